"""Managers, contexts and live objects for tests that save and load on one process.

Owns the few lines that every such test would repeat. Promises that `live_digest` covers every bit
that a save must not change and a load must restore. Knows no ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
from tests.support.states import digest, rng_digests


@dataclass
class Live:
    """The live objects of a run; everything but the model may be left out."""

    model: nn.Module | Sequence[nn.Module]
    optimizer: Any = None
    scheduler: Any = None
    data: Any = None
    state: GlobalState = field(default_factory=GlobalState)

    def save(
        self, manager: DefaultCheckpointManager, step: int | None = None, **context: Any
    ) -> None:
        """Save at the given step; None: the one the counters have."""
        if step is not None:
            self.state.train_state.step = step
        manager.save(
            CheckpointSaveContext(
                self.state,
                self.model,
                self.optimizer,
                self.scheduler,
                train_data_iterator=self.data,
                **context,
            )
        )

    def load(self, manager: DefaultCheckpointManager, **context: Any) -> LoadResult:
        """Load into these objects."""
        return manager.load(
            CheckpointLoadContext(
                self.state,
                self.model,
                self.optimizer,
                self.scheduler,
                train_data_iterator=self.data,
                **context,
            )
        )

    def digests(self) -> dict[str, str]:
        """Digest every part: parameters, gradients, optimizer, scheduler, data, counters, RNG."""
        models = [self.model] if isinstance(self.model, nn.Module) else list(self.model)
        optimizers = self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]
        found = rng_digests()
        for number, model in enumerate(models):
            for name, value in model.state_dict().items():
                found[f"model.{number}.{name}"] = digest(value)
            for name, parameter in model.named_parameters():
                found[f"gradient.{number}.{name}"] = digest(parameter.grad)
        for number, optimizer in enumerate(optimizers):
            if optimizer is not None:
                found[f"optimizer.{number}"] = digest(optimizer.state_dict())
        if self.scheduler is not None:
            found["scheduler"] = digest(self.scheduler.state_dict())
        if self.data is not None:
            found["data"] = digest(self.data.state_dict())
        found["counters"] = digest(self.state.train_state.to_dict())
        return found


def manager_of(
    root: Path, filesystem: Filesystem | None = None, **values: Any
) -> DefaultCheckpointManager:
    """Return a manager of a store; `values` are fields of the config, sub-configs as mappings."""
    values.setdefault("async_save", False)
    persistent = {"directory": str(root), **values.pop("persistent", {})}
    config = CheckpointConfig.from_mapping({**values, "persistent": persistent})
    return DefaultCheckpointManager(config, filesystem=filesystem)


def linear(seed: int = 0, width: int = 4) -> Live:
    """Return a small model with AdamW that has taken no step."""
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    return Live(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def step(live: Live, seed: int = 0) -> None:
    """Take one optimizer step on gradients made from a seed, drawing from no global generator."""
    models = [live.model] if isinstance(live.model, nn.Module) else list(live.model)
    generator = torch.Generator().manual_seed(seed)
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = torch.rand(parameter.shape, generator=generator)
                parameter.grad = values.to(parameter.dtype)
    optimizers = live.optimizer if isinstance(live.optimizer, list) else [live.optimizer]
    for optimizer in optimizers:
        optimizer.step()
    if live.scheduler is not None:
        live.scheduler.step()
    live.state.train_state.step += 1


def zero(live: Live) -> None:
    """Overwrite every live tensor in place, as training would in time."""
    models = [live.model] if isinstance(live.model, nn.Module) else list(live.model)
    optimizers = live.optimizer if isinstance(live.optimizer, list) else [live.optimizer]
    with torch.no_grad():
        for model in models:
            for value in model.state_dict().values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
        for optimizer in optimizers:
            for values in optimizer.state.values() if optimizer is not None else ():
                for value in values.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()


def counters(**values: Any) -> GlobalState:
    """Return a state whose counters have the given values."""
    return GlobalState(train_state=TrainState(**values))
