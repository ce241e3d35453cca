"""The states that methods save, as live models and optimizers.

Owns building a model and an AdamW of a named shape from a seed, comparing two contents bit for bit,
overwriting the content before a load, and the small change that a training step makes. Promises
the same names, shapes and values on every call. Knows no method and no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import nn

from benchmarks.shapes import Recipe, Shape

SPOILED = 123.0
"""What every tensor is filled with before a load, so that a load that does nothing is noticed."""
CHANGED_SHARE = 0.02
"""The part of the parameters that a training step of the benchmark changes."""


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)


class _Transformer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(_Block(shape.width) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)


class State:
    """A live model and optimizer, as a training loop holds them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of this rank by name, as it is now: a load may replace tensors."""
        names: dict[torch.Tensor, str] = {}
        for name, parameter in self.model.named_parameters():
            names[parameter] = name
            yield f"model.{name}", _local(parameter)
        for owner, entries in self.optimizer.state.items():
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    yield f"optimizer.{names[owner]}.{key}", _local(value)

    def size_bytes(self) -> int:
        """Return the bytes of all tensors of this rank."""
        return sum(each.numel() * each.element_size() for _, each in self.tensors())

    def count(self) -> int:
        """Return how many tensors there are."""
        return sum(1 for _ in self.tensors())

    def change(self) -> None:
        """Take the small optimizer step of the benchmark's training."""
        self.optimizer.step()

    def fingerprint(self) -> dict[str, bytes]:
        """Return a digest of every tensor's bytes."""
        return {
            name: xxhash.xxh3_128_digest(each.cpu().contiguous().reshape(-1).numpy())  # type: ignore[arg-type]  # any buffer
            for name, each in self.tensors()
        }

    def addresses(self) -> list[int]:
        """Return where the tensors lie; unchanged by a load into place."""
        return [each.data_ptr() for _, each in self.tensors()]

    def spoil(self) -> None:
        """Overwrite every tensor in place."""
        for _, each in self.tensors():
            each.fill_(SPOILED)


def differences(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """Name the tensors whose bytes differ, or that are on one side only."""
    return sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )


def build(recipe: Recipe, *, quick: bool, device: str = "cpu") -> State:
    """Make the state on this rank; with ranks, in the default process group."""
    torch.manual_seed(0)
    shape = recipe.shape(quick)
    model: nn.Module
    if shape.tiny_tensors:
        model = nn.ParameterList(
            nn.Parameter(torch.randn(64, device=device)) for _ in range(shape.tiny_tensors)
        )
    else:
        with torch.device(device):
            model = _Transformer(shape)
    if recipe.parallel == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        assert isinstance(model, _Transformer)
        mesh = init_device_mesh(device, (recipe.ranks,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif recipe.parallel == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        _local(parameter.grad).normal_()
    optimizer.step()
    _leave_few_gradients(model)
    return State(model, optimizer)


def _leave_few_gradients(model: nn.Module) -> None:
    """Keep the last gradients only: a step then changes a small part, as a slow one would."""
    parameters = list(model.parameters())
    wanted = CHANGED_SHARE * sum(each.numel() for each in parameters)
    for parameter in reversed(parameters):
        if wanted <= 0:
            parameter.grad = None
        wanted -= parameter.numel()


def _local(tensor: Any) -> torch.Tensor:
    """Return what this rank holds of a tensor, sharing its memory."""
    detached = tensor.detach()
    local: torch.Tensor = detached.to_local() if hasattr(detached, "to_local") else detached
    return local
