"""One of two ranks, or both, is killed with SIGKILL in a save of either tier.

The rank that is left is told who is missing within the deadline, and a fresh start resumes on both
ranks from the checkpoint before the save or the one after it, equal in every bit; it then saves.
The regular run tries a seeded sample of the calls that change something; HOLDFAST_FAULTS=full all.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from holdfast.errors import CheckpointError
from tests.faults.jobs import State, damages, leftovers, load, state_of
from tests.faults.local_stories import place_in_memory
from tests.faults.places import Pair
from tests.faults.report import record
from tests.faults.tiers import FULL, NEEDS_LOCAL
from tests.support.deadlines import DEADLINE_SECONDS, told_within
from tests.support.kernel_calls import Call, KernelCalls, plant, tree_of
from tests.support.ranks import RankExit, run_ranks

SEED = 20
VICTIMS = [(0,), (1,), (0, 1)]
"""Both only where each rank makes the same calls at the same time: on its own node."""


# -- what the ranks run ----------------------------------------------------------------------------


def _save_earlier(pair: Pair) -> State:
    """Save 10 and 20; return the state of 20."""
    job = pair.start()
    job.load()
    for step in (10, 20):
        job.train_to(step)
        pair.save(job)
    job.close()
    return state_of(job)


def _save_uninterrupted(pair: Pair, asynchronous: bool) -> tuple[State, list[str]]:
    """Load and save 30; return its state, and what this rank changed by which calls."""
    job = pair.start(async_save=asynchronous)
    job.load()
    calls, seen = KernelCalls(pair.own), list[str]()
    calls.before = lambda call: seen.append(str(call)) if call.changes else None
    job.train_to(30)
    distributed.barrier()
    with calls.watching():
        pair.save(job)
    state = state_of(job)
    job.close()
    return state, seen


@dataclass(frozen=True)
class _Told:
    """What a rank that was left heard, and how long after it had begun to wait."""

    message: str
    seconds: float


def _save_until_told(
    pair: Pair, victims: Sequence[int], kill_at: int, asynchronous: bool
) -> _Told | None:
    """Save 30 and 31; victims die in the first of them, the other hears of it in either."""
    job = pair.start(timeout_seconds=DEADLINE_SECONDS, async_save=asynchronous)
    job.load()
    calls, seen = KernelCalls(pair.own), 0

    def die(call: Call) -> None:
        nonlocal seen
        seen += call.changes
        if seen == kill_at and distributed.get_rank() in victims:
            os.kill(os.getpid(), signal.SIGKILL)

    calls.before = die
    job.train_to(30)
    with calls.watching():
        for _ in range(2):
            began = time.monotonic()
            try:
                pair.save(job)
            except CheckpointError as error:
                return _Told(str(error), time.monotonic() - began)
            job.state.train_state.step += 1  # nobody may be left to train with
    return None


def _resume(pair: Pair) -> tuple[State, list[str]]:
    """Load, save in every tier, and load that; return what was found, and what is wrong."""
    job = pair.start()
    found = load(job)
    for to_local in (True, False) if pair.to_local else (False,):
        job.train_to(job.step + 3)
        job.save(to_local=to_local)
    saved = state_of(job)
    job.close()
    again = pair.start()
    problems = [] if load(again) == saved else ["what was saved is not what is loaded"]
    again.close()
    if distributed.get_rank() == 0:
        problems += [f"left behind: {each}" for each in leftovers(pair.root / "store")]
        problems += damages(pair.root / "store")
    return found, problems


# -- the tries -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Try:
    """One save in which ranks were to be killed, and the start after it."""

    ends: list[Any]
    found: list[State]
    problems: list[str]


def _try(pair: Pair, victims: Sequence[int], kill_at: int, asynchronous: bool) -> _Try:
    ends = run_ranks(_save_until_told, 2, pair, victims, kill_at, asynchronous, may_die=victims)
    resumed = run_ranks(_resume, 2, pair)
    return _Try(
        ends, [state for state, _ in resumed], [each for _, more in resumed for each in more]
    )


def _check(where: str, victims: Sequence[int], tried: _Try, outcomes: Sequence[list[State]]) -> int:
    """Demand what must hold after ranks were killed; return which outcome was found."""
    for rank, end in enumerate(tried.ends):
        if rank in victims:
            assert isinstance(end, RankExit), f"not {where}"
            assert end.signal is signal.SIGKILL, f"not {where}"
            continue
        assert end is not None, f"{where}: rank {rank} was told nothing"
        assert f"rank {victims[0]}" in end.message, f"{where}: {end.message}"
        assert 'stage "' in end.message, f"{where}: {end.message}"
        assert end.seconds < told_within(victims[0]), f"{where}: {end.seconds} s"
    assert tried.found in outcomes, f"{where}: neither the old nor the new on both ranks"
    assert not tried.problems, f"{where}: {tried.problems}"
    return outcomes.index(tried.found)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "to_local",
    [pytest.param(False, id="persistent"), pytest.param(True, id="local", marks=NEEDS_LOCAL)],
)
def test_a_killed_rank_is_named_and_the_next_start_resumes(
    to_local: bool, asynchronous: bool, tmp_path: Path
) -> None:
    """Wherever ranks are killed, who is left is told, and both resume with one state."""
    with ExitStack() as ends:
        base = ends.enter_context(place_in_memory()) if to_local else tmp_path
        # Each spends most of its time waiting for a deadline: several at once.
        pool = ends.enter_context(ThreadPoolExecutor(6))
        pair = Pair(base / "earlier", to_local)
        old = run_ranks(_save_earlier, 2, pair)
        tree = {name: each for name, each in tree_of(pair.root).items() if "spare" not in name}

        def planted(name: str) -> Pair:
            plant(base / name, tree)
            return Pair(base / name, to_local)

        live = planted("uninterrupted")
        new, changes = zip(*run_ranks(_save_uninterrupted, 2, live, asynchronous), strict=True)
        tries: list[tuple[str, tuple[int, ...], Future[_Try]]] = []
        for victims in VICTIMS if to_local else VICTIMS[:2]:
            calls = changes[victims[0]]
            numbers: Sequence[int] = range(1, min(len(changes[each]) for each in victims) + 1)
            if not FULL:
                count = 1 if to_local else 3
                rng = random.Random(f"{SEED} {victims} {asynchronous}")
                numbers = sorted(rng.sample(numbers, count))
            for number in numbers:
                where = f"{victims} killed before call {number}, {calls[number - 1]}"
                future = pool.submit(
                    _try, planted(f"try_{len(tries)}"), victims, number, asynchronous
                )
                tries.append((where, victims, future))
        reached: dict[tuple[int, ...], int] = {}
        for where, victims, future in tries:
            found = _check(where, victims, future.result(), [old, list(new)])
            if not to_local:  # there it depends on how far the other rank had come
                assert found >= reached.get(victims, 0), f"{where}: the newer was there before"
                reached[victims] = found
    record("local: kill points" if to_local else "kill points", len(tries))
