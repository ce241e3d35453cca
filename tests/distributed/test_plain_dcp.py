"""A checkpoint is plain torch.distributed.checkpoint: it loads where holdfast does not exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.training import Run
from tests.support.ranks import run_program, run_ranks

PROGRAM = """
import sys

class Absent:  # an installed package is as absent as one that is not
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "holdfast":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Absent())
try:
    import holdfast
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("holdfast is importable here")

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(7, 13), nn.Tanh(), nn.Dropout(0.1), nn.Linear(13, 5), nn.Tanh()
        )
        self.gates = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(5, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

found = {}
for checkpoint in sys.argv[2:]:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    named = dict(model.named_parameters())
    found[checkpoint] = {
        "model": {**named, **dict(model.named_buffers())},
        "optimizer": {
            f"{name}.{key}": value
            for name, parameter in named.items()
            for key, value in optimizer.state[parameter].items()
        },
        "learning_rate": optimizer.param_groups[0]["lr"],
    }
assert not [name for name in sys.modules if name.partition(".")[0] == "holdfast"]
torch.save(found, sys.argv[1])
"""


def _save(root: Path) -> dict[str, dict[str, Any]]:
    """Save under every division; return what plain DCP has to find, by checkpoint."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        run = Run(parallel, root / parallel)
        run.train(3, save_at=[2, 3])
        path = root / parallel / "iter_0000003"
        found[str(path)] = {
            **run.tensors(),
            "learning_rate": run.optimizer.param_groups[0]["lr"],
        }
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_plain_dcp_loads_every_checkpoint(ranks: int, tmp_path: Path) -> None:
    """Model, moments and learning rate, bit for bit, in a process that cannot import holdfast."""
    saved = run_ranks(_save, ranks, tmp_path)[0]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run_program([program, tmp_path / "found.pt", *saved], environment={"PYTHONPATH": ""})
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert set(found) == set(saved)
    for path, expected in saved.items():
        for part in ("model", "optimizer"):
            read = {name: _bits(each) for name, each in found[path][part].items()}
            assert read == expected[part], f"{path}: {part}"
        assert found[path]["learning_rate"] == expected["learning_rate"]
        assert expected["optimizer"]


def _bits(value: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
