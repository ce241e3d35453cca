"""One job beside the training thread, and the step at which its outcome is acted on.

Owns the writer thread and the agreement on when every rank looks at what became of it. Promises
that all ranks act on an outcome at the same step, that a step without an outcome costs one local
look and no communication, that an outcome is handed out once, and that a job in flight is finished
when the program ends. Knows nothing of what the job does.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  # its own end of a program comes after ours
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

from holdfast.coordination import Coordinator
from holdfast.errors import CheckpointError, StageTimeoutError

T = TypeVar("T")


_in_flight: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@cache
def _wait_at_the_end() -> None:
    """Let the end of the program wait for jobs while thread pools still take work.

    Python closes those before it joins threads that are no daemons, and a save needs some.
    """
    with suppress(AttributeError, RuntimeError):  # unknown to this Python, or too late
        threading._register_atexit(_wait)  # type: ignore[attr-defined]  # as the pools do


def _wait() -> None:
    for thread in list(_in_flight):
        thread.join()


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """How a job ended: with a value, or with an error."""

    value: T | None = None
    error: BaseException | None = None


class Background(Generic[T]):
    """Runs one job at a time on a thread; every rank starts and polls in the same order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._polls = 0
        self._hold_at: int | None = None
        self._act_at = 0
        self._decided = threading.Event()
        self._thread: threading.Thread | None = None
        self._outcome: Outcome[T] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job was started whose outcome nobody has taken yet."""
        return self._thread is not None

    def start(self, work: Callable[[], T], coordinator: Coordinator) -> None:
        """Begin a job; the coordinator is its own while it runs, and agrees on its outcome."""
        assert self._thread is None, "the previous job's outcome was not taken"
        self._decided.clear()
        self._thread = threading.Thread(
            target=self._run,
            args=(work, coordinator),
            name="holdfast-writer",
            daemon=False,  # a save in flight is finished when the program ends
        )
        _wait_at_the_end()
        self._thread.start()
        _in_flight.add(self._thread)

    def poll(self) -> Outcome[T] | None:
        """Count one training step; return the outcome at the step at which all ranks act."""
        with self._lock:
            self._polls += 1
            step, hold_at = self._polls, self._hold_at
        if hold_at is None or step < hold_at:
            return None
        self._decided.wait()  # the other ranks' threads are naming their steps: no training needed
        return self._take() if step >= self._act_at else None

    def wait(self) -> Outcome[T] | None:
        """Wait for the job and return its outcome; None: no job. All ranks call it together."""
        if self._thread is None:
            return None
        return self._take()

    def _take(self) -> Outcome[T] | None:
        assert self._thread is not None
        self._thread.join()
        outcome, self._outcome = self._outcome, None
        self._thread = None
        self._hold_at = None
        return outcome

    def _run(self, work: Callable[[], T], coordinator: Coordinator) -> None:
        try:
            self._outcome = Outcome(value=work())
        except BaseException as error:  # noqa: BLE001  # handed to the training thread, never lost
            self._outcome = Outcome(error=error)
        with self._lock:
            # From here the training thread stops at the end of the step it is in, until all ranks
            # have said which step that is.
            in_progress = self._hold_at = self._polls + 1
        self._act_at = in_progress
        # Where ranks are missing, all have just waited for them in vain, and know: asking again
        # would keep the bad news for as long once more.
        try:
            if not isinstance(self._outcome.error, StageTimeoutError):
                with suppress(CheckpointError):  # the others are unreachable: act alone, and soon
                    self._act_at = max(coordinator.together("outcome", lambda: in_progress))
        finally:
            self._decided.set()  # whatever happened: the training thread may be waiting
