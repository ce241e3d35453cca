"""Agree on the commit to load, and restore from peers the files that nodes have lost.

Owns the agreement on the newest available commit, the list of files found damaged on the way, and
the transfer of whole shards from ranks that hold copies, which may run beside training. Promises
that every rank makes the same decisions from the same facts, that a file found damaged counts as
missing until it is written again, and that a received shard is published only if all of it
verified. Reads no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from holdfast.errors import CorruptCheckpointError, is_process_failure
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.direct import read_verified
from holdfast.storage.posix import PosixStorage
from holdfast.tiers.local.availability import (
    Candidate,
    Commit,
    Copy,
    Inventory,
    Objection,
    Verdict,
    judge,
    lacks_cover,
)
from holdfast.tiers.local.elastic import find_gap, outline
from holdfast.tiers.local.exchange import ShardReplication
from holdfast.tiers.local.shard_file import parse_shard_name, shard_name
from holdfast.tiers.local.shards import FileShard, ShardDirectory

CkptId = tuple[int, int, str]
"""As nvidia-resiliency-ext has it: iteration, owner, session (here the run id)."""
Problem = tuple[int, str, str]
"""A damaged file: the rank that lists it, path, reason."""


class Recovery:
    """One rank's side of the agreement on existing commits, and of their repair."""

    def __init__(self, shards: ShardDirectory, strategy: ShardReplication | None) -> None:
        self.verdict: Verdict | None = None
        """Of the last agreement."""
        self.damaged: set[tuple[int, str, int]] = set()
        """Files that were found damaged: the rank that lists them, path, sequence."""
        self.rejected: dict[Commit, str] = {}
        self.unusual: set[Commit] = set()
        """Commits whose containers another version of torch wrote."""
        self._covered: set[Commit] = set()
        self._shards = shards
        self._run = shards.run
        self._strategy = strategy

    def inventory(self) -> Inventory:
        """Return the files this rank lists, read by name and trailer."""
        self._run.prepare(self._shards.rank)  # again: the directory itself may have been lost
        return Inventory(self._shards.scan(), frozenset(self.damaged))

    def vote(self, objection: Objection, coordinator: Coordinator) -> Verdict:
        """Agree with all ranks on the newest commit that can be loaded."""
        while True:
            verdict = self.verdict = coordinator.all_reduce(
                "local find",
                self.inventory,
                lambda found: judge(found, objection, self.rejected, self._covered),
            )
            candidate = verdict.candidate
            if candidate is None or not candidate.lost or candidate.commit in self._covered:
                return verdict
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

    def _outline(self, candidate: Candidate) -> list[Any]:
        """Return the chunks in the shards of a commit that this rank lists."""
        found: list[Any] = []
        for copies in candidate.copies:
            for copy in copies:
                if copy.rank == self._shards.rank and copy.is_whole:
                    try:
                        record = self._run.read_trailer(copy.path).record
                        found += outline(self._run.root / copy.path, record, self._run.filesystem)
                    except (CorruptCheckpointError, OSError) as error:
                        if is_process_failure(error):
                            raise
                        self.note_damage(copy.path)
        return found

    def verify(self, candidate: Candidate) -> list[str]:
        """Read every file of a commit that this rank lists; note and return what is damaged."""
        problems = []
        for copy in [each for copies in candidate.copies for each in copies]:
            if copy.rank != self._shards.rank or not copy.is_whole:
                continue
            files = PosixStorage(self._run.root, self._run.filesystem)
            try:
                record = self._run.read_trailer(copy.path).record
                whole = [range(record.body_bytes)]
                read_verified(files, copy.path, record.image_record(copy.path), [], whole)
            except (CorruptCheckpointError, OSError) as error:
                if is_process_failure(error):
                    raise
                self.note_damage(copy.path)
                problems.append(str(error))
        return problems

    def note_damage(self, path: str, lister: int | None = None) -> None:
        """Note that a published file is damaged; the next `vote` counts it as missing.

        `lister`: the rank that lists it, where it is not at this rank's place.
        """
        if self.verdict is None or self.verdict.candidate is None:
            return
        if parse_shard_name(path.rpartition("/")[2]) is None:
            return  # a file of fetched blocks, not a published one
        rank = self._shards.lister(_directory(path)) if lister is None else lister
        self.damaged.add((rank, path, self.verdict.candidate.record.sequence))

    def note_unusual(self) -> None:
        """Note that the commit's containers are another torch's; the next `vote` finds it again."""
        assert self.verdict is not None
        assert self.verdict.candidate is not None
        record = self.verdict.candidate.record
        self.unusual.add(record.commit)
        # Names no file, but counts as new damage: so the commit itself is not passed over.
        self.damaged.add((self._shards.rank, "", record.sequence))

    def bring_home(self, candidate: Candidate, coordinator: Coordinator) -> Candidate:
        """Restore, from a peer's copy, each rank's own shard that is missing at its place.

        Return the commit with the restored copies.

        Raises:
            CorruptCheckpointError: on every rank: a copy was damaged; find a commit again.
            StageFailedError: a shard could not be written, or a rank is gone.
        """
        candidate, problems = self._fetch(
            candidate, self._missing_own_shards(candidate), "local restore", coordinator
        )
        self._raise(problems)
        return candidate

    def lacks(self, candidate: Candidate) -> list[tuple[int, int]]:
        """Return the missing files, as pairs of holder and owner, that a copy can restore.

        Expected are each rank's own shard at its place, and with replication every copy at its
        holder. The same on every rank; a single process has no peers to fetch from.
        """
        strategy = self._strategy
        if strategy is None or candidate.record.world_size != self._shards.topology.world_size:
            return []
        wanted = self._missing_own_shards(candidate)
        if strategy.sends_images:
            wanted += [
                (holder, owner)
                for owner, holders in enumerate(strategy.holders)
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
            candidate, found = self._fetch(candidate, wanted, "local redundancy", coordinator)
            problems += found
            # A damaged file is missing too, as long as another copy can restore it.
            bad = {(rank, path) for rank, path, _ in found}
            sound = [
                tuple(each for each in copies if (each.rank, each.path) not in bad)
                for copies in candidate.copies
            ]
            candidate = replace(candidate, copies=tuple(sound))
        if set(candidate.lost) > lost_before:
            self._raise(problems)

    def _missing_own_shards(self, candidate: Candidate) -> list[tuple[int, int]]:
        """Return ranks whose own shard is missing at their place, as pairs of holder and owner."""
        places = self._shards.topology.places
        return [
            (rank, rank)
            for rank, copies in enumerate(candidate.copies)
            if not any(each.is_whole and places[each.rank] == places[rank] for each in copies)
        ]

    def _raise(self, problems: Sequence[Problem]) -> None:
        if problems:
            reasons = "; ".join(reason for _, _, reason in problems[:3])
            raise CorruptCheckpointError(str(self._run.root), reasons)

    def _fetch(
        self,
        candidate: Candidate,
        wanted: Sequence[tuple[int, int]],
        stage: str,
        coordinator: Coordinator,
    ) -> tuple[Candidate, list[Problem]]:
        """Send shards to the ranks in `wanted`, pairs of receiver and owner, equal on all ranks.

        Return the commit with the restored copies, and which of its files are damaged.
        """
        if not wanted or self._strategy is None:
            return candidate, []
        iteration = candidate.record.iteration
        listed: list[dict[CkptId, Copy]] = [{} for _ in self._shards.topology.seats]
        for owner, copies in enumerate(candidate.copies):
            for copy in copies:
                if copy.is_whole:
                    listed[copy.rank].setdefault((iteration, owner, self._run.run_id), copy)
        plan = self._strategy.retrieve_plan(
            listed, [(receiver, (iteration, owner, self._run.run_id)) for receiver, owner in wanted]
        )
        rewritten = coordinator.all_reduce(
            stage,
            lambda: self._carry_out(plan, listed, candidate),
            lambda parts: [each for part in parts for each in part],
        )
        problems = [(rank, path, reason) for rank, path, reason in rewritten if reason is not None]
        written = {(rank, path) for rank, path, reason in rewritten if reason is None}
        sequence = candidate.record.sequence
        self.damaged -= {(rank, path, sequence) for rank, path in written}
        holdings = [list(each) for each in candidate.copies]
        for entry in plan.entries:
            owner = entry.id_[1]
            path = f"{entry.receiver}/{shard_name(iteration, owner)}"
            if (entry.receiver, path) in written:
                holdings[owner].insert(0, Copy(entry.receiver, path, is_whole=True))
        return replace(candidate, copies=tuple(tuple(each) for each in holdings)), problems

    def _carry_out(
        self, plan: Any, listed: Sequence[dict[CkptId, Copy]], candidate: Candidate
    ) -> list[tuple[int, str, str | None]]:
        """Return what was written here, or why not: the rank that lists it, path, reason."""
        strategy, shards, root = self._strategy, self._shards, self._run.root
        assert strategy is not None
        sources = {
            each: FileShard(
                self._run.filesystem,
                root / listed[self._shards.rank][each].path,
                self._body_bytes(listed[self._shards.rank][each].path),
            )
            for each in plan.required_ids(self._shards.rank)
        }
        strategy.local_group.make_sink = shards.sink
        try:
            received = strategy.retrieve_execute(plan, sources)
        finally:
            for source in sources.values():
                source.close()
        senders = {
            each.id_: each.sender for each in plan.entries if each.receiver == self._shards.rank
        }
        outcomes: list[tuple[int, str, str | None]] = []
        for ckpt_id, sink in received.items():
            owner = ckpt_id[1]
            try:
                trailer = sink.seal(self._run.run_id, candidate.commit, owner)
            except CorruptCheckpointError as error:
                sender = senders[ckpt_id]
                path = listed[sender][ckpt_id].path
                self.note_damage(path, sender)
                shards.drop_received(sink)
                outcomes.append((sender, path, f"{path} on rank {sender}: {error.reason}"))
                continue
            except OSError:
                shards.drop_received(sink)
                raise
            shards.publish_received(sink, trailer)
            for final, replaced in shards.settle():
                outcomes.append((shards.rank, f"{shards.rank}/{final.name}", None))
                if replaced is not None:
                    shards.retire(replaced)  # damaged: a sound file would not have been fetched
        shards.sync_names()
        return outcomes

    def _body_bytes(self, path: str) -> int:
        try:
            return self._run.read_trailer(path).record.body_bytes
        except (CorruptCheckpointError, OSError):
            return 0  # damaged since it was listed: the receiver will reject what is sent


def _directory(path: str) -> int:
    return int(path.partition("/")[0])
