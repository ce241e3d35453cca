"""The file system interface that `DefaultCheckpointManager(filesystem=...)` takes.

`Filesystem` is the protocol; `LocalFilesystem` carries it out on mounted file systems, and is what
to derive from for faults in tests. Both are defined in `holdfast.storage.posix`.
"""

from __future__ import annotations

from holdfast.storage.posix import Filesystem, LocalFilesystem

__all__ = ["Filesystem", "LocalFilesystem"]
