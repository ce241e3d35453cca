"""Run a manager's calls on a thread that no signal handler interrupts, while the caller waits.

Python runs signal handlers on the main thread, between any two instructions: Ctrl-C, or a handler
that raises, could otherwise leave a save half staged, a lock held or an outcome lost. Owns the
thread of one call, the wait of its caller, and the check whether the caller still waits. Promises
that a call which has begun runs to its end; that an interrupt is raised when the call has ended, or
after a short patience; that a caller that stopped waiting early is detected without its help, so
that nothing which relies on its waiting is trusted; and that the next call begins only when the
last one has ended. The caller's thread uses no lock that an interrupt could leave held. Modes of
the caller's thread (autograd, default device) do not apply to the call; context variables and the
CUDA device and streams do.

The threads of a manager: `holdfast-call` runs the body of each call (here); `holdfast-writer`
writes a save, promotes a local commit or rewrites lost shards (`ranks.job`); `holdfast-staging` and
its helpers copy tensors (`snapshot.copy`); pools write, digest, read and exchange blocks
(`snapshot.shard`, `read.direct`, `tiers.local.exchange`, `tiers.local.peers`). The caller's own
thread checks arguments, counts steps and waits. Callbacks run on `holdfast-call`.

`in_normal_mode` is for tensors that outlive a call: one created in inference mode can never be
changed in place outside it. Default dtype, default device, autocast and determinism need no guard:
what is created here names its dtype and device and computes nothing.
"""

from __future__ import annotations

import _thread
import concurrent.futures.thread  # noqa: F401  # imported first: its exit hook runs after ours
import contextvars
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any, Generic, ParamSpec, TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

THREAD_NAME = "holdfast-call"
"""Name of the thread of a call, on which callbacks and hooks run."""
_TICK_SECONDS = 0.05
"""The longest delay for a waiting thread whose wake-up was lost to an interrupt."""

_unfinished: set[Call[Any]] = set()


class CallerLeftError(Exception):
    """The caller of a call was interrupted and no longer waits for it."""


_current: contextvars.ContextVar[Call[Any] | None] = contextvars.ContextVar("call", default=None)


def stop_if_left() -> None:
    """End long work whose caller no longer waits; called regularly during a load.

    Raises:
        CallerLeftError: the next call, or the program's exit, waits for this call to end.
    """
    call = _current.get()
    if call is not None and call.is_given_up:
        raise CallerLeftError("nobody waits for it any more")


class Gate:
    """A one-time signal (continue or fail) from the thread of a call to its worker threads."""

    def __init__(self) -> None:
        self._decided = threading.Event()
        self._error: Exception | None = None

    def open(self) -> None:
        """Let the waiting threads continue."""
        self._decided.set()

    def fail(self, error: Exception) -> None:
        """Let the waiting threads fail, unless the gate is already open."""
        if not self._decided.is_set():
            self._error = error
            self._decided.set()

    def wait(self) -> None:
        """Wait until the gate is open; raise the error it failed with."""
        self._decided.wait()
        if self._error is not None:
            raise self._error


class Call(Generic[T]):
    """One call, shared between its thread and its caller."""

    def __init__(self, name: str, work: Callable[[Call[T]], T]) -> None:
        self.name = name
        self.is_done = False
        self.error: BaseException | None = None
        self.process = os.getpid()
        self._work: Callable[[Call[T]], T] | None = work
        self._value: T | None = None
        self._asks = False
        self._is_answered = False
        self.is_given_up = False
        self._context = contextvars.copy_context()
        self._on_device = _devices_of_caller()
        # C-level locks: on an interrupt each is acquired or not, never in between.
        self._claim = _thread.allocate_lock()
        self._caller_wakes = _thread.allocate_lock()
        self._thread_wakes = _thread.allocate_lock()
        self._caller_wakes.acquire()
        self._thread_wakes.acquire()

    # -- on its thread ---------------------------------------------------------------------------

    def confirm(self) -> None:
        """Return once the caller is known to be waiting, so that it has changed nothing until now.

        Raises:
            CallerLeftError: it no longer waits; what relies on its waiting cannot be trusted.
        """
        self._asks = True
        _release(self._caller_wakes)
        while not self._is_answered:
            if self.is_given_up:
                raise CallerLeftError
            self._thread_wakes.acquire(timeout=_TICK_SECONDS)

    def carry_out(self) -> None:
        """Do the work, unless the call was dropped; keep its value or error for the caller."""
        if not self.claim():
            return
        work, self._work = self._work, None
        assert work is not None
        try:
            with self._on_device():
                self._context.run(_current.set, self)
                self._value = self._context.run(work, self)
        except BaseException as error:  # noqa: BLE001  # raised in the waiting caller
            self.error = error
        finally:
            del work
            _unfinished.discard(self)
            self.is_done = True
            _release(self._caller_wakes)

    # -- where it is waited for ------------------------------------------------------------------

    def answer(self) -> None:
        """Wait briefly; confirm that the caller is waiting, if `confirm` asks."""
        if self._asks and not self._is_answered:
            self._is_answered = True
            _release(self._thread_wakes)
        if not self.is_done:
            self._caller_wakes.acquire(timeout=_TICK_SECONDS)

    def claim(self) -> bool:
        """Claim the call, to carry it out or to drop it; True only for the first claim."""
        return self._claim.acquire(blocking=False)

    def give_up(self) -> None:
        """Record that the caller no longer waits, and wait for the end of the call."""
        self.is_given_up = True
        _release(self._thread_wakes)
        if self.claim():  # it was interrupted before its thread was started
            self.error = CallerLeftError("it was interrupted before it began")
            _unfinished.discard(self)
            self.is_done = True
        while not self.is_done:
            self._caller_wakes.acquire(timeout=_TICK_SECONDS)

    @property
    def value(self) -> T:
        """What the work returned."""
        return self._value  # type: ignore[return-value]  # read only after success

    def was_told(self) -> bool:
        """Whether its error was raised to the caller."""
        trace = self.error.__traceback__ if self.error is not None else None
        while trace is not None:
            if trace.tb_frame.f_code is _RUN:
                return True
            trace = trace.tb_next
        return False


class Caller:
    """Runs the calls of one manager, one at a time."""

    def __init__(self) -> None:
        self._last: Call[Any] | None = None
        """The last call, until its result was returned."""

    def run(
        self,
        name: str,
        work: Callable[[Call[T]], T],
        *,
        patience_seconds: float,
    ) -> T:
        """Run a call and return what it returns, or raise what it raises.

        An interrupt is raised when the call has ended, or `patience_seconds` later at the latest; a
        second one at once. The call continues meanwhile, and the next one waits for its end.

        One call at a time: see `arguments.one_at_a_time`.
        """
        if self._last is not None:
            self._end_last(self._last)
        call = Call(name, work)
        self._last = call
        _unfinished.add(call)
        _wait_at_exit()
        _thread.start_new_thread(_launch, (call,))
        interrupt: BaseException | None = None
        until = 0.0
        while not call.is_done and (interrupt is None or time.monotonic() < until):
            try:
                call.answer()
            except BaseException as error:
                if interrupt is not None:
                    raise  # the second interrupt
                interrupt, until = error, time.monotonic() + patience_seconds
        if interrupt is not None:
            raise interrupt from call.error
        if call.error is not None:
            raise call.error
        self._last = None
        return call.value

    @property
    def is_idle(self) -> bool:
        """Whether the last call has ended and returned its result."""
        return self._last is None

    def _end_last(self, last: Call[Any]) -> None:
        """Wait for the end of a call whose caller left, and log an error that was not raised."""
        if last.process != os.getpid():
            self._last = None  # a call of the process that this one was forked from
            return
        if not last.is_done:
            last.give_up()
        if last.error is not None and not last.was_told():
            logger.error("%s did not succeed, and was interrupted: %s", last.name, last.error)
        self._last = None


_RUN = Caller.run.__code__


def _launch(call: Call[Any]) -> None:
    """Start the thread of a call, itself on a bare thread: an interrupt could break the start."""
    threading.Thread(target=call.carry_out, name=THREAD_NAME, daemon=True).start()


def _release(lock: Any) -> None:
    try:
        lock.release()
    except RuntimeError:  # not acquired since it was last released
        return


def _devices_of_caller() -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes this thread's GPU and streams current in another thread."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ExitStack
    device = torch.cuda.current_device()
    streams = [torch.cuda.current_stream(each) for each in range(torch.cuda.device_count())]

    def enter() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for each in streams:
            stack.enter_context(torch.cuda.stream(each))
        stack.enter_context(torch.cuda.device(device))
        return stack

    return enter


@cache
def _wait_at_exit() -> None:
    """Make the program's exit wait for abandoned calls, while thread pools still work."""
    register: Any = getattr(threading, "_register_atexit", None)
    if register is not None:
        try:
            register(end_calls)
        except RuntimeError:  # the program is already exiting
            return


def end_calls() -> None:
    """Wait at the program's exit for calls whose caller left. Ctrl-C ends the wait."""
    for call in list(_unfinished):
        if call.is_done or call.process != os.getpid():
            continue
        try:
            call.give_up()
        except KeyboardInterrupt:
            logger.error("%s was abandoned at the end of the program", call.name)
            return
        if call.error is not None and not call.was_told():
            logger.error("%s did not succeed, and was interrupted: %s", call.name, call.error)


P = ParamSpec("P")


def in_normal_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function outside inference mode and without gradients."""
    # Leaving inference mode enables gradients, so no_grad is applied inside.
    return torch.inference_mode(False)(torch.no_grad()(function))
