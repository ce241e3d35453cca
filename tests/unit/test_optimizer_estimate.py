"""What an optimizer will keep is known before its first step, or said to be unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from holdfast.format.items import Itemizer, structure_of
from holdfast.format.layout import Item
from holdfast.state.app import AppState
from holdfast.state.estimate import Estimate, estimate
from holdfast.state.small import Place
from tests.support.managers import Live, step
from tests.support.ranks import run_ranks
from tests.support.states import FEATURES, MODELS, digest

Make = Callable[[list[nn.Parameter]], optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda each: optim.SGD(each, lr=0.1),
    "momentum": lambda each: optim.SGD(each, lr=0.1, momentum=0.9),
    "adam": lambda each: optim.Adam(each, lr=0.1),
    "adamw": lambda each: optim.AdamW(each, lr=0.1),
    "amsgrad": lambda each: optim.AdamW(each, lr=0.1, amsgrad=True),
    "nadam": lambda each: optim.NAdam(each, lr=0.1),
    "radam": lambda each: optim.RAdam(each, lr=0.1),
    "adamax": lambda each: optim.Adamax(each, lr=0.1),
    "adadelta": lambda each: optim.Adadelta(each, lr=0.1),
    "adagrad": lambda each: optim.Adagrad(each, lr=0.1),
    "rmsprop": lambda each: optim.RMSprop(each, lr=0.1),
    "centered": lambda each: optim.RMSprop(each, lr=0.1, momentum=0.9, centered=True),
    "rprop": lambda each: optim.Rprop(each, lr=0.1),
    "asgd": lambda each: optim.ASGD(each, lr=0.1),
    "nesterov": lambda each: optim.SGD(each, lr=0.1, momentum=0.9, nesterov=True),
    "foreach": lambda each: optim.Adam(each, lr=0.1, foreach=True),
    "foreach asgd": lambda each: optim.ASGD(each, lr=0.1, foreach=True),
    "foreach rprop": lambda each: optim.Rprop(each, lr=0.1, foreach=True),
    "fused sgd": lambda each: optim.SGD(each, lr=0.1, momentum=0.9, fused=True),
    "fused adam": lambda each: optim.Adam(each, lr=0.1, fused=True),
    "fused amsgrad": lambda each: optim.AdamW(each, lr=0.1, amsgrad=True, fused=True),
    "tensor lr": lambda each: optim.AdamW(each, lr=torch.tensor(0.1)),
    "tensor lr asgd": lambda each: optim.ASGD(each, lr=torch.tensor(0.1)),
    "tensor betas": lambda each: optim.Adam(
        each, lr=0.1, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False
    ),
    "named": lambda each: optim.AdamW([(str(at), one) for at, one in enumerate(each)], lr=0.1),
    "constructor of its own": lambda each: _Configured({"lr": 0.1}, each),
    "two groups": lambda each: optim.SGD(
        [{"params": each[:1]}, {"params": each[1:], "momentum": 0.9}], lr=0.1
    ),
}


class _Renamed(optim.AdamW):
    """Steps as its base does."""


class _Configured(optim.RMSprop):
    """Cannot be constructed from parameters and options."""

    def __init__(self, config: dict[str, float], parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, **config)


class _Thrifty(optim.AdamW):
    """Steps in its own way."""

    def step(self, closure: Any = None) -> None:
        """Keep nothing."""


def _look(live: Live) -> tuple[Estimate, Sequence[Item]]:
    """Return what is foreseen, and what is there."""
    app = AppState(live.model, live.optimizer, None, None, Place(0, 1, 0, 1))
    leaves = app.gather_leaves()
    items = Itemizer().describe(leaves.values, leaves.paths).items
    return estimate(app.optimizers, leaves, items), items


def _live(make: Make, model: nn.Module) -> Live:
    return Live(model, make([*model.parameters()]))


@pytest.mark.parametrize("model", ["small", "tied", "mixed"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_foreseen_is_what_comes(kind: str, model: str) -> None:
    """Names, types, sizes and order, so that the plan made for it is the plan of the first save."""
    live = _live(OPTIMIZERS[kind], MODELS[model]())
    foreseen, _ = _look(live)
    step(live)
    after, items = _look(live)
    assert [each.name for each in foreseen.items] == [each.name for each in items]
    assert structure_of(foreseen.items) == structure_of(items)
    assert foreseen.uncounted == []
    assert structure_of(after.items) == structure_of(items), "it foresees what is there already"


def test_a_matrix_optimizer_is_foreseen() -> None:
    """Muon takes matrices alone."""
    live = _live(lambda each: optim.Muon(each, lr=0.1), nn.Linear(4, 3, bias=False))
    foreseen, _ = _look(live)
    step(live)
    assert structure_of(foreseen.items) == structure_of(_look(live)[1])


CAPTURABLE = [
    *(optim.Adadelta, optim.Adam, optim.Adamax, optim.ASGD),
    *(optim.NAdam, optim.RAdam, optim.RMSprop, optim.Rprop),
]


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
@pytest.mark.parametrize("kind", CAPTURABLE)
def test_what_torch_creates_before_it_refuses_is_foreseen(
    kind: type[optim.Optimizer], option: str
) -> None:
    """Leaves cannot be stepped differentiably, nor graphs be captured without a GPU."""
    options: dict[str, Any] = {"lr": 0.1, option: True}
    live = _live(lambda each: kind(each, **options), MODELS["mixed"]())
    foreseen, before = _look(live)
    with pytest.raises((AssertionError, RuntimeError)):
        step(live)
    _, items = _look(live)
    assert len(items) > len(before)
    assert structure_of(foreseen.items) == structure_of(items)
    assert foreseen.uncounted == []


UNKNOWN: dict[str, Make] = {
    "Adafactor": optim.Adafactor,
    "LBFGS": optim.LBFGS,
    "SparseAdam": optim.SparseAdam,
    "_Thrifty": _Thrifty,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_whose_step_cannot_be_tried_is_named(name: str) -> None:
    """It needs a closure, sparse gradients or numbers, or is somebody's own."""
    foreseen, items = _look(_live(UNKNOWN[name], MODELS["small"]()))
    assert foreseen.uncounted == [name]
    assert list(foreseen.items) == list(items)


def test_hooks_of_all_optimizers_are_not_run() -> None:
    """A step that is tried is of nobody's training."""
    seen: list[Any] = []
    hooks = [
        register_optimizer_step_pre_hook(lambda *call: seen.append(call)),
        register_optimizer_step_post_hook(lambda *call: seen.append(call)),
    ]
    try:
        known, items = _look(_live(OPTIMIZERS["adamw"], MODELS["small"]()))
    finally:
        for each in hooks:
            each.remove()
    assert seen == []
    assert len(known.items) == len(items) + 3 * 4


def test_several_optimizers_are_foreseen_together() -> None:
    """Their states come before all their groups."""
    model = nn.Linear(4, 2)
    optimizers = [optim.AdamW([model.weight], lr=0.1), optim.SGD([model.bias], lr=0.1, momentum=1)]
    live = Live(model, optimizers)
    foreseen, _ = _look(live)
    step(live)
    assert structure_of(foreseen.items) == structure_of(_look(live)[1])


def test_who_steps_in_its_own_way_is_not_guessed_at() -> None:
    """A subclass counts as its base only where it inherits the step."""
    foreseen, items = _look(_live(lambda each: _Thrifty(each, lr=0.1), MODELS["small"]()))
    assert foreseen.uncounted == ["_Thrifty"]
    assert list(foreseen.items) == list(items)
    foreseen, items = _look(_live(optim.Adafactor, MODELS["small"]()))
    assert foreseen.uncounted == ["Adafactor"]
    foreseen, items = _look(_live(lambda each: _Renamed(each, lr=0.1), MODELS["small"]()))
    assert foreseen.uncounted == []
    assert len(foreseen.items) == len(items) + 3 * 4


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_foreseeing_changes_nothing(kind: str) -> None:
    """No step, no state, no draw."""
    live = _live(OPTIMIZERS[kind], MODELS["mixed"]())
    before, state = live.digests(), digest(live.optimizer.state_dict()["state"])
    options = digest([{**each, "params": 0} for each in live.optimizer.param_groups])
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    _look(live)
    assert digest([{**each, "params": 0} for each in live.optimizer.param_groups]) == options
    assert (torch.get_default_dtype(), torch.get_default_device()) == (dtype, device)
    assert live.digests() == before
    assert digest(live.optimizer.state_dict()["state"]) == state
    assert all(each.grad is None for each in live.model.parameters())  # type: ignore[union-attr]
    assert torch.is_grad_enabled()


def _shard_and_look(kind: str) -> tuple[bool, int]:
    """Foresee the state of a model that is sharded over ranks; say whether it came so."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = MODELS["small"]()
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    live = _live(OPTIMIZERS[kind], model)
    foreseen, before = _look(live)
    inputs = torch.ones(2, FEATURES)
    model(inputs).sum().backward()
    live.optimizer.step()
    _, items = _look(live)
    return structure_of(foreseen.items) == structure_of(items), len(items) - len(before)


@pytest.mark.parametrize("kind", ["adamw", "tensor lr", "adamax"])
def test_shards_are_foreseen_as_shards(kind: str) -> None:
    """Each rank's part of a sharded parameter has its part of the state."""
    assert run_ranks(_shard_and_look, 2, kind) == [(True, 12), (True, 12)]
