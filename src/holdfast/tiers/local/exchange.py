"""Send streams of blocks between ranks: one engine, for any process group that can carry messages.

Owns what a stream is (a source, a sink, a header and blocks) and the lanes that carry all streams
of one exchange, from host memory or through the memory of a device. Promises that a stream runs to
its end although its source or sink fails, so that no rank waits for another one; that received
blocks are digested and placed on other threads while the next ones are received; that no buffer is
filled again before its block was taken; and that nothing is received into memory once an exchange
has ended, failed or not. Knows neither shards nor who sends what to whom.
"""

from __future__ import annotations

import itertools
import struct
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from holdfast.read.requests import MOST_PIECES

HEADER = struct.Struct("<QQQ")
"""Of a stream: its bytes, the bytes covered by block digests, and the bytes per message."""
_CUTS_TAG = 1 << 16
"""Added to a stream's tag for the message in which its receiver says how blocks are cut."""
_TAKERS = 2
"""Threads that digest and place received blocks: one alone is no faster than the network."""


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
    """The sink, if the sender expects cuts; a device receives blocks whole all the same."""

    def guard(self, step: Callable[[], None]) -> None:
        """Record the first failure; the stream is still received to its end."""
        if self.error is None:
            try:
                step()
            except Exception as error:  # noqa: BLE001  # reported to every rank after the exchange
                self.error = error


@dataclass
class Message:
    """One message of a stream."""

    sends: bool
    tensor: torch.Tensor
    """In memory that the backend sends from."""
    rank: int
    """The peer."""
    tag: int
    work: Any = None
    """What to wait for, once it was posted."""


class Group(Protocol):
    """The ranks of an exchange, and the backend that carries its messages."""

    @property
    def copies_blocks(self) -> bool:
        """Whether blocks are copied to and from memory of the backend, a device."""
        ...

    def window(self, *, in_pieces: bool) -> int:
        """Return how many blocks of one stream may be in flight."""
        ...

    def post(self, messages: Iterable[Message]) -> None:
        """Post the messages of a round."""
        ...

    def wait(self, work: Any) -> None:
        """Wait for a posted message.

        Raises:
            RuntimeError: it failed or timed out.
        """
        ...

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Return host memory for blocks."""
        ...

    def backend_buffer(self, size_bytes: int) -> torch.Tensor:
        """Return memory that the backend sends from and receives into."""
        ...

    def to_tensor(self, content: bytes) -> torch.Tensor:
        """Return a small message in such memory."""
        ...


def carry_out(group: Group, outgoing: Sequence[Outgoing], incoming: Sequence[Incoming]) -> None:
    """Send and receive all streams of this rank; a collective call over the group.

    Errors of sources and sinks are recorded in the transfers, which still run to their end.

    Raises:
        RuntimeError: a rank is gone or silent.
    """
    name = "holdfast-receiver"
    lanes: list[_Lane] = []
    with (
        ThreadPoolExecutor(1, thread_name_prefix=name) as one,
        ThreadPoolExecutor(_TAKERS, thread_name_prefix=name) as several,
    ):
        try:
            for out, tag in zip(outgoing, _tags(x.receiver for x in outgoing), strict=True):
                lanes.append(_SendLane(group, out, tag))
            for coming, tag in zip(incoming, _tags(x.sender for x in incoming), strict=True):
                beside = several if getattr(coming.sink, "in_any_order", False) else one
                lanes.append(_ReceiveLane(group, coming, tag, beside))
            # In rounds, posting all messages of a round before waiting for any of them: the rank
            # furthest behind then finds its counterparts posted, so there is no circular wait
            # between ranks, however streams cross.
            under_way = list(lanes)
            while under_way:
                group.post(each for lane in under_way for each in lane.post())
                for lane in under_way:
                    lane.meanwhile()
                under_way = [lane for lane in under_way if lane.finish()]
        except BaseException as error:
            # The error's handler keeps its traceback, whose frames would keep alive the buffers of
            # receives that were posted.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            # If a rank is gone, connections to the others are still open, and by the time these
            # send, the memory may hold state loaded from elsewhere. Dropping the last reference to
            # a posted receive ends it.
            for lane in lanes:
                lane.abandon()


def _tags(peers: Iterable[int]) -> list[int]:
    """Number the streams to, or from, one rank; both sides list them in the same order."""
    counts: Counter[int] = Counter()
    tags = []
    for peer in peers:
        counts[peer] += 1
        tags.append(counts[peer])
    return tags


class _Buffers:
    """The memory for the blocks of one stream, reused in rotation and allocated on first use."""

    def __init__(self, make: Callable[[int], torch.Tensor], count: int, size_bytes: int) -> None:
        self._make, self._count, self._size_bytes = make, count, size_bytes
        self._buffers: dict[int, torch.Tensor] = {}

    def at(self, number: int, length: int) -> torch.Tensor:
        """Return the memory for a block."""
        slot = number % self._count
        if slot not in self._buffers:
            self._buffers[slot] = self._make(self._size_bytes)
        return self._buffers[slot][:length]


@dataclass
class _Step:
    """Messages that are waited for at once, and what to do then."""

    messages: list[Message]
    then: Callable[[], None] | None = None


class _Lane:
    """One stream as a sequence of steps: its header, how blocks are cut, and the blocks."""

    def __init__(self, group: Group, peer: int, tag: int, *, in_pieces: bool) -> None:
        self._group, self._peer, self._tag = group, peer, tag
        self._window = group.window(in_pieces=in_pieces)
        self._size_bytes, self._block_bytes = 0, 1
        self._first: list[_Step] = []
        self._under_way: deque[_Step] = deque()
        """Oldest first."""
        self._posted = 0
        self._may_post = True
        """False until the other side has said how blocks are cut."""

    def post(self) -> Iterator[Message]:
        """Yield the messages to post in this round, as many as the window allows."""
        first, self._first = self._first, []
        for step in first:
            self._under_way.append(step)
            yield from step.messages
        while len(self._under_way) < self._window and (length := self._next_length):
            step = self._begin(self._posted, length)
            self._under_way.append(step)
            self._posted += 1
            yield from step.messages

    def meanwhile(self) -> None:
        """Do the copies that can run while the round is in flight."""

    def finish(self) -> bool:
        """Wait for the oldest step; return whether the stream has more."""
        step = self._under_way.popleft()
        for each in step.messages:
            self._group.wait(each.work)
        if step.then is not None:
            step.then()
        return bool(self._under_way) or self._next_length > 0

    def abandon(self) -> None:
        """Drop posted messages: memory is no longer sent from or received into."""
        self._first.clear()
        self._under_way.clear()

    @property
    def _next_length(self) -> int:
        """The bytes of the block to post next; 0: there is none, or none yet."""
        return self._length(self._posted) if self._may_post else 0

    def _length(self, number: int) -> int:
        """Return the bytes of a block, the first one being the largest; 0: past the end."""
        return max(0, min(self._block_bytes, self._size_bytes - number * self._block_bytes))

    def _make_buffers(self) -> None:
        """Provide host memory for the blocks in flight and, on a device, for one that is copied."""
        self._count = self._window + self._group.copies_blocks
        self._in_memory = _Buffers(self._group.host_buffer, self._count, self._length(0))
        self._on_device = _Buffers(self._group.backend_buffer, self._count, self._length(0))

    def _message(self, tensor: torch.Tensor, *, sends: bool, tag: int = 0) -> Message:
        return Message(sends, tensor, self._peer, tag + self._tag)

    def _begin(self, number: int, length: int) -> _Step:
        """Return the step of one block."""
        raise NotImplementedError


class _SendLane(_Lane):
    def __init__(self, group: Group, transfer: Outgoing, tag: int) -> None:
        is_cut = transfer.is_cut and not group.copies_blocks
        super().__init__(group, transfer.receiver, tag, in_pieces=is_cut)
        self._source = source = transfer.source
        self._size_bytes, self._block_bytes = source.size_bytes, source.block_bytes
        self._make_buffers()
        self._ready: torch.Tensor | None = None
        """The next block, on the device."""
        self._cuts: Any = None
        packed = HEADER.pack(self._size_bytes, source.body_bytes, self._block_bytes)
        self._first.append(_Step([self._message(group.to_tensor(packed), sends=True)]))
        if is_cut:
            self._may_post = False
            self._cuts = _no_cuts(-(-self._size_bytes // self._block_bytes))
            table = torch.from_numpy(self._cuts).view(torch.uint8)
            self._first.append(
                _Step([self._message(table, sends=False, tag=_CUTS_TAG)], self._start)
            )

    def _start(self) -> None:
        self._may_post = True

    def _begin(self, number: int, length: int) -> _Step:
        lengths = [length]
        if self._cuts is not None:
            lengths = [each for each in self._cuts[number].tolist() if each]
        block, self._ready = self._ready, None
        if block is None:
            block = self._load(number, sum(lengths))
        return _Step([self._message(each, sends=True) for each in _split(block, lengths)])

    def meanwhile(self) -> None:
        if self._group.copies_blocks and (length := self._next_length):
            self._ready = self._load(self._posted, length)

    def _load(self, number: int, length: int) -> torch.Tensor:
        """Return a block in memory that the backend sends from."""
        block = self._read(number, length)
        if self._group.copies_blocks:
            return self._on_device.at(number, length).copy_(block)
        return block

    def _read(self, number: int, length: int) -> torch.Tensor:
        """Return a block: in place, if it is in memory, or copied into a buffer."""
        offset = number * self._block_bytes
        if (in_place := self._source.view(offset, length)) is not None:
            return torch.frombuffer(in_place, dtype=torch.uint8)
        tensor = self._in_memory.at(number, length)
        try:
            self._source.read_into(offset, _memory_of(tensor))
        except Exception:  # noqa: BLE001  # the receiver reports the digest mismatch
            tensor.zero_()
        return tensor


class _ReceiveLane(_Lane):
    """Blocks are taken on the thread `beside` while the next ones are received."""

    def __init__(
        self, group: Group, transfer: Incoming, tag: int, beside: ThreadPoolExecutor
    ) -> None:
        self._placed = None if group.copies_blocks else transfer.placed
        super().__init__(group, transfer.sender, tag, in_pieces=self._placed is not None)
        self._transfer, self._beside = transfer, beside
        self._busy: dict[int, Future[None]] = {}
        """By buffer: what must end before it is filled again."""
        self._arrived: tuple[int, torch.Tensor] | None = None
        """The number of a received block that is still on the device, and its memory there."""
        header = group.to_tensor(bytes(HEADER.size))
        self._first.append(
            _Step([self._message(header, sends=False)], partial(self._read_header, header))
        )
        if self._placed is not None:
            cuts = self._placed.cuts
            table = _no_cuts(len(cuts))
            for row, lengths in zip(table, cuts, strict=True):
                row[: len(lengths)] = lengths
            message = torch.from_numpy(table).view(torch.uint8)
            self._first.append(_Step([self._message(message, sends=True, tag=_CUTS_TAG)]))

    def _read_header(self, header: torch.Tensor) -> None:
        """Learn the sizes from the first message, and pass them to the sink."""
        self._size_bytes, body_bytes, self._block_bytes = HEADER.unpack(to_bytes(header))
        self._make_buffers()
        self._transfer.guard(partial(self._transfer.sink.begin, self._size_bytes, body_bytes))

    def finish(self) -> bool:
        has_more = super().finish()
        if not has_more:
            self.meanwhile()
            for each in self._busy.values():
                each.result()
        return has_more

    def _begin(self, number: int, length: int) -> _Step:
        if self._group.copies_blocks:
            block = self._on_device.at(number, length)
            return _Step([self._message(block, sends=False)], partial(self._note, number, block))
        buffer, placed = self._buffer(number, length), self._placed
        if placed is None:
            return _Step([self._message(buffer, sends=False)], partial(self._put, number, buffer))
        pieces = self._expect(placed, number, buffer)
        return _Step(
            [self._message(each, sends=False) for each in pieces],
            partial(self._hand_over, number, partial(placed.arrived, number)),
        )

    def _note(self, number: int, block: torch.Tensor) -> None:
        self._arrived = (number, block)

    def meanwhile(self) -> None:
        if self._arrived is not None:
            (number, block), self._arrived = self._arrived, None
            self._put(number, self._buffer(number, len(block)).copy_(block))

    def _buffer(self, number: int, length: int) -> torch.Tensor:
        """Return host memory for a block, once the block that was in it has been taken."""
        if (earlier := self._busy.pop(number % self._count, None)) is not None:
            earlier.result()
        return self._in_memory.at(number, length)

    def _put(self, number: int, block: torch.Tensor) -> None:
        """Hand a received block over to the sink."""
        offset = number * self._block_bytes
        self._hand_over(number, partial(self._transfer.sink.put, offset, _memory_of(block)))

    def _hand_over(self, number: int, take: Callable[[], None]) -> None:
        """Take a received block by calling `take` on another thread."""
        self._busy[number % self._count] = self._beside.submit(self._transfer.guard, take)

    def _expect(self, placed: PlacedSink, number: int, buffer: torch.Tensor) -> list[torch.Tensor]:
        lengths = placed.cuts[number]
        found: list[memoryview] = []
        self._transfer.guard(lambda: found.extend(placed.expect(number, _memory_of(buffer))))
        if not found:  # the sink failed: still receive the block, and discard it
            return _split(buffer, lengths)
        return [torch.frombuffer(each, dtype=torch.uint8) for each in found]


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the content of a small message."""
    content: bytes = tensor.cpu().numpy().tobytes()
    return content


def _memory_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a uint8 tensor on the host."""
    array: Any = tensor.numpy()
    return memoryview(array)


def _no_cuts(blocks: int) -> Any:
    """Return an empty table of piece lengths, `MOST_PIECES` for each block."""
    return np.zeros((blocks, MOST_PIECES), dtype=np.uint32)


def _split(block: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return views of consecutive pieces of a block, which may be longer than all of them."""
    ends = list(itertools.accumulate(lengths))
    return [block[end - length : end] for end, length in zip(ends, lengths, strict=True)]
