"""The durable steps on a real disk."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from holdfast.filesystem import (
    LocalFilesystem,
    create_once,
    naming,
    read_bytes,
    remove_tree,
    replace,
    write_new,
)
from tests.support.stores import FaultyFilesystem, tree


def test_a_new_file_must_be_new(tmp_path: Path) -> None:
    """Writing a new file over one that is there is refused and leaves it alone."""
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_new(LocalFilesystem(), tmp_path / "a", b"new")
    assert tree(tmp_path) == {"a": b"old"}


def test_replacing_leaves_nothing_aside(tmp_path: Path) -> None:
    """A replaced file holds the new bytes, and no other name is left beside it."""
    for content in (b"one", b"two", b""):
        replace(LocalFilesystem(), tmp_path / "a", content)
        assert tree(tmp_path) == {"a": content}


@pytest.mark.parametrize("step", ["open_new", "sync_file", "rename"])
def test_a_failed_replacement_keeps_the_old_bytes(tmp_path: Path, step: str) -> None:
    """When any step before the rename fails, the old file stands alone and the error has a path."""
    filesystem = FaultyFilesystem()
    (tmp_path / "a").write_bytes(b"old")
    filesystem.refuses = lambda asked, path: asked == step
    with pytest.raises(OSError, match="Input/output") as caught:
        replace(filesystem, tmp_path / "a", b"new")
    assert caught.value.errno == errno.EIO
    assert str(caught.value.filename).startswith(str(tmp_path / "a"))
    assert tree(tmp_path) == {"a": b"old"}


def test_only_one_of_many_creates(tmp_path: Path) -> None:
    """Of sixteen threads that create one file at once, one succeeds and its bytes are whole."""
    start, winners = threading.Barrier(16), []

    def create(number: int) -> None:
        start.wait()
        try:
            create_once(LocalFilesystem(), tmp_path / "claim", b"%04d" % number * 1000)
        except FileExistsError:
            return
        winners.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(winners) == 1
    assert tree(tmp_path) == {"claim": b"%04d" % winners[0] * 1000}


class _NoLinks(LocalFilesystem):
    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(target))


def test_creation_is_exclusive_without_hard_links(tmp_path: Path) -> None:
    """Where the file system has no hard links, the first creation still wins."""
    create_once(_NoLinks(), tmp_path / "claim", b"first")
    with pytest.raises(FileExistsError):
        create_once(_NoLinks(), tmp_path / "claim", b"second")
    assert tree(tmp_path) == {"claim": b"first"}


def test_a_tree_is_removed_without_following_links(tmp_path: Path) -> None:
    """Removing a directory removes the links in it and leaves what they point to."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_bytes(b"kept")
    (tmp_path / "doomed/inner").mkdir(parents=True)
    (tmp_path / "doomed/inner/file").write_bytes(b"x")
    (tmp_path / "doomed/to_directory").symlink_to(tmp_path / "outside")
    (tmp_path / "doomed/to_file").symlink_to(tmp_path / "outside/kept")
    (tmp_path / "doomed/dangling").symlink_to(tmp_path / "nothing")
    remove_tree(LocalFilesystem(), tmp_path / "doomed")
    remove_tree(LocalFilesystem(), tmp_path / "doomed")  # absent is fine
    assert tree(tmp_path) == {"outside": None, "outside/kept": b"kept"}


def test_a_listing_tells_links_from_what_they_point_to(tmp_path: Path) -> None:
    """Entries come by name; a link is neither a file nor a directory."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "d").symlink_to(tmp_path / "a")
    entries = LocalFilesystem().list_directory(tmp_path)
    assert [(each.name, each.is_file, each.is_directory) for each in entries] == [
        ("a", True, False),
        ("b", False, True),
        ("c", False, False),
        ("d", False, False),
    ]
    assert LocalFilesystem().is_directory(tmp_path / "b")
    assert not LocalFilesystem().is_directory(tmp_path / "c")
    assert not LocalFilesystem().is_directory(tmp_path / "a/b")


def _make(path: Path, kind: str) -> None:
    if kind == "link":
        (path.parent / "target").write_bytes(b"x")
        path.symlink_to(path.parent / "target")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_only_a_regular_file_is_opened_or_measured(tmp_path: Path, kind: str) -> None:
    """A link, a directory or a pipe in the place of a file is an error with its path, at once."""
    path, filesystem = tmp_path / "a", LocalFilesystem()
    _make(path, kind)
    descriptors = len(os.listdir("/proc/self/fd"))
    for attempt in (
        lambda: read_bytes(filesystem, path),
        lambda: filesystem.size_bytes(path),
    ):
        with pytest.raises(OSError, match=r".") as caught:
            attempt()
        assert str(caught.value.filename) == str(path)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_an_error_without_a_path_is_given_one(tmp_path: Path) -> None:
    """A failed write knows only its errno; it leaves with the path it happened on."""
    with pytest.raises(OSError, match="No space") as caught, naming(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    with pytest.raises(FileNotFoundError) as kept, naming(tmp_path / "a"):
        (tmp_path / "b").read_bytes()
    assert str(kept.value.filename) == str(tmp_path / "b")
