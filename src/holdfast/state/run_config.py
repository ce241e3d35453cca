"""The composed config of a run as YAML for people.

Owns turning whatever a loop calls its config into plain containers. Promises to save something
readable for any config and to fail for none: a value that YAML does not know is written as text.
Never read back by holdfast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf


def to_yaml(config: Any) -> bytes:
    """Return a dataclass, DictConfig, mapping or None as YAML; None is an empty mapping."""
    if OmegaConf.is_config(config):
        return OmegaConf.to_yaml(config).encode()
    plain = _to_plain(config) if config is not None else {}
    if not isinstance(plain, dict):
        plain = {"config": plain}
    # A text that looks like an interpolation must stay one, so nothing is resolved here.
    return OmegaConf.to_yaml(OmegaConf.create(plain), resolve=False).encode()


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value)]
        return {name: _to_plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _to_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_to_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
