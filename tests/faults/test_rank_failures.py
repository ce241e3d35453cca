"""One rank fails, dies or hangs in a stage: the others are told, and nothing is lost by it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from holdfast.errors import CheckpointError, StageFailedError
from holdfast.events import (
    ON_CHECKPOINT_SAVE,
    ON_CHECKPOINT_SAVE_FAILED,
    CallbackManager,
    CheckpointEvent,
)
from tests.distributed.training import Data, Run
from tests.faults.report import record
from tests.support.deadlines import DEADLINE_SECONDS, LAUNCH_SECONDS, told_within
from tests.support.rank_faults import Fault, Job, die, disk_is_full, exit_at_once
from tests.support.ranks import RankExit, run_ranks


class _FaultyData(Data):
    def __init__(self, fault: Fault, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._fault = fault

    def state_dict(self) -> dict[str, Any]:
        self._fault.reach("data.state_dict")
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._fault.reach("data.load_state_dict")
        super().load_state_dict(state_dict)


def _faulty_run(fault: Fault, directory: Path, seed: int = 1, **config: Any) -> Run:
    values = {
        "persistent": {"directory": str(directory), "keep": {"last": 2}},
        "replicas": {"audit_fraction": 1},  # or a checkpoint before the last ones stays
        "load": {"verify": "first"},  # one stage more in which a rank can fail
        **config,
    }
    run = Run(
        "ddp",
        directory,
        seed=seed,
        data=lambda rank, size: _FaultyData(fault, rank, size),
        filesystem=fault.filesystem(),
        **values,
    )
    fault.watch(run.model)
    _watch_scheduler(fault, run)
    return run


def _watch_scheduler(fault: Fault, run: Run) -> None:
    """Put this fault before every reading of the scheduler's state, which stays the same."""

    class Watched(torch.optim.lr_scheduler.CosineAnnealingLR):
        def state_dict(self) -> dict[str, Any]:
            fault.reach("the scheduler")
            state: dict[str, Any] = super().state_dict()
            return state

    run.scheduler.__class__ = Watched


def _names(directory: Path) -> tuple[list[str], list[str]]:
    """Return what is committed and what is left over, after every rank is through."""
    distributed.barrier()
    names = sorted(os.listdir(directory))
    distributed.barrier()  # nobody goes on while another rank still looks
    committed = [name for name in names if name.startswith("iter_") and len(name) == 12]
    left = [name for name in names if ".pending-" in name or ".replaced-" in name]
    return committed, left


def _described(error: BaseException | None) -> dict[str, Any] | None:
    if error is None:
        return None
    assert isinstance(error, CheckpointError), repr(error)
    found: dict[str, Any] = {
        "types": [each.__name__ for each in type(error).__mro__],
        "message": str(error),
        "cause": type(error.__cause__).__name__,
    }
    if isinstance(error, StageFailedError):
        found |= {"stage": error.stage, "failures": error.failures}
    return found


def _attempt(work: Callable[[], Any]) -> tuple[Any, CheckpointError | None]:
    try:
        return work(), None
    except CheckpointError as error:
        return None, error


# -- a rank raises -------------------------------------------------------------------------------

SAVE_FAULTS = [
    ("admit", 0),
    ("capture", 0),
    ("capture", 1),
    ("begin", 0),
    ("write", 0),
    ("write", 2),
    ("commit", 0),
]


def _work_unevenly(rank: int, step: int) -> None:
    """Take a while that depends on rank and step, on the CPU."""
    size = 24 * (1 + (rank + step) % 3)
    torch.linalg.matrix_power(torch.eye(size), 7)


def _train_until_told(run: Run) -> tuple[int, CheckpointError | None]:
    """Train, every rank at its own speed but for the gradients, until a failure surfaces."""
    for _ in range(200):
        run.step()
        _work_unevenly(run.rank, run.step_number)
        _, error = _attempt(run.finalize)
        if error is not None or not run.manager._saving.is_busy:
            return run.step_number, error
    _, error = _attempt(lambda: run.finalize(blocking=True))
    return run.step_number, error


def _fail_in_each_stage(root: Path, asynchronous: bool) -> list[dict[str, Any]]:
    fault = Fault()
    directory = root / "store"
    run = _faulty_run(fault, directory, async_save=asynchronous)
    found = []
    for stage, rank in SAVE_FAULTS:
        run.step()
        run.save()
        run.finalize(blocking=True)
        good, iteration = run.tensors(), run.step_number
        run.step()
        if run.rank == rank:
            fault.arm(stage, disk_is_full)
        _, error = _attempt(run.save)
        told_at = run.step_number
        if error is None and asynchronous:
            told_at, error = _train_until_told(run)
        _, again = _attempt(lambda: run.finalize(blocking=True))
        committed, left = _names(directory)
        other = _faulty_run(Fault(), directory, seed=5)
        loaded, _ = other.load()
        found.append(
            {
                "struck": fault.struck,
                "error": _described(error),
                "again": _described(again),
                "told at": told_at,
                "newest": committed[-1],
                "left": left,
                "loads the earlier one": (loaded, other.tensors()) == (iteration, good),
                "earlier": iteration,
            }
        )
    run.step()
    run.save()
    run.finalize(blocking=True)
    found.append({"newest": _names(directory)[0][-1], "earlier": run.step_number})
    return found


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_failure_in_any_stage_of_a_save_is_told_to_all(
    asynchronous: bool, tmp_path: Path
) -> None:
    """Every rank raises the same error at the same step, once: rank, stage, errno and path.

    Nothing is committed or left over, the earlier checkpoint loads, and the next save works.
    """
    results = run_ranks(
        _fail_in_each_stage, 3, tmp_path, asynchronous, timeout_seconds=2 * LAUNCH_SECONDS
    )
    strikes = [0, 0, 0]
    record("rank failures", len(SAVE_FAULTS))
    for index, (stage, failing) in enumerate(SAVE_FAULTS):
        where = f"{stage} on rank {failing}"
        strikes[failing] += 1
        found = [result[index] for result in results]
        assert [each["struck"] for each in found] == strikes, f"{where}: the fault did not strike"
        for each in found:
            error = each["error"]
            assert error is not None, f"{where}: not told"
            assert error["types"][0] == "SaveFailedError", where
            assert error["stage"] == stage
            (failure,) = error["failures"]
            assert (failure.rank, failure.errno) == (failing, 28), where
            assert failure.path is not None, where
            for part in (f"rank {failing}", f'"{stage}"', "ENOSPC", failure.path):
                assert part in error["message"], where
            assert each["again"] is None, f"{where}: told twice"
            assert each["newest"] == f"iter_{each['earlier']:07d}", f"{where}: committed"
            assert each["left"] == [], where
            assert each["loads the earlier one"], where
        assert len({each["told at"] for each in found}) == 1, f"{where}: told at several steps"
    for result in results:
        assert result[-1]["newest"] == f"iter_{result[-1]['earlier']:07d}"


@contextmanager
def _no_copies() -> Iterator[None]:
    """Fail every copy of tensors into the memory of a save, as a lost device does."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot be copied")

    copy, torch._foreach_copy_ = torch._foreach_copy_, refuse
    try:
        yield
    finally:
        torch._foreach_copy_ = copy


def _fail_while_staging(directory: Path) -> list[Any]:
    fault = Fault()
    run = _faulty_run(fault, directory)
    with _no_copies() if run.rank == 1 else nullcontext():
        run.save()
    _, error = _attempt(lambda: run.finalize(blocking=True))
    run.save()
    run.finalize(blocking=True)
    return [_described(error), _names(directory)]


def test_a_failure_while_staging_is_told_to_all(tmp_path: Path) -> None:
    """A copy into host memory that fails on one rank fails the save on all, told as any other."""
    for error, (committed, left) in run_ranks(_fail_while_staging, 2, tmp_path / "store"):
        assert error is not None
        assert [each.rank for each in error["failures"]] == [1]
        assert error["stage"] == "write"
        assert (committed, left) == (["iter_0000000"], [])


def _save_what_cannot_be_saved(directory: Path) -> list[Any]:
    run = _faulty_run(Fault(), directory)
    if run.rank == 1:
        run.data.state_dict = lambda: {"seen": run.data}  # type: ignore[method-assign]
    _, error = _attempt(run.save)
    return [type(error).__name__, str(error), getattr(error, "__notes__", [])]


def test_an_error_of_ours_names_its_rank(tmp_path: Path) -> None:
    """State of one rank that could not be read back is refused on all, with rank and stage."""
    for name, message, notes in run_ranks(_save_what_cannot_be_saved, 3, tmp_path / "store"):
        assert name == "UnsupportedStateError"
        assert "rank 1 data.seen" in message
        assert notes == ['raised on rank 1 in stage "capture"']


def _fail_in_retention(directory: Path) -> list[Any]:
    fault = Fault()
    run = _faulty_run(fault, directory, async_save=False)
    found = []
    for step in range(4):
        run.step()
        if run.rank == 0 and step == 2:
            fault.arm("retain", disk_is_full)
        run.save()
        found.append(_names(directory)[0])
    return [found, fault.struck]


def test_failing_retention_fails_no_save(tmp_path: Path) -> None:
    """What cannot be removed stays until the next save; the checkpoint was committed."""
    results = run_ranks(_fail_in_retention, 2, tmp_path / "store")
    for found, _ in results:
        assert [len(each) for each in found] == [1, 2, 3, 2]
    assert [struck for _, struck in results] == [1, 0]


# -- at the same step ----------------------------------------------------------------------------


def _surface_at_one_step(root: Path) -> list[tuple[int, int, int]]:
    """Fail saves while ranks run freely, at speeds of their own, without any collective."""
    fault = Fault()
    run = _faulty_run(fault, root / "store")
    rank = distributed.get_rank()
    found = []
    polls = 0
    for attempt in range(6):
        if rank == attempt % run.size:
            fault.arm("write", disk_is_full)
        run.save()
        told: list[int] = []
        while not told:
            for _ in range(1 + 2 * ((rank + attempt) % run.size)):
                _work_unevenly(rank, polls)
            polls += 1
            _, error = _attempt(run.finalize)
            if error is not None:
                told.append(polls)
        for _ in range(5):
            polls += 1
            _, error = _attempt(run.finalize)
            if error is not None:
                told.append(polls)
        run.state.train_state.step += 1
        run.save()
        run.finalize(blocking=True)
        run.state.train_state.step += 1
        found.append((told[0], len(told), len(_names(root / "store")[0])))
    return found


def test_an_async_failure_surfaces_at_one_step_without_collectives(tmp_path: Path) -> None:
    """Ranks that run apart, each at its own speed, are told at the same count of steps, once."""
    results = run_ranks(_surface_at_one_step, 3, tmp_path)
    assert results[0] == results[1] == results[2]
    assert [count for _, count, _ in results[0]] == [1] * 6
    assert [committed for _, _, committed in results[0]] == [1, 2, 2, 2, 2, 2], "later saves work"


def _note(events: list[tuple[str, int]], name: str) -> Callable[[CheckpointEvent], None]:
    return lambda event: events.append((name, event.iteration))


def _warn_and_train_on(root: Path) -> dict[str, Any]:
    """Fail twice, succeed, then fail until the limit."""
    fault = Fault()
    directory = root / "store"
    run = _faulty_run(fault, directory, on_save_failure="warn", save_failure_limit=3)
    events: list[tuple[str, int]] = []
    listener = CallbackManager()
    for name in (ON_CHECKPOINT_SAVE, ON_CHECKPOINT_SAVE_FAILED):
        listener.register(name, _note(events, name))
    error = None
    for fails in (True, True, False, True, True, True):
        run.step()
        if fails and run.rank == 1:
            fault.arm("write", disk_is_full)
        assert error is None
        run.save(listener)
        _, error = _train_until_told(run)
    return {"events": events, "committed": _names(directory)[0], "error": _described(error)}


def test_warn_trains_on_until_the_limit(tmp_path: Path) -> None:
    """With on_save_failure=warn failures are told as events; the third in a row is raised."""
    for found in run_ranks(_warn_and_train_on, 2, tmp_path):
        names = [name for name, _ in found["events"]]
        failed = ON_CHECKPOINT_SAVE_FAILED
        assert names == [failed, failed, ON_CHECKPOINT_SAVE, failed, failed, failed]
        assert len(found["committed"]) == 1
        assert found["error"] is not None
        assert found["error"]["failures"][0].rank == 1


# -- a rank raises while loading -----------------------------------------------------------------

PASSED_OVER = [("verify", 1), ("names", 0), ("names", 1)]
PASSED_OVER += [("open", 0), ("open", 1), ("read", 0), ("read", 1)]
RAISED = [("survey", 0), ("shardings", 1), ("compare", 0), ("compare", 1), ("apply", 1)]


def _fail_while_loading(directory: Path) -> list[dict[str, Any]]:
    fault = Fault()
    run = _faulty_run(fault, directory, async_save=False)
    tensors = {}
    for _ in range(2):
        run.step()
        run.save()
        tensors[run.step_number] = run.tensors()
    found = []
    for stage, rank in PASSED_OVER + RAISED:
        fault = Fault()
        run = _faulty_run(fault, directory, seed=6)
        before = run.tensors()
        if run.rank == rank:
            fault.arm(stage, disk_is_full)
        result, error = _attempt(run.load)
        after = run.tensors()
        again = run.load()
        found.append(
            {
                "struck": fault.struck,
                "error": _described(error),
                "iteration": result.iteration if result else None,
                "skipped": [(each.iteration, each.reason) for each in result.skipped]
                if result
                else [],
                "sound": result is None or after == tensors[result.iteration],
                "untouched": after == before,
                "again": again.iteration == 2 and run.tensors() == tensors[2],
            }
        )
    return found


def test_a_failure_while_loading_is_one_decision(tmp_path: Path) -> None:
    """What one rank cannot read no rank loads: all take the older one, or raise the same.

    Where the checkpoint was not to blame every rank raises, and nothing live was touched before
    the stage that fills it. The same manager loads in full afterwards.
    """
    results = run_ranks(_fail_while_loading, 2, tmp_path / "store")
    record("rank failures", len(PASSED_OVER + RAISED))
    for index, (stage, failing) in enumerate(PASSED_OVER + RAISED):
        where = f"{stage} on rank {failing}"
        found = [result[index] for result in results]
        assert sum(each["struck"] for each in found) == 1, f"{where}: the fault did not strike"
        for each in found:
            if (stage, failing) in PASSED_OVER:
                assert each["iteration"] == 1, where
                ((iteration, reason),) = each["skipped"]
                assert iteration == 2
                assert "No space left" in reason, where
            else:
                assert each["error"]["stage"] == stage
                assert [one.rank for one in each["error"]["failures"]] == [failing], where
                assert "No space left" in each["error"]["message"]
                assert each["untouched"] or stage == "apply", where
            assert each["sound"], where
            assert each["again"], where


# -- a rank dies or hangs ------------------------------------------------------------------------

JOB_SIZE = 2

SAVE_PLACES = [
    ("admit", 0),
    ("capture", 1),
    ("begin", 0),
    ("write", 0),
    ("write", 1),
    ("commit", 0),
    ("retain", 0),
]
LOAD_PLACES = [
    ("survey", 0),
    ("verify", 1),
    ("open", 1),
    ("compare", 1),
    ("read", 0),
    ("apply", 1),
]
PLACES = [("save", *place) for place in SAVE_PLACES] + [("load", *place) for place in LOAD_PLACES]


def _begin(job: Job, root: Path) -> tuple[Run, Fault, Path]:
    """Commit two checkpoints at leisure; return a run whose manager waits for seconds only."""
    directory = root / str(job.number)
    run = _faulty_run(Fault(), directory, async_save=False, timeout_seconds=60.0)
    for _ in range(2):
        run.step()
        run.save()
    fault = Fault()
    run = _faulty_run(fault, directory, async_save=False, timeout_seconds=DEADLINE_SECONDS)
    run.load()
    run.step()
    job.gather_all(int(os.environ["WORLD_SIZE"]))
    return run, fault, directory


def _time(work: Callable[[], Any]) -> tuple[dict[str, Any] | None, float]:
    distributed.barrier()
    began = time.monotonic()
    _, error = _attempt(work)
    return _described(error), time.monotonic() - began


def _lose_a_rank(root: Path, places: list[tuple[str, str, int]]) -> tuple[Any, float]:
    job = Job(JOB_SIZE)
    call, stage, failing = places[job.number]
    run, fault, _ = _begin(job, root)
    if job.rank == failing:
        fault.arm(stage, die if job.number % 2 else exit_at_once)
    return _time(getattr(run, call))


def _go_on(root: Path, places: list[tuple[str, str, int]]) -> list[tuple[int, int]]:
    """Load, save and load again in every job's store."""
    found = []
    for number in range(len(places)):
        run = _faulty_run(Fault(), root / str(number), seed=4, async_save=False)
        first, _ = run.load()
        run.step()
        run.save()
        run = _faulty_run(Fault(), root / str(number), seed=4, async_save=False)
        second, _ = run.load()
        found.append((first, second))
    return found


def _assert_told(told: tuple[Any, float], stage: str, failing: int, where: str) -> None:
    error, seconds = told
    assert error is not None, f"{where}: the others were not told"
    assert "StageTimeoutError" in error["types"] or error["cause"] == "StageTimeoutError", where
    # Rank 0 retains before it says that it has committed.
    assert error["stage"] == {"retain": "commit"}.get(stage, stage), where
    assert [each.rank for each in error["failures"]] == [failing], where
    assert seconds < told_within(failing), f"{where}: told after {seconds:.1f} s"


def test_a_dead_rank_is_named_within_the_deadline(tmp_path: Path) -> None:
    """A rank that exits or is killed in any stage is named by the others, who wait no longer.

    Nothing is committed that was not agreed, and the same number of ranks, started again, loads the
    newest checkpoint, saves, and loads that.
    """
    dying = [JOB_SIZE * number + failing for number, (_, _, failing) in enumerate(PLACES)]
    results = run_ranks(
        _lose_a_rank,
        JOB_SIZE * len(PLACES),
        tmp_path,
        PLACES,
        timeout_seconds=2 * LAUNCH_SECONDS,
        may_die=dying,
        initialise=False,
    )
    record("rank failures", len(PLACES))
    for number, (call, stage, failing) in enumerate(PLACES):
        where = f"{call}, {stage} on rank {failing}"
        job = results[JOB_SIZE * number : JOB_SIZE * (number + 1)]
        assert isinstance(job[failing], RankExit), where
        assert job[failing].exit_code == (-9 if number % 2 else 7), where
        _assert_told(job[1 - failing], stage, failing, where)
    newest = [3 if place[:2] == ("save", "retain") else 2 for place in PLACES]
    for found in run_ranks(_go_on, JOB_SIZE, tmp_path, PLACES):
        for place, iteration, loaded in zip(PLACES, newest, found, strict=True):
            assert loaded == (iteration, iteration + 1), place


HANGS = [
    ("save", "admit", 0),
    ("save", "capture", 1),
    ("save", "write", 0),
    ("save", "write", 1),
    ("save", "commit", 0),
    ("save", "retain", 0),
    ("load", "survey", 0),
    ("load", "verify", 1),
    ("load", "read", 0),
    ("load", "read", 1),
]


def _outlast_a_hang(root: Path, places: list[tuple[str, str, int]]) -> dict[str, Any]:
    job = Job(JOB_SIZE)
    call, stage, failing = places[job.number]
    run, fault, directory = _begin(job, root)
    if job.rank == failing:
        fault.arm(stage, lambda _: job.await_others("told", 60))
    told = _time(getattr(run, call))
    job.tell("told")
    committed, _ = _names(directory)
    later: list[dict[str, Any] | None] = []
    for _ in range(2):
        run.step()
        if call == "load":
            _, error = _attempt(run.load)
        else:
            run.state.train_state.step = 10 + len(later)
            _, error = _attempt(run.save)
        later.append(_described(error))
    other = _faulty_run(Fault(), directory, seed=4)
    loaded, _ = other.load()
    return {
        "told": told,
        "committed": committed,
        "later": later,
        "loaded": loaded,
        "left": _names(directory)[1],
    }


def test_a_rank_that_hangs_is_named_and_may_come_back(tmp_path: Path) -> None:
    """The others are told within the deadline; when the rank wakes, all ranks save and load again.

    Also where it was rank 0 that hung, which then finds the others gone from the stage.
    """
    results = run_ranks(
        _outlast_a_hang,
        JOB_SIZE * len(HANGS),
        tmp_path,
        HANGS,
        timeout_seconds=2 * LAUNCH_SECONDS,
        initialise=False,
    )
    record("rank failures", len(HANGS))
    for number, (call, stage, failing) in enumerate(HANGS):
        where = f"{call}, {stage} on rank {failing}"
        job = results[JOB_SIZE * number : JOB_SIZE * (number + 1)]
        _assert_told(job[1 - failing]["told"], stage, failing, where)
        for each in job:
            assert each["later"] == [None, None], f"{where}: {each['later']}"
            assert each["loaded"] == (11 if call == "save" else 2), where
            assert each["left"] == [], where


def _hang_in_the_writer_thread(directory: Path) -> tuple[Any, float, int, int]:
    """Train on while the writer thread of rank 1 hangs; it wakes once rank 0 was told."""
    job = Job(JOB_SIZE)
    fault = Fault()
    run = _faulty_run(fault, directory, timeout_seconds=DEADLINE_SECONDS)
    if job.rank == 1:
        fault.arm("write", lambda _: job.await_others("told", 60))
    run.save()
    told: list[CheckpointError] = []
    began = time.monotonic()
    while not told:
        _work_unevenly(job.rank, 1)
        _, error = _attempt(run.finalize)
        if error is not None:
            told.append(error)
    seconds = time.monotonic() - began
    job.tell("told")
    run.step()
    run.save()
    run.finalize(blocking=True)
    return _described(told[0]), seconds, len(told), len(_names(directory)[0])


def test_a_hung_writer_thread_is_named_while_training_goes_on(tmp_path: Path) -> None:
    """The failure surfaces at a step of every rank, on the hung one as soon as it wakes."""
    results = run_ranks(_hang_in_the_writer_thread, JOB_SIZE, tmp_path / "store", initialise=False)
    for error, seconds, times, committed in results:
        _assert_told((error, seconds), "write", 1, "the writer thread")
        assert times == 1
        assert committed == 1, "the next save works"


def _lose_the_store(directory: Path) -> tuple[Any, float]:
    """Let rank 0 host the rendezvous store, as it does without an agent, and die in a save."""
    rank = int(os.environ["RANK"])
    stores: Any = distributed
    launch = stores.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    if rank == 0:
        store = stores.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        launch.set("port", str(store.port))
    else:
        store = stores.TCPStore("127.0.0.1", int(launch.get("port")), is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    fault = Fault()
    run = _faulty_run(fault, directory, async_save=False, timeout_seconds=60.0)
    if rank == 0:
        fault.arm("write", die)
    return _time(run.save)


def test_a_store_that_dies_with_rank_0_is_noticed_at_once(tmp_path: Path) -> None:
    """Where rank 0 took the rendezvous store with it, the others do not wait for the deadline."""
    _, (error, seconds) = run_ranks(
        _lose_the_store, 2, tmp_path / "store", may_die=[0], initialise=False
    )
    assert error is not None
    # The word that the stage before was done may have gone down with rank 0.
    assert error["stage"] in ("stage", "begin", "write")
    assert "rank 0" in error["message"]
    assert seconds < 20, "the deadline was 60 s"
