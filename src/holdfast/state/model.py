"""A model's state by name: read from its modules where that is safe, else by torch's getters.

Owns the one walk over modules: which parameter or buffer each name of a checkpoint stands for, by
the names that torch's getters give. A walk is made once and read at every save after that, since
the getters look each name up from the root several times; before each reading it is compared with
the modules, and what was added, removed, replaced or overridden ends it. Where a state dict is not
simply a module's own parameters and buffers (overrides, hooks, unknown wrappers), the getters are
asked. Promises to refuse by name an entry that is no attribute, to skip torch's setters only where
all tensors were read in place, and to let errors of hooks reach the caller unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor

from holdfast.errors import UnsupportedStateError
from holdfast.format.dcp import is_leaf
from holdfast.format.nondense import is_lazy
from holdfast.state.codec import check_reachable
from holdfast.torch_internals import (
    EXTRA_STATE,
    child_left_out,
    has_default_loading,
    is_plain_module,
    load_pre_hooks,
    local_of,
    only_shard,
    parts_of,
    pre_hooks_of,
)

MODEL = "model."
"""Names of a model's state in a checkpoint begin with this."""
_TENSORS = frozenset({torch.Tensor, nn.Parameter, nn.Buffer, DTensor})
"""Others may not be there yet, or be shown as something else."""


class _Table(NamedTuple):
    """One dictionary of a module, with its entries when it was walked."""

    owner: dict[str, Any]
    entries: Sequence[tuple[str, str | None]]
    """Each key, with its name in a checkpoint; None: it had no value, or is not saved."""
    absent: frozenset[str]
    """Keys whose value was None."""

    @classmethod
    def of(cls, owner: dict[str, Any], prefix: str, not_saved: frozenset[str]) -> _Table:
        absent = frozenset([key for key, value in owner.items() if value is None])
        left_out = absent | not_saved
        entries = [(key, None if key in left_out else prefix + key) for key in owner]
        return cls(owner, entries, absent)

    def holds(self, owner: dict[str, Any]) -> bool:
        return (
            owner is self.owner
            and len(owner) == len(self.entries)
            and all(
                key in owner and (owner[key] is None) == (key in self.absent)
                for key, _ in self.entries
            )
        )


class _Part(NamedTuple):
    """A module, as it was when it was walked."""

    module: nn.Module
    name: str
    """What the names of its entries begin with."""
    key: str
    """What its entries begin with in the root's state dict, wrappers included."""
    parameters: _Table
    buffers: _Table
    children: Mapping[str, nn.Module | None]
    not_saved: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module, name: str, key: str) -> _Part:
        parameters, buffers, children, not_saved = parts_of(module)
        unsaved = frozenset(not_saved)
        return cls(
            module,
            name,
            key,
            _Table.of(parameters, MODEL + name, frozenset()),
            _Table.of(buffers, MODEL + name, unsaved),
            dict(children),
            unsaved,
        )

    def holds(self) -> bool:
        if not is_plain_module(self.module):
            return False
        parameters, buffers, children, not_saved = parts_of(self.module)
        return (
            self.parameters.holds(parameters)
            and self.buffers.holds(buffers)
            and children.keys() == self.children.keys()
            and all(map(_is, children.values(), self.children.values()))
            and not_saved == self.not_saved
        )


class ModelWalk:
    """Where the state of a model is, by the names that torch's getters give it."""

    def __init__(self, root: nn.Module, parts: Sequence[_Part]) -> None:
        """Use `find`."""
        self._root = root
        self._parts = parts
        # What a wrapper holds comes last, as in the getters.
        in_order = sorted(parts, key=lambda each: each.name != each.key)
        self._tables = [table for each in in_order for table in (each.parameters, each.buffers)]

    @classmethod
    def find(cls, root: nn.Module) -> ModelWalk | None:
        """Walk all modules; None: not all of them are plain, or named as the getters name them."""
        parts: list[_Part] = []

        def add(module: nn.Module, name: str, key: str) -> bool:
            wrapper = child_left_out(module) if is_plain_module(module) else None
            if wrapper is None:
                return False
            part = _Part.of(module, name, key)
            parts.append(part)
            for child_name, child in part.children.items():
                if child is None:
                    continue
                own = "" if child_name == wrapper else f"{child_name}."
                if (own and wrapper) or not add(child, name + own, f"{key}{child_name}."):
                    return False
            return True

        if not add(root, "", ""):
            return None
        walk = cls(root, parts)
        names = [name for table in walk._tables for _, name in table.entries if name is not None]
        return walk if len(set(names)) == len(names) else None

    @classmethod
    def find_unhooked(cls, root: nn.Module) -> ModelWalk | None:
        """Walk all modules; None also where a hook of the user's may change their state dicts."""
        walk = cls.find(root)
        hooks = [] if walk is None else [pre_hooks_of(each.module) for each in walk._parts]
        return walk if all(only_shard(each.values()) for each in hooks) else None

    def holds(self, root: nn.Module) -> bool:
        """Whether everything is where it was when it was walked."""
        known = root is self._root or _are_equal_lists(root, self._root)
        return known and all(each.holds() for each in self._parts)

    def run_hooks(self) -> bool:
        """Run state-dict pre-hooks, as state_dict would: FSDP2 reshards its parameters in them.

        Returns whether there were any; they may have changed what was walked.
        """
        ran = False
        for each in self._parts:
            for hook in tuple(pre_hooks_of(each.module).values()):
                hook(each.module, each.key, False)  # positional, as torch passes it
                ran = True
        return ran

    def values(self) -> dict[str, Any]:
        """Return the live values by name, in the order of the getters."""
        found: dict[str, Any] = {}
        for table in self._tables:
            owner = table.owner
            for key, name in table.entries:
                if name is not None:
                    found[name] = owner[key]
        return found

    def parameter_names(self) -> dict[int, str]:
        """Return the name in the model of each parameter, by its id; of what is tied the first."""
        found: dict[int, str] = {}
        for part in self._parts:
            for key, parameter in part.parameters.owner.items():
                found.setdefault(id(parameter), part.name + key)
        return found


def _is(one: Any, other: Any) -> bool:
    return one is other


def _are_equal_lists(one: nn.Module, other: nn.Module) -> bool:
    """Whether both are plain lists, or dicts, of the same models."""
    is_either = type(one) in (nn.ModuleList, nn.ModuleDict)
    if not (is_either and type(one) is type(other) and is_plain_module(one)):
        return False
    parameters, buffers, children, _ = parts_of(one)
    others = parts_of(other)[2]
    return (
        list(children) == list(others)
        and all(map(_is, children.values(), others.values()))
        and not (parameters or buffers or pre_hooks_of(one))
    )


def run_each(*works: Callable[[], Any]) -> list[Any]:
    """Run one after the other, also where an earlier one failed; return what each returned.

    Torch's getters and setters (of FSDP1, say) and hooks of the user's may run collectives. A rank
    that left after the first failure would keep the others waiting in the next one.

    Raises:
        BaseException: the first that was raised, when all have run, with the others in its notes.
    """
    results: list[Any] = []
    first: BaseException | None = None
    for work in works:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # raised below
            if first is not None:
                first.add_note(f"and: {error}")
            first = first or error
    if first is not None:
        raise first
    return results


def ask_torch(getter: Callable[[], dict[str, Any]], explain: Callable[[], str | None]) -> Any:
    """Return what one of torch's state-dict getters returns.

    Raises:
        UnsupportedStateError: it failed over state that it does not know; `explain` found which.
    """
    try:
        return getter()
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        if (problem := explain()) is None:
            raise
        raise UnsupportedStateError(problem) from error


def model_state(root: nn.Module, walk: ModelWalk | None) -> dict[str, Any]:
    """Return the model's live state by the names of torch's getter, which is asked if need be.

    `walk`: as `find_unhooked` returns it.

    Raises:
        UnsupportedStateError: it has entries that are no parameter, buffer or extra state, or some
            without a size yet.
    """
    state = read_model(walk)
    if state is None:
        tensors = [*root.named_parameters(), *root.named_buffers()]
        check_reachable({MODEL + name: each for name, each in tensors if is_lazy(each)})
        state = ask_torch(lambda: get_model_state_dict(root), lambda: _find_unknown(root))
    return state


def read_model(walk: ModelWalk | None) -> dict[str, Any] | None:
    """Return what `get_model_state_dict` does, but live; None: ask that.

    Parameters of FSDP2 are in shards then, as after a state dict.
    """
    if walk is None:
        return None
    walk.run_hooks()
    values = walk.values()
    if not _TENSORS.issuperset(map(type, values.values())):
        return None
    return {name.removeprefix(MODEL): value for name, value in values.items()}


def _find_unknown(model: nn.Module) -> str | None:
    unknown = [name for name in model.state_dict() if not _is_attribute(model, name)]
    if not unknown:
        return None
    return (
        f"model.{unknown[0]}: state_dict() of the model has it, and no parameter, buffer or "
        "attribute has that name, so that nothing can be restored into it.\n"
        "Register it with register_buffer, or return it from get_extra_state."
    )


def _is_attribute(model: nn.Module, name: str) -> bool:
    value: Any = model
    for part in name.split("."):
        if part == EXTRA_STATE:
            return True
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def restore_model(root: nn.Module, live: Mapping[str, Any], restored: dict[str, Any]) -> None:
    """Give a model its state: by the names of torch's getter, `live` by those in a checkpoint.

    Torch's setter walks every module to copy tensors onto themselves. It is not needed where all
    that is restored was read into the live tensors, and nothing overrides or hooks loading.
    """
    named = {MODEL + name: value for name, value in restored.items()}
    if named and not (all(map(has_default_loading, root.modules())) and are_in_place(named, live)):
        # Not strict: the names were compared before.
        set_model_state_dict(root, restored, options=StateDictOptions(strict=False))


def are_in_place(restored: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    """Whether every restored value is the live tensor of its name."""
    return all(
        isinstance(value, torch.Tensor) and live.get(name) is value
        for name, value in restored.items()
    )


def is_live(leaf: Any, live: Any) -> bool:
    """Whether a leaf from a getter is this live value and not a copy of it."""
    if leaf is live:
        return True
    if not isinstance(live, torch.Tensor):
        return is_leaf(live) and type(leaf) is type(live)
    if not isinstance(leaf, torch.Tensor) or leaf.shape != live.shape or leaf.dtype != live.dtype:
        return False
    one, other = local_of(leaf), local_of(live)
    return (
        (type(leaf) is type(live) or (type(leaf) is torch.Tensor and type(live) in _TENSORS))
        and one.layout is other.layout is torch.strided
        and one.device == other.device
        and one.shape == other.shape
        and one.data_ptr() == other.data_ptr()
        and one.stride() == other.stride()
    )


def join_models(
    model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
) -> nn.Module:
    """Return one root: named models under their names, and several chunks under 0, 1, ..."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, Mapping):
        return nn.ModuleDict(dict(model))
    models = list(model)
    return models[0] if len(models) == 1 else nn.ModuleList(models)


def migrate_names(
    root: nn.Module, saved: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> dict[str, str]:
    """Return the names that hooks of the model give to saved ones before they are loaded.

    `saved`: size and type by name. The hooks are given tensors without values.

    Raises:
        Exception: whatever a hook raised.
    """
    hooks = list(load_pre_hooks(root))
    if not hooks:
        return {}
    given = {
        name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in saved.items()
    }
    names = {id(each): name for name, each in given.items()}
    state = dict(given)
    for hook, prefix in hooks:
        hook(state, prefix, {}, True, [], [], [])
    found = {names[id(each)]: name for name, each in state.items() if id(each) in names}
    return {old: new for old, new in found.items() if old != new}
