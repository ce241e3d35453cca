"""With `staging: overlapped` a save is of the moment of the call, whatever training does next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import SaveFailedError
from holdfast.manager import DefaultCheckpointManager
from tests.support.managers import Live, manager_of, step
from tests.support.states import digest


def _manager(root: Path) -> DefaultCheckpointManager:
    return manager_of(root, async_save=True, staging="overlapped")


@dataclass
class _Gate:
    """Holds every copy that is made beside training, or fails it; copies within `save` go on."""

    opened: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def close(self) -> None:
        self.opened.clear()
        self.reached.clear()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Gate]:
    """A gate in torch's copy; it stands open at first, and in the end."""
    found, copy = _Gate(), torch._foreach_copy_

    def gated(*arguments: Any, **named: Any) -> Any:
        if threading.current_thread().name == "holdfast-staging":
            found.reached.set()
            assert found.opened.wait(30), "nobody opened the gate"
            if found.error is not None:
                raise found.error
        return copy(*arguments, **named)

    monkeypatch.setattr(torch, "_foreach_copy_", gated)
    found.opened.set()
    yield found
    found.opened.set()


class _Net(nn.Module):
    """Parameters that are trained and one that is not, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)
        self.register_buffer("mean", torch.rand(3))


def _build(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    net = _Net()
    trained = [each for each in net.parameters() if each.requires_grad]
    optimizers: dict[str, Callable[[], Any]] = {
        "sgd": lambda: torch.optim.SGD(trained, lr=0.1),
        "momentum": lambda: torch.optim.SGD(trained, lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(trained, lr=0.1),
        "lbfgs": lambda: torch.optim.LBFGS(trained, max_iter=3),
        "several": lambda: [
            torch.optim.SGD(net.first.parameters(), lr=0.1, momentum=0.9),
            torch.optim.AdamW(net.second.parameters(), lr=0.1),
        ],
    }
    return Live(net, optimizers[kind]())


KINDS = ["sgd", "momentum", "adamw", "lbfgs", "several"]


def _step(live: Any, seed: int = 0) -> None:
    if isinstance(live.optimizer, torch.optim.LBFGS):
        _step_with_closure(live, seed)
    else:
        step(live, seed)


def _step_with_closure(live: Any, seed: int) -> None:
    inputs = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))

    def closure() -> Tensor:
        live.optimizer.zero_grad()
        loss: Tensor = live.model.second(live.model.first(inputs)).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    live.optimizer.step(closure)


def _state(live: Any) -> list[str]:
    optimizers = live.optimizer if isinstance(live.optimizer, list) else [live.optimizer]
    return [digest(live.model.state_dict()), *(digest(each.state_dict()) for each in optimizers)]


def _loaded(root: Path, kind: str, iteration: int) -> list[str]:
    live = _build(kind, seed=9)
    assert live.load(manager_of(root)).iteration == iteration
    return _state(live)


def _on_thread(work: Callable[[], Any]) -> tuple[threading.Thread, threading.Event]:
    """Run work beside the test; the event says that it is done."""
    done = threading.Event()

    def run() -> None:
        work()
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, done


# -- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_the_copy_and_changes_nothing_saved(
    tmp_path: Path, gate: _Gate, kind: str
) -> None:
    """`save` returns while the copy is held, a step is held with it, and the state is as before."""
    manager, live = _manager(tmp_path), _build(kind)
    _step(live)
    live.save(manager, 1)  # the second is followed, and into a used arena
    manager.finalize_async_saves(live.state, blocking=True)
    _step(live, 1)
    expected = _state(live)
    gate.close()
    live.save(manager, 2)
    assert gate.reached.wait(30)
    stepping, stepped = _on_thread(lambda: _step(live, 2))
    assert not stepped.wait(0.05)
    assert _state(live) == expected
    gate.opened.set()
    stepping.join()
    assert _state(live) != expected
    manager.finalize_async_saves(live.state, terminate=True)
    assert _loaded(tmp_path, kind, 2) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_saves_and_steps_in_close_order(tmp_path: Path, kind: str) -> None:
    """Save, step, save, step: each checkpoint is of its own moment, large tensors too."""
    manager = manager_of(
        tmp_path, async_save=True, staging="overlapped", persistent={"keep": {"last": 9}}
    )
    live = _build(kind)
    live.model.large = nn.Parameter(torch.rand(600_000))
    if kind != "several":
        group = {"params": [live.model.large]}
        if kind != "lbfgs":
            live.optimizer.add_param_group(group)
    expected = {}
    for number in range(1, 6):
        _step(live, number)
        expected[number] = _state(live)
        live.save(manager, number)
    _step(live)
    manager.finalize_async_saves(live.state, terminate=True)
    for number, state in expected.items():
        other = _build(kind, seed=9)
        other.model.large = nn.Parameter(torch.rand(600_000))
        if kind not in ("several", "lbfgs"):
            other.optimizer.add_param_group({"params": [other.model.large]})
        loader = manager_of(tmp_path, load={"step": number})
        assert other.load(loader).iteration == number
        assert _state(other) == state, number


def test_a_first_step_after_a_first_save_waits_too(tmp_path: Path, gate: _Gate) -> None:
    """Before the optimizer has any state, its first step is held like any other."""
    manager, live = _manager(tmp_path), _build("adamw")
    expected = _state(live)
    gate.close()
    live.save(manager, 1)
    stepping, stepped = _on_thread(lambda: _step(live))
    assert not stepped.wait(0.05)
    gate.opened.set()
    stepping.join()
    manager.finalize_async_saves(live.state, terminate=True)
    assert _loaded(tmp_path, "adamw", 1) == expected


# -- other roads ---------------------------------------------------------------------------------


def test_what_no_step_changes_is_copied_before_save_returns(tmp_path: Path, gate: _Gate) -> None:
    """Buffers, frozen parameters, rates and counters may change at once, with the copy held."""
    manager, live = _manager(tmp_path), _build("adamw")
    _step(live)
    live.state.train_state.extra["note"] = "before"
    expected = _state(live)
    gate.close()
    live.save(manager, 1)
    with torch.no_grad():
        live.model.frozen.add_(1)
        live.model.mean.add_(1)
    live.optimizer.param_groups[0]["lr"] = 7.0
    live.state.train_state.extra["note"] = "after"
    gate.opened.set()
    manager.finalize_async_saves(live.state, terminate=True)
    assert _loaded(tmp_path, "adamw", 1) == expected
    other = _build("adamw")
    other.load(manager_of(tmp_path))
    assert other.state.train_state.extra == {"note": "before"}


def test_what_was_frozen_since_is_copied_before_save_returns(tmp_path: Path, gate: _Gate) -> None:
    """A parameter that was trained at the last save, and is not now, may change by hand at once."""
    manager, live = _manager(tmp_path), _build("adamw")
    _step(live)
    live.save(manager, 1)
    manager.finalize_async_saves(live.state, blocking=True)
    live.model.first.requires_grad_(False)
    expected = _state(live)
    gate.close()
    live.save(manager, 2)
    with torch.no_grad():
        live.model.first.weight.add_(1)
    gate.opened.set()
    manager.finalize_async_saves(live.state, terminate=True)
    assert _loaded(tmp_path, "adamw", 2) == expected


def test_waiting_makes_other_changes_safe(tmp_path: Path, gate: _Gate) -> None:
    """After `wait_staged` anything may change; it returns when the copy is made, and once over
    costs nothing.
    """
    manager, live = _manager(tmp_path), _build("adamw")
    _step(live)
    expected = _state(live)
    gate.close()
    live.save(manager, 1)

    def change() -> None:
        manager.wait_staged()
        with torch.no_grad():
            live.model.first.weight.zero_()

    changing, changed = _on_thread(change)
    assert not changed.wait(0.05)
    assert _state(live) == expected
    gate.opened.set()
    changing.join()
    assert _state(live) != expected
    manager.wait_staged()
    manager.finalize_async_saves(live.state, terminate=True)
    manager.wait_staged()
    assert _loaded(tmp_path, "adamw", 1) == expected


def test_the_next_save_waits_for_the_copy(tmp_path: Path, gate: _Gate) -> None:
    """A second save does not overwrite what the first is still copying."""
    manager, live = _manager(tmp_path), _build("sgd")
    expected = _state(live)
    gate.close()
    live.save(manager, 1)
    saving, saved = _on_thread(lambda: live.save(manager, 2))
    assert not saved.wait(0.05)
    gate.opened.set()
    saving.join()
    manager.finalize_async_saves(live.state, terminate=True)
    for number in (1, 2):
        other = _build("sgd", seed=9)
        other.load(manager_of(tmp_path, load={"step": number}))
        assert _state(other) == expected


def test_a_load_waits_for_the_copy(tmp_path: Path, gate: _Gate) -> None:
    """A load into the tensors that are being copied does not reach the checkpoint."""
    manager, live = _manager(tmp_path), _build("sgd")
    live.save(manager, 1)
    manager.finalize_async_saves(live.state, blocking=True)
    _step(live)
    expected = _state(live)
    gate.close()
    live.save(manager, 2)
    loading, loaded = _on_thread(lambda: live.load(manager))
    assert not loaded.wait(0.05)
    gate.opened.set()
    loading.join()
    manager.finalize_async_saves(live.state, terminate=True)
    assert _loaded(tmp_path, "sgd", 2) == expected


# -- hooks and failures --------------------------------------------------------------------------


def test_one_hook_for_each_optimizer_until_the_end(tmp_path: Path) -> None:
    """Many saves leave one hook on each optimizer, and `terminate` none."""
    manager, live = _manager(tmp_path), _build("several")
    for number in range(1, 4):
        _step(live)
        live.save(manager, number)
        manager.finalize_async_saves(live.state, blocking=True)
        assert [len(each._optimizer_step_pre_hooks) for each in live.optimizer] == [1, 1]
    manager.finalize_async_saves(live.state, terminate=True)
    assert [len(each._optimizer_step_pre_hooks) for each in live.optimizer] == [0, 0]


@pytest.mark.parametrize("staging", ["blocking", "overlapped"])
def test_only_overlapped_saves_hook(tmp_path: Path, staging: str) -> None:
    """With blocking staging no optimizer is touched."""
    manager, live = manager_of(tmp_path, async_save=True, staging=staging), _build("adamw")
    live.save(manager, 1)
    assert len(live.optimizer._optimizer_step_pre_hooks) == (staging == "overlapped")
    manager.finalize_async_saves(live.state, terminate=True)


def test_a_copy_that_fails_is_told_once(tmp_path: Path, gate: _Gate) -> None:
    """A failed copy stops no step and commits nothing: the save has failed, and the next works."""
    manager, live = _manager(tmp_path), _build("adamw")
    _step(live)
    live.save(manager, 1)
    manager.finalize_async_saves(live.state, blocking=True)
    gate.error = RuntimeError("as planned")
    live.save(manager, 2)
    _step(live)
    with pytest.raises(SaveFailedError, match="as planned") as caught:
        manager.finalize_async_saves(live.state, blocking=True)
    assert caught.value.iteration == 2
    manager.finalize_async_saves(live.state, blocking=True)
    assert not (tmp_path / "iter_0000002").exists()
    gate.error = None
    expected = _state(live)
    live.save(manager, 3)
    _step(live)
    manager.finalize_async_saves(live.state, terminate=True)
    assert _loaded(tmp_path, "adamw", 3) == expected


def test_a_failed_copy_before_the_next_save_is_that_saves_to_tell(
    tmp_path: Path, gate: _Gate
) -> None:
    """When nobody asked in between, the next `save` raises what became of the last, once."""
    manager, live = _manager(tmp_path), _build("adamw")
    gate.error = RuntimeError("as planned")
    live.save(manager, 1)
    with pytest.raises(SaveFailedError, match="as planned"):
        live.save(manager, 2)
    gate.error = None
    live.save(manager, 3)
    manager.finalize_async_saves(live.state, terminate=True)
    assert _loaded(tmp_path, "adamw", 3) == _state(live)


def test_a_model_without_an_optimizer_has_nothing_to_hold(tmp_path: Path, gate: _Gate) -> None:
    """Where nothing steps, everything is copied before `save` returns."""
    manager = _manager(tmp_path)
    live: Any = Live(_build("sgd").model)
    expected = digest(live.model.state_dict())
    gate.close()
    live.save(manager, 1)
    with torch.no_grad():
        for each in live.model.parameters():
            each.zero_()
    gate.opened.set()
    manager.finalize_async_saves(live.state, terminate=True)
    other: Any = Live(_build("sgd", seed=9).model)
    other.load(manager_of(tmp_path))
    assert digest(other.model.state_dict()) == expected
