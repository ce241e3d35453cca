"""The first recipe a reader opens trains, dies, and resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import holdfast
from tests.recipes.conftest import RECIPES

STORE = Path("checkpoints")
TRACKER = STORE / "latest_checkpointed_iteration.txt"


def _command(processes: int, steps: int, run_dir: str) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
    overrides = ["model=tiny", f"steps={steps}", f"run_dir={run_dir}", "log_interval=10"]
    overrides.append("checkpoint.persistent.save_interval=10")
    return [*launcher, str(RECIPES / "minimal.py"), *overrides]


def _run(processes: int, steps: int, run_dir: str) -> str:
    ended = subprocess.run(
        _command(processes, steps, run_dir),
        check=False,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def _kill_after_a_commit(processes: int, run_dir: str) -> int:
    """Begin a run without end, kill it after a commit, and return the iteration it committed."""
    with subprocess.Popen(
        _command(processes, 1_000_000, run_dir),
        env={"OMP_NUM_THREADS": "1", **os.environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as running:
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


def test_killed_it_resumes_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on, and the end is that of a run left alone, to the last bit."""
    monkeypatch.chdir(tmp_path)
    reached = _kill_after_a_commit(1, "killed")
    assert f"starting at step {reached} of {reached + 5}" in _run(1, reached + 5, "killed")
    assert "starting at step 0 of" in _run(1, reached + 5, "alone")
    resumed, alone = (holdfast.open_tensors(Path(each) / STORE) for each in ("killed", "alone"))
    assert set(resumed) == set(alone)
    assert all(torch.equal(resumed[name], alone[name]) for name in alone)


def test_killed_on_two_processes_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same under torchrun: the only difference is the launcher."""
    monkeypatch.chdir(tmp_path)
    reached = _kill_after_a_commit(2, "killed")
    assert f"starting at step {reached} of {reached + 5}" in _run(2, reached + 5, "killed")
