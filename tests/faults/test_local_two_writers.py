"""Two starts of one run share a node: the later one goes on, and no commit of its is ever lost.

The earlier one is refused at its next save, wherever it is: between saves, in the middle of a local
one, or of a persistent one. What it had under way may still appear, and is older than anything that
the later one commits.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from holdfast.caller import THREAD_NAME
from holdfast.errors import CheckpointError, SaveFailedError, SupersededAttemptError
from tests.faults.jobs import Job, load, state_of, train_to
from tests.faults.local_crashes import check_is_tidy
from tests.faults.local_stories import place_in_memory, place_on_disk, start
from tests.faults.report import record
from tests.faults.tiers import FULL
from tests.support.kernel_calls import Call, KernelCalls
from tests.support.ranks import run_ranks

pytest.importorskip("nvidia_resiliency_ext")


def _newest(base: Path) -> object:
    job = start(base)
    found = load(job)
    job.close()
    return found


@pytest.mark.parametrize("to_local", [True, False], ids=["local", "both"])
def test_the_older_of_two_starts_is_refused(base: Path, to_local: bool) -> None:
    """A forgotten twin is refused at its next save and for good, and takes nothing with it."""
    older = start(base)
    older.load()
    for iteration in (10, 20):
        train_to(older, iteration)
        older.save(to_local=True)
    newer = start(base)
    assert newer.load().iteration == 20
    expected = train_to(newer, 30)
    newer.save(to_local=to_local)
    for iteration in (30, 40):
        train_to(older, iteration)
        with pytest.raises(SupersededAttemptError):
            older.save(to_local=True)
    assert _newest(base) == expected
    expected = train_to(newer, 40)
    newer.save(to_local=True)
    older.close()
    assert _newest(base) == expected
    newer.close()
    check_is_tidy(base)


def _race(base: Path, number: int) -> Call | None:
    """Let a later start take over at one call of an older one's save; None: it has not so many."""
    older = start(base)
    older.load()
    for iteration in (10, 20):
        train_to(older, iteration)
        older.save(to_local=True)
    arrived, goes_on = threading.Event(), threading.Event()
    calls, seen = KernelCalls(base / "local"), list[Call]()
    told: list[BaseException] = []

    def wait(call: Call) -> None:
        # Of the older one's call, which is alone until it has arrived.
        is_older = threading.current_thread().name == THREAD_NAME and not arrived.is_set()
        if is_older and call.changes:
            seen.append(call)
            if len(seen) == number:
                arrived.set()
                assert goes_on.wait(60)

    def save() -> None:
        try:
            older.save(to_local=True)
        except CheckpointError as error:
            told.append(error)
        finally:
            arrived.set()

    train_to(older, 30)
    thread = threading.Thread(target=save)
    calls.before = wait
    calls.is_one_at_a_time = False
    with calls.watching():
        thread.start()
        assert arrived.wait(60)
        newer = start(base)
        found = load(newer)
        assert found is not None
        assert found[0] in (20, 30), found
        newest = None
        for iteration in (30, 40):
            newest = train_to(newer, iteration)
            newer.save(to_local=True)
        goes_on.set()
        thread.join()
    for error in told:
        assert isinstance(error, SaveFailedError | SupersededAttemptError), error
    where = seen[number - 1] if len(seen) >= number else None
    assert _newest(base) == newest, f"lost to a twin that went on at {where}"
    with pytest.raises(SupersededAttemptError):
        _save_again(older)
    newest = train_to(newer, 50)
    newer.save(to_local=True)
    assert _newest(base) == newest
    older.close()
    newer.close()
    check_is_tidy(base / "local")
    assert _newest(base) == newest
    return where


def _save_again(job: Job) -> None:
    train_to(job, job.step + 1)
    job.save(to_local=True)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_twin_in_the_middle_of_a_local_save_takes_nothing_away(
    where: str, tmp_path: Path
) -> None:
    """Whatever call of its save it had come to: what the later start commits is the newest."""
    number, count = 1, 0
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        with place_in_memory() if where == "memory" else place_on_disk(folder) as base:
            if _race(base, number) is None:
                break
        number += 1
        count += 1
    assert count > 3
    record("local: twins", count)


def _start_and_save(base: Path, seed: int) -> list[tuple[int, str]]:
    """Start, and save until refused, as one of several that know nothing of one another."""
    committed: list[tuple[int, str]] = []
    rng = random.Random(seed + int(os.environ["RANK"]))
    for _ in range(6 if FULL else 3):
        job = start(base)
        try:
            job.load()
            for _ in range(3):
                job.train_to(job.step + 1)
                state = state_of(job)
                job.save(to_local=rng.random() < 0.7)
                committed.append(state)
        except CheckpointError:
            continue
        finally:
            job.close()
    return committed


def test_many_starts_at_once_leave_a_sound_node(base: Path) -> None:
    """Four jobs that start over one node at once lose one another's race, and no bit."""
    columns = run_ranks(_start_and_save, 4, base, 7, initialise=False)
    committed = {state for column in columns for state in column}
    assert committed
    job = start(base)
    found = load(job)
    assert found in committed or found is not None
    reference = start(base / "reference")
    reference.train_to(job.step)
    assert state_of(job) == state_of(reference)
    again = train_to(job, job.step + 1)
    job.save()
    job.close()
    assert _newest(base) == again
    check_is_tidy(base)
    record("local: twins", 4)


def test_a_late_start_that_dies_takes_nothing_with_it(base: Path) -> None:
    """A start that swept the node and claimed nothing: the one before it goes on, with room."""
    older = start(base)
    older.load()
    train_to(older, 10)
    older.save(to_local=True)
    for iteration in (20, 30, 40):
        late = start(base)  # it loads, sweeps what waits for its turn, and dies
        late.load()
        expected = train_to(older, iteration)
        older.save(to_local=True)
        late.close()
        assert _newest(base) == expected
    older.close()
    check_is_tidy(base)
    record("local: twins", 3)
