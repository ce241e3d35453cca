"""A run that was killed and resumed is the run that was not, to the last bit of every rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.training import Run, seed_rank
from tests.support.ranks import RankExit, run_ranks

MODES = [(parallel, asynchronous) for parallel in ("ddp", "fsdp") for asynchronous in (False, True)]
SAVES = (3, 6, 9)
KILLED_AT = 8
LAST = 12


def _train_through() -> list[tuple[dict[str, Any], float, float]]:
    """Train without any manager in sight; return the facts, and the loss before and after."""
    found = []
    for parallel in ("ddp", "fsdp"):
        before = Run(parallel).evaluate()
        run = Run(parallel)
        run.train(LAST)
        found.append((run.facts(), before, run.evaluate()))
    return found


def _train_and_die(root: Path) -> None:
    for parallel, asynchronous in MODES:
        run = Run(parallel, _store(root, parallel, asynchronous), async_save=asynchronous)
        run.train(KILLED_AT, SAVES)
    os.kill(os.getpid(), signal.SIGKILL)


def _resume(root: Path) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    found = []
    for parallel, asynchronous in MODES:
        directory = _store(root, parallel, asynchronous)
        run = Run(parallel, directory, seed=77, async_save=asynchronous)
        result = run.load()
        run.train(LAST, SAVES)
        found.append((tuple(result), run.facts()))
    return found  # type: ignore[return-value]  # a result unpacks as two numbers


def _store(root: Path, parallel: str, asynchronous: bool) -> Path:
    return root / f"{parallel}-{'async' if asynchronous else 'sync'}"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(ranks: int, tmp_path: Path) -> None:
    """The resumed run's own losses, samples, parameters, moments, schedule and draws, bit for bit.

    For DDP and FSDP2, sync and async saves; every rank draws from its own seeds, dropout is on, and
    the resumed run was built from other seeds altogether.
    """
    through = run_ranks(_train_through, ranks)
    ends = run_ranks(_train_and_die, ranks, tmp_path, may_die=range(ranks))
    assert all(isinstance(each, RankExit) and each.signal is signal.SIGKILL for each in ends)
    resumed = run_ranks(_resume, ranks, tmp_path)
    for rank in range(ranks):
        for (parallel, asynchronous), (result, facts) in zip(MODES, resumed[rank], strict=True):
            where = f"rank {rank}, {parallel}, {'async' if asynchronous else 'sync'}"
            expected = dict(through[rank][parallel == "fsdp"][0])
            resumed_at = 6
            assert result == (resumed_at, 1000 * resumed_at), where
            expected["losses"] = expected["losses"][resumed_at:]
            expected["seen"] = expected["seen"][4 * resumed_at :]
            for name, value in expected.items():
                assert facts[name] == value, f"{where}: {name}"
    for _, before, after in through[0]:
        assert after < 0.5 * before, "nothing was learned: a lost state might not show"
    draws = {facts["draws"] for each in through for facts, _, _ in each[:1]}
    assert len(draws) == ranks, "the ranks draw alike: one rank's state for all would pass"


def _lose_moments(run: Run) -> None:
    run.optimizer.state.clear()


def _lose_schedule(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = 0.05


def _lose_data(run: Run) -> None:
    run.data.position += 1


def _lose_generators(run: Run) -> None:
    seed_rank(run.rank)


LOSSES: dict[str, Callable[[Run], None]] = {
    "moments": _lose_moments,
    "schedule": _lose_schedule,
    "data": _lose_data,
    "generators": _lose_generators,
}


def _resume_with_a_loss(root: Path) -> dict[str, list[str]]:
    run = Run("fsdp", root)
    run.train(4, save_at=[4])
    run.train(8)
    found = {"nothing": run.losses[4:]}
    for name, lose in LOSSES.items():
        run = Run("fsdp", root)
        run.load()
        lose(run)
        run.train(8)
        found[name] = run.losses
    return found


def test_whatever_a_resume_loses_shows_in_its_losses(tmp_path: Path) -> None:
    """The comparison above is worth something: each loss of state changes the numbers it compares.

    The state is complete; only the copy that the run goes on with has one part missing.
    """
    for found in run_ranks(_resume_with_a_loss, 2, tmp_path):
        for name in LOSSES:
            assert found[name] != found["nothing"], f"lost {name} and nothing showed"
