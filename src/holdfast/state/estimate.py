"""Estimate the state that optimizers will keep, before their first step.

Owns the table of what torch's own optimizers keep for each parameter. Promises to take no step, to
make no optimizer create state, and never to overestimate on purpose: for an optimizer that is not
in the table, or that overrides `step`, nothing is estimated and its name is reported. State that an
optimizer already has is not estimated.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import optim
from torch.optim import Optimizer

from holdfast.format.layout import Item
from holdfast.state.bindings import Leaves

_NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})
"""Kept as one-element tensors; everything else has the parameter's shape and dtype."""

_KEPT: Mapping[type[Optimizer], Sequence[str | tuple[str, str]]] = {
    # In the order of creation; the second of a pair is the group option that enables the first.
    optim.SGD: [("momentum_buffer", "momentum")],
    optim.Adam: ["step", "exp_avg", "exp_avg_sq", ("max_exp_avg_sq", "amsgrad")],
    optim.AdamW: ["step", "exp_avg", "exp_avg_sq", ("max_exp_avg_sq", "amsgrad")],
    optim.NAdam: ["step", "mu_product", "exp_avg", "exp_avg_sq"],
    optim.RAdam: ["step", "exp_avg", "exp_avg_sq"],
    optim.Adamax: ["step", "exp_avg", "exp_inf"],
    optim.Adadelta: ["step", "square_avg", "acc_delta"],
    optim.Adagrad: [],  # created with the optimizer
    optim.RMSprop: [
        "step", "square_avg", ("momentum_buffer", "momentum"), ("grad_avg", "centered"),
    ],
    optim.Rprop: ["step", "prev", "step_size"],
    optim.ASGD: ["step", "eta", "mu", "ax"],
    optim.Muon: ["momentum_buffer"],
}  # fmt: skip


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
    added: list[Item] = []
    uncounted: set[str] = set()
    number = 0
    for optimizer in optimizers:
        kept = _kept_by(optimizer)
        for group in optimizer.param_groups:
            lacking = list(_without_state(optimizer, group, _names_of(leaves, number)))
            number += 1
            if kept is None and lacking:
                uncounted.add(type(optimizer).__name__)
            for name in lacking if kept is not None else ():
                for key in _chosen(kept or (), group):
                    added += _like(by_name.get(f"model.{name}", ()), name, key)
    place = next(
        (at for at, item in enumerate(items) if item.path[:2] == ("optimizer", "param_groups")),
        len(items),
    )
    return Estimate([*items[:place], *added, *items[place:]], sorted(uncounted))


def _kept_by(optimizer: Optimizer) -> Sequence[str | tuple[str, str]] | None:
    """Return what the optimizer keeps; None: its `step` is not one of the table's."""
    step = inspect.unwrap(type(optimizer).step)
    for kind, kept in _KEPT.items():
        if isinstance(optimizer, kind) and inspect.unwrap(kind.step) is step:
            return kept
    return None


def _names_of(leaves: Leaves, number: int) -> Sequence[str]:
    path = ("optimizer", "param_groups", number, "params")
    found = next((name for name, each in leaves.paths.items() if each == path), None)
    return [] if found is None else leaves.values[found]


def _without_state(
    optimizer: Optimizer, group: Mapping[str, Any], names: Sequence[str]
) -> Iterator[str]:
    # Without `strict`: getters that name other parameters than the group are reported by the save.
    for parameter, name in zip(group["params"], names, strict=False):
        if parameter.requires_grad and not optimizer.state.get(parameter):
            yield name


def _chosen(kept: Sequence[str | tuple[str, str]], group: Mapping[str, Any]) -> Iterator[str]:
    for each in kept:
        if isinstance(each, str):
            yield each
        elif group.get(each[1]):
            yield each[0]


def _like(parameter: Sequence[Item], name: str, key: str) -> list[Item]:
    """Return the items of one entry in a parameter's state."""
    full, path = f"optimizer.state.{name}.{key}", ("optimizer", "state", name, key)
    if key in _NUMBERS:
        return [Item(full, path, torch.float32, (), (), ())]
    return [replace(each, name=full, path=path, alias_of=None) for each in parameter]
