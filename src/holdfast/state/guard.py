"""A question about what a run was and what it is now, asked before any tensor is read.

Owns the facts of both sides and the meaning of `load.guard`. Promises that a guard is given the
same kind of facts of both, that whatever it names is refused with both values, and that nothing is
touched. Which facts have to agree is the guard's to say; one is built in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from holdfast.errors import ConfigError, StateMismatchError
from holdfast.state.saved import SavedTensors

MODEL_CONFIG = "model_config"
"""The guard that is built in."""


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before any of its tensors is read."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's config (`state.cfg`) as plain values; empty: none is known."""
    tensors: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    """Shape and type of the model's tensors by name: of the checkpoint, or of this rank."""
    trained: frozenset[str] = frozenset()
    """Names of those that an optimizer has."""

    @classmethod
    def of(
        cls, config: bytes, tensors: Mapping[str, tuple[Any, Any]], trained: Collection[str]
    ) -> RunFacts:
        """Return the facts. `config`: as YAML. `tensors`: shape and type by their flat names."""
        found = {
            name.removeprefix("model."): (tuple(shape), str(dtype))
            for name, (shape, dtype) in tensors.items()
        }
        return cls(_read_config(config), found, frozenset(trained) & found.keys())

    @property
    def frozen(self) -> frozenset[str]:
        """Names of those that no optimizer has."""
        return frozenset(self.tensors) - self.trained


def same_model_config(saved: RunFacts, current: RunFacts) -> list[str]:
    """Name every setting under `model` in the run's config that is not as it was."""
    there, here = (each.config.get("model") for each in (saved, current))
    sides = (("the checkpoint", there), ("this run", here))
    lacking = [side for side, part in sides if part is None]
    if lacking:
        return [f"no config with a part named model is known of {' and '.join(lacking)}"]
    return list(_differences(there, here, "model"))


_ABSENT = object()


def _differences(there: Any, here: Any, place: str) -> Iterator[str]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys((*there, *here)):
            found = there.get(key, _ABSENT), here.get(key, _ABSENT)
            yield from _differences(*found, f"{place}.{key}")
    elif type(there) is not type(here) or there != here:
        yield f"{place} is {_show(there)} in the checkpoint, {_show(here)} here"


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)


class Guard:
    """What `load.guard` names."""

    def __init__(self, setting: str) -> None:
        """Resolve a word or a dotted path.

        Raises:
            ConfigError: the path leads to nothing that can be called.
        """
        self._setting = setting
        self._ask: Callable[[RunFacts, RunFacts], Any] = same_model_config
        if setting != MODEL_CONFIG:
            self._ask = resolve(setting, "load.guard", MODEL_CONFIG)

    def check(self, path: str, saved: RunFacts, current: RunFacts) -> None:
        """Refuse a checkpoint that the guard objects to.

        The guard returns what does not agree, as one string or several; None, nothing and True
        mean that all does.

        Raises:
            StateMismatchError: with all that it named.
        """
        found = self._ask(saved, current)
        if found is None or found is True:
            return
        if found is False:
            found = "it returned False"
        named = [found] if isinstance(found, str) else [str(each) for each in found]
        if not any(named):
            return
        error = StateMismatchError(path, different=named, strict=False)
        error.message = (
            f"{path} is refused by checkpoint.load.guard={self._setting}: {'; '.join(named)}.\n"
            "Use the settings that it was saved with, or load without this guard. Nothing was "
            "touched."
        )
        raise error


def resolve(setting: str, name: str, words: str) -> Any:
    """Return the function at a dotted path; `name`: of the setting, `words`: what else it may be.

    Raises:
        ConfigError: the path leads to nothing that can be called.
    """
    module_name, _, attribute = setting.rpartition(".")
    try:
        found = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        use = f"use {words} or package.module.function"
        problem = f"checkpoint.{name} is {setting!r}, which cannot be imported: {error}; {use}"
        raise ConfigError([problem]) from error
    if not callable(found):
        kind = type(found).__name__
        raise ConfigError([f"checkpoint.{name} is {setting!r}, which is a {kind}, no function"])
    return found


def facts_of_checkpoint(config: bytes, saved: SavedTensors | None) -> RunFacts:
    """Return the facts of the saved side. `config`: as YAML; `saved` None: its tensors are left."""
    if saved is None:
        return RunFacts.of(config, {}, ())
    tensors = {
        name: (each.size, each.properties.dtype)
        for name, each in saved.tensors.items()
        if saved.key_paths[name][0] == "model"
    }
    trained = {name for root in saved.roots for name in saved.parameter_names(root)}
    return RunFacts.of(config, tensors, trained)


def _read_config(content: bytes) -> dict[str, Any]:
    """Return a config as plain values, with interpolations resolved where all of them can be."""
    if not content.strip():
        return {}
    config = OmegaConf.create(content.decode())
    try:
        found = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:  # for example a variable that this machine does not have
        found = OmegaConf.to_container(config, resolve=False)
    return {str(key): each for key, each in found.items()} if isinstance(found, dict) else {}
