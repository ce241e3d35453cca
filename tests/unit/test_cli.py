"""The command line: what it prints and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast import __version__
from holdfast.cli import main
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.identity import RunIdentity
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store
from tests.support.stores import commit, flip_bit, tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store of run `run` with iterations 10 and 20."""
    root = tmp_path / "store"
    root.mkdir()
    RunIdentity(PosixStorage(root, LocalFilesystem())).agree_run_id("run")
    store = Store(PosixStorage(root, LocalFilesystem()))
    commit(store, 10)
    commit(store, 20, content=bytes(3 << 20))
    return root


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code, out, err = _run(capsys, *arguments, "--json")
    assert err == ""
    return code, json.loads(out)


def test_ls_lists_a_store_newest_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table with run, iterations, sizes and the tracker; exit code 0."""
    code, out, err = _run(capsys, "ls", root)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == f"{root}  run run"
    assert [line.split()[0] for line in lines[1:]] == ["iteration", "20", "10"]
    assert "3.0 MiB" in lines[2]
    assert lines[2].endswith("<- tracker")
    assert not lines[3].endswith("tracker")


def test_ls_prints_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON document with every field of every checkpoint."""
    code, document = _json(capsys, "ls", root)
    assert code == 0
    assert (document["run_id"], document["tracker"], document["broken"]) == ("run", 20, [])
    assert [each["iteration"] for each in document["checkpoints"]] == [20, 10]
    assert document["checkpoints"][1] == {
        "iteration": 10, "path": str(root / "iter_0000010"), "sequence": 10, "attempt": 1,
        "run_id": "run", "world_size": 1, "size_bytes": 11, "files": 2,
        "saved_at": "2026-01-01T00:00:00+00:00", "annotations": {},
    }  # fmt: skip


def test_ls_shows_one_checkpoint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An iter_* directory stands for itself."""
    _, document = _json(capsys, "ls", root / "iter_0000010")
    assert [each["iteration"] for each in document["checkpoints"]] == [10]


def test_ls_of_a_store_without_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A claimed one is no error; a directory of something else is."""
    code, out, err = _run(capsys, "ls", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"holdfast: {tmp_path} holds no checkpoint.\n"
    RunIdentity(PosixStorage(tmp_path, LocalFilesystem())).agree_run_id("wanted")
    code, out, _ = _run(capsys, "ls", tmp_path)
    assert code == 0
    assert out.splitlines() == [f"{tmp_path}  run wanted", "  no checkpoints"]


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_a_store_in_the_directory_is_suggested(
    command: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Instead of saying that there is nothing."""
    code, _, err = _run(capsys, command, root.parent)
    assert code == 2
    assert f"Did you mean {root}?" in err


def test_ls_tells_what_is_broken(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken directory and a torn tracker are told; a broken one makes the exit code 1."""
    (root / "latest_checkpointed_iteration.txt").write_bytes(b"")
    code, out, _ = _run(capsys, "ls", root)
    assert code == 0
    assert "tracker: torn" in out
    (root / "iter_0000010/manifest.json").unlink()
    code, out, _ = _run(capsys, "ls", root)
    assert code == 1
    assert "broken: " in out
    assert "iter_0000010: has no manifest.json" in out
    code, document = _json(capsys, "ls", root)
    assert code == 1
    assert [each["path"] for each in document["broken"]] == [str(root / "iter_0000010")]


def test_verify_reads_everything(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sound store is said to be sound, exit code 0, and nothing is changed."""
    before = tree(root)
    code, out, err = _run(capsys, "verify", root)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{root / 'iter_0000020'}: sound",
        f"{root / 'iter_0000010'}: sound",
        "2 checkpoints read, 0 damaged",
    ]
    assert tree(root) == before


def test_verify_names_every_damage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each damaged file is named with its byte range, each broken directory with its reason."""
    flip_bit(root / "iter_0000020/x.distcp", 1 << 20)
    (root / "iter_0000020/y.distcp").unlink()
    (root / "iter_0000010/manifest.json").unlink()
    code, out, _ = _run(capsys, "verify", root)
    assert code == 1
    assert f"{root / 'iter_0000020'}: DAMAGED" in out
    assert f"  iter_0000020/x.distcp: block 0 (bytes 0-{(3 << 20) - 1}) does not match" in out
    assert "  iter_0000020/y.distcp: is missing" in out
    assert "has no manifest.json" in out
    assert out.splitlines()[-1] == "2 checkpoints read, 2 damaged"
    code, document = _json(capsys, "verify", root)
    assert (code, document["damaged"]) == (1, 2)
    assert [len(each["damages"]) for each in document["checkpoints"]] == [2, 1]


def test_verify_of_one_checkpoint_reads_only_that(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damage beside the checkpoint that was named does not count."""
    flip_bit(root / "iter_0000020/x.distcp")
    assert _run(capsys, "verify", root / "iter_0000010")[0] == 0
    assert _run(capsys, "verify", root / "iter_0000020")[0] == 1


def test_a_renamed_directory_is_damaged(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint under another iteration's name is told as such."""
    (root / "iter_0000010").rename(root / "iter_0000015")
    code, out, _ = _run(capsys, "verify", root / "iter_0000015")
    assert code == 1
    assert "is of iteration 10" in out


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_a_wrong_question_has_its_own_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """A directory that is not there is exit code 2 and one line on stderr."""
    code, out, err = _run(capsys, command, tmp_path / "absent")
    assert (code, out) == (2, "")
    assert err.startswith("holdfast: ")
    assert "absent does not exist" in err
    assert len(err.splitlines()) == 1


def test_verify_of_nothing_is_a_wrong_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty directory has nothing to be sound: exit code 2."""
    assert _run(capsys, "verify", tmp_path)[0] == 2


@pytest.mark.parametrize("arguments", [[], ["what"], ["ls"]])
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Argparse's own code for wrong usage is the same."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: holdfast" in capsys.readouterr().err


def test_the_command_runs_without_torch(root: Path) -> None:
    """`python -m holdfast` in a process where torch cannot be imported lists and verifies."""
    program = (
        "import sys, runpy\n"
        "for name in ('torch', 'numpy', 'omegaconf', 'hydra'): sys.modules[name] = None\n"
        "sys.argv[0] = 'holdfast'\n"
        "runpy.run_module('holdfast', run_name='__main__')\n"
    )
    for command in (["ls", root], ["verify", root], ["--version"]):
        finished = subprocess.run(
            [sys.executable, "-c", program, *map(str, command)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert (
            "run run" in finished.stdout
            or "sound" in finished.stdout
            or (finished.stdout.strip() == f"holdfast {__version__}")
        )


def test_damage_outside_of_checkpoints_is_damage(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store whose run.json is no JSON is exit code 1 and not a wrong question."""
    (root / "attempt_0000001.json").write_text("{}")
    (root / "run.json").write_text("{")
    assert main(["ls", str(root)]) == 1
    assert f"holdfast: {root}/run.json: is not JSON" in capsys.readouterr().err


def test_what_cannot_be_read_is_named_without_a_traceback(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question that could not be answered is exit code 2 and one line with path and reason."""
    (root / "run.json").unlink()
    (root / "run.json").mkdir()
    assert main(["ls", str(root)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"holdfast: {root}/run.json: ")
    assert len(error.splitlines()) == 1


def test_a_broken_checkpoint_is_named_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the line of a checkpoint its path is not repeated."""
    (newest, *_) = sorted(root.glob("iter_*"), reverse=True)
    (newest / "manifest.json").unlink()
    assert main(["verify", str(newest)]) == 1
    assert capsys.readouterr().out.count(str(newest)) == 1
