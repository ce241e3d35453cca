"""A small byte-level GPT in plain PyTorch.

Owns the architecture: pre-norm blocks of causal attention with rotary positions and a two-layer
MLP, an untied head over the 256 byte values. Promises that two models built after the same
`torch.manual_seed` are equal bit for bit. Knows no devices, parallelism or data; `blocks` is what a
caller shards, slices or divides into stages; its keys are the layers' numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name that every PyTorch program uses

from run_config import ModelConfig

BYTE_VALUES = 256


class Block(nn.Module):
    """One layer: attention, then an MLP, each on a normalised copy and added back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.mlp_out = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self._attend(self.attention_norm(hidden)))
        expanded = F.gelu(self.mlp_in(self.mlp_norm(hidden)), approximate="tanh")
        added: Tensor = self.dropout(self.mlp_out(expanded))
        return hidden + added

    def _attend(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        # Grouped by head: a slice of the weight (tensor parallel) is a number of whole heads.
        projected = self.query_key_value(hidden).view(batch, length, -1, 3, width // self.heads)
        query, key, value = projected.permute(3, 0, 2, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(query), _rotate(key), value, is_causal=True)
        attended: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return attended


def _rotate(vectors: Tensor) -> Tensor:
    """Turn each pair of features by an angle that grows with the position (rotary embedding)."""
    length, size = vectors.shape[-2:]
    rates = 1000.0 ** -torch.arange(0, 1, 2 / size, device=vectors.device)
    angles = torch.arange(length, device=vectors.device)[:, None] * rates
    first, second = vectors.chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class GPT(nn.Module):
    """Predict the next byte of each position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(BYTE_VALUES, config.width)
        self.blocks = nn.ModuleDict({str(number): Block(config) for number in range(config.layers)})
        self.final_norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, BYTE_VALUES, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                # Each block adds twice to the stream; its variance stays that of one layer.
                parameter.data.div_((2 * config.layers) ** 0.5)
        nn.init.zeros_(self.head.weight)  # every byte equally likely: the first loss is 8 bits

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy, in nats per byte, of (batch, length) byte values."""
        hidden = self.token_embedding(tokens)
        for block in self.blocks.values():
            hidden = block(hidden)
        return mean_cross_entropy(self.head(self.final_norm(hidden)), targets)


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss, in nats per byte, of (batch, length, 256) predictions."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def floating_point_operations_per_token(model: nn.Module, config: ModelConfig) -> int:
    """Count forward and backward of one token: 6 per weight, 12 * width * context per attention.

    The usual estimate of Kaplan et al., "Scaling Laws for Neural Language Models" (2020), table 1.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    return 6 * weights + 12 * config.layers * config.width * config.context
