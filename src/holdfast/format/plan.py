"""Rank 0's side of a plan: which rank writes what, and whether the last plan still applies.

Owns the decision that needs every rank's items: each replicated item is assigned to exactly one of
its holders, balanced by bytes; tied names share one slot where all holders agree on the tie. No
item is lost or written twice, the chunks of each tensor tile it exactly, and the same proposals
give the same decision. What is per rank is written by every rank that has it, of whatever size, and
listed once, as the lowest of these ranks has it. Proposals are read as one table in which equal
ones cost no more than one.
Also owns the verdict on the records that ranks send before each save: a plan is used only while
every rank has the structure it was made for. Refuses ranks that disagree about a name, and reports
which. Pure: no I/O, no communication. A rank's own side is in `items`. `decide` divides the items
of one group of ranks; which groups there are, and the exchange around it, is in `snapshot.shard`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from holdfast.errors import UnsupportedStateError
from holdfast.format.catalogue import Catalogue, Table
from holdfast.format.holders import Holders, find_holders
from holdfast.format.items import PROPOSAL_HEADER, RECORD_MARK
from holdfast.format.layout import SLOT_ALIGNMENT, IntArray, slot_offsets
from holdfast.format.tiling import first_untiled

BoolArray = npt.NDArray[np.bool_]


def shard_name(rank: int) -> str:
    """Return the name of a rank's shard file."""
    return f"__{rank}_0.distcp"


@dataclass(frozen=True, eq=False)
class Decision:
    """Which rank writes what; the same proposals give an equal decision on every rank."""

    shares: list[bytes]
    """By rank: one bit per proposed item, for `choose`."""
    structures: list[bytes]
    """By rank: the structure that its share is for."""
    plan: bytes
    """16 bytes that identify this decision."""
    body_bytes: list[int]
    """By rank: of the slots it writes, index not counted."""
    catalogue: Catalogue
    written: _Written
    holders: Holders
    """Of these ranks, numbered in this order."""


@dataclass(frozen=True, eq=False)
class _Written:
    """One row per item written, sorted by name and offsets; of copies per rank, the first alone."""

    name: IntArray
    """Position in the catalogue."""
    rank: IntArray
    offsets: IntArray
    lengths: IntArray
    file_offset: IntArray
    slot_bytes: IntArray


def decide(proposals: Sequence[bytes], *, is_whole: bool = True) -> Decision:
    """Decide which rank writes which item, from every rank's `propose` result, in rank order.

    `is_whole`: these ranks hold the whole state; if not, chunks need not tile their tensor.

    Raises:
        UnsupportedStateError: ranks disagree about a name, or chunks do not tile their tensor.
    """
    profiles = _profiles_of(proposals)
    catalogue = Catalogue()
    rows, counts = _rows_of(profiles, catalogue)
    rows, leader_group, group = _group(rows)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    _check_replicas(rows, starts[group], profiles, catalogue)
    if is_whole:
        _check_tiling(rows, starts, profiles, catalogue)
    rank = _assign(rows, starts, leader_group, profiles, catalogue)
    # Rows are sorted by group and profile, so that a group's row on a rank can be searched for.
    keys = group * len(profiles.ranks) + rows.profile
    groups = np.arange(len(starts))
    listed = (
        np.searchsorted(keys, groups * len(profiles.ranks) + profiles.of_rank[rank])
        if len(starts)
        else groups
    )
    others, other_ranks = _other_copies(rows, rank[group], profiles)
    chosen = rows.take(np.concatenate((listed, others)))
    rank = np.concatenate((rank, other_ranks))
    base = np.concatenate(([0], np.cumsum(counts[profiles.of_rank]))).astype(np.int64)
    flags = np.zeros(int(base[-1]), dtype=np.bool_)
    flags[base[rank] + chosen.item] = True
    packed = [
        np.packbits(flags[first:last]).tobytes()
        for first, last in zip(base[:-1].tolist(), base[1:].tolist(), strict=True)
    ]
    file_offset, body_bytes = _place(chosen, rank, base, flags)
    count = len(starts)
    plan = xxhash.xxh3_128(b"".join(profiles.structures))
    plan.update(b"".join(packed))
    return Decision(
        shares=packed,
        structures=profiles.structures,
        plan=plan.digest(),
        body_bytes=body_bytes,
        catalogue=catalogue,
        holders=find_holders(rows, starts, profiles.ranks, profiles.of_rank, counts),
        written=_Written(
            chosen.name[:count],
            rank[:count],
            chosen.offsets[:count],
            chosen.lengths[:count],
            file_offset[:count],
            chosen.slot_bytes[:count],
        ),
    )


def holders_of(proposals: Sequence[bytes]) -> Holders:
    """Return the holders of each item, from every rank's `propose` result, in rank order."""
    profiles = _profiles_of(proposals)
    rows, counts = _rows_of(profiles, Catalogue())
    rows, _, group = _group(rows)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return find_holders(rows, starts, profiles.ranks, profiles.of_rank, counts)


@dataclass(eq=False)
class _Profiles:
    """The distinct proposals: ranks with equal proposals share one profile."""

    of_rank: IntArray
    first_rank: IntArray
    """By profile."""
    ranks: list[list[int]]
    """By profile."""
    tables: dict[bytes, list[tuple[int, bytes]]]
    """By table: the profiles that share it, each with its own part."""
    structures: list[bytes]


def _profiles_of(proposals: Sequence[bytes]) -> _Profiles:
    """Group ranks by equal proposals, which are given in rank order."""
    known: dict[tuple[int, bytes], int] = {}
    tables: dict[bytes, tuple[int, list[tuple[int, bytes]]]] = {}
    of_rank: list[int] = []
    ranks: list[list[int]] = []
    structures = []
    for rank, proposal in enumerate(proposals):
        structure, table_bytes, _ = PROPOSAL_HEADER.unpack_from(proposal)
        split = PROPOSAL_HEADER.size + table_bytes
        number, members = tables.setdefault(
            proposal[PROPOSAL_HEADER.size : split], (len(tables), [])
        )
        own = proposal[split:]
        profile = known.setdefault((number, own), len(ranks))
        if profile == len(ranks):
            ranks.append([])
            members.append((profile, own))
        ranks[profile].append(rank)
        of_rank.append(profile)
        structures.append(structure)
    return _Profiles(
        of_rank=np.array(of_rank, dtype=np.int64),
        first_rank=np.array([each[0] for each in ranks], dtype=np.int64),
        ranks=ranks,
        tables={table: members for table, (_, members) in tables.items()},
        structures=structures,
    )


@dataclass(eq=False)
class _Rows:
    """One row per profile and item; all arrays have one length."""

    name: IntArray
    profile: IntArray
    item: IntArray
    offsets: IntArray
    lengths: IntArray
    slot_bytes: IntArray
    leader: IntArray
    """The item of the same profile whose bytes this one shares; -1: none."""
    per_rank: BoolArray

    def take(self, chosen: Any) -> _Rows:
        """Return the rows at these positions, or where a mask is true."""
        return _Rows(**{name: column[chosen] for name, column in vars(self).items()})


def _rows_of(profiles: _Profiles, catalogue: Catalogue) -> tuple[_Rows, IntArray]:
    """Return all rows, and the item count of each profile; adds the names to the catalogue.

    Raises:
        UnsupportedStateError: ranks disagree about a name.
    """
    tables = [(Table(table), members) for table, members in profiles.tables.items()]
    dimensions = max((int(max(table.dimensions, default=0)) for table, _ in tables), default=0)
    counts = np.zeros(len(profiles.ranks), dtype=np.int64)
    parts = []
    for table, members in tables:
        numbers = np.array([profile for profile, _ in members], dtype=np.int64)
        names = catalogue.add(table, profiles.ranks[members[0][0]][0])
        items, repeats = len(names), len(members)
        counts[numbers] = items
        own = np.frombuffer(b"".join(own for _, own in members), dtype=np.int64)
        total = int(table.dimensions.sum())
        own = own.reshape(repeats, 2 * total + 2 * items)
        present = np.arange(dimensions) < table.dimensions[:, None]
        offsets = np.zeros((repeats, items, dimensions), dtype=np.int64)
        lengths = np.ones((repeats, items, dimensions), dtype=np.int64)
        offsets[:, present] = own[:, :total]
        lengths[:, present] = own[:, total : 2 * total]
        parts.append(
            _Rows(
                name=np.tile(names, repeats),
                profile=np.repeat(numbers, items),
                item=np.tile(np.arange(items), repeats),
                offsets=offsets.reshape(repeats * items, dimensions),
                lengths=lengths.reshape(repeats * items, dimensions),
                slot_bytes=own[:, 2 * total : 2 * total + items].reshape(-1),
                leader=own[:, 2 * total + items :].reshape(-1),
                per_rank=np.tile(table.per_rank, repeats),
            )
        )
    if len(parts) == 1:
        return parts[0], counts
    columns = _Rows.__dataclass_fields__
    return (
        _Rows(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in columns}),
        counts,
    )


def _group(rows: _Rows) -> tuple[_Rows, IntArray, IntArray]:
    """Sort rows so that replicas are adjacent, and drop those that must not be written.

    Return them with the group of each row's leader (-1: none) and of each row.
    """
    empty = (rows.lengths == 0).any(axis=1) & ~rows.per_rank
    moving = [column for column in rows.offsets.T if column.any()]
    order = np.lexsort((rows.profile, empty, *moving[::-1], rows.name))
    sorted_ = rows.take(order)
    differs = np.ones(len(order), dtype=np.bool_)
    if len(order):
        differs[1:] = np.diff(sorted_.name) != 0
        for column in moving:
            differs[1:] |= np.diff(column[order]) != 0
    group = np.cumsum(differs) - 1
    # Where the items of each row's profile began before the sort, to find a leader's row.
    first = np.arange(len(order)) - rows.item
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    tied = sorted_.leader >= 0
    leader_group = np.full(len(order), -1, dtype=np.int64)
    leader_group[tied] = group[place[first[order][tied] + sorted_.leader[tied]]]
    # An empty chunk at the same offsets as one with bytes adds nothing, and DCP could not
    # distinguish the two.
    empty = empty[order]
    kept = empty == empty[np.flatnonzero(differs)][group]
    return sorted_.take(kept), leader_group[kept], group[kept]


def _check_replicas(rows: _Rows, twin: IntArray, profiles: _Profiles, catalogue: Catalogue) -> None:
    """Raise unless all replicas of a chunk have the same size."""
    names = list(catalogue.numbers)
    unlike = (rows.lengths != rows.lengths[twin]).any(axis=1) & ~rows.per_rank
    if unlike.any():
        row = int(np.flatnonzero(unlike)[0])
        ranks = profiles.first_rank[rows.profile[[twin[row], row]]].tolist()
        one, other = rows.lengths[[twin[row], row]].tolist()
        raise UnsupportedStateError(
            f"{names[rows.name[row]]}: ranks {ranks[0]} and {ranks[1]} hold chunks of sizes {one} "
            f"and {other} at the same offsets {rows.offsets[row].tolist()}."
        )


def _check_tiling(rows: _Rows, starts: IntArray, profiles: _Profiles, catalogue: Catalogue) -> None:
    """Raise unless the chunks of each tensor tile it."""
    names = list(catalogue.numbers)
    chunks = rows.take(starts)
    sizes = np.ones((len(names), rows.offsets.shape[1]), dtype=np.int64)
    for number, size in enumerate(catalogue.sizes):
        sizes[number, : len(size)] = size
    untiled = first_untiled(chunks.name, chunks.offsets, chunks.lengths, sizes)
    if untiled is None:
        return
    mine = chunks.name == untiled
    ranks = np.unique(profiles.first_rank[chunks.profile[mine]]).tolist()
    volume = chunks.lengths[mine].prod(axis=1).sum()
    raise UnsupportedStateError(
        f"{names[untiled]}: the {mine.sum()} chunks of ranks {_few(ranks)} hold {volume} elements "
        f"and do not tile its {sizes[untiled].prod()} (size {list(catalogue.sizes[untiled])}): "
        "they overlap, leave gaps, or reach beyond it."
    )


def _assign(
    rows: _Rows,
    starts: IntArray,
    leader_group: IntArray,
    profiles: _Profiles,
    catalogue: Catalogue,
) -> IntArray:
    """Return the rank that writes each group: largest first, to the least loaded holder."""
    if not len(starts):
        return np.zeros(0, dtype=np.int64)
    ends = np.append(starts[1:], len(rows.name))
    multiplicity = np.array([len(ranks) for ranks in profiles.ranks], dtype=np.int64)
    holders = np.add.reduceat(multiplicity[rows.profile], starts)
    weight = -(-rows.slot_bytes[starts] // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    # A tie is kept where every holder of a name ties it to the same other name, and no further
    # rank holds that one.
    low = np.minimum.reduceat(leader_group, starts)
    leader = np.where(low == np.maximum.reduceat(leader_group, starts), low, -2)
    tied = leader >= 0
    guess = np.where(tied, leader, 0)
    tied &= (ends - starts == (ends - starts)[guess]) & (leader[guess] == -1)
    own = rows.per_rank[starts]
    tied &= ~own

    rank = profiles.first_rank[rows.profile[starts]]
    is_value = np.array([dtype is None for dtype in catalogue.dtypes])[rows.name[starts]]
    fixed = ~tied & ((holders == 1) | is_value | own)
    sums = np.zeros(len(profiles.of_rank), dtype=np.int64)
    np.add.at(sums, rank[fixed], weight[fixed])
    others, other_ranks = _other_copies(rows, np.repeat(rank, ends - starts), profiles)
    np.add.at(sums, other_ranks, rows.slot_bytes[others])
    free = np.flatnonzero(~tied & ~fixed)
    free = free[np.argsort(-weight[free], kind="stable")]
    loads: list[int] = sums.tolist()
    queues: dict[bytes, list[tuple[int, int]]] = {}
    for group, start, end, size in zip(
        free.tolist(),
        starts[free].tolist(),
        ends[free].tolist(),
        weight[free].tolist(),
        strict=True,
    ):
        members = rows.profile[start:end]
        key = members.tobytes()
        if (queue := queues.get(key)) is None:
            ranks = chain.from_iterable(profiles.ranks[profile] for profile in members.tolist())
            queue = queues[key] = [(loads[each], each) for each in ranks]
            heapq.heapify(queue)
        # Loads only grow, also through other queues: reinsert stale entries with their new load.
        while queue[0][0] != loads[queue[0][1]]:
            heapq.heapreplace(queue, (loads[queue[0][1]], queue[0][1]))
        chosen = queue[0][1]
        rank[group] = chosen
        loads[chosen] += size
        heapq.heapreplace(queue, (loads[chosen], chosen))
    rank[tied] = rank[leader[tied]]
    return rank


def _other_copies(
    rows: _Rows, first_rank: IntArray, profiles: _Profiles
) -> tuple[IntArray, IntArray]:
    """Return row and rank of each copy per rank but the first, whose rank is given by row."""
    own = np.flatnonzero(rows.per_rank)
    ranks = [profiles.ranks[profile] for profile in rows.profile[own].tolist()]
    copies = np.repeat(own, [len(each) for each in ranks])
    held = np.array([*chain.from_iterable(ranks)], dtype=np.int64)
    others = held != first_rank[copies]
    return copies[others], held[others]


def _place(
    chosen: _Rows, rank: IntArray, base: IntArray, flags: BoolArray
) -> tuple[IntArray, list[int]]:
    """Return each chosen row's offset in its rank's file, as in `lay_out`, and bytes per rank."""
    ranks = len(base) - 1
    key = base[rank] + chosen.item
    order = np.argsort(key)
    key, rank = key[order], rank[order]
    leader = chosen.leader[order]
    leader_key = base[rank] + leader
    shares_bytes = (leader >= 0) & flags[np.where(leader >= 0, leader_key, 0)]
    sizes = np.where(shares_bytes, 0, chosen.slot_bytes[order])
    running = slot_offsets(sizes)
    total = int(running[-1] + slot_offsets(np.append(sizes[-1:], 0))[-1]) if len(sizes) else 0
    # Where each rank's first row starts in the running offset over all ranks.
    first = np.append(running, total)[np.searchsorted(rank, np.arange(ranks + 1))]
    offset = running - first[rank]
    offset[shares_bytes] = offset[np.searchsorted(key, leader_key[shares_bytes])]
    file_offset = np.empty_like(offset)
    file_offset[order] = offset
    return file_offset, np.diff(first).tolist()


_RECORDS = np.dtype([("mark", "S8"), ("structure", "<u8", 2), ("plan", "<u8", 2)])
"""As `pack_record` packs them."""
_SHOWN = 3
"""Ranks that a message names."""


def judge(records: Sequence[bytes], structures: Sequence[bytes] | None = None) -> str | None:
    """Return why ranks must plan, from every rank's record in rank order; None: all have one plan.

    If plans merely differ, the ranks named are those that differ from rank 0. `structures`, of the
    decision: also detects a rank that claims its plan for another structure.

    Raises:
        ValueError: a record is invalid.
    """
    content = b"".join(records)
    if not records or any(len(record) != _RECORDS.itemsize for record in records):
        raise ValueError(f"not every one of {len(records)} records has {_RECORDS.itemsize} bytes")
    table = np.frombuffer(content, dtype=_RECORDS)
    if (table["mark"] != RECORD_MARK).any():
        raise ValueError("not every record is of this version of holdfast")
    stale = (table["plan"] == 0).all(axis=1)
    if structures is not None:
        if len(structures) != len(records):
            return f"{len(records)} ranks, where the plan is for {len(structures)}"
        planned = np.frombuffer(b"".join(structures), dtype="<u8").reshape(-1, 2)
        stale |= (table["structure"] != planned).any(axis=1)
    if not stale.any():
        stale = (table["plan"] != table["plan"][0]).any(axis=1)
    changed = np.flatnonzero(stale).tolist()
    return f"no plan for the present state of ranks {_few(changed)}" if changed else None


def _few(ranks: Sequence[int]) -> str:
    """List the first few ranks, with an ellipsis if there are more."""
    return ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
