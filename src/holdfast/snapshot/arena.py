"""Host memory for a snapshot, laid out as the shard file that it becomes.

Owns how that memory is requested from the kernel (page-aligned, in huge pages where available, also
for files in RAM, populated at once, page-locked for copies from a GPU, and not inherited by forked
children: a data loader's workers would otherwise make every page copy-on-write) and the views into
it that staging fills. Headers and trailers are written once; a save copies payloads between them.
Promises that the bytes of the arena are the bytes of the file, that the steady state allocates
nothing, and that a size which exceeds what the machine or the container has left is an error with
the numbers, also when all ranks of a node allocate at the same time. `StreamedShard` is the same
file without an arena. Knows no files and no other rank.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from holdfast.caller import in_normal_mode
from holdfast.errors import NotEnoughMemoryError
from holdfast.format.items import Source
from holdfast.format.layout import Layout
from holdfast.messages import describe_size
from holdfast.snapshot.copy import Copying, bytes_of
from holdfast.storage.digests import BLOCK_BYTES, footer_size

logger = logging.getLogger(__name__)

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, since Linux 5.14; Python does not name it."""
_COLLAPSE = 25
"""MADV_COLLAPSE, since Linux 6.1; Python does not name it either."""
_FIXED = 0x10
"""MAP_FIXED, which Python does not name either."""
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_CHECKED_BYTES = 64 << 20
"""Smaller sizes are allocated without a check."""
_SHARED = Path("/dev/shm")  # noqa: S108  # only for our lock file, never followed as a link
"""A directory that exactly the processes of one node share."""
_POLL_SECONDS = 0.01
_PAGE_BYTES = mmap.PAGESIZE
_STRETCH_BYTES = 64 << 20
"""Written in one call: the disk stays busy while the next stretch is prepared."""
_STREAM_BUFFERS = 3
"""One is being filled, one digested and written, and one was just finished."""


@dataclass(frozen=True)
class Room:
    """How much memory is free, and what limits it."""

    free_bytes: int
    limited_by: str


@dataclass(frozen=True)
class Node:
    """The machine or container whose memory is allocated, shared with other processes."""

    find_room: Callable[[], Room | None]
    lock: Path
    """A file that the processes of one node lock while they allocate. Its content is unused."""
    processes: int | None
    """How many may allocate at the same time. None: unknown."""
    patience_seconds: float = 60.0
    """How long to wait for a process that does not release the lock."""

    @classmethod
    def here(cls) -> Node:
        """Return the node of this process."""
        directory = _SHARED if _SHARED.is_dir() else Path(tempfile.gettempdir())
        local = os.environ.get("LOCAL_WORLD_SIZE", "")  # set by torchrun
        return cls(
            find_room,
            directory / f"holdfast-memory-{os.getuid()}.lock",
            int(local) if local.isdecimal() else None,
        )


def allocate(size_bytes: int, node: Node | None = None) -> memoryview:
    """Return page-aligned, writable, zero-filled memory; it is freed with the last view.

    Concurrent allocations by other processes of the node are accounted for. `node`: None: the one
    that this process runs on.

    Raises:
        NotEnoughMemoryError: the machine or the container has less memory left.
    """
    if size_bytes < _CHECKED_BYTES:
        return _allocate(size_bytes)
    node = node or Node.here()
    if node.processes is not None:
        # If this much fits for every process, they need not wait for one another.
        with _locked(node, fcntl.LOCK_SH):
            room = node.find_room()
            if room is None or size_bytes * node.processes <= room.free_bytes:
                return _allocate(size_bytes)
    # Otherwise one after another, so that each sees what the ones before it have allocated.
    with _locked(node, fcntl.LOCK_EX):
        if (room := node.find_room()) is not None:
            check_room(size_bytes, room)
        return _allocate(size_bytes)


@contextmanager
def _locked(node: Node, operation: int) -> Iterator[None]:
    """Hold the lock of a node; continue without it if it cannot be acquired."""
    flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(node.lock, flags, 0o600)
    if descriptor is None:
        yield
        return
    try:
        deadline = time.monotonic() + node.patience_seconds
        # Another user's file is not locked.
        while os.fstat(descriptor).st_uid == os.getuid() and time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_POLL_SECONDS)
                continue
            except OSError:  # no locks on this file system
                pass
            break
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a child that was forked meanwhile
        os.close(descriptor)


def _allocate(size_bytes: int) -> memoryview:
    pages = mmap.mmap(-1, max(size_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with suppress(OSError, AttributeError):  # a kernel without them: slower but correct
            pages.madvise(getattr(mmap, advice))
    touch(pages)
    return memoryview(pages)[:size_bytes]


def touch(pages: mmap.mmap) -> None:
    """Populate every page of a writable mapping now, without changing a byte."""
    try:
        pages.madvise(_POPULATE_WRITE)
    except OSError:  # an older kernel: rewrite a byte of each page
        for start in range(0, len(pages), _PAGE_BYTES):
            pages[start] = pages[start]


def prefer_huge_pages(descriptor: int, size_bytes: int) -> None:
    """Back a new file in RAM, open for reading and writing, with huge pages where possible.

    The rest is left as holes and as single pages: allocate the file afterwards. Such a file is
    allocated, mapped and read in a fraction of the time. Few mounts use huge pages by themselves;
    requesting them for each range works on any, unless the system denies them.
    """
    huge_bytes = int(next(iter(_lines(_HUGE_PAGES)), "0"))
    if not huge_bytes or size_bytes < huge_bytes:
        return
    whole = size_bytes - size_bytes % huge_bytes
    with suppress(OSError):  # raised again when the caller allocates the file
        os.ftruncate(descriptor, size_bytes)  # a mount may use huge pages within a file's size
        for start in range(0, whole, huge_bytes):
            os.pwrite(descriptor, b"\0", start)  # a range without any page is not collapsed
        _collapse(descriptor, whole, huge_bytes)


def _collapse(descriptor: int, size_bytes: int, huge_bytes: int) -> None:
    # Through libc: the mapping must be aligned to a huge page, for which Python's mmap has no
    # argument. It is placed inside a larger mapping, which reserves the address range.
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    failed = ctypes.c_void_p(-1).value
    length = ctypes.c_size_t(size_bytes + huge_bytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    around = libc.mmap(None, length, 0, flags, -1, ctypes.c_long(0))
    if around == failed:
        return
    try:
        start = ctypes.c_void_p(-(-around // huge_bytes) * huge_bytes)
        size, access = ctypes.c_size_t(size_bytes), mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_SHARED | _FIXED
        if libc.mmap(start, size, access, flags, descriptor, ctypes.c_long(0)) != failed:
            libc.madvise(start, size, _COLLAPSE)  # best effort
    finally:
        libc.munmap(ctypes.c_void_p(around), length)


def check_room(size_bytes: int, room: Room) -> None:
    """Refuse a size that does not fit.

    Raises:
        NotEnoughMemoryError: with the numbers.
    """
    if size_bytes > room.free_bytes:
        raise NotEnoughMemoryError(size_bytes, room.free_bytes, room.limited_by)


def find_room(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Room | None:
    """Return the tightest limit on new memory: the machine's, or a control group's.

    None: the system reports none.
    """
    rooms = [*_machine_room(proc), *_group_rooms(proc, groups)]
    return min(rooms, key=lambda each: each.free_bytes, default=None)


def _machine_room(proc: Path) -> Iterator[Room]:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield Room(int(line.split()[1]) << 10, "the machine's available memory")


def _group_rooms(proc: Path, groups: Path) -> Iterator[Room]:
    """Yield the free memory of every control group that contains this process, v1 and v2."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit, usage = groups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = groups / "memory", *_VERSION_1
        else:
            continue
        group = root / name.lstrip("/")
        while group == root or root in group.parents:
            yield from _group_room(group, limit, usage)
            group = group.parent


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _group_room(group: Path, limit_name: str, usage_name: str) -> Iterator[Room]:
    limits, usages = _lines(group / limit_name), _lines(group / usage_name)
    if not limits or not usages or not limits[0].isdigit():  # "max": no limit
        return
    # The page cache counts as used, but is reclaimed when memory is requested. Version 1 reports
    # the sum over nested groups as a separate total; version 2 reports only that sum.
    counts = dict(line.split()[:2] for line in _lines(group / "memory.stat"))
    cached = sum(
        int(counts.get(f"total_{name}", counts.get(name, 0)))
        for name in ("inactive_file", "active_file")
    )
    limit_bytes = int(limits[0])
    free_bytes = max(limit_bytes - int(usages[0]) + cached, 0)
    yield Room(free_bytes, f"the limit of {describe_size(limit_bytes)} of control group {group}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def image_bytes(layout: Layout) -> int:
    """Return the size of the whole file: body and footer."""
    return layout.body_bytes + footer_size(layout.body_bytes)


class Arena:
    """Memory for one shard file; it holds one snapshot at a time."""

    @in_normal_mode  # saves in other modes copy into the tensors created here
    def __init__(
        self,
        layout: Layout,
        memory: memoryview | None = None,
        *,
        pinned: bool = False,
        pinning: Callable[[torch.Tensor], Callable[[], None]] | None = None,
    ) -> None:
        """Lay the file out in zero-filled memory. None: allocate it.

        `pinned`: page-lock it for copies from a GPU, if the system allows it. `pinning`: pins a
        tensor and returns a function that unpins it. None: through CUDA.

        Raises:
            NotEnoughMemoryError: it does not fit into the remaining memory.
        """
        self.layout = layout
        self.memory = allocate(image_bytes(layout)) if memory is None else memory
        self._tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
        self._unpin = _pin_or_warn(self._tensor, pinning or pin) if pinned else None
        self._copying = Copying(())
        self._targets: list[Any] = []
        for slot in layout.slots:
            start, end = slot.payload_offset, slot.payload_offset + slot.payload_bytes
            if slot.container is None:
                self._targets.append(self.memory[start:end])
                continue
            dtype = slot.item.dtype
            assert dtype is not None
            self.memory[slot.offset : start] = slot.container.header
            if slot.payload_bytes == 0:  # header only, which need not end on an aligned offset
                self._targets.append(torch.empty(slot.item.lengths, dtype=dtype, device="cpu"))
                continue
            self.memory[end : slot.offset + slot.size_bytes] = slot.container.trailer
            payload = self._tensor[start:end].view(dtype)
            self._targets.append(payload.view(slot.item.lengths))
        index_end = layout.index_offset + len(layout.index)
        self.memory[layout.index_offset : index_end] = layout.index
        self.memory[layout.body_bytes - len(layout.tail) : layout.body_bytes] = layout.tail

    keeps_stretches = True

    @property
    def body_bytes(self) -> int:
        """Of the file without its footer."""
        return self.layout.body_bytes

    def stage(self, sources: Sequence[Source], later: Sequence[bool] | None = None) -> Copying:
        """Copy each slot's source, except those marked `later`; return the pending copy of these.

        Until that copy was waited for, only `stretches` may read the arena. None: all tensors are
        copied later.
        """
        now: list[tuple[Any, Any]] = []
        then: list[tuple[Any, Any]] = []
        deferred = [True] * len(self._targets) if later is None else later
        for target, source, is_deferred in zip(self._targets, sources, deferred, strict=True):
            if isinstance(source, bytes):
                target[: len(source)] = source
                target[len(source) :] = bytes(len(target) - len(source))
            elif is_deferred:
                then.append((target, source))
            else:
                now.append((target, source))
        Copying(now).wait()
        self._copying = Copying(then)
        return self._copying

    def content(self, slot: int) -> Source:
        """Return what was staged into a slot: a view of it, or a copy of small bytes."""
        target = self._targets[slot]
        if isinstance(target, memoryview):
            return bytes(target)
        source: torch.Tensor = target
        return source

    def stretches(self) -> Iterator[memoryview]:
        """Yield the body in stretches of 64 MiB, each once it is staged."""
        address = self._tensor.data_ptr()
        for start in range(0, self.body_bytes, _STRETCH_BYTES):
            end = min(start + _STRETCH_BYTES, self.body_bytes)
            self._copying.wait_below(address + end)
            yield self.memory[start:end]

    def release(self) -> None:
        """Unpin the memory; it is freed with its last view."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None


class StreamedShard:
    """The same file produced from live tensors, which must not change meanwhile."""

    def __init__(
        self, layout: Layout, sources: Sequence[Source], computed: Iterable[Any] = ()
    ) -> None:
        """Take one source for each slot.

        `computed`: events of a GPU to wait for before the sources are read. Threads that read from
        a GPU use their own streams, which do not wait for pending work of the caller's stream.
        """
        self.layout = layout
        self._sources = sources
        self._computed = computed

    keeps_stretches = False

    def content(self, slot: int) -> Source:
        """Return the source of a slot."""
        return self._sources[slot]

    @property
    def body_bytes(self) -> int:
        """Of the file without its footer."""
        return self.layout.body_bytes

    def stretches(self) -> Iterator[memoryview]:
        """Yield the body in blocks of 8 MiB, in a few buffers reused in rotation."""
        size_bytes = min(BLOCK_BYTES, self.body_bytes)
        for each in self._computed:
            each.synchronize()
        buffers = [allocate(size_bytes) for _ in range(_STREAM_BUFFERS)]
        current = filled = 0
        for part in self._parts():
            rest = part
            while len(rest):
                count = min(len(rest), size_bytes - filled)
                buffers[current][filled : filled + count] = rest[:count]
                rest = rest[count:]
                filled += count
                if filled == size_bytes:
                    yield buffers[current]
                    current, filled = (current + 1) % _STREAM_BUFFERS, 0
        if filled:
            yield buffers[current][:filled]

    def _parts(self) -> Iterator[memoryview]:
        """Yield every byte of the body in order."""
        position = 0
        for slot, source in zip(self.layout.slots, self._sources, strict=True):
            yield memoryview(bytes(slot.offset - position))
            if isinstance(source, bytes):
                yield memoryview(source.ljust(slot.size_bytes, b"\0"))
            else:
                assert slot.container is not None
                yield memoryview(slot.container.header)
                yield from bytes_of(source)
                yield memoryview(slot.container.trailer)
            position = slot.offset + slot.size_bytes
        layout = self.layout
        yield memoryview(bytes(layout.index_offset - position))
        yield memoryview(layout.index)
        position = layout.index_offset + len(layout.index)
        yield memoryview(bytes(layout.body_bytes - len(layout.tail) - position))
        yield memoryview(layout.tail)


def pin(tensor: torch.Tensor) -> Callable[[], None]:
    """Register memory with CUDA; return a function that unregisters it.

    Raises:
        RuntimeError: it cannot be registered, for example if the limit on locked memory is too low.
    """
    cuda: Any = torch.cuda
    address = tensor.data_ptr()
    try:
        cuda.check_error(cuda.cudart().cudaHostRegister(address, tensor.nbytes, 0))
    except RuntimeError:
        # CUDA reports the error again at the next kernel launch, which must not be training's.
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
        raise

    def unpin() -> None:
        cuda.check_error(cuda.cudart().cudaHostUnregister(address))

    return unpin


def _pin_or_warn(
    tensor: torch.Tensor, pinning: Callable[[torch.Tensor], Callable[[], None]]
) -> Callable[[], None] | None:
    """Pin memory, or warn that copies from a GPU will be slower; saves work either way."""
    try:
        return pinning(tensor)
    except RuntimeError as error:
        _warn_unpinned(str(error).partition("\n")[0])
        return None


@cache  # warn once per reason: there are several arenas, and more with each structure
def _warn_unpinned(reason: str) -> None:
    logger.warning(
        "memory for saves cannot be registered with CUDA (%s): copies from the GPU are slower.\n"
        "Raise the limit on locked memory (ulimit -l) of this process.",
        reason,
    )
