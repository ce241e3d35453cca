"""State that was read into live tensors is not copied onto itself; all else takes torch's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.managers import Live, linear, manager_of, step


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A store with a checkpoint of a model after two steps, its learning rate changed."""
    live = linear()
    step(live)
    step(live)
    live.optimizer.param_groups[0]["lr"] = 0.3
    live.save(manager_of(tmp_path))
    return tmp_path


def _live() -> tuple[Live, nn.Linear]:
    live = linear(1)
    step(live, 5)
    assert isinstance(live.model, nn.Linear)
    return live, live.model


def test_what_is_in_place_stays_in_place(saved: Path) -> None:
    """State keeps its tensors and groups their identity, and options are the checkpoint's."""
    live, model = _live()
    group, state = live.optimizer.param_groups[0], live.optimizer.state[model.weight]
    kept = dict(state)
    live.load(manager_of(saved))
    assert live.optimizer.param_groups[0] is group
    assert group["lr"] == 0.3
    assert live.optimizer.state[model.weight] is state
    assert all(state[key] is value for key, value in kept.items())
    assert state["step"].item() == 2


def _watch_module(live: Live, model: nn.Linear, called: list[str]) -> None:
    register: Any = model.register_load_state_dict_post_hook
    register(lambda *_: called.append("module"))


def _watch_from_nowhere(live: Live, model: nn.Linear, called: list[str]) -> None:
    def hook(*_: Any) -> None:
        called.append("module")

    hook.__module__ = None  # type: ignore[assignment]  # as methods of builtin types have it
    register: Any = model.register_load_state_dict_post_hook
    register(hook)


def _watch_optimizer(live: Live, model: nn.Linear, called: list[str]) -> None:
    live.optimizer.register_load_state_dict_post_hook(lambda *_: called.append("optimizer"))


def _override_module(live: Live, model: nn.Linear, called: list[str]) -> None:
    own: Any = model.load_state_dict

    def load_state_dict(*arguments: Any, **options: Any) -> Any:
        called.append("override")
        return own(*arguments, **options)

    model.load_state_dict = load_state_dict  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "watch", [_watch_module, _watch_from_nowhere, _watch_optimizer, _override_module]
)
def test_whoever_listens_to_a_load_is_told(saved: Path, watch: Any) -> None:
    """Hooks and overrides of loading are called as torch calls them."""
    live, model = _live()
    called: list[str] = []
    watch(live, model, called)
    live.load(manager_of(saved))
    assert len(called) == 1
    assert live.optimizer.param_groups[0]["lr"] == 0.3


def test_groups_in_another_order_are_matched_by_name(saved: Path) -> None:
    """Parameters that stand in another order get their own state, as torch gives it."""
    expected, _ = _live()
    expected.load(manager_of(saved))
    torch.manual_seed(1)
    model = nn.Linear(4, 2)
    live = Live(model, torch.optim.AdamW([model.bias, model.weight], lr=0.1))
    step(live, 5)
    live.load(manager_of(saved))
    for mine, theirs in zip(model.parameters(), expected.model.parameters(), strict=True):  # type: ignore[union-attr]
        for key, value in expected.optimizer.state[theirs].items():
            assert torch.equal(live.optimizer.state[mine][key], value)
