"""Tensors of a checkpoint as views of its memory-mapped files, read on access.

Owns zero-copy reading for inference. Promises that a tensor stored in one piece costs no memory
beyond the page cache, that every block of a tensor matched its digest before the tensor is
returned, and that files are never written: the mapping is private, so a modified tensor gets copies
of its pages. A file may be removed while it is mapped, for example by retention; its bytes stay
until the last tensor is freed. Changes on disk after a block was verified are not noticed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from holdfast.errors import CorruptCheckpointError
from holdfast.format.layout import container_of
from holdfast.read.direct import blocks_of, read_expected
from holdfast.read.reader import ShardReader
from holdfast.storage.digests import Blocks


class LazyTensors(Mapping[str, torch.Tensor]):
    """The tensors of one checkpoint by name; each access returns a new view or a new copy.

    A tensor stored in one piece is a view of the file; one saved in several chunks is assembled in
    memory of its own. Safe to share between threads.
    """

    def __init__(self, reader: ShardReader, prefix: str = "", *, verify: bool = True) -> None:
        """`prefix`: only names that begin with it, shown without it. `verify`: check digests."""
        self._reader = reader
        self._described = {
            name.removeprefix(prefix): (name, each)
            for name, each in reader.tensors().items()
            if name.startswith(prefix)
        }
        self._verify = verify
        self._files: dict[str, _MappedFile] = {}
        self._lock = Lock()

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""
        return self._reader.path

    def __len__(self) -> int:
        return len(self._described)

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __contains__(self, name: object) -> bool:
        return name in self._described  # without touching the tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor, its blocks verified on first access.

        Raises:
            KeyError: there is no such tensor.
            CorruptCheckpointError: naming file, block and tensor.
        """
        full_name, described = self._described[name]
        chunks = [self._chunk(full_name, described, each) for each in described.chunks]
        if len(chunks) == 1 and chunks[0].size() == described.size:
            return chunks[0]
        whole = torch.empty(described.size, dtype=described.properties.dtype, device="cpu")
        missing = whole.numel()
        for chunk, stored in zip(chunks, described.chunks, strict=True):
            region = whole
            for dimension, (start, length) in enumerate(
                zip(stored.offsets, stored.sizes, strict=True)
            ):
                region = region.narrow(dimension, start, length)
            region.copy_(chunk)
            missing -= chunk.numel()
        if missing > 0:
            raise CorruptCheckpointError(str(self.path), f"has no place for all of {full_name}")
        return whole

    def _chunk(self, name: str, described: TensorStorageMetadata, stored: Any) -> torch.Tensor:
        dtype, size = described.properties.dtype, stored.sizes
        place = self._reader.place_of(MetadataIndex(name, stored.offsets))
        file = self._file(place.relative_path)
        file.verify(range(place.offset, place.offset + place.length), name)
        content = file.content[place.offset : place.offset + place.length]
        container = container_of(dtype, size)
        header = container.header
        if container.size_bytes != len(content) or content[: len(header)] != header:
            return _unpickle(content, file.path, name)  # for example a strided tensor
        if not prod(size):
            return torch.empty(size, dtype=dtype, device="cpu")
        payload = content[len(header) : len(header) + container.payload_bytes]
        if (place.offset + len(header)) % dtype.itemsize:  # possible in files of other writers
            payload = memoryview(bytearray(payload))
        return torch.frombuffer(payload, dtype=dtype).view(size)

    def _file(self, name: str) -> _MappedFile:
        with self._lock:
            if name not in self._files:
                self._files[name] = _MappedFile.open(self._reader, name, self._verify)
            return self._files[name]


@dataclass
class _MappedFile:
    """One memory-mapped file, and which of its blocks are verified."""

    path: Path
    content: memoryview
    expected: Blocks | None
    """None: nothing is verified."""
    _verified: set[int] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def open(cls, reader: ShardReader, name: str, verify: bool) -> _MappedFile:
        path, expected = reader.path / name, None
        try:
            with reader.files.open(name) as source:
                if verify:
                    expected = read_expected(source, str(path), reader.records[name])
                content = source.map()
        except FileNotFoundError as error:
            raise CorruptCheckpointError(str(path), "is missing") from error
        return cls(path, content, expected)

    def verify(self, wanted: range, name: str) -> None:
        """Check the blocks that a range overlaps against their digests, each only once.

        Raises:
            CorruptCheckpointError: one does not match, or the file ends before the range does.
        """
        if wanted.start < 0 or wanted.stop > len(self.content):
            raise CorruptCheckpointError(
                str(self.path), f"has {len(self.content)} bytes, too few for {name}"
            )
        if self.expected is None or not wanted:
            return
        if wanted.stop > self.expected.covered_bytes:
            raise CorruptCheckpointError(str(self.path), f"has {name} where no digest covers it")
        for number in sorted(blocks_of([wanted])):
            with self._lock:  # a thread that waits here then finds the block verified
                if number in self._verified:
                    continue
                place = self.expected.place(number)
                block = self.content[place.start : place.stop]
                if (found := self.expected.compare(number, [block])) is not None:
                    raise found.as_error(str(self.path), f", in {name}")
                self._verified.add(number)


def _unpickle(content: memoryview, path: Path, name: str) -> torch.Tensor:
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own message explains how to run the code anyway
        raise CorruptCheckpointError(str(path), f"{name} asks for code, or is torn") from error
    if not isinstance(found, torch.Tensor):
        raise CorruptCheckpointError(str(path), f"{name} is no tensor")
    return found
