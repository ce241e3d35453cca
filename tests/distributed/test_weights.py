"""A model from a checkpoint without a run, on several ranks and in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import distributed

import holdfast
from holdfast.errors import StageFailedError, StateMismatchError
from tests.distributed.training import Model, Run
from tests.support.ranks import run_ranks
from tests.support.stores import flip_bit


def _save(root: Path) -> dict[str, Any]:
    found = {}
    for parallel in ("ddp", "fsdp"):
        run = Run(parallel, root / parallel, async_save=False)
        for steps in (1, 2):
            run.train(steps)
            run.save()
        found[parallel] = run.tensors()["model"]
    return found


def _load(root: Path) -> list[Any]:
    found: list[Any] = []
    for saved in ("ddp", "fsdp"):
        for parallel in ("ddp", "fsdp"):
            run = Run(parallel, seed=9)
            result = holdfast.load_model_weights(run.model, root / saved, timeout_seconds=30.0)
            assert set(result.restored) == {"model"}
            found.append((result.iteration, run.tensors()["model"], saved))
        built = holdfast.build_model_from_checkpoint(
            root / saved, builder=lambda config: Model(), key=None, timeout_seconds=30.0
        )
        assert isinstance(built, Model)
    return found


@pytest.mark.parametrize("after", [1, 2, 4])
def test_any_layout_into_any(after: int, tmp_path: Path) -> None:
    """DDP and FSDP2 of two ranks, into both at one, two and four."""
    saved = run_ranks(_save, 2, tmp_path)[0]
    for found in run_ranks(_load, after, tmp_path):
        assert [each[0] for each in found] == [2] * 4
        assert all(tensors == saved[source] for _, tensors, source in found)


def _meet_trouble(root: Path) -> list[Any]:
    rank = distributed.get_rank()
    found: list[Any] = []
    run = Run("fsdp", seed=9)
    result = holdfast.load_model_weights(run.model, root / "fsdp", timeout_seconds=30.0)
    found.append((result.iteration, [each.iteration for each in result.skipped]))
    # One rank's model is another one: all are told, and none is touched.
    model = Model()
    if rank == 1:
        model.extra = model.head
    before = [each.tolist() for each in model.parameters()]
    with pytest.raises((StateMismatchError, StageFailedError)) as caught:
        holdfast.load_model_weights(model, root / "ddp", timeout_seconds=30.0)
    assert before == [each.tolist() for each in model.parameters()]
    found.append("extra" in str(caught.value))
    with pytest.raises(StageFailedError) as told:
        holdfast.load_model_weights(Model(), root / ["ddp", "fsdp"][rank], timeout_seconds=30.0)
    found.append("fsdp" in str(told.value))
    return found


def test_ranks_take_the_same_one_and_are_told_the_same(tmp_path: Path) -> None:
    """A damaged shard passes one over on all; a misfit, or another path, on one rank stops all."""
    run_ranks(_save, 2, tmp_path)
    flip_bit(tmp_path / "fsdp/iter_0000002/__1_0.distcp", 200)
    assert run_ranks(_meet_trouble, 2, tmp_path) == [[(1, [2]), True, True]] * 2
