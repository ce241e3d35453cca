"""A small job on the local tier, on nodes that are directories of this machine.

Owns a state that is partly sharded over ranks and partly the same on all, whose every value follows
from the iteration, and one rank's part of saving it and of loading it again. Promises that a loaded
state is compared bit for bit, and that a node is lost by removing one directory. Knows no manager:
the tier is called as the manager calls it.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from holdfast.config import LocalConfig, LocalKeepConfig, ReplicationConfig
from holdfast.errors import CheckpointError, CorruptCheckpointError
from holdfast.filesystem import Filesystem, LocalFilesystem
from holdfast.format.items import structure_of
from holdfast.format.layout import Item, lay_out
from holdfast.protocol import TrainState
from holdfast.ranks.channels import open_channels
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.job import Progress
from holdfast.snapshot.arena import Arena
from holdfast.snapshot.shard import ShardPlan, Share, StagedShard
from holdfast.storage.identity import CommitIdentity
from holdfast.tiers.local.tier import LocalTier
from holdfast.tiers.select import Commit, Condition
from holdfast.tiers.tier import Contents, Snapshot, Wanted
from tests.support.deadlines import ANSWER_SECONDS

RUN_ID = "run"
ROWS = 24
"""Of each sharded tensor; divides evenly by 1, 2, 3 and 4 ranks."""
CAPACITY = 4096


@contextmanager
def memory_directory() -> Iterator[Path]:
    """Make a directory in RAM, gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="holdfast-test-", dir="/dev/shm"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _open_channels(timeout_seconds: float) -> list[Coordinator]:
    """Open them once for all jobs of this process: a new connection may take seconds."""
    return open_channels(2, timeout_seconds, f"test {timeout_seconds}")


@dataclass
class Loaded:
    """What a load came to on one rank."""

    iteration: int | None
    """None: nothing could be loaded."""
    wrong: list[str] = field(default_factory=list)
    """Names whose bits are not those that were saved."""
    reasons: list[str] = field(default_factory=list)
    rank_states: Sequence[str] = field(default_factory=list)
    tries: int = 0


class Job:
    """One rank of a job with a local tier."""

    def __init__(
        self,
        root: Path,
        nodes: Sequence[str] | None = None,
        *,
        factor: int = 1,
        keep: int = 2,
        sharded: int = 2,
        replicated: int = 3,
        width: int = 5,
        timeout_seconds: float = ANSWER_SECONDS,
        attempt: int = 1,
        jump: int | None = None,
        filesystem: Filesystem | None = None,
    ) -> None:
        self.control, self.writer = _open_channels(timeout_seconds)
        self.rank, self.size = self.control.rank, self.control.world_size
        self.nodes = list(nodes or ["node0"] * self.size)
        self.node = self.nodes[self.rank]
        self.attempt = attempt
        self.directory = root / self.node
        self._shapes = {f"model.s{number}": (ROWS, width) for number in range(sharded)}
        self._shapes |= {f"model.r{number}": (7, width) for number in range(replicated)}
        self._sequence = 0
        self.tier = LocalTier(
            LocalConfig(
                directory=str(self.directory),
                keep=LocalKeepConfig(last=keep),
                replication=ReplicationConfig(factor=factor, jump=jump),
            ),
            RUN_ID,
            filesystem or LocalFilesystem(),
            self.control,
            timeout_seconds,
            node=self.node,
        )
        items = self._live_items()
        self.structure = structure_of(items)
        self.layout = lay_out([item for item in items if self._writes(item)])
        self.arena = None if self.tier.in_memory else Arena(self.layout)

    # -- the state -------------------------------------------------------------------------------

    def _live_items(self) -> list[Item]:
        """Return everything that this rank has: its rows, and all of what is replicated."""
        rows = ROWS // self.size
        items = []
        for name, shape in self._shapes.items():
            offsets, lengths = (0, 0), shape
            if name.startswith("model.s"):
                offsets, lengths = (rows * self.rank, 0), (rows, shape[1])
            path = tuple(name.split("."))
            items.append(Item(name, path, torch.float32, shape, offsets, lengths))
        items.append(Item("optimizer.lr", ("optimizer", "lr"), None, (), (), (), CAPACITY))
        items.append(Item("data", ("data",), None, (), (), (), CAPACITY, per_rank=True))
        return items

    def _writes(self, item: Item) -> bool:
        """Whether this rank writes an item: duplicates are divided within a node."""
        mates = [rank for rank, node in enumerate(self.nodes) if node == self.node]
        if item.per_rank or (item.name.startswith("model.s") and self.size > 1):
            return True
        return mates[sum(map(ord, item.name)) % len(mates)] == self.rank

    def _whole(self, name: str, iteration: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * iteration + sum(map(ord, name)))
        return torch.rand(self._shapes[name], generator=generator)

    def _source(self, item: Item, iteration: int) -> torch.Tensor | bytes:
        if item.dtype is None:
            stream = io.BytesIO()
            own = f"rank {self.rank} at {iteration}"
            torch.save(own if item.per_rank else iteration / 7, stream)
            return stream.getvalue()
        whole = self._whole(item.name, iteration)
        return whole[item.offsets[0] : item.offsets[0] + item.lengths[0]]

    # -- save ------------------------------------------------------------------------------------

    def save(self, iteration: int, before_write: Callable[[], None] | None = None) -> None:
        """Save the state of an iteration and wait for it."""
        arena = self.tier.reserve(self.layout, self.control) or self.arena
        assert arena is not None
        arena.stage([self._source(slot.item, iteration) for slot in self.layout.slots]).wait()
        if before_write is not None:
            before_write()
        counters = TrainState(step=iteration).to_dict()
        self.tier.write(
            Snapshot(
                iteration=iteration,
                shard=StagedShard(self._plan(), arena, arena, None, Progress()),
                train_state=json.dumps(
                    {"train_state": counters, "num_floating_point_operations_so_far": iteration}
                ).encode(),
                run_config=b"{}\n",
            ),
            self._identify,
            self.writer,
        )

    def _plan(self) -> ShardPlan:
        share = Share(self.layout, range(len(self.layout.slots)))
        names = len(self._shapes) + 2
        return ShardPlan(bytes(16), self.structure, share, share, "unused", names)

    def _identify(self) -> CommitIdentity:
        self._sequence = max(self._sequence, self.tier.newest_sequence) + 1
        return CommitIdentity(self.attempt, self._sequence)

    # -- load ------------------------------------------------------------------------------------

    def load(self) -> Loaded:
        """Load the newest commit that can be loaded, as the manager does, and compare it."""
        tries = 0
        while True:
            commit = self.survey()
            reasons = self.control.broadcast(
                "reasons", lambda: [f"{each.path}: {each.reason}" for each in self.tier.passed]
            )
            if commit is None:
                return Loaded(None, reasons=reasons, tries=tries)
            tries += 1
            assert tries < 10, reasons
            iteration = commit.iteration
            assert iteration is not None
            try:
                wanted = Wanted(lambda state: True, lambda contents: None)
                contents = self.tier.open(commit, self.control, wanted)
                targets = self._targets()
                self._read(contents, targets)
            except CorruptCheckpointError as error:
                self.tier.pass_over(commit, self.control, error)
                continue
            wrong = [
                name for name, each in targets.items() if not self._is_right(name, each, iteration)
            ]
            if contents.values != {"optimizer.lr": iteration / 7}:
                wrong.append("optimizer.lr")
            if contents.counters["train_state"]["step"] != iteration:
                wrong.append("counters")
            saved = contents.checkpoint.manifest.world_size
            ranks = [self.rank] if saved == self.size else list(range(saved))
            states = [contents.small["data"]] if saved == self.size else contents.copies["data"]
            for rank, state in zip(ranks, states, strict=True):
                if state != f"rank {rank} at {iteration}":
                    wrong.append(f"state of rank {rank}")
            restore = self.tier.finish_load()
            if restore is not None:
                restore(self.control)
            return Loaded(iteration, wrong, reasons, states, tries)

    def survey(self) -> Commit | None:
        """Return the newest commit that can be loaded; None: there is none."""
        commits = self.tier.survey(self.control, lambda record: None)
        return next((each for each in commits if each.condition is Condition.SOUND), None)

    def _read(self, contents: Contents, targets: dict[str, torch.Tensor]) -> None:
        contents.bring(lambda: targets, self.control)
        self.control.all_reduce(
            "read", lambda: contents.reader.read_tensors(targets), lambda _: None
        )

    def _targets(self) -> dict[str, torch.Tensor]:
        targets: dict[str, torch.Tensor] = {}
        for item in self._live_items():
            if item.dtype is None:
                continue
            if item.name.startswith("model.s") and self.size > 1:
                mesh = init_device_mesh("cpu", (self.size,))
                local = torch.full(item.lengths, float("nan"))
                targets[item.name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
            else:
                targets[item.name] = torch.full(item.size, float("nan"))
        return targets

    def _is_right(self, name: str, value: torch.Tensor, iteration: int) -> bool:
        whole = self._whole(name, iteration)
        if isinstance(value, DTensor):
            rows = ROWS // self.size
            return torch.equal(value.to_local(), whole[rows * self.rank : rows * (self.rank + 1)])
        return torch.equal(value, whole)

    def close(self) -> None:
        """End the job."""
        self.tier.close()

    def files(self) -> list[str]:
        """Return what this rank's node keeps, relative to the run's directory."""
        root = self.directory / RUN_ID
        return sorted(str(each.relative_to(root)) for each in root.rglob("*") if each.is_file())


def published(root: Path, node: str) -> list[str]:
    """Return the published files of a node."""
    base = root / node / RUN_ID
    return sorted(
        str(each.relative_to(base)) for each in base.rglob("*_local.pt") if each.is_file()
    )


def shard_path(root: Path, node: str, rank: int, iteration: int, owner: int | None = None) -> Path:
    """Return the path of a rank's file; `owner`: of the copy that it holds for another rank."""
    name = f"iter_{iteration:07d}_{rank if owner is None else owner}_local.pt"
    return root / node / RUN_ID / str(rank) / name


def truncate(path: Path) -> None:
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, offset: int = 4100) -> None:
    """Change one bit in the middle of a file."""
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 4]))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "flipped": flip,
    "deleted": lambda path: path.unlink(),
}


def lose_node(root: Path, node: str) -> None:
    """Lose everything that a node had."""
    shutil.rmtree(root / node)


def wait_for_all() -> None:
    """Let every rank come this far."""
    if distributed.is_initialized():
        distributed.barrier()


def failure_of(work: Callable[[], Any]) -> CheckpointError:
    """Return the error that a piece of work raises."""
    try:
        work()
    except CheckpointError as error:
        return error
    raise AssertionError("nothing was raised")


def hide_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nvidia-resiliency-ext be as if it were not installed."""
    for name in [each for each in sys.modules if each.startswith("nvidia_resiliency_ext")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
