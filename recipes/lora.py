"""Low-rank adapters (LoRA) for the recipes' GPT.

Owns the layer and the change of a model: all of it is frozen, and chosen linear layers get a
trained update of low rank beside their weight. Promises that every name of the model stays as it
was, so that a checkpoint of pretraining fits, and that before the first step the adapted model
computes what the model did. Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models"
(2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name that every PyTorch program uses


class LoraLinear(nn.Linear):
    """A frozen linear layer without bias, and a trained update of its weight of low rank."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        """Take over the weight of a layer; `scale`: of the update."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        self.lora_down = nn.Parameter(torch.empty(rank, layer.in_features))
        self.lora_up = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.scale = scale
        nn.init.normal_(self.lora_down, std=layer.in_features**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        update = F.linear(F.linear(hidden, self.lora_down), self.lora_up)
        return F.linear(hidden, self.weight) + self.scale * update


def adapt(model: nn.Module, targets: Sequence[str], rank: int, alpha: float) -> None:
    """Freeze a model in place, and adapt the linear layers whose last name is one of `targets`."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(module, name, LoraLinear(child, rank, alpha / rank))
