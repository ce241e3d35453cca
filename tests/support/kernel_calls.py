"""Every call with which files under some directories are changed or read, before it is made.

Owns a stand-in for the calls of python's `os` and `mmap` that lead to the kernel, so that code
which keeps descriptors and maps files is watched as closely as code that goes through the
filesystem seam. Promises that nothing of holdfast is replaced, that a call which was made to fail
or was cut off has changed nothing, and that after a cut no later one changes anything. A sync is
noted, and not carried out: no test pulls the plug. What is written through a mapping is no call;
it shows at the next one.
"""

from __future__ import annotations

import io
import mmap
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGING = frozenset(
    {"mkdir", "rmdir", "unlink", "rename", "link", "create", "write", "truncate", "allocate"}
)
"""Kinds that change what is there."""
READING = frozenset({"open", "read", "scandir", "stat", "statvfs", "map", "dup"})
"""Kinds that change nothing; all may fail."""

_BY_NAME = frozenset({"mkdir", "rmdir", "unlink", "rename", "link", "create", "open", "scandir",
                      "stat", "statvfs"})  # fmt: skip


Tree = dict[str, bytes | None]
"""Files by relative name; None: a directory."""


class Cut(BaseException):
    """The process is gone: derived from BaseException, so that nobody tidies up after it."""


@dataclass(frozen=True)
class Call:
    """One call that is about to be made."""

    kind: str
    path: str
    source: str = ""
    """Of a rename or a link: what is there."""
    offset: int = 0
    """Of a write."""
    content: bytes = b""
    """Of a write."""
    size_bytes: int = 0
    """Of a truncation, and of an allocation."""

    @property
    def changes(self) -> bool:
        """Whether it changes what programs see."""
        return self.kind in CHANGING

    @property
    def is_by_name(self) -> bool:
        """Whether it names a path; else it is on a descriptor."""
        return self.kind in _BY_NAME

    def __str__(self) -> str:
        source = f"{self.source} -> " if self.source else ""
        return f"{self.kind} {source}{self.path}"


class KernelCalls:
    """Sees the calls below some directories while `watching`."""

    def __init__(self, *roots: Path) -> None:
        self._roots = tuple(os.path.realpath(each) for each in roots)
        self.before: Callable[[Call], None] = lambda call: None
        """Asked before each call; it may look, raise an OSError, kill the process or `cut`."""
        self.done: Callable[[Call], None] = lambda call: None
        """Told of each call that was carried out."""
        self.shortens: Callable[[Call], bool] = lambda call: False
        """Asked before each write; True: only half of the bytes are taken."""
        self.is_one_at_a_time = True
        """So that what is there before a call is one state; a call that waits needs the others."""
        self._is_cut = False
        self._lock = threading.RLock()
        self._inside = threading.local()
        self._real: dict[str, Any] = {name: getattr(os, name) for name in _NAMES}
        self._map = mmap.mmap

    def cut(self) -> None:
        """End here: this call, and all that follow, are not made.

        Raises:
            Cut: always.
        """
        self._is_cut = True
        raise Cut

    @contextmanager
    def watching(self) -> Iterator[KernelCalls]:
        """Stand between the program and the kernel meanwhile."""
        stand_ins = {name: getattr(self, f"_{name}") for name in _NAMES}
        for name, each in stand_ins.items():
            setattr(os, name, each)
        mmap.mmap = self._mmap  # type: ignore[assignment,misc]  # a function in the class's place
        try:
            yield self
        finally:
            for name, each in self._real.items():
                setattr(os, name, each)
            mmap.mmap = self._map  # type: ignore[misc]

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Let this thread make calls that are none of the program's."""
        depth = getattr(self._inside, "depth", 0)
        self._inside.depth = depth + 1
        try:
            yield
        finally:
            self._inside.depth = depth

    # -- one call --------------------------------------------------------------------------------

    def _make(self, call: Call, carry_out: Callable[[], Any]) -> Any:
        with self._lock if self.is_one_at_a_time else nullcontext():
            if self._is_cut:
                raise Cut
            with self.unseen():
                self.before(call)
                value = carry_out()
                self.done(call)
                return value

    def _path(self, path: Any) -> str | None:
        """Return the absolute path if it is one of those that are watched."""
        if getattr(self._inside, "depth", 0) or isinstance(path, int):
            return None
        absolute = os.path.abspath(os.fsdecode(path))
        return absolute if self._is_watched(absolute) else None

    def _descriptor(self, number: int) -> str | None:
        if getattr(self._inside, "depth", 0):
            return None
        try:
            path = os.readlink(f"/proc/self/fd/{number}").removesuffix(" (deleted)")
        except OSError:
            return None
        return path if self._is_watched(path) else None

    def _is_watched(self, path: str) -> bool:
        return any(path == each or path.startswith(f"{each}/") for each in self._roots)

    def _at(self, kind: str, name: str, path: Any, *arguments: Any, **options: Any) -> Any:
        real, found = self._real[name], self._path(path)
        if found is None:
            return real(path, *arguments, **options)
        return self._make(Call(kind, found), lambda: real(path, *arguments, **options))

    # -- the calls -------------------------------------------------------------------------------

    def _mkdir(self, path: Any, *arguments: Any, **options: Any) -> Any:
        return self._at("mkdir", "mkdir", path, *arguments, **options)

    def _rmdir(self, path: Any, **options: Any) -> Any:
        return self._at("rmdir", "rmdir", path, **options)

    def _unlink(self, path: Any, **options: Any) -> Any:
        return self._at("unlink", "unlink", path, **options)

    def _scandir(self, path: Any = ".") -> Any:
        return self._at("scandir", "scandir", path)

    def _stat(self, path: Any, **options: Any) -> Any:
        return self._at("stat", "stat", path, **options)

    def _lstat(self, path: Any, **options: Any) -> Any:
        return self._at("stat", "lstat", path, **options)

    def _statvfs(self, path: Any) -> Any:
        return self._at("statvfs", "statvfs", path)

    def _rename(self, source: Any, target: Any, **options: Any) -> Any:
        return self._move("rename", source, target, **options)

    def _link(self, source: Any, target: Any, **options: Any) -> Any:
        return self._move("link", source, target, **options)

    def _move(self, name: str, source: Any, target: Any, **options: Any) -> Any:
        real, found = self._real[name], self._path(target)
        if found is None:
            return real(source, target, **options)
        call = Call(name, found, source=os.path.abspath(os.fsdecode(source)))
        return self._make(call, lambda: real(source, target, **options))

    def _open(self, path: Any, flags: int, *arguments: Any, **options: Any) -> Any:
        with self.unseen():
            is_new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        kind = "create" if is_new else "open"
        return self._at(kind, "open", path, flags, *arguments, **options)

    def _on(self, call: Call | None, name: str, *arguments: Any) -> Any:
        real = self._real[name]
        return real(*arguments) if call is None else self._make(call, lambda: real(*arguments))

    def _dup(self, number: int) -> Any:
        path = self._descriptor(number)
        return self._on(None if path is None else Call("dup", path), "dup", number)

    def _fsync(self, number: int) -> Any:
        path = self._descriptor(number)
        if path is None:
            return self._real["fsync"](number)
        is_directory = stat.S_ISDIR(os.fstat(number).st_mode)
        call = Call("sync_directory" if is_directory else "sync_file", path)
        return self._make(call, lambda: None)

    def _ftruncate(self, number: int, size_bytes: int) -> Any:
        path = self._descriptor(number)
        call = None if path is None else Call("truncate", path, size_bytes=size_bytes)
        return self._on(call, "ftruncate", number, size_bytes)

    def _posix_fallocate(self, number: int, offset: int, length: int) -> Any:
        path = self._descriptor(number)
        call = None if path is None else Call("allocate", path, size_bytes=offset + length)
        return self._on(call, "posix_fallocate", number, offset, length)

    def _pwrite(self, number: int, content: Any, offset: int) -> Any:
        path = self._descriptor(number)
        if path is None:
            return self._real["pwrite"](number, content, offset)
        return self.write(path, offset, content, lambda part: self._real["pwrite"](
            number, part, offset))  # fmt: skip

    def _preadv(self, number: int, buffers: Sequence[Any], offset: int, *flags: int) -> Any:
        path = self._descriptor(number)
        call = None if path is None else Call("read", path)
        return self._on(call, "preadv", number, buffers, offset, *flags)

    def _fdopen(self, number: int, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        path = self._descriptor(number)
        if path is None or "b" not in mode or arguments or options:
            return self._real["fdopen"](number, mode, *arguments, **options)
        raw = _WatchedFile(number, mode, self)
        if "+" in mode:
            return io.BufferedRandom(raw)
        return io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)

    def _mmap(self, number: int, *arguments: Any, **options: Any) -> Any:
        path = None if number < 0 else self._descriptor(number)
        if path is None:
            return self._map(number, *arguments, **options)
        return self._make(Call("map", path), lambda: self._map(number, *arguments, **options))

    def write(
        self, path: str, offset: int, content: Any, carry_out: Callable[[memoryview], int]
    ) -> int:
        """Write to a watched file, all or half of it."""
        view = memoryview(content).cast("B")
        call = Call("write", path, offset=offset, content=bytes(view))
        if self.shortens(call):
            view = view[: max(1, len(view) // 2)]
            call = Call("write", path, offset=offset, content=bytes(view))
        count: int = self._make(call, lambda: carry_out(view))
        return count

    def read(self, number: int, carry_out: Callable[[], Any]) -> Any:
        """Read from a file that was watched when it was opened."""
        path = self._descriptor(number)
        return carry_out() if path is None else self._make(Call("read", path), carry_out)

    def path_of(self, number: int) -> str | None:
        """Return the path of an open file that is watched."""
        return self._descriptor(number)


_NAMES = ("mkdir", "rmdir", "unlink", "scandir", "stat", "lstat", "statvfs", "rename", "link",
          "open", "dup", "fsync", "ftruncate", "posix_fallocate", "pwrite", "preadv",
          "fdopen")  # fmt: skip


class _WatchedFile(io.FileIO):
    """An open file whose reads and writes are calls."""

    def __init__(self, number: int, mode: str, calls: KernelCalls) -> None:
        super().__init__(number, mode.replace("b", ""))
        self._calls = calls

    def write(self, content: Any) -> int:
        path = self._calls.path_of(self.fileno())
        if path is None:
            return super().write(content)
        is_appending = "a" in self.mode
        offset = os.fstat(self.fileno()).st_size if is_appending else self.tell()
        return self._calls.write(path, offset, content, super().write)

    def readinto(self, buffer: Any) -> int:
        count: int = self._calls.read(self.fileno(), lambda: io.FileIO.readinto(self, buffer))
        return count

    def readall(self) -> bytes:
        content: bytes = self._calls.read(self.fileno(), lambda: io.FileIO.readall(self))
        return content


def tree_of(root: Path) -> Tree:
    """Return all that lies below a directory by relative name: bytes, or None for a directory."""
    found: Tree = {}
    if not root.is_dir():
        return found
    for path in sorted(root.rglob("*")):
        found[str(path.relative_to(root))] = None if path.is_dir() else path.read_bytes()
    return found


def plant(root: Path, tree: Tree) -> None:
    """Make a directory hold exactly this, which was seen or computed before."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(0o700, parents=True)
    for name, content in sorted(tree.items()):
        path = root / name
        if content is None:
            path.mkdir(0o700, exist_ok=True)
        else:
            path.write_bytes(content)
            path.chmod(0o600)
