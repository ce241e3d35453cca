"""One view of several shard files, and what ranks tell one another of a checkpoint.

Owns which of several copies of a name is read: chunks and values that are the same on every rank
from the first file that has them, and what is per rank from this rank's own file. Without one, the
copy of the lowest rank is the name's value, as in `.metadata`.

Owns the compact form in which metadata is sent, and what of it is sent. An outline has every name
with its type, size and kind, and the places of values and of tensors that are stored whole, but no
chunk that is a part of a tensor: it does not grow with the ranks that share a tensor. Such chunks
are cut out of the whole metadata by the boxes that a rank asks for. Promises that names which
shards describe differently are refused. Opens no files and asks no rank.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
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

from holdfast.format.dcp import KINDS, PER_RANK, kinds_of, per_rank_names
from holdfast.format.layout import Entry
from holdfast.torch_internals import StorageInfo

Box = tuple[Sequence[int], Sequence[int]]
"""A part of a whole tensor: offsets and lengths, by dimension."""
Boxes = Mapping[str, Sequence[Box] | None]
"""By name; None: the whole tensor."""


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


def pack(metadata: Metadata) -> bytes:
    """Return metadata in a compact form, column by column."""
    described, places = metadata.state_dict_metadata, metadata.storage_data
    assert metadata.planner_data is not None
    assert places is not None
    kinds, per_rank = kinds_of(metadata), per_rank_names(metadata)
    files: dict[str, int] = {}
    names, chunks = [], []
    for number, (name, each) in enumerate(described.items()):
        path = list(metadata.planner_data[name])
        shown = None if path == name.split(".") else path
        dtype = size = None
        parts: list[Any] = [(None, None)]
        if isinstance(each, TensorStorageMetadata):
            dtype, size = str(each.properties.dtype).removeprefix("torch."), list(each.size)
            parts = [(chunk.offsets, chunk.sizes) for chunk in each.chunks]
        names.append((name, shown, dtype, size, kinds.get(name, ""), name in per_rank))
        for offsets, lengths in parts:
            info = places.get(MetadataIndex(name, offsets))
            place: tuple[int | None, int, int] = (None, 0, 0)
            if info is not None:
                file = files.setdefault(info.relative_path, len(files))
                place = (file, info.offset, info.length)
            box = (None, None) if offsets is None else (list(offsets), list(lengths))
            chunks.append((number, *place, *box))
    columns = [list(files), [*zip(*names, strict=True)], [*zip(*chunks, strict=True)]]
    return zlib.compress(json.dumps(columns).encode(), 1)


def unpack(content: bytes) -> Metadata:
    """Return the metadata that `pack` was given."""
    files, names, chunks = json.loads(zlib.decompress(content))
    described: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    places: dict[MetadataIndex, Any] = {}
    kinds: dict[str, str] = {}
    per_rank: list[str] = []
    properties: dict[str, TensorProperties] = {}
    for name, path, dtype, size, kind, is_own in zip(*names, strict=True):
        paths[name] = tuple(name.split(".") if path is None else path)
        kinds[name] = kind
        if is_own:
            per_rank.append(name)
        if dtype is None:
            described[name] = BytesStorageMetadata()
            continue
        if dtype not in properties:
            properties[dtype] = TensorProperties(dtype=getattr(torch, dtype))
        described[name] = TensorStorageMetadata(properties[dtype], torch.Size(size), [])
    listed = list(described)
    for number, file, offset, length, offsets, lengths in zip(*chunks, strict=True):
        name = listed[number]
        at = None if offsets is None else torch.Size(offsets)
        if at is not None:
            described[name].chunks.append(ChunkStorageMetadata(at, torch.Size(lengths)))
        if file is not None:
            places[MetadataIndex(name, at)] = StorageInfo(files[file], offset, length)
    metadata = Metadata(described, paths, places, StorageMeta())
    _record(metadata, kinds, per_rank)
    return metadata


def files_in(metadata: Metadata, without: Collection[str] = ()) -> list[str]:
    """Return the files that metadata has places in, of other names than these."""
    assert metadata.storage_data is not None
    places = metadata.storage_data.items()
    return list(dict.fromkeys(info.relative_path for at, info in places if at.fqn not in without))


def outline(metadata: Metadata) -> Metadata:
    """Return metadata without the chunks that are parts of a tensor."""
    described = metadata.state_dict_metadata
    return _of_names(metadata, {name: _whole_chunks(each) for name, each in described.items()})


def in_parts(metadata: Metadata) -> Metadata:
    """Return what metadata has of tensors that are stored in parts."""
    described = metadata.state_dict_metadata.items()
    return _of_names(
        metadata,
        {
            name: each.chunks
            for name, each in described
            if isinstance(each, TensorStorageMetadata) and not _whole_chunks(each)
        },
    )


def split(metadata: Metadata) -> list[Metadata]:
    """Return the outline of one shard in two parts, of which the first is alike on most ranks.

    It has the names of tensors that are stored in parts.
    """
    chunks = {name: _whole_chunks(each) for name, each in metadata.state_dict_metadata.items()}
    parts = in_parts(metadata).state_dict_metadata
    return [
        _of_names(metadata, {name: each for name, each in chunks.items() if name in parts}),
        _of_names(metadata, {name: each for name, each in chunks.items() if name not in parts}),
    ]


def unite(outlines: Iterable[Metadata]) -> Metadata:
    """Return what several outlines hold together, given by ascending rank.

    Of what is per rank the lowest rank's is taken.

    Raises:
        ValueError: they describe a name differently.
    """
    united = Metadata({}, {}, {}, StorageMeta())
    kinds: dict[str, str] = {}
    per_rank: dict[str, None] = {}
    for each in outlines:
        own, found = per_rank_names(each), kinds_of(each)
        assert each.planner_data is not None
        assert each.storage_data is not None
        fresh = set()
        for name, described in each.state_dict_metadata.items():
            known = united.state_dict_metadata.get(name)
            if known is None:
                fresh.add(name)
                united.state_dict_metadata[name] = described
                united.planner_data[name] = each.planner_data[name]
                kinds[name] = found.get(name, "")
                if name in own:
                    per_rank[name] = None
            elif (name in own) != (name in per_rank):
                raise ValueError(f"shards differ in whether {name} is per rank")
            elif name not in own and _kind_of(known) != _kind_of(described):
                raise ValueError(
                    f"shards describe {name} as {_kind_of(known)} and as {_kind_of(described)}"
                )
            elif name not in own:
                _add_chunks(united, name, known, described, each.storage_data)
        united.storage_data |= {
            place: info for place, info in each.storage_data.items() if place.fqn in fresh
        }
    _record(united, kinds, per_rank)
    return united


def add_chunks(metadata: Metadata, more: Metadata) -> None:
    """Add the chunks of other metadata to what is known of the same names."""
    assert more.storage_data is not None
    for name, described in more.state_dict_metadata.items():
        known = metadata.state_dict_metadata[name]
        _add_chunks(metadata, name, known, described, more.storage_data)


def find_uncovered(metadata: Metadata, boxes: Boxes) -> dict[str, Sequence[Box] | None]:
    """Return the boxes, of those given, that the known chunks do not cover."""
    found: dict[str, Sequence[Box] | None] = {}
    for name, wanted in boxes.items():
        described = metadata.state_dict_metadata[name]
        assert isinstance(described, TensorStorageMetadata)
        if wanted is None:
            if sum(prod(each.sizes) for each in described.chunks) < prod(described.size):
                found[name] = None
        elif left := [box for box in wanted if not _covers(described.chunks, box)]:
            found[name] = left
    return found


def pack_boxes(boxes: Boxes) -> bytes:
    """Return boxes in a compact form."""
    rows = {
        name: None if each is None else [(list(first), list(size)) for first, size in each]
        for name, each in boxes.items()
    }
    return zlib.compress(json.dumps(rows).encode(), 1)


def unpack_boxes(content: bytes) -> Boxes:
    """Return the boxes that `pack_boxes` was given."""
    found: Boxes = json.loads(zlib.decompress(content))
    return found


class ChunkTable:
    """All chunks of a checkpoint, to cut out of them what overlaps given boxes."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self._known: dict[str, tuple[Any, Any]] = {}

    def cut(self, boxes: Boxes) -> Metadata:
        """Return the chunks that overlap these boxes; names that are not here are left out."""
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for name, wanted in boxes.items():
            described = self.metadata.state_dict_metadata.get(name)
            if not isinstance(described, TensorStorageMetadata):
                continue
            if wanted is None:
                chunks[name] = list(described.chunks)
                continue
            starts, ends = self._bounds(name, described)
            overlaps = np.zeros(len(described.chunks), dtype=np.bool_)
            for offsets, lengths in wanted:
                first = np.array(offsets, dtype=np.int64)
                end = first + np.array(lengths, dtype=np.int64)
                overlaps |= ((starts < end) & (ends > first)).all(axis=1)
            chunks[name] = [described.chunks[each] for each in np.flatnonzero(overlaps).tolist()]
        return _of_names(self.metadata, chunks)

    def _bounds(self, name: str, described: TensorStorageMetadata) -> tuple[Any, Any]:
        """Return where each chunk of a tensor begins and ends, a row for each."""
        if name not in self._known:
            shape = len(described.chunks), len(described.size)
            starts = np.array([each.offsets for each in described.chunks], dtype=np.int64)
            sizes = np.array([each.sizes for each in described.chunks], dtype=np.int64)
            starts = starts.reshape(shape)
            self._known[name] = starts, starts + sizes.reshape(shape)
        return self._known[name]


def _of_names(metadata: Metadata, chunks: Mapping[str, Sequence[ChunkStorageMetadata]]) -> Metadata:
    """Return what metadata has of these names, of tensors these chunks alone."""
    assert metadata.planner_data is not None
    assert metadata.storage_data is not None
    kinds, own = kinds_of(metadata), per_rank_names(metadata)
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, Any] = {}
    for name, kept in chunks.items():
        each = metadata.state_dict_metadata[name]
        indexes = [MetadataIndex(name)]
        if isinstance(each, TensorStorageMetadata):
            each = TensorStorageMetadata(each.properties, each.size, list(kept))
            indexes = [MetadataIndex(name, chunk.offsets) for chunk in kept]
        described[name] = each
        places |= {
            index: metadata.storage_data[index]
            for index in indexes
            if index in metadata.storage_data
        }
    found = Metadata(
        described, {name: metadata.planner_data[name] for name in chunks}, places, StorageMeta()
    )
    _record(
        found,
        {name: kinds.get(name, "") for name in chunks},
        [name for name in chunks if name in own],
    )
    return found


def _whole_chunks(described: Any) -> list[ChunkStorageMetadata]:
    if not isinstance(described, TensorStorageMetadata):
        return []
    return [each for each in described.chunks if each.sizes == described.size]


def _kind_of(described: Any) -> str:
    if not isinstance(described, TensorStorageMetadata):
        return "a value"
    return f"{described.properties.dtype}{list(described.size)}"


def _add_chunks(
    metadata: Metadata, name: str, known: Any, described: Any, places: Mapping[MetadataIndex, Any]
) -> None:
    assert metadata.storage_data is not None
    if not isinstance(described, TensorStorageMetadata):
        return
    for chunk in described.chunks:
        index = MetadataIndex(name, chunk.offsets)
        if index not in metadata.storage_data and index in places:
            known.chunks.append(chunk)
            metadata.storage_data[index] = places[index]


def _covers(chunks: Sequence[ChunkStorageMetadata], box: Box) -> bool:
    """Whether chunks, which do not overlap, hold all of a box."""
    offsets, lengths = box
    missing = prod(lengths)
    for chunk in chunks:
        if missing <= 0:
            break
        missing -= prod(
            max(min(first + length, start + size) - max(first, start), 0)
            for first, length, start, size in zip(
                offsets, lengths, chunk.offsets, chunk.sizes, strict=True
            )
        )
    return missing <= 0
