"""What the kernel holds of a file already, and what it should fetch next.

Owns copying from the page cache without a system call for each run of bytes: mapped pages are
copied at the speed of memory, which `preadv` does not reach. Promises to touch a mapping only after
the kernel has brought all of it in, so that a bad disk is an error of the ordinary read that the
caller falls back to, and not a signal that ends the process. Takes no advice badly: where something
is not to be had, the answer is no.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO

import numpy as np

_POPULATE_READ = 22
"""Linux 5.14: bring pages in, or say why not. The mmap module has no name for it."""
_REFUSALS = (OSError, ValueError, AttributeError)
"""Not cached, too short, a stream in memory, or another system."""


def copy_cached(stream: BinaryIO, offset: int, views: Sequence[memoryview]) -> bool:
    """Fill buffers in order from a file offset, a multiple of the page size; False: read them."""
    size_bytes = sum(map(len, views))
    try:
        descriptor = stream.fileno()
        for position in (offset, offset + size_bytes - 1):
            if os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT) != 1:
                return False
        pages = mmap.mmap(
            descriptor, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=offset
        )
    except _REFUSALS:
        return False
    with pages:
        try:
            pages.madvise(_POPULATE_READ)
        except _REFUSALS:
            return False
        source = np.frombuffer(pages, np.uint8)
        position = 0
        for view in views:
            np.copyto(np.frombuffer(view, np.uint8), source[position : position + len(view)])
            position += len(view)
        del source  # or the mapping could not be closed
    return True


def announce(stream: BinaryIO, offset: int, size_bytes: int) -> None:
    """Tell the kernel what is read soon, unless it has it: by itself it may read ahead too little.

    Asking first, since advice walks all the pages that are there.
    """
    with suppress(*_REFUSALS):
        try:
            os.preadv(stream.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            os.posix_fadvise(stream.fileno(), offset, size_bytes, os.POSIX_FADV_WILLNEED)
