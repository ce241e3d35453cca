"""One start of a small training job: live state, counters and a manager.

Owns what every fault test does to a run: start it, train it, save it, load it, and look at what is
left on disk. Promises that the same calls give the same bits. Knows no faults.
"""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from holdfast.config import CheckpointConfig
from holdfast.filesystem import Filesystem, LocalFilesystem
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    GlobalState,
    LoadResult,
    TrainState,
)
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store
from tests.support.states import digest, make_run

_LEFTOVER = re.compile(r"(?P<place>.*)\.(?P<mark>pending|replaced)-[0-9a-f]{8}")


State = tuple[int, str] | None
"""An iteration and the digest of everything it holds; None: nothing is found."""

_trainings = itertools.count(1)


class Job:
    """A process that trains, from its start to its end or its death; with DDP on several ranks."""

    def __init__(
        self,
        directory: Path,
        *,
        kind: str = "small",
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        filesystem: Filesystem | None = None,
        **config: Any,
    ) -> None:
        self.directory = directory
        self.run = make_run(kind, seed, rank, ranks)
        if ranks > 1:
            self.run.model = DistributedDataParallel(self.run.model)
        self.state = GlobalState(cfg={"kind": kind}, train_state=TrainState())
        values = {"async_save": False, "persistent": {"directory": str(directory)}}
        self.manager = DefaultCheckpointManager(
            CheckpointConfig.from_mapping({**values, **config}), filesystem=filesystem
        )

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.state.train_state.step

    def train_to(self, step: int) -> None:
        """Train until so many steps are completed."""
        self.run.train(step - self.step)
        self.state.train_state.step = step

    def save(self, *, to_local: bool = False) -> None:
        """Save here, and wait until the outcome was told."""
        self.begin_save(to_local=to_local)
        self.manager.finalize_async_saves(self.state, blocking=True)

    def begin_save(self, callback_manager: Any | None = None, *, to_local: bool = False) -> None:
        """Save here; with async_save return before it is written."""
        run = self.run
        context = CheckpointSaveContext(
            self.state,
            run.model,
            run.optimizer,
            run.scheduler,
            num_floating_point_operations_so_far=7 * self.step,
            train_data_iterator=run.stream,
            non_persistent_ckpt=to_local,
        )
        self.manager.save(context, callback_manager)

    def load(self) -> LoadResult:
        """Restore what the configuration asks for."""
        run = self.run
        context = CheckpointLoadContext(
            self.state,
            run.model,
            run.optimizer,
            run.scheduler,
            train_data_iterator=run.stream,
        )
        return self.manager.load(context)

    def close(self) -> None:
        """End here: wait for what is under way, and let go of the files of the local tier."""
        self.manager.finalize_async_saves(self.state, terminate=True)

    def digests(self) -> dict[str, str]:
        """Digest everything that a checkpoint carries, counters included."""
        return self.run.digests() | {"counters": str(self.state.train_state.to_dict())}


def state_of(job: Job) -> tuple[int, str]:
    """Return what a checkpoint taken now would hold."""
    return job.step, digest(job.digests())


def load(job: Job) -> State:
    """Load, and return what was found."""
    return state_of(job) if job.load().found else None


def train_to(job: Job, iteration: int) -> tuple[int, str]:
    """Take one step, call it `iteration`, and return the state.

    No batch is ever taken twice: a resumed job is exact, and would arrive where another did.
    """
    job.run.stream.position = 1000 * next(_trainings)
    job.run.train(1)
    job.state.train_state.step = iteration
    return state_of(job)


def job_of_rank(directory: Path, **options: Any) -> Job:
    """Start the job of this rank of an initialised process group."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    return Job(directory, rank=rank, ranks=ranks, **options)


def make_store(directory: Path, *steps: int, **options: Any) -> dict[int, dict[str, str]]:
    """Train one job and save at each step; return the digests of each."""
    job = Job(directory, **options)
    found = {}
    for step in steps:
        job.train_to(step)
        job.save()
        found[step] = job.digests()
    return found


def copy_store(source: Path, target: Path) -> Path:
    """Copy a store as it is; an older copy is replaced."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target


def leftovers(directory: Path) -> list[str]:
    """Name everything in a store that waits to be swept.

    A replaced checkpoint whose successor never came still counts as a checkpoint, and is none.
    """
    names = {each.name for each in directory.iterdir()}
    return sorted(
        name
        for name in names
        if (match := _LEFTOVER.fullmatch(name))
        and (match["mark"] == "pending" or match["place"] in names)
    )


def damages(directory: Path) -> list[str]:
    """Name everything that is listed in a store and not sound."""
    store = Store(PosixStorage(directory, LocalFilesystem()))
    listing = store.listing()
    found = [each.reason for each in listing.broken]
    return found + [str(each) for one in listing.checkpoints for each in store.verify(one)]
