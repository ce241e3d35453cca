"""A storage in memory: the reference implementation of the storage protocol.

Owns objects in a dict of this process, each whole from the moment it is there. Promises what
`storage.backend` asks of a storage among the threads of one process; nothing outlives it. Knows no
file system: what the protocol needs is here.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from holdfast.storage.backend import (
    REPLACED_MARK,
    Append,
    Entry,
    check_group,
    check_name,
    pending_name,
    replaced_name,
)


@dataclass
class _Contents:
    """What all views of one storage share."""

    objects: dict[str, bytes] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)


class MemoryStorage:
    """Objects by name, in this process only."""

    def __init__(self, root: str = "/memory", contents: _Contents | None = None) -> None:
        """`root`: its name in messages. `contents`: those of a storage that this is a group of."""
        self._root = root
        self._contents = contents or _Contents()

    def where(self, name: str = "") -> str:
        return f"{self._root}/{name}" if name else self._root

    def under(self, group: str) -> Self:
        check_group(group)
        return type(self)(self.where(group), self._contents)

    def prepare(self) -> None:
        """See the protocol."""
        self._contents.groups.add(self._root)

    def has_group(self, group: str = "") -> bool:
        full = self._full(group) if group else self._root
        with self._contents.lock:
            return full in self._contents.groups or any(
                each.startswith(f"{full}/") for each in self._contents.objects
            )

    def _full(self, name: str) -> str:
        check_name(name)
        return self.where(name)

    # -- writing ---------------------------------------------------------------------------------

    def put(self, name: str, content: bytes) -> None:
        self._contents.objects[self._full(name)] = bytes(content)

    @contextmanager
    def put_from(self, name: str) -> Iterator[Append]:
        full, content = self._full(name), bytearray()

        def append(block: memoryview) -> None:
            content.extend(block)

        yield append
        self._contents.objects[full] = bytes(content)

    def put_new(self, name: str, content: bytes) -> None:
        full = self._full(name)
        with self._contents.lock:
            if full in self._contents.objects:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), full)
            self._contents.objects[full] = bytes(content)

    def replace(self, name: str, content: bytes) -> None:
        self.put(name, content)

    def settle(self, names: Sequence[str]) -> None:
        """Nothing to do: what is put is there."""

    # -- groups ----------------------------------------------------------------------------------

    def begin(self, group: str) -> None:
        with self._contents.lock:
            self._contents.groups.add(self._full(group))

    def publish(
        self, group: str, name: str, record: str, content: bytes, needs: Sequence[str]
    ) -> str | None:
        check_name(name)
        files = self.under(group)
        with self._contents.lock:
            if not self.has_group(group):
                raise self._missing(group)
            for each in needs:
                files.size_bytes(each)  # raises for one that is not there
            replaced = None
            if self.has_group(name):
                replaced = replaced_name(name)
                self._move(name, replaced)
            files.put(record, content)
            self._move(group, name)
        return replaced

    def restore(self, replaced: str, name: str) -> None:
        check_name(replaced)
        check_name(name)
        with self._contents.lock:
            if not self.has_group(name):
                self._move(replaced, name)

    def retract(self, name: str) -> str:
        check_name(name)
        left = pending_name(name.partition(REPLACED_MARK)[0])
        with self._contents.lock:
            self._move(name, left)
        return left

    def _move(self, source: str, target: str) -> None:
        """Give the objects of a group other names, at once for all who hold the lock."""
        old, new = f"{self._full(source)}/", f"{self._full(target)}/"
        if not self.has_group(source):
            raise self._missing(source)
        objects, groups = self._contents.objects, self._contents.groups
        for each in [each for each in objects if each.startswith(old)]:
            objects[new + each.removeprefix(old)] = objects.pop(each)
        groups.discard(old.rstrip("/"))
        groups.add(new.rstrip("/"))

    def delete(self, name: str) -> None:
        full = self._full(name)
        with self._contents.lock:
            objects = self._contents.objects
            for each in [each for each in objects if f"{each}/".startswith(f"{full}/")]:
                del objects[each]
            self._contents.groups.discard(full)

    # -- reading ---------------------------------------------------------------------------------

    def list(self) -> list[Entry]:
        start = f"{self._root}/"
        with self._contents.lock:
            inner = [
                (full.removeprefix(start), full in self._contents.groups)
                for full in (*self._contents.objects, *self._contents.groups)
                if full.startswith(start)
            ]
        names = {name.partition("/")[0]: is_group or "/" in name for name, is_group in inner}
        return [Entry(name, is_group) for name, is_group in sorted(names.items())]

    def get(self, name: str) -> bytes:
        try:
            return self._contents.objects[self._full(name)]
        except KeyError:
            raise self._missing(name) from None

    def size_bytes(self, name: str) -> int:
        return len(self.get(name))

    @contextmanager
    def open(self, name: str) -> Iterator[MemoryObject]:
        yield MemoryObject(self.get(name))

    def _missing(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.where(name))


class MemoryObject:
    """An object as it was when it was opened."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @property
    def size_bytes(self) -> int:
        return len(self._content)

    def get_into(self, offset: int, targets: Sequence[memoryview]) -> int:
        filled = 0
        for target in targets:
            part = self._content[offset + filled : offset + filled + len(target)]
            target[: len(part)] = part
            filled += len(part)
        return filled

    def map(self) -> memoryview:
        return memoryview(bytearray(self._content))
