"""What an asynchronous local save commits is what was live when `save` was called.

Training changes everything as soon as `save` has returned, while the writer thread is kept from its
first call on the node. In RAM the memory that was staged into is the file, so that a later save
which filled it too early would show as well. A failure of that thread is told once.
"""

from __future__ import annotations

import errno
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from holdfast.caller import THREAD_NAME
from holdfast.errors import SaveFailedError
from tests.faults.jobs import Job, load, state_of
from tests.faults.local_crashes import check_is_tidy
from tests.faults.local_stories import refuse_with, start
from tests.faults.report import record
from tests.support.kernel_calls import Call, KernelCalls, plant, tree_of
from tests.support.states import MODELS

pytest.importorskip("nvidia_resiliency_ext")


def _is_beside_training() -> bool:
    """Whether this thread works while training goes on: all do but those that it waits for."""
    thread = threading.current_thread()
    return thread is not threading.main_thread() and thread.name != THREAD_NAME


class _Gate:
    """Keeps every thread that works beside training from changing anything on the node."""

    def __init__(self, base: Path) -> None:
        self.calls = KernelCalls(base / "local")
        self.calls.is_one_at_a_time = False
        self.calls.before = self._wait
        self._is_open = threading.Event()
        self._somebody_waits = threading.Event()

    def _wait(self, call: Call) -> None:
        if _is_beside_training() and call.changes:
            self._somebody_waits.set()
            assert self._is_open.wait(60), "nobody opened the gate"

    def close(self) -> None:
        self._is_open.clear()
        self._somebody_waits.clear()

    def open(self) -> None:
        """Let go of who waits, once somebody does."""
        assert self._somebody_waits.wait(60), "nobody came to the gate"
        self._is_open.set()


def _newest(base: Path, **options: Any) -> object:
    job = start(base, **options)
    found = load(job)
    job.close()
    return found


@pytest.mark.parametrize("staging", ["blocking", "overlapped"])
@pytest.mark.parametrize("kind", MODELS)
def test_training_never_reaches_a_local_save(kind: str, staging: str, base: Path) -> None:
    """Steps taken while the writer has not begun: each commit holds the state of its call."""
    job = start(base, kind=kind, async_save=True, staging=staging)
    job.load()
    gate = _Gate(base)
    for _ in range(5):  # so that every file takes a turn again
        job.train_to(job.step + 1)
        expected = state_of(job)
        with gate.calls.watching():
            gate.close()
            job.begin_save(to_local=True)
            job.train_to(job.step + 2)
            gate.open()
            job.manager.finalize_async_saves(job.state, blocking=True)
        assert _newest_beside(base, kind) == expected
    job.close()
    check_is_tidy(base / "local")


def _newest_beside(base: Path, kind: str) -> object:
    """Load what is there without sweeping away what the running job keeps for its next turn."""
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        plant(Path(folder), tree_of(base))
        return _newest(Path(folder), kind=kind)


def test_a_failure_of_the_writer_is_told_once(base: Path) -> None:
    """At the step at which it is acted on, and never again; the save after it works."""
    job = start(base, async_save=True)
    job.load()
    told = 0
    for number in range(8):
        job.train_to(job.step + 1)
        job.save(to_local=True)
        stands = state_of(job)
        calls, seen = KernelCalls(base / "local"), 0

        def fails(call: Call, number: int = number) -> None:
            nonlocal seen
            if _is_beside_training():
                seen += 1
                refuse_with(errno.EIO if seen > number else None, call)

        calls.before = fails
        job.train_to(job.step + 1)
        with calls.watching():
            job.begin_save(to_local=True)
            try:
                job.manager.finalize_async_saves(job.state, blocking=True)
                stands = state_of(job)
            except SaveFailedError as error:
                assert error.failures[0].errno == errno.EIO  # noqa: PT017  # some do not fail
                told += 1
        job.manager.finalize_async_saves(job.state, blocking=True)
        job.manager.finalize_async_saves(job.state)
        assert _newest_beside(base, "small") in (stands, state_of(job))
    job.train_to(job.step + 1)
    job.save(to_local=True)
    last = state_of(job)
    job.close()
    assert _newest(base) == last
    assert told > 2
    record("local: errno x call pairs", 8)


def test_a_promoted_commit_is_what_was_saved(base: Path) -> None:
    """While a persistent checkpoint is made from a local commit, later saves do not reach it."""
    persistent = {"directory": str(base / "store"), "from_local": True}
    job: Job = start(base, async_save=True, persistent=persistent)
    job.load()
    for _ in range(3):
        job.train_to(job.step + 1)
        job.begin_save()
        expected = state_of(job)
        for _ in range(3):
            job.train_to(job.step + 1)
            job.begin_save(to_local=True)
        job.manager.finalize_async_saves(job.state, blocking=True)
        for each in (base / "local").glob("*/0/iter_*"):
            assert int(each.name[5:12]) <= job.step
        newest = start(base, local={"directory": str(base / "elsewhere")})
        assert load(newest) == expected
        newest.close()
    job.close()
