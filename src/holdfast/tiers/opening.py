"""Open a selected checkpoint, and if asked verify it in full, before anything live is touched.

Owns how ranks share the work of verifying and which small files a rank needs. Every rank is given
every damage that any rank found, and all small state was read and matched its digests when
`open_contents` returns. Decides nothing.

Owns also how a directory that torch.distributed.checkpoint wrote without holdfast is recognised and
what stands for the parts that it lacks: a manifest that lists nothing, counters that leave
everything as it is. A checkpoint of ours is never taken for one, whatever it has lost, and a load
warns that nothing vouches for the bytes.
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
from holdfast.storage.digests import FileRecord, find_difference
from holdfast.storage.manifest import FOREIGN, MANIFEST_NAME, Manifest
from holdfast.storage.posix import Filesystem, read_bytes
from holdfast.storage.store import Checkpoint, Damage, Store
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
    """A checkpoint of torch's own making, with a manifest that says nothing of its files."""

    @classmethod
    def at(cls, path: Path) -> ForeignCheckpoint:
        """Name one; its iteration is that of a name `iter_N`, and 0 for any other."""
        match = _ITERATION.fullmatch(path.name)
        iteration = int(match[1]) if match else 0
        return cls(path, Manifest("", 0, 0, iteration, FOREIGN, 1, "", ()))


def is_foreign(path: Path, filesystem: Filesystem) -> bool:
    """Whether a directory is a checkpoint of torch's own making.

    One with any file that only we write is ours, and damaged if its manifest is gone.
    """
    names = {each.name for each in filesystem.list_directory(path)}
    return METADATA_NAME in names and not names & _OURS


def warn_of_foreign(path: Path) -> None:
    """Say what such a checkpoint cannot promise."""
    logger.warning(
        "%s was written without holdfast: nothing vouches for its bytes, and only model and "
        "optimizer are loaded from it",
        path,
    )


def open_foreign(checkpoint: ForeignCheckpoint, filesystem: Filesystem) -> ForeignReader:
    """Understand what lies in the directory.

    Raises:
        CorruptCheckpointError: its metadata cannot be read, or names files that are not there.
    """
    path = checkpoint.path
    records = {
        each.name: FileRecord(each.name, filesystem.size_bytes(path / each.name), "", ())
        for each in filesystem.list_directory(path)
        if each.is_file
    }
    try:
        content = read_bytes(filesystem, path / METADATA_NAME)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(str(path / METADATA_NAME), "is missing") from error
    return ForeignReader.open(path, content, records, filesystem)


def unchanged_counters() -> dict[str, Any]:
    """Return counters that leave those of the run as they are."""
    return {"train_state": {}, "num_floating_point_operations_so_far": 0}


_SHARD = re.compile(r"__([0-9]+)_[0-9]+\.distcp")


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, tensors not yet read."""

    checkpoint: Checkpoint
    reader: ShardReader
    values: dict[str, Any]
    """Everything among the shards that is no tensor, by flat name."""
    counters: dict[str, Any]
    """`train_state`, and `num_floating_point_operations_so_far`."""
    shared_state: bytes | None
    """None, and no rank has a state either: the checkpoint is a foreign one."""

    def read_rank_state(self, rank: int, filesystem: Filesystem) -> bytes:
        """Return the state file of one of the saving ranks.

        Raises:
            CorruptCheckpointError: it is not listed, so that nothing vouches for it, or damaged.
        """
        return _read_checked(self.checkpoint, rank_state_name(rank), filesystem)

    def bring(
        self, find_targets: Callable[[], Mapping[str, torch.Tensor]], coordinator: Coordinator
    ) -> None:
        """Fetch what these tensors need and only other ranks can read; here every rank reads all.

        Every rank calls it together, before any reads.
        """

    def sources(self) -> tuple[ShardSource, ...]:
        """Return the files that this rank has read tensors from."""
        root, tier = self.checkpoint.path, self.checkpoint.manifest.tier
        return tuple(
            ShardSource(tier, f"{root.name}/{path}", size_bytes, _owner_of(path))
            for path, size_bytes in sorted(self.reader.taken.items())
        )


def verify_together(
    checkpoint: Checkpoint, coordinator: Coordinator, filesystem: Filesystem
) -> list[Damage]:
    """Read every file once, each rank its share; return all damages on every rank."""
    store = Store(checkpoint.path.parent, filesystem)
    share = _shares(checkpoint.manifest.files, coordinator.world_size)[coordinator.rank]

    def verify() -> list[Damage]:
        return name_tensors(checkpoint, store.verify(checkpoint, share), filesystem)

    parts = coordinator.all_gather("verify", verify)
    return [damage for part in parts for damage in part]


def open_contents(checkpoint: Checkpoint, filesystem: Filesystem) -> Contents:
    """Read the small state of a checkpoint.

    Raises:
        CorruptCheckpointError: a file is missing, or is not what it should be.
    """
    if isinstance(checkpoint, ForeignCheckpoint):
        foreign = open_shards(checkpoint, filesystem)
        return Contents(checkpoint, foreign, foreign.read_values(), unchanged_counters(), None)
    where = checkpoint.path / TRAIN_STATE_NAME
    content = _read_checked(checkpoint, TRAIN_STATE_NAME, filesystem)
    try:
        counters = json.loads(content)
        # Whether the live counters can take the rest over is asked before anything is touched.
        step = dict(counters["train_state"])["step"]
        int(counters["num_floating_point_operations_so_far"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(str(where), f"is not a train state: {error}") from error
    if type(step) is not int or step != checkpoint.iteration:
        raise CorruptCheckpointError(str(where), f"is of step {step!r}")
    _read_checked(checkpoint, RUN_CONFIG_NAME, filesystem)  # vouched for too
    reader = open_shards(checkpoint, filesystem)
    return Contents(
        checkpoint,
        reader,
        reader.read_values(),
        counters,
        _read_checked(checkpoint, SHARED_STATE_NAME, filesystem),
    )


def open_shards(checkpoint: Checkpoint, filesystem: Filesystem) -> ShardReader:
    """Understand where tensors and values lie, reading none of them.

    Raises:
        CorruptCheckpointError: `.metadata` is missing, or is not what it should be.
    """
    if isinstance(checkpoint, ForeignCheckpoint):
        return open_foreign(checkpoint, filesystem)
    metadata = _read_checked(checkpoint, METADATA_NAME, filesystem)
    records = {each.path: each for each in checkpoint.manifest.files}
    return ShardReader.open(checkpoint.path, metadata, records, filesystem)


def _read_checked(checkpoint: Checkpoint, name: str, filesystem: Filesystem) -> bytes:
    """Return the content of a small file, held against its digest."""
    record = next((each for each in checkpoint.manifest.files if each.path == name), None)
    if record is None:
        raise CorruptCheckpointError(
            str(checkpoint.path / MANIFEST_NAME), f"does not list {name}, which a load needs"
        )
    path = checkpoint.path / name
    try:
        content = read_bytes(filesystem, path)
    except FileNotFoundError as error:  # gone since, or not seen from this node yet
        raise CorruptCheckpointError(str(path), "is missing") from error
    if (difference := find_difference(record, BytesIO(content))) is not None:
        raise CorruptCheckpointError(str(path), difference.reason, difference.byte_range)
    return content


def _owner_of(path: str) -> int | None:
    """Return the rank that wrote a shard file, if its name says so as torch's do."""
    match = _SHARD.fullmatch(path)
    return int(match[1]) if match else None


def _shares(records: Sequence[FileRecord], world_size: int) -> list[list[FileRecord]]:
    """Deal files to ranks, largest first, each to the rank that has least."""
    shares: list[list[FileRecord]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for record in sorted(records, key=lambda each: (-each.size_bytes, each.path)):
        rank = loads.index(min(loads))
        shares[rank].append(record)
        loads[rank] += record.size_bytes + 1
    return shares
