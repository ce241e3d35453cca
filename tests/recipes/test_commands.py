"""Commands that a person is to type run the programs of this environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from commands import name_program


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the programs of an environment in the working directory, which runs this process."""
    folder = tmp_path / ".venv/bin"
    folder.mkdir(parents=True)
    for name in ("python", "torchrun"):
        (folder / name).touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    return folder


@pytest.mark.parametrize("name", ["python", "torchrun"])
def test_a_program_is_named_as_it_can_be_typed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By its path from here, and by its bare name only where that leads to the same program."""
    assert name_program(name) == f".venv/bin/{name}"
    monkeypatch.setenv("PATH", str(folder))
    assert name_program(name) == name


def test_a_program_of_another_environment_is_not_meant(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another torchrun that comes first in PATH would run another torch."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/torchrun").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'other'}:{folder}")
    assert name_program("torchrun") == ".venv/bin/torchrun"
    (folder / "torchrun").unlink()
    assert name_program("torchrun") == "torchrun"
