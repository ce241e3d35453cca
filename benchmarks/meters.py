"""What is measured beside the clock: processor time, memory, and lost training.

Owns the processor seconds of a process with its children, the peak of their anonymous and shared
memory, and a training loop that computes and changes the state. Promises that a meter costs the
method nothing while it is timed: memory is sampled in saves of their own. Memory is the sum of
Pss_Anon and Pss_Shmem of /proc/<pid>/smaps_rollup over the process and its descendants: a page that
two of them share counts once, the page cache does not. Knows no method's inside.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.states import State

SAMPLE_SECONDS = 0.004
STEP_SECONDS = 0.03
"""About how long the compute of one training step takes."""
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """Return the processor time of this process, its ended children and its living descendants."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = sum(_seconds_of(pid) for pid in descendants(os.getpid()))
    return time.process_time() + ended.ru_utime + ended.ru_stime + living


def descendants(pid: int) -> list[int]:
    """Return the processes that descend from one, itself apart."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = list(children.get(pid, ()))
    while waiting:
        each = waiting.pop()
        found.append(each)
        waiting += children.get(each, ())
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat behind the name; empty: it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _seconds_of(pid: int) -> float:
    fields = _stat(pid)
    # utime, stime and those of its ended children: fields 14 to 17, counted from 1.
    return sum(map(int, fields[11:15])) / _TICKS if fields else 0.0


def memory_bytes(folder: Path | None = None) -> int:
    """Return what this process and its descendants hold, and the files of a RAM-backed folder."""
    own = os.getpid()
    held = sum(_held_bytes(pid) for pid in (own, *descendants(own)))
    if folder is None:
        return held
    # A file there counts once, whether or not somebody has mapped it.
    mapped = sum(_mapped_bytes(pid, folder) for pid in (own, *descendants(own)))
    return held - mapped + _file_bytes(folder)


def _held_bytes(pid: int) -> int:
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1]) * 1024
    except OSError:
        pass  # it has ended
    return total


def _mapped_bytes(pid: int, folder: Path) -> int:
    """Return what a process holds of the files in a folder by having mapped them."""
    total, within = 0, False
    try:
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):  # a new mapping: addresses, rights, and at its end a path
                within = f" {folder}/" in rest
            elif within and first == "Pss:":
                total += int(rest.split()[0]) * 1024
    except OSError:
        pass
    return total


def _file_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512
    return total


def settled_memory_bytes(folder: Path | None = None) -> int:
    """Return the memory now, garbage collected first."""
    gc.collect()
    return memory_bytes(folder)


class Peak:
    """The largest memory seen by a thread while a block runs."""

    def __init__(self, folder: Path | None = None) -> None:
        self.size_bytes = 0
        self._folder = folder

    @contextlib.contextmanager
    def watch(self) -> Iterator[Peak]:
        """Sample until the block ends."""
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                self.size_bytes = max(self.size_bytes, memory_bytes(self._folder))

        thread = threading.Thread(target=sample, name="memory-peak")
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()
            self.size_bytes = max(self.size_bytes, memory_bytes(self._folder))


class Training:
    """Steps of pure compute, each with a small optimizer step behind it."""

    def __init__(self, state: State, device: str = "cpu") -> None:
        self._state = state
        self._left = torch.randn(384, 384, device=device)
        self._right = torch.randn(384, 384, device=device)
        self._products = 1
        self.compute()  # the first one starts torch's threads
        once = min(self._timed(self.compute) for _ in range(5))
        self._products = max(1, round(STEP_SECONDS / once))

    def compute(self) -> None:
        """Do the work of one forward and backward."""
        for _ in range(self._products):
            torch.mm(self._left, self._right)
        if self._left.is_cuda:
            torch.cuda.synchronize()

    def compute_for(self, seconds: float) -> None:
        """Compute for at least so long."""
        ends = time.perf_counter() + seconds
        while time.perf_counter() < ends:
            self.compute()

    def step(self) -> None:
        """Compute, then change the state."""
        self.compute()
        self._state.change()

    def seconds_of(self, steps: int) -> float:
        """Return how long so many steps take with nothing beside them."""

        def take() -> None:
            for _ in range(steps):
                self.step()

        return self._timed(take)

    def steps_in(self, seconds: float) -> int:
        """Return how many steps fill so many seconds."""
        return max(3, round(seconds / min(self._timed(self.step) for _ in range(3))))

    @staticmethod
    def _timed(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
