"""Errors that the person at the keyboard can mend, as short messages.

Owns which errors those are and how each is worded: the field or path first, what is wrong with it,
what to do. Promises at most three lines, whatever page Hydra or OmegaConf raised. Refuses to word
an unknown exception: that is a defect, and its traceback is wanted.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from holdfast import CheckpointConfig, CheckpointError
from holdfast.errors import ConfigError
from holdfast.messages import list_settings, suggest
from run_config import RecipeError, RunConfig

PLAIN_ERRORS = (RecipeError, CheckpointError, HydraException, OmegaConfBaseException)
"""What `condense` can word."""
LINE_LIMIT = 3
_TYPED = re.compile(r"Could not (?:override|append to config[^']*) '([^'=]+)")
"""The path in Hydra's message as it was typed; OmegaConf names its first unknown part only."""
SHOW_CONFIG = "See configs/pretrain.yaml, or add --cfg job to print everything that can be set."


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
    """Name the field, and where it is unknown, the fields that there are."""
    path = str(error.full_key or "")
    kind = error.object_type
    first = f"{path}: {_first_line(error)}" if path else f"{context} {_first_line(error)}"
    if "is not in struct" in first:
        return f"{path}: there is no such setting.\nTo add it, write +{path}=..."
    if not (is_dataclass(kind) and "not in" in _first_line(error)):
        return f"{first}.\n{SHOW_CONFIG}"
    known = [each.name for each in fields(kind)]
    typed = _TYPED.search(context)
    close = _suggest(path if typed is None else typed[1])
    guess = f"Did you mean {close}? " if close else ""
    return f"{path}: there is no such setting.\n{guess}Known here: {', '.join(known)}."


def _suggest(typed: str) -> str | None:
    """Return the setting that was meant, sought among the checkpoint's where it was one of them."""
    section, _, rest = typed.partition(".")
    if section == "checkpoint":
        close = suggest(rest, list_settings(CheckpointConfig))
        return None if close is None else f"checkpoint.{close}"
    return suggest(typed, list_settings(RunConfig))


def _first_line(error: BaseException) -> str:
    return _lines(error)[0].rstrip(".")


def _lines(error: BaseException) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [type(error).__name__]
