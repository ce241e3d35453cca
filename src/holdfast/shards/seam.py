"""torch's idea of a file system, carried out by ours.

Owns the adapter through which torch.distributed.checkpoint's own reader and writer reach a disk.
Promises that no byte of theirs goes past the `Filesystem` seam. Decides nothing.
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
        opener = self._filesystem.open_new if mode == "wb" else self._filesystem.open_existing
        with naming(Path(path)), opener(Path(path)) as stream:
            yield cast(IOBase, stream)

    def exists(self, path: Any) -> bool:
        try:
            self._filesystem.size_bytes(Path(path))
        except FileNotFoundError:
            return False
        return True

    def rename(self, path: Any, new_path: Any) -> None:
        self._filesystem.rename(Path(path), Path(new_path))

    def mkdir(self, path: Any) -> None:
        # torch would create it where it is missing; but rank 0 has, and a rank that does not see
        # it would write to a disk of its own what nobody else could ever read.
        if not self._filesystem.is_directory(Path(path)):
            reason = (
                "rank 0 has created this directory, but it is not here; "
                "checkpoint.persistent.directory must be on a file system that all ranks share"
            )
            raise FileNotFoundError(errno.ENOENT, reason, str(path))

    def rm_file(self, path: Any) -> None:
        self._filesystem.remove_file(Path(path))
