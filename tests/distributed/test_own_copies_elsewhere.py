"""What a rank has of its own comes back over every way to it, or is refused by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from holdfast.errors import StateMismatchError
from holdfast.format.dcp import per_rank_names, read_metadata
from holdfast.state import per_rank
from tests.support.managers import Live, manager_of
from tests.support.nodes import memory_directory, wait_for_all
from tests.support.ranks import run_ranks

STEP = 1


def _live(seed: int) -> Live:
    """Parameters are those of all; the buffers are the rank's own."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    norm.running_mean.fill_(10 * seed + distributed.get_rank() + 0.5)
    return Live(model, torch.optim.SGD(model.parameters(), lr=0.1))


def _mean(live: Live) -> list[float]:
    model: Any = live.model
    mean: list[float] = model.state_dict()["1.running_mean"].tolist()
    return mean


def _lose_a_node(root: Path) -> tuple[list[float], list[float], Any, list[int | None]]:
    rank = distributed.get_rank()
    os.environ["HOLDFAST_NODE"] = f"node{rank}"
    local = {"directory": str(root / f"node{rank}"), "replication": {"factor": 2}}
    live, manager = _live(0), manager_of(root / "store", run_id="run", async_save=True, local=local)
    live.save(manager, STEP, non_persistent_ckpt=True)
    manager.finalize_async_saves(live.state, terminate=True)
    wait_for_all()
    if rank == 1:
        shutil.rmtree(root / "node1")
    wait_for_all()
    fresh, manager = _live(7), manager_of(root / "store", run_id="run", local=local)
    result = fresh.load(manager)
    manager.finalize_async_saves(fresh.state, terminate=True)
    return _mean(live), _mean(fresh), result.tier, [each.rank for each in result.sources]


def test_a_lost_shard_s_own_tensors_are_fetched_from_a_peer() -> None:
    """The rank whose node was lost gets its own buffers back, not those of the peer that sends."""
    pytest.importorskip("nvidia_resiliency_ext")
    with memory_directory() as root:
        for rank, (saved, loaded, tier, _) in enumerate(run_ranks(_lose_a_node, 2, root)):
            assert saved == [rank + 0.5] * 4
            assert (loaded, tier) == (saved, "local")


def _save_and_broadcast(root: Path) -> tuple[list[float], list[float]]:
    live = _live(0)
    live.save(manager_of(root), STEP)
    fresh = _live(7)
    fresh.load(manager_of(root, load={"broadcast": True}))
    return _mean(live), _mean(fresh)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_broadcast_load_sends_no_rank_s_own_tensors(ranks: int, tmp_path: Path) -> None:
    """Each rank reads its own; a wrong one would be equal on all."""
    for rank, (saved, loaded) in enumerate(run_ranks(_save_and_broadcast, ranks, tmp_path)):
        assert saved == loaded == [rank + 0.5] * 4


class _Rows(torch.optim.Optimizer):
    """Keeps one plain statistic for each row of a rank's shard."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.param_groups[0]["params"]:
            self.state[each]["row"] = torch.ones(each.to_local().shape[0])


def _rows() -> Live:
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    fully_shard(model)
    optimizer = _Rows(model.parameters())
    optimizer.step()
    return Live(model, optimizer)


def _save_rows(root: Path) -> None:
    _rows().save(manager_of(root), STEP)


def _load_rows(root: Path) -> str:
    live = _rows()
    before = live.digests()
    with pytest.raises(StateMismatchError) as caught:
        live.load(manager_of(root))
    assert live.digests() == before
    return str(caught.value)


def test_plain_state_of_a_shard_is_refused_at_another_size(tmp_path: Path) -> None:
    """By its name and both sizes, on every rank, with nothing touched."""
    run_ranks(_save_rows, 2, tmp_path)
    for told in run_ranks(_load_rows, 4, tmp_path):
        assert "optimizer.state.weight.row is plain state of one shard of its parameter" in told
        assert "on a mesh [2] and is a DTensor (S(0)) on a mesh [4] here" in told


def _buffers(size: int, differ: bool) -> Live:
    model = nn.Module()
    value = float(distributed.get_rank() if distributed.is_initialized() and differ else 0)
    for number in range(2):
        model.register_buffer(f"large{number}", torch.full((size + number,), value + number))
    return Live(model)


def _at_the_cap(root: Path, excess: int, differ: bool) -> tuple[list[str], list[float]]:
    """Save and load buffers that together are so many elements above the cap.

    Return the names that are per rank in the checkpoint, and what came back.
    """
    per_rank.BUFFER_CAP_BYTES = 4 * (2 * 100 + 1)
    _buffers(100 + excess, differ).save(manager_of(root), STEP)
    metadata: Any = read_metadata((root / "iter_0000001/.metadata").read_bytes())
    names = sorted(name for name in per_rank_names(metadata) if name.startswith("model."))
    fresh = _buffers(100 + excess, differ)
    model: Any = fresh.model
    for each in model.buffers():
        each.fill_(9)
    fresh.load(manager_of(root))
    return names, [float(each[0]) for each in model.buffers()]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("excess", "differ", "names"),
    [
        (0, True, ["model.large0", "model.large1"]),
        (0, False, ["model.large0", "model.large1"]),
        (1, False, ["model.large0"]),
        (1, True, ["model.large0", "model.large1"]),
    ],
)
def test_above_the_cap_only_buffers_that_differ_are_per_rank(
    excess: int, differ: bool, names: list[str], ranks: int, tmp_path: Path
) -> None:
    """Up to and with its last byte all are; above it the largest are saved once if equal."""
    if ranks == 1 and excess:
        names = ["model.large0"]  # nothing to differ from
    for rank, found in enumerate(run_ranks(_at_the_cap, ranks, tmp_path, excess, differ)):
        assert found == (names, [float(rank * differ), rank * differ + 1.0])
