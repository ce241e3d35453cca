"""Ranks that see or want different things reach one decision, and say who differs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from torch import distributed

from holdfast.config import CheckpointConfig
from holdfast.errors import CheckpointOverdueError, SaveFailedError, StepRewoundError
from holdfast.filesystem import Filesystem, LocalFilesystem
from holdfast.manager import DefaultCheckpointManager
from tests.distributed.training import Run
from tests.support.managers import linear
from tests.support.ranks import run_ranks
from tests.support.stores import FaultyFilesystem


class _Seen:
    """A file system on which this rank sees every path as something else, or not at all."""

    def __init__(self, view: Callable[[Path], Path]) -> None:
        self._view = view
        self._filesystem = LocalFilesystem()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._filesystem, name)

        def operate(*paths: Path) -> Any:
            found = operation(*(self._view(path) for path in paths))
            if name == "list_directory":
                return [each for each in found if self._view(paths[0] / each.name).exists()]
            return found

        return operate


def _seen(view: Callable[[Path], Path]) -> Filesystem:
    return cast("Filesystem", _Seen(view))


def _disagree_on_the_step(root: Path, asynchronous: bool) -> list[tuple[str, Any, list[str]]]:
    run = Run("ddp", root / "store", async_save=asynchronous)
    found = []
    for odd in (2, 0):
        run.train(run.step_number + 1)
        agreed = run.step_number
        run.state.train_state.step += 10 * (run.rank == odd)
        with pytest.raises(SaveFailedError) as caught:
            run.save()
        distributed.barrier()
        found.append((str(caught.value), caught.value.failures, _committed(root / "store")))
        run.state.train_state.step = agreed
    run.save()
    run.finalize(blocking=True)
    found.append(("", (), _committed(root / "store")))
    return found


def _committed(directory: Path) -> list[str]:
    return sorted(each for each in os.listdir(directory) if each.startswith("iter_"))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_ranks_at_different_steps_are_named(asynchronous: bool, tmp_path: Path) -> None:
    """All ranks raise the same, with the ranks and steps that differ; nothing is written."""
    for found in run_ranks(_disagree_on_the_step, 3, tmp_path, asynchronous):
        (message, failures, committed), (other, others, _), (_, _, after) = found
        assert [each.rank for each in failures] == [2]
        assert "rank 2" in message
        assert "saves at step 11, rank 0 at step 1" in message
        assert committed == []
        assert [each.rank for each in others] == [1, 2]
        assert "saves at step 2, rank 0 at step 12" in other
        assert after == ["iter_0000002"], "the next save works"


def _save_without_a_shared_disk(root: Path) -> tuple[str, list[int], list[str], list[str]]:
    """Rank 1 has a disk of its own under the same path, on which it may create what it likes."""
    rank = distributed.get_rank()
    own = root / "own"
    shared = root / "store"

    def view(path: Path) -> Path:
        return own / path.relative_to(shared) if rank == 1 and shared in path.parents else path

    run = Run("ddp", shared, filesystem=_seen(view), async_save=False)
    with pytest.raises(SaveFailedError) as caught:
        run.save()
    distributed.barrier()
    names = _committed(shared)
    left = sorted(os.listdir(own)) if own.exists() else []
    return str(caught.value), [each.rank for each in caught.value.failures], names, left


def test_a_rank_without_the_shared_disk_is_told(tmp_path: Path) -> None:
    """A store that one rank has under the same path on another disk fails the save, and says so.

    That rank creates nothing there: the directory being missing is what gives it away.
    """
    for message, ranks, names, left in run_ranks(_save_without_a_shared_disk, 2, tmp_path):
        assert ranks == [1]
        assert "rank 1" in message
        assert "file system that all ranks share" in message
        assert names == []
        assert left == []


def _load_with_a_lagging_rank(directory: Path) -> list[Any]:
    rank = distributed.get_rank()
    run = Run("fsdp", directory, async_save=False)
    tensors = {}
    for step in (1, 2):
        run.train(step)
        run.save()
        tensors[step] = run.tensors()
    found = []
    for lagging in (0, 1, 2):
        hidden = directory / "iter_0000002"

        def view(path: Path, *, hidden: Path = hidden, lags: bool = rank == lagging) -> Path:
            is_hidden = lags and (path == hidden or hidden in path.parents)
            return Path("/nonexistent") / path.name if is_hidden else path

        other = Run("fsdp", directory, seed=5, filesystem=_seen(view))
        result = other.load()
        reasons = [(each.iteration, each.reason) for each in result.skipped]
        same = other.tensors() == tensors[result.iteration]
        found.append((result.iteration, other.step_number, same, reasons))
    return found


def test_ranks_that_see_different_directories_load_one_checkpoint(tmp_path: Path) -> None:
    """If any rank does not see the newest checkpoint yet, all load the one before, and say why."""
    results = run_ranks(_load_with_a_lagging_rank, 3, tmp_path / "store")
    assert results[0] == results[1] == results[2]
    for lagging, (iteration, step, same, reasons) in enumerate(results[0]):
        assert (iteration, step) == (1, 1)
        assert same, "the tensors are not those of the checkpoint"
        if lagging > 0:  # rank 0 chooses: what it does not see is no candidate
            ((skipped, reason),) = reasons
            assert skipped == 2
            assert "is missing" in reason


def _forget_the_counter(root: Path, odd: int) -> list[Any]:
    run = Run("ddp", root / "store", async_save=False, on_save_failure="warn")
    run.train(5)
    run.save()
    found: list[Any] = []
    if run.rank == odd:
        run.state.train_state.step = 2
    with pytest.raises(StepRewoundError) as caught:
        run.save()
    found.append((caught.value.step, caught.value.reached))
    run.state.train_state.step = 6
    run.save()
    distributed.barrier()
    return [*found, _committed(root / "store")]


@pytest.mark.parametrize("odd", [0, 1])
def test_a_counter_that_one_rank_forgot_is_refused_on_all(odd: int, tmp_path: Path) -> None:
    """Whichever rank is below the step saved last, all raise the same; the next save works."""
    for found in run_ranks(_forget_the_counter, 2, tmp_path, odd):
        assert found == [(2, 5), ["iter_0000005", "iter_0000006"]]


def _stop_when_overdue(root: Path) -> list[Any]:
    """Rank 0's clock says that it is time, rank 1's says the opposite of whatever that is."""
    rank = distributed.get_rank()
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("holdfast.alarm").addHandler(handler)
    now = [0.0]
    config = CheckpointConfig.from_mapping(
        {
            "persistent": {"directory": str(root / "store")},
            "alarm_after_seconds": 100.0,
            "alarm_stops": True,
            "on_save_failure": "warn",
            "save_failure_limit": None,
            "timeout_seconds": 20.0,
        }
    )
    filesystem = FaultyFilesystem()
    manager = DefaultCheckpointManager(config, filesystem=filesystem, clock=lambda: now[0])
    live = linear()
    live.load(manager)
    live.save(manager, 1)
    manager.finalize_async_saves(live.state, blocking=True)
    filesystem.refuses = lambda name, path: path.suffix == ".distcp"
    now[0] = 99.0 if rank == 0 else 500.0
    live.save(manager, 2)
    manager.finalize_async_saves(live.state, blocking=True)
    now[0] = 100.0 if rank == 0 else 0.0
    with pytest.raises(CheckpointOverdueError) as caught:
        live.save(manager, 3)
    manager.finalize_async_saves(live.state, terminate=True)
    return [caught.value.seconds, caught.value.iteration, str(caught.value), len(warned)]


def test_the_clock_of_rank_0_stops_an_overdue_run_on_all_ranks(tmp_path: Path) -> None:
    """Clocks differ: rank 0 decides, and all ranks raise the same at the same save."""
    first, second = run_ranks(_stop_when_overdue, 2, tmp_path)
    assert first[:3] == second[:3]
    assert first[:2] == [100.0, 1]
    assert (first[3], second[3]) == (1, 0), "rank 0 alone warns"
