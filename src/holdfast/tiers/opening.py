"""Open a selected checkpoint, and if asked verify it in full, before anything live is touched.

Owns how ranks share the work of verifying and which small files a rank needs. Promises that every
rank receives all damage found on any rank, and that `open_contents` returns only after all small
state was read and matched its digests. Decides nothing.

Owns also how a directory that torch.distributed.checkpoint wrote without holdfast is recognised,
and the substitutes for its missing parts: an empty manifest, and counters that change nothing. A
damaged checkpoint of holdfast is never mistaken for one. A load warns that its bytes are not
covered by digests.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from holdfast.errors import CorruptCheckpointError
from holdfast.format.inventory import METADATA_NAME, name_tensors
from holdfast.protocol import ShardSource
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.reader import ForeignReader, ShardReader
from holdfast.storage.backend import Storage
from holdfast.storage.digests import FileRecord, find_difference
from holdfast.storage.manifest import FOREIGN, MANIFEST_NAME, Manifest
from holdfast.storage.store import Checkpoint, Damage, verify_files
from holdfast.tiers.persistent import (
    RUN_CONFIG_NAME,
    SHARED_STATE_NAME,
    TRAIN_STATE_NAME,
    rank_state_name,
)

logger = logging.getLogger(__name__)

_OURS = {MANIFEST_NAME, TRAIN_STATE_NAME, RUN_CONFIG_NAME, SHARED_STATE_NAME.partition("/")[0]}
_ITERATION = re.compile("iter_([0-9]+)")


@dataclass(frozen=True)
class ForeignCheckpoint(Checkpoint):
    """A checkpoint written by torch alone, with a manifest that lists no files."""

    @classmethod
    def at(cls, path: Path) -> ForeignCheckpoint:
        """Make one for a directory; the iteration is N for a name `iter_N`, else 0."""
        match = _ITERATION.fullmatch(path.name)
        iteration = int(match[1]) if match else 0
        return cls(path, Manifest("", 0, 0, iteration, FOREIGN, 1, "", ()))


def is_foreign(files: Storage) -> bool:
    """Whether these are the files of a checkpoint written by torch alone.

    One with any file that only holdfast writes is holdfast's, and damaged without manifest.
    """
    names = {each.name for each in files.list()}
    return METADATA_NAME in names and not names & _OURS


def warn_of_foreign(path: Path) -> None:
    """Warn that such a checkpoint has no digests and only model and optimizer."""
    logger.warning(
        "%s was written without holdfast: nothing vouches for its bytes, and only model and "
        "optimizer are loaded from it",
        path,
    )


def open_foreign(files: Storage) -> ForeignReader:
    """Read the metadata of a checkpoint written by torch alone.

    Raises:
        CorruptCheckpointError: its metadata cannot be read, or names files that are not there.
    """
    records = {
        each.name: FileRecord(each.name, files.size_bytes(each.name), "", ())
        for each in files.list()
        if not each.is_group
    }
    try:
        content = files.get(METADATA_NAME)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(files.where(METADATA_NAME), "is missing") from error
    return ForeignReader.open(files, content, records)


def unchanged_counters() -> dict[str, Any]:
    """Return counters that change none of the run's."""
    return {"train_state": {}, "num_floating_point_operations_so_far": 0}


_SHARD = re.compile(r"__([0-9]+)_[0-9]+\.distcp")


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint, tensors not yet read."""

    checkpoint: Checkpoint
    reader: ShardReader
    values: dict[str, Any]
    """All values in the shards that are not tensors, by flat name."""
    counters: dict[str, Any]
    """`train_state`, and `num_floating_point_operations_so_far`."""
    shared_state: bytes | None
    """None: a foreign checkpoint, which has no rank states either."""

    def read_rank_state(self, rank: int) -> bytes:
        """Return the state file of one of the saving ranks.

        Raises:
            CorruptCheckpointError: it is damaged, or not listed and so without a digest.
        """
        return _read_checked(self.checkpoint, rank_state_name(rank), self.reader.files)

    def bring(
        self, find_targets: Callable[[], Mapping[str, torch.Tensor]], coordinator: Coordinator
    ) -> None:
        """Fetch what these tensors need and only other ranks can read; no-op here.

        In this class every rank can read all files. Every rank calls it, before any rank reads.
        """

    def sources(self) -> tuple[ShardSource, ...]:
        """Return the files that this rank has read tensors from."""
        root, tier = self.checkpoint.path, self.checkpoint.manifest.tier
        return tuple(
            ShardSource(tier, f"{root.name}/{path}", size_bytes, _owner_of(path))
            for path, size_bytes in sorted(self.reader.taken.items())
        )


def verify_together(
    checkpoint: Checkpoint, coordinator: Coordinator, files: Storage
) -> list[Damage]:
    """Read every file once, each rank its share; return all damage on every rank."""
    share = _shares(checkpoint.manifest.files, coordinator.world_size)[coordinator.rank]

    def verify() -> list[Damage]:
        return name_tensors(files, verify_files(files, share))

    parts = coordinator.all_gather("verify", verify)
    return [damage for part in parts for damage in part]


def open_contents(checkpoint: Checkpoint, files: Storage) -> Contents:
    """Read the small state of a checkpoint.

    Raises:
        CorruptCheckpointError: a file is missing or damaged.
    """
    if isinstance(checkpoint, ForeignCheckpoint):
        foreign = open_shards(checkpoint, files)
        return Contents(checkpoint, foreign, foreign.read_values(), unchanged_counters(), None)
    where = files.where(TRAIN_STATE_NAME)
    content = _read_checked(checkpoint, TRAIN_STATE_NAME, files)
    try:
        counters = json.loads(content)
        # Whether the live counters accept the other values is checked later, before any change.
        step = dict(counters["train_state"])["step"]
        int(counters["num_floating_point_operations_so_far"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(where, f"is not a train state: {error}") from error
    if type(step) is not int or step != checkpoint.iteration:
        raise CorruptCheckpointError(where, f"is of step {step!r}")
    _read_checked(checkpoint, RUN_CONFIG_NAME, files)  # only to check its digest
    reader = open_shards(checkpoint, files)
    return Contents(
        checkpoint,
        reader,
        reader.read_values(),
        counters,
        _read_checked(checkpoint, SHARED_STATE_NAME, files),
    )


def open_shards(checkpoint: Checkpoint, files: Storage) -> ShardReader:
    """Find where tensors and values are stored, reading none of them.

    Raises:
        CorruptCheckpointError: `.metadata` is missing or damaged.
    """
    if isinstance(checkpoint, ForeignCheckpoint):
        return open_foreign(files)
    metadata = _read_checked(checkpoint, METADATA_NAME, files)
    records = {each.path: each for each in checkpoint.manifest.files}
    return ShardReader.open(files, metadata, records)


def _read_checked(checkpoint: Checkpoint, name: str, files: Storage) -> bytes:
    """Return the content of a small file, checked against its digest."""
    record = next((each for each in checkpoint.manifest.files if each.path == name), None)
    if record is None:
        raise CorruptCheckpointError(
            files.where(MANIFEST_NAME), f"does not list {name}, which a load needs"
        )
    where = files.where(name)
    try:
        content = files.get(name)
    except FileNotFoundError as error:  # removed since, or not visible on this node yet
        raise CorruptCheckpointError(where, "is missing") from error
    if (difference := find_difference(record, BytesIO(content))) is not None:
        raise CorruptCheckpointError(where, difference.reason, difference.byte_range)
    return content


def _owner_of(path: str) -> int | None:
    """Return the rank that wrote a shard file, if it has a name as torch gives it."""
    match = _SHARD.fullmatch(path)
    return int(match[1]) if match else None


def _shares(records: Sequence[FileRecord], world_size: int) -> list[list[FileRecord]]:
    """Assign files to ranks, largest first, each to the least loaded rank."""
    shares: list[list[FileRecord]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for record in sorted(records, key=lambda each: (-each.size_bytes, each.path)):
        rank = loads.index(min(loads))
        shares[rank].append(record)
        loads[rank] += record.size_bytes + 1
    return shares
