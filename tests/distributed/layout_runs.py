"""Runs that train under every layout, to be saved in the middle and resumed.

Owns one small trainable model for each way of dividing or wrapping it, with the step that it needs.
Promises that every run learns, draws dropout, and that ranks which read different samples draw
different numbers; ranks that hold parts of one layer have to draw alike. Knows no expected numbers:
a run is compared with itself, uninterrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.training import BATCH, FEATURES, Data, Model, Run, seed_rank


def _grid() -> DeviceMesh:
    """Return all ranks as a table with rows of two."""
    size = distributed.get_world_size()
    return init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("outer", "inner"))


def _ddp(model: nn.Module, **options: Any) -> nn.Module:
    # See `training.build_model`: the first layout of the buckets is kept.
    return DistributedDataParallel(model, find_unused_parameters=True, **options)


def _fsdp(model: Any, mesh: DeviceMesh | None = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    built: nn.Module = model
    return built


class Normalised(nn.Module):
    """A model whose buffers follow the samples that its rank has seen."""

    def __init__(self, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 13), make_norm(13), nn.Tanh(), nn.Dropout(0.1), nn.Linear(13, 1)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layers(inputs)
        return output


class SyncBatchNorm(nn.BatchNorm1d):
    """The state and statistics of torch's SyncBatchNorm, which only accelerators take."""

    def forward(self, inputs: Tensor) -> Tensor:
        size = distributed.get_world_size()
        mean = all_reduce(inputs.mean(0)) / size
        variance = all_reduce((inputs - mean).square().mean(0)) / size
        running: Any = self
        with torch.no_grad():
            running.num_batches_tracked += 1
            running.running_mean.lerp_(mean, 0.1)
            running.running_var.lerp_(variance, 0.1)
        return (inputs - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, FEATURES)
        self.mirror = nn.Linear(FEATURES, FEATURES, bias=False)
        self.mirror.weight = self.body.weight
        self.head = nn.Linear(FEATURES, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.dropout(torch.tanh(self.body(inputs)), 0.1, self.training)
        output: Tensor = self.head(torch.tanh(self.mirror(hidden)))
        return output


class Experts(nn.Module):
    """A router that all ranks share, and one expert on each rank, all applied to every sample."""

    def __init__(self) -> None:
        super().__init__()
        rank, size = distributed.get_rank(), distributed.get_world_size()
        self.router = nn.Linear(FEATURES, size)
        experts = [
            nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh(), nn.Linear(9, 1)) for _ in range(size)
        ]
        self.experts = nn.ModuleDict({str(rank): experts[rank]})
        self._rank = rank
        for parameter in self.router.parameters():
            parameter.register_post_accumulate_grad_hook(_sum_gradient)

    def forward(self, inputs: Tensor) -> Tensor:
        shares = functional.dropout(self.router(inputs), 0.1, self.training).softmax(1)
        own = shares[:, self._rank, None] * self.experts[str(self._rank)](inputs)
        output: Tensor = all_reduce(own)
        return output


def _sum_gradient(parameter: Tensor) -> None:
    distributed.all_reduce(parameter.grad)


class Stage(nn.Module):
    """Half of a model: the first one ends in a send, the last one begins with what was sent."""

    def __init__(self, number: int, peer: int) -> None:
        super().__init__()
        self._number, self._peer = number, peer
        first = nn.Sequential(nn.Linear(FEATURES, 13), nn.Tanh(), nn.Dropout(0.1))
        last = nn.Sequential(nn.Linear(13, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 1))
        self.layers = nn.ModuleDict({str(number): (first, last)[number]})

    def forward(self, inputs: Tensor) -> Tensor:
        layers = self.layers[str(self._number)]
        if self._number == 0:
            sent: Tensor = _Send.apply(layers(inputs), self._peer)
            return sent
        empty = torch.empty(len(inputs), 13, requires_grad=True)
        output: Tensor = layers(_Receive.apply(empty, self._peer))
        return output


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor, peer: int) -> Tensor:
        context.peer, context.gradient = peer, torch.empty_like(hidden)
        distributed.send(hidden, peer)
        return hidden.new_zeros(len(hidden), 1)

    @staticmethod
    def backward(context: Any, _: Tensor) -> tuple[Tensor, None]:
        distributed.recv(context.gradient, context.peer)
        return context.gradient, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, empty: Tensor, peer: int) -> Tensor:
        context.peer, hidden = peer, torch.empty_like(empty)
        distributed.recv(hidden, peer)
        return hidden

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, None]:
        distributed.send(gradient.contiguous(), context.peer)
        return None, None


def _slice(mesh: DeviceMesh) -> Model:
    model = Model()
    # DTensor computes with even slices only.
    model.body[0], model.body[3] = nn.Linear(FEATURES, 12), nn.Linear(12, 5)
    parallelize_module(model.body, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})
    return model


def _stage() -> Stage:
    rank = distributed.get_rank()
    return Stage(rank % 2, rank ^ 1)


def _tied() -> nn.Module:
    model: Any = Tied()
    fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    built: nn.Module = model
    return built


def _meta() -> nn.Module:
    with torch.device("meta"):
        model = Model()
    _fsdp(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    with torch.no_grad():
        model.gates.fill_(1)
        model.calls.zero_()
    return model


def _checkpointed() -> nn.Module:
    model = Model()
    model.body = checkpoint_wrapper(model.body)
    return _fsdp(model)


def _compiled() -> nn.Module:
    compiled: nn.Module = torch.compile(_ddp(Model()), backend="aot_eager")  # type: ignore[assignment]
    return compiled


@dataclass(frozen=True)
class Way:
    """How a model is built, and which ranks read the same samples."""

    build: Callable[[], nn.Module]
    row: int = 1
    """Neighbours that read the same samples; 0: all ranks."""
    draws_alike: bool = False
    """Whether these draw the same numbers."""
    batches: int = 1
    """Whose gradients are accumulated in a step."""


WAYS: dict[str, Way] = {
    "ddp with batch norm": Way(lambda: _ddp(Normalised(nn.BatchNorm1d), broadcast_buffers=False)),
    "ddp with batch norm of rank 0": Way(lambda: _ddp(Normalised(nn.BatchNorm1d))),
    "ddp with sync batch norm": Way(lambda: _ddp(Normalised(SyncBatchNorm))),
    "accumulated": Way(lambda: _ddp(Model()), batches=3),
    "tied": Way(_tied),
    "compiled": Way(_compiled),
    "checkpointed": Way(_checkpointed),
    "meta": Way(_meta),
    "tp": Way(lambda: _slice(_grid()["inner"]), row=2, draws_alike=True),
    "hsdp": Way(lambda: _fsdp(Model(), _grid())),
    "fsdp x tp": Way(
        lambda: _fsdp(_slice(_grid()["inner"]), _grid()["outer"]), row=2, draws_alike=True
    ),
    "pp": Way(_stage, row=2),
    "pp x dp": Way(lambda: _ddp(_stage(), process_group=_grid().get_group("outer")), row=2),
    "ep": Way(Experts, row=0, draws_alike=True),
}


class LayoutRun(Run):
    """A run of one of `WAYS`."""

    def __init__(self, way: str, directory: Path, seed: int = 1) -> None:
        self._way = WAYS[way]
        rank, size = distributed.get_rank(), distributed.get_world_size()
        row = self._way.row or size
        place = (rank // row, size // row)

        def build(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            return self._way.build()

        super().__init__(build, directory, seed=seed, data=lambda *_: Data(*place))
        if row > 1:
            mesh = init_device_mesh("cpu", (size // row, row), mesh_dim_names=("data", "model"))
            self.groups = SimpleNamespace(dp=mesh.get_group("data"))
        if self._way.draws_alike:
            seed_rank(100 * seed + place[0])

    def step(self) -> None:
        """Train one step, of several batches where gradients are accumulated."""
        if self._way.batches == 1:
            super().step()
            return
        self.optimizer.zero_grad()
        total = 0.0
        for _ in range(self._way.batches):
            inputs, outputs = next(self.data)
            loss = functional.mse_loss(self.model(inputs), outputs) / self._way.batches
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            total += float(loss.item())
        self.optimizer.step()
        self.scheduler.step()
        self.state.train_state.step += 1
        self.state.train_state.consumed_train_samples += BATCH * self._way.batches * self.size
        self.losses.append(total.hex())
