"""The names of a checkpoint, which every rank of a load learns from files that are read once.

Owns what each rank reads for all: the index of its own shard where as many ranks load as saved;
otherwise the first rank of each node reads `.metadata`, and every rank its share of the shards'
indexes. Owns what is sent: one table of all names, the values and the smallest tensors that are the
same for all, and the records of the files that a rank is to read. Promises that what is sent
matched its digest where it was read, and that names do not take more as more ranks share a tensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from holdfast.errors import CorruptCheckpointError
from holdfast.format.dcp import per_rank_names
from holdfast.format.layout import Entry
from holdfast.format.merging import (
    add_chunks,
    files_in,
    merge_shards,
    outline,
    pack,
    prefer_own_copies,
    split,
    unite,
    unpack,
)
from holdfast.format.plan import shard_name
from holdfast.format.values import EMPTY, is_united
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.gathered import (
    Copies,
    Lookup,
    decode_copies,
    join_copies,
    pick_records,
    read_together,
    share_of_shards,
)
from holdfast.read.index import read_index
from holdfast.read.reader import ShardReader
from holdfast.read.requests import bytes_of
from holdfast.storage.backend import Storage, opened_once
from holdfast.storage.digests import FileRecord, pack_records, unpack_records
from holdfast.storage.manifest import MANIFEST_NAME
from holdfast.storage.store import Checkpoint

_SENT_BYTES = 64
"""Tensors up to this size, such as the steps of an optimizer, are sent with their names: or every
rank would open a file for each."""

T = TypeVar("T")

_Described = tuple[Sequence[bytes], dict[str, bytes], Copies]
"""Outlines, packed; what is sent to all, by name; and copies to unite."""


@dataclass
class SharedNames:
    """What every rank learns of a checkpoint's names, from files that are read once or per node.

    Where as many ranks load as saved, each reads the index of its own shard; otherwise the first
    rank of each node reads `.metadata`. Values and the smallest tensors that are the same for all
    are read by one rank and sent.
    """

    checkpoint: Checkpoint
    """On rank 0 its manifest lists every file."""
    files: Storage
    coordinator: Coordinator
    lookup: Lookup
    model_only: bool = False
    """Whether nothing but the model is needed: other values are left unread."""
    _own: list[Entry] = field(default_factory=list)
    """What this rank's own shard holds, if it is one of those that saved."""
    _table: bytes = b""
    _names: list[str] = field(default_factory=list)
    _told: Mapping[int, bytes] = field(default_factory=dict)
    """By the number of a name: what is sent to all."""
    _known: dict[str, FileRecord] = field(default_factory=dict)
    _copies: Copies = ()

    def learn(self, read_first: Callable[[], T]) -> T:
        """Exchange names with all ranks; return what `read_first` did, which rank 0 alone calls.

        Raises:
            CorruptCheckpointError: on every rank, naming what is damaged.
        """
        if not self._are_same_ranks:
            self.lookup.agree_on_readers(self.coordinator)
        describe = self._describe_own if self._are_same_ranks else self._describe_all

        def read() -> tuple[_Described, T | None]:
            first = read_first() if self.coordinator.rank == 0 else None
            return describe(), first

        self._table, self._told, records, self._copies, first = read_together(
            "names", read, self.checkpoint, self.coordinator, self._join
        )
        self._known = {each.path: each for each in unpack_records(records)}
        if (own := self._records.get(self._own_file)) is not None:
            self._known[own.path] = own
        return first  # type: ignore[no-any-return]  # what `read_first` has returned

    def reader(self) -> ShardReader:
        """Return a reader that knows what this rank was told, and what its own shard holds.

        Raises:
            CorruptCheckpointError: ranks have copies of their own, and this one's is not listed.
        """
        metadata = unpack(self._table)
        self._names = list(metadata.state_dict_metadata)
        reader = ShardReader(self.files, metadata, self._known)
        if self._are_same_ranks:
            if per_rank_names(metadata) and self._own_file not in self._known:
                where = self.files.where(MANIFEST_NAME)
                raise CorruptCheckpointError(where, f"does not list {self._own_file}")
            reader.own_names.update(prefer_own_copies(metadata, self._own_file, self._own))
            shared = [each for each in self._own if not each.per_rank]
            add_chunks(metadata, merge_shards([(0, self._own_file, shared)]))
        tensors = reader.tensors()
        for number, content in self._told.items():
            if (described := tensors.get(self._names[number])) is not None:
                chunk = MetadataIndex(self._names[number], (0,) * len(described.size))
                reader.sent[chunk] = content
        return reader

    def values(self, reader: ShardReader) -> dict[str, Any]:
        """Return all values by name, for what `reader` returned; this rank's own are read here.

        Raises:
            CorruptCheckpointError: one is damaged, or requires running code.
        """
        told = {self._names[number]: each for number, each in self._told.items()}
        wanted = names_of_model(reader) if self.model_only else reader.value_names()
        unsent = [each for each in wanted if each not in told or each in reader.own_names]
        found = reader.read_contents(unsent)
        found |= {each: zlib.decompress(told[each]) for each in wanted if each not in found}
        return reader.decode({each: found[each] for each in wanted})

    def copies(self) -> dict[str, list[Any]] | None:
        """Return the distinct copies of what is to be united; None: this rank's own may suffice.

        Raises:
            CorruptCheckpointError: one requires running code, or is torn.
        """
        return None if self._are_same_ranks else decode_copies(self._copies, self.files.where())

    @property
    def _are_same_ranks(self) -> bool:
        return self.coordinator.world_size == self.checkpoint.manifest.world_size

    @property
    def _own_file(self) -> str:
        return shard_name(self.coordinator.rank)

    @cached_property
    def _records(self) -> dict[str, FileRecord]:
        return {each.path: each for each in self.checkpoint.manifest.files}

    def _describe_own(self) -> _Described:
        """Return the outline of this rank's own shard, and what it sends to all."""
        self.lookup.own = merge_shards([])
        if (record := self._records.get(self._own_file)) is None:
            return [], {}, []
        rank = self.coordinator.rank
        self._own, contents, _ = self._read_shard(rank, record, is_canonical=False)
        self.lookup.own = merge_shards([(rank, self._own_file, self._own)])
        return [pack(each) for each in split(self.lookup.own)], contents, []

    def _describe_all(self) -> _Described:
        """Read `.metadata` where this rank does, and its share of the shards.

        Return on rank 0 the outline of all, and what is sent of these shards.
        """
        metadata = self.lookup.read(self.coordinator.rank)
        contents: dict[str, bytes] = {}
        copies: list[Copies] = []
        for rank, record in share_of_shards(self.checkpoint, self.coordinator).items():
            _, found, united = self._read_shard(rank, record, is_canonical=rank == 0)
            contents |= found
            copies.append(united)
        is_first = metadata is not None and self.coordinator.rank == 0
        outlines = [pack(outline(metadata))] if metadata is not None and is_first else []
        return outlines, contents, join_copies(copies)

    def _read_shard(
        self, rank: int, record: FileRecord, *, is_canonical: bool
    ) -> tuple[list[Entry], dict[str, bytes], Copies]:
        """Open a shard once; return its items, what is sent of it to all, and copies to unite.

        `is_canonical`: whether its copies are what other numbers of ranks are told.
        """
        name = record.path
        with opened_once(self.files, name) as files:
            entries = read_index(files, name, record).entries(files.where(name))
            reader = ShardReader(files, merge_shards([(rank, name, entries)]), {name: record})
            own = reader.per_rank_names
            contents = self._read_shared(reader, () if is_canonical else own)
            if self._are_same_ranks or self.model_only:
                return entries, contents, []
            united = reader.read_contents([each for each in own if is_united(each)])
        return entries, contents, [(rank, each, bytes(united[each])) for each in united]

    def _read_shared(self, reader: ShardReader, leave_out: Collection[str]) -> dict[str, bytes]:
        """Return the values of a shard, compressed, and the bytes of its smallest tensors."""
        tensors: dict[str, torch.Tensor] = {}
        for name, described in reader.tensors().items():
            if name in leave_out or (self.model_only and not _is_of_model(reader, name)):
                continue
            dtype, size = described.properties.dtype, described.size
            if 0 < prod(size) * dtype.itemsize <= _SENT_BYTES and reader.is_direct(name):
                tensors[name] = torch.empty(size, dtype=dtype, device="cpu")
        wanted = names_of_model(reader) if self.model_only else reader.value_names()
        contents = reader.read_contents([each for each in wanted if each not in leave_out])
        reader.read_tensors(tensors)
        found = {name: zlib.compress(each, 1) for name, each in contents.items()}
        flat: Any
        for name, tensor in tensors.items():
            flat = bytes_of(tensor)
            found[name] = flat.numpy().tobytes()
        return found

    def _join(
        self, found: Sequence[tuple[_Described, Any]]
    ) -> tuple[bytes, dict[int, bytes], bytes, Copies, Any]:
        """Return on rank 0 what every rank is told: names, what is sent, records of files."""
        described, first = [each for each, _ in found], found[0][1]
        # Most ranks say the same of what is stored in parts.
        parts = dict.fromkeys(each for outlines, _, _ in described for each in outlines)
        where = str(self.checkpoint.path)
        try:
            united = unite(map(unpack, parts))
        except ValueError as error:
            raise CorruptCheckpointError(where, str(error)) from error
        contents = {name: each for _, sent, _ in described for name, each in sent.items()}
        numbers = {name: number for number, name in enumerate(united.state_dict_metadata)}
        told = {numbers[name]: each for name, each in contents.items() if name in numbers}
        copies = join_copies([each for _, _, each in described])
        pick_records(files_in(united), self._records, where)
        records = pick_records(files_in(united, contents), self._records, where)
        return pack(united), told, pack_records(records), copies, first


def names_of_model(reader: ShardReader) -> list[str]:
    """Return the names of the values that a model needs: its own, and which mappings are empty."""
    return [each for each in reader.value_names() if each == EMPTY or _is_of_model(reader, each)]


def _is_of_model(reader: ShardReader, name: str) -> bool:
    return reader.key_path(name)[0] == "model"
