"""Where the checkpoints of a run of one rank lie in a fault test, and how a process of it begins.

Owns the few things in which the tiers differ for a test that only starts, trains, saves and loads:
the configuration of a process, which tier a save is for, and what must not be left behind. Knows no
faults.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from holdfast.storage.digests import ALIGNMENT_BYTES, footer_size
from holdfast.storage.store import checkpoint_name
from holdfast.tiers.local.shard_file import read_trailer
from tests.faults import local_stories
from tests.faults.jobs import Job, State, damages, load
from tests.faults.local_crashes import check_is_tidy
from tests.faults.local_stories import place_in_memory, place_on_disk
from tests.faults.tiers import NEEDS_LOCAL
from tests.support.kernel_calls import KernelCalls, Tree, plant, tree_of


@dataclass(frozen=True)
class Place:
    """A directory for a run, one of whose tiers is tried."""

    base: Path
    to_local: bool
    """Which tier that is."""

    @property
    def label(self) -> str:
        """What stands before the rows of the table that this tier counts for."""
        return "local: " if self.to_local else ""

    def inside(self, name: str) -> Place:
        """Return a place for another run, below this one."""
        (self.base / name).mkdir()
        return replace(self, base=self.base / name)

    def calls(self) -> KernelCalls:
        """Return what sees the calls by which the tier that is tried changes what is there."""
        return KernelCalls(self.base / ("local" if self.to_local else "store"))

    def start(self, *, step: int | None = None, **settings: Any) -> Job:
        """Start a process of the run."""
        if self.to_local:
            return local_stories.start(self.base, step=step, **settings)
        return Job(self.base / "store", **{"seed": 1, "load": {"step": step}, **settings})

    def save(self, job: Job) -> None:
        """Save in the tier that is tried."""
        job.save(to_local=self.to_local)

    def begin_save(self, job: Job) -> None:
        """Save in the tier that is tried; with async_save return before it is written."""
        job.begin_save(to_local=self.to_local)

    def newest(self, **settings: Any) -> State:
        """Return what a fresh process loads."""
        job = self.start(**settings)
        found = load(job)
        job.close()
        return found

    def newest_beside(self, **settings: Any) -> State:
        """Return what one loads that sweeps nothing away of what a running job keeps."""
        with tempfile.TemporaryDirectory(dir=self.base.parent) as folder:
            plant(Path(folder), self.tree())
            return replace(self, base=Path(folder)).newest(**settings)

    def tree(self) -> Tree:
        """Return all there is."""
        return tree_of(self.base)

    def shard(self, iteration: int) -> Path:
        """Return the file that holds the tensors of a checkpoint."""
        if not self.to_local:
            return self.base / "store" / checkpoint_name(iteration) / "__0_0.distcp"
        (found,) = (self.base / "local").glob(f"*/0/iter_{iteration:07d}_0_local.pt")
        return found

    def body_bytes(self, iteration: int) -> int:
        """Return how much of a shard is covered by blocks: what lies before its footer."""
        path = self.shard(iteration)
        if self.to_local:
            with path.open("rb") as stream:
                return read_trailer(stream, str(path)).record.body_bytes
        return covered_bytes(path)

    def check_is_sound(self) -> None:
        """Demand that nothing waits to be swept once the processes have ended, and no damage."""
        check_is_tidy(self.base)
        if (self.base / "store").exists():
            assert not damages(self.base / "store")


def covered_bytes(path: Path) -> int:
    """Return the size of a checkpoint's file without the footer that a shard ends with."""
    size_bytes = path.stat().st_size
    if path.suffix != ".distcp":
        return size_bytes
    fitting = (
        body_bytes
        for body_bytes in range(0, size_bytes, ALIGNMENT_BYTES)
        if body_bytes + footer_size(body_bytes) == size_bytes
    )
    return next(fitting)


@dataclass(frozen=True)
class Pair:
    """The directory of a run of two ranks, each a node of its own, one of whose tiers is tried."""

    root: Path
    to_local: bool
    """Which tier that is."""

    @property
    def label(self) -> str:
        """What stands before the rows of the table that this tier counts for."""
        return "local: " if self.to_local else ""

    @property
    def own(self) -> Path:
        """What this rank writes into: the store, or the memory of its node."""
        return self.root / ("ab"[distributed.get_rank()] if self.to_local else "store")

    def start(self, *, factor: int = 2, **options: Any) -> Job:
        """Start this rank; `factor`: on how many nodes a local shard lies."""
        rank = distributed.get_rank()
        if self.to_local:
            os.environ["HOLDFAST_NODE"] = "ab"[rank]
            replication = {"factor": factor}
            options["local"] = {"directory": str(self.own), "replication": replication}
        return Job(self.root / "store", seed=1, rank=rank, ranks=2, **options)

    def save(self, job: Job) -> None:
        """Save in the tier that is tried."""
        job.save(to_local=self.to_local)


@contextmanager
def _persistent(folder: Path) -> Iterator[Place]:
    (folder / "base").mkdir()
    yield Place(folder / "base", to_local=False)


@contextmanager
def _local_in_memory(folder: Path) -> Iterator[Place]:
    with place_in_memory() as base:
        yield Place(base, to_local=True)


@contextmanager
def _local_on_disk(folder: Path) -> Iterator[Place]:
    with place_on_disk(folder) as base:
        yield Place(base, to_local=True)


PLACES = [
    pytest.param(_persistent, id="persistent"),
    pytest.param(_local_in_memory, id="local_in_memory", marks=NEEDS_LOCAL),
    pytest.param(_local_on_disk, id="local_on_disk", marks=NEEDS_LOCAL),
]
"""One of them at a time is the fixture `place`."""
