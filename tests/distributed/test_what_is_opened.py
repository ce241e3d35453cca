"""Which files a load opens: its own shard alone if it can, and `.metadata` once for each node."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from holdfast.errors import CorruptCheckpointError, NoLoadableCheckpointError
from holdfast.filesystem import LocalFilesystem
from tests.distributed.training import Model, Run
from tests.support.ranks import run_ranks

SAVED_AT = 2
METADATA = ".metadata"
MOST_OPENS = 3
"""Of one file, by the ranks of one node: an index, its tensors, and what is sent to others."""


class _Counting(LocalFilesystem):
    """Counts how often each file of a checkpoint is opened for reading."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: Counter[str] = Counter()

    def open_existing(self, path: Path) -> BinaryIO:
        if path.parent.name.startswith("iter_"):
            self.opened[path.name] += 1
        return super().open_existing(path)


def _hybrid(seed: int) -> nn.Module:
    """Parameters in two parts, each held by half of the ranks."""
    torch.manual_seed(seed)
    model = Model()
    shape = (2, distributed.get_world_size() // 2)
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("copy", "part")))
    return model


def _parallel(name: str) -> Any:
    return _hybrid if name == "hybrid" else name


def _save(root: Path, parallels: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for each in parallels:
        run = Run(_parallel(each), root / each)
        run.train(SAVED_AT, save_at=[SAVED_AT])
        found[each] = run.tensors()
    return found


def _load(
    root: Path, parallels: tuple[tuple[str, str], ...], nodes: int = 1
) -> list[tuple[Counter[str], dict[str, Any]]]:
    """Load each checkpoint under a division; return what was opened, and the tensors."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    os.environ["HOLDFAST_NODE"] = str(rank * nodes // ranks)
    found = []
    for saved, parallel in parallels:
        filesystem = _Counting()
        run = Run(
            _parallel(parallel),
            root / saved,
            seed=8,
            filesystem=filesystem,
            load={"accept_data_restart": True},
        )
        assert run.load().iteration == SAVED_AT
        found.append((filesystem.opened, run.tensors()))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_resume_of_the_same_layout_opens_no_metadata(ranks: int, tmp_path: Path) -> None:
    """Each rank reads its own shard's index; of sharded state it opens no other rank's file."""
    parallels = ("ddp", "fsdp")
    saved = run_ranks(_save, ranks, tmp_path, parallels)[0]
    found = run_ranks(_load, ranks, tmp_path, tuple((each, each) for each in parallels))
    for rank, loads in enumerate(found):
        for parallel, (opened, tensors) in zip(parallels, loads, strict=True):
            assert tensors == saved[parallel]
            assert METADATA not in opened
            read_by_rank_0 = {"manifest.json", "train_state.json", "run_config.yaml"}
            assert not read_by_rank_0 & opened.keys() or rank == 0
            if parallel == "fsdp":
                shards = {name for name in opened if name.endswith(".distcp")}
                assert shards == {f"__{rank}_0.distcp"}
                assert opened[f"__{rank}_0.distcp"] <= MOST_OPENS


@pytest.mark.parametrize("nodes", [1, 2])
def test_an_elastic_load_opens_each_file_few_times_on_a_node(nodes: int, tmp_path: Path) -> None:
    """`.metadata` is opened once by each node, shards at most three times."""
    saved = run_ranks(_save, 4, tmp_path, ("fsdp",))[0]
    loads = run_ranks(_load, 2, tmp_path, (("fsdp", "fsdp"),), nodes)
    by_node = [Counter[str]() for _ in range(nodes)]
    for rank, [(opened, tensors)] in enumerate(loads):
        assert tensors == saved["fsdp"]
        by_node[rank * nodes // 2] += opened
    for opened in by_node:
        assert opened[METADATA] == 1
        assert all(times <= MOST_OPENS for times in opened.values()), opened


def test_parts_that_others_wrote_are_looked_up(tmp_path: Path) -> None:
    """By those who need the same, as in hybrid sharding; else in `.metadata`, once on a node."""
    pairs = (("hybrid", "hybrid"), ("fsdp", "ddp"), ("ddp", "fsdp"), ("hybrid", "fsdp"))
    saved = run_ranks(_save, 4, tmp_path, ("fsdp", "hybrid", "ddp"))[0]
    for rank, loaded in enumerate(run_ranks(_load, 4, tmp_path, pairs, 2)):
        assert [tensors for _, tensors in loaded] == [saved[source] for source, _ in pairs]
        is_reader = int(rank % 2 == 0)  # the first of its node
        assert [opened[METADATA] for opened, _ in loaded] == [0, 0, 0, is_reader]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _load_damaged(root: Path, step: int | None) -> tuple[int, list[str]] | str:
    run = Run("fsdp", root, seed=8, load={"accept_data_restart": True, "step": step})
    before = run.tensors()
    try:
        result = run.load()
    except (CorruptCheckpointError, NoLoadableCheckpointError) as error:
        assert run.tensors() == before
        return f"{type(error).__name__}: {error}"
    return result.iteration, [each.reason for each in result.skipped]


def _save_two(root: Path) -> None:
    Run("fsdp", root).train(2, save_at=[1, 2])


def test_damage_of_metadata_costs_only_those_who_need_it(tmp_path: Path) -> None:
    """A resume goes on; another number of ranks takes the older one, all for the same reason."""
    store = tmp_path / "store"
    run_ranks(_save_two, 2, store)
    _flip(store / "iter_0000002" / METADATA)
    assert run_ranks(_load_damaged, 2, store, None) == [(2, [])] * 2
    first, *others = run_ranks(_load_damaged, 4, store, None)
    assert others == [first] * 3
    iteration, [reason] = first
    assert iteration == 1
    assert f"{METADATA}: block 0" in reason
    told = run_ranks(_load_damaged, 4, store, 2)
    assert len(set(told)) == 1
    assert told[0].startswith("CorruptCheckpointError")
    _flip(store / "iter_0000001" / METADATA)
    told = run_ranks(_load_damaged, 4, store, None)
    assert len(set(told)) == 1
    assert told[0].startswith("NoLoadableCheckpointError")
