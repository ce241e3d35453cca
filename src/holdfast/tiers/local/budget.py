"""What the local tier will take of a node, told before training starts.

Owns the sum (each rank's shard, times the files that take turns, plus the copies it holds for
others) and what it is held against: the room in the directory and, where that is RAM, what memory
is left. Promises one line for people and, where it cannot fit, an error with the numbers. Allocates
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import ConfigError
from holdfast.shards.memory import Room, find_room

_GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """What one place of the local tier needs, and has."""

    directory: str
    own_bytes: int
    """Of the files of its ranks' own shards, all turns together."""
    copy_bytes: int
    """Of the copies that its ranks hold for others, all turns together."""
    turns: int
    room: Room | None
    """The tightest limit; None: the system does not say."""

    @property
    def needed_bytes(self) -> int:
        """Of all files at once."""
        return self.own_bytes + self.copy_bytes

    @property
    def line(self) -> str:
        """The sum in words."""
        room = "" if self.room is None else f" of {_size(self.room.free_bytes)} free"
        return (
            f"local tier at {self.directory}: {_size(self.needed_bytes)}{room} "
            f"({self.turns} files in turn: own shards {_size(self.own_bytes)}, copies "
            f"for others {_size(self.copy_bytes)})"
        )

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            ConfigError: with the numbers.
        """
        if self.room is None or self.needed_bytes <= self.room.free_bytes:
            return
        advice = "lower local.keep.last or local.replication.factor, or name a larger directory"
        limit = f"limited by {self.room.limited_by}"
        raise ConfigError([f"checkpoint.local: {self.line}; {limit}; {advice}"])


def _size(size_bytes: int) -> str:
    if size_bytes >= _GIB:
        return f"{size_bytes / _GIB:.2f} GiB"
    return f"{size_bytes / 2**20:.1f} MiB"


def find_budget(
    directory: Path,
    image_bytes: Sequence[int],
    held: Sequence[Sequence[int]],
    turns: int,
    *,
    in_memory: bool,
) -> Budget:
    """Return the budget of one place from its ranks' image sizes, and those of copies they hold."""
    own = turns * sum(image_bytes)
    copies = turns * sum(size for sizes in held for size in sizes)
    taken = _taken_bytes(directory)
    found = os.statvfs(directory)
    rooms = [Room(found.f_bavail * found.f_frsize + taken, "the free space of the directory")]
    if in_memory and (memory := find_room()) is not None:
        rooms.append(Room(memory.free_bytes + taken, memory.limited_by))
    tightest = min(rooms, key=lambda each: each.free_bytes)
    return Budget(str(directory), own, copies, turns, tightest)


def _taken_bytes(directory: Path) -> int:
    """Return what files under a directory take already: their room will be used again."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                continue
    return total
