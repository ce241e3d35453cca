"""The optimizer state to come, so that memory is known and planned before the first step.

Owns the estimate: a clone takes a step on the meta device, and what it keeps will be kept. It is
tried with steps of torch's own optimizers only (others are reported), changes no live object or
generator, and runs no hook.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn, optim
from torch.optim import Optimizer

from holdfast.format.dcp import flatten
from holdfast.format.items import Itemizer
from holdfast.format.layout import Item
from holdfast.state.bindings import Leaves
from holdfast.state.groups import GROUPS
from holdfast.state.naming import PARAMETERS, STATE
from holdfast.torch_internals import local_of

_TORCH = "torch.optim"
"""Modules of torch's own optimizers begin with this."""
_SWITCHES = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Options for how a step is computed, not for what is kept; off, since they need a real device."""
_FAIL_WITH_STATE = (optim.ASGD, optim.Rprop)
"""Their updates read numbers from the device, but only after all state has been created."""


@dataclass(frozen=True)
class Estimate:
    """The items of a state once every optimizer has taken a step."""

    items: Sequence[Item]
    uncounted: Sequence[str]
    """Classes of optimizers that have no state yet and cannot be estimated."""


def estimate(
    optimizers: Sequence[Optimizer],
    leaves: Leaves,
    items: Sequence[Item],
    kind_of: Callable[[Any], str] = lambda _: "",
) -> Estimate:
    """Return a state's items, with those that the first steps will add at their final position.

    `kind_of`: what the items' kinds were recorded by.
    """
    by_name: dict[str, list[Item]] = {}
    for item in items:
        by_name.setdefault(item.name, []).append(item)
    added: dict[str, list[Item]] = {}
    uncounted: set[str] = set()
    first_group: dict[str, int] = {}
    for optimizer, root in zip(optimizers, leaves.roots, strict=True):
        record = leaves.values[f"{root}.{GROUPS}"]
        start = first_group.get(root, 0)
        first_group[root] = start + len(optimizer.param_groups)
        for number, group in enumerate(optimizer.param_groups, start):
            # Without `strict`: what FSDP1 flattened has more names than parameters.
            names = record[number]["params"]
            lacking = [
                (at, name)
                for at, (each, name) in enumerate(zip(group["params"], names, strict=False))
                if each.requires_grad and not optimizer.state.get(each)
            ]
            states = _states_after_step(optimizer, group) if lacking else []
            if states is None:
                uncounted.add(type(optimizer).__name__)
                continue
            for at, name in lacking:
                outside = by_name.get(f"{root}.{PARAMETERS}.{name}", ())
                like = by_name.get(f"model.{name}", outside)
                parameter = group["params"][at]
                added.setdefault(root, []).extend(
                    _items_of(root, name, states[at], parameter, like, kind_of)
                )
    found: list[Item] = []
    for item in items:
        if item.path[1:] == (GROUPS,):
            found += added.pop(str(item.path[0]), ())
        found.append(item)
    return Estimate(found, sorted(uncounted))


def _states_after_step(
    optimizer: Optimizer, group: Mapping[str, Any]
) -> Sequence[Mapping[str, Any]] | None:
    """Return what a clone keeps for each parameter of the group; None: it cannot be known."""
    step = inspect.unwrap(type(optimizer).step)  # without the wrapper that runs hooks
    if not step.__module__.startswith(_TORCH):
        return None  # somebody's own may communicate, or call kernels that do not know meta tensors
    # A subclass that inherits its step may have a constructor of its own.
    kind: Any = next(each for each in type(optimizer).__mro__ if each.__module__.startswith(_TORCH))
    # The same is kept for every parameter of a kind: one of each is enough, and faster.
    keys = [(each.shape, each.dtype, each.requires_grad) for each in group["params"]]
    parameters = dict(zip(keys, map(_on_meta, group["params"]), strict=True))
    state: Mapping[Any, Mapping[str, Any]] = {}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            options, defaults = _copy_options(group), _copy_options(optimizer.defaults)
            taken = inspect.signature(kind).parameters
            clone = kind(
                [{**options, "params": [*parameters.values()]}],
                **{key: value for key, value in defaults.items() if key in taken},
            )
            state = clone.state
            step(clone)
    except Exception:  # noqa: BLE001  # whatever a step on meta tensors raises
        if not state or kind not in _FAIL_WITH_STATE:
            return None
    return [state.get(parameters[key], {}) for key in keys]


def _on_meta(parameter: torch.Tensor) -> nn.Parameter:
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    found = nn.Parameter(empty, parameter.requires_grad)
    found.grad = torch.empty_like(empty) if parameter.requires_grad else None
    return found


def _copy_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: False if key in _SWITCHES else _copy_option(value)
        for key, value in options.items()
        if key != "params"
    }


def _copy_option(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in (list, tuple):
        return type(value)(map(_copy_option, value))
    return copy.deepcopy(value)


def _items_of(
    root: str,
    name: str,
    entries: Mapping[str, Any],
    like: torch.Tensor,
    parameter: Sequence[Item],
    kind_of: Callable[[Any], str],
) -> Iterator[Item]:
    """Return the items of a parameter's state: sharded like it where the sizes are equal."""
    shape, device = like.shape, local_of(like).device
    flat, paths = flatten({root: {STATE: {name: entries}}})
    for full, value in flat.items():
        if isinstance(value, torch.Tensor) and value.shape == shape:
            path, dtype = paths[full], value.dtype
            for each in parameter:
                yield replace(each, name=full, path=path, dtype=dtype, alias_of=None)
        else:
            # What the clone made on the meta device will be beside its parameter.
            is_on_meta = isinstance(value, torch.Tensor) and value.is_meta
            kind = kind_of(torch.empty(0, device=device) if is_on_meta else value)
            found = Itemizer().describe({full: value}, paths).items
            yield from (replace(each, kind=kind) for each in found)
