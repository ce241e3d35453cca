"""What the optimizers of a run are given of a checkpoint's state, decided before any of it is read.

Owns the comparison of the two sides by root, parameter and group: whether another kind of optimizer
saved, which names differ, which group takes which saved options. Promises that all of it is decided
from names and options alone, so that what does not fit is refused with everything untouched, and
that what is given is what was compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from holdfast.config import RAISE, WARN
from holdfast.errors import StateMismatchError
from holdfast.state.groups import Group, Match, match, names_of, show_side_by_side
from holdfast.state.naming import PARAMETERS
from holdfast.state.optimizer import Entries, LiveOptimizers
from holdfast.state.options import OptionPair, check_kinds
from holdfast.state.saved import SavedTensors
from holdfast.state.strictness import Differences, Strictness


class OptimizerFit:
    """The optimizers of a run beside the state of a checkpoint."""

    def __init__(
        self, optimizers: Sequence[Any], live: LiveOptimizers, saved: SavedTensors
    ) -> None:
        self._optimizers = optimizers
        self._live = live
        self.saved = saved
        """The checkpoint's side."""
        self.skipped: frozenset[str] = frozenset()
        """Names in a checkpoint of parameters of another shape, which keep value and state."""

    @cached_property
    def matches(self) -> dict[str, Match]:
        """For each root, what each group takes."""
        return {
            root: match(self._live.groups(root), self._saved_groups(root), root)
            for root in dict.fromkeys(self._live.roots)
        }

    def _saved_groups(self, root: str) -> list[Group]:
        return self.saved.groups_for(root, names_of(self._live.groups(root)))

    @cached_property
    def _places(self) -> list[tuple[Any, str, range]]:
        """Each optimizer, its root, and the positions of its groups among those of the root."""
        counts: dict[str, int] = {}
        found = []
        for root, optimizer in zip(self._live.roots, self._optimizers, strict=True):
            start = counts.get(root, 0)
            counts[root] = start + len(optimizer.param_groups)
            found.append((optimizer, root, range(start, counts[root])))
        return found

    def pairs(self) -> list[OptionPair]:
        """Return every group of the optimizers, in order, and the one whose options it takes."""
        return [
            OptionPair(optimizer, group, self.matches[root].taken[at])
            for optimizer, root, places in self._places
            for group, at in zip(optimizer.param_groups, places, strict=True)
        ]

    def check_kinds(self, path: str) -> None:
        """Refuse state that another kind of optimizer saved; raises as `options.check_kinds`."""
        for optimizer, root, places in self._places:
            live, there = self._live.groups(root), self._saved_groups(root)
            sources = {each for at in places for each in self.matches[root].sources[at]}
            saved = [there[at] for at in sorted(sources)]
            check_kinds(optimizer, [live[at] for at in places], saved, root, path)

    def compare_names(self, found: Differences) -> None:
        """Add what differs by the names of parameters, and by shapes of those outside the model."""
        for root in dict.fromkeys((*self.matches, *self.saved.roots)):
            is_here = root in self.matches
            live = names_of(self._live.groups(root)) if is_here else frozenset[str]()
            there = self.saved.parameter_names(root)
            found.missing += [f"{root}.{name}" for name in sorted(live - there)]
            found.unexpected += [f"{root}.{name}" for name in sorted(there - live)]
            outside = self._live.outside(root) if is_here else {}
            for name, parameter in sorted(outside.items()):
                full = f"{root}.{PARAMETERS}.{name}"
                source = self.saved.tensors.get(full)
                if source is None and name in there:
                    found.missing.append(full)
                elif source is not None and source.size != parameter.size():
                    sizes = f"{list(source.size)}, here {list(parameter.size())}"
                    found.shapes[full] = f"{full} is {sizes}"

    def check_groups(self, path: str, strictness: Strictness) -> list[str]:
        """Refuse groups whose members were saved with different options, or return what to tell.

        Raises:
            StateMismatchError: with both structures.
        """
        told: list[str] = []
        for root, matched in self.matches.items():
            if matched.conflicts and strictness.groups == WARN:
                told += matched.conflicts
            if matched.conflicts and strictness.groups == RAISE:
                error = StateMismatchError(path, different=matched.conflicts, strict=False)
                both = show_side_by_side(self._saved_groups(root), self._live.groups(root))
                error.message = (
                    f"{path} does not fit the live state: {'; '.join(matched.conflicts)}.\n{both}\n"
                    "Make the groups that were saved, or keep those of this run with "
                    "load.override=[optimizer]."
                )
                raise error
        return told

    def keeps(self, root: str, name: str) -> bool:
        """Whether a parameter is of another shape here, and keeps its state."""
        return f"model.{name}" in self.skipped or f"{root}.{PARAMETERS}.{name}" in self.skipped

    def restore(self, state: Mapping[str, Mapping[str, Entries]]) -> bool:
        """Give the optimizers state and options; `state`: what was read, by root and parameter.

        Returns whether there was any for them.
        """
        taken, unknown = {}, {}
        for root, matched in self.matches.items():
            live, there = names_of(self._live.groups(root)), self.saved.parameter_names(root)
            if live & there or any(matched.taken):
                kept = {name for name in live if self.keeps(root, name)}
                taken[root], unknown[root] = matched.taken, (live - there) | kept
        if taken:
            self._live.restore(state, taken, unknown)
        return bool(taken)
