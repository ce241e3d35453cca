"""Which shards of a run can be reached, agreed by all ranks, and restoring those that nodes lost.

Owns the grouping of shard files into commits, the decision which commit all ranks can load, the
list of files found damaged on the way, and the transfer of whole shards from ranks that hold
copies, which may run beside training. Promises that every rank makes the same decisions from the
same facts, newest commit first, naming everything it passed over and why; that files of one commit
are never mixed with another's, even of the same iteration; that a state counts as covered only if
every name is present and every tensor is tiled exactly; that a file found damaged counts as missing
until it is written again; and that a received shard is published only if all of it verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from holdfast.blame import is_process_failure
from holdfast.errors import CorruptCheckpointError
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.direct import read_verified
from holdfast.tiers.local.commits import (
    Agreement,
    Candidate,
    Copy,
    Inventory,
    find_gap,
    judge,
    lacks_cover,
)
from holdfast.tiers.local.replication import Replication
from holdfast.tiers.local.shard_file import (
    Chunk,
    CommitKey,
    ShardRecord,
    outline,
    parse_shard_name,
    shard_name,
)
from holdfast.tiers.local.shards import FileShard, ShardDirectory
from holdfast.tiers.tier import Objection

T = TypeVar("T")

Problem = tuple[int, str, str]
"""A damaged file: the rank that lists it, path, reason."""


class Availability:
    """One rank's side of the agreement on existing commits, and of their repair."""

    def __init__(self, files: ShardDirectory, replication: Replication | None) -> None:
        self.agreement: Agreement | None = None
        """Of the last agreement."""
        self.damaged: set[tuple[int, str, int]] = set()
        """Files that were found damaged: the rank that lists them, path, sequence."""
        self.rejected: dict[CommitKey, str] = {}
        self.unusual: set[CommitKey] = set()
        """Commits whose containers another version of torch wrote."""
        self._covered: set[CommitKey] = set()
        self._is_swept = False
        self.files = files
        self._run = files.run
        self.replication = replication

    def inventory(self) -> Inventory:
        """Return the files this rank lists, read by name and trailer; at first sweep leftovers."""
        self._run.prepare(self.files.rank)  # again: the directory itself may have been lost
        if not self._is_swept:
            self._run.sweep(self.files.share())
            self._is_swept = True
        is_broken = self.replication is not None and self.replication.is_broken
        return Inventory(self.files.scan(), frozenset(self.damaged), is_broken)

    def agree(self, objection: Objection, coordinator: Coordinator) -> Agreement:
        """Agree with all ranks on the newest commit that can be loaded."""
        judged: list[Agreement] = []

        def decide(found: list[Inventory]) -> Agreement:
            judged.append(judge(found, objection, self.rejected, self._covered))
            return replace(judged[-1], passed=())  # there may be one for each rank

        while True:
            told = coordinator.all_reduce("local find", self.inventory, decide)
            agreement = self.agreement = judged[-1] if judged else told
            candidate = agreement.candidate
            if candidate is None or not candidate.lost or candidate.commit in self._covered:
                return agreement
            self._look_closer(candidate, coordinator)

    def _look_closer(self, candidate: Candidate, coordinator: Coordinator) -> None:
        """Agree with all ranks whether the remaining shards of a commit cover the state."""
        gap = coordinator.all_reduce(
            "local cover",
            lambda: self._outline(candidate),
            lambda parts: find_gap(
                [each for part in parts for each in part], candidate.record.state_names
            ),
        )
        if gap is None:
            self._covered.add(candidate.commit)
        else:
            self.rejected[candidate.commit] = lacks_cover(candidate, gap)

    def verify(self, candidate: Candidate) -> list[str]:
        """Read every file of a commit that this rank lists; note and return what is damaged."""

        def read(path: str, record: ShardRecord) -> None:
            whole = [range(record.body_bytes)]
            read_verified(self._run.storage, path, record.image_record(path), [], whole)

        return self._read_each(candidate, read)[1]

    def _outline(self, candidate: Candidate) -> list[Chunk]:
        """Return the chunks in the shards of a commit that this rank lists."""
        found, _ = self._read_each(candidate, lambda *shard: outline(self._run.storage, *shard))
        return [each for chunks in found for each in chunks]

    def _read_each(
        self, candidate: Candidate, read: Callable[[str, ShardRecord], T]
    ) -> tuple[list[T], list[str]]:
        """Read every shard of a commit that this rank lists; note and return what is damaged."""
        found, problems = [], []
        for copy in [each for copies in candidate.copies for each in copies]:
            if copy.rank == self.files.rank:
                try:
                    with self.noting(copy.path):
                        found.append(read(copy.path, self._run.read_trailer(copy.path).record))
                except (CorruptCheckpointError, OSError) as error:
                    if is_process_failure(error):
                        raise
                    problems.append(str(error))
        return found, problems

    @contextmanager
    def noting(self, path: str) -> Iterator[None]:
        """Note the file as damaged if reading it fails."""
        try:
            yield
        except (CorruptCheckpointError, OSError) as error:
            if not is_process_failure(error):
                self.note_damage(path)
            raise

    def note_damage(self, path: str, lister: int | None = None) -> None:
        """Note that a published file is damaged; the next `agree` counts it as missing.

        `lister`: the rank that lists it, where it is not at this rank's place.
        """
        if self.agreement is None or self.agreement.candidate is None:
            return
        if parse_shard_name(path.rpartition("/")[2]) is None:
            return  # a file of fetched blocks, not a published one
        rank = self.files.lister(_directory(path)) if lister is None else lister
        self.damaged.add((rank, path, self.agreement.candidate.record.sequence))

    def note_unusual(self) -> None:
        """Note that another torch wrote the containers; the next `agree` finds the commit again."""
        assert self.agreement is not None
        assert self.agreement.candidate is not None
        record = self.agreement.candidate.record
        self.unusual.add(record.commit)
        # Names no file, but counts as new damage: so the commit itself is not passed over.
        self.damaged.add((self.files.rank, "", record.sequence))

    def lacks(self, candidate: Candidate) -> list[tuple[int, int]]:
        """Return the missing files, as pairs of holder and owner, that a copy can restore.

        Expected are each rank's own shard at its place, and with replication every copy at its
        holder. The same on every rank; a single process has no peers to fetch from.
        """
        replication = self.replication
        if replication is None or candidate.record.world_size != self.files.topology.world_size:
            return []
        wanted = self._missing_own_shards(candidate)
        if replication.sends_images:
            wanted += [
                (holder, owner)
                for owner, holders in enumerate(replication.holders)
                for holder in holders
                if not any(
                    each.is_whole and each.rank == holder and _directory(each.path) == holder
                    for each in candidate.copies[owner]
                )
            ]
        return [
            pair
            for pair in dict.fromkeys(wanted)
            # From another rank: a shard the holder has in any directory counts as present.
            if any(each.is_whole and each.rank != pair[0] for each in candidate.copies[pair[1]])
        ]

    def restore(self, candidate: Candidate, coordinator: Coordinator) -> None:
        """Restore every file that `lacks` names, from any sound copy.

        Raises:
            CorruptCheckpointError: on every rank: copies were damaged; the rest was restored.
            StageFailedError: a file could not be written, or a rank is gone.
        """
        problems: list[Problem] = []
        lost_before = set(candidate.lost)
        while wanted := self.lacks(candidate):
            candidate, found = self._fetch(candidate, wanted, coordinator)
            problems += found
            # A damaged file is missing too, as long as another copy can restore it.
            bad = {(rank, path) for rank, path, _ in found}
            sound = [
                tuple(each for each in copies if (each.rank, each.path) not in bad)
                for copies in candidate.copies
            ]
            candidate = replace(candidate, copies=tuple(sound))
        if problems and set(candidate.lost) > lost_before:
            reasons = "; ".join(reason for _, _, reason in problems[:3])
            raise CorruptCheckpointError(str(self._run.root), reasons)

    def _missing_own_shards(self, candidate: Candidate) -> list[tuple[int, int]]:
        """Return ranks whose own shard is missing at their place, as pairs of holder and owner."""
        places = self.files.topology.places
        return [
            (rank, rank)
            for rank, copies in enumerate(candidate.copies)
            if not any(each.is_whole and places[each.rank] == places[rank] for each in copies)
        ]

    def _fetch(
        self, candidate: Candidate, wanted: Sequence[tuple[int, int]], coordinator: Coordinator
    ) -> tuple[Candidate, list[Problem]]:
        """Send shards to the ranks in `wanted`, pairs of receiver and owner, equal on all ranks.

        Return the commit with the restored copies, and which of its files are damaged.
        """
        assert self.replication is not None
        record = candidate.record
        listed: list[dict[int, Copy]] = [{} for _ in self.files.topology.seats]
        for owner, copies in enumerate(candidate.copies):
            for copy in copies:
                if copy.is_whole:
                    listed[copy.rank].setdefault(owner, copy)
        plan = self.replication.plan_restore(listed, wanted)
        rewritten = coordinator.all_reduce(
            "local redundancy",
            lambda: self._carry_out(plan, listed, candidate),
            lambda parts: [each for part in parts for each in part],
        )
        problems = [(rank, path, reason) for rank, path, reason in rewritten if reason is not None]
        written = {(rank, path) for rank, path, reason in rewritten if reason is None}
        self.damaged -= {(rank, path, record.sequence) for rank, path in written}
        holdings = [list(each) for each in candidate.copies]
        for entry in plan.entries:
            path = f"{entry.receiver}/{shard_name(record.iteration, entry.id_)}"
            if (entry.receiver, path) in written:
                holdings[entry.id_].insert(0, Copy(entry.receiver, path, is_whole=True))
        return replace(candidate, copies=tuple(tuple(each) for each in holdings)), problems

    def _carry_out(
        self, plan: Any, listed: Sequence[dict[int, Copy]], candidate: Candidate
    ) -> list[tuple[int, str, str | None]]:
        """Return what was written here, or why not: the rank that lists it, path, reason."""
        replication, files, rank = self.replication, self.files, self.files.rank
        assert replication is not None
        sources = {
            owner: FileShard(self._run.storage, path, self._body_bytes(path))
            for owner, path in ((each, listed[rank][each].path) for each in plan.required_ids(rank))
        }
        senders = {each.id_: each.sender for each in plan.entries if each.receiver == rank}
        sinks = {owner: files.sink() for owner in senders}
        outcomes: list[tuple[int, str, str | None]] = []
        try:
            replication.exchange(plan, rank, sources, sinks, replication.wide)
            for owner, sink in sinks.items():
                try:
                    sink.seal(self._run.run_id, candidate.commit, owner)
                except CorruptCheckpointError as error:
                    sender = senders[owner]
                    path = listed[sender][owner].path
                    self.note_damage(path, sender)
                    files.drop_received(sink)
                    outcomes.append((sender, path, f"{path} on rank {sender}: {error.reason}"))
                    continue
                files.publish_received(sink)
                for final, replaced in files.settle():
                    outcomes.append((rank, f"{rank}/{final.name}", None))
                    if replaced is not None:
                        files.retire(replaced)  # damaged: a sound one would not have been fetched
        except BaseException:
            for sink in sinks.values():
                files.drop_received(sink)  # those that were not published
            raise
        finally:
            for source in sources.values():
                source.close()
        files.sync_names()
        return outcomes

    def _body_bytes(self, path: str) -> int:
        try:
            return self._run.read_trailer(path).record.body_bytes
        except (CorruptCheckpointError, OSError):
            return 0  # damaged since it was listed: the receiver will reject what is sent


def _directory(path: str) -> int:
    return int(path.partition("/")[0])
