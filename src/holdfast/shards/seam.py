"""torch's idea of a file system, carried out by ours.

Owns the adapter through which torch.distributed.checkpoint's own reader reaches a disk. Promises
that no byte of its goes past the `Filesystem` seam, and that it cannot write. Decides nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from io import IOBase
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem

from holdfast.filesystem import Filesystem, naming


class SeamFileSystem(FileSystem):
    """What torch calls on a file system, and no more than it calls."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[IOBase]:
        if mode != "rb":
            raise OSError(errno.EROFS, "only for reading", str(path))
        with naming(Path(path)), self._filesystem.open_existing(Path(path)) as stream:
            yield cast(IOBase, stream)

    def exists(self, path: Any) -> bool:
        try:
            self._filesystem.size_bytes(Path(path))
        except FileNotFoundError:
            return False
        return True
