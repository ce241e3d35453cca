"""Optimizer state under FSDP2 comes back as what it was, and the next step is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from holdfast.errors import StateMismatchError
from tests.support.deadlines import ANSWER_SECONDS
from tests.support.managers import Live, manager_of
from tests.support.ranks import run_ranks
from tests.support.subclasses import Coded, CodedMomentum

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class _Rows(torch.optim.Optimizer):
    """One statistic per row, as NorMuon and Adafactor have; of the shard alone if `plain`."""

    def __init__(self, parameters: Any, plain: bool) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self._is_plain = plain

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            value, gradient = parameter, parameter.grad
            if self._is_plain:
                value, gradient = value._local_tensor, gradient._local_tensor
            state = self.state[parameter]
            row = state.setdefault("row", torch.zeros_like(value[..., :1]))
            row.lerp_(gradient.square().mean(-1, keepdim=True), 0.1)
            value.sub_(gradient / (row.sqrt() + 1e-8), alpha=0.1)


class _Listed(torch.optim.SGD):
    """Keeps a list of DTensors for each parameter, as optimizers of whole matrices do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            (mean,) = state.setdefault("means", [torch.zeros_like(parameter)])
            parameter.sub_(mean.lerp_(parameter.grad, 0.1), alpha=0.1)


class _Scaled(nn.Module):
    """One replicated scale of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        scale = distribute_tensor(torch.tensor(1.0), mesh, [Replicate()])
        self.scale = nn.Parameter(scale)

    def forward(self, inputs: torch.Tensor) -> Any:
        return torch.ones_like(inputs) * self.scale.to_local()  # replicas stay equal


def _build(kind: str) -> Live:
    torch.manual_seed(0)
    if kind == "scale":
        scaled = _Scaled()
        return Live(scaled, torch.optim.AdamW(scaled.parameters(), lr=0.1))
    model = nn.Linear(8, 5, bias=False)  # uneven on two ranks
    fully_shard(model)
    if kind == "subclass":
        return Live(model, CodedMomentum(model.parameters()))
    if kind == "listed":
        return Live(model, _Listed(model.parameters()))
    return Live(model, _Rows(model.parameters(), plain=kind == "plain"))


def _step(live: Live) -> None:
    assert isinstance(live.model, nn.Module)
    live.optimizer.zero_grad()
    inputs = torch.arange(8.0) + distributed.get_rank()
    (live.model(inputs) - 1).square().mean().backward()
    live.optimizer.step()


def _facts(live: Live) -> dict[str, Any]:
    """Everything of model and optimizer on this rank, with what it is."""
    assert isinstance(live.model, nn.Module)
    found: dict[str, Any] = {}
    names = {parameter: name for name, parameter in live.model.named_parameters()}
    for name, parameter in live.model.named_parameters():
        found[name] = _fact(parameter)
    for parameter, state in live.optimizer.state.items():
        for key, value in state.items():
            found[f"{names[parameter]}.{key}"] = _fact(value)
    return found


def _fact(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_fact, value))
    if not isinstance(value, torch.Tensor):
        return value
    layout = None
    if isinstance(value, DTensor):
        layout = str(value.placements), value.size(), value.stride()
        value = value._local_tensor
    if isinstance(value, Coded):
        return "Coded", layout, value.codes.tolist(), value.scale.item()
    return type(value) in (torch.Tensor, nn.Parameter), layout, value.tolist()


KINDS = ("rows", "plain", "subclass", "scale", "listed")


def _resume(root: Path) -> dict[str, list[Any]]:
    """Return, by kind, the facts of the uninterrupted run and of the resumed one."""
    found = {}
    for kind in KINDS:
        live, other = _build(kind), _build(kind)
        _step(live)
        manager = manager_of(root / kind, timeout_seconds=ANSWER_SECONDS)
        live.load(manager)
        live.save(manager, 1)
        at_save = _facts(live)
        other.load(manager_of(root / kind, timeout_seconds=ANSWER_SECONDS))
        facts = [at_save, _facts(other)]
        _step(live)
        _step(other)
        found[kind] = [*facts, _facts(live), _facts(other)]
    return found


def _reload(root: Path) -> list[str]:
    """Load what two ranks saved at another world size; return what was said of each kind."""
    said = []
    for kind in KINDS:
        live = _build(kind)
        try:
            live.load(manager_of(root / kind, timeout_seconds=ANSWER_SECONDS))
        except StateMismatchError as error:
            said.append(f"{kind}: {error}")
            continue
        _step(live)
        said.append(f"{kind}: loaded")
    return said


def test_optimizer_state_resumes_as_the_kind_it_was(tmp_path: Path) -> None:
    """Row statistics as DTensors and as plain tensors of a shard, a subclass in DTensors, and a
    parameter of no dimension beside a plain step: restored as it was, and the next step is that
    of the uninterrupted run bit for bit. Elsewhere what is of one shard is refused by name.
    """
    for found in run_ranks(_resume, 2, tmp_path):
        for kind in KINDS:
            saved, restored, went_on, resumed = found[kind]
            assert saved == restored, kind
            assert went_on == resumed, kind
    (said,) = run_ranks(_reload, 1, tmp_path)
    assert said[0] == "rows: loaded"
    assert "optimizer.state.weight.row is plain state of one shard" in said[1]
    assert "optimizer.state.weight.momentum is a DTensor of Coded" in said[2]
    assert said[3] == "scale: loaded"
