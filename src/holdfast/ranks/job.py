"""A save in flight, and how its outcome is reported.

`Save` is one save with its listener and its event, and fires events. `Flight` owns the save in
flight and reports its outcome once, on all ranks at the same step (`background`): first the event,
then the error if there is one; `FailureRule` decides whether that is raised or only logged. None of
them knows what the job does.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from holdfast.caller import Call, CallerLeftError
from holdfast.config import CheckpointConfig
from holdfast.errors import (
    CheckpointError,
    RankFailure,
    SaveAbandonedError,
    SaveFailedError,
    SaveGivenUpError,
    StageFailedError,
    StoreIdentityError,
)
from holdfast.events import (
    ON_CHECKPOINT_SAVE,
    ON_CHECKPOINT_SAVE_FAILED,
    CallbackManager,
    CheckpointEvent,
)
from holdfast.messages import describe_size
from holdfast.protocol import CheckpointSaveContext
from holdfast.ranks.background import Background as Background
from holdfast.ranks.background import Outcome as Outcome
from holdfast.ranks.coordinator import Coordinator
from holdfast.storage.manifest import LOCAL, PERSISTENT

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a pass has come; another thread may read it at any time."""

    total_bytes: int = 0
    written_bytes: int = 0
    started: float = 0.0
    """By `time.monotonic`; 0: not yet."""

    @property
    def bytes_per_second(self) -> float:
        """The mean rate since the start; 0 before."""
        seconds = time.monotonic() - self.started
        return self.written_bytes / seconds if self.started and seconds > 0 else 0.0

    def begin(self, total_bytes: int) -> None:
        """Start from nothing."""
        self.total_bytes, self.written_bytes = total_bytes, 0
        self.started = time.monotonic()


@dataclass(frozen=True)
class Committed:
    """A save that succeeded."""

    path: Path
    size_bytes: int
    removed_iterations: tuple[int, ...]
    """What retention removed afterwards."""
    tier: str = PERSISTENT
    copies: tuple[str, ...] = ()
    """Other tiers that the same save was committed to before."""
    lacks_copy: bool = False
    """Whether a copy in another tier failed."""
    afterwards: Callable[[], None] = lambda: None
    """What this rank has left to do when the outcome is known, such as removing files."""


@dataclass
class Save:
    """One save, until its outcome is reported."""

    callback_manager: Any | None
    event: CheckpointEvent
    started: float
    """By `time.monotonic`."""

    @classmethod
    def of(cls, ctx: CheckpointSaveContext, callback_manager: Any | None) -> Save:
        """Return the save that a context asks for, which starts now."""
        event = CheckpointEvent(
            iteration=ctx.state.train_state.step,
            tier=LOCAL if ctx.non_persistent_ckpt else PERSISTENT,
            state=ctx.state,
            model=ctx.model,
            optimizer=ctx.optimizer,
            scheduler=ctx.opt_param_scheduler,
        )
        return cls(callback_manager, event, time.monotonic())

    def continued_in(self, tier: str) -> Save:
        """Return the same save, on its way to another tier; the loop has gone on meanwhile."""
        return Save(self.callback_manager, replace(self.event, tier=tier), self.started)

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"the save of iteration {self.event.iteration}"

    def confirm(self, call: Call[Any]) -> None:
        """Return if the caller has kept away from live state until now.

        Raises:
            SaveAbandonedError: it may not have.
        """
        try:
            call.confirm()
        except CallerLeftError:
            raise SaveAbandonedError(self.name) from None

    def fire(self, event_name: str) -> None:
        """Fire an event at the listener of this save, where it has one that knows it."""
        # Other callback managers than ours know Megatron-Bridge's event only.
        listener = self.callback_manager
        if isinstance(listener, CallbackManager) or (
            listener is not None and event_name == ON_CHECKPOINT_SAVE
        ):
            listener.fire(event_name, self.event)


class FailureRule:
    """Decide which failure in a row ends the run; each tier has a count of its own.

    Local saves are frequent: if their successes reset the count of persistent failures, a full
    disk would never end a run that saves to both tiers.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._raises = config.on_save_failure == "raise"
        self._limit = config.save_failure_limit
        self._in_a_row: Counter[str] = Counter()

    def note_success(self, tiers: Sequence[str]) -> None:
        """Reset the counts of the tiers to which a save was committed."""
        for tier in tiers:
            self._in_a_row[tier] = 0

    def judge(self, error: CheckpointError, cause: BaseException, tier: str) -> None:
        """Warn of a failed save to a tier, or raise its error."""
        self._in_a_row[tier] += 1
        count = self._in_a_row[tier]
        spent = self._limit is not None and count >= self._limit
        overtaken = isinstance(error, StoreIdentityError)  # no later save can succeed
        if self._raises or overtaken:
            raise error from cause
        if spent:
            # Not with the advice of the other lines: to set what is set.
            first = error.message.splitlines()[0]
            error.message = (
                f"{first}\nIt changed no earlier checkpoint. This is failure {count} in a row "
                f"of saves to the {tier} tier; checkpoint.save_failure_limit is {self._limit}."
            )
            raise error from cause
        limit = "without a limit" if self._limit is None else f"the run ends at {self._limit}"
        first_line = str(error).splitlines()[0]  # the others advise what is set already
        logger.warning("%s (%s tier: failure %d in a row, %s)", first_line, tier, count, limit)


class Watcher(Protocol):
    """Is given every outcome before callbacks are."""

    def note_commit(self, iteration: int, tier: str) -> None: ...
    def note_failure(self, iteration: int, tier: str, error: BaseException) -> None: ...


class Flight:
    """At most one save whose outcome is not reported yet; every rank makes the same calls."""

    def __init__(self, rule: FailureRule, watchers: Sequence[Watcher] = ()) -> None:
        self._rule = rule
        self._watchers = watchers
        self._background: Background[Committed] = Background()
        self._save: Save | None = None
        self._landed: Callable[[Committed], None] | None = None
        self._given_up: Callable[[], None] | None = None
        self._refusal: CheckpointError | None = None
        """What refused the save in flight: raised whatever the policy for failures is."""

    @property
    def is_busy(self) -> bool:
        """Whether there is one."""
        return self._background.is_busy

    @property
    def save(self) -> Save | None:
        """The save in flight; None: there is none."""
        return self._save

    def describe(self, progress: Progress | None) -> str | None:
        """Say how long a persistent save has been in flight, and how far it came; None: it is not.

        `progress`: of rank 0's shard, where that is known.
        """
        save = self._save
        if save is None or save.event.tier != PERSISTENT:
            return None
        far = ""
        if progress is not None and (total := progress.total_bytes):
            written = describe_size(progress.written_bytes, total)
            far = f", {written} of {describe_size(total)} of rank 0's shard written"
        return f"{save.name} is in flight for {time.monotonic() - save.started:.0f} s{far}"

    def start(
        self,
        save: Save,
        work: Callable[[], Committed],
        coordinator: Coordinator,
        landed: Callable[[Committed], None] | None = None,
        given_up: Callable[[], None] | None = None,
    ) -> None:
        """Do the work on a thread; `landed` hears of what it committed before anybody else.

        `given_up`: called if the save was given up, and did not fail.
        """
        self._save, self._landed, self._given_up, self._refusal = save, landed, given_up, None
        self._background.start(work, coordinator, save.name, lambda each: each.afterwards())

    @property
    def next_step(self) -> int:
        """The step that training is in; see `Background.next_step`."""
        return self._background.next_step

    def name_step(self) -> int:
        """Name the step at which this rank can act on a failure; see `Background.name_step`."""
        return self._background.name_step()

    def refuse(self, error: CheckpointError) -> None:
        """Note, on the job's thread, that this error refuses the save: no policy lives with it."""
        self._refusal = error

    def finish(self) -> None:
        """Wait for what was left to do after the last outcome."""
        self._background.finish()

    def run(self, save: Save, work: Callable[[], Committed], rank: int) -> None:
        """Do the work here and tell of it.

        Raises:
            CheckpointError: it failed, and the run does not live with that.
        """
        self._save, self._landed, self._given_up, self._refusal = save, None, None, None
        try:
            outcome = Outcome(value=work())
        except CheckpointError as error:
            outcome = Outcome(error=error)
        save.event.stall_seconds = time.monotonic() - save.started
        try:
            self._tell(outcome, rank)
        finally:
            if outcome.value is not None:
                outcome.value.afterwards()

    def fail(self, save: Save, error: CheckpointError, rank: int) -> None:
        """Tell of a save that did not come as far as its work; raises as `run`."""
        self._save, self._landed, self._given_up, self._refusal = save, None, None, None
        self._tell(Outcome(error=error), rank)

    def wait(self, rank: int) -> None:
        """Wait for the save in flight, if there is one, and tell of it; raises as `run`."""
        self._tell(self._background.wait(), rank)

    def count_step(self) -> bool:
        """Count one training step; return whether `tell_if_due` has something to look at."""
        return self._background.count_step()

    def tell_if_due(self, rank: int) -> None:
        """Tell of the save in flight if this is the step at which all ranks do; raises as `run`."""
        self._tell(self._background.take_if_due(), rank)

    def _tell(self, outcome: Outcome[Committed] | None, rank: int) -> None:
        save, landed, given_up = self._save, self._landed, self._given_up
        if outcome is None or save is None:
            return
        self._save = self._landed = self._given_up = None
        event = save.event
        event.total_seconds = time.monotonic() - save.started
        if outcome.value is not None:
            self._rule.note_success((outcome.value.tier, *outcome.value.copies))
            event.tier = outcome.value.tier
            for each in self._watchers:
                each.note_commit(event.iteration, event.tier)
            event.path = str(outcome.value.path)
            event.size_bytes = outcome.value.size_bytes
            event.removed_iterations = outcome.value.removed_iterations
            if landed is not None:
                landed(outcome.value)
            save.fire(ON_CHECKPOINT_SAVE)
            return
        assert outcome.error is not None
        event.error = _as_save_failure(event.iteration, outcome.error, rank)
        for watcher in self._watchers:
            watcher.note_failure(event.iteration, event.tier, event.error)
        save.fire(ON_CHECKPOINT_SAVE_FAILED)
        if isinstance(event.error, SaveGivenUpError):
            if rank == 0:  # every rank has the same
                logger.warning("%s", event.error)
            if given_up is not None:
                given_up()
            return
        if self._refusal is not None:
            raise event.error from outcome.error
        self._rule.judge(event.error, outcome.error, event.tier)


def _as_save_failure(iteration: int, error: BaseException, rank: int) -> CheckpointError:
    """Name the save that failed; an error that speaks for itself stays what it is."""
    if isinstance(error, StageFailedError):
        return SaveFailedError(iteration, error.stage, error.failures)
    if isinstance(error, CheckpointError):
        return error
    return SaveFailedError(iteration, "write", [RankFailure.of(rank, error)])
