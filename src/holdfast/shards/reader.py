"""The shard files of a committed checkpoint become tensors in place.

Owns the dialogue with torch.distributed.checkpoint on the way in. Promises that nothing read from
disk runs code: `.metadata` goes through an unpickler that knows the few types torch puts there,
other values through weights-only loading, and no file outside the checkpoint's manifest is opened.
Needs no other rank: each reads what its own tensors ask for.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import IOBase
from pathlib import Path, PurePath
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import Filesystem, naming
from holdfast.shards.writer import METADATA_NAME

_METADATA_GLOBALS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch._C", "Size"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "Path"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Finds the types of a DCP metadata file and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_GLOBALS:
            return PurePath if module == "pathlib" else super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class _SafePlanner(DefaultLoadPlanner):
    """Fills a flat state; values that are no tensors are loaded weights-only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _SeamFileSystem(FileSystem):
    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[IOBase]:
        assert mode == "rb"
        with naming(Path(path)), self._filesystem.open_existing(Path(path)) as stream:
            yield cast(IOBase, stream)


class _SeamReader(FileSystemReader):
    def __init__(self, path: Path, metadata: Metadata, filesystem: Filesystem) -> None:
        super().__init__(path)
        self.fs = _SeamFileSystem(filesystem)
        self.storage_data = metadata.storage_data


@dataclass(frozen=True)
class ShardReader:
    """The tensors and values of one checkpoint, by flat name."""

    path: Path
    filesystem: Filesystem
    metadata: Metadata

    @classmethod
    def open(cls, path: Path, listed_files: set[str], filesystem: Filesystem) -> ShardReader:
        """Read `.metadata`.

        Raises:
            CorruptCheckpointError: it is no metadata, asks for code, or names files that
                the manifest does not list.
        """
        where = path / METADATA_NAME
        try:
            with filesystem.open_existing(where) as stream:
                metadata = _MetadataUnpickler(stream).load()
        except Exception as error:  # a hostile or torn pickle can raise anything
            raise CorruptCheckpointError(str(where), f"cannot be read: {error}") from error
        if not isinstance(metadata, Metadata):
            raise CorruptCheckpointError(str(where), "is not the metadata of a checkpoint")
        parts = (metadata.state_dict_metadata, metadata.planner_data, metadata.storage_data)
        if not all(isinstance(each, dict) for each in parts):
            raise CorruptCheckpointError(str(where), "is not the metadata of a checkpoint")
        if nameless := sorted(metadata.state_dict_metadata.keys() - metadata.planner_data.keys()):
            raise CorruptCheckpointError(str(where), f"has no place for {nameless[0]!r}")
        for info in metadata.storage_data.values():
            relative_path = getattr(info, "relative_path", None)
            if relative_path not in listed_files:
                raise CorruptCheckpointError(
                    str(where), f"names {relative_path!r}, which the manifest does not list"
                )
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return cls(path, filesystem, metadata)

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return the description of every tensor by flat name."""
        return {
            name: each
            for name, each in self.metadata.state_dict_metadata.items()
            if isinstance(each, TensorStorageMetadata)
        }

    def value_names(self) -> list[str]:
        """Return the flat names of everything that is no tensor."""
        return [
            name
            for name, each in self.metadata.state_dict_metadata.items()
            if isinstance(each, BytesStorageMetadata)
        ]

    def key_path(self, name: str) -> tuple[str | int, ...]:
        """Return the nested keys that a flat name stands for."""
        path: tuple[str | int, ...] = self.metadata.planner_data[name]
        return path

    def read_values(self) -> dict[str, Any]:
        """Return everything that is no tensor, by flat name."""
        return self._read(dict.fromkeys(self.value_names()))

    def read_tensors(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors, plain or distributed, in place; names and sizes must be known to agree."""
        self._read(dict(targets))

    def _read(self, state: dict[str, Any]) -> dict[str, Any]:
        planner = _SafePlanner()
        planner.set_up_planner(state, self.metadata, is_coordinator=True)
        plan = planner.finish_plan(planner.create_local_plan())
        reader = _SeamReader(self.path, self.metadata, self.filesystem)
        try:
            reader.read_data(plan, planner).wait()
        except pickle.UnpicklingError as error:
            # What torch says instead is how to run the code after all.
            raise CorruptCheckpointError(
                str(self.path), "an item of the shards asks for code, or is torn"
            ) from error
        return state
