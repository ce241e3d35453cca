"""The position in the data where peers share it, where some ranks hold it, and at another size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from holdfast.errors import DataReshardError, StageFailedError
from tests.distributed.training import Data, ReshardableData, Run
from tests.support.ranks import run_ranks

STEPS = 3
ALL, FIRST = "all", "first"
"""Which ranks of a group that reads the same samples hold an iterator."""


def _run(root: Path, readers: int, holders: str, kind: type[Data] = Data, **config: Any) -> Run:
    """Return a run in which `readers` groups of ranks read different samples."""
    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (readers, size // readers), mesh_dim_names=("dp", "tp"))
    run = Run("plain", root, async_save=False, on_replica_mismatch="per_rank", **config)
    run.groups = SimpleNamespace(dp=mesh.get_group("dp"))
    holds = holders == ALL or mesh.get_local_rank("tp") == 0
    data: Any = kind(mesh.get_local_rank("dp"), readers) if holds else None
    run.data = data
    return run


def _save(root: Path, readers: int, holders: str, kind: type[Data]) -> list[list[int]]:
    """Take some batches, save, and return the samples of the next ones."""
    run = _run(root, readers, holders, kind)
    if run.data is not None:
        for _ in range(STEPS):
            next(run.data)
        run.data.seen.clear()
    run.state.train_state.step = STEPS
    run.save()
    return _take(run)


def _take(run: Run) -> list[list[int]]:
    if run.data is None:
        return []
    for _ in range(30):  # into the next epochs
        next(run.data)
    return [run.data.seen]


def _load(root: Path, readers: int, holders: str, saved: int) -> list[list[int]]:
    # At the same number of ranks it is known which of them had an iterator.
    strict = {"components": "raise"} if distributed.get_world_size() == saved else True
    run = _run(root, readers, holders, load={"strict": strict})
    result = run.load()
    assert ("data" in result.restored) == (run.data is not None)
    return _take(run)


@pytest.mark.parametrize(
    ("before", "after"),
    [((4, ALL), (4, ALL)), ((4, FIRST), (4, FIRST)), ((4, FIRST), (4, ALL)),
     ((4, FIRST), (2, ALL)), ((2, ALL), (4, FIRST))],
)  # fmt: skip
def test_two_readers_go_on_with_the_next_sample(
    before: tuple[int, str], after: tuple[int, str], tmp_path: Path
) -> None:
    """On any number of ranks: peers get the same data, and a rank without an iterator none."""
    saved_by, holders = before
    saved = run_ranks(_save, saved_by, tmp_path, 2, holders, Data)
    samples = [each[0] for each in saved if each]
    expected = [samples[0], samples[-1]]
    assert expected[0] != expected[1]
    ranks, holders = after
    loaded = run_ranks(_load, ranks, tmp_path, 2, holders, saved_by)
    peers = ranks // 2
    for rank, found in enumerate(loaded):
        is_holder = holders == ALL or rank % peers == 0
        assert found == ([expected[rank // peers]] if is_holder else [])


def _load_at_another_size(root: Path) -> list[Any]:
    found: list[Any] = []
    run = _run(root, 1, FIRST)
    with pytest.raises((DataReshardError, StageFailedError), match="load_resharded_state"):
        run.load()
    run = _run(root, 1, FIRST, ReshardableData)
    run.load()
    if run.data is not None:
        found.append((run.data.epoch, run.data.position))
    run = _run(root, 1, FIRST, load={"accept_data_restart": True})
    run.load()
    if run.data is not None:
        found.append((run.data.epoch, run.data.position))
    return found


def test_another_size_is_resharded_or_refused(tmp_path: Path) -> None:
    """A source that can gets the states of both readers, in order; another one is refused."""
    run_ranks(_save, 4, tmp_path, 2, FIRST, ReshardableData)
    first, second = run_ranks(_load_at_another_size, 2, tmp_path)
    assert first == [(0, 2 * STEPS * 4), (0, 0)]
    assert second == []


def _save_one_reader(root: Path) -> None:
    run = _run(root, 2, ALL, ReshardableData)
    if run.rank == 1:
        run.data = None  # type: ignore[assignment]  # a job that forgot it there
    run.state.train_state.step = STEPS
    run.save()


def _miss_one_reader(root: Path, readers: int) -> str:
    run = _run(root, readers, ALL, ReshardableData)
    with pytest.raises((DataReshardError, StageFailedError)) as caught:
        run.load()
    return str(caught.value)


@pytest.mark.parametrize("readers", [1, 2])
def test_a_position_that_nobody_saved_is_named(readers: int, tmp_path: Path) -> None:
    """Neither the same size nor another one goes on without it, as if it began there."""
    run_ranks(_save_one_reader, 2, tmp_path)
    for message in run_ranks(_miss_one_reader, readers, tmp_path, readers):
        assert "no data position of data-parallel rank(s) 1 of 2" in message
