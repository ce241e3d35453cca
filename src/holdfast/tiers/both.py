"""Both tiers of one run: where a save goes.

Owns what spans both tiers: one order of commits, one admission, and one snapshot for the tiers that
are due. Promises that without a local tier only the persistent one is used, and that a local
failure never costs a persistent save. Leaves the work of a tier to that tier, and the choice of
what to load to `search`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from holdfast.config import CheckpointConfig
from holdfast.errors import (
    CheckpointError,
    ConfigError,
    StageFailedError,
    StageTimeoutError,
    StoreIdentityError,
    StoreNotLoadedError,
)
from holdfast.filesystem import Filesystem
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.job import Background, Committed, Outcome
from holdfast.snapshot.arena import Arena, image_bytes
from holdfast.snapshot.shard import ShardPlan
from holdfast.storage.identity import CommitIdentity
from holdfast.storage.manifest import LOCAL
from holdfast.tiers.persistent import Admission, PersistentTier, Snapshot

if TYPE_CHECKING:
    from holdfast.tiers.local.tier import LocalTier

logger = logging.getLogger(__name__)


class Tiers:
    """The persistent tier of one run, and the local one where it is configured."""

    def __init__(
        self, config: CheckpointConfig, persistent: PersistentTier, filesystem: Filesystem
    ):
        """Open nothing yet: the run id is known only once the store has been read."""
        self.persistent = persistent
        self.local: LocalTier | None = None
        self._config = config
        self._filesystem = filesystem
        self._identity: CommitIdentity | None = None
        """Attempt and sequence of the last local commit, on rank 0."""
        self._budgeted = b""
        """Identity of the plan for which the local tier was found to have enough space."""
        self._is_ordered = False
        """Whether commits of this attempt are newer than all earlier ones in the local tier."""
        self._restoring: Background[None] = Background()
        """The background rewrite of shards that nodes had lost of the loaded commit."""

    # -- save ------------------------------------------------------------------------------------

    def check_save(self, *, to_local: bool) -> None:
        """Refuse a save to a tier that is not configured.

        Raises:
            ConfigError: a local save is requested, and there is no local tier.
        """
        if to_local and self._config.local.directory is None:
            raise ConfigError(
                ["checkpoint.local.directory is null: there is no local tier to save to"]
            )

    def follow(self, admission: Admission, coordinator: Coordinator, *, to_local: bool) -> None:
        """Prepare the local tier for a save that the persistent tier has admitted.

        Raises:
            StoreNotLoadedError: it holds checkpoints and this job loaded none of them.
            CheckpointError: on every rank: a local save was requested, and the tier cannot be used.
        """
        if self._config.local.directory is None:
            return
        if admission.is_new:
            self._is_ordered = False
        local = self.open_local(admission.run_id, coordinator)
        if self._is_ordered:
            return
        try:
            self._order(local, admission, coordinator)
        except StageTimeoutError:
            raise
        except StageFailedError as error:
            if to_local:
                raise
            # Advance the sequence past local commits that could not be read.
            coordinator.broadcast("outrank", self.persistent.outrank_unseen)
            if coordinator.rank == 0:
                logger.warning("the local tier cannot be used for this save: %s", error)
            return
        self._is_ordered = True

    def _order(self, local: LocalTier, admission: Admission, coordinator: Coordinator) -> None:
        """Advance the sequence of this attempt past every commit in the local tier."""
        local.find(coordinator, lambda _: None)  # every commit, loadable or not
        newest = local.newest_sequence

        def outrank() -> None:
            if newest and not admission.goes_on:
                raise StoreNotLoadedError(
                    f"{local.directory} holds checkpoints of run {admission.run_id} that this job "
                    "has not loaded.\nCall load first, or name another checkpoint.run_id."
                )
            self.persistent.outrank(newest)

        coordinator.broadcast("outrank", outrank)
        local.discard_after(admission.resumed_from, coordinator)

    @property
    def nodes(self) -> Sequence[int] | None:
        """The node of each rank; None: there is no local tier."""
        return None if self.local is None else self.local.topology.nodes

    @property
    def can_drain(self) -> bool:
        """Whether a persistent save is to be promoted from its local commit.

        Only where the arena is the local file: the buffer pool keeps that file unchanged while
        other buffers are used. On a disk the next local save would overwrite the arena during the
        drain.
        """
        drains = self._config.persistent.from_local
        return drains and self.local is not None and self.local.in_memory

    def begin_local(
        self, snapshot_of: int, plan: ShardPlan, coordinator: Coordinator, *, pinned: bool
    ) -> Arena | None:
        """Return the local tier's memory to stage into; None: stage into the stager's own.

        Raises:
            ConfigError: on every rank: the whole buffer pool does not fit, with the numbers.
            CheckpointError: on every rank: not enough free space.
        """
        assert self.local is not None
        if not self._is_ordered:
            raise CheckpointError("the local tier could not be read when this save began")
        layout = plan.staged.layout
        if plan.identity != self._budgeted:
            # Before any allocation: the need of the whole buffer pool, not only of the next file.
            self.local.budget(image_bytes(layout), coordinator)
            self._budgeted = plan.identity
        return self.local.begin(snapshot_of, layout, coordinator, pinned=pinned)

    def abandon_local(self) -> None:
        """Release that memory: the staging failed."""
        if self.local is not None:
            self.local.abandon()

    def write(
        self,
        snapshot: Snapshot,
        coordinator: Coordinator,
        *,
        to_local: bool,
        to_persistent: bool,
        drains: bool = False,
    ) -> Committed:
        """Write one snapshot to the tiers that are due; every rank calls it.

        `drains`: skip the persistent tier if the local commit succeeds; the caller then promotes it
        with `hold`.

        Raises:
            CheckpointError: on every rank: the persistent save failed, or only a local save was due
                and it failed.
        """
        identities: list[CommitIdentity] = []

        def identify() -> CommitIdentity:
            identities.append(self.persistent.reserve())
            return identities[-1]

        committed: Committed | None = None
        if to_local:
            try:
                committed = self._write_local(snapshot, identify, coordinator)
            except (StageTimeoutError, StoreIdentityError):
                raise
            except CheckpointError as error:
                if not to_persistent:
                    raise
                if coordinator.rank == 0:
                    logger.warning("the local copy of this save failed: %s", error)
        identity = self._identity = identities[0] if identities else None
        if to_persistent and not (drains and committed is not None):
            copies = () if committed is None else (LOCAL,)
            committed = self.persistent.write(snapshot, coordinator, identity)
            committed = replace(committed, copies=copies)
        assert committed is not None
        return committed

    def hold(self, snapshot: Snapshot, coordinator: Coordinator) -> Callable[[], Committed]:
        """Keep the local commit of a snapshot from being overwritten; return what promotes it.

        Call the returned function on a thread of its own: it writes to the persistent tier and
        then releases the local commit.
        """
        assert self.local is not None
        kept = ExitStack()
        kept.enter_context(self.local.keep(snapshot.iteration))
        identity = self._identity

        def promote() -> Committed:
            with kept:
                return self.persistent.write(snapshot, coordinator, identity)

        return promote

    def _write_local(
        self, snapshot: Snapshot, identify: Callable[[], CommitIdentity], coordinator: Coordinator
    ) -> Committed:
        from holdfast.tiers.local.shards import LocalSnapshot

        assert self.local is not None
        plan, arena = snapshot.shard.plan, snapshot.shard.arena
        assert arena is not None
        snapshot.shard.wait()
        snapshot.confirm()
        local = LocalSnapshot(
            snapshot.iteration,
            arena,
            plan.structure,
            plan.identity,
            plan.state_names,
            snapshot.rank_state,
            snapshot.shared_state,
            snapshot.train_state,
            snapshot.run_config,
        )
        done = self.local.write(local, identify, coordinator)
        return Committed(done.path, done.size_bytes, (), tier=LOCAL)

    # -- load ------------------------------------------------------------------------------------

    def finish_load(self, channel: Coordinator) -> None:
        """End a load of a local commit; rewrite on a thread the shards that nodes have lost.

        `channel`: the one of that thread, in use until `wait_restored` has returned.
        """
        local = self.local
        assert local is not None
        if local.finish():
            self._restoring.start(lambda: local.restore(channel), channel)

    def wait_restored(self, rank: int) -> None:
        """Wait until lost shards are rewritten; every rank calls it.

        Raises:
            StageTimeoutError: a rank is gone. Any other failure is a warning: the state is loaded,
                and the next save makes new copies, or fails for the same reason.
        """
        self._report_restored(self._restoring.wait(), rank)

    def count_step(self) -> bool:
        """Count one training step; return whether `tell_restored_if_due` has work to do."""
        return self._restoring.count_step()

    def tell_restored_if_due(self, rank: int) -> None:
        """As `wait_restored`, without waiting: act at the step that all ranks agreed on."""
        self._report_restored(self._restoring.take_if_due(), rank)

    def _report_restored(self, outcome: Outcome[None] | None, rank: int) -> None:
        if outcome is None or outcome.error is None:
            return
        error = outcome.error
        if isinstance(error, StageTimeoutError) or not isinstance(error, CheckpointError):
            raise error
        if rank == 0:  # every rank has the same error
            logger.warning("copies were not restored, the next save makes new ones: %s", error)

    def close(self) -> None:
        """Release the local tier's files; committed checkpoints stay."""
        if self.local is not None:
            self.local.close()
            self.local = None

    def open_local(self, run_id: str, coordinator: Coordinator) -> LocalTier:
        """Return the local tier of a run; every rank calls it."""
        from holdfast.tiers.local.tier import LocalTier

        if self.local is None or self.local.run_id != run_id:
            self.close()
            self.local = LocalTier(
                self._config.local,
                run_id,
                self._filesystem,
                coordinator,
                self._config.timeout_seconds,
                drains=self._config.persistent.from_local,
                store=self.persistent.store.root,
            )
        return self.local
