"""Copies of shards travel between ranks: off the training thread, over a group of their own.

Owns the transport (a gloo group that nobody else uses, any backend beside it) and the strategy that
nvidia-resiliency-ext asks for it. Promises that nothing is sent which all ranks have not agreed on
before, that a rank whose own disk fails goes on receiving so that nobody waits for it, that every
block a copy is made of matched its digest when the copy is whole, that a wait ends a little before
the group's timeout, and that nothing arrives in anybody's memory once a transfer has ended, however
it did. Refuses nothing: what failed is told to the caller, who agrees on it.
"""

from __future__ import annotations

import itertools
import struct
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from nvidia_resiliency_ext.checkpointing.local.replication.group_utils import (
    ExchangePlan,
    GroupWrapper,
)
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import (
    CliqueReplicationStrategy,
)
from torch import distributed

from holdfast.read.requests import MOST_PIECES

_WINDOW = 4
"""Blocks of one stream under way at a time: one arrives while one is digested and written."""
_PLACED_WINDOW = 8
"""Likewise, where blocks arrive in memory that is there anyway: no gaps between them, then."""
_CUTS_TAG = 1 << 16
"""Added to a stream's tag where its receiver says how blocks are cut."""
_TAKERS = 2
"""Threads that digest and place what arrives: one alone is no faster than the network."""
_PATIENCE = 0.75
"""Of the group's timeout: who waited in vain here must still be in time to say so elsewhere."""
_HEADER = struct.Struct("<QQQ")
"""Of a stream: its bytes, those of them that block digests cover, and how many a message has."""


class Source(Protocol):
    """Bytes to send."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def body_bytes(self) -> int:
        """So many from the start are covered by block digests."""
        ...

    @property
    def block_bytes(self) -> int:
        """Of each message but the last."""
        ...

    def view(self, offset: int, length: int) -> memoryview | None:
        """Return the bytes where they lie, if that is memory that can be sent from."""
        ...

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill memory from an offset.

        Raises:
            OSError, CheckpointError: they cannot be had.
        """
        ...


class Sink(Protocol):
    """Where received bytes go, block after block.

    One whose `in_any_order` is true is given several blocks at a time, on several threads.
    """

    def begin(self, size_bytes: int, body_bytes: int) -> None: ...

    def put(self, offset: int, block: memoryview) -> None: ...


class PlacedSink(Sink, Protocol):
    """A sink that has memory for what arrives, block by block and piece by piece."""

    @property
    def cuts(self) -> Sequence[Sequence[int]]:
        """By block of the stream: the bytes of its pieces, in order; at most `MOST_PIECES`."""
        ...

    def expect(self, number: int, spare: memoryview) -> Sequence[memoryview]:
        """Return where the pieces of a block are to arrive; `spare` serves where nothing does."""
        ...

    def arrived(self, number: int) -> None:
        """Take in what lies there now; called for several blocks at a time, on several threads."""
        ...


@dataclass
class Outgoing:
    """One stream to another rank."""

    receiver: int
    source: Source
    is_cut: bool = False
    """Whether the receiver says in which pieces it takes each block."""


@dataclass
class Incoming:
    """One stream from another rank, and what went wrong with it here."""

    sender: int
    sink: Sink
    error: Exception | None = None
    placed: PlacedSink | None = None
    """The sink, if the sender was told that blocks are cut; a transport may send them whole yet."""

    def guard(self, step: Callable[[], None]) -> None:
        """Note the first failure here, and go on taking what the other rank sends."""
        if self.error is None:
            try:
                step()
            except Exception as error:  # noqa: BLE001  # told to every rank after the exchange
                self.error = error


class GroupBrokenError(Exception):
    """The group cannot be used any more: a rank is gone, or did not answer in time."""


class OwnGroup(GroupWrapper):  # type: ignore[misc]  # the package ships no types
    """A gloo group for host memory, whatever the trainer uses.

    `isend_state_dict` and `irecv_state_dict` are overridden: the stock ones go through CUDA even on
    gloo, pickle the state, and leave the sender's object hollow when the transfer fails.
    """

    def __init__(self, group: Any, timeout_seconds: float) -> None:
        super().__init__(group)
        self._wait = timedelta(seconds=timeout_seconds * _PATIENCE)
        self.is_broken = False
        self.land: Callable[[], Any] | None = None
        """Makes what `irecv_state_dict` fills: a sink that is a state dict."""

    def stream(self, outgoing: Sequence[Outgoing], incoming: Sequence[Incoming]) -> None:
        """Carry out all transfers of this rank; every rank of the group calls it together.

        Errors of sources and sinks are noted in the transfers, and the transfer goes on.

        Raises:
            GroupBrokenError: a rank is gone or silent.
        """
        name = "holdfast-receiver"
        with (
            ThreadPoolExecutor(1, thread_name_prefix=name) as one,
            ThreadPoolExecutor(_TAKERS, thread_name_prefix=name) as several,
        ):
            self._stream(outgoing, incoming, one, several)

    def _stream(
        self,
        outgoing: Sequence[Outgoing],
        incoming: Sequence[Incoming],
        one: ThreadPoolExecutor,
        several: ThreadPoolExecutor,
    ) -> None:
        lanes: list[_Lane] = []
        try:
            for out, tag in zip(outgoing, _tags(x.receiver for x in outgoing), strict=True):
                lanes.append(_SendLane(self, out, tag))
            for coming, tag in zip(incoming, _tags(x.sender for x in incoming), strict=True):
                beside = several if getattr(coming.sink, "in_any_order", False) else one
                lanes.append(_ReceiveLane(self, coming, tag, beside))
            # In rounds, and everything of a round posted before any of it is waited for: whoever is
            # furthest behind finds its counterparts posted, so that no ranks wait for one another
            # in a circle, however streams cross.
            under_way = list(lanes)
            while under_way:
                for lane in under_way:
                    lane.post()
                under_way = [lane for lane in under_way if lane.finish()]
        except BaseException as error:
            # Whoever handles the error keeps its traceback, and the calls that ended in it would
            # keep what they had begun to receive.
            traceback.clear_frames(error.__traceback__)
            # gloo closes all connections if a wait took too long; else peers are left half-way.
            self.is_broken = True
            if not isinstance(error, RuntimeError):
                raise
            reason = str(error).rpartition("] ")[2] or str(error)
            raise GroupBrokenError(f"the exchange between ranks broke off: {reason}") from error
        finally:
            # If a rank is gone, connections to the others are open yet, and by the time these send
            # the memory may hold what was loaded elsewhere. What nobody holds is received no more.
            for lane in lanes:
                lane.abandon()

    def renew(self, group: Any) -> None:
        """Go on over another group: this one is broken."""
        self._group = group
        self.is_broken = False

    def share(self, content: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Return what every rank of the group gave; `sizes` were agreed on before.

        Raises:
            GroupBrokenError: as `stream`.
        """
        shared = []
        for rank, size_bytes in enumerate(sizes):
            mine = rank == self.my_group_rank
            buffer = bytearray(content) if mine else bytearray(size_bytes)
            if size_bytes:
                tensor = torch.frombuffer(buffer, dtype=torch.uint8)
                try:
                    self.broadcast(tensor, src=self.get_global_rank(rank))
                except RuntimeError as error:
                    self.is_broken = True
                    raise GroupBrokenError(f"ranks could not share: {error}") from error
            shared.append(bytes(buffer))
        return shared

    def isend_state_dict(self, state_dict: Any, dst: int) -> dict[str, float]:
        """Send a shard as it is, from wherever it lies."""
        self.stream([Outgoing(dst, state_dict)], [])
        return {"data_sent": state_dict.size_bytes}

    def irecv_state_dict(self, src: int) -> tuple[Any, dict[str, float]]:
        """Receive a shard into a file."""
        assert self.land is not None
        sink = self.land()
        transfer = Incoming(src, sink)
        self.stream([], [transfer])
        sink.error = transfer.error
        return sink, {"data_recv": sink.size_bytes}

    def post_send(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
        """Begin to send."""
        return distributed.isend(tensor, self.get_global_rank(rank), group=self.group, tag=tag)

    def post_receive(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
        """Begin to receive."""
        return distributed.irecv(tensor, self.get_global_rank(rank), group=self.group, tag=tag)

    def wait(self, work: Any) -> None:
        """Wait for what was begun."""
        work.wait(self._wait)


def _tags(peers: Iterable[int]) -> list[int]:
    """Tell the streams to, or from, one rank apart; both sides list them in one order."""
    counts: Counter[int] = Counter()
    tags = []
    for peer in peers:
        counts[peer] += 1
        tags.append(counts[peer])
    return tags


class _Buffers:
    """The window of one lane: as many buffers as operations under way."""

    def __init__(self, size_bytes: int, count: int) -> None:
        self._size_bytes, self._count = size_bytes, count
        self._buffers: dict[int, torch.Tensor] = {}

    def at(self, number: int, length: int) -> torch.Tensor:
        slot = number % self._count
        if slot not in self._buffers:
            self._buffers[slot] = torch.empty(self._size_bytes, dtype=torch.uint8, device="cpu")
        return self._buffers[slot][:length]


class _Lane:
    """One stream, an operation after the other: its header, how blocks are cut, and the blocks."""

    def __init__(self, group: OwnGroup) -> None:
        self._group = group
        self._under_way: deque[tuple[list[Any], Callable[[], None] | None]] = deque()
        """What each operation waits for, oldest first, and what is done then."""
        self._size, self._step = 0, 1
        """Of the stream, 0 until blocks may be posted, and of a block."""
        self._window = _WINDOW
        self._posted = 0

    def post(self) -> None:
        """Begin as many operations as the window takes."""
        while len(self._under_way) < self._window and self._has_more:
            offset = self._posted * self._step
            works, then = self._begin(self._posted, min(self._step, self._size - offset))
            self._under_way.append((works, then))
            self._posted += 1

    def finish(self) -> bool:
        """Wait for the oldest operation; False: it was the last of the stream."""
        works, then = self._under_way.popleft()
        for each in works:
            self._group.wait(each)
        if then is not None:
            then()
        return bool(self._under_way) or self._has_more

    def abandon(self) -> None:
        """Let go of what was begun: nothing is sent from memory, or received into it, any more."""
        self._under_way.clear()

    @property
    def _has_more(self) -> bool:
        return self._posted * self._step < self._size

    def _begin(self, number: int, length: int) -> tuple[list[Any], Callable[[], None] | None]:
        """Post one block."""
        raise NotImplementedError


class _SendLane(_Lane):
    def __init__(self, group: OwnGroup, transfer: Outgoing, tag: int) -> None:
        super().__init__(group)
        self._source, self._receiver, self._tag = transfer.source, transfer.receiver, tag
        size_bytes, self._step = self._source.size_bytes, self._source.block_bytes
        header = bytearray(_HEADER.pack(size_bytes, self._source.body_bytes, self._step))
        tensor = torch.frombuffer(header, dtype=torch.uint8)
        self._under_way.append(([group.post_send(tensor, self._receiver, tag)], None))
        self._cuts: Any = None

        def may_post() -> None:
            self._size = size_bytes

        if not transfer.is_cut:
            may_post()
        else:
            self._window = _PLACED_WINDOW
            self._cuts = _no_cuts(-(-size_bytes // self._step))
            told = torch.from_numpy(self._cuts).view(torch.uint8)
            work = group.post_receive(told, self._receiver, _CUTS_TAG + tag)
            self._under_way.append(([work], may_post))
        self._buffers = _Buffers(min(self._step, size_bytes), self._window)

    def _begin(self, number: int, length: int) -> tuple[list[Any], Callable[[], None] | None]:
        lengths = [length]
        if self._cuts is not None:
            lengths = [each for each in self._cuts[number].tolist() if each]
        pieces = _split(self._fill(number, sum(lengths)), lengths)
        return [self._group.post_send(each, self._receiver, self._tag) for each in pieces], None

    def _fill(self, number: int, length: int) -> torch.Tensor:
        """Return a block: where it lies, if that is memory, or in a buffer."""
        offset = number * self._step
        if (in_place := self._source.view(offset, length)) is not None:
            return torch.frombuffer(in_place, dtype=torch.uint8)
        tensor = self._buffers.at(number, length)
        try:
            self._source.read_into(offset, bytes_of(tensor))
        except Exception:  # noqa: BLE001  # the receiver finds the digest wrong, and says so
            tensor.zero_()
        return tensor


class _ReceiveLane(_Lane):
    def __init__(
        self, group: OwnGroup, transfer: Incoming, tag: int, beside: ThreadPoolExecutor
    ) -> None:
        super().__init__(group)
        self._transfer, self._tag = transfer, tag
        self._beside = beside
        """Where blocks are digested and written while the next ones arrive."""
        self._busy: dict[int, Future[None]] = {}
        """By place in the window: what must end before its buffer is filled again."""
        self._header = bytearray(_HEADER.size)
        tensor = torch.frombuffer(self._header, dtype=torch.uint8)
        work = group.post_receive(tensor, transfer.sender, tag)
        self._under_way.append(([work], self._read_header))
        self._placed = transfer.placed
        if self._placed is not None:
            self._window = _PLACED_WINDOW
            cuts = self._placed.cuts
            table = _no_cuts(len(cuts))
            for row, lengths in zip(table, cuts, strict=True):
                row[: len(lengths)] = lengths
            told = torch.from_numpy(table).view(torch.uint8)
            work = group.post_send(told, transfer.sender, _CUTS_TAG + tag)
            self._under_way.append(([work], None))

    def finish(self) -> bool:
        goes_on = super().finish()
        if not goes_on:
            for each in self._busy.values():
                each.result()
        return goes_on

    def _read_header(self) -> None:
        size_bytes, body_bytes, self._step = _HEADER.unpack(self._header)
        self._size = size_bytes
        self._buffers = _Buffers(min(self._step, size_bytes), self._window)
        self._transfer.guard(lambda: self._transfer.sink.begin(size_bytes, body_bytes))

    def _begin(self, number: int, length: int) -> tuple[list[Any], Callable[[], None] | None]:
        if (earlier := self._busy.pop(number % self._window, None)) is not None:
            earlier.result()
        buffer = self._buffers.at(number, length)
        if self._placed is None:
            pieces = [buffer]
            offset = number * self._step
            take = partial(self._transfer.sink.put, offset, bytes_of(buffer))
        else:
            pieces = self._expect(self._placed, number, buffer)
            take = partial(self._placed.arrived, number)
        sender = self._transfer.sender
        works = [self._group.post_receive(each, sender, self._tag) for each in pieces]
        return works, lambda: self._hand_over(number, take)

    def _expect(self, placed: PlacedSink, number: int, buffer: torch.Tensor) -> list[torch.Tensor]:
        lengths = placed.cuts[number]
        found: list[memoryview] = []
        self._transfer.guard(lambda: found.extend(placed.expect(number, bytes_of(buffer))))
        if not found:  # what comes is taken none the less, and forgotten
            return _split(buffer, lengths)
        return [torch.frombuffer(each, dtype=torch.uint8) for each in found]

    def _hand_over(self, number: int, take: Callable[[], None]) -> None:
        self._busy[number % self._window] = self._beside.submit(self._transfer.guard, take)


def _no_cuts(blocks: int) -> Any:
    """Return a table for the pieces of so many blocks, with room for as many as there may be."""
    return np.zeros((blocks, MOST_PIECES), dtype=np.uint32)


def _split(block: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return views of consecutive bytes; there may be more of them behind."""
    ends = list(itertools.accumulate(lengths))
    return [block[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of bytes that lie on the host."""
    array: Any = tensor.numpy()
    return memoryview(array)


class ShardReplication(CliqueReplicationStrategy):  # type: ignore[misc]  # ships no types
    """Who holds whose copies, and how they get there.

    `replicate` is overridden: the stock one sends every tensor while training waits, rewrites the
    caller's object, and has only as many cliques as divide the world. `retrieve_plan` likewise: the
    stock one knows a clique alone, asks it in a collective that others may never reach, and raises
    on some ranks only.
    """

    def __init__(
        self, group: OwnGroup, holders: Sequence[tuple[int, ...]], *, sends_images: bool
    ) -> None:
        super().__init__(group, target_device="cpu")
        self.holders = list(holders)
        """By owner: the ranks that hold its shard, the owner first."""
        self.sends_images = sends_images
        """Whether holders get the whole shard; else the small states alone."""

    @property
    def sends_anything(self) -> bool:
        """Whether any rank holds anything of another one."""
        return any(len(each) > 1 for each in self.holders)

    def replicate(self, local_ckpt: Any, id_: Any) -> tuple[list[Any], list[Any]]:
        """Return the own shard at once; `exchange` sends it, later and elsewhere."""
        return [local_ckpt], [id_]

    def exchange(
        self, source: Source | None, rank: int, sinks: dict[int, Sink]
    ) -> dict[int, Exception]:
        """Send this rank's shard to its holders and receive theirs, by owner; return what failed.

        Every rank calls it together, on whatever thread writes.

        Raises:
            GroupBrokenError: a rank is gone or silent.
        """
        outgoing = []
        if source is not None:
            outgoing = [Outgoing(each, source) for each in self.holders[rank] if each != rank]
        incoming = [Incoming(owner, sink) for owner, sink in sorted(sinks.items())]
        self.local_group.stream(outgoing, incoming)
        return {each.sender: each.error for each in incoming if each.error is not None}

    def owners_held_by(self, rank: int) -> list[int]:
        """Return whose copies a rank holds beside its own shard."""
        return [
            owner for owner, ranks in enumerate(self.holders) if rank in ranks and owner != rank
        ]

    def retrieve_plan(self, globally_available_ids: Any, wanted: Sequence[Any]) -> ExchangePlan:
        """Return who sends what to whom: the same on every rank, from what all ranks know.

        `globally_available_ids`: by rank, the ids it can send; `wanted`: pairs of rank and id. An
        id that nobody has is left out: what that means is decided where the wish came from.
        """
        plan = ExchangePlan(group=self.local_group)
        loads = [0] * len(globally_available_ids)
        for receiver, wanted_id in wanted:
            senders = [
                rank
                for rank, ids in enumerate(globally_available_ids)
                if wanted_id in ids and rank != receiver
            ]
            if senders:
                sender = min(senders, key=lambda rank: (loads[rank], rank))
                loads[sender] += 1
                plan.plan(sender=sender, receiver=receiver, id_=wanted_id)
        return plan
