"""What the ranks of one load read for one another, and how all of them hear of damage.

Owns a stage in which every rank reads and what any of them finds damaged is reported on all; the
copies of one name that several ranks have saved, read by another number of ranks, each shard once;
and the places of chunks that a rank was not told when a checkpoint was opened: the first rank of
each node reads `.metadata` and answers for its node. Promises that every byte used matched its
digest, that no rank goes on alone, and that what a rank receives is what it asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import xxhash
from torch.distributed.checkpoint.metadata import Metadata

from holdfast.blame import is_process_failure
from holdfast.errors import CheckpointError, CorruptCheckpointError, RankFailure
from holdfast.format.merging import (
    Boxes,
    ChunkTable,
    add_chunks,
    files_in,
    find_uncovered,
    in_parts,
    merge_shards,
    pack,
    pack_boxes,
    unpack,
    unpack_boxes,
)
from holdfast.format.plan import shard_name
from holdfast.messages import list_first
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.topology import node_name, pack_numbers, unpack_numbers
from holdfast.read.index import read_index
from holdfast.read.reader import ShardReader, decode_value
from holdfast.read.requests import Target, boxes_of
from holdfast.storage.backend import Storage, opened_once
from holdfast.storage.digests import FileRecord, pack_records, unpack_records
from holdfast.storage.manifest import MANIFEST_NAME
from holdfast.storage.store import Checkpoint

T = TypeVar("T")
R = TypeVar("R")

Copies = Sequence[tuple[int, str, bytes]]
"""Rank that saved, name, and the bytes of a value; the lowest rank of those with equal bytes."""


def _nothing(_: object) -> None:
    return None


def read_together(
    stage: str,
    work: Callable[[], T],
    checkpoint: Checkpoint,
    coordinator: Coordinator,
    join: Callable[[list[T]], R] = _nothing,  # type: ignore[assignment]  # R is None then
) -> R:
    """Read on every rank; what any of them finds damaged is reported on all, file by file.

    `join`: makes of all results what every rank is given, on rank 0. `work` reads the checkpoint's
    own files and calls nothing of the user's, so that a file that cannot be read is damage.
    Anything else that fails is no reason to take an older checkpoint.

    Raises:
        CorruptCheckpointError: on every rank, the same.
        StageFailedError: a rank failed or is gone; the checkpoint is not to blame.
    """

    def find_damage() -> tuple[CorruptCheckpointError | None, Any]:
        try:
            return None, work()
        except CorruptCheckpointError as error:
            return error, None
        except OSError as error:
            if isinstance(error, CheckpointError) or is_process_failure(error):
                raise
            failure = RankFailure.of(coordinator.rank, error)
            reason = f"cannot be read on rank {failure.rank}: {failure.reason}"
            return CorruptCheckpointError(failure.path or str(checkpoint.path), reason), None

    def judge(
        found: list[tuple[CorruptCheckpointError | None, Any]],
    ) -> tuple[CorruptCheckpointError | None, Any]:
        # Ranks that read the same file say the same of it.
        damages = list({str(each): each for each, _ in found if each is not None}.values())
        if len(damages) > 1:
            damages = [CorruptCheckpointError(str(checkpoint.path), list_first(damages, "files"))]
        return (damages[0], None) if damages else (None, join([each for _, each in found]))

    damage, joined = coordinator.all_reduce(stage, find_damage, judge)
    if damage is not None:
        raise damage
    return joined  # type: ignore[no-any-return]  # what `join` has returned


def pick_records(
    files: Collection[str], records: Mapping[str, FileRecord], where: str
) -> list[FileRecord]:
    """Return the records of these files, which something at `where` names.

    Raises:
        CorruptCheckpointError: the manifest does not list one of them.
    """
    for each in files:
        if each not in records:
            raise CorruptCheckpointError(where, f"names {each!r}, which the manifest does not list")
    return [records[each] for each in files]


@dataclass
class Lookup:
    """Asks for the places of chunks that this rank was not told; every rank makes the same calls.

    What a save of another layout wrote, a rank cannot know from its own shard's index. Nodes are
    told apart by their names alone: two of one name have one reader.
    """

    checkpoint: Checkpoint
    """On rank 0 its manifest lists every file."""
    read_metadata: Callable[[], Metadata]
    """Reads `.metadata`, verified."""
    own: Metadata | None = field(default=None, repr=False)
    """What this rank's own shard holds, where as many ranks load as saved."""
    _readers: Sequence[int] = ()
    """By rank: the first rank of its node, which reads for it."""
    _chunks: ChunkTable | None = field(default=None, repr=False)
    """All chunks, on those that read them."""

    def agree_on_readers(self, coordinator: Coordinator) -> None:
        """Agree on which rank reads for which; needed once, before anything is read."""

        def choose(names: list[str]) -> bytes:
            first: dict[str, int] = {}
            return pack_numbers([first.setdefault(name, rank) for rank, name in enumerate(names)])

        self._readers = unpack_numbers(coordinator.all_reduce("nodes", node_name, choose))

    def read(self, rank: int) -> Metadata | None:
        """Read all of the metadata where this rank reads for its node; else return None."""
        if self._readers[rank] != rank:
            return None
        self._chunks = ChunkTable(self.read_metadata())
        return self._chunks.metadata

    def bring(
        self,
        reader: ShardReader,
        find_targets: Callable[[], Mapping[str, Target]],
        coordinator: Coordinator,
    ) -> None:
        """Let a reader know every chunk that its targets need.

        Raises:
            CorruptCheckpointError: on every rank: `.metadata` is damaged, or contradicts the rest.
            StageFailedError: a rank is gone.
        """
        boxes: Boxes = {}
        lacking: Boxes = {}

        def look() -> bool:
            nonlocal boxes, lacking
            boxes = boxes or boxes_of(find_targets())
            lacking = find_uncovered(reader.metadata, boxes)
            return bool(lacking)

        if not coordinator.all_reduce("places", look, any):
            return
        if self.own is not None:
            for content, records in self._ask_alike(boxes, self.own, coordinator):
                _add(reader, content, records)
            if not coordinator.all_reduce("places left", look, any):
                return
        if not self._readers:
            self.agree_on_readers(coordinator)
            rank = coordinator.rank
            read_together("metadata", lambda: self.read(rank), self.checkpoint, coordinator)
        content, records = self._ask(pack_boxes(lacking) if lacking else b"", coordinator)
        if content:
            _add(reader, content, records)

    def _ask_alike(
        self, boxes: Boxes, own: Metadata, coordinator: Coordinator
    ) -> list[tuple[bytes, bytes]]:
        """Return the parts that ranks wrote which need the same as this one, and their records.

        Ranks that hold the same parts of tensors, as in hybrid sharding, have each written some.
        """
        parts = in_parts(own)

        def describe() -> tuple[bytes, bytes, list[str]]:
            return xxhash.xxh3_128_digest(pack_boxes(boxes)), pack(parts), files_in(parts)

        found = coordinator.gather("places alike", describe) or []

        def hand_out() -> list[list[tuple[bytes, bytes]]]:
            records = {each.path: each for each in self.checkpoint.manifest.files}
            where = str(self.checkpoint.path / MANIFEST_NAME)
            alike: dict[bytes, list[tuple[bytes, bytes]]] = {}
            for need, content, files in found:
                packed = pack_records(pick_records(files, records, where))
                alike.setdefault(need, []).append((content, packed))
            return [alike[need] for need, _, _ in found]

        return coordinator.scatter("places alike told", hand_out)

    def _ask(self, boxes: bytes, coordinator: Coordinator) -> tuple[bytes, bytes]:
        """Return the chunks that overlap these boxes, and the records of the files they are in.

        Both are packed, and empty where nothing was asked for.
        """
        readers = self._readers
        asked = coordinator.gather("places asked", lambda: boxes) or []
        answers: list[dict[int, tuple[bytes, Sequence[str]]]]
        if any(readers):

            def hand_out() -> list[dict[int, bytes]]:
                tasks: list[dict[int, bytes]] = [{} for _ in readers]
                for rank, each in enumerate(asked):
                    if each:
                        tasks[readers[rank]][rank] = each
                return tasks

            task = coordinator.scatter("places to find", hand_out)
            answers = coordinator.gather("places found", lambda: self._answer(task)) or []
        else:  # one node: rank 0 answers for all
            answers = []

        def answer_each() -> list[tuple[bytes, bytes]]:
            given = answers or [self._answer({n: each for n, each in enumerate(asked) if each})]
            records = {each.path: each for each in self.checkpoint.manifest.files}
            where = str(self.checkpoint.path / MANIFEST_NAME)
            told = [(b"", b"")] * len(readers)
            for answer in given:
                for rank, (content, files) in answer.items():
                    told[rank] = content, pack_records(pick_records(files, records, where))
            return told

        return coordinator.scatter("places told", answer_each)

    def _answer(self, task: Mapping[int, bytes]) -> dict[int, tuple[bytes, Sequence[str]]]:
        """Return by rank the chunks that were asked for, packed, and the files they are in."""
        found: dict[int, tuple[bytes, Sequence[str]]] = {}
        for rank, boxes in task.items():
            assert self._chunks is not None
            part = self._chunks.cut(unpack_boxes(boxes))
            found[rank] = pack(part), files_in(part)
        return found


def _add(reader: ShardReader, content: bytes, records: bytes) -> None:
    """Let a reader know more chunks, in place: callers keep using it."""
    add_chunks(reader.metadata, unpack(content))
    known: Any = reader.records
    known.update({each.path: each for each in unpack_records(records)})


# Copies of one name that several ranks have saved.


def read_copies(files: Storage, shards: Mapping[int, FileRecord], names: Collection[str]) -> Copies:
    """Read the distinct copies of these names from shards, given by the rank that wrote them.

    Raises:
        CorruptCheckpointError: a file is missing or damaged.
        OSError: it cannot be read.
    """
    found: list[tuple[int, str, bytes]] = []
    for rank, record in shards.items():
        name = record.path
        with opened_once(files, name) as kept:
            entries = read_index(kept, name, record).entries(files.where(name))
            own = [each for each in entries if each.per_rank and each.name in names]
            reader = ShardReader(kept, merge_shards([(rank, name, own)]), {name: record})
            contents = reader.read_contents(reader.value_names())
        found += [(rank, each, bytes(content)) for each, content in contents.items()]
    return join_copies([found])


def join_copies(parts: Sequence[Copies]) -> Copies:
    """Return the distinct copies among these, sorted by rank."""
    lowest: dict[tuple[str, bytes], int] = {}
    for rank, name, content in sorted(each for part in parts for each in part):
        lowest.setdefault((name, content), rank)
    return [(rank, name, content) for (name, content), rank in lowest.items()]


def decode_copies(copies: Copies, where: str) -> dict[str, list[Any]]:
    """Return the values by name, running no code.

    Raises:
        CorruptCheckpointError: one needs code, or is torn.
    """
    values: dict[str, list[Any]] = {}
    for rank, name, content in copies:
        values.setdefault(name, []).append(decode_value(content, where, f"{name} of rank {rank}"))
    return values


def share_of_shards(checkpoint: Checkpoint, coordinator: Coordinator) -> dict[int, FileRecord]:
    """Return this rank's share of the shard files, by the rank that wrote them.

    Raises:
        CorruptCheckpointError: the manifest does not list one of them.
    """
    records = {each.path: each for each in checkpoint.manifest.files}
    ranks = range(coordinator.rank, checkpoint.manifest.world_size, coordinator.world_size)
    for rank in ranks:
        if shard_name(rank) not in records:
            where = str(checkpoint.path / MANIFEST_NAME)
            raise CorruptCheckpointError(where, f"does not list the file of rank {rank}")
    return {rank: records[shard_name(rank)] for rank in ranks}
