"""One call at a time is inside a manager."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from holdfast.arguments import Calls, one_at_a_time
from holdfast.errors import ConcurrentUseError
from holdfast.events import CallbackManager
from holdfast.protocol import CheckpointSaveContext
from tests.support.managers import linear, manager_of


class Guarded:
    """Two methods that a call may be inside of, and what is to happen there."""

    def __init__(self) -> None:
        self._calls_inside = Calls()
        self.entered = threading.Event()
        self.leave = threading.Event()

    @one_at_a_time
    def stay(self) -> str:
        self.entered.set()
        assert self.leave.wait(30)
        return "stayed"

    @one_at_a_time
    def call(self, inner: Any = None) -> Any:
        return None if inner is None else inner()


def test_a_second_thread_is_refused_at_once_and_the_first_goes_on() -> None:
    """The second call raises without waiting and names both threads; later calls work."""
    guarded, results = Guarded(), list[str]()
    first = threading.Thread(target=lambda: results.append(guarded.stay()), name="first")
    first.start()
    assert guarded.entered.wait(30)
    with pytest.raises(ConcurrentUseError) as caught:
        guarded.call()
    guarded.leave.set()
    first.join(30)
    assert "call was called on thread MainThread while manager.stay runs on thread first" in str(
        caught.value
    )
    assert results == ["stayed"]
    assert guarded.call(lambda: 5) == 5


def test_a_call_from_inside_a_call_is_refused() -> None:
    """What is called in the middle of a call on the same thread is told to wait for its return."""
    guarded = Guarded()
    with pytest.raises(ConcurrentUseError, match=r"from inside manager\.call, by a callback"):
        guarded.call(guarded.call)
    assert guarded.call(lambda: 5) == 5


def test_an_error_or_an_interrupt_leaves_the_manager_free() -> None:
    """Whatever ends a call, the next one is let in."""
    guarded = Guarded()
    for error in (ValueError, KeyboardInterrupt, SystemExit):

        def fail(error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            guarded.call(fail)
        assert not guarded._calls_inside.inside
        assert guarded.call(lambda: 5) == 5


def test_an_interrupt_at_any_line_leaves_the_manager_free() -> None:
    """Also where it comes between a call that ended and the line that signs it out."""
    guarded, count, interrupted = Guarded(), 0, True
    while interrupted:
        count += 1
        left, interrupted = count, False

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left, interrupted
            if frame.f_code.co_filename.endswith("arguments.py") and event in ("line", "return"):
                left -= 1
                if left == 0:
                    interrupted = True
                    raise KeyboardInterrupt
            return trace

        try:
            sys.settrace(trace)
            guarded.call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert guarded.call(lambda: 5) == 5, f"interrupted at line event {count}"
    assert count > 8


def test_a_callback_that_saves_is_refused_and_the_save_stands(tmp_path: Path) -> None:
    """A save from inside the callback of a commit raises there; the commit is not harmed."""
    live, callbacks, refused = linear(), CallbackManager(), list[str]()
    manager = manager_of(tmp_path / "store", async_save=True)

    def save_again(_: Any) -> None:
        try:
            live.save(manager, 2)
        except ConcurrentUseError as error:
            refused.append(str(error))

    callbacks.register("on_checkpoint_save", save_again)
    live.state.train_state.step = 1
    manager.save(CheckpointSaveContext(live.state, live.model, live.optimizer, None), callbacks)
    manager.finalize_async_saves(live.state, blocking=True)
    live.save(manager, 3)
    manager.finalize_async_saves(live.state, blocking=True, terminate=True)
    assert len(refused) == 1
    assert "manager.save was called from inside manager.finalize_async_saves" in refused[0]
    assert sorted(each.name for each in (tmp_path / "store").glob("iter_*")) == [
        "iter_0000001",
        "iter_0000003",
    ]
