"""Run a manager's calls on a thread that no signal handler interrupts, while the caller waits.

Python runs signal handlers on the main thread, between any two instructions: Ctrl-C, or a handler
that raises, could otherwise leave a save half staged, a lock held or an outcome lost. Owns the
thread of one call, the wait of its caller, and the question whether the caller is still there.
Promises that a call which has begun is carried to its end; that an interrupt is raised when the
call has ended, or after a short patience at once; that a caller who left early is known to have
left (it never has to say so), so that nothing which needed it to wait is trusted; and that the next
call begins when the last one has ended. The caller's thread uses no lock that an interrupt could
leave held. Modes of the caller's thread (autograd, default device) do not reach the call; context
variables and the CUDA device and streams do.

`in_normal_mode` is for tensors that outlive a call: one made in inference mode can never be changed
in place outside it. Default dtype, default device, autocast and determinism need no guard: what is
made here names its own dtype and device and computes nothing.
"""

from __future__ import annotations

import _thread
import concurrent.futures.thread  # noqa: F401  # its own end of a program comes after ours
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
"""Of the thread of a call; callbacks and hooks run on it."""
_TICK_SECONDS = 0.05
"""A wake-up that an interrupt swallowed costs who waits no more than this."""

_unfinished: set[Call[Any]] = set()


class CallerLeftError(Exception):
    """Whoever made a call was interrupted and no longer waits for it."""


_current: contextvars.ContextVar[Call[Any] | None] = contextvars.ContextVar("call", default=None)


def stop_if_left() -> None:
    """End long work that nobody waits for any more; called now and then by what a load does.

    Raises:
        CallerLeftError: the next call, or the end of the program, waits for this one to end.
    """
    call = _current.get()
    if call is not None and call.is_given_up:
        raise CallerLeftError("nobody waits for it any more")


class Gate:
    """What the thread of a call lets the threads of its work know; they wait for it."""

    def __init__(self) -> None:
        self._decided = threading.Event()
        self._error: Exception | None = None

    def open(self) -> None:
        """Let them go on."""
        self._decided.set()

    def fail(self, error: Exception) -> None:
        """Let them fail, unless they have gone on."""
        if not self._decided.is_set():
            self._error = error
            self._decided.set()

    def wait(self) -> None:
        """Return when it was opened; raise what it failed with."""
        self._decided.wait()
        if self._error is not None:
            raise self._error


class Call(Generic[T]):
    """One call, shared by its thread and its caller."""

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
        # Locks of C: an interrupt finds each taken or not, and never in between.
        self._claim = _thread.allocate_lock()
        self._caller_wakes = _thread.allocate_lock()
        self._thread_wakes = _thread.allocate_lock()
        self._caller_wakes.acquire()
        self._thread_wakes.acquire()

    # -- on its thread ---------------------------------------------------------------------------

    def confirm(self) -> None:
        """Return when the caller was found waiting: until here it has changed nothing.

        Raises:
            CallerLeftError: it has left; what needed it to wait cannot be trusted.
        """
        self._asks = True
        _release(self._caller_wakes)
        while not self._is_answered:
            if self.is_given_up:
                raise CallerLeftError
            self._thread_wakes.acquire(timeout=_TICK_SECONDS)

    def carry_out(self) -> None:
        """Do the work, unless the call was dropped; whatever ends it is kept for the caller."""
        if not self.claim():
            return
        work, self._work = self._work, None
        assert work is not None
        try:
            with self._on_device():
                self._context.run(_current.set, self)
                self._value = self._context.run(work, self)
        except BaseException as error:  # noqa: BLE001  # raised where the caller waits
            self.error = error
        finally:
            del work
            _unfinished.discard(self)
            self.is_done = True
            _release(self._caller_wakes)

    # -- where it is waited for ------------------------------------------------------------------

    def answer(self) -> None:
        """Wait a little; say that the caller is here, if that is asked."""
        if self._asks and not self._is_answered:
            self._is_answered = True
            _release(self._thread_wakes)
        if not self.is_done:
            self._caller_wakes.acquire(timeout=_TICK_SECONDS)

    def claim(self) -> bool:
        """Whether it falls to this thread to carry the call out, or to drop it; only once."""
        return self._claim.acquire(blocking=False)

    def give_up(self) -> None:
        """Record that the caller has left, and wait for the end."""
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
        return self._value  # type: ignore[return-value]  # it is done, and raised nothing

    def was_told(self) -> bool:
        """Whether its error was raised to the caller."""
        trace = self.error.__traceback__ if self.error is not None else None
        while trace is not None:
            if trace.tb_frame.f_code is _RUN:
                return True
            trace = trace.tb_next
        return False


class Caller:
    """Carries out the calls of one manager, one at a time."""

    def __init__(self) -> None:
        self._last: Call[Any] | None = None
        """The last call, until its result was handed over."""

    def run(
        self,
        name: str,
        work: Callable[[Call[T]], T],
        *,
        patience_seconds: float,
    ) -> T:
        """Carry out a call and return what it returns, or raise what it raises.

        An interrupt is raised when the call has ended, or `patience_seconds` later at the latest; a
        second one at once. The call goes on meanwhile, and the next one waits for its end.

        One call at a time: see `arguments.one_at_a_time`.
        """
        if self._last is not None:
            self._settle(self._last)
        call = Call(name, work)
        self._last = call
        _unfinished.add(call)
        _wait_at_the_end()
        _thread.start_new_thread(_launch, (call,))
        interrupt: BaseException | None = None
        until = 0.0
        while not call.is_done and (interrupt is None or time.monotonic() < until):
            try:
                call.answer()
            except BaseException as error:
                if interrupt is not None:
                    raise  # asked for twice
                interrupt, until = error, time.monotonic() + patience_seconds
        if interrupt is not None:
            raise interrupt from call.error
        if call.error is not None:
            raise call.error
        self._last = None
        return call.value

    @property
    def is_idle(self) -> bool:
        """Whether the last call has ended, and handed its result over."""
        return self._last is None

    def _settle(self, last: Call[Any]) -> None:
        """Let the last call end, if whoever made it has left, and tell what it could not."""
        if last.process != os.getpid():
            self._last = None  # of the process that this one was forked from
            return
        if not last.is_done:
            last.give_up()
        if last.error is not None and not last.was_told():
            logger.error("%s did not succeed, and was interrupted: %s", last.name, last.error)
        self._last = None


_RUN = Caller.run.__code__


def _launch(call: Call[Any]) -> None:
    """Start the thread of a call, from a bare one: an interrupt could break the start itself."""
    threading.Thread(target=call.carry_out, name=THREAD_NAME, daemon=True).start()


def _release(lock: Any) -> None:
    try:
        lock.release()
    except RuntimeError:  # nobody has waited since it was last released
        return


def _devices_of_caller() -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the GPU and the streams of this thread current in another one."""
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
def _wait_at_the_end() -> None:
    """Let the end of the program wait for calls that were left, while thread pools still work."""
    register: Any = getattr(threading, "_register_atexit", None)
    if register is not None:
        try:
            register(end_calls)
        except RuntimeError:  # the program is ending already
            return


def end_calls() -> None:
    """Let every call end whose caller has left; the program is ending. Ctrl-C ends the wait."""
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
    """Run a function outside inference mode, and without gradients."""
    # Leaving inference mode turns gradients on: they are turned off within.
    return torch.inference_mode(False)(torch.no_grad()(function))
