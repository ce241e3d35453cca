"""Digests of a file, block by block: part of on-disk format 2.

Owns the digest of a file (xxh3-128 over the concatenated xxh3-128 digests of its 8 MiB blocks) and
where the block digests are stored: in the manifest, or, for a shard file, in the footer after the
body that they cover. Promises that a changed byte anywhere in a file, footer included, is found and
reported as a byte range. Knows no file system: it reads streams.

Digests are made where bytes are written: blocks of shards in `snapshot.shard` and, as they arrive
from another rank, in `tiers.local.shards`; small files in `Store.write_file`. They are compared
where bytes are read: blocks in `read.direct`; blocks fetched from another rank in
`tiers.local.peers`, and whole copies in `tiers.local.shards`; small files in `tiers.opening`; all
files in `verify_files` of `storage.store`. Records with a digest of their own: manifests and
attempts through `seal` and `unseal` of `storage.manifest`; trailers of local shards, with the small
states in them, in `tiers.local.shard_file`.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import xxhash

from holdfast.errors import CorruptCheckpointError

BLOCK_BYTES = 8 << 20
ALIGNMENT_BYTES = 4096
"""Bodies and footers are multiples of it, so that they can be written past the page cache."""
DIGEST_BYTES = 16
_TRAILER = struct.Struct("<16sQQ")
"""The end of a footer: the mark, the size of the body in bytes, the number of its blocks."""
_MARK = b"holdfast shard 1"


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    path: str
    """Relative to the checkpoint, with forward slashes."""
    size_bytes: int
    digest: str
    """32 hexadecimal digits."""
    blocks: tuple[str, ...] | None
    """The digest of each 8 MiB block, in file order; the last may be shorter. None: they are in the
    file's own footer, and cover the body before it."""


def pack_records(records: Sequence[FileRecord]) -> bytes:
    """Return a compact form to send: column by column, in which paths and sizes are regular."""
    columns = (
        [each.path for each in records],
        [each.size_bytes for each in records],
        [each.digest for each in records],
        [each.blocks for each in records],
    )
    return zlib.compress(json.dumps(columns).encode())


def unpack_records(content: bytes) -> tuple[FileRecord, ...]:
    """Return the records that `pack_records` was given."""
    return tuple(
        FileRecord(path, size_bytes, digest, None if blocks is None else tuple(blocks))
        for path, size_bytes, digest, blocks in zip(
            *json.loads(zlib.decompress(content)), strict=True
        )
    )


@dataclass(frozen=True)
class Difference:
    """Where a file first differs from its record."""

    reason: str
    byte_range: tuple[int, int] | None = None
    """The first and the last byte of the block; None: it does not concern one block."""

    def __str__(self) -> str:
        return self.reason

    @classmethod
    def in_block(cls, number: int, first: int, last: int) -> Difference:
        """Describe a block whose bytes are not what was committed."""
        reason = f"block {number} (bytes {first}-{last}) does not match its digest"
        return cls(reason, (first, last))

    def as_error(self, path: str, names: str = "") -> CorruptCheckpointError:
        """Return the error of a file that differs. `names`: which tensors are there, if known."""
        return CorruptCheckpointError(path, self.reason + names, self.byte_range)


class DifferenceError(Exception):
    """A file differs, found while reading its block digests; readers never let this escape."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(difference.reason)
        self.difference = difference


@dataclass(frozen=True)
class Blocks:
    """The block digests of one file, verified to be those committed."""

    covered_bytes: int
    """Bytes from the start of the file that the digests cover; a footer follows."""
    digests: Sequence[str]

    def place(self, number: int) -> range:
        """Return the bytes of one block."""
        start = number * BLOCK_BYTES
        return range(start, min(start + BLOCK_BYTES, self.covered_bytes))

    def compare(self, number: int, pieces: Iterable[memoryview]) -> Difference | None:
        """Return how a block differs, given in pieces in order; None: it is what was committed."""
        if matches(pieces, self.digests[number]):
            return None
        place = self.place(number)
        return Difference.in_block(number, place.start, place.stop - 1)


def describe_content(path: str, content: bytes) -> FileRecord:
    """Return the record of a file with this content under a relative path."""
    view = memoryview(content)
    digests = [
        xxhash.xxh3_128_digest(view[start : start + BLOCK_BYTES])
        for start in range(0, len(content), BLOCK_BYTES)
    ]
    return FileRecord(
        path, len(content), _root_digest(digests), tuple(digest.hex() for digest in digests)
    )


def describe_body(path: str, body_bytes: int, digests: Sequence[bytes]) -> FileRecord:
    """Return the record of a file that is a body and the footer with its block digests."""
    return FileRecord(path, body_bytes + footer_size(body_bytes), _root_digest(digests), None)


def footer_size(body_bytes: int) -> int:
    """Return the size of the footer of a body, in bytes."""
    table_bytes = block_count(body_bytes) * DIGEST_BYTES
    return round_up(table_bytes + _TRAILER.size, ALIGNMENT_BYTES)


def make_footer(body_bytes: int, digests: Sequence[bytes]) -> bytes:
    """Return the footer of a body: digests of 16 bytes, zeros, and the trailer."""
    assert len(digests) == block_count(body_bytes)
    table = b"".join(digests)
    trailer = _TRAILER.pack(_MARK, body_bytes, len(digests))
    return table.ljust(footer_size(body_bytes) - len(trailer), b"\0") + trailer


def read_blocks(record: FileRecord, stream: BinaryIO) -> Blocks:
    """Return the block digests of a file, from its record or from its footer.

    Raises:
        DifferenceError: the footer is not the one that was committed.
        OSError: it cannot be read.
    """
    if record.blocks is not None:
        return Blocks(record.size_bytes, record.blocks)
    start = max(record.size_bytes - _TRAILER.size, 0)
    stream.seek(start)
    trailer = stream.read(_TRAILER.size)
    if len(trailer) == _TRAILER.size:
        mark, body_bytes, _ = _TRAILER.unpack(trailer)
        # The manifest's size decides how much is read, not this number, which may be damaged.
        if mark == _MARK and body_bytes + footer_size(body_bytes) == record.size_bytes:
            stream.seek(body_bytes)
            footer = stream.read(record.size_bytes - body_bytes)
            table = footer[: block_count(body_bytes) * DIGEST_BYTES]
            digests = [table[at : at + DIGEST_BYTES] for at in range(0, len(table), DIGEST_BYTES)]
            if (
                _root_digest(digests) == record.digest
                and len(digests) == block_count(body_bytes)
                and footer == make_footer(body_bytes, digests)
            ):
                return Blocks(body_bytes, tuple(digest.hex() for digest in digests))
    raise DifferenceError(
        Difference(
            f"the footer (up to byte {record.size_bytes - 1}) does not match its digest",
            (start, record.size_bytes - 1),
        )
    )


def body_bytes_of(stream: BinaryIO) -> int | None:
    """Return the size of the body that a file with a footer claims to have; None: it has none."""
    size_bytes = stream.seek(0, io.SEEK_END)
    stream.seek(max(size_bytes - _TRAILER.size, 0))
    trailer = stream.read(_TRAILER.size)
    if len(trailer) != _TRAILER.size:
        return None
    mark, body_bytes, _ = _TRAILER.unpack(trailer)
    found = mark == _MARK and body_bytes + footer_size(body_bytes) == size_bytes
    return int(body_bytes) if found else None


def find_difference(record: FileRecord, stream: BinaryIO) -> Difference | None:
    """Return where a stream first differs from its record; None: it does not."""
    try:
        expected = read_blocks(record, stream)
    except DifferenceError as error:
        return error.difference
    in_footer = record.blocks is None
    stream.seek(0)
    position = 0
    limit_bytes = expected.covered_bytes if in_footer else None
    for count, block in enumerate(_blocks(stream, record.size_bytes + 1, limit_bytes)):
        if count >= len(expected.digests):
            return Difference(f"is longer than the {record.size_bytes} bytes committed")
        if not matches([block], expected.digests[count]):
            return Difference.in_block(count, position, position + len(block) - 1)
        position += len(block)
    if in_footer:
        stream.seek(record.size_bytes)
        if stream.read(1):
            return Difference(f"is longer than the {record.size_bytes} bytes committed")
    if position != expected.covered_bytes:
        return Difference(f"has {position} bytes, {record.size_bytes} were committed")
    if not in_footer and _root_digest([*map(bytes.fromhex, expected.digests)]) != record.digest:
        return Difference("its block digests do not match its digest")
    return None


def matches(pieces: Iterable[memoryview], digest: str) -> bool:
    """Whether the pieces of one block, in order, have this digest."""
    found = xxhash.xxh3_128()
    for each in pieces:
        found.update(each)
    return found.hexdigest() == digest


def block_count(size_bytes: int) -> int:
    """Return the number of blocks in `size_bytes`."""
    return -(-size_bytes // BLOCK_BYTES)


def round_up(size_bytes: int, multiple: int) -> int:
    """Round up to the next multiple."""
    return -(-size_bytes // multiple) * multiple


def _blocks(
    stream: BinaryIO, expected_bytes: int, limit_bytes: int | None = None
) -> Iterator[memoryview]:
    """Yield the stream in blocks of 8 MiB through one buffer; each is valid until the next.

    `expected_bytes`: if less than a block, the buffer and all blocks have this size.
    `limit_bytes`: where to stop. None: at the end.
    """
    buffer = bytearray(min(BLOCK_BYTES, expected_bytes))
    view = memoryview(buffer)
    position = 0
    while True:
        rest = len(buffer) if limit_bytes is None else limit_bytes - position
        target = min(len(buffer), rest)
        filled = 0
        while filled < target:
            count = stream.readinto(view[filled:target])  # type: ignore[attr-defined]  # BinaryIO lacks it
            if not count:
                break
            filled += count
        if filled:
            yield view[:filled]
        position += filled
        if filled < len(buffer):
            return


def _root_digest(digests: Sequence[bytes]) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(digests))
