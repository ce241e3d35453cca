"""Names and `.metadata` as torch.distributed.checkpoint has them, and its reader on our storage.

Owns the flat names of nested state, equal to those that DCP gives it. Owns writing the pickle of
`.metadata` for a decision (the same bytes for the same decision), reading it without running code
from it, and the read-only adapter through which torch's own reader reaches storage. Only the few
types that describe tensors are unpickled as torch's own; names of torch.distributed and of Megatron
that a load never needs (such as the plans that Megatron-Core caches in the file) become inert
objects, and any other name is refused. Nested keys that a writer left out are derived from the flat
names.
"""

from __future__ import annotations

import errno
import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import IOBase
from itertools import pairwise
from pathlib import PurePath
from typing import Any, Self, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from holdfast.blame import is_process_failure
from holdfast.errors import CheckpointError, CorruptCheckpointError
from holdfast.format.plan import Decision, shard_name
from holdfast.storage.backend import Storage, open_stream
from holdfast.torch_internals import EXTRA_STATE, PICKLED, StorageInfo

KeyPath = tuple[str | int, ...]
"""Nested keys: strings for mappings, integers for lists."""


def flatten(nested: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, KeyPath]]:
    """Return the leaves of nested state and their nested keys, by the flat names that DCP gives.

    Raises:
        ValueError: two leaves have the same name.
    """
    leaves: dict[str, Any] = {}
    paths: dict[str, KeyPath] = {}

    def add(path: KeyPath, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, each in value.items():
                add((*path, str(key)), each)
        elif isinstance(value, list) and not is_leaf(value):
            for position, each in enumerate(value):
                add((*path, position), each)
        else:
            name = ".".join(map(str, path))
            if name in leaves:
                raise ValueError(f"duplicated flatten key {name}")
            leaves[name] = value
            paths[name] = path

    add((), nested)
    return leaves, paths


def is_leaf(value: Any) -> bool:
    """Whether DCP does not flatten a value: no mapping, and no list with tensors or mappings."""
    if isinstance(value, list):
        return all(is_leaf(each) and not isinstance(each, torch.Tensor) for each in value)
    return not isinstance(value, Mapping)


def put(nested: dict[str, Any], path: Sequence[Any], value: Any) -> None:
    """Put a value where its nested keys say, making the mappings and lists on the way."""
    container: Any = nested
    for key, following in pairwise(path):
        if isinstance(container, list):
            container += [None] * (key + 1 - len(container))
        if key not in container if isinstance(container, dict) else container[key] is None:
            container[key] = [] if isinstance(following, int) else {}
        container = container[key]
    if isinstance(container, list):
        container += [None] * (path[-1] + 1 - len(container))
    container[path[-1]] = value


def encode_metadata(decision: Decision) -> bytes:
    """Return `.metadata` as stock torch reads it; the same bytes for the same proposals.

    A large job has an entry per rank and tensor, so the objects that torch would pickle are never
    created: their pickle is assembled from parts. A test compares it with the pickled objects.
    """
    catalogue, written = decision.catalogue, decision.written
    pickled = _Pickled()
    names = [pickled.text(name) for name in catalogue.numbers]
    files = [pickled.text(shard_name(rank)) for rank in range(len(decision.shares))]
    a_chunk = pickled.template(ChunkStorageMetadata, "offsets", "sizes")
    a_place = pickled.template(StorageInfo, "relative_path", "offset", "length")
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
    table = {kind: number for number, kind in enumerate(dict.fromkeys(catalogue.kinds))}
    fields[KINDS] = _plain(([*table], [table[kind] for kind in catalogue.kinds]))
    fields[PER_RANK] = _dictionary(
        [
            part
            for name, own in zip(names, catalogue.per_rank, strict=True)
            if own
            for part in (name, pickle.NONE)
        ]
    )
    return pickled.finish(pickled.template(Metadata, *fields) % tuple(fields.values()))


KINDS, PER_RANK = "kinds", "per_rank"
"""Attributes of the metadata that torch ignores: a table of kinds and the number of each name's
kind in the order of the names; and the names of which every rank has its own copy."""


class _Pickled:
    """Builder of a protocol 3 pickle; repeated objects are memoized first and then referenced."""

    def __init__(self) -> None:
        self._front: list[bytes] = [pickle.PROTO + b"\x03"]
        self._references: dict[Any, bytes] = {}
        self._sizes: dict[tuple[int, ...], bytes] = {}

    def finish(self, whole: bytes) -> bytes:
        """Return the complete pickle: the memoized objects, then the given object."""
        return b"".join((*self._front, whole, pickle.STOP))

    def text(self, text: str) -> bytes:
        return self._references.get(text) or self._refer(text, _plain(text))

    def path(self, path: KeyPath) -> bytes:
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
    """Return the pickle of one value, without protocol header, stop opcode and memo."""
    return pickletools.optimize(pickle.dumps(value, protocol=3))[2:-1]


def _integer(number: int) -> bytes:
    return pickle.dumps(number, protocol=3)[2:-1]


def _dictionary(parts: Sequence[bytes]) -> bytes:
    return b"".join((pickle.EMPTY_DICT, pickle.MARK, *parts, pickle.SETITEMS))


_KNOWN: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", each.__name__): each
        for each in (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )
    },
    **{("pathlib", name): PurePath for name in ("Path", "PosixPath", "PurePosixPath")},
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    **PICKLED,
}
"""What a name in the file stands for."""
_INERT = ("torch.distributed.", "megatron.")
"""Modules whose names may occur in the file though no load needs them."""


_MEGATRON_METADATA = "MCoreMetadata"
"""A subclass of Metadata with an additional field, which is ignored."""


class _Inert:
    """Replaces an object whose type is not imported: holds nothing, does nothing."""

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
    """Resolves the types of a DCP metadata file and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        if module.startswith("megatron.") and name == _MEGATRON_METADATA:
            return type(name, (Metadata,), {"__module__": module})
        if f"{module}.".startswith(_INERT):
            return type(name.rpartition(".")[2], (_Inert,), {"__module__": module})
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def read_metadata(content: bytes, *, derive_keys: bool = False) -> Metadata | None:
    """Return the complete metadata of a checkpoint; None: the file holds something else.

    `derive_keys`: derive nested keys that the writer left out from the flat names.

    A hostile or torn pickle can make the unpickler raise any exception.
    """
    metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    if not isinstance(metadata, Metadata):
        return None
    fields = vars(metadata)
    if not _is_recorded(fields):
        return None
    fields.pop("all_local_plans", None)  # the writer's plans: large and not needed here
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


def _is_recorded(fields: Mapping[str, Any]) -> bool:
    """Return whether kinds and names per rank, where there are any, are what we write."""
    names, per_rank = fields.get("state_dict_metadata"), fields.get(PER_RANK, {})
    kinds, numbers = fields.get(KINDS, ((), ()))
    return (
        isinstance(names, dict)
        and isinstance(per_rank, dict)
        and per_rank.keys() <= names.keys()
        and all(type(kind) is str for kind in kinds)
        and (not numbers or len(numbers) == len(names))
        and all(type(number) is int and 0 <= number < len(kinds) for number in numbers)
    )


def kinds_of(metadata: Metadata) -> dict[str, str]:
    """Return the recorded kind of each name, where one was recorded."""
    kinds, numbers = vars(metadata).get(KINDS, ((), ()))
    named = zip(metadata.state_dict_metadata, numbers, strict=False)
    return {name: kinds[number] for name, number in named if kinds[number]}


def per_rank_names(metadata: Metadata) -> frozenset[str]:
    """Return the names of which every rank has saved its own copy."""
    return frozenset(vars(metadata).get(PER_RANK, ()))


def _is_described(entry: tuple[Any, Any]) -> bool:
    """Return whether a name maps to torch's description of a tensor or a value."""
    name, described = entry
    return isinstance(name, str) and isinstance(
        described, TensorStorageMetadata | BytesStorageMetadata
    )


def _complete(name: str, path: Any) -> KeyPath:
    """Return nested keys as a load expects them: model names flat even if saved nested."""
    if not isinstance(path, tuple) or len(path) < 2:
        return key_path_of(name)
    if path[0] == "model" and len(path) > 2 and not str(path[1]).endswith(EXTRA_STATE):
        return ("model", ".".join(map(str, path[1:])))
    return path


def key_path_of(name: str) -> KeyPath:
    """Return the nested keys of a flat model or optimizer name.

    A parameter's own name contains dots, so the name is split only at its ends: `model.<name>`,
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


class _FileSystem(FileSystem):
    """Exactly the file system methods that torch's reader calls; paths are names in a storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[IOBase]:
        if mode != "rb":
            raise OSError(errno.EROFS, "only for reading", self._storage.where(str(path)))
        with open_stream(self._storage, str(path)) as stream:
            yield cast(IOBase, stream)

    def exists(self, path: Any) -> bool:
        try:
            self._storage.size_bytes(str(path))
        except FileNotFoundError:
            return False
        return True


class _Reader(FileSystemReader):
    def __init__(self, files: Storage, metadata: Metadata) -> None:
        super().__init__("")  # names relative to the storage
        self.fs = _FileSystem(files)
        self.storage_data = metadata.storage_data


class _Planner(DefaultLoadPlanner):
    """What torch's reader is to read, and where to."""

    items: Sequence[ReadItem] = ()
    refusal: Exception | None = None
    """What copying into a target raised: not the fault of any file."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)


class ValuePlanner(_Planner):
    """Reads values that are not tensors, weights-only, into `values`."""

    def __init__(self, names: Iterable[str], metadata: Metadata) -> None:
        super().__init__()
        self.values: dict[str, Any] = dict.fromkeys(names)
        self.set_up_planner(self.values, metadata, is_coordinator=True)
        self.items = self.finish_plan(self.create_local_plan()).items

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.values[read_item.dest_index.fqn] = torch.load(
            value, weights_only=True, map_location="cpu"
        )


class TensorPlanner(_Planner):
    """Reads parts of stored tensors, each into the target given with it."""

    def __init__(self, wanted: Sequence[tuple[ReadItem, torch.Tensor]]) -> None:
        super().__init__()
        self.items = [item for item, _ in wanted]
        self._targets = {id(item): target for item, target in wanted}

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


def read_through_torch(
    files: Storage,
    name: str,
    metadata: Metadata,
    planner: ValuePlanner | TensorPlanner,
    items: Sequence[ReadItem],
) -> None:
    """Let torch read items of the planner, which are in one file, from their containers.

    Raises:
        CorruptCheckpointError: it cannot, and neither this process nor a target is the cause.
    """
    try:
        _Reader(files, metadata).read_data(LoadPlan(list(items)), planner).wait()
    except pickle.UnpicklingError as error:
        # torch's own message explains how to run the code anyway.
        raise CorruptCheckpointError(
            files.where(name), "an item asks for code, or is torn"
        ) from error
    except (OSError, CheckpointError):  # already specific
        raise
    except Exception as error:  # torn archives can raise anything
        if is_process_failure(error) or error is planner.refusal:
            raise
        summary = str(error).partition("\n")[0] or type(error).__name__
        raise CorruptCheckpointError(
            files.where(name), f"an item cannot be read: {summary}"
        ) from error
