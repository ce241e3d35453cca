"""Read nested mappings into dataclasses of settings, and check the types of their values.

Owns how a mapping becomes a tree of dataclasses, what fits a field's type, and what an unknown name
probably meant. Promises that all problems are listed, each with the path of its field. What the
settings are, and which values are possible, is in `config`.
"""

from __future__ import annotations

import copy
import os
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from holdfast.messages import list_settings, suggest


@dataclass(frozen=True)
class SettingsReader:
    """Reads the settings of one tree of dataclasses."""

    root: type[Any]
    name: str
    """Of the whole tree, the first part of every path."""
    path_fields: Collection[str]
    """The fields, named without the root, that take a `pathlib.Path` or the like too."""

    def build(self, values: Any, problems: list[str]) -> Any:
        """Build the tree from a mapping; list every unknown name and wrong type."""
        return self._build(self.root, values, self.name, problems)

    def check(self, node: Any, problems: list[str]) -> Any:
        """Copy the tree; list every value of a wrong type and use its default instead."""
        return self._check(node, self.name, problems)

    def _build(self, kind: type[Any], values: Any, path: str, problems: list[str]) -> Any:
        result = kind()
        if not isinstance(values, Mapping):
            problems.append(f"{path} is {values!r}; it must be a mapping")
            return result
        hints = get_type_hints(kind)
        for name, value in values.items():
            where = f"{path}.{name}"
            if name not in hints:
                remedy = self._find_remedy(kind, path, where, value)
                problems.append(f"{where} is unknown; {remedy}")
            elif is_dataclass(hints[name]):
                setattr(result, name, self._build(hints[name], value, where, problems))
            elif self._is_path(value, where):
                setattr(result, name, os.fspath(value))
            elif _fits(value, hints[name]):
                setattr(result, name, value)
            else:
                problems.append(f"{where} is {value!r}; it must be {_describe(hints[name])}")
        return result

    def _check(self, node: Any, path: str, problems: list[str]) -> Any:
        sound = copy.copy(node)
        hints = get_type_hints(type(node))
        for each in fields(node):
            where, value, hint = f"{path}.{each.name}", getattr(node, each.name), hints[each.name]
            if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, hint):
                setattr(sound, each.name, self._check(value, where, problems))
            elif not _fits(value, hint) and not self._is_path(value, where):
                problems.append(f"{where} is {value!r}; it must be {_describe(hint)}")
                factory = each.default_factory
                setattr(sound, each.name, each.default if factory is MISSING else factory())
        return sound

    def _is_path(self, value: Any, where: str) -> bool:
        is_path_field = where.removeprefix(f"{self.name}.") in self.path_fields
        return (
            is_path_field and isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
        )

    def _find_remedy(self, kind: type[Any], path: str, where: str, value: Any) -> str:
        """Return which setting an unknown one probably meant, or list those of its section."""
        inner = next(iter(value), None) if isinstance(value, Mapping) else None
        typed = (where if inner is None else f"{where}.{inner}").removeprefix(f"{self.name}.")
        settings = list_settings(self.root)
        if typed in settings and inner is None:
            *sections, name = typed.split(".")
            nested = "".join(f'{{"{each}": ' for each in sections)
            return f'nest it: {nested}{{"{name}": ...}}{"}" * len(sections)}'
        guess = suggest(typed, settings)
        if guess is not None:
            return f"did you mean {self.name}.{guess}?"
        return f"{path} has {', '.join(each.name for each in fields(kind))}"


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is type(None):
        return value is None
    if hint is Any:
        return True
    if origin is list:
        return isinstance(value, list) and all(_fits(each, get_args(hint)[0]) for each in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if isinstance(value, bool):
        return hint is bool  # a bool is an int to Python, not to a person
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    names = {
        int: "a whole number", float: "a number", str: "a string", bool: "true or false",
        type(None): "null",
    }  # fmt: skip
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is list:
        return "a list of strings"
    if is_dataclass(hint):
        return f"a {getattr(hint, '__name__', hint)}"
    return names.get(hint, "a mapping")
