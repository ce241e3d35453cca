"""Under every layout a resumed run goes on as the uninterrupted one, from its very next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional

from holdfast.config import CheckpointConfig
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext, GlobalState
from tests.distributed.layout_runs import WAYS, LayoutRun
from tests.distributed.training import draw, exact, seed_rank
from tests.support.deadlines import LAUNCH_SECONDS
from tests.support.ranks import run_ranks

SAVED_AT, LAST = 4, 9
"""Within an epoch of the data; the epoch ends in between on two ranks."""
ON_TWO = [way for way in WAYS if way not in ("hsdp", "fsdp x tp", "pp x dp")]
ON_FOUR = ["hsdp", "fsdp x tp", "pp x dp"]


def _resume(root: Path, ways: list[str]) -> dict[str, dict[str, Any]]:
    """Return by way what differs on this rank, and how much the run learned."""
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        run = LayoutRun(way, root / way)
        run.train(LAST, save_at=[SAVED_AT])
        expected = run.facts()
        learned = [float.fromhex(each) for each in run.losses]
        expected["losses"] = expected["losses"][SAVED_AT:]
        expected["seen"] = expected["seen"][-len(expected["seen"]) * (LAST - SAVED_AT) // LAST :]
        again = LayoutRun(way, root / way, seed=77)
        try:
            assert again.load().iteration == SAVED_AT
        except Exception as error:  # noqa: BLE001  # one layout must not hide the others
            found[way] = {"different": [f"{type(error).__name__}: {error}"], "losses": learned}
            continue
        again.train(LAST)
        facts = again.facts()
        different = [name for name in expected if facts[name] != expected[name]]
        found[way] = {"different": different, "losses": learned, "draws": facts["draws"]}
    return found


@pytest.mark.parametrize(
    ("ranks", "ways"),
    [(2, ON_TWO[:5]), (2, ON_TWO[5:8]), (2, ON_TWO[8:]), (4, ON_FOUR)],
    ids=["replicas", "wrappers", "parts", "grids"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    ranks: int, ways: list[str], tmp_path: Path
) -> None:
    """Losses, samples, tensors, options, schedule and draws of each rank, bit for bit.

    The resumed run was built from another seed.
    """
    results = run_ranks(_resume, ranks, tmp_path, ways, timeout_seconds=2 * LAUNCH_SECONDS)
    broken = {}
    for way in ways:
        outcomes = [found[way] for found in results]
        different = {rank: each["different"] for rank, each in enumerate(outcomes)}
        if any(different.values()):
            broken[way] = different
        else:
            draws = {each["draws"] for each in outcomes}
            row = WAYS[way].row or ranks
            assert len(draws) == (ranks // row if WAYS[way].draws_alike else ranks), way
        losses = outcomes[-1]["losses"]
        assert min(losses) < 0.8 * losses[0], f"{way}: nothing was learned: {losses}"
    assert not broken


class _Pair:
    """A generator and a discriminator, each with an optimizer, in one manager."""

    def __init__(self, directory: Path, seed: int) -> None:
        torch.manual_seed(seed)
        generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))
        discriminator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.models = {
            name: nn.parallel.DistributedDataParallel(each, find_unused_parameters=True)
            for name, each in (("generator", generator), ("discriminator", discriminator))
        }
        self.optimizers = {
            "generator": torch.optim.AdamW(self.models["generator"].parameters(), lr=0.02),
            "discriminator": torch.optim.SGD(
                self.models["discriminator"].parameters(), lr=0.05, momentum=0.9
            ),
        }
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizers["generator"], 0.9)
        self.state = GlobalState()
        values = {"persistent": {"directory": str(directory)}, "timeout_seconds": 30}
        self.manager = DefaultCheckpointManager(CheckpointConfig.from_mapping(values))
        self._targets: Any = (self.state, self.models, self.optimizers, self.scheduler)
        self.losses: list[tuple[float, float]] = []
        seed_rank(100 * seed + distributed.get_rank())

    def train(self, last: int, save_at: int | None = None) -> None:
        while self.state.train_state.step < last:
            self.losses.append((self._teach(), self._fool()))
            self.scheduler.step()
            self.state.train_state.step += 1
            if self.state.train_state.step == save_at:
                self.manager.save(CheckpointSaveContext(*self._targets))
            self.manager.finalize_async_saves(self.state)
        self.manager.finalize_async_saves(self.state, blocking=True, terminate=True)

    def load(self) -> int:
        return self.manager.load(CheckpointLoadContext(*self._targets)).iteration

    def _teach(self) -> float:
        real = 0.3 * torch.randn(8, 2) + torch.tensor([1.0, -1.0])
        with torch.no_grad():
            made = self.models["generator"](torch.randn(8, 3))
        judge = self.models["discriminator"]
        loss = functional.softplus(-judge(real)).mean() + functional.softplus(judge(made)).mean()
        return self._step("discriminator", loss)

    def _fool(self) -> float:
        made = self.models["generator"](torch.randn(8, 3))
        loss = functional.softplus(-self.models["discriminator"].module(made)).mean()
        return self._step("generator", loss)

    def _step(self, name: str, loss: torch.Tensor) -> float:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.optimizers[name].step()
        return float(loss.item())

    def facts(self) -> dict[str, Any]:
        tensors = {
            f"{name}.{key}": exact(value)
            for name, model in self.models.items()
            for key, value in model.state_dict().items()
        }
        for name, optimizer in self.optimizers.items():
            for number, values in optimizer.state_dict()["state"].items():
                for key, value in values.items():
                    tensors[f"{name}.{number}.{key}"] = exact(value)
        groups = {name: each.state_dict()["param_groups"] for name, each in self.optimizers.items()}
        return {"tensors": tensors, "groups": groups, "draws": draw(), "losses": self.losses}


def _resume_pair(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    pair = _Pair(root, seed=1)
    pair.train(LAST, save_at=SAVED_AT)
    expected = pair.facts()
    expected["losses"] = expected["losses"][SAVED_AT:]
    again = _Pair(root, seed=5)
    assert again.load() == SAVED_AT
    again.train(LAST)
    return expected, again.facts()


def test_two_models_with_an_optimizer_each_resume_in_one_manager(tmp_path: Path) -> None:
    """A GAN's pair goes on as it would have, with an optimizer of another kind for each."""
    for expected, found in run_ranks(_resume_pair, 2, tmp_path):
        assert expected["losses"][0] != expected["losses"][-1]
        for name, value in expected.items():
            assert found[name] == value, name
