"""Decide which local commit all ranks can load, from the files each rank lists.

Owns the grouping of shard files into commits and the decision which of them is complete. Promises
one verdict for all ranks, newest commit first, naming everything it passed over and why; files of
one commit are never mixed with another's, even of the same iteration. A commit that lacks shards is
returned as a candidate whose remaining shards may cover the state: the caller, which can read the
files, decides. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from holdfast.errors import FormatTooNewError
from holdfast.tiers.local.shard_file import Found, ShardRecord
from holdfast.tiers.select import Condition
from holdfast.tiers.tier import Objection

Commit = tuple[int, int, int]
"""Sequence, attempt, iteration; larger is newer."""
_SHOWN = 4


@dataclass(frozen=True)
class Inventory:
    """The files in the directories that one rank lists."""

    found: tuple[Found, ...]
    damaged: frozenset[tuple[int, str, int]] = frozenset()
    """Files that were found damaged when read: the rank that lists them, path, sequence."""


@dataclass(frozen=True)
class Copy:
    """One file with a shard, or with its small states alone."""

    rank: int
    """The rank that lists it; every rank at its place can read it."""
    path: str
    """Relative to the run's directory."""
    is_whole: bool


@dataclass(frozen=True)
class Candidate:
    """One commit, and where its shards are."""

    record: ShardRecord
    """Of any one of its files: use only the fields that all files of a commit share."""
    copies: tuple[tuple[Copy, ...], ...]
    """By owner."""

    @property
    def commit(self) -> Commit:
        """Its place in the order of commits."""
        return self.record.commit

    @property
    def lost(self) -> tuple[int, ...]:
        """Ranks whose shard has no copy left."""
        return tuple(
            owner
            for owner, copies in enumerate(self.copies)
            if not any(each.is_whole for each in copies)
        )

    @property
    def without_files(self) -> tuple[int, ...]:
        """Ranks with no surviving file."""
        return tuple(owner for owner, copies in enumerate(self.copies) if not copies)


@dataclass(frozen=True)
class Passed:
    """A commit or a file that was passed over."""

    path: str
    iteration: int
    sequence: int
    reason: str
    condition: Condition = Condition.DAMAGED
    too_new: FormatTooNewError | None = None
    """Set where a later version of holdfast wrote it."""


@dataclass(frozen=True)
class Verdict:
    """The decision that all ranks receive."""

    candidate: Candidate | None
    """The newest commit that may be loaded; None: there is none."""
    passed: tuple[Passed, ...]
    whole: tuple[Commit, ...]
    """Commits with every shard, newest first."""
    newest_sequence: int
    """Over all files found, passed over or not."""


def judge(
    inventories: Sequence[Inventory],
    objection: Objection,
    rejected: dict[Commit, str],
    covered: Collection[Commit] = (),
) -> Verdict:
    """Choose the newest commit that is complete or whose remaining shards may cover the state.

    `rejected`: commits found unloadable earlier, with reasons. `covered`: commits known to be
    loadable without the shards they lack.
    """
    damaged = frozenset().union(*(each.damaged for each in inventories))
    candidates, passed = _group(inventories, damaged)
    chosen = None
    whole = []
    for candidate in candidates:
        reason = objection(candidate.record)
        if reason is not None:
            passed.append(_pass_over(candidate, reason, Condition.SUPERSEDED))
            continue
        reason = rejected.get(candidate.commit)
        if reason is None and candidate.commit not in covered:
            reason = _why_unloadable(candidate)
        if reason is not None:
            passed.append(_pass_over(candidate, reason))
            continue
        if not candidate.lost:
            whole.append(candidate.commit)
        chosen = chosen or candidate
    found = [each for part in inventories for each in part.found]
    sequences = [each.record.sequence for each in found if each.record]
    sequences += [each.too_new.sequence or 0 for each in found if each.too_new]
    passed.sort(key=lambda each: (each.sequence, each.iteration, each.path), reverse=True)
    return Verdict(chosen, tuple(passed), tuple(whole), max(sequences, default=0))


def _group(
    inventories: Sequence[Inventory], damaged: frozenset[tuple[int, str, int]]
) -> tuple[list[Candidate], list[Passed]]:
    groups: dict[tuple[object, ...], tuple[ShardRecord, list[list[Copy]]]] = {}
    passed = []
    for rank, inventory in enumerate(inventories):
        for each in inventory.found:
            record = each.record
            if each.too_new is not None:
                sequence = each.too_new.sequence or 0
                passed.append(
                    Passed(
                        each.path,
                        each.iteration,
                        sequence,
                        each.too_new.summary,
                        Condition.TOO_NEW,
                        each.too_new,
                    )
                )
            elif record is None:
                passed.append(Passed(each.path, each.iteration, 0, each.reason or "is no shard"))
            elif (rank, each.path, record.sequence) in damaged:
                reason = "was found damaged when it was read"
                passed.append(Passed(each.path, each.iteration, record.sequence, reason))
            else:
                common = (record.world_size, record.nodes, record.plan, record.state_names)
                _, copies = groups.setdefault(
                    (record.commit, *common), (record, [[] for _ in range(record.world_size)])
                )
                copies[record.owner].append(Copy(rank, each.path, record.is_whole))
    candidates = [
        Candidate(record, tuple(tuple(each) for each in copies))
        for record, copies in groups.values()
    ]
    return sorted(candidates, key=lambda each: each.commit, reverse=True), passed


def _why_unloadable(candidate: Candidate) -> str | None:
    """Return why a commit cannot be loaded; None: no known reason."""
    if without_files := candidate.without_files:
        return f"nothing is left of {_ranks(without_files, candidate)}"
    lost = candidate.lost
    if not lost:
        return None
    if len(lost) == len(candidate.copies):
        return "no shard is left of it"
    if candidate.record.state_names is None:
        return f"no shard is left of {_ranks(lost, candidate)}"
    return None  # the remaining shards may cover the state


def lacks_cover(candidate: Candidate, gap: str) -> str:
    """Return the message that the remaining shards do not cover the state."""
    return f"no shard is left of {_ranks(candidate.lost, candidate)}, and {gap}"


def _ranks(ranks: Sequence[int], candidate: Candidate) -> str:
    shown = ", ".join(str(each) for each in ranks[:_SHOWN])
    more = ", ..." if len(ranks) > _SHOWN else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more} of {len(candidate.copies)}"


def _pass_over(
    candidate: Candidate, reason: str, condition: Condition = Condition.DAMAGED
) -> Passed:
    record = candidate.record
    name = f"iter_{record.iteration:07d}"
    return Passed(name, record.iteration, record.sequence, reason, condition)
