"""One shard of the local tier as bytes on their way: out of memory, out of a file, into a file.

Owns how an image and its tail become one stream and a stream becomes a file again. Promises that a
received shard is sealed only if every block of its body, its footer and its tail are those that
were sent, and are of the commit that was expected. Knows no ranks and no names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from holdfast.digests import BLOCK_BYTES, describe_body, footer_size, make_footer
from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import Filesystem, naming, read_into
from holdfast.tiers.local.tail import Tail, parse_tail
from holdfast.tiers.local.turns import TurnFile


class MemoryShard:
    """A shard whose image lies in memory; empty for a copy of the small states."""

    block_bytes = BLOCK_BYTES

    def __init__(self, image: memoryview, body_bytes: int, tail: bytes) -> None:
        self.body_bytes = body_bytes
        self.size_bytes = len(image) + len(tail)
        self._image = image
        self._tail = memoryview(tail)

    def view(self, offset: int, length: int) -> memoryview | None:
        """Return bytes of the image; None: part of them are the tail's."""
        inside = offset + length <= len(self._image)
        return self._image[offset : offset + length] if inside else None

    def read_into(self, offset: int, target: memoryview) -> None:
        """Copy bytes from where they lie."""
        inside = max(min(len(self._image) - offset, len(target)), 0)
        if inside:
            target[:inside] = self._image[offset : offset + inside]
        start = max(offset - len(self._image), 0)
        target[inside:] = self._tail[start : start + len(target) - inside]


class FileShard:
    """A published shard file."""

    block_bytes = BLOCK_BYTES

    def __init__(self, filesystem: Filesystem, path: Path, body_bytes: int) -> None:
        """Open it; what cannot be opened is sent as nothing, which no receiver takes for a shard.

        Who should send must not stay away: the receiver waits.
        """
        self.body_bytes = body_bytes
        self.path = path
        self.size_bytes = 0
        self._stream: BinaryIO | None = None
        with suppress(OSError):
            self._stream = filesystem.open_existing(path)
            self.size_bytes = os.fstat(self._stream.fileno()).st_size

    def view(self, offset: int, length: int) -> memoryview | None:
        """Nothing of a file is in memory that could be relied on."""
        return None

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read bytes; those behind an end that came too early are zeros, and no digest fits."""
        assert self._stream is not None, "of nothing no byte is asked for"
        with naming(self.path):
            filled = read_into(self._stream, offset, [target])
        target[filled:] = bytes(len(target) - filled)

    def close(self) -> None:
        """Close it."""
        if self._stream is not None:
            self._stream.close()


class ReceivedShard:
    """A shard that arrives and becomes a file, under a pending name until it is published."""

    def __init__(self, take: Callable[[int], TurnFile]) -> None:
        self.size_bytes = 0
        self.file: TurnFile | None = None
        self.error: Exception | None = None
        """What went wrong on the way, here."""
        self._take = take
        self._body_bytes = 0
        self._digests: list[bytes] = []
        self._rest = bytearray()
        """What followed the body: footer and tail."""

    def begin(self, size_bytes: int, body_bytes: int) -> None:
        """Take a file for so many bytes.

        Raises:
            OSError: there is no room.
        """
        self.size_bytes, self._body_bytes = size_bytes, body_bytes
        self.file = self._take(_image_bytes(body_bytes))

    def put(self, offset: int, block: memoryview) -> None:
        """Write and digest the next block.

        Raises:
            OSError: it cannot be written.
        """
        assert self.file is not None
        inside = max(min(self._body_bytes - offset, len(block)), 0)
        if inside:
            self._digests.append(xxhash.xxh3_128_digest(block[:inside]))
        self._rest += block[inside:]
        self.file.write_at(offset, block)

    def seal(self, run_id: str, commit: tuple[int, int, int], owner: int) -> Tail:
        """Return the tail of the whole file, all of it verified.

        Raises:
            CorruptCheckpointError: it is not what was to be sent.
            OSError: it could not be written, on the way.
        """
        if self.error is not None:
            raise self.error
        assert self.file is not None
        path, body_bytes = str(self.file.path), self._body_bytes
        footer_bytes = _image_bytes(body_bytes) - body_bytes
        tail = parse_tail(bytes(self._rest[footer_bytes:]), path)
        record = tail.record
        if (record.run_id, record.commit, record.owner) != (run_id, commit, owner):
            raise CorruptCheckpointError(path, "another shard arrived than was to be sent")
        if body_bytes != (record.body_bytes if record.is_whole else 0):
            raise CorruptCheckpointError(path, "another part of the shard arrived than was sent")
        if record.is_whole and (
            self._rest[:footer_bytes] != make_footer(body_bytes, self._digests)
            or describe_body(path, body_bytes, self._digests).digest != record.digest
        ):
            raise CorruptCheckpointError(path, "the bytes that arrived do not match their digests")
        return tail


def _image_bytes(body_bytes: int) -> int:
    return body_bytes + footer_size(body_bytes) if body_bytes else 0
