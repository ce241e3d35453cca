"""Where checkpoints are kept: the storage protocol, what keeps it, and the store on top of it.

`open_storage` is where a new kind of storage is added.
"""

from __future__ import annotations

from pathlib import Path

from holdfast.filesystem import Filesystem
from holdfast.storage.backend import Storage
from holdfast.storage.posix import PosixStorage


def open_storage(root: Path, filesystem: Filesystem) -> Storage:
    """Return the storage of a place that checkpoints are read from or written to.

    The place need not exist. If it is a link, it is followed; no link inside it is.
    """
    return PosixStorage(root, filesystem)
