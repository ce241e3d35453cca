"""Wrappers that are no optimizers of torch's: they resume exactly, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.errors import UnsupportedStateError
from tests.support.managers import Live, manager_of, step
from tests.support.states import digest


class _Wrapper:
    """As LARC and many others: what it wraps does the work."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class _Stale(_Wrapper):
    """Keeps the mapping that a load of the inner optimizer replaces."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._state = optimizer.state

    @property
    def state(self) -> Any:
        return self._state


class _Derived(_Wrapper, torch.optim.Optimizer):
    """As Accelerate's: an Optimizer by class whose constructor was never called."""


def _build(kind: Any, dtype: torch.dtype) -> Live:
    torch.manual_seed(0)
    model = nn.Linear(4, 2, dtype=dtype)
    return Live(model, kind(torch.optim.AdamW(model.parameters(), lr=0.1)))


def _widen(live: Live) -> None:
    """Keep moments of 32 bits beside parameters of 16, as trainers do."""
    for entries in live.optimizer.optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            entries[key] = entries[key].float() + 1e-6


def _save(path: Path, kind: Any, dtype: torch.dtype) -> Live:
    live = _build(kind, dtype)
    manager = manager_of(path)
    live.load(manager)
    step(live)
    if dtype is torch.bfloat16:
        _widen(live)
    live.save(manager, 1)
    return live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [_Wrapper, _Derived])
def test_a_wrapper_resumes_exactly(tmp_path: Path, kind: Any, dtype: torch.dtype) -> None:
    """By its state dict, moments of another dtype than their parameter's included."""
    live, other = _save(tmp_path, kind, dtype), _build(kind, dtype)
    other.load(manager_of(tmp_path))
    states = [each.optimizer.optimizer.state.values() for each in (live, other)]
    for mine, theirs in zip(*states, strict=True):
        for key, value in mine.items():
            assert theirs[key].dtype == value.dtype
            assert torch.equal(theirs[key], value)


def test_a_wrapper_that_rounds_what_it_is_given_is_refused(tmp_path: Path) -> None:
    """Its state lets nobody put back what torch's load_state_dict has cast."""
    _save(tmp_path, _Stale, torch.bfloat16)
    other = _build(_Stale, torch.bfloat16)
    words = r"given as a dense tensor of torch.float32, is a dense tensor of torch.bfloat16"
    with pytest.raises(UnsupportedStateError, match=words):
        other.load(manager_of(tmp_path))


def _odd_state() -> dict[str, Any]:
    return {
        "string": "fast",
        "strings": ["a", ("b", {"c": "d"}), {"e"}],
        "nested": {"wide": torch.tensor([1 / 3], dtype=torch.float64), "list": [torch.tensor(7)]},
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "bits": [torch.arange(4, dtype=torch.uint8).view(torch.bits8)],
        "plain": [1, None, True, 0.1, b"x"],
    }


def _typed(value: Any) -> Any:
    """A value with its types, for a comparison that does not take 1 for True."""
    if isinstance(value, torch.Tensor):
        return type(value), value.dtype, bytes(value.untyped_storage())
    if isinstance(value, dict):
        return {key: _typed(each) for key, each in value.items()}
    return (type(value), list(map(_typed, value)) if isinstance(value, list | tuple) else value)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # torch names what replaces it
@pytest.mark.parametrize("kind", [_Wrapper, lambda optimizer: optimizer])
def test_what_torch_cannot_cast_comes_back_as_it_was(tmp_path: Path, kind: Any) -> None:
    """Strings, tensors of another dtype at any depth, and dtypes without a conversion."""
    live = _build(kind, torch.bfloat16)
    manager = manager_of(tmp_path)
    live.load(manager)
    step(live)
    for entries in live.optimizer.state.values():
        entries.update(_odd_state())
    live.save(manager, 1)
    other = _build(kind, torch.bfloat16)
    other.load(manager_of(tmp_path))
    odd = _odd_state()
    for entries in other.optimizer.state.values():
        assert _typed({key: entries[key] for key in odd}) == _typed(odd)


@pytest.mark.parametrize("kind", [_Wrapper, _Derived])
def test_overlapped_staging_refuses_a_wrapper_at_the_load(tmp_path: Path, kind: Any) -> None:
    """By class, with the way out, though it may have inherited the method."""
    live = _build(kind, torch.float32)
    with pytest.raises(UnsupportedStateError, match=f"overlapped: a {kind.__name__} has no reg"):
        live.load(manager_of(tmp_path, async_save=True, staging="overlapped"))


def test_many_optimizers_of_one_parameter_each_resume(tmp_path: Path) -> None:
    """As where optimizers step in the backward pass."""
    lives = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
        optimizers = [torch.optim.AdamW([each], lr=0.1) for each in model.parameters()]
        lives.append(Live(model, optimizers))
    one, other = lives
    manager = manager_of(tmp_path)
    one.load(manager)
    for each in one.optimizer:
        for parameter in each.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        each.step()
    one.save(manager, 1)
    other.load(manager_of(tmp_path))
    mine, theirs = one.digests(), other.digests()
    assert {name for name in mine if mine[name] != theirs[name]} <= {
        name for name in mine if name.startswith("gradient")
    }


class _Lookahead(torch.optim.Optimizer):
    """Steps with an inner optimizer, and keeps state of its own beside that one's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        for group in self.param_groups:
            for each in group["params"]:
                slow = self.state[each].setdefault("slow", each.detach().clone())
                slow.lerp_(each.detach(), 0.5)


def _look_ahead() -> tuple[torch.nn.Module, _Lookahead]:
    torch.manual_seed(3)
    model = torch.nn.Linear(3, 2)
    outer = _Lookahead(torch.optim.Adam(model.parameters(), lr=0.1))
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    return model, outer


def test_an_inner_optimizer_with_state_of_its_own_is_not_lost(tmp_path: Path) -> None:
    """Refused by name at the load; both given, both come back."""
    model, outer = _look_ahead()
    with pytest.raises(UnsupportedStateError, match=r"_Lookahead\.optimizer .*\(Adam\)"):
        Live(model, outer).load(manager_of(tmp_path / "one"))
    outer.step()
    manager = manager_of(tmp_path / "both", async_save=False)
    Live(model, [outer, outer.optimizer]).save(manager, 1)
    live, fresh = _look_ahead()
    Live(live, [fresh, fresh.optimizer]).load(manager_of(tmp_path / "both"))
    for one, other in ((outer, fresh), (outer.optimizer, fresh.optimizer)):
        assert digest(one.state_dict()) == digest(other.state_dict())
