"""Names, owners and leftovers of the local tier on one node."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.errors import ConfigError
from holdfast.filesystem import LocalFilesystem, is_memory
from holdfast.storage.backend import pending_name
from holdfast.tiers.local.shard_file import (
    RunDirectory,
    make_private_directory,
    parse_shard_name,
    shard_name,
)
from tests.support.local_shards import FILE, RECORD


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """The directory of run "run", with that of rank 1."""
    run = RunDirectory(tmp_path / "local", "run", LocalFilesystem())
    run.prepare(1)
    return run


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("iter_0000010_3_local.pt", (10, 3)),
        ("iter_12345678_0_local.pt", (12345678, 0)),
        ("iter_0000010_12_local.pt.replaced-0123abcd", (10, 12)),
        ("iter_10_3_local.pt", None),
        ("iter_01234567_0_local.pt", None),
        ("iter_0000010_03_local.pt", None),
        ("iter_0000010_3_local.pt.pending-0123abcd", None),
        ("iter_0000010_3_local.dirty.pt", None),
        ("iter_0000010_3_local.pt ", None),
        ("notes.pt", None),
    ],
)
def test_names(name: str, expected: tuple[int, int] | None) -> None:
    """A published shard has exactly one kind of name, and one for the time it is replaced in."""
    assert parse_shard_name(name) == expected


def test_names_are_those_of_the_package() -> None:
    """Up to seven digits, a shard is called as nvidia-resiliency-ext calls it; beyond, it works."""
    module = pytest.importorskip(
        "nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager"
    )
    stock = module.LocalCheckpointManager("/nowhere", "run")
    for iteration in (0, 10, 9_999_999):
        assert shard_name(iteration, 3) == stock._filename_from_template(iteration, 3)
    assert parse_shard_name(shard_name(10_000_000, 3)) == (10_000_000, 3)


def test_directories_are_made_for_their_owner_alone(run: RunDirectory) -> None:
    """Nobody else can read, or put anything there."""
    assert run.root.stat().st_mode & 0o777 == 0o700
    assert run.rank_directory(1).stat().st_mode & 0o777 == 0o700
    assert run.ranks() == [1]


@pytest.mark.parametrize(("mode", "is_fine"), [(0o700, True), (0o755, True), (0o775, False),
                                               (0o777, False), (0o1777, True)])  # fmt: skip
def test_a_directory_that_others_may_write_to_is_refused(
    tmp_path: Path, mode: int, is_fine: bool
) -> None:
    """Unless only owners can remove things from it."""
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(mode)
    if is_fine:
        make_private_directory(LocalFilesystem(), directory)
    else:
        with pytest.raises(ConfigError, match="written by others"):
            make_private_directory(LocalFilesystem(), directory)


def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """Whatever its mode: what is loaded from it would be theirs to choose."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    directory = tmp_path / "theirs"
    directory.mkdir()
    os.chown(directory, 12345, -1)
    with pytest.raises(ConfigError, match="user 12345"):
        RunDirectory(directory, "run", LocalFilesystem()).prepare(0)


def test_a_link_is_no_directory(tmp_path: Path) -> None:
    """Where a link leads, its owner decides later."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="no directory"):
        make_private_directory(LocalFilesystem(), tmp_path / "link")


def test_leftovers_are_swept_and_nothing_else(run: RunDirectory) -> None:
    """Pending names, and those that the package's own saves leave, but no shard and no stranger."""
    own = run.rank_directory(1)
    leftovers = [
        pending_name("spare"),
        pending_name(shard_name(10, 1)),
        pending_name("borrowed_3"),
        "iter_0000010_1_local.dirty.pt",
    ]
    stay = [shard_name(10, 1), shard_name(10, 1) + ".replaced-0123abcd", "notes.txt", "x.pending-1"]
    for name in leftovers + stay:
        (own / name).write_bytes(b"")
    run.sweep([1, 2])
    assert sorted(os.listdir(own)) == sorted(stay)


def test_only_files_that_are_what_their_name_says_have_a_record(run: RunDirectory) -> None:
    """Torn, renamed, or another run's: found, with the reason, and without a record."""
    own = run.rank_directory(1)
    good = shard_name(RECORD.iteration, RECORD.owner)
    (own / good).write_bytes(FILE)
    (own / shard_name(5, 1)).write_bytes(FILE)
    (own / shard_name(6, 1)).write_bytes(FILE[:-1])
    os.mkfifo(own / shard_name(7, 1))
    found = {each.path: each for each in run.scan([1])}
    assert found[f"1/{good}"].record == RECORD
    assert "is the shard of rank 1 of iteration 12345678" in str(
        found[f"1/{shard_name(5, 1)}"].reason
    )
    assert "torn" in str(found[f"1/{shard_name(6, 1)}"].reason)
    assert f"1/{shard_name(7, 1)}" not in found, "no file at all"
    other = RunDirectory(run.root.parent, "other", LocalFilesystem())
    other.prepare(1)
    (other.rank_directory(1) / good).write_bytes(FILE)
    (alien,) = other.scan([1])
    assert alien.record is None
    assert "belongs to run 'run'" in str(alien.reason)


def test_a_predecessor_of_the_same_name_still_counts(run: RunDirectory) -> None:
    """Until the new commit is agreed on, the old one can be loaded."""
    own = run.rank_directory(1)
    name = shard_name(RECORD.iteration, 1)
    (own / name).write_bytes(FILE)
    (own / "new.pending-00000000").write_bytes(FILE)
    final, replaced = run.publish(own / "new.pending-00000000", 1, RECORD.iteration, 1)
    assert final == own / name
    assert replaced is not None
    assert len(run.scan([1])) == 2
    assert all(each.record is not None for each in run.scan([1]))


def test_memory_is_told_by_the_mount(tmp_path: Path) -> None:
    """By the file system that the directory's device number names, whatever its path."""
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = tmp_path / "mountinfo"
    line = "36 35 {} / /mnt rw,noatime shared:1 - {} source rw\n"
    mounts.write_text(line.format("0:999", "tmpfs") + line.format(number, "ext4"))
    assert not is_memory(tmp_path, mounts)
    mounts.write_text(line.format("0:999", "ext4") + line.format(number, "tmpfs"))
    assert is_memory(tmp_path, mounts)
    assert not is_memory(tmp_path, tmp_path / "absent")
