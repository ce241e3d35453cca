"""Plan, stage and write one rank's shard.

Owns what is kept between saves (the plan of which rank writes what, and the arena laid out for it),
the groups of ranks among which items are divided (`_make_plan`: all ranks, or with a local tier
each node, and then all again for the persistent files), and the pass that writes a shard file:
stretches of 8 MiB blocks, bypassing the page cache where the file system supports it, each block
digested while others are written, the footer last. Promises that a plan is used only while every
rank's structure is the one it was made for, that a replicated tensor is copied and written by one
rank, that digests are of the bytes in memory and not of what a disk returns, and that the bytes are
durable when `write` returns. Ranks communicate only through the coordinator. Knows neither where
files go nor when to save.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import xxhash

from holdfast.format.dcp import encode_metadata
from holdfast.format.holders import Holders, unpack
from holdfast.format.items import NO_PLAN, Inventory, Source, choose, pack_record, propose
from holdfast.format.layout import Item, Layout, lay_out
from holdfast.format.plan import Decision, decide, holders_of, judge, shard_name
from holdfast.format.values import is_component
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.job import Progress
from holdfast.snapshot.arena import Arena, StreamedShard, allocate, image_bytes
from holdfast.snapshot.copies import digest_copies
from holdfast.snapshot.copy import Copying, mark_streams
from holdfast.storage.backend import Append, Storage
from holdfast.storage.digests import (
    BLOCK_BYTES,
    FileRecord,
    describe_body,
    footer_size,
    make_footer,
)
from holdfast.storage.manifest import COMPONENTS, PER_RANK

_DIGESTERS = 2
"""Threads that digest an image in memory: one thread reaches half of the memory's read speed."""


class Image(Protocol):
    """The body of a shard file, produced piece by piece and in order."""

    @property
    def body_bytes(self) -> int:
        """A multiple of 4096."""
        ...

    @property
    def keeps_stretches(self) -> bool:
        """Whether stretches stay valid; if not, each does until two more are requested."""
        ...

    def stretches(self) -> Iterator[memoryview]:
        """Yield the body in page-aligned stretches of whole 8 MiB blocks.

        The last block may be shorter.
        """
        ...


def write_shard(
    writing: AbstractContextManager[Append],
    name: str,
    image: Image,
    progress: Progress | None = None,
    bytes_per_second: float | None = None,
) -> FileRecord:
    """Write a new file, body and footer, and return its record under a relative name.

    `writing`: opens the file, which must be new, and gives the function that appends to it.
    `bytes_per_second`: the highest average rate over the whole file. None: no limit.

    Raises:
        OSError: it cannot be written.
    """
    progress = progress or Progress()
    progress.begin(image.body_bytes + footer_size(image.body_bytes))
    digests: list[Future[bytes]] = []
    with (
        ThreadPoolExecutor(1, thread_name_prefix="holdfast-digest") as digesting,
        ThreadPoolExecutor(1, thread_name_prefix="holdfast-stretch") as preparing,
        writing as append,
    ):
        # Preparing the next stretch, digesting this one and writing it all release the GIL and run
        # concurrently.
        stretches = image.stretches()
        stretch = next(stretches, None)
        while stretch is not None:
            blocks = _cut(stretch, BLOCK_BYTES)
            digests += [digesting.submit(xxhash.xxh3_128_digest, each) for each in blocks]
            following = preparing.submit(next, stretches, None)
            for part in [stretch] if bytes_per_second is None else blocks:
                _keep_pace(progress, bytes_per_second)
                append(part)
                progress.written_bytes += len(part)
            if not image.keeps_stretches:
                wait(digests[-len(blocks) :])
            stretch = following.result()
        results = [each.result() for each in digests]
        footer = allocate(footer_size(image.body_bytes))
        footer[:] = make_footer(image.body_bytes, results)
        _keep_pace(progress, bytes_per_second)
        append(footer)
        progress.written_bytes += len(footer)
    return describe_body(name, image.body_bytes, results)


def seal_image(memory: memoryview, body_bytes: int, name: str) -> FileRecord:
    """Append the footer to a body in memory, and return the record of the resulting file."""
    with ThreadPoolExecutor(_DIGESTERS, thread_name_prefix="holdfast-digester") as pool:
        blocks = _cut(memory[:body_bytes], BLOCK_BYTES)
        digests = list(pool.map(xxhash.xxh3_128_digest, blocks))
    memory[body_bytes : body_bytes + footer_size(body_bytes)] = make_footer(body_bytes, digests)
    return describe_body(name, body_bytes, digests)


def _cut(memory: memoryview, size_bytes: int) -> list[memoryview]:
    """Cut memory into pieces of one size; the last may be shorter."""
    return [memory[start : start + size_bytes] for start in range(0, len(memory), size_bytes)]


def _keep_pace(
    progress: Progress,
    bytes_per_second: float | None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the rate allows the bytes written so far."""
    if bytes_per_second is None:
        return
    early = progress.written_bytes / bytes_per_second - (time.monotonic() - progress.started)
    if early > 0:
        pause(early)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """The items that a rank writes into one file, and their layout there."""

    layout: Layout
    positions: Sequence[int]
    """For each slot of the layout, the position of its item in the inventory."""


@dataclass(frozen=True)
class ShardPlan:
    """Which rank stages and writes what: this rank's part of the plan."""

    identity: bytes
    """16 bytes, equal on all ranks."""
    structure: bytes
    """Of this rank's state, for which the plan was made."""
    staged: Share
    """What this rank copies: replicas are divided among the ranks of a node, or of the job."""
    written: Share
    """The part of `staged` in this rank's file, where all ranks' files together hold the whole
    state; the same object where nothing else is to be divided."""
    name: str
    """Of that file."""
    state_names: int
    """Number of distinct names in the whole state."""
    structures: Sequence[bytes] | None = None
    """On rank 0: of every rank."""
    decision: Decision | None = None
    """On rank 0: of the whole state."""
    holders: Sequence[int] = ()
    """By position in the inventory: the number of the set of ranks that hold the item; 0: none but
    this rank."""
    all_holders: Holders | None = None
    """On rank 0: the members of these sets."""

    def features(self, *, has_copies: bool) -> tuple[str, ...]:
        """Return what a reader of the checkpoint must know, on rank 0."""
        assert self.decision is not None
        has_components = any(map(is_component, self.decision.catalogue.numbers))
        return (*((PER_RANK,) if has_copies else ()), *((COMPONENTS,) if has_components else ()))

    @cached_property  # asked for by the first save of a plan, off the training thread
    def metadata(self) -> bytes:
        """The content of `.metadata`, on rank 0."""
        assert self.decision is not None
        return encode_metadata(self.decision)


@dataclass(frozen=True)
class StagedShard:
    """The bytes of one shard file, copied or still to be copied from the live tensors."""

    plan: ShardPlan
    image: Arena | StreamedShard
    """Of the file that this rank writes."""
    arena: Arena | None
    """All that it staged; None: nothing is staged, the live tensors are read."""
    copying: Copying | None
    """The pending copy; None: nothing is to be copied."""
    progress: Progress

    @property
    def is_empty(self) -> bool:
        """Whether this rank has nothing to write."""
        return not self.plan.written.layout.slots

    def wait(self) -> None:
        """Wait for the pending copy; raise its error."""
        if self.copying is not None:
            self.copying.wait()

    def digest_copies(self) -> dict[str, str]:
        """Return digests of what is per rank, once everything is staged; see `snapshot.copies`."""
        return digest_copies(self.plan.written.layout, self.image.content)

    def write(self, files: Storage, bytes_per_second: float | None) -> FileRecord:
        """Write the file into the storage of a pending checkpoint while it is being staged.

        Raises:
            OSError: it cannot be written.
        """
        if self.image is not self.arena:
            self.wait()
        name = self.plan.name
        writing = files.put_from(name)
        return write_shard(writing, name, self.image, self.progress, bytes_per_second)


class PlanChangedError(Exception):
    """The state has another structure than the last plan was made for."""


class ShardSaver:
    """Plans and stages one shard after another; each overwrites the previous one."""

    def __init__(self) -> None:
        self._plan: ShardPlan | None = None
        self._arena: Arena | None = None
        self.progress = Progress()
        """Of the file being written, or of the last one written."""

    def agree_on_plan(
        self,
        take: Callable[[], Inventory],
        coordinator: Coordinator,
        nodes: Sequence[int] | None = None,
        agree: Callable[[], Inventory | None] = lambda: None,
        *,
        plans: bool = True,
    ) -> tuple[ShardPlan, Inventory]:
        """Agree with all ranks on the plan for a state; `take` returns its items.

        `nodes`: the node of each rank, if each node is to stage the whole state. None: the job
        stages it once. `agree`: agrees on what items take from other ranks, before they are planned
        anew, and returns them if that has changed them. `plans`: whether to plan again where the
        last plan does not apply.

        Raises:
            PlanChangedError: it does not, and `plans` is off.
            CheckpointError: on every rank, if `take` raised it on any.
            StageFailedError: planning failed.
        """
        taken: list[Inventory] = []
        plan = self._plan

        def describe() -> bytes:
            inventory = take()
            taken.append(inventory)
            fits = plan is not None and plan.structure == inventory.structure
            identity = plan.identity if plan is not None and fits else NO_PLAN
            return pack_record(inventory.structure, identity)

        structures = plan.structures if plan is not None and plans else None
        reason = coordinator.all_reduce(
            "capture", describe, lambda records: judge(records, structures)
        )
        if plan is None or reason is not None:
            if not plans:
                raise PlanChangedError(
                    "no plan for its present state: names, shapes or types of it have changed"
                )
            if plan is not None and coordinator.rank == 0:
                logger.info("planning again: %s", reason)
            inventory = agree() or taken[0]
            plan = self._plan = _make_plan(inventory, coordinator, nodes)
            return plan, inventory
        return plan, taken[0]

    def stage(
        self,
        plan: ShardPlan,
        inventory: Inventory,
        *,
        arena: Arena | None = None,
        pinned: bool = False,
        later: frozenset[str] | None = None,
    ) -> StagedShard:
        """Stage this rank's part into an arena, which must no longer be read by a previous save.

        The returned shard's `copying` is still pending. `arena`: laid out for `plan.staged`. None:
        the saver's own. `later`: names left to `copying`. None: all tensors.

        Raises:
            NotEnoughMemoryError: the saver's own does not fit into the remaining memory.
        """
        staged = plan.staged
        if arena is None:
            arena = self._arena_for(staged.layout, pinned=pinned)
        names = [slot.item.name for slot in staged.layout.slots]
        deferred = None if later is None else [name in later for name in names]
        copying = arena.stage(_sources(staged, inventory), deferred)
        image: Arena | StreamedShard = arena
        if plan.written is not staged:
            places = {position: slot for slot, position in enumerate(staged.positions)}
            chosen = [arena.content(places[position]) for position in plan.written.positions]
            image = StreamedShard(plan.written.layout, chosen)
        return StagedShard(plan, image, arena, copying, self.progress)

    def stream(self, plan: ShardPlan, inventory: Inventory) -> StagedShard:
        """Return a shard that is read from the live tensors when it is written, without a copy."""
        sources = _sources(plan.written, inventory)
        computed = [event for events in mark_streams(sources).values() for event in events]
        image = StreamedShard(plan.written.layout, sources, computed)
        return StagedShard(plan, image, None, None, self.progress)

    def release(self) -> None:
        """Free the arena's memory; the next save allocates it again."""
        if self._arena is not None:
            self._arena.release()
        self._arena = None

    def _arena_for(self, layout: Layout, *, pinned: bool) -> Arena:
        arena = self._arena
        if arena is not None and arena.layout is layout:
            return arena
        size_bytes = image_bytes(layout)
        memory = arena.memory if arena is not None else None
        self.release()  # before the next one is allocated: both together may not fit
        del arena
        if memory is not None and len(memory) // 2 <= size_bytes <= len(memory):
            memory = memory[:size_bytes]
            torch.frombuffer(memory, dtype=torch.uint8).zero_()
        else:
            memory = None
        self._arena = Arena(layout, memory, pinned=pinned)
        return self._arena


def _make_plan(
    inventory: Inventory, coordinator: Coordinator, nodes: Sequence[int] | None
) -> ShardPlan:
    items = inventory.items
    world = [[*range(coordinator.world_size)]]
    groups = world if nodes is None else _ranks_of_nodes(nodes)
    division = first = _divide(items, coordinator, groups)
    staged = written = _share(items, choose(items, division.share))
    identity, structures = division.identity, division.structures
    if len(groups) > 1:
        # Of what several nodes have staged, one node writes each item, from its staged copy.
        staged_items = choose(items, division.share)
        division = _divide(staged_items, coordinator, world)
        written_items = choose(staged_items, division.share)
        if written_items != staged_items:
            written = _share(items, written_items)
        identity = xxhash.xxh3_128_digest(identity + division.identity)
    return ShardPlan(
        identity,
        inventory.structure,
        staged,
        written,
        shard_name(coordinator.rank),
        division.state_names,
        structures,
        division.decisions[0] if division.decisions else None,
        unpack(first.own_holders),
        first.holders,
    )


@dataclass(frozen=True)
class _Division:
    """The result of one division of items, on this rank."""

    identity: bytes
    state_names: int
    share: bytes
    own_holders: bytes
    """For `unpack`: of this rank's items, among all ranks."""
    holders: Holders | None
    """On rank 0."""
    structures: Sequence[bytes] | None
    """On rank 0: of each rank's proposal."""
    decisions: Sequence[Decision]
    """On rank 0: one for each group."""


def _divide(
    items: Sequence[Item], coordinator: Coordinator, groups: Sequence[Sequence[int]]
) -> _Division:
    """Divide replicated items within each group of ranks; every rank is in one group."""
    proposals = coordinator.gather("plan", lambda: propose(items))
    decisions: list[Decision] = []
    structures = [b""] * coordinator.world_size
    found: list[Holders] = []

    def decide_all() -> list[tuple[bytes, int, bytes, bytes]]:
        assert proposals is not None
        shares = [b""] * len(proposals)
        for ranks in groups:
            decision = decide([proposals[rank] for rank in ranks], is_whole=len(groups) == 1)
            decisions.append(decision)
            for rank, share, structure in zip(
                ranks, decision.shares, decision.structures, strict=True
            ):
                shares[rank], structures[rank] = share, structure
        identity = xxhash.xxh3_128_digest(b"".join(each.plan for each in decisions))
        names = max(len(each.catalogue.numbers) for each in decisions)
        holders = decisions[0].holders if len(groups) == 1 else holders_of(proposals)
        found.append(holders)
        return [(identity, names, *own) for own in zip(shares, holders.by_rank, strict=True)]

    identity, names, share, own_holders = coordinator.scatter("plan", decide_all)
    is_root = coordinator.rank == 0
    return _Division(
        identity,
        names,
        share,
        own_holders,
        found[0] if found else None,
        structures if is_root else None,
        decisions,
    )


def _ranks_of_nodes(nodes: Sequence[int]) -> list[list[int]]:
    return [
        [rank for rank, each in enumerate(nodes) if each == node] for node in sorted(set(nodes))
    ]


def _share(items: Sequence[Item], chosen: Sequence[Item]) -> Share:
    places = {_key(item): position for position, item in enumerate(items)}
    layout = lay_out(chosen)
    return Share(layout, [places[_key(slot.item)] for slot in layout.slots])


def _sources(share: Share, inventory: Inventory) -> list[Source]:
    return [inventory.sources[position] for position in share.positions]


def _key(item: Item) -> tuple[str, tuple[int, ...]]:
    return item.name, item.offsets
