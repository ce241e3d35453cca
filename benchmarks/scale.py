"""What agreeing costs as a job grows: requests, bytes and seconds of simulated ranks.

Owns the runs, the table and the fit. N simulated ranks (`benchmarks.simulated`) run whole managers
over one real TCPStore server. Requests and bytes are counted at the server's door, by a proxy that
parses the store's framing (`benchmarks.store_proxy`). Opened files are counted by node. Seconds are
of a run of its own without that proxy, or with `--delay` through one that holds each request, those
of different clients at the same time. Whole managers of thousands of ranks would take the cores of
this one machine for minutes: above `--whole` ranks only their exchanges are done, with the values
of the largest smaller job.
Beside them `--real` counts the requests of a real gloo job of so many processes from outside,
with strace.

    python -m benchmarks.scale --ranks 64 256 1024
    python -m benchmarks.scale --ranks 4096 --count no --delay 0.0001
    python -m benchmarks.scale --real 16
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.real_job import count_real_job
from benchmarks.simulated import Report, World, remove, serve_ranks
from benchmarks.store_proxy import Count, serve_proxy

_PHASES: list[tuple[str, list[tuple[str, dict[str, Any]]], bool]] = [
    ("connect", [("start", {})], False),
    ("first load", [("load", {})], False),
    ("first save", [("save", {})], False),
    ("save", [("save", {})], True),
    ("end", [("end", {})], False),
    ("restart", [("start", {})], False),
    ("start", [("load", {})], True),
    ("end again", [("end", {})], False),
]
"""Name, what each rank does, and whether its exchanges are measured again without work."""
_ELASTIC: list[tuple[str, list[tuple[str, dict[str, Any]]], bool]] = [
    ("connect half", [("start", {})], False),
    ("start by half", [("load", {})], False),
]
"""Likewise, by half as many ranks, from the persistent tier."""


@dataclass
class Figure:
    """One phase at one number of ranks."""

    ranks: int
    phase: str
    seconds: float
    cpu_seconds: float
    exchanges: dict[str, int] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)
    rank0_requests: float = math.nan
    requests_per_rank: float = math.nan
    """The mean over the others."""
    rank0_sent: float = math.nan
    rank0_received: float = math.nan
    sent_per_rank: float = math.nan
    received_per_rank: float = math.nan
    kinds: dict[str, float] = field(default_factory=dict)
    agreeing_seconds: float = math.nan
    """Of the same exchanges without work between them."""
    metadata_opens: float = math.nan
    """The most that the ranks of one node opened a `.metadata`."""
    shard_opens: float = math.nan
    """Likewise of any shard file, by ranks that read its index or tensors."""


def serve_store(pipe: Any) -> None:
    """Be the process of the store's server."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while pipe.poll(None):
        try:
            pipe.recv()
        except EOFError:
            return


class Cluster:
    """A store, perhaps a proxy, and processes of ranks; rank 0 has one of its own."""

    def __init__(
        self, world: World, processes: int, *, proxied: bool, delay_seconds: float = 0.0
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.simulated"])
        self.world = world
        self._ends: list[Any] = []
        self._processes: list[Any] = []
        self._proxies: list[Any] = []

        def launch(target: Any, *arguments: Any) -> Any:
            mine, theirs = context.Pipe()
            process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(mine)
            self._processes.append(process)
            return mine

        port = launch(serve_store).recv()
        ports = [port, port]
        if proxied:
            proxy = launch(serve_proxy, ("127.0.0.1", port), delay_seconds)
            ports = proxy.recv()
            self._proxies = [proxy]
        others = list(range(1, world.ranks))
        shares = [[0], *(others[at::processes] for at in range(processes))]
        self._workers = [
            launch(serve_ranks, share, world, ports[min(number, 1)])
            for number, share in enumerate(shares)
            if share
        ]
        for each in self._workers:
            each.recv()

    def run(self, name: str, **arguments: Any) -> list[Report]:
        """Let every rank do something; return what each process says of it."""
        for each in self._workers:
            each.send((name, arguments))
        reports = [each.recv() for each in self._workers]
        if problems := [each.error for each in reports if each.error]:
            sys.exit(f"{name} failed: {problems[0]}")
        return reports

    def notes(self) -> list[Any]:
        """Return what rank 0 and one other rank have noted, by channel."""
        for each in self._workers[:2]:
            each.send(("notes", {}))
        return [each.recv() for each in self._workers[:2]]

    def opened(self) -> Counter[tuple[str, str]]:
        """Return how often each node has opened each file of a checkpoint since the last look."""
        for each in self._workers:
            each.send(("opened", {}))
        return sum((Counter(each.recv()) for each in self._workers), Counter())

    def counts(self) -> list[Count]:
        """Return what passed since the last look: rank 0's, and the others' together."""
        for each in self._proxies:
            each.send("counts")
        found = [each.recv() for each in self._proxies]
        return found[0] if found else []

    def close(self) -> None:
        """End every process."""
        for each in self._ends:
            each.close()
        for each in self._processes:
            each.join(5)
            if each.is_alive():
                each.kill()
                each.join()


Notes = dict[str, list[Any]]
"""By phase: the exchanges of rank 0 and of another rank."""


def measure(
    world: World, processes: int, notes: Notes, *, proxied: bool, delay_seconds: float
) -> list[Figure]:
    """Run every phase once, and note the exchanges of those that are measured again."""
    figures = []
    with ExitStack() as opened:
        opened.callback(remove, world.directory)
        cluster = Cluster(world, processes, proxied=proxied, delay_seconds=delay_seconds)
        opened.callback(cluster.close)
        for phase, steps, again in _PHASES + _ELASTIC * (world.ranks % 2 == 0):
            if phase == "connect half":
                cluster.close()
                world = replace(world, ranks=world.ranks // 2, rows=2 * world.rows, local=False)
                cluster = Cluster(world, processes, proxied=proxied, delay_seconds=delay_seconds)
                opened.callback(cluster.close)
            if phase not in ("connect", "restart", "connect half"):
                cluster.run("forget")
            cluster.counts()
            cluster.opened()
            reports = [report for step in steps for report in cluster.run(step[0], **step[1])]
            figure = Figure(
                world.ranks,
                phase,
                max(each.ended for each in reports) - min(each.began for each in reports),
                sum(each.cpu_seconds for each in reports),
                reports[0].exchanges,
                reports[0].details,
            )
            if counts := cluster.counts():
                _note_counts(figure, counts, world.ranks)
            for (_, name), times in cluster.opened().items():
                kind = "metadata_opens" if name == ".metadata" else "shard_opens"
                if name == ".metadata" or name.endswith(".distcp"):
                    setattr(figure, kind, max(times, getattr(figure, kind)))
            if again:
                notes[phase] = cluster.notes()
                figure.agreeing_seconds = _replay(cluster)
            figures.append(figure)
            print(f"  {world.ranks} ranks, {phase}: {figure.seconds:.2f} s", file=sys.stderr)
    return figures


def measure_again(
    world: World, processes: int, notes: Notes, *, proxied: bool, delay_seconds: float
) -> list[Figure]:
    """Do only the exchanges that a smaller job has noted, with its values."""
    figures = []
    with ExitStack() as opened:
        opened.callback(remove, world.directory)
        cluster = Cluster(world, processes, proxied=proxied, delay_seconds=delay_seconds)
        opened.callback(cluster.close)
        cluster.run("start")
        for phase, (first, others) in notes.items():
            cluster.run("adopt", first=first, others=others)
            cluster.counts()
            figure = Figure(world.ranks, phase, math.nan, math.nan)
            figure.agreeing_seconds = _replay(cluster)
            if counts := cluster.counts():
                _note_counts(figure, counts, world.ranks)
            for kind, *_ in (note for channel in first for note in channel):
                figure.exchanges[kind] = figure.exchanges.get(kind, 0) + 1
            figures.append(figure)
            print(
                f"  {world.ranks} ranks, {phase}: {figure.agreeing_seconds:.2f} s", file=sys.stderr
            )
    return figures


def _replay(cluster: Cluster) -> float:
    reports = cluster.run("replay")
    return max(each.ended for each in reports) - min(each.began for each in reports)


def _note_counts(figure: Figure, counts: Sequence[Count], ranks: int) -> None:
    first, rest = counts
    others = max(ranks - 1, 1)
    figure.rank0_requests, figure.requests_per_rank = first.total, rest.total / others
    figure.rank0_sent, figure.rank0_received = first.sent_bytes, first.received_bytes
    figure.sent_per_rank = rest.sent_bytes / others
    figure.received_per_rank = rest.received_bytes / others
    figure.kinds = {name: each / others for name, each in sorted(rest.requests.items())}


def growth(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent of the power of N that fits best."""
    points = [(math.log(n), math.log(v)) for n, v in zip(sizes, values, strict=True) if v > 0 < n]
    if len(points) < 2:
        return math.nan
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    over = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / over if over else math.nan


def print_table(figures: Sequence[Figure]) -> None:
    """Print every phase, and how its figures grow with the ranks."""
    columns: tuple[tuple[str, Callable[[Figure], float], str], ...] = (
        ("exchanges", lambda each: sum(each.exchanges.values()), "10.0f"),
        ("req/rank", lambda each: each.requests_per_rank, "9.1f"),
        ("req rank 0", lambda each: each.rank0_requests, "11.0f"),
        ("B sent", lambda each: each.sent_per_rank, "9.0f"),
        ("B received", lambda each: each.received_per_rank, "11.0f"),
        ("B rcvd 0", lambda each: each.rank0_received, "11.0f"),
        (".metadata", lambda each: each.metadata_opens, "10.0f"),
        ("shards", lambda each: each.shard_opens, "7.0f"),
        ("agreeing s", lambda each: each.agreeing_seconds, "11.3f"),
        ("whole s", lambda each: each.seconds, "9.2f"),
        ("CPU s", lambda each: each.cpu_seconds, "8.2f"),
    )
    for phase in dict.fromkeys(each.phase for each in figures):
        rows = [each for each in figures if each.phase == phase]
        print(f"\n{phase}")
        print(f"{'ranks':>7}" + "".join(f"{name:>{_width(form)}}" for name, _, form in columns))
        for row in rows:
            print(f"{row.ranks:7}" + "".join(f"{get(row):{form}}" for _, get, form in columns))
        if len(rows) > 1:
            sizes = [each.ranks for each in rows]
            powers = [growth(sizes, [get(each) for each in rows]) for _, get, _ in columns]
            shown = "".join(
                f"{power:{_width(form)}.2f}"
                for power, (_, _, form) in zip(powers, columns, strict=True)
            )
            print(f"{'N^':>7}{shown}")


def _width(form: str) -> int:
    return int(form.partition(".")[0])


def main() -> None:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--node-ranks", type=int, default=8)
    parser.add_argument("--tensors", type=int, default=2, help="parameters; AdamW keeps two more")
    parser.add_argument("--processes", type=int, default=4, help="for all ranks but rank 0")
    parser.add_argument("--no-local", action="store_true", help="the persistent tier alone")
    parser.add_argument(
        "--whole", type=int, default=512, help="above it only exchanges, with values of fewer ranks"
    )
    parser.add_argument("--count", choices=["yes", "no"], default="yes")
    parser.add_argument("--time", choices=["yes", "no"], default="yes")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds per request")
    parser.add_argument("--directory", default="/dev/shm")  # noqa: S108  # sizes, not secrets
    parser.add_argument("--real", type=int, help="count a real gloo job of so many processes")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    parsed = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limit in (1 << 17, most):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, most)))
            break
        except (ValueError, OSError):
            continue
    if parsed.real:
        count_real_job(parsed.real, parsed.node_ranks, parsed.tensors, parsed.directory)
        return
    figures: list[Figure] = []
    notes: Notes = {}
    for ranks in sorted(parsed.ranks):
        merged: dict[str, Figure] = {}
        for proxied in (True, False):
            if (parsed.count if proxied else parsed.time) == "no":
                continue
            folder = tempfile.mkdtemp(prefix="holdfast-scale-", dir=parsed.directory)
            world = World(
                ranks, parsed.node_ranks, parsed.tensors, folder, local=not parsed.no_local
            )
            delayed = not proxied and parsed.delay > 0
            run = measure if ranks <= parsed.whole or not notes else measure_again
            for each in run(
                world,
                parsed.processes,
                notes,
                proxied=proxied or delayed,
                delay_seconds=parsed.delay if delayed else 0.0,
            ):
                if (known := merged.setdefault(each.phase, each)) is not each:
                    known.seconds, known.cpu_seconds = each.seconds, each.cpu_seconds
                    known.agreeing_seconds = each.agreeing_seconds
        figures += merged.values()
        if parsed.json:  # what is known, should a larger job not end
            parsed.json.write_text(json.dumps([asdict(each) for each in figures], indent=1))
    print(
        f"\n{parsed.tensors} parameters, nodes of {parsed.node_ranks}, "
        f"{parsed.delay * 1e6:.0f} us per request, {time.strftime('%Y-%m-%d')}"
    )
    print_table(figures)


if __name__ == "__main__":
    main()
