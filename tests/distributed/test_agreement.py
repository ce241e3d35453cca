"""Ranks that see or want different things reach one decision, and say who differs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import distributed

from holdfast.config import CheckpointConfig
from holdfast.errors import (
    CheckpointError,
    CheckpointOverdueError,
    SaveFailedError,
    StepRewoundError,
)
from holdfast.filesystem import Filesystem, LocalFilesystem
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext
from tests.distributed.training import Run
from tests.support.deadlines import DEADLINE_SECONDS
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
    if not directory.exists():
        return []
    return sorted(each for each in os.listdir(directory) if each.startswith("iter_"))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_ranks_at_different_steps_are_named(asynchronous: bool, tmp_path: Path) -> None:
    """All ranks raise the same, with the ranks and steps that differ; nothing is written."""
    for found in run_ranks(_disagree_on_the_step, 3, tmp_path, asynchronous):
        (message, failures, committed), (other, others, _), (_, _, after) = found
        assert [each.rank for each in failures] == [2]
        assert "rank 2" in message
        assert "is in the save of iteration 11 (persistent tier), and rank 0 in" in message
        assert committed == []
        assert [each.rank for each in others] == [1, 2]
        assert "is in the save of iteration 2 (" in other
        assert "rank 0 in the save of iteration 12 (" in other
        assert after == ["iter_0000002"], "the next save works"


def _miss_a_call(root: Path, odd: int) -> list[Any]:
    """Have one rank miss a save, and then come in other calls than the others."""
    run = Run("ddp", root / "store", timeout_seconds=DEADLINE_SECONDS)
    found: list[Any] = []

    def outcome_of(call: Callable[[], Any]) -> str:
        try:
            call()
        except CheckpointError as error:
            return str(error)
        return ""

    run.train(run.step_number + 1)
    run.save()
    run.finalize(blocking=True)
    for wrong in (run.save, run.load):
        run.train(run.step_number + 1)
        if run.rank != odd:
            began = time.monotonic()
            message = outcome_of(run.save) or outcome_of(lambda: run.finalize(blocking=True))
            found.append((message, time.monotonic() - began))
        else:  # it was interrupted before it came to this save, and goes on with its next call
            run.state.train_state.step += 1
            message = outcome_of(wrong) or outcome_of(lambda: run.finalize(blocking=True))
            found.append((message, 0.0))
            run.state.train_state.step -= 1
        for _ in range(2):
            run.train(run.step_number + 1)
            found.append((outcome_of(run.save), 0.0))
            found.append((outcome_of(lambda: run.finalize(blocking=True)), 0.0))
    return found


@pytest.mark.parametrize("odd", [0, 1])
def test_ranks_that_are_in_different_calls_are_told_and_meet_again(
    odd: int, tmp_path: Path
) -> None:
    """Which call it is is agreed: a rank that missed one is in step again after one refusal."""
    for found in run_ranks(_miss_a_call, 2, tmp_path, odd):
        saves, others = found[:5], found[5:]
        assert "rank 1: OtherCall: is in the save of iteration" in saves[0][0]
        assert "OtherCall" in others[0][0]
        assert "the load" in others[0][0]
        assert max(seconds for _, seconds in found) < DEADLINE_SECONDS / 2, (
            "and not at the deadline"
        )
        assert [message for message, _ in saves[1:] + others[1:]] == [""] * 8


def _refuse_on_one_rank(root: Path, odd: int) -> list[tuple[str, str, float]]:
    """Hand one rank an argument that is wrong, or state that cannot be saved there."""
    run = Run("ddp", root / "store", timeout_seconds=DEADLINE_SECONDS)
    found = []
    wrong = run.rank == odd
    save = CheckpointSaveContext(run.state, run.model, run.optimizer, run.scheduler)
    load = CheckpointLoadContext(run.state, run.model, run.optimizer, run.scheduler)
    calls: list[Callable[[], Any]] = [
        lambda: run.manager.save(cast("Any", load) if wrong else save),
        lambda: run.manager.save(save, cast("Any", 5) if wrong else None),
        lambda: run.manager.load(replace(load, model=cast("Any", {})) if wrong else load),
        run.save,
        lambda: run.finalize(blocking=True),
        run.load,
    ]
    for call in calls:
        began = time.monotonic()
        kind = message = ""
        try:
            call()
        except CheckpointError as error:
            kind, message = type(error).__name__, str(error)
        found.append((kind, message, time.monotonic() - began))
    return found


@pytest.mark.parametrize("odd", [0, 1])
def test_a_wrong_argument_on_one_rank_is_told_on_all(odd: int, tmp_path: Path) -> None:
    """At once, and not at the deadline; the next calls succeed."""
    told = run_ranks(_refuse_on_one_rank, 2, tmp_path, odd)
    assert [each[:2] for each in told[0]] == [each[:2] for each in told[1]]
    kinds = [kind for kind, _, _ in told[0]]
    assert kinds == ["WrongArgumentError"] * 3 + [""] * 3
    assert max(seconds for found in told for _, _, seconds in found) < DEADLINE_SECONDS / 2


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
    logging.getLogger("holdfast.policies.guards").addHandler(handler)
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


class _Meeting:
    """A scheduler in whose state dict the ranks run a collective, as a hook of the user's may."""

    def state_dict(self) -> dict[str, Any]:
        total = torch.ones(1)
        distributed.all_reduce(total)
        return {"ranks": int(total)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state_dict()


def _fail_before_a_collective(root: Path, odd: int) -> list[str]:
    """Fail on one rank in its model's state, or in its setter, before the ranks meet in another."""
    run = Run("ddp", root / "store", async_save=False, timeout_seconds=DEADLINE_SECONDS)
    run.scheduler = cast("Any", _Meeting())
    register: Any = run.model.register_state_dict_pre_hook
    failing: set[int] = set()

    def hook(*_: Any) -> None:
        if run.rank in failing:
            raise ValueError("of this rank alone")

    register(hook)
    run.optimizer.register_state_dict_post_hook(lambda *_: _Meeting().state_dict() and None)
    found = []
    run.save()
    for call in (run.save, run.load):
        for ranks in ([odd], []):
            failing = set(ranks)
            began = time.monotonic()
            try:
                call()
                found.append("")
            except CheckpointError as error:
                found.append(str(error))
            found.append("late" if time.monotonic() - began > DEADLINE_SECONDS / 2 else "")
    return found


@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_that_fails_alone_leaves_nobody_in_a_collective(odd: int, tmp_path: Path) -> None:
    """Torch's getters and hooks may run collectives: they are run on every rank to the last one."""
    for found in run_ranks(_fail_before_a_collective, 2, tmp_path, odd):
        save, load = found[0], found[4]
        assert f"rank {odd}: ValueError: of this rank alone" in save
        assert f"rank {odd}: ValueError: of this rank alone" in load
        assert [each for each in found if each not in (save, load)] == [""] * 6


def _outcome(call: Callable[[], Any]) -> tuple[str, str, float]:
    began, kind, message = time.monotonic(), "", ""
    try:
        call()
    except (CheckpointError, SystemExit) as error:
        kind, message = type(error).__name__, str(error)
    return kind, message, time.monotonic() - began


def _use_two_managers(root: Path) -> list[tuple[str, str, float]]:
    """Rank 1 misses the first manager's save and goes on with the second's."""
    main = Run("ddp", root / "main", timeout_seconds=DEADLINE_SECONDS / 2)
    average = Run("ddp", root / "average", seed=2, timeout_seconds=DEADLINE_SECONDS)
    found = []
    if main.rank == 0:
        found.append(_outcome(main.save))
    found.append(_outcome(average.save))
    main.train(1)
    found += [_outcome(each) for each in (main.save, lambda: main.finalize(blocking=True))]
    average.finalize(blocking=True)
    return found


def test_two_managers_never_answer_each_other(tmp_path: Path) -> None:
    """A rank that misses a call of one meets the others in the next call of each."""
    first, second = run_ranks(_use_two_managers, 2, tmp_path)
    assert first[0][0] == "SaveFailedError"
    assert "rank 1" in first[0][1]
    assert [kind for kind, _, _ in first[1:] + second] == [""] * 6
    assert _committed(tmp_path / "main") == ["iter_0000001"]
    assert _committed(tmp_path / "average") == ["iter_0000000"]


def _lag_behind(root: Path) -> list[tuple[str, str, float]]:
    """Rank 1 misses one load, and then comes to every load before rank 0."""
    run = Run("ddp", root / "store", timeout_seconds=DEADLINE_SECONDS / 2)
    run.save()
    run.finalize(blocking=True)
    found = []
    if run.rank == 0:
        found.append(_outcome(run.load))
    for _ in range(3):
        distributed.barrier()
        if run.rank == 0:
            time.sleep(0.3)
        found.append(_outcome(run.load))
    return found


def test_a_rank_does_not_lag_behind_for_ever(tmp_path: Path) -> None:
    """Calls of one name cannot be told apart: that costs one more of them, and not all."""
    first, second = run_ranks(_lag_behind, 2, tmp_path)
    assert [kind for kind, _, _ in first[2:] + second[1:]] == [""] * 4


def _end_in_a_state_dict(root: Path) -> list[tuple[str, str, float]]:
    """One rank's state dict ends the program, one is slow, and both ranks differ in a setting."""
    rank = distributed.get_rank()
    run = Run("ddp", root / "store", timeout_seconds=DEADLINE_SECONDS, async_save=False)
    scheduler, run.scheduler = run.scheduler, cast("Any", _Ending(rank == 0))
    found = [_outcome(run.save)]
    run.scheduler = scheduler
    found.append(_outcome(run.save))
    other = Run("ddp", root / "other", timeout_seconds=DEADLINE_SECONDS, async_save=rank == 0)
    found.append(_outcome(other.save))
    return found


class _Ending:
    def __init__(self, ends: bool) -> None:
        self._ends = ends

    def state_dict(self) -> dict[str, Any]:
        if self._ends:
            raise SystemExit("asked to stop")
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def test_a_rank_that_ends_in_a_state_dict_and_one_with_other_settings_are_named(
    tmp_path: Path,
) -> None:
    """At once; the end of a program is raised where it was asked for."""
    first, second = run_ranks(_end_in_a_state_dict, 2, tmp_path)
    assert first[0][0] == "SystemExit"
    assert second[0][0] == "SaveFailedError"
    assert "rank 0: SystemExit: asked to stop" in second[0][1]
    assert [each[1][0] for each in (first, second)] == ["", ""]
    for each in (first, second):
        assert "rank 1: OtherSettings: has checkpoint.async_save=False" in each[2][1]
    assert max(seconds for _, _, seconds in first + second) < DEADLINE_SECONDS / 2


def _call_before_the_group(root: Path) -> tuple[int, list[str]]:
    run = Run("none", root / "store", timeout_seconds=DEADLINE_SECONDS)
    run.finalize(blocking=True)
    distributed.init_process_group("gloo")
    run.save()
    run.finalize(blocking=True)
    distributed.barrier()
    return run.manager._channels.world_size, _committed(root / "store")


def test_a_call_before_the_process_group_does_not_make_a_rank_alone(tmp_path: Path) -> None:
    """A manager may be made, and asked for outcomes, before torch.distributed is initialised."""
    for found in run_ranks(_call_before_the_group, 2, tmp_path, initialise=False):
        assert found == (2, ["iter_0000000"])
