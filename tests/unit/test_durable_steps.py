"""The durable steps on a real disk."""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from holdfast.filesystem import LocalFilesystem, naming
from holdfast.snapshot.arena import allocate
from holdfast.storage.posix import (
    create_once,
    read_bytes,
    remove_tree,
    replace_file,
    write_new,
    writing_past_cache,
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
        replace_file(LocalFilesystem(), tmp_path / "a", content)
        assert tree(tmp_path) == {"a": content}


@pytest.mark.parametrize("step", ["open_new", "sync_file", "rename"])
def test_a_failed_replacement_keeps_the_old_bytes(tmp_path: Path, step: str) -> None:
    """When any step before the rename fails, the old file stands alone and the error has a path."""
    filesystem = FaultyFilesystem()
    (tmp_path / "a").write_bytes(b"old")
    filesystem.refuses = lambda asked, path: asked == step
    with pytest.raises(OSError, match="Input/output") as caught:
        replace_file(filesystem, tmp_path / "a", b"new")
    assert caught.value.errno == errno.EIO
    assert str(caught.value.filename).startswith(str(tmp_path / "a"))
    assert tree(tmp_path) == {"a": b"old"}


class _Recording(LocalFilesystem):
    """Marks what files are written through, and notes of each sync whether it has the mark."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[bool] = []

    def open_new(self, path: Path) -> BinaryIO:
        stream = super().open_new(path)
        flags = fcntl.fcntl(stream, fcntl.F_GETFL)
        fcntl.fcntl(stream, fcntl.F_SETFL, flags | os.O_NOATIME)  # of this opening of the file
        return stream

    def sync_file(self, path: Path, stream: Any) -> None:
        assert path.stat().st_size == len(_CONTENT), "not all of it has been handed over"
        super().sync_file(path, stream)
        self.syncs.append(bool(fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_NOATIME))


_CONTENT = b"x" * 5000


@pytest.mark.parametrize("way", ["new", "replaced", "created", "past the cache"])
def test_a_file_is_synced_through_what_wrote_it(tmp_path: Path, way: str) -> None:
    """An error in writing back is sure to be told only to a descriptor that was open then."""
    filesystem, path = _Recording(), tmp_path / "a"
    match way:
        case "new":
            write_new(filesystem, path, _CONTENT)
        case "replaced":
            replace_file(filesystem, path, _CONTENT)
        case "created":
            create_once(filesystem, path, _CONTENT)
        case "past the cache":
            with writing_past_cache(filesystem, path) as append:
                append(memoryview(_CONTENT))
    assert filesystem.syncs == [True]
    assert tree(tmp_path) == {"a": _CONTENT}


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
    gc.collect()  # what earlier tests have left to be collected must not be counted
    descriptors = len(os.listdir("/proc/self/fd"))
    for attempt in (
        lambda: read_bytes(filesystem, path),
        lambda: filesystem.size_bytes(path),
    ):
        with pytest.raises(OSError, match=r".") as caught:
            attempt()
        assert str(caught.value.filename) == str(path)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_an_error_without_a_path_is_given_one(tmp_path: Path) -> None:
    """A failed write knows only its errno; it leaves with the path it happened on."""
    with pytest.raises(OSError, match="No space") as caught, naming(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    with pytest.raises(FileNotFoundError) as kept, naming(tmp_path / "a"):
        (tmp_path / "b").read_bytes()
    assert str(kept.value.filename) == str(tmp_path / "b")


# -- past the page cache -------------------------------------------------------------------------

_PAGES = 4096 * 5


class _Raw(io.FileIO):
    """A file that tells whether it is written past the cache, and may refuse."""

    modes: list[bool]
    refuses: Callable[[_Raw, memoryview], int | None]

    @property
    def is_direct(self) -> bool:
        return bool(fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT)

    def write(self, block: Any) -> int:
        if (number := self.refuses(self, block)) is not None:
            raise OSError(number, os.strerror(number))
        self.modes.append(self.is_direct)
        return super().write(block)


class _Watched(LocalFilesystem):
    """A file system that tells how each write was made."""

    def __init__(self, refuses: Callable[[_Raw, memoryview], int | None] = lambda *_: None) -> None:
        super().__init__()
        self.modes: list[bool] = []
        self.refuses = refuses

    def open_new(self, path: Path) -> BinaryIO:
        raw = _Raw(path, "x+b")
        raw.modes, raw.refuses = self.modes, self.refuses
        return io.BufferedRandom(raw)


def _takes_direct(directory: Path) -> bool:
    try:
        os.close(os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    (directory / "probe").unlink(missing_ok=True)
    return True


def _pages(size_bytes: int = _PAGES) -> memoryview:
    memory = allocate(size_bytes)
    memory[:] = os.urandom(size_bytes)
    return memory


def test_blocks_go_past_the_page_cache(tmp_path: Path) -> None:
    """Where the disk takes it every block is written with O_DIRECT, and read back as it was."""
    if not _takes_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    filesystem, blocks = _Watched(), [_pages(), _pages(4096), _pages()]
    with writing_past_cache(filesystem, tmp_path / "a") as append:
        for each in blocks:
            append(each)
    assert filesystem.modes == [True, True, True]
    assert (tmp_path / "a").read_bytes() == b"".join(map(bytes, blocks))


@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_a_late_refusal_goes_through_the_cache(tmp_path: Path, accepted: int) -> None:
    """A system that refuses O_DIRECT at some write gets that block, and all later, buffered."""
    turns = iter(range(100))

    def refuse(raw: _Raw, block: memoryview) -> int | None:
        return errno.EINVAL if raw.is_direct and next(turns) >= accepted else None

    if not _takes_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    filesystem, blocks = _Watched(refuse), [_pages(), _pages(), _pages()]
    with writing_past_cache(filesystem, tmp_path / "a") as append:
        for each in blocks:
            append(each)
    assert filesystem.modes == [True] * accepted + [False] * (3 - accepted)
    assert (tmp_path / "a").read_bytes() == b"".join(map(bytes, blocks))


@pytest.mark.parametrize("start", [0, 1, 100])
@pytest.mark.parametrize("length", [0, 1, 4095, 5000])
def test_what_is_no_whole_page_is_written_too(tmp_path: Path, start: int, length: int) -> None:
    """A block of any length, anywhere in memory and behind any other, arrives whole."""
    blocks = [_pages(), _pages()[start : start + length], _pages(), _pages(start + length)]
    with writing_past_cache(LocalFilesystem(), tmp_path / "a") as append:
        for each in blocks:
            append(each)
    assert (tmp_path / "a").read_bytes() == b"".join(map(bytes, blocks))


def test_memory_as_a_file_system_takes_the_same(tmp_path: Path) -> None:
    """On tmpfs, which may refuse O_DIRECT, the bytes are the same."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("there is no tmpfs here")
    path = shared / f"holdfast-test-{os.getpid()}"
    blocks = [_pages(), _pages(4096)]
    try:
        with writing_past_cache(LocalFilesystem(), path) as append:
            for each in blocks:
                append(each)
        assert path.read_bytes() == b"".join(map(bytes, blocks))
    finally:
        path.unlink(missing_ok=True)


class _Short(_Raw):
    """A file that takes at most so much at once."""

    def write(self, block: Any) -> int:
        return super().write(block[:5000])


def test_a_short_write_is_gone_on_with(tmp_path: Path) -> None:
    """What a system did not take of a block it is given again, past the cache or through it."""

    class Short(_Watched):
        def open_new(self, path: Path) -> BinaryIO:
            raw = _Short(path, "x+b")
            raw.modes, raw.refuses = self.modes, self.refuses
            return io.BufferedRandom(raw)

    blocks = [_pages(), _pages()]
    with writing_past_cache(Short(), tmp_path / "a") as append:
        for each in blocks:
            append(each)
    assert (tmp_path / "a").read_bytes() == b"".join(map(bytes, blocks))


class _NoFlags(_Raw):
    """A file on a file system that refuses O_DIRECT when it is asked for."""

    asked = 0

    def fileno(self) -> int:
        self.asked += 1
        if self.asked == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().fileno()


def test_a_refused_flag_means_the_cache(tmp_path: Path) -> None:
    """Where O_DIRECT cannot even be asked for, all is written as it always was."""

    class Refusing(_Watched):
        def open_new(self, path: Path) -> BinaryIO:
            raw = _NoFlags(path, "x+b")
            raw.modes, raw.refuses = self.modes, self.refuses
            buffered = io.BufferedRandom(raw)
            raw.asked = 0  # by us, from here on
            return buffered

    filesystem, block = Refusing(), _pages()
    with writing_past_cache(filesystem, tmp_path / "a") as append:
        append(block)
        append(block)
    assert filesystem.modes == [False, False]
    assert (tmp_path / "a").read_bytes() == bytes(block) * 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EINVAL])
def test_an_error_past_the_cache_has_errno_and_path(tmp_path: Path, number: int) -> None:
    """A write that fails for good is raised, EINVAL too when it is not about O_DIRECT."""
    filesystem = _Watched(lambda raw, block: number)
    gc.collect()  # what earlier tests have left to be collected must not be counted
    descriptors = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(OSError, match=r".") as caught,
        writing_past_cache(filesystem, tmp_path / "a") as append,
    ):
        append(_pages())
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "a"))
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_nothing_is_written_over_what_is_there(tmp_path: Path) -> None:
    """A name that is taken is refused before a byte is written."""
    (tmp_path / "a").write_bytes(b"old")
    with (
        pytest.raises(FileExistsError),
        writing_past_cache(LocalFilesystem(), tmp_path / "a") as append,
    ):
        append(_pages())
    assert tree(tmp_path) == {"a": b"old"}
