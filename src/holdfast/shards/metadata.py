"""The `.metadata` of a checkpoint: where every rank's items lie, in torch's own words.

Owns turning a decision into the pickle that `torch.distributed.checkpoint.load` reads. Promises
that the bytes are the same for the same decision, so that they are made once and kept. Decides
nothing.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from holdfast.shards.planning import Decision, shard_name


def encode_metadata(decision: Decision) -> bytes:
    """Return `.metadata` as stock torch reads it; the same bytes for the same proposals.

    A large job has an entry per rank and tensor, so the objects that torch would pickle are never
    made: their pickle is put together from parts. A test holds it against the objects.
    """
    catalogue, written = decision.catalogue, decision.written
    pickled = _Pickled()
    names = [pickled.text(name) for name in catalogue.numbers]
    files = [pickled.text(shard_name(rank)) for rank in range(len(decision.shares))]
    a_chunk = pickled.template(ChunkStorageMetadata, "offsets", "sizes")
    a_place = pickled.template(_StorageInfo, "relative_path", "offset", "length")
    a_chunk_index = pickled.template(MetadataIndex, "fqn", "index", "offset")
    a_value_index = pickled.template(MetadataIndex, "fqn", "index")
    chunks: list[list[bytes]] = [[] for _ in names]
    places: list[bytes] = []
    for number, rank, offsets, lengths, file_offset, slot_bytes in zip(
        written.name.tolist(),
        written.rank.tolist(),
        map(tuple, written.offsets.tolist()),
        map(tuple, written.lengths.tolist()),
        written.file_offset.tolist(),
        written.slot_bytes.tolist(),
        strict=True,
    ):
        if catalogue.dtypes[number] is None:
            places.append(a_value_index % (names[number], pickle.NONE))
        else:
            mine, dimensions = chunks[number], len(catalogue.sizes[number])
            offset = pickled.size(offsets[:dimensions])
            places.append(a_chunk_index % (names[number], _integer(len(mine)), offset))
            mine.append(a_chunk % (offset, pickled.size(lengths[:dimensions])))
        places.append(a_place % (files[rank], _integer(file_offset), _integer(slot_bytes)))

    a_tensor = pickled.template(TensorStorageMetadata, "properties", "size", "chunks")
    a_value = pickled.template(BytesStorageMetadata)
    described: list[bytes] = []
    for number, (dtype, size) in enumerate(zip(catalogue.dtypes, catalogue.sizes, strict=True)):
        described.append(names[number])
        if dtype is None:
            described.append(a_value)
        else:
            listed = b"".join((pickle.EMPTY_LIST, pickle.MARK, *chunks[number], pickle.APPENDS))
            described.append(a_tensor % (pickled.properties(dtype), pickled.size(size), listed))
    paths: list[bytes] = []
    for name, path in zip(names, catalogue.paths, strict=True):
        paths += (name, pickled.path(path))
    fields = {name: _plain(default) for name, default in vars(Metadata({})).items()}
    fields["state_dict_metadata"] = _dictionary(described)
    fields["planner_data"] = _dictionary(paths)
    fields["storage_data"] = _dictionary(places)
    return pickled.finish(pickled.template(Metadata, *fields) % tuple(fields.values()))


class _Pickled:
    """A pickle of protocol 3 in the making: what recurs stands in front and is referred to."""

    def __init__(self) -> None:
        self._front: list[bytes] = [pickle.PROTO + b"\x03"]
        self._references: dict[Any, bytes] = {}
        self._sizes: dict[tuple[int, ...], bytes] = {}

    def finish(self, whole: bytes) -> bytes:
        """Return the pickle of the object that these parts make."""
        return b"".join((*self._front, whole, pickle.STOP))

    def text(self, text: str) -> bytes:
        return self._references.get(text) or self._refer(text, _plain(text))

    def path(self, path: tuple[str | int, ...]) -> bytes:
        keys = (self.text(key) if isinstance(key, str) else _integer(key) for key in path)
        return b"".join((pickle.MARK, *keys, pickle.TUPLE))

    def size(self, size: tuple[int, ...]) -> bytes:
        if (known := self._sizes.get(size)) is None:
            called = self._global(torch.Size) + _plain(size) + pickle.TUPLE1 + pickle.REDUCE
            known = self._sizes[size] = self._refer(torch.Size(size), called)
        return known

    def properties(self, dtype: str) -> bytes:
        key = getattr(torch, dtype)
        return self._references.get(key) or self._refer(key, _plain(TensorProperties(key)))

    def template(self, kind: type, *keys: str) -> bytes:
        """Return the pickle of an object with a %b where the value of each key goes."""
        new = self._global(kind) + pickle.EMPTY_TUPLE + pickle.NEWOBJ
        if not keys:
            return new
        parts = [new + pickle.EMPTY_DICT + pickle.MARK, *map(self.text, keys)]
        return b"%b".join(
            part.replace(b"%", b"%%") for part in (parts[0] + parts[1], *parts[2:])
        ) + (b"%b" + pickle.SETITEMS + pickle.BUILD)

    def _global(self, kind: type) -> bytes:
        content = pickle.GLOBAL + f"{kind.__module__}\n{kind.__qualname__}\n".encode("ascii")
        return self._references.get(kind) or self._refer(kind, content)

    def _refer(self, key: Any, content: bytes) -> bytes:
        number = (len(self._references)).to_bytes(4, "little")
        self._front.append(content + pickle.LONG_BINPUT + number + pickle.POP)
        self._references[key] = reference = pickle.LONG_BINGET + number
        return reference


def _plain(value: Any) -> bytes:
    """Return the pickle of one thing, without beginning and end and without anything remembered."""
    return pickletools.optimize(pickle.dumps(value, protocol=3))[2:-1]


def _integer(number: int) -> bytes:
    return pickle.dumps(number, protocol=3)[2:-1]


def _dictionary(parts: Sequence[bytes]) -> bytes:
    return b"".join((pickle.EMPTY_DICT, pickle.MARK, *parts, pickle.SETITEMS))
