"""The tensors and values of a committed checkpoint, by name.

Owns which bytes of which file a tensor needs, and passes containers of an unexpected form to torch.
Promises that every block matched its digest before its bytes are used, and that nothing read from
disk runs code: `.metadata` is read by `format.dcp`, other values by weights-only loading, and no
file outside the checkpoint's manifest is opened. Needs no other rank.

`ShardReader` reads into given tensors in place. `ForeignReader` reads what
torch.distributed.checkpoint wrote without holdfast, through torch's own reader: without digests,
wrong bytes go unnoticed. `LazyTensors` are views of mapped files for inference, read on access:
files are never written, since the mapping is private; one may be removed while it is mapped, for
example by retention, and its bytes stay until the last tensor is freed.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Self

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from holdfast.blame import is_process_failure
from holdfast.caller import stop_if_left
from holdfast.errors import CorruptCheckpointError
from holdfast.format.dcp import (
    TensorPlanner,
    ValuePlanner,
    kinds_of,
    per_rank_names,
    read_through_torch,
)
from holdfast.format.inventory import METADATA_NAME, list_names, names_at
from holdfast.format.layout import container_of
from holdfast.format.merging import prefer_own_copies
from holdfast.format.nondense import QUANTISED, ReadWhole, recorded_classes, unpickle_tensor
from holdfast.read.direct import MappedFile, Part, read_verified
from holdfast.read.index import parse_metadata, read_index
from holdfast.read.requests import (
    FileRequests,
    ReadRequest,
    Region,
    Target,
    UncoveredError,
    part_of,
    regions_of,
    waves,
)
from holdfast.storage.backend import Storage, open_stream
from holdfast.storage.digests import FileRecord


@dataclass(frozen=True)
class ShardReader:
    """The tensors and values of one checkpoint, by flat name."""

    files: Storage
    """Of the checkpoint."""
    metadata: Metadata
    records: Mapping[str, FileRecord]
    """Of the manifest, by path: the digests that every byte read is checked against."""
    taken: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By path: the tensor bytes read so far."""
    own_names: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Names that are read as this rank has saved them, not as another one has."""
    sent: dict[MetadataIndex, bytes] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Tensors that another rank has read and verified: their bytes, in place of a file's."""

    _unlisted: ClassVar[str] = "the manifest does not list"
    _derives_keys: ClassVar[bool] = False
    """Whether the metadata may lack the nested keys of its names."""

    @property
    def path(self) -> Path:
        """The full name of the checkpoint."""
        return Path(self.files.where())

    @classmethod
    def open(
        cls,
        files: Storage,
        content: bytes,
        records: Mapping[str, FileRecord],
        own_file: str | None = None,
    ) -> Self:
        """Parse the content of `.metadata`.

        `own_file`: that this rank wrote, whose copies it reads of what is per rank. None: those of
        the lowest rank, as `.metadata` has them.

        Raises:
            CorruptCheckpointError: it is not metadata, requires running code, or names files that
                the manifest does not list; or that one does not list `own_file`.
        """
        where = files.where(METADATA_NAME)
        metadata = parse_metadata(content, where, derive_keys=cls._derives_keys)
        assert metadata.storage_data is not None
        for info in metadata.storage_data.values():
            relative_path = getattr(info, "relative_path", None)
            if relative_path not in records:
                raise CorruptCheckpointError(
                    where, f"names {relative_path!r}, which {cls._unlisted}"
                )
        reader = cls(files, metadata, records)
        if own_file is not None and per_rank_names(metadata):
            if own_file not in records:
                raise CorruptCheckpointError(where, f"is of ranks whose {own_file} is not listed")
            entries = read_index(files, own_file, records[own_file]).entries(files.where(own_file))
            reader.own_names.update(prefer_own_copies(metadata, own_file, entries))
        return reader

    @property
    def per_rank_names(self) -> frozenset[str]:
        """The names of which every rank has saved its own copy."""
        return per_rank_names(self.metadata)

    def kind(self, name: str) -> str:
        """Return what was recorded of the kind of a name; empty: nothing."""
        return self._kinds.get(name, "")

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return kinds_of(self.metadata)

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return the description of every tensor by flat name."""
        return {
            name: each
            for name, each in self.metadata.state_dict_metadata.items()
            if isinstance(each, TensorStorageMetadata)
        }

    def value_names(self) -> list[str]:
        """Return the flat names of all non-tensor values."""
        return [
            name
            for name, each in self.metadata.state_dict_metadata.items()
            if isinstance(each, BytesStorageMetadata)
        ]

    def key_path(self, name: str) -> tuple[str | int, ...]:
        """Return the nested keys of a flat name."""
        path: tuple[str | int, ...] = self.metadata.planner_data[name]
        return path

    def read_values(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return non-tensor values by flat name, verified before they are decoded; None: all.

        Raises:
            CorruptCheckpointError: a block that holds a value does not match its digest, or a
                value requires running code.
        """
        return self.decode(self.read_contents(self.value_names() if names is None else names))

    def decode(self, contents: Mapping[str, Any]) -> dict[str, Any]:
        """Return values by flat name, of their verified bytes.

        Raises:
            CorruptCheckpointError: one requires running code, or is torn.
        """
        values: dict[str, Any] = {}
        for name, content in contents.items():
            where = self.files.where(self.place_of_value(name).relative_path)
            values[name] = decode_value(content, where, name)
        return values

    def read_contents(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the bytes of values, verified.

        Raises:
            CorruptCheckpointError: a block that holds a value does not match its digest.
        """
        read: dict[str, Any] = dict.fromkeys(names)
        places: dict[str, list[tuple[str, Any]]] = {}
        for name in names:
            info = self.place_of_value(name)
            places.setdefault(info.relative_path, []).append((name, info))
        for file_name, found in places.items():
            contents = [bytearray(info.length) for _, info in found]
            self._read_parts(
                file_name,
                [
                    Part(info.offset, memoryview(content))
                    for (_, info), content in zip(found, contents, strict=True)
                ],
            )
            read.update((name, content) for (name, _), content in zip(found, contents, strict=True))
        return read

    def place_of_value(self, name: str) -> Any:
        """Return which bytes of which file hold a value; raises like `place_of`."""
        return self.place_of(MetadataIndex(name))

    def read_tensors(self, targets: Mapping[str, Target]) -> None:
        """Fill plain or distributed tensors in place; names and sizes must be known to agree.

        Each block read is compared with its digest in the same pass.

        Raises:
            CorruptCheckpointError: a block does not match; the tensors hold wrong values.
        """
        self.read(self.plan(targets))

    def plan(self, targets: Mapping[str, Target]) -> dict[str, FileRequests]:
        """Return by file what has to be read to fill tensors, reading nothing; see `read_tensors`.

        Raises:
            CorruptCheckpointError: the stored chunks do not cover them.
        """
        files: dict[str, FileRequests] = {}
        try:
            for region in regions_of(targets, self.metadata):
                if region.chunk in self.sent:
                    files.setdefault("", FileRequests()).sent.append(region)
                    continue
                place = self.place_of(region.chunk)
                self._sort(region, place, files.setdefault(place.relative_path, FileRequests()))
        except UncoveredError as error:
            raise CorruptCheckpointError(str(self.path / METADATA_NAME), str(error)) from error
        return files

    def read(self, plan: Mapping[str, FileRequests]) -> None:
        """Fill what was planned, file by file.

        Raises:
            CorruptCheckpointError: see `read_tensors`.
        """
        for region in plan[""].sent if "" in plan else ():
            content, dtype = bytearray(self.sent[region.chunk]), self._dtype_of(region)
            source = torch.frombuffer(content, dtype=dtype).view(region.chunk_size)
            region.target.copy_(part_of(source, region.starts, region.lengths))
        for name, requests in plan.items():
            if not name:
                continue
            stop_if_left()
            self._read_from(name, requests)
            self.taken[name] = self.taken.get(name, 0) + requests.size_bytes

    def file_order(self, names: Iterable[str]) -> list[str]:
        """Return tensor names sorted by the position of their first bytes in the files."""
        return sorted(names, key=self._first_place)

    def place_of(self, index: MetadataIndex) -> Any:
        """Return which bytes of which file hold a value, or a chunk of a tensor.

        Raises:
            CorruptCheckpointError: the metadata has no entry for it.
        """
        try:
            return self.metadata.storage_data[index]
        except KeyError:
            raise CorruptCheckpointError(
                str(self.path / METADATA_NAME), f"names no place for {index.fqn}"
            ) from None

    def _first_place(self, name: str) -> tuple[str, int]:
        described = self.metadata.state_dict_metadata[name]
        assert isinstance(described, TensorStorageMetadata)
        places = [self.place_of(MetadataIndex(name, each.offsets)) for each in described.chunks]
        # The least: ranks may have been told the chunks of one tensor in another order.
        return min(((each.relative_path, each.offset) for each in places), default=("", 0))

    def _sort(self, region: Region, place: Any, requests: FileRequests) -> None:
        """Decide how a region is read: directly if its container allows it, otherwise by torch."""
        dtype = self._dtype_of(region)
        is_whole = type(region.target) is ReadWhole or dtype in QUANTISED
        container = None if is_whole else container_of(dtype, region.chunk_size)
        if container is None or container.size_bytes != place.length:
            # For example a strided tensor: only its own pickle describes its layout.
            requests.through_torch.append((region, _range_of(place)))
        else:
            requests.direct.append(ReadRequest(region, place.offset, container, dtype))

    def is_direct(self, name: str) -> bool:
        """Whether a tensor that is stored whole is read without torch, from its usual container."""
        described = self.tensors()[name]
        dtype, (chunk, *_) = described.properties.dtype, described.chunks
        if dtype in QUANTISED or chunk.sizes != described.size:
            return False
        place = self.place_of(MetadataIndex(name, chunk.offsets))
        return bool(container_of(dtype, described.size).size_bytes == place.length)

    def _dtype_of(self, region: Region) -> torch.dtype:
        described = self.metadata.state_dict_metadata[region.chunk.fqn]
        assert isinstance(described, TensorStorageMetadata)
        return described.properties.dtype

    def _read_from(self, name: str, requests: FileRequests) -> None:
        foreign = [region for region, _ in requests.through_torch]
        for wave in waves(requests.direct):
            stop_if_left()
            parts = [part for request in wave for part in request.open()]
            self._read_parts(name, parts, [request.whole for request in wave])
            foreign += [request.region for request in wave if not request.close()]
        if foreign:
            places = [_range_of(self.place_of(each.chunk)) for each in foreign]
            self._read_parts(name, [], places)
            self._extract(name, foreign)

    def _extract(self, name: str, regions: Sequence[Region]) -> None:
        """Let torch extract regions from the containers in a file; their bytes are verified."""
        by_torch = []
        for each in regions:
            if type(each.target) is ReadWhole:
                self._extract_whole(name, each, each.target)
            else:
                by_torch.append((each.to_item(), each.target))
        if not by_torch:
            return
        planner = TensorPlanner(by_torch)
        read_through_torch(self.files, name, self.metadata, planner, planner.items)

    def _extract_whole(self, name: str, region: Region, target: ReadWhole) -> None:
        place = self.place_of(region.chunk)
        with open_stream(self.files, name) as stream:
            stream.seek(place.offset)
            content = stream.read(place.length)
        where, tensor = self.files.where(name), region.chunk.fqn
        found = unpickle_tensor(content, target.classes, where, tensor)
        if found.size() != region.chunk_size or found.dtype != target.dtype:
            raise CorruptCheckpointError(where, f"{tensor} has another size or type in its file")
        target.value = found

    def _read_parts(self, name: str, parts: list[Part], ranges: Sequence[range] = ()) -> None:
        try:
            read_verified(self.files, name, self.records[name], parts, ranges)
        except FileNotFoundError as error:  # removed since, or not visible from this node yet
            raise CorruptCheckpointError(str(self.path / name), "is missing") from error
        except CorruptCheckpointError as error:
            if error.byte_range is None:
                raise
            names = list_names(names_at(self.metadata.storage_data, name, error.byte_range))
            raise CorruptCheckpointError(
                error.path, error.reason + names, error.byte_range
            ) from error


@dataclass(frozen=True)
class ForeignReader(ShardReader):
    """The tensors and values under `model` and `optimizer`; everything else is left out."""

    _unlisted: ClassVar[str] = "is not in the directory"
    _derives_keys: ClassVar[bool] = True

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """See the base class."""
        found = super().tensors()
        return {name: each for name, each in found.items() if self._is_of_use(name)}

    def value_names(self) -> list[str]:
        """See the base class."""
        return [name for name in super().value_names() if self._is_of_use(name)]

    def _is_of_use(self, name: str) -> bool:
        path = self.key_path(name)
        if path[:2] in (("optimizer", "state"), ("optimizer", "param_groups")):
            return len(path) > 3
        return path[0] == "model" and len(path) > 1

    def read_values(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """See the base class; nothing is verified."""
        planner = ValuePlanner(self.value_names() if names is None else names, self.metadata)
        files: dict[str, list[ReadItem]] = {}
        for item in planner.items:
            files.setdefault(self.place_of(item.storage_index).relative_path, []).append(item)
        for name, items in files.items():
            read_through_torch(self.files, name, self.metadata, planner, items)
        return planner.values

    def _sort(self, region: Region, place: Any, requests: FileRequests) -> None:
        requests.through_torch.append((region, _range_of(place)))

    def _read_from(self, name: str, requests: FileRequests) -> None:
        self._extract(name, [region for region, _ in requests.through_torch])


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
        self._files: dict[str, MappedFile] = {}
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
            UnsupportedStateError: it is of a class whose module is not loaded.
        """
        full_name, described = self._described[name]
        chunks = [self._chunk(full_name, described, each) for each in described.chunks]
        if len(chunks) == 1 and chunks[0].size() == described.size:
            return chunks[0]
        whole = torch.empty(described.size, dtype=described.properties.dtype, device="cpu")
        missing = whole.numel()
        for chunk, stored in zip(chunks, described.chunks, strict=True):
            part_of(whole, stored.offsets, stored.sizes).copy_(chunk)
            missing -= chunk.numel()
        if missing > 0:
            raise CorruptCheckpointError(str(self.path), f"has no place for all of {full_name}")
        return whole

    def _chunk(self, name: str, described: TensorStorageMetadata, stored: Any) -> torch.Tensor:
        dtype, size = described.properties.dtype, stored.sizes
        place = self._reader.place_of(MetadataIndex(name, stored.offsets))
        file = self._file(place.relative_path)
        file.verify(_range_of(place), name)
        content = file.content[place.offset : place.offset + place.length]
        if dtype in QUANTISED:
            return self._decode(content, file.where, name)
        container = container_of(dtype, size)
        header = container.header
        if container.size_bytes != len(content) or content[: len(header)] != header:
            return self._decode(content, file.where, name)  # for example a sparse tensor
        if not prod(size):
            return torch.empty(size, dtype=dtype, device="cpu")
        payload = content[len(header) : len(header) + container.payload_bytes]
        if (place.offset + len(header)) % dtype.itemsize:  # possible in files of other writers
            payload = memoryview(bytearray(payload))
        return torch.frombuffer(payload, dtype=dtype).view(size)

    def _decode(self, content: memoryview, where: str, name: str) -> torch.Tensor:
        classes = recorded_classes(self._reader.kind(name), name)
        return unpickle_tensor(content, classes, where, name)

    def _file(self, name: str) -> MappedFile:
        with self._lock:
            if name not in self._files:
                self._files[name] = MappedFile.open(
                    self._reader.files, name, self._reader.records[name] if self._verify else None
                )
            return self._files[name]


def decode_value(content: bytes | bytearray | memoryview, where: str, name: str) -> Any:
    """Return a value or tensor from its container, running no code from it.

    Raises:
        CorruptCheckpointError: it needs code, or is torn.
    """
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # torch's own message explains how to run the code anyway
        if is_process_failure(error):
            raise
        raise CorruptCheckpointError(where, f"{name} asks for code, or is torn") from error


def _range_of(place: Any) -> range:
    return range(place.offset, place.offset + place.length)
