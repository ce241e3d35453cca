"""Every private name of torch that holdfast uses, and what replaces each one when it is gone.

Owns all access to names that torch may move without notice: attributes of distributed tensors,
modules, optimizers and schedules, functions of torch.distributed, and names inside `.metadata`
files. A test lists them, finds each on the installed torch, holds that no other module of holdfast
uses one, and takes each away to see its replacement work. Promises that importing this module never
fails because a name has moved. What replaces a name is a slower way through public calls where
there is one, otherwise an error that names the version of torch, raised where the name is needed.
Knows nothing about checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from holdfast.errors import CheckpointError


def _gone(name: str, need: str) -> CheckpointError:
    return CheckpointError(
        f"torch {torch.__version__} has no {name}, which holdfast needs {need}.\n"
        "Use a version of torch that this version of holdfast was tested with."
    )


def _has(owner: Any, names: Iterable[str]) -> bool:
    return all(hasattr(owner, each) for each in names)


# Distributed tensors


def _attributes(tensor: Any) -> tuple[Any, Any]:
    return tensor._local_tensor, tensor._spec  # quicker than an attrgetter: saves ask every tensor


def _public_parts(tensor: Any) -> tuple[Any, Any]:
    spec = (tensor.device_mesh, tuple(tensor.placements), tensor.shape)
    return tensor.detach().to_local(), spec


local_and_spec: Callable[[Any], tuple[Any, Any]] = (
    _attributes if _has(DTensor, ("_local_tensor", "_spec")) else _public_parts
)
"""Return this rank's part of a DTensor, and what is equal for DTensors that are laid out alike.

Without the names: by its public methods, which take longer.
"""


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that has one, otherwise the tensor."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return tensor  # quicker than to ask for what it does not have
    local: torch.Tensor | None = getattr(tensor, "_local_tensor", None)
    if local is not None:
        return local
    found: torch.Tensor = local_and_spec(tensor)[0] if isinstance(tensor, DTensor) else tensor
    return found


def chunks_of(tensor: DTensor) -> list[tuple[torch.Size, torch.Size]]:
    """Return offsets and sizes of what this rank holds of a DTensor; its mesh includes this rank.

    Without `__create_chunk_list__`: computed from the public placements.

    Raises:
        CheckpointError: it is gone, and a placement is neither `Shard` nor `Replicate`.
    """
    find: Any = getattr(tensor, "__create_chunk_list__", None)
    if find is not None:
        local = local_of(tensor)  # FSDP2 leaves an empty part of an empty part of another shape
        return [(each.offsets, each.sizes if local.numel() else local.shape) for each in find()]
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    for place, position, count in zip(
        tensor.placements, coordinate, tensor.device_mesh.shape, strict=True
    ):
        if place.is_replicate():
            continue
        if type(place) is not Shard:
            raise _gone("DTensor.__create_chunk_list__", f"for tensors placed as {place}")
        size = sizes[place.dim]
        length = -(-size // count)  # as torch.chunk divides: the last parts may be short or empty
        start = min(position * length, size)
        offsets[place.dim] += start
        sizes[place.dim] = min(length, size - start)
    return [(torch.Size(offsets), torch.Size(sizes))]


def can_be_flattened(tensor: torch.Tensor) -> bool:
    """Whether a tensor subclass says how to take it apart. Without the name: none does."""
    return hasattr(tensor, "__tensor_flatten__")


def flatten_tensor(tensor: Any) -> tuple[Sequence[str], Any]:
    """Return the attributes of a subclass that are tensors, and the rest of what it is made of."""
    names, context = tensor.__tensor_flatten__()
    return names, context


def unflatten_tensor(
    kind: Any, inner: Mapping[str, torch.Tensor], context: Any, size: Any, stride: Any
) -> torch.Tensor:
    """Return a tensor of a subclass from what `flatten_tensor` has found."""
    made: torch.Tensor = kind.__tensor_unflatten__(inner, context, size, stride)
    return made


def sparse_parts(tensor: Any) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """Return the layout of a sparse tensor, and its indices and values, sharing memory.

    Without `_indices` and `_values`: copies, in the order of a coalesced tensor.
    """
    layout = tensor.layout
    if layout is torch.sparse_coo:
        if not _has(torch.Tensor, ("_indices", "_values")):
            ordered = tensor.coalesce()
            return (layout, tensor.is_coalesced()), [ordered.indices(), ordered.values()]
        return (layout, tensor.is_coalesced()), [tensor._indices(), tensor._values()]
    if layout in (torch.sparse_csr, torch.sparse_bsr):
        return (layout,), [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return (layout,), [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


# Copies


def copy_each(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, non_blocking: bool = False
) -> None:
    """Copy tensors in one call. Without `torch._foreach_copy_`: in one call for each."""
    copy: Any = getattr(torch, "_foreach_copy_", None)
    if copy is not None:
        copy(targets, sources, non_blocking=non_blocking)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=non_blocking)


# Process groups


def rendezvous_store() -> Any:
    """Return the store of the default process group.

    Without `_get_default_store`: the group's own view of it, a public method of newer groups.

    Raises:
        CheckpointError: neither is there.
    """
    find: Any = getattr(distributed.distributed_c10d, "_get_default_store", None)
    if find is None:
        find = getattr(distributed.group.WORLD, "get_group_store", None)
    if find is None:
        raise _gone("distributed_c10d._get_default_store", "for ranks to communicate")
    return find()


def abort_group(group: Any) -> None:
    """End all operations of a process group. Without the name: by the group's own method."""
    abort: Any = getattr(distributed.distributed_c10d, "_abort_process_group", None)
    if abort is None:
        group.abort()
    else:
        abort(group)


# Modules. Without any of these names no module is plain, and torch's getters and setters are asked.

_PARTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")
_LOAD_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_SAVING = "_save_to_state_dict"
_LOADING = ("load_state_dict", "_load_from_state_dict", "set_extra_state")
"""Methods with which a module can customize loading."""


_MODULES_ARE_KNOWN = _has(nn.Module(), (*_PARTS, *_HOOKS, _SAVING))
_LOADING_IS_KNOWN = _has(nn.Module(), (*_LOAD_HOOKS, *_LOADING))
_OWN_SAVING = getattr(nn.Module, _SAVING, None)

parts_of: Callable[[nn.Module], tuple[dict[str, Any], dict[str, Any], dict[str, Any], set[str]]]
parts_of = attrgetter(*_PARTS)
"""Return parameters, buffers and children of a plain module, and which buffers are not saved."""

pre_hooks_of: Callable[[nn.Module], dict[int, Callable[..., Any]]]
pre_hooks_of = attrgetter("_state_dict_pre_hooks")
"""Return the hooks that a plain module runs before a state dict."""

EXTRA_STATE = "_extra_state"
"""The last part of the name of a module's extra state. Part of the format of state dicts."""

_SHARDING = "torch.distributed.fsdp._fully_shard."
"""Where FSDP2's own hooks are made. If they are made elsewhere: a hook of the user's."""
_COMPILING = "torch._dynamo.eval_frame"
_RENAMING = "_fqn_modifiers"
"""The attribute by which a module renames its parts for torch's getters. Such a module also hooks
its state dict, so that it is not plain without this name either."""


def is_plain_module(module: nn.Module) -> bool:
    """Whether a module's state dict is its parameters and buffers, as they are."""
    kind, given = type(module), vars(module)
    return (
        _MODULES_ARE_KNOWN
        and kind.state_dict is nn.Module.state_dict
        and kind._save_to_state_dict is _OWN_SAVING
        and kind.get_extra_state is nn.Module.get_extra_state
        and "state_dict" not in given
        and "_save_to_state_dict" not in given
        and not given["_state_dict_hooks"]
    )


def has_default_loading(module: nn.Module) -> bool:
    """Whether a plain module's `load_state_dict` copies into its parameters and buffers alone."""
    kind, given = type(module), vars(module)
    return (
        is_plain_module(module)
        and _LOADING_IS_KNOWN
        and all(
            getattr(kind, name) is getattr(nn.Module, name) and name not in given
            for name in _LOADING
        )
        and only_shard(module._state_dict_pre_hooks.values())
        and only_shard(module._load_state_dict_pre_hooks.values())
        and only_shard(module._load_state_dict_post_hooks.values())
    )


def only_shard(hooks: Iterable[Callable[..., Any]]) -> bool:
    """Whether hooks are FSDP2's own, which bring parameters into shards and do nothing else."""
    return all((getattr(each, "__module__", None) or "").startswith(_SHARDING) for each in hooks)


def child_left_out(module: nn.Module) -> str | None:
    """Return the child of a plain module that torch's getters leave out of names; "": none.

    None: only the getters know, since the module renames its parts, or is a wrapper of a kind that
    is not known here.
    """
    kind, children = type(module), module._modules
    if hasattr(kind, _RENAMING) or _RENAMING in vars(module):
        return None
    if "_checkpoint_wrapped_module" in children:
        return None
    if isinstance(module, DistributedDataParallel):
        return "module"
    compiled: Any = getattr(sys.modules.get(_COMPILING), "OptimizedModule", ())
    if isinstance(module, compiled):
        return "_orig_mod" if "_orig_mod" in children else None
    return None if kind.__module__.startswith("torch._dynamo.") else ""


# Optimizers. Without any of these names none is plain, and torch's getters and setters are asked.

_OPTIMIZER_HOOKS = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
_OPTIMIZER_LOAD_HOOKS = (
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def is_plain_optimizer(optimizer: Optimizer) -> bool:
    """Whether an optimizer's state dict is its state and groups, as they are."""
    return (
        type(optimizer).state_dict is Optimizer.state_dict
        and "state_dict" not in vars(optimizer)
        and not any(getattr(optimizer, each, True) for each in _OPTIMIZER_HOOKS)
    )


def optimizer_has_default_loading(optimizer: Optimizer) -> bool:
    """Whether a plain optimizer's `load_state_dict` takes over state and groups, as they are."""
    return (
        is_plain_optimizer(optimizer)
        and type(optimizer).load_state_dict is Optimizer.load_state_dict
        and "load_state_dict" not in vars(optimizer)
        and not any(getattr(optimizer, each, True) for each in _OPTIMIZER_LOAD_HOOKS)
    )


# Learning-rate schedules

NESTED_SCHEDULES = "_schedulers"
"""The key of nested schedules in the state dict of a schedule."""


def nested_schedules(schedule: Any) -> Sequence[Any]:
    """Return the schedules inside one. Without the name: none; see `hides_schedules`."""
    found: Sequence[Any] = getattr(schedule, "_schedulers", ())
    return found


def hides_schedules(schedule: Any) -> bool:
    """Whether a schedule is made of others that cannot be found in it."""
    kinds = (torch.optim.lr_scheduler.SequentialLR, torch.optim.lr_scheduler.ChainedScheduler)
    return isinstance(schedule, kinds) and not nested_schedules(schedule)


def last_rates(schedule: Any) -> Sequence[Any] | None:
    """Return the rates that a schedule reports. Without the name: None, as there are none to keep.

    The public `get_last_lr` returns the same, but the rates cannot be set by a public name.
    """
    found: Sequence[Any] | None = getattr(schedule, "_last_lr", None)
    return found


def set_last_rates(schedule: Any, rates: Sequence[float]) -> None:
    """Set the rates that a schedule reports until its next step; no-op without the name."""
    if last_rates(schedule) is not None:
        schedule._last_lr = rates


# Names inside a .metadata file


@dataclass
class _OwnStorageInfo:
    """The same fields as torch's own class, pickled by its name: that name is the format."""

    relative_path: str
    offset: int
    length: int


_OwnStorageInfo.__module__ = "torch.distributed.checkpoint.filesystem"
_OwnStorageInfo.__qualname__ = "_StorageInfo"

StorageInfo: Any = getattr(filesystem, "_StorageInfo", _OwnStorageInfo)
"""Where an entry is: `relative_path`, `offset`, `length`. Without the name: a class of ours."""


def _find_layout(name: str) -> torch.layout:
    layout = getattr(torch, name.removeprefix("torch."))
    assert isinstance(layout, torch.layout)
    return layout


def _refuse_memory_format(*_: Any) -> Any:
    raise _gone(
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING", "to read .metadata files"
    )


PICKLED: Mapping[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): getattr(
        metadata, "_MEM_FORMAT_ENCODING", _refuse_memory_format
    ),
    ("torch.serialization", "_get_layout"): getattr(
        torch.serialization, "_get_layout", _find_layout
    ),
    ("torch._C", "Size"): torch.Size,
}
"""What the private names in a `.metadata` file stand for."""


def load_pre_hooks(root: nn.Module, prefix: str = "") -> Iterator[tuple[Callable[..., Any], str]]:
    """Yield the user's hooks that run before a state dict is loaded, each with its names' prefix.

    Prefixes are those of torch's getters. A wrapper of an unknown kind hides what is inside it.
    """
    for hook in getattr(root, _LOAD_HOOKS[0], {}).values():
        if not (getattr(hook, "__module__", None) or "").startswith("torch."):
            yield hook, prefix
    left_out = child_left_out(root)
    if left_out is not None:
        for name, child in root.named_children():
            yield from load_pre_hooks(child, prefix if name == left_out else f"{prefix}{name}.")


def copy_versions(source: Any, target: Any) -> None:
    """Copy the versions of modules that a state dict has beside its entries, if it has some."""
    with suppress(AttributeError):
        target._metadata = source._metadata
