"""Components in a load: what a checkpoint holds, which value a rank is given, and what waits.

Owns the rules by sharing pattern, also at another number of ranks or in other groups: a rank is
given its own value, or one that all had alike, or the load is refused by name; never another
rank's in place of its own. Promises that `check` touches nothing live, and that a saved component
without an object here is kept until it is asked for, or saved again as it was. State that
is sharded cannot wait: only an object says which part a rank needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from holdfast.errors import (
    CorruptCheckpointError,
    StateMismatchError,
)
from holdfast.format.merging import find_uncovered
from holdfast.format.nondense import size_bytes_of
from holdfast.format.values import COMPONENTS
from holdfast.protocol import Restored
from holdfast.read.reader import ShardReader
from holdfast.state.codec import canonical, encode
from holdfast.state.components import (
    ONE_VALUE,
    Keys,
    SharingPattern,
    StateComponent,
    full_name,
    name_of_tensor,
    rebuild,
    take_apart,
)
from holdfast.state.kinds import DTENSOR, TENSOR, Kind, find_model_difference
from holdfast.state.model import run_each
from holdfast.state.small import Place
from holdfast.state.targets import KindMismatchError, StateEntry, Target, model_target
from holdfast.storage.manifest import Manifest
from holdfast.torch_internals import local_of

_FRAME = re.compile(rf"{re.escape(COMPONENTS)}([A-Za-z0-9_-]+)(?:@(\d+))?")
_READ_AT_ONCE = "its tensors are on other nodes, and were not compared"


@dataclass(frozen=True)
class Frame:
    """One saved value of a component: its plain part, and where its tensors belong."""

    name: str
    """Of the component."""
    base: str
    """In the checkpoint."""
    sharing: SharingPattern
    members: tuple[int, ...] | None
    """Ranks that have this value in common; None: the pattern names none."""
    state: Any
    tensors: Mapping[Keys, str]
    """Names of its tensors, by their keys in the state."""

    @classmethod
    def parse(cls, name: str, value: Any) -> Frame | None:
        """Return what a small state says; None: it is no component's.

        Raises:
            ValueError: it is malformed.
        """
        match = _FRAME.fullmatch(name)
        if match is None:
            return None
        try:
            members = value["members"]
            return cls(
                match[1],
                name,
                SharingPattern(value["sharing"]),
                None if members is None else tuple(map(int, members)),
                value["state"],
                {tuple(keys): str(flat) for keys, flat in value["tensors"]},
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"holds no component where {name} should be: {error}") from error


def read_frames(
    small: Mapping[str, Any], tensors: Collection[str], where: str
) -> dict[str, list[Frame]]:
    """Return the saved values of components, by component.

    Raises:
        CorruptCheckpointError: one is malformed, or names a tensor that is not there.
    """
    found: dict[str, list[Frame]] = {}
    for name, value in small.items():
        try:
            frame = Frame.parse(name, value)
        except ValueError as error:
            raise CorruptCheckpointError(where, str(error)) from error
        if frame is None:
            continue
        if lacking := sorted(set(frame.tensors.values()).difference(tensors)):
            raise CorruptCheckpointError(where, f"lacks {lacking[0]}, a tensor of {name}")
        found.setdefault(frame.name, []).append(frame)
    return found


@dataclass(frozen=True)
class SavedComponents:
    """What a checkpoint holds of components, as one rank sees it."""

    frames: Mapping[str, Sequence[Frame]]
    tensors: Mapping[str, TensorStorageMetadata]
    reader: ShardReader
    world_size: int
    """Of the run that saved it."""
    differing: Collection[str]
    """Names of which ranks saved copies that differ."""
    reads_all: bool
    """Whether this rank can read every file now."""
    path: str

    @classmethod
    def of(
        cls,
        small: Mapping[str, Any],
        reader: ShardReader,
        manifest: Manifest,
        path: str,
        reads_all: bool,
    ) -> SavedComponents:
        """Read what the small states say; raises as `read_frames`."""
        tensors = reader.tensors()
        frames = read_frames(small, tensors, path)
        differing = manifest.differing or ()
        return cls(frames, tensors, reader, manifest.world_size, differing, reads_all, path)

    def choose(
        self, name: str, sharing: SharingPattern, members: Sequence[int] | None, place: Place
    ) -> tuple[Frame | None, str | None]:
        """Return the value that this rank is given, and what prevents it; both None: none saved.

        `sharing`, `members`: as declared here.
        """
        frames = self.frames.get(name, ())
        if not frames:
            return None, None
        saved = frames[0].sharing
        if saved is not sharing and not {saved, sharing} <= ONE_VALUE:
            return None, f"was saved as {saved.name}, and is declared {sharing.name} here"
        if saved in ONE_VALUE:
            return frames[0], None
        if saved is SharingPattern.PER_RANK:
            return self._choose_own(frames[0], place)
        for each in frames:
            if members is not None and each.members == tuple(members):
                return each, None
        if (difference := self._find_difference(frames)) is not None:
            groups = ", ".join(str(list(each.members or ())) for each in frames)
            return None, (
                f"was saved by the groups {groups}, this rank is in {list(members or ())}, and "
                f"the saved values are not all equal ({difference})"
            )
        return frames[0], None

    def _choose_own(self, frame: Frame, place: Place) -> tuple[Frame | None, str | None]:
        if self.world_size == place.world_size:
            return (frame, None) if frame.base in self.reader.own_names else (None, None)
        names = {frame.base, *frame.tensors.values()}
        if names.isdisjoint(self.differing):
            return frame, None
        return None, (
            f"has a value for each of {self.world_size} ranks, which differ, and this run has "
            f"{place.world_size}"
        )

    def _find_difference(self, frames: Sequence[Frame]) -> str | None:
        """Return what differs between saved values; None: they are equal."""
        first, *others = frames
        for each in others:
            if canonical([first.state, [*first.tensors]]) != canonical(
                [each.state, [*each.tensors]]
            ):
                return f"{first.base} and {each.base} differ"
        if not first.tensors or not others:
            return None
        told = self.reader.metadata
        if not self.reads_all or find_uncovered(told, dict.fromkeys(first.tensors.values())):
            return _READ_AT_ONCE
        for keys, name in first.tensors.items():
            names = [name, *(each.tensors[keys] for each in others)]
            sources = [self.tensors[each] for each in names]
            forms = {(each.size, each.properties.dtype) for each in sources}
            kinds = {self.reader.kind(each) for each in names}
            if len(forms) > 1 or len(kinds) > 1 or not _kind(self.reader, name).is_dense:
                return f"{name} and {names[1]} differ"
            read = {
                each: torch.empty(source.size, dtype=source.properties.dtype)
                for each, source in zip(names, sources, strict=True)
            }
            self.reader.read_tensors(read)
            contents = {_bytes_of(each) for each in read.values()}
            if len(contents) > 1:
                return f"tensors at {name} differ"
        return None


@dataclass(frozen=True)
class _Match:
    """A saved value, and the object that it is for."""

    frame: Frame
    component: StateComponent | None
    """None: it waits until it is asked for."""
    live: Any = None
    """The live state, of a component that is filled in place."""


class ComponentLoad:
    """The components of a load beside those of a checkpoint."""

    def __init__(
        self,
        components: Sequence[StateComponent],
        saved: SavedComponents,
        place: Place,
        keeps: Callable[[str], bool],
        *,
        with_sharded: bool,
    ) -> None:
        """Touch nothing yet.

        `keeps`: whether one of this name keeps its live value. `with_sharded`: whether
        model and optimizer are restored, and so what is divided like them.
        """
        self._components = components
        self._saved = saved
        self._place = place
        self._keeps = keeps
        self._with_sharded = with_sharded
        self._live: dict[str, Any] = {}
        self._matches: list[_Match] = []
        self._targets: dict[str, Target] = {}
        self.restored: dict[str, Restored] = {}
        """By component, as `LoadResult.restored` has it."""
        self.waiting: dict[str, tuple[Frame, Any]] = {}
        """Saved state that no object was given for, by component; complete after `apply`."""

    @property
    def is_empty(self) -> bool:
        """Whether no rank of this load has anything to do with components."""
        return all(map(self._keeps, self._saved.frames))

    def names(self) -> set[str]:
        """Return the names of components of both sides."""
        return {each.name for each in self._components} | self._saved.frames.keys()

    def look(self) -> None:
        """Ask components that are filled in place for their live state, on all ranks together.

        Raises:
            Exception: whatever a state dict raised.
        """
        asked = [each for each in self._components if each.is_in_place and self._takes(each)]
        if not self._live:
            states = run_each(*(each.read for each in asked))
            self._live = {each.name: one for each, one in zip(asked, states, strict=True)}

    def _takes(self, component: StateComponent) -> bool:
        if self._keeps(component.name):
            return False
        return component.sharing is not SharingPattern.SHARDED or self._with_sharded

    def check(self) -> list[str]:
        """Compare both sides, and refuse what does not fit; return what to warn of.

        Raises:
            StateMismatchError: with everything that does not fit.
            UnsupportedStateError: a group that this rank is not in.
        """
        self._matches = []
        problems: list[str] = []
        warnings: list[str] = []
        for component in self._components:
            if self._takes(component):
                self._check_one(component, problems, warnings)
        given = {each.name for each in self._components}
        for name, frames in self._saved.frames.items():
            if name not in given and not self._keeps(name):
                warnings += self._put_aside(name, frames)
        if problems:
            raise make_mismatch(self._saved.path, problems)
        return warnings

    def _check_one(
        self, component: StateComponent, problems: list[str], warnings: list[str]
    ) -> None:
        name = full_name(component.name)
        frame, problem = self._saved.choose(
            component.name, component.sharing, component.members(self._place), self._place
        )
        if problem is not None:
            problems.append(f"{name} {problem}; load.override=[{name}] keeps the live one")
        elif frame is None and component.required:
            problems.append(
                f"{name} is required and was not saved: declare it with required=False, or keep "
                f"the live one with load.override=[{name}]"
            )
        elif frame is None:
            warnings.append(f"{self._saved.path} holds no {name}: it is as it was")
        else:
            match = _Match(frame, component, self._live.get(component.name))
            problems += self._compare_tensors(match, warnings)
            self._matches.append(match)

    def _put_aside(self, name: str, frames: Sequence[Frame]) -> Iterator[str]:
        """Let a value wait for its object; yield why it cannot."""
        path, sharing = self._saved.path, frames[0].sharing
        if sharing is SharingPattern.SHARDED:
            if self._with_sharded:
                yield (
                    f"{path} holds {full_name(name)}, which is sharded, and this load was given "
                    "no object for it: left out"
                )
            return
        rank, is_alike = self._place.rank, self._saved.world_size == self._place.world_size
        own = [each for each in frames if rank in (each.members or ())]
        frame: Frame | None = None
        problem: str | None = None
        if frames[0].members is None:
            frame, problem = self._saved.choose(name, sharing, None, self._place)
        elif is_alike:
            frame = own[0] if own else None
        else:
            problem = f"its groups were those of {self._saved.world_size} ranks"
        if frame is not None:
            problem = next(self._check_fresh(frame), None)
        if problem is not None:
            yield f"{path}: {full_name(name)} was given no object, and {problem}: left out"
        elif frame is not None:
            self._matches.append(_Match(frame, None))

    def _compare_tensors(self, match: _Match, warnings: list[str]) -> Iterator[str]:
        component, frame = match.component, match.frame
        assert component is not None
        if not component.is_in_place:
            yield from self._check_fresh(frame)
            return
        live = self._live_tensors(match)
        for name, tensor in live.items():
            source = self._saved.tensors.get(name)
            if source is None:
                yield f"{name} was not saved"
            elif source.size != tensor.size():
                yield f"{name} is {list(source.size)}, here {list(tensor.size())}"
            elif source.properties.dtype != tensor.dtype:
                yield f"{name} is {source.properties.dtype}, here {tensor.dtype}"
            elif (problem := find_model_difference(tensor, self._kind_of(name))) is not None:
                yield f"{name} {problem}"
        left = sorted(set(frame.tensors.values()) - live.keys())
        if left and self._saved.world_size == self._place.world_size:
            yield f"{left[0]} was saved, and the live {component.name} has no such tensor"
        elif left:
            warnings.append(
                f"{self._saved.path}: the live {component.name} has no {', '.join(left[:3])}"
            )

    def _check_fresh(self, frame: Frame) -> Iterator[str]:
        for name in frame.tensors.values():
            try:
                self._entry(name).check()
            except KindMismatchError as error:
                yield f"{name} {error}"

    def _live_tensors(self, match: _Match) -> dict[str, torch.Tensor]:
        base = match.frame.base
        return {name_of_tensor(base, keys): each for keys, each in take_apart(match.live)[1]}

    def _kind_of(self, name: str) -> Kind | None:
        return Kind.parse(self._saved.reader.kind(name))

    def _entry(self, name: str) -> StateEntry:
        kind = _kind(self._saved.reader, name)
        if kind.type == DTENSOR and kind.is_dense:  # read whole
            kind = Kind(TENSOR, kind.device)
        return StateEntry(
            name, self._saved.tensors[name], kind, None, None, None, is_of_shard=False
        )

    def find_targets(self) -> dict[str, torch.Tensor]:
        """Return the tensors to fill, by their names in the checkpoint."""
        self._targets = {}
        for match in self._matches:
            if match.component is not None and match.component.is_in_place:
                for name, live in self._live_tensors(match).items():
                    self._targets[name] = model_target(live, self._saved.tensors[name])
                continue
            for name in match.frame.tensors.values():
                self._targets[name] = self._entry(name).target()
        return {name: each.tensor for name, each in self._targets.items()}

    def apply(self) -> None:
        """Give every object its state, once the targets are filled."""
        tensors = {
            name: each.tensor if each.finish is None else each.finish()
            for name, each in self._targets.items()
        }
        run_each(*(partial(self._give, each, tensors) for each in self._matches))

    def _give(self, match: _Match, tensors: Mapping[str, torch.Tensor]) -> None:
        frame, component = match.frame, match.component
        if component is None:
            self.waiting[frame.name] = frame, self._put_together(frame, tensors)
            return
        if component.is_in_place:
            own = self._live_tensors(match)
            state = _merge(match.live, frame.state)
        else:
            own = {name: tensors[name] for name in frame.tensors.values()}
            state = self._put_together(frame, tensors)
        component.give(state)
        size = sum(size_bytes_of(local_of(each)) for each in own.values())
        plain = len(encode(frame.state))
        self.restored[full_name(frame.name)] = Restored(len(own), size + plain)

    def _put_together(self, frame: Frame, tensors: Mapping[str, torch.Tensor]) -> Any:
        def leaf_of(keys: Keys, leaf: Any) -> Any:
            name = frame.tensors.get(keys)
            if name is None:
                return leaf
            tensor = tensors[name]
            device = _kind(self._saved.reader, name).device
            if device != tensor.device.type and device == "cuda" and torch.cuda.is_available():
                return tensor.to(device)
            return tensor

        return rebuild(frame.state, leaf_of)


def make_mismatch(path: str, problems: Sequence[str]) -> StateMismatchError:
    """Return the error for components that do not fit."""
    error = StateMismatchError(path, different=problems)
    error.message = f"{path} does not fit the live state: {'; '.join(problems)}"
    return error


def _merge(live: Any, saved: Any) -> Any:
    """Return saved plain values around live tensors, which are filled by now."""
    if isinstance(live, torch.Tensor):
        return live
    if isinstance(live, Mapping) and isinstance(saved, Mapping):
        made = rebuild(live, lambda _, leaf: leaf)
        for key, value in saved.items():
            if key in live:
                made[key] = _merge(live[key], value)
            elif value is not None:
                made[key] = value
        return made
    if take_apart(live)[1] and isinstance(live, list | tuple):
        pairs = zip(live, saved, strict=False)
        return type(live)(_merge(one, other) for one, other in pairs)
    return saved


def _kind(reader: ShardReader, name: str) -> Kind:
    return Kind.parse(reader.kind(name)) or Kind(TENSOR)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
