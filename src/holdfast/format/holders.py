"""Which ranks hold a copy of each item of a plan.

Owns the sets of ranks that hold one item alike, numbered for the whole job: a rank is told the
number of the set of each of its items, and rank 0 knows the members. Items per rank have no other
holders. Pure; the rows come from `plan`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from holdfast.format.layout import IntArray

ALONE = 0
"""The number of an item that no other rank holds."""


@dataclass(frozen=True)
class Holders:
    """The sets of holders of all items."""

    sets: Sequence[tuple[int, ...]]
    """The ranks of each set, in ascending order; the first one has the number 1."""
    by_rank: Sequence[bytes]
    """The number of the set of each item of a rank, for `unpack`."""

    def ranks(self, number: int) -> tuple[int, ...]:
        """Return the members of a set."""
        return self.sets[number - 1]


def unpack(numbers: bytes) -> list[int]:
    """Return the number of the set of each item of one rank."""
    found: list[int] = np.frombuffer(zlib.decompress(numbers), dtype="<u4").tolist()
    return found


def find_holders(
    rows: Any, starts: IntArray, ranks: Sequence[Sequence[int]], of_rank: IntArray, counts: IntArray
) -> Holders:
    """Return the holders of each item.

    `rows`: one per profile and item, sorted by item and profile; `starts`: the first row of each
    item. `ranks`, `counts`: of each profile, the ranks and the number of items. `of_rank`: the
    profile of each rank.
    """
    ends = np.append(starts, len(rows.profile))[1:]
    known: dict[bytes, int] = {}
    sets: list[tuple[int, ...]] = []
    of_item: list[int] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        members = rows.profile[start:end]
        key = members.tobytes()
        if (number := known.get(key)) is None:
            holders = sorted(chain.from_iterable(ranks[each] for each in members.tolist()))
            if len(holders) > 1:
                sets.append(tuple(holders))
            number = known[key] = len(sets) if len(holders) > 1 else ALONE
        of_item.append(number)
    numbers = np.repeat(np.array(of_item, dtype=np.int64), ends - starts)
    numbers[rows.per_rank] = ALONE
    base = np.concatenate(([0], np.cumsum(counts)))
    flat = np.zeros(int(base[-1]), dtype="<u4")
    flat[base[rows.profile] + rows.item] = numbers
    packed = [
        zlib.compress(flat[first:last].tobytes(), 1)
        for first, last in zip(base[:-1].tolist(), base[1:].tolist(), strict=True)
    ]
    return Holders(sets, [packed[each] for each in of_rank.tolist()])
