"""One job beside training, and the step at which all ranks act on its outcome.

Owns the writer thread and that agreement: the same step on all ranks, one local look and no
communication in a step without an outcome, each outcome handed out once. A rank's thread names a
step some steps ahead of the one that training is in; the outcome is acted on at the largest, and a
rank waits for the others only if it comes to the step that it named before that is known. What is
left to do once the outcome is known goes on beside training. A job in flight is finished when the
program ends. Does not know what the job does.
"""

from __future__ import annotations

import _thread
import concurrent.futures.thread  # noqa: F401  # its own end of a program comes after ours
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from holdfast.caller import end_calls
from holdfast.errors import CheckpointError, StageTimeoutError
from holdfast.ranks.coordinator import Coordinator

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TICK_SECONDS = 0.05
STEPS_AHEAD = 8
"""How many steps after the one in progress a rank names for an outcome to be acted on, where there
are other ranks: the time in which they agree, and no training waits."""


class _InFlight:
    """A job that the end of the program waits for, with a lock of C, which no interrupt breaks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = os.getpid()
        self.is_over = False
        self._over = _thread.allocate_lock()
        self._over.acquire()

    def end(self) -> None:
        _in_flight.discard(self)
        self.is_over = True
        self._over.release()

    def wait_a_little(self) -> None:
        self._over.acquire(timeout=_TICK_SECONDS)


_in_flight: set[_InFlight] = set()


@cache
def _wait_at_the_end() -> None:
    """Let the end of the program wait for jobs while thread pools still take work.

    Python closes those before it joins threads that are no daemons, and a save needs some.
    """
    register: Any = getattr(threading, "_register_atexit", None)
    with suppress(RuntimeError):  # too late
        if register is not None:  # else unknown to this Python
            register(_wait)


def _wait() -> None:
    """Finish what is in flight; one interrupt logs what is waited for, a second one ends it."""
    end_calls()  # a job may wait for the call that began it
    warned = False
    for job in list(_in_flight):
        while not job.is_over and job.process == os.getpid():
            try:
                job.wait_a_little()
            except KeyboardInterrupt:
                if warned:
                    logger.error("%s was abandoned at the end of the program", job.name)
                    return
                warned = True
                logger.warning(
                    "the program ends when %s is done; interrupt again to abandon it", job.name
                )


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """How a job ended: with a value, or with an error."""

    value: T | None = None
    error: BaseException | None = None


class DecidedError(Exception):
    """Raised by a job that has failed on all ranks, which have agreed on the step to act at."""

    def __init__(self, error: CheckpointError, act_at: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.act_at = act_at
        """A step as `Background.name_step` names them."""


class Background(Generic[T]):
    """Runs one job at a time on a thread; every rank starts and polls in the same order."""

    def __init__(self) -> None:
        self._polls = 0
        """Written by the training thread alone."""
        self._is_ending = False
        """Set before the job's thread looks at `_polls`, so that no step is missed. No lock: an
        interrupt of the training thread could leave it held."""
        self._hold_at = 0
        self._held = threading.Event()
        self._act_at = 0
        self._decided = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_thread: threading.Thread | None = None
        """Of the job before, which may still be doing what was left."""
        self._outcome: Outcome[T] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job was started whose outcome nobody has taken yet."""
        return self._thread is not None

    def start(
        self,
        work: Callable[[], T],
        coordinator: Coordinator,
        name: str = "a job",
        afterwards: Callable[[T], None] = lambda _: None,
    ) -> None:
        """Begin a job; the coordinator is its own while it runs, and agrees on its outcome.

        `afterwards`: what is left to do when ranks have agreed; nobody waits for it but the next
        job, and `finish`.
        """
        assert self._thread is None, "the previous job's outcome was not taken"
        self._decided.clear()
        self._held.clear()
        self._is_ending = False
        self._thread = threading.Thread(
            target=self._run,
            args=(work, coordinator, afterwards, _InFlight(name), self._last_thread),
            name="holdfast-writer",
            daemon=False,  # a save in flight is finished when the program ends
        )
        _wait_at_the_end()
        self._thread.start()

    @property
    def next_step(self) -> int:
        """The step that training is in, as the next call of `count_step` will count it."""
        return self._polls + 1

    def name_step(self) -> int:
        """Return the step at which this rank can act on a failure that others must hear of.

        Called on the job's thread; training waits at that step for the end of the job.
        """
        self._is_ending = True
        self._hold_at = self.next_step + STEPS_AHEAD
        self._held.set()
        return self._hold_at

    def count_step(self) -> bool:
        """Count one training step; return whether an outcome is there to be acted on soon."""
        self._polls += 1
        return self._is_ending

    def take_if_due(self) -> Outcome[T] | None:
        """Return the outcome if the step counted last is the one at which all ranks act."""
        if not self._is_ending:
            return None
        self._held.wait()
        if self._polls < self._hold_at:
            return None
        self._decided.wait()  # the other ranks' threads are naming their steps: no training needed
        return self._take() if self._polls >= self._act_at else None

    def poll(self) -> Outcome[T] | None:
        """Count one training step; return the outcome at the step at which all ranks act."""
        return self.take_if_due() if self.count_step() else None

    def wait(self) -> Outcome[T] | None:
        """Wait for the job and return its outcome; None: no job. All ranks call it together."""
        if self._thread is None:
            return None
        return self._take()

    def finish(self) -> None:
        """Wait for what was left to do after the last outcome."""
        if self._last_thread is not None:
            self._last_thread.join()
            self._last_thread = None

    def _take(self) -> Outcome[T] | None:
        assert self._thread is not None
        self._decided.wait()
        outcome, self._outcome = self._outcome, None
        self._is_ending = False
        self._last_thread, self._thread = self._thread, None
        return outcome

    def _run(
        self,
        work: Callable[[], T],
        coordinator: Coordinator,
        afterwards: Callable[[T], None],
        job: _InFlight,
        before: threading.Thread | None,
    ) -> None:
        _in_flight.add(job)
        try:
            if before is not None:
                before.join()
            value = self._work(work, coordinator)
            if value is not None:
                afterwards(value)
        finally:
            job.end()

    def _work(self, work: Callable[[], T], coordinator: Coordinator) -> T | None:
        """Do the work and agree on the step to act at; return its value, if it has one."""
        act_at: int | None = None
        outcome: Outcome[T]
        try:
            outcome = Outcome(value=work())
        except DecidedError as decided:
            outcome, act_at = Outcome(error=decided.error), decided.act_at
        except BaseException as error:  # noqa: BLE001  # handed to the training thread, never lost
            outcome = Outcome(error=error)
        self._outcome = outcome
        self._is_ending = True
        # Where ranks are missing, all have just waited for them in vain: asking again would delay
        # the report by the same time once more.
        asks = act_at is None and not isinstance(outcome.error, StageTimeoutError)
        if not self._held.is_set():
            # From here training stops at the step that is named, until all have named theirs.
            self._hold_at = self._polls + 1
            if asks and coordinator.world_size > 1:
                self._hold_at += STEPS_AHEAD
            self._held.set()
        named = self._hold_at
        self._act_at = named if act_at is None else act_at
        try:
            if asks:
                with suppress(CheckpointError):  # the others are unreachable: act alone, and soon
                    self._act_at = coordinator.all_reduce("outcome", lambda: named, _largest)
        finally:
            self._decided.set()  # whatever happened: the training thread may be waiting
        return outcome.value


def _largest(steps: list[int]) -> int:
    return max(steps)
