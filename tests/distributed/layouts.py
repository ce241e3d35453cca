"""The ways in which ranks share one model and its optimizer, each filled with known values.

Owns a model whose every tensor is known from its name alone, and how each layout divides it:
replicas, shards, slices, stages, experts. Promises that a layout's expected local tensors are made
by torch's own division of the known values (or by plain slicing where the layout is plain), never
read back from a checkpoint. Nothing is trained here. Sizes divide by no number of ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

EXPERTS = 4
MOMENTS = ("exp_avg", "exp_avg_sq")
DECAY, NO_DECAY = 0.125, 0.0
LEARNING_RATE = 0.375


class Block(nn.Module):
    """A layer with what is sliced, what is not, and experts behind a router that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 13)
        self.down = nn.Linear(13, 6)
        self.router = nn.Linear(6, EXPERTS, bias=False)
        self.experts = nn.ModuleDict({str(n): nn.Linear(6, 3, bias=False) for n in range(EXPERTS)})
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))


class Net(nn.Module):
    """Two layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleDict({"0": Block(), "1": Block()})
        self.gates = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(6, 5, bias=False)


def truth(name: str, like: Tensor, moment: str = "") -> Tensor:
    """Return the whole value of a tensor, known from its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {moment}".encode()))
    if like.dtype.is_floating_point:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)
    return torch.randint(1, 1000, like.shape, generator=generator)


def true_step(name: str) -> float:
    """Return how many steps the optimizer has counted for a parameter."""
    return float(1 + zlib.crc32(name.encode()) % 50)


Divide = Callable[[Net], nn.Module]
"""Turn the whole model into what this rank has of it, in place."""


def _pure(model: Net) -> nn.Module:
    return model


def _ddp(model: Net) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp(model: Net, mesh: DeviceMesh | None = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _grid() -> DeviceMesh:
    size = distributed.get_world_size()
    return init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("outer", "inner"))


def _hsdp(model: Net) -> nn.Module:
    return _fsdp(model, _grid())


def _tp(model: Net, mesh: DeviceMesh | None = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.blocks.values():
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    parallelize_module(model, mesh, {"embedding": RowwiseParallel(), "head": ColwiseParallel()})
    return model


def _fsdp_tp(model: Net) -> nn.Module:
    grid = _grid()
    _tp(model, grid["inner"])
    return _fsdp(model, grid["outer"])


def _stage(model: Net, number: int) -> Net:
    if number == 0:
        del model.head
    else:
        del model.embedding, model.gates
    del model.blocks["1" if number == 0 else "0"]
    return model


def _pp(model: Net) -> nn.Module:
    return _stage(model, distributed.get_rank() % 2)


def _pp_dp(model: Net) -> nn.Module:
    grid = _grid()
    stage = _stage(model, grid.get_local_rank("inner"))
    return DistributedDataParallel(stage, process_group=grid.get_group("outer"))


def _ep(model: Net) -> nn.Module:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    for block in model.blocks.values():
        for number in range(EXPERTS):
            if number % size != rank:
                del block.experts[str(number)]
    return model


_COLUMNS = {"embedding.weight", "up.weight", "up.bias", "head.weight"}
_ROWS = {"down.weight"}


def _megatron(model: Net, group: Any = None) -> nn.Module:
    """Plain parameters with Megatron's attributes."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    for name, parameter in [*model.named_parameters()]:
        short = ".".join(name.split(".")[-2:])
        if short not in _COLUMNS | _ROWS:
            continue
        dim = 0 if short in _COLUMNS else 1
        part: Any = nn.Parameter(parameter.detach().tensor_split(size, dim)[rank].clone())
        part.tensor_model_parallel, part.partition_dim, part.partition_stride = True, dim, 1
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], part)
    return model


def _megatron_pp(model: Net) -> nn.Module:
    grid = _grid()
    stage = _stage(model, grid.get_local_rank("outer"))
    return _megatron(stage, grid.get_group("inner"))


def _world_is_tp() -> Any:
    return SimpleNamespace(dp=None, tp=distributed.group.WORLD)


def _inner_is_tp() -> Any:
    return SimpleNamespace(dp=None, tp=_grid().get_group("inner"))


@dataclass(frozen=True)
class Layout:
    """One way of dividing the model over all ranks of a job."""

    divide: Divide
    groups: Callable[[], Any] = lambda: None
    """What the manager is told of the process groups."""


LAYOUTS: dict[str, Layout] = {
    "unsharded": Layout(_pure),
    "ddp": Layout(_ddp),
    "fsdp": Layout(_fsdp),
    "hsdp": Layout(_hsdp),
    "tp": Layout(_tp),
    "fsdp_tp": Layout(_fsdp_tp),
    "pp": Layout(_pp),
    "pp_dp": Layout(_pp_dp),
    "ep": Layout(_ep),
    "megatron": Layout(_megatron, _world_is_tp),
    "megatron_pp": Layout(_megatron_pp, _inner_is_tp),
}
ON: Mapping[int, tuple[str, ...]] = {
    1: ("unsharded",),
    2: ("ddp", "fsdp", "tp", "pp", "ep", "megatron"),
    3: ("fsdp", "tp", "megatron"),
    4: ("hsdp", "tp", "fsdp_tp", "pp_dp", "ep", "megatron", "megatron_pp"),
}
"""The layouts by number of ranks."""


class State:
    """What one rank has of the model and its AdamW, and what it should be."""

    def __init__(self, layout: str) -> None:
        self._layout = LAYOUTS[layout]
        self.groups = self._layout.groups()
        self.model = self._divided("")
        self._moments = {each: dict(_named(self._divided(each))) for each in MOMENTS}
        self._expected = {name: _local(each).clone() for name, each in self._tensors()}
        self.optimizer = self._make_optimizer(LEARNING_RATE)

    def _divided(self, moment: str) -> nn.Module:
        model = Net()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(truth(name, value, moment))
        return self._layout.divide(model)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        buffers = [(_plain(name), each) for name, each in self.model.named_buffers()]
        return [*_named(self.model), *buffers]

    def _make_optimizer(self, learning_rate: float) -> torch.optim.AdamW:
        parameters = list(self.model.parameters())
        groups = [
            {"params": [each for each in parameters if each.dim() > 1], "weight_decay": DECAY},
            {"params": [each for each in parameters if each.dim() < 2], "weight_decay": NO_DECAY},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate)

    def fill(self) -> None:
        """Give the optimizer its true state."""
        for name, parameter in _named(self.model):
            self.optimizer.state[parameter] = {
                "step": torch.tensor(true_step(name)),
                **{key: self._moments[key][name].detach().clone() for key in MOMENTS},
            }

    def forget(self) -> None:
        """Lose all values: a model of minus ones, an optimizer without state."""
        with torch.no_grad():
            for _, each in self._tensors():
                _local(each).fill_(-1)
        self.optimizer = self._make_optimizer(9.0)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 9.0

    def differences(self) -> list[str]:
        """Name what is not, bit for bit, the true value that belongs on this rank."""
        found = [name for name, each in self._tensors() if not _is(each, self._expected[name])]
        for name, parameter in _named(self.model):
            state = self.optimizer.state.get(parameter, {})
            true = {key: self._moments[key][name] for key in MOMENTS}
            true["step"] = torch.tensor(true_step(name))
            if set(state) != set(true):
                found.append(f"{name}: has {sorted(state)}")
            else:
                found += [f"{name}.{key}" for key in true if not _is(state[key], true[key])]
        options = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        if options != [(LEARNING_RATE, DECAY), (LEARNING_RATE, NO_DECAY)]:
            found.append(f"options: {options}")
        return found


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(_plain(name), each) for name, each in model.named_parameters()]


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _is(value: Any, expected: Tensor) -> bool:
    """Whether a tensor has these bits here, and is a DTensor if that is one."""
    if isinstance(expected, DTensor) and type(value) is not type(expected):
        return False
    own, true = _local(value).detach(), _local(expected).detach()
    return own.dtype == true.dtype and own.shape == true.shape and torch.equal(own, true)
