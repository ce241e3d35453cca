"""Host memory laid out as the shard file that it becomes.

Owns the memory of a snapshot, reused between saves, and the views into it that staging fills:
headers and trailers are written once, a save copies payloads between them. Promises that the bytes
of the arena are the bytes of the file, that the slot behind a shorter value is zero-filled, and
that the steady state allocates nothing. `StreamedShard` is the same file without an arena, produced
block by block from live tensors. Knows no files and no other rank.
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
"""Written in one call: the disk stays busy while the next stretch is prepared."""
_STREAM_BUFFERS = 3
"""One is being filled, one digested and written, and one was just finished."""
_PIECE_BYTES = 1 << 20
"""Tensors not in plain host memory are copied there in pieces; larger ones cost malloc more."""


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


class Event(Protocol):
    """Work of a GPU that can be waited for; torch.cuda.Event is one."""

    def synchronize(self) -> None:
        """Wait until it is done."""
        ...


class StreamedShard:
    """The same file produced from live tensors, which must not change meanwhile."""

    def __init__(
        self, layout: Layout, sources: Sequence[Source], computed: Iterable[Event] = ()
    ) -> None:
        """Take one source for each slot.

        `computed`: events to wait for before the sources are read. Threads that read from a GPU use
        their own streams, which do not wait for pending work of the caller's stream.
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
    """Yield the row-major bytes of a tensor; in pieces if it is not plain host memory."""
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
