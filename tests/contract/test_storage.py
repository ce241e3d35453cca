"""Every storage keeps the promises of the protocol, and a checkpoint needs no more than these."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from holdfast.filesystem import LocalFilesystem
from holdfast.storage.backend import GroupUnreachableError
from holdfast.storage.posix import PosixStorage
from holdfast.testing import MemoryStorage, StorageContract
from holdfast.testing.storage import OpenStorage


class TestMemoryStorage(StorageContract):
    """A storage that has nothing of a file system."""

    is_shared = False

    @pytest.fixture
    def open_storage(self) -> OpenStorage:
        storage = MemoryStorage()
        return lambda: storage


class TestPosixStorage(StorageContract):
    """A directory whose files only their owner may read."""

    @pytest.fixture
    def open_storage(self, tmp_path: Path) -> OpenStorage:
        return partial(PosixStorage, tmp_path / "new/root", LocalFilesystem())

    def test_nobody_else_may_read(self, open_storage: OpenStorage, tmp_path: Path) -> None:
        """Files and directories are made with the modes of the file system's setting."""
        storage = open_storage()
        storage.prepare()
        storage.begin("g")
        storage.under("g").put("state/a", b"x")
        assert _modes(tmp_path / "new") == {0o700, 0o600}

    def test_a_folder_that_is_a_link_is_not_followed(
        self, open_storage: OpenStorage, tmp_path: Path
    ) -> None:
        """Inside the root a link may lead anywhere: reading through one is refused."""
        storage = open_storage()
        storage.prepare()
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside/a").write_bytes(b"secret")
        (tmp_path / "new/root/folder").symlink_to(tmp_path / "outside")
        for attempt in (
            storage.get,
            storage.size_bytes,
            lambda name: storage.open(name).__enter__(),
        ):
            with pytest.raises(OSError, match="missing or a link") as caught:
                attempt("folder/a")
            assert caught.value.filename == str(tmp_path / "new/root/folder/a")

    def test_what_no_name_can_reach_is_not_listed(
        self, open_storage: OpenStorage, tmp_path: Path
    ) -> None:
        """Files whose names the protocol refuses, pipes and the like are passed by."""
        storage = open_storage()
        storage.prepare()
        storage.put("a", b"x")
        (tmp_path / "new/root/b\\c").write_bytes(b"x")
        (tmp_path / "new/root/d\n").write_bytes(b"x")
        os.mkfifo(tmp_path / "new/root/pipe")
        assert [each.name for each in storage.list()] == ["a"]

    def test_a_root_that_is_a_link_is_followed(
        self, open_storage: OpenStorage, tmp_path: Path
    ) -> None:
        """A checkpoint moved to an archive is read; one whose link leads nowhere says so."""
        storage = open_storage()
        storage.prepare()
        (tmp_path / "archive").mkdir()
        (tmp_path / "archive/a").write_bytes(b"x")
        (tmp_path / "new/root/moved").symlink_to(tmp_path / "archive")
        assert storage.under("moved").get("a") == b"x"
        (tmp_path / "archive").rename(tmp_path / "elsewhere")
        for name in ("get", "size_bytes"):
            with pytest.raises(GroupUnreachableError, match="is a link to") as caught:
                getattr(storage.under("moved"), name)("a")
            assert caught.value.filename == str(tmp_path / "new/root/moved")


class TestOpenPosixStorage(StorageContract):
    """A directory whose files the umask protects."""

    @pytest.fixture
    def open_storage(self, tmp_path: Path) -> OpenStorage:
        return partial(PosixStorage, tmp_path, LocalFilesystem(private=False))


def _modes(root: Path) -> set[int]:
    return {each.stat().st_mode & 0o777 for each in (root, *root.rglob("*"))}
