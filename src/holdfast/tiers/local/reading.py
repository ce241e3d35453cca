"""A local commit, opened: one view of shards that lie here, at peers, or partly at both.

Owns the steps between a commit that was voted for and tensors that can be read: which files are
read from where, and who tells whom what lies elsewhere. Promises that a job which finds on each
node what it had there when it saved communicates no index at all, that else only shards that are
missing somewhere are told of while they suffice, that what is damaged is noted, so that the next
vote takes it for missing, and that every exchange is agreed before and after.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from holdfast import __version__
from holdfast.errors import CorruptCheckpointError, is_process_failure
from holdfast.protocol import ShardSource
from holdfast.ranks.coordinator import Coordinator
from holdfast.storage.manifest import LOCAL, Manifest
from holdfast.storage.posix import PENDING_MARK, Filesystem
from holdfast.storage.store import Checkpoint
from holdfast.tiers.local.availability import Candidate
from holdfast.tiers.local.elastic import Index, read_shard_index, read_shard_values
from holdfast.tiers.local.nvrx import ShardManager
from holdfast.tiers.local.peers import MergedShards, PeerFetch, Shard
from holdfast.tiers.local.shard_file import Trailer
from holdfast.tiers.opening import Contents

_COUNT = struct.Struct("<Q")
_SMALL = ("rank_state", "shared_state", "train_state")
"""Of a tail: what a load needs of it."""


@dataclass(frozen=True)
class LocalContents(Contents):
    """What a local commit holds, as a checkpoint of the persistent tier would show it."""

    rank_states: Mapping[int, bytes]
    """Of the ranks that saved: all of them, or this one's alone where it needs no other."""
    loan: PeerFetch

    def read_rank_state(self, rank: int, filesystem: Filesystem) -> bytes:
        """Return the small state of one of the saving ranks.

        Raises:
            CorruptCheckpointError: it was not told that another rank's would be asked for.
        """
        if rank not in self.rank_states:
            raise CorruptCheckpointError(str(self.checkpoint.path), f"no state of rank {rank} here")
        return self.rank_states[rank]

    def bring(
        self, find_targets: Callable[[], Mapping[str, torch.Tensor]], coordinator: Coordinator
    ) -> None:
        """Agree on the blocks that `read_tensors` gets from peers; every rank calls it together.

        Raises:
            CorruptCheckpointError: on every rank: a copy was damaged, vote again.
            StageFailedError: they could not be written, or a rank is gone.
        """
        assert isinstance(self.reader, MergedShards)
        self.loan.bring(self.reader, find_targets, coordinator)

    def sources(self) -> tuple[ShardSource, ...]:
        """As its base."""
        return self.loan.sources(self.reader.taken)


@dataclass(frozen=True)
class _Told:
    """What a rank was told of a shard that another one has."""

    index: Index | None
    """None: its tensors are nowhere."""
    body_bytes: int
    small: Mapping[str, bytes]
    values: Mapping[str, bytes]


@dataclass
class Opening:
    """What one rank knows while a commit is opened."""

    manager: ShardManager
    candidate: Candidate
    coordinator: Coordinator

    def run(self, suffices: Callable[[bytes], bool] | None) -> LocalContents:
        """Open it together with every other rank; see `LocalTier.open`."""
        self._here = self._find_here()
        self._providers = _choose_providers(self.candidate)
        homes = self._homes()
        if homes is not None:
            held = self._held_by_place()
            away = {
                owner
                for place, owners in zip(self.manager.topology.places, homes, strict=True)
                for owner in owners - held[place]
            }
            if away <= self._providers.keys():
                home = sorted(homes[self.manager.rank])
                if (contents := self._open_home(home, away, suffices)) is not None:
                    return contents
        return self._open_anywhere()

    def _find_here(self) -> dict[int, str]:
        """Return by owner the file of each shard at this place, this rank's directory first."""
        places, rank = self.manager.topology.places, self.manager.rank
        found = {}
        for owner, copies in enumerate(self.candidate.copies):
            paths = [
                each.path for each in copies if each.is_whole and places[each.rank] == places[rank]
            ]
            if paths:
                found[owner] = min(paths, key=lambda path: (int(path.split("/")[0]) != rank, path))
        return found

    def _held_by_place(self) -> dict[int, set[int]]:
        """Return by place the owners whose shard it has."""
        places = self.manager.topology.places
        held: dict[int, set[int]] = {place: set() for place in places}
        for owner, copies in enumerate(self.candidate.copies):
            for each in copies:
                if each.is_whole:
                    held[places[each.rank]].add(owner)
        return held

    def _homes(self) -> list[set[int]] | None:
        """Return by rank the shards that its node had when it saved; None: other ranks saved.

        Among them each node holds all that its ranks had, where they still are as they were.
        """
        record = self.candidate.record
        if record.world_size != self.manager.topology.world_size:
            return None
        mates: dict[int, set[int]] = {}
        for owner, node in enumerate(record.nodes):
            mates.setdefault(node, set()).add(owner)
        return [mates[node] for node in record.nodes]

    def _open_home(
        self,
        home: Sequence[int],
        away: Collection[int],
        suffices: Callable[[bytes], bool] | None,
    ) -> LocalContents | None:
        """Open the shards that this rank's node had; None, on every rank: that is not enough.

        `away`: those of any rank that its place has lost, which are told of by who has a copy.
        """
        opened: list[LocalContents] = []
        rank, record = self.manager.rank, self.candidate.record
        shards: dict[int, Shard] = {}

        def read() -> None:
            for owner in home:
                if owner in self._here:
                    shards[owner] = self._shard(owner, self._here[owner])

        def join(told: Mapping[int, _Told]) -> bool:
            if rank in self._here:
                small: Mapping[str, bytes] = self._trailer_of(self._here[rank]).parts
            else:
                small = told[rank].small
            loan = self._loan(told, is_empty=not away)
            loan.widen = self._widen
            for owner in home:
                if owner not in shards:
                    shards[owner] = self._borrowed(owner, told[owner])
            reader = self._reader([shards[each] for each in home], loan)
            if len(reader.metadata.state_dict_metadata) != record.state_names or not (
                suffices is None or suffices(small["rank_state"])
            ):
                return False
            states = {rank: small["rank_state"]}
            opened.append(self._contents(reader, small, states, loan))
            return True

        def read_and_join() -> bool:
            read()
            return join({})

        if not away:
            is_enough = self.coordinator.all_reduce("local index", read_and_join, all)
        else:
            descriptions: list[bytes] = []

            def read_and_describe() -> int:
                read()
                descriptions.append(self._describe(away))
                return len(descriptions[0])

            sizes = self.coordinator.all_gather("local index", read_and_describe)
            is_enough = self.coordinator.all_reduce(
                "local share", lambda: join(self._share(descriptions[0], sizes)), all
            )
        return opened[0] if is_enough else None

    @contextmanager
    def _noting(self, path: str) -> Iterator[None]:
        """Remember that a file is damaged if it turns out to be."""
        try:
            yield
        except (CorruptCheckpointError, OSError) as error:
            if not is_process_failure(error):
                self.manager.recovery.note_damage(path)
            raise

    def _trailer_of(self, path: str) -> Trailer:
        with self._noting(path):
            try:
                return self.manager.run.read_trailer(path)
            except FileNotFoundError as error:
                raise CorruptCheckpointError(path, "is missing") from error

    def _shard(self, owner: int, path: str) -> Shard:
        tail = self._trailer_of(path)
        run = self.manager.run
        with self._noting(path):
            index = read_shard_index(run.root / path, tail.record, run.filesystem)
        return Shard(owner, path, index, tail.record.body_bytes, None)

    def _borrowed(self, owner: int, told: _Told) -> Shard:
        assert told.index is not None
        leader = self.manager.topology.place_mates(self.manager.rank)[0]
        mark = zlib.crc32(repr(self.candidate.commit).encode())
        path = f"{leader}/borrowed_{owner}{PENDING_MARK}{mark:08x}"
        return Shard(owner, path, told.index, told.body_bytes, self._providers[owner][0])

    def _open_anywhere(self) -> LocalContents:
        """Let each shard's provider tell everybody what is in it, and what lies nowhere here."""
        told = self._tell_all()
        opened: list[LocalContents] = []

        def read() -> None:
            states = {owner: each.small["rank_state"] for owner, each in told.items()}
            loan = self._loan(told, is_empty=len(self.manager.topology.seats) == 1)
            reader = self._reader(self._shards_of(told), loan)
            first = told[min(told)].small
            opened.append(self._contents(reader, first, states, loan))

        self.coordinator.all_reduce("local values", read, lambda _: None)
        return opened[0]

    def _widen(self, reader: MergedShards) -> None:
        """Let a reader of home shards read all there are."""
        told = self._tell_all()
        wider = self._loan(told, is_empty=len(self.manager.topology.seats) == 1)
        loan = reader.loan
        loan.lent, loan.sizes, loan.provided = wider.lent, wider.sizes, wider.provided
        loan.is_empty = wider.is_empty
        self.coordinator.all_reduce(
            "local widen", lambda: reader.widen(self._shards_of(told)), lambda _: None
        )

    def _tell_all(self) -> dict[int, _Told]:
        owners = range(len(self.candidate.copies))
        descriptions: list[bytes] = []

        def describe() -> int:
            descriptions.append(self._describe(owners))
            return len(descriptions[0])

        sizes = self.coordinator.all_gather("local describe", describe)
        shared: list[dict[int, _Told]] = []
        self.coordinator.all_reduce(
            "local share",
            lambda: shared.append(self._share(descriptions[0], sizes)),
            lambda _: None,
        )
        return shared[0]

    def _shards_of(self, told: Mapping[int, _Told]) -> list[Shard]:
        """Return what this rank reads of each shard: what lies here, its own directory first."""
        shards = []
        for owner, each in told.items():
            if each.index is None:
                continue
            here = self._here.get(owner)
            if here is None:
                shards.append(self._borrowed(owner, each))
            else:
                shards.append(Shard(owner, here, each.index, each.body_bytes, None))
        own = f"{self.manager.rank}/"
        shards.sort(
            key=lambda each: (each.provider is not None, not each.path.startswith(own), each.owner)
        )
        return shards

    def _loan(self, told: Mapping[int, _Told], *, is_empty: bool) -> PeerFetch:
        providers, rank = self._providers, self.manager.rank
        return PeerFetch(
            self.manager,
            self.candidate.commit,
            lent={owner: path for owner, (each, path) in providers.items() if each == rank},
            sizes={owner: each.body_bytes for owner, each in told.items()},
            provided={owner: path for owner, (_, path) in providers.items()},
            values={
                (self._borrowed(owner, each).path, name): content
                for owner, each in told.items()
                if each.index is not None and owner not in self._here
                for name, content in each.values.items()
            },
            is_empty=is_empty,
        )

    def _describe(self, owners: Collection[int]) -> bytes:
        """Return what this rank has to tell of these shards: index, values and small states."""
        described: list[bytes] = []
        run = self.manager.run
        for owner, copies in enumerate(self.candidate.copies):
            if owner not in owners:
                continue
            rank, path = self._providers.get(owner, (copies[0].rank, copies[0].path))
            if rank != self.manager.rank:
                continue
            tail = self._trailer_of(path)
            head = {"owner": owner, "body_bytes": tail.record.body_bytes, "offset": None}
            content, digests, values = b"", b"", b""
            if owner in self._providers:
                index = self._shard(owner, path).index
                head["offset"] = index.offset
                content, digests = index.content, bytes.fromhex("".join(index.digests))
                with self._noting(path):
                    found = read_shard_values(run.root / path, tail.record, index, run.filesystem)
                pairs = [(name.encode(), value) for name, value in found.items()]
                values = _pack([frame for pair in pairs for frame in pair])
            small = [tail.parts[each] for each in _SMALL]
            described.append(_pack([json.dumps(head).encode(), content, digests, values, *small]))
        return zlib.compress(_pack(described), 1)

    def _share(self, content: bytes, sizes: Sequence[int]) -> dict[int, _Told]:
        """Return by owner what all ranks had to tell."""
        contents = [content]
        if len(sizes) > 1:
            contents = self.manager.repl_strategy.local_group.share(content, sizes)
        told = {}
        for each in contents:
            for packed in _unpack(zlib.decompress(each)):
                head, index, digests, values, *small = _unpack(packed)
                facts = json.loads(head)
                found = None
                if facts["offset"] is not None:
                    blocks = tuple(digests[at : at + 16].hex() for at in range(0, len(digests), 16))
                    found = Index(index, facts["offset"], blocks)
                frames = _unpack(values)
                named = {
                    name.decode(): value
                    for name, value in zip(frames[::2], frames[1::2], strict=True)
                }
                parts = dict(zip(_SMALL, small, strict=True))
                told[facts["owner"]] = _Told(found, facts["body_bytes"], parts, named)
        return dict(sorted(told.items()))

    def _reader(self, shards: Sequence[Shard], loan: PeerFetch) -> MergedShards:
        run = self.manager.run
        return MergedShards.of(run.root, run.filesystem, shards, loan)

    def _contents(
        self,
        reader: MergedShards,
        parts: Mapping[str, bytes],
        states: Mapping[int, bytes],
        loan: PeerFetch,
    ) -> LocalContents:
        record = self.candidate.record
        where = str(self.manager.run.root)
        try:
            counters = json.loads(parts["train_state"])
            step = dict(counters["train_state"])["step"]
            int(counters["num_floating_point_operations_so_far"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(where, f"holds no train state: {error}") from error
        if type(step) is not int or step != record.iteration:
            raise CorruptCheckpointError(where, f"is of step {step!r}")
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
        )
        checkpoint = Checkpoint(self.manager.run.root, manifest)
        values = reader.read_values()
        return LocalContents(
            checkpoint, reader, values, counters, parts["shared_state"], states, loan
        )


def _choose_providers(candidate: Candidate) -> dict[int, tuple[int, str]]:
    """Return for each shard that is anywhere who tells of it, and sends it: rank and path."""
    loads: dict[int, int] = {}
    chosen = {}
    for owner, copies in enumerate(candidate.copies):
        whole = [each for each in copies if each.is_whole]
        if whole:
            best = min(whole, key=lambda each: (loads.get(each.rank, 0), each.rank, each.path))
            loads[best.rank] = loads.get(best.rank, 0) + 1
            chosen[owner] = (best.rank, best.path)
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
