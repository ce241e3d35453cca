"""Model and optimizer state by name: directly where that is safe, else by torch's getters.

Owns the question whether a state dict is what it seems (a module's own parameters and buffers, an
optimizer's own entries). Those are taken directly, by the names that torch's getters give them,
since the getters look each name up from the root several times. Where anything is overridden,
hooked, wrapped in an unknown way or not found, the getters are asked, with a view of the optimizer
that keeps torch from taking a step to create state. Promises to refuse by name what they do not
know (an entry that is no attribute, a parameter that is not in the model, an optimizer with a state
dict of its own) and live tensors that no dense bytes can be copied into (meta, sparse, quantised,
MKL-DNN, nested). Whatever else is raised, by a hook say, reaches the caller unchanged. `run_each`
is for what may run collectives inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from holdfast.errors import UnsupportedStateError
from holdfast.torch_internals import (
    EXTRA_STATE,
    child_left_out,
    is_plain_module,
    is_plain_optimizer,
    local_of,
    only_shard,
    parts_of,
    pre_hooks_of,
)

_SHOWN = 5
"""Names that one message lists."""
_META = "on the meta device, with no memory to hold values"
_SPARSE = "not dense"
_QUANTISED = "quantised"
_SHARDED = "a ShardedTensor, as FSDP1 makes without a device mesh"
_OVERLAPPING = "of elements that share memory (expanded)"
_REMEDIES = {
    _META: "Materialise first: build the model, call model.to_empty(device=...), make the "
    "optimizer from its parameters, then load or save.",
    _SPARSE: "Keep it out of the state (register_buffer(..., persistent=False)) and build it from "
    "dense parts, such as its indices and values, which can be saved.",
    _QUANTISED: "Save the model before it is quantised, or keep int_repr(), scale and zero point "
    "as plain buffers.",
    _SHARDED: "Pass device_mesh= to FullyShardedDataParallel, or use fully_shard: their parameters "
    "are DTensors, which can be saved.",
    _OVERLAPPING: "Give it memory of its own, with .clone() or .contiguous(), before loading.",
}
_DENSE = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def check_reachable(state: Mapping[str, Any], *, written_to: bool = False) -> None:
    """Refuse tensors whose values cannot be saved; `written_to`: or not be restored in place.

    Raises:
        UnsupportedStateError: naming the tensors of the first kind found.
    """
    found: dict[str, list[str]] = {}
    for name, value in state.items():
        reason = _why_not(value, written_to) if isinstance(value, torch.Tensor) else None
        if reason is not None:
            layout = f" ({local_of(value).layout})" if reason == _SPARSE else ""
            found.setdefault(reason, []).append(name + layout)
    for reason, names in found.items():
        listed = ", ".join(names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        verb = "is" if len(names) == 1 else "are"
        raise UnsupportedStateError(f"{listed}{more} {verb} {reason}.\n{_REMEDIES[reason]}")


def _why_not(value: torch.Tensor, written_to: bool) -> str | None:
    if type(value).__name__ == "ShardedTensor":  # by name: its module is torch's own, and may move
        return _SHARDED
    tensor = local_of(value)
    if tensor.device.type == "meta":
        return _META
    if tensor.layout is not torch.strided:
        return _SPARSE
    if tensor.is_quantized:
        return _QUANTISED
    if written_to and type(tensor) in _DENSE and _overlaps(tensor):
        return _OVERLAPPING
    return None


def _overlaps(tensor: torch.Tensor) -> bool:
    return 0 in tensor.stride() and any(
        stride == 0 and size > 1
        for stride, size in zip(tensor.stride(), tensor.size(), strict=True)
    )


_TENSORS = frozenset({torch.Tensor, nn.Parameter, nn.Buffer, DTensor})
"""Others may not be there yet, or be shown as something else."""


def model_state(root: nn.Module) -> dict[str, Any] | None:
    """Return what `get_model_state_dict` does, but live; None: ask that.

    Parameters of FSDP2 are in shards then, as after a state dict.
    """
    modules = _modules_of(root)
    if modules is None:
        return None
    for module, _, key in modules:
        for hook in pre_hooks_of(module).values():
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
        for own_name, value in parts_of(module)[0].items():
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
    found: list[tuple[nn.Module, str, str]] = []

    def add(module: nn.Module, name: str, key: str) -> bool:
        if not is_plain_module(module) or not only_shard(pre_hooks_of(module).values()):
            return False
        wrapper = child_left_out(module)
        if wrapper is None:
            return False
        found.append((module, name, key))
        for child_name, child in parts_of(module)[2].items():
            if child is None:
                continue
            own = "" if child_name == wrapper else f"{child_name}."
            if (own and wrapper) or not add(child, name + own, f"{key}{child_name}."):
                return False
        return True

    return found if add(root, "", "") else None


def _entries_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a module's own part of a state dict shows."""
    parameters, buffers, _, not_saved = parts_of(module)
    for name, parameter in parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in buffers.items():
        if buffer is not None and name not in not_saved:
            yield name, buffer


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
        if part == EXTRA_STATE:
            return True
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True
