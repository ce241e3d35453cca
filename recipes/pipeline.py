"""Pipeline parallelism: the GPT cut into two stages, on two processes.

Owns the cut and how activations and their gradients pass between the stages. Promises that each
parameter keeps its name and is on one stage only, that the loss and the gradients are those of the
whole model, and that `loss.backward()` is all a training loop has to call. A batch passes as a
whole: a schedule of micro-batches (torch.distributed.pipelining) would keep both stages busy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt import GPT, mean_cross_entropy
from run_config import RecipeError

STAGES = 2


def cut_stage(model: GPT, rank: int) -> nn.Module:
    """Return the stage of this process: even ranks hold the first one, odd ranks the last one.

    Raises:
        RecipeError: the model has fewer layers than stages.
    """
    blocks = list(model.blocks.items())
    middle = len(blocks) // STAGES
    if middle == 0:
        raise RecipeError(
            f"model.layers is {len(blocks)}; {STAGES} pipeline stages need at least {STAGES}."
        )
    if rank % STAGES == 0:
        return _FirstStage(model, dict(blocks[:middle]), rank + 1)
    return _LastStage(model, dict(blocks[middle:]), rank - 1)


class _FirstStage(nn.Module):
    def __init__(self, model: GPT, blocks: dict[str, nn.Module], next_rank: int) -> None:
        super().__init__()
        self.token_embedding = model.token_embedding
        self.blocks = nn.ModuleDict(blocks)
        self._next_rank = next_rank

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return 0 as this stage's part of the loss; its gradient is that of the activations."""
        hidden = self.token_embedding(tokens)
        for block in self.blocks.values():
            hidden = block(hidden)
        loss: Tensor = _Send.apply(hidden, self._next_rank)  # type: ignore[no-untyped-call]
        return loss


class _LastStage(nn.Module):
    def __init__(self, model: GPT, blocks: dict[str, nn.Module], previous_rank: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)
        self.final_norm = model.final_norm
        self.head = model.head
        self._previous_rank = previous_rank

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        shape = (*tokens.shape, self.head.in_features)
        # Autograd calls `backward` only of what depends on a tensor that wants a gradient.
        empty = torch.empty(shape, device=tokens.device, requires_grad=True)
        hidden = _Receive.apply(empty, self._previous_rank)  # type: ignore[no-untyped-call]
        for block in self.blocks.values():
            hidden = block(hidden)
        return mean_cross_entropy(self.head(self.final_norm(hidden)), targets)


class _Send(torch.autograd.Function):
    """Send activations to a stage; their gradient comes back from there."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, rank: int) -> Tensor:
        context.rank, context.like = rank, torch.empty_like(hidden)
        dist.send(hidden.contiguous(), rank)
        return hidden.new_zeros(())

    @staticmethod
    def backward(context: Any, _: Tensor) -> tuple[Tensor, None]:
        gradient = context.like
        dist.recv(gradient, context.rank)
        return gradient, None


class _Receive(torch.autograd.Function):
    """Receive activations from a stage; their gradient is sent back there."""

    @staticmethod
    def forward(context: Any, empty: Tensor, rank: int) -> Tensor:
        context.rank = rank
        hidden = torch.empty_like(empty)
        dist.recv(hidden, rank)
        return hidden

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, None]:
        dist.send(gradient.contiguous(), context.rank)
        return None, None
