"""The file system that loses power: what it forgets, and what it keeps."""

from __future__ import annotations

from pathlib import Path

from tests.support.crash_filesystem import CrashFilesystem, all_bytes, synced_bytes


def _write(filesystem: CrashFilesystem, path: str, content: bytes) -> None:
    with filesystem.open_new(Path(path)) as stream:
        stream.write(content)


def _left(filesystem: CrashFilesystem) -> dict[str, bytes | str | None]:
    return filesystem.image.after_power_loss((), synced_bytes).tree()


def test_a_synced_file_has_no_durable_name() -> None:
    """Syncing a file keeps its bytes; its name, and the name above, need syncs of their own."""
    filesystem = CrashFilesystem()
    filesystem.make_directory(Path("/a"))
    _write(filesystem, "/a/x", b"bytes")
    filesystem.sync_file(Path("/a/x"))
    assert _left(filesystem) == {}
    filesystem.sync_directory(Path("/a"))
    assert _left(filesystem) == {}
    filesystem.sync_directory(Path("/"))
    assert _left(filesystem) == {"/a": None, "/a/x": b"bytes"}


def test_a_synced_name_has_no_durable_bytes() -> None:
    """Syncing a directory keeps the name of a file, empty."""
    filesystem = CrashFilesystem()
    _write(filesystem, "/x", b"bytes")
    filesystem.sync_directory(Path("/"))
    assert _left(filesystem) == {"/x": b""}


def test_a_rename_happens_in_full_or_not_at_all() -> None:
    """Every subset of un-synced changes has the old name or the new, and the name it took over."""
    filesystem = CrashFilesystem()
    for name in ("/x", "/y"):
        _write(filesystem, name, name.encode())
        filesystem.sync_file(Path(name))
    filesystem.sync_directory(Path("/"))
    filesystem.rename(Path("/x"), Path("/y"))
    image = filesystem.image
    assert image.after_power_loss((), all_bytes).tree() == {"/x": b"/x", "/y": b"/y"}
    assert image.after_power_loss(image.unsynced, all_bytes).tree() == {"/y": b"/x"}


def test_later_changes_may_outlive_earlier_ones() -> None:
    """Nothing un-synced comes before anything else: the second rename may be all that happened."""
    filesystem = CrashFilesystem()
    for name in ("/old", "/new"):
        filesystem.make_directory(Path(name))
    filesystem.sync_directory(Path("/"))
    filesystem.rename(Path("/old"), Path("/aside"))
    filesystem.rename(Path("/new"), Path("/old"))
    image = filesystem.image
    left = image.after_power_loss(image.unsynced[1:], all_bytes)
    assert left.tree() == {"/old": None}
