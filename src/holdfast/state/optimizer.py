"""Optimizer state by the names of parameters: read where it is, else by torch's getters.

Owns the one walk over an optimizer: which entry of its state and its groups each name of a
checkpoint stands for; like that of a model it is compared with the optimizer before each reading.
Torch's getters and setters are used where state dicts are overridden or hooked. Promises that torch
takes no hidden step to create state, and that state keeps its dtype. Refuses by name an optimizer
with a state dict of another shape, or of parameters that the model does not have. Also owns the
estimate of the state to come: a clone takes a step on the meta device. It is tried with steps of
torch's own optimizers only (others are reported), changes no live object or generator, and runs no
hook.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from holdfast.format.dcp import flatten, is_leaf
from holdfast.format.items import Itemizer
from holdfast.format.layout import Item
from holdfast.state.model import MODEL, ModelWalk, are_in_place, ask_torch
from holdfast.torch_internals import is_plain_optimizer, optimizer_has_default_loading

_STATE = "optimizer.state"
_GROUPS = "optimizer.param_groups"
_TORCH = "torch.optim"
"""Modules of torch's own optimizers begin with this."""
_SWITCHES = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Options for how a step is computed, not for what is kept; off, since they need a real device."""
_FAIL_WITH_STATE = (optim.ASGD, optim.Rprop)
"""Their updates read numbers from the device, but only after all state has been created."""


class _Group(NamedTuple):
    """One group of an optimizer's parameters, as it was when it was walked."""

    keys: tuple[str, ...]
    options: Mapping[str, str]
    """Each key except `params`, with its name in a checkpoint."""
    members: Sequence[tuple[str, bool]]
    """Of each parameter: the name of its leaf in the model, and whether steps change it."""
    names: tuple[str, list[str]]
    """Under which name, in a checkpoint, which names of parameters are listed."""


class _Entries(NamedTuple):
    """The state of one parameter, as it was when it was walked."""

    parameter: torch.Tensor
    owner: str
    """The parameter's name."""
    keys: Mapping[str, str]
    """Each key, with its name in a checkpoint."""


class OptimizerWalk:
    """Where the groups and the state of one optimizer are."""

    def __init__(
        self, optimizer: Optimizer, groups: Sequence[_Group], states: Sequence[_Entries]
    ) -> None:
        """Use `find_all`."""
        self._optimizer = optimizer
        self._groups = groups
        self._states = states

    @classmethod
    def find_all(
        cls, optimizers: Sequence[Optimizer], names: Mapping[int, str]
    ) -> list[OptimizerWalk] | None:
        """Walk optimizers; None: one is not plain, or has parameters that are not the model's.

        `names`: in the model, of each parameter by its id.
        """
        found: list[OptimizerWalk] = []
        first_group = 0
        for each in optimizers:
            walk = cls._find(each, names, first_group) if is_plain_optimizer(each) else None
            if walk is None:
                return None
            found.append(walk)
            first_group += len(each.param_groups)
        return found

    @classmethod
    def _find(
        cls, optimizer: Optimizer, names: Mapping[int, str], first_group: int
    ) -> OptimizerWalk | None:
        known: dict[int, str] = {}
        groups: list[_Group] = []
        for number, group in enumerate(optimizer.param_groups, first_group):
            parameters = group["params"]
            if not all(id(each) in names for each in parameters):
                return None
            own = {id(each): names[id(each)] for each in parameters}
            known |= own
            at = f"{_GROUPS}.{number}"
            groups.append(
                _Group(
                    tuple(group),
                    {key: f"{at}.{key}" for key in group if key != "params"},
                    [(MODEL + own[id(each)], each.requires_grad) for each in parameters],
                    (f"{at}.params", [own[id(each)] for each in parameters]),
                )
            )
        states: list[_Entries] = []
        for parameter, entries in optimizer.state.items():
            owner = known.get(id(parameter))
            if owner is None:
                return None
            keys = {key: f"{_STATE}.{owner}.{key}" for key in entries}
            states.append(_Entries(parameter, owner, keys))
        return cls(optimizer, groups, states)

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether it is the same optimizer, with the same groups and as much state."""
        groups = optimizer.param_groups
        return (
            optimizer is self._optimizer
            and is_plain_optimizer(optimizer)
            and len(groups) == len(self._groups)
            and len(optimizer.state) == len(self._states)
            and all(
                tuple(group) == walked.keys and len(group["params"]) == len(walked.members)
                for group, walked in zip(groups, self._groups, strict=True)
            )
        )

    def nested_state(self) -> dict[str, Any]:
        """Return the live entries of each parameter, by its name."""
        return {each.owner: self._optimizer.state[each.parameter] for each in self._states}

    def nested_groups(self) -> list[dict[str, Any]]:
        """Return the live options of each group, with the names of its parameters."""
        return [
            {**{key: group[key] for key in walked.options}, "params": walked.names[1]}
            for group, walked in zip(self._optimizer.param_groups, self._groups, strict=True)
        ]

    def add_state(self, into: dict[str, Any]) -> bool:
        """Add the live entries; False: one is missing, or has become a nested container."""
        live = self._optimizer.state
        for each in self._states:
            state = live.get(each.parameter)
            if state is None or len(state) != len(each.keys):
                return False
            for key, name in each.keys.items():
                value = state.get(key, _MISSING)
                if value is _MISSING or not is_leaf(value):
                    return False
                into[name] = value
        return True

    def add_groups(self, into: dict[str, Any]) -> bool:
        """Add the live options; False: a parameter is another one, or an option is nested.

        `into` already has the model's leaves.
        """
        for group, walked in zip(self._optimizer.param_groups, self._groups, strict=True):
            for parameter, (name, steps) in zip(group["params"], walked.members, strict=True):
                if into[name] is not parameter or parameter.requires_grad != steps:
                    return False
            for key, name in walked.options.items():
                if not is_leaf(group[key]):
                    return False
                into[name] = group[key]
            into[walked.names[0]] = walked.names[1]
        return True


_MISSING = object()


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


def optimizer_state(
    root: nn.Module, optimizers: Sequence[Optimizer], walk: ModelWalk | None
) -> dict[str, Any]:
    """Return the live state by the names of torch's getter, which is asked if need be.

    `walk`: of the model, as for `model_state`, which comes first: FSDP2 swaps parameters there.

    Raises:
        UnsupportedStateError: an optimizer has parameters that are not the model's, or a state
            dict of another shape than torch's optimizers have.
    """
    state = read_optimizers(optimizers, walk)
    if state is None:
        views: Any = [OptimizerView(each) for each in optimizers]
        state = ask_torch(
            lambda: get_optimizer_state_dict(root, views), lambda: _find_unknown(root, optimizers)
        )
    return state


def read_optimizers(
    optimizers: Sequence[Optimizer], model: ModelWalk | None
) -> dict[str, Any] | None:
    """Return what `get_optimizer_state_dict` does, but live; None: ask that."""
    if model is None:
        return None
    walks = OptimizerWalk.find_all(optimizers, model.parameter_names())
    if walks is None:
        return None
    state: dict[str, Any] = {}
    for each in walks:
        state |= each.nested_state()
    groups = [group for each in walks for group in each.nested_groups()]
    return {"state": state, "param_groups": groups}


def _find_unknown(model: nn.Module, optimizers: Sequence[Optimizer]) -> str | None:
    for number, optimizer in enumerate(optimizers):
        if (problem := _find_problem(model, optimizer)) is not None:
            which = "optimizer" if len(optimizers) == 1 else f"optimizer number {number}"
            return f"{which} ({type(optimizer).__name__}): {problem}"
    return None


def _find_problem(model: nn.Module, optimizer: Optimizer) -> str | None:
    known = {id(each) for each in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                return (
                    f"param_groups[{number}].params[{position}], of shape "
                    f"{tuple(parameter.shape)}, is no parameter of the model.\n"
                    "Register it in the model, or pass the model that this optimizer trains: state "
                    "is saved by the names that parameters have there."
                )
    state: Any = optimizer.state_dict()
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        has = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        return (
            f"its state_dict() has {has}, not state and param_groups.\n"
            "Pass the torch.optim.Optimizer inside it, or let its state_dict() have torch's shape."
        )
    return None


def restore_optimizers(
    root: nn.Module,
    optimizers: Sequence[Optimizer],
    live: Mapping[str, Any],
    restored: dict[str, Any],
    unknown: set[str],
) -> None:
    """Give optimizers their state; `live` and `restored` are nested as by torch's getter.

    `unknown`: parameters without saved state, which keep their live one.
    """
    if _restore_in_place(optimizers, live, restored):
        return
    if unknown:  # an optimizer takes all its state at once, and drops what it is not given
        kept = {name: state for name, state in live["state"].items() if name in unknown}
        groups = [
            {**group, "params": [name for name in group["params"] if name in unknown]}
            for group in live["param_groups"]
        ]
        # First: the options of a group that both sides have are the checkpoint's.
        restored["state"].update(kept)
        restored["param_groups"] = groups + restored["param_groups"]
    views: Any = [OptimizerView(each) for each in optimizers]
    set_optimizer_state_dict(root, views, restored, options=StateDictOptions(strict=False))


def _restore_in_place(
    optimizers: Sequence[Optimizer], live: Mapping[str, Any], restored: Mapping[str, Any]
) -> bool:
    """Restore the options of optimizers whose tensors were read in place.

    False: nothing was changed, since names, groups or options differ, or hooks or overrides are
    involved.
    """
    groups, saved_groups = live["param_groups"], restored.get("param_groups", ())
    own_groups = [group for each in optimizers for group in each.param_groups]
    if not (
        all(map(optimizer_has_default_loading, optimizers))
        and len(own_groups) == len(groups) == len(saved_groups)
        and live["state"].keys() == restored["state"].keys()
        and all(map(_is_alike, own_groups, groups, saved_groups))
        and all(
            live["state"][name].keys() == state.keys() and are_in_place(state, live["state"][name])
            for name, state in restored["state"].items()
        )
    ):
        return False
    for group, saved in zip(own_groups, saved_groups, strict=True):
        group.update({key: copy.deepcopy(saved[key]) for key in saved if key != "params"})
    for each in optimizers:
        # The last step of torch's own load_state_dict: some optimizers upgrade older state here.
        each.__setstate__({"state": each.state, "param_groups": each.param_groups})
    return True


def _is_alike(own: Mapping[str, Any], live: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether a group has the same parameters in the same order, and the same plain options."""
    return (
        own.keys() == live.keys() == saved.keys()
        and len(own["params"]) == len(live["params"])
        and live["params"] == saved["params"]
        and not any(
            isinstance(each, torch.Tensor)
            for key in saved
            if key != "params"
            for each in (own[key], saved[key])
        )
    )


@dataclass(frozen=True)
class Estimate:
    """The items of a state once every optimizer has taken a step."""

    items: Sequence[Item]
    uncounted: Sequence[str]
    """Classes of optimizers that have no state yet and cannot be estimated."""


def estimate(
    optimizers: Sequence[Optimizer], leaves: Mapping[str, Any], items: Sequence[Item]
) -> Estimate:
    """Return a state's items, with those that the first steps will add at their final position."""
    by_name: dict[str, list[Item]] = {}
    for item in items:
        by_name.setdefault(item.name, []).append(item)
    added: list[Item] = []
    uncounted: set[str] = set()
    groups = [(each, group) for each in optimizers for group in each.param_groups]
    for number, (optimizer, group) in enumerate(groups):
        names = leaves.get(f"{_GROUPS}.{number}.params", ())
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
