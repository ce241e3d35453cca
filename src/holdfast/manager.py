"""holdfast's own checkpoint manager: the order of the stages, and only the order.

A save: finish the previous one, be admitted to the store, capture, stage, then write, commit and
prune on a thread. A load: select, open, compare, and only then touch live state: tensors, verified
as they are read, optimizer, scheduler, data, RNG, counters. Promises that all ranks take every
stage together and that an outcome is reported once. What a stage does is in its module; which tier
does it, in `tiers`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from holdfast.arguments import (
    Calls,
    check_load,
    check_save,
    check_state,
    describe_load,
    one_at_a_time,
    settings_of_save,
)
from holdfast.caller import Call, Caller, CallerLeftError
from holdfast.config import CheckpointConfig, read_config
from holdfast.contexts import app_state_of, place_of, strategy_of
from holdfast.errors import CorruptCheckpointError, LoadIncompleteError
from holdfast.filesystem import Filesystem, LocalFilesystem
from holdfast.opened import Opened, open_selected
from holdfast.policies.guards import Alarm, StepOrder
from holdfast.protocol import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    GlobalState,
    LoadResult,
)
from holdfast.ranks.channels import Channels
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.entry import Entry
from holdfast.ranks.job import FailureRule, Flight, Progress, Save, Watcher
from holdfast.restoring import Restoration
from holdfast.saving import Request, Saver
from holdfast.snapshotting import Snapshotter, collection_put_off
from holdfast.state.app import AppState
from holdfast.state.codec import to_yaml
from holdfast.state.components import StateComponent, check_components
from holdfast.state.guard import Guard
from holdfast.state.loaded import LastLoad
from holdfast.state.model import run_each
from holdfast.state.overrides import Overrides
from holdfast.state.rehearsal import LazyState
from holdfast.state.small import warn_of_lost_position
from holdfast.state.strategy import LoadStrategy
from holdfast.state.strictness import Strictness
from holdfast.tiers.bases import Bases
from holdfast.tiers.routing import Tiers
from holdfast.tiers.search import Search, Selected
from holdfast.tiers.survey import warn_of_living_attempt
from holdfast.tiers.tier import Source

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE_SECONDS = 10.0
"""How long an interrupted save goes on waiting for its copy: by then it is over, or ranks hang."""


class DefaultCheckpointManager:
    """Saves to and loads from a store of torch.distributed.checkpoint directories."""

    def __init__(
        self,
        checkpoint_config: CheckpointConfig | Mapping[str, Any],
        *,
        filesystem: Filesystem | None = None,
        clock: Callable[[], float] = time.monotonic,
        store: Any = None,
    ) -> None:
        """Check the configuration and its directories; nothing is created yet.

        `filesystem`: the operations that files are written and read by, for tests of faults. None:
        the mounted file systems. `clock`: what the alarm of overdue checkpoints is measured by, in
        seconds. `store`: the `torch.distributed.Store` through which the ranks agree; threads use
        clones of it. None: that of the default process group.

        Raises:
            ConfigError: with every problem of the configuration.
            WrongArgumentError: `store` is none.
        """
        checkpoint_config = read_config(checkpoint_config)
        checkpoint_config.validate()
        LoadStrategy.of(checkpoint_config.load.strategy)  # a wrong one is told now
        self.checkpoint_config = checkpoint_config
        self._base = str(Path.cwd())
        """What relative paths of the configuration are relative to."""
        config = self._config = checkpoint_config.with_expanded_paths(self._base)
        self._filesystem = filesystem or LocalFilesystem(private=config.permissions == "private")
        self._tiers = Tiers(config, self._filesystem)
        if config.load.guard is not None:
            Guard(config.load.guard)  # a wrong path is told now
        self._snapshotter = Snapshotter(config, self._tiers)
        self._overlaps = config.async_save and config.staging == "overlapped"
        self._steps = StepOrder(allow_rewind=config.allow_rewind)
        self._alarm = Alarm(config.alarm_after_seconds, stops=config.alarm_stops, clock=clock)
        rule = FailureRule(config)
        watchers: list[Watcher] = [self._steps, self._alarm]
        self._saving, self._draining = Flight(rule, watchers), Flight(rule, watchers)
        self._channels = Channels(3, config.timeout_seconds, str(self._tiers.root), store)
        self._saver = Saver(
            config, self._channels, self._tiers, self._snapshotter, self._saving, self._draining
        )
        watchers.append(self._saver)
        self._calls_inside = Calls()
        self._has_warned_of_data = False
        self._last_load = LastLoad()
        self._lazy_state = LazyState()
        self._is_torn = False
        """Whether live state holds parts of a checkpoint, from a load that did not complete."""
        self._caller = Caller()

    # -- save ------------------------------------------------------------------------------------

    @one_at_a_time
    def save(self, ctx: CheckpointSaveContext, callback_manager: Any | None = None) -> None:
        """Save at `ctx.state.train_state.step`; with `async_save` return once the copy is taken.

        An interrupt is raised when the copy is complete: the save goes on, and is reported later.

        Raises:
            WrongArgumentError, ConcurrentUseError: before anything is touched.
            StepRewoundError: the step is below the one last loaded or saved.
            CheckpointOverdueError: `alarm_stops` is set, and nothing durable came for too long.
            LoadIncompleteError: the last load began to overwrite live state and did not complete.
            CheckpointError: this save could not begin, or the previous one had failed.
        """
        try:
            check_save(ctx, callback_manager, overlaps=self._overlaps)
            self._last_load.check_components(ctx)
        except Exception as refusal:  # noqa: BLE001  # raised there
            self._refuse("admit", refusal)
        save = Save.of(ctx, callback_manager)
        self._caller.run(
            save.name,
            lambda call: self._save(ctx, save, call),
            patience_seconds=_PATIENCE_SECONDS,
        )

    def _save(self, ctx: CheckpointSaveContext, save: Save, call: Call[None]) -> None:
        is_persistent = not ctx.non_persistent_ckpt
        refusal = self._end_last_calls(drains=is_persistent)
        control = self._channels.open()[0]
        if save.callback_manager is not None:
            self._alarm.listener = save.callback_manager
        self._alarm.note_save(is_persistent=is_persistent)
        self._warn_if_overdue(control.rank)

        def capture() -> AppState:
            given = self._last_load.components_to_save(ctx, control.rank)
            return app_state_of(ctx, control, given)

        def check_own() -> Entry:
            if self._is_torn:
                raise LoadIncompleteError
            self._steps.check(ctx.state.train_state.step)
            self._tiers.check_save(to_local=not is_persistent)
            return f"{save.name} ({save.event.tier} tier)", *settings_of_save(self._config)

        def check_alarm() -> None:
            self._alarm.check(self._describe_flight(), is_persistent=is_persistent)

        if control.rank == 0 and not self._has_warned_of_data:
            self._has_warned_of_data = warn_of_lost_position(ctx.train_data_iterator)
        self._saver.save(Request(ctx, save, call, capture, check_own, check_alarm, refusal))

    @one_at_a_time
    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Act on a finished save, at the same step on every rank; call once per step.

        `blocking` waits for the saves in flight; `terminate` does so too, at the end of the run. An
        interrupt is raised at once; saves go on, and the next call waits for them.

        Raises:
            WrongArgumentError, ConcurrentUseError: before anything is touched.
            UnsupportedStateError: likewise; an optimizer has made state that no save would take.
            CheckpointError: a save in flight had failed, and `on_save_failure` is `raise`.
        """
        check_state("finalize_async_saves", state)
        self._lazy_state.check()
        if not (blocking or terminate):
            flights = (self._saving, self._draining, self._tiers)
            is_due = [each.count_step() for each in flights]
            if not (any(is_due) or self._alarm.is_due()) and self._caller.is_idle:
                return
        self._caller.run(
            "the wait for saves" if blocking or terminate else "the look at saves",
            lambda call: self._finalize(state, call, blocking=blocking, terminate=terminate),
            patience_seconds=0.0,
        )

    def _finalize(
        self, state: GlobalState, call: Call[None], *, blocking: bool, terminate: bool
    ) -> None:
        rank = self._channels.rank
        if not (blocking or terminate):
            self._saving.tell_if_due(rank)
            self._draining.tell_if_due(rank)
            self._tiers.tell_restored_if_due(rank)
            self._warn_if_overdue(rank)
            return
        try:
            run_each(
                partial(self._saving.wait, rank),
                lambda: self._save_again(state, call),
                partial(self._draining.wait, rank),
                partial(self._tiers.wait_restored, rank),
                partial(self._warn_if_overdue, rank),
                self._saving.finish,
                self._draining.finish,
            )
        finally:
            if terminate:
                self._alarm.end()
                self._snapshotter.release()
                self._tiers.close()

    def _save_again(self, state: GlobalState, call: Call[None]) -> None:
        """Save what was given up, if nothing was trained since: it may be the run's last save."""
        given_up = self._saver.take_given_up(state.train_state.step)
        if given_up is not None:
            ctx, save = given_up
            self._save(ctx, Save.of(ctx, save.callback_manager), call)
            self._saving.wait(self._channels.rank)

    def _warn_if_overdue(self, rank: int) -> None:
        self._alarm.warn(self._describe_flight(), str(self._tiers.root), rank)

    def _describe_flight(self) -> str | None:
        """Say how long the persistent save in flight has taken, and how far it came."""
        return self._saving.describe(self.progress) or self._draining.describe(None)

    def wait_staged(self) -> None:
        """Return when the last save no longer reads live tensors.

        With overlapped staging, call it before anything but an optimizer's step changes parameters
        or optimizer state. Otherwise there is nothing to wait for.
        """
        self._snapshotter.wait()

    @property
    def progress(self) -> Progress:
        """How far this rank's shard of the latest save has come to disk."""
        return self._snapshotter.progress

    # -- load ------------------------------------------------------------------------------------

    @one_at_a_time
    def load(self, ctx: CheckpointLoadContext) -> LoadResult:
        """Restore the newest checkpoint that verifies, or exactly the one that was asked for.

        Raises:
            WrongArgumentError, ConcurrentUseError: before anything is touched.
            CheckpointNotFoundError: what was named is not there, or nothing is and
                `load.on_missing` is `error`.
            NoLoadableCheckpointError: checkpoints are there and none can be loaded.
            StateMismatchError, DataReshardError: the checkpoint is sound but does not fit this run.
            StoreNotWritableError: nothing was found, and a first save could not be written either.
            ConfigError: what local checkpoints will need does not fit on some node.
        """
        try:
            check_load(ctx, overlaps=self._overlaps)
            check_components("load", ctx)
            strategy_of(self.checkpoint_config.load, ctx)
        except Exception as refusal:  # noqa: BLE001  # raised there
            self._refuse("arrive", refusal)
        return self._caller.run(
            "the load",
            lambda call: self._load(ctx, call),
            patience_seconds=0.0,
        )

    def _load(self, ctx: CheckpointLoadContext, call: Call[LoadResult]) -> LoadResult:
        refusal = self._end_last_calls(drains=True)
        self._saver.agree_first("it has loaded since")
        control, writer, _ = self._channels.open()

        def check_own() -> Entry:
            # What to load may be set late.
            self._config = self.checkpoint_config.with_expanded_paths(self._base)
            return describe_load(self._config, ctx)

        self._begin_call("arrive", check_own, lambda: None, refusal)
        search = Search(self._config, self._tiers, self._filesystem, control)
        if control.rank == 0:
            warn_of_living_attempt(self._tiers.storage)
        touched = False
        while (selected := search.next(touched=touched)) is not None:
            self._report_needs(ctx, selected.source, control)
            try:
                with collection_put_off():
                    opened = open_selected(
                        selected.source,
                        selected.commit,
                        control,
                        place_of(ctx, control),
                        verify_first=self._config.load.verify == "first",
                        bases=Bases.of(self._config, self._filesystem),
                    )
                    restoration = self._compare(ctx, selected, opened, control)
                    restoration.prepare(control)
                    touched = self._is_torn = True
                    restoration.fill(control)
            except CorruptCheckpointError as error:
                search.pass_over(selected, error)
                continue
            control.all_reduce("apply", restoration.apply, lambda _: None)
            self._last_load.note(restoration.loaded)
            self._lazy_state.watch(ctx.model, ctx.optimizer)
            self._tiers.finish_load(selected.source, writer)
            search.warn(selected)
            result = self._finish_load(selected, opened, restoration, search)
            self._end_load(call)
            return result
        self._snapshotter.expect_base(None, self._tiers.root)
        self._report_needs(ctx, None, control)
        control.all_reduce("capture", app_state_of(ctx, control).rehearse, lambda _: None)
        self._lazy_state.watch(ctx.model, ctx.optimizer)
        self._last_load.note(None)
        # Now, and not at the first save hours away.
        control.broadcast("probe", self._tiers.prove_writable)
        self._steps.note_load(None)
        self._alarm.begin()
        self._end_load(call)
        return LoadResult()

    def _end_load(self, call: Call[LoadResult]) -> None:
        """Note that live state is whole, unless its caller has gone on meanwhile."""
        with suppress(CallerLeftError):
            call.confirm()
            self._is_torn = False

    def restore_rng(self) -> None:
        """Give the random number generators the state that the last load found, again.

        For loops that draw numbers between `load` and their first step. Nothing happens where the
        load found no checkpoint, or where `load.rng` or `load.override` leaves them as they are.

        Raises:
            NothingLoadedError: `load` has not been called.
        """
        self._last_load.restore_rng()

    def restore_data(self, iterator: Any) -> None:
        """Give an iterator that is built after `load` the data position that the load found.

        Raises:
            NothingLoadedError: no load has found a checkpoint with a data position.
            UnsupportedStateError: the iterator has no `load_state_dict`.
            DataReshardError: as for `load`.
        """
        self._last_load.restore_data(iterator, self._config.load.accept_data_restart)

    def restore_component(self, component: StateComponent) -> bool:
        """Give a component the state that the last load found and had no object for, once.

        What nobody asks for is saved again as it was, with a warning. Returns whether there was
        some: not where the load found no checkpoint, or `load.override` names it.

        Raises:
            NothingLoadedError: `load` has not been called, or the component is required and the
                checkpoint holds none of it.
            StateMismatchError: it was saved with another pattern, or by another group.
        """
        return self._last_load.restore_component(component)

    def _report_needs(
        self, ctx: CheckpointLoadContext, source: Source | None, control: Coordinator
    ) -> None:
        """Report what local checkpoints will need of each node, before anything is touched."""
        if ctx.skip_load_to_model_and_opt:
            return

        def estimate(nodes: Sequence[int]) -> tuple[int, list[str]]:
            app, counters = app_state_of(ctx, control), ctx.state.train_state
            return self._snapshotter.estimate(app, counters, nodes, control)

        with collection_put_off():
            self._tiers.report_needs(source, estimate, control)

    def _compare(
        self,
        ctx: CheckpointLoadContext,
        selected: Selected,
        opened: Opened,
        control: Coordinator,
    ) -> Restoration:
        """Compare a checkpoint with the live state, on every rank, touching nothing."""
        self._snapshotter.expect_base(opened.contents, self._tiers.root)
        load = self._config.load
        takes_weights_only = selected.is_parent and load.pretrained.what == "weights"
        restoration = Restoration(
            opened,
            app_state_of(ctx, control),
            ctx.state.train_state,
            place_of(ctx, control),
            with_tensors=not ctx.skip_load_to_model_and_opt,
            overrides=None if takes_weights_only else Overrides.of(load.override, rng=load.rng),
            strategy=strategy_of(load, ctx),
            broadcast=load.broadcast and opened.contents.is_shared,
        )
        restoration.agree_on_shardings(control)
        if load.guard is not None:
            restoration.ask(Guard(load.guard), to_yaml(ctx.state.cfg), control)
        strict = load.strict if ctx.strict is None else ctx.strict
        restoration.compare(
            control,
            Strictness.of(strict),
            load.accept_data_restart,
            self._snapshotter.filter if selected.is_parent else None,
        )
        return restoration

    def _finish_load(
        self, selected: Selected, opened: Opened, restoration: Restoration, search: Search
    ) -> LoadResult:
        checkpoint, counters = opened.checkpoint, opened.contents.counters
        search.resume_from(selected, checkpoint)
        self._snapshotter.take_base(opened.contents, restoration.filled_names, self._tiers.root)
        goes_on = restoration.goes_on
        # A checkpoint that plain torch wrote has no counters: those of the loop stay as they are.
        has_counters = not restoration.takes_weights_only and bool(checkpoint.manifest.run_id)
        self._steps.note_load(checkpoint.iteration if has_counters else None)
        is_safe = selected.is_durable and selected.is_own
        self._alarm.begin(checkpoint.iteration if is_safe else None)
        operations = counters["num_floating_point_operations_so_far"]
        return LoadResult(
            iteration=checkpoint.iteration if goes_on else 0,
            num_floating_point_operations_so_far=operations if goes_on else 0,
            found=True,
            tier=checkpoint.manifest.tier,
            path=checkpoint.path,
            skipped=selected.skipped,
            sources=opened.contents.sources(),
            restored=restoration.restored,
            is_durable=selected.is_durable,
            is_pretrained=selected.is_parent,
        )

    # -- ranks -----------------------------------------------------------------------------------

    def _begin_call(
        self,
        stage: str,
        enter: Callable[[], Entry],
        admit: Callable[[], T],
        refusal: BaseException | None,
    ) -> T:
        in_use = [2] if self._draining.is_busy else []
        return self._channels.begin_call(stage, enter, admit, refusal, in_use)

    def _end_last_calls(self, *, drains: bool) -> BaseException | None:
        """Let what runs in the background end; return what this rank has to raise for it.

        It is raised after the ranks have met: the others may know nothing of a callback's error.
        """
        waits = [self._saving.wait, self._tiers.wait_restored]
        if drains:
            waits.insert(1, self._draining.wait)
        try:
            run_each(self.wait_staged, *(partial(each, self._channels.rank) for each in waits))
        except BaseException as error:  # noqa: BLE001  # raised by the caller
            return error
        return None

    def _refuse(self, stage: str, refusal: Exception) -> NoReturn:
        """Let the other ranks know that a call of theirs is refused here; raise it.

        They are not waited for longer than the deadline, and may make no such call at all.
        """
        if self._channels.world_size > 1:
            logger.error("%s", refusal)  # at once

            def enter(_: Call[None]) -> None:
                self._end_last_calls(drains=True)
                self._saver.agree_first("its last call was refused")
                self._begin_call(stage, lambda: (), lambda: None, refusal)

            self._caller.run("a refused call", enter, patience_seconds=0.0)
        raise refusal
