"""The setting that was meant by an unknown one.

Owns the dotted paths of a tree of dataclasses, and the comparison of what was typed with them.
Knows no settings: it is given the dataclass, or the paths.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def list_settings(kind: type[Any]) -> list[str]:
    """Return the dotted path of every setting of a dataclass of dataclasses, in order."""
    found = []
    hints = get_type_hints(kind)
    for each in fields(kind):
        if is_dataclass(hints[each.name]):
            found += [f"{each.name}.{inner}" for inner in list_settings(hints[each.name])]
        else:
            found.append(each.name)
    return found


def suggest(path: str, known: Sequence[str]) -> str | None:
    """Return the known path that an unknown one was probably meant to be; None: none is close."""
    # Its first parts were left out, or its last ones.
    for each in known:
        if f".{each}".endswith(f".{path}") or f".{path}." in f".{each}":
            return each
    last = path.rpartition(".")[2]
    for each in difflib.get_close_matches(path, known, n=3, cutoff=0.7):
        # Paths of one section are alike by their first parts alone.
        if difflib.SequenceMatcher(None, last, each.rpartition(".")[2]).ratio() > 0.6:
            return each
    names = {each.rpartition(".")[2]: each for each in reversed(known)}
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.8)
    return names[close[0]] if close else None
