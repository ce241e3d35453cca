"""Copies of shards travel between ranks: off the training thread, over a group of their own.

Owns the transport (a gloo group that nobody else uses, any backend beside it) and the strategy that
nvidia-resiliency-ext asks for it. Promises that nothing is sent which all ranks have not agreed on
before, that a rank whose own disk fails goes on receiving so that nobody waits for it, that every
block a copy is made of matched its digest when the copy is whole, and that a wait ends a little
before the group's timeout. Refuses nothing: what failed is told to the caller, who agrees on it.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
from nvidia_resiliency_ext.checkpointing.local.replication.group_utils import (
    ExchangePlan,
    GroupWrapper,
)
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import (
    CliqueReplicationStrategy,
)
from torch import distributed

_WINDOW = 4
"""Blocks of one stream under way at a time: one arrives while one is digested and written."""
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


@dataclass
class Outgoing:
    """One stream to another rank."""

    receiver: int
    source: Source


@dataclass
class Incoming:
    """One stream from another rank, and what went wrong with it here."""

    sender: int
    sink: Sink
    error: Exception | None = None

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
        try:
            lanes: list[_Lane] = [
                _SendLane(self, each, tag)
                for each, tag in zip(outgoing, _tags(x.receiver for x in outgoing), strict=True)
            ]
            lanes += [
                _ReceiveLane(
                    self, each, tag, several if getattr(each.sink, "in_any_order", False) else one
                )
                for each, tag in zip(incoming, _tags(x.sender for x in incoming), strict=True)
            ]
            # In rounds, and everything of a round posted before any of it is waited for: whoever is
            # furthest behind finds its counterparts posted, so that no ranks wait for one another
            # in a circle, however streams cross.
            while lanes:
                for lane in lanes:
                    lane.post()
                lanes = [lane for lane in lanes if lane.finish()]
        except RuntimeError as error:
            self.is_broken = True  # gloo closes its connections at the first wait that fails
            reason = str(error).rpartition("] ")[2] or str(error)
            raise GroupBrokenError(f"the exchange between ranks broke off: {reason}") from error

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


class _Lane(Protocol):
    def post(self) -> None:
        """Begin as many operations as the window takes."""
        ...

    def finish(self) -> bool:
        """Wait for the oldest operation; False: it was the last of the stream."""
        ...


@dataclass
class _Buffers:
    """The window of one lane: as many buffers as operations under way."""

    size_bytes: int
    _buffers: list[bytearray] = field(default_factory=list)

    def at(self, number: int, length: int) -> tuple[memoryview, torch.Tensor]:
        slot = number % _WINDOW
        while len(self._buffers) <= slot:
            self._buffers.append(bytearray(self.size_bytes))
        view = memoryview(self._buffers[slot])[:length]
        return view, torch.frombuffer(view, dtype=torch.uint8)


class _SendLane:
    def __init__(self, group: OwnGroup, transfer: Outgoing, tag: int) -> None:
        self._group, self._transfer, self._tag = group, transfer, tag
        self._source = transfer.source
        self._size = self._source.size_bytes
        self._step = self._source.block_bytes
        header = bytearray(_HEADER.pack(self._size, self._source.body_bytes, self._step))
        tensor = torch.frombuffer(header, dtype=torch.uint8)
        self._works = [group.post_send(tensor, transfer.receiver, tag)]
        self._buffers = _Buffers(min(self._step, self._size))
        self._posted = 0

    def post(self) -> None:
        while len(self._works) <= _WINDOW - 1 and self._posted * self._step < self._size:
            offset = self._posted * self._step
            length = min(self._step, self._size - offset)
            tensor = self._fill(offset, length)
            self._works.append(self._group.post_send(tensor, self._transfer.receiver, self._tag))
            self._posted += 1

    def _fill(self, offset: int, length: int) -> torch.Tensor:
        """Return the next block: where it lies, if that is memory, or in a buffer."""
        if (in_place := self._source.view(offset, length)) is not None:
            return torch.frombuffer(in_place, dtype=torch.uint8)
        view, tensor = self._buffers.at(self._posted, length)
        try:
            self._source.read_into(offset, view)
        except Exception:  # noqa: BLE001  # the receiver finds the digest wrong, and says so
            view[:] = bytes(length)
        return tensor

    def finish(self) -> bool:
        self._group.wait(self._works.pop(0))
        return bool(self._works) or self._posted * self._step < self._size


class _ReceiveLane:
    def __init__(
        self, group: OwnGroup, transfer: Incoming, tag: int, beside: ThreadPoolExecutor
    ) -> None:
        self._group, self._transfer, self._tag = group, transfer, tag
        self._beside = beside
        """Where blocks are digested and written while the next ones arrive."""
        self._busy: dict[int, Future[None]] = {}
        """By place in the window: what must end before its buffer is filled again."""
        self._header = bytearray(_HEADER.size)
        tensor = torch.frombuffer(self._header, dtype=torch.uint8)
        self._pending: list[tuple[Any, int, memoryview | None]] = [
            (group.post_receive(tensor, transfer.sender, tag), 0, None)
        ]
        self._size = 0
        self._step = 1
        self._posted = 0
        self._buffers = _Buffers(0)

    def post(self) -> None:
        while len(self._pending) <= _WINDOW - 1 and self._posted * self._step < self._size:
            offset = self._posted * self._step
            if (earlier := self._busy.pop(self._posted % _WINDOW, None)) is not None:
                earlier.result()
            view, tensor = self._buffers.at(self._posted, min(self._step, self._size - offset))
            work = self._group.post_receive(tensor, self._transfer.sender, self._tag)
            self._pending.append((work, offset, view))
            self._posted += 1

    def finish(self) -> bool:
        work, offset, block = self._pending.pop(0)
        self._group.wait(work)
        if block is None:
            self._size, body_bytes, self._step = _HEADER.unpack(self._header)
            self._buffers = _Buffers(min(self._step, self._size))
            self._transfer.guard(lambda: self._transfer.sink.begin(self._size, body_bytes))
        else:
            received = block
            put = partial(self._transfer.guard, lambda: self._transfer.sink.put(offset, received))
            self._busy[offset // self._step % _WINDOW] = self._beside.submit(put)
        goes_on = bool(self._pending) or self._posted * self._step < self._size
        if not goes_on:
            for each in self._busy.values():
                each.result()
        return goes_on


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
