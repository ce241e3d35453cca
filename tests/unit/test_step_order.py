"""A save may not fall below the step last loaded or saved, unless the run says so."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import CheckpointError, SaveFailedError, StepRewoundError
from holdfast.policies.guards import StepOrder
from holdfast.protocol import GlobalState
from tests.support.managers import Live, linear, manager_of
from tests.support.stores import FaultyFilesystem, tree

HISTORIES = [
    # what happened before: l a load, s a commit, f a failure, n a load of nothing; then the step
    ("", 0, None),
    ("l6", 1, (6, "loaded")),
    ("l6", 6, None),
    ("l6", 7, None),
    ("s10", 9, (10, "saved")),
    ("s10", 10, None),
    ("l6 s10", 7, (10, "saved")),
    ("s10 l6", 7, None),
    ("s10 l6", 5, (6, "loaded")),
    ("s10 f20", 15, None),
    ("f20", 1, None),
    ("s12 s10", 11, (12, "saved")),
    ("l6 n", 1, None),
    ("l6 s6", 5, (6, "saved")),
]


@pytest.mark.parametrize(("history", "step", "refused"), HISTORIES)
def test_a_step_below_the_one_reached_is_refused(
    history: str, step: int, refused: tuple[int, str] | None
) -> None:
    """The largest commit since the last load counts, or that load; failures do not."""
    order = StepOrder(allow_rewind=False)
    for event in history.split():
        if event == "n":
            order.note_load(None)
        elif event[0] == "l":
            order.note_load(int(event[1:]))
        elif event[0] == "s":
            order.note_commit(int(event[1:]), "persistent")
        else:
            order.note_failure(int(event[1:]), "persistent", OSError())
    if refused is None:
        order.check(step)
        return
    with pytest.raises(StepRewoundError, match="allow_rewind") as caught:
        order.check(step)
    assert (caught.value.step, caught.value.reached, caught.value.origin) == (step, *refused)
    assert f"step is {step}, below step {refused[0]}" in str(caught.value)


@pytest.mark.parametrize("step", [True, 1.0, "1", None])
def test_what_is_no_whole_number_is_left_to_others(step: object) -> None:
    """A counter of the wrong type is not compared: the capture refuses it with its own error."""
    order = StepOrder(allow_rewind=False)
    order.note_commit(6, "local")
    order.check(step)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A local directory in RAM."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def _saved(root: Path) -> None:
    """Leave a store of a run that saved 4, 5 and 6."""
    live, manager = linear(), manager_of(root)
    for iteration in (4, 5, 6):
        live.save(manager, iteration)
    manager.finalize_async_saves(live.state, terminate=True)


@pytest.mark.parametrize("policy", ["raise", "warn"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_forgotten_counter_costs_no_checkpoint(
    tmp_path: Path, asynchronous: bool, policy: str
) -> None:
    """After a load of 6, saves of a state nobody filled are refused, and no byte changes."""
    _saved(tmp_path)
    live = linear()
    manager = manager_of(tmp_path, async_save=asynchronous, on_save_failure=policy)
    Live(live.model, live.optimizer).load(manager)  # into a state that is thrown away
    before = tree(tmp_path)
    for iteration in (0, 1, 2):
        with pytest.raises(StepRewoundError, match=f"step is {iteration}, below step 6"):
            live.save(manager, iteration)
        manager.finalize_async_saves(live.state, blocking=True)
    assert tree(tmp_path) == before, "not even an attempt was claimed"
    live.save(manager, 6)
    live.save(manager, 7)
    manager.finalize_async_saves(live.state, blocking=True, terminate=True)


def test_a_load_without_model_and_optimizer_counts(tmp_path: Path) -> None:
    """Counters are loaded then too: what was said of a whole load holds."""
    _saved(tmp_path)
    live, manager = linear(), manager_of(tmp_path)
    live.load(manager, skip_load_to_model_and_opt=True)
    with pytest.raises(StepRewoundError):
        live.save(manager, 5)


def test_a_counter_that_is_reset_between_saves_is_refused(tmp_path: Path) -> None:
    """A loop that starts counting anew, or saves with another state, is told at its next save."""
    live, manager = linear(), manager_of(tmp_path, async_save=True)
    live.save(manager, 10)
    other = Live(live.model, live.optimizer, state=GlobalState())
    with pytest.raises(StepRewoundError, match="below step 10, which this manager saved"):
        other.save(manager)  # while the save of 10 is in flight
    live.save(manager, 11)
    manager.finalize_async_saves(live.state, blocking=True, terminate=True)


@pytest.mark.parametrize("first_is_local", [True, False])
def test_the_order_holds_over_both_tiers(
    tmp_path: Path, memory: Path, first_is_local: bool
) -> None:
    """A local save at 5 after a persistent one at 10 is refused, and the other way round."""
    live = linear()
    manager = manager_of(tmp_path / "store", local={"directory": str(memory)})
    live.load(manager)
    live.save(manager, 10, non_persistent_ckpt=first_is_local)
    with pytest.raises(StepRewoundError):
        live.save(manager, 5, non_persistent_ckpt=not first_is_local)
    live.save(manager, 10, non_persistent_ckpt=not first_is_local)
    manager.finalize_async_saves(live.state, terminate=True)


def test_a_rewind_that_is_asked_for_is_allowed(tmp_path: Path) -> None:
    """With `allow_rewind` a lower step is saved, and it is the newest from there on."""
    _saved(tmp_path)
    live, manager = linear(), manager_of(tmp_path, allow_rewind=True)
    live.load(manager)
    live.save(manager, 3)
    manager.finalize_async_saves(live.state, terminate=True)
    assert linear().load(manager_of(tmp_path)).iteration == 3


def test_a_failed_save_does_not_raise_the_step(tmp_path: Path) -> None:
    """What was never committed is nothing that a lower step could supersede."""
    filesystem, live = FaultyFilesystem(), linear()
    manager = manager_of(tmp_path, filesystem)
    live.save(manager, 1)
    filesystem.refuses = lambda name, path: path.suffix == ".distcp"
    with pytest.raises(SaveFailedError):
        live.save(manager, 20)
    filesystem.refuses = lambda name, path: False
    live.save(manager, 10)
    with pytest.raises(CheckpointError):
        live.save(manager, 9)
