"""The tail that makes a shard file of the local tier whole: who wrote it, and the small states.

Owns the bytes behind the image of a shard: the record (identity, sizes, digest of the image), this
rank's and the shared small states, and a sealed end that says where all this stands. A file without
a sound tail is none of ours, so a shard is there whole or not at all. Promises that a tail is read
back exactly or refused with a reason, and that nothing in it is unpickled here. Part of on-disk
format 1 of the local tier. Knows no file system: it reads streams.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, BinaryIO

import xxhash

from holdfast.digests import FileRecord, footer_size
from holdfast.errors import CorruptCheckpointError, FormatTooNewError
from holdfast.manifest import check_format, known_fields

FORMAT = 1
PART_NAMES = ("rank_state", "shared_state", "train_state", "run_config")
"""The small states, in this order behind the record."""

_MARK = b"holdfast local 1"
_END = struct.Struct("<16sQQ16s")
"""The mark, the bytes of the image, those of the rest before this end, and the digest of that."""


@dataclass(frozen=True)
class ShardRecord:
    """What one shard file says of itself; those of one commit agree in all but the last fields."""

    run_id: str
    attempt: int
    sequence: int
    """The order of commits in a run, over both tiers; larger is newer."""
    iteration: int
    world_size: int
    """Ranks that wrote the commit."""
    nodes: tuple[int, ...]
    """The node that each of them sat on, numbered in the order of first ranks."""
    plan: str
    """Hexadecimal; of the decision which rank writes what."""
    state_names: int | None
    """Different names in the whole state; None: not known, so that no shard can be done without."""
    owner: int
    """The rank whose shard this is."""
    structure: str
    """Hexadecimal; of what this rank had live, by name, type, size and part."""
    body_bytes: int
    digest: str
    """Of the image: of its block digests, which stand in its footer."""
    is_whole: bool = True
    """Whether the image is here; a copy of the small states alone has none."""
    written_by: str = "holdfast"
    format: int = FORMAT

    @property
    def image_bytes(self) -> int:
        """Bytes of the image, body and footer, in a file that is whole."""
        return self.body_bytes + footer_size(self.body_bytes)

    @property
    def commit(self) -> tuple[int, int, int]:
        """What all files of one commit share: sequence, attempt, iteration."""
        return self.sequence, self.attempt, self.iteration

    def image_record(self, path: str) -> FileRecord:
        """Return the record of the image as the shard reader takes it."""
        return FileRecord(path, self.image_bytes, self.digest, None)


@dataclass(frozen=True)
class Tail:
    """Everything of a shard file but its image."""

    record: ShardRecord
    parts: Mapping[str, bytes]
    """By `PART_NAMES`."""

    def without_image(self) -> Tail:
        """Return the tail of a copy that holds the small states alone."""
        return replace(self, record=replace(self.record, is_whole=False))

    def to_bytes(self) -> bytes:
        """Return what follows the image in the file."""
        sizes = {name: len(self.parts[name]) for name in PART_NAMES}
        text = json.dumps({**asdict(self.record), "parts": sizes}, sort_keys=True).encode()
        rest = b"".join([text + b"\n", *(self.parts[name] for name in PART_NAMES)])
        image_bytes = self.record.image_bytes if self.record.is_whole else 0
        digest = _digest(image_bytes, rest)
        return rest + _END.pack(_MARK, image_bytes, len(rest), digest)


def read_tail(stream: BinaryIO, size_bytes: int, path: str) -> Tail:
    """Read the tail of a file of so many bytes; `path` is for messages.

    Raises:
        CorruptCheckpointError: torn or altered.
        FormatTooNewError: a later version of holdfast wrote it.
        OSError: it cannot be read.
    """
    if size_bytes < _END.size:
        raise CorruptCheckpointError(path, f"has {size_bytes} bytes, too few for a shard file")
    stream.seek(size_bytes - _END.size)
    end = stream.read(_END.size)
    if len(end) != _END.size:
        raise CorruptCheckpointError(path, "ends before its tail: it was torn")
    mark, image_bytes, rest_bytes, _ = _END.unpack(end)
    if mark != _MARK or image_bytes + rest_bytes + _END.size != size_bytes:
        raise CorruptCheckpointError(path, "does not end as a shard file does: it was torn")
    stream.seek(image_bytes)
    rest = stream.read(rest_bytes)
    return parse_tail(rest + end, path)


def parse_tail(content: bytes, path: str) -> Tail:
    """Understand what `Tail.to_bytes` made; `path` is for messages.

    Raises:
        CorruptCheckpointError: as `read_tail`.
    """
    if len(content) < _END.size:
        raise CorruptCheckpointError(path, "ends before its tail: it was torn")
    rest, end = content[: -_END.size], content[-_END.size :]
    mark, image_bytes, rest_bytes, digest = _END.unpack(end)
    if mark != _MARK or rest_bytes != len(rest) or digest != _digest(image_bytes, rest):
        raise CorruptCheckpointError(path, "the tail does not match its digest")
    text, _, states = rest.partition(b"\n")
    try:
        values = json.loads(text)
        check_format(values, FORMAT, path)
        known = known_fields(ShardRecord, values)
        record = ShardRecord(**{**known, "nodes": tuple(values["nodes"])})
        _check(record, image_bytes)
        parts = _split(states, values["parts"])
    except FormatTooNewError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"has no sound record: {error}") from error
    return Tail(record, parts)


def _digest(image_bytes: int, rest: bytes) -> bytes:
    hasher = xxhash.xxh3_128(struct.pack("<Q", image_bytes))
    hasher.update(rest)
    return hasher.digest()


_COUNTS = ("attempt", "sequence", "iteration", "world_size", "owner", "body_bytes")


def _check(record: ShardRecord, image_bytes: int) -> None:
    """Refuse what would fail far from here: decisions compare these numbers.

    Raises:
        TypeError, ValueError: naming the field.
    """
    for name in _COUNTS:
        value = getattr(record, name)
        if type(value) is not int or value < 0:
            raise TypeError(f"{name} is {value!r}")
    for each in fields(record):
        if each.type == "str" and type(getattr(record, each.name)) is not str:
            raise TypeError(f"{each.name} is no text")
    for name, kinds in (("is_whole", (bool,)), ("state_names", (int, type(None)))):
        if type(getattr(record, name)) not in kinds:
            raise TypeError(f"{name} is of another type")
    if len(record.nodes) != record.world_size or not all(type(x) is int for x in record.nodes):
        raise ValueError("nodes does not name one node for each rank")
    if record.owner >= record.world_size:
        raise ValueError(f"owner {record.owner} is not among {record.world_size} ranks")
    if image_bytes != (record.image_bytes if record.is_whole else 0):
        raise ValueError("body_bytes is not the size of the image")


def _split(states: bytes, sizes: Any) -> dict[str, bytes]:
    """Return the parts by name; those that a later version may add lie behind them."""
    if not set(sizes) >= set(PART_NAMES) or sum(sizes.values()) != len(states):
        raise ValueError("the small states are not those of this format")
    parts = {}
    for name in PART_NAMES:
        parts[name], states = states[: sizes[name]], states[sizes[name] :]
    return parts
