"""Fast path of capture: where each captured tensor is, found once and looked up at later saves.

Owns the mapping from a name in the checkpoint to its parameter, buffer or optimizer entry. A full
capture builds, names and flattens whole state dicts; following the bindings only looks every entry
up again. Promises never to be silently stale: each time, modules, parameters, groups and state are
compared with what was bound, and anything added, removed, replaced or hooked requires a full
capture. Refuses to bind state dicts that hooks or overrides change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from holdfast.format.dcp import is_leaf
from holdfast.torch_internals import (
    WRAPPERS,
    is_plain_module,
    is_plain_optimizer,
    local_of,
    parts_of,
    pre_hooks_of,
)

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Leaves:
    """Model and optimizer as flat named leaves, referring to live tensors."""

    values: Mapping[str, Any]
    """Tensors and plain values by DCP's flat name."""
    paths: Mapping[str, KeyPath]
    """The nested keys of each name: strings for mappings, integers for lists."""
    changed_by_steps: frozenset[str]
    """Names that only an optimizer step changes: trainable parameters, optimizer state."""
    hollow: tuple[tuple[str, ...], ...] = ()
    """The nested keys of mappings without a leaf, which have no name."""


class Bindings:
    """The state of one model and its optimizers, bound to the objects that hold its leaves."""

    def __init__(self, model: _BoundModel, optimizers: Sequence[_BoundOptimizer], leaves: Leaves):
        """Use `bind`."""
        self._model = model
        self._optimizers = optimizers
        self._order = list(leaves.values)
        # Everything but the values, which are looked up at each save.
        self._about = replace(leaves, values={})

    @classmethod
    def bind(
        cls, model: nn.Module, optimizers: Sequence[Optimizer], leaves: Leaves
    ) -> Bindings | None:
        """Find every leaf; None: one has no place where it could be looked up again."""
        bound_model = _BoundModel.bind(model, leaves)
        if bound_model is None:
            return None
        bound: list[_BoundOptimizer] = []
        first_group = 0
        for each in optimizers:
            found = _BoundOptimizer.bind(each, leaves, first_group)
            if found is None:
                return None
            bound.append(found)
            first_group += len(each.param_groups)
        names = [*bound_model.names(), *(name for each in bound for name in each.names())]
        if len(names) != len(leaves.values) or set(names) != set(leaves.values):
            return None
        return cls(bound_model, bound, leaves)

    def follow(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> Leaves | None:
        """Return the current leaves; None: something changed and must be bound again."""
        if not self._model.holds(model) or len(optimizers) != len(self._optimizers):
            return None
        if not all(
            bound.holds(each) for bound, each in zip(self._optimizers, optimizers, strict=True)
        ):
            return None
        if self._model.run_hooks() and not self._model.holds(model):
            return None
        found: dict[str, Any] = {}
        self._model.collect(found)
        for bound in self._optimizers:
            if not bound.collect(found):
                return None
        values = {name: found[name] for name in self._order}
        return replace(self._about, values=values)


@dataclass(frozen=True)
class _Table:
    """One dictionary of a module, with its entries when it was bound."""

    owner: dict[str, Any]
    entries: tuple[tuple[str, str | None], ...]
    """Each key, with the name of its leaf; None: it had no value, or is not saved."""
    absent: frozenset[str]
    """Keys whose value was None."""

    def holds(self) -> bool:
        owner = self.owner
        return len(owner) == len(self.entries) and all(
            key in owner and (owner[key] is None) == (key in self.absent) for key, _ in self.entries
        )


@dataclass(frozen=True)
class _BoundModule:
    module: nn.Module
    prefix: str
    children: Mapping[str, nn.Module | None]
    tables: tuple[_Table, _Table]
    not_saved: frozenset[str]

    def holds(self) -> bool:
        parameters, buffers, children, not_saved = parts_of(self.module)
        return (
            parameters is self.tables[0].owner
            and buffers is self.tables[1].owner
            and self.tables[0].holds()
            and self.tables[1].holds()
            and children.keys() == self.children.keys()
            and all(map(_is, children.values(), self.children.values()))
            and not_saved == self.not_saved
            and is_plain_module(self.module)
        )


class _BoundModel:
    def __init__(self, root: nn.Module, modules: Sequence[_BoundModule]) -> None:
        self._root = root
        self._modules = modules

    @classmethod
    def bind(cls, root: nn.Module, leaves: Leaves) -> _BoundModel | None:
        names = {path[1]: name for name, path in leaves.paths.items() if path[0] == "model"}
        modules: list[_BoundModule] = []
        for prefix, module in root.named_modules(remove_duplicate=False):
            if not is_plain_module(module):
                return None
            prefix = f"{prefix}." if prefix else ""
            parameters, buffers, children, skipped_buffers = parts_of(module)
            not_saved = frozenset(skipped_buffers)
            tables: list[_Table] = []
            for owner, skipped in ((parameters, frozenset()), (buffers, not_saved)):
                entries: list[tuple[str, str | None]] = []
                absent = set()
                for key, value in owner.items():
                    name = None
                    if value is None:
                        absent.add(key)
                    elif key not in skipped:
                        name = names.get(_without_wrappers(prefix + key))
                        if name is None or not _is_same(leaves.values[name], value):
                            return None
                    entries.append((key, name))
                tables.append(_Table(owner, tuple(entries), frozenset(absent)))
            modules.append(
                _BoundModule(module, prefix, dict(children), (tables[0], tables[1]), not_saved)
            )
        return cls(root, modules)

    def names(self) -> list[str]:
        return [
            name
            for each in self._modules
            for table in each.tables
            for _, name in table.entries
            if name is not None
        ]

    def holds(self, root: nn.Module) -> bool:
        known = root is self._root or _are_equal_lists(root, self._root)
        return known and all(each.holds() for each in self._modules)

    def run_hooks(self) -> bool:
        """Run state-dict pre-hooks, as state_dict would: FSDP2 reshards its parameters in them.

        Returns whether there were any; they may have changed what was bound.
        """
        ran = False
        for each in self._modules:
            for hook in tuple(pre_hooks_of(each.module).values()):
                hook(each.module, each.prefix, False)  # positional, as torch passes it
                ran = True
        return ran

    def collect(self, into: dict[str, Any]) -> None:
        for each in self._modules:
            for table in each.tables:
                owner = table.owner
                for key, name in table.entries:
                    if name is not None:
                        into[name] = owner[key]


@dataclass(frozen=True)
class _Group:
    """One group of an optimizer's parameters."""

    keys: tuple[str, ...]
    members: Sequence[tuple[str, bool]]
    """Of each parameter: the name of its leaf in the model, and whether steps change it."""
    options: Mapping[str, str]
    """Each key except `params`, with the name of its leaf."""


class _BoundOptimizer:
    def __init__(
        self,
        optimizer: Optimizer,
        groups: Sequence[_Group],
        states: Sequence[tuple[torch.Tensor, dict[str, str]]],
        parameters: Mapping[str, Any],
    ) -> None:
        self._optimizer = optimizer
        self._groups = groups
        self._states = states
        self._parameters = parameters

    @classmethod
    def bind(cls, optimizer: Optimizer, leaves: Leaves, first_group: int) -> _BoundOptimizer | None:
        if not is_plain_optimizer(optimizer):
            return None
        by_path = {path: name for name, path in leaves.paths.items() if path[0] == "optimizer"}
        groups = []
        states = []
        fixed: dict[str, Any] = {}
        for number, group in enumerate(optimizer.param_groups, first_group):
            at: dict[str, str] = {}
            for key in group:
                name = by_path.get(("optimizer", "param_groups", number, key))
                if name is None:
                    return None
                at[key] = name
            saved_names = leaves.values[at["params"]]
            if len(saved_names) != len(group["params"]):
                return None
            fixed[at.pop("params")] = saved_names
            members: list[tuple[str, bool]] = []
            for parameter, saved_name in zip(group["params"], saved_names, strict=True):
                if f"model.{saved_name}" not in leaves.values:
                    return None
                members.append((f"model.{saved_name}", parameter.requires_grad))
            groups.append(_Group(tuple(group), members, at))
            for parameter, saved_name in zip(group["params"], saved_names, strict=True):
                state = optimizer.state.get(parameter)
                if state is None:
                    continue
                where: dict[str, str] = {}
                for key, value in state.items():
                    name = by_path.get(("optimizer", "state", saved_name, key))
                    if name is None or not _is_same(leaves.values[name], value):
                        return None
                    where[key] = name
                states.append((parameter, where))
        return cls(optimizer, groups, states, fixed)

    def names(self) -> list[str]:
        found = [name for group in self._groups for name in group.options.values()]
        found += [name for _, where in self._states for name in where.values()]
        return [*found, *self._parameters]

    def holds(self, optimizer: Optimizer) -> bool:
        groups = optimizer.param_groups
        return (
            optimizer is self._optimizer
            and is_plain_optimizer(optimizer)
            and len(groups) == len(self._groups)
            and len(optimizer.state) == len(self._states)
            and all(
                tuple(group) == bound.keys and len(group["params"]) == len(bound.members)
                for group, bound in zip(groups, self._groups, strict=True)
            )
        )

    def collect(self, into: dict[str, Any]) -> bool:
        """Add the current leaves; False: one is missing, or has become a nested container.

        `into` already has the model's leaves.
        """
        into.update(self._parameters)
        for group, bound in zip(self._optimizer.param_groups, self._groups, strict=True):
            for parameter, (name, steps) in zip(group["params"], bound.members, strict=True):
                if into[name] is not parameter or parameter.requires_grad != steps:
                    return False
            for key, name in bound.options.items():
                if not is_leaf(group[key]):
                    return False
                into[name] = group[key]
        live = self._optimizer.state
        for parameter, where in self._states:
            state = live.get(parameter)
            if state is None or len(state) != len(where):
                return False
            for key, name in where.items():
                value = state.get(key, _MISSING)
                if value is _MISSING or not is_leaf(value):
                    return False
                into[name] = value
        return True


_MISSING = object()


def _is(one: Any, other: Any) -> bool:
    return one is other


def _are_equal_lists(one: nn.Module, other: nn.Module) -> bool:
    """Whether both are plain lists of the same models."""
    return (
        type(one) is type(other) is nn.ModuleList
        and len(one) == len(other)
        and all(map(_is, one, other))
        and is_plain_module(one)
        and not (any(parts_of(one)[:2]) or pre_hooks_of(one))
    )


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _is_same(leaf: Any, live: Any) -> bool:
    """Whether a leaf from a getter is this live value and not a copy of it."""
    if not isinstance(live, torch.Tensor):
        return is_leaf(live) and type(leaf) is type(live)
    if leaf is live:
        return True
    if not isinstance(leaf, torch.Tensor) or leaf.shape != live.shape or leaf.dtype != live.dtype:
        return False
    one, other = local_of(leaf), local_of(live)
    return (
        type(leaf) in (type(live), torch.Tensor)
        and one.layout is other.layout is torch.strided
        and one.device == other.device
        and one.shape == other.shape
        and one.data_ptr() == other.data_ptr()
        and one.stride() == other.stride()
    )
