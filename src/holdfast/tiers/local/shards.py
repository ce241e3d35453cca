"""The shard files that one rank's node holds: its own and copies of others'.

Owns what is published, listed, shared with other ranks and pruned in one rank's directory, and how
a shard becomes a stream (out of memory or a file) and a stream a file again. Promises that a
received shard is sealed only if every block of its body, its footer and its trailer are those that
were sent, and are of the commit that was expected, and that nothing of a save counts before it is
published. Knows no other rank's directory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from holdfast.errors import CorruptCheckpointError
from holdfast.storage.digests import BLOCK_BYTES, describe_body, footer_size, make_footer
from holdfast.storage.posix import Filesystem, naming, read_into
from holdfast.tiers.local.availability import Commit
from holdfast.tiers.local.budget import Topology
from holdfast.tiers.local.pool import BufferPool, PooledFile
from holdfast.tiers.local.shard_file import Found, RunDirectory, ShardRecord, Trailer, parse_trailer


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

    def __init__(self, take: Callable[[int], PooledFile]) -> None:
        self.size_bytes = 0
        self.file: PooledFile | None = None
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

    def seal(self, run_id: str, commit: tuple[int, int, int], owner: int) -> Trailer:
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
        tail = parse_trailer(bytes(self._rest[footer_bytes:]), path)
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


logger = logging.getLogger(__name__)


class ShardDirectory:
    """The files of one rank."""

    def __init__(
        self,
        run: RunDirectory,
        rank: int,
        topology: Topology,
        *,
        turns: int,
        copies: int,
        in_memory: bool,
    ) -> None:
        """`turns`: files of the own shard; `copies`: shards of others that are held besides."""
        self.run = run
        self.rank = rank
        self.topology = topology
        self.directory = run.rank_directory(rank)
        self.turns = BufferPool(
            self.directory,
            run.filesystem,
            limit=turns,
            spares=turns,
            mapped=True,
            in_memory=in_memory,
        )
        """Of the own shard, where files take turns."""
        self._copies = BufferPool(
            self.directory, run.filesystem, spares=copies, mapped=False, in_memory=in_memory
        )
        self._in_memory = in_memory
        self._keep = turns - 1
        self.spared: frozenset[int] = frozenset()
        """Iterations that may be sound but could not be read when it was settled what is kept."""
        self._fresh: list[tuple[Path, Path | None]] = []
        """What was published since the last commit, with the predecessor of each."""

    # -- what there is ---------------------------------------------------------------------------

    def share(self) -> list[int]:
        """Return the rank directories that this rank lists: its own, and a part of the orphans."""
        return [each for each in self.run.ranks() if self.lister(each) == self.rank]

    def lister(self, directory: int) -> int:
        """Return who lists a rank directory of this place."""
        mates = self.topology.place_mates(self.rank)
        return directory if directory in mates else mates[directory % len(mates)]

    def scan(self) -> tuple[Found, ...]:
        """Return every published file in this rank's share."""
        return tuple(self.run.scan(self.share()))

    # -- publish and take back -------------------------------------------------------------------

    def take(self, size_bytes: int, timeout_seconds: float, kept: Collection[Commit]) -> PooledFile:
        """Return a file for the next shard that nobody reads.

        Raises:
            NoFileFreeError: all of them are held, and stayed so.
            OSError: there is no room, or what a failed save has left cannot be removed.
        """
        if not self.turns.has_turn:
            self.prune(kept)  # left of a save that failed, or of pruning that did
        return self.turns.take(size_bytes, timeout_seconds)

    def sink(self) -> ReceivedShard:
        """Return what receives a shard into a file of this rank."""
        return ReceivedShard(lambda size_bytes: self._copies.take(size_bytes, 0.0))

    def publish(self, pending: Path, record: ShardRecord, file: PooledFile | None) -> None:
        """Give the own shard, sealed and synced, its name."""
        final = self._publish(pending, record)
        if file is not None:
            self.turns.published_as(file, final)

    def publish_received(self, sink: ReceivedShard, tail: Trailer) -> None:
        """Give a sealed copy its name."""
        assert sink.file is not None
        if not self._in_memory:
            sink.file.sync()  # durable before it has the name that counts
        final = self._publish(sink.file.path, tail.record)
        self._copies.published_as(sink.file, final)

    def _publish(self, pending: Path, record: ShardRecord) -> Path:
        final, replaced = self.run.publish(pending, self.rank, record.iteration, record.owner)
        self._fresh.append((final, replaced))
        if replaced is not None:
            self._rename(final, replaced)
        return final

    def _rename(self, path: Path, target: Path) -> None:
        for turns in (self.turns, self._copies):
            turns.renamed(path, target)

    def sync_names(self) -> None:
        """Make the names durable: without them the bytes are not found after a power cut."""
        if not self._in_memory:
            self.run.filesystem.sync_directory(self.directory)

    def settle(self) -> list[tuple[Path, Path | None]]:
        """Return what was published, with the predecessor of each, which is not taken back now."""
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
            except OSError as error:  # it is of a commit that no vote will find whole
                logger.warning("%s is left of a save that failed: %s", final, error)

    def drop(self, pending: Path, file: PooledFile | None) -> None:
        """Take a shard that was not published out of the way."""
        if file is not None:
            self.turns.give_back(file)
        else:
            with suppress(OSError):  # published and taken back already, or the next start sweeps it
                self.run.filesystem.remove_file(pending)

    def drop_received(self, sink: ReceivedShard) -> None:
        """Take a copy that was not published out of the way."""
        if sink.file is not None:
            self._copies.give_back(sink.file)

    # -- prune -----------------------------------------------------------------------------------

    def prune(self, kept: Collection[Commit]) -> None:
        """Remove every published file of this rank's share that is surely not of a kept commit.

        Raises:
            OSError: one cannot be removed; the others were.
        """
        failures = []
        for found in self.scan():
            if self._is_doomed(found, kept):
                try:
                    self.retire(self.run.root / found.path)
                except OSError as error:
                    failures.append(error)
        if failures:
            raise failures[0]
        mates = self.topology.place_mates(self.rank)
        self.run.remove_empty([each for each in self.share() if each not in mates])

    def _is_doomed(self, found: Found, kept: Collection[Commit]) -> bool:
        if found.too_new is not None:
            return False  # a later version of holdfast wrote it: not this one's to judge
        if found.record is None:
            # Nothing but its name tells what it may be the only copy of.
            is_kept = found.iteration in {iteration for _, _, iteration in kept}
            return not (found.is_unread and (is_kept or found.iteration in self.spared))
        if found.record.commit in kept:
            return False
        newest_attempt = max((attempt for _, attempt, _ in kept), default=0)
        if found.record.attempt > newest_attempt:
            return False  # a later start has taken over meanwhile: what it commits is not ours
        is_spared = found.iteration in self.spared and not self.turns.has(
            self.run.root / found.path
        )
        return not is_spared or (len(kept) >= self._keep and found.record.commit < min(kept))

    def discard(self, is_doomed: Callable[[ShardRecord], bool]) -> None:
        """Remove the published files of this rank's share whose record is doomed.

        Raises:
            OSError: one cannot be removed.
        """
        for found in self.scan():
            if found.record is not None and is_doomed(found.record):
                self.retire(self.run.root / found.path)

    def retire(self, path: Path) -> None:
        """Take one published file out of sight.

        Raises:
            OSError: it cannot be renamed or removed.
        """
        turns = self.turns if self.turns.has(path) else self._copies
        turns.retire(path)

    def close(self) -> None:
        """Let go of every file; what is published stays."""
        self.turns.close()
        self._copies.close()
