"""A small run that learns, with everything in it that a resume could lose.

Owns the model, the data, the loop and the reading of exact numbers out of live objects. Promises
that every step draws from python, numpy and torch (each rank its own), that the shapes divide by no
world size, and that the numbers are read past holdfast and past DCP's getters: from the parameters
and the optimizer themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from holdfast.config import CheckpointConfig
from holdfast.filesystem import Filesystem
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    GlobalState,
    LoadResult,
    TrainState,
)

FEATURES = 7
SAMPLES = 90
BATCH = 4
DATA_SEED = 5


class Data:
    """Samples of a smooth function in an order shuffled by seed and epoch; each rank its share."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size
        self.epoch = 0
        self.position = 0
        generator = torch.Generator().manual_seed(DATA_SEED)
        self.inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
        self.outputs = torch.sin(self.inputs @ torch.linspace(-0.7, 0.9, FEATURES)[:, None])
        self.seen: list[int] = []

    def __iter__(self) -> Data:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(
            SAMPLES, generator=torch.Generator().manual_seed(DATA_SEED + 1 + self.epoch)
        )[self._rank :: self._size]
        chosen = order[self.position : self.position + BATCH]
        self.position += BATCH
        if self.position + BATCH > len(order):
            self.epoch, self.position = self.epoch + 1, 0
        self.seen += chosen.tolist()
        return self.inputs[chosen], self.outputs[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "rank": self._rank}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]
        assert state_dict["rank"] == self._rank, "was given another rank's state"


class ReshardableData(Data):
    """As `Data`, and it can go on where a world of another size stopped."""

    def load_resharded_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        assert [each["rank"] for each in states] == list(range(len(states)))
        self.epoch = max(each["epoch"] for each in states)
        self.position = sum(each["position"] for each in states) // self._size


class Model(nn.Module):
    """An MLP with dropout. 13, 5, 3 and 1 divide by no world size, and 1 is smaller than any."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(FEATURES, 13), nn.Tanh(), nn.Dropout(0.1), nn.Linear(13, 5), nn.Tanh()
        )
        self.gates = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(5, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.calls: torch.Tensor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = self.body(inputs) * self.gates.mean()
        output: torch.Tensor = self.head(hidden)
        return output


def build_model(parallel: str, seed: int) -> nn.Module:
    """Return the model, alike on all ranks before it is wrapped: `plain`, `ddp` or `fsdp`."""
    torch.manual_seed(seed)
    model = Model()
    if parallel == "ddp":
        # After the first step of a process DDP lays its buckets out anew, in the order in which
        # gradients arrived, and over more than two ranks gloo's sums depend on the place in the
        # bucket: a new process would differ from an old one in the last bits whatever it loaded.
        # Looking for unused parameters keeps the first layout.
        return DistributedDataParallel(model, find_unused_parameters=True)
    if parallel == "fsdp":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        fully_shard(model.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


class Run:
    """The live objects of one training run on one rank, and its manager."""

    def __init__(
        self,
        parallel: str | Callable[[int], nn.Module],
        directory: Path | None = None,
        *,
        seed: int = 1,
        data: Callable[[int, int], Data] = Data,
        filesystem: Filesystem | None = None,
        **config: Any,
    ) -> None:
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.size = distributed.get_world_size() if distributed.is_initialized() else 1
        self.model = build_model(parallel, seed) if isinstance(parallel, str) else parallel(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=30)
        self.data = data(self.rank, self.size)
        self.state = GlobalState(cfg={"parallel": str(parallel)}, train_state=TrainState())
        self.groups: Any = None
        """What the manager is told of the process groups."""
        self.losses: list[str] = []
        if directory is not None:
            values = {"timeout_seconds": 30.0, "persistent": {"directory": str(directory)}}
            self.manager = DefaultCheckpointManager(
                CheckpointConfig.from_mapping({**values, **config}), filesystem=filesystem
            )
        seed_rank(100 * seed + self.rank)

    @property
    def step_number(self) -> int:
        """Completed steps."""
        return self.state.train_state.step

    def step(self) -> None:
        """Train one step; the loss is this rank's own."""
        inputs, outputs = next(self.data)
        inputs = inputs + 0.01 * torch.from_numpy(np.random.standard_normal(inputs.shape)).float()
        inputs[:, random.randrange(FEATURES)] *= 0.9
        loss = functional.mse_loss(self.model(inputs), outputs)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.optimizer.step()
        self.scheduler.step()
        self.state.train_state.step += 1
        self.state.train_state.consumed_train_samples += BATCH * self.size
        self.losses.append(float(loss.item()).hex())

    def train(self, last_step: int, save_at: Sequence[int] = ()) -> None:
        """Train up to a step as a loop would: finalize at every step, and wait at the end."""
        while self.step_number < last_step:
            self.step()
            self.finalize()
            if self.step_number in save_at:
                self.save()
        if save_at:
            self.finalize(blocking=True)

    def save(self, callback_manager: Any | None = None, **settings: Any) -> None:
        """Save everything."""
        settings.setdefault("pg_collection", self.groups)
        context = CheckpointSaveContext(
            self.state,
            self.model,
            self.optimizer,
            self.scheduler,
            num_floating_point_operations_so_far=1000 * self.step_number,
            train_data_iterator=self.data,
            **settings,
        )
        self.manager.save(context, callback_manager)

    def load(self, **settings: Any) -> LoadResult:
        """Load everything."""
        settings.setdefault("pg_collection", self.groups)
        context = CheckpointLoadContext(
            self.state,
            self.model,
            self.optimizer,
            self.scheduler,
            train_data_iterator=self.data,
            **settings,
        )
        return self.manager.load(context)

    def finalize(self, *, blocking: bool = False) -> None:
        """End a step."""
        if hasattr(self, "manager"):
            self.manager.finalize_async_saves(self.state, blocking=blocking)

    def evaluate(self) -> float:
        """Return the loss over all samples, without noise or dropout."""
        self.model.eval()
        with torch.no_grad():
            return functional.mse_loss(self.model(self.data.inputs), self.data.outputs).item()

    def facts(self) -> dict[str, Any]:
        """Return every number of the run, exactly. It is over then: this draws."""
        return {
            "losses": self.losses,
            "seen": self.data.seen,
            "data": self.data.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "counters": self.state.train_state.to_dict(),
            "learning_rates": [float(group["lr"]).hex() for group in self.optimizer.param_groups],
            "draws": draw(),
            **self.tensors(),
        }

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Return full parameters, buffers and moments by name; every rank calls it together."""
        named = dict(self.model.named_parameters())
        model = {name: exact(each) for name, each in named.items()}
        model |= {name: exact(each) for name, each in self.model.named_buffers()}
        optimizer = {
            f"{name}.{key}": exact(value)
            for name, parameter in named.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return {
            "model": {_plain_name(name): each for name, each in model.items()},
            "optimizer": {_plain_name(name): each for name, each in optimizer.items()},
        }


def _plain_name(name: str) -> str:
    return name.removeprefix("module.")


def exact(value: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Return the type, the shape and the bits of a full tensor."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    assert isinstance(whole, torch.Tensor)
    return str(whole.dtype), tuple(whole.shape), whole.detach().numpy().tobytes()


def seed_rank(seed: int) -> None:
    """Seed every generator of this rank."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw() -> tuple[str, str, tuple[str, ...]]:
    """Return the next draw of python, numpy and torch."""
    return (
        random.random().hex(),
        float(np.random.standard_normal()).hex(),
        tuple(each.hex() for each in torch.randn(3).tolist()),
    )
