"""Runs the measurements: a fresh process per method and round, the methods taking turns.

Owns starting a measurement as one process per rank, as torchrun would, its deadline, and merging
what the ranks and rounds returned. Promises the same environment for every method, that a method
that fails or hangs costs its own row only, and that nothing is left behind on disk. Knows no method
and draws nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.worker import Order

ROOT = Path(__file__).parents[1]
PROBES = "probes"
FORMAT = 1
SUMMED = ("cpu",)
"""Quantities of several ranks that add up; of all others the largest of the ranks counts."""
SHOWN_CHARACTERS = 2000


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured, and where."""

    saves: int
    loads: int
    lost: int
    quick: bool
    directory: Path
    memory_directory: Path
    """RAM-backed, for methods of the local tier."""
    omp_wait_policy: str = "default"
    """`default`: torch's own; otherwise the value that every method gets."""
    timeout_seconds: float = 600.0
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Task:
    """A state, with how many ranks it needs and the methods to measure on it."""

    state: str
    ranks: int
    rounds: int
    methods: Sequence[str]
    in_memory: bool = False
    """Whether they write to the RAM-backed folder."""


def run(
    tasks: Sequence[Task],
    settings: Settings,
    tell: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure everything and return the processes, the samples, and what was skipped and why.

    `tell` gets progress messages; `keep` gets the result so far after each process.
    """
    processes: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    given_up: set[tuple[str, str]] = set()
    for task in tasks:
        for number in range(1, task.rounds + 1):
            for method in (PROBES, *task.methods):
                if (task.state, method) in given_up:
                    continue
                tell(f"{task.state}, round {number} of {task.rounds}: {method}")
                began = time.monotonic()
                measured = _measure(task, method, settings)
                measured |= {
                    "state": task.state,
                    "method": method,
                    "round": number,
                    "seconds": round(time.monotonic() - began, 1),
                }
                processes.append(measured)
                for reason in ("skipped", "failed"):
                    if reason in measured:
                        given_up.add((task.state, method))
                        tell(f"  {reason}: {measured[reason]}")
                for each in measured.get("mismatches", ()):
                    tell(f"  MISMATCH: {method}: {each}")
                result = {"processes": processes, **gather(processes)}
                keep(result)
    return result


def gather(processes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the processes of all rounds: samples and facts per state and method, and the rest."""
    samples: dict[str, dict[str, dict[str, list[float]]]] = {}
    facts: dict[str, dict[str, dict[str, Any]]] = {}
    skipped: dict[str, dict[str, str]] = {}
    mismatches: list[dict[str, str]] = []
    for each in processes:
        state, method = each["state"], each["method"]
        reason = each.get("skipped") or each.get("failed")
        if reason:
            skipped.setdefault(state, {})[method] = reason
        for name, values in each.get("samples", {}).items():
            row = samples.setdefault(state, {}).setdefault(method, {})
            row.setdefault(name, []).extend(values)
        if "facts" in each:
            facts.setdefault(state, {})[method] = each["facts"]
        mismatches += [
            {"state": state, "method": method, "what": what} for what in each.get("mismatches", ())
        ]
    return {"samples": samples, "facts": facts, "skipped": skipped, "mismatches": mismatches}


def merge_ranks(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the results of the ranks of one measurement into one."""
    for word in ("failed", "skipped"):
        reasons = [each[word] for each in results if word in each]
        if reasons:
            return {word: reasons[0]}
    first, ranks = results[0], len(results)
    samples = {}
    for name in first["samples"]:
        columns = list(zip(*(each["samples"][name] for each in results), strict=True))
        if name in SUMMED:
            samples[name] = [sum(column) for column in columns]
        else:
            samples[name] = [max(column) for column in columns]
    mismatches = [
        f"rank {rank}: {what}" if ranks > 1 else what
        for rank, each in enumerate(results)
        for what in each.get("mismatches", ())
    ]
    return {"samples": samples, "facts": first["facts"], "mismatches": mismatches}


def _measure(task: Task, method: str, settings: Settings) -> dict[str, Any]:
    """Run one method once, one process per rank, in a folder of its own."""
    parent = settings.memory_directory if task.in_memory else settings.directory
    # The probes of a state with several ranks are one process: the limit is the machine's.
    ranks = 1 if method == PROBES else task.ranks
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=parent) as name:
        folder = Path(name, "files")
        folder.mkdir()
        order = Order(
            method,
            task.state,
            str(folder),
            settings.quick,
            settings.saves,
            settings.loads,
            settings.lost,
            settings.device,
        )
        try:
            return _run_ranks(order, ranks, Path(name), settings)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()


def _run_ranks(order: Order, ranks: int, scratch: Path, settings: Settings) -> dict[str, Any]:
    shared = environment(settings.omp_wait_policy, ranks)
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    started: list[subprocess.Popen[bytes]] = []
    outputs = [scratch / f"output_{rank}" for rank in range(ranks)]
    results = [scratch / f"result_{rank}.json" for rank in range(ranks)]
    try:
        for rank in range(ranks):
            with outputs[rank].open("wb") as stream:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.worker", order.to_json(), results[rank]],
                        cwd=ROOT,
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        late = _wait(started, settings.timeout_seconds)
    finally:
        for each in started:
            _end(each)
    reports = [json.loads(each.read_text()) for each in results if each.exists()]
    if late and not any("failed" in each for each in reports):
        return {"failed": f"did not end within {settings.timeout_seconds:g} s"}
    if len(reports) < ranks and not any("failed" in each for each in reports):
        shown = outputs[0].read_text(errors="replace")[-SHOWN_CHARACTERS:].strip()
        return {"failed": f"ended without a result: {shown}"}
    merged = merge_ranks(reports)
    if "failed" in merged:
        ends = [each.read_text(errors="replace")[-SHOWN_CHARACTERS:] for each in outputs]
        merged["output"] = "\n".join(ends)
    return merged


def environment(omp_wait_policy: str, ranks: int) -> dict[str, str]:
    """Return what every process of every method sees."""
    values = dict(os.environ)
    for name in ("OMP_WAIT_POLICY", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        values.pop(name, None)
    if omp_wait_policy != "default":
        values["OMP_WAIT_POLICY"] = omp_wait_policy
    if ranks > 1:
        values["OMP_NUM_THREADS"] = "1"  # torchrun's own default
    paths = [str(ROOT / "src"), str(ROOT), *values.get("PYTHONPATH", "").split(os.pathsep)]
    values["PYTHONPATH"] = os.pathsep.join(each for each in paths if each)
    values["WORLD_SIZE"] = values["LOCAL_WORLD_SIZE"] = str(ranks)
    return values


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_seconds: float) -> bool:
    """Wait for all, or for the first failure; say whether time ran out."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        codes = [each.poll() for each in processes]
        if all(code is not None for code in codes):
            return False
        if any(code not in (None, 0) for code in codes):
            return False  # the others would wait for it
        time.sleep(0.05)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started: each leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
