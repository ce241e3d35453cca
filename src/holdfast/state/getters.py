"""Model and optimizer state by torch's getters, where it cannot be taken directly.

Owns the view of an optimizer that keeps torch from taking a step to create state, and what a
failure inside the getters means. Promises that state of a shape that they do not know is refused by
name: an entry of a model's state dict that is no attribute, a parameter of an optimizer that is not
in the model, an optimizer with a state dict of its own making. Whatever else is raised, by a hook
say, reaches the caller unchanged. `run_each` is for what may run collectives inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer

from holdfast.errors import UnsupportedStateError


def run_each(*works: Callable[[], Any]) -> list[Any]:
    """Run one after the other, also where an earlier one failed; return what each returned.

    Torch's getters and setters (of FSDP1, say) and hooks of the user's may run collectives. A rank
    that left after the first failure would keep the others waiting in the next one.

    Raises:
        Exception: the first that was raised, when all have run.
    """
    results: list[Any] = []
    first: Exception | None = None
    for work in works:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001  # raised below
            first = first or error
    if first is not None:
        raise first
    return results


class OptimizerView:
    """Shows an optimizer to DCP as one that has state, so that DCP takes no step to make some."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = {"present": True}

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
        # torch casts state to its parameter's dtype: 32-bit moments of a 16-bit parameter would
        # come back rounded.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, name in zip(group["params"], saved["params"], strict=True):
                live = self.optimizer.state[parameter] if name in state_dict["state"] else {}
                for key, value in state_dict["state"].get(name, {}).items():
                    cast = live.get(key)
                    if isinstance(cast, torch.Tensor) and cast.dtype != value.dtype:
                        live[key] = value.to(cast.device)


def ask_model(model: nn.Module) -> dict[str, Any]:
    """Return the model's state dict by torch's getter.

    Raises:
        UnsupportedStateError: it has entries that are no parameter, buffer or extra state.
    """
    try:
        return get_model_state_dict(model)
    except (AttributeError, KeyError, TypeError) as error:
        unknown = [name for name in model.state_dict() if not _is_attribute(model, name)]
        if not unknown:
            raise
        raise UnsupportedStateError(
            f"model.{unknown[0]}: state_dict() of the model has it, and no parameter, buffer or "
            "attribute has that name, so that nothing can be restored into it.\n"
            "Register it with register_buffer, or return it from get_extra_state."
        ) from error


def ask_optimizers(model: nn.Module, views: Sequence[OptimizerView]) -> dict[str, Any]:
    """Return the optimizers' state, by the names of parameters, by torch's getter.

    Raises:
        UnsupportedStateError: an optimizer has parameters that are not the model's, or a state
            dict of another shape than torch's optimizers have.
    """
    given: Any = list(views)
    try:
        return get_optimizer_state_dict(model, given)
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        for number, view in enumerate(views):
            problem = _find_problem(model, view)
            if problem is not None:
                which = "optimizer" if len(views) == 1 else f"optimizer number {number}"
                kind = type(view.optimizer).__name__
                raise UnsupportedStateError(f"{which} ({kind}): {problem}") from error
        raise


def _find_problem(model: nn.Module, view: OptimizerView) -> str | None:
    known = {id(each) for each in model.parameters()}
    for number, group in enumerate(view.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                return (
                    f"param_groups[{number}].params[{position}], of shape "
                    f"{tuple(parameter.shape)}, is no parameter of the model.\n"
                    "Register it in the model, or pass the model that this optimizer trains: state "
                    "is saved by the names that parameters have there."
                )
    state: Any = view.state_dict()
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        has = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        return (
            f"its state_dict() has {has}, not state and param_groups.\n"
            "Pass the torch.optim.Optimizer inside it, or let its state_dict() have torch's shape."
        )
    return None


def _is_attribute(model: nn.Module, name: str) -> bool:
    value: Any = model
    for part in name.split("."):
        if part == "_extra_state":
            return True
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True
