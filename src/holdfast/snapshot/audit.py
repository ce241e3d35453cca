"""Compare a share of what several ranks hold alike in a save that sends nothing before it writes.

Owns which blocks a save compares (`deal`: blocks of 8 MiB are dealt to as many shares as saves are
to cover everything, largest first, so that shares are about equal in bytes), what this rank keeps
of them when the snapshot is taken, and the comparison itself: one digest for each set of holders,
which travels in an exchange that the save has anyway. What this rank stages is digested on the
writer's thread. What it does not stage is copied or digested before training goes on, on a GPU by
kernels that training does not wait for. Only where digests differ do ranks compare blocks and
elements. Promises that a save with a difference is not committed on any rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import xxhash

from holdfast.errors import SaveGivenUpError
from holdfast.format.holders import ALONE
from holdfast.format.items import Source
from holdfast.format.layout import Item
from holdfast.messages import name_first
from holdfast.ranks.coordinator import Coordinator
from holdfast.snapshot.differences import Difference, Read, find_sides, refuse
from holdfast.snapshot.fingerprints import (
    BlockDigests,
    block_of,
    bytes_between,
    fingerprint,
    host_digests,
)
from holdfast.snapshot.shard import ShardPlan, StagedShard
from holdfast.storage.digests import BLOCK_BYTES

_KEPT_BYTES = 256 << 20
"""So much of what is compared is copied; the rest is digested before training goes on, and its
values cannot be shown later."""

Digests = Sequence[tuple[int, bytes]]
"""A digest for each set of holders."""
Unlike = Mapping[int, tuple[int, ...]]
"""The sets whose holders do not all report the same, each with its ranks."""


class Report(NamedTuple):
    """What a rank reports of one comparison."""

    order: tuple[int, int]
    """Which comparison of its plan this is, and of which share: alike on all ranks, unless some
    missed a verdict, and would compare something else."""
    digests: Digests


class Place(NamedTuple):
    """One item that other ranks hold as well."""

    number: int
    """Of the set of its holders."""
    name: str
    offsets: tuple[int, ...]
    position: int
    """In the inventory."""
    item: Item


class Part(NamedTuple):
    """What is compared of one item in one save."""

    at: int
    """Which of the places."""
    place: Place
    source: Source
    blocks: tuple[int, ...] | None
    """None: the whole item."""

    @property
    def item(self) -> Item:
        """What it is a part of."""
        return self.place.item


Share = dict[int, tuple[int, ...] | None]
"""The blocks of one share, by the index of their place; None: the whole item."""


def find_places(plan: ShardPlan, items: Sequence[Item]) -> list[Place]:
    """Return what can be compared, in an order that all holders of a set have alike."""
    found = [
        Place(number, item.name, item.offsets, position, item)
        for position, (number, item) in enumerate(zip(plan.holders, items, strict=True))
        if number != ALONE and _is_comparable(item)
    ]
    return sorted(found, key=lambda each: each[:3])


def _is_comparable(item: Item) -> bool:
    """Whether equal values have equal bytes: tensors do, and values of an optimizer's state."""
    return not item.per_rank and (item.dtype is not None or item.path[1:2] == ("state",))


def deal(places: Sequence[Place], shares: int) -> list[Share]:
    """Deal the blocks of each set of holders to shares, if any; all holders do it alike."""
    if not shares:
        return []
    by_set: dict[int, list[tuple[int, int, int | None]]] = {}
    for index, place in enumerate(places):
        item = place.item
        own = by_set.setdefault(place.number, [])
        if item.dtype is None or item.capacity_bytes:
            own.append((0, index, None))
            continue
        size_bytes = math.prod(item.lengths) * item.dtype.itemsize
        own += [
            (-min(BLOCK_BYTES, size_bytes - start), index, start // BLOCK_BYTES)
            for start in range(0, size_bytes, BLOCK_BYTES)
        ]
    found: list[dict[int, list[int] | None]] = [{} for _ in range(shares)]
    for number, blocks in by_set.items():
        ordered = sorted(blocks, key=lambda each: (each[0], each[1], each[2] or 0))
        for at, (_, index, block) in enumerate(ordered):
            share = found[(at + number) % shares]
            if block is None:
                share[index] = None
            elif (known := share.setdefault(index, [])) is not None:
                known.append(block)
    return [
        {index: None if own is None else tuple(sorted(own)) for index, own in share.items()}
        for share in found
    ]


def combine(parts: Sequence[Part], digests: Sequence[Sequence[bytes]]) -> Digests:
    """Return one digest for each set of holders."""
    combined: dict[int, Any] = {}
    for part, own in zip(parts, digests, strict=True):
        place = part.place
        if place.number not in combined:
            combined[place.number] = xxhash.xxh3_128()
        described = f"{place.name} {place.offsets} {part.blocks} ".encode()
        combined[place.number].update(described + fingerprint(own))
    return [(number, each.digest()) for number, each in combined.items()]


def find_unlike(reports: Sequence[Report], plan: ShardPlan) -> Unlike:
    """Return, on rank 0, the sets whose holders do not all report the same."""
    assert plan.all_holders is not None
    reported: dict[int, list[bytes]] = {}
    for report in reports:
        for number, digest in report.digests:
            reported.setdefault(number, []).append(digest)
    found = {number: plan.all_holders.ranks(number) for number in sorted(reported)}
    return {
        number: ranks
        for number, ranks in found.items()
        if len(set(reported[number])) > 1 or len(reported[number]) != len(ranks)
    }


class Audited:
    """What was compared before the snapshot was taken, if anything: nothing is left to compare."""

    def __init__(self, record: dict[str, Any] | None = None) -> None:
        self.record = record
        """What the commit's record says of it."""

    def report(self) -> Report | None:
        """Return this rank's digests, once everything is staged; on the writer's thread."""
        return None

    def judge(self, reports: Sequence[Report | None]) -> Unlike:
        """Return, on rank 0, the sets whose holders differ, from the reports of all ranks."""
        return {}

    def conclude(self, unlike: Unlike, coordinator: Coordinator) -> None:
        """Note that all copies are alike, or find out what differs; every rank calls it.

        Raises:
            ReplicaMismatchError: on every rank: copies differ.
            SaveGivenUpError: likewise, and the next save sets them aside.
        """


NOTHING_LEFT = Audited()


@dataclass(frozen=True)
class Rules:
    """What becomes of a difference."""

    can_be_set_aside: Callable[[Item], bool]
    agreed: int | None
    """The last iteration at which all copies agreed."""
    iteration: int
    order: tuple[int, int]
    """Of the report."""
    on_host: frozenset[int]
    """Sets with holders on different kinds of devices."""


class Audit(Audited):
    """The comparison of one save."""

    def __init__(
        self,
        parts: Sequence[Part],
        shard: StagedShard,
        scratch: Scratch,
        record: dict[str, Any] | None,
        rules: Rules,
        note: Callable[[Sequence[Part], Sequence[bytes]], None],
    ) -> None:
        """Keep what training may change: on the training thread.

        `note`: called with the digests of all parts once all ranks have the same.
        """
        super().__init__(record)
        self._parts, self._shard, self._rules, self._note = parts, shard, rules, note
        self._plan = shard.plan
        self._is_settled = False
        self._digests: list[list[bytes]] = [[] for _ in parts]
        self._is_digested = False
        self._staged: dict[int, int] = {}
        """By part: the slot of what this rank stages."""
        self._kept: dict[int, dict[int, memoryview]] = {}
        """By part: copies of blocks."""
        self._now: list[int] = []
        slots = {position: slot for slot, position in enumerate(shard.plan.staged.positions)}
        wanted: list[tuple[Source, Sequence[int] | None]] = []
        scratch.clear()
        for number, part in enumerate(parts):
            source = part.source
            if isinstance(source, bytes):
                continue
            on_device = source.device.type != "cpu"
            if not on_device and part.place.position in slots and shard.arena is not None:
                self._staged[number] = slots[part.place.position]
                continue
            if not on_device and part.blocks is not None:
                kept = scratch.keep(source, part.blocks)
                if kept is not None:
                    self._kept[number] = kept
                    continue
            if on_device and part.place.number in rules.on_host:
                source = source.cpu()
            self._now.append(number)
            wanted.append((source, part.blocks))
        self._live = BlockDigests(wanted)

    def report(self) -> Report | None:
        if self._is_settled:
            return None
        if not self._is_digested:
            self._shard.wait()
            for number, part in enumerate(self._parts):
                if number in self._kept:
                    blocks = self._kept[number].values()
                    self._digests[number] = [xxhash.xxh3_128_digest(each) for each in blocks]
                elif number in self._staged or isinstance(part.source, bytes):
                    self._digests[number] = host_digests(self._content(number), part.blocks)
            for number, own in zip(self._now, self._live.result(), strict=True):
                self._digests[number] = own
            self._is_digested = True
        return Report(self._rules.order, combine(self._parts, self._digests))

    def judge(self, reports: Sequence[Report | None]) -> Unlike:
        found = [each for each in reports if each is not None]
        if len({each.order for each in found}) > 1:
            raise SaveGivenUpError(
                f"the save of iteration {self._rules.iteration} was given up: ranks compare "
                "different parts of their replicas.\nThe next save compares all of them."
            )
        return find_unlike(found, self._plan)

    def conclude(self, unlike: Unlike, coordinator: Coordinator) -> None:
        if self._is_settled:
            return
        if unlike:
            self._find_out(unlike, coordinator)
        self._is_settled = True
        self._note(self._parts, [fingerprint(each) for each in self._digests])
        self._parts, self._digests = (), []  # they refer to live tensors

    def _content(self, number: int) -> Source:
        """Return the copy of a whole item that training does not change."""
        arena, source = self._shard.arena, self._parts[number].source
        if isinstance(source, bytes):
            return source
        assert arena is not None
        return arena.content(self._staged[number])

    def _find_out(self, unlike: Unlike, coordinator: Coordinator) -> None:
        """Find the first block that differs, and raise it.

        Raises:
            ReplicaMismatchError, SaveGivenUpError: on every rank.
        """
        own: dict[int, list[int]] = {}
        for number, part in enumerate(self._parts):
            if part.place.number in unlike:
                own.setdefault(part.place.number, []).append(number)
        rules = self._rules

        def describe() -> dict[int, list[_Described]]:
            return {
                of: [
                    _Described(
                        self._parts[number].item.name,
                        self._digests[number],
                        self._parts[number].blocks,
                        rules.can_be_set_aside(self._parts[number].item),
                    )
                    for number in numbers
                ]
                for of, numbers in own.items()
            }

        def find(
            records: Sequence[dict[int, list[_Described]]],
        ) -> tuple[int, int, Difference] | None:
            found = _differing(unlike, records)
            refused = [each for each in found if not each.can_be_set_aside]
            if found and not refused:
                raise SaveGivenUpError(
                    f"the save of iteration {rules.iteration} was given up: ranks hold different "
                    f"values of {name_first(sorted({each.name for each in found}))}.\n"
                    "The next save sets them aside (checkpoint.on_replica_mismatch)."
                )
            if not refused:
                return None
            first = refused[0]
            difference = Difference(first.sides, first.block, len(refused) - 1, rules.agreed)
            return first.of, first.position, difference

        first = coordinator.all_reduce("replicas", describe, find)
        if first is not None:
            of, position, difference = first
            if of in own:
                number = own[of][position]
                refuse(difference, self._parts[number].item, self._reader(number), coordinator)
            refuse(difference, None, None, coordinator)

    def _reader(self, number: int) -> Read:
        part = self._parts[number]
        kept, digests = self._kept.get(number), self._digests[number]

        def read(start: int, end: int) -> bytes | None:
            if number in self._staged or isinstance(part.source, bytes):
                return bytes_between(self._content(number), start, end)
            block = start // BLOCK_BYTES
            if kept is not None:
                low = block * BLOCK_BYTES
                return bytes(kept[block][start - low : end - low])
            place = block if part.blocks is None else part.blocks.index(block)
            if part.source.device.type != "cpu":
                return None
            now = bytes(block_of(part.source, block))
            if xxhash.xxh3_128_digest(now) != digests[place]:
                return None
            low = block * BLOCK_BYTES
            return now[start - low : end - low]

        return read


@dataclass(frozen=True)
class _Described:
    """What a rank reports of one part of a set whose holders differ."""

    name: str
    digests: Sequence[bytes]
    blocks: tuple[int, ...] | None
    can_be_set_aside: bool


@dataclass(frozen=True)
class _Differing:
    """One part that is not alike."""

    name: str
    of: int
    """The set of its holders."""
    position: int
    """Among the parts of this set."""
    sides: Sequence[Sequence[int]]
    block: int
    can_be_set_aside: bool


def _differing(
    unlike: Unlike, records: Sequence[Mapping[int, Sequence[_Described]]]
) -> list[_Differing]:
    found = []
    for of, ranks in unlike.items():
        columns = zip(*(records[rank].get(of, ()) for rank in ranks), strict=True)
        for position, column in enumerate(columns):
            first = column[0]
            count = max(len(each.digests) for each in column)
            for at in range(count):
                own = {
                    rank: each.digests[at : at + 1] and each.digests[at]
                    for rank, each in zip(ranks, column, strict=True)
                }
                sides = find_sides({rank: bytes(value) for rank, value in own.items()})
                if len(sides) > 1:
                    block = at if first.blocks is None else first.blocks[at]
                    found.append(
                        _Differing(
                            first.name,
                            of,
                            position,
                            sides,
                            block,
                            all(each.can_be_set_aside for each in column),
                        )
                    )
                    break
    return found


class Scratch:
    """Memory for copies of blocks, reused from save to save."""

    def __init__(self, limit_bytes: int = _KEPT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._memory = bytearray()
        self._filled = self._kept = 0

    def clear(self) -> None:
        """Forget the copies of the save before."""
        self._filled = self._kept = 0

    def keep(self, source: torch.Tensor, blocks: Sequence[int]) -> dict[int, memoryview] | None:
        """Copy blocks of a tensor in host memory; None: there is no room for them."""
        found: dict[int, memoryview] = {}
        views = [block_of(source, block) for block in blocks]
        size_bytes = sum(map(len, views))
        if self._kept + size_bytes > self._limit_bytes:
            return None
        self._kept += size_bytes
        if self._filled + size_bytes > len(self._memory):
            # Views of what was there keep it until they are gone.
            self._memory = bytearray(max(size_bytes, 2 * len(self._memory)))
            self._filled = 0
        whole = memoryview(self._memory)
        for block, view in zip(blocks, views, strict=True):
            start, self._filled = self._filled, self._filled + len(view)
            found[block] = whole[start : self._filled]
            found[block][:] = view
        return found

    def release(self) -> None:
        """Free the memory, with the last view of it."""
        self._memory = bytearray()
        self.clear()
