"""A shard file of the local tier in memory, and ends of a stream that carries a few bytes.

Owns a record, its small states and the whole file that they end, and a source and a sink whose
blocks are so small that a few bytes are many of them. Knows no files and no ranks.
"""

from __future__ import annotations

import errno
import os

from holdfast.tiers.local.shard_file import PART_NAMES, ShardRecord, Trailer

RECORD = ShardRecord(
    run_id="run",
    attempt=2,
    sequence=7,
    iteration=12_345_678,
    world_size=2,
    nodes=(0, 1),
    plan="ab" * 16,
    state_names=9,
    owner=1,
    structure="cd" * 16,
    body_bytes=4096,
    digest="ef" * 16,
)
PARTS = {name: name.encode() * 3 + b"\n\x00" for name in PART_NAMES}
TAIL = Trailer(RECORD, PARTS)
FILE = bytes(RECORD.image_bytes) + TAIL.to_bytes()


class Letters:
    """A source of small messages, so that a few bytes are many blocks."""

    def __init__(self, content: bytes, block_bytes: int = 3, fails_at: int | None = None) -> None:
        self.content = content
        self.size_bytes = len(content)
        self.body_bytes = 0
        self.block_bytes = block_bytes
        self._fails_at = fails_at

    def view(self, offset: int, length: int) -> memoryview | None:
        return None

    def read_into(self, offset: int, target: memoryview) -> None:
        if self._fails_at is not None and offset >= self._fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "source")
        target[:] = self.content[offset : offset + len(target)]


class Collected:
    """A sink in memory that fails, if asked to, at an offset."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.content = bytearray()
        self._fails_at = fails_at

    def begin(self, size_bytes: int, body_bytes: int) -> None:
        assert not self.content

    def put(self, offset: int, block: memoryview) -> None:
        assert offset == len(self.content)
        if self._fails_at is not None and offset >= self._fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "sink")
        self.content += block
