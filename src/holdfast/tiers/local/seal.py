"""A staged snapshot becomes one rank's shard, whole under a pending name.

Owns what a local save is given, the memory it is staged into where files take turns, and the pass
that digests it. Promises that the shard is sealed, and on a disk durable, when `seal` returns, and
that neither counts before it is published. Knows one rank.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from holdfast import __version__
from holdfast.format.layout import Layout
from holdfast.snapshot.arena import Arena, image_bytes
from holdfast.snapshot.shard import seal_image, write_shard
from holdfast.storage.digests import FileRecord
from holdfast.storage.identity import CommitIdentity
from holdfast.storage.posix import Filesystem, naming, read_into
from holdfast.tiers.local.pool import PooledFile
from holdfast.tiers.local.shard_file import ShardRecord, Trailer, pending_name, shard_name
from holdfast.tiers.local.shards import ShardDirectory


@dataclass(frozen=True)
class LocalSnapshot:
    """What one local save writes, out of training's reach."""

    iteration: int
    arena: Arena
    """Staged; where files take turns, the one that `begin` gave."""
    structure: bytes
    """Of what this rank has live: `structure_of(items)`."""
    plan: bytes
    """Of the decision which rank writes what."""
    state_names: int | None
    """Different names in the whole state; None: not known, so that no shard can be done without."""
    rank_state: bytes
    shared_state: bytes
    train_state: bytes
    run_config: bytes


def lay_out_in(file: PooledFile, layout: Layout, *, pinned: bool) -> Arena:
    """Return the arena that a file holds from an earlier turn, or make it."""
    arena = file.content
    if isinstance(arena, Arena):
        if arena.layout == layout:
            return arena
        arena.release()
        file.memory[:] = bytes(len(file.memory))  # an arena is laid out in zeros
    arena = Arena(layout, file.memory, pinned=pinned)
    file.content = arena
    return arena


def seal(
    snapshot: LocalSnapshot,
    identity: CommitIdentity,
    shelf: ShardDirectory,
    file: PooledFile | None,
) -> tuple[Path, Trailer]:
    """Make a rank's shard whole; `file` is the one it was staged into, None: on a disk.

    Return its pending path, and its tail.

    Raises:
        OSError: it cannot be written; nothing is left of it but a pending name.
    """
    arena = snapshot.arena
    name = shard_name(snapshot.iteration, shelf.rank)
    if file is not None:
        pending = file.path
        written = seal_image(arena.memory, arena.body_bytes, name)
    else:
        shelf.run.filesystem.make_directory(shelf.directory)
        pending = shelf.directory / pending_name(name)
        written = write_shard(shelf.run.filesystem, pending, name, arena)
        _read_footer(shelf, pending, arena)
    tail = _trailer_of(snapshot, identity, shelf, written)
    image_size = tail.record.image_bytes
    if file is not None:
        file.write_at(image_size, tail.to_bytes())
    else:
        _append(shelf.run.filesystem, pending, tail.to_bytes())
    return pending, tail


def _trailer_of(
    snapshot: LocalSnapshot, identity: CommitIdentity, shelf: ShardDirectory, written: FileRecord
) -> Trailer:
    record = ShardRecord(
        run_id=shelf.run.run_id,
        attempt=identity.attempt,
        sequence=identity.sequence,
        iteration=snapshot.iteration,
        world_size=shelf.topology.world_size,
        nodes=shelf.topology.nodes,
        plan=snapshot.plan.hex(),
        state_names=snapshot.state_names,
        owner=shelf.rank,
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


def _read_footer(shelf: ShardDirectory, path: Path, arena: Arena) -> None:
    """Put the footer that was made on the way to the disk behind the body in memory too."""
    footer = arena.memory[arena.body_bytes : image_bytes(arena.layout)]
    with naming(path), shelf.run.filesystem.open_existing(path) as stream:
        read_into(stream, arena.body_bytes, [footer])


def _append(filesystem: Filesystem, path: Path, content: bytes) -> None:
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "ab") as stream:
            stream.write(content)
            stream.flush()
            filesystem.sync_file(path, stream)  # durable before it has the name that counts
