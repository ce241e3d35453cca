"""Blocks of shards that lie at no file of this place, borrowed from peers for one load.

Owns what a rank reads of each shard and from where, and the exchange that brings remote blocks into
live tensors; what several ranks of a place want goes through a file beside their own, sparse and
gone when the load is over. Promises that each place fetches a block once, that every block which is
put in place matched its digest when the exchange ends, or the load is told so, that a block which
does not is told as damage of its provider's file, and that every rank takes part or none. Chooses
no commit and opens none.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
import xxhash

from holdfast.errors import CorruptCheckpointError
from holdfast.protocol import ShardSource
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.direct import blocks_of
from holdfast.read.reader import ShardReader
from holdfast.read.requests import Intake, Wanted
from holdfast.storage.digests import BLOCK_BYTES, FileRecord, block_count
from holdfast.storage.manifest import LOCAL
from holdfast.storage.posix import Filesystem, naming, read_into
from holdfast.tiers.local.availability import Commit
from holdfast.tiers.local.elastic import Block, Index, ReadRequest, divide, merge
from holdfast.tiers.local.exchange import Incoming, Outgoing, Sink
from holdfast.tiers.local.nvrx import ShardManager

_POPULATE_READ = 22
"""MADV_POPULATE_READ, which Python's mmap does not name: map pages now."""


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


@dataclass(frozen=True)
class MergedShards(ShardReader):
    """Reads tensors and values out of several shards; damage is noted on its way out."""

    loan: PeerFetch

    @classmethod
    def of(
        cls, root: Path, filesystem: Filesystem, shards: Sequence[Shard], loan: PeerFetch
    ) -> Self:
        """Return the merged view of shards, of which some may be borrowed."""
        metadata = merge(
            [(each.path, each.index.entries(str(root / each.path))) for each in shards]
        )
        loan.shards = shards
        return cls(root, filesystem, metadata, {each.path: each.record for each in shards}, loan)

    def read_contents(self, names: Sequence[str]) -> dict[str, Any]:
        """As its base; what lies elsewhere was told."""
        told = {
            name: content
            for name in names
            if (content := self.loan.values.get((self._path_of(name), name))) is not None
        }
        with self._noting():
            return {**super().read_contents([each for each in names if each not in told]), **told}

    def _path_of(self, name: str) -> str:
        path: str = self.place_of_value(name).relative_path
        return path

    def read_tensors(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors from files and from peers; together with every other rank, after `bring`."""
        with self._noting():
            self.loan.fill(self, targets)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except CorruptCheckpointError as error:
            with suppress(ValueError):  # a path of another kind: of a tensor's name, say
                path = str(Path(error.path).relative_to(self.path))
                self.loan.manager.recovery.note_damage(path)
            raise

    def widen(self, shards: Sequence[Shard]) -> None:
        """Read from these shards from now on."""
        wider = self.of(self.path, self.filesystem, shards, self.loan)
        # In place: whoever holds this reader goes on with it.
        self.metadata.state_dict_metadata = wider.metadata.state_dict_metadata
        self.metadata.planner_data = wider.metadata.planner_data
        self.metadata.storage_data = wider.metadata.storage_data
        records: Any = self.records
        records.update(wider.records)


@dataclass
class PeerFetch:
    """What is borrowed for one load, and what this rank lends."""

    manager: ShardManager
    commit: Commit
    shards: Sequence[Shard] = ()
    """What this rank reads from."""
    lent: Mapping[int, str] = field(default_factory=dict)
    """By owner whose blocks this rank sends: the path of its file."""
    sizes: Mapping[int, int] = field(default_factory=dict)
    """By owner whose blocks are sent by anybody: the bytes of the body."""
    provided: Mapping[int, str] = field(default_factory=dict)
    """By owner: the path of the file at its provider."""
    values: Mapping[tuple[str, str], bytes] = field(default_factory=dict)
    """By path and name: the values in shards that lie elsewhere, as their providers told them."""
    is_empty: bool = True
    """Whether no rank reads anything from afar, as all know."""
    widen: Callable[[MergedShards], None] | None = None
    """Finds out, together with every other rank, what all other shards hold."""
    _plan: Mapping[str, Wanted] | None = None
    _straight: Sequence[Sequence[Block]] = ()
    """By rank: the blocks that go from their provider into its tensors."""
    _has_files: bool = False

    # -- agree -----------------------------------------------------------------------------------

    def bring(
        self,
        reader: MergedShards,
        find_targets: Callable[[], Mapping[str, torch.Tensor]],
        coordinator: Coordinator,
    ) -> None:
        """Agree on who sends what to whom; fetch into files what several ranks of a place want."""

        def wish() -> dict[int, ReadRequest] | None:
            try:
                self._plan = reader.plan(find_targets())
            except CorruptCheckpointError:
                if self.widen is None:
                    raise
                return None  # what is known so far of shards does not cover what is live here
            return self._wishes()

        wishes = self._agree(wish, coordinator)
        if wishes is None:
            assert self.widen is not None
            self.widen(reader)
            self.widen = None
            wishes = self._agree(wish, coordinator)
        assert wishes is not None
        places = self.manager.topology.places
        self._straight, filed = divide(wishes, places)
        if any(filed):
            self._has_files = True
            problems = coordinator.all_reduce(
                "local fetch",
                lambda: self._exchange(filed),
                lambda parts: [each for part in parts for each in part],
            )
            self._raise(problems)

    def _agree(
        self, wish: Callable[[], dict[int, ReadRequest] | None], coordinator: Coordinator
    ) -> Sequence[Mapping[int, ReadRequest]] | None:
        """Return the wishes of all ranks; None: some rank does not know enough."""
        if self.is_empty:  # what each rank is told does not grow with their number
            is_covered = coordinator.all_reduce(
                "local wishes", wish, lambda found: None not in found
            )
            return [{} for _ in self.manager.topology.seats] if is_covered else None
        wishes = coordinator.all_gather("local wishes", wish)
        known = [each for each in wishes if each is not None]
        return known if len(known) == len(wishes) else None

    def _wishes(self) -> dict[int, ReadRequest]:
        """Return the blocks that this rank needs from afar, by owner."""
        assert self._plan is not None
        by_path = {each.path: each for each in self.shards if each.provider is not None}
        is_unusual = self.commit in self.manager.recovery.unusual
        wishes = {}
        for path, wanted in self._plan.items():
            if (shard := by_path.get(path)) is None:
                continue
            by_file = is_unusual or bool(wanted.foreign)
            numbers = blocks_of(wanted.containers if by_file else wanted.ranges)
            wishes[shard.owner] = ReadRequest(tuple(sorted(numbers)), by_file)
        return wishes

    # -- carry out -------------------------------------------------------------------------------

    def fill(self, reader: MergedShards, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill what was planned: from files on a thread, and meanwhile from peers.

        Without a plan, since nobody has agreed on any: all of it from files.

        Raises:
            CorruptCheckpointError: a block did not match; it was not put in place.
            GroupBrokenError, OSError: a rank is gone, or a file cannot be read.
        """
        if self._plan is None:
            reader.read(reader.plan(targets))
            return
        remote = {each.path: each for each in self.shards if each.provider is not None}
        intakes = {
            path: Intake(wanted.landings)
            for path, wanted in self._plan.items()
            if path in remote and not wanted.foreign and self.commit not in self._unusual
        }
        rest = {path: each for path, each in self._plan.items() if path not in intakes}
        if not any(self._straight):
            reader.read(rest)
        else:
            with ThreadPoolExecutor(1, thread_name_prefix="holdfast-reader") as beside:
                reading = beside.submit(reader.read, rest)
                # Whatever happens to the files here: other ranks wait for this one's blocks.
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

    @property
    def _unusual(self) -> set[Commit]:
        return self.manager.recovery.unusual

    def _raise(self, problems: Sequence[str]) -> None:
        if problems:
            raise CorruptCheckpointError(str(self._root), "; ".join(problems[:3]))

    def _exchange(
        self,
        shares: Sequence[Sequence[Block]],
        intakes: Mapping[str, Intake] | None = None,
    ) -> list[str]:
        """Send and receive blocks, into tensors or, without any, files; return what is damaged."""
        manager = self.manager
        own_rank, root = manager.rank, self._root
        outgoing, incoming = [], []
        # Everybody computes everybody's streams from the same shares, so both ends agree.
        wanted: dict[int, list[tuple[Shard, int]]] = {}
        shards = {each.owner: each for each in self.shards}
        for owner, number in shares[own_rank]:
            shard = shards[owner]
            assert shard.provider is not None
            wanted.setdefault(shard.provider, []).append((shard, number))
        sinks: dict[int, _BlockSink] = {
            provider: _FileSink(root, blocks) if intakes is None else _TensorSink(blocks, intakes)
            for provider, blocks in wanted.items()
        }
        incoming = [
            Incoming(provider, sink, placed=sink if isinstance(sink, _TensorSink) else None)
            for provider, sink in sorted(sinks.items())
        ]
        with ExitStack() as opened:
            for receiver, share in enumerate(shares):
                blocks = [each for each in share if each[0] in self.lent]
                if blocks and receiver != own_rank:
                    mine = [(root / self.lent[owner], number) for owner, number in blocks]
                    sizes = [_block_size(self.sizes[owner], number) for owner, number in blocks]
                    source = _BlockSource(
                        manager.run.filesystem, mine, sizes, in_memory=manager.in_memory
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
        """Return where tensors came from; `taken`: by path, what was read of it."""
        manager, found = self.manager, []
        for shard in self.shards:
            size_bytes = taken.get(shard.path, 0)
            if not size_bytes:
                continue
            path, rank = shard.path, shard.provider
            if rank is None:
                rank = manager.shelf.lister(int(path.partition("/")[0]))
            else:
                path = self.provided[shard.owner]
            node = manager.topology.seats[rank].node
            where = f"{manager.run.run_id}/{path}"
            found.append(ShardSource(LOCAL, where, size_bytes, shard.owner, rank, node))
        return tuple(found)

    def return_all(self) -> None:
        """Remove what was borrowed by file, if this rank leads its place."""
        mates = self.manager.topology.place_mates(self.manager.rank)
        if self.manager.rank != mates[0] or not self._has_files:
            return
        for each in self.shards:
            if each.provider is not None:
                with suppress(FileNotFoundError):
                    self.manager.run.filesystem.remove_file(self._root / each.path)


class _BlockSource:
    """Blocks of several files, one a message; the last of a file is filled up.

    Files in RAM are sent from where they lie, and mapped a little ahead on a thread: that is where
    the time goes. On a disk a block that cannot be read must be an error, and not a signal.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        blocks: Sequence[tuple[Path, int]],
        sizes: Sequence[int],
        *,
        in_memory: bool = False,
    ) -> None:
        self.body_bytes = 0
        self.block_bytes = max(sizes)
        self.size_bytes = self.block_bytes * len(blocks)
        self._filesystem = filesystem
        self._blocks = blocks
        self._streams: dict[Path, BinaryIO] = {}
        self._mapped: dict[Path, mmap.mmap] = {}
        self._is_over = False
        self._ahead: threading.Thread | None = None
        if in_memory:
            with suppress(OSError, ValueError):  # gone, or empty: told by whoever reads it
                for path in {path for path, _ in blocks}:
                    descriptor = self._stream(path).fileno()
                    # Private, since torch wants memory that may be written; nobody does.
                    self._mapped[path] = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE)
                self._ahead = threading.Thread(target=self._map_ahead, name="holdfast-mapper")
                self._ahead.start()

    def view(self, offset: int, length: int) -> memoryview | None:
        path, number = self._blocks[offset // self.block_bytes]
        start = number * BLOCK_BYTES
        mapped = self._mapped.get(path)
        if mapped is None or start + length > len(mapped):
            return None
        return memoryview(mapped)[start : start + length]

    def read_into(self, offset: int, target: memoryview) -> None:
        path, number = self._blocks[offset // self.block_bytes]
        with naming(path):
            read_into(self._stream(path), number * BLOCK_BYTES, [target])

    def close(self) -> None:
        self._is_over = True
        if self._ahead is not None:
            self._ahead.join()
        self._mapped.clear()
        for stream in self._streams.values():
            stream.close()

    def _stream(self, path: Path) -> BinaryIO:
        if path not in self._streams:
            self._streams[path] = self._filesystem.open_existing(path)
        return self._streams[path]

    def _map_ahead(self) -> None:
        for path, number in self._blocks:
            start, mapped = number * BLOCK_BYTES, self._mapped[path]
            length = min(BLOCK_BYTES, len(mapped) - start)
            if self._is_over or length <= 0:
                return
            with suppress(OSError):  # an older kernel maps them when they are sent
                mapped.madvise(_POPULATE_READ, start, length)


class _BlockSink(Sink):
    """Takes blocks that match their digests."""

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
        """Let go of files."""


class _TensorSink(_BlockSink):
    """Puts blocks where they belong, or has them arrive there."""

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
    """Writes blocks to where they are borrowed."""

    def __init__(self, root: Path, blocks: Sequence[tuple[Shard, int]]) -> None:
        super().__init__(blocks)
        self._root = root
        self._descriptors: dict[str, int] = {}

    def take(self, shard: Shard, number: int, content: memoryview) -> None:
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


def _take_filed(path: Path, shard: Shard, intake: Intake) -> None:
    """Take in what came by a file, for several ranks of this place."""
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
