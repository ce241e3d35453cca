"""The composed config of a run as YAML for people."""

from __future__ import annotations

import argparse
import dataclasses
import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from holdfast.config import CheckpointConfig
from holdfast.state.codec import to_yaml


class _Colour(enum.Enum):
    RED = 1


class _Custom:
    def __str__(self) -> str:
        return "custom"


@dataclasses.dataclass
class _Inner:
    path: Any = Path("/x")
    names: Any = ("a", "b")


@dataclasses.dataclass
class _Outer:
    inner: _Inner = dataclasses.field(default_factory=_Inner)
    options: Any = None


CONFIGS = [
    (None, {}),
    ({}, {}),
    ({"a": {"b": [1, 2.5, True, None, "x"]}}, {"a": {"b": [1, 2.5, True, None, "x"]}}),
    (OmegaConf.create({"a": 1, "b": "${a}"}), {"a": 1, "b": "${a}"}),
    (OmegaConf.create({"a": "???", "b": "${nothing.there}"}),
     {"a": "???", "b": "${nothing.there}"}),
    (_Outer(), {"inner": {"path": "/x", "names": ["a", "b"]}, "options": None}),
    (_Outer(options=OmegaConf.create({"a": "${nothing}"})),
     {"inner": {"path": "/x", "names": ["a", "b"]}, "options": {"a": "${nothing}"}}),
    ({"a": OmegaConf.create([1, "${nothing}"])}, {"a": [1, "${nothing}"]}),
    ({"a": _Colour.RED, 5: _Custom()}, {"a": "RED", "5": "custom"}),
    ({"a": {3, 1}, "b": 2**70}, {"a": [1, 3], "b": 2**70}),
    ({"a": "${x}", "b": "${", "c": "${x:${", "d": "???"},
     {"a": "${x}", "b": "\\${", "c": "\\${x:\\${", "d": "???"}),
    ({"a": "yes", "b": "1e3", "c": "null", "d": "x: y\n# z", "e": "\u00e9\U0001f600"},
     {"a": "yes", "b": "1e3", "c": "null", "d": "x: y\n# z", "e": "\u00e9\U0001f600"}),
    ({"a": SimpleNamespace(b=argparse.Namespace(c=1), d=[SimpleNamespace(e=None)])},
     {"a": {"b": {"c": 1}, "d": [{"e": None}]}}),
    (SimpleNamespace(seed=1), {"seed": 1}),
    ([1, 2], {"config": [1, 2]}),
    (7, {"config": 7}),
    (_Custom(), {"config": "custom"}),
    (_Outer, {"config": str(_Outer)}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), CONFIGS, ids=range(len(CONFIGS)))
def test_any_config_becomes_readable_yaml(config: Any, expected: Any) -> None:
    """Dataclasses, Hydra configs, mappings and anything else are written, nothing resolved."""
    assert yaml.safe_load(to_yaml(config)) == expected


def test_a_run_config_is_written_in_order() -> None:
    """Fields keep the order in which they were declared, so that people find them."""
    lines = to_yaml(CheckpointConfig()).decode().splitlines()
    top = [line.split(":")[0] for line in lines if line[0] not in " -"]
    assert top == [each.name for each in dataclasses.fields(CheckpointConfig)]


class _Mute:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def _cycle() -> dict[str, Any]:
    config: dict[str, Any] = {"a": 1}
    config["self"] = config
    return config


@pytest.mark.parametrize("config", [{"a": 1, "b": _Mute()}, _cycle()], ids=["mute", "cycle"])
def test_no_config_fails_a_save(config: Any) -> None:
    """A value that has no text, or holds itself, costs its place in the file and nothing more."""
    assert yaml.safe_load(to_yaml(config))["a"] == 1
