"""Small state as bytes that can be read back without running code, and the config as YAML.

Owns the check before writing and the only encoding of such values: everything written here can be
read by weights-only loading; anything else is refused at the save. Also owns the composed config of
a run as YAML for people: readable output for any config, never an error, never read back by
holdfast. Knows no files, only bytes.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import io
import pickle
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from holdfast.errors import CorruptCheckpointError, UnsupportedStateError, is_process_failure
from holdfast.state.model import check_reachable

_PLAIN = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
)
_SEQUENCES = (list, tuple, set)
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter)


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


def encode(value: Any) -> bytes:
    """Return plain values and tensors as the bytes of a torch file."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


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
