"""One view of several shard files, as torch's planner knows a checkpoint.

Owns which of several copies of a name is read: chunks and values that are the same on every rank
from the first file that has them, and what is per rank from this rank's own file. Without one, the
copy of the lowest rank is the name's value, as in `.metadata`. Opens no files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from holdfast.format.dcp import KINDS, PER_RANK, kinds_of
from holdfast.format.layout import Entry
from holdfast.torch_internals import StorageInfo


def merge_shards(
    shards: Iterable[tuple[int, str, Iterable[Entry]]], own: int | None = None
) -> Metadata:
    """Return one view of many shard files, given as the rank that wrote it, path and entries.

    `own`: the rank whose copies are read of what is per rank. None: those of the lowest rank.
    """
    merged = _Merged()
    copies: dict[str, tuple[int, str, Entry]] = {}
    for owner, path, entries in shards:
        for entry in entries:
            if not entry.per_rank:
                merged.add(path, entry)
                continue
            known = copies.get(entry.name)
            # At equal rank the first file: another copy of the same shard.
            if known is None or (known[0] != own and (owner == own or owner < known[0])):
                copies[entry.name] = (owner, path, entry)
    for _, path, entry in copies.values():
        merged.add(path, entry)
    return merged.metadata(copies)


class _Merged:
    """The parts of the view, collected name by name."""

    def __init__(self) -> None:
        self._described: dict[str, Any] = {}
        self._paths: dict[str, tuple[Any, ...]] = {}
        self._places: dict[MetadataIndex, Any] = {}
        self._properties: dict[torch.dtype, TensorProperties] = {}
        self._kinds: dict[str, str] = {}

    def add(self, file_path: str, entry: Entry) -> None:
        """Add one entry, unless it is there already."""
        name, dtype = entry.name, entry.dtype
        place = MetadataIndex(name, None if dtype is None else torch.Size(entry.offsets))
        if place in self._places:
            return
        self._places[place] = StorageInfo(file_path, entry.offset, entry.length)
        if name not in self._described:
            self._paths[name], self._kinds[name] = entry.path, entry.kind
            self._described[name] = self._describe(dtype, entry)
        if dtype is not None:
            chunk = ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.lengths))
            self._described[name].chunks.append(chunk)

    def _describe(self, dtype: torch.dtype | None, entry: Entry) -> Any:
        if dtype is None:
            return BytesStorageMetadata()
        if dtype not in self._properties:
            self._properties[dtype] = TensorProperties(dtype=dtype)
        return TensorStorageMetadata(self._properties[dtype], torch.Size(entry.size), [])

    def metadata(self, per_rank: Iterable[str]) -> Metadata:
        """Return what was added."""
        found = Metadata(self._described, self._paths, self._places, StorageMeta())
        _record(found, self._kinds, per_rank)
        return found


def _record(metadata: Metadata, kinds: dict[str, str], per_rank: Iterable[str]) -> None:
    table = {kind: number for number, kind in enumerate(dict.fromkeys(kinds.values()))}
    fields = vars(metadata)
    fields[KINDS] = ([*table], [table[kinds[name]] for name in metadata.state_dict_metadata])
    fields[PER_RANK] = dict.fromkeys(per_rank)


def prefer_own_copies(metadata: Metadata, path: str, entries: Iterable[Entry]) -> list[str]:
    """Read what is per rank from this rank's own file; return the names that it has there."""
    own = merge_shards([(0, path, [entry for entry in entries if entry.per_rank])])
    names = [*own.state_dict_metadata]
    assert metadata.storage_data is not None
    assert metadata.planner_data is not None
    assert own.storage_data is not None
    replaced = {*names}
    places = {
        place: info for place, info in metadata.storage_data.items() if place.fqn not in replaced
    }
    # Before the names change: kinds are recorded in their order.
    kinds = dict.fromkeys(metadata.state_dict_metadata, "") | kinds_of(metadata) | kinds_of(own)
    per_rank = {**vars(metadata).get(PER_RANK, {}), **dict.fromkeys(names)}
    metadata.state_dict_metadata |= own.state_dict_metadata
    metadata.planner_data |= own.planner_data
    metadata.storage_data = {**places, **own.storage_data}
    _record(metadata, dict.fromkeys(metadata.state_dict_metadata, "") | kinds, per_rank)
    return names
