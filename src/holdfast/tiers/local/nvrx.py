"""The adapter to nvidia-resiliency-ext: its local checkpoint manager and its view of a shard.

Owns the order of a local save across ranks once shards are sealed (exchange, publish, prune), the
agreement on what can be loaded, and fetching a lost shard from a peer. Each override names the
defect of the stock body that it covers. Promises that ranks agree through the coordinator before
and after every exchange, that a failed save leaves what was published before it, and that the stock
names stay. `ShardState` is one uint8 tensor over the image and never holds live objects: the
package's own class takes a live optimizer apart, demands tensors on a GPU, and sends strided ones
wrongly. Importing this module imports the package, which not every platform has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncRequest
from nvidia_resiliency_ext.checkpointing.local.base_state_dict import TensorAwareStateDict
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.base_manager import (
    CheckpointingException,
)
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import (
    LocalCheckpointManager,
)

from holdfast.errors import CorruptCheckpointError
from holdfast.ranks.coordinator import Coordinator, SingleProcess
from holdfast.read.direct import Part, read_verified
from holdfast.storage.posix import naming, read_into
from holdfast.tiers.local.availability import Commit, Objection, Verdict
from holdfast.tiers.local.budget import Topology
from holdfast.tiers.local.exchange import OwnGroup, ShardReplication
from holdfast.tiers.local.pool import PooledFile
from holdfast.tiers.local.recovery import CkptId, Recovery
from holdfast.tiers.local.shard_file import RunDirectory, Trailer, shard_name
from holdfast.tiers.local.shards import MemoryShard, ReceivedShard, ShardDirectory
from holdfast.tiers.local.transport import DeviceGroup


class ShardState(TensorAwareStateDict):  # type: ignore[misc]  # the package ships no types
    """The image of one shard, its tail, and where it lies until it is published."""

    def __init__(
        self, image: memoryview, tail: Trailer, pending: Path, file: PooledFile | None
    ) -> None:
        self.tail = tail
        self.image = image
        self.pending = pending
        """Where it lies, sealed, until it is published."""
        self.file = file
        """The same, where files take turns."""
        self._image: torch.Tensor | None = torch.frombuffer(image, dtype=torch.uint8)

    def pop_tensors(self) -> list[torch.Tensor]:
        """Return the image; the state is hollow until it is given one back."""
        (tensor,) = self.tensors
        self._image = None
        return [tensor]

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        """The image."""
        assert self._image is not None, "this state is hollow"
        return [self._image]

    @property
    def is_hollow(self) -> bool:
        """Whether the image was taken away."""
        return self._image is None

    def insert_tensors(self, tensor_data: Iterable[torch.Tensor]) -> None:
        """Undo `pop_tensors`."""
        (self._image,) = tensor_data

    def init_tensors(self) -> None:
        """Make room for an image."""
        self._image = torch.empty(self.tail.record.image_bytes, dtype=torch.uint8, device="cpu")

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        """The image lies in host memory: there is nothing to copy, and nothing to wait for."""

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        """Where tensors belong is the business of whoever reads them from the image."""


logger = logging.getLogger(__name__)


class ShardManager(LocalCheckpointManager):  # type: ignore[misc]  # the package ships no types
    """The shard files of one rank, and what all ranks do about theirs."""

    def __init__(
        self,
        run: RunDirectory,
        rank: int,
        topology: Topology,
        strategy: ShardReplication | None,
        keep_last: int,
        *,
        in_memory: bool,
    ) -> None:
        super().__init__(run.root.parent, session_id=run.run_id, repl_strategy=strategy)
        self._rank = rank  # the stock property asks torch.distributed, which one process needs not
        self.run = run
        self.topology = topology
        self.in_memory = in_memory
        self.coordinator: Coordinator = SingleProcess()
        """The channel of the thread that calls; set by whoever calls."""
        self.kept: list[Commit] = []
        """What retention leaves, newest first."""
        self._keep_last = keep_last
        held = len(strategy.owners_held_by(rank)) if strategy is not None else 0
        self.shelf = ShardDirectory(
            run, rank, topology, turns=keep_last + 1, copies=held, in_memory=in_memory
        )
        self.recovery = Recovery(self.shelf, strategy)
        self._received: dict[int, tuple[ReceivedShard, Trailer | None]] = {}
        """Copies of the save under way, by owner."""

    # -- save ------------------------------------------------------------------------------------

    def save(
        self, state_dict: ShardState, iteration: int, is_async: bool = False
    ) -> AsyncRequest | None:
        """Exchange, publish and prune, together with every other rank, on whatever thread writes.

        Overridden: the stock body refuses an iteration that is not the newest, replicates while
        training waits, meets the others on the trainer's group, in which a rank that failed leaves
        them waiting, and asks CUDA to synchronise.
        """
        # By name: the defaults of this tuple differ between versions of the package.
        request = AsyncRequest(
            async_fn=self._save_together,
            async_fn_args=(state_dict, iteration),
            finalize_fns=[],
            async_fn_kwargs={},
        )
        if is_async:
            return request
        request.async_fn(*request.async_fn_args)
        return None

    def _save_together(self, state: ShardState, iteration: int) -> None:
        strategy, coordinator = self.repl_strategy, self.coordinator
        commit = state.tail.record.commit
        try:
            if strategy is not None and strategy.sends_anything:
                # All ranks have sealed their shards, as the caller agreed: nobody stays away.
                coordinator.all_reduce(
                    "local exchange", lambda: self._exchange(strategy, state), _nothing
                )
            coordinator.all_reduce("local publish", lambda: self._publish_all(state), _nothing)
        except BaseException:
            self._cleanup_failed_save(iteration)
            raise
        self.shelf.settle()
        # An older commit of the same iteration has served: it stood until this one was agreed on.
        others = [each for each in self.kept if each[2] != iteration]
        self.kept = [commit, *others][: self._keep_last]
        self._cleanup(iteration)

    def _exchange(self, strategy: ShardReplication, state: ShardState) -> None:
        tail = state.tail
        record = tail.record
        if strategy.sends_images:
            source = MemoryShard(state.image, record.body_bytes, tail.to_bytes())
        else:
            source = MemoryShard(memoryview(b""), 0, tail.without_image().to_bytes())
        sinks = {owner: self.shelf.sink() for owner in strategy.owners_held_by(self.rank)}
        self._received = {owner: (sink, None) for owner, sink in sinks.items()}
        failed = strategy.exchange(source, self.rank, dict(sinks))
        for owner, sink in sinks.items():
            sink.error = failed.get(owner)
            sealed = sink.seal(record.run_id, record.commit, owner)
            self._received[owner] = (sink, sealed)

    def _publish_all(self, state: ShardState) -> None:
        self._save(state, self._ckpt_id(state.tail.record.iteration))
        for sink, tail in self._received.values():
            assert tail is not None
            self.shelf.publish_received(sink, tail)
        self._received = {}
        self.shelf.sync_names()

    def _save(self, state_dict: ShardState, ckpt_id: CkptId) -> None:
        """Publish a sealed shard.

        Overridden: the stock body pickles, has no digest, never syncs, and fails for ever at the
        leftover of a killed save.
        """
        self.shelf.publish(state_dict.pending, state_dict.tail.record, state_dict.file)

    def _cleanup(self, iteration: int) -> None:
        """Remove every published file that is not of a kept commit.

        Overridden: the stock body keeps one iteration, lets stale newer ones live, and loses the
        only good one to a save that not all ranks finished.
        """
        try:
            self.shelf.prune(self.kept)
        except OSError as error:  # the commit stands on every rank, whatever becomes of older ones
            logger.warning("pruning stopped, the next save goes on with it: %s", error)

    def _cleanup_failed_save(self, iteration: int) -> None:
        """Take back what a failed save has done here, and no more.

        Overridden: the stock body removes whatever has the iteration's name, an older sound save of
        the same iteration among it.
        """
        for sink, _ in self._received.values():
            self.shelf.drop_received(sink)
        self._received = {}
        self.shelf.take_back()

    # -- load ------------------------------------------------------------------------------------

    def vote(self, objection: Objection) -> Verdict:
        """Agree with all ranks on the newest commit that can be loaded, and on what is kept."""
        verdict = self.recovery.vote(objection, self.coordinator)
        candidate = verdict.candidate
        self.latest_iteration = -1 if candidate is None else candidate.record.iteration
        resumed = [] if candidate is None else [candidate.commit]
        self.kept = sorted({*verdict.whole, *resumed}, reverse=True)[: self._keep_last]
        return verdict

    def _my_ckpt_ids(self) -> list[CkptId]:
        """Return the shards in this rank's share whose tails are sound.

        Overridden: the stock body goes by names alone, and looks into one directory, so that ranks
        which were numbered anew find nothing.
        """
        records = [each.record for each in self.recovery.inventory().found]
        return [
            (each.iteration, each.owner, self.session_id)
            for each in records
            if each is not None and each.is_whole
        ]

    def find_latest(self) -> int:
        """Return the iteration that `vote` settles on; -1: none.

        Overridden: the stock body believes names, meets the others on the trainer's group, and
        takes 2 of 4 shards for a checkpoint of 2 ranks.
        """
        self.vote(lambda record: None)
        return int(self.latest_iteration)

    def load(self) -> tuple[ShardState, CkptId]:
        """Return this rank's own shard of the agreed commit, brought home where it was missing.

        Overridden: the stock body raises on some ranks only, never asks for the replica of a
        damaged file, and does not write again what it has recovered.

        Raises:
            CheckpointingException: nothing was agreed on, or another number of ranks wrote it.
            CorruptCheckpointError: on every rank; vote again.
        """
        verdict = self.recovery.verdict
        candidate = verdict.candidate if verdict is not None else None
        if candidate is None or candidate.record.world_size != self.topology.world_size:
            raise CheckpointingException("no local checkpoint of this many ranks was agreed on")
        self.recovery.bring_home(candidate, self.coordinator)
        ckpt_id = self._ckpt_id(candidate.record.iteration)
        return self._load(ckpt_id), ckpt_id

    def _load(self, ckpt_id: CkptId) -> ShardState:
        """Return a shard that lies here, all of it verified.

        Overridden: the stock body runs code from the file, and returns flipped bits as they are.
        """
        iteration, owner, _ = ckpt_id
        path = f"{self.rank}/{shard_name(iteration, owner)}"
        full = self.run.root / path
        try:
            tail = self.run.read_trailer(path)
            record = tail.record
            image = memoryview(bytearray(record.image_bytes))
            parts = [Part(0, image[: record.body_bytes])]
            read_verified(self.run.filesystem, full, record.image_record(path), parts)
            with naming(full), self.run.filesystem.open_existing(full) as stream:
                read_into(stream, record.body_bytes, [image[record.body_bytes :]])
        except (CorruptCheckpointError, OSError) as error:
            raise CheckpointingException(str(error)) from error
        return ShardState(image, tail, full, None)

    def close(self) -> None:
        """Let go of every file; what is published stays."""
        self.shelf.close()


def make_strategy(
    group: Any,
    holders: Sequence[tuple[int, ...]],
    timeout_seconds: float,
    *,
    sends_images: bool,
    device: torch.device | None = None,
) -> ShardReplication:
    """Return the strategy of a job over a process group of its own.

    `device`: what copies travel through. None: they travel out of host memory.
    """
    own = (
        OwnGroup(group, timeout_seconds)
        if device is None
        else DeviceGroup(group, timeout_seconds, device)
    )
    return ShardReplication(own, holders, sends_images=sends_images)


def _nothing(_: object) -> None:
    return None
