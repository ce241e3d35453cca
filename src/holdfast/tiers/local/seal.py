"""Turn a staged snapshot into one rank's shard, complete under a pending name.

Owns the input of a local save, the arena in a pooled file that it is staged into, and the pass that
digests it. Promises that the shard is sealed, and on a disk durable, when `seal` returns, and that
it does not count before it is published. Knows one rank.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from holdfast import __version__
from holdfast.filesystem import Filesystem, naming
from holdfast.format.layout import Layout
from holdfast.snapshot.arena import Arena, image_bytes
from holdfast.snapshot.shard import seal_image, write_shard
from holdfast.storage.digests import FileRecord
from holdfast.storage.identity import CommitIdentity
from holdfast.storage.posix import read_into, writing_past_cache
from holdfast.tiers.local.pool import PooledFile
from holdfast.tiers.local.shard_file import ShardRecord, Trailer, pending_name, shard_name
from holdfast.tiers.local.shards import ShardDirectory


@dataclass(frozen=True)
class LocalSnapshot:
    """What one local save writes, in memory that training does not change."""

    iteration: int
    arena: Arena
    """Staged; in RAM, the one that `LocalTier.begin` returned."""
    structure: bytes
    """Of this rank's live state: `structure_of(items)`."""
    plan: bytes
    """Of the decision which rank writes what."""
    state_names: int | None
    """Distinct names in the whole state; None: unknown, so that a load needs every shard."""
    rank_state: bytes
    shared_state: bytes
    train_state: bytes
    run_config: bytes


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
    snapshot: LocalSnapshot,
    identity: CommitIdentity,
    shards: ShardDirectory,
    file: PooledFile | None,
) -> tuple[Path, Trailer]:
    """Complete a rank's shard; `file` is the one it was staged into, None: on a disk.

    Return its pending path and its trailer.

    Raises:
        OSError: it cannot be written; only a pending name is left.
    """
    arena = snapshot.arena
    name = shard_name(snapshot.iteration, shards.rank)
    if file is not None:
        pending = file.path
        written = seal_image(arena.memory, arena.body_bytes, name)
    else:
        shards.run.filesystem.make_directory(shards.directory)
        pending = shards.directory / pending_name(name)
        written = write_shard(writing_past_cache(shards.run.filesystem, pending), name, arena)
        _read_footer(shards, pending, arena)
    trailer = _trailer_of(snapshot, identity, shards, written)
    image_size = trailer.record.image_bytes
    if file is not None:
        file.write_at(image_size, trailer.to_bytes())
    else:
        _append(shards.run.filesystem, pending, trailer.to_bytes())
    return pending, trailer


def _trailer_of(
    snapshot: LocalSnapshot, identity: CommitIdentity, shards: ShardDirectory, written: FileRecord
) -> Trailer:
    record = ShardRecord(
        run_id=shards.run.run_id,
        attempt=identity.attempt,
        sequence=identity.sequence,
        iteration=snapshot.iteration,
        world_size=shards.topology.world_size,
        nodes=shards.topology.nodes,
        plan=snapshot.plan.hex(),
        state_names=snapshot.state_names,
        owner=shards.rank,
        structure=snapshot.structure.hex(),
        body_bytes=snapshot.arena.body_bytes,
        digest=written.digest,
        written_by=f"holdfast {__version__}",
    )
    parts = {
        "rank_state": snapshot.rank_state,
        "shared_state": snapshot.shared_state,
        "train_state": snapshot.train_state,
        "run_config": snapshot.run_config,
    }
    return Trailer(record, parts)


def _read_footer(shards: ShardDirectory, path: Path, arena: Arena) -> None:
    """Read the footer, computed while writing to disk, into memory behind the body."""
    footer = arena.memory[arena.body_bytes : image_bytes(arena.layout)]
    with naming(path), shards.run.filesystem.open_existing(path) as stream:
        read_into(stream, arena.body_bytes, [footer])


def _append(filesystem: Filesystem, path: Path, content: bytes) -> None:
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "ab") as stream:
            stream.write(content)
            stream.flush()
            filesystem.sync_file(path, stream)  # durable before it has the name that counts
