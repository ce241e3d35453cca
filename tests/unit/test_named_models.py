"""Several models in one manager: by name, as a pair of opponents, as teacher and student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from holdfast.errors import NothingFitsError
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext, GlobalState
from tests.support.managers import manager_of
from tests.support.states import digest


def _pair(seed: int) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    torch.manual_seed(seed)
    models = {"actor": nn.Linear(3, 2), "critic": nn.Linear(3, 2)}
    optimizers = {
        "actor": torch.optim.AdamW(models["actor"].parameters(), lr=0.1),
        "critic": torch.optim.SGD(models["critic"].parameters(), lr=0.2, momentum=0.9),
    }
    return models, optimizers


def _step(models: dict[str, nn.Module], optimizers: dict[str, Any]) -> None:
    for model in models.values():
        for each in model.parameters():
            each.grad = torch.ones_like(each)
    for optimizer in optimizers.values():
        optimizer.step()


def _digests(models: dict[str, nn.Module], optimizers: dict[str, Any]) -> list[str]:
    return [digest(each.state_dict()) for each in (*models.values(), *optimizers.values())]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_models_by_name_come_back(tmp_path: Path, asynchronous: bool) -> None:
    """With the optimizer of each; names in the file begin with the model's, also to plain DCP."""
    models, optimizers = _pair(1)
    manager = manager_of(tmp_path, async_save=asynchronous)
    state = GlobalState()
    for number in (1, 2, 3):  # the later ones are followed
        _step(models, optimizers)
        state.train_state.step = number
        manager.save(CheckpointSaveContext(state, dict(models), dict(optimizers), None))
        manager.finalize_async_saves(state, blocking=True)
    live, fresh = _pair(2)
    result = manager_of(tmp_path).load(CheckpointLoadContext(GlobalState(), live, fresh, None))
    assert _digests(live, fresh) == _digests(models, optimizers)
    assert result.restored["model"].tensors == 4
    names = FileSystemReader(tmp_path / "iter_0000003").read_metadata().state_dict_metadata
    for name in ("model.actor.weight", "optimizer.state.critic.weight.momentum_buffer"):
        assert name in names


def test_optimizers_of_one_parameter_are_known_by_their_keys(tmp_path: Path) -> None:
    """Whichever is given first: each gets its own state, and not the other's."""
    model = nn.Linear(3, 2)
    optimizers = {"slow": torch.optim.AdamW(model.parameters(), lr=0.1)}
    optimizers["fast"] = torch.optim.AdamW(model.parameters(), lr=0.1)
    _step({"model": model}, {"fast": optimizers["fast"]})
    _step({"model": model}, optimizers)
    state = GlobalState()
    state.train_state.step = 1
    manager_of(tmp_path, async_save=False).save(
        CheckpointSaveContext(state, model, optimizers, None)
    )
    live = nn.Linear(3, 2)
    fresh = {key: torch.optim.AdamW(live.parameters(), lr=0.1) for key in ("fast", "slow")}
    manager_of(tmp_path).load(CheckpointLoadContext(GlobalState(), live, fresh, None))
    for key, steps in (("fast", 2), ("slow", 1)):
        assert [float(each["step"]) for each in fresh[key].state.values()] == [steps] * 2


def test_a_teacher_needs_no_optimizer(tmp_path: Path) -> None:
    """The student's alone is given, and both models come back."""
    models, optimizers = _pair(1)
    del optimizers["critic"]
    _step(models, optimizers)
    state = GlobalState()
    manager_of(tmp_path).save(CheckpointSaveContext(state, models, optimizers["actor"], None))
    live, fresh = _pair(2)
    del fresh["critic"]
    manager_of(tmp_path).load(CheckpointLoadContext(GlobalState(), live, fresh, None))
    assert _digests(live, fresh) == _digests(models, optimizers)


def test_one_model_of_two_is_no_model_without_a_name(tmp_path: Path) -> None:
    """The error names the prefix that would make it fit."""
    models, optimizers = _pair(1)
    manager_of(tmp_path).save(CheckpointSaveContext(GlobalState(), models, optimizers, None))
    with pytest.raises(NothingFitsError, match=r"actor\.|critic\."):
        manager_of(tmp_path).load(
            CheckpointLoadContext(GlobalState(), models["actor"], optimizers["actor"], None)
        )
    named = {"actor": models["actor"]}
    context = CheckpointLoadContext(GlobalState(), named, optimizers["actor"], None)
    manager_of(tmp_path, load={"strict": {"names": "ignore"}}).load(context)
