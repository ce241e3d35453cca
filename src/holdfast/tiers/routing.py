"""Which tiers a save goes to, and how the two of a run work together.

Owns what spans both tiers: one order of commits, one admission, one snapshot for the tiers that are
due, the later promotion of a local commit to the persistent tier, and the memory that a save is
staged into. Promises that without a local tier only the persistent one is used, and that a local
failure never costs a persistent save. Leaves the work of a tier to that tier, and the choice of
what to load to `search`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.config import CheckpointConfig
from holdfast.errors import (
    CheckpointError,
    ConfigError,
    ReplicaMismatchError,
    SaveGivenUpError,
    StageFailedError,
    StageTimeoutError,
    StoreIdentityError,
    StoreNotLoadedError,
)
from holdfast.filesystem import Filesystem
from holdfast.format.layout import Layout
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.job import Background, Committed, Outcome
from holdfast.snapshot.arena import Arena, image_bytes
from holdfast.storage import open_storage
from holdfast.storage.backend import Storage
from holdfast.storage.identity import CommitIdentity
from holdfast.tiers.local.budget import Need, report_budget, take_seats
from holdfast.tiers.local.shard_file import find_orphans
from holdfast.tiers.persistent import Admission, PersistentTier
from holdfast.tiers.places import check_directories
from holdfast.tiers.tier import Reserved, Snapshot, Source

if TYPE_CHECKING:
    from holdfast.tiers.local.tier import LocalTier

logger = logging.getLogger(__name__)

_NOT_OF_ONE_TIER = StageTimeoutError, StoreIdentityError, ReplicaMismatchError, SaveGivenUpError
"""Errors that would repeat in the other tier."""


@dataclass(frozen=True)
class Route:
    """Which tiers one save is written to, and when."""

    to_local: bool
    to_persistent: bool
    is_promoted: bool
    """Whether the persistent copy is made from the local commit afterwards, on another thread."""


@dataclass(frozen=True)
class Begun:
    """What rank 0 has begun for a save that is written on all ranks."""

    pending: str | None = None
    """The pending checkpoint in the persistent tier, if it goes there."""
    identity: CommitIdentity | None = None
    """Of the commit in the local tier, if it goes there."""


@dataclass(frozen=True)
class Promotion:
    """The later copy of a commit to another tier."""

    tier: str
    work: Callable[[], Committed]
    """Makes it, on a thread of its own."""


class Tiers:
    """The persistent tier of one run, and the local one where it is configured."""

    def __init__(self, config: CheckpointConfig, filesystem: Filesystem) -> None:
        """Open nothing yet: the run id is known only once the store has been read.

        Raises:
            ConfigError: no directory is configured, or one cannot be used.
        """
        directory = config.persistent.directory
        if directory is None:
            raise ConfigError(
                ["checkpoint.persistent.directory is null; name where checkpoints are kept"]
            )
        check_directories(config, filesystem)
        # The root may be a link; inside it no link is followed.
        self.storage: Storage = open_storage(Path(directory).absolute().resolve(), filesystem)
        """Where the run's store is."""
        self.persistent = PersistentTier(
            self.storage,
            config.run_id,
            config.persistent.keep.last,
            config.persistent.write_bytes_per_second,
        )
        self.local: LocalTier | None = None
        self._config = config
        self._filesystem = filesystem
        self._identity: CommitIdentity | None = None
        """Attempt and sequence of the last local commit, on rank 0."""
        self._budgeted = b""
        """Identity of the plan for which the local tier was found to have enough space."""
        self._is_budgeted = False
        """Whether the needs of the local tier were reported before training."""
        self._is_ordered = False
        """Whether commits of this attempt are newer than all earlier ones in the local tier."""
        self._restoring: Background[None] = Background()
        """The background rewrite of shards that nodes had lost of the loaded commit."""

    @property
    def root(self) -> Path:
        """The store of the run: what messages name, and ranks know one another by."""
        return self.persistent.store.root

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

    def admit(self) -> Admission:
        """Claim an attempt at the run's store, on rank 0; see `PersistentTier.admit`.

        Raises:
            StoreNotLoadedError: one of the tiers holds checkpoints and this job loaded none.
        """
        directory = self._config.local.directory
        if directory is not None and self.persistent.claims_unloaded:
            # Before the claim, which would supersede the job that saved them.
            run_id = self._config.run_id or self.persistent.identity.read_run_id()
            place = Path(directory).absolute()
            for found, _ in find_orphans(place, self.root, self._filesystem):
                if found == run_id:
                    raise _not_loaded(place, found)
        return self.persistent.admit()

    def prove_writable(self) -> None:
        """Fail now if a first save could not be written; on rank 0."""
        self.persistent.prove_writable()

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
                raise _not_loaded(local.directory, admission.run_id)
            self.persistent.outrank(newest)

        coordinator.broadcast("outrank", outrank)
        local.discard_after(admission.resumed_from, coordinator)

    @property
    def nodes(self) -> Sequence[int] | None:
        """The node of each rank; None: there is no local tier."""
        return None if self.local is None else self.local.topology.nodes

    def route(self, reserved: Reserved, *, local_only: bool) -> Route:
        """Return where a save goes whose memory was reserved.

        It is promoted only where the memory is the local file: the buffer pool keeps that file
        unchanged while other buffers are used. On a disk the next local save would overwrite it.
        """
        config = self._config
        is_promoted = (
            config.persistent.from_local
            and config.async_save
            and not local_only
            and reserved.to_local
            and self.local is not None
            and self.local.in_memory
        )
        return Route(reserved.to_local, not local_only, is_promoted)

    def reserve(
        self, layout: Layout, plan: bytes, coordinator: Coordinator, *, pinned: bool, required: bool
    ) -> Reserved:
        """Return memory of the local tier to stage into; without one, the caller's own.

        Raises:
            ConfigError: on every rank: the whole buffer pool does not fit, with the numbers.
            CheckpointError: on every rank: not enough free space, and it is `required`.
        """
        if self.local is None:
            return Reserved(None, to_local=False)
        try:
            arena = self._reserve_local(self.local, layout, plan, coordinator, pinned=pinned)
        except (StageTimeoutError, ConfigError):
            raise
        except CheckpointError as error:
            if required:
                raise
            if coordinator.rank == 0 or coordinator.world_size == 1:
                logger.warning("no local copy of this save: %s", error)
            return Reserved(None, to_local=False)
        return Reserved(arena, to_local=True)

    def _reserve_local(
        self,
        local: LocalTier,
        layout: Layout,
        plan: bytes,
        coordinator: Coordinator,
        *,
        pinned: bool,
    ) -> Arena | None:
        if not self._is_ordered:
            raise CheckpointError("the local tier could not be read when this save began")
        if plan != self._budgeted:
            # Before any allocation: the need of the whole buffer pool, not only of the next file.
            local.budget(image_bytes(layout), coordinator)
            self._budgeted = plan
        return local.reserve(layout, coordinator, pinned=pinned)

    def why_agree(self) -> str:
        """Say why a save needs what only all ranks together can do; empty: it does not."""
        if self._config.local.directory is None:
            return ""
        if self.local is None or not self._is_ordered:
            return "its local tier was not read yet"
        if self.local.replication is not None and self.local.replication.is_broken:
            return "its connections for local copies are broken"
        return ""

    def begin(self, iteration: int, route: Route) -> Begun:
        """Begin a save on rank 0 in the tiers that are due.

        Raises:
            CheckpointError, OSError: it cannot begin there.
        """
        identity = self.persistent.next_identity() if route.to_local else None
        pending = None
        if route.to_persistent and not route.is_promoted:
            pending = self.persistent.begin(iteration)
        return Begun(pending, identity)

    def release(self) -> None:
        """Give reserved memory back: the staging failed."""
        if self.local is not None:
            self.local.release()

    def write(
        self,
        snapshot: Snapshot,
        route: Route,
        coordinator: Coordinator,
        begun: Begun | None = None,
    ) -> Committed:
        """Write one snapshot to the tiers that are due; every rank calls it.

        If it is to be promoted and its local commit succeeds, call `promote` afterwards. `begun`:
        what rank 0 has begun, alike on all ranks. None: it begins here.

        Raises:
            CheckpointError: on every rank: the persistent save failed, or only a local save was due
                and it failed.
        """
        given = begun or Begun()
        identities: list[CommitIdentity] = []

        def identify() -> CommitIdentity:
            identities.append(given.identity or self.persistent.next_identity())
            return identities[-1]

        committed: Committed | None = None
        try:
            if route.to_local:
                assert self.local is not None
                try:
                    committed = self.local.write(snapshot, identify, coordinator)
                except _NOT_OF_ONE_TIER:
                    raise
                except CheckpointError as error:
                    if not route.to_persistent:
                        raise
                    if coordinator.rank == 0:
                        logger.warning("the local copy of this save failed: %s", error)
            elif self.local is not None:
                self.local.release()  # where some rank had no memory for a copy
        except BaseException:
            if given.pending is not None and coordinator.rank == 0:
                self.persistent.abandon(given.pending)
            raise
        self._identity = identities[0] if identities else None
        if route.to_persistent and not (route.is_promoted and committed is not None):
            copies = () if committed is None else (committed.tier,)
            lacks_copy = self.local is not None and committed is None
            committed = self._write_persistent(
                snapshot, self._identity, coordinator, pending=given.pending
            )
            committed = replace(committed, copies=copies, lacks_copy=lacks_copy)
        assert committed is not None
        return committed

    def _write_persistent(
        self,
        snapshot: Snapshot,
        identity: CommitIdentity | None,
        coordinator: Coordinator,
        *,
        pending: str | None = None,
    ) -> Committed:
        """`identity`: what the local commit of this snapshot has; None: a new one."""
        return self.persistent.write(
            snapshot,
            lambda: identity or self.persistent.next_identity(),
            coordinator,
            pending,
        )

    def promote(
        self, snapshot: Snapshot, committed: Committed, coordinator: Coordinator
    ) -> Promotion | None:
        """Return what copies a commit to the persistent tier; None: it is there already.

        The local commit is protected from being overwritten from now until that has ended.
        """
        if committed.tier == self.persistent.name:
            return None  # the local save had failed
        assert self.local is not None
        kept = ExitStack()
        kept.enter_context(self.local.keep(snapshot.iteration))
        identity = self._identity

        def work() -> Committed:
            with kept:
                return self._write_persistent(snapshot, identity, coordinator)

        return Promotion(self.persistent.name, work)

    # -- load ------------------------------------------------------------------------------------

    def report_needs(
        self,
        selected: Source | None,
        estimate: Callable[[Sequence[int]], tuple[int, list[str]]],
        coordinator: Coordinator,
    ) -> None:
        """Report once, before training, what the local tier will need of each node.

        `selected`: where the checkpoint is that will be loaded. If it is the local tier, and as
        many ranks saved, the size of the shard is known. Otherwise `estimate` is given the node of
        each rank, and returns the size in bytes, and what it does not count.

        Raises:
            ConfigError: on every rank: it does not fit somewhere, with the numbers.
            CheckpointError: on every rank: the state cannot be saved, or a directory is unusable.
        """
        config, local = self._config, self.local
        if config.local.directory is None or self._is_budgeted:
            return
        topology = (
            local.topology if local else take_seats(config.local, self._filesystem, coordinator)
        )
        size = None
        if local is not None and selected is local:
            size = local.size_before(coordinator.world_size)
        need = Need(*estimate(topology.nodes)) if size is None else Need(size)
        if local is not None:
            run_id: str | None = local.run_id
        else:  # no local commit of this run was looked for; there may be some all the same
            found = coordinator.broadcast("run id", self.persistent.identity.read_run_id)
            run_id = found or config.run_id
        drains = config.persistent.from_local
        report_budget(config.local, topology, run_id, need, coordinator, drains=drains)
        self._is_budgeted = True

    def finish_load(self, source: Source, channel: Coordinator) -> None:
        """End a load; do on a thread what is left, such as rewriting shards that nodes have lost.

        `channel`: the one of that thread, in use until `wait_restored` has returned.
        """
        work = source.finish_load()
        if work is not None:
            self._restoring.start(lambda: work(channel), channel)

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


def _not_loaded(directory: Path, run_id: str) -> StoreNotLoadedError:
    return StoreNotLoadedError(
        f"{directory} holds checkpoints of run {run_id} that this job has not loaded.\n"
        "Call load first, or name another checkpoint.run_id."
    )
