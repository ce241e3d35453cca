"""A local commit, opened: one view of shards that lie here, at peers, or partly at both.

Owns the steps between a commit that was voted for and tensors that can be read: which files are
read from where, who tells whom what lies elsewhere, and the fetching of remote blocks into files
that are gone when the load is over. Promises that a job which finds on each node what it had there
when it saved communicates no index at all, that what is damaged is noted, so that the next vote
takes it for missing, and that every exchange is agreed before and after.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from holdfast import __version__
from holdfast.coordination import Coordinator
from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import PENDING_MARK, Filesystem
from holdfast.manifest import Manifest
from holdfast.protocol import TrainState
from holdfast.store import Checkpoint
from holdfast.tiers.local.elastic import Index, merge, read_shard_index
from holdfast.tiers.local.engine import ShardManager
from holdfast.tiers.local.loan import Loan, MergedShards, Shard
from holdfast.tiers.local.tail import Tail
from holdfast.tiers.local.vote import Candidate
from holdfast.tiers.reading import Contents

TIER_NAME = "local"
_COUNT = struct.Struct("<Q")


@dataclass(frozen=True)
class LocalContents(Contents):
    """What a local commit holds, as a checkpoint of the persistent tier would show it."""

    rank_states: Mapping[int, bytes]
    """Of the ranks that saved: all of them, or this one's alone where it needs no other."""
    loan: Loan

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
        """Fetch the remote blocks that `read_tensors` needs; every rank calls it together.

        Raises:
            CorruptCheckpointError: on every rank: a copy was damaged, vote again.
            StageFailedError: they could not be written, or a rank is gone.
        """
        assert isinstance(self.reader, MergedShards)
        targets: dict[str, torch.Tensor] = {}
        coordinator.settle("targets", lambda: targets.update(find_targets()), lambda _: None)
        self.loan.bring(self.reader, targets, coordinator)


@dataclass
class Opening:
    """What one rank knows while a commit is opened."""

    manager: ShardManager
    candidate: Candidate
    coordinator: Coordinator

    def run(self, structure: str | None, suffices: Callable[[bytes], bool] | None) -> LocalContents:
        """Open it together with every other rank; see `LocalTier.open`."""
        manager, candidate = self.manager, self.candidate
        places = manager.topology.places
        self._here = {
            owner: min(paths, key=lambda path: (int(path.split("/")[0]) != manager.rank, path))
            for owner, copies in enumerate(candidate.copies)
            if (
                paths := [
                    each.path
                    for each in copies
                    if each.is_whole and places[each.rank] == places[manager.rank]
                ]
            )
        }
        at_home = self.coordinator.settle(
            "local open", lambda: self._is_at_home(structure, suffices), all
        )
        if at_home:
            return self._open_here()
        return self._open_anywhere()

    def _is_at_home(self, structure: str | None, suffices: Callable[[bytes], bool] | None) -> bool:
        """Whether this rank has at its place all that its node had when it saved, and needs no
        more than that.
        """
        record, rank = self.candidate.record, self.manager.rank
        if record.world_size != self.manager.topology.world_size or rank not in self._here:
            return False
        mates = [each for each, node in enumerate(record.nodes) if node == record.nodes[rank]]
        if structure is None or not all(each in self._here for each in mates):
            return False
        tail = self._tail_of(self._here[rank])
        if tail.record.structure != structure:
            return False
        return suffices is None or suffices(tail.parts["rank_state"])

    def _tail_of(self, path: str) -> Tail:
        try:
            tail = self.manager.run.read_tail(path)
        except FileNotFoundError as error:
            self.manager.recovery.note_damage(path)
            raise CorruptCheckpointError(path, "is missing") from error
        except (CorruptCheckpointError, OSError):
            self.manager.recovery.note_damage(path)
            raise
        return tail

    def _shard(self, owner: int, path: str) -> Shard:
        tail = self._tail_of(path)
        root = self.manager.run.root
        try:
            index = read_shard_index(root / path, tail.record, self.manager.run.filesystem)
        except (CorruptCheckpointError, OSError):
            self.manager.recovery.note_damage(path)
            raise
        return Shard(owner, path, index, tail.record.body_bytes, None)

    def _open_here(self) -> LocalContents:
        record, rank = self.candidate.record, self.manager.rank
        mates = [each for each, node in enumerate(record.nodes) if node == record.nodes[rank]]
        opened: list[LocalContents] = []

        def read() -> None:
            order = [rank, *(each for each in mates if each != rank)]
            shards = [self._shard(owner, self._here[owner]) for owner in order]
            tail = self._tail_of(self._here[rank])
            reader = self._reader(shards)
            states = {rank: tail.parts["rank_state"]}
            loan = Loan(self.manager)
            opened.append(self._contents(reader, reader.read_values(), tail.parts, states, loan))

        self.coordinator.settle("local index", read, lambda _: None)
        return opened[0]

    def _open_anywhere(self) -> LocalContents:
        """Let each shard's provider tell everybody what is in it, and what lies nowhere here."""
        manager = self.manager
        providers = _choose_providers(self.candidate)
        told = self._share(self._describe(providers))
        shards, states = [], {}
        parts: dict[str, bytes] = {}
        for owner, (index, body_bytes, small) in sorted(told.items()):
            states[owner] = small["rank_state"]
            parts = parts or small
            if index is None:
                continue
            here = self._here.get(owner)
            if here is None:
                here = self._borrowed_path(owner)
                shards.append(Shard(owner, here, index, body_bytes, providers[owner][0]))
            else:
                shards.append(Shard(owner, here, index, body_bytes, None))
        # What lies here is read here, a rank's own directory first.
        shards.sort(
            key=lambda each: (
                each.provider is not None,
                not each.path.startswith(f"{manager.rank}/"),
                each.owner,
            )
        )
        provided = {owner: path for owner, (_, path) in providers.items()}
        loan = Loan(
            manager,
            shards,
            {owner: path for owner, (rank, path) in providers.items() if rank == manager.rank},
            is_empty=len(manager.topology.seats) == 1,
            provided_path=provided,
        )
        reader = self._reader(shards)
        names = reader.value_names()
        loan.bring(reader, dict.fromkeys(names), self.coordinator)
        opened: list[LocalContents] = []

        def read() -> None:
            values = reader.read_values()
            opened.append(self._contents(reader, values, parts, states, loan))

        self.coordinator.settle("local values", read, lambda _: None)
        return opened[0]

    def _borrowed_path(self, owner: int) -> str:
        leader = self.manager.topology.place_mates(self.manager.rank)[0]
        mark = zlib.crc32(repr(self.candidate.commit).encode())
        return f"{leader}/borrowed_{owner}{PENDING_MARK}{mark:08x}"

    def _describe(self, providers: Mapping[int, tuple[int, str]]) -> bytes:
        """Return what this rank has to tell: index and small states of the shards it provides."""
        described: list[bytes] = []

        def describe() -> None:
            for owner, copies in enumerate(self.candidate.copies):
                rank, path = providers.get(owner, (copies[0].rank, copies[0].path))
                if rank != self.manager.rank:
                    continue
                tail = self._tail_of(path)
                parts = tail.parts
                head = {"owner": owner, "body_bytes": tail.record.body_bytes, "offset": None}
                content, digests = b"", b""
                if owner in providers:
                    index = self._shard(owner, path).index
                    head["offset"] = index.offset
                    content, digests = index.content, bytes.fromhex("".join(index.digests))
                small = [parts["rank_state"], parts["shared_state"], parts["train_state"]]
                frames = [json.dumps(head).encode(), content, digests, *small]
                described.append(_pack(frames))

        self.coordinator.settle("local describe", describe, lambda _: None)
        return zlib.compress(_pack(described), 1)

    def _share(self, content: bytes) -> dict[int, tuple[Index | None, int, dict[str, bytes]]]:
        """Return by owner what all ranks had to tell."""
        manager, contents = self.manager, [content]
        if len(manager.topology.seats) > 1:
            sizes = self.coordinator.together("local sizes", lambda: len(content))
            group = manager.repl_strategy.local_group
            shared: list[list[bytes]] = []
            self.coordinator.settle(
                "local share",
                lambda: shared.append(group.share(content, sizes)),
                lambda _: None,
            )
            contents = shared[0]
        told = {}
        for each in contents:
            for packed in _unpack(zlib.decompress(each)):
                head, index, digests, *small = _unpack(packed)
                values = json.loads(head)
                found = None
                if values["offset"] is not None:
                    blocks = tuple(digests[at : at + 16].hex() for at in range(0, len(digests), 16))
                    found = Index(index, values["offset"], blocks)
                names = ("rank_state", "shared_state", "train_state")
                parts = dict(zip(names, small, strict=True))
                told[values["owner"]] = (found, values["body_bytes"], parts)
        return told

    def _reader(self, shards: Sequence[Shard]) -> MergedShards:
        root = self.manager.run.root
        metadata = merge(
            [(each.path, each.index.entries(str(root / each.path))) for each in shards]
        )
        records = {each.path: each.record for each in shards}
        return MergedShards(
            root, self.manager.run.filesystem, metadata, records, self.manager.recovery.note_damage
        )

    def _contents(
        self,
        reader: MergedShards,
        values: dict[str, Any],
        parts: Mapping[str, bytes],
        states: Mapping[int, bytes],
        loan: Loan,
    ) -> LocalContents:
        record = self.candidate.record
        where = str(self.manager.run.root)
        try:
            counters = json.loads(parts["train_state"])
            TrainState().update_from(counters["train_state"])
            int(counters["num_floating_point_operations_so_far"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(where, f"holds no train state: {error}") from error
        if counters["train_state"]["step"] != record.iteration:
            raise CorruptCheckpointError(where, f"is of step {counters['train_state']['step']}")
        manifest = Manifest(
            run_id=record.run_id,
            attempt=record.attempt,
            sequence=record.sequence,
            iteration=record.iteration,
            tier=TIER_NAME,
            world_size=record.world_size,
            saved_at="",
            files=(),
            written_by=f"holdfast {__version__}",
        )
        checkpoint = Checkpoint(self.manager.run.root, manifest)
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
