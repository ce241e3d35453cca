"""The fast tier: snapshots on each node's RAM or disk, replicated, loadable at any world size.

Owns the order in which a job uses its local checkpoints: memory to stage into, sealing, the call to
nvidia-resiliency-ext's manager (exchange, publish, prune), the agreement on a commit to load,
opening it, and restoring missing files afterwards. Promises that a failed save leaves earlier
commits intact, that a commit it finds was sealed by all its ranks, that everything passed over has
a reason, and that ranks enter an exchange only after all have agreed to it. Power loss and a lost
node without copies are left to the persistent tier.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from holdfast.config import LocalConfig
from holdfast.errors import (
    ConfigError,
    CorruptCheckpointError,
    RankFailure,
    StageFailedError,
    StageTimeoutError,
    blames_checkpoint,
)
from holdfast.filesystem import Filesystem
from holdfast.format.layout import Layout
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.topology import Seat, Topology, assign_holders, node_name
from holdfast.snapshot.arena import Arena, image_bytes
from holdfast.storage.identity import CommitIdentity
from holdfast.tiers.local.availability import Candidate, Objection, Passed
from holdfast.tiers.local.budget import Budget, find_budget
from holdfast.tiers.local.requirements import device_of, import_adapter, new_group
from holdfast.tiers.local.seal import LocalSnapshot, lay_out_in, seal
from holdfast.tiers.local.shard_file import UNREAD, RunDirectory, ShardRecord, is_memory, shard_name

if TYPE_CHECKING:
    from holdfast.tiers.local.nvrx import ShardManager, ShardState
    from holdfast.tiers.local.pool import PooledFile
    from holdfast.tiers.local.reading import LocalContents

logger = logging.getLogger(__name__)

_PATIENCE = 0.75
"""Fraction of the timeout: leaves a rank that waits for a reader time to report to the others."""


@dataclass(frozen=True)
class LocalCommitted:
    """A local save that succeeded."""

    path: Path
    """Of this rank's own shard."""
    size_bytes: int
    """Of all shards together, copies not counted."""


class LocalTier:
    """The local checkpoints of one run.

    Created collectively, on the training thread, once the run id is known.
    """

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
        """Check the directory, gather all ranks' placements, sweep leftovers.

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
        self._filesystem = filesystem
        self._timeout_seconds = timeout_seconds
        self._buffer_count = keep_last + 1 + drains
        rank = coordinator.rank
        run = RunDirectory(self.directory, run_id, filesystem)
        # Within the stage, so that a package missing on one node only is reported on all ranks.
        transport = config.replication.transport
        places = coordinator.all_gather(
            "local prepare", lambda: _prepare(run, rank, node, transport)
        )
        if store is not None:
            run.note_store(store)
        engine = import_adapter()
        self._device = device_of(transport)
        self.topology = Topology(tuple(seat for seat, _ in places))
        factor, jump = config.replication.factor, config.replication.jump
        nodes = self.topology.nodes
        # Even without copies of shards the small states go to another node: where the remaining
        # shards cover the state, the small states are all that a lost node would take with it.
        copies = factor if factor > 1 else min(2, len(set(nodes)))
        self.holders = assign_holders(nodes, copies, jump)
        """By rank: the holders of its shard, or with `replication.factor` 1 of its small states."""
        self.in_memory = places[rank][1]
        strategy = None
        if coordinator.world_size > 1:
            strategy = engine.make_strategy(
                self._new_group(),
                self.holders,
                timeout_seconds,
                sends_images=factor > 1,
                device=self._device,
            )
            if factor > 1 and min(map(len, self.holders)) < factor and rank == 0:
                logger.warning(
                    "checkpoint.local.replication.factor is %d; this job has too few ranks for it",
                    factor,
                )
        self.manager: ShardManager = engine.ShardManager(
            run, rank, self.topology, strategy, keep_last, in_memory=self.in_memory
        )
        self._file: PooledFile | None = None
        self._newest_sequence = 0
        self._candidate: Candidate | None = None
        self._noted: frozenset[Any] = frozenset()
        """Damage known when the candidate was opened."""
        self._opened: LocalContents | None = None
        shards = self.manager.shards
        coordinator.all_reduce("local sweep", lambda: run.sweep(shards.share()), lambda _: None)

    # -- save ------------------------------------------------------------------------------------

    def begin(
        self, iteration: int, layout: Layout, coordinator: Coordinator, *, pinned: bool = False
    ) -> Arena | None:
        """Return the memory to stage into, on the training thread; None: the caller's own arena.

        Waits, and logs that, while readers hold every file.

        Raises:
            StageFailedError: on every rank: some rank has no space, for instance.
            CheckpointError: no file became free.
        """
        if self.manager.recovery.verdict is None:
            self.find(coordinator, lambda record: None)  # learn what retention must not remove
        self._give_back()

        def take() -> bool:
            if self.in_memory:
                self._filesystem.make_directory(self.manager.shards.directory)  # it may be wiped
                patience = self._timeout_seconds * _PATIENCE
                shards, kept = self.manager.shards, self.manager.kept
                self._file = shards.take(image_bytes(layout), patience, kept)
                arenas.append(lay_out_in(self._file, layout, pinned=pinned))
            return self._group_is_broken()

        arenas: list[Arena] = []
        self._renew_group(coordinator.all_reduce("local begin", take, any))
        return arenas[0] if arenas else None

    def abandon(self) -> None:
        """Release the memory of a save whose staging failed."""
        self._give_back()

    def _give_back(self) -> None:
        if self._file is not None:
            self.manager.shards.pool.give_back(self._file)
            self._file = None

    def write(
        self,
        snapshot: LocalSnapshot,
        identify: Callable[[], CommitIdentity],
        coordinator: Coordinator,
    ) -> LocalCommitted:
        """Seal, exchange, publish and prune; a collective call, on any thread.

        `identify` is called on rank 0 and may refuse the save.

        Raises:
            CheckpointError: on every rank, naming the stage, the ranks and the cause; earlier
                commits are intact.
        """
        self.manager.coordinator = coordinator
        engine = import_adapter()
        size = image_bytes(snapshot.arena.layout)
        sealed: list[ShardState] = []
        try:
            identity = coordinator.broadcast("local identity", identify)

            def seal_own() -> tuple[int, int]:
                pending, trailer = seal(snapshot, identity, self.manager.shards, self._file)
                image = snapshot.arena.memory[:size]
                sealed.append(engine.ShardState(image, trailer, pending, self._file))
                return snapshot.iteration, size

            total = coordinator.all_reduce("local seal", seal_own, _agree_on_iteration)
            self._file = None  # owned by the manager from here on
            self.manager.save(sealed[0], snapshot.iteration)
        except BaseException:
            self._give_back()
            for state in sealed:
                self.manager.shards.drop(state.pending, state.file)
            raise
        if self.in_memory:
            self._prepare_next(size)
        name = shard_name(snapshot.iteration, coordinator.rank)
        own = self.manager.run.rank_directory(coordinator.rank) / name
        return LocalCommitted(own, total)

    def _prepare_next(self, size: int) -> None:
        """Allocate the next save's file now, beside training."""
        try:
            self.manager.shards.pool.top_up(size)
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
        self.manager.coordinator = coordinator
        self._renew_group(coordinator.all_reduce("local group", self._group_is_broken, any))
        verdict = self.manager.vote(objection)
        self._newest_sequence = max(self._newest_sequence, verdict.newest_sequence)
        # A file that cannot be read at the moment may belong to the newest commit.
        unread = {each.iteration for each in verdict.passed if each.reason.startswith(UNREAD)}
        self.manager.shards.spared = frozenset(unread)
        return verdict.candidate

    @property
    def passed(self) -> tuple[Passed, ...]:
        """Commits and files that the last `find` passed over, newest first, with reasons."""
        verdict = self.manager.recovery.verdict
        return () if verdict is None else verdict.passed

    @property
    def newest_sequence(self) -> int:
        """The largest sequence of any file that any `find` saw; 0: none."""
        return self._newest_sequence

    def open(
        self,
        candidate: Candidate,
        coordinator: Coordinator,
        suffices: Callable[[bytes], bool] | None = None,
    ) -> LocalContents:
        """Open a commit that `find` returned; a collective call.

        Shards that a node has lost are read from peers, and restored by `restore`. `suffices`:
        returns whether this rank's own small state is all it needs of the small states.

        Raises:
            CorruptCheckpointError: on every rank; call `find` again for another commit.
            StageFailedError: a rank is gone, or failed for a reason other than the commit.
        """
        from holdfast.tiers.local.reading import Opening

        manager = self.manager
        self._noted = frozenset(manager.recovery.damaged)
        try:
            self._opened = Opening(manager, candidate, coordinator).run(suffices)
            self._candidate = candidate
        except StageTimeoutError:
            raise
        except (CorruptCheckpointError, StageFailedError) as error:
            if isinstance(error, StageFailedError) and not blames_checkpoint(error):
                raise
            self.pass_over(candidate, coordinator, str(error))
            if isinstance(error, StageFailedError):
                raise CorruptCheckpointError(str(manager.run.root), str(error)) from error
            raise
        return self._opened

    def pass_over(self, candidate: Candidate, coordinator: Coordinator, reason: str) -> None:
        """Make the next `find` return something else after a commit could not be loaded.

        A collective call. Damage noted since `open` suffices; without any, the whole commit is
        passed over with this reason.
        """
        found = coordinator.all_reduce(
            "local pass over", lambda: not self._noted >= self.manager.recovery.damaged, any
        )
        if not found:
            self.manager.recovery.rejected[candidate.commit] = reason

    def verify(self, candidate: Candidate, coordinator: Coordinator) -> None:
        """Read and verify every file of a commit, each rank its share.

        Raises:
            CorruptCheckpointError: on every rank; call `find` again.
        """
        problems = coordinator.all_reduce(
            "local verify",
            lambda: self.manager.recovery.verify(candidate),
            lambda parts: [each for part in parts for each in part],
        )
        if problems:
            raise CorruptCheckpointError(str(self.manager.run.root), "; ".join(problems[:3]))

    def finish(self) -> bool:
        """End a successful load; return, alike on every rank, whether `restore` has work to do."""
        self._end_fetch()
        candidate = self._candidate
        return candidate is not None and bool(self.manager.recovery.lacks(candidate))

    def restore(self, coordinator: Coordinator) -> None:
        """Restore the files that nodes have lost of the loaded commit; collective, on any thread.

        Raises:
            CheckpointError: on every rank: a file could not be written, or has no sound copy.
        """
        assert self._candidate is not None
        self.manager.recovery.restore(self._candidate, coordinator)

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

        coordinator.all_reduce(
            "local discard", lambda: self.manager.shards.discard(is_superseded), lambda _: None
        )
        self.manager.kept = [
            each for each in self.manager.kept if iteration is not None and each[2] <= iteration
        ]

    # -- other -----------------------------------------------------------------------------------

    @contextmanager
    def hold(self, iteration: int) -> Iterator[BinaryIO]:
        """Open this rank's own shard of a commit, protected from reuse meanwhile, on any thread.

        Raises:
            OSError: it cannot be opened.
        """
        with self.manager.shards.pool.hold(self._own_path(iteration)) as stream:
            yield stream

    @contextmanager
    def keep(self, iteration: int) -> Iterator[None]:
        """Protect this rank's own shard of a commit from reuse meanwhile; this cannot fail."""
        with self.manager.shards.pool.keep(self._own_path(iteration)):
            yield

    def _own_path(self, iteration: int) -> Path:
        rank = self.manager.rank
        return self.manager.run.rank_directory(rank) / shard_name(iteration, rank)

    def budget(self, image_size_bytes: int, coordinator: Coordinator) -> Budget:
        """Return what this place needs for shards of these sizes, each rank passing its own.

        Raises:
            ConfigError: on every rank: it does not fit, with the numbers.
        """
        sizes = coordinator.all_gather("local budget", lambda: image_size_bytes)
        rank = coordinator.rank
        mates = self.topology.place_mates(rank)
        strategy = self.manager.repl_strategy
        sends = strategy is not None and strategy.sends_images
        held = [
            [sizes[owner] for owner in strategy.owners_held_by(each)] if sends else []
            for each in mates
        ]

        def find() -> Budget:
            found = find_budget(
                self.directory,
                [sizes[each] for each in mates],
                held,
                self._buffer_count,
                in_memory=self.in_memory,
                reused=[self.manager.run.root],
            )
            if rank == mates[0]:
                found.check()
            return found

        budgets: list[Budget] = []
        coordinator.all_reduce("local room", lambda: budgets.append(find()), lambda _: None)
        return budgets[0]

    def close(self) -> None:
        """Close every file; published files stay."""
        self._end_fetch()
        self._give_back()
        self.manager.close()

    # -- the group -------------------------------------------------------------------------------

    def _new_group(self) -> Any:
        """Create the group for exchanges; a collective call, on the training thread."""
        return new_group(self._device, self._timeout_seconds)

    def _group_is_broken(self) -> bool:
        strategy = self.manager.repl_strategy
        return strategy is not None and strategy.local_group.is_broken

    def _renew_group(self, is_broken: bool) -> None:
        """Replace a group in which a wait timed out: gloo has closed its connections."""
        if is_broken:
            self.manager.repl_strategy.local_group.renew(self._new_group())


def _prepare(run: RunDirectory, rank: int, node: str | None, transport: str) -> tuple[Seat, bool]:
    """Return where this rank is placed, and whether its directory is in RAM."""
    import_adapter()
    device_of(transport)
    run.prepare(rank)
    found = os.stat(run.root)
    return Seat(node_name(node), (found.st_dev, found.st_ino)), is_memory(run.root)


def _agree_on_iteration(sealed: list[tuple[int, int]]) -> int:
    """Return the bytes of all shards together.

    Raises:
        StageFailedError: ranks save different iterations.
    """
    failures = [
        RankFailure(
            rank, "Disagreement", f"saves at step {iteration}, rank 0 at step {sealed[0][0]}"
        )
        for rank, (iteration, _) in enumerate(sealed)
        if iteration != sealed[0][0]
    ]
    if failures:
        raise StageFailedError("local seal", failures)
    return sum(size for _, size in sealed)
