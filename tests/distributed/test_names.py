"""Names that only some ranks have: stages of a pipeline, experts beside a shared router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from holdfast.config import CheckpointConfig
from holdfast.errors import StateMismatchError
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext, GlobalState
from tests.support.ranks import run_ranks
from tests.support.states import digest

LAYERS = 4


class _Stage(nn.Module):
    """Some layers of one model, and a router that every rank has."""

    def __init__(self, layers: list[int], fill: float | None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.router = nn.Linear(3, 3, bias=False)
        for each in range(LAYERS):
            layer = nn.Linear(3, 3)
            if each in layers:
                self.add_module(f"layer{each}", layer)
        if fill is not None:
            for parameter in self.parameters():
                nn.init.constant_(parameter, fill)


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Biases are in a group of their own; the third group is empty everywhere."""
    named = dict(model.named_parameters())
    biases = [each for name, each in named.items() if name.endswith("bias")]
    weights = [each for name, each in named.items() if name.endswith("weight")]
    return torch.optim.AdamW(
        [{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.2}, {"params": [], "lr": 0.3}]
    )


def _step(model: nn.Module, optimizer: Any) -> None:
    for name, parameter in model.named_parameters():
        seed = sum(name.encode())
        parameter.grad = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def _by_name(model: nn.Module, optimizer: Any) -> dict[str, str]:
    found = {name: digest(each) for name, each in model.state_dict().items()}
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        for name, parameter in model.named_parameters():
            if any(parameter is each for each in group["params"]):
                found[f"{name}:state"] = digest([optimizer.state[parameter], options])
    return found


def _manager(root: str, **load: Any) -> DefaultCheckpointManager:
    values = {"persistent": {"directory": root}, "load": load, "async_save": False}
    return DefaultCheckpointManager(CheckpointConfig.from_mapping(values))


def _state(step: int) -> GlobalState:
    state = GlobalState()
    state.train_state.step = step
    return state


def _save(root: str, layout: list[list[int]]) -> None:
    model = _Stage(layout[distributed.get_rank() if len(layout) > 1 else 0], None)
    optimizer = _optimizer(model)
    _step(model, optimizer)
    _manager(root).save(CheckpointSaveContext(_state(1), model, optimizer, None))


def _load(root: str, layout: list[list[int]], stepped: bool) -> dict[str, str]:
    model = _Stage(layout[distributed.get_rank() if len(layout) > 1 else 0], 0.5)
    optimizer = _optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 9.0
    if stepped:
        _step(model, optimizer)
    _manager(root).load(CheckpointLoadContext(GlobalState(), model, optimizer, None))
    assert optimizer.param_groups[2]["lr"] == 0.3
    return _by_name(model, optimizer)


def _truth() -> dict[str, str]:
    model = _Stage([*range(LAYERS)], None)
    optimizer = _optimizer(model)
    _step(model, optimizer)
    return _by_name(model, optimizer)


def _save_alone(root: str) -> None:
    _save(root, [[*range(LAYERS)]])


LAYOUTS = {
    "one": [[0, 1, 2, 3]],
    "halves": [[0, 1], [2, 3]],
    "swapped": [[2, 3], [0, 1]],
    "uneven": [[0], [1, 2, 3]],
    "bare": [[], [0, 1, 2, 3]],
    "four": [[0], [1], [2], [3]],
}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("halves", "halves"), ("halves", "swapped"), ("halves", "one"), ("halves", "four"),
        ("halves", "uneven"), ("one", "halves"), ("four", "halves"), ("bare", "halves"),
    ],
)  # fmt: skip
def test_stages_come_back_wherever_they_are_now(tmp_path: Path, saved: str, loaded: str) -> None:
    """A strict load: values, optimizer state and options of every layer, by name."""
    run_ranks(_save, len(LAYOUTS[saved]), str(tmp_path), LAYOUTS[saved])
    found = run_ranks(_load, len(LAYOUTS[loaded]), str(tmp_path), LAYOUTS[loaded], saved == "one")
    truth = _truth()
    names = [name for each in found for name in each]
    assert set(names) == set(truth)
    for each in found:
        assert each == {name: truth[name] for name in each}


def _load_part(root: str) -> list[Any]:
    """Load what lacks layer 3 on every rank: refused by all, or left out."""
    layers = [[0], [1, 2]][distributed.get_rank()]
    model = _Stage(layers, 0.5)
    optimizer = _optimizer(model)
    before = _by_name(model, optimizer)
    with pytest.raises(StateMismatchError) as caught:
        _manager(root).load(CheckpointLoadContext(GlobalState(), model, optimizer, None))
    assert _by_name(model, optimizer) == before
    context = CheckpointLoadContext(GlobalState(), model, optimizer, None)
    _manager(root, strict={"names": "warn"}).load(context)
    return [sorted(caught.value.unexpected), caught.value.missing, _by_name(model, optimizer)]


def test_what_no_rank_has_is_unexpected(tmp_path: Path) -> None:
    """And nothing else is: each name that any rank has is expected."""
    run_ranks(_save, 2, str(tmp_path), LAYOUTS["halves"])
    truth = _truth()
    parts = ("bias", "weight")
    expected = [f"{root}.layer3.{part}" for root in ("model", "optimizer") for part in parts]
    for unexpected, missing, found in run_ranks(_load_part, 2, str(tmp_path)):
        assert (unexpected, missing) == (expected, ())
        assert found == {name: truth[name] for name in found}


def _two_managers(root: str) -> list[bool]:
    """Save and load with two managers in turn, in one process and another order of stores."""
    pairs = []
    for name in ("a", "b"):
        model = _Stage([distributed.get_rank()], None if name == "a" else 2.0)
        pairs.append((_manager(f"{root}/{name}"), model, _optimizer(model)))
    for number in (1, 2):
        for manager, model, optimizer in pairs:
            _step(model, optimizer)
            manager.save(CheckpointSaveContext(_state(number), model, optimizer, None))
    same = []
    for name, (_, model, optimizer) in zip(("a", "b"), pairs, strict=True):
        fresh = _Stage([distributed.get_rank()], 0.5)
        mine = _optimizer(fresh)
        _manager(f"{root}/{name}").load(CheckpointLoadContext(GlobalState(), fresh, mine, None))
        same.append(_by_name(fresh, mine) == _by_name(model, optimizer))
    return same


def test_two_managers_of_one_process_do_not_meet(tmp_path: Path) -> None:
    """Each has its own store, models and optimizers, and calls that ranks make in turn."""
    assert run_ranks(_two_managers, 2, str(tmp_path)) == [[True, True]] * 2
