"""The shard files that ranks have found, as commits, and which commit all of them can load.

Owns the grouping of files into commits, the choice of the newest that can be loaded, and the form
in which both are sent: tables of all ranks are packed, for a job has thousands. Promises that equal
facts give the same agreement, newest commit first, naming all that was passed over and why, and
that files of one commit are never mixed with another's, even of the same iteration. Pure: it reads
no file and asks no rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from holdfast.format.tiling import first_untiled
from holdfast.ranks.topology import pack_numbers, unpack_numbers
from holdfast.storage.manifest import LOCAL
from holdfast.tiers.local.shard_file import (
    UNREAD,
    Chunk,
    CommitKey,
    Found,
    ShardRecord,
    shard_name,
)
from holdfast.tiers.select import Commit, Condition
from holdfast.tiers.tier import Objection

_SHOWN = 4


@dataclass(frozen=True)
class Inventory:
    """The files in the directories that one rank lists."""

    found: tuple[Found, ...]
    damaged: frozenset[tuple[int, str, int]] = frozenset()
    """Files that were found damaged when read: the rank that lists them, path, sequence."""
    group_is_broken: bool = False
    """Whether this rank can send no copies over its group any more."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Send each record with its table of nodes in a compact form."""
        bare, tables = [], []
        for each in self.found:
            record = each.record
            tables.append(b"" if record is None else pack_numbers(record.nodes))
            bare.append(each if record is None else replace(each, record=_without_nodes(record)))
        return _restore_inventory, (bare, tables, self.damaged, self.group_is_broken)


def _without_nodes(record: ShardRecord) -> ShardRecord:
    return replace(record, nodes=())


def _restore_inventory(
    bare: Sequence[Found],
    tables: Sequence[bytes],
    damaged: frozenset[tuple[int, str, int]],
    group_is_broken: bool,
) -> Inventory:
    found = tuple(
        each
        if each.record is None
        else replace(each, record=replace(each.record, nodes=unpack_numbers(table)))
        for each, table in zip(bare, tables, strict=True)
    )
    return Inventory(found, damaged, group_is_broken)


@dataclass(frozen=True)
class Copy:
    """One file with a shard, or with what only its rank has of it."""

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
    def commit(self) -> CommitKey:
        """Its place in the order of commits."""
        return self.record.commit

    @property
    def usable(self) -> tuple[tuple[Copy, ...], ...]:
        """By owner: the copies to read from, the whole ones if there are any."""
        return tuple(
            tuple(each for each in copies if each.is_whole) or copies for copies in self.copies
        )

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

    def __reduce__(self) -> tuple[Any, ...]:
        """Send tables of ranks, which are regular and small, in place of one path for each copy."""
        endings: dict[str, int] = {}
        rows = []
        for owner, copies in enumerate(self.copies):
            for each in copies:
                directory, _, name = each.path.partition("/")
                ending = name.removeprefix(shard_name(self.record.iteration, owner))
                number = endings.setdefault(ending, len(endings))
                rows.append((owner, each.rank, int(directory), each.is_whole, number))
        tables = [pack_numbers(column) for column in zip(*rows, strict=True)]
        record, nodes = _without_nodes(self.record), pack_numbers(self.record.nodes)
        return _restore_candidate, (record, nodes, len(self.copies), tables, list(endings))


def _restore_candidate(
    record: ShardRecord, nodes: bytes, owners: int, tables: Sequence[bytes], endings: Sequence[str]
) -> Candidate:
    copies: list[list[Copy]] = [[] for _ in range(owners)]
    for owner, rank, directory, is_whole, ending in zip(*map(unpack_numbers, tables), strict=True):
        path = f"{directory}/{shard_name(record.iteration, owner)}{endings[ending]}"
        copies[owner].append(Copy(rank, path, bool(is_whole)))
    record = replace(record, nodes=unpack_numbers(nodes))
    return Candidate(record, tuple(map(tuple, copies)))


@dataclass(frozen=True)
class Agreement:
    """What all ranks agreed on."""

    candidate: Candidate | None
    """The newest commit that may be loaded; None: there is none."""
    passed: tuple[Commit, ...]
    """Commits and files that were passed over, newest first, with reasons; on rank 0 alone."""
    whole: tuple[CommitKey, ...]
    """Commits with every shard, newest first."""
    newest_sequence: int
    """Over all files found, passed over or not."""
    unread: frozenset[int] = frozenset()
    """Iterations with files that cannot be read at the moment, and may be sound."""
    group_is_broken: bool = False
    """Whether some rank can send no copies over its group any more."""


def judge(
    inventories: Sequence[Inventory],
    objection: Objection,
    rejected: dict[CommitKey, str],
    covered: Collection[CommitKey] = (),
) -> Agreement:
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
    passed.sort(key=lambda each: (each.sequence or 0, each.iteration or 0, each.path), reverse=True)
    unread = {each.iteration for each in passed if each.reason.startswith(UNREAD)}
    return Agreement(
        chosen,
        tuple(passed),
        tuple(whole),
        max(sequences, default=0),
        frozenset(each for each in unread if each is not None),
        any(each.group_is_broken for each in inventories),
    )


def _group(
    inventories: Sequence[Inventory], damaged: frozenset[tuple[int, str, int]]
) -> tuple[list[Candidate], list[Commit]]:
    groups: dict[tuple[object, ...], tuple[ShardRecord, list[list[Copy]]]] = {}
    passed = []
    same: dict[int, tuple[int, ...]] = {}
    """By identity: equal tables are mostly one object, and long to compare."""
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    for rank, inventory in enumerate(inventories):
        for each in inventory.found:
            record = each.record
            if each.too_new is not None:
                sequence = each.too_new.sequence or 0
                passed.append(_pass_file(each, sequence, each.too_new.summary))
            elif record is None:
                passed.append(_pass_file(each, 0, each.reason or "is no shard"))
            elif (rank, each.path, record.sequence) in damaged:
                reason = "was found damaged when it was read"
                passed.append(_pass_file(each, record.sequence, reason))
            else:
                if id(record.nodes) not in same:
                    same[id(record.nodes)] = known.setdefault(record.nodes, record.nodes)
                nodes = id(same[id(record.nodes)])
                common = (record.world_size, nodes, record.plan, record.state_names)
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
) -> Commit:
    record = candidate.record
    name = f"iter_{record.iteration:07d}"
    return Commit(LOCAL, record.iteration, record.sequence, condition, reason, name)


def _pass_file(found: Found, sequence: int, reason: str) -> Commit:
    condition = Condition.DAMAGED if found.too_new is None else Condition.TOO_NEW
    return Commit(
        LOCAL, found.iteration, sequence or None, condition, reason, found.path, found.too_new
    )


def find_gap(chunks: Sequence[Chunk], state_names: int | None) -> str | None:
    """Return what a set of chunks lacks of the whole state; None: nothing.

    `state_names`: how many names the whole state has. None: unknown, so coverage is not provable.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    different: dict[tuple[str, tuple[int, ...], tuple[int, ...]], None] = {}
    for name, size, offsets, lengths in chunks:
        sizes.setdefault(name, size)
        different.setdefault((name, offsets, lengths))
    if state_names is None or len(sizes) < state_names:
        return f"the others hold {len(sizes)} of {state_names} names of the state"
    numbers = {name: number for number, name in enumerate(sizes)}
    dimensions = max((len(size) for size in sizes.values()), default=0)

    def padded(rows: Iterable[tuple[int, ...]], fill: int) -> Any:
        table = [(*row, *([fill] * (dimensions - len(row)))) for row in rows]
        return np.array(table, dtype=np.int64).reshape(len(table), dimensions)

    lacking = first_untiled(
        np.array([numbers[name] for name, _, _ in different], dtype=np.int64),
        padded((offsets for _, offsets, _ in different), 0),
        padded((lengths for _, _, lengths in different), 1),
        padded(sizes.values(), 1),
    )
    return None if lacking is None else f"the others do not hold all of {list(sizes)[lacking]}"
