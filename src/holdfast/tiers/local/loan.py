"""Blocks of shards that lie at no file of this place, borrowed from peers for one load.

Owns what a rank reads of each shard and from where, and the exchange that brings remote blocks into
files beside its own, sparse and gone when the load is over. Promises that each place fetches a
block once, that a block which arrives matched its digest or is told as damage of its provider's
file, and that every rank takes part or none. Chooses no commit and opens none.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from holdfast.coordination import Coordinator
from holdfast.digests import BLOCK_BYTES, FileRecord, block_count
from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import Filesystem, naming, read_into
from holdfast.shards.reader import ShardReader
from holdfast.tiers.local.elastic import Index, deal
from holdfast.tiers.local.engine import ShardManager
from holdfast.tiers.local.replication import Incoming, Outgoing


@dataclass(frozen=True)
class MergedShards(ShardReader):
    """Reads tensors and values out of several shard files; damage is noted on its way out."""

    note: Callable[[str], None]
    """Told the path, relative to the run's directory, of a file that is damaged."""

    def read_values(self) -> dict[str, Any]:
        """As its base."""
        with self._noting():
            return super().read_values()

    def read_tensors(self, targets: Mapping[str, torch.Tensor]) -> None:
        """As its base."""
        with self._noting():
            super().read_tensors(targets)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except CorruptCheckpointError as error:
            with suppress(ValueError):  # a path of another kind: of a tensor's name, say
                self.note(str(Path(error.path).relative_to(self.path)))
            raise

    def blocks_of(self, targets: Mapping[str, Any]) -> dict[str, set[int]]:
        """Return which blocks of which files reading these names touches."""
        found: dict[str, set[int]] = {}
        _, plan = self._plan(dict(targets))
        for path, items in self._by_file(plan.items).items():
            numbers = found.setdefault(path, set())
            for item in items:
                place = self.metadata.storage_data[item.storage_index]
                if place.length:
                    last = (place.offset + place.length - 1) // BLOCK_BYTES
                    numbers.update(range(place.offset // BLOCK_BYTES, last + 1))
        return found


@dataclass
class Shard:
    """One shard of the commit as this rank reads it."""

    owner: int
    path: str
    """Relative to the run's directory: of the file itself, or of what is borrowed of it."""
    index: Index
    body_bytes: int
    provider: int | None
    """Who sends its blocks; None: it lies here."""

    @property
    def record(self) -> FileRecord:
        """The digests its blocks are held against."""
        return FileRecord(self.path, self.body_bytes, "", self.index.digests)


@dataclass
class Loan:
    """The blocks of remote shards that are borrowed for one load."""

    manager: ShardManager
    shards: Sequence[Shard] = ()
    sources: Mapping[int, str] = field(default_factory=dict)
    """By owner whose blocks this rank sends: the path of its file."""
    is_empty: bool = True
    """Whether no rank needs anything from afar, as all have agreed."""
    provided_path: Mapping[int, str] = field(default_factory=dict)
    """By owner: the path of the file at its provider."""
    _brought: dict[int, set[int]] = field(default_factory=dict)

    def bring(
        self, reader: MergedShards, targets: Mapping[str, Any], coordinator: Coordinator
    ) -> None:
        """Fetch what reading these names needs, once for each place."""
        if self.is_empty:
            return
        by_path = {each.path: each for each in self.shards if each.provider is not None}

        def wish() -> dict[int, list[int]]:
            touched = reader.blocks_of(targets)
            wishes = {}
            for path, shard in by_path.items():
                new = touched.get(path, set()) - self._brought.get(shard.owner, set())
                if new:
                    wishes[shard.owner] = sorted(new)
            return wishes

        wishes = coordinator.together("local wishes", wish)
        if not any(wishes):
            return
        rank, places = self.manager.rank, self.manager.topology.places
        shares = deal(wishes, places)
        problems = coordinator.settle(
            "local fetch",
            lambda: self._exchange(shares),
            lambda parts: [each for part in parts for each in part],
        )
        if problems:
            raise CorruptCheckpointError(str(self.manager.run.root), "; ".join(problems[:3]))
        for mate in range(len(places)):
            if places[mate] == places[rank]:
                for owner, number in shares[mate]:
                    self._brought.setdefault(owner, set()).add(number)

    def _exchange(self, shares: Sequence[Sequence[tuple[int, int]]]) -> list[str]:
        """Send and receive blocks; return what arrived damaged."""
        manager = self.manager
        own_rank, root = manager.rank, manager.run.root
        group = manager.repl_strategy.local_group
        shards = {each.owner: each for each in self.shards}
        # Everybody computes everybody's streams from the same shares, so both ends agree.
        outgoing, sources = [], []
        for receiver, share in enumerate(shares):
            blocks = [each for each in share if each[0] in self.sources]
            if blocks and receiver != own_rank:
                mine = [(root / self.sources[owner], number) for owner, number in blocks]
                sizes = [_block_size(shards[owner].body_bytes, number) for owner, number in blocks]
                sources.append(_BlockSource(manager.run.filesystem, mine, sizes))
                outgoing.append(Outgoing(receiver, sources[-1]))
        incoming = []
        wanted: dict[int, list[tuple[Shard, int]]] = {}
        for owner, number in shares[own_rank]:
            shard = shards[owner]
            assert shard.provider is not None
            wanted.setdefault(shard.provider, []).append((shard, number))
        sinks = {provider: _BlockSink(root, blocks) for provider, blocks in wanted.items()}
        incoming = [Incoming(provider, sink) for provider, sink in sorted(sinks.items())]
        try:
            group.stream(outgoing, incoming)
        finally:
            for each in sinks.values():
                each.close()
        problems = []
        for transfer in incoming:
            if transfer.error is not None:
                raise transfer.error
            for owner in sinks[transfer.sender].damaged:
                path = self.provided_path[owner]
                manager.recovery.note_damage(path, transfer.sender)
                problems.append(f"{path} on rank {transfer.sender}: a block does not match")
        return problems

    def return_all(self) -> None:
        """Remove what was borrowed, if this rank leads its place."""
        mates = self.manager.topology.place_mates(self.manager.rank)
        if self.manager.rank != mates[0]:
            return
        for each in self.shards:
            if each.provider is not None:
                with suppress(FileNotFoundError):
                    self.manager.run.filesystem.remove_file(self.manager.run.root / each.path)


class _BlockSource:
    """Blocks of several files, one a message; the last of a file is filled up."""

    def __init__(
        self, filesystem: Filesystem, blocks: Sequence[tuple[Path, int]], sizes: Sequence[int]
    ) -> None:
        self.body_bytes = 0
        self.block_bytes = max(sizes)
        self.size_bytes = self.block_bytes * len(blocks)
        self._filesystem = filesystem
        self._blocks = blocks

    def view(self, offset: int, length: int) -> memoryview | None:
        return None

    def read_into(self, offset: int, target: memoryview) -> None:
        path, number = self._blocks[offset // self.block_bytes]
        with naming(path), self._filesystem.open_existing(path) as stream:
            read_into(stream, number * BLOCK_BYTES, [target])


class _BlockSink:
    """Writes blocks that match their digests to where they are borrowed."""

    def __init__(self, root: Path, blocks: Sequence[tuple[Shard, int]]) -> None:
        self.damaged: list[int] = []
        """Owners whose blocks did not match."""
        self._root = root
        self._blocks = blocks
        self._step = 1
        self._descriptors: dict[str, int] = {}

    def begin(self, size_bytes: int, body_bytes: int) -> None:
        self._step = size_bytes // len(self._blocks)

    def put(self, offset: int, block: memoryview) -> None:
        shard, number = self._blocks[offset // self._step]
        content = block[: _block_size(shard.body_bytes, number)]
        if xxhash.xxh3_128_hexdigest(content) != shard.index.digests[number]:
            self.damaged.append(shard.owner)
            return
        path = self._root / shard.path
        with naming(path):
            descriptor = self._descriptors.get(shard.path)
            if descriptor is None:
                # Others at this place write other blocks of the same file.
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = self._descriptors[shard.path] = os.open(path, flags, 0o600)
            if os.pwrite(descriptor, content, number * BLOCK_BYTES) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def _block_size(body_bytes: int, number: int) -> int:
    assert number < block_count(body_bytes)
    return min(BLOCK_BYTES, body_bytes - number * BLOCK_BYTES)
