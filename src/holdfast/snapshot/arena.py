"""The file before it is a file: memory that is laid out as the shard it becomes.

Owns the memory behind a snapshot, kept from save to save, and the views into it that staging fills:
headers and trailers are written once, a save copies payloads between them. Promises that the bytes
of the arena are the bytes of the file, that what a shorter value leaves over is zeros, and that the
steady state allocates nothing. `StreamedShard` is the same file without an arena, made block by
block from live tensors. Knows no files and no other rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import torch

from holdfast.caller import in_normal_mode
from holdfast.format.items import Source
from holdfast.format.layout import Layout
from holdfast.snapshot.copy import Copying
from holdfast.snapshot.memory import allocate
from holdfast.storage.digests import BLOCK_BYTES, footer_size

logger = logging.getLogger(__name__)

_STRETCH_BYTES = 64 << 20
"""Written in one call: a disk has something to do while the next one is prepared."""
_STREAM_BUFFERS = 3
"""One is filled, one digested and written, one just was."""
_PIECE_BYTES = 1 << 20
"""What is no plain host memory is brought there in pieces; larger ones cost malloc more to keep."""


def image_bytes(layout: Layout) -> int:
    """Return the size of the whole file: body and footer."""
    return layout.body_bytes + footer_size(layout.body_bytes)


class Arena:
    """Memory for one shard file; one snapshot is in it at a time."""

    @in_normal_mode  # other saves, in other modes, copy into what is made here
    def __init__(
        self,
        layout: Layout,
        memory: memoryview | None = None,
        *,
        pinned: bool = False,
        pinning: Callable[[torch.Tensor], Callable[[], None]] | None = None,
    ) -> None:
        """Lay the file out in memory, which holds zeros. None: in memory of its own.

        `pinned`: fixed in place for copies from a GPU, as far as the system allows it. `pinning`:
        fixes it and returns what undoes that. None: CUDA does.

        Raises:
            NotEnoughMemoryError: it does not fit what is left.
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
            if slot.payload_bytes == 0:  # all of it is header, which need not end on a boundary
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
        """Give each slot its source: copy all but those marked `later`, and return their copy.

        That is yet to be made; nobody but `stretches` may read the arena before it was waited for.
        None: all tensors are for later.
        """
        now: list[tuple[Any, Any]] = []
        then: list[tuple[Any, Any]] = []
        marks = [True] * len(self._targets) if later is None else later
        for target, source, waits in zip(self._targets, sources, marks, strict=True):
            if isinstance(source, bytes):
                target[: len(source)] = source
                target[len(source) :] = bytes(len(target) - len(source))
            elif waits:
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
        """Yield the body in stretches of 64 MiB, each when it has been staged."""
        address = self._tensor.data_ptr()
        for start in range(0, self.body_bytes, _STRETCH_BYTES):
            end = min(start + _STRETCH_BYTES, self.body_bytes)
            self._copying.wait_below(address + end)
            yield self.memory[start:end]

    def release(self) -> None:
        """Let go of what is fixed in place; the memory follows when nobody views it any more."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None


class Event(Protocol):
    """Something that a GPU has yet to do; torch.cuda.Event is one."""

    def synchronize(self) -> None:
        """Wait until it is done."""
        ...


class StreamedShard:
    """The same file made block by block from live tensors, which must not change meanwhile."""

    def __init__(
        self, layout: Layout, sources: Sequence[Source], computed: Iterable[Event] = ()
    ) -> None:
        """Take one source for each slot.

        `computed`: what to wait for before they are read; threads that read them from a GPU do so
        on streams of their own, which wait for nothing that the caller's stream has yet to compute.
        """
        self.layout = layout
        self._sources = sources
        self._computed = computed

    keeps_stretches = False

    @property
    def body_bytes(self) -> int:
        """Of the file without its footer."""
        return self.layout.body_bytes

    def stretches(self) -> Iterator[memoryview]:
        """Yield the body in blocks of 8 MiB, in a few buffers that take turns."""
        size_bytes = min(BLOCK_BYTES, self.body_bytes)
        for each in self._computed:
            each.synchronize()
        buffers = [allocate(size_bytes) for _ in range(_STREAM_BUFFERS)]
        turn = filled = 0
        for part in self._parts():
            rest = part
            while len(rest):
                count = min(len(rest), size_bytes - filled)
                buffers[turn][filled : filled + count] = rest[:count]
                rest = rest[count:]
                filled += count
                if filled == size_bytes:
                    yield buffers[turn]
                    turn, filled = (turn + 1) % _STREAM_BUFFERS, 0
        if filled:
            yield buffers[turn][:filled]

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
                yield from _bytes_of(source)
                yield memoryview(slot.container.trailer)
            position = slot.offset + slot.size_bytes
        layout = self.layout
        yield memoryview(bytes(layout.index_offset - position))
        yield memoryview(layout.index)
        position = layout.index_offset + len(layout.index)
        yield memoryview(bytes(layout.body_bytes - len(layout.tail) - position))
        yield memoryview(layout.tail)


@torch.no_grad()
def _bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the row-major bytes of a tensor; what is no plain host memory in pieces."""
    tensor = tensor.detach()
    plain = tensor.device.type == "cpu" and not (tensor.is_conj() or tensor.is_neg())
    if plain and tensor.is_contiguous():
        flat: Any = tensor.view(-1).view(torch.uint8).numpy()
        yield memoryview(flat)
        return
    if tensor.nbytes <= _PIECE_BYTES or tensor.dim() == 0:
        yield from _bytes_of(tensor.resolve_conj().resolve_neg().cpu().contiguous())
        return
    rows = max(tensor.shape[0] * _PIECE_BYTES // tensor.nbytes, 1)
    for start in range(0, tensor.shape[0], rows):
        part = tensor[start : start + rows]
        yield from _bytes_of(part[0] if rows == 1 else part)


def pin(tensor: torch.Tensor) -> Callable[[], None]:
    """Fix memory in place for a GPU; return what undoes it.

    Raises:
        RuntimeError: it cannot be registered: the limit on locked memory is too low, say.
    """
    cuda: Any = torch.cuda
    address = tensor.data_ptr()
    try:
        cuda.check_error(cuda.cudart().cudaHostRegister(address, tensor.nbytes, 0))
    except RuntimeError:
        # CUDA repeats the error at the next kernel launch; that must not be training.
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
        raise

    def unpin() -> None:
        cuda.check_error(cuda.cudart().cudaHostUnregister(address))

    return unpin


def _pin_or_warn(
    tensor: torch.Tensor, pinning: Callable[[torch.Tensor], Callable[[], None]]
) -> Callable[[], None] | None:
    """Fix memory in place, or say that copies from a GPU will be slower: both are right."""
    try:
        return pinning(tensor)
    except RuntimeError as error:
        _warn_unpinned(str(error).partition("\n")[0])
        return None


@cache  # each reason once: there are several arenas, and more with each structure
def _warn_unpinned(reason: str) -> None:
    logger.warning(
        "memory for saves cannot be registered with CUDA (%s): copies from the GPU are slower.\n"
        "Raise the limit on locked memory (ulimit -l) of this process.",
        reason,
    )
