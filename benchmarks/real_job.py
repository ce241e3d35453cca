"""The requests of a real gloo job to its rendezvous store, counted from outside with strace.

Owns one comparison: the same phases as `benchmarks.scale`, in processes with a real process group,
where strace sees every byte that any of their threads sends to the store's port. What it saw is
parsed as the proxy parses it, so that both count the same thing. A rank marks where a phase begins
and ends by a write that fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.simulated import SimulatedRank, World
from benchmarks.store_proxy import Framing

_PHASES = ("start", "load", "save", "save", "end", "start", "load", "end")
_NAMES = ("connect", "first load", "first save", "save", "end", "restart", "start", "end again")
_CALL = re.compile(r"^([0-9.]+) (\w+)\((.*)$")
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_STARTED = re.compile(r"^[0-9.]+ clone3?\(.*= ([0-9]+)$", re.MULTILINE)
_PAUSE_SECONDS = 0.3


def count_real_job(ranks: int, node_ranks: int, tensors: int, directory: str) -> None:
    """Run the job under strace and print the requests of its ranks by phase."""
    folder = tempfile.mkdtemp(prefix="holdfast-real-", dir=directory)
    try:
        trace = [
            *("strace", "-ff", "-qq", "-ttt", "-yy", "-xx", "-s", "10000000"),
            *("--seccomp-bpf", "-e", "trace=sendto,write,clone,clone3,fork,vfork"),
            *("-e", "signal=none", "-o", f"{folder}/trace"),
        ]
        job = [sys.executable, "-m", "benchmarks.real_job"]
        job += [str(ranks), str(node_ranks), str(tensors), folder]
        subprocess.run([*trace, *job], check=True)
        _print(_read(Path(folder)), ranks)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _be_job(ranks: int, node_ranks: int, tensors: int, folder: str) -> None:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

    import holdfast.tiers.local.tier  # noqa: F401  # once, before the ranks fork

    with Path(folder, "port").open("w") as stream:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stream.write(str(store.port))
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            status = 1
            with suppress(BaseException):
                _be_rank(rank, World(ranks, node_ranks, tensors, folder, local=True), store.port)
                status = 0
            os._exit(status)
        children.append(child)
    Path(folder, "ranks").write_text(" ".join(map(str, children)))
    if any(os.waitpid(each, 0)[1] for each in children):
        sys.exit("a rank failed")


def _be_rank(rank: int, world: World, port: int) -> None:
    import torch
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

    from holdfast.ranks.channels import Channels

    os.environ["HOLDFAST_NODE"] = f"node{rank // world.node_ranks}"
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world.ranks)

    class RealRank(SimulatedRank):
        def make_channels(self, connect: Any, name: str) -> Channels:
            return Channels(3, world.timeout_seconds, name)

    one = RealRank(rank, world, port)
    for phase, name in zip(_PHASES, _NAMES, strict=True):
        distributed.barrier()
        time.sleep(_PAUSE_SECONDS)
        _mark(f"begin {name}")
        getattr(one, phase)()
        _mark(f"end {name}")
        time.sleep(_PAUSE_SECONDS)


def _mark(text: str) -> None:
    with suppress(OSError):
        os.write(1023, f"phase {text}".encode())


def _read(folder: Path) -> dict[int, dict[str, Counter[str]]]:
    """Return by rank and phase the requests by name."""
    port = (folder / "port").read_text()
    pids = {int(pid): rank for rank, pid in enumerate((folder / "ranks").read_text().split())}
    traces = {int(each.suffix[1:]): each for each in folder.glob("trace.*")}
    owners = dict(pids)
    found: dict[int, dict[str, Counter[str]]] = {}
    for pid, rank in pids.items():  # threads of threads belong to the rank, too
        waiting = [pid]
        while waiting:
            thread = waiting.pop()
            owners[thread] = rank
            waiting += map(int, _STARTED.findall(traces[thread].read_text()))
    sends: dict[int, list[tuple[float, str, bytes]]] = {}
    marks: dict[int, list[tuple[float, str]]] = {}
    for thread, rank in owners.items():
        for line in traces[thread].read_text().splitlines():
            match = _CALL.match(line)
            content = _BYTES.search(line) if match else None
            if match is None or content is None:
                continue
            raw = bytes.fromhex(content[1].replace("\\x", ""))
            if raw.startswith(b"phase "):
                marks.setdefault(rank, []).append((float(match[1]), raw[6:].decode()))
            elif (peers := re.search(rf"<(TCP[^>]*->[^>]*:{port}\])>", match[3])) is not None:
                sends.setdefault(rank, []).append((float(match[1]), peers[1], raw))
    for rank, those in sends.items():
        streams: dict[str, Framing] = {}
        for moment, connection, raw in sorted(those):
            names = streams.setdefault(connection, Framing()).feed(raw)
            if phase := _phase_at(moment, sorted(marks[rank])):
                count = found.setdefault(rank, {}).setdefault(phase, Counter())
                count.update(names)
    return found


def _phase_at(moment: float, marks: list[tuple[float, str]]) -> str | None:
    phase = None
    for when, text in marks:
        if when > moment:
            break
        phase = text.removeprefix("begin ") if text.startswith("begin ") else None
    return phase


def _print(found: dict[int, dict[str, Counter[str]]], ranks: int) -> None:
    print(f"{ranks} real processes, requests to the store as strace saw them")
    print(f"{'':14}{'rank 0':>8}{'others':>8}{'most':>6}")
    for phase in _NAMES:
        totals = [
            sum(
                number
                for name, number in found.get(rank, {}).get(phase, Counter()).items()
                if name not in ("validate", "ping")
            )
            for rank in range(ranks)
        ]
        mean = sum(totals[1:]) / max(ranks - 1, 1)
        print(f"{phase:14}{totals[0]:8}{mean:8.1f}{max(totals[1:] or [0]):6}")


if __name__ == "__main__":
    _be_job(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
