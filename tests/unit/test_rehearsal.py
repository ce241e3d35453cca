"""State that cannot be saved is refused before training, or as soon as it appears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.errors import UnsupportedStateError
from tests.support.managers import Live, linear, manager_of, step
from tests.support.states import rng_digests
from tests.support.subclasses import Coded, Opaque


class _Odd(torch.optim.SGD):
    """Keeps a value for each parameter from its second step on."""

    def __init__(self, parameters: Any, make: Callable[[], Any]) -> None:
        super().__init__(parameters, lr=0.1)
        self._make, self._steps = make, 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self._steps += 1
        if self._steps == 2:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["odd"] = self._make()


REFUSED: dict[str, Callable[[], Any]] = {
    "opaque": lambda: torch.ones(2).as_subclass(Opaque),
    "meta": lambda: torch.empty(2, device="meta"),
    "object": object,
    "bits": lambda: torch.ones(2, dtype=torch.uint8).view(torch.uint4),  # type: ignore[attr-defined]
    "not read back": lambda: Coded.of(torch.ones(2), note=object()),
}


def _with_buffer(value: torch.Tensor) -> Live:
    live = linear()
    assert isinstance(live.model, nn.Module)
    live.model.register_buffer("extra", value)
    return live


@pytest.mark.parametrize("kind", [each for each in REFUSED if each != "object"])
@pytest.mark.parametrize("found", [False, True])
def test_a_model_that_cannot_be_saved_is_refused_at_the_load(
    tmp_path: Path, kind: str, found: bool
) -> None:
    """Whether a checkpoint is there or not, with nothing touched."""
    if found:
        first = linear()
        manager = manager_of(tmp_path)
        first.load(manager)
        first.save(manager, 1)
    live = _with_buffer(REFUSED[kind]())
    with pytest.raises(UnsupportedStateError, match=r"model\.extra is"):
        live.load(manager_of(tmp_path), strict=False)
    assert live.state.train_state.step == 0


def test_a_scheduler_that_cannot_be_saved_is_refused_at_the_load(tmp_path: Path) -> None:
    """Also where nothing is found."""

    class _Schedule:
        def state_dict(self) -> dict[str, Any]:
            return {"rule": object()}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    live = linear()
    live.scheduler = _Schedule()
    with pytest.raises(UnsupportedStateError, match=r"scheduler\.rule is a builtins\.object"):
        live.load(manager_of(tmp_path))


@pytest.mark.parametrize("kind", REFUSED)
def test_optimizer_state_is_looked_at_as_soon_as_it_appears(tmp_path: Path, kind: str) -> None:
    """By the first `finalize_async_saves` after it, which names the parameter; and no later one.

    The next save refuses it as well.
    """
    model = nn.Linear(4, 2)
    live = Live(model, _Odd(model.parameters(), REFUSED[kind]))
    manager = manager_of(tmp_path)
    live.load(manager)
    step(live)
    manager.finalize_async_saves(live.state)
    step(live)
    with pytest.raises(UnsupportedStateError, match=r"optimizer\.state\.weight\.odd"):
        manager.finalize_async_saves(live.state)
    manager.finalize_async_saves(live.state)
    with pytest.raises(UnsupportedStateError, match=r"optimizer\.state\.weight\.odd"):
        live.save(manager, 2)


def test_a_key_that_is_no_string_is_refused_as_soon_as_it_appears(tmp_path: Path) -> None:
    """A save would refuse it; training has not gone on for long."""
    model = nn.Linear(4, 2)
    live = Live(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    manager = manager_of(tmp_path)
    live.load(manager)
    step(live)
    live.optimizer.state[model.bias][0] = torch.ones(2)
    with pytest.raises(UnsupportedStateError, match=r"the key 0 of optimizer\.state\.bias"):
        manager.finalize_async_saves(live.state)


def test_a_load_draws_no_number_and_makes_no_optimizer_state(tmp_path: Path) -> None:
    """Looking at everything leaves it as it was."""
    live = linear()
    before = rng_digests()
    live.load(manager_of(tmp_path))
    assert rng_digests() == before
    assert not live.optimizer.state
