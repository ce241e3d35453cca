"""The adapter to nvidia-resiliency-ext: its local checkpoint manager and its view of a shard.

Owns the order of a local save across ranks once shards are sealed (exchange, publish, prune), the
agreement on the commit to load, and fetching a lost shard from a peer. Each override names the
defect of the stock method that it covers. Promises that ranks agree through the coordinator before
and after every exchange, that a failed save leaves earlier published files intact, and that the
stock names stay. `ShardState` is one uint8 tensor over the image and never holds live objects: the
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
from holdfast.filesystem import naming
from holdfast.ranks.coordinator import Coordinator, SingleProcess
from holdfast.ranks.topology import Topology
from holdfast.read.direct import Part, read_verified
from holdfast.storage.posix import PosixStorage, read_into
from holdfast.tiers.local.availability import Commit, Objection, Verdict
from holdfast.tiers.local.exchange import OwnGroup, ShardReplication
from holdfast.tiers.local.pool import PooledFile
from holdfast.tiers.local.recovery import CkptId, Recovery
from holdfast.tiers.local.shard_file import RunDirectory, Trailer, shard_name
from holdfast.tiers.local.shards import MemoryShard, ReceivedShard, ShardDirectory
from holdfast.tiers.local.transport import DeviceGroup


class ShardState(TensorAwareStateDict):  # type: ignore[misc]  # the package ships no types
    """The image of one shard, its trailer, and its path until it is published."""

    def __init__(
        self, image: memoryview, trailer: Trailer, pending: Path, file: PooledFile | None
    ) -> None:
        self.trailer = trailer
        self.image = image
        self.pending = pending
        """Its path, sealed, until it is published."""
        self.file = file
        """The pooled file at that path, for a save in RAM; otherwise None."""
        self._image: torch.Tensor | None = torch.frombuffer(image, dtype=torch.uint8)

    def pop_tensors(self) -> list[torch.Tensor]:
        """Return the image and leave the state hollow, until `insert_tensors`."""
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
        """Allocate memory for an image."""
        self._image = torch.empty(self.trailer.record.image_bytes, dtype=torch.uint8, device="cpu")

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        """No-op: the image is in host memory already."""

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        """No-op: the reader of the image places tensors on their devices."""


logger = logging.getLogger(__name__)


class ShardManager(LocalCheckpointManager):  # type: ignore[misc]  # the package ships no types
    """The shard files of one rank, and the collective steps over those of all ranks."""

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
        self._rank = rank  # the stock property needs torch.distributed, a single process does not
        self.run = run
        self.topology = topology
        self.in_memory = in_memory
        self.coordinator: Coordinator = SingleProcess()
        """The coordinator of the calling thread; set by the caller."""
        self.kept: list[Commit] = []
        """The commits that retention keeps, newest first."""
        self._keep_last = keep_last
        held = len(strategy.owners_held_by(rank)) if strategy is not None else 0
        self.shards = ShardDirectory(
            run, rank, topology, buffers=keep_last + 1, copies=held, in_memory=in_memory
        )
        self.recovery = Recovery(self.shards, strategy)
        self._received: dict[int, tuple[ReceivedShard, Trailer | None]] = {}
        """Copies received in the current save, by owner."""

    # -- save ------------------------------------------------------------------------------------

    def save(
        self, state_dict: ShardState, iteration: int, is_async: bool = False
    ) -> AsyncRequest | None:
        """Exchange, publish and prune; a collective call, on the thread that writes.

        Overridden: the stock method refuses an iteration that is not the newest, replicates while
        training waits, runs collectives on the trainer's group, in which a failed rank leaves the
        others waiting, and synchronises CUDA.
        """
        # Keyword arguments: this tuple's defaults differ between versions of the package.
        request = AsyncRequest(
            async_fn=self._save_collectively,
            async_fn_args=(state_dict, iteration),
            finalize_fns=[],
            async_fn_kwargs={},
        )
        if is_async:
            return request
        request.async_fn(*request.async_fn_args)
        return None

    def _save_collectively(self, state: ShardState, iteration: int) -> None:
        strategy, coordinator = self.repl_strategy, self.coordinator
        commit = state.trailer.record.commit
        try:
            if strategy is not None and strategy.sends_anything:
                # The caller agreed that all ranks have sealed their shards, so all take part.
                coordinator.all_reduce(
                    "local exchange", lambda: self._exchange(strategy, state), _nothing
                )
            coordinator.all_reduce("local publish", lambda: self._publish_all(state), _nothing)
        except BaseException:
            self._cleanup_failed_save(iteration)
            raise
        self.shards.settle()
        # An older commit of the same iteration was kept until this one was agreed on.
        others = [each for each in self.kept if each[2] != iteration]
        self.kept = [commit, *others][: self._keep_last]
        self._cleanup(iteration)

    def _exchange(self, strategy: ShardReplication, state: ShardState) -> None:
        trailer = state.trailer
        record = trailer.record
        if strategy.sends_images:
            source = MemoryShard(state.image, record.body_bytes, trailer.to_bytes())
        else:
            source = MemoryShard(memoryview(b""), 0, trailer.without_image().to_bytes())
        sinks = {owner: self.shards.sink() for owner in strategy.owners_held_by(self.rank)}
        self._received = {owner: (sink, None) for owner, sink in sinks.items()}
        failed = strategy.exchange(source, self.rank, dict(sinks))
        for owner, sink in sinks.items():
            sink.error = failed.get(owner)
            sealed = sink.seal(record.run_id, record.commit, owner)
            self._received[owner] = (sink, sealed)

    def _publish_all(self, state: ShardState) -> None:
        self._save(state, self._ckpt_id(state.trailer.record.iteration))
        for sink, trailer in self._received.values():
            assert trailer is not None
            self.shards.publish_received(sink, trailer)
        self._received = {}
        self.shards.sync_names()

    def _save(self, state_dict: ShardState, ckpt_id: CkptId) -> None:
        """Publish a sealed shard.

        Overridden: the stock method pickles, has no digest, never syncs, and fails permanently on
        the leftover of a killed save.
        """
        self.shards.publish(state_dict.pending, state_dict.trailer.record, state_dict.file)

    def _cleanup(self, iteration: int) -> None:
        """Remove every published file that does not belong to a kept commit.

        Overridden: the stock method keeps one iteration, leaves stale newer ones, and removes the
        only good one after a save that not all ranks finished.
        """
        try:
            self.shards.prune(self.kept)
        except OSError as error:  # the new commit is complete even if older ones are not removed
            logger.warning("pruning stopped, the next save continues it: %s", error)

    def _cleanup_failed_save(self, iteration: int) -> None:
        """Undo what a failed save has done here, and nothing else.

        Overridden: the stock method removes every file named for the iteration, including an older
        sound save of it.
        """
        for sink, _ in self._received.values():
            self.shards.drop_received(sink)
        self._received = {}
        self.shards.take_back()

    # -- load ------------------------------------------------------------------------------------

    def vote(self, objection: Objection) -> Verdict:
        """Agree with all ranks on the newest loadable commit, and on the commits to keep."""
        verdict = self.recovery.vote(objection, self.coordinator)
        candidate = verdict.candidate
        self.latest_iteration = -1 if candidate is None else candidate.record.iteration
        resumed = [] if candidate is None else [candidate.commit]
        self.kept = sorted({*verdict.whole, *resumed}, reverse=True)[: self._keep_last]
        return verdict

    def find_latest(self) -> int:
        """Return the iteration that all ranks agree on; -1: none.

        Overridden: the stock method trusts names, runs collectives on the trainer's group, and
        mistakes 2 of 4 shards for a checkpoint of 2 ranks.
        """
        self.vote(lambda record: None)
        return int(self.latest_iteration)

    def load(self) -> tuple[ShardState, CkptId]:
        """Return this rank's own shard of the agreed commit, restored from a peer if missing.

        Overridden: the stock method raises on some ranks only, never requests the replica of a
        damaged file, and does not write recovered shards to disk.

        Raises:
            CheckpointingException: nothing was agreed on, or another number of ranks wrote it.
            CorruptCheckpointError: on every rank; call `vote` again.
        """
        verdict = self.recovery.verdict
        candidate = verdict.candidate if verdict is not None else None
        if candidate is None or candidate.record.world_size != self.topology.world_size:
            raise CheckpointingException("no local checkpoint of this many ranks was agreed on")
        self.recovery.bring_home(candidate, self.coordinator)
        ckpt_id = self._ckpt_id(candidate.record.iteration)
        return self._load(ckpt_id), ckpt_id

    def _load(self, ckpt_id: CkptId) -> ShardState:
        """Return a shard from this rank's directory, fully verified.

        Overridden: the stock method runs code from the file, and does not detect flipped bits.
        """
        iteration, owner, _ = ckpt_id
        path = f"{self.rank}/{shard_name(iteration, owner)}"
        full = self.run.root / path
        try:
            trailer = self.run.read_trailer(path)
            record = trailer.record
            image = memoryview(bytearray(record.image_bytes))
            parts = [Part(0, image[: record.body_bytes])]
            files = PosixStorage(self.run.root, self.run.filesystem)
            read_verified(files, path, record.image_record(path), parts)
            with naming(full), self.run.filesystem.open_existing(full) as stream:
                read_into(stream, record.body_bytes, [image[record.body_bytes :]])
        except (CorruptCheckpointError, OSError) as error:
            raise CheckpointingException(str(error)) from error
        return ShardState(image, trailer, full, None)

    def close(self) -> None:
        """Close every file; published files stay."""
        self.shards.close()


def make_strategy(
    group: Any,
    holders: Sequence[tuple[int, ...]],
    timeout_seconds: float,
    *,
    sends_images: bool,
    device: torch.device | None = None,
) -> ShardReplication:
    """Return the replication strategy of a job, over a separate process group.

    `device`: the device that copies are sent through. None: they are sent from host memory.
    """
    own = (
        OwnGroup(group, timeout_seconds)
        if device is None
        else DeviceGroup(group, timeout_seconds, device)
    )
    return ShardReplication(own, holders, sends_images=sends_images)


def _nothing(_: object) -> None:
    return None
