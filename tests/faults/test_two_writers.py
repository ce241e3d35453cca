"""Two jobs save into one place: one of them is told to stop, and nothing needs cleaning.

A stranger is refused before it writes anything. Of two starts of one run the later goes on and the
earlier is refused at its next save, wherever it is: between saves, in the middle of one, of either
tier. What it had under way is not seen or, on the local tier, may still appear, and is older than
anything that the later one commits.
"""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.caller import THREAD_NAME
from holdfast.errors import (
    CheckpointError,
    SaveFailedError,
    StoreIdentityError,
    StoreNotLoadedError,
    SupersededAttemptError,
)
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store
from holdfast.tiers.persistent import PersistentTier
from tests.faults.jobs import Job, State, damages, leftovers, load, state_of, train_to
from tests.faults.local_crashes import check_is_tidy
from tests.faults.places import PLACES, Place
from tests.faults.report import record
from tests.faults.tiers import FULL
from tests.support.kernel_calls import Call, KernelCalls
from tests.support.ranks import run_ranks
from tests.support.stores import FaultyFilesystem, find

MODES: list[dict[str, Any]] = [
    {},
    {"async_save": True},
    {"on_save_failure": "warn"},
    {"async_save": True, "on_save_failure": "warn"},
]


def _iterations(store: Path) -> list[int]:
    return [
        each.iteration
        for each in Store(PosixStorage(store, LocalFilesystem())).listing().checkpoints
    ]


def _save_at(place: Place, job: Job, *iterations: int) -> State:
    """Train to each iteration and save there; return the last state."""
    state: State = None
    for iteration in iterations:
        state = train_to(job, iteration)
        place.save(job)
    return state


# -- between saves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_another_run_is_refused_before_it_writes(place: Place, mode: dict[str, Any]) -> None:
    """A job with another run id can neither load nor save, changes nothing, and is told why."""
    first = place.start(run_id="first")
    _save_at(place, first, 2, 4)
    first.close()
    before = place.tree()
    job = place.start(run_id="second", **mode)
    job.train_to(6)
    for attempt in (job.load, lambda: place.save(job), lambda: place.save(job)):
        with pytest.raises(StoreIdentityError) as caught:
            attempt()
        for part in ("'first'", "'second'", "persistent.directory", "run_id=null"):
            assert part in str(caught.value)
    job.close()
    assert place.tree() == before


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_job_that_loaded_nothing_is_refused_before_it_writes(
    place: Place, mode: dict[str, Any]
) -> None:
    """A job that starts afresh over a store in use is refused, with both ways out; both work."""
    first = place.start()
    train_to(first, 2)
    if not place.to_local:
        first.save()  # of two iterations, that retention is seen to have kept
    saved = _save_at(place, first, 4)
    before = place.tree()
    job = place.start(**mode)
    job.train_to(3)
    for _ in range(2):
        with pytest.raises(StoreNotLoadedError, match=r"Call load first.* or name another"):
            place.save(job)
    assert place.tree() == before
    saved = _save_at(place, first, 6)  # which the refused job has not superseded
    first.close()
    assert load(job) == saved
    saved = _save_at(place, job, 7)
    job.close()
    assert place.newest() == saved
    if not place.to_local:
        assert _iterations(place.base / "store") == [7, 6, 4]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    ("place", "newer_is_local"),
    [
        pytest.param(*each.values, is_local, id=f"{each.id}-{name}", marks=each.marks)
        for each in PLACES
        for is_local, name in ([(True, "local")] if each in PLACES[1:] else []) + [(False, "both")]
    ],
    indirect=["place"],
)
def test_the_older_of_two_starts_is_refused(
    place: Place, mode: dict[str, Any], newer_is_local: bool
) -> None:
    """A forgotten twin is refused at its next save and for good, while the newer one goes on."""
    older = place.start(**mode)
    older.load()
    _save_at(place, older, 10, 20)
    newer = place.start(**mode)
    assert newer.load().iteration == 20
    expected = train_to(newer, 30)
    newer.save(to_local=newer_is_local)
    before = place.tree()
    for iteration in (30, 40, 50):
        train_to(older, iteration)
        with pytest.raises(SupersededAttemptError, match=r"attempt 2 .* taken over from attempt 1"):
            place.save(older)
    if not place.to_local:
        assert place.tree() == before
    assert place.newest() == expected
    expected = _save_at(place, newer, 40)
    older.close()
    assert place.newest() == expected
    newer.close()
    place.check_is_sound()


def test_a_late_start_that_claims_and_dies_takes_nothing_with_it(tmp_path: Path) -> None:
    """A start that claims the store when what it resumed from is gone supersedes nothing."""
    older, filesystem = Job(tmp_path), LocalFilesystem()
    older.train_to(1)
    older.save()
    late = PersistentTier(PosixStorage(tmp_path, filesystem), None, 3)
    late.resume_from(find(late.store, 1), is_own=True)
    for step in (2, 3, 4):
        older.train_to(step)
        older.save()
    assert _iterations(tmp_path) == [4, 3, 2]
    late.admit()  # and it dies before it commits anything
    newest = Job(tmp_path, seed=1)
    assert newest.load().iteration == 4
    assert newest.digests() == older.digests()
    newest.train_to(5)
    newest.save()
    assert _iterations(tmp_path) == [5, 4, 3]


def test_a_late_start_that_loads_and_dies_takes_nothing_with_it(place: Place) -> None:
    """A start that swept leftovers and claimed nothing: the one before it goes on, with room."""
    older = place.start()
    older.load()
    _save_at(place, older, 10)
    for iteration in (20, 30, 40):
        late = place.start()  # it loads, sweeps what waits for its turn, and dies
        late.load()
        expected = _save_at(place, older, iteration)
        late.close()
        assert place.newest() == expected
    older.close()
    place.check_is_sound()
    if place.to_local:
        record("local: twins", 3)


# -- in the middle of a save -----------------------------------------------------------------------


@pytest.mark.parametrize("on_save_failure", ["raise", "warn"])
def test_a_twin_in_the_middle_of_a_save_is_refused(on_save_failure: str, tmp_path: Path) -> None:
    """A save that was being written when the newer start took over is refused by that name."""
    filesystem = FaultyFilesystem()
    older = Job(tmp_path, filesystem=filesystem, async_save=True, on_save_failure=on_save_failure)
    older.train_to(2)
    older.save()
    older.train_to(4)
    filesystem.gate.clear()
    older.begin_save()
    while not leftovers(tmp_path):
        time.sleep(0.001)  # until it has begun
    newer = Job(tmp_path, seed=1)
    assert newer.load().iteration == 2
    newer.train_to(4)
    newer.save()
    expected = newer.digests()
    filesystem.gate.set()
    with pytest.raises(SupersededAttemptError):
        older.manager.finalize_async_saves(older.state, blocking=True)
    newest = Job(tmp_path, seed=2)
    assert newest.load().iteration == 4
    assert newest.digests() == expected
    newer.train_to(6)
    newer.save()
    assert _iterations(tmp_path) == [6, 4, 2]
    assert not leftovers(tmp_path)
    assert not damages(tmp_path)


@pytest.mark.parametrize("make_place", PLACES[1:])
def test_a_twin_in_the_middle_of_a_local_save_takes_nothing_away(
    make_place: Any, tmp_path: Path
) -> None:
    """Whatever call of its save it had come to: what the later start commits is the newest."""
    number, count = 1, 0
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        with make_place(folder) as place:
            if _race(place, number) is None:
                break
        number += 1
        count += 1
    assert count > 3
    record("local: twins", count)


def _race(place: Place, number: int) -> Call | None:
    """Let a later start take over at one call of an older one's save; None: it has not so many."""
    older = place.start()
    older.load()
    _save_at(place, older, 10, 20)
    arrived, goes_on = threading.Event(), threading.Event()
    calls, seen = KernelCalls(place.base / "local"), list[Call]()
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
            place.save(older)
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
        newer = place.start()
        found = load(newer)
        assert found is not None
        assert found[0] in (20, 30), found
        newest = _save_at(place, newer, 30, 40)
        goes_on.set()
        thread.join()
    for error in told:
        assert isinstance(error, SaveFailedError | SupersededAttemptError), error
    where = seen[number - 1] if len(seen) >= number else None
    assert place.newest() == newest, f"lost to a twin that went on at {where}"
    with pytest.raises(SupersededAttemptError):
        _save_at(place, older, older.step + 1)
    newest = _save_at(place, newer, 50)
    assert place.newest() == newest
    older.close()
    newer.close()
    check_is_tidy(place.base / "local")
    assert place.newest() == newest
    return where


# -- several at once -------------------------------------------------------------------------------


def _start_and_save(place: Place, seed: int) -> list[State]:
    """Start, and save until refused, as one of several that know nothing of one another.

    A load may fail as well: another start may replace or remove what is being read.
    """
    committed: list[State] = []
    rng = random.Random(seed + int(os.environ["RANK"]))
    for _ in range(6 if FULL else 3):
        job = place.start()
        try:
            job.load()
            for _ in range(3):
                job.train_to(job.step + 1)
                state = state_of(job)
                job.save(to_local=place.to_local and rng.random() < 0.7)
                committed.append(state)
        except CheckpointError:
            continue
        finally:
            job.close()
    return committed


def test_many_starts_at_once_leave_a_sound_place(place: Place) -> None:
    """Four jobs that start over one empty place at once lose one another's race, and no bit."""
    columns = run_ranks(_start_and_save, 4, place, 7, initialise=False)
    assert any(columns)
    job = place.start()
    found = job.load()
    assert found.found
    if not place.to_local:
        assert all("superseded" in each.reason for each in found.skipped)
    reference = replace(place, base=place.base / "reference").start()
    reference.train_to(job.step)
    assert state_of(job) == state_of(reference)
    again = train_to(job, job.step + 1)
    job.save()
    job.close()
    reference.close()
    assert place.newest() == again
    place.check_is_sound()
    if place.to_local:
        record("local: twins", 4)
