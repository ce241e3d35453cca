"""A step waits for the copy of what it is about to change, once."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from holdfast.snapshotting import StepGuard


def _optimizer(kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    return kind([parameter], lr=1.0)  # type: ignore[call-arg]  # every kind here has one


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
def test_a_step_holds_before_it_changes_anything(kind: type[torch.optim.Optimizer]) -> None:
    """The copy is held while the parameter has its old value, by a step with a closure too."""
    guard, optimizer = StepGuard(), _optimizer(kind)
    (parameter,) = optimizer.param_groups[0]["params"]
    seen: list[float] = []
    guard.watch([optimizer], lambda: seen.append(parameter.item()))

    def closure() -> float:
        parameter.grad = torch.ones(1)
        return 1.0

    optimizer.step(closure)
    assert seen == [0.0]
    assert parameter.item() != 0.0


def test_only_the_first_step_waits() -> None:
    """Of several optimizers whichever steps first holds; the others and later steps go on."""
    guard, optimizers, held = StepGuard(), [_optimizer(), _optimizer()], []
    guard.watch(optimizers, lambda: held.append(1))
    optimizers[1].step()
    assert held == [1]
    for each in optimizers:
        each.step()
    assert held == [1]
    guard.watch(optimizers, lambda: held.append(2))
    optimizers[0].step()
    assert held == [1, 2]


def test_an_optimizer_is_hooked_once() -> None:
    """However often an optimizer is watched, and whatever beside it, it has one hook of ours."""
    guard, optimizers = StepGuard(), [_optimizer(), _optimizer()]
    theirs = optimizers[0].register_step_pre_hook(lambda *_: None)
    for _ in range(3):
        guard.watch(optimizers[:1], lambda: None)
        guard.watch(optimizers, lambda: None)
    assert [len(each._optimizer_step_pre_hooks) for each in optimizers] == [2, 1]
    guard.leave()
    assert [len(each._optimizer_step_pre_hooks) for each in optimizers] == [1, 0]
    theirs.remove()


def test_leaving_holds_what_is_in_hand() -> None:
    """Whoever leaves waits for the copy, and steps are free from then on."""
    guard, optimizer, held = StepGuard(), _optimizer(), []
    guard.watch([optimizer], lambda: held.append(1))
    guard.leave()
    assert held == [1]
    optimizer.step()
    guard.wait()
    assert held == [1]
    guard.watch([optimizer], lambda: held.append(2))
    optimizer.step()
    assert held == [1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_wait_is_waited_for_again(error: type[BaseException]) -> None:
    """What a signal handler raises reaches the step that waited; no step goes past the wait."""
    guard, optimizer = StepGuard(), _optimizer()
    (parameter,) = optimizer.param_groups[0]["params"]
    interrupts = [error("as planned"), error("as planned")]

    def hold() -> None:
        if interrupts:
            raise interrupts.pop()

    guard.watch([optimizer], hold)
    for _ in range(2):
        with pytest.raises(error, match="as planned"):
            optimizer.step()
        assert parameter.item() == 0.0
    optimizer.step()
    assert parameter.item() == -1.0


def test_a_guard_keeps_no_optimizer_alive() -> None:
    """An optimizer that the trainer drops is freed, though it was watched."""
    guard, optimizer = StepGuard(), _optimizer()
    guard.watch([optimizer], lambda: None)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    guard.leave()


def test_a_copy_of_an_optimizer_is_another() -> None:
    """A deep copy of a watched optimizer carries no hook, and can be watched itself."""
    guard, optimizer, held = StepGuard(), _optimizer(), []
    guard.watch([optimizer], lambda: held.append(1))
    other = copy.deepcopy(optimizer)
    assert not other._optimizer_step_pre_hooks
    guard.watch([other], lambda: held.append(2))
    other.step()
    assert held == [2]
    guard.leave()
