"""A checkpoint loads at another number of ranks and under another way of dividing the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from holdfast.config import CheckpointConfig
from holdfast.errors import DataReshardError
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    GlobalState,
    TrainState,
)
from tests.distributed.training import Data, ReshardableData, Run, draw, exact, seed_rank
from tests.support.ranks import run_ranks

SAVED_AT = 3


def _save(root: Path) -> dict[str, Any]:
    """Train and save under every division; return the full tensors of each."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        run = Run(parallel, root / parallel, data=ReshardableData)
        run.train(SAVED_AT, save_at=[SAVED_AT])
        found[parallel] = run.tensors()
    return found


def _load(root: Path, parallels: tuple[str, ...]) -> dict[tuple[str, str], dict[str, Any]]:
    """Load every checkpoint under every division; go on training from each."""
    found = {}
    for saved in ("ddp", "fsdp"):
        for parallel in parallels:
            run = Run(parallel, root / saved, seed=8, data=ReshardableData)
            iteration, _ = run.load()
            assert iteration == run.step_number == SAVED_AT
            found[saved, parallel] = run.tensors()
            run.train(SAVED_AT + 2)
    return found


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 2), (2, 4), (4, 2)])
def test_model_and_optimizer_load_exactly_at_another_size(
    before: int, after: int, tmp_path: Path
) -> None:
    """Full tensors have the same bits after loading, from DDP and FSDP2 into either."""
    saved = run_ranks(_save, before, tmp_path)[0]
    parallels = ("plain", "ddp", "fsdp") if after == 1 else ("ddp", "fsdp")
    for found in run_ranks(_load, after, tmp_path, parallels):
        for (source, target), tensors in found.items():
            assert tensors == saved[source], f"{source} at {before} -> {target} at {after}"
    assert saved["fsdp"]["optimizer"], "there was no optimizer state to compare"


def _odd_model() -> nn.Module:
    """Shapes that leave some ranks of four with uneven shards, and some with none."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2), nn.Linear(2, 1, bias=False))


def _odd_run(directory: Path) -> tuple[DefaultCheckpointManager, dict[str, Any]]:
    model = _odd_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    live = {"model": model, "optimizer": optimizer, "state": GlobalState(train_state=TrainState())}
    values = {"timeout_seconds": 30, "persistent": {"directory": str(directory)}}
    return DefaultCheckpointManager(CheckpointConfig.from_mapping(values)), live


def _odd_tensors(live: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, parameter in live["model"].named_parameters():
        found[name] = exact(parameter)
        for key, value in live["optimizer"].state[parameter].items():
            found[f"{name}.{key}"] = exact(value)
    return found


def _save_odd(directory: Path) -> tuple[dict[str, Any], list[int]]:
    manager, live = _odd_run(directory)
    for _ in range(2):
        live["model"](torch.ones(3, 5)).sum().backward()
        live["optimizer"].step()
    live["state"].train_state.step = 2
    manager.save(CheckpointSaveContext(opt_param_scheduler=None, **live))
    manager.finalize_async_saves(live["state"], blocking=True)
    local = [parameter.to_local().numel() for parameter in live["model"].parameters()]
    return _odd_tensors(live), local


def _load_odd(directory: Path) -> dict[str, Any]:
    manager, live = _odd_run(directory)
    with torch.no_grad():
        for parameter in live["model"].parameters():
            parameter.zero_()
    manager.load(CheckpointLoadContext(opt_param_scheduler=None, **live))
    return _odd_tensors(live)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 4), (4, 1)])
def test_uneven_and_empty_shards_load_exactly(before: int, after: int, tmp_path: Path) -> None:
    """Dimensions that do not divide, or are smaller than the world, lose and move nothing."""
    saved = run_ranks(_save_odd, before, tmp_path)
    if before == 4:
        assert any(0 in local for _, local in saved), "no shard was empty"
    for found in run_ranks(_load_odd, after, tmp_path):
        assert found == saved[0][0]


def _save_for_data(root: Path) -> None:
    for name, data in (("follows", ReshardableData), ("stays", Data)):
        run = Run("ddp", root / name, data=data)
        run.train(SAVED_AT, save_at=[SAVED_AT])


def _load_data(root: Path) -> dict[str, Any]:
    """Load at another size with data that follows, that does not, and that may start over."""
    found: dict[str, Any] = {}
    run = Run("ddp", root / "follows", seed=8, data=ReshardableData)
    run.load()
    found["follows"] = run.data.state_dict()

    run = Run("ddp", root / "stays", seed=8)
    seed_rank(900 + run.rank)
    untouched = draw(), run.tensors()
    seed_rank(900 + run.rank)
    try:
        run.load()
    except DataReshardError as error:
        found["refused"] = str(error)
    found["untouched"] = (draw(), run.tensors()) == untouched and run.step_number == 0

    run = Run("ddp", root / "stays", seed=8, load={"accept_data_restart": True})
    iteration, _ = run.load()
    found["restarted"] = iteration, run.data.state_dict()
    found["tensors"] = run.tensors()["model"]
    return found


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 1)])
def test_data_follows_its_declared_policy(before: int, after: int, tmp_path: Path) -> None:
    """Resharded where it can be; else refused by naming the option, or started over with it.

    A refusal leaves model, optimizer, counters and generators alone.
    """
    run_ranks(_save_for_data, before, tmp_path)
    results = run_ranks(_load_data, after, tmp_path)
    for rank, found in enumerate(results):
        position = 4 * SAVED_AT * before // after
        assert found["follows"] == {"epoch": 0, "position": position, "rank": rank}
        assert "load.accept_data_restart" in found["refused"]
        assert f"{before} data-parallel ranks, this run has {after}" in found["refused"]
        assert found["untouched"]
        assert found["restarted"] == (SAVED_AT, {"epoch": 0, "position": 0, "rank": rank})
        assert found["tensors"] == results[0]["tensors"]


class _Group:
    """A data-parallel group as `pg_collection.dp` shows one."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class _Groups:
    def __init__(self, rank: int, size: int) -> None:
        self.dp = _Group(rank, size)


def _save_then_halve_the_readers(root: Path) -> tuple[dict[str, Any], bool]:
    """Four ranks read four shares; then pairs of them read one of two, and save again."""
    rank = distributed.get_rank()
    run = Run("ddp", root / "four", data=ReshardableData)
    run.train(SAVED_AT, save_at=[SAVED_AT])
    expected = draw()
    run = Run("ddp", root / "four", seed=8, data=lambda *_: ReshardableData(rank // 2, 2))
    run.load(pg_collection=_Groups(rank // 2, 2))
    found, goes_on = run.data.state_dict(), draw() == expected

    run = Run("ddp", root / "pairs", data=lambda *_: Data(rank // 2, 2))
    run.train(SAVED_AT)
    run.save(pg_collection=_Groups(rank // 2, 2))
    run.finalize(blocking=True)
    return found, goes_on


def _load_at_half_the_ranks(root: Path) -> dict[str, Any]:
    run = Run("ddp", root / "pairs", seed=8)
    run.load()
    return run.data.state_dict()


def test_readers_count_not_ranks(tmp_path: Path) -> None:
    """What counts for data is how many read it: the world may stay while that changes, or change.

    Four readers become two in a world that stays: data is resharded, draws go on. Two readers on
    four ranks become two on two: each goes on exactly, nothing needs resharding.
    """
    for rank, (data, goes_on) in enumerate(run_ranks(_save_then_halve_the_readers, 4, tmp_path)):
        assert data == {"epoch": 0, "position": 4 * SAVED_AT * 2, "rank": rank // 2}
        assert goes_on
    for rank, data in enumerate(run_ranks(_load_at_half_the_ranks, 2, tmp_path)):
        assert data == {"epoch": 0, "position": 4 * SAVED_AT, "rank": rank}


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _draw_after_load(root: Path) -> tuple[Any, list[str]]:
    messages = _Messages()
    logging.getLogger("holdfast").addHandler(messages)
    run = Run("ddp", root / "follows", seed=8, data=ReshardableData)
    seed_rank(1000)  # the same everywhere: what differs comes from the load
    run.load()
    return draw(), [each for each in messages.texts if "RNG reseeded" in each]


def _twice(function: Callable[..., Any], *arguments: Any) -> list[list[Any]]:
    return [run_ranks(function, 4, *arguments) for _ in range(2)]


def test_generators_are_reseeded_for_another_world(tmp_path: Path) -> None:
    """At another size every rank draws its own numbers, the same ones at every such resume."""
    run_ranks(_save_for_data, 2, tmp_path)
    first, second = _twice(_draw_after_load, tmp_path)
    assert first == second
    for part in range(3):  # python, numpy and torch, each by itself
        assert len({draws[part] for draws, _ in first}) == 4
    assert [len(messages) for _, messages in first] == [1, 0, 0, 0], "told once, by rank 0"


def _save_drawing_alike(root: Path) -> Any:
    run = Run("ddp", root, data=ReshardableData)
    run.train(SAVED_AT)
    seed_rank(4)
    run.save()
    run.finalize(blocking=True)
    return draw()


def _draw_on(root: Path) -> Any:
    run = Run("ddp", root, seed=8, data=ReshardableData)
    seed_rank(1000 + run.rank)
    run.load()
    return draw()


def test_ranks_that_drew_alike_do_so_in_another_world(tmp_path: Path) -> None:
    """One state was saved of all generators: every rank goes on from it."""
    before, other = run_ranks(_save_drawing_alike, 2, tmp_path)
    assert before == other
    assert run_ranks(_draw_on, 3, tmp_path) == [before] * 3
