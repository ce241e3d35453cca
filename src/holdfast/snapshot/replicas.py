"""Compare what several ranks hold under one name, before one of them writes it for all.

Owns the comparison: each rank sends one digest per set of holders, and only where these differ are
tensors, blocks and elements compared, down to the first difference. Everything is compared after
each new plan, and each item until its value has changed since it was first compared (equal zeros
prove nothing), in every save that all ranks agree on before it: not in those that send nothing.
Promises that a difference is found before any byte is staged, that it is the same verdict on every
rank, and that NaNs are compared as bits. What differs is refused, or set aside as
`on_replica_mismatch` says: saved per rank, or as the lowest rank has it. Values that are per rank
by kind are not compared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import xxhash

from holdfast.errors import ReplicaMismatchError
from holdfast.format.holders import ALONE
from holdfast.format.items import Inventory, Source, structure_of
from holdfast.format.layout import Item
from holdfast.messages import name_first
from holdfast.ranks.coordinator import Coordinator
from holdfast.snapshot.fingerprints import bytes_between, fingerprints, host_digests
from holdfast.snapshot.shard import ShardPlan
from holdfast.storage.digests import BLOCK_BYTES

logger = logging.getLogger(__name__)

T = TypeVar("T")
Key = tuple[str, tuple[int, ...]]
"""Name and offsets of an item."""

_PAGE_BYTES = 4096
"""Bytes that are compared one by one once digests have found where to look."""


_Record = tuple[list[tuple[int, bytes]], bool]
"""What a rank reports: a digest for each set of holders, and whether nothing will be left."""


class _Held(NamedTuple):
    """One item that other ranks hold as well."""

    number: int
    """Of the set of its holders."""
    item: Item
    source: Source


@dataclass(frozen=True)
class _Difference:
    """Items of one set of holders that are not alike."""

    ranks: tuple[int, ...]
    positions: Sequence[int]
    """Among the items of this set that were compared, in order."""
    refused: Sequence[int]
    """Those of them that cannot be set aside."""


class Replicas:
    """What was compared of one state, and what has been set aside since it differed."""

    def __init__(self, on_mismatch: str) -> None:
        """`on_mismatch`: as `checkpoint.on_replica_mismatch`."""
        self._on_mismatch = on_mismatch
        self._plan = b""
        self._first: dict[Key, bytes] = {}
        """Of items whose value has not changed since they were first compared."""
        self._changed: set[Key] = set()
        self._is_done = True
        """Whether no rank has anything left to compare under this plan."""
        self.per_rank: frozenset[str] = frozenset()
        """Names of which every rank is to save its own copy, since copies differed."""
        self._left_out: frozenset[Key] = frozenset()
        """Items that a lower rank has otherwise, and saves."""
        self._last: tuple[Any, Any, Inventory] | None = None

    def leave_out(self, inventory: Inventory) -> Inventory:
        """Return the items that this rank may save: without those that a lower rank saves."""
        if not self._left_out:
            return inventory
        kept = [_key(item) not in self._left_out for item in inventory.items]
        sources = [each for each, is_kept in zip(inventory.sources, kept, strict=True) if is_kept]
        last = self._last
        if last is not None and last[0] is inventory.items and last[1] is self._left_out:
            return Inventory(last[2].items, sources, last[2].structure)
        items = [each for each, is_kept in zip(inventory.items, kept, strict=True) if is_kept]
        found = Inventory(items, sources, structure_of(items))
        self._last = inventory.items, self._left_out, found
        return found

    def compare(
        self,
        plan: ShardPlan,
        inventory: Inventory,
        is_state_of_rank: Callable[[str], bool],
        coordinator: Coordinator,
    ) -> bool:
        """Compare the copies of all items that are still to be compared; a collective call.

        `is_state_of_rank`: whether a name may differ between ranks rightly, as buffers may: where
        it does, each rank saves its own. Returns whether items were set aside: describe the state
        and plan again.

        Raises:
            ReplicaMismatchError: on every rank: copies differ.
        """
        if coordinator.world_size == 1:
            return False
        if plan.identity != self._plan:
            self._plan = plan.identity
            self._first.clear()
            self._changed.clear()
            self._is_done = False
        if self._is_done:
            return False
        held: list[_Held] = []
        digests: list[bytes] = []

        def digest() -> _Record:
            held.extend(self._select(plan, inventory))
            digests.extend(fingerprints([each.source for each in held]))
            same = (
                self._first.get(_key(each.item), digest) == digest
                for each, digest in zip(held, digests, strict=True)
            )
            return _combine(held, digests), not any(same)

        def judge(records: Sequence[_Record]) -> tuple[list[int], bool]:
            assert plan.all_holders is not None
            unlike = _find_unlike([each for each, _ in records], plan.all_holders.ranks)
            return unlike, all(is_done for _, is_done in records)

        unlike, is_done = coordinator.all_reduce("replicas", digest, judge)
        if unlike and self._set_aside(unlike, plan, held, is_state_of_rank, coordinator):
            return True
        self._note(held, digests)
        self._is_done = is_done
        return False

    def _select(self, plan: ShardPlan, inventory: Inventory) -> list[_Held]:
        """Return what is to be compared, in an order that all holders of a set have alike."""
        held = [
            _Held(number, item, source)
            for number, item, source in zip(
                plan.holders, inventory.items, inventory.sources, strict=True
            )
            if number != ALONE and _key(item) not in self._changed and _is_comparable(item)
        ]
        return sorted(held, key=lambda each: (each.number, *_key(each.item)))

    def _note(self, held: Sequence[_Held], digests: Sequence[bytes]) -> None:
        """Remember values that were found alike on all ranks."""
        for each, digest in zip(held, digests, strict=True):
            key = _key(each.item)
            if self._first.setdefault(key, digest) != digest:
                del self._first[key]
                self._changed.add(key)

    # -- what differs ----------------------------------------------------------------------------

    def _set_aside(
        self,
        unlike: Sequence[int],
        plan: ShardPlan,
        held: Sequence[_Held],
        is_state_of_rank: Callable[[str], bool],
        coordinator: Coordinator,
    ) -> bool:
        """Set aside what differs, on every rank alike; False: nothing does.

        Raises:
            ReplicaMismatchError: some of it cannot be set aside.
        """
        own: dict[int, list[_Held]] = {number: [] for number in unlike}
        for each in held:
            if each.number in own:
                own[each.number].append(each)
        own = {number: items for number, items in own.items() if items}

        def describe() -> dict[int, list[tuple[bytes, bool]]]:
            # Digests of host memory: ranks may have one tensor on different kinds of devices.
            return {
                number: [
                    (_whole_digest(each), self._can_be_set_aside(each.item, is_state_of_rank))
                    for each in items
                ]
                for number, items in own.items()
            }

        def find(records: Sequence[dict[int, list[tuple[bytes, bool]]]]) -> dict[int, _Difference]:
            assert plan.all_holders is not None
            found = {}
            for number in unlike:
                ranks = plan.all_holders.ranks(number)
                if difference := _differ(ranks, [records[rank].get(number, []) for rank in ranks]):
                    found[number] = difference
            return found

        found: dict[int, _Difference] = coordinator.all_reduce("replicas", describe, find)
        for number, difference in found.items():
            if difference.refused:
                _refuse(own.get(number, []), number, found, coordinator)
        for number, difference in found.items():
            if number in own:
                items = [own[number][position].item for position in difference.positions]
                self._move(items, difference.ranks, is_state_of_rank, coordinator.rank)
        return bool(found)

    def _can_be_set_aside(self, item: Item, is_state_of_rank: Callable[[str], bool]) -> bool:
        if self._on_mismatch == "rank0" and not is_state_of_rank(item.name):
            return True
        is_wanted = self._on_mismatch == "per_rank" or is_state_of_rank(item.name)
        return is_wanted and item.lengths == item.size

    def _move(
        self,
        items: Sequence[Item],
        ranks: Sequence[int],
        is_state_of_rank: Callable[[str], bool],
        rank: int,
    ) -> None:
        lowest = min(ranks)
        per_rank = {
            each.name
            for each in items
            if self._on_mismatch == "per_rank" or is_state_of_rank(each.name)
        }
        self.per_rank |= per_rank
        rest = [each for each in items if each.name not in per_rank]
        if rank != lowest:
            self._left_out |= {_key(each) for each in rest}
            return
        if names := sorted({each.name for each in rest}):
            logger.warning(
                "ranks %s hold different values of %s: what rank %d holds is saved "
                "(checkpoint.on_replica_mismatch=rank0)",
                _few(ranks),
                name_first(names),
                lowest,
            )
        if names := sorted(per_rank):
            logger.info("ranks %s hold different values of %s: each saves its own", ranks, names)


def _is_comparable(item: Item) -> bool:
    """Whether equal values have equal bytes: tensors do, and values of an optimizer's state."""
    return not item.per_rank and (item.dtype is not None or item.path[1:2] == ("state",))


def _key(item: Item) -> Key:
    return item.name, item.offsets


def _combine(held: Sequence[_Held], digests: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """Return one digest for each set of holders."""
    combined: dict[int, Any] = {}
    for each, digest in zip(held, digests, strict=True):
        if each.number not in combined:
            combined[each.number] = xxhash.xxh3_128()
        combined[each.number].update(f"{each.item.name} {each.item.offsets} ".encode() + digest)
    return [(number, each.digest()) for number, each in combined.items()]


def _find_unlike(
    records: Sequence[Sequence[tuple[int, bytes]]], ranks_of: Callable[[int], Sequence[int]]
) -> list[int]:
    """Return the sets whose holders do not all report the same."""
    reported: dict[int, list[bytes]] = {}
    for record in records:
        for number, digest in record:
            reported.setdefault(number, []).append(digest)
    return sorted(
        number
        for number, digests in reported.items()
        if len(set(digests)) > 1 or len(digests) != len(ranks_of(number))
    )


def _differ(
    ranks: tuple[int, ...], records: Sequence[Sequence[tuple[bytes, bool]]]
) -> _Difference | None:
    """Return which of the items of one set are not alike; None: all are."""
    columns = zip(*records, strict=True)  # all holders have compared the same items until now
    positions = [
        (position, column[0][1])
        for position, column in enumerate(columns)
        if len({digest for digest, _ in column}) > 1
    ]
    if not positions:
        return None
    refused = [position for position, can_be_set_aside in positions if not can_be_set_aside]
    return _Difference(ranks, [position for position, _ in positions], refused)


def _whole_digest(held: _Held) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(host_digests(held.source)))


# -- the first difference ----------------------------------------------------------------------


def _refuse(
    own: Sequence[_Held],
    number: int,
    found: Mapping[int, _Difference],
    coordinator: Coordinator,
) -> None:
    """Find the first element that differs, together with all ranks, and raise it.

    Raises:
        ReplicaMismatchError: on every rank.
    """
    difference = found[number]
    ranks, position = difference.ranks, difference.refused[0]
    held = own[position] if own else None
    others = sum(len(each.refused) for each in found.values()) - 1

    def ask(stage: str, of: Iterable[int], work: Callable[[_Held], T]) -> Mapping[int, T]:
        """Return what some holders answer."""
        asked = set(of)

        def answer() -> list[T]:
            return [work(held)] if held is not None and coordinator.rank in asked else []

        return coordinator.all_reduce(
            stage,
            answer,
            lambda found: {rank: found[rank][0] for rank in sorted(asked)},
        )

    wholes = ask("replica sides", ranks, _whole_digest)
    sides: dict[bytes, list[int]] = {}
    for rank, digest in wholes.items():
        sides.setdefault(digest, []).append(rank)
    one, other = [side[0] for side in sides.values()][:2]
    pair = (one, other)
    blocks = ask("replica blocks", pair, lambda each: host_digests(each.source))
    block = _first_unlike(blocks[one], blocks[other])
    start = block * BLOCK_BYTES
    pages = ask("replica pages", pair, lambda each: _pages_of(each.source, start))
    start += _first_unlike(pages[one], pages[other]) * _PAGE_BYTES
    described = ask(
        "replica values",
        pair,
        lambda each: (each.item, bytes_between(each.source, start, start + _PAGE_BYTES)),
    )
    item = described[one][0]
    index, values = _first_element(item, start, [described[each][1] for each in pair])
    raise ReplicaMismatchError(
        item.name, [tuple(each) for each in sides.values()], block, index, values, others
    )


def _pages_of(source: Source, start: int) -> list[int]:
    content = bytes_between(source, start, start + BLOCK_BYTES)
    return [
        xxhash.xxh3_64_intdigest(content[at : at + _PAGE_BYTES])
        for at in range(0, len(content), _PAGE_BYTES)
    ]


def _first_unlike(one: Sequence[Any], other: Sequence[Any]) -> int:
    pairs = zip(one, other, strict=False)
    common = min(len(one), len(other))
    return next((at for at, (first, second) in enumerate(pairs) if first != second), common)


def _first_element(
    item: Item, start: int, contents: Sequence[bytes]
) -> tuple[tuple[int, ...] | None, tuple[str, str]]:
    """Return the index of the first element that differs, in the global tensor, and both values.

    The index is None for what is no dense tensor.
    """
    first, second = contents
    if item.dtype is None or item.capacity_bytes:
        at = _first_unlike(first, second)
        return None, (repr(first[at : at + 16]), repr(second[at : at + 16]))
    size = item.dtype.itemsize
    at = _first_unlike(first, second) // size
    place = np.unravel_index(start // size + at, item.lengths)
    index = tuple(int(own) + low for own, low in zip(place, item.offsets, strict=True))
    one, other = (each[at * size : (at + 1) * size] for each in contents)
    shown = _show(one, item.dtype), _show(other, item.dtype)
    if shown[0] == shown[1]:  # two NaNs, say
        shown = f"{shown[0]} (bits {one[::-1].hex()})", f"{shown[1]} (bits {other[::-1].hex()})"
    return index, shown


def _show(content: bytes, dtype: torch.dtype) -> str:
    return str(torch.frombuffer(bytearray(content), dtype=dtype)[0].item())


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
