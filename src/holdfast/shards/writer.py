"""A nested state of tensors becomes the shard files of a pending checkpoint.

Owns the dialogue with torch.distributed.checkpoint on the way out: plan, write, `.metadata`.
Promises that every byte goes through the filesystem seam, that ranks talk only through the
coordinator it is given (so it may run on any thread), and that plain
`torch.distributed.checkpoint.load` reads the result. Refuses to decide where, when or whether: the
tier that calls it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.storage import WriteResult

from holdfast.coordination import Coordinator
from holdfast.filesystem import Filesystem
from holdfast.shards.inventory import METADATA_NAME
from holdfast.shards.seam import SeamFileSystem


class _SeamWriter(FileSystemWriter):
    """torch's writer on our file system; durability is the caller's, who re-opens and syncs."""

    def __init__(self, pending: Path, checkpoint_name: str, filesystem: Filesystem) -> None:
        super().__init__(pending, sync_files=False, overwrite=False)
        self.fs = SeamFileSystem(filesystem)
        self._checkpoint_name = checkpoint_name

    def storage_meta(self) -> StorageMeta:
        # torch would record the pending path, which the commit is about to rename.
        return StorageMeta(checkpoint_id=self._checkpoint_name, save_id=self.save_id)


@dataclass
class ShardWriter:
    """Writes one state into one pending directory; every rank makes the same two calls."""

    pending: Path
    checkpoint_name: str
    filesystem: Filesystem
    coordinator: Coordinator

    def __post_init__(self) -> None:
        self._writer = _SeamWriter(self.pending, self.checkpoint_name, self.filesystem)
        self._planner = DefaultSavePlanner()
        self._metadata: Metadata | None = None

    def plan(self, state: dict[str, Any]) -> None:
        """Agree on which rank writes which item; replicated items are written once.

        Raises:
            StageFailedError: planning failed on some rank.
        """
        leads = self.coordinator.rank == 0

        def plan_locally() -> Any:
            self._planner.set_up_planner(state, self._writer.storage_meta(), leads)
            self._writer.set_up_storage_writer(leads)
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

        local_plans = self.coordinator.gather("plan", plan_locally)

        def plan_globally() -> Any:
            assert local_plans is not None
            plans, self._metadata = self._planner.create_global_plan(local_plans)
            return self._writer.prepare_global_plan(plans)

        self._plan = self._planner.finish_plan(self.coordinator.scatter("plan", plan_globally))

    def write(self) -> tuple[list[str], list[WriteResult]]:
        """Write this rank's shard file; return its name in a list, and what torch wrote where."""
        if not self._plan.items:
            return [], []
        results: list[WriteResult] = self._writer.write_data(self._plan, self._planner).wait()
        return sorted({each.storage_data.relative_path for each in results}), results

    def write_metadata(self, results: list[list[WriteResult]]) -> str:
        """Write `.metadata` from every rank's results, on rank 0; return its name."""
        assert self._metadata is not None
        self._writer.finish(self._metadata, results)
        return METADATA_NAME
