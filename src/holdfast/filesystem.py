"""The primitive operations on a mounted file system: what a manager's `filesystem` argument takes.

Owns the calls that change or read a file system, one method each. `Filesystem` is the protocol, the
interface at which tests inject faults; `LocalFilesystem` carries it out, to be derived from.
Promises that what a method has synced survives power loss, that every failure is an OSError with
errno and path, and that no symbolic link is followed where a file or a directory is expected. Owns
also what the local tier asks of a directory of its node: whether it is in RAM, private, full. Knows
nothing about checkpoints. `storage.posix` composes these calls into the promises of a storage.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from holdfast.messages import describe_size

__all__ = ["DirectoryEntry", "Filesystem", "LocalFilesystem"]


@dataclass(frozen=True)
class DirectoryEntry:
    """One name in a directory; a symbolic link is neither a file nor a directory."""

    name: str
    is_file: bool
    is_directory: bool
    is_link: bool = False


class Filesystem(Protocol):
    """The primitive operations. Each succeeds or raises OSError with errno and path."""

    def make_directory(self, path: Path) -> None: ...
    def open_new(self, path: Path) -> BinaryIO: ...
    def sync_file(self, path: Path, stream: Any) -> None: ...
    def sync_directory(self, path: Path) -> None: ...
    def rename(self, source: Path, target: Path) -> None: ...
    def link(self, source: Path, target: Path) -> None: ...
    def remove_file(self, path: Path) -> None: ...
    def remove_directory(self, path: Path) -> None: ...
    def list_directory(self, path: Path) -> list[DirectoryEntry]: ...
    def open_existing(self, path: Path) -> BinaryIO: ...
    def size_bytes(self, path: Path) -> int: ...
    def is_directory(self, path: Path) -> bool: ...


class LocalFilesystem:
    """A mounted POSIX file system."""

    def __init__(self, *, private: bool = True) -> None:
        """`private`: only the owner may read what is created; otherwise the umask decides."""
        self._file_mode = 0o600 if private else 0o666
        self._directory_mode = 0o700 if private else 0o777

    def make_directory(self, path: Path) -> None:
        """Create one directory and its missing parents; it may exist already."""
        if not path.parent.exists():
            self.make_directory(path.parent)
        path.mkdir(self._directory_mode, exist_ok=True)

    def open_new(self, path: Path) -> BinaryIO:
        """Open a file that must not exist yet, for writing and reading back."""
        descriptor = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._file_mode
        )
        return os.fdopen(descriptor, "w+b")

    def sync_file(self, path: Path, stream: Any) -> None:
        """Make the bytes and the size of a file durable, through the stream that wrote them.

        The system need not report a write-back error to a descriptor that was opened later.
        """
        with naming(path):
            os.fsync(stream.fileno())

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            with naming(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or directory atomically, replacing an existing file."""
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name that must not exist yet."""
        os.link(source, target, follow_symlinks=False)

    def remove_file(self, path: Path) -> None:
        """Remove a file or a link; the link's target stays."""
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def list_directory(self, path: Path) -> list[DirectoryEntry]:
        """Return the entries by name."""
        with os.scandir(path) as entries:
            found = [
                DirectoryEntry(
                    each.name,
                    is_file=each.is_file(follow_symlinks=False),
                    is_directory=each.is_dir(follow_symlinks=False),
                    is_link=each.is_symlink(),
                )
                for each in entries
            ]
        return sorted(found, key=lambda each: each.name)

    def open_existing(self, path: Path) -> BinaryIO:
        """Open a regular file for reading; refuse a link (ELOOP) and anything else (EINVAL)."""
        # Non-blocking: opening a pipe instead of a file would otherwise wait for a writer forever.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")

    def size_bytes(self, path: Path) -> int:
        """Return the size of a regular file; anything else is an error."""
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return found.st_size

    def is_directory(self, path: Path) -> bool:
        """Whether the path is a directory and not a link to one."""
        try:
            return stat.S_ISDIR(path.lstat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError that names no file, such as a failed write or read."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


_MEMORY_TYPES = ("tmpfs", "ramfs")


def is_memory(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether files under an existing directory are in RAM."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        before, _, after = line.partition(" - ")
        if after and before.split()[2] == wanted:
            return after.split()[0] in _MEMORY_TYPES
    return False


def place_of(path: Path) -> tuple[int, int]:
    """Return what is equal for two paths only if they are one directory: device and inode."""
    found = path.stat()
    return found.st_dev, found.st_ino


def why_not_private(path: Path) -> str | None:
    """Return why another user could add or remove files in a directory; None: nobody can."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, this job runs as user {os.geteuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def free_bytes(directory: Path) -> int:
    """Return the free space of the file system under a directory."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def taken_bytes(directory: Path) -> int:
    """Return the space of the files under a directory; what cannot be read counts as nothing."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def as_problem(error: OSError, size_bytes: int) -> OSError:
    """Return the error of a full directory with the needed and the free bytes."""
    if error.errno != errno.ENOSPC or error.filename is None:
        return error
    left = free_bytes(Path(error.filename).parent)
    reason = (
        f"{error.strerror}: {describe_size(size_bytes)} are needed, "
        f"{describe_size(left, size_bytes)} are free"
    )
    return OSError(error.errno, reason, error.filename)


def append_durably(filesystem: Filesystem, path: Path, content: bytes) -> None:
    """Append to an existing file and make its bytes durable."""
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "ab") as stream:
            stream.write(content)
            stream.flush()
            filesystem.sync_file(path, stream)


class SharedFile:
    """A file that several processes write to at different offsets, created by the first."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            OSError: it cannot be opened; a link is not followed.
        """
        self._path = path
        with naming(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o600)

    def write_at(self, offset: int, content: memoryview) -> None:
        """Write all of it.

        Raises:
            OSError: there is not enough space, for instance.
        """
        with naming(self._path):
            if os.pwrite(self._descriptor, content, offset) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)
