"""Copies of shards on other ranks: who holds them, what it takes to send them, and over what.

Owns the only use of nvidia-resiliency-ext (its exchange plans, and its wrapper of a process group),
imported when a job first uses a local tier: where it is missing or broken, the error says what to
do. Owns the process groups that copies are sent over and nothing else: gloo from host memory,
whatever backend training uses, or NCCL through each rank's GPU. With gloo a rank is connected to
its peers of copies alone, and to all ranks once a load needs it. Promises that only transfers that
all ranks agreed on are sent, and that a wait ends a little before the backend's timeout: NCCL would
end the process. A requirement this rank does not meet is an error before anything is connected.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import distributed

from holdfast.caller import in_normal_mode
from holdfast.config import ReplicationConfig
from holdfast.errors import ConfigError
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.topology import assign_holders, find_clique
from holdfast.read.shared import BACKEND_PATIENCE
from holdfast.tiers.local.exchange import (
    Incoming,
    Message,
    Outgoing,
    Sink,
    Source,
    carry_out,
    to_bytes,
)
from holdfast.torch_internals import abort_group

logger = logging.getLogger(__name__)

_WINDOW = 4
"""Blocks of one stream in flight: one is received while another is digested and written."""
_PLACED_WINDOW = 8
"""Likewise for blocks received in place, which need no buffers: keeps the link busy."""
_PATIENCE = 0.75
"""Fraction of the group's timeout: leaves a rank time to report a failed wait to the others."""
_POLL_SECONDS = 0.0005


def load_package() -> Any:
    """Return the module of nvidia-resiliency-ext that plans exchanges and wraps process groups.

    Raises:
        ConfigError: it is missing, or does not work here.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "The pynvml package is deprecated", category=FutureWarning
            )
            from nvidia_resiliency_ext.checkpointing.local.replication import group_utils
    except ImportError as error:
        problem = (
            "checkpoint.local.directory is set, but nvidia-resiliency-ext cannot be imported "
            f"({error}); install nvidia-resiliency-ext>=0.4.1,<0.8 (Linux, Python below 3.13), "
            "or set local.directory to null"
        )
        raise ConfigError([problem]) from error
    return group_utils


def wrap_group(group: Any) -> Any:
    """Return the package's wrapper of a process group, which translates ranks."""
    return load_package().GroupWrapper(group)


def device_of(transport: str) -> torch.device | None:
    """Return this rank's current GPU, as training has set it; None: the transport needs none.

    Raises:
        ConfigError: the transport needs a GPU and there is none, or torch has no NCCL.
    """
    if transport != "nccl":
        return None
    lacks = None
    if not torch.cuda.is_available():
        lacks = "this rank sees no GPU"
    elif not distributed.is_nccl_available():
        lacks = "this torch has no NCCL"
    if lacks is not None:
        problem = f"checkpoint.local.replication.transport is 'nccl', and {lacks}; use 'gloo'"
        raise ConfigError([problem])
    return torch.device("cuda", torch.cuda.current_device())


def new_group(transport: str, timeout_seconds: float, ranks: Sequence[int] | None = None) -> Any:
    """Create a process group for exchanges; a collective call, on the training thread.

    `ranks`: its members, which alone make the call. None: all ranks.
    """
    if device_of(transport) is None:
        return distributed.new_group(
            None if ranks is None else list(ranks),
            backend="gloo",
            timeout=timedelta(seconds=timeout_seconds),
            use_local_synchronization=ranks is not None,
        )
    patience = timedelta(seconds=timeout_seconds * BACKEND_PATIENCE)
    return distributed.new_group(backend="nccl", timeout=patience)


def open_group(transport: str, timeout_seconds: float) -> HostGroup:
    """Create a group for exchanges and connect its ranks; collective, on the training thread."""
    group, device = new_group(transport, timeout_seconds), device_of(transport)
    if device is None:
        return HostGroup(group, timeout_seconds)
    return DeviceGroup(group, timeout_seconds, device)


class GroupBrokenError(Exception):
    """The group is unusable: a rank is gone, or did not answer in time."""


class HostGroup:
    """A process group whose backend sends from host memory (gloo)."""

    copies_blocks = False
    """Whether blocks are copied to and from memory of the backend, a device."""

    def __init__(self, group: Any, timeout_seconds: float) -> None:
        """`group`: used for nothing else."""
        self.wrapped = wrap_group(group)
        """As nvidia-resiliency-ext has it."""
        self._wait = timedelta(seconds=timeout_seconds * _PATIENCE)
        self.is_broken = False

    def renew(self, group: Any) -> None:
        """Replace the broken group."""
        self.wrapped = wrap_group(group)
        self.is_broken = False

    def stream(self, outgoing: Sequence[Outgoing], incoming: Sequence[Incoming]) -> None:
        """Carry out all transfers of this rank; a collective call over the group.

        Errors of sources and sinks are recorded in the transfers, which still run to their end.

        Raises:
            GroupBrokenError: a rank is gone or silent.
        """
        try:
            with self.beside_training():
                carry_out(self, outgoing, incoming)
        except BaseException as error:
            # gloo closes all connections if a wait times out; otherwise peers are mid-transfer.
            self.is_broken = True
            if not isinstance(error, RuntimeError):
                raise
            reason = str(error).rpartition("] ")[2] or str(error)
            raise GroupBrokenError(f"the exchange between ranks broke off: {reason}") from error

    def share(self, content: bytes, sizes: Sequence[int]) -> list[bytes]:
        """All-gather the content of every rank of the group; `sizes` were agreed on before.

        Raises:
            GroupBrokenError: as `stream`.
        """
        shared = []
        try:
            for rank, size_bytes in enumerate(sizes):
                mine = content if rank == self.wrapped.my_group_rank else bytes(size_bytes)
                shared.append(self._broadcast(mine, rank) if size_bytes else b"")
        except RuntimeError as error:
            self.is_broken = True
            raise GroupBrokenError(f"ranks could not share: {error}") from error
        return shared

    def _broadcast(self, content: bytes, rank: int) -> bytes:
        with self.beside_training():
            tensor = self.to_tensor(content)
            source = self.wrapped.get_global_rank(rank)
            self.wait(
                distributed.broadcast(tensor, source, group=self.wrapped.group, async_op=True)
            )
            return to_bytes(tensor)

    # -- what differs between backends -----------------------------------------------------------

    def window(self, *, in_pieces: bool) -> int:
        """Return how many blocks of one stream may be in flight."""
        return _PLACED_WINDOW if in_pieces else _WINDOW

    def post(self, messages: Iterable[Message]) -> None:
        """Post the messages of a round, each as soon as it is made."""
        for each in messages:
            post = distributed.isend if each.sends else distributed.irecv
            each.work = post(each.tensor, each.rank, group=self.wrapped.group, tag=each.tag)

    def wait(self, work: Any) -> None:
        """Wait for a posted message, a little shorter than the backend would.

        Raises:
            RuntimeError: it failed or timed out.
        """
        work.wait(self._wait)

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Return host memory for blocks."""
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")

    def backend_buffer(self, size_bytes: int) -> torch.Tensor:
        """Return memory that the backend sends from and receives into."""
        return self.host_buffer(size_bytes)

    def to_tensor(self, content: bytes) -> torch.Tensor:
        """Return a small message in such memory."""
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def beside_training(self) -> AbstractContextManager[Any]:
        """Return the context of all copies and messages."""
        return nullcontext()


class DeviceGroup(HostGroup):
    """A process group whose backend sends from the memory of one device (NCCL).

    Such a backend has no tags and matches messages by order alone, so each stream has one message
    in each round, a round is posted as one batch in the same order on both sides of a pair, and no
    round starts before the last one has ended. Both sides of a stream have the same number of
    rounds. While a block is in flight, the next one is copied to the device and the one before it
    back. A failed wait aborts the group here, before the backend ends the process. Runs on any
    device that torch can copy to and has a backend for.
    """

    copies_blocks = True

    def __init__(self, group: Any, timeout_seconds: float, device: torch.device) -> None:
        """Connect all ranks of the group; a collective call."""
        super().__init__(group, timeout_seconds)
        self._device = device
        # On training's own stream each copy would wait for the work that training has queued.
        self._queue: Any = None
        if device.type == "cuda":
            self._queue = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._connect()

    def renew(self, group: Any) -> None:
        """Replace the broken group, and connect all ranks of the new one."""
        super().renew(group)
        self._connect()

    def _connect(self) -> None:
        # The first operation connects ranks. Run it where all ranks take part: in an exchange some
        # may have nothing to send or to receive.
        with self.beside_training():
            tensor = torch.zeros(1, device=self._device)
            self.wait(distributed.all_reduce(tensor, group=self.wrapped.group, async_op=True))

    def window(self, *, in_pieces: bool) -> int:
        """One: a round matches the peer's round."""
        return 1

    def post(self, messages: Iterable[Message]) -> None:
        """Post all messages of a round as one batch."""
        batch = list(messages)
        works = distributed.batch_isend_irecv(
            [
                distributed.P2POp(
                    distributed.isend if each.sends else distributed.irecv,
                    each.tensor,
                    each.rank,
                    self.wrapped.group,
                )
                for each in batch
            ]
        )
        if len(works) == 1:  # NCCL has one for the whole batch
            works *= len(batch)
        for each, work in zip(batch, works, strict=True):
            each.work = work

    def wait(self, work: Any) -> None:
        """As the base class."""
        if self._queue is None:
            super().wait(work)
            return
        # Do not use the backend's timeout: when it expires, NCCL's watchdog ends the process.
        deadline = time.monotonic() + self._wait.total_seconds()
        while not work.is_completed():
            if time.monotonic() > deadline:
                abort_group(self.wrapped.group)
                raise RuntimeError(f"no answer within {self._wait.total_seconds():g} s")
            time.sleep(_POLL_SECONDS)
        work.wait()  # raises the operation's error

    @in_normal_mode  # other threads copy into it
    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Return host memory for copies to and from the device, pinned where that is CUDA."""
        return torch.empty(
            size_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._queue is not None
        )

    @in_normal_mode  # likewise
    def backend_buffer(self, size_bytes: int) -> torch.Tensor:
        """Return memory of the device."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def to_tensor(self, content: bytes) -> torch.Tensor:
        """As the base class."""
        return super().to_tensor(content).to(self._device)

    def beside_training(self) -> AbstractContextManager[Any]:
        """As the base class."""
        return nullcontext() if self._queue is None else torch.cuda.stream(self._queue)


class CopySink(Sink, Protocol):
    """Receives a copy of a shard."""

    error: Exception | None
    """The first local error during the transfer."""


class Replication:
    """Which rank holds whose copies, and the group that they are sent over.

    Of nvidia-resiliency-ext's own strategy nothing would remain: it sends every tensor while
    training waits, rewrites the caller's object, needs a clique size that divides the world, and
    plans a retrieval in a collective that other ranks may never reach.
    """

    def __init__(
        self,
        group: HostGroup | None,
        holders: Sequence[tuple[int, ...]],
        *,
        sends_images: bool,
        renew: Callable[[], Any],
        open_wide: Callable[[], HostGroup] | None = None,
    ) -> None:
        """`group`: of the ranks that send each other copies; None: this rank has no such peer.

        `renew` makes its process group again. `open_wide` makes a group of all ranks, which only a
        load after a loss needs; None: `group` is one.
        """
        self.group = group
        self.holders = list(holders)
        """By owner: the ranks that hold its shard, the owner first."""
        self.sends_images = sends_images
        """Whether holders receive the whole shard; otherwise the small states alone."""
        self._renew = renew
        self._open_wide = open_wide
        self._wide = group if open_wide is None else None

    @property
    def is_broken(self) -> bool:
        """Whether this rank can send no copies any more."""
        return self.group is not None and self.group.is_broken

    def renew(self) -> None:
        """Replace a broken group; every rank calls it, on the training thread."""
        if self.group is not None:
            self.group.renew(self._renew())

    def connect_all(self, coordinator: Coordinator) -> None:
        """Connect each rank to each where that is not done; collective, on the training thread."""
        is_missing = self._wide is None or self._wide.is_broken
        if self._open_wide and coordinator.all_reduce("local mesh", lambda: is_missing, any):
            self._wide = self._open_wide()

    @property
    def has_all(self) -> bool:
        """Whether each rank is connected to each."""
        return self._wide is not None

    @property
    def wide(self) -> HostGroup:
        """The group of all ranks, once it is connected."""
        assert self._wide is not None
        return self._wide

    @property
    def sends_anything(self) -> bool:
        """Whether any rank holds a copy for another one."""
        return any(len(each) > 1 for each in self.holders)

    def owners_held_by(self, rank: int) -> list[int]:
        """Return the owners of the copies that a rank holds."""
        return [
            owner for owner, ranks in enumerate(self.holders) if rank in ranks and owner != rank
        ]

    def plan_save(self, rank: int) -> Any:
        """Return what a rank sends and receives in a save: each sends its shard to its holders."""
        plan = self._new_plan()
        for owner, ranks in enumerate(self.holders):
            for holder in ranks[1:]:
                if rank in (owner, holder):
                    plan.plan(sender=owner, receiver=holder, id_=owner)
        return plan

    def plan_restore(
        self, available: Sequence[Iterable[int]], wanted: Sequence[tuple[int, int]]
    ) -> Any:
        """Return who sends what to whom after a loss, computed alike on every rank.

        `available`: by rank, the owners whose shard it can send; `wanted`: pairs of receiver and
        owner. A shard without a sender is left out; the caller decides what that means.
        """
        plan = self._new_plan()
        loads = [0] * len(available)
        for receiver, owner in wanted:
            senders = [
                rank
                for rank, owners in enumerate(available)
                if owner in owners and rank != receiver
            ]
            if senders:
                sender = min(senders, key=lambda rank: (loads[rank], rank))
                loads[sender] += 1
                plan.plan(sender=sender, receiver=receiver, id_=owner)
        return plan

    def _new_plan(self) -> Any:
        return load_package().ExchangePlan(group=None if self.group is None else self.group.wrapped)

    def exchange(
        self,
        plan: Any,
        rank: int,
        sources: Mapping[int, Source],
        sinks: Mapping[int, CopySink],
        group: HostGroup | None,
    ) -> None:
        """Send and receive what a plan has for this rank; a collective call, on any thread.

        `group`: `self.group` for a save, `wide` for a plan between any two ranks.

        `sources`, `sinks`: by owner. A sink records its first local error.

        Raises:
            GroupBrokenError: a rank is gone or silent.
        """
        outgoing = [
            Outgoing(each.receiver, sources[each.id_])
            for each in plan.entries
            if each.sender == rank
        ]
        incoming = [
            Incoming(each.sender, sinks[each.id_]) for each in plan.entries if each.receiver == rank
        ]
        if group is not None:
            group.stream(outgoing, incoming)
        owners = [each.id_ for each in plan.entries if each.receiver == rank]
        for owner, transfer in zip(owners, incoming, strict=True):
            sinks[owner].error = transfer.error


def make_replication(
    config: ReplicationConfig, nodes: Sequence[int], rank: int, timeout_seconds: float
) -> Replication | None:
    """Return who holds whose copies, over new groups; None: there is one rank.

    `nodes`: the node of each rank. A collective call, on the training thread.
    """
    if len(nodes) == 1:
        return None
    factor = config.factor
    # Even without copies of shards the small states go to another node: where the remaining shards
    # cover the state, the small states are all that a lost node would take with it.
    copies = factor if factor > 1 else min(2, len(set(nodes)))
    holders = assign_holders(nodes, copies, config.jump)
    if factor > 1 and min(map(len, holders)) < factor and rank == 0:
        logger.warning(
            "checkpoint.local.replication.factor is %d; this job has too few ranks for it", factor
        )
    transport = config.transport
    if device_of(transport) is not None:
        return Replication(
            open_group(transport, timeout_seconds),
            holders,
            sends_images=factor > 1,
            renew=lambda: new_group(transport, timeout_seconds),
        )
    clique = find_clique(holders, rank)

    def connect() -> Any:
        return new_group(transport, timeout_seconds, clique)

    return Replication(
        HostGroup(connect(), timeout_seconds) if len(clique) > 1 else None,
        holders,
        sends_images=factor > 1,
        renew=connect,
        open_wide=lambda: open_group(transport, timeout_seconds),
    )
