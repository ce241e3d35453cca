"""Directories that torch.distributed.checkpoint wrote without holdfast.

Owns how such a directory is recognised, and what a load sees instead of the parts that it lacks: a
manifest that lists nothing, and counters that leave everything as it is. Promises that a checkpoint
of ours is never taken for one, whatever it has lost, and that a load says that nothing vouches for
the bytes. It belongs to no run and no store; nothing is ever written into it.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.digests import FileRecord
from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import Filesystem, read_bytes
from holdfast.manifest import MANIFEST_NAME, Manifest
from holdfast.shards.foreign import ForeignReader
from holdfast.shards.inventory import METADATA_NAME
from holdfast.store import Checkpoint
from holdfast.tiers.persistent import RUN_CONFIG_NAME, SHARED_STATE_NAME, TRAIN_STATE_NAME

logger = logging.getLogger(__name__)

TIER_NAME = "foreign"
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
        return cls(path, Manifest("", 0, 0, iteration, TIER_NAME, 1, "", ()))


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
