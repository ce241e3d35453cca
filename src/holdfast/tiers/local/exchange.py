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
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

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
from holdfast.tiers.local.streams import (
    HEADER,
    Blocks,
    Incoming,
    IncomingBlocks,
    Outgoing,
    OutgoingBlocks,
    PlacedSink,
    Sink,
    Source,
    bytes_of,
)

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
        try:
            self._stream(outgoing, incoming)
        except RuntimeError as error:
            self.is_broken = True
            reason = str(error).rpartition("] ")[2] or str(error)
            raise GroupBrokenError(f"the exchange between ranks broke off: {reason}") from error

    def _stream(self, outgoing: Sequence[Outgoing], incoming: Sequence[Incoming]) -> None:
        name = "holdfast-receiver"
        lanes: list[_Lane] = []
        with (
            ThreadPoolExecutor(1, thread_name_prefix=name) as one,
            ThreadPoolExecutor(_TAKERS, thread_name_prefix=name) as several,
        ):
            try:
                for out, tag in zip(outgoing, _tags(x.receiver for x in outgoing), strict=True):
                    lanes.append(_SendLane(self, out, tag))
                for coming, tag in zip(incoming, _tags(x.sender for x in incoming), strict=True):
                    beside = several if getattr(coming.sink, "in_any_order", False) else one
                    lanes.append(_ReceiveLane(self, coming, tag, beside))
                # In rounds, posting all operations of a round before waiting for any of them: the
                # rank furthest behind then finds its counterparts posted, so there is no circular
                # wait between ranks, however streams cross.
                under_way = list(lanes)
                while under_way:
                    for lane in under_way:
                        lane.post()
                    under_way = [lane for lane in under_way if lane.finish()]
            except BaseException as error:
                # The error's handler keeps its traceback, whose frames would keep alive the buffers
                # of receives that were posted.
                traceback.clear_frames(error.__traceback__)
                # gloo closes all connections if a wait times out; otherwise peers are mid-transfer.
                self.is_broken = True
                raise
            finally:
                # If a rank is gone, connections to the others are still open, and by the time these
                # send, the memory may hold state loaded from elsewhere. Dropping the last reference
                # to a posted receive ends it.
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
        try:
            for rank, size_bytes in enumerate(sizes):
                mine = content if rank == self.my_group_rank else bytes(size_bytes)
                shared.append(self._broadcast(mine, rank) if size_bytes else b"")
        except RuntimeError as error:
            self.is_broken = True
            raise GroupBrokenError(f"ranks could not share: {error}") from error
        return shared

    def _broadcast(self, content: bytes, rank: int) -> bytes:
        buffer = bytearray(content)
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
        self.broadcast(tensor, src=self.get_global_rank(rank))
        return bytes(buffer)

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


class _Lane:
    """One stream as a sequence of operations: its header, how blocks are cut, and the blocks."""

    _blocks: Blocks

    def __init__(self, group: OwnGroup, window: int) -> None:
        self._group = group
        self._under_way: deque[tuple[list[Any], Callable[[], None] | None]] = deque()
        """For each operation, oldest first: what to wait for, and what to call then."""
        self._window = window
        self._posted = 0
        self._may_post = True
        """False until the other side has said how blocks are cut."""

    def post(self) -> None:
        """Post as many operations as the window allows."""
        while len(self._under_way) < self._window and (length := self._next_length):
            self._under_way.append(self._begin(self._posted, length))
            self._posted += 1

    def finish(self) -> bool:
        """Wait for the oldest operation; return whether the stream has more."""
        works, then = self._under_way.popleft()
        for each in works:
            self._group.wait(each)
        if then is not None:
            then()
        return bool(self._under_way) or self._next_length > 0

    def abandon(self) -> None:
        """Drop posted operations: memory is no longer sent from or received into."""
        self._under_way.clear()

    @property
    def _next_length(self) -> int:
        """The bytes of the block to post next; 0: there is none, or none yet."""
        return self._blocks.length(self._posted) if self._may_post else 0

    def _begin(self, number: int, length: int) -> tuple[list[Any], Callable[[], None] | None]:
        """Post one block."""
        raise NotImplementedError


class _SendLane(_Lane):
    _blocks: OutgoingBlocks

    def __init__(self, group: OwnGroup, transfer: Outgoing, tag: int) -> None:
        super().__init__(group, _PLACED_WINDOW if transfer.is_cut else _WINDOW)
        self._blocks = blocks = OutgoingBlocks(transfer.source, _host_buffer, self._window)
        self._receiver, self._tag = transfer.receiver, tag
        work = group.post_send(blocks.header(), self._receiver, tag)
        self._under_way.append(([work], None))
        self._cuts: Any = None
        if transfer.is_cut:
            self._may_post = False
            self._cuts = _no_cuts(-(-blocks.size_bytes // blocks.block_bytes))
            message = torch.from_numpy(self._cuts).view(torch.uint8)
            work = group.post_receive(message, self._receiver, _CUTS_TAG + tag)
            self._under_way.append(([work], self._start))

    def _start(self) -> None:
        self._may_post = True

    def _begin(self, number: int, length: int) -> tuple[list[Any], Callable[[], None] | None]:
        lengths = [length]
        if self._cuts is not None:
            lengths = [each for each in self._cuts[number].tolist() if each]
        pieces = _split(self._blocks.read(number, sum(lengths)), lengths)
        return [self._group.post_send(each, self._receiver, self._tag) for each in pieces], None


class _ReceiveLane(_Lane):
    _blocks: IncomingBlocks

    def __init__(
        self, group: OwnGroup, transfer: Incoming, tag: int, beside: ThreadPoolExecutor
    ) -> None:
        super().__init__(group, _WINDOW if transfer.placed is None else _PLACED_WINDOW)
        self._blocks = IncomingBlocks(transfer, beside, _host_buffer, self._window)
        self._transfer, self._tag = transfer, tag
        header = bytearray(HEADER.size)
        tensor = torch.frombuffer(header, dtype=torch.uint8)
        work = group.post_receive(tensor, transfer.sender, tag)
        self._under_way.append(([work], partial(self._blocks.read_header, header)))
        if transfer.placed is not None:
            cuts = transfer.placed.cuts
            table = _no_cuts(len(cuts))
            for row, lengths in zip(table, cuts, strict=True):
                row[: len(lengths)] = lengths
            message = torch.from_numpy(table).view(torch.uint8)
            work = group.post_send(message, transfer.sender, _CUTS_TAG + tag)
            self._under_way.append(([work], None))

    def finish(self) -> bool:
        has_more = super().finish()
        if not has_more:
            self._blocks.wait()
        return has_more

    def _begin(self, number: int, length: int) -> tuple[list[Any], Callable[[], None] | None]:
        buffer, placed = self._blocks.buffer(number, length), self._transfer.placed
        if placed is None:
            pieces = [buffer]
            then = partial(self._blocks.put, number, buffer)
        else:
            pieces = self._expect(placed, number, buffer)
            then = partial(self._blocks.hand_over, number, partial(placed.arrived, number))
        sender = self._transfer.sender
        return [self._group.post_receive(each, sender, self._tag) for each in pieces], then

    def _expect(self, placed: PlacedSink, number: int, buffer: torch.Tensor) -> list[torch.Tensor]:
        lengths = placed.cuts[number]
        found: list[memoryview] = []
        self._transfer.guard(lambda: found.extend(placed.expect(number, bytes_of(buffer))))
        if not found:  # the sink failed: still receive the block, and discard it
            return _split(buffer, lengths)
        return [torch.frombuffer(each, dtype=torch.uint8) for each in found]


def _host_buffer(size_bytes: int) -> torch.Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")


def _no_cuts(blocks: int) -> Any:
    """Return an empty table of piece lengths, `MOST_PIECES` for each block."""
    return np.zeros((blocks, MOST_PIECES), dtype=np.uint32)


def _split(block: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return views of consecutive pieces of a block, which may be longer than all of them."""
    ends = list(itertools.accumulate(lengths))
    return [block[end - length : end] for end, length in zip(ends, lengths, strict=True)]


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
