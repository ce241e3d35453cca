"""Small training runs with everything that a checkpoint has to carry, and digests of all of it.

Owns models, data and optimizers that are deterministic from a seed, learn something (so that a lost
optimizer state shows in the loss) and cover the shapes that break checkpoints: tied weights, mixed
dtypes, 0-dimensional and empty tensors, buffers, frozen parameters, dropout. Promises that two runs
with equal digests are equal bit for bit. Knows nothing of holdfast.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FEATURES = 8
"""Width of the inputs; targets have one value."""


class SmallModel(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, 16)
        self.dropout = nn.Dropout(0.1)
        self.outer = nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.outer(self.dropout(torch.tanh(self.inner(inputs))))
        return output


class TiedModel(nn.Module):
    """An embedding that is also the output layer: one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(FEATURES, 16)
        self.head = nn.Linear(16, FEATURES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(inputs @ self.embedding.weight)
        output: Tensor = self.head(hidden).sum(dim=1, keepdim=True)
        return output


class MixedModel(nn.Module):
    """Parameters and buffers of many dtypes, one without dimensions, one empty, one frozen."""

    running: Tensor
    calls: Tensor
    flags: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, 16, dtype=torch.bfloat16)
        self.outer = nn.Linear(16, 1, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("running", torch.zeros(16, dtype=torch.float16))
        self.register_buffer("calls", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(inputs.bfloat16()))
        if self.training:
            self.calls += 1
            self.running.lerp_(hidden.detach().mean(dim=0).half(), 0.1)
        output: Tensor = self.outer(hidden.double()).float() * self.scale + self.nothing.sum()
        return output


MODELS: dict[str, type[nn.Module]] = {
    "small": SmallModel,
    "tied": TiedModel,
    "mixed": MixedModel,
}


class SampleStream:
    """Endless batches of a fixed function with noise, dealt to data-parallel ranks in turn.

    Sample number n depends on the seed and on n alone, and the only position is the count of
    samples that all ranks together have taken: its state therefore fits any number of ranks.
    """

    def __init__(self, seed: int = 0, rank: int = 0, ranks: int = 1, batch_size: int = 4) -> None:
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.batch_size = batch_size
        """Samples of each rank's batch."""
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        first = self.position + self.rank * self.batch_size
        self.position += self.ranks * self.batch_size
        samples = [
            np.random.default_rng((self.seed, number)).standard_normal(FEATURES + 1)
            for number in range(first, first + self.batch_size)
        ]
        values = torch.tensor(np.stack(samples), dtype=torch.float32)
        inputs, noise = values[:, :FEATURES], values[:, FEATURES:]
        targets = torch.tanh(inputs[:, :1] - inputs[:, 1:2]) + 0.01 * noise
        return inputs, targets

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.seed = state_dict["seed"]
        self.position = state_dict["position"]


class ReshardableStream(SampleStream):
    """The same, and it says so: it goes on at another number of ranks."""

    def load_resharded_state(self, states: Sequence[dict[str, Any]]) -> None:
        assert len({state["position"] for state in states}) == 1, "the ranks had drifted apart"
        self.load_state_dict(states[0])


@dataclass
class SmallRun:
    """Everything that one rank of a training run carries from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    stream: SampleStream

    def train(self, steps: int) -> list[float]:
        """Take optimizer steps and return the loss of each."""
        losses = []
        self.model.train()
        for _ in range(steps):
            inputs, targets = next(self.stream)
            self.optimizer.zero_grad()
            loss = (self.model(inputs) - targets).square().mean()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def digests(self) -> dict[str, str]:
        """Digest every leaf of the state of this rank, so that a difference is named.

        Sharded tensors are gathered: all ranks call this together, and digests of the model and the
        optimizer are comparable between numbers of ranks.
        """
        found: dict[str, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            found[f"model.{name}"] = digest(parameter)
        for name, buffer in self.model.named_buffers():
            found[f"model.{name}"] = digest(buffer)
        optimizer_state = self.optimizer.state_dict()
        for number, values in optimizer_state["state"].items():
            for name, value in values.items():
                found[f"optimizer.{number}.{name}"] = digest(value)
        found["optimizer.groups"] = digest(optimizer_state["param_groups"])
        found["scheduler"] = digest(self.scheduler.state_dict())
        found["data"] = digest(self.stream.state_dict())
        return found | rng_digests()


def make_run(
    kind: str = "small", seed: int = 0, rank: int = 0, ranks: int = 1, reshardable: bool = True
) -> SmallRun:
    """Seed every generator and build a run; `kind` is one of `MODELS`.

    Ranks start with equal parameters and go on with different random draws.
    """
    seed_everything(seed)
    model = MODELS[kind]()
    trainable = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    stream = (ReshardableStream if reshardable else SampleStream)(seed, rank, ranks)
    seed_everything(1000 * (seed + 1) + rank)
    return SmallRun(model, optimizer, scheduler, stream)


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_digests() -> dict[str, str]:
    """Digest the state of every global generator of this process."""
    found = {
        "rng.python": digest(random.getstate()),
        "rng.numpy": digest(np.random.get_state()),
        "rng.torch": digest(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        found["rng.cuda"] = digest(torch.cuda.get_rng_state_all())
    return found


def draw_from_each_generator() -> tuple[float, float, float]:
    """Take the next number from python's, numpy's and torch's global generator."""
    return random.random(), float(np.random.random()), torch.rand(()).item()


def digest(value: Any) -> str:
    """Digest nested state by type, shape and bits: 0.0 and -0.0 differ, as do 1 and 1.0 and True.

    Raises:
        TypeError: a leaf of a type that this does not know to be deterministic.
    """
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()[:16]


def _feed(hasher: Any, value: Any) -> None:
    def put(text: str) -> None:
        hasher.update(
            f"{len(text)}:{text}".encode()
        )  # its length, so that no two runs together agree

    match value:
        case Tensor():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            put(f"tensor {whole.dtype} {tuple(whole.shape)}")
            flat = whole.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            hasher.update(flat.view(torch.uint8).numpy().tobytes())
        case np.ndarray():
            put(f"array {value.dtype} {value.shape}")
            hasher.update(np.ascontiguousarray(value).tobytes())
        case Mapping():
            put(f"mapping {len(value)}")
            for key in sorted(value, key=repr):
                _feed(hasher, key)
                _feed(hasher, value[key])
        case list() | tuple():
            put(f"{type(value).__name__} {len(value)}")
            for each in value:
                _feed(hasher, each)
        case float():
            put(f"float {value.hex()}")
        case None | bool() | int() | str() | bytes():
            put(f"{type(value).__name__} {value!r}")
        case np.generic():
            put(f"{value.dtype} {value.tobytes()!r}")
        case _:
            raise TypeError(f"no digest of a {type(value).__name__}")
