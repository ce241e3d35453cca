"""Directories in which checkpoints would damage one another are refused, nothing being created."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.errors import ConfigError
from tests.support.managers import linear, manager_of
from tests.support.mounts import bound
from tests.support.stores import tree

PAIRS = [
    # persistent, local, both under the test's folder; {up} is its name; what is said, or None
    ("store", "store", "the same as"),
    ("store", "store/", "the same as"),
    ("store", "store/local", "inside"),
    ("store/deep/er", "store", "around"),
    ("store", "other/../store/local", "inside"),
    ("store", "to_store", "the same as"),
    ("store", "to_store/local", "inside"),
    ("to_store/deep", "store", "around"),
    ("store", "~/store/local", "inside"),
    ("~/store", "store", "the same as"),
    ("$HOME/store", "store/local", "inside"),
    ("store", ".", "around"),
    ("store", "store2", None),
    ("store2", "store", None),
    ("store", "other/store", None),
    ("to_store", "other", None),
]


@pytest.mark.parametrize(("persistent", "local", "relation"), PAIRS)
def test_the_tiers_lie_apart(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    persistent: str,
    local: str,
    relation: str | None,
) -> None:
    """In whatever way they are spelt, one directory is not the other, nor inside or around it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "to_store").symlink_to("store")  # which is not there yet
    before = tree(tmp_path)
    if relation is None:
        manager_of(Path(persistent), local={"directory": local})
    else:
        with pytest.raises(ConfigError, match="are separate") as caught:
            manager_of(Path(persistent), local={"directory": local})
        (problem,) = caught.value.problems
        assert problem.startswith("checkpoint.local.directory: ")
        assert f" is {relation} checkpoint.persistent.directory" in problem
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("persistent", "local", "relation"),
    [
        ("store", "bound", "the same as"),
        ("bound", "store/new", "inside"),
        ("bound/new", "store", "around"),
    ],
)
def test_a_second_mount_is_the_same_directory(
    tmp_path: Path, persistent: str, local: str, relation: str
) -> None:
    """What no path shows is seen all the same: a container may have the store at two places."""
    (tmp_path / "store").mkdir()
    with (
        bound(tmp_path / "store", tmp_path / "bound"),
        pytest.raises(ConfigError, match=f"is {relation} checkpoint"),
    ):
        manager_of(tmp_path / persistent, local={"directory": str(tmp_path / local)})


def _committed(root: Path) -> Path:
    linear().save(manager_of(root), 10)
    return root / "iter_0000010"


@pytest.mark.parametrize("inside", ["", "new", "new/er", "state"])
@pytest.mark.parametrize("tier", ["persistent", "local"])
@pytest.mark.parametrize("name", ["iter_0000010", "best", "iter_0000010.replaced-01234567"])
def test_inside_a_checkpoint_there_is_no_store(
    tmp_path: Path, name: str, tier: str, inside: str
) -> None:
    """A checkpoint, under its own name or another, is nowhere a place for either tier."""
    checkpoint = _committed(tmp_path / "store")
    if name != checkpoint.name:
        checkpoint = checkpoint.rename(tmp_path / name)
    directories = {"persistent": tmp_path / "other", "local": tmp_path / "local"}
    directories[tier] = checkpoint / inside
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="committed checkpoint") as caught:
        manager_of(directories["persistent"], local={"directory": str(directories["local"])})
    (problem,) = caught.value.problems
    assert problem.startswith(f"checkpoint.{tier}.directory: {checkpoint / inside}".rstrip("/"))
    assert str(checkpoint.parent) in problem
    assert tree(tmp_path) == before


@pytest.mark.parametrize("lost", [".metadata", "manifest.json"])
def test_what_is_left_of_a_checkpoint_is_one_still(tmp_path: Path, lost: str) -> None:
    """One of the two files that make a directory a checkpoint is enough."""
    checkpoint = _committed(tmp_path)
    (checkpoint / lost).unlink()
    with pytest.raises(ConfigError, match="committed checkpoint"):
        manager_of(checkpoint / "new")


def test_what_only_looks_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    """A directory called .metadata above the store, or an empty iter_ one, refuses nothing."""
    (tmp_path / ".metadata").mkdir()
    root = tmp_path / "iter_0000010" / "store"
    _committed(root)
    os.symlink("nowhere", root.parent / "manifest.json")
    assert linear().load(manager_of(root)).iteration == 10


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """A local directory that is wrong twice is told twice."""
    checkpoint = _committed(tmp_path)
    with pytest.raises(ConfigError) as caught:
        manager_of(tmp_path, local={"directory": str(checkpoint)})
    assert len(caught.value.problems) == 2
