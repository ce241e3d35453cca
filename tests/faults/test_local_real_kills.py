"""Processes with local checkpoints are really killed, stopped and refused.

After every SIGKILL a fresh process gets the newest commit that was acknowledged, or the one under
way if that had become visible, equal in every bit, and saves again. Of two ranks on two nodes one
that was only stopped is named within the deadline and may come back, and what one node refuses is
told on both. The regular run tries a seeded sample of the calls; HOLDFAST_FAULTS=full all.
"""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from holdfast.errors import CheckpointError, StageFailedError
from tests.faults.jobs import Job, State, load, state_of, train_to
from tests.faults.killing import in_fork
from tests.faults.local_crashes import check_is_tidy
from tests.faults.local_stories import place_in_memory, place_on_disk, refuse_with, start
from tests.faults.places import Pair
from tests.faults.report import record
from tests.faults.tiers import FULL
from tests.support.deadlines import DEADLINE_SECONDS, LAUNCH_SECONDS, told_within
from tests.support.kernel_calls import Call, KernelCalls, Tree, plant, tree_of
from tests.support.ranks import run_ranks

pytest.importorskip("nvidia_resiliency_ext")

SEED = 50
SAVES = [(40, True), (50, True), (60, False)]
"""Of the process that is killed: iterations, and whether they are local alone."""


# -- one rank --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Course:
    """What a process that nobody kills does."""

    changes: list[str]
    """The calls that change something, in order."""
    reached: list[tuple[int, tuple[int, str]]]
    """How many of these had been made when a state was acknowledged, and the state."""


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_killed_process_leaves_what_it_acknowledged(
    where: str, asynchronous: bool, tmp_path: Path
) -> None:
    """Wherever it is killed in loads and saves of both tiers, the next start finds no less."""
    with place_in_memory() if where == "memory" else place_on_disk(tmp_path) as base:
        # Forks come from a process of its own: the one that runs pytest may have threads.
        [kills] = run_ranks(
            _kill_everywhere,
            1,
            base,
            asynchronous,
            timeout_seconds=(60 if FULL else 2) * LAUNCH_SECONDS,
            initialise=False,
        )
    record("local: kill points", kills)


def _kill_everywhere(base: Path, asynchronous: bool) -> int:
    prepared = in_fork(lambda: _prepare(base)).value
    assert prepared is not None
    tree, before = prepared
    course = in_fork(lambda: _live(base, asynchronous, None)).value
    assert course is not None
    numbers = range(1, len(course.changes) + 1)
    if not FULL:
        local = [each for each in numbers if "/local/" in course.changes[each - 1]]
        rng = random.Random(f"{SEED} {base.parts[1]} {asynchronous}")
        numbers = sorted({*rng.sample(local, 6), *rng.sample(numbers, 1)})  # type: ignore[assignment]
    for number in numbers:
        plant(base, tree)
        ending = in_fork(lambda: _live(base, asynchronous, number))  # noqa: B023  # called at once
        where = f"killed before call {number}, {course.changes[number - 1]}"
        assert ending.signal is not None, f"not {where}"
        acknowledged = [state for count, state in course.reached if count < number]
        coming = [state for count, state in course.reached if count >= number]
        allowed: list[State] = [acknowledged[-1] if acknowledged else before, *coming[:1]]
        problem = in_fork(lambda: _resume(base, allowed)).value  # noqa: B023
        assert not problem, f"{where}: {problem}"
    return len(list(numbers))


def _prepare(base: Path) -> tuple[Tree, tuple[int, str]]:
    job = start(base)
    job.load()
    for iteration in (10, 20, 30):
        state = train_to(job, iteration)
        job.save(to_local=iteration != 20)
    job.close()
    return tree_of(base), state


def _live(base: Path, asynchronous: bool, kill_at: int | None) -> _Course:
    """Load and save, and be killed before so many changes; None: never."""
    calls, course = KernelCalls(base), _Course([], [])

    def count(call: Call) -> None:
        if call.changes:
            course.changes.append(str(call))
            if len(course.changes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    calls.before = count
    job = start(base, async_save=asynchronous)
    with calls.watching():
        job.load()
        for iteration, to_local in SAVES:
            state = train_to(job, iteration)
            job.save(to_local=to_local)
            course.reached.append((len(course.changes), state))
        job.close()
    return course


def _resume(base: Path, allowed: Sequence[State]) -> str:
    """Start afresh, load, save; return what is wrong."""
    job = start(base)
    found = load(job)
    if found not in allowed:
        return f"{found} was loaded, not one of {allowed}"
    saved: State = None
    for iteration, to_local in ((70, True), (80, False)):
        saved = train_to(job, iteration)
        job.save(to_local=to_local)
    job.close()
    check_is_tidy(base)
    job = start(base)
    found = load(job)
    job.close()
    return "" if found == saved else f"{saved} was saved and {found} is loaded"


# -- two ranks: one that hangs, and one whose node refuses ----------------------------------------


def _pair(root: Path, **options: Any) -> Job:
    """Start one of two ranks, each on a node of its own, which holds a copy for the other."""
    return Pair(root, to_local=True).start(**options)


def _outlast_a_stop(root: Path, numbers: Sequence[int]) -> list[tuple[str, float, bool]]:
    """Have rank 1 stopped at calls of a save; return what was told, when, and what holds then."""
    job = _pair(root, timeout_seconds=DEADLINE_SECONDS)
    rank = distributed.get_rank()
    pid = root / "pid"
    if rank == 1:
        pid.write_text(str(os.getpid()))
    job.load()
    job.train_to(1)
    job.save(to_local=True)
    distributed.barrier()
    told = []
    for number in numbers:
        calls, seen = KernelCalls(root / "b"), 0

        def stop(call: Call, number: int = number) -> None:
            nonlocal seen
            seen += call.changes
            if seen == number and call.changes:
                # To this thread: sent to the process, it may reach another thread first, and this
                # one would answer before all are stopped.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

        if rank == 1:
            calls.before = stop
        job.train_to(job.step + 1)
        message, began = "", time.monotonic()
        with calls.watching():
            try:
                job.save(to_local=True)
            except CheckpointError as error:
                message = str(error)
        seconds = time.monotonic() - began
        if rank == 0:
            os.kill(int(pid.read_text()), signal.SIGCONT)
        distributed.barrier()
        job.train_to(job.step + 1)
        job.save(to_local=True)
        saved = state_of(job)
        distributed.barrier()
        fresh = _pair(root)
        right = load(fresh) == saved
        fresh.close()
        distributed.barrier()
        job.close()
        job = _pair(root, timeout_seconds=DEADLINE_SECONDS)
        job.load()
        told.append((message, seconds, right))
    job.close()
    return told


def test_a_rank_that_was_stopped_is_named_and_may_come_back(tmp_path: Path) -> None:
    """The other is told within the deadline; then it wakes up, and the next save has both."""
    with place_in_memory() as root:
        (root / "b").mkdir(0o700)
        told = run_ranks(_outlast_a_stop, 2, root, [1, 3] if not FULL else list(range(1, 12)))
    for message, seconds, right in told[0]:
        assert re.search(r'stage "local [a-z]+"', message), message
        assert "rank 1" in message
        assert seconds < told_within(1)
        assert right
    assert all(right for _, _, right in told[1])
    record("local: rank failures", len(told[0]))


def _refuse_on_one_rank(root: Path, victim: int) -> list[tuple[str, str, str, bool]]:
    """Fail each call of one rank's node; return where, the stage, what was told, what holds."""
    rank = distributed.get_rank()
    job = _pair(root, timeout_seconds=DEADLINE_SECONDS)
    job.load()
    for step in (1, 2, 3):
        job.train_to(step)
        job.save(to_local=True)
    found: list[tuple[str, str, str, bool]] = []
    number, goes_on = 1, True
    while goes_on:
        calls, seen = KernelCalls(root / "ab"[rank]), list[Call]()

        def fails(call: Call, number: int = number, seen: list[Call] = seen) -> None:
            seen.append(call)
            refuse_with(errno.EIO if len(seen) == number else None, call)

        if rank == victim:
            calls.before = fails
        job.train_to(job.step + 1)
        stage = message = ""
        with calls.watching():
            try:
                job.save(to_local=True)
            except StageFailedError as error:
                stage, message = error.stage, str(error)
        job.train_to(job.step + 1)
        job.save(to_local=True)
        saved = state_of(job)
        where = str(seen[number - 1]) if len(seen) >= number else ""
        reached: list[Any] = [where if rank == victim else None]
        distributed.broadcast_object_list(reached, src=victim)
        distributed.barrier()
        if len(found) % 8 == 0:
            fresh = _pair(root, timeout_seconds=DEADLINE_SECONDS)
            right = load(fresh) == saved
            fresh.close()
            distributed.barrier()
        goes_on = bool(reached[0])
        if goes_on:
            found.append((reached[0], stage, message, right))
        number += 1
    job.close()
    return found


def test_what_one_node_refuses_is_told_on_both(tmp_path: Path) -> None:
    """EIO at any call of one rank, copies included: both are told alike, and both save again."""
    with place_in_memory() as base:
        count = 0
        for victim in (0, 1):
            columns = run_ranks(
                _refuse_on_one_rank,
                2,
                base / str(victim),
                victim,
                timeout_seconds=2 * LAUNCH_SECONDS,
            )
            assert columns[0] == columns[1]
            assert any("local exchange" in stage for _, stage, _, _ in columns[0])
            assert any("local publish" in stage for _, stage, _, _ in columns[0])
            for where, stage, message, right in columns[0]:
                assert right, where
                if stage:
                    assert f"rank {victim}" in message, f"{where}: {message}"
                    assert "EIO" in message, f"{where}: {message}"
            count += len(columns[0])
    record("local: rank failures", count)
