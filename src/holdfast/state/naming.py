"""Which name each parameter of an optimizer has in a checkpoint, and under which root.

Owns the rule: a parameter has the name that torch's getters give it in the model. A parameter that
is none of the model's is `group<g>.<i>` after its place, and its value is state of the optimizer.
Optimizers with different parameters share the root `optimizer`; one with a parameter that an
earlier one holds is saved as a whole under the first of `optimizer@1`, `optimizer@2`, ... where it
meets none. Refuses optimizers that train nothing of the model, and names that are ambiguous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from holdfast.errors import UnsupportedStateError
from holdfast.state.model import ModelWalk

ROOT = "optimizer"
"""The first part of the names of most optimizers' state."""
STATE, PARAMETERS = "state", "parameters"
"""The second part of names: state by parameter; values of parameters that are not the model's."""


def is_root(key: Any) -> bool:
    """Whether a first key is that of an optimizer's state."""
    return key == ROOT or (isinstance(key, str) and key.startswith(f"{ROOT}@"))


@dataclass(frozen=True)
class Named:
    """An optimizer, and the names of its parameters."""

    optimizer: Any
    root: str
    groups: tuple[tuple[str, ...], ...]
    """For each group the names of its parameters, in order."""
    outside: Mapping[str, torch.Tensor]
    """Its parameters that are not the model's."""

    def by_name(self) -> dict[str, torch.Tensor]:
        """Return its parameters by name."""
        return {
            name: parameter
            for group, names in zip(self.optimizer.param_groups, self.groups, strict=True)
            for name, parameter in zip(names, group["params"], strict=True)
        }


class _EveryParameter:
    """Shows all parameters of a model to torch's getter as those of one optimizer."""

    def __init__(self, root: nn.Module) -> None:
        self.parameters = list(root.parameters())
        self.param_groups = [{"params": self.parameters}]
        self.state = {"present": True}  # otherwise torch takes a step to make some

    def state_dict(self) -> dict[str, Any]:
        numbers = list(range(len(self.parameters)))
        return {"state": {}, "param_groups": [{"params": numbers}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is loaded into it."""


def parameter_names(root: nn.Module, walk: ModelWalk | None) -> dict[int, str]:
    """Return the name in the model of each parameter, by its id; `walk` None: torch is asked."""
    if walk is not None:
        return walk.parameter_names()
    every: Any = _EveryParameter(root)
    if not every.parameters:
        return {}
    found: Any = get_optimizer_state_dict(root, [every])
    names = found["param_groups"][0]["params"]
    return dict(zip(map(id, every.parameters), names, strict=True))


def name_optimizers(optimizers: Sequence[Any], known: Mapping[int, str]) -> list[Named]:
    """Name the parameters of all optimizers; `known`: names in the model, by id.

    Raises:
        UnsupportedStateError: none of the parameters is the model's, or a name is taken.
    """
    held = [
        {id(each) for group in it.param_groups for each in group["params"]} for it in optimizers
    ]
    if any(held) and not any(each in known for ids in held for each in ids):
        raise UnsupportedStateError(_describe_stranger(optimizers))
    taken = set(known.values())
    members: dict[str, set[int]] = {}
    group_counts: dict[str, int] = {}
    found = []
    for optimizer, ids in zip(optimizers, held, strict=True):
        root = next(each for each in _roots() if not members.setdefault(each, set()) & ids)
        members[root] |= ids
        groups: list[tuple[str, ...]] = []
        outside: dict[str, torch.Tensor] = {}
        for number, group in enumerate(optimizer.param_groups, group_counts.get(root, 0)):
            names = []
            for position, parameter in enumerate(group["params"]):
                name = known.get(id(parameter))
                if name is None:
                    name = f"group{number}.{position}"
                    if name in taken:
                        raise UnsupportedStateError(_describe_clash(optimizer, name, parameter))
                    outside[name] = parameter
                names.append(name)
            groups.append(tuple(names))
        group_counts[root] = group_counts.get(root, 0) + len(groups)
        found.append(Named(optimizer, root, tuple(groups), outside))
    return found


def _roots() -> Any:
    yield ROOT
    number = 1
    while True:
        yield f"{ROOT}@{number}"
        number += 1


def _describe_stranger(optimizers: Sequence[Any]) -> str:
    for number, optimizer in enumerate(optimizers):
        for at, group in enumerate(optimizer.param_groups):
            if group["params"]:
                which = "optimizer" if len(optimizers) == 1 else f"optimizer number {number}"
                return (
                    f"{which} ({type(optimizer).__name__}): param_groups[{at}].params[0], of shape "
                    f"{tuple(group['params'][0].shape)}, is no parameter of the model, and no "
                    "other is either.\nRegister it in the model, or pass the model that this "
                    "optimizer trains: state is saved by the names that parameters have there."
                )
    raise AssertionError("an optimizer holds parameters")


def _describe_clash(optimizer: Any, name: str, parameter: torch.Tensor) -> str:
    return (
        f"optimizer ({type(optimizer).__name__}): a parameter of shape {tuple(parameter.shape)} "
        f"that is not the model's would be saved as {name} after its place, and the model has a "
        "parameter of that name.\nRegister it in the model, or rename the module there."
    )
