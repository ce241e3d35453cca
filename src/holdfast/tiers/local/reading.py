"""Open a local commit: one view of shards that are here, at peers, or partly at both.

Owns the steps between an agreed commit and readable tensors: which files are read from where, and
which ranks describe remote shards to the others. Promises that a job whose nodes still hold what
they held at the save communicates no index at all; that otherwise only shards missing from some
node are described, as long as these suffice; that damage is noted, so that the next availability
check counts the file as missing; and that ranks agree before and after every exchange.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from holdfast import __version__
from holdfast.errors import CorruptCheckpointError
from holdfast.format.merging import merge_shards
from holdfast.format.values import is_united, split_small
from holdfast.protocol import ShardSource
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.gathered import decode_copies, join_copies
from holdfast.read.index import Index, read_index
from holdfast.read.reader import ShardReader
from holdfast.read.requests import Target
from holdfast.snapshot.copies import find_differing
from holdfast.storage.backend import PENDING_MARK, Storage
from holdfast.storage.manifest import LOCAL, Manifest
from holdfast.storage.store import Checkpoint
from holdfast.tiers.local.availability import Availability
from holdfast.tiers.local.commits import Candidate, Copy
from holdfast.tiers.local.peers import PeerFetch, Shard
from holdfast.tiers.local.shard_file import Trailer
from holdfast.tiers.tier import Contents, check_counters

S = TypeVar("S")
T = TypeVar("T")

_COUNT = struct.Struct("<Q")


@dataclass(frozen=True)
class MergedShards(ShardReader):
    """Read tensors and values from several shards; note damage before the error propagates."""

    fetch: PeerFetch
    own: int | None
    """The rank whose copies are read of what is per rank; None: those of the lowest rank."""

    @classmethod
    def of(cls, files: Storage, shards: Sequence[Shard], fetch: PeerFetch, own: int | None) -> Self:
        """Return the merged view of shards, some of which may be fetched from peers."""
        opened = [
            (each.owner, each.path, each.index.entries(files.where(each.path))) for each in shards
        ]
        fetch.shards = shards
        records = {each.path: each.record for each in shards}
        reader = cls(files, merge_shards(opened, own), records, fetch, own)
        reader.own_names.update(
            entry.name
            for owner, _, entries in opened
            for entry in entries
            if owner == own and entry.per_rank
        )
        return reader

    def read_contents(self, names: Sequence[str]) -> dict[str, Any]:
        """As its base; values of remote shards were sent by their providers."""
        places = {name: (self.place_of_value(name).relative_path, name) for name in names}
        values = self.fetch.values
        received = {name: values[each] for name, each in places.items() if each in values}
        with self._noting():
            rest = super().read_contents([each for each in names if each not in received])
        return {**rest, **received}

    def read_tensors(self, targets: Mapping[str, Target]) -> None:
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
                self.fetch.available.note_damage(path)
            raise

    def widen(self, shards: Sequence[Shard]) -> None:
        """Switch this reader to these shards."""
        wider = self.of(self.files, shards, self.fetch, self.own)
        # In place: callers keep using this reader object.
        vars(self.metadata).update(vars(wider.metadata))
        vars(self).pop("_kinds", None)
        self.own_names.update(wider.own_names)
        records: Any = self.records
        records.update(wider.records)


@dataclass(frozen=True)
class LocalContents(Contents):
    """The contents of a local commit, with the interface of a persistent checkpoint's."""

    fetch: PeerFetch

    @property
    def is_shared(self) -> bool:
        """Each node reads its own files."""
        return False

    def bring(
        self, find_targets: Callable[[], Mapping[str, Target]], coordinator: Coordinator
    ) -> None:
        """Agree on the blocks that `read_tensors` gets from peers; a collective call.

        Raises:
            CorruptCheckpointError: on every rank: a copy was damaged; find a commit again.
            StageFailedError: they could not be written, or a rank is gone.
        """
        assert isinstance(self.reader, MergedShards)
        self.fetch.bring(self.reader, find_targets, coordinator)

    def sources(self) -> tuple[ShardSource, ...]:
        """As its base."""
        return self.fetch.sources(self.reader.taken)


@dataclass(frozen=True)
class _Description:
    """What the rank that holds a shard sent about it."""

    index: Index
    body_bytes: int
    counters: bytes
    values: Mapping[str, bytes]
    copies: Mapping[str, str]
    """Digests of what is per rank."""


@dataclass
class Opening:
    """The state of one rank while a commit is opened."""

    available: Availability
    candidate: Candidate
    coordinator: Coordinator

    def run(self, suffices: Callable[[Contents], bool] | None) -> LocalContents:
        """Open it, a collective call; see `LocalTier.open`."""
        self._files = self.available.files
        self._here = self._find_here()
        self._providers = _choose_providers(self.candidate)
        nodes, topology = self.candidate.record.nodes, self._files.topology
        # Where ranks are placed as they were, each node still holds all that its ranks saved.
        if self.candidate.record.world_size == topology.world_size:
            shards, held = _members(nodes), self._held_by_place()
            remote = {
                owner
                for place, node in set(zip(topology.places, nodes, strict=True))
                for owner in shards[node] - held[place]
            }
            if remote <= self._providers.keys():
                own = sorted(shards[nodes[self._files.rank]])
                if (contents := self._open_own_node(own, remote, suffices)) is not None:
                    return contents
        return self._open_anywhere()

    def _find_here(self) -> dict[int, str]:
        """Return by owner the file of each shard at this place, preferring the own directory."""
        places, rank = self._files.topology.places, self._files.rank
        found = {}
        for owner, copies in enumerate(self.candidate.usable):
            paths = [each.path for each in copies if places[each.rank] == places[rank]]
            if paths:
                found[owner] = min(paths, key=lambda path: (int(path.split("/")[0]) != rank, path))
        return found

    def _held_by_place(self) -> dict[int, set[int]]:
        """Return by place the owners whose shard it has."""
        places = self._files.topology.places
        held: dict[int, set[int]] = {place: set() for place in places}
        for owner, copies in enumerate(self.candidate.usable):
            for each in copies:
                held[places[each.rank]].add(owner)
        return held

    def _open_own_node(
        self,
        own: Sequence[int],
        remote: Collection[int],
        suffices: Callable[[Contents], bool] | None,
    ) -> LocalContents | None:
        """Open the shards that this rank's node held; None, on every rank: not sufficient.

        `remote`: shards lost at the place of some rank, described by the rank that has a copy.
        """
        opened: list[LocalContents] = []
        rank, record = self._files.rank, self.candidate.record
        shards: dict[int, Shard] = {}

        def read() -> None:
            for owner in own:
                if owner in self._here:
                    shards[owner] = self._shard(owner, self._here[owner])

        def join(described: Mapping[int, _Description]) -> bool:
            if rank in self._here:
                counters = self._trailer_of(self._here[rank]).parts["train_state"]
            else:
                counters = described[rank].counters
            fetch = self._make_fetch(described, is_empty=not remote)
            fetch.widen = self._widen
            for owner in own:
                if owner not in shards:
                    shards[owner] = self._remote_shard(owner, described[owner])
            reader = self._reader([shards[each] for each in own], fetch)
            if len(reader.metadata.state_dict_metadata) != record.state_names:
                return False
            contents = self._contents(reader, counters, {}, fetch)
            if suffices is not None and not suffices(contents):
                return False
            opened.append(contents)
            return True

        def read_and_join() -> bool:
            read()
            return join({})

        if not remote:
            is_enough = self.coordinator.all_reduce("local index", read_and_join, all)
        else:
            is_enough = self._exchange("local index", remote, read, join, all)
        return opened[0] if is_enough else None

    def _trailer_of(self, path: str) -> Trailer:
        with self.available.noting(path):
            try:
                return self._files.run.read_trailer(path)
            except FileNotFoundError as error:
                raise CorruptCheckpointError(path, "is missing") from error

    def _shard(self, owner: int, path: str) -> Shard:
        trailer = self._trailer_of(path)
        run = self._files.run
        with self.available.noting(path):
            index = read_index(run.storage, path, trailer.record.image_record(path))
        return Shard(owner, path, index, trailer.record.body_bytes, None)

    def _remote_shard(self, owner: int, described: _Description) -> Shard:
        leader = self._files.topology.place_mates(self._files.rank)[0]
        mark = zlib.crc32(repr(self.candidate.commit).encode())
        path = f"{leader}/borrowed_{owner}{PENDING_MARK}{mark:08x}"
        return Shard(
            owner, path, described.index, described.body_bytes, self._providers[owner].rank
        )

    def _open_anywhere(self) -> LocalContents:
        """Open with the index of every shard, sent to all ranks by the shard's provider."""
        described = self._describe_all()
        opened: list[LocalContents] = []

        def read() -> None:
            copies = join_copies(
                [
                    [
                        (owner, name, content)
                        for name, content in each.values.items()
                        if is_united(name)
                    ]
                    for owner, each in described.items()
                ]
            )
            fetch = self._make_fetch(described, is_empty=len(self._files.topology.seats) == 1)
            reader = self._reader(self._shards_of(described), fetch)
            united = decode_copies(copies, str(self._files.run.root))
            counters = described[min(described)].counters
            differing = find_differing([each.copies for each in described.values()])
            opened.append(self._contents(reader, counters, united, fetch, differing))

        self.coordinator.all_reduce("local values", read, lambda _: None)
        return opened[0]

    def _widen(self, reader: ShardReader) -> None:
        """Extend a reader of the own node's shards to all shards."""
        assert isinstance(reader, MergedShards)
        described = self._describe_all()
        wider = self._make_fetch(described, is_empty=len(self._files.topology.seats) == 1)
        fetch = reader.fetch
        fetch.sizes, fetch.is_empty = wider.sizes, wider.is_empty
        self.coordinator.all_reduce(
            "local widen", lambda: reader.widen(self._shards_of(described)), lambda _: None
        )

    def _describe_all(self) -> dict[int, _Description]:
        owners = range(len(self.candidate.copies))
        shared: list[dict[int, _Description]] = []
        self._exchange("local describe", owners, lambda: None, shared.append, lambda _: None)
        return shared[0]

    def _exchange(
        self,
        stage: str,
        owners: Collection[int],
        prepare: Callable[[], None],
        use: Callable[[dict[int, _Description]], S],
        judge: Callable[[list[S]], T],
    ) -> T:
        """Send each rank what the providers of these shards describe; return what all make of it.

        `stage`: in which each rank prepares and describes what it provides.
        """
        descriptions: list[bytes] = []

        def describe() -> int:
            prepare()
            descriptions.append(self._describe(owners))
            return len(descriptions[0])

        if self.available.replication is not None:
            self.available.replication.connect_all(self.coordinator)
        sizes = self.coordinator.all_gather(stage, describe)
        return self.coordinator.all_reduce(
            "local share", lambda: use(self._share(descriptions[0], sizes)), judge
        )

    def _shards_of(self, described: Mapping[int, _Description]) -> list[Shard]:
        """Return each shard as this rank reads it: own directory, this place, then peers."""
        shards = []
        for owner, each in described.items():
            here = self._here.get(owner)
            if here is None:
                shards.append(self._remote_shard(owner, each))
            else:
                shards.append(Shard(owner, here, each.index, each.body_bytes, None))
        own = f"{self._files.rank}/"
        shards.sort(
            key=lambda each: (each.provider is not None, not each.path.startswith(own), each.owner)
        )
        return shards

    def _make_fetch(self, described: Mapping[int, _Description], *, is_empty: bool) -> PeerFetch:
        return PeerFetch(
            self.available,
            self.candidate.commit,
            providers=self._providers,
            sizes={owner: each.body_bytes for owner, each in described.items()},
            values={
                (self._remote_shard(owner, each).path, name): content
                for owner, each in described.items()
                if owner not in self._here
                for name, content in each.values.items()
            },
            is_empty=is_empty,
        )

    def _describe(self, owners: Collection[int]) -> bytes:
        """Return what this rank provides of these shards: index, values and small states."""
        described: list[bytes] = []
        run = self._files.run
        for owner, provider in self._providers.items():
            if owner not in owners or provider.rank != self._files.rank:
                continue
            path = provider.path
            trailer = self._trailer_of(path)
            shard = self._shard(owner, path)
            index, records = shard.index, {path: shard.record}
            head: dict[str, Any] = {"owner": owner, "copies": trailer.record.copies or {}}
            head |= {"body_bytes": shard.body_bytes, "offset": index.offset}
            digests = bytes.fromhex("".join(index.digests))
            with self.available.noting(path):
                entries = index.entries(run.storage.where(path))
                metadata = merge_shards([(owner, path, entries)])
                reader = ShardReader(run.storage, metadata, records)
                found = reader.read_contents(reader.value_names())
            pairs = [(name.encode(), value) for name, value in found.items()]
            values = _pack([frame for pair in pairs for frame in pair])
            counters = trailer.parts["train_state"]
            frames = [json.dumps(head).encode(), index.content, digests, values, counters]
            described.append(_pack(frames))
        return zlib.compress(_pack(described), 1)

    def _share(self, content: bytes, sizes: Sequence[int]) -> dict[int, _Description]:
        """Exchange the descriptions of all ranks; return them by owner."""
        contents = [content]
        if len(sizes) > 1:
            assert self.available.replication is not None
            contents = self.available.replication.wide.share(content, sizes)
        described = {}
        for each in contents:
            for packed in _unpack(zlib.decompress(each)):
                head, index, digests, values, counters = _unpack(packed)
                facts = json.loads(head)
                blocks = tuple(digests[at : at + 16].hex() for at in range(0, len(digests), 16))
                found = Index(index, facts["offset"], blocks)
                frames = _unpack(values)
                named = {
                    name.decode(): value
                    for name, value in zip(frames[::2], frames[1::2], strict=True)
                }
                described[facts["owner"]] = _Description(
                    found, facts["body_bytes"], counters, named, facts["copies"]
                )
        return dict(sorted(described.items()))

    def _reader(self, shards: Sequence[Shard], fetch: PeerFetch) -> MergedShards:
        is_same_world = self.candidate.record.world_size == self._files.topology.world_size
        own = self._files.rank if is_same_world else None
        return MergedShards.of(self._files.run.storage, shards, fetch, own)

    def _contents(
        self,
        reader: MergedShards,
        content: bytes,
        copies: Mapping[str, Sequence[Any]],
        fetch: PeerFetch,
        differing: tuple[str, ...] | None = None,
    ) -> LocalContents:
        record = self.candidate.record
        where = f"{self._files.run.root}, iteration {record.iteration}"
        counters = check_counters(content, record.iteration, where)
        manifest = Manifest(
            run_id=record.run_id,
            attempt=record.attempt,
            sequence=record.sequence,
            iteration=record.iteration,
            tier=LOCAL,
            world_size=record.world_size,
            saved_at="",
            files=(),
            written_by=f"holdfast {__version__}",
            differing=differing,
        )
        checkpoint = Checkpoint(self._files.run.root, manifest)
        values, small = split_small(reader.read_values())
        here = self._here.get(self._files.rank) or next(iter(self._here.values()), None)
        return LocalContents(
            checkpoint,
            reader,
            values,
            small,
            counters,
            copies,
            fetch,
            # A rank whose node has no file gets it from the others, if it is asked for.
            run_config=self._trailer_of(here).parts["run_config"] if here else b"",
        )


def _members(nodes: Sequence[int]) -> dict[int, set[int]]:
    """Return the ranks of each node."""
    members: dict[int, set[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, set()).add(rank)
    return members


def _choose_providers(candidate: Candidate) -> dict[int, Copy]:
    """Return for each available shard the copy that is described and sent."""
    loads: dict[int, int] = {}
    chosen = {}
    for owner, copies in enumerate(candidate.usable):
        if copies:
            best = min(copies, key=lambda each: (loads.get(each.rank, 0), each.rank, each.path))
            loads[best.rank] = loads.get(best.rank, 0) + 1
            chosen[owner] = best
    return chosen


def _pack(frames: Sequence[bytes]) -> bytes:
    return b"".join(part for frame in frames for part in (_COUNT.pack(len(frame)), frame))


def _unpack(content: bytes) -> list[bytes]:
    frames = []
    position = 0
    while position < len(content):
        (length,) = _COUNT.unpack_from(content, position)
        position += _COUNT.size
        frames.append(content[position : position + length])
        position += length
    return frames
