"""What is recorded of a checkpoint after its commit: atomic, and beside its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.cli import main
from holdfast.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FormatTooNewError,
    WrongArgumentError,
)
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.manifest import seal
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store
from tests.support.stores import commit, tree

NEWEST = "iter_0000020"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with checkpoints of 10 and 20."""
    made = Store(PosixStorage(tmp_path, LocalFilesystem()))
    for iteration in (10, 20):
        commit(made, iteration)
    return tmp_path


def test_values_are_added_and_replaced(store: Path) -> None:
    """A later value of a name counts; other names stay; other checkpoints have none."""
    assert holdfast.read_annotations(store) == {}
    assert holdfast.annotate(store, {"loss": 2.5, "tasks": {"a": [1, None]}}) == {
        "loss": 2.5, "tasks": {"a": [1, None]},
    }  # fmt: skip
    assert holdfast.annotate(store / NEWEST, {"loss": 2, "done": True})["loss"] == 2
    for path in (store, store / "latest", store / NEWEST, str(store)):
        assert holdfast.read_annotations(path) == {
            "loss": 2, "done": True, "tasks": {"a": [1, None]},
        }  # fmt: skip
    assert holdfast.read_annotations(store, step=10) == {}
    holdfast.annotate(store, {"loss": 9}, step=10)
    assert holdfast.read_annotations(store / "iter_0000010") == {"loss": 9}


def test_the_files_of_a_checkpoint_stay_as_they_are(store: Path) -> None:
    """One more file, the latest record; it verifies as before, and saves go on."""
    before = tree(store)
    for score in range(3):
        holdfast.annotate(store, {"score": score})
    after = tree(store)
    assert set(after) - set(before) == {f"{NEWEST}/annotations_3.json"}
    assert all(after[name] == content for name, content in before.items())
    made = Store(PosixStorage(store, LocalFilesystem()))
    (newest, _) = made.listing().checkpoints
    assert made.verify(newest) == []
    made.remove(newest)
    assert [each for each in tree(store) if "annotations" in each] == []


def test_a_checkpoint_that_is_saved_again_begins_without(store: Path) -> None:
    """The scores were those of other weights."""
    holdfast.annotate(store, {"score": 1})
    commit(Store(PosixStorage(store, LocalFilesystem())), 20, 21, content=b"others")
    assert holdfast.read_annotations(store) == {}


def test_two_writers_lose_nothing(store: Path) -> None:
    """Whoever finds that another was first begins again from what that one wrote."""

    class Late(LocalFilesystem):
        """Lets another writer in once, before a record gets its name."""

        done = False

        def link(self, source: Path, target: Path) -> None:
            if not self.done:
                self.done = True
                holdfast.annotate(store, {"theirs": 2})
            super().link(source, target)

    found = holdfast.annotate(store, {"ours": 1}, filesystem=Late())
    assert found == holdfast.read_annotations(store) == {"ours": 1, "theirs": 2}


def test_the_command_line_shows_them(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As text after the row, and in the JSON document; a damaged record is told."""
    holdfast.annotate(store, {"loss": 2.5, "done": True})
    assert main(["ls", str(store)]) == 0
    rows = capsys.readouterr().out.splitlines()
    (row,) = [each for each in rows if "loss" in each]
    assert row.split()[0] == "20"
    assert row.endswith("done=true loss=2.5")
    assert main(["ls", str(store), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [each["annotations"] for each in listed] == [{"done": True, "loss": 2.5}, {}]
    path = store / NEWEST / "annotations_1.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert main(["ls", str(store)]) == 1
    assert "annotations_1.json does not match" in capsys.readouterr().out.replace(": ", " ")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", CorruptCheckpointError),
        (b"{}\n", CorruptCheckpointError),
        (seal(b"{}\n"), CorruptCheckpointError),
        (seal(b'{"format": 1, "values": []}\n'), CorruptCheckpointError),
        (seal(b"[]\n"), CorruptCheckpointError),
        (seal(b'{"format": 2, "values": {}}\n'), FormatTooNewError),
    ],
)
def test_a_damaged_record_is_named_and_never_built_upon(
    store: Path, content: bytes, kind: type[Exception]
) -> None:
    """Neither reading nor adding takes it for an empty one."""
    path = store / NEWEST / "annotations_7.json"
    path.write_bytes(content)
    for act in (
        lambda: holdfast.read_annotations(store),
        lambda: holdfast.annotate(store, {"a": 1}),
    ):
        with pytest.raises(kind, match=r"annotations_7\.json"):
            act()
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([("a", 1)], "values is of type list"),
        ({1: 2}, "a name that is no string"),
        ({"a": float("nan")}, r"values\['a'\] is no JSON"),
        ({"a": object()}, r"values\['a'\] is no JSON"),
        ({"a": (1, 2)}, r"values\['a'\] would come back"),
        ({"a": {1: 2}}, r"values\['a'\] would come back"),
    ],
)
def test_what_json_would_change_is_refused(store: Path, values: Any, named: str) -> None:
    """Before anything is written, by name."""
    before = tree(store)
    with pytest.raises(WrongArgumentError, match=named):
        holdfast.annotate(store, values)
    assert tree(store) == before


def test_a_place_without_a_checkpoint_is_named(store: Path, tmp_path: Path) -> None:
    """What is not there, is pending, or has no manifest."""
    with pytest.raises(CheckpointNotFoundError, match="iteration 15; it has: 20, 10"):
        holdfast.annotate(store, {}, step=15)
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        holdfast.annotate(tmp_path / "nowhere", {})
    with pytest.raises(WrongArgumentError, match="path is of iteration 20"):
        holdfast.annotate(store / NEWEST, {}, step=10)
    with pytest.raises(WrongArgumentError, match="path is of type int"):
        holdfast.annotate(7, {})  # type: ignore[arg-type]  # that is the claim
    with pytest.raises(WrongArgumentError, match="step is -1"):
        holdfast.read_annotations(store, step=-1)
    (store / NEWEST / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpointError, match="never committed"):
        holdfast.annotate(store / NEWEST, {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
        holdfast.read_annotations(tmp_path / "empty")


def test_no_torch_is_needed(store: Path) -> None:
    """An evaluation may run anywhere."""
    program = (
        "import sys, holdfast; "
        f"holdfast.annotate({str(store)!r}, {{'a': 1}}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert holdfast.read_annotations(store) == {"a": 1}
