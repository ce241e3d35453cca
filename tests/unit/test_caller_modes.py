"""The modes that the caller's thread may be in: none of them decides what a save keeps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.managers import Live, manager_of, step
from tests.support.states import MixedModel

MEMORY = Path("/dev/shm")

Mode = Callable[[], AbstractContextManager[Any]]


@contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


MODES: dict[str, Mode] = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": _default_dtype,
    "default device": lambda: torch.device("meta"),
    "deterministic": _deterministic,
}
STAGINGS: dict[str, dict[str, Any]] = {
    "blocking": {"async_save": True, "staging": "blocking"},
    "overlapped": {"async_save": True, "staging": "overlapped"},
    "synchronous": {"async_save": False},
}


class _Averaging(MixedModel):
    """A model that also has state of its own making, which torch's getters must be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.average = torch.linspace(0, 1, 3)

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        return {"average": self.average * 2}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        self.average = state["average"] / 2


class _OwnAdamW(torch.optim.AdamW):
    """An optimizer whose state dict is its own, which torch's setter has to be asked for."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()


class _Data:
    """A data iterator that keeps the tensors it is given, and counts in them."""

    def __init__(self) -> None:
        self.seen = torch.zeros(2)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.seen = state["seen"]


def _job(kind: type[nn.Module], seed: int) -> Live:
    torch.manual_seed(seed)
    model = kind()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW if kind is MixedModel else _OwnAdamW
    return Live(model, optimizer(trained, lr=0.1), data=_Data())


@contextmanager
def _tiers(name: str) -> Iterator[dict[str, Any]]:
    if name == "persistent":
        yield {}
        return
    with tempfile.TemporaryDirectory(dir=MEMORY if name == "memory" else None) as folder:
        yield {"local": {"directory": f"{folder}/local"}}


def _state(live: Live) -> dict[str, str]:
    """Digest what a checkpoint holds; gradients are not in it."""
    return {name: each for name, each in live.digests().items() if "gradient" not in name}


@pytest.mark.parametrize("tier", ["persistent", "memory", "disk"])
@pytest.mark.parametrize("staging", STAGINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [MixedModel, _Averaging])
def test_saves_within_a_mode_and_after_it_are_complete(
    kind: type[nn.Module], mode: str, staging: str, tier: str, tmp_path: Path
) -> None:
    """A save within any mode, one after it and one within it again each keep the state they saw."""
    with _tiers(tier) as tiers:
        settings = {**STAGINGS[staging], **tiers, "persistent": {"keep": {"last": 9}}}
        live = _job(kind, 0)
        manager = manager_of(tmp_path, **settings)
        live.load(manager)
        seen = {}
        for number, within in enumerate([MODES[mode], nullcontext, MODES[mode]], 1):
            step(live, number)
            with within():
                live.save(manager, number)
                manager.finalize_async_saves(live.state)
            seen[number] = _state(live)
        step(live, 4)  # what is copied beside training is copied before this
        manager.finalize_async_saves(live.state, blocking=True, terminate=True)
        for number, expected in seen.items():
            other = _job(kind, 1)
            again = manager_of(tmp_path, load={"step": number}, **settings)
            result = other.load(again)
            assert result.iteration == number
            assert _state(other) == expected


@pytest.mark.parametrize("tier", ["persistent", "memory"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [MixedModel, _Averaging])
def test_a_run_loaded_within_a_mode_goes_on_training(
    kind: type[nn.Module], mode: str, tier: str, tmp_path: Path
) -> None:
    """A load within any mode restores every bit, and leaves tensors that training can change."""
    with _tiers(tier) as tiers:
        live = _job(kind, 0)
        step(live, 1)
        manager = manager_of(tmp_path, async_save=True, **tiers)
        live.save(manager, 1)
        manager.finalize_async_saves(live.state, blocking=True, terminate=True)
        other = _job(kind, 1)
        with MODES[mode]():
            other.load(manager_of(tmp_path, async_save=True, **tiers))
        assert _state(other) == _state(live)
        for each in (live, other):
            step(each, 2)
            each.data.seen.add_(1)
            if isinstance(each.model, _Averaging):
                each.model.average.add_(1)
        assert _state(other) == _state(live)
        manager = manager_of(tmp_path, async_save=True, **tiers)
        other.load(manager)
        other.save(manager, 2)
        manager.finalize_async_saves(other.state, blocking=True, terminate=True)


def test_a_model_of_inference_tensors_is_saved_and_loaded(tmp_path: Path) -> None:
    """A model that was built within inference mode is saved and loaded like any other."""
    with torch.inference_mode():
        torch.manual_seed(0)
        live, other = Live(MixedModel()), Live(MixedModel())
    manager = manager_of(tmp_path)
    live.save(manager, 1)
    other.load(manager_of(tmp_path))
    assert _state(other)["model.0.inner.weight"] == _state(live)["model.0.inner.weight"]
    assert _state(other) == _state(live)
