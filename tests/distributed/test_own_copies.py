"""What each rank has of its own comes back to that rank, in both tiers, and plain DCP reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load

from holdfast.errors import CorruptCheckpointError
from holdfast.protocol import GlobalState, TrainState
from tests.support.managers import Live, manager_of
from tests.support.ranks import run_ranks
from tests.support.states import digest, rng_digests

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning"  # torch's word on loading without ranks
)
STEPS = (1, 2)


class _Data:
    """A position that grows, as that of a shuffled buffer does."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.resharded: list[list[int]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])

    def load_resharded_state(self, states: Sequence[dict[str, Any]]) -> None:
        self.resharded = [each["seen"] for each in states]


def _live(rank: int) -> Live:
    """Parameters are those of every rank; all else is the rank's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    norm.running_mean.fill_(rank + 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=rank + 3)
    live = Live(model, optimizer, scheduler, _Data(), GlobalState(train_state=TrainState()))
    live.state.train_state.consumed_train_samples = 100 * rank
    torch.manual_seed(rank)
    return live


def _digests(live: Live) -> dict[str, str]:
    found = {f"model.{name}": digest(each) for name, each in live.model.state_dict().items()}
    found |= {"scheduler": digest(live.scheduler.state_dict()), "data": str(live.data.seen)}
    found |= {"counters": str(live.state.train_state.to_dict())}
    return found | rng_digests()


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _save(root: Path) -> dict[str, str]:
    """Save twice, with a position that outgrows any slot made for the first one."""
    live = _live(_rank())
    manager = manager_of(root / "store", local={"directory": str(root / "local")})
    live.load(manager)
    for step in STEPS:
        live.data.seen += range(20_000 * step * (1 + _rank()))
        live.save(manager, step)
    manager.finalize_async_saves(live.state, terminate=True)
    return _digests(live)


def _load(root: Path, with_local: bool) -> tuple[str | None, dict[str, str]]:
    live = _live(7)
    extra = {"local": {"directory": str(root / "local")}} if with_local else {}
    manager = manager_of(root / "store", **extra)
    result = live.load(manager)
    manager.finalize_async_saves(live.state, terminate=True)
    assert result.iteration == STEPS[-1]
    return result.tier, _digests(live)


def _save_and_load(root: Path) -> list[Any]:
    return [_save(root), _load(root, True), _load(root, False)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_gets_its_own_copies_back(
    ranks: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Buffers, scheduler, data position, counters and RNG, in both tiers, bit for bit."""
    found = run_ranks(_save_and_load, ranks, tmp_path)
    for saved, local, persistent in found:
        assert local == ("local", saved)
        assert persistent == ("persistent", saved)
    assert len({each[0]["data"] for each in found}) == ranks
    folder = tmp_path / "store/iter_0000002"
    files = {f"__{rank}_0.distcp" for rank in range(ranks)}
    files |= {".metadata", "manifest.json", "train_state.json", "run_config.yaml"}
    assert {each.name for each in folder.iterdir()} == files
    _expect_plain_names(folder)
    manifest = json.loads(
        (folder / "manifest.json").read_text().rpartition("\n")[0].rpartition("\n")[0]
    )
    assert manifest["requires"] == ["per_rank"]
    if ranks == 2:
        _expect_canonical_on_one_rank(tmp_path, found[0][0], caplog)
        _expect_damage_is_named(tmp_path)


def _expect_plain_names(folder: Path) -> None:
    """Every name is one of plain DCP's, with rank 0's value."""
    mean = torch.zeros(4)
    names = ["scheduler", "rng", "data", "train_state", "optimizer.param_groups"]
    target: dict[str, Any] = {"model.1.running_mean": mean, **dict.fromkeys(names)}
    load(target, checkpoint_id=folder, no_dist=True)
    assert mean.tolist() == [0.5] * 4
    assert target["scheduler"]["step_size"] == 3
    assert (target["data"]["data_rank"], len(target["data"]["position"]["seen"])) == (0, 60_000)
    assert target["train_state"]["train_state"]["step"] == 2
    assert target["train_state"] == json.loads((folder / "train_state.json").read_text())
    assert set(target["rng"]) == {"python", "numpy", "torch", "cuda"}
    dcp_to_torch_save(folder, folder.parent / "whole.pt")
    whole = torch.load(folder.parent / "whole.pt", weights_only=True)
    assert whole["scheduler"] == target["scheduler"]
    assert {*whole} == {"model", "optimizer", *names[:4], "empty_mappings"}


def _expect_canonical_on_one_rank(
    root: Path, first: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Another number of ranks gets rank 0's copies, told by name, and every data position."""
    for with_local in (True, False):
        live = _live(7)
        extra = {"local": {"directory": str(root / "local")}} if with_local else {}
        manager = manager_of(root / "store", **extra)
        caplog.clear()
        assert live.load(manager).tier == ("local" if with_local else "persistent")
        (told,) = [text for text in caplog.messages if "copies that differ" in text]
        _, _, names = told.partition("copies that differ of ")
        assert names.partition(":")[0] == "model.1.running_mean, scheduler, train_state"
        manager.finalize_async_saves(live.state, terminate=True)
        found = _digests(live)
        same = [name for name in found if name.startswith(("model.", "scheduler", "counters"))]
        assert {name: found[name] for name in same} == {name: first[name] for name in same}
        assert [len(each) for each in live.data.resharded] == [60_000, 120_000]


def _load_damaged(root: Path) -> str:
    live = _live(7)
    with pytest.raises(CorruptCheckpointError) as caught:
        live.load(manager_of(root / "store", load={"step": 2}))
    return str(caught.value)


def _expect_damage_is_named(root: Path) -> None:
    """A bit that flips in rank 1's copy is told on both ranks by name and file."""
    path = root / "store/iter_0000002/__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(b"consumed_train_samples") + 40] ^= 1
    path.write_bytes(content)
    shutil.rmtree(root / "local")
    told = run_ranks(_load_damaged, 2, root)
    assert told[0] == told[1]
    assert "__1_0.distcp: block 0" in told[0]
    assert "data" in told[0]
