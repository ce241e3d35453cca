"""Which values can be saved, and small state as bytes.

Owns the checks before writing and the only encoding of small values: everything written here can be
read by weights-only loading, without running code. Anything else is refused at the save, and so are
tensors without values (meta, lazy) or of a form that could not be read back (MKL-DNN, nested,
subclasses that cannot be taken apart), each by name and with the remedy. Also owns the composed
config of a run as YAML for people: readable output for any config, never an error, never read back
by holdfast. Knows no files, only bytes.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import io
import pickle
import struct
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError
from torch.distributed.tensor import DTensor

from holdfast.blame import is_process_failure
from holdfast.errors import CorruptCheckpointError, UnsupportedStateError
from holdfast.format.nondense import (
    PLAIN_TENSORS,
    expanded_dims,
    find_problem,
    is_dense,
    is_lazy,
)
from holdfast.torch_internals import local_of

_PLAIN = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
)
_SEQUENCES = (list, tuple, set)
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter)
_SHOWN = 5
"""Names that one message lists."""
_META = "on the meta device, with no memory to hold values"
_PARTIAL = "a DTensor of partial sums, which no rank has the value of"
_VIEW = "Keep it as bytes: register its .view(torch.uint8)."
_SHARDED = "a ShardedTensor, as FSDP1 makes without a device mesh"
_OVERLAPPING = "of elements that share memory (expanded)"
_REMEDIES = {
    _META: "Materialise first: build the model, call model.to_empty(device=...), make the "
    "optimizer from its parameters, then load or save.",
    _SHARDED: "Pass device_mesh= to FullyShardedDataParallel, or use fully_shard: their parameters "
    "are DTensors, which can be saved.",
    _PARTIAL: "Redistribute it first: tensor.redistribute(placements=[Replicate()]).",
    _OVERLAPPING: "Give it memory of its own, with .clone() or .contiguous(), before loading.",
}


def check_plain(value: Any, name: str) -> None:
    """Refuse state that weights-only loading could not read back.

    Raises:
        UnsupportedStateError: naming the place of the first such value.
    """
    found = _find_foreign(value, name)
    if found is None:
        return
    place, foreign = found
    if isinstance(foreign, torch.Tensor):
        check_reachable({place: foreign})
    try:  # torch's own list of safe types is longer than ours, and users may extend it
        decode(encode(foreign), place)
    except (CorruptCheckpointError, pickle.PicklingError, AttributeError, TypeError) as error:
        raise UnsupportedStateError(
            f"{place} is a {type(foreign).__module__}.{type(foreign).__qualname__}, which could be "
            "read back only by running code from the checkpoint.\nUse tensors, numbers, strings, "
            "and lists or dicts of them in state_dict()."
        ) from error


def check_keys(value: Any, place: str) -> None:
    """Refuse keys that are no strings: DCP would restore them as strings.

    Raises:
        UnsupportedStateError: naming the first such key.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                raise UnsupportedStateError(
                    f"the key {key!r} of {place} is no string, and would be restored as one.\n"
                    "Use strings as keys in what get_extra_state and the optimizer return."
                )
            check_keys(each, f"{place}.{key}")
    elif isinstance(value, list):
        for position, each in enumerate(value):
            check_keys(each, f"{place}[{position}]")


def check_reachable(state: Mapping[str, Any], *, written_to: bool = False) -> None:
    """Refuse tensors whose values cannot be saved; `written_to`: or not be restored in place.

    Raises:
        UnsupportedStateError: naming the tensors of the first kind found.
    """
    found: dict[str, list[str]] = {}
    for name, value in state.items():
        reason = _why_not(value, written_to) if isinstance(value, torch.Tensor) else None
        if reason is not None:
            found.setdefault(reason, []).append(name)
    for reason, names in found.items():
        listed = ", ".join(names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        verb = "is" if len(names) == 1 else "are"
        text = f"{reason}.\n{_REMEDIES[reason]}" if reason in _REMEDIES else reason
        raise UnsupportedStateError(f"{listed}{more} {verb} {text}")


def _why_not(value: torch.Tensor, written_to: bool) -> str | None:
    tensor = value
    if type(value) not in PLAIN_TENSORS:
        if type(value).__name__ == "ShardedTensor":  # by name: its module is torch's, and may move
            return _SHARDED
        if is_lazy(value):
            return find_problem(value)
        # Detached, a parameter of a class that only adds attributes is a plain tensor.
    tensor = local_of(value.detach() if isinstance(value, torch.nn.Parameter) else value)
    if tensor.device.type == "meta":
        return _META
    if isinstance(value, DTensor) and any(each.is_partial() for each in value.placements):
        return _PARTIAL
    if not _is_saved_by_torch(tensor.dtype):
        return f"of the dtype {tensor.dtype}, which torch.save does not write.\n{_VIEW}"
    if not is_dense(tensor):
        return find_problem(tensor)
    if written_to and expanded_dims(tensor):
        return _OVERLAPPING
    return None


@cache
def _is_saved_by_torch(dtype: torch.dtype) -> bool:
    try:
        torch.save(torch.empty(0, dtype=dtype), io.BytesIO())
    except KeyError:  # integers of less than a byte
        return False
    except RuntimeError:  # quantised ones, which are not made this way
        return True
    return True


def encode(value: Any) -> bytes:
    """Return plain values and tensors as the bytes of a torch file."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def count_tensors(state: Any) -> int:
    """Return how many tensors a nested state has."""
    if isinstance(state, Mapping):
        return sum(map(count_tensors, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(count_tensors, state))
    return int(isinstance(state, torch.Tensor))


def decode(content: bytes, name: str) -> Any:
    """Return what `encode` wrote, running no code.

    Raises:
        CorruptCheckpointError: the bytes are torn or contain anything but plain values.
    """
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:  # torch's message explains how to run the code anyway
        raise CorruptCheckpointError(
            name, "cannot be read: it asks for code, or is torn"
        ) from error
    except Exception as error:  # torn files can raise anything
        if is_process_failure(error):
            raise
        summary = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptCheckpointError(name, f"cannot be read: {summary}") from error


def canonical(value: Any) -> bytes:
    """Return bytes that are equal for equal plain values, in whatever order sets and dicts are."""
    if isinstance(value, Mapping):
        pairs = sorted((canonical(key), canonical(each)) for key, each in value.items())
        parts, kind = [part for pair in pairs for part in pair], "mapping"
    elif isinstance(value, set | frozenset):
        parts, kind = sorted(map(canonical, value)), "set"
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        parts, kind = [canonical(each) for each in value], type(value).__name__
    elif isinstance(value, float):
        parts, kind = [struct.pack("<d", value)], "float"
    else:
        parts, kind = [repr(value).encode()], type(value).__name__
    sizes = ",".join(str(len(each)) for each in parts)
    return b"".join([f"{kind}[{sizes}]".encode(), *parts])


def _find_foreign(value: Any, place: str) -> tuple[str, Any] | None:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return (place, value) if value.is_meta else None
    if kind in _PLAIN:
        return None
    if kind in _SEQUENCES:
        if _PLAIN.issuperset(map(type, value)):  # the common case: long lists of numbers
            return None
        inner = [(f"{place}[{position}]", each) for position, each in enumerate(value)]
    elif kind in _MAPPINGS:
        keys = [(f"the key {key!r} of {place}", key) for key in value]
        inner = keys + [(f"{place}.{key}", each) for key, each in value.items()]
    else:
        return place, value
    for where, each in inner:
        if (found := _find_foreign(each, where)) is not None:
            return found
    return None


def to_yaml(config: Any) -> bytes:
    """Return a dataclass, DictConfig, mapping or None as YAML; None is an empty mapping."""
    plain = _to_plain(config, ()) if config is not None else {}
    if not isinstance(plain, dict):
        plain = {"config": plain}
    # A string that looks like an interpolation must stay one, so nothing is resolved here.
    return OmegaConf.to_yaml(OmegaConf.create(plain), resolve=False).encode()


def _to_plain(value: Any, around: tuple[int, ...]) -> Any:
    """Return containers, numbers and strings; `around` holds the ids of the outer containers."""
    if id(value) in around:
        return "(itself)"
    inside = (*around, id(value))
    if OmegaConf.is_config(value):
        return _to_plain(OmegaConf.to_container(value, resolve=False), inside)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value)]
        return {name: _to_plain(getattr(value, name, None), inside) for name in names}
    if isinstance(value, SimpleNamespace | argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {_to_text(key): _to_plain(each, inside) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_plain(each, inside) for each in value]
    if value is None or type(value) in (bool, int, float):
        return value
    return _escaped(_to_text(value))


def _to_text(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    try:
        return str(value)
    except Exception:  # noqa: BLE001  # YAML for people: no value in it may fail a save
        return f"({type(value).__qualname__} without a string form)"


def _escaped(text: str) -> str:
    """Escape a string that would be an interpolation if it were not malformed."""
    try:
        OmegaConf.create([text])
    except GrammarParseError:
        return text.replace("${", "\\${")
    return text
