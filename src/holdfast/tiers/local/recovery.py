"""What can be loaded, agreed by vote, and what nodes have lost, brought back from peers.

Owns the vote on the newest commit, the memory of what was found damaged on the way, and the
fetching of whole shards from ranks that hold copies, which may run beside training. Promises that
every rank makes the same decisions from the same facts, that a file which was found damaged counts
as missing from then on until it was written anew, and that a shard which arrives is published only
if all of it verified. Reads no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from holdfast.errors import CorruptCheckpointError, is_process_failure
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.direct import read_verified
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
    """What one rank does about commits that are there, together with the others."""

    def __init__(self, shelf: ShardDirectory, strategy: ShardReplication | None) -> None:
        self.verdict: Verdict | None = None
        """Of the last vote."""
        self.damaged: set[tuple[int, str, int]] = set()
        """Files that were found damaged: the rank that lists them, path, sequence."""
        self.rejected: dict[Commit, str] = {}
        self.unusual: set[Commit] = set()
        """Commits whose containers are not as this torch makes them."""
        self._covered: set[Commit] = set()
        self._shelf = shelf
        self._run = shelf.run
        self._strategy = strategy

    def inventory(self) -> Inventory:
        """Return what this rank sees, by name and tail."""
        self._run.prepare(self._shelf.rank)  # again: what was lost may be the directory itself
        return Inventory(self._shelf.scan(), frozenset(self.damaged))

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
        """Settle with all ranks whether what is left of a commit covers the state."""
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
        """Describe the chunks in the shards of a commit that this rank lists."""
        found: list[Any] = []
        for copies in candidate.copies:
            for copy in copies:
                if copy.rank == self._shelf.rank and copy.is_whole:
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
            if copy.rank != self._shelf.rank or not copy.is_whole:
                continue
            path = self._run.root / copy.path
            try:
                record = self._run.read_trailer(copy.path).record
                whole = [range(record.body_bytes)]
                read_verified(self._run.filesystem, path, record.image_record(copy.path), [], whole)
            except (CorruptCheckpointError, OSError) as error:
                if is_process_failure(error):
                    raise
                self.note_damage(copy.path)
                problems.append(str(error))
        return problems

    def note_damage(self, path: str, lister: int | None = None) -> None:
        """Remember that a published file is damaged; the next vote takes it for missing.

        `lister`: who lists it, where that is not at this rank's place.
        """
        if self.verdict is None or self.verdict.candidate is None:
            return
        if parse_shard_name(path.rpartition("/")[2]) is None:
            return  # a file that was borrowed: nothing published is to blame
        rank = self._shelf.lister(_directory(path)) if lister is None else lister
        self.damaged.add((rank, path, self.verdict.candidate.record.sequence))

    def note_unusual(self) -> None:
        """Remember that the commit's containers are another torch's; vote again, for the same."""
        assert self.verdict is not None
        assert self.verdict.candidate is not None
        record = self.verdict.candidate.record
        self.unusual.add(record.commit)
        # Of no file, and yet something that was not known before: the commit is not passed over.
        self.damaged.add((self._shelf.rank, "", record.sequence))

    def bring_home(self, candidate: Candidate, coordinator: Coordinator) -> Candidate:
        """Write again, from a peer's copy, each rank's own shard that is not at its place.

        Return the commit with the copies that it has then.

        Raises:
            CorruptCheckpointError: on every rank: a copy was damaged, vote again.
            StageFailedError: a shard could not be written, or a rank is gone.
        """
        candidate, problems = self._fetch(
            candidate, self._homeless(candidate), "local restore", coordinator
        )
        self._raise(problems)
        return candidate

    def lacks(self, candidate: Candidate) -> list[tuple[int, int]]:
        """Return the files that should be somewhere and are not: pairs of holder and owner.

        Each rank's own shard at its place, and with replication every copy at its holder. The
        same on every rank; one process has nobody to ask.
        """
        strategy = self._strategy
        if strategy is None or candidate.record.world_size != self._shelf.topology.world_size:
            return []
        wanted = self._homeless(candidate)
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
            # From another rank: what one has already, in whatever directory, is there.
            if any(each.is_whole and each.rank != pair[0] for each in candidate.copies[pair[1]])
        ]

    def restore(self, candidate: Candidate, coordinator: Coordinator) -> None:
        """Write again everything that `lacks` names, from whatever sound copy there is.

        Raises:
            CorruptCheckpointError: on every rank: copies were damaged; what could be was written.
            StageFailedError: a file could not be written, or a rank is gone.
        """
        problems: list[Problem] = []
        lost_before = set(candidate.lost)
        while wanted := self.lacks(candidate):
            candidate, found = self._fetch(candidate, wanted, "local redundancy", coordinator)
            problems += found
            # Damaged ones are lacking themselves, as long as there is another to write them from.
            bad = {(rank, path) for rank, path, _ in found}
            sound = [
                tuple(each for each in copies if (each.rank, each.path) not in bad)
                for copies in candidate.copies
            ]
            candidate = replace(candidate, copies=tuple(sound))
        if set(candidate.lost) > lost_before:
            self._raise(problems)

    def _homeless(self, candidate: Candidate) -> list[tuple[int, int]]:
        """Return the ranks whose own shard is not at their place, as pairs of holder and owner."""
        places = self._shelf.topology.places
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
        """Send shards to ranks that want them: pairs of receiver and owner, the same everywhere.

        Return the commit with the copies that it has then, and which of its files are damaged.
        """
        if not wanted or self._strategy is None:
            return candidate, []
        iteration = candidate.record.iteration
        listed: list[dict[CkptId, Copy]] = [{} for _ in self._shelf.topology.seats]
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
        """Return what was written here, or why not: who lists it, path, reason."""
        strategy, shelf, root = self._strategy, self._shelf, self._run.root
        assert strategy is not None
        sources = {
            each: FileShard(
                self._run.filesystem,
                root / listed[self._shelf.rank][each].path,
                self._body_bytes(listed[self._shelf.rank][each].path),
            )
            for each in plan.required_ids(self._shelf.rank)
        }
        strategy.local_group.land = shelf.sink
        try:
            received = strategy.retrieve_execute(plan, sources)
        finally:
            for source in sources.values():
                source.close()
        senders = {
            each.id_: each.sender for each in plan.entries if each.receiver == self._shelf.rank
        }
        outcomes: list[tuple[int, str, str | None]] = []
        for ckpt_id, sink in received.items():
            owner = ckpt_id[1]
            try:
                tail = sink.seal(self._run.run_id, candidate.commit, owner)
            except CorruptCheckpointError as error:
                sender = senders[ckpt_id]
                path = listed[sender][ckpt_id].path
                self.note_damage(path, sender)
                shelf.drop_received(sink)
                outcomes.append((sender, path, f"{path} on rank {sender}: {error.reason}"))
                continue
            except OSError:
                shelf.drop_received(sink)
                raise
            shelf.publish_received(sink, tail)
            for final, replaced in shelf.settle():
                outcomes.append((shelf.rank, f"{shelf.rank}/{final.name}", None))
                if replaced is not None:
                    shelf.retire(replaced)  # damaged: a sound one would not have been sent for
        shelf.sync_names()
        return outcomes

    def _body_bytes(self, path: str) -> int:
        try:
            return self._run.read_trailer(path).record.body_bytes
        except (CorruptCheckpointError, OSError):
            return 0  # damaged since it was listed: what is sent will not be taken


def _directory(path: str) -> int:
    return int(path.partition("/")[0])
