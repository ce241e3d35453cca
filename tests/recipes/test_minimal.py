"""The first recipe a reader opens trains, dies, and resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import holdfast
from entry import run_program
from tests.recipes.conftest import NAMED, RECIPES, THREE_METHODS

STORE = Path("checkpoints")
TRACKER = STORE / "latest_checkpointed_iteration.txt"
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return the program: called with overrides, it runs in this process and returns its output."""
    import minimal  # after the path was extended

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")  # find configs/ as from a command line
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["recipes/minimal.py", "model=tiny", *overrides])
        assert run_program(minimal.main) == 0
        return capsys.readouterr().out

    return run


def _short(steps: int, run_dir: str) -> list[str]:
    overrides = [f"steps={steps}", f"run_dir={run_dir}", "log_interval=10"]
    return [*overrides, "checkpoint.persistent.save_interval=10"]


def _start(launcher: list[str], *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(RECIPES / "minimal.py"), "model=tiny", *overrides]
    # As many threads as this process has: sums of floats depend on their number.
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _kill_after_a_commit(launcher: list[str], run_dir: str) -> int:
    """Begin a run without end, kill it after a commit, and return the iteration it committed."""
    with _start(launcher, *_short(1_000_000, run_dir)) as running:
        assert running.stdout is not None
        printed = ""
        for line in running.stdout:
            printed += line
            if line.startswith("step 20:"):  # the save of 20 has waited for the one of 10
                for victim in _training_processes(running.pid):
                    os.kill(victim, signal.SIGKILL)
    assert running.returncode != 0, printed
    return int((Path(run_dir) / TRACKER).read_text())


def _training_processes(pid: int) -> list[int]:
    """Return the children of a launcher, or the process itself where it has none."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in children] or [pid]


def test_killed_it_resumes_as_if_nothing_had_happened(run: Callable[..., str]) -> None:
    """The same command goes on, and the end is that of a run left alone, to the last bit."""
    reached = _kill_after_a_commit([], "killed")
    steps = reached + 5
    assert f"starting at step {reached} of {steps}" in run(*_short(steps, "killed"))
    assert "starting at step 0 of" in run(*_short(steps, "alone"))
    resumed, alone = (holdfast.open_tensors(Path(each) / STORE) for each in ("killed", "alone"))
    assert set(resumed) == set(alone)
    assert all(torch.equal(resumed[name], alone[name]) for name in alone)


def test_killed_on_two_processes_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same under torchrun: the only difference is the launcher."""
    monkeypatch.chdir(tmp_path)
    reached = _kill_after_a_commit(LAUNCHER, "killed")
    with _start(LAUNCHER, *_short(reached + 5, "killed")) as running:
        printed, _ = running.communicate()
    assert running.returncode == 0, printed
    assert f"starting at step {reached} of {reached + 5}" in printed


def test_it_runs_with_a_manager_of_three_methods(tmp_path: Path, run: Callable[..., str]) -> None:
    """A manager that returns a plain pair and restores no counters is enough to resume."""
    source = THREE_METHODS.replace("blocking, terminate", "blocking=False, terminate=False")
    source = source.replace("ctx, callback_manager", "ctx, callback_manager=None")
    (tmp_path / "three_methods.py").write_text(source)
    run(*NAMED, "steps=3")
    assert "starting at step 3 of 5" in run(*NAMED, "steps=5")
    sys.modules.pop("three_methods")
