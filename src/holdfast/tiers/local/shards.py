"""The shard files in one rank's directory: its own and the copies it holds for others.

Owns completing a staged snapshot as a shard file (`seal`), publishing, listing and pruning in that
directory, and the conversion of a shard (in memory or in a file) to a stream and back to a file.
Promises that a shard is sealed, and on a disk durable, before it is published, and does not count
until then; and that a received shard is sealed only if every block of its body, its footer and its
trailer are those that were sent and belong to the expected commit. Knows no other rank's directory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from pathlib import Path

import xxhash

from holdfast import __version__
from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import append_durably
from holdfast.format.layout import Layout, lay_out
from holdfast.ranks.topology import Topology
from holdfast.snapshot.arena import Arena, image_bytes
from holdfast.snapshot.copies import digest_copies
from holdfast.snapshot.shard import seal_image, write_shard
from holdfast.storage.backend import ObjectReader, Storage, pending_name
from holdfast.storage.digests import (
    BLOCK_BYTES,
    FileRecord,
    describe_body,
    footer_size,
    make_footer,
)
from holdfast.storage.identity import CommitIdentity
from holdfast.storage.posix import writing_past_cache
from holdfast.tiers.local.pool import BufferPool, PooledFile
from holdfast.tiers.local.shard_file import (
    CommitKey,
    Found,
    RunDirectory,
    ShardRecord,
    Trailer,
    parse_trailer,
    shard_name,
)
from holdfast.tiers.tier import Snapshot

logger = logging.getLogger(__name__)


class MemoryShard:
    """A shard whose image is in memory."""

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

    def __init__(self, files: Storage, name: str, body_bytes: int) -> None:
        """Open it; a file that cannot be opened is sent as zero bytes, which receivers reject.

        The sender must take part all the same, since the receiver waits for it.
        """
        self.body_bytes = body_bytes
        self.size_bytes = 0
        self._opened = ExitStack()
        self._source: ObjectReader | None = None
        with suppress(OSError):
            self._source = self._opened.enter_context(files.open(name))
            self.size_bytes = self._source.size_bytes

    def view(self, offset: int, length: int) -> memoryview | None:
        """Return None: a file's bytes are not reliably in memory."""
        return None

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read bytes; past the end of a truncated file they are zeros, which fail the digest."""
        assert self._source is not None, "of nothing no byte is asked for"
        filled = self._source.get_into(offset, [target])
        target[filled:] = bytes(len(target) - filled)

    def close(self) -> None:
        """Close it."""
        self._opened.close()


class ReceivedShard:
    """A shard being received into a file, under a pending name until it is published."""

    def __init__(self, take: Callable[[int], PooledFile]) -> None:
        self.size_bytes = 0
        self.file: PooledFile | None = None
        self.error: Exception | None = None
        """The first local error during the transfer."""
        self.trailer: Trailer | None = None
        """Once it is sealed."""
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

    def seal(self, run_id: str, commit: CommitKey, owner: int) -> Trailer:
        """Verify the whole file; return its trailer, which is kept for publishing it.

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
        if body_bytes != record.body_bytes:
            raise CorruptCheckpointError(path, "another part of the shard arrived than was sent")
        if (
            self._rest[:footer_bytes] != make_footer(body_bytes, self._digests)
            or describe_body(path, body_bytes, self._digests).digest != record.digest
        ):
            raise CorruptCheckpointError(path, "the bytes that arrived do not match their digests")
        self.trailer = trailer
        return trailer


def _image_bytes(body_bytes: int) -> int:
    return body_bytes + footer_size(body_bytes) if body_bytes else 0


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
        self.in_memory = in_memory
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

    def take(
        self, size_bytes: int, timeout_seconds: float, kept: Collection[CommitKey]
    ) -> PooledFile:
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

    def publish_received(self, sink: ReceivedShard) -> None:
        """Publish a sealed copy under its name."""
        assert sink.file is not None
        assert sink.trailer is not None
        if not self.in_memory:
            sink.file.sync()  # durable before it has the name that counts
        final = self._publish(sink.file.path, sink.trailer.record)
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
        if not self.in_memory:
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

    def drop(self, pending: Path) -> None:
        """Remove a shard on a disk that was not published."""
        with suppress(OSError):  # published and undone already, or the next start sweeps it
            self.run.filesystem.remove_file(pending)

    def drop_received(self, sink: ReceivedShard) -> None:
        """Free or remove a copy that was not published."""
        if sink.file is not None:
            self._copies.give_back(sink.file)

    # -- prune -----------------------------------------------------------------------------------

    def prune(self, kept: Collection[CommitKey]) -> None:
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

    def _should_remove(self, found: Found, kept: Collection[CommitKey]) -> bool:
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


def lay_out_in(file: PooledFile, layout: Layout, *, pinned: bool) -> Arena:
    """Return the arena that a file holds from an earlier save, or create it."""
    arena = file.content
    if isinstance(arena, Arena):
        if arena.layout == layout:
            return arena
        arena.release()
        file.memory[:] = bytes(len(file.memory))  # an arena starts as zeros
    arena = Arena(layout, file.memory, pinned=pinned)
    file.content = arena
    return arena


def seal(
    snapshot: Snapshot,
    identity: CommitIdentity,
    shards: ShardDirectory,
    file: PooledFile | None,
) -> tuple[Path, Trailer]:
    """Complete a rank's shard; `file` is the one it was staged into, None: on a disk.

    Return its pending path and its trailer.

    Raises:
        OSError: it cannot be written; only a pending name is left.
    """
    arena = snapshot.shard.arena
    assert arena is not None
    name = shard_name(snapshot.iteration, shards.rank)
    if file is not None:
        pending = file.path
        written = seal_image(arena.memory, arena.body_bytes, name)
    else:
        shards.run.filesystem.make_directory(shards.directory)
        pending = shards.directory / pending_name(name)
        written = write_shard(writing_past_cache(shards.run.filesystem, pending), name, arena)
        # Computed while writing to the disk; needed in memory behind the body.
        footer = arena.memory[arena.body_bytes : image_bytes(arena.layout)]
        with shards.run.storage.open(f"{shards.rank}/{pending.name}") as source:
            source.get_into(arena.body_bytes, [footer])
    trailer = _trailer_of(snapshot, identity, shards, arena, written)
    image_size = trailer.record.image_bytes
    if file is not None:
        file.write_at(image_size, trailer.to_bytes())
    else:
        # Durable before it has the name that counts.
        append_durably(shards.run.filesystem, pending, trailer.to_bytes())
    return pending, trailer


def _trailer_of(
    snapshot: Snapshot,
    identity: CommitIdentity,
    shards: ShardDirectory,
    arena: Arena,
    written: FileRecord,
) -> Trailer:
    plan = snapshot.shard.plan
    record = ShardRecord(
        run_id=shards.run.run_id,
        attempt=identity.attempt,
        sequence=identity.sequence,
        iteration=snapshot.iteration,
        world_size=shards.topology.world_size,
        nodes=shards.topology.nodes,
        plan=plan.identity.hex(),
        state_names=plan.state_names,
        owner=shards.rank,
        structure=plan.structure.hex(),
        body_bytes=arena.body_bytes,
        digest=written.digest,
        written_by=f"holdfast {__version__}",
        copies=digest_copies(arena.layout, arena.content),
        audit=snapshot.audit.record,
    )
    parts = {
        "train_state": snapshot.train_state,
        "run_config": snapshot.run_config,
    }
    return Trailer(record, parts)


def shard_to_send(arena: Arena, trailer: Trailer, *, is_whole: bool) -> MemoryShard:
    """Return a sealed shard in memory, or one with what only this rank has of it."""
    if is_whole:
        record = trailer.record
        image = arena.memory[: record.image_bytes]
        return MemoryShard(image, record.body_bytes, trailer.to_bytes())
    slots = {slot.item.name: number for number, slot in enumerate(arena.layout.slots)}
    layout = lay_out([item for item, _ in arena.layout.items if item.per_rank])
    sources = [arena.content(slots[slot.item.name]) for slot in layout.slots]
    copied = Arena(layout)
    copied.stage(sources).wait()
    written = seal_image(copied.memory, copied.body_bytes, "")
    own = trailer.of_own_copies(copied.body_bytes, written.digest)
    return MemoryShard(copied.memory, copied.body_bytes, own.to_bytes())
