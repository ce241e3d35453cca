"""What a path given to a load names, and what is said where it names nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.filesystem import LocalFilesystem
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import TRACKER_NAME, Store
from holdfast.tiers.places import Place, describe, find_place, is_same_directory
from tests.support.stores import commit

FILESYSTEM = LocalFilesystem()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of several runs: a store in `x/checkpoints`, torch's own checkpoints in `titan`."""
    root = tmp_path / "runs"
    store = Store(PosixStorage(root / "x/checkpoints", FILESYSTEM))
    store.root.mkdir(parents=True)
    for iteration in (10, 20):
        commit(store, iteration)
        for name in ("train_state.json", ".metadata"):
            (store.root / f"iter_{iteration:07d}" / name).touch()
    for name in ("step-5", "step-10"):
        (root / "titan" / name).mkdir(parents=True)
        (root / "titan" / name / ".metadata").write_bytes(b"torch's")
        (root / "titan" / name / "__0_0.distcp").write_bytes(b"")
    (root / "empty").mkdir()
    (root / "hub").mkdir()
    (root / "hub/model.safetensors").write_bytes(b"")
    (root / "hub/config.json").write_bytes(b"")
    return root


NAMED = [
    ("x/checkpoints", "x/checkpoints", None),
    ("x/checkpoints/", "x/checkpoints", None),
    ("titan/../x/checkpoints", "x/checkpoints", None),
    (f"x/checkpoints/{TRACKER_NAME}", "x/checkpoints", None),
    ("x/checkpoints/latest", "x/checkpoints", None),
    ("x/checkpoints/iter_0000020", "x/checkpoints", "iter_0000020"),
    ("x/checkpoints/iter_0000020/manifest.json", "x/checkpoints", "iter_0000020"),
    ("x/checkpoints/iter_0000020/train_state.json", "x/checkpoints", "iter_0000020"),
    ("x/checkpoints/iter_0000020/.metadata", "x/checkpoints", "iter_0000020"),
    ("titan/step-5", "titan", "step-5"),
    ("titan/step-5/.metadata", "titan", "step-5"),
    ("titan/step-5/__0_0.distcp", "titan", "step-5"),
]


@pytest.mark.parametrize(("path", "store", "checkpoint"), NAMED, ids=[each[0] for each in NAMED])
def test_a_place_is_found_in_any_spelling(
    root: Path, path: str, store: str, checkpoint: str | None
) -> None:
    """A store, one checkpoint, or a file inside either stands for the store or the checkpoint."""
    expected = Place(root / store, root / store / checkpoint if checkpoint else None)
    assert find_place(root / path, FILESYSTEM) == expected
    link = root / "link"
    link.symlink_to(root / path)
    if Path(path).name not in (TRACKER_NAME, "latest"):  # these mean something by their names
        assert find_place(link, FILESYSTEM) == expected


def test_latest_is_whatever_it_leads_to(root: Path) -> None:
    """Beside checkpoints it is the store; elsewhere a link or a text file leads to a checkpoint."""
    (root / "titan/latest").symlink_to("step-10")
    assert find_place(root / "titan/latest", FILESYSTEM) == Place(
        root / "titan", root / "titan/step-10"
    )
    (root / "titan/latest").unlink()
    (root / "titan/latest").write_text("step-5\n")
    assert find_place(root / "titan/latest", FILESYSTEM) == Place(
        root / "titan", root / "titan/step-5"
    )
    (root / "x/checkpoints/latest").symlink_to("iter_0000010")
    assert find_place(root / "x/checkpoints/latest", FILESYSTEM) == Place(root / "x/checkpoints")


NOTHING = [
    ("x", "holds no checkpoint: it has checkpoints/.", "Did you mean {root}/x/checkpoints?"),
    (".", "holds no checkpoint: it has empty/", "{root}/titan/step-10 or {root}/titan/step-5"),
    ("titan", "it has step-10/, step-5/", "{root}/titan/step-10 or {root}/titan/step-5?"),
    ("empty", "it is empty", ""),
    ("hub", "safetensors, which this version does not load", ""),
    ("hub/config.json", "is a file, and belongs to no checkpoint", ""),
    ("x/checkpoint", "does not exist", "Nearby: {root}/x/checkpoints"),
    ("y/z/checkpoints", "does not exist", ""),
    ("x/checkpoints/iter_0000030", "does not exist", "{root}/x/checkpoints/iter_0000010"),
]


@pytest.mark.parametrize(("path", "told", "near"), NOTHING, ids=[each[0] for each in NOTHING])
def test_where_nothing_is_the_neighbours_are_named(
    root: Path, path: str, told: str, near: str
) -> None:
    """What is there is listed, and the parent or child directory that holds a checkpoint."""
    assert find_place(root / path, FILESYSTEM) is None
    message = describe(root / path, FILESYSTEM)
    assert told in message
    assert near.format(root=root) in message
    assert len(message.splitlines()) <= 3


def test_a_place_beside_its_store_names_the_store(root: Path) -> None:
    """A directory that lies in a store and is no checkpoint points at the store around it."""
    (root / "x/checkpoints/logs").mkdir()
    assert find_place(root / "x/checkpoints/logs", FILESYSTEM) is None
    assert f"Did you mean {root}/x/checkpoints?" in describe(
        root / "x/checkpoints/logs", FILESYSTEM
    )


def test_local_checkpoints_are_named_as_what_they_are(tmp_path: Path) -> None:
    """The local tier's directory is no place to load from: the message says how to go on."""
    shard = tmp_path / "memory/r1/0/iter_0000005_0_local.pt"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"")
    for path in (tmp_path / "memory", tmp_path / "memory/r1"):
        assert find_place(path, FILESYSTEM) is None
        message = describe(path, FILESYSTEM)
        assert "of the local tier, of run r1" in message
        assert "checkpoint.run_id=r1" in message


def test_one_directory_has_many_names(root: Path) -> None:
    """Links, dots and slashes make no other directory; a different one is different."""
    (root / "link").symlink_to("x")
    for name in ("x", "x/", "./x", "titan/../x", "link", "link/."):
        assert is_same_directory(root / name, root / "x")
    assert not is_same_directory(root / "x", root / "titan")
    assert not is_same_directory(root / "x", root / "absent")
    assert is_same_directory(root / "absent", root / "titan/../absent")


def test_a_store_that_is_called_latest_is_itself(root: Path) -> None:
    """A directory of that name that is no link means what it holds, beside a store or not."""
    store = Store(PosixStorage(root / "x/checkpoints/latest", FILESYSTEM))
    store.root.mkdir()
    commit(store, 90)
    assert find_place(store.root, FILESYSTEM) == Place(store.root)


def test_what_was_never_committed_is_no_place(root: Path) -> None:
    """A pending directory is neither loaded nor suggested."""
    pending = root / "empty/iter_0000001.pending-01234567"
    pending.mkdir()
    (pending / ".metadata").write_bytes(b"half")
    assert find_place(pending, FILESYSTEM) is None
    assert "Did you mean" not in describe(root / "empty", FILESYSTEM)
