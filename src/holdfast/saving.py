"""Begin one save on all ranks, and hand it to the writer's thread.

Owns the two ways in which ranks begin a save. By agreement: they are admitted, plan if some state
has another structure than the last plan was made for, and stage, each step an exchange on the
training thread. By the last plan, once all ranks have completed a save together: each rank
compares its state with its own plan and stages, and the training thread sends nothing; the
writer's thread then finds out whether all ranks are in the same save, is admitted, and writes.
Promises that the ways never mix: where a rank cannot save by its plan, no rank writes, which is no
failure, all are told at the same step, and the next save is agreed on. Which calls are allowed is
decided by the manager, where bytes go by the tiers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

from holdfast.caller import Call, Gate
from holdfast.config import CheckpointConfig
from holdfast.errors import (
    CheckpointError,
    ReplicaMismatchError,
    SaveAbandonedError,
    SaveGivenUpError,
    StageFailedError,
    StageTimeoutError,
)
from holdfast.events import ON_CHECKPOINT_STAGED
from holdfast.protocol import CheckpointSaveContext
from holdfast.ranks.background import DecidedError
from holdfast.ranks.channels import Channels
from holdfast.ranks.entry import Arrival, Entry, OthersDifferError
from holdfast.ranks.job import Committed, Flight, Save
from holdfast.ranks.single import SingleProcess
from holdfast.snapshot.shard import PlanChangedError
from holdfast.snapshotting import Snapshotter, collection_put_off
from holdfast.state.app import AppState
from holdfast.tiers.persistent import Admission
from holdfast.tiers.routing import Begun, Route, Tiers
from holdfast.tiers.tier import Reserved, Snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a save is asked for with, and what the manager says to it."""

    ctx: CheckpointSaveContext
    save: Save
    call: Call[Any]
    app: Callable[[], AppState]
    check: Callable[[], Entry]
    """Returns what this rank is in, or refuses it."""
    check_alarm: Callable[[], None]
    """Refuses it on rank 0, whose clock counts."""
    refusal: BaseException | None
    """What this rank has to raise all the same."""


class Saver:
    """Begins the saves of one manager, one at a time."""

    def __init__(
        self,
        config: CheckpointConfig,
        channels: Channels,
        tiers: Tiers,
        snapshotter: Snapshotter,
        flight: Flight,
        drain: Flight,
    ) -> None:
        """`flight`: of saves; `drain`: of copies from the local to the persistent tier."""
        self._config = config
        self._channels = channels
        self._tiers = tiers
        self._snapshotter = snapshotter
        self._flight = flight
        self._drain = drain
        self._why_agree = "it has completed no save"
        """Why this rank cannot save by its plan; empty: it can."""
        self._given_up: tuple[CheckpointSaveContext, Save] | None = None

    def agree_first(self, reason: str) -> None:
        """Let the next save be agreed on; `reason`: of this rank, as others are told it."""
        self._why_agree = reason
        self._snapshotter.compare_all(is_loaded=True)

    def note_commit(self, iteration: int, tier: str) -> None:
        """Nothing: what follows from a commit is noted where its copies are known."""

    def note_failure(self, iteration: int, tier: str, error: BaseException) -> None:
        """Let the next save be agreed on, as after any failure."""
        self._why_agree = "the save before failed"
        self._snapshotter.compare_all()

    def take_given_up(self, iteration: int) -> tuple[CheckpointSaveContext, Save] | None:
        """Return the last save if it was given up, and training has not gone on since; once."""
        given_up, self._given_up = self._given_up, None
        if given_up is None or given_up[0].state.train_state.step != iteration:
            return None
        return given_up if given_up[1].event.iteration == iteration else None

    def save(self, request: Request) -> None:
        """Save; return when training may change what is saved."""
        self._given_up = None
        entry = self._check(request)
        if entry is None or not self._save_by_plan(request, entry):
            self._save_by_agreement(request)

    def _check(self, request: Request) -> Entry | None:
        """Return what this rank is in, if it can save by its plan as far as is known yet."""
        if request.refusal is not None or self._why_agree:
            return None
        try:
            entry = request.check()
            if self._channels.rank == 0:
                request.check_alarm()
        except CheckpointError as error:
            self._why_agree = str(error)  # raised again, and then told to all
            return None
        self._why_agree = self._tiers.why_agree()
        return None if self._why_agree else entry

    def _save_by_agreement(self, request: Request) -> None:
        ctx, save, config = request.ctx, request.save, self._config
        control, writer, _ = self._channels.open()
        gate, to_local = Gate(), ctx.non_persistent_ckpt
        confirm = gate.wait if config.async_save else lambda: save.confirm(request.call)

        def admit() -> Admission:  # on rank 0, whose clock counts
            request.check_alarm()
            return self._tiers.admit()

        try:
            admission = self._channels.begin_call(
                "admit",
                request.check,
                admit,
                request.refusal,
                self._in_use,
                reason=self._why_agree,
                act_at=self._flight.next_step,
            )
            if config.async_save:
                control.expect_alike()  # from here on some rank may have completed this save
            self._tiers.follow(admission, control, to_local=to_local)
            with collection_put_off():
                snapshot, reserved = self._snapshotter.take(ctx, request.app(), control, confirm)
        except DecidedError as decided:
            given_up = decided
            self._start(request, lambda: _raise(given_up))
            return
        except (StageFailedError, ReplicaMismatchError) as error:
            if error is request.refusal:
                raise
            self._flight.fail(save, error, control.rank)
            return
        route = self._tiers.route(reserved, local_only=to_local)

        def write() -> Committed:
            return self._tiers.write(snapshot, route, writer)

        if not config.async_save:
            self._flight.run(save, write, control.rank)
            return
        self._start(request, write, snapshot if route.is_promoted else None)
        self._finish_copy(snapshot, request, gate)

    def _save_by_plan(self, request: Request, entry: Entry) -> bool:
        """Save without a request on this thread; False: the state needs another plan."""
        ctx, alone, gate = request.ctx, SingleProcess(self._channels.rank), Gate()
        taken: tuple[Snapshot, Reserved] | None = None
        failure: CheckpointError | None = None
        try:
            with collection_put_off():
                taken = self._snapshotter.take(ctx, request.app(), alone, gate.wait, plans=False)
        except PlanChangedError as changed:
            self._why_agree = str(changed)
            return False
        except CheckpointError as error:
            failure = error
        except BaseException as ending:  # SystemExit, say: the others must not wait for this rank
            self._channels.begin_call("capture", lambda: (), lambda: None, ending, self._in_use)
            raise
        if taken is None:
            assert failure is not None
            cause = failure
            self._start(request, lambda: self._report(cause))
            return True
        in_use = self._in_use
        snapshot, reserved = taken
        route = self._tiers.route(reserved, local_only=ctx.non_persistent_ckpt)

        def write() -> Committed:
            way, begun = self._enter(request, entry, snapshot, route, in_use)
            return self._tiers.write(snapshot, way, self._channels.open()[1], begun)

        self._start(request, write, snapshot if route.is_promoted else None)
        self._finish_copy(snapshot, request, gate)
        return True

    def _finish_copy(self, snapshot: Snapshot, request: Request, gate: Gate) -> None:
        save = request.save
        try:
            self._snapshotter.finish(snapshot)  # while the thread prepares to write
            save.confirm(request.call)
        except SaveAbandonedError as error:
            gate.fail(error)  # and is reported with the outcome
            return
        except BaseException:
            gate.fail(SaveAbandonedError(save.name))
            raise
        gate.open()  # from here on training may change everything
        save.event.stall_seconds = time.monotonic() - save.started
        save.fire(ON_CHECKPOINT_STAGED)

    def _start(
        self,
        request: Request,
        work: Callable[[], Committed],
        promoted: Snapshot | None = None,
    ) -> None:
        """Do the work on the writer's thread; `promoted`: the snapshot that is drained later."""
        save = request.save
        _, writer, drainer = self._channels.open()

        def land(committed: Committed) -> None:
            if self._channels.world_size > 1:
                self._why_agree = "the local copy of its last save failed"
                if not committed.lacks_copy:
                    self._why_agree = ""
            if promoted is not None:
                promotion = self._tiers.promote(promoted, committed, drainer)
                if promotion is not None:
                    self._drain.start(save.continued_in(promotion.tier), promotion.work, drainer)

        def give_up() -> None:
            self._given_up = request.ctx, save

        self._flight.start(save, work, writer, land, give_up)

    # -- on the writer's thread --------------------------------------------------------------------

    def _enter(
        self,
        request: Request,
        entry: Entry,
        snapshot: Snapshot,
        route: Route,
        in_use: Collection[int],
    ) -> tuple[Route, Begun]:
        """Find out whether all ranks are in this save and have staged it; begin it on rank 0.

        Raises:
            DecidedError: they are not, and know the step at which all act on that.
            CheckpointError: on every rank: the save was refused, or ranks did not come.
        """
        rank0 = SingleProcess()

        def admit(way: Route) -> Begun:
            def admit_job() -> None:
                request.check_alarm()
                self._tiers.admit()

            rank0.broadcast("admit", admit_job)
            return rank0.broadcast("begin", lambda: self._tiers.begin(snapshot.iteration, way))

        control = self._channels.open()[0]
        plan = snapshot.shard.plan.identity
        expected = (*entry, plan.hex(), f"copy={route.to_local}")
        way = route
        try:
            begun = control.begin_alike("admit", expected, lambda: admit(route))
        except OthersDifferError:
            own = Arrival(
                ("value", entry),
                "admit",
                in_background=True,
                act_at=self._flight.name_step(),
                plan=plan,
                has_copy=route.to_local,
            )
            way, begun = self._tell(own, None, route, admit)
        except CheckpointError as error:
            self._note_refusal(error)
            raise
        self._channels.follow(in_use)
        return way, begun

    def _report(self, error: CheckpointError) -> NoReturn:
        """Tell the other ranks that this one could not stage."""
        stage, outcome = "stage", ("ours", cast(Any, error))
        if isinstance(error, StageFailedError):
            stage, outcome = error.stage, ("failure", error.failures[0])
        self._note_refusal(error)
        with suppress(StageTimeoutError):  # then this rank's own error says more
            self._channels.open()[0].decline("admit", None)
            act_at = self._flight.name_step()
            own = Arrival(outcome, stage, in_background=True, act_at=act_at)
            self._tell(own, error, None, None)
        raise error

    def _tell(
        self,
        own: Arrival,
        cause: CheckpointError | None,
        route: Route | None,
        admit: Callable[[Route], Begun] | None,
    ) -> tuple[Route, Begun]:
        """Begin the call with everyone's arrival, while training goes on."""

        def admit_all(have_copies: bool) -> tuple[Route, Begun]:
            assert route is not None
            assert admit is not None
            way = route if have_copies else replace(route, to_local=False, is_promoted=False)
            return way, admit(way)

        ruling = self._channels.open()[0].begin_as("admit", own, cause, admit_all)
        if ruling.error is None:
            return ruling.unpack()
        self._note_refusal(ruling.error)
        if ruling.act_at is None:
            raise ruling.error
        raise DecidedError(ruling.error, ruling.act_at) from cause

    def _note_refusal(self, error: CheckpointError) -> None:
        """Let an error that refuses the save, rather than one that a stage had, be raised."""
        if not isinstance(error, StageFailedError | SaveGivenUpError):
            self._flight.refuse(error)

    @property
    def _in_use(self) -> list[int]:
        """Numbers of channels on which a job communicates; they stay in their call."""
        return [2] if self._drain.is_busy else []


def _raise(error: BaseException) -> NoReturn:
    raise error
