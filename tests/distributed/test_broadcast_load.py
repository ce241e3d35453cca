"""With `load.broadcast`, what all ranks need is read once and sent: same results, less reading."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import torch
from torch import distributed, nn

from holdfast.errors import StageFailedError
from holdfast.filesystem import LocalFilesystem
from holdfast.ranks.channels import open_channels
from holdfast.read.shared import ReadShared, divide, own_group
from holdfast.storage.digests import BLOCK_BYTES
from tests.distributed.training import ReshardableData, Run, exact
from tests.support.managers import Live, manager_of, zero
from tests.support.ranks import run_ranks

SHARED = {"broadcast": True}
_TENSORS = 32
_TENSOR_BYTES = 2 << 20


def _save(root: Path) -> dict[str, Any]:
    found = {}
    for parallel in ("ddp", "fsdp"):
        run = Run(parallel, root / parallel, data=ReshardableData)
        run.train(3, save_at=[3])
        found[parallel] = run.tensors()
    return found


def _load(root: Path) -> dict[tuple[str, str], list[Any]]:
    """Load each checkpoint under each division with and without broadcasting, and train on."""
    found: dict[tuple[str, str], list[Any]] = {}
    for saved in ("ddp", "fsdp"):
        for parallel in ("ddp", "fsdp"):
            for load in (SHARED, {}):
                run = Run(parallel, root / saved, seed=8, data=ReshardableData, load=load)
                run.load()
                assert run.step_number == 3
                tensors = run.tensors()
                run.train(5)
                found.setdefault((saved, parallel), []).append((tensors, run.tensors()))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_arrives_by_broadcast_is_what_was_saved(ranks: int, tmp_path: Path) -> None:
    """Replicated and sharded models have the same bits either way, and train on alike."""
    saved = run_ranks(_save, 2, tmp_path)[0]
    for found in run_ranks(_load, ranks, tmp_path):
        for (source, _), (shared, alone) in found.items():
            assert shared == alone
            assert shared[0] == saved[source]


class _CountingFilesystem(LocalFilesystem):
    """Counts the bytes of shard files that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.read_bytes = 0

    def open_existing(self, path: Path) -> BinaryIO:
        stream = super().open_existing(path)
        if not path.name.endswith(".distcp"):
            return stream
        return cast("BinaryIO", _CountingStream(stream, self))


class _CountingStream(io.RawIOBase):
    """Has no descriptor, so that every byte comes through here."""

    def __init__(self, stream: BinaryIO, counter: _CountingFilesystem) -> None:
        super().__init__()
        self._stream = stream
        self._counter = counter

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, target: Any) -> int:
        count: int = self._stream.readinto(target)  # type: ignore[attr-defined]  # BinaryIO lacks it
        self._counter.read_bytes += count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _wide() -> Live:
    torch.manual_seed(2)
    return Live(nn.ParameterList(torch.randn(_TENSOR_BYTES // 4) for _ in range(_TENSORS)))


def _save_wide(root: Path) -> None:
    live, manager = _wide(), manager_of(root, timeout_seconds=60)
    for iteration in (1, 2):
        with torch.no_grad():
            for each in cast(nn.Module, live.model).parameters():
                each.fill_(iteration).add_(torch.arange(each.numel()))
        live.save(manager, iteration)


def _load_wide(root: Path) -> tuple[list[int], list[Any]]:
    counts, found = [], []
    for load in (SHARED, {}):
        filesystem, live = _CountingFilesystem(), _wide()
        zero(live)
        live.load(manager_of(root, filesystem, load=load, timeout_seconds=60))
        counts.append(filesystem.read_bytes)
        found.append([exact(each)[2][:64] for each in cast(nn.Module, live.model).parameters()])
    return counts, found


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_reads_its_part_alone(ranks: int, tmp_path: Path) -> None:
    """Bytes read per rank are one rank's part, and the blocks at its ends."""
    run_ranks(_save_wide, 2, tmp_path)
    whole = _TENSORS * _TENSOR_BYTES
    for (shared, alone), (sent, read) in run_ranks(_load_wide, ranks, tmp_path):
        assert sent == read
        assert alone >= whole
        assert shared <= whole // ranks + 2 * BLOCK_BYTES + (64 << 10)  # and two footers


def _load_after_damage(root: Path) -> tuple[int, list[Any], list[str]]:
    live = _wide()
    result = live.load(manager_of(root, load=SHARED, timeout_seconds=60))
    values = [each[0].item() for each in cast(nn.Module, live.model).parameters()]
    return result.iteration, values, [each.reason for each in result.skipped]


@pytest.mark.parametrize("ranks", [2, 4])
def test_damage_in_one_part_sends_all_to_the_older_checkpoint(ranks: int, tmp_path: Path) -> None:
    """The one rank that meets a bad block leaves nobody in a broadcast: all take the older one."""
    run_ranks(_save_wide, 2, tmp_path)
    shard = max((tmp_path / "iter_0000002").glob("*.distcp"))
    with shard.open("r+b") as stream:
        stream.seek(BLOCK_BYTES + 100)
        stream.write(b"\xff" * 8)
    for iteration, values, reasons in run_ranks(_load_after_damage, ranks, tmp_path):
        assert iteration == 1
        assert set(values) == {1.0}
        assert len(reasons) == 1
        assert "does not match its digest" in reasons[0]


def _operations() -> int:
    """Return how many collectives the trainer's own group has seen."""
    world: Any = distributed.group.WORLD
    count: int = world._get_sequence_number_for_group()
    return count


def _use_every_way(root: Path) -> tuple[int, int, bool]:
    """Save and load in each way that sends something; count operations of the trainer's group."""
    before = _operations()
    tier = {"directory": str(root / "memory"), "replication": {"factor": 2}}
    ways: list[dict[str, Any]] = [{"load": SHARED}]
    if find_spec("nvidia_resiliency_ext") is not None:
        ways.append({"local": tier})
    for values in ways:
        live = _wide()
        for iteration in (1, 2):
            manager = manager_of(root / "-".join(values), timeout_seconds=60, **values)
            live.load(manager)
            live.save(manager, iteration, non_persistent_ckpt="local" in values)
            manager.finalize_async_saves(live.state, blocking=True, terminate=True)
    by_us = _operations() - before
    distributed.broadcast(torch.ones(1), 0)
    return by_us, _operations() - before, own_group(60) is own_group(60)


def test_the_trainers_group_is_never_used(tmp_path: Path) -> None:
    """Neither a save nor a load, with broadcasts or with copies, runs on the trainer's group."""
    for by_us, with_one_more, is_made_once in run_ranks(_use_every_way, 2, tmp_path):
        assert by_us == 0
        assert with_one_more == 1  # the count can tell
        assert is_made_once


def _leave_a_broadcast(root: Path) -> list[float]:
    """One rank leaves the others in a broadcast; then all load again."""
    coordinator = open_channels(1, 4.0, "test")[0]
    tensor = torch.full((4,), 1.0 - coordinator.rank)
    shared = ReadShared(coordinator.rank, [["a"], []], own_group(4.0))
    shared._steps = list(shared._plan_steps({"a": tensor}))
    if coordinator.rank == 0:
        shared._steps = [(0, [], None)]  # an IndexError in place of the broadcast
    with pytest.raises(StageFailedError, match='"broadcast" failed'):
        shared.pass_on(coordinator)
    again = ReadShared(coordinator.rank, [["a"], []], own_group(4.0))
    again._steps = list(again._plan_steps({"a": tensor}))
    again.pass_on(coordinator)
    return tensor.tolist()


def test_a_broken_group_is_replaced(tmp_path: Path) -> None:
    """A rank left alone in a broadcast says so in time, and the next load has another group."""
    assert run_ranks(_leave_a_broadcast, 2, tmp_path) == [[1.0] * 4, [1.0] * 4]


class _Stage(nn.Module):
    """What one pipeline stage has: a part that all share, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        rank = distributed.get_rank()
        self.everywhere = nn.Linear(3, 3)
        self.add_module(f"stage_{rank}", nn.Linear(2 + rank, 2))
        self.register_buffer("strided", torch.zeros(4, 4).t())


def _pipeline(root: Path) -> bool:
    torch.manual_seed(4)
    model = _Stage()
    live = Live(model)
    live.save(manager_of(root, timeout_seconds=30), 1)
    expected = live.digests()
    zero(live)
    live.load(manager_of(root, load=SHARED | {"strict": False}, timeout_seconds=30))
    return live.digests() == expected


def test_ranks_with_different_tensors_share_those_that_all_have(tmp_path: Path) -> None:
    """Pipeline stages read their own parts themselves, and get the common one from one rank."""
    assert run_ranks(_pipeline, 2, tmp_path) == [True, True]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1, 1, 1, 1], [["0", "1"], ["2", "3"]]),
        ([9, 1, 1, 1], [["0"], ["1", "2", "3"]]),
        ([1, 1, 1, 9], [["0", "1", "2"], ["3"]]),
        ([4], [["0"], []]),
        ([], [[], []]),
        ([0, 0], [["0", "1"], []]),
    ],
)
def test_parts_are_consecutive_and_about_equal(
    sizes: Sequence[int], expected: list[list[str]]
) -> None:
    """Names stay in file order, and each rank has about as many bytes as any other."""
    named = {str(number): size for number, size in enumerate(sizes)}
    assert divide(list(named), named, 2) == expected
