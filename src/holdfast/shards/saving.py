"""One rank's shard on its way out: agreed, staged, and ready to be written.

Owns what is kept between saves: the plan of who writes what, and the arena laid out for it.
Promises that a plan is used only while every rank's structure is the one it was made for (each says
so with one record of fixed size, every time), and that a replicated tensor is copied and written by
one rank. Ranks talk through the coordinator alone. Knows neither where files go nor when to save.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.coordination import Coordinator
from holdfast.digests import FileRecord
from holdfast.errors import RankFailure, StageFailedError
from holdfast.filesystem import Filesystem
from holdfast.shards.arena import Arena, StreamedShard, image_bytes
from holdfast.shards.items import Inventory
from holdfast.shards.layout import Item, Layout, lay_out
from holdfast.shards.metadata import encode_metadata
from holdfast.shards.planning import Decision, choose, decide, propose, shard_name
from holdfast.shards.records import NO_PLAN, Record, Verdict, judge
from holdfast.shards.staging import Copying
from holdfast.shards.writer import Progress, write_shard

logger = logging.getLogger(__name__)


class _Catalogue:
    """The content of `.metadata`, made when it is first needed and kept."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision
        self._content: bytes | None = None

    def content(self) -> bytes:
        if self._content is None:
            self._content = encode_metadata(self._decision)
        return self._content


@dataclass(frozen=True)
class ShardPlan:
    """Which of its items a rank writes, and where they lie."""

    identity: bytes
    """16 bytes, equal on all ranks."""
    structure: bytes
    """Of this rank's state, which it was made for."""
    layout: Layout
    positions: Sequence[int]
    """For each slot of the layout, the item of the inventory that goes into it."""
    name: str
    structures: Sequence[bytes] | None = None
    """On rank 0: of every rank."""
    catalogue: _Catalogue | None = None
    """On rank 0."""


@dataclass(frozen=True)
class StagedShard:
    """The bytes of one shard file, out of training's reach or about to be."""

    plan: ShardPlan
    image: Arena | StreamedShard
    copying: Copying | None
    """What is still being copied; None: nothing."""
    progress: Progress

    @property
    def is_empty(self) -> bool:
        """Whether this rank has nothing to write."""
        return not self.plan.layout.slots

    def write(
        self, filesystem: Filesystem, directory: Path, bytes_per_second: float | None
    ) -> FileRecord:
        """Write the file into a directory; its durability is the caller's.

        Raises:
            OSError: it cannot be written.
        """
        if self.copying is not None:
            self.copying.wait()
        name = self.plan.name
        return write_shard(
            filesystem, directory / name, name, self.image, self.progress, bytes_per_second
        )

    def metadata(self) -> bytes:
        """Return the content of `.metadata`, on rank 0."""
        assert self.plan.catalogue is not None
        return self.plan.catalogue.content()


class ShardSaver:
    """Settles and stages one shard after another; each overwrites the one before."""

    def __init__(self) -> None:
        self._plan: ShardPlan | None = None
        self._arena: Arena | None = None
        self.progress = Progress()
        """Of the file being written, or of the last one."""

    def settle(
        self, take: Callable[[], tuple[int, Inventory]], coordinator: Coordinator
    ) -> tuple[ShardPlan, Inventory]:
        """Agree with all ranks on the plan for a state; `take` returns its iteration and items.

        Raises:
            CheckpointError: raised by `take` on some rank; on every rank.
            StageFailedError: the ranks save different iterations, or planning failed.
        """
        taken: list[Inventory] = []
        plan = self._plan

        def describe() -> bytes:
            iteration, inventory = take()
            taken.append(inventory)
            fits = plan is not None and plan.structure == inventory.structure
            identity = plan.identity if plan is not None and fits else NO_PLAN
            return Record(iteration, inventory.structure, identity).pack()

        structures = plan.structures if plan is not None else None
        verdict = coordinator.settle(
            "capture", describe, lambda records: _judge(records, structures)
        )
        if plan is None or not verdict.is_current:
            if plan is not None and coordinator.rank == 0:
                logger.info("planning anew: %s", verdict.reason)
            plan = self._plan = self._make_plan(taken[0], coordinator)
        return plan, taken[0]

    def _make_plan(self, inventory: Inventory, coordinator: Coordinator) -> ShardPlan:
        proposals = coordinator.gather("plan", lambda: propose(inventory.items))
        decided: list[Decision] = []

        def deal() -> list[tuple[bytes, bytes]]:
            assert proposals is not None
            decision = decide(proposals)
            decided.append(decision)
            return [(decision.plan, share) for share in decision.shares]

        identity, share = coordinator.scatter("plan", deal)
        layout = lay_out(choose(inventory.items, share))
        places = {_key(item): position for position, item in enumerate(inventory.items)}
        decision = decided[0] if decided else None
        return ShardPlan(
            identity,
            inventory.structure,
            layout,
            [places[_key(slot.item)] for slot in layout.slots],
            shard_name(coordinator.rank),
            decision.structures if decision is not None else None,
            _Catalogue(decision) if decision is not None else None,
        )

    def stage(
        self,
        plan: ShardPlan,
        inventory: Inventory,
        *,
        pinned: bool = False,
        later: frozenset[str] = frozenset(),
    ) -> StagedShard:
        """Copy what this rank writes into its arena, which nobody may be reading any more.

        `later`: names that are copied beside training.

        Raises:
            NotEnoughMemoryError: the arena does not fit what is left.
        """
        arena = self._arena_for(plan.layout, pinned=pinned)
        waits = [slot.item.name in later for slot in plan.layout.slots] if later else None
        copying = arena.stage(self._sources(plan, inventory), waits)
        return StagedShard(plan, arena, copying, self.progress)

    def stream(self, plan: ShardPlan, inventory: Inventory) -> StagedShard:
        """Return the shard as it is to be read from the live tensors, with nothing copied yet."""
        image = StreamedShard(plan.layout, self._sources(plan, inventory))
        return StagedShard(plan, image, None, self.progress)

    def release(self) -> None:
        """Give the arena's memory back; the next save takes it anew."""
        if self._arena is not None:
            self._arena.release()
        self._arena = None

    @staticmethod
    def _sources(plan: ShardPlan, inventory: Inventory) -> list[Any]:
        return [inventory.sources[position] for position in plan.positions]

    def _arena_for(self, layout: Layout, *, pinned: bool) -> Arena:
        arena = self._arena
        if arena is not None and arena.layout is layout:
            return arena
        size_bytes = image_bytes(layout)
        memory = arena.memory if arena is not None else None
        self.release()  # before the next one: both need not fit
        del arena
        if memory is not None and len(memory) // 2 <= size_bytes <= len(memory):
            memory = memory[:size_bytes]
            memory[:] = bytes(size_bytes)
        else:
            memory = None
        self._arena = Arena(layout, memory, pinned=pinned)
        return self._arena


def _judge(records: Sequence[bytes], structures: Sequence[bytes] | None) -> Verdict:
    verdict = judge(records, structures)
    if len(verdict.iterations) > 1:
        spoken = [Record.unpack(each).iteration for each in records]
        raise StageFailedError(
            "capture",
            [
                RankFailure(
                    rank,
                    "Disagreement",
                    f"saves at step {iteration}, rank 0 at step {spoken[0]}",
                )
                for rank, iteration in enumerate(spoken)
                if iteration != spoken[0]
            ],
        )
    return verdict


def _key(item: Item) -> tuple[str, tuple[int, ...]]:
    return item.name, item.offsets
