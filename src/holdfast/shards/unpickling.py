"""The `.metadata` file of torch.distributed.checkpoint, understood without running anything in it.

Owns which types that pickle may name and what stands in for the rest. Promises that nothing is
imported and nothing runs: the few types that describe tensors are torch's own, names of
torch.distributed and of Megatron that a load never needs (the plans that Megatron-Core caches in
the file, say) become inert objects, and any other name is refused. Nested keys that a writer left
out can be derived from the flat names.
"""

from __future__ import annotations

import io
import pickle
from pathlib import PurePath
from typing import Any, Self

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

_GLOBALS = {
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
_INERT = ("torch.distributed.", "megatron.")
"""Where names come from that may stand in the file and that no load needs."""


_MEGATRON_METADATA = "MCoreMetadata"
"""Metadata with a field more, which is not looked at."""


class _Inert:
    """Takes the place of an object whose type is not looked up: holds nothing, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def __setstate__(self, _: Any) -> None:
        return

    def __setitem__(self, _: Any, __: Any) -> None:
        return

    def append(self, _: Any) -> None:
        """Drop what the pickle adds to a list."""

    def extend(self, _: Any) -> None:
        """As `append`."""

    def add(self, _: Any) -> None:
        """As `append`."""


class _MetadataUnpickler(pickle.Unpickler):
    """Finds the types of a DCP metadata file and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GLOBALS:
            return PurePath if module == "pathlib" else super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        if module.startswith("megatron.") and name == _MEGATRON_METADATA:
            return type(name, (Metadata,), {"__module__": module})
        if f"{module}.".startswith(_INERT):
            return type(name.rpartition(".")[2], (_Inert,), {"__module__": module})
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def read_metadata(content: bytes, *, derive_keys: bool = False) -> Metadata | None:
    """Return the metadata of a checkpoint, complete; None: the file holds something else.

    `derive_keys`: nested keys that the writer left out follow from the flat names.

    Raises whatever a hostile or torn pickle makes of the unpickler.
    """
    metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    if not isinstance(metadata, Metadata):
        return None
    fields = vars(metadata)
    fields.pop("all_local_plans", None)  # of the writer's ranks; large, and of no use here
    described = fields.get("state_dict_metadata")
    if not isinstance(described, dict) or not all(map(_is_described, described.items())):
        return None
    if derive_keys:
        known = fields.get("planner_data")  # None, as Megatron-Core leaves it, or incomplete
        known = known if isinstance(known, dict) else {}
        fields["planner_data"] = {name: _complete(name, known.get(name)) for name in described}
    if not all(isinstance(fields.get(each), dict) for each in ("planner_data", "storage_data")):
        return None
    if fields.get("storage_meta") is None:
        fields["storage_meta"] = StorageMeta()
    return metadata


def _is_described(entry: tuple[Any, Any]) -> bool:
    """Return whether a name stands for a tensor or a value, in torch's own words."""
    name, described = entry
    return isinstance(name, str) and isinstance(
        described, TensorStorageMetadata | BytesStorageMetadata
    )


def _complete(name: str, path: Any) -> tuple[str | int, ...]:
    """Return nested keys as a load expects them: a model's names are flat, whoever nested them."""
    if not isinstance(path, tuple) or len(path) < 2:
        return key_path_of(name)
    if path[0] == "model" and len(path) > 2 and not str(path[1]).endswith("_extra_state"):
        return ("model", ".".join(map(str, path[1:])))
    return path


def key_path_of(name: str) -> tuple[str | int, ...]:
    """Return the nested keys that a flat name of a model or an optimizer stands for.

    A parameter's own name has dots, so only the ends are cut: `model.<name>`,
    `optimizer.state.<name>.<key>`, `optimizer.param_groups.<number>.<option>`.
    """
    root, _, rest = name.partition(".")
    if root == "model" and rest:
        return ("model", rest)
    if root != "optimizer":
        return (name,)
    kind, _, rest = rest.partition(".")
    if kind == "state":
        owner, _, key = rest.rpartition(".")
        if owner and key:
            return ("optimizer", "state", owner, key)
    if kind == "param_groups":
        number, _, option = rest.partition(".")
        if number.isdecimal() and option:
            return ("optimizer", "param_groups", int(number), option)
    return (name,)
