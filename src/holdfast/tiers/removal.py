"""Delete the files of checkpoints that retention took off the list, each rank its share.

Promises that rank 0 deletes what no other rank does, and that a link to a checkpoint elsewhere is
removed itself, never what it points to. What cannot be deleted is left for the next sweep.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.format.plan import shard_name
from holdfast.storage.backend import Storage

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"__[0-9]+_[0-9]+\.distcp")
_SHARES_SECONDS = 10.0
"""How long rank 0 leaves the other ranks their share."""


@dataclass(frozen=True)
class Removed:
    """A checkpoint that retention took off the list."""

    iteration: int
    left: str
    """The name under which its files still are."""
    world_size: int
    """Of the job that wrote it."""


def remove_share(storage: Storage, removed: Sequence[Removed], rank: int, ranks: int) -> None:
    """Delete this rank's share; rank 0 also the rest, once the others are done or slow."""
    for each in removed:
        files = storage.under(each.left)
        try:
            if storage.has_group(each.left):
                for number in range(rank, each.world_size, ranks):
                    files.delete(shard_name(number))
                if rank == 0:
                    _remove_rest(storage, each.left)
            elif rank == 0:  # only the name of a checkpoint that was moved to an archive
                storage.delete(each.left)
        except OSError as error:
            where = storage.where(each.left)
            logger.warning("%s is left behind for the next save to sweep: %s", where, error)


def _remove_rest(storage: Storage, left: str) -> None:
    until = time.monotonic() + _SHARES_SECONDS
    files = storage.under(left)
    while time.monotonic() < until and any(_SHARD.fullmatch(each.name) for each in files.list()):
        time.sleep(0.02)
    try:
        storage.delete(left)
    except FileNotFoundError:  # another rank was faster
        storage.delete(left)
