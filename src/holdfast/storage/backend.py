"""The storage protocol: what one place for bytes can do, in terms that an object store keeps too.

Owns the promises that stores, readers and writers of checkpoints rely on. A storage holds objects
under names relative to its root; the part of a name before its first slash is a group. What is put
into a group is not part of any checkpoint until `publish` gives the group its final name: the one
moment at which a checkpoint becomes visible. There is no rename of an object, no directory, no
descriptor and no link in this protocol: how a storage keeps its promises is its own matter.

A storage that fails raises OSError with the full name in `filename`. A name that `is_name` refuses
is a ValueError; `under` takes any name that stays below the root.
`holdfast.testing.StorageContract` checks the promises of an implementation.
"""

from __future__ import annotations

import io
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol, Self

PENDING_MARK = ".pending-"
"""Between a name and a nonce: not committed, never listed, swept by the next save."""
REPLACED_MARK = ".replaced-"
"""Between a name and a nonce: a published group that another one replaces."""

Append = Callable[[memoryview], None]
"""Append bytes to an object that is being written. They may change once it has returned."""


@dataclass(frozen=True)
class Entry:
    """One name directly below the root of a storage."""

    name: str
    is_group: bool
    """Whether it is a group and not an object."""


class GroupUnreachableError(FileNotFoundError):
    """A whole group is not where its name leads; `strerror` says why."""


class ObjectReader(Protocol):
    """One object, open for reading by one thread."""

    @property
    def size_bytes(self) -> int:
        """The size of the object."""
        ...

    def get_into(self, offset: int, targets: Sequence[memoryview]) -> int:
        """Fill memory in order with the bytes from an offset; return how many were filled.

        That is fewer than asked for only if the object ends before. It says nothing about the
        content: wrong bytes are found by digests, which are the caller's.
        """
        ...

    def map(self) -> memoryview:
        """Return the content as memory that outlives this source, of a size above zero.

        It is read on access where the storage can do that. Writing to it changes no object.
        """
        ...


class Storage(Protocol):
    """One root for bytes, shared by all ranks of a job and by later jobs."""

    def where(self, name: str = "") -> str:
        """Return the full name of an object or group, for messages; of the root for no name."""
        ...

    def under(self, group: str) -> Self:
        """Return the storage whose root is a group of this one. The group may not exist."""
        ...

    def prepare(self) -> None:
        """Make the root exist, durably. It may exist already."""
        ...

    def has_group(self, group: str = "") -> bool:
        """Whether a group that was begun or published is visible here; for no name: the root.

        A name that leads to a group elsewhere is none: what it leads to is not ours to change.
        """
        ...

    # -- writing: durable once `settle` or `publish` has returned --------------------------------

    def put(self, name: str, content: bytes) -> None:
        """Write a new small object under a name that only the caller writes.

        After a crash it may be absent, torn or whole until it was settled.
        """
        ...

    def put_from(self, name: str) -> AbstractContextManager[Append]:
        """Write a new object of any size from the caller's memory, like `put`; yield how to.

        It is complete once the context is left without an error.
        """
        ...

    def put_new(self, name: str, content: bytes) -> None:
        """Create a small object, whole or not at all, after any crash.

        Of all callers in all processes at most one succeeds, ever. A caller whose outcome is
        uncertain reads it back before it returns.

        Raises:
            FileExistsError: another one was first; nothing was changed.
        """
        ...

    def replace(self, name: str, content: bytes) -> None:
        """Write a small object over another one or none: after any crash, the old or the new.

        Two writers are not ordered: for hints, such as the tracker.
        """
        ...

    def settle(self, names: Sequence[str]) -> None:
        """Make objects that were written durable, their names below the root included."""
        ...

    # -- groups ----------------------------------------------------------------------------------

    def begin(self, group: str) -> None:
        """Begin a group under a pending name, so that every rank may put objects into it."""
        ...

    def publish(
        self, group: str, name: str, record: str, content: bytes, needs: Sequence[str]
    ) -> str | None:
        """Make a pending group readable under its final name: visible at once, durable at return.

        The object `record` with this content is put last; who sees it sees all of `needs`,
        which are names in the group. Return the name that a group published earlier under the same
        name has now, for the caller to delete; None: there was none. It stays readable until this
        one is.

        Raises:
            OSError: it was not published, or a later publication of the name decides whether it
                was. An earlier group of this name is still there.
        """
        ...

    def restore(self, replaced: str, name: str) -> None:
        """Give a replaced group its final name back, unless a group has that name."""
        ...

    def retract(self, name: str) -> str:
        """Undo a publication, durably; return the name of what is left for the caller to delete.

        After any crash the group is there, whole, or not.
        """
        ...

    def delete(self, name: str) -> None:
        """Delete an object, or a group with all that it holds. It may be absent.

        It is not atomic for a group: retract a published one first.
        """
        ...

    # -- reading ---------------------------------------------------------------------------------

    def list(self) -> list[Entry]:
        """Return groups and objects directly below the root, by name; none if there is no root.

        Everything that was published or put before the call began is among them.
        """
        ...

    def get(self, name: str) -> bytes:
        """Return the content of a small object.

        Raises:
            GroupUnreachableError: the root of this storage is a group that leads nowhere.
            FileNotFoundError: there is no such object.
        """
        ...

    def size_bytes(self, name: str) -> int:
        """Return the size of an object; raises like `get`."""
        ...

    def open(self, name: str) -> AbstractContextManager[ObjectReader]:
        """Open an object for reading; raises like `get`."""
        ...


def is_name(name: str) -> bool:
    """Whether a name stays below the root of a storage, and a message can show it."""
    return _stays_below(name) and "\\" not in name and name.isprintable()


def check_name(name: str) -> None:
    """Refuse a name that may lead out of a storage, or that a message cannot show.

    Raises:
        ValueError: it is such a name.
    """
    if not is_name(name):
        raise ValueError(f"{name!r} is no name of an object")


def check_group(name: str) -> None:
    """Refuse a name that may lead out of a storage; groups of other writers have any other.

    Raises:
        ValueError: it does.
    """
    if not _stays_below(name):
        raise ValueError(f"{name!r} is no name of a group")


def _stays_below(name: str) -> bool:
    path = PurePosixPath(name)
    parts = path.parts
    is_inside = bool(parts) and not path.is_absolute() and ".." not in parts
    return is_inside and str(path) == name and "\0" not in name


def pending_name(name: str) -> str:
    """Return a new pending name: what has it is swept unless it is published."""
    return f"{name}{PENDING_MARK}{secrets.token_hex(4)}"


def replaced_name(name: str) -> str:
    """Return a new name for a group that is replaced by another one."""
    return f"{name}{REPLACED_MARK}{secrets.token_hex(4)}"


def as_stream(source: ObjectReader) -> BinaryIO:
    """Return an open object as a seekable stream."""
    return io.BufferedReader(_Stream(source))


@contextmanager
def open_stream(storage: Storage, name: str) -> Iterator[BinaryIO]:
    """Open an object as a seekable stream."""
    with storage.open(name) as source, as_stream(source) as stream:
        yield stream


@contextmanager
def opened_once(storage: Storage, name: str) -> Iterator[Storage]:
    """Open an object, and yield the storage, in which this thread may open it again for free."""
    with storage.open(name) as source:
        kept: Any = _OpenedOnce(storage, name, source)
        yield kept


class _OpenedOnce:
    """A storage that has one object open, for the thread that opened it."""

    def __init__(self, storage: Storage, name: str, source: ObjectReader) -> None:
        self._storage = storage
        self._opened = name, threading.get_ident()
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    @contextmanager
    def open(self, name: str) -> Iterator[ObjectReader]:
        if (name, threading.get_ident()) == self._opened:
            yield self._source
            return
        with self._storage.open(name) as source:
            yield source


class _Stream(io.RawIOBase):
    """A source with a position."""

    def __init__(self, source: ObjectReader) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = (0, self._position, self._source.size_bytes)
        self._position = starts[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = self._source.get_into(self._position, [memoryview(buffer).cast("B")])
        self._position += count
        return count
