"""What the shard files of a checkpoint hold of model and optimizers, by name.

Owns how names are read: those of the model's state, of the parameters that optimizers held, and the
groups of parameters, also where another writer has flattened them into one name per option. Reads
no tensor; groups that a tensor belongs to are complete once those were read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from holdfast.errors import CorruptCheckpointError
from holdfast.format.dcp import put
from holdfast.format.values import DATA, EMPTY, SMALL_STATES, is_component
from holdfast.read.reader import ShardReader
from holdfast.state.groups import GROUPS, Group, names_of, read_record, unite
from holdfast.state.naming import is_root


@dataclass(frozen=True)
class SavedTensors:
    """What the shard files of a checkpoint hold, by DCP's flat names."""

    tensors: Mapping[str, TensorStorageMetadata]
    values: Mapping[str, Any]
    """Everything that is not a tensor."""
    key_paths: Mapping[str, Sequence[Any]]
    """The nested keys of each flat name: strings for mappings, integers for lists."""
    hollow: Sequence[Sequence[str]]
    """The nested keys of mappings without a leaf, which DCP does not write."""
    held: Collection[str] = ()
    """Every flat name in the checkpoint, used here or not."""
    path: str = ""
    """The checkpoint's directory, for messages."""
    records: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """By name of a record, those of all ranks that saved, as far as they differ; without an entry
    the one among the values is this rank's own, or all there is."""
    own_records: Collection[str] = ()
    """Names of records that this rank saved itself: the values have those."""
    are_united: bool = True
    """Whether `records` has what other ranks saved, where ranks have records of their own."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """The kind of each tensor as it was recorded (`state.kinds`); without one it is left out."""

    @classmethod
    def of(
        cls,
        reader: ShardReader,
        values: Mapping[str, Any],
        small: Mapping[str, Any],
        copies: Mapping[str, Sequence[Any]],
        path: str,
        world_size: int,
    ) -> SavedTensors:
        """Return what an opened checkpoint holds; `values`, `small`, `copies`: as `Contents`."""
        tensors = reader.tensors()
        records = {name: each for name, each in copies.items() if name != DATA}
        own = {name for name in reader.own_names if name.endswith(f".{GROUPS}")}
        return cls(
            tensors,
            values,
            {name: reader.key_path(name) for name in (*tensors, *values)},
            small.get(EMPTY, ()),
            [
                name
                for name in reader.metadata.state_dict_metadata
                if name not in SMALL_STATES and not is_component(name)
            ],
            path,
            records,
            own_records=own if world_size > 1 else (),
            are_united=bool(records) or not own,
            kinds={name: kind for name in tensors if (kind := reader.kind(name))},
        )

    def model_names(self) -> set[str]:
        """Return the names of the model's state; a nested extra state counts as one."""
        paths = [*self.key_paths.values(), *self.hollow]
        return {f"model.{path[1]}" for path in paths if path[0] == "model" and path[1:]}

    @cached_property
    def roots(self) -> list[str]:
        """The roots of optimizer state, in order."""
        return list(dict.fromkeys(path[0] for path in self.key_paths.values() if is_root(path[0])))

    def parameter_names(self, root: str) -> frozenset[str]:
        """Return the names of the parameters that the saved optimizers of a root had."""
        return names_of(self.groups(root))

    def shared_names(self) -> set[str]:
        """Return the names of model and parameters that every rank finds in the checkpoint.

        Unless records were gathered, those of parameters are not among them.
        """
        found = self.model_names()
        for root in self.roots:
            if self.are_united:
                found |= {f"{root}.{name}" for name in self.parameter_names(root)}
        return found

    def groups_for(self, root: str, names: Collection[str]) -> list[Group]:
        """Return the groups that this rank saved, if they have all of these parameters, else all.

        Raises:
            CorruptCheckpointError: as `groups`.
        """
        own = self._own_groups.get(root)
        return own if own is not None and names_of(own) >= set(names) else self.groups(root)

    def groups(self, root: str) -> list[Group]:
        """Return the saved groups of parameters of a root, of all ranks together.

        Raises:
            CorruptCheckpointError: what is saved in their place is no list of groups.
        """
        return self._groups.get(root, [])

    @cached_property
    def _groups(self) -> dict[str, list[Group]]:
        known = {**self.values, **self.flat_tensors}
        found = {}
        for root in self.roots:
            name = f"{root}.{GROUPS}"
            if name in self.values and tuple(self.key_paths[name]) == (root, GROUPS):
                own = [self.values[name]] if name in self.own_records else []
                values = [*own, *self.records.get(name, ())] or [self.values[name]]
            else:
                nested: dict[str, Any] = {}
                for each in self.flat_options(root):
                    put(nested, self.key_paths[each], known[each])
                values = [nested[root][GROUPS]] if nested else []
            found[root] = unite([self._read(name, each) for each in values])
        return found

    @cached_property
    def _own_groups(self) -> dict[str, list[Group]]:
        names = {root: f"{root}.{GROUPS}" for root in self.roots}
        return {
            root: self._read(name, self.values[name])
            for root, name in names.items()
            if name in self.own_records
        }

    def _read(self, name: str, value: Any) -> list[Group]:
        try:
            return read_record(value)
        except ValueError as error:
            raise CorruptCheckpointError(self.path, f"{name} {error}") from error

    def flat_options(self, root: str) -> list[str]:
        """Return the flat names of options, as a writer has them who flattens groups."""
        return [
            name
            for name, path in self.key_paths.items()
            if path[0] == root
            and path[1:2] == (GROUPS,)
            and len(path) > 3
            and path[2] < len(self.key_paths)  # a list of them is built
            and (name in self.values or name in self.tensors)
        ]

    @cached_property
    def flat_tensors(self) -> dict[str, torch.Tensor]:
        """Memory for options that are tensors with a name of their own; filled by the load."""
        return {
            name: torch.zeros(self.tensors[name].size, dtype=self.tensors[name].properties.dtype)
            for root in self.roots
            for name in self.flat_options(root)
            if name in self.tensors
        }


def look_up(value: Any, keys: Sequence[Any]) -> Any:
    """Return what nested containers hold at these keys; None: nothing."""
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value
