"""Counters in whatever object a loop keeps them: saved, and given back exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from holdfast.errors import StateMismatchError, UnsupportedStateError
from holdfast.protocol import GlobalState, TrainState
from holdfast.state.small import read_counters
from tests.support.managers import linear, manager_of
from tests.support.states import digest


@dataclass
class _Mine(TrainState):
    epochs: int = 0


@dataclass
class _Scored(TrainState):
    best: Optional[float] = 1.0  # noqa: UP045  # as people write it
    worst: float | None = 1.0


@dataclass
class _Bridge:
    """As Megatron-Bridge has it: 32-bit tensors in its state dict, numbers in its fields."""

    step: int = 0
    consumed_train_samples: int = 0
    floating_point_operations_so_far: float = 0
    do_train: bool = False
    _own: int = 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": torch.tensor(self.step, dtype=torch.int32),
            "consumed_train_samples": torch.tensor(self.consumed_train_samples, dtype=torch.int32),
            "floating_point_operations_so_far": torch.tensor(
                self.floating_point_operations_so_far, dtype=torch.float32
            ),
            "do_train": torch.tensor(self.do_train, dtype=torch.bool),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"].item()
        self.consumed_train_samples = state["consumed_train_samples"].item()
        self.floating_point_operations_so_far = state["floating_point_operations_so_far"].item()
        self.do_train = state["do_train"].item()


class _Object:
    """Neither a dataclass nor with its step in its state."""

    def __init__(self, step: int = 0, seen: int = 0) -> None:
        self.done, self.seen = step, seen

    @property
    def step(self) -> int:
        return self.done

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done, "seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert set(state) >= {"done", "seen"}, state
        assert "step" not in state
        self.done, self.seen = state["done"], state["seen"]


@dataclass
class _Inner:
    best: float = 0.0


@dataclass
class _Fields:
    step: int = 0
    epochs: int = 0
    inner: _Inner = field(default_factory=_Inner)


def _save(root: Path, train_state: Any) -> None:
    live = linear()
    live.state = GlobalState(train_state=train_state)
    live.save(manager_of(root))


def _load(root: Path, train_state: Any, **context: Any) -> Any:
    live = linear(1)
    live.state = GlobalState(train_state=train_state)
    assert live.load(manager_of(root), **context).iteration == 5
    return train_state


SAVED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ours": (TrainState(5, 8), TrainState(), {"consumed_train_samples": 8}),
    "subclass": (_Mine(5, epochs=3), _Mine(), {"epochs": 3}),
    "subclass to base": (_Mine(5, epochs=3), TrainState(), {"extra": {"epochs": 3}}),
    "base to subclass": (TrainState(5, extra={"epochs": 3}), _Mine(epochs=1), {"epochs": 3}),
    "bridge": (
        _Bridge(5, 8, 3.0e18 + 513, True),
        _Bridge(),
        {"consumed_train_samples": 8, "floating_point_operations_so_far": 3.0e18 + 513,
         "do_train": True},
    ),
    "bridge to ours": (
        _Bridge(5, 8, 3.0e18, True),
        TrainState(do_train=False),
        {"floating_point_operations_so_far": 3 * 10**18, "do_train": True, "extra": {}},
    ),
    "ours to bridge": (TrainState(5, 8, extra={"a": 1}), _Bridge(), {"consumed_train_samples": 8}),
    "object": (_Object(5, 9), _Object(), {"seen": 9}),
    "object that lacks some": (TrainState(5), _Bridge(0, 7), {"consumed_train_samples": 0}),
    "fields": (_Fields(5, 2, _Inner(0.5)), _Fields(), {"epochs": 2, "inner": _Inner(0.5)}),
    "fields to ours": (_Fields(5), TrainState(), {"extra": {"epochs": 0, "inner": {"best": 0.0}}}),
    "ours to fields": (TrainState(5, 8), _Fields(epochs=4), {"epochs": 4}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAVED)
def test_counters_come_back_in_any_object(tmp_path: Path, kind: str) -> None:
    """What the object is decides what it takes; `step` is found by its name, whatever else is."""
    saved, live, expected = SAVED[kind]
    _save(tmp_path, saved)
    restored = _load(tmp_path, live)
    assert restored.step == 5
    for name, value in expected.items():
        assert (getattr(restored, name), type(getattr(restored, name))) == (value, type(value))


def test_a_counter_that_is_not_saved_keeps_its_value(tmp_path: Path) -> None:
    """An object that has more counters than the checkpoint keeps what it has of them."""
    _save(tmp_path, _Object(5, 9))
    assert _load(tmp_path, TrainState(tokens_seen=4)).tokens_seen == 4
    assert _load(tmp_path, _Bridge(0, 7)).consumed_train_samples == 7


def test_a_checkpoint_without_extra_keeps_the_live_one(tmp_path: Path) -> None:
    """An older writer had no such field."""
    _save(tmp_path, _Fields(5))
    restored = _load(tmp_path, TrainState(extra={"mine": 1}))
    assert restored.extra == {"mine": 1, "epochs": 0, "inner": {"best": 0.0}}


@dataclass(frozen=True)
class _Frozen:
    step: int = 0


@dataclass
class _Saved:
    step: int = 5
    epochs: str = "three"
    do_train: str = "yes"


@pytest.mark.parametrize(
    ("live", "name"),
    [(_Mine(), "epochs"), (_Fields(), "epochs"), (_Bridge(), "do_train"), (_Frozen(), "frozen")],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_a_wrong_type_is_told_before_anything_is_touched(
    tmp_path: Path, live: Any, name: str
) -> None:
    """The field is named, and model, optimizer and counters are as they were."""
    _save(tmp_path, _Saved())
    run = linear(1)
    run.state = GlobalState(train_state=live)
    before = digest(run.model.state_dict())  # type: ignore[union-attr]
    with pytest.raises(StateMismatchError, match=name):
        run.load(manager_of(tmp_path))
    assert digest(run.model.state_dict()) == before  # type: ignore[union-attr]
    assert live == type(live)()


def test_what_cannot_be_counters_is_refused_at_the_save(tmp_path: Path) -> None:
    """Something without fields or a state dict is named, with what would do."""

    class _Bare:
        step = 5

    with pytest.raises(UnsupportedStateError, match=r"is a _Bare.*\n.*dataclass"):
        _save(tmp_path, _Bare())


def test_a_state_dict_that_disagrees_about_its_step_is_refused() -> None:
    """No checkpoint could be told by it."""

    class _Other(_Object):
        def state_dict(self) -> dict[str, int]:
            return {**super().state_dict(), "step": 4}

    with pytest.raises(UnsupportedStateError, match="says 4"):
        read_counters(_Other(5))


def test_a_step_that_load_state_dict_forgets_is_set_or_refused(tmp_path: Path) -> None:
    """An attribute is set to the checkpoint's step; a property that stays behind is an error."""

    class _Forgets(_Object):
        def load_state_dict(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

    @dataclass
    class _Plain:
        step: int = 0

        def state_dict(self) -> dict[str, int]:
            return {"step": self.step}

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    _save(tmp_path, _Object(5, 9))
    assert _load(tmp_path, _Plain()).step == 5
    with pytest.raises(UnsupportedStateError, match="restore it there"):
        _load(tmp_path, _Forgets())


def test_a_field_that_may_be_none_is_none_again(tmp_path: Path) -> None:
    """However its type says so, a counter that was saved as None comes back as None."""
    live = linear()
    live.state = GlobalState(train_state=_Scored(step=1, best=None, worst=None))
    live.save(manager_of(tmp_path), 1)
    again = linear()
    again.state = GlobalState(train_state=_Scored())
    again.load(manager_of(tmp_path))
    assert (again.state.train_state.best, again.state.train_state.worst) == (None, None)
