"""Read the shard files of a committed checkpoint into tensors in place.

Owns which bytes of which file a tensor needs, and passes containers of an unexpected form to torch.
Promises that every block read matched its digest, and that nothing read from disk runs code:
`.metadata` is read by `format.dcp`, other values by weights-only loading, and no file outside the
checkpoint's manifest is opened. Needs no other rank: each rank reads what its own tensors need.

`ForeignReader` reads what torch.distributed.checkpoint wrote without holdfast, through torch's own
reader: no code is run there either, but without digests wrong bytes go unnoticed.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from holdfast.caller import stop_if_left
from holdfast.errors import CheckpointError, CorruptCheckpointError, is_process_failure
from holdfast.format.dcp import SeamFileSystem, read_metadata
from holdfast.format.inventory import METADATA_NAME, list_names, names_at
from holdfast.format.layout import container_of
from holdfast.read.direct import Part, read_verified
from holdfast.read.requests import Landing, Region, UncoveredError, Wanted, regions_of, waves
from holdfast.storage.backend import Storage
from holdfast.storage.digests import FileRecord


class SafePlanner(DefaultLoadPlanner):
    """Fills a flat state; non-tensor values are loaded weights-only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(
            value, weights_only=True, map_location="cpu"
        )


class RegionPlanner(SafePlanner):
    """Gives torch's reader the targets of regions that were already planned."""

    def __init__(self, regions: Iterable[Region]) -> None:
        super().__init__()
        self._regions = [(each.to_item(), each.target) for each in regions]
        self._targets = {id(item): target for item, target in self._regions}
        self.refusal: Exception | None = None
        """What copying into a target raised: not the fault of any file."""

    @property
    def items(self) -> list[ReadItem]:
        """What to read, as torch's ReadItems."""
        return [item for item, _ in self._regions]

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._targets[id(read_item)]
        if target.device.type == "cpu" and type(target) is torch.Tensor:
            return target
        return torch.empty(target.size(), dtype=target.dtype, device="cpu")

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Copy what was read into its target; keep its error apart from errors of reading."""
        target = self._targets[id(read_item)]
        if tensor is target:
            return
        try:
            target.copy_(tensor)
        except Exception as error:
            self.refusal = error
            raise


class _SeamReader(FileSystemReader):
    def __init__(self, files: Storage, metadata: Metadata) -> None:
        super().__init__("")  # names relative to the storage
        self.fs = SeamFileSystem(files)
        self.storage_data = metadata.storage_data


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

    _unlisted: ClassVar[str] = "the manifest does not list"
    _derives_keys: ClassVar[bool] = False
    """Whether the metadata may lack the nested keys of its names."""

    @property
    def path(self) -> Path:
        """The full name of the checkpoint."""
        return Path(self.files.where())

    @classmethod
    def open(cls, files: Storage, content: bytes, records: Mapping[str, FileRecord]) -> Self:
        """Parse the content of `.metadata`.

        Raises:
            CorruptCheckpointError: it is not metadata, requires running code, or names files that
                the manifest does not list.
        """
        where = files.where(METADATA_NAME)
        try:
            metadata = read_metadata(content, derive_keys=cls._derives_keys)
        except CheckpointError:  # this torch cannot read it
            raise
        except Exception as error:  # a hostile or torn pickle can raise anything
            if is_process_failure(error):
                raise
            raise CorruptCheckpointError(where, f"cannot be read: {error}") from error
        if metadata is None:
            raise CorruptCheckpointError(where, "is not the metadata of a checkpoint")
        assert metadata.planner_data is not None
        assert metadata.storage_data is not None
        if nameless := sorted(metadata.state_dict_metadata.keys() - metadata.planner_data.keys()):
            raise CorruptCheckpointError(where, f"has no place for {nameless[0]!r}")
        for info in metadata.storage_data.values():
            relative_path = getattr(info, "relative_path", None)
            if relative_path not in records:
                raise CorruptCheckpointError(
                    where, f"names {relative_path!r}, which {cls._unlisted}"
                )
        return cls(files, metadata, records)

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

    def read_values(self) -> dict[str, Any]:
        """Return all non-tensor values by flat name, verified before they are decoded.

        Raises:
            CorruptCheckpointError: a block that holds a value does not match its digest, or a
                value requires running code.
        """
        values: dict[str, Any] = {}
        for name, content in self.read_contents(self.value_names()).items():
            try:
                values[name] = torch.load(
                    io.BytesIO(content), weights_only=True, map_location="cpu"
                )
            except Exception as error:  # torch's own message explains how to run the code anyway
                if is_process_failure(error):
                    raise
                where = str(self.path / self.place_of_value(name).relative_path)
                raise CorruptCheckpointError(where, f"{name} asks for code, or is torn") from error
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

    def read_tensors(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill plain or distributed tensors in place; names and sizes must be known to agree.

        Each block read is compared with its digest in the same pass.

        Raises:
            CorruptCheckpointError: a block does not match; the tensors hold wrong values.
        """
        self.read(self.plan(targets))

    def plan(self, targets: Mapping[str, torch.Tensor]) -> dict[str, Wanted]:
        """Return by file what has to be read to fill tensors, reading nothing; see `read_tensors`.

        Raises:
            CorruptCheckpointError: the stored chunks do not cover them.
        """
        files: dict[str, Wanted] = {}
        try:
            for region in regions_of(targets, self.metadata):
                place = self.place_of(region.chunk)
                self._sort(region, place, files.setdefault(place.relative_path, Wanted()))
        except UncoveredError as error:
            raise CorruptCheckpointError(str(self.path / METADATA_NAME), str(error)) from error
        return files

    def read(self, plan: Mapping[str, Wanted]) -> None:
        """Fill what was planned, file by file.

        Raises:
            CorruptCheckpointError: see `read_tensors`.
        """
        for name, wanted in plan.items():
            stop_if_left()
            self._read_from(name, wanted)
            self.taken[name] = self.taken.get(name, 0) + wanted.size_bytes

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
        places = [
            self.place_of(MetadataIndex(name, chunk.offsets)) for chunk in described.chunks[:1]
        ]
        return (places[0].relative_path, places[0].offset) if places else ("", 0)

    def _sort(self, region: Region, place: Any, wanted: Wanted) -> None:
        """Decide how a region is read: directly if its container allows it, otherwise by torch."""
        described = self.metadata.state_dict_metadata[region.chunk.fqn]
        assert isinstance(described, TensorStorageMetadata)
        dtype = described.properties.dtype
        container = container_of(dtype, region.chunk_size)
        if container.size_bytes != place.length:
            # For example a strided tensor: only its own pickle describes its layout.
            wanted.foreign.append((region, range(place.offset, place.offset + place.length)))
        else:
            wanted.landings.append(Landing(region, place.offset, container, dtype))

    def _read_from(self, name: str, wanted: Wanted) -> None:
        foreign = [region for region, _ in wanted.foreign]
        for wave in waves(wanted.landings):
            stop_if_left()
            parts = [part for request in wave for part in request.open()]
            self._read_parts(name, parts, [request.whole for request in wave])
            foreign += [request.region for request in wave if not request.close()]
        if foreign:
            places = [self.metadata.storage_data[each.chunk] for each in foreign]
            self._read_parts(
                name, [], [range(each.offset, each.offset + each.length) for each in places]
            )
            planner = RegionPlanner(foreign)
            self._read_through_torch(name, planner.items, planner)

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

    def _read_through_torch(
        self, name: str, items: Sequence[ReadItem], planner: SafePlanner
    ) -> None:
        """Let torch read containers.

        Raises:
            CorruptCheckpointError: it cannot, and neither this process nor a target is the cause.
        """
        reader = _SeamReader(self.files, self.metadata)
        try:
            reader.read_data(LoadPlan(list(items)), planner).wait()
        except pickle.UnpicklingError as error:
            # torch's own message explains how to run the code anyway.
            raise CorruptCheckpointError(
                str(self.path / name), "an item asks for code, or is torn"
            ) from error
        except (OSError, CheckpointError):  # already specific
            raise
        except Exception as error:  # torn archives can raise anything
            if is_process_failure(error) or error is getattr(planner, "refusal", None):
                raise
            summary = str(error).partition("\n")[0] or type(error).__name__
            raise CorruptCheckpointError(
                str(self.path / name), f"an item cannot be read: {summary}"
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

    def read_values(self) -> dict[str, Any]:
        """Return all non-tensor values by flat name."""
        values: dict[str, Any] = dict.fromkeys(self.value_names())
        planner = SafePlanner()
        planner.set_up_planner(values, self.metadata, is_coordinator=True)
        files: dict[str, list[ReadItem]] = {}
        for item in planner.finish_plan(planner.create_local_plan()).items:
            files.setdefault(self.place_of(item.storage_index).relative_path, []).append(item)
        for name, items in files.items():
            self._read_through_torch(name, items, planner)
        return values

    def _sort(self, region: Region, place: Any, wanted: Wanted) -> None:
        wanted.foreign.append((region, range(place.offset, place.offset + place.length)))

    def _read_from(self, name: str, wanted: Wanted) -> None:
        planner = RegionPlanner(region for region, _ in wanted.foreign)
        self._read_through_torch(name, planner.items, planner)
