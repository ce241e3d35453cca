"""Compare what several ranks hold under one name, before one of them writes it for all.

Owns what is compared in which save. Everything is compared in the first save of a plan, and each
item in full until its value has changed since then (equal zeros prove nothing), in a few saves at
most where a rotation covers it afterwards; of the others a rotating share of all blocks. In saves
that all ranks agree on, this is done before any byte is staged: each rank sends one digest per set
of holders, and only where these differ are tensors, blocks and elements compared. In saves by the
last plan `audit` does it while they are written. Promises the same verdict on every rank, and that
NaNs are compared as bits. What differs is refused, or set aside as `on_replica_mismatch` says:
saved per rank, or as the lowest rank has it. Values that are per rank by kind are not compared.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from holdfast.format.items import Inventory, structure_of
from holdfast.format.layout import Item
from holdfast.messages import name_first
from holdfast.ranks.coordinator import Coordinator
from holdfast.snapshot.audit import (
    Audit,
    Audited,
    Part,
    Place,
    Report,
    Rules,
    Scratch,
    Share,
    Unlike,
    combine,
    deal,
    find_places,
    find_unlike,
)
from holdfast.snapshot.differences import Difference, ask, find_sides, first_unlike, refuse
from holdfast.snapshot.fingerprints import (
    BlockDigests,
    bytes_between,
    fingerprint,
    host_digests,
)
from holdfast.snapshot.shard import ShardPlan, StagedShard

logger = logging.getLogger(__name__)

Key = tuple[str, tuple[int, ...]]
"""Name and offsets of an item."""

_WHOLE_SAVES = 4
"""So many saves of a plan compare what has not changed in full, where there is a rotation."""


@dataclass(frozen=True)
class _Unequal:
    """Items of one set of holders that are not alike."""

    ranks: tuple[int, ...]
    positions: Sequence[int]
    """Among the items of this set that were compared, in order."""
    refused: Sequence[int]
    """Those of them that cannot be set aside."""


class Replicas:
    """What was compared of one state, and what has been set aside since it differed."""

    def __init__(self, on_mismatch: str, audit_fraction: float = 0.0) -> None:
        """The settings `checkpoint.on_replica_mismatch` and `checkpoint.replicas.audit_fraction`.

        With a fraction of 0 nothing is compared again once it has changed.
        """
        self._on_mismatch = on_mismatch
        self._count = math.ceil(1 / audit_fraction - 1e-9) if audit_fraction else 0
        """Of shares."""
        self._plan = b""
        self._places: Sequence[Place] = ()
        self._shares: Sequence[Share] = ()
        self._first: dict[int, bytes] = {}
        """By place: of items whose value has not changed since they were first compared."""
        self._left: set[int] = set()
        """Places that are compared in full."""
        self._done = 0
        """Comparisons of this plan."""
        self._turn = 0
        """The share that is compared next."""
        self._compared: list[int] = []
        """The iteration at which each share was compared last."""
        self._has_any = False
        """Whether any rank has anything to compare."""
        self._agreed: int | None = None
        """The newest iteration that a later comparison of every block covers."""
        self._on_host: frozenset[int] = frozenset()
        """Sets with holders on different kinds of devices."""
        self._scratch = Scratch()
        self.per_rank: frozenset[str] = frozenset()
        """Names of which every rank is to save its own copy, since copies differed."""
        self._left_out: frozenset[Key] = frozenset()
        """Items that a lower rank has otherwise, and saves."""
        self._last: tuple[Any, Any, Inventory] | None = None

    def restart(self, *, is_loaded: bool = False) -> None:
        """Compare everything again in the next save; `is_loaded`: what was compared is gone."""
        self._plan = b""
        if is_loaded:
            self._agreed = None

    def release(self) -> None:
        """Free the memory for copies."""
        self._scratch.release()

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
        iteration: int,
        coordinator: Coordinator,
    ) -> bool:
        """Compare the copies of what is due in this save; a collective call.

        `is_state_of_rank`: whether a name may differ between ranks rightly, as buffers may: where
        it does, each rank saves its own. Returns whether items were set aside: describe the state
        and plan again.

        Raises:
            ReplicaMismatchError: on every rank: copies differ.
        """
        if coordinator.world_size == 1:
            return False
        parts: list[Part] = []
        digests: list[bytes] = []

        def digest() -> Report:
            self._begin(plan, inventory)
            parts[:] = self._select(inventory)
            found = BlockDigests([(each.source, each.blocks) for each in parts]).result()
            digests[:] = [fingerprint(each) for each in found]
            return Report((self._done, self._turn), combine(parts, found))

        def judge(reports: Sequence[Report]) -> tuple[Unlike, bool] | None:
            if len({each.order for each in reports}) > 1:
                return None
            return find_unlike(reports, plan), any(each.digests for each in reports)

        while (verdict := coordinator.all_reduce("replicas", digest, judge)) is None:
            self.restart()
            self._turn = 0
        unlike, has_any = verdict
        self._has_any |= has_any
        if unlike:
            if self._set_aside(unlike, plan, parts, is_state_of_rank, coordinator):
                return True
            self._on_host |= frozenset(unlike)
        self._note(parts, digests, iteration)
        return False

    def audited(self) -> Audited:
        """Return what the comparison before staging has found, for the commit's record."""
        return Audited(self._record(self._compared))

    def audit(
        self,
        plan: ShardPlan,
        inventory: Inventory,
        shard: StagedShard,
        is_state_of_rank: Callable[[str], bool],
        iteration: int,
    ) -> Audit:
        """Return the comparison that a save by the last plan makes while it is written."""
        self._begin(plan, inventory)
        after = self._compared_after(iteration)
        rules = Rules(
            lambda item: self._can_be_set_aside(item, is_state_of_rank),
            self._agreed,
            iteration,
            (self._done, self._turn),
            self._on_host,
        )

        def note(parts: Sequence[Part], digests: Sequence[bytes]) -> None:
            self._note(parts, digests, iteration)

        parts = self._select(inventory)
        return Audit(parts, shard, self._scratch, self._record(after), rules, note)

    def _begin(self, plan: ShardPlan, inventory: Inventory) -> None:
        if plan.identity == self._plan:
            return
        self._plan, self._done, self._compared = plan.identity, 0, []
        self._has_any = False
        self._places = find_places(plan, inventory.items)
        self._shares = deal(self._places, self._count)
        self._first, self._left = {}, {*range(len(self._places))}
        self._on_host = frozenset()

    def _select(self, inventory: Inventory) -> list[Part]:
        """Return what is to be compared, in an order that all holders of a set have alike."""
        chosen: Share = dict.fromkeys(self._left)
        if self._shares:
            due = self._shares[self._turn]
            chosen.update((index, due[index]) for index in due.keys() - self._left)
        return [
            Part(index, place, inventory.sources[place.position], chosen[index])
            for index, place in ((index, self._places[index]) for index in sorted(chosen))
        ]

    def _note(self, parts: Sequence[Part], digests: Sequence[bytes], iteration: int) -> None:
        """Remember values that were found alike on all ranks."""
        for part, digest in zip(parts, digests, strict=True):
            index = part.at
            if index in self._left and self._first.setdefault(index, digest) != digest:
                del self._first[index]
                self._left.remove(index)
        self._compared = self._compared_after(iteration)
        self._agreed = min(self._compared)
        if self._count and self._done:
            self._turn = (self._turn + 1) % self._count
        self._done += 1
        if self._count and self._done >= _WHOLE_SAVES:
            self._left.clear()
            self._first.clear()

    def _compared_after(self, iteration: int) -> list[int]:
        """Return when each share was compared last, once this iteration is."""
        if not self._compared:
            return [iteration] * max(self._count, 1)
        found = [min(each, iteration) for each in self._compared]  # training may have gone back
        if self._count:
            found[self._turn] = iteration
        return found

    def _record(self, compared: Sequence[int]) -> dict[str, Any] | None:
        return {"compared": [*compared]} if compared and self._has_any else None

    # -- what differs ----------------------------------------------------------------------------

    def _set_aside(
        self,
        unlike: Unlike,
        plan: ShardPlan,
        parts: Sequence[Part],
        is_state_of_rank: Callable[[str], bool],
        coordinator: Coordinator,
    ) -> bool:
        """Set aside what differs, on every rank alike; False: nothing does.

        Raises:
            ReplicaMismatchError: some of it cannot be set aside.
        """
        own: dict[int, list[Part]] = {number: [] for number in unlike}
        for each in parts:
            if each.place.number in own:
                own[each.place.number].append(each)
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

        def find(records: Sequence[dict[int, list[tuple[bytes, bool]]]]) -> dict[int, _Unequal]:
            assert plan.all_holders is not None
            found = {}
            for number in unlike:
                ranks = plan.all_holders.ranks(number)
                if unequal := _differ(ranks, [records[rank].get(number, []) for rank in ranks]):
                    found[number] = unequal
            return found

        found: dict[int, _Unequal] = coordinator.all_reduce("replicas", describe, find)
        for number, unequal in found.items():
            if unequal.refused:
                _refuse(own.get(number, []), number, found, self._agreed, coordinator)
        for number, unequal in found.items():
            if number in own:
                items = [own[number][position].item for position in unequal.positions]
                self._move(items, unequal.ranks, is_state_of_rank, coordinator.rank)
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


def _key(item: Item) -> Key:
    return item.name, item.offsets


def _differ(
    ranks: tuple[int, ...], records: Sequence[Sequence[tuple[bytes, bool]]]
) -> _Unequal | None:
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
    return _Unequal(ranks, [position for position, _ in positions], refused)


def _whole_digest(part: Part) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(host_digests(part.source)))


def _refuse(
    own: Sequence[Part],
    number: int,
    found: Mapping[int, _Unequal],
    agreed: int | None,
    coordinator: Coordinator,
) -> None:
    """Find the first element that differs, together with all ranks, and raise it.

    Raises:
        ReplicaMismatchError: on every rank.
    """
    unequal = found[number]
    position = unequal.refused[0]
    part = own[position] if own else None
    others = sum(len(each.refused) for each in found.values()) - 1

    def digest() -> bytes:
        assert part is not None
        return _whole_digest(part)

    def digest_blocks() -> list[bytes]:
        assert part is not None
        return host_digests(part.source)

    sides = find_sides(ask("replica sides", unequal.ranks, digest, coordinator))
    one, other = sides[0][0], sides[1][0]
    blocks = ask("replica blocks", (one, other), digest_blocks, coordinator)
    block = first_unlike(blocks[one], blocks[other])
    difference = Difference(sides, block, others, agreed)
    if part is None:
        refuse(difference, None, None, coordinator)
    source = part.source
    refuse(
        difference,
        part.item,
        lambda start, end: bytes_between(source, start, end),
        coordinator,
    )


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
