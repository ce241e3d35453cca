"""Reading shard files: nothing from disk runs, nothing outside the checkpoint is opened."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.errors import CorruptCheckpointError, NoLoadableCheckpointError
from holdfast.filesystem import LocalFilesystem
from holdfast.read.reader import ShardReader
from holdfast.storage.digests import describe_content
from holdfast.storage.posix import PosixStorage
from tests.support.hostile import hostile_pickle, hostile_torch_file, plant_value
from tests.support.managers import Live, linear, manager_of, step
from tests.support.stores import reseal


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The second of two committed checkpoints, at iterations 1 and 2."""
    live = linear()
    step(live)
    manager = manager_of(tmp_path / "store")
    live.save(manager, 1)
    live.save(manager, 2)
    return tmp_path / "store/iter_0000002"


def _open(path: Path) -> ShardReader:
    records = {}
    for each in path.rglob("*"):
        if each.is_file():
            with each.open("rb") as stream:
                name = str(each.relative_to(path))
                records[name] = describe_content(name, stream.read())
    content = (path / ".metadata").read_bytes()
    return ShardReader.open(PosixStorage(path, LocalFilesystem()), content, records)


def test_a_sound_checkpoint_is_opened(checkpoint: Path) -> None:
    """Tensors and values are known by name, and tensors are read into place."""
    reader = _open(checkpoint)
    assert reader.tensors()["model.weight"].size == torch.Size([2, 4])
    assert "optimizer.param_groups" in reader.value_names()
    assert reader.key_path("optimizer.param_groups") == ("optimizer", "param_groups")
    target = torch.zeros(2, 4)
    reader.read_tensors({"model.weight": target})
    assert target.abs().sum() > 0


def _with_metadata(change: Callable[[Any], Any]) -> Callable[[Path, Path], None]:
    def harm(path: Path, marker: Path) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        (path / ".metadata").write_bytes(pickle.dumps(change(metadata)))

    return harm


def _outside(metadata: Any) -> Any:
    for info in metadata.storage_data.values():
        info.relative_path = "../iter_0000001/__0_0.distcp"
    return metadata


def _unlisted(metadata: Any) -> Any:
    for info in metadata.storage_data.values():
        info.relative_path = "unlisted.distcp"
    return metadata


class _Unwanted:
    """A type that no checkpoint needs."""


def _hide_in_metadata(path: Path, marker: Path) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = pickle.loads  # any callable by its name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _replace(name: str, make: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    def harm(path: Path, marker: Path) -> None:
        (path / name).write_bytes(make(marker))

    return harm


def _plant(name: str, make: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    def harm(path: Path, marker: Path) -> None:
        plant_value(path / "__0_0.distcp", name, make(marker))

    return harm


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


HOSTILE = {
    "metadata: code": _replace(".metadata", hostile_pickle),
    "metadata: a callable": _hide_in_metadata,
    "metadata: another type": _with_metadata(lambda _: {"a": 1}),
    "metadata: a foreign type": _with_metadata(lambda _: _Unwanted()),
    "metadata: nothing": _replace(".metadata", lambda marker: b""),
    "metadata: text": _replace(".metadata", lambda marker: b"garbage"),
    "metadata: outside": _with_metadata(_outside),
    "metadata: unlisted": _with_metadata(_unlisted),
    "rng: pickle": _plant("rng", hostile_pickle),
    "rng: torch": _plant("rng", hostile_torch_file),
    "rng: nothing": _plant("rng", lambda marker: b""),
    "rng: another state": _plant("rng", lambda marker: _saved({"python": 1})),
    "counters: torch": _plant("train_state", hostile_torch_file),
    "counters: another": _plant("train_state", lambda marker: _saved({"train_state": {"step": 7}})),
    "shards: torch": _replace("__0_0.distcp", hostile_torch_file),
    "counters: nothing": _replace("train_state.json", lambda marker: b""),
    "counters: a list": _replace("train_state.json", lambda marker: b"[]"),
    "counters: another step": _replace(
        "train_state.json", lambda marker: b'{"train_state": {"step": 7}}'
    ),
    "counters: a half": _replace(
        "train_state.json", lambda marker: b'{"train_state": {"step": 2}}'
    ),
    "counters: a number that is none": _replace(
        "train_state.json",
        lambda marker: b'{"num_floating_point_operations_so_far": 0, "train_state": {"step": 2.0}}',
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_runs_no_code_and_is_passed_over(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    """Files that lie or ask for code, under a manifest that agrees with them, lose to the older."""
    marker = tmp_path / "ran"
    (checkpoint / "unlisted.distcp").write_bytes((checkpoint / "__0_0.distcp").read_bytes())
    HOSTILE[kind](checkpoint, marker)
    reseal(checkpoint)
    live = linear(1)
    before = live.digests()
    with pytest.raises(CorruptCheckpointError):
        live.load(manager_of(checkpoint.parent, load={"step": 2}))
    assert live.digests() == before
    result = live.load(manager_of(checkpoint.parent))
    assert result.iteration == 1
    assert [each.iteration for each in result.skipped] == [2]
    assert not marker.exists()


DROPPED = ["train_state.json", "run_config.yaml", "__0_0.distcp", ".metadata"]


@pytest.mark.parametrize("name", DROPPED)
def test_a_file_that_was_never_listed_is_an_error(checkpoint: Path, name: str) -> None:
    """Tensors without counters, or without any other part, are no checkpoint: never step 0."""
    (checkpoint / name).unlink()
    reseal(checkpoint, drop=(name,))
    result = linear(1).load(manager_of(checkpoint.parent))
    assert (result.iteration, [each.iteration for each in result.skipped]) == (1, [2])
    (checkpoint.parent / "iter_0000001/manifest.json").unlink()
    live = Live(linear(1).model)
    before = live.digests()
    with pytest.raises(NoLoadableCheckpointError):
        live.load(manager_of(checkpoint.parent))
    assert live.digests() == before


def test_a_link_among_the_files_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A shard file that is a link, even to the right bytes, is not read through."""
    shard = checkpoint / "__0_0.distcp"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    result = linear(1).load(manager_of(checkpoint.parent))
    assert result.iteration == 1
    assert "__0_0.distcp" in result.skipped[0].reason


def test_a_plan_says_which_bytes_are_needed_before_any_is_read(checkpoint: Path) -> None:
    """By file; reading it then fills the tensors and tells how much came from where."""
    reader = _open(checkpoint)
    targets = {"model.weight": torch.zeros(2, 4), "model.bias": torch.zeros(2)}
    plan = reader.plan(targets)
    assert all(not each.any() for each in targets.values())
    (name,) = plan
    size = (checkpoint / name).stat().st_size
    assert all(0 <= each.start < each.stop <= size for each in plan[name].ranges)
    assert reader.taken == {}
    reader.read(plan)
    assert all(each.any() for each in targets.values())
    assert reader.taken == {name: 10 * 4}
