"""The commit record of a checkpoint: on-disk format 1.

Owns the JSON of manifest.json. Promises that a manifest is read back exactly or refused with a
reason; its last line is the xxh3-128 of all bytes before it. Refuses paths that leave the
checkpoint. Knows no file system.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath

import xxhash

from holdfast.digests import FileRecord
from holdfast.errors import CorruptCheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What was committed, by whom, and in which order."""

    run_id: str
    attempt: int
    """Which start of the run wrote it, from 1."""
    sequence: int
    """The order of commits in a run, over all tiers; larger is newer."""
    iteration: int
    tier: str
    world_size: int
    """Ranks that wrote it."""
    saved_at: str
    """UTC, ISO 8601. For people: nothing is decided by a clock."""
    files: tuple[FileRecord, ...]
    """Every file but the manifest itself, by path."""
    written_by: str = "holdfast"
    """Name and version of the writer."""
    format: int = FORMAT

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together, the manifest not counted."""
        return sum(each.size_bytes for each in self.files)

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        return seal(json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n")

    @classmethod
    def from_bytes(cls, content: bytes, path: str) -> Manifest:
        """Read the content of manifest.json; `path` is for messages.

        Raises:
            CorruptCheckpointError: torn, altered, of a newer format, or with paths that leave the
                checkpoint.
        """
        body = unseal(content, path)
        try:
            values = json.loads(body)
            format_number = values["format"]
            if format_number == FORMAT:
                files = tuple(
                    FileRecord(**{**each, "blocks": _as_tuple(each["blocks"])})
                    for each in values["files"]
                )
                manifest = cls(**{**values, "files": files})
                _check_types(manifest)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(path, f"is not a manifest: {error}") from error
        if format_number != FORMAT:
            raise CorruptCheckpointError(
                path, f"is of format {format_number}, not {FORMAT}: it needs a newer holdfast"
            )
        for each in files:
            if not _stays_inside(each.path):
                raise CorruptCheckpointError(path, f"lists {each.path!r}, outside the checkpoint")
        return manifest


def seal(text: bytes) -> bytes:
    """Return a text that ends with a newline and, as one more line, the digest of it."""
    return text + xxhash.xxh3_128_hexdigest(text).encode() + b"\n"


def unseal(content: bytes, path: str) -> bytes:
    """Return the text that `seal` was given; `path` is for messages.

    Raises:
        CorruptCheckpointError: torn or altered, by as little as the last newline.
    """
    text = content[: content.rfind(b"\n", 0, -1) + 1]
    if seal(text) != content:
        raise CorruptCheckpointError(path, "does not match the digest in its last line")
    return text


def _check_types(manifest: Manifest) -> None:
    """Refuse what would fail far from here: decisions compare these numbers and join these texts.

    Raises:
        TypeError: naming the first field of the wrong type.
        ValueError: a digest is not hexadecimal, or no rank wrote the checkpoint.
    """
    records: list[Manifest | FileRecord] = [manifest, *manifest.files]
    for record in records:
        for each in fields(record):
            kind = _FIELD_TYPES.get(str(each.type))
            if kind is not None and type(getattr(record, each.name)) is not kind:
                raise TypeError(f"{each.name} is no {each.type}")
    for file in manifest.files:
        for digest in (file.digest, *(file.blocks or ())):
            bytes.fromhex(digest)
    if manifest.world_size < 1:
        raise ValueError(f"world_size is {manifest.world_size}")


_FIELD_TYPES: dict[str, type] = {"str": str, "int": int}


def _as_tuple(blocks: list[str] | None) -> tuple[str, ...] | None:
    return None if blocks is None else tuple(blocks)


def _stays_inside(path: str) -> bool:
    if not path or "\\" in path or not path.isprintable():  # a name that a message can show
        return False
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and str(parts) == path
