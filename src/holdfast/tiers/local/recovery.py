"""What can be loaded, agreed by vote, and what is brought back from peers before it is.

Owns the vote on the newest commit, the memory of what was found damaged on the way, and the
fetching of whole shards from ranks that hold copies. Promises that every rank makes the same
decisions from the same facts, that a file which was found damaged counts as missing from then on
until it was written anew, and that a shard which arrives is published only if all of it verified.
Reads no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from holdfast.coordination import Coordinator
from holdfast.errors import CorruptCheckpointError
from holdfast.shards.direct import read_verified
from holdfast.tiers.local.elastic import find_gap, outline
from holdfast.tiers.local.files import parse_shard_name, shard_name
from holdfast.tiers.local.replication import ShardReplication
from holdfast.tiers.local.shards import FileShard
from holdfast.tiers.local.shelf import Shelf
from holdfast.tiers.local.vote import (
    Candidate,
    Commit,
    Copy,
    Inventory,
    Objection,
    Verdict,
    judge,
    lacks_cover,
)

CkptId = tuple[int, int, str]
"""As nvidia-resiliency-ext has it: iteration, owner, session (here the run id)."""


class Recovery:
    """What one rank does about commits that are there, together with the others."""

    def __init__(self, shelf: Shelf, strategy: ShardReplication | None) -> None:
        self.verdict: Verdict | None = None
        """Of the last vote."""
        self.damaged: set[tuple[int, str, int]] = set()
        """Files that were found damaged: the rank that lists them, path, sequence."""
        self.rejected: dict[Commit, str] = {}
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
            verdict = self.verdict = coordinator.settle(
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
        gap = coordinator.settle(
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
                        record = self._run.read_tail(copy.path).record
                        found += outline(self._run.root / copy.path, record, self._run.filesystem)
                    except (CorruptCheckpointError, OSError):
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
                record = self._run.read_tail(copy.path).record
                whole = [range(record.body_bytes)]
                read_verified(self._run.filesystem, path, record.image_record(copy.path), [], whole)
            except (CorruptCheckpointError, OSError) as error:
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

    def bring_home(self, candidate: Candidate, coordinator: Coordinator) -> Candidate:
        """Write again, from a peer's copy, each rank's own shard that is not at its place.

        Return the commit with the copies that it has then.

        Raises:
            CorruptCheckpointError: on every rank: a copy was damaged, vote again.
            StageFailedError: a shard could not be written, or a rank is gone.
        """
        places = self._shelf.topology.places
        wanted = [
            (rank, rank)
            for rank, copies in enumerate(candidate.copies)
            if not any(each.is_whole and places[each.rank] == places[rank] for each in copies)
        ]
        return self._fetch(candidate, wanted, "local restore", coordinator)

    def restore_redundancy(self, candidate: Candidate, coordinator: Coordinator) -> None:
        """Write again every copy that its holder should have and has not.

        Raises:
            CorruptCheckpointError, StageFailedError: as `bring_home`.
        """
        strategy = self._strategy
        if strategy is None or not strategy.sends_images:
            return
        wanted = [
            (holder, owner)
            for owner, holders in enumerate(strategy.holders)
            for holder in holders
            if not any(
                each.is_whole and each.rank == holder and _directory(each.path) == holder
                for each in candidate.copies[owner]
            )
        ]
        self._fetch(candidate, wanted, "local redundancy", coordinator)

    def _fetch(
        self,
        candidate: Candidate,
        wanted: Sequence[tuple[int, int]],
        stage: str,
        coordinator: Coordinator,
    ) -> Candidate:
        """Send shards to ranks that want them: pairs of receiver and owner, the same everywhere."""
        if not wanted or self._strategy is None:
            return candidate
        iteration = candidate.record.iteration
        listed: list[dict[CkptId, Copy]] = [{} for _ in self._shelf.topology.seats]
        for owner, copies in enumerate(candidate.copies):
            for copy in copies:
                if copy.is_whole:
                    listed[copy.rank].setdefault((iteration, owner, self._run.run_id), copy)
        plan = self._strategy.retrieve_plan(
            listed, [(receiver, (iteration, owner, self._run.run_id)) for receiver, owner in wanted]
        )
        rewritten = coordinator.settle(
            stage,
            lambda: self._carry_out(plan, listed, candidate),
            lambda parts: [each for part in parts for each in part],
        )
        problems = [reason for _, _, reason in rewritten if reason is not None]
        sequence = candidate.record.sequence
        self.damaged -= {(rank, path, sequence) for rank, path, reason in rewritten if not reason}
        if problems:
            raise CorruptCheckpointError(str(self._run.root), "; ".join(problems[:3]))
        holdings = [list(each) for each in candidate.copies]
        for entry in plan.entries:
            owner = entry.id_[1]
            path = f"{entry.receiver}/{shard_name(iteration, owner)}"
            holdings[owner].insert(0, Copy(entry.receiver, path, is_whole=True))
        return replace(candidate, copies=tuple(tuple(each) for each in holdings))

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
            return self._run.read_tail(path).record.body_bytes
        except (CorruptCheckpointError, OSError):
            return 0  # damaged since it was listed: what is sent will not be taken


def _directory(path: str) -> int:
    return int(path.partition("/")[0])
