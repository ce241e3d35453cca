"""The hostile files are hostile."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch

from tests.support.hostile import hostile_pickle, hostile_torch_file


def test_a_careless_reader_runs_the_code(tmp_path: Path) -> None:
    """Each file leaves its mark when it is read as such files should not be."""
    pickle.loads(hostile_pickle(tmp_path / "one"))
    torch.load(io.BytesIO(hostile_torch_file(tmp_path / "two")), weights_only=False)
    assert (tmp_path / "one").exists()
    assert (tmp_path / "two").exists()
