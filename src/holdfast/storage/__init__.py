"""Where checkpoints are kept: the storage protocol, what keeps it, and the store on top of it.

A filesystem does single steps on mounted directories; a storage keeps bytes under names, and a
directory is one kind of it; a store is one storage with checkpoints in it. The local tier's files
are mapped memory, and always in directories.

A new kind of storage implements `backend` and is chosen in `open_storage`, for the persistent tier
and for loads. Until now every root is a path: one that is none also passes by `with_expanded_paths`
in `config`, `Tiers.__init__` in `tiers.routing`, the checks of `tiers.places`, and `tiers.search`,
which compares it with the run's own. Roots and paths are kept as `Path` in `storage.store` and
`tiers.survey`, and `open_tensors` in `tiers.opening` and `cli` take a path that a user names.
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
