"""The shard files in one rank's directory: its own and the copies it holds for others.

Owns publishing, listing and pruning in that directory, and the conversion of a shard (in memory or
in a file) to a stream and back to a file. Promises that a received shard is sealed only if every
block of its body, its footer and its trailer are those that were sent and belong to the expected
commit, and that nothing of a save counts before it is published. Knows no other rank's directory.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import Filesystem, naming
from holdfast.ranks.topology import Topology
from holdfast.storage.digests import BLOCK_BYTES, describe_body, footer_size, make_footer
from holdfast.storage.posix import read_into
from holdfast.tiers.local.availability import Commit
from holdfast.tiers.local.pool import BufferPool, PooledFile
from holdfast.tiers.local.shard_file import Found, RunDirectory, ShardRecord, Trailer, parse_trailer

_POPULATE_READ = 22
"""MADV_POPULATE_READ, which Python's mmap does not name: map pages now."""


class MemoryShard:
    """A shard whose image is in memory; empty for a copy of the small states."""

    block_bytes = BLOCK_BYTES

    def __init__(self, image: memoryview, body_bytes: int, trailer: bytes) -> None:
        self.body_bytes = body_bytes
        self.size_bytes = len(image) + len(trailer)
        self._image = image
        self._trailer = memoryview(trailer)

    def view(self, offset: int, length: int) -> memoryview | None:
        """Return bytes of the image; None: part of them belong to the trailer."""
        inside = offset + length <= len(self._image)
        return self._image[offset : offset + length] if inside else None

    def read_into(self, offset: int, target: memoryview) -> None:
        """Copy bytes of the image and the trailer."""
        inside = max(min(len(self._image) - offset, len(target)), 0)
        if inside:
            target[:inside] = self._image[offset : offset + inside]
        start = max(offset - len(self._image), 0)
        target[inside:] = self._trailer[start : start + len(target) - inside]


class FileShard:
    """A published shard file."""

    block_bytes = BLOCK_BYTES

    def __init__(self, filesystem: Filesystem, path: Path, body_bytes: int) -> None:
        """Open it; a file that cannot be opened is sent as zero bytes, which receivers reject.

        The sender must take part all the same, since the receiver waits for it.
        """
        self.body_bytes = body_bytes
        self.path = path
        self.size_bytes = 0
        self._stream: BinaryIO | None = None
        with suppress(OSError):
            self._stream = filesystem.open_existing(path)
            self.size_bytes = os.fstat(self._stream.fileno()).st_size

    def view(self, offset: int, length: int) -> memoryview | None:
        """Return None: a file's bytes are not reliably in memory."""
        return None

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read bytes; past the end of a truncated file they are zeros, which fail the digest."""
        assert self._stream is not None, "of nothing no byte is asked for"
        with naming(self.path):
            filled = read_into(self._stream, offset, [target])
        target[filled:] = bytes(len(target) - filled)

    def close(self) -> None:
        """Close it."""
        if self._stream is not None:
            self._stream.close()


class BlockSource:
    """Blocks of several files, one per message; the last block of a file is padded.

    Files in RAM are sent from their mapping, whose pages a thread populates a little ahead, since
    that takes most of the time. Files on a disk are not mapped: a block that cannot be read must be
    an error, not a signal.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        blocks: Sequence[tuple[Path, int]],
        sizes: Sequence[int],
        *,
        in_memory: bool = False,
    ) -> None:
        self.body_bytes = 0
        self.block_bytes = max(sizes)
        self.size_bytes = self.block_bytes * len(blocks)
        self._filesystem = filesystem
        self._blocks = blocks
        self._streams: dict[Path, BinaryIO] = {}
        self._mapped: dict[Path, mmap.mmap] = {}
        self._is_over = False
        self._ahead: threading.Thread | None = None
        if in_memory:
            with suppress(OSError, ValueError):  # gone, or empty: the later read reports it
                for path in {path for path, _ in blocks}:
                    descriptor = self._stream(path).fileno()
                    # Private: torch requires writable memory, though nothing writes to it.
                    self._mapped[path] = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE)
                self._ahead = threading.Thread(target=self._map_ahead, name="holdfast-mapper")
                self._ahead.start()

    def view(self, offset: int, length: int) -> memoryview | None:
        """Return a block of a file in RAM; None: it must be read."""
        path, number = self._blocks[offset // self.block_bytes]
        start = number * BLOCK_BYTES
        mapped = self._mapped.get(path)
        if mapped is None or start + length > len(mapped):
            return None
        return memoryview(mapped)[start : start + length]

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read a block."""
        path, number = self._blocks[offset // self.block_bytes]
        with naming(path):
            read_into(self._stream(path), number * BLOCK_BYTES, [target])

    def close(self) -> None:
        """End the thread and close every file."""
        self._is_over = True
        if self._ahead is not None:
            self._ahead.join()
        self._mapped.clear()
        for stream in self._streams.values():
            stream.close()

    def _stream(self, path: Path) -> BinaryIO:
        if path not in self._streams:
            self._streams[path] = self._filesystem.open_existing(path)
        return self._streams[path]

    def _map_ahead(self) -> None:
        for path, number in self._blocks:
            start, mapped = number * BLOCK_BYTES, self._mapped[path]
            length = min(BLOCK_BYTES, len(mapped) - start)
            if self._is_over or length <= 0:
                return
            with suppress(OSError):  # an older kernel maps pages when they are sent
                mapped.madvise(_POPULATE_READ, start, length)


class ReceivedShard:
    """A shard being received into a file, under a pending name until it is published."""

    def __init__(self, take: Callable[[int], PooledFile]) -> None:
        self.size_bytes = 0
        self.file: PooledFile | None = None
        self.error: Exception | None = None
        """The first local error during the transfer."""
        self._take = take
        self._body_bytes = 0
        self._digests: list[bytes] = []
        self._rest = bytearray()
        """What followed the body: footer and trailer."""

    def begin(self, size_bytes: int, body_bytes: int) -> None:
        """Take a file for the stream.

        Raises:
            OSError: there is not enough space.
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

    def seal(self, run_id: str, commit: tuple[int, int, int], owner: int) -> Trailer:
        """Verify the whole file and return its trailer.

        Raises:
            CorruptCheckpointError: it is not the shard that was expected.
            OSError: it could not be written during the transfer.
        """
        if self.error is not None:
            raise self.error
        assert self.file is not None
        path, body_bytes = str(self.file.path), self._body_bytes
        footer_bytes = _image_bytes(body_bytes) - body_bytes
        trailer = parse_trailer(bytes(self._rest[footer_bytes:]), path)
        record = trailer.record
        if (record.run_id, record.commit, record.owner) != (run_id, commit, owner):
            raise CorruptCheckpointError(path, "another shard arrived than was to be sent")
        if body_bytes != (record.body_bytes if record.is_whole else 0):
            raise CorruptCheckpointError(path, "another part of the shard arrived than was sent")
        if record.is_whole and (
            self._rest[:footer_bytes] != make_footer(body_bytes, self._digests)
            or describe_body(path, body_bytes, self._digests).digest != record.digest
        ):
            raise CorruptCheckpointError(path, "the bytes that arrived do not match their digests")
        return trailer


def _image_bytes(body_bytes: int) -> int:
    return body_bytes + footer_size(body_bytes) if body_bytes else 0


logger = logging.getLogger(__name__)


class ShardDirectory:
    """The shard files of one rank."""

    def __init__(
        self,
        run: RunDirectory,
        rank: int,
        topology: Topology,
        *,
        buffers: int,
        copies: int,
        in_memory: bool,
    ) -> None:
        """`buffers`: files of the own shard; `copies`: copies of other ranks' shards held here."""
        self.run = run
        self.rank = rank
        self.topology = topology
        self.directory = run.rank_directory(rank)
        self.pool = BufferPool(
            self.directory,
            run.filesystem,
            limit=buffers,
            spares=buffers,
            mapped=True,
            in_memory=in_memory,
        )
        """Files of the own shard, reused in rotation where the directory is in RAM."""
        self._copies = BufferPool(
            self.directory, run.filesystem, spares=copies, mapped=False, in_memory=in_memory
        )
        self._in_memory = in_memory
        self._keep = buffers - 1
        self.spared: frozenset[int] = frozenset()
        """Iterations that may be sound but were unreadable when the kept set was agreed."""
        self._fresh: list[tuple[Path, Path | None]] = []
        """Files published since the last commit, each with the file it replaced."""

    # -- list ------------------------------------------------------------------------------------

    def share(self) -> list[int]:
        """Return the rank directories this rank lists: its own, and a share of the orphaned."""
        return [each for each in self.run.ranks() if self.lister(each) == self.rank]

    def lister(self, directory: int) -> int:
        """Return the rank that lists a rank directory of this place."""
        mates = self.topology.place_mates(self.rank)
        return directory if directory in mates else mates[directory % len(mates)]

    def scan(self) -> tuple[Found, ...]:
        """Return every published file in this rank's share."""
        return tuple(self.run.scan(self.share()))

    # -- publish and roll back -------------------------------------------------------------------

    def take(self, size_bytes: int, timeout_seconds: float, kept: Collection[Commit]) -> PooledFile:
        """Return a file for the next shard that has no reader.

        Raises:
            NoFileFreeError: readers held all of them until the timeout.
            OSError: there is not enough space, or leftovers of a failed save cannot be removed.
        """
        if not self.pool.has_free_file:
            self.prune(kept)  # remove leftovers of a failed save or a failed prune
        return self.pool.take(size_bytes, timeout_seconds)

    def sink(self) -> ReceivedShard:
        """Return a sink that receives a shard into a file of this rank."""
        return ReceivedShard(lambda size_bytes: self._copies.take(size_bytes, 0.0))

    def publish(self, pending: Path, record: ShardRecord, file: PooledFile | None) -> None:
        """Publish the own shard, already sealed and synced, under its name."""
        final = self._publish(pending, record)
        if file is not None:
            self.pool.published_as(file, final)

    def publish_received(self, sink: ReceivedShard, trailer: Trailer) -> None:
        """Publish a sealed copy under its name."""
        assert sink.file is not None
        if not self._in_memory:
            sink.file.sync()  # durable before it has the name that counts
        final = self._publish(sink.file.path, trailer.record)
        self._copies.published_as(sink.file, final)

    def _publish(self, pending: Path, record: ShardRecord) -> Path:
        final, replaced = self.run.publish(pending, self.rank, record.iteration, record.owner)
        self._fresh.append((final, replaced))
        if replaced is not None:
            self._rename(final, replaced)
        return final

    def _rename(self, path: Path, target: Path) -> None:
        for pool in (self.pool, self._copies):
            pool.renamed(path, target)

    def sync_names(self) -> None:
        """Make the names durable: without them the bytes cannot be found after a power cut."""
        if not self._in_memory:
            self.run.filesystem.sync_directory(self.directory)

    def settle(self) -> list[tuple[Path, Path | None]]:
        """Return what was published, each with the file it replaced; it is no longer undone."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def take_back(self) -> None:
        """Undo what was published since the last commit."""
        for final, replaced in self.settle():
            try:
                self.retire(final)
                if replaced is not None:
                    self.run.filesystem.rename(replaced, final)
                    self._rename(replaced, final)
            except OSError as error:  # its commit is incomplete and never chosen for a load
                logger.warning("%s is left of a save that failed: %s", final, error)

    def drop(self, pending: Path, file: PooledFile | None) -> None:
        """Free or remove a shard that was not published."""
        if file is not None:
            self.pool.give_back(file)
        else:
            with suppress(OSError):  # published and undone already, or the next start sweeps it
                self.run.filesystem.remove_file(pending)

    def drop_received(self, sink: ReceivedShard) -> None:
        """Free or remove a copy that was not published."""
        if sink.file is not None:
            self._copies.give_back(sink.file)

    # -- prune -----------------------------------------------------------------------------------

    def prune(self, kept: Collection[Commit]) -> None:
        """Remove every published file of this rank's share known not to belong to a kept commit.

        Raises:
            OSError: a file could not be removed; the others were.
        """
        failures = []
        for found in self.scan():
            if self._should_remove(found, kept):
                try:
                    self.retire(self.run.root / found.path)
                except OSError as error:
                    failures.append(error)
        if failures:
            raise failures[0]
        mates = self.topology.place_mates(self.rank)
        self.run.remove_empty([each for each in self.share() if each not in mates])

    def _should_remove(self, found: Found, kept: Collection[Commit]) -> bool:
        if found.too_new is not None:
            return False  # a later version of holdfast wrote it: this one must not remove it
        if found.record is None:
            # Only its name says which shard it may be the last copy of.
            is_kept = found.iteration in {iteration for _, _, iteration in kept}
            return not (found.is_unread and (is_kept or found.iteration in self.spared))
        if found.record.commit in kept:
            return False
        newest_attempt = max((attempt for _, attempt, _ in kept), default=0)
        if found.record.attempt > newest_attempt:
            return False  # a later attempt has taken over: its commits are not ours to remove
        is_spared = found.iteration in self.spared and not self.pool.has(self.run.root / found.path)
        return not is_spared or (len(kept) >= self._keep and found.record.commit < min(kept))

    def discard(self, should_remove: Callable[[ShardRecord], bool]) -> None:
        """Remove the published files of this rank's share whose record satisfies `should_remove`.

        Raises:
            OSError: a file could not be removed.
        """
        for found in self.scan():
            if found.record is not None and should_remove(found.record):
                self.retire(self.run.root / found.path)

    def retire(self, path: Path) -> None:
        """Unpublish one file: free it for reuse, or remove it.

        Raises:
            OSError: it cannot be renamed or removed.
        """
        pool = self.pool if self.pool.has(path) else self._copies
        pool.retire(path)

    def close(self) -> None:
        """Close every file; published files stay."""
        self.pool.close()
        self._copies.close()
