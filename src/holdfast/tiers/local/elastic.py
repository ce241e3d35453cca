"""Shards written by N ranks, read by M: merge their indexes and divide the remote blocks.

Owns reading the index of a shard file, the check that a set of shards covers the state, the merged
view of them for the shard reader, and the division of remote blocks among the ranks that fetch
them. Promises that a state counts as covered only if every name is present and every tensor is
tiled exactly, that a file at this place is preferred to a peer's, that a remote block is fetched
once for all ranks of a place, and that only blocks that some rank reads are fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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

from holdfast.errors import CorruptCheckpointError
from holdfast.format.layout import TAIL, Entry, locate_index, parse_index
from holdfast.format.plan import first_untiled
from holdfast.read.direct import Part, read_verified
from holdfast.storage.digests import DifferenceError, read_blocks
from holdfast.storage.posix import Filesystem, naming, read_into
from holdfast.tiers.local.shard_file import ShardRecord
from holdfast.torch_internals import StorageInfo

Chunk = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Name, size of the whole tensor, offsets, lengths."""
Block = tuple[int, int]
"""Owner of the shard, and number in its file."""


@dataclass(frozen=True)
class Index:
    """The verified index of one shard file."""

    content: bytes
    offset: int
    """Of the index in the file."""
    digests: tuple[str, ...]
    """Of the body's blocks."""

    def entries(self, path: str) -> list[Entry]:
        """Return the items.

        Raises:
            CorruptCheckpointError: it is inconsistent.
        """
        try:
            return parse_index(self.content, self.offset)
        except ValueError as error:
            raise CorruptCheckpointError(path, str(error)) from error


def read_shard_index(path: Path, record: ShardRecord, filesystem: Filesystem) -> Index:
    """Read the index of a published shard, verified against the digests of its blocks.

    Raises:
        CorruptCheckpointError: it is damaged or missing.
        OSError: it cannot be read.
    """
    image = record.image_record(str(path))
    try:
        with naming(path), filesystem.open_existing(path) as stream:
            blocks = read_blocks(image, stream)
    except DifferenceError as error:
        raise CorruptCheckpointError(str(path), error.difference.reason) from None
    except FileNotFoundError as error:
        raise CorruptCheckpointError(str(path), "is missing") from error
    tail_place = record.body_bytes - TAIL.size
    glimpse, end = bytearray(TAIL.size), bytearray(TAIL.size)
    with naming(path), filesystem.open_existing(path) as stream:
        read_into(stream, tail_place, [memoryview(glimpse)])
    try:
        place = locate_index(bytes(glimpse), record.body_bytes)
    except ValueError as error:
        raise CorruptCheckpointError(str(path), str(error)) from error
    content = bytearray(len(place))
    parts = [Part(place.start, memoryview(content)), Part(tail_place, memoryview(end))]
    read_verified(filesystem, path, image, parts)
    if end != glimpse:
        raise CorruptCheckpointError(str(path), "is changed while it is read")
    return Index(bytes(content), place.start, tuple(blocks.digests))


def read_shard_values(
    path: Path, record: ShardRecord, index: Index, filesystem: Filesystem
) -> dict[str, bytes]:
    """Return the values of a shard that are not tensors, by name, verified.

    Raises:
        CorruptCheckpointError, OSError: as `read_shard_index`.
    """
    entries = [each for each in index.entries(str(path)) if each.dtype is None]
    contents = [bytearray(each.length) for each in entries]
    parts = [
        Part(each.offset, memoryview(content))
        for each, content in zip(entries, contents, strict=True)
    ]
    read_verified(filesystem, path, record.image_record(str(path)), parts)
    return {each.name: bytes(content) for each, content in zip(entries, contents, strict=True)}


def outline(path: Path, record: ShardRecord, filesystem: Filesystem) -> list[Chunk]:
    """Return the chunks in a published shard; raises as `read_shard_index`."""
    entries = read_shard_index(path, record, filesystem).entries(str(path))
    return [(each.name, each.size, each.offsets, each.lengths) for each in entries]


def find_gap(chunks: Sequence[Chunk], state_names: int | None) -> str | None:
    """Return what a set of chunks lacks of the whole state; None: nothing.

    `state_names`: how many names the whole state has. None: unknown, so coverage is not provable.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    different: dict[tuple[str, tuple[int, ...], tuple[int, ...]], None] = {}
    for name, size, offsets, lengths in chunks:
        sizes.setdefault(name, size)
        different.setdefault((name, offsets, lengths))
    if state_names is None or len(sizes) < state_names:
        return f"the others hold {len(sizes)} of {state_names} names of the state"
    numbers = {name: number for number, name in enumerate(sizes)}
    dimensions = max((len(size) for size in sizes.values()), default=0)

    def padded(rows: Iterable[tuple[int, ...]], fill: int) -> Any:
        table = [(*row, *([fill] * (dimensions - len(row)))) for row in rows]
        return np.array(table, dtype=np.int64).reshape(len(table), dimensions)

    lacking = first_untiled(
        np.array([numbers[name] for name, _, _ in different], dtype=np.int64),
        padded((offsets for _, offsets, _ in different), 0),
        padded((lengths for _, _, lengths in different), 1),
        padded(sizes.values(), 1),
    )
    return None if lacking is None else f"the others do not hold all of {list(sizes)[lacking]}"


def merge(shards: Sequence[tuple[str, Sequence[Entry]]]) -> Metadata:
    """Return one view of many shard files, given as path and entries, for torch's planner.

    Where several files hold the same chunk, the first one is read.
    """
    described: dict[str, Any] = {}
    paths: dict[str, tuple[Any, ...]] = {}
    places: dict[MetadataIndex, Any] = {}
    properties: dict[torch.dtype, TensorProperties] = {}
    for file_path, entries in shards:
        for entry in entries:
            name, dtype = entry.name, entry.dtype
            place = MetadataIndex(name, None if dtype is None else torch.Size(entry.offsets))
            if place in places:
                continue
            places[place] = StorageInfo(file_path, entry.offset, entry.length)
            if dtype is None:
                paths.setdefault(name, entry.path)
                described.setdefault(name, BytesStorageMetadata())
                continue
            if name not in described:
                paths[name] = entry.path
                if dtype not in properties:
                    properties[dtype] = TensorProperties(dtype=dtype)
                described[name] = TensorStorageMetadata(
                    properties[dtype], torch.Size(entry.size), []
                )
            chunk = ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.lengths))
            described[name].chunks.append(chunk)
    return Metadata(described, paths, places, StorageMeta())


@dataclass(frozen=True)
class ReadRequest:
    """The blocks that a rank needs of a shard that is not at its place."""

    numbers: tuple[int, ...]
    """Block numbers, in order."""
    by_file: bool = False
    """Whether the rank must read them from a file."""


def divide(
    requests: Sequence[Mapping[int, ReadRequest]], places: Sequence[int]
) -> tuple[list[list[Block]], list[list[Block]]]:
    """Divide blocks to fetch so that each place receives each block once.

    `requests`: by rank and owner. Return by rank the blocks sent straight to the only rank of a
    place that needs them, and the blocks it fetches into a file for all ranks of its place.
    """
    straight: list[list[Block]] = [[] for _ in requests]
    filed: list[list[Block]] = [[] for _ in requests]
    for place in sorted(set(places)):
        ranks = [rank for rank, each in enumerate(places) if each == place]
        wanting: dict[Block, list[int]] = {}
        by_file: set[Block] = set()
        for rank in ranks:
            for owner, request in requests[rank].items():
                for number in request.numbers:
                    wanting.setdefault((owner, number), []).append(rank)
                    if request.by_file:
                        by_file.add((owner, number))
        shared = []
        for block, those in sorted(wanting.items()):
            if len(those) == 1 and block not in by_file:
                straight[those[0]].append(block)
            else:
                shared.append(block)
        # Contiguous runs, not every n-th block: blocks are then read and sent in file order.
        size = -(-len(shared) // len(ranks))
        for position, rank in enumerate(ranks):
            filed[rank] = shared[position * size : (position + 1) * size]
    return straight, filed
