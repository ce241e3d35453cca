"""Components: named state of a run beside model, optimizer and the built-in small states.

Owns what a component is declared with (`StateComponent`, `SharingPattern`), its names in a
checkpoint, which rank writes what of it, and how its state is taken apart: tensors are saved as
tensors, the rest is one plain value that says where they were. Promises that a wrong declaration
is refused when it is made, that every rank asks every object for its state (state dicts may run
collectives), and that nothing is saved that could be read back only by running code. What a load
does with it is in `component_load`.
"""

from __future__ import annotations

import collections
import enum
import hashlib
import logging
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from holdfast.errors import UnsupportedStateError, WrongArgumentError
from holdfast.format.dcp import KeyPath
from holdfast.format.values import COMPONENTS, SMALL_STATES
from holdfast.protocol import Stateful
from holdfast.state.codec import canonical, check_plain
from holdfast.state.model import run_each
from holdfast.state.small import Place
from holdfast.torch_internals import copy_versions

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_BUILT_IN = frozenset({"model", "optimizer", "components", *SMALL_STATES})
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter)
_SEQUENCES = (list, tuple)
_SCALARS = frozenset((bool, int, float, complex, str, bytes))
Keys = tuple[Any, ...]
"""Where a tensor was in a state: keys of mappings, positions in lists."""


class SharingPattern(enum.Enum):
    """Which ranks have one value of a component, and so who writes it and who is given it."""

    GLOBAL = "global"
    """One value, that of rank 0; every rank is given it."""
    REPLICATED = "replicated"
    """Every rank holds the same value, which is checked; it is written once."""
    PER_RANK = "per_rank"
    """Every rank writes its own value and is given it again."""
    PER_GROUP = "per_group"
    """One value for each group of ranks, that of its lowest rank; every member is given it."""
    PER_NODE = "per_node"
    """One value for each node, that of its first rank; every rank of the node is given it."""
    SHARDED = "sharded"
    """The tensors say themselves how they are divided, as a model's do; restored in place."""


ONE_VALUE = frozenset({SharingPattern.GLOBAL, SharingPattern.REPLICATED, SharingPattern.SHARDED})
"""Patterns of which a checkpoint has one value, whatever the number of ranks."""


@dataclass(frozen=True, eq=False)
class StateComponent:
    """One named part of the state of a run."""

    name: str
    """Letters, digits, `_` and `-`; the checkpoint has it as `components.<name>`."""
    value: Any
    """An object with `state_dict` and `load_state_dict`, a pair of functions (get, set), or a
    generator of random numbers: numpy's, torch's or `random.Random`."""
    sharing: SharingPattern
    group: Any | None = None
    """For PER_GROUP, and only there: the group that this rank belongs to, as a process group of
    torch.distributed or as a list of ranks."""
    required: bool = True
    """Whether a checkpoint without it is refused; otherwise a warning names it."""
    in_local_saves: bool = True
    """Whether saves that go to the local tier only have it; False: only where `required` is."""
    _access: tuple[Callable[[], Any], Callable[[Any], Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the declaration.

        Raises:
            WrongArgumentError: naming what is wrong with it.
        """
        name: Any = self.name  # whatever it was given, like the others
        sharing: Any = self.sharing
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _wrong(
                "name", f"is {name!r}", "Use letters, digits, _ and -, and begin with a letter."
            )
        if name in _BUILT_IN:
            raise _wrong("name", f"is {name!r}, a built-in component", "Choose another name.")
        if not isinstance(sharing, SharingPattern):
            known = ", ".join(each.name for each in SharingPattern)
            found = f"of {name} is {sharing!r}"
            raise _wrong("sharing", found, f"Use a holdfast.SharingPattern: {known}.")
        access = _find_access(self.value)
        if access is None:
            raise _wrong(
                "value",
                f"of {name} is {_describe(self.value)}, which has no state_dict and "
                "load_state_dict",
                "Pass an object that has both, or a pair of functions (get, set).",
            )
        object.__setattr__(self, "_access", access)
        self._check_group()
        if self.required and not self.in_local_saves:
            raise _wrong(
                "in_local_saves",
                f"of {name} is False, and it is required: no local checkpoint could be loaded",
                "Set required=False with it.",
            )

    def _check_group(self) -> None:
        name, group = self.name, self.group
        is_for_groups = self.sharing is SharingPattern.PER_GROUP
        if is_for_groups and group is None:
            raise _wrong(
                "group", f"of {name} is missing", "PER_GROUP needs the group of this rank."
            )
        if not is_for_groups and group is not None:
            raise _wrong(
                "group",
                f"of {name} is given, and its pattern is {self.sharing.name}",
                "Only PER_GROUP takes a group.",
            )
        if not is_for_groups:
            return
        is_list = (
            isinstance(group, list | tuple | range)
            and len(group) > 0
            and all(type(each) is int and each >= 0 for each in group)
            and len(set(group)) == len(group)
        )
        if not is_list and not _is_process_group(group):
            raise _wrong(
                "group",
                f"of {name} is {_describe(group)}",
                "Pass the process group that this rank belongs to, or a list of its ranks.",
            )

    @classmethod
    def file(
        cls, name: str, path: str | os.PathLike[str], *, required: bool = True
    ) -> StateComponent:
        """Return a component whose state is the content of a file, such as a tokenizer.

        Rank 0 reads it. A load writes the file only where there is none: one of other content is
        left as it is, with a warning.
        """
        return cls(name, _File(Path(path)), SharingPattern.GLOBAL, required=required)

    @property
    def is_in_place(self) -> bool:
        """Whether its live tensors are filled, as a model's are; otherwise it is given new ones."""
        return self.sharing is SharingPattern.SHARDED or isinstance(self.value, nn.Module)

    @property
    def is_missing_file(self) -> bool:
        """Whether it is a file that is not there, as before its first load."""
        return isinstance(self.value, _File) and not self.value.path.exists()

    def read(self) -> Any:
        """Return the live state."""
        return self._access[0]()

    def give(self, state: Any) -> None:
        """Give the live object a state."""
        self._access[1](state)

    def members(self, place: Place) -> tuple[int, ...] | None:
        """Return the ranks that have one value with this one; None: the pattern names none.

        Raises:
            UnsupportedStateError: this rank is not one of them, or they cannot be known.
        """
        if self.sharing is SharingPattern.PER_GROUP:
            ranks = self.group
            if _is_process_group(ranks):
                ranks = distributed.get_process_group_ranks(ranks)
            found = tuple(sorted(ranks))  # type: ignore[arg-type]  # not None, as was checked
        elif self.sharing is SharingPattern.PER_NODE:
            found = _ranks_of_node(self.name, place)
        else:
            return None
        if place.rank not in found or found[-1] >= place.world_size:
            raise UnsupportedStateError(
                f"the group of component {self.name} has the ranks {list(found)}, and this is rank "
                f"{place.rank} of {place.world_size}.\nPass the group that this rank belongs to."
            )
        return found


def full_name(name: str) -> str:
    """Return the name of a component in a checkpoint."""
    return f"{COMPONENTS}{name}"


def components_of(ctx: Any) -> Sequence[StateComponent]:
    """Return the components of a context; those of other trainers may have none."""
    found: Sequence[StateComponent] = getattr(ctx, "components", ())
    return found


def check_components(method: str, ctx: Any) -> Sequence[StateComponent]:
    """Return the components of a context.

    Raises:
        WrongArgumentError: they are no components, or two have one name.
    """
    given = components_of(ctx)
    if not isinstance(given, list | tuple):
        raise WrongArgumentError(
            method, "components", f"is {_describe(given)}", "Pass a list of StateComponents."
        )
    names: set[str] = set()
    for each in given:
        if not isinstance(each, StateComponent):
            raise WrongArgumentError(
                method, "components", f"has {_describe(each)}", "Pass a list of StateComponents."
            )
        if each.name in names:
            raise WrongArgumentError(
                method, "components", f"has two of the name {each.name}", "Rename one of them."
            )
        names.add(each.name)
    return given


# -- capture -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComponentLeaves:
    """What this rank saves of all components, as flat named leaves."""

    values: Mapping[str, Any] = field(default_factory=dict)
    paths: Mapping[str, KeyPath] = field(default_factory=dict)
    per_rank: frozenset[str] = frozenset()
    digests: Mapping[str, bytes] = field(default_factory=dict)
    """By name: of plain values that every rank has alike, 16 bytes each."""

    def is_named_like(self, other: ComponentLeaves) -> bool:
        """Whether another has the same names, with the same meaning."""
        return self.paths == other.paths and self.per_rank == other.per_rank

    def without_values(self) -> ComponentLeaves:
        """Return the names alone."""
        return ComponentLeaves({}, self.paths, self.per_rank)


def capture_components(
    components: Sequence[StateComponent], place: Place, *, is_rehearsal: bool = False
) -> ComponentLeaves:
    """Return the state of components, referring to live tensors.

    `is_rehearsal`: nothing is saved yet, so that a file need not be there.

    Raises:
        UnsupportedStateError: some of it could not be read back safely.
    """
    values: dict[str, Any] = {}
    per_rank: set[str] = set()
    digests: dict[str, bytes] = {}
    asked = components
    if is_rehearsal:
        asked = [each for each in asked if not each.is_missing_file]
    parts = run_each(*(partial(_capture, each, place) for each in asked))
    for component, captured in zip(asked, parts, strict=True):
        if captured is None:
            continue
        values |= captured
        (base, frame), *_ = captured.items()
        if component.sharing in (SharingPattern.REPLICATED, SharingPattern.SHARDED):
            per_rank.add(base)
        if component.sharing is SharingPattern.REPLICATED:
            described = [frame["state"], frame["tensors"]]
            digests[f"{base}@plain_values"] = xxhash.xxh3_128_digest(canonical(described))
        if component.sharing is SharingPattern.PER_RANK:
            per_rank |= captured.keys()
    paths = {name: path_of(name) for name in (*values, *digests)}
    return ComponentLeaves(values, paths, frozenset(per_rank), digests)


def path_of(name: str) -> KeyPath:
    """Return the nested keys of a name of a component."""
    return COMPONENTS.rstrip("."), name.removeprefix(COMPONENTS)


def _capture(component: StateComponent, place: Place) -> dict[str, Any] | None:
    """Return what this rank saves of a component: its plain part, then its tensors; None: none."""
    name, sharing = component.name, component.sharing
    writer = 0 if sharing is SharingPattern.GLOBAL else place.rank
    if isinstance(component.value, _File) and writer != place.rank:
        return None
    state = component.read()  # of every rank, and before anything is refused: it may communicate
    members = component.members(place)
    writer = members[0] if members is not None else writer
    if writer != place.rank:
        return None
    base = full_name(name) if members is None else f"{full_name(name)}@{writer}"
    plain, tensors = take_apart(state)
    values: dict[str, Any] = {}
    for keys, tensor in tensors:
        flat = name_of_tensor(base, keys)
        if flat in values:
            raise UnsupportedStateError(
                f"two tensors of component {name} would have the name {flat}.\n"
                "Rename the keys of its state."
            )
        if isinstance(tensor, DTensor) and sharing is not SharingPattern.SHARDED:
            raise UnsupportedStateError(
                f"{flat} is a DTensor, of which each rank holds a part, and component {name} is "
                f"{sharing.name}.\nDeclare it SharingPattern.SHARDED."
            )
        values[flat] = tensor
    frame = {
        "sharing": sharing.value,
        "members": None if members is None else list(members),
        "state": plain,
        "tensors": [[list(keys), flat] for (keys, _), flat in zip(tensors, values, strict=True)],
    }
    check_plain(plain, full_name(name))
    return {base: frame, **values}


def name_of_tensor(base: str, keys: Keys) -> str:
    """Return the name of a tensor of a component; a state that is a tensor is its `value`."""
    return f"{base}.{'.'.join(map(str, keys)) if keys else 'value'}"


def take_apart(state: Any) -> tuple[Any, list[tuple[Keys, torch.Tensor]]]:
    """Return a state with None in place of its tensors, and the tensors with their keys."""
    tensors: list[tuple[Keys, torch.Tensor]] = []

    def take(keys: Keys, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensors.append((keys, leaf))
        return None

    return rebuild(state, take), tensors


def rebuild(state: Any, leaf_of: Callable[[Keys, Any], Any], keys: Keys = ()) -> Any:
    """Return a copy of nested containers with other leaves: `leaf_of` is given keys and leaf."""
    kind = type(state)
    if kind in _MAPPINGS:
        made: Any = kind()
        for key, each in state.items():
            made[key] = rebuild(each, leaf_of, (*keys, key))
        copy_versions(state, made)
        return made
    if kind in _SEQUENCES:
        if _SCALARS.issuperset(map(type, state)):  # the state of a generator has many
            return state
        return kind(rebuild(each, leaf_of, (*keys, at)) for at, each in enumerate(state))
    return leaf_of(keys, state)


# -- values --------------------------------------------------------------------------------------


def _find_access(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """Return how a value is read and given back; None: it cannot be."""
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: _without_arrays(bits.state), partial(setattr, bits, "state")
    if isinstance(value, np.random.RandomState):
        legacy = value
        return lambda: _without_arrays(legacy.get_state(legacy=False)), legacy.set_state
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, tuple):
        is_pair = len(value) == 2 and all(map(callable, value))
        return (value[0], value[1]) if is_pair else None
    if isinstance(value, type) or not isinstance(value, Stateful):
        return None
    return value.state_dict, value.load_state_dict


def _without_arrays(value: Any) -> Any:
    """Return the state of a numpy generator with lists in place of arrays."""
    if isinstance(value, Mapping):
        return {key: _without_arrays(each) for key, each in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


class _File:
    """The content of a file, read again only when the file has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: tuple[tuple[int, ...], dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the content, its name and its digest.

        Raises:
            OSError: it cannot be read.
        """
        found = self.path.stat()
        mark = (found.st_ino, found.st_size, found.st_mtime_ns)
        if self._read is None or self._read[0] != mark:
            content = self.path.read_bytes()
            state = {
                "name": self.path.name,
                "sha256": hashlib.sha256(content).hexdigest(),
                "content": torch.frombuffer(bytearray(content), dtype=torch.uint8)
                if content
                else torch.empty(0, dtype=torch.uint8),
            }
            self._read = mark, state
        return dict(self._read[1])

    def load_state_dict(self, state: Any) -> None:
        """Write the file if there is none.

        Raises:
            UnsupportedStateError: the saved state is not that of a file.
            OSError: it cannot be written.
        """
        content = state.get("content") if isinstance(state, Mapping) else None
        if not isinstance(content, torch.Tensor) or content.dtype != torch.uint8:
            raise UnsupportedStateError(f"what was saved for {self.path} is no file")
        saved = content.numpy().tobytes()
        if self.path.exists():
            if self.path.read_bytes() != saved:
                logger.warning(
                    "%s is left as it is: the file in the checkpoint has another content (sha256 "
                    "%s). Remove it and load again, or restore it to another path",
                    self.path,
                    state.get("sha256"),
                )
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        pending = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        pending.write_bytes(saved)
        pending.replace(self.path)  # ranks of one node write the same file, whole


def _is_process_group(value: Any) -> bool:
    return distributed.is_available() and isinstance(value, distributed.ProcessGroup)


def _ranks_of_node(name: str, place: Place) -> tuple[int, ...]:
    """Return the ranks of this node, as the launcher says them.

    Raises:
        UnsupportedStateError: it does not.
    """
    if place.world_size == 1:
        return (0,)
    try:
        first = place.rank - int(os.environ["LOCAL_RANK"])
        return tuple(range(first, first + int(os.environ["LOCAL_WORLD_SIZE"])))
    except (KeyError, ValueError) as error:
        raise UnsupportedStateError(
            f"component {name} is PER_NODE, and LOCAL_RANK and LOCAL_WORLD_SIZE do not say which "
            "ranks share a node.\nSet them as torchrun does, or declare it PER_GROUP."
        ) from error


def _wrong(argument: str, found: str, advice: str) -> WrongArgumentError:
    return WrongArgumentError("StateComponent", argument, found, advice)


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}, not an object of it"
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
