"""The program as a newcomer meets it: it trains, resumes, swaps managers, and complains briefly."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from commands import describe_command
from drill import DrillError, Launch, drill
from holdfast import DefaultCheckpointManager
from losses import read_losses
from tests.recipes.conftest import NAMED, RECIPES, ROOT, THREE_METHODS, Outcome
from tests.support.ranks import run_ranks

Pretrain = Callable[..., Outcome]
OVERLAYS = sorted((ROOT / "configs" / "recipe").glob("*.yaml"))
DRIVEN = ("lost_node",)
"""Overlays that a script of their own runs; test_tiers.py runs that."""
STORE = Path("runs/pretrain/checkpoints")


def _command_of(overlay: Path) -> list[str]:
    """Return the command in an overlay's first line, past the directive that Hydra wants above."""
    directive, command = overlay.read_text().splitlines()[:2]
    assert directive == "# @package _global_"
    return shlex.split(command.removeprefix("# "))


def _printed(outcome: Outcome) -> str:
    assert outcome.status == 0, outcome.complained
    assert outcome.complained == ""
    return outcome.printed


@pytest.mark.parametrize(
    "overlay",
    [each for each in OVERLAYS if each.stem not in DRIVEN],
    ids=lambda path: path.stem,
)
def test_the_first_line_of_every_overlay_runs(pretrain: Pretrain, overlay: Path) -> None:
    """The command in the file, only shortened, trains to the end and saves."""
    program, script, *arguments = _command_of(overlay)
    assert (program, script) == ("python", "recipes/pretrain.py")
    assert arguments[0] == f"recipe={overlay.stem}"
    if overlay.stem == "resume_elsewhere":
        _printed(pretrain("steps=4"))
    shortened = [*arguments, "steps=6", "crash_at_step=null"]
    printed = _printed(pretrain(*shortened))
    assert "committed" in printed
    assert f"the same command resumes an interrupted run: {describe_command()}" in printed
    assert "already complete: 6 of 6 steps" in _printed(pretrain(*shortened))


def test_an_interrupted_run_equals_the_uninterrupted_one(pretrain: Pretrain) -> None:
    """The same command goes on where it stopped; every loss is equal to the last bit."""
    whole = _printed(pretrain("run_dir=whole", "steps=10"))
    assert (
        f"starting from step 0: no checkpoint of this run in {Path('whole/checkpoints')} yet"
        in whole
    )
    again = _printed(pretrain("run_dir=again", "steps=10"))
    assert read_losses(Path("whole")) == read_losses(Path("again"))
    assert "validation after step 0: 8.000 bits/byte" in again
    # Take away what came after step 6, as if the run had died between the saves of 6 and 8.
    for iteration in (8, 10):
        shutil.rmtree(f"again/checkpoints/iter_{iteration:07d}")
    resumed = _printed(pretrain("run_dir=again", "steps=10"))
    assert "resumed from iteration 6 of" in resumed
    curve = read_losses(Path("again"))
    assert curve.resumed_from == [0, 6]
    assert curve.training == read_losses(Path("whole")).training
    assert curve.validation == read_losses(Path("whole")).validation


def test_a_run_moves_to_another_directory(pretrain: Pretrain) -> None:
    """It goes on from the old store once, then from its own; the old one stays as it was."""
    _printed(pretrain("steps=4"))
    before = sorted(path.name for path in STORE.iterdir())
    overrides = ["recipe=resume_elsewhere", "steps=7"]
    printed = _printed(pretrain(*overrides))
    assert f"starting from step 4 with what {STORE.absolute()}/iter_0000004 holds" in printed
    shutil.rmtree("runs/elsewhere/checkpoints/iter_0000007")
    assert "resumed from iteration 6" in _printed(pretrain(*overrides))
    assert sorted(path.name for path in STORE.iterdir()) == before


def test_a_run_begins_with_the_weights_of_another(pretrain: Pretrain) -> None:
    """Only the model is taken over, once; then the same command resumes the new run."""
    _printed(pretrain("steps=4"))
    overrides = ["run_dir=tuned", "steps=3", f"checkpoint.load.pretrained.directory={STORE}"]
    printed = _printed(pretrain(*overrides))
    assert f"starting from step 0 with what {STORE.absolute()}/iter_0000004 holds" in printed
    first = read_losses(Path("tuned")).training[1]
    assert first != read_losses(Path("runs/pretrain")).training[1]
    assert "already complete: 3 of 3 steps" in _printed(pretrain(*overrides))
    shorter = _printed(pretrain(*overrides, "steps=2"))
    assert "already complete: 3 steps are done, and steps=2 asks for fewer" in shorter


def test_a_run_that_saves_nothing_says_so(pretrain: Pretrain) -> None:
    """`save_interval=null` is no periodic save and none at the end."""
    printed = _printed(pretrain("checkpoint.persistent.save_interval=null", interval=None))
    assert "no checkpoint was saved" in printed
    assert not list(STORE.glob("iter_*"))


@pytest.fixture
def named(tmp_path: Path) -> Iterator[list[str]]:
    """Return the settings that name that manager, whose module lies in the working directory."""
    (tmp_path / "three_methods.py").write_text(THREE_METHODS)
    yield NAMED
    sys.modules.pop("three_methods", None)


@pytest.mark.parametrize(
    "mode",
    ["", "recipe=quickstart", "recipe=tiered", "recipe=crash_drill", "recipe=resume_elsewhere",
     "checkpoint=sync"],
)  # fmt: skip
def test_every_mode_runs_with_a_manager_of_three_methods(
    pretrain: Pretrain, named: list[str], mode: str
) -> None:
    """Found in the working directory: a plain pair from load, no events, still a table."""
    overrides = [*filter(None, [mode]), *named, "crash_at_step=null", "run_dir=run"]
    printed = _printed(pretrain(*overrides, "steps=5"))
    assert "asked for" in printed
    printed = _printed(pretrain(*overrides, "steps=8"))
    assert "resumed from iteration 5" in printed
    assert torch.load("own-0.pt", weights_only=False)[0] == 8
    assert "already complete: 8 of 8 steps" in _printed(pretrain(*overrides, "steps=8"))


@pytest.mark.parametrize("mode", ["parallel=ddp", "parallel=fsdp", "recipe=lost_node"])
def test_every_parallel_mode_runs_with_a_manager_of_three_methods(
    text: Path, named: list[str], mode: str
) -> None:
    """Two processes train, save and resume with it."""
    overrides = [mode, *named, "crash_at_step=null", "run_dir=run"]
    for status, printed in run_ranks(_train, 2, text, overrides, initialise=False):
        assert status == 0, printed
    statuses, printed = zip(
        *run_ranks(_train, 2, text, [*overrides, "steps=8"], initialise=False), strict=True
    )
    assert statuses == (0, 0), printed
    assert "resumed from iteration 6" in printed[0]


def _train(text: Path, overrides: list[str]) -> tuple[int, str]:
    """Be one of several processes that torchrun has started; return the status and the output."""
    import pretrain as program  # its folder is on the path of the process that this is a fork of

    os.chdir(text.parent)
    os.environ |= {"HYDRA_MAIN_MODULE": "__main__", "HYDRA_FULL_ERROR": "1"}
    sys.argv = ["recipes/pretrain.py", *_shortened(text), *overrides]
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        status = program.main()
    return status, printed.getvalue()


def test_the_mirror_holds_what_the_store_holds(pretrain: Pretrain) -> None:
    """Each committed checkpoint is copied; what a crash prevented is made up for at the start."""
    overrides = ["recipe=custom_manager", "run_dir=run", "checkpoint.persistent.keep.last=2"]
    _printed(pretrain(*overrides))
    store, mirror = Path("run/checkpoints"), Path("run/mirror")
    names = sorted(path.name for path in store.glob("iter_*"))
    assert names == ["iter_0000004", "iter_0000006"]
    assert sorted(path.name for path in mirror.glob("iter_*")) == names
    shutil.rmtree(mirror / "iter_0000006")
    (mirror / "iter_0000006.pending-mirror").mkdir()
    _printed(pretrain(*overrides))
    for name in names:
        files = [path.relative_to(store / name) for path in (store / name).rglob("*")]
        assert files
        for file in files:
            if (store / name / file).is_file():
                assert (mirror / name / file).read_bytes() == (store / name / file).read_bytes()
    assert (mirror / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
    assert not list(mirror.glob("*.pending-mirror"))
    moved = ["run_dir=moved", f"checkpoint.load.directory={mirror}", "steps=8"]
    assert "resumed from iteration 6" in _printed(pretrain(*moved))


def test_bad_input_ends_in_a_short_message(pretrain: Pretrain) -> None:
    """A non-zero exit and at most three lines that name the field or path, and no traceback."""
    _printed(pretrain("steps=4"))
    Path("file").touch()
    cases = {
        "checkpoint.nonsense=1": "checkpoint.nonsense: there is no such setting",
        "steps=soon": "steps: Value 'soon'",
        "checkpoint.persistent.save_interval=-5": "save_interval is -5",
        "run_dir=file/run": "file/run",
        "checkpoint.persistent.directory=file/store": str(Path("file").absolute()),
        "checkpoint.load.directory=nowhere": "nowhere",
        "checkpoint.run_id=another": "another",
        "checkpoint.load.step=3": "3",
        "data.paths=[nowhere]": "data.paths: nowhere cannot be read",
        "batch_size=0": "batch_size is 0",
        "parallel=fsdp": "torchrun --nproc-per-node 2",
        "parallel.device=cuda": "0 GPUs",
        "checkpoint.custom_manager_class=nowhere.Manager": "nowhere",
        "recipe=custom_manager checkpoint.options.mirror_directory=null": "mirror_directory",
        "seed=2": "seed was 1, now 2",
        "model.layers=1": "blocks.1",
    }
    for overrides, named in cases.items():
        outcome = pretrain("steps=6", *overrides.split(" "))
        assert outcome.status == 1, overrides
        lines = outcome.complained.splitlines()
        assert 1 <= len(lines) <= 3, outcome.complained
        assert named in outcome.complained, outcome.complained
        assert "Traceback" not in outcome.complained + outcome.printed


def test_a_setting_without_effect_is_told_once(
    pretrain: Pretrain, recwarn: pytest.WarningsRecorder
) -> None:
    """A warning in one line, without the place in the source; the run goes on."""
    warnings.simplefilter("always")  # as at a command line; the tests make warnings errors
    outcome = pretrain("checkpoint.local.save_interval=5", "steps=1")
    assert outcome.status == 0
    assert outcome.complained == (
        "warning: setting without effect: checkpoint.local.save_interval: local.directory is null\n"
    )


def test_a_truncated_tracker_is_no_dead_end(pretrain: Pretrain) -> None:
    """The newest complete checkpoint is found without it, and nothing starts over."""
    _printed(pretrain("steps=4"))
    (STORE / "latest_checkpointed_iteration.txt").write_text("")
    assert "resumed from iteration 4" in pretrain("steps=6").printed


def test_losses_are_written_for_people_and_for_machines(pretrain: Pretrain) -> None:
    """Each row is JSON with the loss twice: readable and exact."""
    _printed(pretrain("steps=4"))
    rows = [json.loads(row) for row in Path("runs/pretrain/losses.jsonl").read_text().splitlines()]
    assert rows[0] == {"resumed_from": 0}
    assert [row["step"] for row in rows[1:] if "loss" in row] == [1, 2, 3, 4]
    assert all(float.fromhex(row["hex"]) == row["loss"] for row in rows[1:] if "loss" in row)


def test_the_drill_shows_equality_and_would_show_a_difference(tmp_path: Path) -> None:
    """Killed at a step and killed in a save, then resumed: equal to the last bit."""
    verdicts = drill(Launch(1, "single", tmp_path))
    assert [verdict.is_equal for verdict in verdicts] == [True, True]
    assert [verdict.resumed_from for verdict in verdicts] == [40, 40]
    with pytest.raises(DrillError, match="it was to be killed"):
        Launch(1, "single", tmp_path).run_to_death("alone")  # complete: nothing is left to die in


def test_several_processes_train_as_one(pretrain: Pretrain, text: Path) -> None:
    """Under torchrun one speaks, a contradiction is refused, and one process resumes two."""
    refused = _torchrun(text, "parallel=single")
    assert refused.returncode != 0
    assert refused.stdout.count("parallel.kind is single, but torchrun started 2 processes") == 1
    trained = _torchrun(text, "parallel=fsdp")
    assert trained.returncode == 0, trained.stdout
    assert trained.stdout.count("validation after step 6") == 1
    resumed = pretrain("steps=8")
    assert resumed.status == 0, resumed.complained
    assert "resumed from iteration 6" in resumed.printed


def _shortened(text: Path) -> list[str]:
    return ["model=tiny", "steps=6", "data=files", f"data.paths=[{text}]", "validation_batches=2"]


def _torchrun(text: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(RECIPES / "pretrain.py")]
    command += [*_shortened(text), *overrides]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(
        command,
        check=False,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_the_default_manager_is_what_the_example_wraps() -> None:
    """The example imports from the package's public surface alone."""
    import custom_manager  # a module beside the recipe

    assert custom_manager.DefaultCheckpointManager is DefaultCheckpointManager
