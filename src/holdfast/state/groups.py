"""The groups of an optimizer's parameters: as a checkpoint records them, and restored by members.

Owns the record: one value for all optimizers of one name, a list with an entry per group in order,
each `{"params": [names], "class": kind of optimizer, <option>: value}`. Promises that the same
members restore by position, empty groups and options that are tensors included; that otherwise a
group takes what was saved for its members where that is one and the same; and that everything else
is described, both sides next to each other, and not decided. `param_names`, which torch keeps for
people, is neither saved nor restored. Changes no live object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import optim

GROUPS = "param_groups"
"""The last part of the name of a record."""
_MEMBERS = "params"
_KIND = "class"
_OPTION = "option:"
"""What the name of an option begins with in a record, where it has a name of the record's."""
_FOR_PEOPLE = "param_names"
_TORCH = "torch.optim"
_NAMES_SHOWN, _GROUPS_SHOWN, _OPTIONS_SHOWN = 3, 8, 4
_COLUMN = 58
"""Width of the saved side where both are shown."""


@dataclass(frozen=True)
class Group:
    """One group of parameters, here or in a checkpoint."""

    names: tuple[str, ...]
    options: Mapping[str, Any]
    kind: str | None = None
    """What `kind_of` says of its optimizer; None: not recorded."""

    def entry(self) -> dict[str, Any]:
        """Return what a record has of it; tensors refer to the live ones where they can."""
        kind = {} if self.kind is None else {_KIND: self.kind}
        return {
            _MEMBERS: list(self.names),
            **kind,
            **{_written(key): _plain(value) for key, value in self.options.items()},
        }


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is restored of a live group: everything but its parameters."""
    return {key: value for key, value in group.items() if key not in (_MEMBERS, _FOR_PEOPLE)}


def kind_of(optimizer: Any) -> str | None:
    """Return the name of an optimizer's class: of the class of torch that it is derived from.

    None: a wrapper around an optimizer, which may be saved in one and loaded in another.
    """
    if not isinstance(optimizer, optim.Optimizer):
        return None
    kinds = [each for each in type(optimizer).__mro__ if each.__module__.startswith(_TORCH)]
    kind = type(optimizer) if kinds[0] is optim.Optimizer else kinds[0]
    return kind.__qualname__


def names_of(groups: Sequence[Group]) -> frozenset[str]:
    """Return the names of all parameters in groups."""
    return frozenset(name for group in groups for name in group.names)


def read_record(value: Any) -> list[Group]:
    """Return the groups of a record, of which nothing is known but that it was read.

    Raises:
        ValueError: it is no record.
    """
    if not isinstance(value, list):
        raise ValueError("is no list of groups of parameters")
    found = []
    for entry in value:
        names = entry.get(_MEMBERS) if isinstance(entry, Mapping) else None
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise ValueError("has a group without names of parameters")
        kind = entry.get(_KIND)
        found.append(
            Group(
                tuple(names),
                {
                    key.removeprefix(_OPTION): each
                    for key, each in options_of(entry).items()
                    if key != _KIND
                },
                kind if isinstance(kind, str) else None,
            )
        )
    return found


def unite(records: Sequence[Sequence[Group]]) -> list[Group]:
    """Return one list of groups from those of several ranks; each name is the first one's.

    Where all have as many groups, those at one position whose options are equal are one group.
    """
    if not records:
        return []
    first, *rest = records
    groups = list(first)
    known = {name for group in groups for name in group.names}
    for record in rest:
        for position, group in enumerate(record):
            names = tuple(each for each in group.names if each not in known)
            known.update(names)
            if len(record) == len(first) and _have_equal_options(groups[position], group):
                own = groups[position]
                groups[position] = replace(own, names=(*own.names, *names))
            elif names:
                groups.append(replace(group, names=names))
    return groups


@dataclass(frozen=True)
class Match:
    """What each group here takes of the saved ones."""

    taken: tuple[Group | None, ...]
    """For each group the saved one whose options it takes; None: it keeps its own."""
    is_by_position: bool
    """Whether the saved groups have the same members in the same order of groups."""
    sources: tuple[tuple[int, ...], ...]
    """For each group, the positions of the saved ones that have members of it."""
    conflicts: tuple[str, ...] = field(default=())
    """For each group whose members were saved with different options, what differs."""


def match(live: Sequence[Group], saved: Sequence[Group], label: str) -> Match:
    """Find for each group the options that were saved for it; `label`: what conflicts begin with.

    Members that were not saved do not count; a group without members takes the options at its
    position, if as many groups were saved.
    """
    if [set(each.names) for each in live] == [set(each.names) for each in saved]:
        positions = tuple((each,) for each in range(len(live)))
        return Match(tuple(saved), True, positions)
    home = {name: number for number, group in enumerate(saved) for name in group.names}
    taken: list[Group | None] = []
    sources: list[tuple[int, ...]] = []
    conflicts: list[str] = []
    for number, group in enumerate(live):
        found = sorted({home[name] for name in group.names if name in home})
        if not group.names and len(live) == len(saved):
            found = [number]
        sources.append(tuple(found))
        first = saved[found[0]] if found else None
        if first is not None and not all(
            _have_equal_options(first, saved[each]) for each in found[1:]
        ):
            parts = "; ".join(_describe_difference([saved[each] for each in found]))
            where = ", ".join(map(str, found))
            conflicts.append(
                f"{label} group {number} has parameters of saved groups {where}: {parts}"
            )
            first = None
        taken.append(first)
    return Match(tuple(taken), False, tuple(sources), tuple(conflicts))


def show_side_by_side(saved: Sequence[Group], live: Sequence[Group]) -> str:
    """Return both structures as lines, with the options in which groups differ."""
    keys = list(_differing_keys([*saved, *live]))[:_OPTIONS_SHOWN]
    rows = [("saved", "here")]
    count = max(len(saved), len(live))
    rows += [
        (_show(number, saved, keys), _show(number, live, keys))
        for number in range(min(count, _GROUPS_SHOWN))
    ]
    if count > _GROUPS_SHOWN:
        rows.append((f"({len(saved)} groups)", f"({len(live)} groups)"))
    width = min(max(len(left) for left, _ in rows), _COLUMN)
    return "\n".join(f"  {left:{width}} | {right}".rstrip() for left, right in rows)


def comparable(value: Any) -> Any:
    """Return an option as numbers, strings and tuples of them, which can be compared.

    A number that is none is a word, which equals itself.
    """
    if hasattr(value, "tolist"):  # a torch or numpy value
        return comparable(value.tolist())
    if isinstance(value, list | tuple):
        return tuple(map(comparable, value))
    if isinstance(value, Mapping):
        return {key: comparable(each) for key, each in value.items()}
    is_none = isinstance(value, float | complex) and value != value
    return "nan" if is_none else value


def _written(key: str) -> str:
    return f"{_OPTION}{key}" if key == _KIND or key.startswith(_OPTION) else key


def _plain(value: Any) -> Any:
    """Return an option without what only the live object needs: gradients, devices."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if type(value) is dict:
        return {key: _plain(each) for key, each in value.items()}
    return value


def _have_equal_options(one: Group, other: Group) -> bool:
    return one is other or (
        one.kind == other.kind and comparable(one.options) == comparable(other.options)
    )


def _differing_keys(groups: Sequence[Group]) -> Iterator[str]:
    """Yield the options, kind included, that not all groups have alike."""
    if len({each.kind for each in groups}) > 1:
        yield _KIND
    for key in dict.fromkeys(key for each in groups for key in each.options):
        if len({repr(comparable(each.options.get(key))) for each in groups}) > 1:
            yield key


def _describe_difference(groups: Sequence[Group]) -> Iterator[str]:
    for key in list(_differing_keys(groups))[:_OPTIONS_SHOWN]:
        yield f"{key} {' and '.join(_show_option(each, key) for each in groups)}"


def _show(number: int, groups: Sequence[Group], keys: Sequence[str]) -> str:
    if number >= len(groups):
        return ""
    names = groups[number].names
    listed = ", ".join(names[:_NAMES_SHOWN]) or "no parameters"
    more = f", ... ({len(names)})" if len(names) > _NAMES_SHOWN else ""
    options = ", ".join(f"{key}={_show_option(groups[number], key)}" for key in keys)
    return f"{number}: {listed}{more}{'; ' if options else ''}{options}"


def _show_option(group: Group, key: str) -> str:
    value = group.kind if key == _KIND else comparable(group.options.get(key))
    text = f"{value:g}" if isinstance(value, float) else f"{value}"
    return text if len(text) <= 24 else f"{text[:21]}..."
