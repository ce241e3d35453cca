"""Copy the app state to memory that training does not change.

Owns the steps from live objects to a snapshot that threads may write: capture, agree on the plan,
ask the provider for memory, stage. Before the first save it estimates what a snapshot will take.
Promises that either all ranks have a snapshot to write or none has, that everything reused between
saves is compared with the live state each time, that an optimizer step waits for a copy in progress
(`StepGuard` hooks each optimizer once), and that the writer sees the error of a failed copy. Writes
nothing, and knows no tier: the provider of memory is `tiers.routing`, which asks the local tier;
otherwise the arena of `snapshot.shard` is used.
"""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from holdfast.config import CheckpointConfig
from holdfast.errors import CheckpointError, UnsupportedStateError
from holdfast.format.dcp import KeyPath
from holdfast.format.items import Inventory, Itemizer, structure_of
from holdfast.format.values import EMPTY, TRAIN_STATE
from holdfast.protocol import CheckpointSaveContext
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.job import Progress
from holdfast.snapshot.arena import image_bytes
from holdfast.snapshot.replicas import Replicas
from holdfast.snapshot.shard import ShardPlan, ShardSaver, StagedShard
from holdfast.state.app import AppState, Captured
from holdfast.state.bindings import Bindings, Leaves
from holdfast.state.codec import check_reachable, to_yaml
from holdfast.state.components import ComponentLeaves
from holdfast.state.estimate import estimate
from holdfast.state.filters import SaveFilter
from holdfast.state.kinds import kind_of
from holdfast.state.model import run_each
from holdfast.state.sharding import Shardings
from holdfast.state.small import read_counters
from holdfast.storage.store import checkpoint_name
from holdfast.tiers.bases import LoadedBase, require_base
from holdfast.tiers.tier import Contents, MemoryProvider, Reserved, Snapshot


class StepGuard:
    """Delays optimizer steps while a copy of their tensors is pending."""

    def __init__(self) -> None:
        self._hold: Callable[[], None] | None = None
        self._hooked: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()

    def watch(self, optimizers: Sequence[Optimizer], hold: Callable[[], None]) -> None:
        """Call `hold` before the next step of any of these optimizers; later steps do not wait."""
        self._hold = hold
        for each in optimizers:
            if each not in self._hooked:
                self._hooked[each] = each.register_step_pre_hook(self._before_step)

    def wait(self) -> None:
        """Run the pending wait; no-op without a pending copy.

        It stays pending until it has returned, so an interrupted wait is repeated.
        """
        hold = self._hold
        if hold is not None:
            hold()
            self._hold = None

    def leave(self) -> None:
        """Wait for a pending copy and remove every hook."""
        self.wait()
        for handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()

    def _before_step(self, *_: Any) -> None:
        self.wait()


logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class _Names:
    """Names and nested keys of everything in one snapshot; reused while both parts have theirs."""

    paths: Mapping[str, KeyPath]
    """Of model and optimizer."""
    small: tuple[str, ...]
    """Names of the small states."""
    components: ComponentLeaves
    joined: Mapping[str, KeyPath]
    per_rank: frozenset[str]


class Snapshotter:
    """Takes snapshots; each overwrites the previous one, unless a tier keeps it."""

    def __init__(self, config: CheckpointConfig, memory: MemoryProvider) -> None:
        self._config = config
        self.filter = SaveFilter(config.save_filter) if config.save_filter else None
        """What is written of the model; None: all of it."""
        self._is_async = config.async_save
        self._overlaps = config.async_save and config.staging == "overlapped"
        self._memory = memory
        self._shards = ShardSaver()
        self._itemizer = Itemizer(kind_of)
        self._bindings: Bindings | None = None
        self._shardings = Shardings()
        self._names: _Names | None = None
        self._digests: dict[str, torch.Tensor] = {}
        self._replicas = Replicas(config.on_replica_mismatch, config.replicas.audit_fraction)
        self._guard = StepGuard()
        self._base: LoadedBase | None = None
        """What a filtered save leaves to; None: nothing was loaded that could be one."""

    @property
    def progress(self) -> Progress:
        """Write progress of this rank's shard in the latest save."""
        return self._shards.progress

    def take(
        self,
        ctx: CheckpointSaveContext,
        app: AppState,
        control: Coordinator,
        confirm: Callable[[], None],
        *,
        plans: bool = True,
    ) -> tuple[Snapshot, Reserved]:
        """Take a snapshot of this step; return also the memory that it was staged into.

        Large tensors are copied once `finish` has returned or the next optimizer step begins.
        `confirm`: see `Snapshot`. `plans`: see `ShardSaver.agree_on_plan`; where it is off,
        `control` is this rank alone.

        Raises:
            CheckpointError: on every rank.
            PlanChangedError: the state needs another plan, and `plans` is off.
        """
        taken: list[tuple[Captured, Leaves, bytes]] = []
        iteration = ctx.state.train_state.step

        def capture() -> Inventory:
            counters, captured = run_each(
                lambda: _read_counters(ctx), lambda: app.capture(self._bindings)
            )
            self._bindings = captured.bindings
            small = {**captured.small, TRAIN_STATE: counters}
            part = self._leave_out(captured.leaves, app, iteration)
            leaves = self._join(part, small, captured.components)
            taken.append((captured, leaves, _encode_counters(counters)))
            return self._describe(leaves)

        plan, inventory = self._agree_on_plan(
            capture, lambda: taken[0][1], iteration, control, plans=plans
        )
        pinned = _is_on_gpu(inventory)
        reserved = self._memory.reserve(
            plan.staged.layout,
            plan.identity,
            control,
            pinned=pinned,
            required=ctx.non_persistent_ckpt,
        )

        def stage() -> Snapshot:
            ((captured, leaves, counters),) = taken
            shard = self._stage_shard(captured, plan, inventory, reserved, pinned=pinned)
            audit = self._replicas.audited()
            if not plans:
                buffers = leaves.buffers.__contains__
                audit = self._replicas.audit(plan, inventory, shard, buffers, iteration)
            snapshot = Snapshot(
                iteration,
                shard,
                counters,
                to_yaml(ctx.state.cfg),
                confirm,
                audit,
                self._base.record if self.filter is not None and self._base is not None else None,
            )
            copying = snapshot.shard.copying
            if copying is not None and self._overlaps:
                self._guard.watch(app.optimizers, copying.hold)
                copying.begin()
            return snapshot

        try:
            return _keep_own(control, "stage", stage), reserved
        except CheckpointError:
            self._memory.release()
            raise

    def _agree_on_plan(
        self,
        take: Callable[[], Inventory],
        leaves: Callable[[], Leaves],
        iteration: int,
        control: Coordinator,
        *,
        plans: bool,
    ) -> tuple[ShardPlan, Inventory]:
        """Agree on the plan, and that what several ranks hold under one name is one value.

        `leaves`: of the state that `take` has described.
        """
        while True:
            plan, inventory = self._shards.agree_on_plan(
                take,
                control,
                self._memory.nodes,
                lambda: self._agree_on_shardings(leaves(), control),
                plans=plans,
            )
            if not plans:  # this rank is alone: the others are not asked
                return plan, inventory
            buffers = leaves().buffers.__contains__
            if not self._replicas.compare(plan, inventory, buffers, iteration, control):
                return plan, inventory

            def take() -> Inventory:
                return self._describe(leaves())

    def expect_base(self, contents: Contents | None, store: Path) -> None:
        """Refuse to load where nothing would have what filtered saves leave out.

        `contents`: of what is to be loaded; None: the run begins without a checkpoint.

        Raises:
            ConfigError: alike on every rank.
        """
        self._base = None
        if self.filter is not None:
            require_base(contents, store)

    def take_base(self, contents: Contents, filled: Collection[str], store: Path) -> None:
        """Let filtered saves leave to a checkpoint what this rank was given of it.

        `filled`: the names. `store`: that is saved to.
        """
        self._base = None if self.filter is None else LoadedBase.of(contents, filled, store)

    def _leave_out(self, leaves: Leaves, app: AppState, iteration: int) -> Leaves:
        """Leave out what the base has, where a filter says so.

        Raises:
            UnsupportedStateError: there is no base, or it would be replaced, or lacks something.
        """
        if self.filter is None:
            return leaves
        if self._base is None:
            raise UnsupportedStateError(
                "checkpoint.save_filter saves a part of the model, and no checkpoint was loaded "
                "that has the rest.\n"
                "Name one with load.pretrained.directory, or save without a filter."
            )
        record, names = self._base.record, self._base.names
        if record.relative_path == checkpoint_name(iteration):
            raise UnsupportedStateError(
                f"checkpoint.save_filter: a save of iteration {iteration} would replace "
                f"{record.path}, which is its own base.\nSave at a later step."
            )
        return self.filter.apply(leaves, app.model, names, record.path)

    def finish(self, snapshot: Snapshot) -> None:
        """Complete the pending copy, unless it runs in the background during training."""
        if snapshot.shard.copying is not None and not self._overlaps:
            snapshot.shard.copying.finish()

    def compare_all(self, *, is_loaded: bool = False) -> None:
        """Compare all replicas in the next save; `is_loaded`: other values were loaded."""
        self._replicas.restart(is_loaded=is_loaded)

    def estimate(
        self,
        app: AppState,
        train_state: Any,
        nodes: Sequence[int] | None,
        control: Coordinator,
    ) -> tuple[int, list[str]]:
        """Return what this rank will stage once every optimizer has taken a step; copy nothing.

        That is a size in bytes, and the optimizers whose state it does not count. The plan made for
        it is reused by the first save if the state matches the estimate.

        Raises:
            CheckpointError: on every rank: the state cannot be saved.
        """
        uncounted: list[str] = []
        gathered: list[Leaves] = []

        def with_estimate(now: Inventory) -> Inventory:
            then = estimate(app.optimizers, gathered[0], now.items, kind_of)
            uncounted[:] = then.uncounted
            items = then.items
            if len(items) > len(now.items):  # the state of an optimizer will not be empty then
                items = [each for each in items if each.name != EMPTY]
            return Inventory(items, now.sources, structure_of(items))

        def describe() -> Inventory:
            captured = app.capture(with_position=False)
            small = {**captured.small, TRAIN_STATE: _counters_of(train_state, 0)}
            gathered.append(self._join(captured.leaves, small, captured.components))
            return with_estimate(self._describe(gathered[0]))

        def agree() -> Inventory | None:
            found = self._agree_on_shardings(gathered[0], control)
            return None if found is None else with_estimate(found)

        plan, _ = self._shards.agree_on_plan(describe, control, nodes, agree)
        return image_bytes(plan.staged.layout), uncounted

    def wait(self) -> None:
        """Wait until the last snapshot no longer reads live tensors."""
        self._guard.wait()

    def release(self) -> None:
        """Free memory, remove hooks, and drop references to live objects."""
        self._guard.leave()
        self._shards.release()
        self._replicas.release()
        self._bindings = None

    def _describe(self, leaves: Leaves) -> Inventory:
        self._shardings = self._shardings.with_claims(leaves.claims)
        inventory = self._itemizer.describe(
            leaves.values,
            leaves.paths,
            check_reachable,
            leaves.per_rank | self._replicas.per_rank,
            self._shardings.cut_of,
        )
        return self._replicas.leave_out(inventory)

    def _join(
        self, leaves: Leaves, small: Mapping[str, Any], components: ComponentLeaves
    ) -> Leaves:
        """Return model, optimizer, components and small states together, the last all per rank."""
        names = self._names
        if (
            names is None
            or names.paths is not leaves.paths
            or names.small != (*small,)
            or not names.components.is_named_like(components)
        ):
            paths = {**leaves.paths, **{name: (name,) for name in small}, **components.paths}
            per_rank = leaves.per_rank | small.keys() | components.per_rank
            names = _Names(leaves.paths, (*small,), components.without_values(), paths, per_rank)
            self._names = names
        for name, digest in components.digests.items():  # memory that stays where it is
            kept = self._digests.setdefault(name, torch.empty(len(digest), dtype=torch.uint8))
            kept.copy_(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        digests = {name: self._digests[name] for name in components.digests}
        values = {**leaves.values, **small, **components.values, **digests}
        return replace(leaves, values=values, paths=names.joined, per_rank=names.per_rank)

    def _agree_on_shardings(self, leaves: Leaves, control: Coordinator) -> Inventory | None:
        """Agree on how tensors are sharded; return the items anew where that changes them."""
        known = self._shardings
        self._shardings = Shardings.agree(lambda: (leaves.claims, leaves.values), control)
        if known.are_equal_parts and self._shardings.are_equal_parts:
            return None
        return self._describe(leaves)

    def _stage_shard(
        self,
        captured: Captured,
        plan: ShardPlan,
        inventory: Inventory,
        reserved: Reserved,
        *,
        pinned: bool,
    ) -> StagedShard:
        if not self._is_async and not reserved.to_local:
            # Written before `save` returns: nothing to copy.
            return self._shards.stream(plan, inventory)
        later = captured.leaves.changed_by_steps if self._overlaps else None
        return self._shards.stage(plan, inventory, arena=reserved.arena, pinned=pinned, later=later)


@contextmanager
def collection_put_off() -> Iterator[None]:
    """Disable garbage collection: with many tensors it would take longer than everything else."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _keep_own(coordinator: Coordinator, stage: str, work: Callable[[], T]) -> T:
    """Run work on every rank and return this rank's result; it succeeds on all ranks or none."""
    results: list[T] = []
    coordinator.all_reduce(stage, lambda: results.append(work()), lambda _: None)
    return results[0]


def _is_on_gpu(inventory: Inventory) -> bool:
    return torch.cuda.is_available() and any(
        isinstance(source, torch.Tensor) and source.is_cuda for source in inventory.sources
    )


def _counters_of(train_state: Any, operations: Any) -> dict[str, Any]:
    return {
        "train_state": read_counters(train_state),
        "num_floating_point_operations_so_far": operations,
    }


def _read_counters(ctx: CheckpointSaveContext) -> dict[str, Any]:
    values = _counters_of(ctx.state.train_state, ctx.num_floating_point_operations_so_far)
    step: object = ctx.state.train_state.step
    if type(step) is not int or step < 0:
        raise UnsupportedStateError(
            f"train_state.step is {step!r}, which names no iteration; use a whole number from 0 on."
        )
    return values


def _encode_counters(values: Mapping[str, Any]) -> bytes:
    advice = "Use numbers, strings, lists and dicts with string keys in its fields and in extra."
    try:
        content = json.dumps(values, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnsupportedStateError(
            f"train_state holds a value that is no JSON: {error}. {advice}"
        ) from error
    if json.loads(content) != values:  # JSON turns number keys into strings, and tuples into lists
        raise UnsupportedStateError(
            f"train_state holds a value that JSON would give back as another. {advice}"
        )
    return content.encode() + b"\n"
