"""A save by the last plan sends nothing on the training thread, and all ranks write or none."""

from __future__ import annotations

import os
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from holdfast import open_tensors
from holdfast.errors import CheckpointError
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store
from tests.support.thread_ranks import WRITER, ThreadRank, run_threads

SCHEDULES = int(os.environ.get("HOLDFAST_SCHEDULES", "12"))
"""How many are tried; a thousand take some minutes."""


def _committed(root: Path) -> dict[int, dict[str, Any]]:
    """Return the tensors of every checkpoint of a store, all of whose files are as committed."""
    store = Store(PosixStorage(root, LocalFilesystem()))
    listing = store.listing()
    assert not listing.broken
    assert not [each for each in os.listdir(root) if ".pending-" in each or ".replaced-" in each]
    found = {}
    for each in listing.checkpoints:
        assert store.verify(each) == []
        found[each.iteration] = {
            name: value.clone() for name, value in open_tensors(each.path).items()
        }
    return found


def _train_and_save(rank: ThreadRank) -> list[int]:
    """Count the requests of every thread but the writer's, for each of five saves."""
    found = []
    for _ in range(5):
        rank.train()
        rank.store.requests.clear()
        rank.save()
        while rank.manager._saving.is_busy:
            rank.train()
        requests = rank.store.requests
        found.append(sum(requests.values()) - requests[WRITER])
        assert requests[WRITER] > 0
    rank.end()
    return found


@pytest.mark.parametrize("ranks", [2, 5])
def test_a_save_by_the_last_plan_sends_nothing_on_the_training_thread(
    ranks: int, tmp_path: Path
) -> None:
    """The first save agrees first; the later ones, and the looks at them, send no request."""
    for found in run_threads(ranks, tmp_path, _train_and_save):
        assert found[0] > 0
        assert found[1:] == [0] * 4
    assert len(_committed(tmp_path)) == 5


def _grow_alone(rank: ThreadRank) -> list[tuple[str, int, int]]:
    for save in range(3):
        rank.train()
        if save == 1 and rank.rank == 1:
            rank.grow()
        rank.save()
        while rank.manager._saving.is_busy:
            rank.train()
    rank.end()
    return rank.told


def test_a_save_is_given_up_where_one_rank_has_changed(tmp_path: Path) -> None:
    """All ranks are told at the same step, it is no failure, and the next save has the change."""
    first, *others = run_threads(3, tmp_path, _grow_alone)
    assert others == [first] * 2
    assert [name for name, _, _ in first] == ["save", "save_failed", "save"]
    found = _committed(tmp_path)
    assert list(found) == [first[2][1], first[0][1]]
    assert "model.extra0" in found[first[2][1]]


def _grow_together(rank: ThreadRank) -> list[tuple[str, int, int]]:
    for _ in range(3):
        rank.train()
        rank.grow()
        rank.save()
    rank.end()
    return rank.told


def test_a_change_on_all_ranks_is_planned_and_saved_at_once(tmp_path: Path) -> None:
    """No save is lost by it."""
    run_threads(3, tmp_path, _grow_together)
    assert sorted(_committed(tmp_path)) == [1, 2, 3]


def _grow_at_the_end(rank: ThreadRank) -> list[tuple[str, int, int]]:
    for save in range(2):
        rank.train()
        if save == 1 and rank.rank == 0:
            rank.grow()
        rank.save()
        rank.end(terminate=save == 1)
    return rank.told


def test_the_last_save_is_not_lost_by_a_change(tmp_path: Path) -> None:
    """Waiting for it at its own step makes up for a save that was given up."""
    for told in run_threads(3, tmp_path, _grow_at_the_end):
        assert [each[:2] for each in told] == [("save", 1), ("save_failed", 2), ("save", 2)]
    assert sorted(_committed(tmp_path)) == [1, 2]


def _refuse_a_copy(rank: ThreadRank) -> tuple[list[str], int]:
    """Fail in the state dict of rank 1 in a save by the plan; say what each rank is told, when."""
    messages = []

    class Failing:
        fails = False

        def state_dict(self) -> dict[str, Any]:
            if self.fails:
                raise ValueError("as planned")
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    rank.live.scheduler = Failing()
    told_at = 0
    for save in range(3):
        rank.train()
        rank.live.scheduler.fails = save == 1 and rank.rank == 1
        context = rank.live
        context.save(rank.manager)
        while rank.manager._saving.is_busy:
            try:
                rank.train()
            except CheckpointError as error:
                messages.append(str(error))
                told_at = rank.step
    rank.end()
    return messages, told_at


def test_a_rank_that_fails_to_stage_is_told_on_all_at_one_step(tmp_path: Path) -> None:
    """By rank, stage and cause, and the next save works."""
    first, *others = run_threads(3, tmp_path, _refuse_a_copy)
    assert others == [first] * 2
    (message,) = first[0]
    assert 'failed in stage "capture"' in message
    assert "rank 1: ValueError: as planned" in message
    assert len(_committed(tmp_path)) == 2


def _follow_schedule(rank: ThreadRank, seed: int) -> list[tuple[str, int, int]]:
    """Train at a pace of this rank's own; grow on some ranks before some of the saves."""
    shared, own = random.Random(seed), random.Random(f"{seed} {rank.rank}")
    plan = [
        (shared.random() < 0.4, {each for each in range(rank.ranks) if shared.random() < 0.3})
        for _ in range(10)
    ]
    for saves, growing in plan:
        for _ in range(own.choice((0, 0, 1))):
            time.sleep(0.001 * own.random())
        rank.train()
        if saves:
            if rank.rank in growing:
                rank.grow()
            rank.save()
    rank.train()
    rank.save()
    rank.end()
    return rank.told


@pytest.mark.parametrize("part", range(4))
def test_no_schedule_of_changes_mixes_or_hangs(part: int, tmp_path: Path) -> None:
    """Whatever changes where and when, all ranks are told the same at the same step.

    What is committed is of one step on all ranks, and the last save is there.
    """
    for seed in range(part, SCHEDULES, 4):
        root = tmp_path / str(seed)
        first, *others = run_threads(3, root, partial(_follow_schedule, seed=seed), in_step=False)
        assert others == [first] * 2, seed
        found = _committed(root)
        assert set(found) == {step for name, step, _ in first if name == "save"}, seed
        assert max(found) == 11, seed
        for step, tensors in found.items():
            for name, value in tensors.items():
                assert name.startswith("model.extra") or (value == step).all(), (seed, step, name)
