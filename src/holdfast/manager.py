"""holdfast's own checkpoint manager: the order of the stages, and only the order.

A save: settle the previous one, be admitted to the store, capture, stage, then write, commit and
retain on a thread. A load: resolve, open, compare, and only then touch live state: tensors,
verified as they are read, optimizer, scheduler, data, RNG, counters. Promises that all ranks take
every turn together and that an outcome is told once. What a stage does is its room's business.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import Optimizer

from holdfast.background import Background, Outcome
from holdfast.config import CheckpointConfig
from holdfast.coordination import Coordinator, open_channels
from holdfast.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    NoLoadableCheckpointError,
    RankFailure,
    SaveFailedError,
    StageFailedError,
    StageTimeoutError,
    StatePartlyLoadedError,
    StoreIdentityError,
    UnsupportedStateError,
)
from holdfast.events import (
    ON_CHECKPOINT_SAVE,
    ON_CHECKPOINT_SAVE_FAILED,
    ON_CHECKPOINT_STAGED,
    CallbackManager,
    CheckpointEvent,
)
from holdfast.filesystem import Filesystem, LocalFilesystem
from holdfast.protocol import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    GlobalState,
    LoadResult,
    SkippedCheckpoint,
)
from holdfast.restoring import Opened, Restoration, open_local, open_verified
from holdfast.shards.arena import Arena
from holdfast.shards.items import Inventory, Itemizer
from holdfast.shards.saving import ShardPlan, ShardSaver, StagedShard
from holdfast.shards.writer import Progress
from holdfast.state.bindings import Bindings
from holdfast.state.capture import AppState, Captured, Place
from holdfast.state.run_config import to_yaml
from holdfast.state.safety import encode
from holdfast.state.step_guard import StepGuard
from holdfast.store import Checkpoint
from holdfast.tiers.both import LOCAL, Tiers
from holdfast.tiers.persistent import TIER_NAME, Committed, PersistentTier, Snapshot

if TYPE_CHECKING:
    from holdfast.tiers.local_vote import Candidate

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class _Memory:
    """What a save is staged into."""

    arena: Arena | None
    """Of the local tier; None: the stager's own."""
    pinned: bool
    is_local: bool
    """Whether the local tier takes part."""


@dataclass
class _Save:
    """One call of `save`, until its outcome was told."""

    callback_manager: Any | None
    event: CheckpointEvent
    started: float

    def tell(self, event_name: str) -> None:
        """Fire an event at the listener of this save, where it has one that knows it."""
        # Other callback managers than ours know Megatron-Bridge's event only.
        listener = self.callback_manager
        if isinstance(listener, CallbackManager) or (
            listener is not None and event_name == ON_CHECKPOINT_SAVE
        ):
            listener.fire(event_name, self.event)


class DefaultCheckpointManager:
    """Saves to and loads from a store of torch.distributed.checkpoint directories."""

    def __init__(
        self, checkpoint_config: CheckpointConfig, *, filesystem: Filesystem | None = None
    ) -> None:
        """Check the configuration; nothing is read, written or communicated yet.

        `filesystem` is the seam for faults and other storage; None: the mounted file systems.

        Raises:
            ConfigError: with every problem of the configuration.
        """
        checkpoint_config.validate()
        self.checkpoint_config = checkpoint_config
        directory = checkpoint_config.persistent.directory
        if directory is None:
            raise ConfigError(
                ["checkpoint.persistent.directory is null; name where checkpoints are kept"]
            )
        self._filesystem = filesystem or LocalFilesystem(
            private=checkpoint_config.permissions == "private"
        )
        self._tier = PersistentTier(
            Path(directory).absolute(),
            self._filesystem,
            checkpoint_config.run_id,
            checkpoint_config.persistent.keep.last,
            _bytes_per_second(checkpoint_config),
        )
        self._tiers = Tiers(checkpoint_config, self._tier, self._filesystem)
        self._shards = ShardSaver()
        self._itemizer = Itemizer()
        self._bindings: Bindings | None = None
        self._guard = StepGuard()
        self._background: Background[Committed] = Background()
        self._in_flight: _Save | None = None
        self._channels: list[Coordinator] | None = None
        self._calls = 0
        self._failures_in_a_row = 0

    # -- save ------------------------------------------------------------------------------------

    def save(self, ctx: CheckpointSaveContext, callback_manager: Any | None = None) -> None:
        """Save at `ctx.state.train_state.step`; with `async_save` return once the copy is taken.

        Raises:
            CheckpointError: this save could not begin, or the previous one had failed.
        """
        started = time.monotonic()
        self._calls += 1
        self.wait_staged()
        self._settle(self._background.wait())
        control, writer = self._begin_call()
        event = CheckpointEvent(
            iteration=ctx.state.train_state.step,
            tier=LOCAL if ctx.non_persistent_ckpt else TIER_NAME,
            state=ctx.state,
            model=ctx.model,
            optimizer=ctx.optimizer,
            scheduler=ctx.opt_param_scheduler,
        )
        save = _Save(callback_manager, event, started)
        try:
            self._tiers.admit(control, to_local=ctx.non_persistent_ckpt)
            snapshot, to_local = self._take_snapshot(ctx, control)
        except StageFailedError as error:
            self._in_flight = save
            self._settle(Outcome(error=error))
            return

        def write() -> Committed:
            return self._tiers.write(
                snapshot, writer, to_local=to_local, to_persistent=not ctx.non_persistent_ckpt
            )

        self._in_flight = save
        if self.checkpoint_config.async_save:
            self._background.start(write, writer)
            event.stall_seconds = time.monotonic() - started
            save.tell(ON_CHECKPOINT_STAGED)
            return
        outcome = _outcome_of(write)
        event.stall_seconds = time.monotonic() - started
        self._settle(outcome)

    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Act on a finished save, at the same step on every rank; call once per step.

        `blocking` waits for the save in flight; `terminate` does so too, at the end of the run.

        Raises:
            CheckpointError: the save in flight had failed, and `on_save_failure` is `raise`.
        """
        if blocking or terminate:
            outcome = self._background.wait()
            if terminate:  # the memory of a snapshot, and the hooks on what it was taken from
                self._guard.leave()
                self._shards.release()
                self._tiers.close()
                self._bindings = None
            self._settle(outcome)
        else:
            self._settle(self._background.poll())

    def wait_staged(self) -> None:
        """Return when the last save no longer reads live tensors.

        With overlapped staging, for whoever changes parameters or optimizer state by another road
        than an optimizer's step; elsewhere it has nothing to wait for.
        """
        self._guard.settle()

    @property
    def progress(self) -> Progress:
        """How far this rank's shard of the latest save has come to disk."""
        return self._shards.progress

    def _take_snapshot(
        self, ctx: CheckpointSaveContext, control: Coordinator
    ) -> tuple[Snapshot, bool]:
        """Copy everything out of training's reach; a failure on one rank fails all.

        Return it, and whether it can go to the local tier.
        """
        taken: list[tuple[Captured, bytes]] = []
        iteration = ctx.state.train_state.step

        def take() -> tuple[int, Inventory]:
            counters = _encode_counters(ctx)
            captured = _app_state(ctx, control).capture(self._bindings)
            self._bindings = captured.bindings
            taken.append((captured, counters))
            leaves = captured.leaves
            return iteration, self._itemizer.describe(leaves.values, leaves.paths)

        plan, inventory = self._shards.settle(take, control, self._tiers.nodes)
        memory = self._begin_local(ctx, plan, inventory, control)

        def stage() -> Snapshot:
            ((captured, counters),) = taken
            return Snapshot(
                iteration,
                self._stage_shard(ctx, captured, plan, inventory, memory),
                encode(captured.rank),
                encode(captured.shared),
                counters,
                to_yaml(ctx.state.cfg),
            )

        try:
            return _keep_own(control, "stage", stage), memory.is_local
        except CheckpointError:
            self._tiers.abandon_local()
            raise

    def _begin_local(
        self,
        ctx: CheckpointSaveContext,
        plan: ShardPlan,
        inventory: Inventory,
        control: Coordinator,
    ) -> _Memory:
        """Ask the local tier for memory to stage into, where there is one."""
        pinned = _is_on_gpu(inventory)
        if self._tiers.local is None:
            return _Memory(None, pinned, is_local=False)
        iteration = ctx.state.train_state.step
        try:
            arena = self._tiers.begin_local(iteration, plan, control, pinned=pinned)
        except StageTimeoutError:
            raise
        except CheckpointError as error:
            if ctx.non_persistent_ckpt:
                raise
            if control.rank == 0:
                logger.warning("no local copy of this save: %s", error)
            return _Memory(None, pinned, is_local=False)
        return _Memory(arena, pinned, is_local=True)

    def _stage_shard(
        self,
        ctx: CheckpointSaveContext,
        captured: Captured,
        plan: ShardPlan,
        inventory: Inventory,
        memory: _Memory,
    ) -> StagedShard:
        if not self.checkpoint_config.async_save and not memory.is_local:
            # Written before `save` returns: nothing to copy.
            return self._shards.stream(plan, inventory)
        overlapped = (
            self.checkpoint_config.async_save and self.checkpoint_config.staging == "overlapped"
        )
        later = captured.leaves.changed_by_steps if overlapped else frozenset()
        staged = self._shards.stage(
            plan, inventory, arena=memory.arena, pinned=memory.pinned, later=later
        )
        if overlapped and staged.copying is not None:
            self._guard.watch(_optimizers(ctx), staged.copying.hold)
        return staged

    def _settle(self, outcome: Outcome[Committed] | None) -> None:
        """Tell what became of the save in flight, once: events, then the error if there is one."""
        save, self._in_flight = self._in_flight, None
        if outcome is None or save is None:
            self._in_flight = save
            return
        event = save.event
        event.total_seconds = time.monotonic() - save.started
        if outcome.value is not None:
            self._failures_in_a_row = 0
            event.path = str(outcome.value.path)
            event.size_bytes = outcome.value.size_bytes
            event.removed_iterations = outcome.value.removed_iterations
            save.tell(ON_CHECKPOINT_SAVE)
            return
        assert outcome.error is not None
        self._failures_in_a_row += 1
        event.error = _as_save_failure(event.iteration, outcome.error, self._rank())
        save.tell(ON_CHECKPOINT_SAVE_FAILED)
        limit = self.checkpoint_config.save_failure_limit
        spent = limit is not None and self._failures_in_a_row >= limit
        overtaken = isinstance(event.error, StoreIdentityError)  # no later save can succeed
        if self.checkpoint_config.on_save_failure == "raise" or spent or overtaken:
            raise event.error from outcome.error
        logger.warning(
            "%s (failure %d in a row, the run ends at %s)",
            event.error,
            self._failures_in_a_row,
            limit if limit is not None else "none",
        )

    # -- load ------------------------------------------------------------------------------------

    def load(self, ctx: CheckpointLoadContext) -> LoadResult:
        """Restore the newest checkpoint that verifies, or exactly the one that was asked for.

        Raises:
            CheckpointNotFoundError: what was named is not there, or nothing is and
                `load.on_missing` is `error`.
            NoLoadableCheckpointError: checkpoints are there and none can be loaded.
            StateMismatchError, DataReshardError: the checkpoint is sound but does not fit this run.
            StoreNotWritableError: nothing was found, and a first save could not be written either.
        """
        self._calls += 1
        self.wait_staged()
        self._settle(self._background.wait())
        control, _ = self._begin_call()
        config = self.checkpoint_config
        decision = self._tiers.resolve(control)
        failed: list[SkippedCheckpoint] = []
        touched = False
        for candidate in self._tiers.candidates(decision, control):
            try:
                opened = self._open(candidate, ctx, control)
                restoration = self._compare(ctx, opened, control)
                touched = True
                restoration.fill(control)
            except CorruptCheckpointError as error:
                if decision.asked_for and not touched:
                    raise
                self._give_up(candidate, error, failed, control)
                continue
            control.together("apply", restoration.apply)
            if not isinstance(candidate, Checkpoint):
                assert self._tiers.local is not None
                self._tiers.local.finish(control)
            skipped = [*decision.skipped, *self._tiers.passed_over_locally()]
            newer = [each for each in skipped if _is_beyond(each, opened.checkpoint.iteration)]
            return self._finish_load(ctx.state, opened, _newest_first(newer + failed))
        reasons = _newest_first([*decision.skipped, *failed, *self._tiers.passed_over_locally()])
        if reasons:
            kind = StatePartlyLoadedError if touched else NoLoadableCheckpointError
            raise kind(str(decision.root), [f"{each.path}: {each.reason}" for each in reasons])
        if config.load.on_missing == "error":
            raise CheckpointNotFoundError(
                f"{decision.root} holds no checkpoint, and checkpoint.load.on_missing is error.\n"
                "Name the store with checkpoint.load.directory, or set on_missing=start_fresh."
            )
        control.lead("probe", self._tier.prove_writable)  # now, not at the first save hours away
        return LoadResult()

    def _open(
        self, candidate: Checkpoint | Candidate, ctx: CheckpointLoadContext, control: Coordinator
    ) -> Opened:
        place = _place(ctx, control)
        verify_first = self.checkpoint_config.load.verify == "first"
        if isinstance(candidate, Checkpoint):
            return open_verified(
                candidate, control, self._filesystem, place, verify_first=verify_first
            )
        local = self._tiers.local
        assert local is not None
        return open_local(candidate, local, control, place, verify_first=verify_first)

    def _give_up(
        self,
        candidate: Checkpoint | Candidate,
        error: CorruptCheckpointError,
        failed: list[SkippedCheckpoint],
        control: Coordinator,
    ) -> None:
        """Note why a candidate was not loaded, so that the next one is another."""
        if isinstance(candidate, Checkpoint):
            skipped = _skip(candidate, error)
            failed.append(skipped)
        else:
            local = self._tiers.local
            assert local is not None
            local.pass_over(candidate, control, str(error))
            skipped = SkippedCheckpoint(
                str(local.directory), str(error), candidate.record.iteration, LOCAL
            )
            failed.append(skipped)
        if control.rank == 0:
            logger.warning("%s is passed over: %s", skipped.path, skipped.reason)

    def _compare(
        self, ctx: CheckpointLoadContext, opened: Opened, control: Coordinator
    ) -> Restoration:
        """Hold a checkpoint against the live state, on every rank, touching nothing."""
        load = self.checkpoint_config.load
        app = _app_state(ctx, control)
        restoration = Restoration(opened, app, with_tensors=not ctx.skip_load_to_model_and_opt)
        strict = load.strict if ctx.strict is None else ctx.strict

        def compare() -> None:
            restoration.compare(strict, load.accept_data_restart)

        control.together("compare", compare)
        return restoration

    def _finish_load(
        self, state: GlobalState, opened: Opened, skipped: tuple[SkippedCheckpoint, ...]
    ) -> LoadResult:
        checkpoint, counters = opened.checkpoint, opened.contents.counters
        state.train_state.update_from(counters["train_state"])
        self._tiers.resume_from(checkpoint)
        return LoadResult(
            iteration=checkpoint.iteration,
            num_floating_point_operations_so_far=counters["num_floating_point_operations_so_far"],
            found=True,
            tier=checkpoint.manifest.tier,
            path=checkpoint.path,
            skipped=skipped,
        )

    # -- ranks -----------------------------------------------------------------------------------

    def _coordinators(self) -> list[Coordinator]:
        """Return the training thread's channel and the writer thread's, opened at first use."""
        if self._channels is None:
            self._channels = open_channels(2, self.checkpoint_config.timeout_seconds)
        return self._channels

    def _begin_call(self) -> list[Coordinator]:
        """Meet the other ranks anew, in case one of them left the last call in the middle."""
        channels = self._coordinators()
        for each in channels:
            # Counted here and not agreed: all ranks make the same calls, however each one ended.
            each.begin(f"call {self._calls}")
        return channels

    def _rank(self) -> int:
        return self._coordinators()[0].rank


def _keep_own(coordinator: Coordinator, stage: str, work: Callable[[], T]) -> T:
    """Run work on every rank, and keep the result here: all succeed or all fail."""
    results: list[T] = []
    coordinator.settle(stage, lambda: results.append(work()), lambda _: None)
    return results[0]


def _is_on_gpu(inventory: Inventory) -> bool:
    return torch.cuda.is_available() and any(
        isinstance(source, torch.Tensor) and source.is_cuda for source in inventory.sources
    )


def _bytes_per_second(config: CheckpointConfig) -> float | None:
    limit = config.persistent.write_mib_per_second
    return limit * 2**20 if limit is not None else None


def _optimizers(ctx: CheckpointSaveContext) -> list[Optimizer]:
    if ctx.optimizer is None:
        return []
    return list(ctx.optimizer) if isinstance(ctx.optimizer, Sequence) else [ctx.optimizer]


def _is_beyond(skipped: SkippedCheckpoint, iteration: int) -> bool:
    return skipped.iteration is None or skipped.iteration > iteration


def _newest_first(skipped: list[SkippedCheckpoint]) -> tuple[SkippedCheckpoint, ...]:
    return tuple(sorted(skipped, key=lambda each: each.iteration or 0, reverse=True))


def _app_state(
    ctx: CheckpointSaveContext | CheckpointLoadContext, control: Coordinator
) -> AppState:
    return AppState(
        ctx.model,
        ctx.optimizer,
        ctx.opt_param_scheduler,
        ctx.train_data_iterator,
        _place(ctx, control),
    )


def _place(ctx: CheckpointSaveContext | CheckpointLoadContext, control: Coordinator) -> Place:
    return Place.of(control.rank, control.world_size, ctx.pg_collection)


def _skip(checkpoint: Checkpoint, error: CorruptCheckpointError) -> SkippedCheckpoint:
    path = str(checkpoint.path)
    reason = error.reason if error.path == path else str(error)  # which names the file
    return SkippedCheckpoint(path, reason, checkpoint.iteration)


def _encode_counters(ctx: CheckpointSaveContext) -> bytes:
    values = {
        "train_state": ctx.state.train_state.to_dict(),
        "num_floating_point_operations_so_far": ctx.num_floating_point_operations_so_far,
    }
    step: object = ctx.state.train_state.step
    if type(step) is not int or step < 0:
        raise UnsupportedStateError(
            f"train_state.step is {step!r}, which names no iteration; use a whole number from 0 on."
        )
    advice = "Use numbers, texts, lists and dicts with texts as keys in its fields and in extra."
    try:
        content = json.dumps(values, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnsupportedStateError(
            f"train_state holds a value that is no JSON: {error}. {advice}"
        ) from error
    if json.loads(content) != values:  # JSON makes texts of number keys, and lists of tuples
        raise UnsupportedStateError(
            f"train_state holds a value that JSON would give back as another. {advice}"
        )
    return content.encode() + b"\n"


def _outcome_of(work: Callable[[], Committed]) -> Outcome[Committed]:
    try:
        return Outcome(value=work())
    except CheckpointError as error:
        return Outcome(error=error)


def _as_save_failure(iteration: int, error: BaseException, rank: int) -> CheckpointError:
    """Name the save that failed; an error that speaks for itself stays what it is."""
    if isinstance(error, StageFailedError):
        return SaveFailedError(iteration, error.stage, error.failures)
    if isinstance(error, CheckpointError):
        return error
    return SaveFailedError(iteration, "write", [RankFailure.of(rank, error)])
