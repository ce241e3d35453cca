"""Adapters that several ranks save, and that come back with their base in any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from holdfast.errors import CheckpointNotFoundError
from holdfast.storage.manifest import MANIFEST_NAME, Manifest
from tests.distributed.training import Model, Run
from tests.support.ranks import run_ranks


class _Adapted(nn.Linear):
    """A frozen layer, and a trained update of low rank."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_down = nn.Parameter(torch.randn(3, layer.in_features))
        self.lora_up = nn.Parameter(torch.zeros(layer.out_features, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        update = inputs @ self.lora_down.T @ self.lora_up.T
        return super().forward(inputs) + update


def _adapted(parallel: str) -> Callable[[int], nn.Module]:
    """Return what builds the model with adapters, divided in this way."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = Model()
        model.requires_grad_(False)
        body: Any = model.body
        for number in (0, 3):
            body[number] = _Adapted(body[number])
        if parallel == "ddp":
            return DistributedDataParallel(model, find_unused_parameters=True)
        if parallel == "fsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
        return model

    return build


def _run(root: Path, name: str, parallel: str, seed: int) -> Run:
    load: dict[str, Any] = {
        "pretrained": {"directory": str(root / "base")},
        "accept_data_restart": True,
    }
    load["broadcast"] = parallel == "ddp"  # of what was learned of each part after they were joined
    config: dict[str, Any] = {"async_save": False, "load": load, "save_filter": "adapters"}
    return Run(_adapted(parallel), root / f"tuned-{name}", seed=seed, **config)


def _save(root: Path) -> dict[str, Any]:
    """Pretrain, then train adapters in two layouts; return the full tensors of each."""
    base = Run("fsdp", root / "base", async_save=False)
    base.train(2)
    base.save()
    found = {}
    for parallel in ("ddp", "fsdp"):
        run = _run(root, parallel, parallel, seed=7)
        assert run.load().is_pretrained
        run.train(2)
        run.save()
        found[parallel] = run.tensors()
    return found


def _load(root: Path, layouts: tuple[str, ...]) -> list[Any]:
    found: list[Any] = []
    for saved in ("ddp", "fsdp"):
        for parallel in layouts:
            run = _run(root, saved, parallel, seed=9)
            result = run.load()
            assert (result.iteration, result.is_pretrained) == (2, False)
            loaded = run.manager._snapshotter._base
            assert loaded is not None
            found.append((saved, run.tensors(), loaded.record.digest))
    return found


@pytest.mark.parametrize("after", [1, 2, 4])
def test_adapters_and_base_come_back_in_any_layout(after: int, tmp_path: Path) -> None:
    """A base of FSDP2 on two ranks, adapters of DDP and FSDP2, at one, two and four."""
    saved = run_ranks(_save, 2, tmp_path)[0]
    for parallel in ("ddp", "fsdp"):
        path = tmp_path / f"tuned-{parallel}/iter_0000002" / MANIFEST_NAME
        manifest = Manifest.from_bytes(path.read_bytes(), "manifest")
        assert manifest.base_record is not None
        digest = manifest.base_record.digest
    layouts = ("plain",) if after == 1 else ("ddp", "fsdp")
    for found in run_ranks(_load, after, tmp_path, layouts):
        assert len(found) == 2 * len(layouts)
        for source, tensors, base in found:
            assert tensors == saved[source]
            assert base == digest, "every rank knows what it began from"
    assert saved["fsdp"]["optimizer"], "there was no optimizer state to compare"


def _miss_the_base(root: Path) -> list[bool]:
    run = _run(root, "fsdp", "fsdp", seed=9)
    before = run.tensors()
    with pytest.raises(CheckpointNotFoundError, match="its base is not there"):
        run.load()
    return [run.tensors() == before]


def test_all_ranks_are_told_of_a_missing_base(tmp_path: Path) -> None:
    """Before any of them has touched anything."""
    run_ranks(_save, 2, tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert run_ranks(_miss_the_base, 2, tmp_path) == [[True], [True]]
