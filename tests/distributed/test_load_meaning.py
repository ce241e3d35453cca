"""Several ranks take one meaning of a load: one checkpoint, one refusal, one error."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from holdfast.errors import FormatTooNewError, OwnCheckpointsExistError, StageFailedError
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.manifest import MANIFEST_NAME, Manifest
from tests.distributed.training import Run
from tests.support.ranks import run_ranks

LAYOUTS = ["ddp", "fsdp"]


def _fine_tune(root: Path, parallel: str) -> list[Any]:
    base = Run(parallel, root / "base", async_save=False)
    base.train(3)
    base.save()
    weights = base.tensors()["model"]
    found: list[Any] = []
    for seed in (7, 8):
        pretrained = {"pretrained": {"directory": str(root / "base")}}
        run = Run(parallel, root / "tuned", seed=seed, async_save=False, load=pretrained)
        result = run.load()
        is_parents = run.tensors()["model"] == weights
        found.append((tuple(result), result.is_pretrained, run.step_number, is_parents))
        run.train(run.step_number + 2)
        run.save()
    elsewhere = {"directory": str(root / "base")}
    run = Run(parallel, root / "tuned", seed=9, async_save=False, load=elsewhere)
    before = run.tensors()
    with pytest.raises(OwnCheckpointsExistError, match=r"load\.pretrained\.directory"):
        run.load()
    found.append(run.tensors() == before)
    return found


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_a_run_begins_from_another_on_all_ranks(parallel: str, tmp_path: Path) -> None:
    """Weights of the parent and fresh counters at first, the own checkpoint at the second start."""
    for found in run_ranks(_fine_tune, 2, tmp_path, parallel):
        assert found == [((0, 0), True, 0, True), ((2, 2000), False, 2, False), True]


class _OneFails(LocalFilesystem):
    """On one rank, a file of this name cannot be opened for lack of descriptors, once."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name: str | None = name

    def open_existing(self, path: Path) -> BinaryIO:
        if path.name == self.name:
            self.name = None
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return super().open_existing(path)


def _run_short(root: Path, odd: int, name: str) -> list[Any]:
    run = Run("ddp", root / "store", async_save=False)
    for steps in (1, 2):
        run.train(steps)
        run.save()
    filesystem = _OneFails(name) if run.rank == odd else None
    run = Run("ddp", root / "store", seed=5, async_save=False, filesystem=filesystem)
    with pytest.raises(StageFailedError) as caught:
        run.load()
    failed = [each.rank for each in caught.value.failures]
    result = run.load()
    return [failed, result.iteration, result.skipped]


@pytest.mark.parametrize(
    ("odd", "name"),
    # What one rank reads for all, this rank's own shard, and another's.
    [
        (0, "manifest.json"),
        (0, "train_state.json"),
        (1, "__1_0.distcp"),
        (1, "__0_0.distcp"),
    ],
)
def test_one_rank_that_fails_is_told_and_nothing_older_is_taken(
    odd: int, name: str, tmp_path: Path
) -> None:
    """All ranks raise and name it; the next load of all takes the newest."""
    for found in run_ranks(_run_short, 2, tmp_path, odd, name):
        assert found == [[odd], 2, ()]


def _meet_a_later_version(root: Path) -> list[str]:
    run = Run("fsdp", root / "store", async_save=False)
    for steps in (1, 2):
        run.train(steps)
        run.save()
    if run.rank == 0:
        path = root / "store/iter_0000002" / MANIFEST_NAME
        manifest = Manifest.from_bytes(path.read_bytes(), "manifest")
        later = dict(vars(manifest), format=99)
        path.write_bytes(Manifest(**later).to_bytes())
    run = Run("fsdp", root / "store", seed=5, async_save=False)
    with pytest.raises(FormatTooNewError) as caught:
        run.load()
    return [caught.value.found]


def test_all_ranks_stop_before_a_later_version(tmp_path: Path) -> None:
    """No rank loads the older checkpoint in its place."""
    assert run_ranks(_meet_a_later_version, 2, tmp_path) == [["format 99"]] * 2
