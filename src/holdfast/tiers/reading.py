"""A resolved checkpoint is verified and opened, before anything live is touched.

Owns how ranks share the work of verifying and which small files a rank needs. Promises that every
rank hears of every damage, and that all small state was read when `open_contents` returns. Decides
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.coordination import Coordinator
from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import Filesystem, read_bytes
from holdfast.manifest import MANIFEST_NAME, FileRecord
from holdfast.protocol import TrainState
from holdfast.shards.reader import ShardReader
from holdfast.shards.writer import METADATA_NAME
from holdfast.store import Checkpoint, Damage, Store
from holdfast.tiers.persistent import SHARED_STATE_NAME, TRAIN_STATE_NAME, rank_state_name


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, tensors not yet read."""

    checkpoint: Checkpoint
    reader: ShardReader
    values: dict[str, Any]
    """Everything among the shards that is no tensor, by flat name."""
    counters: dict[str, Any]
    """`train_state`, and `num_floating_point_operations_so_far`."""
    shared_state: bytes

    def read_rank_state(self, rank: int, filesystem: Filesystem) -> bytes:
        """Return the state file of one of the saving ranks.

        Raises:
            CorruptCheckpointError: the manifest does not list it, so that nothing vouches for it.
        """
        _require_listed(self.checkpoint, rank_state_name(rank))
        return read_bytes(filesystem, self.checkpoint.path / rank_state_name(rank))


def verify_together(store: Store, checkpoint: Checkpoint, coordinator: Coordinator) -> list[Damage]:
    """Read every file once, each rank its share; return all damages on every rank."""
    share = _shares(checkpoint.manifest.files, coordinator.world_size)[coordinator.rank]
    parts = coordinator.together("verify", lambda: store.verify(checkpoint, share))
    return [damage for part in parts for damage in part]


def open_contents(checkpoint: Checkpoint, filesystem: Filesystem) -> Contents:
    """Read the small state of a checkpoint.

    Raises:
        CorruptCheckpointError: a file is missing, or is not what it should be.
    """
    for name in (TRAIN_STATE_NAME, SHARED_STATE_NAME, METADATA_NAME):
        _require_listed(checkpoint, name)
    where = checkpoint.path / TRAIN_STATE_NAME
    try:
        counters = json.loads(read_bytes(filesystem, where))
        step = counters["train_state"]["step"]
        # Refused here, while nothing live is touched: what `load` takes from it at its end.
        TrainState().update_from(counters["train_state"])
        int(counters["num_floating_point_operations_so_far"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(str(where), f"is not a train state: {error}") from error
    if step != checkpoint.iteration:
        raise CorruptCheckpointError(str(where), f"is of step {step}")
    listed = {each.path for each in checkpoint.manifest.files}
    reader = ShardReader.open(checkpoint.path, listed, filesystem)
    return Contents(
        checkpoint,
        reader,
        reader.read_values(),
        counters,
        read_bytes(filesystem, checkpoint.path / SHARED_STATE_NAME),
    )


def _require_listed(checkpoint: Checkpoint, name: str) -> None:
    if not any(each.path == name for each in checkpoint.manifest.files):
        raise CorruptCheckpointError(
            str(checkpoint.path / MANIFEST_NAME), f"does not list {name}, which a load needs"
        )


def _shares(records: Sequence[FileRecord], world_size: int) -> list[list[FileRecord]]:
    """Deal files to ranks, largest first, each to the rank that has least."""
    shares: list[list[FileRecord]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for record in sorted(records, key=lambda each: (-each.size_bytes, each.path)):
        rank = loads.index(min(loads))
        shares[rank].append(record)
        loads[rank] += record.size_bytes + 1
    return shares
