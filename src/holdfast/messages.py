"""How messages state sizes, long lists and differences, and which setting was meant.

Owns the units of sizes (binary, with a decimal or two, so that what is needed and what is free can
be compared at a glance), and the comparison of a mistyped setting with the dotted paths of a tree
of dataclasses. Knows no settings: it is given the dataclass, or the paths.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def describe_size(size_bytes: float, beside: float = 0) -> str:
    """Return a size with its unit, from `512 B` over `3.5 MiB` to `1.50 TiB`.

    `beside`: a size that it is compared with; no smaller unit than that one's is taken.
    """
    power = max(_power_of(size_bytes), _power_of(beside))
    digits = 0 if power == 0 else 1 if power < 3 else 2
    return f"{size_bytes / 1024**power:.{digits}f} {_UNITS[power]}"


def _power_of(size_bytes: float) -> int:
    power = 0
    while power < len(_UNITS) - 1 and abs(size_bytes) / 1024**power >= 1023.95:
        power += 1
    return power


def list_first(items: Sequence[object], kind: str, most: int = 3) -> str:
    """Return the first items as text, and how many more of that kind there are."""
    shown = "; ".join(map(str, items[:most]))
    return shown if len(items) <= most else f"{shown}; and {len(items) - most} more {kind}"


def name_first(names: Sequence[str]) -> str:
    """Return the first names, and three dots if there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def suspects_of(sides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the ranks outside the one largest side; all of them where no side is the largest."""
    ordered = sorted(sides, key=len)
    if len(ordered[-1]) > len(ordered[-2]):
        ordered = ordered[:-1]
    return tuple(sorted(rank for side in ordered for rank in side))


def describe_mismatch(
    name: str,
    sides: Sequence[Sequence[int]],
    block: int,
    index: Sequence[int] | None,
    values: tuple[str, str] | None,
    others: int,
    agreed: int | None,
) -> str:
    """Say what ranks hold differently under one name, and what to do about it."""
    one, other = (each[0] for each in sides[:2])
    first = " and ".join(f"rank(s) {name_first([*map(str, each)])}" for each in sides[:2])
    more = f" (and {others} more)" if others else ""
    place = f"in block {block}" if index is None else f"at {[*index]}"
    if values is None:
        shown = f"{place}, whose values have changed since"
    else:
        shown = f"{place}: {values[0]} on rank {one}, {values[1]} on rank {other}"
    suspects = suspects_of(sides)
    if sum(map(len, sides)) > len(suspects):
        shown += f". The minority is suspect: {name_first([*map(str, suspects)])}"
    if agreed is not None:
        shown += f". All replicas last agreed at iteration {agreed}"
    return (
        f"{name}{more} differs between {first}, first {shown}. Nothing was saved.\n"
        "Parts of one tensor need a DTensor, pg_collection.tp with Megatron's attributes, or "
        "holdfast.declare_sharding.\nOtherwise find out why replicas differ, or set "
        "checkpoint.on_replica_mismatch: per_rank saves each rank's own, rank0 the lowest's."
    )


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
    if close := difflib.get_close_matches(last, names, n=1, cutoff=0.8):
        return names[close[0]]
    # The initials, as in lr for learning_rate.
    initials = {"".join(word[:1] for word in name.split("_")): names[name] for name in names}
    return initials.get(last) if len(last) > 1 else None
