"""Fetch blocks of a lost shard from the ranks that hold a copy, for one load.

Owns what a rank reads of each shard and from where, and the exchange that receives remote blocks
into live tensors; blocks that several ranks of a place need go through a sparse file beside their
own, removed after the load. Promises that each place fetches a block once, that when the exchange
ends every block put in place matched its digest or the load fails, that a mismatch is reported as
damage of the provider's file, and that either every rank takes part or none does. Neither chooses
nor opens a commit.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import xxhash

from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import naming
from holdfast.protocol import ShardSource
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.direct import blocks_of
from holdfast.read.reader import ShardReader
from holdfast.read.requests import Intake, Wanted
from holdfast.storage.backend import Storage
from holdfast.storage.digests import BLOCK_BYTES, FileRecord, block_count
from holdfast.storage.manifest import LOCAL
from holdfast.storage.posix import read_into
from holdfast.tiers.local.availability import Commit
from holdfast.tiers.local.elastic import Block, Index, ReadRequest, divide, merge
from holdfast.tiers.local.nvrx import ShardManager
from holdfast.tiers.local.shards import BlockSource
from holdfast.tiers.local.streams import Incoming, Outgoing, Sink


@dataclass
class Shard:
    """One shard of the commit as this rank reads it."""

    owner: int
    path: str
    """Relative to the run's directory: the file itself, or the file for its fetched blocks."""
    index: Index
    body_bytes: int
    provider: int | None
    """The rank that sends its blocks; None: the file is at this place."""

    @property
    def record(self) -> FileRecord:
        """The digests its blocks are checked against."""
        return FileRecord(self.path, self.body_bytes, "", self.index.digests)


@dataclass(frozen=True)
class MergedShards(ShardReader):
    """Read tensors and values from several shards; note damage before the error propagates."""

    fetch: PeerFetch

    @classmethod
    def of(cls, files: Storage, shards: Sequence[Shard], fetch: PeerFetch) -> Self:
        """Return the merged view of shards, some of which may be fetched from peers."""
        metadata = merge(
            [(each.path, each.index.entries(files.where(each.path))) for each in shards]
        )
        fetch.shards = shards
        return cls(files, metadata, {each.path: each.record for each in shards}, fetch)

    def read_contents(self, names: Sequence[str]) -> dict[str, Any]:
        """As its base; values of remote shards were sent by their providers."""
        places = {name: (self.place_of_value(name).relative_path, name) for name in names}
        values = self.fetch.values
        received = {name: values[each] for name, each in places.items() if each in values}
        with self._noting():
            rest = super().read_contents([each for each in names if each not in received])
        return {**rest, **received}

    def read_tensors(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors from files and from peers; a collective call, after `bring`."""
        with self._noting():
            self.fetch.fill(self, targets)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except CorruptCheckpointError as error:
            with suppress(ValueError):  # not a path under the root: a tensor's name, for instance
                path = str(Path(error.path).relative_to(self.path))
                self.fetch.manager.recovery.note_damage(path)
            raise

    def widen(self, shards: Sequence[Shard]) -> None:
        """Switch this reader to these shards."""
        wider = self.of(self.files, shards, self.fetch)
        # In place: callers keep using this reader object.
        self.metadata.state_dict_metadata = wider.metadata.state_dict_metadata
        self.metadata.planner_data = wider.metadata.planner_data
        self.metadata.storage_data = wider.metadata.storage_data
        records: Any = self.records
        records.update(wider.records)


@dataclass
class PeerFetch:
    """What this rank receives from peers for one load, and what it sends them."""

    manager: ShardManager
    commit: Commit
    shards: Sequence[Shard] = ()
    """The shards this rank reads from."""
    served: Mapping[int, str] = field(default_factory=dict)
    """The shards whose blocks this rank sends, by owner: the path of the file."""
    sizes: Mapping[int, int] = field(default_factory=dict)
    """The shards whose blocks any rank sends, by owner: the bytes of the body."""
    provided: Mapping[int, str] = field(default_factory=dict)
    """By owner: the path of the provider's file."""
    values: Mapping[tuple[str, str], bytes] = field(default_factory=dict)
    """By path and name: the values in remote shards, as their providers sent them."""
    is_empty: bool = True
    """Whether no rank reads anything from a peer; the same on every rank."""
    widen: Callable[[MergedShards], None] | None = None
    """Collective: exchange the indexes of all shards and extend the reader."""
    _plan: Mapping[str, Wanted] | None = None
    _straight: Sequence[Sequence[Block]] = ()
    """By rank: the blocks that are received straight into its tensors."""
    _has_files: bool = False

    # -- agree -----------------------------------------------------------------------------------

    def bring(
        self,
        reader: MergedShards,
        find_targets: Callable[[], Mapping[str, torch.Tensor]],
        coordinator: Coordinator,
    ) -> None:
        """Agree on who sends what to whom; fetch blocks that several ranks of a place need."""

        def find_requests() -> dict[int, ReadRequest] | None:
            try:
                self._plan = reader.plan(find_targets())
            except CorruptCheckpointError:
                if self.widen is None:
                    raise
                return None  # the shards known so far do not cover this rank's state
            return self._requests()

        requests = self._agree(find_requests, coordinator)
        if requests is None:
            assert self.widen is not None
            self.widen(reader)
            self.widen = None
            requests = self._agree(find_requests, coordinator)
        assert requests is not None
        self._straight, filed = divide(requests, self.manager.topology.places)
        if any(filed):
            self._has_files = True
            problems = coordinator.all_reduce(
                "local fetch",
                lambda: self._exchange(filed),
                lambda parts: [each for part in parts for each in part],
            )
            self._raise(problems)

    def _agree(
        self, find_requests: Callable[[], dict[int, ReadRequest] | None], coordinator: Coordinator
    ) -> Sequence[Mapping[int, ReadRequest]] | None:
        """Return the read requests of all ranks; None: some rank needs more indexes to plan."""
        if self.is_empty:  # a reduction: its result does not grow with the number of ranks
            is_covered = coordinator.all_reduce(
                "local wishes", find_requests, lambda found: None not in found
            )
            return [{} for _ in self.manager.topology.seats] if is_covered else None
        requests = coordinator.all_gather("local wishes", find_requests)
        known = [each for each in requests if each is not None]
        return known if len(known) == len(requests) else None

    def _requests(self) -> dict[int, ReadRequest]:
        """Return the blocks that this rank needs from peers, by owner."""
        assert self._plan is not None
        remote, requests = self._remote, {}
        for path, wanted in self._plan.items():
            if (shard := remote.get(path)) is not None:
                by_file = self._needs_file(wanted)
                numbers = blocks_of(wanted.containers if by_file else wanted.ranges)
                requests[shard.owner] = ReadRequest(tuple(sorted(numbers)), by_file)
        return requests

    @property
    def _remote(self) -> dict[str, Shard]:
        """By path: the shards that are fetched from a peer."""
        return {each.path: each for each in self.shards if each.provider is not None}

    def _needs_file(self, wanted: Wanted) -> bool:
        """Whether this part of a remote shard can only be read from a file."""
        return bool(wanted.foreign) or self.commit in self.manager.recovery.unusual

    # -- transfer --------------------------------------------------------------------------------

    def fill(self, reader: MergedShards, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill what was planned: from files on a thread, and at the same time from peers.

        Without an agreed plan everything is read from files.

        Raises:
            CorruptCheckpointError: a block did not match; it was not put in place.
            GroupBrokenError, OSError: a rank is gone, or a file cannot be read.
        """
        if self._plan is None:
            reader.read(reader.plan(targets))
            return
        remote = self._remote
        intakes = {
            path: Intake(wanted.landings)
            for path, wanted in self._plan.items()
            if path in remote and not self._needs_file(wanted)
        }
        rest = {path: each for path, each in self._plan.items() if path not in intakes}
        if not any(self._straight):
            reader.read(rest)
        else:
            with ThreadPoolExecutor(1, thread_name_prefix="holdfast-reader") as beside:
                reading = beside.submit(reader.read, rest)
                # Exchange even if reading files fails: other ranks wait for this one's blocks.
                problems = self._exchange(self._straight, intakes)
                reading.result()
            self._raise(problems)
        for path, intake in intakes.items():
            _take_filed(self._root / path, remote[path], intake)
            reader.taken[path] = self._plan[path].size_bytes
            if intake.unrecognised:
                self.manager.recovery.note_unusual()
                reason = "holds containers of another torch, which go through a file"
                raise CorruptCheckpointError(str(self._root / path), reason)

    @property
    def _root(self) -> Path:
        return self.manager.run.root

    def _raise(self, problems: Sequence[str]) -> None:
        if problems:
            raise CorruptCheckpointError(str(self._root), "; ".join(problems[:3]))

    def _exchange(
        self,
        shares: Sequence[Sequence[Block]],
        intakes: Mapping[str, Intake] | None = None,
    ) -> list[str]:
        """Send and receive blocks, into `intakes` or, where None, files; return the damage."""
        manager, root = self.manager, self._root
        # Every rank computes all streams from the same shares, so both ends agree.
        wanted: dict[int, list[tuple[Shard, int]]] = {}
        shards = {each.owner: each for each in self.shards}
        for owner, number in shares[manager.rank]:
            shard = shards[owner]
            assert shard.provider is not None
            wanted.setdefault(shard.provider, []).append((shard, number))
        sinks: dict[int, _BlockSink] = {}
        outgoing, incoming = [], []
        for provider, blocks in sorted(wanted.items()):
            placed = None if intakes is None else _TensorSink(blocks, intakes)
            sinks[provider] = placed or _FileSink(root, blocks)
            incoming.append(Incoming(provider, sinks[provider], placed=placed))
        with ExitStack() as opened:
            for receiver, share in enumerate(shares):
                served = [each for each in share if each[0] in self.served]
                if served and receiver != manager.rank:
                    source = BlockSource(
                        manager.run.filesystem,
                        [(root / self.served[owner], number) for owner, number in served],
                        [_block_size(self.sizes[owner], number) for owner, number in served],
                        in_memory=manager.in_memory,
                    )
                    opened.callback(source.close)
                    outgoing.append(Outgoing(receiver, source, is_cut=intakes is not None))
            for sink in sinks.values():
                opened.callback(sink.close)
            if outgoing or incoming:
                manager.repl_strategy.local_group.stream(outgoing, incoming)
        problems = []
        for transfer in incoming:
            if transfer.error is not None:
                raise transfer.error
            for owner in sinks[transfer.sender].damaged:
                path = self.provided[owner]
                manager.recovery.note_damage(path, transfer.sender)
                problems.append(f"{path} on rank {transfer.sender}: a block does not match")
        return problems

    # -- afterwards ------------------------------------------------------------------------------

    def sources(self, taken: Mapping[str, int]) -> tuple[ShardSource, ...]:
        """Return where tensors came from; `taken`: by path, the bytes read of it."""
        manager, found = self.manager, []
        for shard in self.shards:
            if not (size_bytes := taken.get(shard.path, 0)):
                continue
            path, rank = shard.path, shard.provider
            if rank is None:
                rank = manager.shards.lister(int(path.partition("/")[0]))
            else:
                path = self.provided[shard.owner]
            node = manager.topology.seats[rank].node
            where = f"{manager.run.run_id}/{path}"
            found.append(ShardSource(LOCAL, where, size_bytes, shard.owner, rank, node))
        return tuple(found)

    def return_all(self) -> None:
        """Remove the files of fetched blocks, if this is the first rank of its place."""
        mates = self.manager.topology.place_mates(self.manager.rank)
        if self.manager.rank != mates[0] or not self._has_files:
            return
        for path in self._remote:
            with suppress(FileNotFoundError):
                self.manager.run.filesystem.remove_file(self._root / path)


class _BlockSink(Sink):
    """Check received blocks against their digests; take those that match."""

    in_any_order = False

    def __init__(self, blocks: Sequence[tuple[Shard, int]]) -> None:
        self.damaged: list[int] = []
        """Owners whose blocks did not match."""
        self._blocks = blocks
        self._step = 1

    def begin(self, size_bytes: int, body_bytes: int) -> None:
        self._step = size_bytes // len(self._blocks)

    def put(self, offset: int, block: memoryview) -> None:
        shard, number = self._blocks[offset // self._step]
        content = block[: _block_size(shard.body_bytes, number)]
        if self.matches(shard, number, [content]):
            self.take(shard, number, content)

    def matches(self, shard: Shard, number: int, contents: Sequence[memoryview]) -> bool:
        digest = xxhash.xxh3_128()
        for each in contents:
            digest.update(each)
        is_sound = digest.hexdigest() == shard.index.digests[number]
        if not is_sound:
            self.damaged.append(shard.owner)
        return is_sound

    def take(self, shard: Shard, number: int, content: memoryview) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Close files."""


class _TensorSink(_BlockSink):
    """Put blocks into tensors, or receive them in place."""

    in_any_order = True

    def __init__(self, blocks: Sequence[tuple[Shard, int]], intakes: Mapping[str, Intake]) -> None:
        super().__init__(blocks)
        self._intakes = intakes
        self._pieces = [
            intakes[shard.path].pieces(number, _block_size(shard.body_bytes, number))
            for shard, number in blocks
        ]
        self.cuts = [[len(each.place) for each in pieces] for pieces in self._pieces]
        self._expected: dict[int, Sequence[memoryview]] = {}

    def expect(self, number: int, spare: memoryview) -> Sequence[memoryview]:
        shard, block = self._blocks[number]
        found = self._intakes[shard.path].expect(block, self._pieces[number], spare)
        self._expected[number] = found
        return found

    def arrived(self, number: int) -> None:
        shard, block = self._blocks[number]
        contents = self._expected.pop(number)
        if self.matches(shard, block, contents):
            self._intakes[shard.path].take_pieces(block, self._pieces[number], contents)

    def take(self, shard: Shard, number: int, content: memoryview) -> None:
        self._intakes[shard.path].take(number, content)


class _FileSink(_BlockSink):
    """Write blocks to the place's file of fetched blocks."""

    def __init__(self, root: Path, blocks: Sequence[tuple[Shard, int]]) -> None:
        super().__init__(blocks)
        self._root = root
        self._descriptors: dict[str, int] = {}

    def take(self, shard: Shard, number: int, content: memoryview) -> None:
        path = self._root / shard.path
        with naming(path):
            descriptor = self._descriptors.get(shard.path)
            if descriptor is None:
                # Other ranks of this place write other blocks of the same file.
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = self._descriptors[shard.path] = os.open(path, flags, 0o600)
            if os.pwrite(descriptor, content, number * BLOCK_BYTES) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def _take_filed(path: Path, shard: Shard, intake: Intake) -> None:
    """Read the blocks that this place fetched into a file for several of its ranks."""
    numbers = sorted(intake.blocks)
    if not numbers:
        return
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with naming(path), path.open("rb", buffering=0) as stream:
        for number in numbers:
            content = buffer[: _block_size(shard.body_bytes, number)]
            read_into(stream, number * BLOCK_BYTES, [content])
            if xxhash.xxh3_128_hexdigest(content) != shard.index.digests[number]:
                reason = f"block {number} does not match its digest any more"
                raise CorruptCheckpointError(str(path), reason)
            intake.take(number, content)


def _block_size(body_bytes: int, number: int) -> int:
    assert number < block_count(body_bytes)
    return min(BLOCK_BYTES, body_bytes - number * BLOCK_BYTES)
