"""State that lies in plain sight, taken where it lies.

Owns the question whether a state dict is what it seems (a module's own parameters and buffers, an
optimizer's own entries), and such state by the names that torch's getters give it. The getters look
each name up from the root, several times over, which takes longer than many a state takes to read.
Promises the same keys in the same order with the live values themselves, or None: where anything is
overridden, hooked into, wrapped in a way of its own or not found, torch must be asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

_TENSORS = frozenset({torch.Tensor, nn.Parameter, nn.Buffer, DTensor})
"""Others may not be there yet, or be shown as something else."""
_RENAMING = "_fqn_modifiers"
"""By which a module lets torch's getters call its parts otherwise."""
_CHECKPOINTED = "_checkpoint_wrapped_module"
"""A part that they leave out of names, whatever holds it."""
_SHARDING = "torch.distributed.fsdp._fully_shard."
"""Where FSDP2's own hooks are made."""


def is_plain_module(module: nn.Module) -> bool:
    """Whether a module's state dict is its parameters and buffers, as they are."""
    kind, given = type(module), vars(module)
    return (
        kind.state_dict is nn.Module.state_dict
        and kind._save_to_state_dict is nn.Module._save_to_state_dict
        and kind.get_extra_state is nn.Module.get_extra_state
        and "state_dict" not in given
        and "_save_to_state_dict" not in given
        and not given["_state_dict_hooks"]
    )


def is_plain_optimizer(optimizer: Optimizer) -> bool:
    """Whether an optimizer's state dict is its state and groups, as they are."""
    return (
        type(optimizer).state_dict is Optimizer.state_dict
        and "state_dict" not in vars(optimizer)
        and not optimizer._optimizer_state_dict_pre_hooks
        and not optimizer._optimizer_state_dict_post_hooks
    )


def only_shard(hooks: Iterable[Callable[..., Any]]) -> bool:
    """Whether hooks are FSDP2's own, which bring parameters into shards and do nothing else."""
    return all((getattr(each, "__module__", None) or "").startswith(_SHARDING) for each in hooks)


def model_state(root: nn.Module) -> dict[str, Any] | None:
    """Return what `get_model_state_dict` does, but live; None: ask that.

    Parameters of FSDP2 are in shards then, as after a state dict.
    """
    modules = _modules_of(root)
    if modules is None:
        return None
    for module, _, key in modules:
        for hook in module._state_dict_pre_hooks.values():
            hook(module, key, False)  # torch passes it so
    state: dict[str, Any] = {}
    renamed: dict[str, Any] = {}
    for module, name, key in modules:
        found = state if name == key else renamed
        for own_name, value in _entries_of(module):
            if type(value) not in _TENSORS:
                return None
            full = name + own_name
            if full in state or full in renamed:
                return None
            found[full] = value
    # Renamed ones come last, as torch puts them. Of an empty state torch complains, in its words.
    return {**state, **renamed} or None


def optimizer_state(root: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any] | None:
    """Return what `get_optimizer_state_dict` does, but live; None: ask that."""
    modules = _modules_of(root)
    if modules is None or not all(map(is_plain_optimizer, optimizers)):
        return None
    names: dict[int, str] = {}  # of what is tied, the first one
    for module, name, _ in modules:
        for own_name, value in module._parameters.items():
            names.setdefault(id(value), name + own_name)
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for optimizer in optimizers:
        known: dict[int, str] = {}
        for group in optimizer.param_groups:
            members = [id(each) for each in group["params"]]
            if not all(each in names for each in members):
                return None
            known.update((each, names[each]) for each in members)
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append({**options, "params": [names[each] for each in members]})
        for parameter, entries in optimizer.state.items():
            if id(parameter) not in known:
                return None
            state[known[id(parameter)]] = entries
    return {"state": state, "param_groups": groups}


def _modules_of(root: nn.Module) -> list[tuple[nn.Module, str, str]] | None:
    """Return every module with the prefix of its names and of its keys in a state dict.

    They differ by the wrappers that torch's getters leave out. None: not all of it is plain.
    """
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    found: list[tuple[nn.Module, str, str]] = []

    def add(module: nn.Module, name: str, key: str) -> bool:
        kind, given = type(module), vars(module)
        if not is_plain_module(module) or not only_shard(module._state_dict_pre_hooks.values()):
            return False
        if hasattr(kind, _RENAMING) or _RENAMING in given or _CHECKPOINTED in module._modules:
            return False
        found.append((module, name, key))
        wrapper = None
        if isinstance(module, DistributedDataParallel):
            wrapper = "module"
        elif isinstance(module, compiled):
            wrapper = "_orig_mod"
        for child_name, child in module._modules.items():
            if child is None:
                continue
            own = "" if child_name == wrapper else f"{child_name}."
            if (own and wrapper) or not add(child, name + own, f"{key}{child_name}."):
                return False
        return True

    return found if add(root, "", "") else None


def _entries_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a module's own part of a state dict shows."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer
