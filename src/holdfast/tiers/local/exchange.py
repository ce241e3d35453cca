"""Send copies of shards between ranks, off the training thread, over a separate process group.

Owns the transport (a gloo group used for nothing else, whatever backend training uses) and the
replication strategy that nvidia-resiliency-ext calls. Promises that only transfers agreed on by all
ranks are sent; that a rank whose own disk fails keeps receiving, so that no rank waits for it; that
every block of a complete copy matched its digest; that a wait ends a little before the group's
timeout; and that nothing is received into memory once a transfer has ended, failed or not. Refuses
nothing: failures are reported to the caller, which agrees on them with the other ranks.
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
"""Blocks of one stream in flight: one is received while another is digested and written."""
_PLACED_WINDOW = 8
"""Likewise for blocks received in place, which need no buffers: keeps the link busy."""
_CUTS_TAG = 1 << 16
"""Added to a stream's tag for the message in which its receiver says how blocks are cut."""
_TAKERS = 2
"""Threads that digest and place received blocks: one alone is no faster than the network."""
_PATIENCE = 0.75
"""Fraction of the group's timeout: leaves a rank time to report a failed wait to the others."""
_HEADER = struct.Struct("<QQQ")
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


class GroupBrokenError(Exception):
    """The group is unusable: a rank is gone, or did not answer in time."""


class OwnGroup(GroupWrapper):  # type: ignore[misc]  # the package ships no types
    """A gloo group for host memory, whatever backend training uses.

    `isend_state_dict` and `irecv_state_dict` are overridden: the stock ones use CUDA even on gloo,
    pickle the state, and leave the sender's object hollow when the transfer fails.
    """

    def __init__(self, group: Any, timeout_seconds: float) -> None:
        super().__init__(group)
        self._wait = timedelta(seconds=timeout_seconds * _PATIENCE)
        self.is_broken = False
        self.make_sink: Callable[[], Any] | None = None
        """Makes the sink, passed off as a state dict, that `irecv_state_dict` fills."""

    def stream(self, outgoing: Sequence[Outgoing], incoming: Sequence[Incoming]) -> None:
        """Carry out all transfers of this rank; a collective call over the group.

        Errors of sources and sinks are recorded in the transfers, which still run to their end.

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
            # In rounds, posting all operations of a round before waiting for any of them: the rank
            # furthest behind then finds its counterparts posted, so there is no circular wait
            # between ranks, however streams cross.
            under_way = list(lanes)
            while under_way:
                for lane in under_way:
                    lane.post()
                under_way = [lane for lane in under_way if lane.finish()]
        except BaseException as error:
            # The error's handler keeps its traceback, whose frames would keep alive the buffers of
            # receives that were posted.
            traceback.clear_frames(error.__traceback__)
            # gloo closes all connections if a wait times out; otherwise peers are mid-transfer.
            self.is_broken = True
            if not isinstance(error, RuntimeError):
                raise
            reason = str(error).rpartition("] ")[2] or str(error)
            raise GroupBrokenError(f"the exchange between ranks broke off: {reason}") from error
        finally:
            # If a rank is gone, connections to the others are still open, and by the time these
            # send, the memory may hold state loaded from elsewhere. Dropping the last reference to
            # a posted receive ends it.
            for lane in lanes:
                lane.abandon()

    def renew(self, group: Any) -> None:
        """Replace the broken group."""
        self._group = group
        self.is_broken = False

    def share(self, content: bytes, sizes: Sequence[int]) -> list[bytes]:
        """All-gather the content of every rank of the group; `sizes` were agreed on before.

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
        """Send a shard as it is, from memory or a file."""
        self.stream([Outgoing(dst, state_dict)], [])
        return {"data_sent": state_dict.size_bytes}

    def irecv_state_dict(self, src: int) -> tuple[Any, dict[str, float]]:
        """Receive a shard into a file."""
        assert self.make_sink is not None
        sink = self.make_sink()
        transfer = Incoming(src, sink)
        self.stream([], [transfer])
        sink.error = transfer.error
        return sink, {"data_recv": sink.size_bytes}

    def post_send(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
        """Post a send."""
        return distributed.isend(tensor, self.get_global_rank(rank), group=self.group, tag=tag)

    def post_receive(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
        """Post a receive."""
        return distributed.irecv(tensor, self.get_global_rank(rank), group=self.group, tag=tag)

    def wait(self, work: Any) -> None:
        """Wait for a posted operation."""
        work.wait(self._wait)


def _tags(peers: Iterable[int]) -> list[int]:
    """Number the streams to, or from, one rank; both sides list them in the same order."""
    counts: Counter[int] = Counter()
    tags = []
    for peer in peers:
        counts[peer] += 1
        tags.append(counts[peer])
    return tags


class _Buffers:
    """The buffers of one lane, one for each operation in flight."""

    def __init__(self, size_bytes: int, count: int) -> None:
        self._size_bytes, self._count = size_bytes, count
        self._buffers: dict[int, torch.Tensor] = {}

    def at(self, number: int, length: int) -> torch.Tensor:
        slot = number % self._count
        if slot not in self._buffers:
            self._buffers[slot] = torch.empty(self._size_bytes, dtype=torch.uint8, device="cpu")
        return self._buffers[slot][:length]


class _Lane:
    """One stream as a sequence of operations: its header, how blocks are cut, and the blocks."""

    def __init__(self, group: OwnGroup) -> None:
        self._group = group
        self._under_way: deque[tuple[list[Any], Callable[[], None] | None]] = deque()
        """For each operation, oldest first: what to wait for, and what to call then."""
        self._size, self._step = 0, 1
        """Bytes of the stream, 0 until blocks may be posted, and of a block."""
        self._window = _WINDOW
        self._posted = 0

    def post(self) -> None:
        """Post as many operations as the window allows."""
        while len(self._under_way) < self._window and self._has_more:
            offset = self._posted * self._step
            works, then = self._begin(self._posted, min(self._step, self._size - offset))
            self._under_way.append((works, then))
            self._posted += 1

    def finish(self) -> bool:
        """Wait for the oldest operation; return whether the stream has more."""
        works, then = self._under_way.popleft()
        for each in works:
            self._group.wait(each)
        if then is not None:
            then()
        return bool(self._under_way) or self._has_more

    def abandon(self) -> None:
        """Drop posted operations: memory is no longer sent from or received into."""
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
            message = torch.from_numpy(self._cuts).view(torch.uint8)
            work = group.post_receive(message, self._receiver, _CUTS_TAG + tag)
            self._under_way.append(([work], may_post))
        self._buffers = _Buffers(min(self._step, size_bytes), self._window)

    def _begin(self, number: int, length: int) -> tuple[list[Any], Callable[[], None] | None]:
        lengths = [length]
        if self._cuts is not None:
            lengths = [each for each in self._cuts[number].tolist() if each]
        pieces = _split(self._fill(number, sum(lengths)), lengths)
        return [self._group.post_send(each, self._receiver, self._tag) for each in pieces], None

    def _fill(self, number: int, length: int) -> torch.Tensor:
        """Return a block: in place, if it is in memory, or copied into a buffer."""
        offset = number * self._step
        if (in_place := self._source.view(offset, length)) is not None:
            return torch.frombuffer(in_place, dtype=torch.uint8)
        tensor = self._buffers.at(number, length)
        try:
            self._source.read_into(offset, bytes_of(tensor))
        except Exception:  # noqa: BLE001  # the receiver reports the digest mismatch
            tensor.zero_()
        return tensor


class _ReceiveLane(_Lane):
    def __init__(
        self, group: OwnGroup, transfer: Incoming, tag: int, beside: ThreadPoolExecutor
    ) -> None:
        super().__init__(group)
        self._transfer, self._tag = transfer, tag
        self._beside = beside
        """Digests and writes blocks while the next ones are received."""
        self._busy: dict[int, Future[None]] = {}
        """By slot of the window: what must end before its buffer is filled again."""
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
            message = torch.from_numpy(table).view(torch.uint8)
            work = group.post_send(message, transfer.sender, _CUTS_TAG + tag)
            self._under_way.append(([work], None))

    def finish(self) -> bool:
        has_more = super().finish()
        if not has_more:
            for each in self._busy.values():
                each.result()
        return has_more

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
        if not found:  # the sink failed: still receive the block, and discard it
            return _split(buffer, lengths)
        return [torch.frombuffer(each, dtype=torch.uint8) for each in found]

    def _hand_over(self, number: int, take: Callable[[], None]) -> None:
        self._busy[number % self._window] = self._beside.submit(self._transfer.guard, take)


def _no_cuts(blocks: int) -> Any:
    """Return an empty table of piece lengths, `MOST_PIECES` for each block."""
    return np.zeros((blocks, MOST_PIECES), dtype=np.uint32)


def _split(block: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return views of consecutive pieces of a block, which may be longer than all of them."""
    ends = list(itertools.accumulate(lengths))
    return [block[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a uint8 tensor on the host."""
    array: Any = tensor.numpy()
    return memoryview(array)


class ShardReplication(CliqueReplicationStrategy):  # type: ignore[misc]  # ships no types
    """Which rank holds whose copies, and how copies are sent.

    `replicate` is overridden: the stock one sends every tensor while training waits, rewrites the
    caller's object, and needs a clique size that divides the world. `retrieve_plan` likewise: the
    stock one considers a single clique, queries it in a collective that other ranks may never
    reach, and raises on some ranks only.
    """

    def __init__(
        self, group: OwnGroup, holders: Sequence[tuple[int, ...]], *, sends_images: bool
    ) -> None:
        super().__init__(group, target_device="cpu")
        self.holders = list(holders)
        """By owner: the ranks that hold its shard, the owner first."""
        self.sends_images = sends_images
        """Whether holders receive the whole shard; otherwise the small states alone."""

    @property
    def sends_anything(self) -> bool:
        """Whether any rank holds a copy for another one."""
        return any(len(each) > 1 for each in self.holders)

    def replicate(self, local_ckpt: Any, id_: Any) -> tuple[list[Any], list[Any]]:
        """Return the own shard at once; `exchange` sends it later, on another thread."""
        return [local_ckpt], [id_]

    def exchange(
        self, source: Source | None, rank: int, sinks: dict[int, Sink]
    ) -> dict[int, Exception]:
        """Send this rank's shard to its holders, receive others' copies; return errors by owner.

        A collective call, on the thread that writes.

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
        """Return the owners of the copies that a rank holds."""
        return [
            owner for owner, ranks in enumerate(self.holders) if rank in ranks and owner != rank
        ]

    def retrieve_plan(self, globally_available_ids: Any, wanted: Sequence[Any]) -> ExchangePlan:
        """Return who sends what to whom, computed alike on every rank from shared knowledge.

        `globally_available_ids`: by rank, the ids it can send; `wanted`: pairs of rank and id. An
        id without a sender is left out; the caller decides what that means.
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
