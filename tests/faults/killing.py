"""Processes that are killed at a chosen step, and the forks that make hundreds of them cheap.

Owns a file system that sends SIGKILL to its own process before its n-th step, and a fork that runs
a function to its end or its death. Promises that nothing tidies up after the kill: no exception is
raised and no handler runs. A fork must come from a process without threads.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, NoReturn, TypeVar

from holdfast.filesystem import DirectoryEntry, Filesystem, LocalFilesystem

T = TypeVar("T")


class KillingFilesystem:
    """A real file system that kills its process before one of its steps, counted from 1.

    Every method is a step, and so is every write to a new file that reaches the system, and its
    close: what is still in the process's buffer then dies with it.
    """

    def __init__(self) -> None:
        self._inner: Filesystem = LocalFilesystem()
        self._lock = threading.Lock()
        self._kill_at: int | None = None
        self.steps: list[str] = []
        """What was done since it was armed, or since the beginning."""

    def arm(self, kill_at: int | None) -> None:
        """Count from here, and kill before that step; None: never."""
        self.steps.clear()
        self._kill_at = kill_at

    def count(self, step: str) -> None:
        """Take part in the count, or die."""
        with self._lock:
            self.steps.append(step)
            if len(self.steps) == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def make_directory(self, path: Path) -> None:
        self.count(f"make_directory {path.name}")
        self._inner.make_directory(path)

    def open_new(self, path: Path) -> BinaryIO:
        self.count(f"open_new {path.name}")
        with self._inner.open_new(path) as stream:
            counted = _CountedFile(os.dup(stream.fileno()), self, path.name)
        return io.BufferedRandom(counted)

    def sync_file(self, path: Path, stream: Any) -> None:
        self.count(f"sync_file {path.name}")
        self._inner.sync_file(path, stream)

    def sync_directory(self, path: Path) -> None:
        self.count(f"sync_directory {path.name}")
        self._inner.sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self.count(f"rename {source.name} {target.name}")
        self._inner.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self.count(f"link {target.name}")
        self._inner.link(source, target)

    def remove_file(self, path: Path) -> None:
        self.count(f"remove_file {path.name}")
        self._inner.remove_file(path)

    def remove_directory(self, path: Path) -> None:
        self.count(f"remove_directory {path.name}")
        self._inner.remove_directory(path)

    def list_directory(self, path: Path) -> list[DirectoryEntry]:
        self.count(f"list_directory {path.name}")
        return self._inner.list_directory(path)

    def open_existing(self, path: Path) -> BinaryIO:
        self.count(f"open_existing {path.name}")
        return self._inner.open_existing(path)

    def size_bytes(self, path: Path) -> int:
        self.count(f"size_bytes {path.name}")
        return self._inner.size_bytes(path)

    def is_directory(self, path: Path) -> bool:
        self.count(f"is_directory {path.name}")
        return self._inner.is_directory(path)


class _CountedFile(io.FileIO):
    """A new file whose writes, as they reach the system, and whose close count."""

    def __init__(self, descriptor: int, filesystem: KillingFilesystem, name: str) -> None:
        super().__init__(descriptor, "r+b")
        self._filesystem = filesystem
        self._written_name = name

    def write(self, content: Any) -> int:
        self._filesystem.count(f"write {self._written_name}")
        return super().write(content)

    def close(self) -> None:
        if not self.closed:
            self._filesystem.count(f"close {self._written_name}")
        super().close()


@dataclass(frozen=True)
class Ending(Generic[T]):
    """How a fork ended: with a value, or by a signal."""

    value: T | None = None
    signal: signal.Signals | None = None


def in_fork(function: Callable[[], T]) -> Ending[T]:
    """Run a function in a fork and wait for it; only SIGKILL is a legitimate other end.

    Raises:
        AssertionError: the function raised, with its traceback.
    """
    reading, writing = os.pipe()
    random_state = random.getstate()
    pid = os.fork()
    if pid == 0:
        random.setstate(random_state)  # python seeds it anew in every fork
        _run_and_exit(function, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        content = stream.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the fork died by {status}"
        return Ending(signal=signal.SIGKILL)
    kind, value = pickle.loads(content)
    assert kind == "value", f"the fork raised:\n{value}"
    return Ending(value=value)


def _run_and_exit(function: Callable[[], Any], writing: int) -> NoReturn:
    try:
        outcome = ("value", function())
    except BaseException:  # noqa: BLE001  # told to the parent, which raises
        outcome = ("error", traceback.format_exc())
    with os.fdopen(writing, "wb") as stream:
        stream.write(pickle.dumps(outcome))
    os._exit(0)
