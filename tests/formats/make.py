"""Make the frozen checkpoints of the current on-disk format, intact and damaged.

    python -m tests.formats.make tests/formats/v2

Run once, when a format is new, and keep what it makes: every later version must read the intact
ones and pass over the damaged ones for the reasons in `EXPECTED`, which is written beside them.
Each example is a store named for what is wrong with it. All values follow from formulas, so that a
reader can be checked without the writer.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from holdfast.config import CheckpointConfig
from holdfast.filesystem import LocalFilesystem
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import CheckpointSaveContext, GlobalState, TrainState
from holdfast.storage.digests import describe_content, footer_size
from holdfast.storage.identity import RunIdentity
from holdfast.storage.manifest import MANIFEST_NAME, Manifest, seal
from holdfast.storage.posix import PosixStorage
from tests.support.hostile import hostile_torch_file, plant_value
from tests.support.ranks import run_ranks

RUN_ID = "frozen"
ITERATION = 20
OLDER = 10
FLOATING_POINT_OPERATIONS = 3 * 10**20
"""More than 64 bits hold."""
SEED = 7

BASE = "intact_small"
"""What the damaged examples differ from: each holds only the files that do."""

EXPECTED: dict[str, dict[str, Any]] = {
    BASE: {"loads": ITERATION},
    "intact_one_rank": {"loads": ITERATION},
    "intact_two_ranks": {"loads": ITERATION},
    "flipped_shard": {
        "loads": OLDER,
        "skips": r"__0_0\.distcp: block 0 \(bytes 0-\d+\) does not match its digest",
    },
    "flipped_footer": {"loads": OLDER, "skips": r"__0_0\.distcp: the footer .* does not match"},
    "blocks_in_manifest": {"loads": ITERATION},
    "cut_shard": {"loads": OLDER, "skips": r"__0_0\.distcp: has \d+ bytes, \d+ were committed"},
    "missing_counters": {"loads": OLDER, "skips": r"train_state\.json: is missing"},
    "other_metadata": {"loads": OLDER, "skips": r"\.metadata: .* does not match its digest"},
    "no_manifest": {"loads": OLDER, "skips": r"has no manifest\.json"},
    "flipped_manifest": {
        "loads": OLDER,
        "skips": r"manifest\.json: does not match the digest in its last line",
    },
    "renamed": {"loads": OLDER, "skips": r"is of iteration 20: the directory was renamed"},
    "newer_format": {"stops": r"is of format 1000; this version of holdfast reads up to format 2"},
    "newer_feature": {"stops": r"requires 'striped_shards'; this version of holdfast reads"},
    "newer_fields": {"loads": ITERATION},
    "leads_outside": {"loads": OLDER, "skips": r"lists '\.\./.*', outside the checkpoint"},
    "code_in_state": {"loads": OLDER, "skips": r"asks for code"},
    "other_run": {"skips": r"belongs to run 'frozen'", "loads_by_number": ITERATION},
    "superseded": {"loads": OLDER, "skips": r"superseded", "loads_by_number": ITERATION},
}
"""`loads`: the iteration that a load takes, absent: none; `skips`: why not the newest, a pattern.
`stops`: the newest needs a later version, so nothing is loaded: the error, a pattern.

The newest is then refused by its number too, unless `loads_by_number`. Where the table is written,
`without` and `moved` join: what to take from the base and how to rename it, before the files of the
example are put over it.
"""


class Model(nn.Module):
    """Two parameters and a buffer, filled by formula."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(0))

    @torch.no_grad()
    def fill(self, iteration: int) -> None:
        """Give every tensor the values that it has at an iteration."""
        self.steps.fill_(iteration)
        for name, parameter in self.named_parameters():
            whole = expected_parameter(name, iteration)
            parameter.copy_(whole)


def expected_parameter(name: str, iteration: int) -> Tensor:
    """Return a parameter at an iteration: whole numbers, exact in any float."""
    shape = {"linear.weight": (2, 3), "linear.bias": (2,)}[name]
    count = int(np.prod(shape))
    return torch.arange(count, dtype=torch.float32).reshape(shape) + iteration


def expected_momentum(name: str, iteration: int) -> Tensor:
    """Return the optimizer's momentum of a parameter at an iteration."""
    return -expected_parameter(name, iteration)


def _save(directory: Path, iterations: list[int], with_optimizer: bool) -> None:
    """Save a run of formulas at some iterations, on every rank there is."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    state = GlobalState(cfg={"made_by": "tests/formats/make.py"}, train_state=TrainState())
    manager = DefaultCheckpointManager(
        CheckpointConfig.from_mapping(
            {"run_id": RUN_ID, "async_save": False, "persistent": {"directory": str(directory)}}
        )
    )
    for iteration in iterations:
        model = Model()
        model.fill(iteration)
        if distributed.is_initialized():
            fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5)
        scheduler.last_epoch = iteration
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = -parameter.detach()
        state.train_state.step = iteration
        state.train_state.consumed_train_samples = 8 * iteration
        state.train_state.floating_point_operations_so_far = FLOATING_POINT_OPERATIONS
        manager.save(
            CheckpointSaveContext(
                state,
                model,
                optimizer if with_optimizer else None,
                scheduler if with_optimizer else None,
                num_floating_point_operations_so_far=FLOATING_POINT_OPERATIONS,
            )
        )


# Damages: each is given the newest of the two checkpoints of a store.


def _flipped_shard(folder: Path) -> None:
    _flip(folder / "__0_0.distcp")


def _flipped_footer(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[-footer_size(0)] ^= 1
    path.write_bytes(content)


def _blocks_in_manifest(folder: Path) -> None:
    def list_them(values: dict[str, Any]) -> None:
        for each in values["files"]:
            with (folder / each["path"]).open("rb") as stream:
                each |= dataclasses.asdict(describe_content(each["path"], stream.read()))

    _rewrite_manifest(folder, list_them)


def _cut_shard(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def _missing_counters(folder: Path) -> None:
    (folder / "train_state.json").unlink()


def _other_metadata(folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"linear", b"normal"))


def _no_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()


def _flipped_manifest(folder: Path) -> None:
    _flip(folder / MANIFEST_NAME)


def _newer_format(folder: Path) -> None:
    _rewrite_manifest(folder, lambda values: values.update(format=1000))


def _newer_feature(folder: Path) -> None:
    _rewrite_manifest(folder, lambda values: values.update(requires=["striped_shards"]))


def _newer_fields(folder: Path) -> None:
    def add(values: dict[str, Any]) -> None:
        values.update(colour="red", requires=[])
        values["files"] = [{**each, "colour": "red"} for each in values["files"]]

    _rewrite_manifest(folder, add)
    run_path = folder.parent / "run.json"
    run = json.loads(run_path.read_text())
    run["attempts"] = [{**each, "colour": "red"} for each in run["attempts"]]
    run_path.write_text(json.dumps({**run, "colour": "red"}, indent=1, sort_keys=True) + "\n")
    claim_path = folder.parent / "attempt_0000001.json"
    claim = json.loads(claim_path.read_text().rpartition("\n")[0].rpartition("\n")[0])
    text = json.dumps({**claim, "colour": "red"}, indent=1, sort_keys=True).encode() + b"\n"
    claim_path.write_bytes(seal(text))


def _leads_outside(folder: Path) -> None:
    def add(values: dict[str, Any]) -> None:
        outside = {**values["files"][0], "path": "../run.json"}
        values["files"] = [*values["files"], outside]

    _rewrite_manifest(folder, add)


def _code_in_state(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    plant_value(path, "rng", hostile_torch_file(Path("/nonexistent/holdfast-ran-code")))

    def seal_it(values: dict[str, Any]) -> None:
        for each in values["files"]:
            if each["path"] == path.name:
                with path.open("rb") as stream:
                    each |= dataclasses.asdict(describe_content(each["path"], stream.read()))

    _rewrite_manifest(folder, seal_it)


def _other_run(folder: Path) -> None:
    path = folder.parent / "run.json"
    path.write_text(path.read_text().replace(RUN_ID, "another"))


def _superseded(folder: Path) -> None:
    identity = RunIdentity(PosixStorage(folder.parent, LocalFilesystem()))
    identity.claim_attempt(RUN_ID, OLDER, f"/checkpoints/iter_{OLDER:07d}")


DAMAGES: dict[str, Callable[[Path], None]] = {
    each.__name__.removeprefix("_"): each
    for each in (
        _flipped_shard, _flipped_footer, _blocks_in_manifest, _cut_shard, _missing_counters,
        _other_metadata, _no_manifest,
        _flipped_manifest, _newer_format, _newer_feature, _newer_fields, _leads_outside, _code_in_state, _other_run, _superseded,
    )
}  # fmt: skip


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / MANIFEST_NAME
    values = dataclasses.asdict(Manifest.from_bytes(path.read_bytes(), ""))
    change(values)
    path.write_bytes(seal(json.dumps(values, indent=1, sort_keys=True).encode() + b"\n"))


def assemble(example: Path, expected: dict[str, Any], target: Path) -> Path:
    """Make a whole store of an example and what it shares with the base."""
    if example.name.startswith("intact"):
        return shutil.copytree(example, target)
    shutil.copytree(example.parent / BASE, target)
    for name in expected.get("without", ()):
        (target / name).unlink()
    for old, new in expected.get("moved", {}).items():
        (target / old).rename(target / new)
    if example.is_dir():
        shutil.copytree(example, target, dirs_exist_ok=True)
    return target


def make(target: Path) -> None:
    """Write every example and the table of what is expected of it."""
    target.mkdir(parents=True)
    base = target / BASE
    run_ranks(_save, 1, base, [OLDER, ITERATION], False, initialise=False)
    run_ranks(_save, 1, target / "intact_one_rank", [ITERATION], True, initialise=False)
    run_ranks(_save, 2, target / "intact_two_ranks", [ITERATION], True)
    newest = f"iter_{ITERATION:07d}"
    table = {name: dict(expected) for name, expected in EXPECTED.items()}
    table["renamed"]["moved"] = {newest: f"iter_{ITERATION + 1:07d}"}
    for name, damage in DAMAGES.items():
        whole = shutil.copytree(base, target / "whole")
        damage(whole / newest)
        before, after = _files(base), _files(whole)
        if without := sorted(before.keys() - after.keys()):
            table[name]["without"] = without
        for path in sorted(after):
            if after[path] != before.get(path):
                (target / name / path).parent.mkdir(parents=True, exist_ok=True)
                (target / name / path).write_bytes(after[path])
        shutil.rmtree(whole)
    content = json.dumps(table, indent=1, sort_keys=True) + "\n"
    (target / "expected.json").write_text(content)


def _files(folder: Path) -> dict[str, bytes]:
    paths = [each for each in folder.rglob("*") if each.is_file()]
    return {str(each.relative_to(folder)): each.read_bytes() for each in paths}


if __name__ == "__main__":
    make(Path(sys.argv[1]))
