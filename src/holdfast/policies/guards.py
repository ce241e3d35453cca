"""Guards of a run: saves that go back in steps, and too long without a checkpoint.

`StepOrder` refuses a save whose step is below the step last loaded or saved: a loop that forgot its
counter would otherwise supersede the newest checkpoints, and retention would delete them. Saving
the same step again is allowed; a failed save does not raise the step; a load sets it.

`Alarm` detects that nothing was committed to the persistent tier for too long, and decides the
known reason and the time of the next warning. With `on_save_failure=warn`, a save that hangs, or
local saves only, a run would otherwise train for days with nothing durable. Rank 0 decides, since
clocks of ranks differ. A training step reads the clock at most once. Neither knows about files.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from holdfast.errors import CheckpointOverdueError, StepRewoundError
from holdfast.events import ON_CHECKPOINT_OVERDUE, CallbackManager, OverdueEvent


class StepOrder:
    """The lowest step that a later save of one manager may have."""

    def __init__(self, *, allow_rewind: bool) -> None:
        self._allow_rewind = allow_rewind
        self._reached: int | None = None
        self._origin = ""

    def note_load(self, iteration: int | None) -> None:
        """Set the step to the one loaded; None: nothing was loaded, or it has no step."""
        self._reached, self._origin = iteration, "loaded"

    def note_commit(self, iteration: int, tier: str) -> None:
        """Raise the step to that of a committed save; a drain may commit an older one later."""
        if self._reached is None or iteration >= self._reached:
            self._reached, self._origin = iteration, "saved"

    def note_failure(self, iteration: int, tier: str, error: BaseException) -> None:
        """Ignore it: what was not committed cannot be lost."""

    def check(self, step: object) -> None:
        """Refuse a step below the one reached; other types than int are checked elsewhere.

        Raises:
            StepRewoundError: with both steps.
        """
        if self._allow_rewind or self._reached is None or type(step) is not int:
            return
        if step < self._reached:
            raise StepRewoundError(step, self._reached, self._origin)


logger = logging.getLogger(__name__)

INTERVALS = 3
"""The limit in intervals between saves, if none is configured."""
SHORTEST_LIMIT_SECONDS = 60.0
"""Lower bound of a measured limit: saves may be only seconds apart."""
_KEPT_INTERVALS = 5


def find_limit(after_seconds: float | None, intervals: Sequence[float]) -> float:
    """Return after how many seconds a commit is overdue; infinite: not known yet.

    `intervals`: the latest seconds between persistent saves. The longest counts, so that a single
    extra save does not shorten the limit.
    """
    if after_seconds is not None:
        return after_seconds
    if not intervals:
        return math.inf
    return max(INTERVALS * max(intervals), SHORTEST_LIMIT_SECONDS)


class Alarm:
    """The time since the last durable commit of one manager."""

    def __init__(
        self, after_seconds: float | None, *, stops: bool, clock: Callable[[], float]
    ) -> None:
        self._after_seconds = after_seconds
        self._stops = stops
        self._clock = clock
        self._intervals: deque[float] = deque(maxlen=_KEPT_INTERVALS)
        self._asked_at: float | None = None
        self._is_asked = False
        """Whether a persistent save was requested since the last durable commit."""
        self._since: float | None = None
        """Time of the last durable commit or of the end of the load; None: not watching."""
        self._iteration: int | None = None
        self._failure: BaseException | None = None
        self._warnings = 0
        self._due = math.inf
        """Time of the next warning."""
        self.listener: Any | None = None
        """The callback manager of the latest save that had one."""

    def begin(self, iteration: int | None = None) -> None:
        """Start watching; `iteration`: that of the newest durable checkpoint, if known."""
        self._since, self._iteration = self._clock(), iteration
        self._asked_at, self._is_asked = None, False
        self._failure, self._warnings = None, 0
        self._set_due()

    def end(self) -> None:
        """Stop watching, until the next load or save."""
        self._since, self._due = None, math.inf
        self.listener = None

    def note_save(self, *, is_persistent: bool) -> None:
        """Note that a save was requested, after earlier ones have ended."""
        if self._since is None:
            self.begin()
        if is_persistent:
            now = self._clock()
            if self._asked_at is not None:
                self._intervals.append(now - self._asked_at)
            self._asked_at, self._is_asked = now, True
            self._set_due()

    def note_commit(self, iteration: int, tier: str) -> None:
        """Restart the measurement if the commit is durable."""
        if tier == "persistent":
            self._since, self._iteration = self._clock(), iteration
            self._is_asked, self._failure, self._warnings = False, None, 0
            self._set_due()

    def note_failure(self, iteration: int, tier: str, error: BaseException) -> None:
        """Keep the latest failure: it is the likely reason."""
        if tier == "persistent":
            self._failure = error

    def is_due(self) -> bool:
        """Whether a warning is due now; call it once per step."""
        return self._due < math.inf and self._clock() >= self._due

    def describe(self, in_flight: str | None) -> OverdueEvent:
        """Return the event of a warning and double the time to the next one.

        `in_flight`: a description of the uncommitted persistent save; None: there is none.
        """
        event = self._find(in_flight)
        while self._due <= self._clock():
            self._warnings += 1
            self._set_due()
        return event

    def warn(self, in_flight: str | None, store: str, rank: int) -> None:
        """Warn on rank 0 if a warning is due, and fire the event at the listener."""
        if not self.is_due():
            return
        event = self.describe(in_flight)
        if rank != 0:
            return
        last = "none since the load" if event.iteration is None else f"iteration {event.iteration}"
        logger.warning(
            "No checkpoint was committed to %s for %.0f s (the last: %s), and it may take %.0f s: "
            "%s.\nThis is repeated after twice the time%s. checkpoint.alarm_after_seconds sets the "
            "limit; inf turns the alarm off.",
            store,
            event.seconds,
            last,
            event.limit_seconds,
            event.reason,
            ", and the next save stops the run" if self._stops else "",
        )
        if isinstance(self.listener, CallbackManager):
            self.listener.fire(ON_CHECKPOINT_OVERDUE, event)

    def check(self, in_flight: str | None, *, is_persistent: bool) -> None:
        """Refuse a save if a commit is overdue and the run is to stop.

        A persistent save is allowed unless one has failed since the last commit: it is what the
        alarm demands.

        Raises:
            CheckpointOverdueError: on rank 0, which broadcasts the outcome of the stage.
        """
        if not self._stops or self._since is None or (is_persistent and self._failure is None):
            return
        event = self._find(in_flight)
        if event.seconds >= event.limit_seconds:
            raise CheckpointOverdueError(event.seconds, event.iteration, event.reason)

    def _find(self, in_flight: str | None) -> OverdueEvent:
        assert self._since is not None
        reasons = []
        if self._failure is not None:
            first_line = (str(self._failure) or type(self._failure).__name__).splitlines()[0]
            reasons.append(first_line.rstrip("."))
        if in_flight is not None:
            reasons.append(in_flight)
        if not reasons:
            reasons.append(
                "the last requested save has not begun"
                if self._is_asked
                else "no save to the persistent tier was requested since"
            )
        return OverdueEvent(
            seconds=self._clock() - self._since,
            limit_seconds=find_limit(self._after_seconds, self._intervals),
            iteration=self._iteration,
            reason="; ".join(reasons),
            last_failure=self._failure,
        )

    def _set_due(self) -> None:
        assert self._since is not None
        limit = find_limit(self._after_seconds, self._intervals)
        self._due = self._since + limit * 2**self._warnings
