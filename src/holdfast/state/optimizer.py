"""Optimizer state by the names of parameters: read where it is, given back to each optimizer.

Owns which entry of an optimizer's state each name of a checkpoint stands for. An optimizer whose
state dict is overridden or hooked is asked for it; what FSDP1 flattened is left to torch's getters
and setters. Promises that torch takes no hidden step to create state, that every optimizer is given
its own state alone, of all of its parameters whether they need a gradient or not, and that state
keeps its dtype. Refuses by name an optimizer with a state dict of another shape, and state of no
parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from holdfast.errors import UnsupportedStateError
from holdfast.state.groups import Group, kind_of, options_of
from holdfast.state.kinds import find_changed
from holdfast.state.model import ModelWalk, are_in_place, ask_torch
from holdfast.state.naming import ROOT, Named, name_optimizers, parameter_names
from holdfast.torch_internals import (
    is_plain_optimizer,
    local_of,
    optimizer_has_default_loading,
)

Entries = Mapping[str, Any]
"""The state of one parameter, by key."""
_SHAPE = {"state", "param_groups"}
_DIVIDED = "ZeroRedundancyOptimizer"
"""By name: importing torch.distributed.optim takes long, and whoever has one has imported it."""


class LiveOptimizers(Protocol):
    """All optimizers of a run as they were when they were looked up, by root and name."""

    @property
    def roots(self) -> Sequence[str]:
        """For each optimizer, the root of its names."""
        ...

    def state(self, root: str) -> Mapping[str, Entries]:
        """Return the live entries of each parameter."""
        ...

    def groups(self, root: str) -> list[Group]:
        """Return all groups in order, with the options that they have now."""
        ...

    def outside(self, root: str) -> Mapping[str, torch.Tensor]:
        """Return the parameters that are not the model's."""
        ...

    def restore(
        self,
        state: Mapping[str, Mapping[str, Entries]],
        taken: Mapping[str, Sequence[Group | None]],
        unknown: Mapping[str, Collection[str]],
    ) -> None:
        """Give every optimizer its state and options, by root.

        `taken`: for each group the one whose options it takes; None: it keeps its own. `unknown`:
        parameters without saved state, which keep their live one.
        """
        ...


def look_up(root: nn.Module, optimizers: Sequence[Any], walk: ModelWalk | None) -> LiveOptimizers:
    """Look up all optimizers, asking torch's getters or their own state dicts if need be.

    `walk`: of the model, as for `model_state`, which comes first: FSDP2 swaps parameters there.

    Raises:
        UnsupportedStateError: an optimizer has a state dict of another shape than torch's have, or
            state that belongs to no parameter; as `name_optimizers`.
    """
    if walk is None and any(isinstance(each, FullyShardedDataParallel) for each in root.modules()):
        return FlattenedOptimizers(root, optimizers)
    return NamedOptimizers(name_optimizers(optimizers, parameter_names(root, walk)))


class NamedOptimizers:
    """Optimizers whose parameters are known by name."""

    def __init__(self, named: Sequence[Named]) -> None:
        self.named = named
        self._states = [_read_state(each, _which(each, named)) for each in named]

    @property
    def roots(self) -> Sequence[str]:
        """See the protocol."""
        return [each.root for each in self.named]

    def state(self, root: str) -> dict[str, Entries]:
        """See the protocol."""
        found: dict[str, Entries] = {}
        for each, states in zip(self.named, self._states, strict=True):
            if each.root == root:
                found |= states
        return found

    def groups(self, root: str) -> list[Group]:
        """See the protocol."""
        return [group for each in self.named if each.root == root for group in groups_of(each)]

    def outside(self, root: str) -> dict[str, torch.Tensor]:
        """See the protocol."""
        found: dict[str, torch.Tensor] = {}
        for each in self.named:
            if each.root == root:
                found |= each.outside
        return found

    def restore(
        self,
        state: Mapping[str, Mapping[str, Entries]],
        taken: Mapping[str, Sequence[Group | None]],
        unknown: Mapping[str, Collection[str]],
    ) -> None:
        """See the protocol."""
        first_group: dict[str, int] = {}
        for each, live in zip(self.named, self._states, strict=True):
            start = first_group.get(each.root, 0)
            first_group[each.root] = stop = start + len(each.groups)
            if each.root not in taken:
                continue
            own = set().union(*each.groups)
            saved, kept = state.get(each.root, {}), unknown[each.root]
            given = {name: saved[name] for name in saved if name in own}
            given |= {name: live[name] for name in live if name in kept}
            _restore(each, live, given, taken[each.root][start:stop])


def groups_of(named: Named) -> list[Group]:
    """Return the groups of one optimizer, with the options that they have now."""
    kind = kind_of(named.optimizer)
    return [
        Group(names, options_of(group), kind)
        for names, group in zip(named.groups, named.optimizer.param_groups, strict=True)
    ]


def _which(named: Named, all_named: Sequence[Named]) -> str:
    number = next(at for at, each in enumerate(all_named) if each is named)
    which = "optimizer" if len(all_named) == 1 else f"optimizer number {number}"
    return f"{which} ({type(named.optimizer).__name__})"


def _read_state(named: Named, which: str) -> dict[str, Entries]:
    """Return the entries of each parameter of one optimizer, from its state dict if need be."""
    optimizer = named.optimizer
    if is_plain_optimizer(optimizer):
        by_id = {id(each): name for name, each in named.by_name().items()}
        found = {}
        for parameter, entries in optimizer.state.items():
            if id(parameter) in by_id:
                found[by_id[id(parameter)]] = entries
            elif entries:  # an entry without content was made by looking
                raise UnsupportedStateError(_describe_nobody(which, parameter))
        return found
    if type(optimizer).__name__ == _DIVIDED:
        raise UnsupportedStateError(
            f"{which}: each rank keeps the state of some parameters alone, and state_dict() gives "
            "it to one rank.\nUse fully_shard, which shards optimizer state as well, or the "
            "optimizer inside it without ZeroRedundancyOptimizer."
        )
    state = optimizer.state_dict()
    if not isinstance(state, Mapping) or state.keys() != _SHAPE:
        raise UnsupportedStateError(_describe_shape(which, state))
    found = {}
    names = _numbered(named)
    for key, entries in state["state"].items():
        if key in names:
            found[names[key]] = entries
        elif entries:
            raise UnsupportedStateError(_describe_nobody(which, key))
    return found


def _numbered(named: Named) -> dict[Any, str]:
    """Return the name of each parameter by its number in torch's state dicts."""
    numbers: dict[int, int] = {}
    found: dict[Any, str] = {}
    count = 0
    for group, names in zip(named.optimizer.param_groups, named.groups, strict=True):
        start = count
        for position, (parameter, name) in enumerate(zip(group["params"], names, strict=True)):
            number = numbers.setdefault(id(parameter), start + position)
            found.setdefault(number, name)
        count += len(names)
    return found


def _describe_nobody(which: str, key: Any) -> str:
    what = f"a tensor of shape {tuple(key.shape)}" if isinstance(key, torch.Tensor) else f"{key!r}"
    return (
        f"{which}: its state has an entry for {what}, which is no parameter in its groups.\n"
        "Keep it in param_groups, or with the parameter that it belongs to: state is saved by the "
        "names of parameters."
    )


def _describe_shape(which: str, state: Any) -> str:
    if isinstance(state, Mapping) and state.keys() > _SHAPE:
        more = ", ".join(map(str, state.keys() - _SHAPE))
        return (
            f"{which}: its state_dict() also has {more}, which has no place in a checkpoint.\n"
            "Keep it in param_groups or in the state of a parameter, or let its state_dict() have "
            "torch's shape."
        )
    has = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
    return (
        f"{which}: its state_dict() has {has}, not state and param_groups.\n"
        "Pass the torch.optim.Optimizer inside it, or let its state_dict() have torch's shape."
    )


def _restore(
    named: Named,
    live: Mapping[str, Entries],
    given: Mapping[str, Entries],
    taken: Sequence[Group | None],
) -> None:
    """Give one optimizer its state; in place where all of it was read there."""
    optimizer = named.optimizer
    tensors = [
        {key: value for key, value in group.items() if isinstance(value, torch.Tensor)}
        for group in optimizer.param_groups
    ]
    if (
        optimizer_has_default_loading(optimizer)
        and live.keys() == given.keys()
        and all(
            live[name].keys() == entries.keys() and are_in_place(entries, live[name])
            for name, entries in given.items()
        )
    ):
        for group, saved in zip(optimizer.param_groups, taken, strict=True):
            if saved is not None:
                group.update(copy.deepcopy(dict(saved.options)))
        # The last step of torch's own load_state_dict: some optimizers upgrade older state here.
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    else:
        _load(named, given, taken)
    for group, own in zip(optimizer.param_groups, tensors, strict=True):
        _keep_memory(group, own)


def _load(named: Named, given: Mapping[str, Entries], taken: Sequence[Group | None]) -> None:
    """Let an optimizer load a state dict as torch makes it."""
    optimizer = named.optimizer
    numbers = {name: number for number, name in _numbered(named).items()}
    groups = [
        {
            **options_of(group),
            **({} if saved is None else saved.options),
            "params": [numbers[name] for name in names],
        }
        for group, saved, names in zip(optimizer.param_groups, taken, named.groups, strict=True)
    ]
    state = {numbers[name]: _without_uncastable(dict(entries)) for name, entries in given.items()}
    parameters = named.by_name()
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for name, entries in given.items():
        live = optimizer.state.get(parameters[name], {})
        for key, value in entries.items():
            if key in live:
                live[key] = _undo_cast(live[key], value)
    _check_restored(named, given)


def _undo_cast(cast: Any, value: Any) -> Any:
    """Return what torch has cast as it was given, on the device that torch has chosen.

    torch casts state to its parameter's dtype, at any depth: 32-bit moments of a 16-bit parameter
    would come back rounded. It takes strings for containers of letters.
    """
    if isinstance(value, torch.Tensor):
        if not isinstance(cast, torch.Tensor):
            return value if cast is None else cast  # None: it was kept from torch
        return cast if cast.dtype == value.dtype else value.to(cast.device)
    if type(cast) is not type(value):
        return cast
    if isinstance(value, str | set):
        return value
    if type(value) is dict and cast.keys() == value.keys():
        return {key: _undo_cast(cast[key], each) for key, each in value.items()}
    if type(value) in (list, tuple) and len(cast) == len(value):
        return type(value)(map(_undo_cast, cast, value))
    return cast


def _without_uncastable(value: Any) -> Any:
    """Return state with None in place of the tensors that torch could not cast, at any depth."""
    if isinstance(value, torch.Tensor):
        return value if _is_castable(local_of(value).dtype) else None
    if type(value) is dict:
        return {key: _without_uncastable(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_uncastable, value))
    return value


@cache
def _is_castable(dtype: torch.dtype) -> bool:
    try:
        torch.empty(1, dtype=dtype).to(torch.float32)
    except (RuntimeError, TypeError):  # quantised ones, and those that only hold bits
        return False
    return True


def _check_restored(named: Named, given: Mapping[str, Entries]) -> None:
    """Refuse an optimizer that has made something else of the state that it was given.

    Raises:
        UnsupportedStateError: naming the entry; such a run would not go on as it was.
    """
    name = type(named.optimizer).__name__
    found = _read_state(named, f"optimizer ({name})")
    for owner, entries in given.items():
        changed = find_changed(entries, found.get(owner, {}))
        if changed is not None:
            raise UnsupportedStateError(
                f"optimizer ({name}): load_state_dict does not restore the state of {owner}: "
                f"{changed}.\nPass the torch.optim.Optimizer inside it, or let load_state_dict "
                "take state as state_dict gives it."
            )


def _keep_memory(group: dict[str, Any], own: Mapping[str, torch.Tensor]) -> None:
    """Fill the tensors that a group had as options: schedules and graphs refer to them."""
    for key, tensor in own.items():
        saved = group.get(key)
        if (
            isinstance(saved, torch.Tensor)
            and saved is not tensor
            and (saved.shape, saved.dtype) == (tensor.shape, tensor.dtype)
        ):
            with torch.no_grad():
                tensor.copy_(saved)
            group[key] = tensor


# What FSDP1 flattened


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
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, name in zip(group["params"], saved["params"], strict=True):
                live = self.optimizer.state[parameter] if name in state_dict["state"] else {}
                for key, value in state_dict["state"].get(name, {}).items():
                    if key in live:
                        live[key] = _undo_cast(live[key], value)


class FlattenedOptimizers:
    """Optimizers of parameters that only torch's getters and setters know by name."""

    def __init__(self, root: nn.Module, optimizers: Sequence[Any]) -> None:
        self._root = root
        self._optimizers = optimizers
        held = [{id(p) for g in each.param_groups for p in g["params"]} for each in optimizers]
        if sum(map(len, held)) > len(set().union(*held)):
            raise UnsupportedStateError(
                "two optimizers hold the same parameter of a FullyShardedDataParallel model, whose "
                "state torch cannot tell apart.\nUse fully_shard, or one optimizer."
            )
        views: Any = [OptimizerView(each) for each in optimizers]
        self._live: Any = ask_torch(
            lambda: get_optimizer_state_dict(root, views), lambda: _find_problem(optimizers)
        )
        self._kinds = [kind_of(each) for each in optimizers for _ in each.param_groups]

    @property
    def roots(self) -> Sequence[str]:
        """See the protocol."""
        return [ROOT] * len(self._optimizers)

    def state(self, root: str) -> Mapping[str, Entries]:
        """See the protocol."""
        found: Mapping[str, Entries] = self._live["state"]
        return found

    def groups(self, root: str) -> list[Group]:
        """See the protocol."""
        groups = self._live["param_groups"]
        return [
            Group(tuple(group["params"]), options_of(group), kind)
            for group, kind in zip(groups, self._kinds, strict=True)
        ]

    def outside(self, root: str) -> Mapping[str, torch.Tensor]:
        """See the protocol."""
        return {}

    def restore(
        self,
        state: Mapping[str, Mapping[str, Entries]],
        taken: Mapping[str, Sequence[Group | None]],
        unknown: Mapping[str, Collection[str]],
    ) -> None:
        """See the protocol."""
        live, kept = self.groups(ROOT), unknown[ROOT]
        own = {name: entries for name, entries in self.state(ROOT).items() if name in kept}
        restored: Any = {
            "state": {**{name: dict(each) for name, each in state.get(ROOT, {}).items()}, **own},
            "param_groups": [
                {
                    **group.options,
                    **({} if saved is None else saved.options),
                    "params": [*group.names],
                }
                for group, saved in zip(live, taken[ROOT], strict=True)
            ],
        }
        views: Any = [OptimizerView(each) for each in self._optimizers]
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(self._root, views, restored, options=options)


def _find_problem(optimizers: Sequence[Any]) -> str | None:
    for optimizer in optimizers:
        state = optimizer.state_dict()
        if not isinstance(state, Mapping) or not state.keys() >= _SHAPE:
            return _describe_shape(f"optimizer ({type(optimizer).__name__})", state)
    return None
