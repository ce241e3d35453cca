"""A checkpoint that somebody made to do harm is refused, and nothing in it runs.

Whoever can write into a store can also make its digests right: each of these checkpoints is sealed
as a sound one is, so that only the reading itself can refuse it. The next good checkpoint is loaded
instead, and nothing outside the store is read, changed or removed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.digests import describe_content
from holdfast.storage.manifest import MANIFEST_NAME, Manifest, seal
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store, checkpoint_name
from tests.faults.jobs import Job, copy_store, leftovers, make_store
from tests.support.hostile import hostile_pickle, hostile_torch_file, plant_value
from tests.support.stores import tree

STEPS = (2, 4, 6)
OLDER, NEWEST = STEPS[-2:]

Digests = dict[int, dict[str, str]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Digests]:
    """A store with three checkpoints, and what each holds."""
    store = tmp_path_factory.mktemp("sound") / "store"
    return store, make_store(store, *STEPS)


@pytest.fixture
def folder(sound: tuple[Path, Digests], tmp_path: Path) -> Path:
    """The newest checkpoint of a copy of the store."""
    return copy_store(sound[0], tmp_path / "store") / checkpoint_name(NEWEST)


def _rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the manifest says, and make its digest right."""
    content = (folder / MANIFEST_NAME).read_bytes()
    values = dataclasses.asdict(Manifest.from_bytes(content, ""))
    change(values)
    (folder / MANIFEST_NAME).write_bytes(seal(json.dumps(values).encode() + b"\n"))


def _reseal(folder: Path) -> None:
    """Make the manifest agree with the files."""

    def describe(values: dict[str, Any]) -> None:
        for each in values["files"]:
            with (folder / each["path"]).open("rb") as stream:
                each |= dataclasses.asdict(describe_content(each["path"], stream.read()))

    _rewrite_manifest(folder, describe)


def _expect_refusal(folder: Path, saved: Digests, reason: str) -> None:
    """Expect the next older checkpoint, and nothing where the newest is named."""
    job = Job(folder.parent, seed=1)
    result = job.load()
    assert result.iteration == OLDER
    assert job.digests() == saved[OLDER]
    [skipped] = result.skipped
    assert reason in skipped.reason
    by_number = Job(folder.parent, seed=1, load={"step": NEWEST})
    before = by_number.digests()
    with pytest.raises(CorruptCheckpointError) as caught:
        by_number.load()
    assert reason in str(caught.value)
    assert by_number.digests() == before


# Code in files.


def _metadata_of_code(folder: Path, marker: Path) -> None:
    (folder / ".metadata").write_bytes(hostile_pickle(marker))


def _metadata_with_code(folder: Path, marker: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data["more"] = _Planted(hostile_pickle(marker))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class _Planted:
    """Unpickles as whatever the planted pickle makes."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return (pickle.loads, (self._content,))


def _rank_state_of_code(folder: Path, marker: Path) -> None:
    plant_value(folder / "__0_0.distcp", "rng", hostile_torch_file(marker))


def _counters_of_code(folder: Path, marker: Path) -> None:
    plant_value(folder / "__0_0.distcp", "train_state", hostile_torch_file(marker))


def _tensor_of_code(folder: Path, marker: Path) -> None:
    _plant_item(folder, "model.inner.weight", hostile_torch_file(marker))


def _value_of_code(folder: Path, marker: Path) -> None:
    plant_value(folder / "__0_0.distcp", "optimizer.param_groups", hostile_torch_file(marker))


def _plant_item(folder: Path, prefix: str, content: bytes) -> None:
    """Put bytes behind the shards, and have `.metadata` say that they are an item."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    shard = folder / "__0_0.distcp"
    [index, *_] = [each for each in metadata.storage_data if each.fqn.startswith(prefix)]
    place = metadata.storage_data[index]
    place.offset, place.length = shard.stat().st_size, len(content)
    shard.write_bytes(shard.read_bytes() + content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _read_carelessly(folder: Path) -> Iterator[Callable[[], Any]]:
    """Read every file as code that does not care would."""
    metadata = (folder / ".metadata").read_bytes()
    yield lambda: pickle.loads(metadata)
    shard = (folder / "__0_0.distcp").read_bytes()
    for place in pickle.loads(metadata).storage_data.values():
        item = io.BytesIO(shard[place.offset : place.offset + place.length])
        yield lambda item=item: torch.load(item, weights_only=False)  # type: ignore[misc]


PLACES: dict[str, Callable[[Path, Path], None]] = {
    "instead of the metadata": _metadata_of_code,
    "within the metadata": _metadata_with_code,
    "instead of a rank's state": _rank_state_of_code,
    "instead of a rank's counters": _counters_of_code,
    "as a value": _value_of_code,
}


@pytest.mark.parametrize("place", PLACES)
def test_code_in_a_file_is_refused_and_not_run(
    place: str, folder: Path, sound: tuple[Path, Digests], tmp_path: Path
) -> None:
    """A pickle that would run code is refused wherever it stands, and leaves no mark."""
    marker = tmp_path / "ran"
    PLACES[place](folder, marker)
    _reseal(folder)
    refusal = "it asks for" if "metadata" in place else "asks for code"
    _expect_refusal(folder, sound[1], refusal)
    assert not marker.exists()


def test_code_in_a_tensor_is_refused_and_not_run(
    folder: Path, sound: tuple[Path, Digests], tmp_path: Path
) -> None:
    """Code in the place of a tensor, found only while filling, costs that one checkpoint."""
    marker = tmp_path / "ran"
    _tensor_of_code(folder, marker)
    _reseal(folder)
    job = Job(folder.parent, seed=1)
    result = job.load()
    assert (result.iteration, job.digests()) == (OLDER, sound[1][OLDER])
    assert [each.iteration for each in result.skipped] == [NEWEST]
    assert not marker.exists()


@pytest.mark.parametrize("plant", [*PLACES.values(), _tensor_of_code])
def test_the_code_would_run(
    plant: Callable[[Path, Path], None], folder: Path, tmp_path: Path
) -> None:
    """A careless reader of the same checkpoint runs the code: the tests above can fail."""
    marker = tmp_path / "ran"
    plant(folder, marker)
    for read in _read_carelessly(folder):
        read()
        if marker.exists():
            return
    raise AssertionError("the code does not run at all")


# Paths that lead elsewhere.


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../iter_0000004/__0_0.distcp",
        "state/../../iter_0000004/__0_0.distcp",
        "..",
        "./__0_0.distcp",
        "state//shared.pt",
        "state\\shared.pt",
        "",
        "state/\0",
    ],
)
def test_a_manifest_that_leaves_the_checkpoint_is_refused(
    path: str, folder: Path, sound: tuple[Path, Digests]
) -> None:
    """A manifest may name files below its own directory only, in the one way to write them."""

    def add(values: dict[str, Any]) -> None:
        values["files"] = [*values["files"], {**values["files"][0], "path": path}]

    _rewrite_manifest(folder, add)
    _expect_refusal(folder, sound[1], "outside the checkpoint")


@pytest.mark.parametrize("path", ["/etc/passwd", "../iter_0000004/__0_0.distcp", "unlisted", "", 7])
def test_metadata_that_leaves_the_manifest_is_refused(
    path: Any, folder: Path, sound: tuple[Path, Digests]
) -> None:
    """`.metadata` may name files that the manifest lists, and no others."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "unlisted").write_bytes(b"x" * 100_000)
    _reseal(folder)
    _expect_refusal(folder, sound[1], "which the manifest does not list")


@pytest.mark.parametrize("name", [".metadata", "run_config.yaml", "train_state.json"])
def test_a_file_that_is_not_listed_is_refused(
    name: str, folder: Path, sound: tuple[Path, Digests]
) -> None:
    """State that no digest vouches for is not loaded, though it is there."""

    def drop(values: dict[str, Any]) -> None:
        values["files"] = [each for each in values["files"] if each["path"] != name]

    _rewrite_manifest(folder, drop)
    _expect_refusal(folder, sound[1], f"does not list {name}")


LINKED = [
    "__0_0.distcp",
    ".metadata",
    "run_config.yaml",
    "train_state.json",
    MANIFEST_NAME,
]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_checkpoint_is_refused(
    name: str, folder: Path, sound: tuple[Path, Digests], tmp_path: Path
) -> None:
    """A link in the place of a file or folder is refused, though what it shows is right."""
    (tmp_path / "outside").mkdir()
    outside = tmp_path / "outside" / Path(name).name
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    _expect_refusal(folder, sound[1], Path(name).name)


def test_what_a_linked_checkpoint_leads_to_is_only_read(
    folder: Path, sound: tuple[Path, Digests], tmp_path: Path
) -> None:
    """A link to a moved checkpoint is loaded, verified; pruning takes the link and no more."""
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere")
    job = Job(folder.parent)
    assert job.load().iteration == NEWEST
    assert job.digests() == sound[1][NEWEST]
    for _ in range(5):
        job.train_to(job.step + 3)
        job.save()
    assert not folder.is_symlink()
    assert tree(tmp_path / "elsewhere") == before


def test_a_monstrous_number_of_ranks_does_not_hold_up_pruning(folder: Path) -> None:
    """A checkpoint that claims to be of very many ranks is passed over, and pruned like any."""

    def claim(values: dict[str, Any]) -> None:
        values["world_size"] = 10**12

    _rewrite_manifest(folder, claim)
    job = Job(folder.parent)
    assert job.load().iteration == OLDER
    job.train_to(NEWEST + 1)  # beside it, not in its place
    for _ in range(4):
        job.save()
        job.train_to(job.step + 1)
    assert not folder.exists()


def test_a_link_to_what_is_no_checkpoint_is_passed_over(
    folder: Path, sound: tuple[Path, Digests], tmp_path: Path
) -> None:
    """A link with a checkpoint's name to anything else is not loaded, and nothing behind it is."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    (elsewhere / "manifest.json").unlink()
    shutil.rmtree(folder)
    folder.symlink_to(elsewhere)
    before = tree(elsewhere)
    job = Job(folder.parent)
    assert job.load().iteration == OLDER
    assert job.digests() == sound[1][OLDER]
    job.train_to(job.step + 3)
    job.save()
    assert tree(elsewhere) == before


def test_what_is_removed_is_removed_inside_the_store(folder: Path, tmp_path: Path) -> None:
    """Sweeping and retention remove links, never what they lead to."""
    outside = tmp_path / "outside"
    shutil.copytree(folder, outside)
    before = tree(outside)
    store = folder.parent
    (store / "iter_0000009.pending-00000001").symlink_to(outside)
    (store / "iter_0000009.pending-00000002").mkdir()
    (store / "iter_0000009.pending-00000002" / "state").symlink_to(outside)
    (store / checkpoint_name(2) / "more").symlink_to(outside)
    job = Job(store, persistent={"directory": str(store), "keep": {"last": 1}})
    job.load()
    job.train_to(8)
    job.save()
    assert leftovers(store) == []
    assert [
        each.iteration
        for each in Store(PosixStorage(store, LocalFilesystem())).listing().checkpoints
    ] == [8]
    assert tree(outside) == before


# Values that no save writes.


def _deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels + b"\n"


@pytest.mark.parametrize(
    "text",
    [
        _deep(100_000),
        b"[" * 1_000_000 + b"\n",
        b'{"format": 1, "files": ' + b"9" * 100_000 + b"}\n",
        b'{"format": 1, "files": [' + b'{"path": "x"}, ' * 100_000 + b"{}]}\n",
        b"[1, 2]\n",
        b"null\n",
        b'"format"\n',
        b"\xff\xfe\n",
        b"\n",
    ],
    ids=[
        "deep objects",
        "deep lists",
        "huge number",
        "long",
        "list",
        "null",
        "text",
        "utf-16",
        "empty",
    ],
)
def test_a_monstrous_manifest_is_a_broken_one(
    text: bytes, folder: Path, sound: tuple[Path, Digests]
) -> None:
    """A manifest too deep, too large or of another shape is refused like any broken one."""
    (folder / MANIFEST_NAME).write_bytes(seal(text))
    _expect_refusal(folder, sound[1], MANIFEST_NAME)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequence", "12"),
        ("sequence", None),
        ("sequence", 1.5),
        ("iteration", float(NEWEST)),
        ("attempt", [1]),
        ("run_id", 7),
        ("world_size", "1"),
        ("world_size", True),
        ("files", {"path": "x"}),
        ("tier", None),
    ],
)
def test_a_manifest_with_the_wrong_types_is_a_broken_one(
    field: str, value: Any, folder: Path, sound: tuple[Path, Digests]
) -> None:
    """Whatever decisions are made from has the type that they need."""
    _rewrite_manifest(folder, lambda values: values.update({field: value}))
    _expect_refusal(folder, sound[1], MANIFEST_NAME)


@pytest.mark.parametrize("world_size", [0, -1, 2, 10**9, 10**30])
def test_a_world_that_left_no_state_is_refused(
    world_size: int, folder: Path, sound: tuple[Path, Digests]
) -> None:
    """A manifest that claims other ranks than those that left their state is refused at once."""
    _rewrite_manifest(folder, lambda values: values.update(world_size=world_size))
    _expect_refusal(folder, sound[1], "the file of rank 1" if world_size > 0 else "world_size")


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def remove(values: dict[str, Any]) -> None:
        inner = values
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return remove


@pytest.mark.parametrize(
    "change",
    [
        _without("train_state"),
        _without("train_state", "step"),
        _without("num_floating_point_operations_so_far"),
        lambda values: values.update(train_state=[1]),
        lambda values: values.update(num_floating_point_operations_so_far="many"),
    ],
)
def test_counters_that_cannot_be_restored_are_refused(
    change: Callable[[dict[str, Any]], None], folder: Path, sound: tuple[Path, Digests]
) -> None:
    """Counters of another shape cost the checkpoint, before anything live is touched."""
    path = folder / "train_state.json"
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values))
    _reseal(folder)
    _expect_refusal(folder, sound[1], "train_state.json")


def test_deep_counters_are_refused(folder: Path, sound: tuple[Path, Digests]) -> None:
    """Counters nested without end are refused like any that cannot be read."""
    (folder / "train_state.json").write_bytes(_deep(100_000))
    _reseal(folder)
    _expect_refusal(folder, sound[1], "train_state.json")


@pytest.mark.parametrize("content", [_deep(100_000), b"[]", b"7", b'{"run_id": ["x"]}'])
def test_a_monstrous_run_record_is_named(content: bytes, folder: Path) -> None:
    """A run.json of another shape is refused by its name."""
    (folder.parent / "run.json").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"run\.json"):
        Job(folder.parent).load()


METADATA_CHANGES: dict[str, Callable[[Any], None]] = {
    "no names": lambda metadata: setattr(metadata, "planner_data", None),
    "no name of one tensor": lambda metadata: metadata.planner_data.pop("model.inner.weight"),
    "no places": lambda metadata: setattr(metadata, "storage_data", None),
    "places that are none": lambda metadata: setattr(metadata, "storage_data", {"x": "y"}),
    "no tensors": lambda metadata: setattr(metadata, "state_dict_metadata", None),
    "a place of no file": lambda metadata: setattr(
        next(iter(metadata.storage_data.values())), "length", -1
    ),
}


@pytest.mark.parametrize("change", METADATA_CHANGES)
def test_metadata_of_another_shape_is_refused(
    change: str, folder: Path, sound: tuple[Path, Digests]
) -> None:
    """`.metadata` that unpickles to something else than a save writes costs one checkpoint."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    METADATA_CHANGES[change](metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    _reseal(folder)
    job = Job(folder.parent, seed=1)
    result = job.load()
    assert (result.iteration, job.digests()) == (OLDER, sound[1][OLDER])
    assert [each.iteration for each in result.skipped] == [NEWEST]


# Who may read.


@pytest.mark.parametrize(
    ("permissions", "umask", "file_mode", "directory_mode"),
    [
        ("private", 0o000, 0o600, 0o700),
        ("private", 0o022, 0o600, 0o700),
        ("umask", 0o022, 0o644, 0o755),
        ("umask", 0o002, 0o664, 0o775),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_only_the_owner_reads_unless_configured(
    permissions: str,
    umask: int,
    file_mode: int,
    directory_mode: int,
    asynchronous: bool,
    tmp_path: Path,
) -> None:
    """Every file and directory is created private, or as umask says where that is configured."""
    store = tmp_path / "new" / "store"
    before = os.umask(umask)
    try:
        job = Job(store, permissions=permissions, async_save=asynchronous)
        for step in STEPS:
            job.train_to(step)
            job.save()
    finally:
        os.umask(before)
    for path in (store.parent, store, *store.rglob("*")):
        expected = directory_mode if path.is_dir() else file_mode
        assert path.stat().st_mode & 0o777 == expected, path
