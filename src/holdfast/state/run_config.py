"""The composed config of a run as YAML for people.

Owns turning whatever a loop calls its config into plain containers: dataclasses, mappings and
namespaces become mappings at any depth. Promises to save something
readable for any config and to fail for none: a value that YAML does not know is written as text.
Never read back by holdfast.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError


def to_yaml(config: Any) -> bytes:
    """Return a dataclass, DictConfig, mapping or None as YAML; None is an empty mapping."""
    plain = _to_plain(config, ()) if config is not None else {}
    if not isinstance(plain, dict):
        plain = {"config": plain}
    # A text that looks like an interpolation must stay one, so nothing is resolved here.
    return OmegaConf.to_yaml(OmegaConf.create(plain), resolve=False).encode()


def _to_plain(value: Any, around: tuple[int, ...]) -> Any:
    """Return containers, numbers and texts; `around` holds the ids of the containers outside."""
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
    except Exception:  # noqa: BLE001  # a config is for people: no value in it fails a save
        return f"({type(value).__qualname__} without a text)"


def _escaped(text: str) -> str:
    """Escape a text that would be an interpolation if it were not malformed."""
    try:
        OmegaConf.create([text])
    except GrammarParseError:
        return text.replace("${", "\\${")
    return text
