"""holdfast beside its peers and beside the limits of the machine.

Owns the command line: which states, methods and rounds; where the report, the table and the charts
go. A run writes one JSON report and one PNG per state, and prints the tables and the bars. Nothing
is asserted: machines differ.

    python -m benchmarks --quick
    python -m benchmarks --states 1gib,tiny --rounds 5 --peers dcp-async,safetensors
    python -m benchmarks --report runs/bench/2026-11-20-1830.json
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import bars, chart, harness, machine, report
from benchmarks.method import Method
from benchmarks.registry import METHODS
from benchmarks.shapes import RECIPES, Recipe, whole_bytes

ALL_OURS = (
    "holdfast",
    "holdfast-overlapped",
    "holdfast-sync",
    "holdfast-local",
    "holdfast-local-2",
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is measured on a state unless the command line says otherwise."""

    rounds: int
    ours: tuple[str, ...]
    peers: tuple[str, ...]


UNASKED = {
    "1gib": Choice(2, ALL_OURS, ("safetensors", "dcp-save", "dcp-async", "nvrx")),
    "tiny": Choice(1, ("holdfast",), ("torch-save", "dcp-async")),
    "ddp": Choice(1, ("holdfast",), ("dcp-async",)),
}
"""Measured without arguments, in about ten minutes."""
OTHERWISE = Choice(2, ALL_OURS, ("dcp-save", "dcp-async"))
IN_MEMORY = Choice(2, ALL_OURS, ("nvrx-local", "nvrx-local-sync"))


def main() -> None:
    """Measure, or show a report that was measured before."""
    parsed = _parse(sys.argv[1:])
    if parsed.list:
        _print_methods()
    elif parsed.report:
        _show(json.loads(parsed.report.read_text()), parsed.report)
    else:
        _measure(parsed)


def _measure(parsed: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and files go too
    settings = _settings(parsed)
    tasks = _tasks(parsed, settings)
    described = _describe(tasks, settings)
    stamp = datetime.datetime.now().astimezone().strftime("%Y-%m-%d-%H%M%S")
    path = parsed.output / f"{stamp}{'-quick' if settings.quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(result: dict[str, Any]) -> None:
        document = described | result
        document["bars"] = [each.to_dict() for each in bars.judge(document)]
        path.write_text(json.dumps(document, indent=1))

    try:
        harness.run(tasks, settings, _tell, keep)
    except KeyboardInterrupt:
        _tell("interrupted; this is what there is so far")
    if path.exists():
        _show(json.loads(path.read_text()), path)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--states", help=f"names as --list shows them; default {','.join(UNASKED)}")
    add("--peers", help="names as --list shows them, `all` or `none`; default: a choice per state")
    add("--ours", help="some of holdfast's own methods; default: a choice per state")
    add("--rounds", type=int, help="fresh processes per method; default: 1 or 2 per state")
    add("--saves", type=int, help="timed saves per process; default 3")
    add("--quick", action="store_true", help="small states, one round: to see that it runs")
    add("--directory", type=Path, help="where to write; default: the folder of temporary files")
    add("--memory-directory", type=Path, default=Path("/dev", "shm"), help="for the local tier")
    add("--omp-wait-policy", choices=("default", "passive", "active"), default="default",
        help="for every method alike; default: leave it to torch")  # fmt: skip
    add("--device", default="cpu", help="where the state lies: cpu or cuda")
    add("--timeout", type=float, default=900, metavar="SECONDS", help="for one process")
    add("--output", type=Path, default=Path("runs/bench"), help="a folder for JSON and PNG")
    add("--report", type=Path, help="show this report again; measure nothing")
    add("--list", action="store_true", help="list the states and the methods")
    return parser.parse_args(arguments)


def _settings(parsed: argparse.Namespace) -> harness.Settings:
    return harness.Settings(
        saves=parsed.saves or (2 if parsed.quick else 3),
        loads=1 if parsed.quick else 2,
        lost=1,
        quick=parsed.quick,
        directory=parsed.directory or Path(tempfile.gettempdir()),
        memory_directory=parsed.memory_directory,
        omp_wait_policy=parsed.omp_wait_policy,
        timeout_seconds=parsed.timeout,
        device=parsed.device,
    )


def _tasks(parsed: argparse.Namespace, settings: harness.Settings) -> list[harness.Task]:
    names = parsed.states.split(",") if parsed.states else [*UNASKED]
    _refuse_unknown("state", names, RECIPES)
    everyone = [each.name for each in METHODS.values() if not each.ours]
    tasks = []
    for name in names:
        recipe = RECIPES[name]
        unasked = IN_MEMORY if recipe.in_memory else UNASKED.get(name, OTHERWISE)
        peers = everyone if parsed.peers == "all" else _chosen(parsed.peers, [*unasked.peers])
        wanted = [*_chosen(parsed.ours, [*unasked.ours]), *peers]
        _refuse_unknown("method", wanted, METHODS)
        chosen = [each for each in wanted if _suits(METHODS[each], recipe)]
        rounds = parsed.rounds or (1 if parsed.quick else unasked.rounds)
        tasks.append(harness.Task(name, recipe.ranks, rounds, chosen, recipe.in_memory))
        kept = 3  # the newest, the one before until it is removed, and room to breathe
        where = settings.memory_directory if recipe.in_memory else settings.directory
        _refuse_full(where, kept * whole_bytes(recipe, quick=settings.quick))
    return tasks


def _suits(method: type[Method], recipe: Recipe) -> bool:
    """Say whether a method can save a state at all."""
    if method.local != recipe.in_memory or recipe.ranks < method.fewest_ranks:
        return False
    return method.many_ranks or recipe.ranks == 1


def _chosen(text: str | None, default: list[str]) -> list[str]:
    if text is None:
        return default
    return [] if text in ("", "none") else text.split(",")


def _refuse_unknown(kind: str, names: list[str], known: dict[str, Any]) -> None:
    if unknown := [each for each in names if each not in known]:
        sys.exit(f"no {kind} {', '.join(unknown)}; there are {', '.join(known)}")


def _refuse_full(directory: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        sys.exit(
            f"{directory} has {free / 2**30:.1f} GiB free and a method needs "
            f"{needed_bytes / 2**30:.1f} GiB; name another with --directory"
        )


def _describe(tasks: list[harness.Task], settings: harness.Settings) -> dict[str, Any]:
    used = dict.fromkeys(name for task in tasks for name in task.methods)
    folders = {"disk": settings.directory, "memory": settings.memory_directory}
    return {
        "format": harness.FORMAT,
        "machine": machine.describe(folders),
        "load_average_before": machine.load_average(),
        "settings": {
            "saves": settings.saves,
            "loads": settings.loads,
            "quick": settings.quick,
            "OMP_WAIT_POLICY": settings.omp_wait_policy,
            "device": settings.device,
        },
        "states": {
            task.state: {
                "label": RECIPES[task.state].label,
                "ranks": task.ranks,
                "rounds": task.rounds,
                "size_bytes": whole_bytes(RECIPES[task.state], quick=settings.quick),
            }
            for task in tasks
        },
        "methods": {name: _about(METHODS[name]) for name in used},
    }


def _about(method: type[Method]) -> dict[str, Any]:
    return {
        "label": method.label,
        "ours": method.ours,
        "asynchronous": method.asynchronous,
        "copies": method.copies,
        "durability": method.durability,
        "note": method.note,
    }


def _show(document: dict[str, Any], path: Path) -> None:
    print(report.render(document))
    print(f"report: {path}")
    for line in chart.draw(document, path):
        print(line)


def _print_methods() -> None:
    for recipe in RECIPES.values():
        print(f"{recipe.name:<20} {recipe.label}")
    print()
    for each in METHODS.values():
        kind = "asynchronous" if each.asynchronous else "synchronous"
        print(f"{each.name:<20} {each.label:<26} {kind:<13} {each.durability}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
