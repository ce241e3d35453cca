"""Errors that the person at the keyboard can fix, as short messages.

Owns which errors those are and their wording: first the field or path, then what is wrong with it,
then what to do. Promises at most three lines, however long the text is that Hydra or OmegaConf
raised. Which settings exist is read from the composed config itself, so that the messages fit every
recipe. Refuses to word an unknown exception: that is a defect, and its traceback is wanted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf import Container, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from holdfast import CheckpointError
from holdfast.errors import ConfigError
from holdfast.messages import suggest
from run_config import RecipeError

PLAIN_ERRORS = (RecipeError, CheckpointError, HydraException, OmegaConfBaseException)
"""What `condense` can word."""
LINE_LIMIT = 3
_TYPED = re.compile(r"Could not (?:override|append to config[^']*) '([^'=]+)")
"""The path in Hydra's message as it was typed; OmegaConf names its first unknown part only."""
FREE_SECTION = "checkpoint.options."
"""Takes any name: the settings of a custom manager."""
SHOW_CONFIG = "See the files in configs/, or add --cfg job to print everything that can be set."


def condense(error: BaseException) -> str:
    """Return the message for one of `PLAIN_ERRORS`, in at most three lines."""
    if isinstance(error, ConfigError):
        shown = list(error.problems)
        if len(shown) > LINE_LIMIT:
            shown[LINE_LIMIT - 1 :] = [f"and {len(shown) - LINE_LIMIT + 1} more such problems"]
        return "\n".join(shown)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        offered = ", ".join(error.options)
        return f"{group}={choice}: there is no such choice.\nChoose one of {offered}."
    cause = error.__cause__
    if isinstance(error, OmegaConfBaseException):
        return _word_field(error, _first_line(error))
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        return _word_field(cause, _first_line(error))
    return "\n".join(_lines(error)[:LINE_LIMIT])


def _word_field(error: OmegaConfBaseException, context: str) -> str:
    """Name the field, and for an unknown one the setting that was probably meant."""
    path, parent = str(error.full_key or ""), error.parent_node
    first = f"{path}: {_first_line(error)}" if path else f"{context} {_first_line(error)}"
    if not path or not isinstance(parent, Container):
        return f"{first}.\n{SHOW_CONFIG}"
    settings = _plain(parent._get_root())  # OmegaConf has no public way from a node to its config
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        problem = "there is no such setting"
        if path.startswith(FREE_SECTION):
            return f"{path}: {problem}.\nTo add it, write +{path}=..."
        typed = _TYPED.search(context)
        close = _suggest(path if typed is None else typed[1], settings)
        offered = _plain(parent)
    else:
        offered = _find_section(settings, path)
        if not offered:
            return f"{first}.\n{SHOW_CONFIG}"
        problem = "this is a group of settings, which takes no value itself"
        close = _suggest(path, settings)
    guess = f"Did you mean {close}? " if close else ""
    return f"{path}: {problem}.\n{guess}Known here: {', '.join(offered)}."


def _suggest(typed: str, settings: Mapping[str, Any]) -> str | None:
    """Return the setting that was meant, sought in its section where there is one."""
    section, _, rest = typed.partition(".")
    if rest and (inner := _find_section(settings, section)):
        close = _suggest(rest, inner)
        return None if close is None else f"{section}.{close}"
    return suggest(typed, list(_list_paths(settings)))


def _plain(section: Container) -> dict[str, Any]:
    """Return the settings of a section as nested dicts, without those of Hydra itself."""
    values = OmegaConf.to_container(section, resolve=False)
    if not isinstance(values, dict):
        return {}
    return {str(name): value for name, value in values.items() if name != "hydra"}


def _list_paths(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the dotted path of every setting, in order."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in _list_paths(value))
        else:
            yield name


def _find_section(settings: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the group of settings at a path; empty: the path is one setting."""
    found: Any = settings
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _first_line(error: BaseException) -> str:
    return _lines(error)[0].rstrip(".")


def _lines(error: BaseException) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [type(error).__name__]
