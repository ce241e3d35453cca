"""The durable tier: snapshots become committed checkpoints of one store, agreed by all ranks.

Owns the order of a save across ranks (begin, write, commit, retain; then each rank removes its
share of what retention took off the list), which job may save here, and the names of the files
beside the shards. Promises that every rank learns the outcome, that a failed save lists nothing and
the next one works, and that only the newest attempt of the right run commits. Sees the live state
only as a captured snapshot.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from holdfast import __version__
from holdfast.errors import (
    CheckpointError,
    CorruptCheckpointError,
    StoreNotLoadedError,
    StoreNotWritableError,
)
from holdfast.format.inventory import METADATA_NAME
from holdfast.format.layout import Layout
from holdfast.policies.keeping import Candidate, retain
from holdfast.ranks.coordinator import Coordinator, SingleProcess
from holdfast.ranks.job import Committed
from holdfast.snapshot.arena import Arena
from holdfast.snapshot.audit import Report, Unlike
from holdfast.snapshot.copies import find_differing
from holdfast.storage.backend import Storage, pending_name
from holdfast.storage.digests import FileRecord
from holdfast.storage.identity import RUN_NAME, Attempt, CommitIdentity, Parent, RunIdentity
from holdfast.storage.manifest import BASE, PERSISTENT, Manifest
from holdfast.storage.store import Checkpoint, Store
from holdfast.tiers.opening import SurveyedStore
from holdfast.tiers.removal import Removed, remove_share
from holdfast.tiers.select import Commit
from holdfast.tiers.survey import Survey, survey_store
from holdfast.tiers.tier import (
    RUN_CONFIG_NAME,
    TRAIN_STATE_NAME,
    Contents,
    Objection,
    Snapshot,
    Wanted,
)

logger = logging.getLogger(__name__)

_Written = tuple[list[FileRecord], dict[str, str], Report | None]
SEQUENCE_STRIDE = 1_000_000_000
"""More commits than one attempt can make."""
_NOT_SHARED = (
    "rank 0 has created this directory, but it is not here; "
    "checkpoint.persistent.directory must be on a file system that all ranks share"
)


@dataclass(frozen=True)
class Admission:
    """The result of admitting a job to the store."""

    run_id: str
    is_new: bool
    """Whether this call admitted the job."""
    goes_on: bool
    """Whether this job loaded a checkpoint of this run."""
    resumed_from: int | None
    """The iteration that this job loaded."""


@dataclass(frozen=True)
class _Resumed:
    """The checkpoint that was loaded."""

    run_id: str
    iteration: int
    path: Path
    is_own: bool
    """Whether it belongs to this store's run, not to another run."""
    asked_step: int | None
    """The value of `load.step`."""


@dataclass
class _Grant:
    """The state that rank 0 keeps from the first save on."""

    run_id: str
    attempt: Attempt
    next_sequence: int
    parent: Parent | None
    """The checkpoint that the run began from, in whichever attempt."""


@dataclass(frozen=True)
class _Ended:
    """What every rank is told of a commit."""

    path: Path
    size_bytes: int
    removed: tuple[Removed, ...]


class PersistentTier:
    """One store, written by all ranks of a job."""

    name = PERSISTENT

    def __init__(
        self,
        storage: Storage,
        run_id: str | None,
        keep_last: int | None,
        bytes_per_second: float | None = None,
    ) -> None:
        self.store = Store(storage)
        self.identity = RunIdentity(storage)
        self._storage = storage
        self._configured_run_id = run_id
        self._keep_last = keep_last
        self._bytes_per_second = bytes_per_second
        self._resumed: _Resumed | None = None
        self._grant: _Grant | None = None
        self._parent: Parent | None = None
        self._found = SurveyedStore(Survey(self.store.root), storage)
        """The run's own checkpoints at the last survey, which rank 0 makes."""

    # -- load ------------------------------------------------------------------------------------

    @property
    def surveyed(self) -> Survey:
        """The run's own checkpoints: as surveyed, but for those found damaged since; on rank 0."""
        return self._found.survey

    def survey(
        self, coordinator: Coordinator, objection: Objection, step: int | None = None
    ) -> Sequence[Commit]:
        """Survey the store on rank 0; superseded commits are marked, so no objection is needed.

        Raises:
            StoreIdentityError: it belongs to another run than the one configured.
            FormatTooNewError: a later version of holdfast wrote its run.json.
        """
        coordinator.broadcast("survey", lambda: self.look(step))
        return self.surveyed.commits

    def look(self, step: int | None = None) -> None:
        """Survey the store in this process, which is rank 0; raises as `survey`."""
        self._found = SurveyedStore(
            survey_store(
                self._storage,
                is_own=True,
                run_id=self._configured_run_id,
                step=step,
            ),
            self._storage,
        )

    def open(self, commit: Commit, coordinator: Coordinator, wanted: Wanted) -> Contents:
        return self._found.open(commit, coordinator, wanted)

    def pass_over(
        self, commit: Commit, coordinator: Coordinator, error: CorruptCheckpointError
    ) -> Commit:
        return self._found.pass_over(commit, coordinator, error)

    def finish_load(self) -> None:
        """Nothing is left to do."""

    def begin_from(self, parent: Parent) -> None:
        """Record on every rank what a new run begins from; its first attempt saves it."""
        self._parent = parent

    def resume_from(
        self,
        checkpoint: Checkpoint,
        *,
        is_own: bool,
        asked_step: int | None = None,
    ) -> None:
        """Record on every rank what was loaded; the first save continues from there.

        `is_own`: whether it belongs to this store's run.
        `asked_step`: the value of `load.step`, which the attempt records.
        """
        run_id = checkpoint.manifest.run_id
        self._resumed = _Resumed(run_id, checkpoint.iteration, checkpoint.path, is_own, asked_step)
        if is_own:
            self._parent = None  # the first attempt of this run has recorded its parent
        self._grant = None  # later saves need a new attempt: they continue from another point

    def prove_writable(self) -> None:
        """Write and remove a file in the store, on rank 0: fail now, not at the first save.

        Raises:
            StoreNotWritableError: the directory cannot be created or written to.
        """
        storage = self._storage
        probe = pending_name(RUN_NAME)  # a name that a sweep removes if we die here
        try:
            storage.prepare()
            with suppress(FileNotFoundError):  # a concurrent attempt's sweep may remove it
                storage.put(probe, b"")
                storage.delete(probe)
        except OSError as error:
            raise StoreNotWritableError(storage.where(), error) from error

    @property
    def claims_unloaded(self) -> bool:
        """Whether `admit` would claim an attempt for a job that has loaded nothing of this run."""
        return self._grant is None and not (self._resumed is not None and self._resumed.is_own)

    def admit(self) -> Admission:
        """Claim an attempt at this store, on rank 0, before the first save; idempotent.

        Raises:
            StoreIdentityError: the store belongs to another run.
            StoreNotLoadedError: it holds checkpoints and this job loaded none of them.
        """
        own = self._resumed if self._resumed is not None and self._resumed.is_own else None
        resumed_from = own.iteration if own is not None else None
        if self._grant is not None:
            self.identity.check_newest(self._grant.attempt)
            return Admission(self._grant.run_id, False, own is not None, resumed_from)
        found = self.identity.read_run_id()
        if found is None:
            self._storage.prepare()
        else:
            self.identity.check_run_id(self._configured_run_id, found)
        listing = self.store.listing()
        is_empty = not (listing.checkpoints or listing.broken or listing.too_new)
        if not is_empty and own is None:
            raise StoreNotLoadedError(
                f"{self._storage.where()} holds checkpoints that this job has not loaded; saving "
                "beside them could supersede them.\nCall load first (with load.directory=null), or "
                "name another checkpoint.persistent.directory."
            )
        lineage = own.run_id if own is not None else None
        run_id = self.identity.agree_run_id(self._configured_run_id or lineage)
        attempt = self.identity.claim_attempt(
            run_id,
            resumed_from,
            str(self._resumed.path) if self._resumed is not None else None,
            asked_step=self._resumed.asked_step if self._resumed is not None else None,
            parent=self._parent,
        )
        newest = max((each.manifest.sequence for each in listing.checkpoints), default=0)
        if listing.broken or listing.too_new:
            # One of these may be the newest commit and become readable again: advance the sequence
            # past it. Only the newest attempt commits, so a stride per attempt is enough.
            newest = max(newest, attempt.number * SEQUENCE_STRIDE)
        parents = [each.parent for each in self.identity.attempts() if each.parent is not None]
        self._grant = _Grant(run_id, attempt, newest + 1, parents[0] if parents else None)
        return Admission(run_id, True, own is not None, resumed_from)

    def outrank(self, sequence: int) -> None:
        """Make later commits newer than a commit in the other tier, on rank 0."""
        assert self._grant is not None
        self._grant.next_sequence = max(self._grant.next_sequence, sequence + 1)

    def outrank_unseen(self) -> None:
        """Make later commits newer than those of any earlier attempt, on rank 0."""
        assert self._grant is not None
        self.outrank(self._grant.attempt.number * SEQUENCE_STRIDE)

    def next_identity(self) -> CommitIdentity:
        """Return the next sequence number, on rank 0; it is used up even if the commit fails.

        Raises:
            SupersededAttemptError: a newer attempt has taken over.
        """
        assert self._grant is not None
        self.identity.check_newest(self._grant.attempt)
        sequence, self._grant.next_sequence = (
            self._grant.next_sequence,
            self._grant.next_sequence + 1,
        )
        return CommitIdentity(self._grant.attempt.number, sequence)

    # -- save ------------------------------------------------------------------------------------

    def reserve(self, layout: Layout, coordinator: Coordinator, *, pinned: bool) -> Arena | None:
        """Return None: files are written from the caller's memory."""
        return None

    def release(self) -> None:
        """Nothing was reserved."""

    def close(self) -> None:
        """Nothing is held open."""

    def write(
        self,
        snapshot: Snapshot,
        identify: Callable[[], CommitIdentity],
        coordinator: Coordinator,
        pending: str | None = None,
    ) -> Committed:
        """Write, commit and retain; every rank calls it, on any thread.

        `pending`: what `begin` on rank 0 has returned, known to every rank; None: not begun yet.

        Raises:
            CheckpointError: on every rank, naming the stage, the ranks and the cause.
        """
        if pending is None:
            pending = coordinator.broadcast("begin", lambda: self.begin(snapshot.iteration))
        rank0 = SingleProcess()  # its own part of the stage, under a name of its own

        def commit(written: list[_Written]) -> _Ended | Unlike:
            if unlike := snapshot.audit.judge([report for _, _, report in written]):
                return unlike
            checkpoint = rank0.broadcast(
                "commit",
                lambda: self._commit(pending, snapshot, written, coordinator, identify()),
            )
            removed = rank0.broadcast("retain", self._retain)
            return _Ended(checkpoint.path, checkpoint.manifest.size_bytes, removed)

        try:
            ended = coordinator.all_reduce(
                "write",
                lambda: self._write_shard(pending, snapshot),
                commit,
                then="commit",
            )
            snapshot.audit.conclude({} if isinstance(ended, _Ended) else ended, coordinator)
        except CheckpointError:
            if coordinator.rank == 0:
                self.abandon(pending)
            raise
        assert isinstance(ended, _Ended)
        rank, ranks = coordinator.rank, coordinator.world_size
        return Committed(
            ended.path,
            ended.size_bytes,
            tuple(each.iteration for each in ended.removed),
            afterwards=lambda: remove_share(self._storage, ended.removed, rank, ranks),
        )

    def begin(self, iteration: int) -> str:
        """Begin a pending checkpoint, on rank 0; return its name.

        Raises:
            OSError: it cannot be created.
            SupersededAttemptError: a newer attempt has taken over.
        """
        assert self._grant is not None
        attempt = self._grant.attempt
        self.identity.check_newest(attempt)
        # Check again between listing and removing: what looks like a leftover may be the pending
        # checkpoint of a newer attempt, which claimed its number before it began.
        self.store.sweep(lambda: self.identity.check_newest(attempt))
        return self.store.begin(iteration)

    def _write_shard(self, pending: str, snapshot: Snapshot) -> _Written:
        """Write this rank's file; return what rank 0 needs of it."""
        records: list[FileRecord] = []
        copies: dict[str, str] = {}
        with self._naming_successor():
            if not self._storage.has_group(pending):
                # Rank 0 has created it: a rank that does not see it would write to its own disk,
                # which no other rank can read.
                raise FileNotFoundError(errno.ENOENT, _NOT_SHARED, self._storage.where(pending))
            if not snapshot.shard.is_empty:
                files = self._storage.under(pending)
                records.append(snapshot.shard.write(files, self._bytes_per_second))
                copies = snapshot.shard.digest_copies()
            snapshot.confirm()
        return records, copies, snapshot.audit.report()

    @contextmanager
    def _naming_successor(self) -> Iterator[None]:
        """Report a newer attempt that swept our files instead of the missing file."""
        try:
            yield
        except OSError:
            if self._grant is not None:
                self.identity.check_newest(self._grant.attempt)
            raise

    def _commit(
        self,
        pending: str,
        snapshot: Snapshot,
        written: Sequence[_Written],
        coordinator: Coordinator,
        identity: CommitIdentity,
    ) -> Checkpoint:
        assert self._grant is not None
        store, grant = self.store, self._grant
        records = [record for part, _, _ in written for record in part]
        copies = [each for _, each, _ in written]
        with self._naming_successor():
            for name, content in (
                (METADATA_NAME, snapshot.shard.plan.metadata),
                (TRAIN_STATE_NAME, snapshot.train_state),
                (RUN_CONFIG_NAME, snapshot.run_config),
            ):
                records.append(store.write_file(pending, name, content))
        manifest = Manifest(
            run_id=grant.run_id,
            attempt=identity.attempt,
            sequence=identity.sequence,
            iteration=snapshot.iteration,
            tier=PERSISTENT,
            world_size=coordinator.world_size,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=tuple(sorted(records, key=lambda each: each.path)),
            written_by=f"holdfast {__version__}",
            parent=asdict(grant.parent) if grant.parent is not None else None,
            requires=snapshot.shard.plan.features(has_copies=any(copies))
            + ((BASE,) if snapshot.base is not None else ()),
            base=asdict(snapshot.base) if snapshot.base is not None else None,
            differing=find_differing(copies),
            audit=snapshot.audit.record,
        )
        self.identity.check_newest(grant.attempt)  # the last check before it is visible
        return store.commit(pending, manifest)

    def _retain(self) -> tuple[Removed, ...]:
        """Take what retention does not keep off the list; a failure does not undo the commit."""
        if self._keep_last is None:
            return ()
        removed = []
        try:
            checkpoints = {each.iteration: each for each in self.store.listing().checkpoints}
            candidates = [
                replace(Candidate.of(each.manifest), base=each.base_here)
                for each in checkpoints.values()
            ]
            tracker_iteration, _ = self.store.read_tracker()
            for verdict in retain(candidates, self._keep_last, tracker_iteration):
                if not verdict.keep:
                    checkpoint = checkpoints[verdict.iteration]
                    left = self.store.retract(checkpoint)
                    logger.info("removed iteration %d: %s", verdict.iteration, verdict.reason)
                    manifest = checkpoint.manifest
                    # Each rank wrote a file at least: a larger number was not written by a save.
                    world_size = min(manifest.world_size, len(manifest.files))
                    removed.append(Removed(verdict.iteration, left, world_size))
        except OSError as error:
            logger.warning("retention stopped, the next save continues it: %s", error)
        return tuple(removed)

    def abandon(self, pending: str) -> None:
        """Remove a pending checkpoint that will not be committed, on rank 0."""
        try:
            self.store.abandon(pending)
        except OSError as error:
            where = self._storage.where(pending)
            logger.warning("%s is left behind for the next save to sweep: %s", where, error)
