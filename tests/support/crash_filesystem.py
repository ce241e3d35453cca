"""A file system in memory that forgets what was not synced, as a disk does when the power goes.

Owns the model of durability and the states that a crash may leave. It promises no more than POSIX,
and less than journals give in practice:

* Bytes are durable once their file was synced. Before, a crash leaves what was synced last, a torn
  part, or all of it.
* A name is durable once its directory was synced; syncing the file does not help. Before, each
  change of a name (made, removed, renamed) may be there or not, whatever was changed before or
  after it and in whatever directory.
* A rename is one change: never both names, never neither, and the name that it takes over stands
  for the old or for the new. ext4, xfs, btrfs and NFS servers keep that; FAT does not.
* Nothing that was synced is lost or altered.

An `Image` is everything at one instant, and cheap: images of before every step are kept. Knows
nothing of checkpoints.
"""

from __future__ import annotations

import errno
import io
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO, cast

from holdfast.filesystem import DirectoryEntry

EXHAUSTIVE_CHANGES = 4
"""Up to so many un-synced name changes, every subset of them is tried."""

STREAM_KINDS = frozenset({"write", "read", "close"})
SYNC_KINDS = frozenset({"sync_file", "sync_directory"})


class PowerCut(BaseException):
    """The machine is gone: derived from BaseException, so that nobody tidies up after it."""


@dataclass(frozen=True)
class File:
    """Bytes as programs see them, and as the disk has them."""

    content: bytes = b""
    durable: bytes = b""


@dataclass(frozen=True)
class Directory:
    """Names as programs see them, and as the disk has them; each stands for a node's number."""

    names: Mapping[str, int] = field(default_factory=dict)
    durable: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    """A symbolic link; nothing here follows it."""

    target: str


Node = File | Directory | Link


@dataclass(frozen=True)
class NameEdit:
    """One name of one directory that appears with a node, or disappears from it."""

    directory: int
    name: str
    node: int
    appears: bool


NameChange = tuple[NameEdit, ...]
"""What happens to names at once: one edit, or the two of a rename."""

_ROOT = 0


@dataclass(frozen=True)
class Image:
    """A whole file system at one instant."""

    nodes: Mapping[int, Node] = field(default_factory=lambda: {_ROOT: Directory()})
    unsynced: tuple[NameChange, ...] = ()
    """Name changes that are not durable yet, oldest first."""

    def after_power_loss(
        self, changes: Sequence[NameChange], content_of: Callable[[File], bytes]
    ) -> Image:
        """Return what a machine finds that starts again: the given un-synced changes happened."""
        tables = {
            number: dict(node.durable)
            for number, node in self.nodes.items()
            if isinstance(node, Directory)
        }
        for change in changes:
            _apply(change, tables)
        nodes: dict[int, Node] = {}
        for number, node in self.nodes.items():
            if isinstance(node, Directory):
                nodes[number] = Directory(tables[number], tables[number])
            elif isinstance(node, File):
                content = content_of(node)
                nodes[number] = File(content, content)
            else:
                nodes[number] = node
        return Image(nodes)

    def tree(self) -> dict[str, bytes | str | None]:
        """Return all that programs see by absolute name: bytes, a link's target, or None."""
        return dict(self._walk("", _ROOT))

    def _walk(self, where: str, number: int) -> Iterator[tuple[str, bytes | str | None]]:
        directory = self.nodes[number]
        assert isinstance(directory, Directory)
        for name, inner in directory.names.items():
            path, node = f"{where}/{name}", self.nodes[inner]
            if isinstance(node, File):
                yield path, node.content
            elif isinstance(node, Link):
                yield path, node.target
            else:
                yield path, None
                yield from self._walk(path, inner)


def all_bytes(file: File) -> bytes:
    """What a file holds when its un-synced bytes were written after all."""
    return file.content


def synced_bytes(file: File) -> bytes:
    """What a file holds when its un-synced bytes were not written."""
    return file.durable


def torn_bytes(file: File) -> bytes:
    """What a file holds when half of its un-synced bytes were written."""
    if file.content == file.durable:
        return file.content
    common = len(file.durable) if file.content.startswith(file.durable) else 0
    return file.content[: common + (len(file.content) - common) // 2]


@dataclass(frozen=True)
class Aftermath:
    """One state that a crash may leave, and by which loss."""

    loss: str
    image: Image


def aftermaths(image: Image, chooser: random.Random, samples: int = 0) -> Iterator[Aftermath]:
    """Yield what may be left of an image.

    The process killed and the machine alive; all that was not synced lost; names kept but bytes
    lost, or torn; everything kept. Then subsets of the un-synced name changes, with and without the
    un-synced bytes: all of them while these are few, else each change alone happened, each change
    alone missing, each point in time, and `samples` drawn ones.
    """
    changes = image.unsynced
    yield Aftermath("process killed", image)
    yield Aftermath("un-synced names and bytes lost", image.after_power_loss((), synced_bytes))
    yield Aftermath("un-synced bytes lost", image.after_power_loss(changes, synced_bytes))
    yield Aftermath("un-synced bytes torn", image.after_power_loss(changes, torn_bytes))
    yield Aftermath("everything kept", image.after_power_loss(changes, all_bytes))
    for chosen in _subsets(len(changes), chooser, samples):
        happened = [changes[position] for position in sorted(chosen)]
        loss = f"un-synced name changes {sorted(chosen)} of {len(changes)} happened"
        yield Aftermath(loss, image.after_power_loss(happened, all_bytes))
        yield Aftermath(f"{loss}, bytes lost", image.after_power_loss(happened, synced_bytes))


def _subsets(count: int, chooser: random.Random, samples: int) -> Iterator[frozenset[int]]:
    everything = frozenset(range(count))
    if count <= EXHAUSTIVE_CHANGES:
        for size in range(count + 1):
            for chosen in combinations(range(count), size):
                yield frozenset(chosen)
        return
    for position in range(count):
        yield frozenset({position})
        yield everything - {position}
        yield frozenset(range(position))
    for _ in range(samples):
        yield frozenset(position for position in range(count) if chooser.random() < 0.5)


def _apply(change: NameChange, tables: dict[int, dict[str, int]]) -> None:
    for edit in change:
        table = tables[edit.directory]
        if edit.appears:
            table[edit.name] = edit.node
        elif table.get(edit.name) == edit.node:
            del table[edit.name]


@dataclass(frozen=True)
class Operation:
    """One step that was asked of the file system."""

    kind: str
    """The method's name; `write`, `read` and `close` for a stream's."""
    path: str
    caller: str
    """Where in the package it was asked, innermost first, out to the first that is no helper."""


class CrashFilesystem:
    """Holds an image, records every step, and can lose power before any of them."""

    def __init__(self, image: Image | None = None) -> None:
        """Start from an image; None: an empty one."""
        self.image = image or Image()
        self.operations: list[Operation] = []
        self.images: list[Image] = []
        """What was there before each operation of the same position."""
        self.cuts: Callable[[Operation], bool] = lambda operation: False
        """Asked before each operation; True: it is never carried out, nor is any later one."""
        self.ignores: Callable[[Operation], bool] = lambda operation: False
        """Asked before each sync; True: it reports success and does nothing."""
        self.fails: Callable[[Operation], int | None] = lambda operation: None
        """Asked before each operation for the errno with which it fails; None: it does not."""
        self.shortens: Callable[[Operation], bool] = lambda operation: False
        """Asked before each write of a stream; True: only half of the bytes are taken."""
        self.has_hard_links = True
        self._is_dead = False
        self._lock = threading.RLock()

    # -- the protocol ----------------------------------------------------------------------------

    def make_directory(self, path: Path) -> None:
        """Create one directory, with its parents where they are missing; present is fine."""
        if self._find(path.parent) is None:
            self.make_directory(path.parent)
        with self._step("make_directory", path):
            found = self._find(path)
            if found is None:
                self._add(path, Directory())
            elif not isinstance(self.image.nodes[found], Directory):
                raise _error(errno.EEXIST, path)

    def open_new(self, path: Path) -> BinaryIO:
        """Open a file that must not exist yet, for writing and reading back."""
        with self._step("open_new", path):
            self._must_be_free(path)
            number = self._add(path, File())
        return cast(BinaryIO, io.BufferedRandom(_Stream(self, number, path, writes=True)))

    def sync_file(self, path: Path, stream: Any = None) -> None:
        """Make the bytes of a file durable; its name is another matter."""
        with self._step("sync_file", path) as goes_on:
            number = self._number(path)
            node = self.image.nodes[number]
            if isinstance(node, Link):
                raise _error(errno.ELOOP, path)
            if isinstance(node, File) and goes_on:
                self._set(number, replace(node, durable=node.content))

    def sync_directory(self, path: Path) -> None:
        """Make every change of a name in a directory durable."""
        with self._step("sync_directory", path) as goes_on:
            number, _ = self._directory(path)
            if not goes_on:
                return
            tables = {
                each: dict(found.durable)
                for each, found in self.image.nodes.items()
                if isinstance(found, Directory)
            }
            left = []
            for change in self.image.unsynced:
                if any(edit.directory == number for edit in change):
                    _apply(change, tables)
                else:
                    left.append(change)
            nodes = dict(self.image.nodes)
            for each, table in tables.items():
                nodes[each] = replace(cast(Directory, nodes[each]), durable=table)
            self.image = Image(nodes, tuple(left))

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or directory another name, over an existing file or empty directory."""
        with self._step("rename", source, target):
            number = self._number(source)
            there = self._find(target)
            if there is not None and there != number:
                moved, taken = self.image.nodes[number], self.image.nodes[there]
                if isinstance(taken, Directory):
                    if not isinstance(moved, Directory):
                        raise _error(errno.EISDIR, source, target)
                    if taken.names:
                        raise _error(errno.ENOTEMPTY, source, target)
                elif isinstance(moved, Directory):
                    raise _error(errno.ENOTDIR, source, target)
            self._edit(
                NameEdit(self._directory(source.parent)[0], source.name, number, appears=False),
                NameEdit(self._directory(target.parent)[0], target.name, number, appears=True),
            )

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name that must not exist yet."""
        with self._step("link", source, target):
            if not self.has_hard_links:
                raise _error(errno.EPERM, source, target)
            number = self._number(source)
            self._must_be_free(target)
            parent, _ = self._directory(target.parent)
            self._edit(NameEdit(parent, target.name, number, appears=True))

    def remove_file(self, path: Path) -> None:
        """Remove a file or a link."""
        with self._step("remove_file", path):
            number = self._number(path)
            if isinstance(self.image.nodes[number], Directory):
                raise _error(errno.EISDIR, path)
            parent, _ = self._directory(path.parent)
            self._edit(NameEdit(parent, path.name, number, appears=False))

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        with self._step("remove_directory", path):
            number, node = self._directory(path)
            if node.names:
                raise _error(errno.ENOTEMPTY, path)
            parent, _ = self._directory(path.parent)
            self._edit(NameEdit(parent, path.name, number, appears=False))

    def list_directory(self, path: Path) -> list[DirectoryEntry]:
        """Return the entries by name."""
        with self._step("list_directory", path):
            _, node = self._directory(path)
            found = [(name, self.image.nodes[number]) for name, number in node.names.items()]
        return [
            DirectoryEntry(
                name,
                is_file=isinstance(each, File),
                is_directory=isinstance(each, Directory),
            )
            for name, each in sorted(found, key=lambda pair: pair[0])
        ]

    def open_existing(self, path: Path) -> BinaryIO:
        """Open a regular file for reading."""
        with self._step("open_existing", path):
            number = self._number(path)
            node = self.image.nodes[number]
            if isinstance(node, Link):
                raise _error(errno.ELOOP, path)
            if isinstance(node, Directory):
                raise _error(errno.EINVAL, path)
        return cast(BinaryIO, io.BufferedReader(_Stream(self, number, path, writes=False)))

    def size_bytes(self, path: Path) -> int:
        """Return the size of a regular file."""
        with self._step("size_bytes", path):
            node = self.image.nodes[self._number(path)]
            if not isinstance(node, File):
                raise _error(errno.EINVAL, path)
            return len(node.content)

    def is_directory(self, path: Path) -> bool:
        """Whether a directory is there."""
        with self._step("is_directory", path):
            number = self._find(path)
            return number is not None and isinstance(self.image.nodes[number], Directory)

    # -- for tests -------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Let another process use what a killed one left; the machine had never stopped."""
        self.cuts = lambda operation: False
        self._is_dead = False

    def overwrite(self, path: Path, position: int, content: bytes) -> None:
        """Write into a file that is there, as through a descriptor that was kept."""
        self.write_at(self._number(path), position, content, path)

    def resize(self, path: Path, size_bytes: int) -> None:
        """Cut a file, or lengthen it with zeros."""
        with self._step("write", path):
            number = self._number(path)
            file = self.image.nodes[number]
            assert isinstance(file, File)
            content = file.content[:size_bytes].ljust(size_bytes, b"\0")
            self._set(number, replace(file, content=content))

    def plant_link(self, path: Path, target: str) -> None:
        """Put a symbolic link where nothing is."""
        self._add(path, Link(target))

    # -- streams ---------------------------------------------------------------------------------

    def write_at(self, number: int, position: int, content: bytes, path: Path) -> int:
        """Overwrite or lengthen a file; return how many bytes were taken."""
        with self._step("write", path):
            if self.shortens(self.operations[-1]):
                content = content[: max(1, len(content) // 2)]
            file = self.image.nodes[number]
            assert isinstance(file, File)
            before = file.content[:position].ljust(position, b"\0")
            after = file.content[position + len(content) :]
            self._set(number, replace(file, content=before + content + after))
        return len(content)

    def read_at(self, number: int, position: int, size: int, path: Path) -> bytes:
        """Return up to so many bytes."""
        with self._step("read", path):
            file = self.image.nodes[number]
            assert isinstance(file, File)
            return file.content[position : position + size]

    def close(self, path: Path) -> None:
        """Take note that a written file was closed, which some file systems let fail."""
        with self._step("close", path):
            pass

    def length_of(self, number: int) -> int:
        """Return the size of an open file."""
        file = self.image.nodes[number]
        assert isinstance(file, File)
        return len(file.content)

    # -- inside ----------------------------------------------------------------------------------

    def _step(self, kind: str, path: Path, target: Path | None = None) -> _Step:
        return _Step(self, kind, path if target is None else target)

    def _enter(self, kind: str, path: Path) -> bool:
        """Record one operation; return whether it is carried out."""
        self._lock.acquire()
        try:
            self._must_live()
            operation = Operation(kind, str(path), _caller())
            self._is_dead = self.cuts(operation)
            self._must_live()
            self.operations.append(operation)
            self.images.append(self.image)
            if (number := self.fails(operation)) is not None:
                # As from the kernel: calls on descriptors know no path.
                known = () if kind in STREAM_KINDS else (str(path),)
                raise OSError(number, os.strerror(number), *known)
            return not (kind in SYNC_KINDS and self.ignores(operation))
        except BaseException:
            self._lock.release()
            raise

    def _leave(self) -> None:
        self._lock.release()

    def _must_live(self) -> None:
        if self._is_dead:
            raise PowerCut

    def _find(self, path: Path) -> int | None:
        """Return the number of the node at a path; None: there is none."""
        assert path.is_absolute()
        number = _ROOT
        for part in path.parts[1:]:
            node = self.image.nodes[number]
            if isinstance(node, Link):
                raise _error(errno.ELOOP, path)
            if isinstance(node, File):
                raise _error(errno.ENOTDIR, path)
            found = node.names.get(part)
            if found is None:
                return None
            number = found
        return number

    def _number(self, path: Path) -> int:
        number = self._find(path)
        if number is None:
            raise _error(errno.ENOENT, path)
        return number

    def _directory(self, path: Path) -> tuple[int, Directory]:
        number = self._number(path)
        node = self.image.nodes[number]
        if not isinstance(node, Directory):
            raise _error(errno.ENOTDIR, path)
        return number, node

    def _must_be_free(self, path: Path) -> None:
        if self._find(path) is not None:
            raise _error(errno.EEXIST, path)

    def _add(self, path: Path, node: Node) -> int:
        parent, _ = self._directory(path.parent)
        number = len(self.image.nodes)
        self._set(number, node)
        self._edit(NameEdit(parent, path.name, number, appears=True))
        return number

    def _set(self, number: int, node: Node) -> None:
        self.image = Image({**self.image.nodes, number: node}, self.image.unsynced)

    def _edit(self, *change: NameEdit) -> None:
        nodes = dict(self.image.nodes)
        tables = {
            edit.directory: dict(cast(Directory, nodes[edit.directory]).names) for edit in change
        }
        _apply(change, tables)
        for number, table in tables.items():
            nodes[number] = replace(cast(Directory, nodes[number]), names=table)
        self.image = Image(nodes, (*self.image.unsynced, change))


class _Step:
    """One operation, recorded before it is carried out and alone while it is."""

    def __init__(self, filesystem: CrashFilesystem, kind: str, path: Path) -> None:
        self._filesystem = filesystem
        self._kind = kind
        self._path = path

    def __enter__(self) -> bool:
        return self._filesystem._enter(self._kind, self._path)

    def __exit__(self, *error: object) -> None:
        self._filesystem._leave()


class _Stream(io.RawIOBase):
    """An open file; buffering is python's, as on a real disk."""

    def __init__(
        self, filesystem: CrashFilesystem, number: int, path: Path, *, writes: bool
    ) -> None:
        self._filesystem = filesystem
        self._node = number
        self._path = path
        self._writes = writes
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return self._writes

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {
            os.SEEK_SET: 0,
            os.SEEK_CUR: self._position,
            os.SEEK_END: self._filesystem.length_of(self._node),
        }[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        found = self._filesystem.read_at(self._node, self._position, len(view), self._path)
        view[: len(found)] = found
        self._position += len(found)
        return len(found)

    def write(self, content: Any) -> int:
        taken = self._filesystem.write_at(self._node, self._position, bytes(content), self._path)
        self._position += taken
        return taken

    def close(self) -> None:
        was_open = not self.closed
        super().close()  # the descriptor is gone even where closing reports an error
        if was_open and self._writes:
            self._filesystem.close(self._path)


def _error(number: int, path: Path, target: Path | None = None) -> OSError:
    if target is None:
        return OSError(number, os.strerror(number), str(path))
    return OSError(number, os.strerror(number), str(path), None, str(target))


def _caller() -> str:
    """Name the functions of the package that led here, through its file helpers to their user."""
    names = []
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("holdfast."):
            function = f"{module.removeprefix('holdfast.')}.{frame.f_code.co_qualname}"
            names.append(f"{function}:{frame.f_lineno}")
            if module not in ("holdfast.storage.posix", "holdfast.filesystem"):
                break
        frame = frame.f_back  # type: ignore[assignment]  # None at the outermost
    return " < ".join(names)
