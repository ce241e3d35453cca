"""The recipe, run inside the test process where nothing has to die and no ranks are needed."""

from __future__ import annotations

import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
sys.path.insert(0, str(RECIPES))  # as `python recipes/pretrain.py` does

THREE_METHODS = """
import os
import torch

class Manager:
    def __init__(self, checkpoint_config):
        rank = os.environ.get("RANK", "0")
        self.path = f"{checkpoint_config.options['path']}-{rank}.pt"

    def save(self, ctx, callback_manager):
        step = ctx.state.train_state.step
        torch.save((step, ctx.model.state_dict(), ctx.optimizer.state_dict()), self.path)

    def load(self, ctx):
        try:
            step, model, optimizer = torch.load(self.path, weights_only=False)
        except FileNotFoundError:
            return 0, 0
        ctx.model.load_state_dict(model)
        ctx.optimizer.load_state_dict(optimizer)
        return step, 0

    def finalize_async_saves(self, state, blocking, terminate):
        pass
"""
"""A manager made for Megatron-Bridge's protocol, and nothing more."""
NAMED = ["checkpoint.custom_manager_class=three_methods.Manager", "+checkpoint.options.path=own"]


@dataclass(frozen=True)
class Outcome:
    """What one run of the program left behind."""

    status: int
    printed: str
    complained: str


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the directory in RAM that the overlays name for this user, gone afterwards."""
    user = f"test-{secrets.token_hex(4)}"
    monkeypatch.setenv("USER", user)
    path = Path(f"/dev/shm/holdfast-{user}")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a small file of real text: the recipe's own modules."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(each.read_bytes() for each in sorted(RECIPES.glob("*.py"))))
    return path


@pytest.fixture
def pretrain(
    tmp_path: Path,
    text: Path,
    memory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Outcome]:
    """Return the program: called with overrides, it runs tiny and short in its own directory."""
    import pretrain as program  # after the path was extended

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")  # find configs/ as from a command line
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    short = ["model=tiny", "steps=6", "log_interval=2", "validation_interval=3"]
    short += ["validation_batches=2", "data=files", f"data.paths=[{text}]"]

    def run(*overrides: str, interval: int | None = 2) -> Outcome:
        saves = [] if interval is None else [f"checkpoint.persistent.save_interval={interval}"]
        arguments = ["recipes/pretrain.py", *short, *saves, *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        status = program.main()
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run
