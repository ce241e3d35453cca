"""The fast tier: snapshots on each node's RAM or disk, replicated, loadable at any world size.

Owns the order in which a job uses its local checkpoints: memory to stage into, sealing, the
exchange of copies, publishing and pruning; the agreement on a commit to load, opening it, and
restoring missing files afterwards. Promises that a failed save leaves earlier commits intact, that
a commit it finds was sealed by all its ranks, that everything passed over has a reason, and that
ranks enter an exchange only after all have agreed to it. A lost node's shard is read from ranks
that hold a copy (`peers`), and written again after the load (`availability`). Power loss and a lost
node without copies are left to the persistent tier.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.blame import blames_checkpoint
from holdfast.caller import in_normal_mode
from holdfast.config import LocalConfig
from holdfast.errors import (
    ConfigError,
    CorruptCheckpointError,
    RankFailure,
    StageFailedError,
    StageTimeoutError,
)
from holdfast.filesystem import Filesystem, is_memory
from holdfast.format.layout import Layout
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.job import Committed
from holdfast.read.gathered import read_together
from holdfast.snapshot.arena import Arena, image_bytes
from holdfast.snapshot.audit import Report, Unlike
from holdfast.storage.identity import CommitIdentity
from holdfast.storage.manifest import LOCAL
from holdfast.tiers.local.availability import Availability
from holdfast.tiers.local.budget import Budget, Need, report_budget, take_seats
from holdfast.tiers.local.commits import Candidate
from holdfast.tiers.local.pool import PooledFile
from holdfast.tiers.local.reading import LocalContents, Opening
from holdfast.tiers.local.replication import Replication, make_replication
from holdfast.tiers.local.shard_file import (
    CommitKey,
    RunDirectory,
    ShardRecord,
    Trailer,
    shard_name,
)
from holdfast.tiers.local.shards import (
    ReceivedShard,
    ShardDirectory,
    lay_out_in,
    seal,
    shard_to_send,
)
from holdfast.tiers.select import Commit, Condition
from holdfast.tiers.tier import Objection, Snapshot, Wanted

logger = logging.getLogger(__name__)

_PATIENCE = 0.75
"""Fraction of the timeout: leaves a rank that waits for a reader time to report to the others."""


class LocalTier:
    """The local checkpoints of one run.

    Created collectively, on the training thread, once the run id is known.
    """

    name = LOCAL

    def __init__(
        self,
        config: LocalConfig,
        run_id: str,
        filesystem: Filesystem,
        coordinator: Coordinator,
        timeout_seconds: float,
        node: str | None = None,
        *,
        drains: bool = False,
        store: Path | None = None,
    ) -> None:
        """Check the directory and gather all ranks' placements.

        `node`: the name of this node. None: HOLDFAST_NODE, or the host name. `drains`: commits will
        be held while they are promoted, for which the budget has one more buffer. `store`: where
        the run's persistent checkpoints are, recorded beside the shards.

        Raises:
            ConfigError: nvidia-resiliency-ext is missing, or the directory is not this user's.
            StageFailedError: a directory cannot be made, on some rank.
        """
        assert config.directory is not None
        keep_last = config.keep.last
        if keep_last is None or keep_last < 2:
            rule = "it must be 2 or more: one whole commit must be kept while the next is made"
            raise ConfigError([f"checkpoint.local.keep.last is {keep_last}; {rule}"])
        self.directory = Path(config.directory).absolute()
        self.run_id = run_id
        self._config = config
        self._filesystem = filesystem
        self._timeout_seconds = timeout_seconds
        self._drains = drains
        self._keep_last = keep_last
        rank = coordinator.rank
        run = RunDirectory(self.directory, run_id, filesystem)
        places: list[bool] = []

        def prepare() -> None:
            run.prepare(rank)
            places.append(is_memory(run.root))

        self.topology = take_seats(config, filesystem, coordinator, node=node, prepare=prepare)
        self.in_memory = places[0]
        if store is not None:
            run.note_store(store)
        self.replication = make_replication(
            config.replication, self.topology.nodes, rank, timeout_seconds
        )
        held = [] if self.replication is None else self.replication.owners_held_by(rank)
        self.files = ShardDirectory(
            run,
            rank,
            self.topology,
            buffers=keep_last + 1,
            copies=len(held),
            in_memory=self.in_memory,
        )
        self.availability = Availability(self.files, self.replication)
        self._kept: list[CommitKey] = []
        """The commits that retention keeps, newest first."""
        self._file: PooledFile | None = None
        self._received: list[ReceivedShard] = []
        """Copies received in the current save."""
        self._newest_sequence = 0
        self._candidate: Candidate | None = None
        """The commit that the last survey found."""
        self._failed: list[Commit] = []
        """Commits that were tried and found damaged."""
        self._noted: frozenset[Any] = frozenset()
        """Damage known when the candidate was opened."""
        self._opened: LocalContents | None = None

    # -- save ------------------------------------------------------------------------------------

    def reserve(
        self, layout: Layout, coordinator: Coordinator, *, pinned: bool = False
    ) -> Arena | None:
        """Return the memory to stage into, on the training thread; None: the caller's own arena.

        Waits, and logs that, while readers hold every file.

        Raises:
            StageFailedError: on every rank: some rank has no space, for instance.
            CheckpointError: no file became free.
        """
        if self.availability.agreement is None:
            self.find(coordinator, lambda record: None)  # learn what retention must not remove
        self.release()

        def take() -> bool:
            if self.in_memory:
                self._filesystem.make_directory(self.files.directory)  # it may be wiped
                patience = self._timeout_seconds * _PATIENCE
                self._file = self.files.take(image_bytes(layout), patience, self._kept)
                arenas.append(lay_out_in(self._file, layout, pinned=pinned))
            return self._group_is_broken()

        arenas: list[Arena] = []
        self._renew_group(coordinator.all_reduce("local begin", take, any))
        return arenas[0] if arenas else None

    def release(self) -> None:
        """Release the memory of a save whose staging failed."""
        if self._file is not None:
            self.files.pool.give_back(self._file)
            self._file = None

    def write(
        self,
        snapshot: Snapshot,
        identify: Callable[[], CommitIdentity],
        coordinator: Coordinator,
    ) -> Committed:
        """Seal, exchange, publish and prune; a collective call, on any thread.

        The size of what was committed is that of all shards, copies not counted.

        Raises:
            CheckpointError: on every rank, naming the stage, the ranks and the cause; earlier
                commits are intact.
        """
        arena = snapshot.shard.arena
        assert arena is not None
        snapshot.shard.wait()
        snapshot.confirm()
        size, file, sealed = image_bytes(arena.layout), self._file, []
        try:
            identity = coordinator.broadcast("local identity", identify)

            def seal_own() -> tuple[int, int, Report | None]:
                sealed.append(seal(snapshot, identity, self.files, file))
                return snapshot.iteration, size, snapshot.audit.report()

            total, unlike = coordinator.all_reduce(
                "local seal", seal_own, lambda all_sealed: _judge(all_sealed, snapshot)
            )
            snapshot.audit.conclude(unlike, coordinator)
            ((pending, trailer),) = sealed
            if self.replication is not None and self.replication.sends_anything:
                # All ranks have sealed their shards, so all take part.
                replication = self.replication
                coordinator.all_reduce(
                    "local exchange", lambda: self._exchange(replication, arena, trailer), _nothing
                )
            coordinator.all_reduce(
                "local publish", lambda: self._publish(pending, trailer.record, file), _nothing
            )
        except BaseException:
            self._undo_save(sealed[0][0] if sealed else None)
            raise
        self._file = None  # published
        self._keep_and_prune(trailer.record.commit)
        if self.in_memory:
            self._prepare_next(size)
        return Committed(self._own_path(snapshot.iteration), total, (), tier=LOCAL)

    def _exchange(self, replication: Replication, arena: Arena, trailer: Trailer) -> None:
        """Send this rank's shard to its holders and receive the copies held here."""
        record, rank = trailer.record, self.files.rank
        source = shard_to_send(arena, trailer, is_whole=replication.sends_images)
        sinks = {owner: self.files.sink() for owner in replication.owners_held_by(rank)}
        self._received = list(sinks.values())
        replication.exchange(
            replication.plan_save(rank), rank, {rank: source}, sinks, replication.group
        )
        for owner, sink in sinks.items():
            sink.seal(record.run_id, record.commit, owner)

    def _publish(self, pending: Path, record: ShardRecord, file: PooledFile | None) -> None:
        self.files.publish(pending, record, file)
        for each in self._received:
            self.files.publish_received(each)
        self._received = []
        self.files.sync_names()

    def _undo_save(self, pending: Path | None) -> None:
        """Undo what a failed save has done here, and nothing else: an older save stays."""
        for each in self._received:
            self.files.drop_received(each)
        self._received = []
        self.files.take_back()
        if self._file is None and pending is not None:
            self.files.drop(pending)
        self.release()

    def _keep_and_prune(self, commit: CommitKey) -> None:
        """Remove every published file that does not belong to a kept commit."""
        self.files.settle()
        # An older commit of the same iteration was kept until this one was agreed on.
        others = [each for each in self._kept if each[2] != commit[2]]
        self._kept = [commit, *others][: self._keep_last]
        try:
            self.files.prune(self._kept)
        except OSError as error:  # the new commit is complete even if older ones are not removed
            logger.warning("pruning stopped, the next save continues it: %s", error)

    def _prepare_next(self, size: int) -> None:
        """Allocate the next save's file now, beside training."""
        try:
            self.files.pool.top_up(size)
        except OSError as error:
            logger.warning("%s: the next save may lack space: %s", self.directory, error)

    # -- load ------------------------------------------------------------------------------------

    def find(self, coordinator: Coordinator, objection: Objection) -> Candidate | None:
        """Agree on the newest commit that all ranks can load; None: there is none.

        `objection` returns, on rank 0, why a commit must not be loaded, for instance because it is
        superseded. Call again after damage was found: files noted as damaged then count as missing.
        `passed` has the reasons.

        Raises:
            StageFailedError: a directory cannot be read, on some rank, or a rank is gone.
        """
        self._end_fetch()
        agreed = self.availability.agree(objection, coordinator)
        self._renew_group(agreed.group_is_broken)
        candidate = agreed.candidate
        resumed = [] if candidate is None else [candidate.commit]
        self._kept = sorted({*agreed.whole, *resumed}, reverse=True)[: self._keep_last]
        self._newest_sequence = max(self._newest_sequence, agreed.newest_sequence)
        # A file that cannot be read at the moment may belong to the newest commit.
        self.files.spared = agreed.unread
        return candidate

    @property
    def passed(self) -> tuple[Commit, ...]:
        """What the last `find` passed over, newest first, with reasons; on rank 0."""
        agreed = self.availability.agreement
        return () if agreed is None else agreed.passed

    @property
    def newest_sequence(self) -> int:
        """The largest sequence of any file that any `find` saw; 0: none."""
        return self._newest_sequence

    def survey(
        self, coordinator: Coordinator, objection: Objection, step: int | None = None
    ) -> list[Commit]:
        """Return the newest commit that all ranks can load; on rank 0 also what was passed over.

        Raises:
            StageFailedError: a directory cannot be read, on some rank, or a rank is gone.
        """
        candidate = self._candidate = self.find(coordinator, objection)
        failed = {(each.iteration, each.sequence) for each in self._failed}
        commits = list(self._failed)
        commits += [each for each in self.passed if (each.iteration, each.sequence) not in failed]
        if candidate is not None:
            record, path = candidate.record, str(self.directory)
            commits.append(Commit(LOCAL, record.iteration, record.sequence, path=path))
        return commits

    @in_normal_mode  # live objects may keep what is read here
    def open(self, commit: Commit, coordinator: Coordinator, wanted: Wanted) -> LocalContents:
        """Open the commit that the last survey found; a collective call.

        Shards that a node has lost are read from peers, and restored after the load.

        Raises:
            CorruptCheckpointError: on every rank; survey again for another commit.
            StageFailedError: a rank is gone, or failed for a reason other than the commit.
        """
        candidate = self._candidate
        assert candidate is not None
        if wanted.verify_first:
            self.verify(candidate, coordinator)
        self._noted = frozenset(self.availability.damaged)
        if self.replication is not None and self.availability.lacks(candidate):
            self.replication.connect_all(coordinator)  # for `finish_load`, on another thread
        try:
            opened = Opening(self.availability, candidate, coordinator).run(wanted.suffices)
        except StageTimeoutError:
            raise
        except (CorruptCheckpointError, StageFailedError) as error:
            if isinstance(error, StageFailedError) and not blames_checkpoint(error):
                raise
            self._reject(candidate, coordinator, str(error))
            if isinstance(error, StageFailedError):
                raise CorruptCheckpointError(str(self.files.run.root), str(error)) from error
            raise
        self._opened = opened
        read_together("open", lambda: wanted.accept(opened), opened.checkpoint, coordinator)
        return opened

    def pass_over(
        self, commit: Commit, coordinator: Coordinator, error: CorruptCheckpointError
    ) -> Commit:
        """Make the next survey find something else after a commit could not be loaded.

        A collective call. Damage noted since `open` suffices; without any, the whole commit is
        passed over with this reason.
        """
        assert self._candidate is not None
        reason, path = str(error), str(self.directory)
        self._reject(self._candidate, coordinator, reason)
        failed = replace(commit, condition=Condition.DAMAGED, reason=reason, path=path, error=error)
        self._failed.append(failed)
        return failed

    def _reject(self, candidate: Candidate, coordinator: Coordinator, reason: str) -> None:
        found = coordinator.all_reduce(
            "local pass over", lambda: not self._noted >= self.availability.damaged, any
        )
        if not found:
            self.availability.rejected[candidate.commit] = reason

    def verify(self, candidate: Candidate, coordinator: Coordinator) -> None:
        """Read and verify every file of a commit, each rank its share.

        Raises:
            CorruptCheckpointError: on every rank; call `find` again.
        """
        problems = coordinator.all_reduce(
            "local verify",
            lambda: self.availability.verify(candidate),
            lambda parts: [each for part in parts for each in part],
        )
        if problems:
            raise CorruptCheckpointError(str(self.files.run.root), "; ".join(problems[:3]))

    def finish_load(self) -> Callable[[Coordinator], None] | None:
        """End a successful load; return what restores the files that nodes have lost of it.

        The function is collective, runs on any thread, and raises CheckpointError on every rank
        where a file could not be written or has no sound copy. None, on every rank: nothing was
        lost.
        """
        self._end_fetch()
        candidate = self._candidate
        if candidate is None or not self.availability.lacks(candidate):
            return None
        return lambda coordinator: self.availability.restore(candidate, coordinator)

    def _end_fetch(self) -> None:
        if self._opened is not None:
            self._opened.fetch.return_all()
            self._opened = None

    def discard_after(self, iteration: int | None, coordinator: Coordinator) -> None:
        """Remove the commits that resuming from an iteration supersedes; None: all of them.

        A collective call, before the first save of the attempt that resumed there.
        """

        def is_superseded(record: ShardRecord) -> bool:
            return iteration is None or record.iteration > iteration

        coordinator.all_reduce("local discard", lambda: self.files.discard(is_superseded), _nothing)
        self._kept = [each for each in self._kept if iteration is not None and each[2] <= iteration]

    # -- other -----------------------------------------------------------------------------------

    @contextmanager
    def keep(self, iteration: int) -> Iterator[None]:
        """Protect this rank's own shard of a commit from reuse meanwhile; this cannot fail."""
        with self.files.pool.keep(self._own_path(iteration)):
            yield

    def size_before(self, world_size: int) -> int | None:
        """Return the size of this rank's file of the commit that was found last.

        Of another rank's file, if this one is lost. None: no commit of this many ranks was found.
        """
        if self._candidate is None or self._candidate.record.world_size != world_size:
            return None
        record = self._candidate.record
        try:
            return self._filesystem.size_bytes(self._own_path(record.iteration))
        except OSError:
            return record.image_bytes

    def _own_path(self, iteration: int) -> Path:
        return self.files.directory / shard_name(iteration, self.files.rank)

    def budget(self, image_size_bytes: int, coordinator: Coordinator) -> Budget:
        """Report what shards of these sizes need, each rank passing its own; see `report_budget`.

        Raises:
            ConfigError: on every rank: it does not fit, with the numbers.
        """
        config, need, drains = self._config, Need(image_size_bytes), self._drains
        return report_budget(
            config, self.topology, self.run_id, need, coordinator, drains=drains, is_estimate=False
        )

    def close(self) -> None:
        """Close every file; published files stay."""
        self._end_fetch()
        self.release()
        self.files.close()

    def _group_is_broken(self) -> bool:
        return self.replication is not None and self.replication.is_broken

    def _renew_group(self, is_broken: bool) -> None:
        """Replace a group in which a wait timed out: gloo has closed its connections."""
        if is_broken:
            assert self.replication is not None
            self.replication.renew()


def _nothing(_: object) -> None:
    return None


def _judge(sealed: list[tuple[int, int, Report | None]], snapshot: Snapshot) -> tuple[int, Unlike]:
    """Return the bytes of all shards together, and which replicas differ.

    Raises:
        StageFailedError: ranks save different iterations.
    """
    first = sealed[0][0]
    failures = [
        RankFailure(rank, "Disagreement", f"saves at step {iteration}, rank 0 at step {first}")
        for rank, (iteration, _, _) in enumerate(sealed)
        if iteration != first
    ]
    if failures:
        raise StageFailedError("local seal", failures)
    unlike = snapshot.audit.judge([report for _, _, report in sealed])
    return sum(size for _, size, _ in sealed), unlike
