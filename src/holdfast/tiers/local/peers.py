"""Fetch blocks of a lost shard from the ranks that hold a copy, for one load.

Owns the division of remote blocks among the ranks that fetch them, and the exchange that receives
them into live tensors; blocks that several ranks of a place need go through a sparse file beside
their own, removed after the load. Promises that each place fetches a block once, that when the
exchange ends every block put in place matched its digest or the load fails, that a mismatch is
reported as damage of the provider's file, and that either every rank takes part or none does.
Neither chooses nor opens a commit.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import SharedFile
from holdfast.protocol import ShardSource
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.direct import Part, blocks_of, read_verified
from holdfast.read.index import Index
from holdfast.read.reader import ShardReader
from holdfast.read.requests import FileRequests, Intake, Target
from holdfast.storage.backend import ObjectReader, Storage
from holdfast.storage.digests import BLOCK_BYTES, FileRecord, block_count, matches
from holdfast.storage.manifest import LOCAL
from holdfast.tiers.local.availability import Availability
from holdfast.tiers.local.commits import Copy
from holdfast.tiers.local.exchange import Incoming, Outgoing, Sink
from holdfast.tiers.local.shard_file import CommitKey
from holdfast.tiers.local.shards import ShardDirectory

Block = tuple[int, int]
"""Owner of the shard, and number in its file."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ, which Python's mmap does not name: map pages now."""


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


@dataclass
class PeerFetch:
    """What this rank receives from peers for one load, and what it sends them."""

    available: Availability
    commit: CommitKey
    shards: Sequence[Shard] = ()
    """The shards this rank reads from."""
    providers: Mapping[int, Copy] = field(default_factory=dict)
    """By owner: the file that blocks of its shard are sent from, by the rank that lists it."""
    sizes: Mapping[int, int] = field(default_factory=dict)
    """The shards whose blocks any rank sends, by owner: the bytes of the body."""
    values: Mapping[tuple[str, str], bytes] = field(default_factory=dict)
    """By path and name: the values in remote shards, as their providers sent them."""
    is_empty: bool = True
    """Whether no rank reads anything from a peer; the same on every rank."""
    widen: Callable[[ShardReader], None] | None = None
    """Collective: exchange the indexes of all shards and extend the reader."""
    _plan: Mapping[str, FileRequests] | None = None
    _straight: Sequence[Sequence[Block]] = ()
    """By rank: the blocks that are received straight into its tensors."""
    _has_files: bool = False

    # -- agree -----------------------------------------------------------------------------------

    def bring(
        self,
        reader: ShardReader,
        find_targets: Callable[[], Mapping[str, Target]],
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
        self._straight, filed = divide(requests, self._files.topology.places)
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
            return [{} for _ in self._files.topology.seats] if is_covered else None
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

    def _needs_file(self, wanted: FileRequests) -> bool:
        """Whether this part of a remote shard can only be read from a file."""
        return bool(wanted.through_torch) or self.commit in self.available.unusual

    # -- transfer --------------------------------------------------------------------------------

    def fill(self, reader: ShardReader, targets: Mapping[str, Target]) -> None:
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
            path: Intake(wanted.direct)
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
            self._take_filed(remote[path], intake)
            reader.taken[path] = self._plan[path].size_bytes
            if intake.unrecognised:
                self.available.note_unusual()
                reason = "holds containers of another torch, which go through a file"
                raise CorruptCheckpointError(str(self._root / path), reason)

    def _take_filed(self, shard: Shard, intake: Intake) -> None:
        """Read the blocks that this place fetched into a file for several of its ranks."""
        buffer = memoryview(bytearray(BLOCK_BYTES))
        for number in sorted(intake.blocks):
            content = buffer[: _block_size(shard.body_bytes, number)]
            part = Part(number * BLOCK_BYTES, content)
            read_verified(self._files.run.storage, shard.path, shard.record, [part])
            intake.take(number, content)

    @property
    def _files(self) -> ShardDirectory:
        return self.available.files

    @property
    def _root(self) -> Path:
        return self._files.run.root

    def _raise(self, problems: Sequence[str]) -> None:
        if problems:
            raise CorruptCheckpointError(str(self._root), "; ".join(problems[:3]))

    def _exchange(
        self,
        shares: Sequence[Sequence[Block]],
        intakes: Mapping[str, Intake] | None = None,
    ) -> list[str]:
        """Send and receive blocks, into `intakes` or, where None, files; return the damage."""
        files, root = self._files, self._root
        # Every rank computes all streams from the same shares, so both ends agree.
        wanted: dict[int, list[tuple[Shard, int]]] = {}
        shards = {each.owner: each for each in self.shards}
        for owner, number in shares[files.rank]:
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
                served = [each for each in share if self.providers[each[0]].rank == files.rank]
                if served and receiver != files.rank:
                    source = BlockSource(
                        files.run.storage,
                        [(self.providers[owner].path, number) for owner, number in served],
                        [_block_size(self.sizes[owner], number) for owner, number in served],
                        in_memory=files.in_memory,
                    )
                    opened.callback(source.close)
                    outgoing.append(Outgoing(receiver, source, is_cut=intakes is not None))
            for sink in sinks.values():
                opened.callback(sink.close)
            if outgoing or incoming:
                assert self.available.replication is not None
                self.available.replication.wide.stream(outgoing, incoming)
        problems = []
        for transfer in incoming:
            if transfer.error is not None:
                raise transfer.error
            for owner in sinks[transfer.sender].damaged:
                path = self.providers[owner].path
                self.available.note_damage(path, transfer.sender)
                problems.append(f"{path} on rank {transfer.sender}: a block does not match")
        return problems

    # -- afterwards ------------------------------------------------------------------------------

    def sources(self, taken: Mapping[str, int]) -> tuple[ShardSource, ...]:
        """Return where tensors came from; `taken`: by path, the bytes read of it."""
        files, found = self._files, []
        for shard in self.shards:
            if not (size_bytes := taken.get(shard.path, 0)):
                continue
            path, rank = shard.path, shard.provider
            if rank is None:
                rank = files.lister(int(path.partition("/")[0]))
            else:
                path = self.providers[shard.owner].path
            node = files.topology.seats[rank].node
            where = f"{files.run.run_id}/{path}"
            found.append(ShardSource(LOCAL, where, size_bytes, shard.owner, rank, node))
        return tuple(found)

    def return_all(self) -> None:
        """Remove the files of fetched blocks, if this is the first rank of its place."""
        mates = self._files.topology.place_mates(self._files.rank)
        if self._files.rank != mates[0] or not self._has_files:
            return
        for path in self._remote:
            with suppress(FileNotFoundError):
                self._files.run.filesystem.remove_file(self._root / path)


class BlockSource:
    """Blocks of several files, one per message; the last block of a file is padded.

    Files in RAM are sent from their mapping, whose pages a thread populates a little ahead, since
    that takes most of the time. Files on a disk are not mapped: a block that cannot be read must be
    an error, not a signal.
    """

    def __init__(
        self,
        files: Storage,
        blocks: Sequence[tuple[str, int]],
        sizes: Sequence[int],
        *,
        in_memory: bool = False,
    ) -> None:
        """`blocks`: the name of the file, and the number in it."""
        self.body_bytes = 0
        self.block_bytes = max(sizes)
        self.size_bytes = self.block_bytes * len(blocks)
        self._files = files
        self._blocks = blocks
        self._opened = ExitStack()
        self._sources: dict[str, ObjectReader] = {}
        self._mapped: dict[str, memoryview] = {}
        self._is_over = False
        self._ahead: threading.Thread | None = None
        if in_memory:
            with suppress(OSError, ValueError):  # gone, or empty: the later read reports it
                for name in {name for name, _ in blocks}:
                    self._mapped[name] = self._source(name).map()
                self._ahead = threading.Thread(target=self._map_ahead, name="holdfast-mapper")
                self._ahead.start()

    def view(self, offset: int, length: int) -> memoryview | None:
        """Return a block of a file in RAM; None: it must be read."""
        name, number = self._blocks[offset // self.block_bytes]
        start = number * BLOCK_BYTES
        mapped = self._mapped.get(name)
        if mapped is None or start + length > len(mapped):
            return None
        return mapped[start : start + length]

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read a block."""
        name, number = self._blocks[offset // self.block_bytes]
        self._source(name).get_into(number * BLOCK_BYTES, [target])

    def close(self) -> None:
        """End the thread and close every file."""
        self._is_over = True
        if self._ahead is not None:
            self._ahead.join()
        self._mapped.clear()
        self._opened.close()

    def _source(self, name: str) -> ObjectReader:
        if name not in self._sources:
            self._sources[name] = self._opened.enter_context(self._files.open(name))
        return self._sources[name]

    def _map_ahead(self) -> None:
        for name, number in self._blocks:
            start, mapped = number * BLOCK_BYTES, self._mapped[name]
            length = min(BLOCK_BYTES, len(mapped) - start)
            if self._is_over or length <= 0:
                return
            if isinstance(mapped.obj, mmap.mmap):
                with suppress(OSError):  # an older kernel maps pages when they are sent
                    mapped.obj.madvise(_POPULATE_READ, start, length)


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
        is_sound = matches(contents, shard.index.digests[number])
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
        self._files: dict[str, SharedFile] = {}

    def take(self, shard: Shard, number: int, content: memoryview) -> None:
        if shard.path not in self._files:
            # Other ranks of this place write other blocks of the same file.
            self._files[shard.path] = SharedFile(self._root / shard.path)
        self._files[shard.path].write_at(number * BLOCK_BYTES, content)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _block_size(body_bytes: int, number: int) -> int:
    assert number < block_count(body_bytes)
    return min(BLOCK_BYTES, body_bytes - number * BLOCK_BYTES)


@dataclass(frozen=True)
class ReadRequest:
    """The blocks that a rank needs of a shard that is not at its place."""

    numbers: tuple[int, ...]
    """Block numbers, in order."""
    by_file: bool = False
    """Whether the rank must read them from a file."""


def divide(
    requests: Sequence[Mapping[int, ReadRequest]], places: Sequence[int]
) -> tuple[list[list[Block]], list[list[Block]]]:
    """Divide blocks to fetch so that each place receives each block once.

    `requests`: by rank and owner. Return by rank the blocks sent straight to the only rank of a
    place that needs them, and the blocks it fetches into a file for all ranks of its place.
    """
    straight: list[list[Block]] = [[] for _ in requests]
    filed: list[list[Block]] = [[] for _ in requests]
    for place in sorted(set(places)):
        ranks = [rank for rank, each in enumerate(places) if each == place]
        wanting: dict[Block, list[int]] = {}
        by_file: set[Block] = set()
        for rank in ranks:
            for owner, request in requests[rank].items():
                for number in request.numbers:
                    wanting.setdefault((owner, number), []).append(rank)
                    if request.by_file:
                        by_file.add((owner, number))
        shared = []
        for block, those in sorted(wanting.items()):
            if len(those) == 1 and block not in by_file:
                straight[those[0]].append(block)
            else:
                shared.append(block)
        # Contiguous runs, not every n-th block: blocks are then read and sent in file order.
        size = -(-len(shared) // len(ranks))
        for position, rank in enumerate(ranks):
            filed[rank] = shared[position * size : (position + 1) * size]
    return straight, filed
