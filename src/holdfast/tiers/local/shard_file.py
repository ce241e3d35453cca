"""A shard file of the local tier: its name, its directory, its trailer, and its index.

Names are `<directory>/<run id>/<rank>/iter_<N>_<owner>_local.pt`, the pattern of
nvidia-resiliency-ext, with any number of digits. Files with other names are neither touched nor
counted, leftovers never block a save, and a shard is published under its name only when it is
complete: a file of the same name is renamed, and still counts, until the new commit is agreed.

The trailer is the record (identity, sizes, digest of the image), the counters and the config for
people, and a sealed end that says where these are. A file without a sound trailer is not accepted.
A trailer is read back exactly or refused with a reason, nothing in it is unpickled here, and an
index is read only with the blocks that hold it verified. Part of on-disk format 2 of the local
tier. Knows no tensors and no other rank.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from holdfast.blame import is_process_failure
from holdfast.errors import (
    ConfigError,
    CorruptCheckpointError,
    FormatTooNewError,
)
from holdfast.filesystem import Filesystem, naming, why_not_private
from holdfast.read.index import read_index
from holdfast.storage.backend import PENDING_MARK, REPLACED_MARK, Storage, replaced_name
from holdfast.storage.digests import FileRecord, footer_size
from holdfast.storage.manifest import check_format, known_fields
from holdfast.storage.posix import PosixStorage, make_durable_directory, read_bytes, replace_file

CommitKey = tuple[int, int, int]
"""What all files of one commit share: sequence, attempt, iteration; larger is newer."""
FORMAT = 2
PART_NAMES = ("train_state", "run_config")
"""What follows the record, in this order."""

_MOST_RANKS = 1 << 24
"""A damaged table must not take all memory."""
_MARK = b"holdfast local 2"
_END = struct.Struct("<16sQQ16s")
"""Magic, bytes of the image, bytes between the image and this end, and their digest."""


@dataclass(frozen=True)
class ShardRecord:
    """The record of one shard file; files of one commit differ only in `owner` and below."""

    run_id: str
    attempt: int
    sequence: int
    """The order of commits in a run, over both tiers; larger is newer."""
    iteration: int
    world_size: int
    """The number of ranks that wrote the commit."""
    nodes: tuple[int, ...]
    """The node of each of them, numbered in the order of first ranks."""
    plan: str
    """Hexadecimal digest of the plan which rank writes what."""
    state_names: int | None
    """Distinct names in the whole state; None: unknown, so that a load needs every shard."""
    owner: int
    """The rank whose shard this is."""
    structure: str
    """Hexadecimal digest of this rank's live state: names, types, sizes and parts."""
    body_bytes: int
    digest: str
    """Of the image: the digest of its block digests, which are in its footer."""
    is_whole: bool = True
    """Whether the image has all that the rank staged; else it has the rank's own copies alone."""
    written_by: str = "holdfast"
    copies: dict[str, str] | None = None
    """Digests of what is per rank in the shard, by name or group; None: not made."""
    audit: dict[str, Any] | None = None
    """What was compared of the replicas of tensors; None: nothing."""
    format: int = FORMAT

    @property
    def image_bytes(self) -> int:
        """Bytes of the image, body and footer."""
        return self.body_bytes + footer_size(self.body_bytes)

    @property
    def commit(self) -> CommitKey:
        """What all files of one commit share."""
        return self.sequence, self.attempt, self.iteration

    def image_record(self, path: str) -> FileRecord:
        """Return the record of the image for the shard reader."""
        return FileRecord(path, self.image_bytes, self.digest, None)


def pack_nodes(nodes: Sequence[int]) -> list[list[int]]:
    """Return a table of nodes as runs: first node, how much it grows by, ranks of each, repeats.

    A job whose nodes have equally many consecutive ranks is one run, of whatever size.
    """
    packed: list[list[int]] = []
    for node, ranks in ((node, len([*each])) for node, each in groupby(nodes)):
        if packed and packed[-1][2] == ranks:
            first, step, _, repeats = packed[-1]
            last = first + step * (repeats - 1)
            if repeats == 1 or node - last == step:
                packed[-1] = [first, node - last, ranks, repeats + 1]
                continue
        packed.append([node, 0, ranks, 1])
    return packed


def unpack_nodes(packed: Any) -> tuple[int, ...]:
    """Return the table that `pack_nodes` was given.

    Raises:
        ValueError: it is none, or has more than a job could have ranks.
    """
    nodes: list[int] = []
    for first, step, ranks, repeats in packed:
        if not all(type(each) is int for each in (first, step, ranks, repeats)):
            raise ValueError("nodes is no table")
        if min(ranks, repeats) < 1 or len(nodes) + ranks * repeats > _MOST_RANKS:
            raise ValueError(f"nodes has a run of {repeats} times {ranks} ranks")
        nodes += [first + step * number for number in range(repeats) for _ in range(ranks)]
    return tuple(nodes)


@dataclass(frozen=True)
class Trailer:
    """Everything in a shard file except its image."""

    record: ShardRecord
    parts: Mapping[str, bytes]
    """By `PART_NAMES`."""

    def of_own_copies(self, body_bytes: int, digest: str) -> Trailer:
        """Return the trailer of a file with this image, of what only this rank has."""
        record = replace(self.record, is_whole=False, body_bytes=body_bytes, digest=digest)
        return replace(self, record=record)

    def to_bytes(self) -> bytes:
        """Return what follows the image in the file."""
        sizes = {name: len(self.parts[name]) for name in PART_NAMES}
        values = {**vars(self.record), "nodes": pack_nodes(self.record.nodes), "parts": sizes}
        for name in ("audit", "copies"):
            if values[name] is None:
                del values[name]
        text = json.dumps(values, sort_keys=True).encode()
        rest = b"".join([text + b"\n", *(self.parts[name] for name in PART_NAMES)])
        image_bytes = self.record.image_bytes
        digest = _digest(image_bytes, rest)
        return rest + _END.pack(_MARK, image_bytes, len(rest), digest)


def read_trailer(stream: BinaryIO, path: str) -> Trailer:
    """Read the trailer of a file; `path` is for messages.

    Raises:
        CorruptCheckpointError: it is truncated or altered.
        FormatTooNewError: a later version of holdfast wrote it.
        OSError: it cannot be read.
    """
    size_bytes = stream.seek(0, os.SEEK_END)
    if size_bytes < _END.size:
        raise CorruptCheckpointError(path, f"has {size_bytes} bytes, too few for a shard file")
    stream.seek(size_bytes - _END.size)
    end = stream.read(_END.size)
    if len(end) != _END.size:
        raise CorruptCheckpointError(path, "ends before its trailer: it was torn")
    mark, image_bytes, rest_bytes, _ = _END.unpack(end)
    if mark != _MARK or image_bytes + rest_bytes + _END.size != size_bytes:
        raise CorruptCheckpointError(path, "does not end as a shard file does: it was torn")
    stream.seek(image_bytes)
    rest = stream.read(rest_bytes)
    return parse_trailer(rest + end, path)


def parse_trailer(content: bytes, path: str) -> Trailer:
    """Parse the output of `Trailer.to_bytes`; `path` is for messages.

    Raises:
        CorruptCheckpointError: as `read_trailer`.
    """
    if len(content) < _END.size:
        raise CorruptCheckpointError(path, "ends before its trailer: it was torn")
    rest, end = content[: -_END.size], content[-_END.size :]
    mark, image_bytes, rest_bytes, digest = _END.unpack(end)
    if mark != _MARK or rest_bytes != len(rest) or digest != _digest(image_bytes, rest):
        raise CorruptCheckpointError(path, "the trailer does not match its digest")
    text, _, states = rest.partition(b"\n")
    try:
        values = json.loads(text)
        check_format(values, FORMAT, path, FORMAT)
        known = known_fields(ShardRecord, values)
        record = ShardRecord(**{**known, "nodes": unpack_nodes(values["nodes"])})
        _check(record, image_bytes)
        parts = _split(states, values["parts"])
    except FormatTooNewError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"has no sound record: {error}") from error
    return Trailer(record, parts)


def _digest(image_bytes: int, rest: bytes) -> bytes:
    hasher = xxhash.xxh3_128(struct.pack("<Q", image_bytes))
    hasher.update(rest)
    return hasher.digest()


_COUNTS = ("attempt", "sequence", "iteration", "world_size", "owner", "body_bytes")


def _check(record: ShardRecord, image_bytes: int) -> None:
    """Refuse invalid fields here rather than where decisions compare them.

    Raises:
        TypeError, ValueError: naming the field.
    """
    for name in _COUNTS:
        value = getattr(record, name)
        if type(value) is not int or value < 0:
            raise TypeError(f"{name} is {value!r}")
    for each in fields(record):
        if each.type == "str" and type(getattr(record, each.name)) is not str:
            raise TypeError(f"{each.name} is not a string")
    for name, kinds in (("is_whole", (bool,)), ("state_names", (int, type(None)))):
        if type(getattr(record, name)) not in kinds:
            raise TypeError(f"{name} is of another type")
    for name in ("audit", "copies"):
        if not isinstance(getattr(record, name), dict | None):
            raise TypeError(f"{name} is no mapping")
    if len(record.nodes) != record.world_size or not all(type(x) is int for x in record.nodes):
        raise ValueError("nodes does not name one node for each rank")
    if record.owner >= record.world_size:
        raise ValueError(f"owner {record.owner} is not among {record.world_size} ranks")
    if image_bytes != record.image_bytes:
        raise ValueError("body_bytes is not the size of the image")


def _split(states: bytes, sizes: Any) -> dict[str, bytes]:
    """Return the parts by name; a later version may append others."""
    if not set(sizes) >= set(PART_NAMES) or sum(sizes.values()) != len(states):
        raise ValueError("the parts are not those of this format")
    parts = {}
    for name in PART_NAMES:
        parts[name], states = states[: sizes[name]], states[sizes[name] :]
    return parts


STORE_NAME = "store.txt"
"""In a run's directory: the path of the store that holds its persistent checkpoints."""
_NUMBER = "[0-9]{7}|[1-9][0-9]{7,}"
_SHARD = re.compile(
    rf"iter_({_NUMBER})_(0|[1-9][0-9]*)_local\.pt({re.escape(REPLACED_MARK)}[0-9a-f]{{8}})?"
)
_PENDING = re.compile(rf"[a-z0-9_]+(\.pt)?{re.escape(PENDING_MARK)}[0-9a-f]{{8}}")
_STOCK_PENDING = re.compile(rf"iter_({_NUMBER})_(0|[1-9][0-9]*)_local\.dirty\.pt")
_RANK = re.compile("0|[1-9][0-9]*")
UNREAD = "cannot be read"
"""Start of the reason for a file that may be sound but that the system could not read."""


def shard_name(iteration: int, owner: int) -> str:
    """Return the name of a rank's shard."""
    return f"iter_{iteration:07d}_{owner}_local.pt"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """Return the iteration and the owner in a shard's name; None: not the name of a shard."""
    match = _SHARD.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class Found:
    """One published file: its record, or why it has none."""

    path: str
    """Relative to the run's directory: `<rank>/<name>`."""
    iteration: int
    owner: int
    record: ShardRecord | None
    reason: str | None = None
    too_new: FormatTooNewError | None = None
    """Set where a later version of holdfast wrote it."""

    @property
    def is_unread(self) -> bool:
        """Whether only its name is known."""
        return self.reason is not None and self.reason.startswith(UNREAD)


class RunDirectory:
    """The files of one run at one place."""

    def __init__(self, directory: Path, run_id: str, filesystem: Filesystem) -> None:
        self.root = directory / run_id
        self.run_id = run_id
        self.filesystem = filesystem
        self.storage: Storage = PosixStorage(self.root, filesystem)
        self._directory = directory

    def prepare(self, rank: int) -> None:
        """Create this rank's directory; existing directories must be writable by this user alone.

        Raises:
            ConfigError: a directory of the path is another user's, or others may write to it.
            OSError: it cannot be created.
        """
        for path in (self._directory, self.root, self.root / str(rank)):
            make_private_directory(self.filesystem, path)

    def note_store(self, store: Path) -> None:
        """Record beside the shards which store this run has, in case that store is lost.

        Best effort: no load or save depends on it.
        """
        path, content = self.root / STORE_NAME, f"{store}\n".encode()
        with suppress(OSError):
            if _read_or_nothing(self.filesystem, path) != content:
                replace_file(self.filesystem, path, content)

    def rank_directory(self, rank: int) -> Path:
        """Return the directory of a rank."""
        return self.root / str(rank)

    def ranks(self) -> list[int]:
        """Return every rank that has a directory here, whether or not the rank still exists."""
        try:
            entries = self.filesystem.list_directory(self.root)
        except FileNotFoundError:  # the directory was wiped meanwhile
            return []
        return sorted(
            int(each.name) for each in entries if each.is_directory and _RANK.fullmatch(each.name)
        )

    def published(self, rank: int) -> list[str]:
        """Return the paths of one rank's published files, relative to the run's directory."""
        return [
            f"{rank}/{name}" for name in self._names(rank) if parse_shard_name(name) is not None
        ]

    def _names(self, rank: int) -> list[str]:
        try:
            entries = self.filesystem.list_directory(self.rank_directory(rank))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [each.name for each in entries if each.is_file]

    def scan(self, ranks: Iterable[int]) -> list[Found]:
        """Read the record of every published file in the directories of these ranks."""
        return [self._look_at(path) for rank in ranks for path in self.published(rank)]

    def _look_at(self, path: str) -> Found:
        parsed = parse_shard_name(path.partition("/")[2])
        assert parsed is not None
        iteration, owner = parsed
        try:
            record = self.read_trailer(path).record
        except CorruptCheckpointError as error:
            return Found(path, iteration, owner, None, error.reason)
        except FormatTooNewError as error:
            return Found(path, iteration, owner, None, error.summary, error)
        except OSError as error:
            if is_process_failure(error):
                raise
            return Found(path, iteration, owner, None, f"{UNREAD}: {error.strerror}")
        if (record.iteration, record.owner) != parsed:
            reason = f"is the shard of rank {record.owner} of iteration {record.iteration}"
            return Found(path, iteration, owner, None, reason)
        if record.run_id != self.run_id:
            return Found(path, iteration, owner, None, f"belongs to run {record.run_id!r}")
        return Found(path, iteration, owner, record)

    def read_trailer(self, path: str) -> Trailer:
        """Return the trailer of a published file.

        Raises:
            CorruptCheckpointError: it has no sound trailer.
            OSError: it cannot be read.
        """
        full = self.root / path
        with naming(full), self.filesystem.open_existing(full) as stream:
            return read_trailer(stream, str(full))

    def publish(
        self, pending: Path, rank: int, iteration: int, owner: int
    ) -> tuple[Path, Path | None]:
        """Rename a complete, synced file to its published name in a rank's directory.

        Return its path, and that of the file it replaced, which counts until it is removed.
        """
        final = self.rank_directory(rank) / shard_name(iteration, owner)
        replaced = None
        if final.name in self._names(rank):
            replaced = final.with_name(replaced_name(final.name))
            self.filesystem.rename(final, replaced)
        self.filesystem.rename(pending, final)  # visible from here
        return final, replaced

    def sweep(self, ranks: Iterable[int]) -> None:
        """Remove the leftovers of killed processes; call only while no rank saves."""
        for rank in ranks:
            for name in self._names(rank):
                if _PENDING.fullmatch(name) or _STOCK_PENDING.fullmatch(name):
                    with suppress(FileNotFoundError):
                        self.filesystem.remove_file(self.rank_directory(rank) / name)

    def remove_empty(self, ranks: Collection[int]) -> None:
        """Remove the empty directories of ranks that no longer exist."""
        for rank in ranks:
            with suppress(OSError):  # it contains another file, or is gone
                self.filesystem.remove_directory(self.rank_directory(rank))


def find_orphans(directory: Path, store: Path, filesystem: Filesystem) -> list[tuple[str, int]]:
    """Return the runs with local checkpoints here that recorded the given store.

    Each with its newest iteration. Whether the store is gone is for the caller to know.
    """
    found = []
    with suppress(OSError):
        for each in filesystem.list_directory(directory):
            if not each.is_directory:
                continue
            run = RunDirectory(directory, each.name, filesystem)
            noted = _read_or_nothing(filesystem, run.root / STORE_NAME).decode(errors="replace")
            if not noted.strip() or Path(noted.strip()) != store:
                continue
            iterations = [each.iteration for each in run.scan(run.ranks()) if each.record]
            if iterations:
                found.append((each.name, max(iterations)))
    return found


def _read_or_nothing(filesystem: Filesystem, path: Path) -> bytes:
    try:
        return read_bytes(filesystem, path)
    except OSError:
        return b""


def make_private_directory(filesystem: Filesystem, path: Path) -> None:
    """Create a directory in which no other user could add or remove files that this job trusts.

    Raises:
        ConfigError: it is another user's, or others may write to it.
        OSError: it cannot be created.
    """
    make_durable_directory(filesystem, path)
    if (problem := why_not_private(path)) is not None:
        advice = "name one that this job makes itself, such as /dev/shm/holdfast-<user>"
        raise ConfigError([f"checkpoint.local.directory: {path} {problem}; {advice}"])


Chunk = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Name, size of the whole tensor, offsets, lengths."""


def outline(files: Storage, name: str, record: ShardRecord) -> list[Chunk]:
    """Return the chunks in a published shard; raises as `read_index`."""
    entries = read_index(files, name, record.image_record(name)).entries(files.where(name))
    # Ranks may have copies of different sizes of what is per rank: there is nothing to tile.
    return [
        (each.name, (), (), ())
        if each.per_rank
        else (each.name, each.size, each.offsets, each.lengths)
        for each in entries
    ]
