"""One job beside the training thread, and the step at which its outcome is acted on.

Owns the writer thread and the agreement on when every rank looks at what became of it. Promises
that all ranks act on an outcome at the same step, that a step without an outcome costs one local
look and no communication, that an outcome is handed out once, and that a job in flight is finished
when the program ends. Knows nothing of what the job does.
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
from holdfast.coordination import Coordinator
from holdfast.errors import CheckpointError, StageTimeoutError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TICK_SECONDS = 0.05


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
    """Finish what is in flight; one interrupt is told what it waits for, a second one ends it."""
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


class Background(Generic[T]):
    """Runs one job at a time on a thread; every rank starts and polls in the same order."""

    def __init__(self) -> None:
        self._polls = 0
        """Written by the training thread alone."""
        self._is_ending = False
        """Set before the job's thread looks at `_polls`, so that no step slips past it: this takes
        the place of a lock, which an interrupt of the training thread could leave held."""
        self._hold_at = 0
        self._held = threading.Event()
        self._act_at = 0
        self._decided = threading.Event()
        self._thread: threading.Thread | None = None
        self._outcome: Outcome[T] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job was started whose outcome nobody has taken yet."""
        return self._thread is not None

    def start(self, work: Callable[[], T], coordinator: Coordinator, name: str = "a job") -> None:
        """Begin a job; the coordinator is its own while it runs, and agrees on its outcome."""
        assert self._thread is None, "the previous job's outcome was not taken"
        self._decided.clear()
        self._held.clear()
        self._is_ending = False
        self._thread = threading.Thread(
            target=self._run,
            args=(work, coordinator, _InFlight(name)),
            name="holdfast-writer",
            daemon=False,  # a save in flight is finished when the program ends
        )
        _wait_at_the_end()
        self._thread.start()

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

    def _take(self) -> Outcome[T] | None:
        assert self._thread is not None
        self._thread.join()
        outcome, self._outcome = self._outcome, None
        self._is_ending = False
        self._thread = None
        return outcome

    def _run(self, work: Callable[[], T], coordinator: Coordinator, job: _InFlight) -> None:
        _in_flight.add(job)
        try:
            self._work(work, coordinator)
        finally:
            job.end()

    def _work(self, work: Callable[[], T], coordinator: Coordinator) -> None:
        try:
            self._outcome = Outcome(value=work())
        except BaseException as error:  # noqa: BLE001  # handed to the training thread, never lost
            self._outcome = Outcome(error=error)
        # From here the training thread stops at the end of the step it is in, until all ranks have
        # said which step that is.
        self._is_ending = True
        in_progress = self._hold_at = self._polls + 1
        self._held.set()
        self._act_at = in_progress
        # Where ranks are missing, all have just waited for them in vain, and know: asking again
        # would keep the bad news for as long once more.
        try:
            if not isinstance(self._outcome.error, StageTimeoutError):
                with suppress(CheckpointError):  # the others are unreachable: act alone, and soon
                    self._act_at = max(coordinator.together("outcome", lambda: in_progress))
        finally:
            self._decided.set()  # whatever happened: the training thread may be waiting
