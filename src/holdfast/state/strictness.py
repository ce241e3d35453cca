"""What a load does about each kind of difference between a checkpoint and the live state.

Owns the meaning of `load.strict`: a bool, or a table with an action for each subject. Everything
that is refused is in one error, everything that is warned of in one sentence. What is not refused
keeps its live value, but for a type, which is converted, and for an option, of which the saved one
is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from holdfast.config import IGNORE, RAISE, WARN
from holdfast.errors import StateMismatchError
from holdfast.messages import name_first


@dataclass(frozen=True)
class Strictness:
    """An action for each subject: `raise`, `warn` or `ignore`."""

    names: str = RAISE
    shapes: str = RAISE
    dtypes: str = RAISE
    groups: str = RAISE
    """Groups whose members were saved with different options: they keep their own."""
    options: str = WARN
    components: str = RAISE
    """A scheduler or data iterator of which nothing was saved."""
    left_out: str = WARN
    """A saved component that nothing was given for; a table has it under `components`."""

    @classmethod
    def of(cls, given: bool | Mapping[str, str]) -> Strictness:
        """Return what a setting means; what a table leaves out is as with `true`."""
        if isinstance(given, Mapping):
            table = {key: str(value) for key, value in given.items()}
            if "components" in table:
                table["left_out"] = table["components"]
            return replace(cls(), **table)
        return cls() if given else cls(names=WARN, dtypes=IGNORE, components=WARN)


@dataclass
class Differences:
    """What differs between the two sides, each list in the order of the report."""

    missing: list[str] = field(default_factory=list)
    """Names the live state has and the checkpoint lacks."""
    unexpected: list[str] = field(default_factory=list)
    """Names the checkpoint has and the live state of this rank lacks; `agree_on_unexpected` leaves
    those that all ranks lack."""
    shapes: dict[str, str] = field(default_factory=dict)
    """Names both have, with what differs."""
    dtypes: dict[str, str] = field(default_factory=dict)
    components: list[str] = field(default_factory=list)
    """Components of which nothing was saved."""
    kinds: list[str] = field(default_factory=list)
    """What cannot be given back as the kind of value that it was: never allowed."""

    kept: set[str] = field(default_factory=set)
    """Live names of the model that keep their values whatever the checkpoint has."""

    def leave_out(self, ignores: Callable[[str], bool], live: Iterable[str]) -> None:
        """Keep what a predicate names as it is, and report nothing of it."""
        self.kept = {name for name in live if ignores(name)}
        self.missing = [name for name in self.missing if not ignores(name)]
        self.unexpected = [name for name in self.unexpected if not ignores(name)]
        for found in (self.shapes, self.dtypes):
            for name in [each for each in found if ignores(each)]:
                del found[name]
        self.kinds = [each for each in self.kinds if not ignores(each.split(" ")[0])]

    def refuse(self, path: str, strictness: Strictness) -> None:
        """Raise what does not fit.

        Raises:
            StateMismatchError: with everything that is not allowed to differ.
        """
        refuses_names = strictness.names == RAISE
        missing = self.missing if refuses_names else []
        missing = missing + (self.components if strictness.components == RAISE else [])
        unexpected = self.unexpected if refuses_names else []
        different = [*self.shapes.values()] if strictness.shapes == RAISE else []
        different += self.dtypes.values() if strictness.dtypes == RAISE else ()
        different += self.kinds
        if missing or unexpected or different:
            raise StateMismatchError(
                path, missing, unexpected, different, strict=refuses_names or not different
            )

    def summary(self, strictness: Strictness) -> str | None:
        """Return one sentence about what is not loaded as it was saved; None: nothing to tell."""
        told: list[tuple[str, str, Sequence[str]]] = [
            (strictness.names, "not in the checkpoint, keeping the live value", self.missing),
            (strictness.components, "not in the checkpoint, as they are", self.components),
            (strictness.names, "in the checkpoint only, left out", self.unexpected),
            (
                strictness.shapes,
                "of another shape, keeping the live value",
                [*self.shapes.values()],
            ),
            (strictness.dtypes, "of another type, converted", [*self.dtypes.values()]),
        ]
        parts = [
            f"{what}: {len(each)} ({name_first(each)})"
            for action, what, each in told
            if action == WARN and each
        ]
        return "; ".join(parts) or None
