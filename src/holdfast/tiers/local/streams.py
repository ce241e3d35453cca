"""A stream of blocks between two ranks, whichever way its messages travel.

Owns the interfaces of what is sent and of what takes it, a stream's header, and the work on its
blocks on each side: the sender reads them one by one, the receiver digests and places them on other
threads while it receives the next ones. Promises that a stream runs to its end although its source
or sink fails, so that no rank waits for the other one, and that no buffer is filled again before
its block was taken. Knows neither process groups nor the order of operations.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

HEADER = struct.Struct("<QQQ")
"""Of a stream: its bytes, the bytes covered by block digests, and the bytes per message."""


class Source(Protocol):
    """Bytes to send."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def body_bytes(self) -> int:
        """Bytes, from the start, that block digests cover."""
        ...

    @property
    def block_bytes(self) -> int:
        """Of each message but the last."""
        ...

    def view(self, offset: int, length: int) -> memoryview | None:
        """Return the bytes in place, if they are in memory that can be sent from."""
        ...

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill memory from an offset.

        Raises:
            OSError, CheckpointError: the bytes cannot be read.
        """
        ...


class Sink(Protocol):
    """Takes received bytes, block after block.

    If `in_any_order` is true, blocks are passed concurrently, on several threads.
    """

    def begin(self, size_bytes: int, body_bytes: int) -> None: ...

    def put(self, offset: int, block: memoryview) -> None: ...


class PlacedSink(Sink, Protocol):
    """A sink that provides the memory that blocks are received into, piece by piece."""

    @property
    def cuts(self) -> Sequence[Sequence[int]]:
        """By block of the stream: the bytes of its pieces, in order; at most `MOST_PIECES`."""
        ...

    def expect(self, number: int, spare: memoryview) -> Sequence[memoryview]:
        """Return the memory for each piece of a block; parts of `spare` for unneeded pieces."""
        ...

    def arrived(self, number: int) -> None:
        """Take a received block; called concurrently, on several threads."""
        ...


@dataclass
class Outgoing:
    """One stream to another rank."""

    receiver: int
    source: Source
    is_cut: bool = False
    """Whether the receiver sends the pieces in which it takes each block."""


@dataclass
class Incoming:
    """One stream from another rank, and its first local error."""

    sender: int
    sink: Sink
    error: Exception | None = None
    placed: PlacedSink | None = None
    """The sink, if the sender expects cuts; a transport may still send blocks whole."""

    def guard(self, step: Callable[[], None]) -> None:
        """Record the first failure; the stream is still received to its end."""
        if self.error is None:
            try:
                step()
            except Exception as error:  # noqa: BLE001  # reported to every rank after the exchange
                self.error = error


class Slots:
    """Buffers reused in rotation, allocated on first use."""

    def __init__(self, make: Callable[[int], torch.Tensor], count: int, size_bytes: int) -> None:
        self._make, self._count, self._size_bytes = make, count, size_bytes
        self._buffers: dict[int, torch.Tensor] = {}

    def at(self, number: int, length: int) -> torch.Tensor:
        """Return the memory for a block."""
        slot = number % self._count
        if slot not in self._buffers:
            self._buffers[slot] = self._make(self._size_bytes)
        return self._buffers[slot][:length]


class Blocks:
    """The blocks of one stream, by number."""

    def __init__(self, size_bytes: int, block_bytes: int) -> None:
        self.size_bytes, self.block_bytes = size_bytes, block_bytes

    def length(self, number: int) -> int:
        """Return the bytes of a block, the first one being the largest; 0: past the end."""
        return max(0, min(self.block_bytes, self.size_bytes - number * self.block_bytes))


class OutgoingBlocks(Blocks):
    """The header and the blocks of a stream to send.

    `make_buffer`: makes host memory, for at most `slots` blocks at a time.
    """

    def __init__(
        self, source: Source, make_buffer: Callable[[int], torch.Tensor], slots: int
    ) -> None:
        super().__init__(source.size_bytes, source.block_bytes)
        self._source = source
        self._buffers = Slots(make_buffer, slots, self.length(0))

    def header(self) -> torch.Tensor:
        """Return the first message."""
        packed = HEADER.pack(self.size_bytes, self._source.body_bytes, self.block_bytes)
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    def read(self, number: int, length: int) -> torch.Tensor:
        """Return a block: in place, if it is in memory, or copied into a buffer."""
        offset = number * self.block_bytes
        if (in_place := self._source.view(offset, length)) is not None:
            return torch.frombuffer(in_place, dtype=torch.uint8)
        tensor = self._buffers.at(number, length)
        try:
            self._source.read_into(offset, bytes_of(tensor))
        except Exception:  # noqa: BLE001  # the receiver reports the digest mismatch
            tensor.zero_()
        return tensor


class IncomingBlocks(Blocks):
    """The blocks of a received stream, taken on `beside` while the next ones are received.

    `make_buffer` and `slots`: as for `OutgoingBlocks`. There is no block before the header is read.
    """

    def __init__(
        self,
        transfer: Incoming,
        beside: ThreadPoolExecutor,
        make_buffer: Callable[[int], torch.Tensor],
        slots: int,
    ) -> None:
        super().__init__(0, 1)
        self._transfer, self._beside = transfer, beside
        self._make_buffer, self._count = make_buffer, slots
        self._busy: dict[int, Future[None]] = {}
        """By slot: what must end before its buffer is filled again."""

    def read_header(self, content: bytes | bytearray) -> None:
        """Learn the sizes from the first message, and pass them to the sink."""
        self.size_bytes, body_bytes, self.block_bytes = HEADER.unpack(content)
        self._buffers = Slots(self._make_buffer, self._count, self.length(0))
        self._transfer.guard(partial(self._transfer.sink.begin, self.size_bytes, body_bytes))

    def buffer(self, number: int, length: int) -> torch.Tensor:
        """Return host memory for a block, once the block that was in it has been taken."""
        if (earlier := self._busy.pop(number % self._count, None)) is not None:
            earlier.result()
        return self._buffers.at(number, length)

    def put(self, number: int, block: torch.Tensor) -> None:
        """Hand a received block over to the sink."""
        offset = number * self.block_bytes
        self.hand_over(number, partial(self._transfer.sink.put, offset, bytes_of(block)))

    def hand_over(self, number: int, take: Callable[[], None]) -> None:
        """Take a received block by calling `take` on another thread."""
        self._busy[number % self._count] = self._beside.submit(self._transfer.guard, take)

    def wait(self) -> None:
        """Wait until every block has been taken."""
        for each in self._busy.values():
            each.result()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a uint8 tensor on the host."""
    array: Any = tensor.numpy()
    return memoryview(array)
