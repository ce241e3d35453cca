"""A job that was started again gets what its nodes have lost from peers, and gives it back."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from holdfast.filesystem import LocalFilesystem
from holdfast.format.layout import Container, container_of
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import LoadResult
from tests.support.deadlines import ANSWER_SECONDS
from tests.support.managers import Live, manager_of
from tests.support.nodes import flip, memory_directory, wait_for_all
from tests.support.ranks import run_ranks

pytest.importorskip("nvidia_resiliency_ext")

NODES = ("a", "b")
WIDTH = 1536
"""Of a model whose shards are several blocks of digests on each of two ranks."""


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory in RAM."""
    with memory_directory() as path:
        yield path


class _Full(LocalFilesystem):
    """A file system on which, as long as somebody says so, there is no room for a file."""

    def __init__(self) -> None:
        super().__init__()
        self.is_full = False

    def open_new(self, path: Path) -> Any:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return super().open_new(path)


class _Job:
    """One rank of a job whose ranks are nodes of their own, with so many copies of each shard."""

    def __init__(self, root: Path, *, factor: int = 2) -> None:
        self.root = root
        self.factor = factor
        self.rank = distributed.get_rank()
        os.environ["HOLDFAST_NODE"] = NODES[self.rank]
        self.disk = _Full()
        self.live = _state(sharded=True)
        self.manager = self._manager()

    def _manager(self) -> DefaultCheckpointManager:
        return manager_of(
            self.root / "store",
            self.disk,
            run_id="run",
            async_save=True,
            timeout_seconds=ANSWER_SECONDS,
            local={
                "directory": str(self.root / NODES[self.rank]),
                "replication": {"factor": self.factor},
            },
        )

    def save(self, iteration: int) -> dict[str, torch.Tensor]:
        """Change everything, save it locally, and return what was saved."""
        own = torch.Generator().manual_seed(10 * iteration + self.rank)
        common = torch.Generator().manual_seed(10 * iteration)
        for each in _tensors(self.live).values():
            if isinstance(each, DTensor):
                each.to_local().copy_(torch.rand(each.to_local().shape, generator=own))
            else:
                each.copy_(torch.rand(each.shape, generator=common))
        self.live.save(self.manager, iteration, non_persistent_ckpt=True)
        self.manager.finalize_async_saves(self.live.state, blocking=True)
        return _copy(self.live)

    def restart(self, *, sharded: bool = True) -> None:
        """End this job, and begin another with a state of its own."""
        self.manager.finalize_async_saves(self.live.state, blocking=True, terminate=True)
        wait_for_all()
        self.live = _state(sharded=sharded, seed=9)
        self.manager = self._manager()

    def lose(self, node: str) -> None:
        """Lose what a node has in memory."""
        if NODES[self.rank] == node:
            shutil.rmtree(self.root / node)
        wait_for_all()

    def load(self) -> LoadResult:
        return self.live.load(self.manager)

    def files(self, iteration: int) -> list[str]:
        """Return the sound shards of an iteration on all nodes, when all ranks are here."""
        wait_for_all()
        found = [
            f"{node} {path.parent.name}/{path.name}"
            for node in NODES
            for path in (self.root / node).glob(f"run/*/iter_{iteration:07d}_*_local.pt")
        ]
        wait_for_all()
        return sorted(found)

    def path(self, holder: int, owner: int, iteration: int) -> Path:
        name = f"iter_{iteration:07d}_{owner}_local.pt"
        return self.root / NODES[holder] / "run" / str(holder) / name

    def end(self) -> None:
        self.manager.finalize_async_saves(self.live.state, blocking=True, terminate=True)


def _state(*, sharded: bool, seed: int = 0) -> Live:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 3))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    live = Live(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    live.optimizer.step()
    return live


def _tensors(live: Live) -> dict[str, torch.Tensor]:
    assert isinstance(live.model, nn.Module)
    found = {}
    for name, parameter in live.model.named_parameters():
        found[name] = parameter.detach()
        for key, value in live.optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value.detach()
    return found


def _copy(live: Live) -> dict[str, torch.Tensor]:
    return {
        name: (each.to_local() if isinstance(each, DTensor) else each).clone()
        for name, each in _tensors(live).items()
    }


def _wrong(live: Live, saved: dict[str, torch.Tensor]) -> list[str]:
    found = _copy(live)
    return [name for name, each in saved.items() if not torch.equal(found[name], each)]


BOTH = [f"{node} {rank}/iter_0000002_{owner}_local.pt" for rank, node in enumerate(NODES)
        for owner in (0, 1)]  # fmt: skip


def _lose_a_node(root: Path) -> tuple[LoadResult, list[str], list[str], list[str]]:
    job = _Job(root)
    job.save(1)
    saved = job.save(2)
    job.restart()
    job.lose("b")
    result = job.load()
    wrong = _wrong(job.live, saved)
    job.manager.finalize_async_saves(job.live.state, blocking=True)
    files = job.files(2)
    # Nothing of it is needed any more: the copies that were written again serve in their turn.
    job.restart()
    job.lose("a")
    again = job.load()
    wrong += _wrong(job.live, saved)
    job.end()
    return result, files, wrong, [each.node or "" for each in again.sources]


def test_a_lost_shard_comes_from_its_peer_and_both_copies_are_written_again(root: Path) -> None:
    """The state is that which was saved, its sources are told, and the next loss finds two."""
    results = run_ranks(_lose_a_node, 2, root)
    shares = []
    for rank, (result, files, wrong, again) in enumerate(results):
        assert (result.iteration, result.tier, wrong) == (2, "local", [])
        (source,) = result.sources
        assert (source.tier, source.owner, source.rank, source.node) == ("local", rank, 0, "a")
        assert source.path == f"run/0/iter_0000002_{rank}_local.pt"
        shares.append(source.size_bytes)
        assert files == BOTH
        assert again == ["b"]
    whole = WIDTH * (WIDTH + 1) + WIDTH // 3 * (WIDTH + 1)
    assert sum(shares) == pytest.approx(3 * 4 * whole, rel=1e-3)


def _load_after_damage(root: Path) -> tuple[LoadResult, list[str]]:
    job = _Job(root)
    saved = job.save(1)
    job.save(2)
    job.restart()
    job.lose("b")
    if job.rank == 0:
        flip(job.path(0, 1, 2), offset=9 << 20)  # in its second block: seen when it arrives
    wait_for_all()
    result = job.load()
    wrong = _wrong(job.live, saved)
    job.end()
    return result, wrong


def test_a_block_that_arrives_damaged_sends_all_ranks_to_the_commit_before(root: Path) -> None:
    """What had come into place of the newer commit is overwritten, on both ranks."""
    for result, wrong in run_ranks(_load_after_damage, 2, root):
        assert (result.iteration, wrong) == (1, [])
        assert any("a block does not match" in each.reason for each in result.skipped)


def _load_without_room(root: Path) -> tuple[int, list[str], list[str], list[str], list[str]]:
    job = _Job(root)
    job.save(1)
    saved = job.save(2)
    job.restart()
    job.lose("b")
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("holdfast").addHandler(handler)
    job.disk.is_full = job.rank == 1
    result = job.load()
    wrong = _wrong(job.live, saved)
    job.manager.finalize_async_saves(job.live.state, blocking=True)
    files = job.files(2)
    job.disk.is_full = False
    saved = job.save(3)
    job.restart()
    job.load()
    wrong += _wrong(job.live, saved)
    job.end()
    return result.iteration, wrong, messages, files, job.files(3)


def test_copies_that_cannot_be_written_again_are_told_and_the_next_save_makes_new_ones(
    root: Path,
) -> None:
    """The load has succeeded; rank 0 says what has not, with rank, path and reason."""
    (*first, messages, files, after), second = run_ranks(_load_without_room, 2, root)
    assert first == [2, []]
    assert second[:2] == (2, [])
    (message,) = [each for each in messages if "not restored" in each]
    assert "rank 1" in message
    assert "ENOSPC" in message
    assert second[2] == []
    assert files == [each for each in BOTH if each.startswith("a")]
    assert len(after) == 4


def _load_otherwise_sharded(root: Path) -> tuple[LoadResult, list[str]]:
    job = _Job(root, factor=1)
    job.save(1)
    saved = {
        name: each.full_tensor() if isinstance(each, DTensor) else each.clone()
        for name, each in _tensors(job.live).items()
    }
    job.restart(sharded=False)
    result = job.load()
    wrong = _wrong(job.live, saved)
    job.end()
    return result, wrong


def test_state_that_is_sharded_otherwise_now_is_read_from_all_nodes(root: Path) -> None:
    """What a node had when it saved does not cover what is live here: its peers send the rest."""
    for result, wrong in run_ranks(_load_otherwise_sharded, 2, root):
        assert (result.iteration, result.tier, wrong) == (1, "local", [])
        assert {(each.owner, each.node) for each in result.sources} == {(0, "a"), (1, "b")}


def _load_with_another_torch(root: Path) -> tuple[LoadResult, list[str]]:
    from holdfast.read import reader

    room: Any = reader
    job = _Job(root)
    saved = job.save(2)
    job.restart()
    job.lose("b")

    def of_another_torch(dtype: torch.dtype, shape: torch.Size) -> Container:
        found = container_of(dtype, shape)
        header = bytes([found.header[0] ^ 1]) + found.header[1:]
        return Container(header, found.payload_bytes, found.trailer)

    room.container_of = of_another_torch
    try:
        result = job.load()
    finally:
        room.container_of = container_of
    wrong = _wrong(job.live, saved)
    job.end()
    return result, wrong


def test_containers_of_another_torch_arrive_through_a_file(root: Path) -> None:
    """Same size, another header: torch takes them apart, and no older commit is taken instead."""
    for result, wrong in run_ranks(_load_with_another_torch, 2, root):
        assert (result.iteration, result.tier, wrong) == (2, "local", [])
