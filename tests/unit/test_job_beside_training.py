"""One job beside the training thread, acted on by all ranks at the same step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore

from holdfast.errors import StageFailedError
from holdfast.ranks.coordinator import SingleProcess, StoreCoordinator
from holdfast.ranks.job import Background, Outcome

RANKS = 3


def _poll_until_outcome(background: Background[Any], limit: int = 10_000_000) -> Outcome[Any]:
    for _ in range(limit):
        if (outcome := background.poll()) is not None:
            return outcome
    raise AssertionError("no poll returned the outcome")


def test_without_a_job_there_is_no_outcome() -> None:
    """Polling and waiting before any job return None."""
    background: Background[int] = Background()
    assert background.poll() is None
    assert background.wait() is None
    assert not background.is_busy


@pytest.mark.parametrize("take", [_poll_until_outcome, Background.wait])
def test_an_outcome_is_handed_out_once(take: Callable[[Background[int]], Any]) -> None:
    """A job's value is returned by one poll or wait and by no later one; then another may start."""
    background: Background[int] = Background()
    for number in range(3):
        background.start(lambda number=number: number, SingleProcess())  # type: ignore[misc]
        assert background.is_busy
        assert take(background) == Outcome(value=number)
        assert not background.is_busy
        assert background.poll() is None
        assert background.wait() is None


def test_a_poll_does_not_wait_for_the_job() -> None:
    """While the job runs, polls return at once with nothing."""
    background: Background[str] = Background()
    release = threading.Event()

    def work() -> str:
        assert release.wait(60)
        return "done"

    background.start(work, SingleProcess())
    assert [background.poll() for _ in range(100)] == [None] * 100
    release.set()
    assert background.wait() == Outcome(value="done")


@pytest.mark.parametrize(
    "error", [ValueError("x"), StageFailedError("s", []), SystemExit(3), KeyboardInterrupt()]
)
def test_every_error_of_a_job_is_handed_over(error: BaseException) -> None:
    """Whatever ends a job, a SystemExit included, comes back as its outcome and not as a trace."""

    def work() -> None:
        raise error

    background: Background[None] = Background()
    background.start(work, SingleProcess())
    assert _poll_until_outcome(background) == Outcome(error=error)
    assert background.poll() is None


def test_a_job_runs_off_the_training_thread() -> None:
    """The work runs on a thread of its own, which the end of the program waits for."""
    background: Background[threading.Thread] = Background()
    background.start(threading.current_thread, SingleProcess())
    outcome = background.wait()
    assert outcome is not None
    assert outcome.value is not None
    assert outcome.value is not threading.current_thread()
    assert not outcome.value.daemon


def _on_ranks(program: Callable[[int, StoreCoordinator], Any]) -> list[Any]:
    store, found = HashStore(), [None] * RANKS

    def run(rank: int) -> None:
        found[rank] = program(rank, StoreCoordinator(store, rank, RANKS, 20.0, "test"))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(RANKS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive(), "a rank hangs"
    return found


PACES = [(3, 3, 3), (3, 10, 5), (10, 3, 5), (1, 1, 40), (7, 1, 2)]


@pytest.mark.parametrize("finishes_at", PACES)
def test_ranks_at_different_paces_act_at_the_same_poll(finishes_at: tuple[int, ...]) -> None:
    """Jobs that end at different steps are acted on at one step, not before the last has ended."""

    def program(rank: int, coordinator: StoreCoordinator) -> list[int]:
        background: Background[int] = Background()
        polls, acted_at = 0, []
        for _ in range(3):
            release = threading.Event()
            background.start(
                lambda release=release: release.wait(60) and rank,  # type: ignore[misc]
                coordinator,
            )
            first = polls
            while True:
                polls += 1
                outcome = background.poll()
                if polls - first == finishes_at[rank]:
                    release.set()
                if outcome is not None:
                    assert outcome == Outcome(value=rank)
                    acted_at.append(polls)
                    break
        return acted_at

    found = _on_ranks(program)
    assert found[0] == found[1] == found[2]
    assert found[0][0] > max(finishes_at)


def test_ranks_that_train_in_step_act_at_the_same_step() -> None:
    """With a collective in every step no rank waits for a step that another cannot reach."""
    collective = threading.Barrier(RANKS, timeout=30)

    def program(rank: int, coordinator: StoreCoordinator) -> list[int]:
        background: Background[int] = Background()
        acted_at, steps = [], 0
        for _ in range(20):
            background.start(lambda: rank, coordinator)
            outcome = None
            while outcome is None:
                collective.wait()
                steps += 1
                outcome = background.poll()
            acted_at.append(steps)
        return acted_at

    found = _on_ranks(program)
    assert found[0] == found[1] == found[2]


def test_an_error_on_one_rank_is_acted_on_by_all_at_once() -> None:
    """Ranks whose own job succeeded still act at the step of the one that failed."""

    def program(rank: int, coordinator: StoreCoordinator) -> tuple[int, str]:
        background: Background[int] = Background()

        def work() -> int:
            return rank if rank != 1 else 1 // 0

        background.start(work, coordinator)
        polls = 1
        while (outcome := background.poll()) is None:
            polls += 1
        return polls, type(outcome.error).__name__

    found = _on_ranks(program)
    assert len({polls for polls, _ in found}) == 1
    assert [error for _, error in found] == ["NoneType", "ZeroDivisionError", "NoneType"]


@pytest.mark.parametrize("failure", [StageFailedError("outcome", []), RuntimeError("lost")])
def test_a_rank_that_cannot_reach_the_others_acts_alone(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the agreement itself fails, in whatever way, the training thread does not hang."""

    class Unreachable(SingleProcess):
        def all_reduce(self, *_: Any, **__: Any) -> Any:
            raise failure

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    background: Background[int] = Background()
    background.start(lambda: 7, Unreachable())
    assert _poll_until_outcome(background) == Outcome(value=7)
