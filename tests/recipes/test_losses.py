"""The loss log, the crash plan and the record of saves: small values, decided without a run."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crash import CrashPlan, plan_crash
from drill import STEPS, compare
from gpt import GPT
from holdfast import CheckpointEvent, CheckpointSaveContext, GlobalState, TrainState
from holdfast.events import ON_CHECKPOINT_SAVE, ON_CHECKPOINT_SAVE_FAILED
from losses import LOSSES_NAME, LossCurve, LossLog, read_losses
from run_config import ModelConfig, RecipeError
from saving import MeasuredSaves


def test_rows_beyond_the_resumed_step_are_void(tmp_path: Path) -> None:
    """The curve is the newest attempt's from where it resumed, and exact to the last bit."""
    with LossLog(tmp_path, 0) as first:
        for step in range(1, 6):
            first.append_training(step, step / 3)
        first.append_validation(4, 0.1)
    with LossLog(tmp_path, 3) as second, LossLog(tmp_path, 3, rank=1) as other_process:
        second.append_training(4, 0.7)
        other_process.append_training(4, 0.8)
    curve = read_losses(tmp_path)
    assert curve.training == {1: 1 / 3, 2: 2 / 3, 3: 1.0, 4: 0.7}
    assert curve.validation == {}
    assert curve.resumed_from == [0, 3]
    assert curve.furthest_step == 5


def test_a_torn_row_spoils_nothing(tmp_path: Path) -> None:
    """The row that a dying machine did not finish is passed over, the next attempt's stand."""
    with LossLog(tmp_path, 0) as first:
        first.append_training(1, 0.5)
    with (tmp_path / LOSSES_NAME).open("a") as file:
        file.write('{"step": 2, "lo')
    with LossLog(tmp_path, 1) as second:
        second.append_training(2, 0.25)
    assert read_losses(tmp_path).training == {1: 0.5, 2: 0.25}


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The message names the directory and the setting."""
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"run_dir: .*file/run cannot be written"):
        LossLog(tmp_path / "file" / "run", 0)


@pytest.mark.parametrize(
    ("step", "during_save", "furthest_step", "planned"),
    [
        (None, False, 0, CrashPlan(None)),
        (5, False, 0, CrashPlan(5)),
        (5, False, 4, CrashPlan(5)),
        (5, False, 5, CrashPlan(None)),
        (5, True, 4, CrashPlan(5, Path("store"))),
        (5, True, 6, CrashPlan(None)),
    ],
)
def test_an_attempt_dies_only_where_none_has_been(
    step: int | None, during_save: bool, furthest_step: int, planned: CrashPlan
) -> None:
    """The same command works twice: what an earlier attempt has passed kills nobody."""
    assert plan_crash(step, during_save, Path("store"), furthest_step) == planned


class _EventfulManager:
    """Commits the first save, gives up the second, removes the first."""

    def __init__(self, fires: bool) -> None:
        self.fires = fires
        self.finalized: list[tuple[bool, bool]] = []

    def save(self, ctx: CheckpointSaveContext, callback_manager: Any | None = None) -> None:
        if not self.fires or callback_manager is None:
            return
        step = ctx.state.train_state.step
        if step == 1:
            event = CheckpointEvent(1, "persistent", "p", 2_500_000, 0.1, 0.2)
            callback_manager.fire(ON_CHECKPOINT_SAVE, event)
        elif step == 2:
            event = CheckpointEvent(2, "persistent", error=OSError("disk full"))
            callback_manager.fire(ON_CHECKPOINT_SAVE_FAILED, event)
        else:
            event = CheckpointEvent(3, "persistent", "p", 5, removed_iterations=(1,))
            callback_manager.fire(ON_CHECKPOINT_SAVE, event)

    def load(self, ctx: Any) -> Any:
        raise NotImplementedError

    def finalize_async_saves(self, state: GlobalState, blocking: bool, terminate: bool) -> None:
        self.finalized.append((blocking, terminate))


@pytest.mark.parametrize(
    ("fires", "outcomes", "sizes"),
    [
        (True, ["pruned", "failed", "committed"], [2_500_000, None, 5]),
        (False, ["asked for"] * 3, [None] * 3),
    ],
)
def test_any_manager_gives_a_table(
    fires: bool, outcomes: list[str], sizes: list[int | None]
) -> None:
    """The wait is measured from outside; the rest comes from events where there are any."""
    told: list[str] = []
    manager = _EventfulManager(fires)
    saves = MeasuredSaves(manager, told.append)
    for step in (1, 2, 3):
        state = GlobalState(train_state=TrainState(step=step))
        saves.save(CheckpointSaveContext(state, torch.nn.Module(), None, None))
        saves.finalize(state)
    saves.finalize(GlobalState(), last=True)
    assert [record.outcome for record in saves.records] == outcomes
    assert [record.size_bytes for record in saves.records] == sizes
    assert all(record.waited_seconds > 0 for record in saves.records)
    assert manager.finalized == [(False, False)] * 3 + [(True, True)]
    assert len(told) == (3 if fires else 0)


def test_a_model_knows_nothing_at_first_and_never_looks_ahead() -> None:
    """The first loss is 8 bits; a later byte changes no earlier prediction."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(layers=2, width=32, heads=2, context=16)).eval()
    tokens = torch.randint(0, 256, (2, 16))
    assert model(tokens, tokens).item() == pytest.approx(8 * 0.6931471805599453)
    torch.nn.init.normal_(model.head.weight)
    changed = tokens.clone()
    changed[:, 8:] = 0
    hidden: list[torch.Tensor] = []
    model.final_norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    for each in (tokens, changed):
        model(each, tokens)
    assert torch.equal(hidden[0][:, :8], hidden[1][:, :8])
    assert not torch.equal(hidden[0][:, 8:], hidden[1][:, 8:])


def test_the_drill_sees_one_bit() -> None:
    """One loss off by its last bit, a missing step or another final validation is a difference."""
    alone = LossCurve({1: 0.1, STEPS: 0.2}, {STEPS: 0.3}, [0], STEPS)
    resumed = replace(alone, resumed_from=[0, 1])
    assert compare("same", resumed, alone).is_equal
    off = replace(resumed, training={1: math.nextafter(0.1, 1), STEPS: 0.2})
    assert compare("off", off, alone).different_steps == (1,)
    assert compare("short", replace(resumed, training={1: 0.1}), alone).different_steps == (STEPS,)
    other = replace(resumed, validation={STEPS: math.nextafter(0.3, 0)})
    assert not compare("other", other, alone).is_equal


def test_no_plan_kills_nobody() -> None:
    """A crash plan without a step is a no-op, or this process would be gone."""
    CrashPlan(None).crash_if_due(5)
    CrashPlan(4).crash_if_due(5)
    CrashPlan(None).watch_save_if_due(5)
    assert os.getpid() > 0
