"""Two jobs save into one store: one of them is told to stop, and nothing needs cleaning.

A stranger is refused before it writes anything. Of two starts of one run the later goes on and the
earlier is refused at its next commit, wherever in a save it is; what it was writing is not seen.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import (
    CheckpointError,
    StoreIdentityError,
    StoreNotLoadedError,
    SupersededAttemptError,
)
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store
from holdfast.tiers.persistent import PersistentTier
from tests.faults.jobs import Job, damages, leftovers, make_store
from tests.support.ranks import run_ranks
from tests.support.stores import FaultyFilesystem, tree

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


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_another_run_is_refused_before_it_writes(mode: dict[str, Any], tmp_path: Path) -> None:
    """A job with another run id can neither load nor save, changes nothing, and is told why."""
    make_store(tmp_path, 2, 4, run_id="first")
    before = tree(tmp_path)
    job = Job(tmp_path, run_id="second", **mode)
    job.train_to(6)
    for attempt in (job.load, job.save, job.save):
        with pytest.raises(StoreIdentityError) as caught:
            attempt()
        for part in ("'first'", "'second'", "persistent.directory", "run_id=null"):
            assert part in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_job_that_loaded_nothing_is_refused_before_it_writes(
    mode: dict[str, Any], tmp_path: Path
) -> None:
    """A job that starts afresh over a store in use is refused, with both ways out; both work."""
    saved = make_store(tmp_path / "used", 2, 4)
    before = tree(tmp_path / "used")
    job = Job(tmp_path / "used", seed=1, **mode)
    job.train_to(3)
    for _ in range(2):
        with pytest.raises(StoreNotLoadedError, match=r"Call load first .* or name another"):
            job.save()
    assert tree(tmp_path / "used") == before
    assert job.load().iteration == 4
    assert job.digests() == saved[4]
    job.train_to(5)
    job.save()
    assert _iterations(tmp_path / "used") == [5, 4, 2]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_older_of_two_starts_is_refused(mode: dict[str, Any], tmp_path: Path) -> None:
    """A forgotten twin is refused at its next save and for good, while the newer one goes on."""
    older, newer = Job(tmp_path, **mode), Job(tmp_path, **mode)
    older.train_to(2)
    older.save()
    newer.load()
    newer.train_to(4)
    newer.save()
    expected = newer.digests()
    before = tree(tmp_path)
    for step in (3, 5, 7):
        older.train_to(step)
        with pytest.raises(SupersededAttemptError, match=r"attempt 2 .* taken over from attempt 1"):
            older.save()
    assert tree(tmp_path) == before
    third = Job(tmp_path, seed=1)
    assert third.load().iteration == 4
    assert third.digests() == expected
    newer.train_to(6)
    newer.save()
    assert _iterations(tmp_path) == [6, 4, 2]
    assert not leftovers(tmp_path)
    assert not damages(tmp_path)


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


def test_a_late_start_that_dies_takes_nothing_with_it(tmp_path: Path) -> None:
    """A start that claims the store when what it resumed from is gone supersedes nothing."""
    older, filesystem = Job(tmp_path), LocalFilesystem()
    older.train_to(1)
    older.save()
    late = PersistentTier(PosixStorage(tmp_path, filesystem), None, 3)
    late.resume_from(late.store.find(1))
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


def _start_and_save(directory: Path) -> list[int]:
    """Start, and save until refused, as one of several that know nothing of one another.

    A load may fail as well: another start may replace or remove what is being read.
    """
    committed: list[int] = []
    for _ in range(3):
        job = Job(directory)
        try:
            job.load()
            for _ in range(3):
                job.train_to(job.step + 1)
                job.save()
                committed.append(job.step)
        except CheckpointError:
            continue
    return committed


def test_many_starts_at_once_leave_a_sound_store(tmp_path: Path) -> None:
    """Four jobs that start over one empty store at once lose one another's race, and no bit."""
    committed = run_ranks(_start_and_save, 4, tmp_path, initialise=False)
    assert any(committed)
    job = Job(tmp_path, seed=1)
    found = job.load()
    reference = Job(tmp_path / "reference")
    reference.train_to(found.iteration)
    assert job.digests() == reference.digests()
    assert not found.skipped or all("superseded" in each.reason for each in found.skipped)
    job.train_to(job.step + 1)
    job.save()
    assert not leftovers(tmp_path)
    assert not damages(tmp_path)
