"""Estimate the state that optimizers will keep, before their first step.

Owns how a first step is tried: a clone of the optimizer takes it with parameters and gradients on
the meta device, and the shapes and dtypes of the resulting state are read. Only steps of torch's
own optimizers, and of subclasses that inherit them, are tried; of others, and where such a step
fails on the meta device, nothing is estimated and the class is reported. Promises to change no live
object and no random generator, and to run no hook. State that an optimizer already has is not
estimated.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn, optim
from torch.optim import Optimizer

from holdfast.format.dcp import flatten
from holdfast.format.items import Itemizer
from holdfast.format.layout import Item
from holdfast.state.bindings import Leaves

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


def estimate(optimizers: Sequence[Optimizer], leaves: Leaves, items: Sequence[Item]) -> Estimate:
    """Return a state's items, with those that the first steps will add at their final position."""
    by_name: dict[str, list[Item]] = {}
    for item in items:
        by_name.setdefault(item.name, []).append(item)
    by_path = {path: leaves.values[name] for name, path in leaves.paths.items()}
    added: list[Item] = []
    uncounted: set[str] = set()
    groups = [(each, group) for each in optimizers for group in each.param_groups]
    for number, (optimizer, group) in enumerate(groups):
        names = by_path.get(("optimizer", "param_groups", number, "params"), ())
        # Without `strict`: getters that name other parameters than the group are reported by save.
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
            like = by_name.get(f"model.{name}", ())
            added += _items_of(name, states[at], group["params"][at].shape, like)
    place = next(
        (at for at, item in enumerate(items) if item.path[:2] == ("optimizer", "param_groups")),
        len(items),
    )
    return Estimate([*items[:place], *added, *items[place:]], sorted(uncounted))


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
    name: str, entries: Mapping[str, Any], shape: torch.Size, parameter: Sequence[Item]
) -> Iterator[Item]:
    """Return the items of a parameter's state: sharded like it where the sizes are equal."""
    flat, paths = flatten({"optimizer": {"state": {name: entries}}})
    for full, value in flat.items():
        if isinstance(value, torch.Tensor) and value.shape == shape:
            path, dtype = paths[full], value.dtype
            for each in parameter:
                yield replace(each, name=full, path=path, dtype=dtype, alias_of=None)
        else:
            yield from Itemizer().describe({full: value}, paths).items
