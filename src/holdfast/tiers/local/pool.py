"""A pool of memory-mapped buffers, reused in rotation: the last saves, and the next one.

Owns the files of one rank in a directory in RAM, where a snapshot's memory is the file itself.
Promises that every byte of a file is allocated before it is written, so that a full directory is an
error and never a signal; that a file is renamed out of every reader's sight before it is filled
again; and that at most `limit` of them exist, or one more while it is read. A save that finds none
free waits for a reader to release one, and logs that. Knows no format.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from holdfast.errors import NoFileFreeError
from holdfast.filesystem import Filesystem, as_problem, naming
from holdfast.snapshot.arena import prefer_huge_pages
from holdfast.storage.backend import pending_name

logger = logging.getLogger(__name__)


class Laid(Protocol):
    """What a user of a file has laid out in its memory."""

    def release(self) -> None: ...


class PooledFile:
    """One open file; if it serves as an arena, mapped and fully allocated."""

    def __init__(
        self,
        path: Path,
        size_bytes: int,
        filesystem: Filesystem,
        *,
        mapped: bool,
        in_memory: bool,
    ) -> None:
        """Create it, and allocate a mapped file; for any other, a write reports a full directory.

        `in_memory`: whether the directory is in RAM, as it must be where files are mapped; the file
        then gets the huge pages that the kernel grants it here.

        Raises:
            OSError: there is not enough space.
        """
        self.path = path
        self.size_bytes = size_bytes
        """Of the image; a trailer may follow."""
        self.content: Laid | None = None
        """What its user has laid out in its memory, for reuse by the next save in this file."""
        self.holders = 0
        self.is_retired = False
        """Free as soon as its last reader releases it."""
        self._filesystem = filesystem
        with naming(path), filesystem.open_new(path) as stream:
            self._descriptor = os.dup(stream.fileno())
        # A finalizer, since a manager need not be closed.
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._memory: memoryview | None = None
        try:
            if in_memory:
                prefer_huge_pages(self._descriptor, size_bytes)
            if mapped and size_bytes:
                flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
                with naming(path):
                    # Writing to a mapped hole of a full file system kills the process.
                    os.posix_fallocate(self._descriptor, 0, size_bytes)
                    pages = mmap.mmap(self._descriptor, size_bytes, flags=flags)
                with suppress(OSError, AttributeError):
                    pages.madvise(mmap.MADV_DONTFORK)
                self._memory = memoryview(pages)
        except OSError as error:
            self.remove()
            raise as_problem(error, size_bytes) from error

    @property
    def memory(self) -> memoryview:
        """The bytes of the image, writable."""
        assert self._memory is not None, "this file was not to be mapped"
        return self._memory

    @property
    def is_there(self) -> bool:
        """Whether its name still refers to it: the directory may have been wiped meanwhile."""
        try:
            found = self.path.lstat()
        except OSError:
            return False
        return found.st_ino == os.fstat(self._descriptor).st_ino

    def write_at(self, offset: int, content: bytes | memoryview) -> None:
        """Write all of it.

        Raises:
            OSError: there is not enough space, for instance.
        """
        rest = memoryview(content)
        try:
            while len(rest):
                count = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[count:], offset + count
        except OSError as error:
            raise as_problem(
                OSError(error.errno, error.strerror, str(self.path)), len(content)
            ) from error

    def cut(self, size_bytes: int) -> None:
        """Truncate the file to this size.

        Raises:
            OSError: it cannot be changed.
        """
        with naming(self.path):
            os.ftruncate(self._descriptor, size_bytes)

    def sync(self) -> None:
        """Make the bytes durable; no effect for a file in RAM.

        Raises:
            OSError: the sync failed.
        """
        with naming(self.path):
            os.fsync(self._descriptor)

    def rename(self, path: Path) -> None:
        """Rename it, replacing an existing file."""
        self._filesystem.rename(self.path, path)
        self.path = path

    def close(self) -> None:
        """Close it; a remaining view of its memory keeps the mapping alive."""
        self._close()
        self._memory = None
        if self.content is not None:
            self.content.release()
            self.content = None

    def remove(self) -> None:
        """Remove and close it."""
        with suppress(FileNotFoundError):
            self._filesystem.remove_file(self.path)
        self.close()


class BufferPool:
    """The files of one rank for one purpose."""

    def __init__(
        self,
        directory: Path,
        filesystem: Filesystem,
        *,
        limit: int | None = None,
        spares: int,
        mapped: bool,
        in_memory: bool,
    ) -> None:
        """`limit`: the most files; None: no limit. `spares`: the most free files kept for reuse.

        `mapped`, `in_memory`: as for each `PooledFile`.
        """
        self._directory = directory
        self._limit = limit
        self._spares = spares
        self._filesystem = filesystem
        self._mapped, self._in_memory = mapped, in_memory
        self._free: list[PooledFile] = []
        self._published: dict[Path, PooledFile] = {}
        self._taken: set[PooledFile] = set()
        self._changed = threading.Condition()

    def take(self, size_bytes: int, timeout_seconds: float) -> PooledFile:
        """Return a file of this size that has no reader, under a pending name.

        Raises:
            NoFileFreeError: readers held all of them until the timeout.
            OSError: there is no space for another one.
        """
        with self._changed:
            if not self._has_free_file():
                logger.warning(
                    "%s: the save waits: a reader holds the file to be reused next",
                    self._directory,
                )
                if not self._changed.wait_for(self._has_free_file, timeout_seconds):
                    raise NoFileFreeError(
                        f"{self._directory}: no file became free within {timeout_seconds:g} s; "
                        f"all {self._limit} are held by a reader."
                    )
            file = self._pick(size_bytes)
            self._taken.add(file)
            return file

    @property
    def has_free_file(self) -> bool:
        """Whether a file can be taken at once."""
        with self._changed:
            return self._has_free_file()

    def _has_free_file(self) -> bool:
        return bool(self._free) or self._may_create()

    def _may_create(self) -> bool:
        return self._limit is None or self._count() < self._limit

    def _count(self) -> int:
        """Return how many files exist, not counting one retired file that is still being read:
        a drain takes longer than a save and should not delay the next one.
        """
        count = len(self._free) + len(self._published) + len(self._taken)
        return count - any(each.is_retired for each in self._published.values())

    def _pick(self, size_bytes: int) -> PooledFile:
        for file in [each for each in self._free if not each.is_there]:
            self._free.remove(file)
            file.close()
        for file in self._free:
            if file.size_bytes == size_bytes:
                file.cut(size_bytes)  # removes the trailer: without it the file is no shard
                self._free.remove(file)
                return file
        while self._free:  # of another size: their space is needed
            self._free[-1].remove()
            self._free.pop()
        return self._create(size_bytes)

    def _create(self, size_bytes: int) -> PooledFile:
        self._filesystem.make_directory(self._directory)
        path = self._directory / pending_name("spare")
        return PooledFile(
            path, size_bytes, self._filesystem, mapped=self._mapped, in_memory=self._in_memory
        )

    def top_up(self, size_bytes: int) -> None:
        """Allocate the next save's file now, if none is free.

        Raises:
            OSError: there is not enough space; existing files are kept.
        """
        with self._changed:
            if not self._free and self._may_create():
                self._free.append(self._create(size_bytes))

    def published_as(self, file: PooledFile, path: Path) -> None:
        """Record that a taken file was published under this name."""
        with self._changed:
            self._taken.discard(file)
            file.path = path
            self._published[path] = file

    def renamed(self, path: Path, target: Path) -> None:
        """Record that a published file was renamed and still counts."""
        with self._changed:
            if (file := self._published.pop(path, None)) is not None:
                file.path = target
                self._published[target] = file

    def has(self, path: Path) -> bool:
        """Whether this file was published here by this process."""
        with self._changed:
            return path in self._published

    def give_back(self, file: PooledFile) -> None:
        """Return a taken file whose content is not needed."""
        with self._changed:
            if file in self._taken:
                self._taken.discard(file)
                self._keep_or_remove(file)

    def retire(self, path: Path) -> None:
        """Unpublish a file: free it for reuse, or remove it if this process did not write it.

        Raises:
            OSError: it cannot be renamed or removed.
        """
        with self._changed:
            file = self._published.get(path)
            if file is None:  # written by an earlier process
                with suppress(FileNotFoundError):
                    self._filesystem.remove_file(path)
            elif file.holders:
                file.is_retired = True
            else:
                self._put_away(file)

    def _put_away(self, file: PooledFile) -> None:
        self._published.pop(file.path, None)
        file.is_retired = False
        if not file.is_there:  # removed by another process
            file.close()
            return
        file.rename(self._directory / pending_name("spare"))
        self._keep_or_remove(file)

    def _keep_or_remove(self, file: PooledFile) -> None:
        if len(self._free) < self._spares and self._may_create():
            self._free.append(file)
        else:
            file.remove()
        self._changed.notify_all()

    @contextmanager
    def keep(self, path: Path) -> Iterator[None]:
        """Protect a published file from reuse inside this context; this cannot fail."""
        with self._changed:
            file = self._published.get(path)
            if file is not None:
                file.holders += 1
        try:
            yield
        finally:
            with self._changed:
                if file is not None:
                    file.holders -= 1
                    if file.is_retired and not file.holders:
                        try:
                            self._put_away(file)
                        except OSError as error:  # the next prune finds it by its name
                            logger.warning("%s is left behind: %s", path, error)

    def close(self) -> None:
        """Remove free and taken files, and close the published ones."""
        with self._changed:
            for file in (*self._free, *self._taken):
                file.remove()
            for file in self._published.values():
                file.close()
            self._free.clear()
            self._taken.clear()
            self._published.clear()
