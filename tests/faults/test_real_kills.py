"""A process is killed with SIGKILL before each step of a save, and the next one resumes.

After every kill a fresh process gets the checkpoint before the save or the one after it, equal in
every bit: never neither, never a mixture, and never the old one again once the new one has been
there. It then saves, and what the dead process left behind is gone. The regular run tries every
second step that changes the disk, and every rename, in the plainest case and a seeded sample
elsewhere; HOLDFAST_FAULTS=full tries every step everywhere.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from holdfast.protocol import LoadResult
from holdfast.storage.store import checkpoint_name
from tests.faults.jobs import Job, copy_store, damages, leftovers, make_store
from tests.faults.killing import KillingFilesystem, in_fork
from tests.faults.report import record
from tests.support.deadlines import LAUNCH_SECONDS
from tests.support.ranks import run_ranks

FULL = os.environ.get("HOLDFAST_FAULTS") == "full"
SEED = 20

_READING = ("list_directory", "open_existing", "size_bytes", "is_directory")
"""Steps that change nothing: a kill before one is a kill before the next that does."""

State = tuple[int, dict[str, str]] | None
"""What a load restores: the iteration and the digests of it all. None: nothing was there."""


@dataclass(frozen=True)
class Saving:
    """A job that is about to save."""

    job: Job
    outcomes: Sequence[State]
    """What a fresh process may find, in the order in which they may follow one another."""


# What is killed: each returns a job that has the given file system and is about to save.


def _first_save(directory: Path, **options: Any) -> Saving:
    job = Job(directory, **options)
    job.load()
    job.train_to(4)
    return Saving(job, [None, _state(job)])


def _over_an_older_one(directory: Path, **options: Any) -> Saving:
    saved = make_store(directory, 2)
    job = Job(directory, **options)
    job.load()
    job.train_to(4)
    return Saving(job, [(2, saved[2]), _state(job)])


def _the_same_iteration_again(directory: Path, **options: Any) -> Saving:
    saved = make_store(directory, 2, 4)
    job = Job(directory, **options)
    job.load()
    job.run.train(1)  # not counted: another state of the same iteration
    return Saving(job, [(4, saved[4]), _state(job)])


def _the_same_iteration_after_a_rollback(directory: Path, **options: Any) -> Saving:
    saved = make_store(directory, 2, 4)
    job = Job(directory, load={"step": 2}, **options)
    job.load()
    job.run.train(1)
    job.train_to(4)
    # From the claim of the new attempt on, what it rolled back loads by number only.
    return Saving(job, [(4, saved[4]), (2, saved[2]), _state(job)])


def _retention(directory: Path, **options: Any) -> Saving:
    saved = make_store(directory, 2, 4)
    persistent = {"directory": str(directory), "keep": {"last": 1}}
    job = Job(directory, persistent=persistent, **options)
    job.load()
    job.train_to(6)
    return Saving(job, [(4, saved[4]), _state(job)])


def _sweeping(directory: Path, **options: Any) -> Saving:
    saved = make_store(directory, 2, 4)
    for leftover in ("iter_0000006.pending-00000001", "iter_0000004.replaced-00000002"):
        shutil.copytree(directory / checkpoint_name(2), directory / leftover)
    job = Job(directory, **options)
    job.load()
    job.train_to(6)
    return Saving(job, [(4, saved[4]), _state(job)])


SCENARIOS: dict[str, Callable[..., Saving]] = {
    each.__name__.removeprefix("_").replace("_", " "): each
    for each in (
        _over_an_older_one,
        _first_save,
        _the_same_iteration_again,
        _the_same_iteration_after_a_rollback,
        _retention,
        _sweeping,
    )
}


def _state(job: Job) -> State:
    return job.step, job.digests()


# One rank.


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_killed_save_leaves_the_old_or_the_new(
    scenario: str, asynchronous: bool, tmp_path: Path
) -> None:
    """Wherever one rank is killed, the next start finds the old checkpoint or the new in full."""
    # Forks come from a process of its own: the one that runs pytest may have threads.
    [kills] = run_ranks(
        _kill_everywhere,
        1,
        scenario,
        asynchronous,
        tmp_path,
        timeout_seconds=(60 if FULL else 2) * LAUNCH_SECONDS,
        initialise=False,
    )
    record("kill points", kills)


def _kill_everywhere(scenario: str, asynchronous: bool, folder: Path) -> int:
    """Kill at every chosen step of one scenario and return the number of kills."""
    store, filesystem = folder / "store", KillingFilesystem()
    saving = SCENARIOS[scenario](store, filesystem=filesystem, async_save=asynchronous)
    store.mkdir(exist_ok=True)
    before = copy_store(store, folder / "before")

    def save(kill_at: int | None) -> list[str]:
        filesystem.arm(kill_at)
        saving.job.save()
        return filesystem.steps

    steps = in_fork(lambda: save(None)).value
    assert steps is not None
    plainest = scenario == "over an older one" and not asynchronous
    kills, reached = 0, 0
    for kill_at in _chosen(steps, plainest, f"{scenario} {asynchronous}"):
        copy_store(before, store)
        ending = in_fork(lambda: save(kill_at))  # noqa: B023  # called at once
        where = f"killed before step {kill_at} of {len(steps)}: {(*steps, 'the end')[kill_at - 1]}"
        if kill_at > len(steps):
            assert ending.signal is None, where
        else:
            assert ending.signal is not None, f"not {where}"
            kills += 1
        found = in_fork(lambda: _resume(store, saving.outcomes)).value
        assert found is not None
        index, problems = found
        assert not problems, f"{where}: {problems}"
        assert index >= reached, f"{where}: the new checkpoint was there before, and is gone"
        reached = index
    assert reached == len(saving.outcomes) - 1, "the save that nobody killed is not there"
    return kills


def _chosen(steps: Sequence[str], plainest: bool, seed: str) -> list[int]:
    """Return the steps to kill at, from 1, in order; the last is one more than there are."""
    everything = range(1, len(steps) + 2)
    if FULL:
        return list(everything)
    changing = _changing(steps)
    renames = [each for each in changing if steps[each - 1].startswith(("rename", "link"))]
    later = [each for each in changing if each > renames[-1]]
    if plainest:
        chosen = {*changing[::2], *renames}
    else:
        chosen = {*random.Random(f"{SEED} {seed}").sample(changing, 6), renames[-1]}
    changing = sorted({*chosen, *later[:1]})
    return [*changing, everything[-1]]


def _changing(steps: Sequence[str]) -> list[int]:
    return [number for number, step in enumerate(steps, 1) if step.split()[0] not in _READING]


def _resume(directory: Path, outcomes: Sequence[State]) -> tuple[int, list[str]]:
    """Start afresh, load, save; return which outcome was found, and what is wrong."""
    job = Job(directory)
    result = job.load()
    index, problems = _recognise(job, result, outcomes)
    job.train_to(job.step + 3)
    job.save()
    saved = _state(job)
    problems += [f"left behind: {each}" for each in leftovers(directory)]
    problems += damages(directory)
    again = Job(directory)
    again.load()
    if _state(again) != saved:
        problems.append(f"what the next start saved at {job.step} is not what it loads")
    return index, problems


def _recognise(job: Job, result: LoadResult, outcomes: Sequence[State]) -> tuple[int, list[str]]:
    found = _state(job) if result.found else None
    if found in outcomes:
        return outcomes.index(found), []
    if found is None:
        return -1, ["found nothing"]
    step, digests = found
    problems = [f"found {step}, which is not among the outcomes"]
    for each in outcomes:
        if each is not None and each[0] == step:
            names = sorted({*digests, *each[1]})
            differing = [name for name in names if digests.get(name) != each[1].get(name)]
            problems.append(f"differs from {step} in {', '.join(differing)}")
    return -1, problems
