"""A storage in a directory of a mounted file system.

Owns how the promises of `storage.backend` are kept on POSIX: a small file is written aside, synced
and linked or renamed; a group is a directory, published by a rename; names are durable once their
directories were synced. Owns therefore the order of these steps, and everything in them that has no
counterpart in an object store: descriptors, links, directories, writing past the page cache. The
root may be a link; inside it no link is followed. `filesystem` carries out the single steps.
Importing it does not import torch.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self

from holdfast.filesystem import Filesystem, naming
from holdfast.storage.backend import (
    REPLACED_MARK,
    Append,
    Entry,
    GroupUnreachableError,
    check_group,
    check_name,
    is_name,
    pending_name,
    replaced_name,
)

_TRIES = 5
"""A sweep runs once per save: more failures in a row than this have another cause."""


class PosixStorage:
    """The storage of one directory; its groups are the directories in it."""

    def __init__(self, root: Path, filesystem: Filesystem) -> None:
        self._root = root
        self._filesystem = filesystem

    def where(self, name: str = "") -> str:
        return str(self._root / name)

    def under(self, group: str) -> Self:
        check_group(group)
        return type(self)(self._root / group, self._filesystem)

    def prepare(self) -> None:
        make_durable_directory(self._filesystem, self._root)

    def has_group(self, group: str = "") -> bool:
        return self._filesystem.is_directory(self._path(group) if group else self._root)

    def _path(self, name: str) -> Path:
        check_name(name)
        return self._root / name

    # -- writing ---------------------------------------------------------------------------------

    def put(self, name: str, content: bytes) -> None:
        write_new(self._filesystem, self._new_path(name), content)

    @contextmanager
    def put_from(self, name: str) -> Iterator[Append]:
        with writing_past_cache(self._filesystem, self._new_path(name)) as append:
            yield append

    def _new_path(self, name: str) -> Path:
        """Return the path of a name, and make the folder that it is in."""
        path = self._path(name)
        if path.parent != self._root:
            self._filesystem.make_directory(path.parent)
        return path

    def put_new(self, name: str, content: bytes) -> None:
        self._despite_sweeps(create_once, self._path(name), content)

    def replace(self, name: str, content: bytes) -> None:
        self._despite_sweeps(replace_file, self._path(name), content)

    def _despite_sweeps(
        self, write: Callable[[Filesystem, Path, bytes], None], path: Path, content: bytes
    ) -> None:
        """Write again if another job's sweep removed the pending file as a leftover."""
        for tried in range(1, _TRIES + 1):
            try:
                write(self._filesystem, path, content)
                return
            except FileNotFoundError:
                if tried == _TRIES:
                    raise

    def settle(self, names: Sequence[str]) -> None:
        # The files' bytes were synced as they were written: what is left is their names.
        folders = {
            self._root / folder
            for name in names
            for folder in PurePosixPath(name).parents  # the last one is the root
        }
        for folder in sorted(folders, reverse=True):
            self._filesystem.sync_directory(folder)

    # -- groups ----------------------------------------------------------------------------------

    def begin(self, group: str) -> None:
        self._filesystem.make_directory(self._path(group))

    def publish(
        self, group: str, name: str, record: str, content: bytes, needs: Sequence[str]
    ) -> str | None:
        filesystem, files = self._filesystem, self.under(group)
        pending, final = self._path(group), self._path(name)
        files.put(record, content)
        files.settle([*needs, record])  # the files' names, before the rename shows them
        replaced = None
        if self._is_taken(final):
            # The removal of what an earlier publication replaced must be durable before the name is
            # free, or a power cut could bring back its remains under this name.
            filesystem.sync_directory(self._root)
            replaced = final.with_name(replaced_name(name))
            # It still counts under its new name. No sync is needed before the next rename: if only
            # that one survives a power cut, the successor is complete.
            filesystem.rename(final, replaced)
        try:
            filesystem.rename(pending, final)  # visible from here
        except OSError:
            if replaced is not None:
                with suppress(OSError):  # it counts under either name; the next sweep retries
                    filesystem.rename(replaced, final)
            raise
        filesystem.sync_directory(self._root)  # durable from here
        return replaced.name if replaced is not None else None

    def restore(self, replaced: str, name: str) -> None:
        source, target = self._path(replaced), self._path(name)
        if not self._is_taken(target):
            self._filesystem.rename(source, target)

    def retract(self, name: str) -> str:
        path, left = self._path(name), pending_name(name.partition(REPLACED_MARK)[0])
        self._filesystem.rename(path, self._path(left))  # not listed from here
        # Or a power cut could list it half deleted.
        self._filesystem.sync_directory(self._root)
        return left

    def _is_taken(self, path: Path) -> bool:
        """Whether this name is a directory or a link."""
        if self._filesystem.is_directory(path):
            return True
        entries = self._filesystem.list_directory(path.parent)
        return any(each.is_link and each.name == path.name for each in entries)

    def delete(self, name: str) -> None:
        path = self._path(name)
        if self._filesystem.is_directory(path):
            remove_tree(self._filesystem, path)
        else:
            with suppress(FileNotFoundError):
                self._filesystem.remove_file(path)  # of a link only the link, never its target

    # -- reading ---------------------------------------------------------------------------------

    def list(self) -> list[Entry]:
        """See the protocol; a link is a group: a checkpoint that was moved to an archive."""
        try:
            entries = self._filesystem.list_directory(self._root)
        except FileNotFoundError:
            return []
        return [
            Entry(each.name, is_group=not each.is_file)
            for each in entries
            if is_name(each.name) and (each.is_file or each.is_directory or each.is_link)
        ]

    def get(self, name: str) -> bytes:
        with self._explaining():
            return read_bytes(self._filesystem, self._inner_path(name))

    def size_bytes(self, name: str) -> int:
        with self._explaining():
            return self._filesystem.size_bytes(self._inner_path(name))

    @contextmanager
    def open(self, name: str) -> Iterator[_File]:
        path = self._inner_path(name)
        with self._explaining():
            stream = self._filesystem.open_existing(path)
        with stream:
            yield _File(path, stream)

    def _inner_path(self, name: str) -> Path:
        """Return the path of a name; refuse a folder that is a link: it may lead anywhere."""
        path = self._path(name)
        for folder in reversed(PurePosixPath(name).parents[:-1]):
            if not self._filesystem.is_directory(self._root / folder):
                reason = f"{folder} is missing or a link, not a directory"
                raise NotADirectoryError(errno.ENOTDIR, reason, str(path))
        return path

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Report a link that leads nowhere in place of the root, instead of what is missing."""
        try:
            yield
        except FileNotFoundError as error:
            if not self._root.is_symlink() or self._root.exists():
                raise
            reason = f"is a link to {self._root.readlink()}, which is not there"
            raise GroupUnreachableError(errno.ENOENT, reason, str(self._root)) from error


class _File:
    """An open file as a source."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path = path
        self._stream = stream

    @property
    def size_bytes(self) -> int:
        with naming(self._path):
            return self._stream.seek(0, os.SEEK_END)

    def get_into(self, offset: int, targets: Sequence[memoryview]) -> int:
        with naming(self._path):
            return read_into(self._stream, offset, targets)

    def map(self) -> memoryview:
        # No swap reservation where the system supports it: a file may exceed memory.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        with naming(self._path):
            return memoryview(mmap.mmap(self._stream.fileno(), 0, flags=flags, prot=access))


def make_durable_directory(filesystem: Filesystem, path: Path) -> None:
    """Create a directory and its missing parents, and make each name durable."""
    chain = [path]
    while not filesystem.is_directory(chain[-1]) and chain[-1] != chain[-1].parent:
        chain.append(chain[-1].parent)
    present = chain.pop() if filesystem.is_directory(chain[-1]) else None
    if present is not None:
        # A killed process may have created it without a sync. If we may not read it, we did not.
        with suppress(PermissionError):
            filesystem.sync_directory(present.parent)
    for each in reversed(chain):
        filesystem.make_directory(each)
        filesystem.sync_directory(each.parent)  # or a power cut removes it with its contents


def write_new(filesystem: Filesystem, path: Path, content: bytes) -> None:
    """Write a new file and make its bytes durable; the caller syncs its name."""
    with naming(path), filesystem.open_new(path) as stream:
        stream.write(content)
        stream.flush()  # continues a short write
        filesystem.sync_file(path, stream)


@contextmanager
def writing_past_cache(
    filesystem: Filesystem, path: Path
) -> Iterator[Callable[[memoryview], None]]:
    """Open a file that must not exist yet; yield a function that appends a block to it.

    Blocks bypass the page cache where the file system supports it, if they are page-aligned whole
    pages; otherwise they go through it. They are durable at the end; the caller syncs the name.
    """
    with naming(path):
        buffered: Any = filesystem.open_new(path)
        with buffered.detach() as raw:
            bypassed = _set_direct(raw, wanted=True)

            def write(block: memoryview) -> None:
                nonlocal bypassed
                while len(block):
                    try:
                        count = raw.write(block)
                    except OSError as error:
                        # Some systems refuse only now, or refuse the rest after a short write.
                        if error.errno != errno.EINVAL or not bypassed:
                            raise
                        bypassed = _set_direct(raw, wanted=False)
                        continue
                    block = block[count:]

            yield write
            filesystem.sync_file(path, raw)


def _set_direct(raw: Any, *, wanted: bool) -> bool:
    """Switch O_DIRECT on or off where it is supported; return whether it is on."""
    flag = getattr(os, "O_DIRECT", 0)
    try:
        flags = fcntl.fcntl(raw.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(raw.fileno(), fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
    except OSError:  # refused (older tmpfs), or a file in memory
        return False
    return wanted and flag != 0


def replace_file(filesystem: Filesystem, path: Path, content: bytes) -> None:
    """Replace a small file atomically: after any crash it holds the old bytes or the new.

    The new bytes are certain once the caller has synced the directory.
    """
    aside = set_aside(path)
    try:
        write_new(filesystem, aside, content)  # durable before the rename
        filesystem.rename(aside, path)  # visible from here
    except OSError:
        _discard(filesystem, aside)
        raise


def create_once(filesystem: Filesystem, path: Path, content: bytes) -> None:
    """Create a small file atomically and exclusively; the caller syncs its name.

    Raises:
        FileExistsError: another process was first; nothing was changed.
    """
    aside = set_aside(path)
    try:
        write_new(filesystem, aside, content)
        filesystem.link(aside, path)  # fails where the name exists; the bytes are already durable
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # No hard links here: exclusive creation still lets only one process be first, but a crash
        # may leave torn bytes under the name, which readers must tolerate.
        write_new(filesystem, path, content)
    finally:
        _discard(filesystem, aside)


def read_bytes(filesystem: Filesystem, path: Path) -> bytes:
    """Return the whole content of a small file."""
    with naming(path), filesystem.open_existing(path) as stream:
        return stream.read()


_VECTOR_LIMIT = 1024
"""Buffers in one call of preadv; Linux's IOV_MAX."""


def read_into(stream: BinaryIO, offset: int, views: Sequence[memoryview]) -> int:
    """Fill buffers in order from a file offset; return the bytes filled before the file ended."""
    try:
        descriptor = stream.fileno()
    except OSError:  # a stream in memory
        stream.seek(offset)
        return sum(stream.readinto(view) for view in views)  # type: ignore[attr-defined]  # is raw
    filled = 0
    rest = list(views)
    first = 0
    while first < len(rest):
        count = os.preadv(descriptor, rest[first : first + _VECTOR_LIMIT], offset + filled)
        if count == 0:
            break
        filled += count
        while first < len(rest) and count >= len(rest[first]):
            count -= len(rest[first])
            first += 1
        if count:  # the call ended inside a buffer
            rest[first] = rest[first][count:]
    return filled


def remove_tree(filesystem: Filesystem, path: Path) -> None:
    """Remove a directory and its contents, following no link; it may be absent."""
    try:
        entries = filesystem.list_directory(path)
    except FileNotFoundError:
        return
    for each in entries:
        if each.is_directory:
            remove_tree(filesystem, path / each.name)
        else:
            filesystem.remove_file(path / each.name)
    filesystem.remove_directory(path)


def set_aside(path: Path) -> Path:
    """Return a new pending name in the directory of a path."""
    return path.with_name(pending_name(path.name))


def _discard(filesystem: Filesystem, path: Path) -> None:
    """Remove a leftover if possible; otherwise the next save sweeps it."""
    try:
        filesystem.remove_file(path)
    except OSError:
        return
