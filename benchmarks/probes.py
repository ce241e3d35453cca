"""The limits of this machine, measured with the size of the state in the same round.

Owns the memory and disk probes: copies by one and two threads between reused, touched memory on
huge pages; new files past the page cache with fsync; the same files read back past the cache, cold;
and read through the cache, warm, into touched memory; and what a recovery can at best be. Promises
plain libc and system calls: torch for the copy from an accelerator and between ranks alone. Where
O_DIRECT is refused it says so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

BLOCK_BYTES = 8 << 20
PIECE_BYTES = 1 << 20
PAGE_BYTES = 4096
_LIBC = ctypes.CDLL(None)
_LIBC.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_LIBC.memcpy.restype = ctypes.c_void_p

LABELS = {
    "memcpy_1": "memory to memory, 1 thread",
    "memcpy_2": "memory to memory, 2 threads",
    "write_direct": "O_DIRECT write of a new file, fsync",
    "read_direct_cold": "O_DIRECT read, cold",
    "read_warm": "buffered read, warm",
    "pinned_d2h": "accelerator to pinned memory",
}


class Memory:
    """Touched anonymous memory, on huge pages where the kernel gives them."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._map = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        pattern = os.urandom(1 << 20)
        for start in range(0, size_bytes, len(pattern)):
            piece = min(len(pattern), size_bytes - start)
            self.view[start : start + piece] = pattern[:piece]


def copy_seconds(target: Memory, source: Memory, threads: int) -> float:
    """Copy all of the source with so many threads, started beforehand."""
    size = source.size_bytes
    bounds = [size * number // threads for number in range(threads + 1)]
    gate = threading.Barrier(threads)

    def copy(number: int) -> None:
        start, end = bounds[number], bounds[number + 1]
        gate.wait()
        _LIBC.memcpy(target.address + start, source.address + start, end - start)

    helpers = [threading.Thread(target=copy, args=(number,)) for number in range(1, threads)]
    for each in helpers:
        each.start()
    time.sleep(0.002 * len(helpers))  # all wait at the gate by then: the start is not measured
    began = time.perf_counter()
    copy(0)
    for each in helpers:
        each.join()
    return time.perf_counter() - began


def write_seconds(path: Path, source: Memory, *, direct: bool) -> float:
    """Write a new file of the source's bytes and sync it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    began = time.perf_counter()
    descriptor = os.open(path, flags, 0o600)
    for start in range(0, source.size_bytes, BLOCK_BYTES):
        piece = source.view[start : start + BLOCK_BYTES]
        while piece:
            piece = piece[os.write(descriptor, piece) :]
    os.fsync(descriptor)
    os.close(descriptor)
    return time.perf_counter() - began


def read_seconds(path: Path, target: Memory, *, direct: bool) -> float:
    """Read a whole file into touched memory."""
    began = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    for start in range(0, target.size_bytes, BLOCK_BYTES):
        piece = target.view[start : start + BLOCK_BYTES]
        offset = start
        while piece:
            got = os.preadv(descriptor, [piece], offset)
            if got == 0:
                raise OSError(f"{path} ends at {offset}, expected {target.size_bytes} bytes")
            piece, offset = piece[got:], offset + got
    os.close(descriptor)
    return time.perf_counter() - began


def drop_caches(folder: Path) -> str:
    """Make the files under a folder cold, and say by which means."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "drop_caches"
    except OSError:
        for path in _files(folder):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return "posix_fadvise(DONTNEED): not root, so what other processes read may stay cached"


def warm_up(folder: Path) -> None:
    """Read every file under a folder into the page cache."""
    block = memoryview(bytearray(BLOCK_BYTES))
    for path in _files(folder):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass


def sync_tree(folder: Path) -> None:
    """Sync every file and folder: what a method that never syncs needs to be durable."""
    places = [folder, *folder.rglob("*")] if folder.is_dir() else [folder]
    for place in [*places, folder.parent]:
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def takes_direct(folder: Path) -> bool:
    """Say whether the file system takes O_DIRECT."""
    path = folder / "direct"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def measure(size_bytes: int, folder: Path, repeats: int, device: str = "cpu") -> dict[str, Any]:
    """Return the seconds of every probe, `repeats` times each, and notes."""
    size_bytes = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
    source, target = Memory(size_bytes), Memory(size_bytes)
    direct = takes_direct(folder)
    samples: dict[str, list[float]] = {name: [] for name in LABELS if name != "pinned_d2h"}
    how = ""

    def add(name: str, probe: Callable[[], float]) -> None:
        samples[name].append(probe())

    copy_seconds(target, source, 1)
    copy_seconds(target, source, 2)
    for number in range(repeats):
        path = folder / f"probe_{number}"
        add("memcpy_1", lambda: copy_seconds(target, source, 1))
        add("memcpy_2", lambda: copy_seconds(target, source, 2))
        os.sync()
        add("write_direct", lambda: write_seconds(path, source, direct=direct))  # noqa: B023
        how = drop_caches(folder)
        add("read_direct_cold", lambda: read_seconds(path, target, direct=direct))  # noqa: B023
        warm_up(path.parent)
        add("read_warm", lambda: read_seconds(path, target, direct=False))  # noqa: B023
        path.unlink()
    if device != "cpu":
        samples["pinned_d2h"] = _pinned_copies(size_bytes, repeats, device)
    notes = [] if direct else [f"{folder} refuses O_DIRECT: its probes are buffered, then synced"]
    return {"samples": samples, "facts": {"size_bytes": size_bytes, "cold": how, "notes": notes}}


Measure = Callable[[Callable[[], None]], float]
"""Seconds; it is given what brings the ranks together."""


def copying(size_bytes: int, folder: Path) -> Measure:
    """Return what copies so many bytes once, with one thread, on all ranks at a time."""
    source, target = Memory(size_bytes), Memory(size_bytes)

    def measure(barrier: Callable[[], None]) -> float:
        barrier()
        return copy_seconds(target, source, 1)

    return measure


def reading(size_bytes: int, folder: Path) -> Measure:
    """Return what reads so many bytes of a file under `folder`, by two threads, on all ranks.

    Each piece is digested while it is in a cache: the least that a load does which verifies.
    """
    read = _reader(size_bytes, folder)

    def measure(barrier: Callable[[], None]) -> float:
        barrier()
        began = time.perf_counter()
        read()
        return time.perf_counter() - began

    return measure


def transferring(size_bytes: int, folder: Path, *, beside: bool = False) -> Measure:
    """Return what sends so many bytes from rank 0 to rank 1 as gloo does it best: in one message.

    Over a group of its own, from and into touched memory. `beside`: while rank 0 reads as many, as
    it does whose peer has lost its shard.
    """
    import torch
    from torch import distributed

    group = distributed.new_group(backend="gloo")
    rank = distributed.get_rank()
    content = torch.full((size_bytes,), rank, dtype=torch.uint8)
    read = _reader(size_bytes, folder) if beside and rank == 0 else None

    def measure(barrier: Callable[[], None]) -> float:
        barrier()
        began = time.perf_counter()
        reader = threading.Thread(target=read)
        reader.start()
        if rank == 0:
            distributed.send(content, 1, group=group)
        elif rank == 1:
            distributed.recv(content, 0, group=group)
        reader.join()
        return time.perf_counter() - began

    return measure


LIMITS_OF_RECOVERY: dict[str, dict[str, Callable[[int, Path], Measure]]] = {
    "own": {"raw_copy": copying, "raw_read": reading},
    "peer": {"raw_transfer": transferring, "busy_transfer": partial(transferring, beside=True)},
}
"""By what was lost: its limits, by name, and what makes the measure of each."""


def _reader(size_bytes: int, folder: Path) -> Callable[[], None]:
    """Return what reads a new file, without a name any more, into touched memory."""
    target = Memory(size_bytes)
    descriptor, name = tempfile.mkstemp(dir=folder)  # open until the process ends
    os.unlink(name)
    for start in range(0, size_bytes, PIECE_BYTES):
        os.pwrite(descriptor, target.view[start : start + PIECE_BYTES], start)

    def read(start: int, end: int) -> None:
        for position in range(start, end, PIECE_BYTES):
            piece = target.view[position : min(position + PIECE_BYTES, end)]
            os.preadv(descriptor, [piece], position)
            xxhash.xxh3_128_digest(piece)

    def read_all() -> None:
        middle = size_bytes // 2
        helper = threading.Thread(target=read, args=(middle, size_bytes))
        helper.start()
        read(0, middle)
        helper.join()

    return read_all


def _pinned_copies(size_bytes: int, repeats: int, device: str) -> list[float]:
    import torch

    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    seconds = []
    for _ in range(repeats + 1):
        torch.accelerator.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    return sorted(each for each in folder.rglob("*") if each.is_file())
