"""The commit record of a checkpoint: on-disk format 2.

Owns the JSON of manifest.json. Promises that a manifest is read back exactly or refused with a
reason; its last line is the xxh3-128 of all bytes before it. Refuses paths that leave the
checkpoint. Knows no file system.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import xxhash

from holdfast.errors import CorruptCheckpointError, FormatTooNewError
from holdfast.storage.backend import is_name
from holdfast.storage.digests import FileRecord

PERSISTENT, LOCAL, FOREIGN = "persistent", "local", "foreign"
"""Tiers; a foreign checkpoint is one written by torch alone."""
MANIFEST_NAME = "manifest.json"
FORMAT = 2
"""Of manifests and of the indexes of shard files. Format 1 was never released, and is not read."""
PER_RANK = "per_rank"
"""The feature that shard files hold copies which belong to one rank each."""
COMPONENTS = "components"
"""The feature that it holds components, which a reader that knows none would leave out."""
BASE = "base"
"""The feature that a checkpoint holds a part of a model, and its base has the rest."""
FEATURES: frozenset[str] = frozenset({PER_RANK, COMPONENTS, BASE})
"""Features that this version understands, of those a file may list under `requires`."""


@dataclass(frozen=True)
class Base:
    """The full checkpoint that has what a part of a model lacks."""

    path: str
    """Where it was when the part was saved."""
    relative_path: str
    """The same, from the store of the part: both may be moved together."""
    run_id: str
    iteration: int
    digest: str
    """Of the digests of all its files."""


@dataclass(frozen=True)
class Manifest:
    """The commit record: what was committed, by which attempt, in which order."""

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
    """UTC, ISO 8601. Informative: no decision depends on a clock."""
    files: tuple[FileRecord, ...]
    """Every file except the manifest, by path."""
    written_by: str = "holdfast"
    """Name and version of the writer."""
    parent: dict[str, Any] | None = None
    """The checkpoint of another run that this one began from; None: it began from nothing."""
    requires: tuple[str, ...] = ()
    """Features that a reader must know."""
    differing: tuple[str, ...] | None = None
    """Names, or groups of names, of which ranks saved copies that differ; None: not compared."""
    audit: dict[str, Any] | None = None
    """What was compared of the replicas of tensors; None: nothing."""
    base: dict[str, Any] | None = None
    """As `Base`: what has the rest of the model; None: the checkpoint is complete by itself."""
    format: int = FORMAT

    @property
    def size_bytes(self) -> int:
        """Total bytes of all files, without the manifest."""
        return sum(each.size_bytes for each in self.files)

    @property
    def compared(self) -> tuple[int, ...]:
        """The iteration at which each share of the replicas was compared last; empty: not known."""
        found = (self.audit or {}).get("compared")
        if not isinstance(found, list | tuple) or not all(type(each) is int for each in found):
            return ()
        return tuple(found)

    @property
    def base_record(self) -> Base | None:
        """The base, if there is one; unknown fields are left out."""
        return None if self.base is None else Base(**known_fields(Base, self.base))

    @property
    def content_digest(self) -> str:
        """Hexadecimal digest of the names, sizes and digests of all files."""
        lines = sorted(f"{each.path} {each.size_bytes} {each.digest}\n" for each in self.files)
        return xxhash.xxh3_128_hexdigest("".join(lines).encode())

    def without_files(self) -> Manifest:
        """Return what other ranks are told, who are given the records they need beside it."""
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        told |= {"files": (), "audit": None}
        return _PartOfManifest(**told, whole_digest=self.content_digest)

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        values = asdict(self)
        for name in ("parent", "differing", "audit", "base"):
            if values[name] is None:
                del values[name]
        return seal(json.dumps(values, indent=1, sort_keys=True).encode() + b"\n")

    @classmethod
    def from_bytes(cls, content: bytes, path: str) -> Manifest:
        """Parse the content of manifest.json; `path` is for messages.

        Unknown fields are ignored: a later version may add some.

        Raises:
            CorruptCheckpointError: torn, altered, or with paths that leave the checkpoint.
            FormatTooNewError: it has a later format, or requires a feature of a later version.
        """
        try:
            body = unseal(content, path)
        except CorruptCheckpointError:
            _check_unsealed(content, path)
            raise
        try:
            values = json.loads(body)
            check_format(values, FORMAT, path, FORMAT)
            files = tuple(map(_read_record, values["files"]))
            known = {**known_fields(cls, values), "files": files}
            for name in ("requires", "differing"):
                if known.get(name) is not None:
                    known[name] = _strings(known[name], name)
            manifest = cls(**known)
            _check_types(manifest)
        except FormatTooNewError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptCheckpointError(path, f"is not a manifest: {error}") from error
        for each in files:
            if not is_name(each.path):
                raise CorruptCheckpointError(path, f"lists {each.path!r}, outside the checkpoint")
        return manifest


@dataclass(frozen=True)
class _PartOfManifest(Manifest):
    """A manifest that lists some of the files alone, and has the digest of all."""

    whole_digest: str = field(kw_only=True)

    @property
    def content_digest(self) -> str:
        """Of all files, as the whole manifest has it."""
        return self.whole_digest


def check_format(values: Mapping[str, Any], known: int, path: str, oldest: int = 1) -> None:
    """Refuse a record whose format or required features this version does not know.

    `values`: as read from JSON. `known`: the latest format of such records; `oldest`: the first.

    Raises:
        FormatTooNewError: it is of a later version.
        ValueError: its format is not a number, or older.
    """
    found, sequence = values["format"], values.get("sequence")
    place = sequence if type(sequence) is int else None
    if type(found) is not int or found < oldest:
        raise ValueError(f"format is {found!r}")
    if found > known:
        raise FormatTooNewError(path, f"format {found}", f"up to format {known}", place)
    requires = values.get("requires", [])
    if not isinstance(requires, list):
        raise ValueError(f"requires is {requires!r}")
    if unknown := sorted(str(each) for each in requires if each not in FEATURES):
        features = ", ".join(map(repr, unknown))
        what = f"format {found} and requires {features}"
        raise FormatTooNewError(path, what, f"format {known} without", place)


def _check_unsealed(content: bytes, path: str) -> None:
    """Refuse an intact record of a later format that is sealed in another way, or not at all.

    A record of this format ends with its digest, so it is never JSON as a whole, damaged or not.

    Raises:
        FormatTooNewError: it is of a later version.
    """
    try:
        check_format(json.loads(content), FORMAT, path)
    except FormatTooNewError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def known_fields(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a dataclass has a field for."""
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _read_record(values: Mapping[str, Any]) -> FileRecord:
    known = known_fields(FileRecord, values)
    return FileRecord(**{**known, "blocks": _as_tuple(values["blocks"])})


def seal(text: bytes) -> bytes:
    """Append the digest of `text`, which ends with a newline, as one more line."""
    return text + xxhash.xxh3_128_hexdigest(text).encode() + b"\n"


def unseal(content: bytes, path: str) -> bytes:
    """Return the text without its digest line; `path` is for messages.

    Raises:
        CorruptCheckpointError: torn or altered, even if only the last newline is missing.
    """
    text = content[: content.rfind(b"\n", 0, -1) + 1]
    if seal(text) != content:
        raise CorruptCheckpointError(path, "does not match the digest in its last line")
    return text


def _check_types(manifest: Manifest) -> None:
    """Refuse values that would fail later: decisions compare these numbers and join these strings.

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
    for name in ("parent", "audit", "base"):
        if not isinstance(getattr(manifest, name), dict | None):
            raise TypeError(f"{name} is no mapping")
    if (base := manifest.base_record) is not None:
        for each in fields(base):
            if type(getattr(base, each.name)) is not _FIELD_TYPES[str(each.type)]:
                raise TypeError(f"{each.name} of the base is no {each.type}")
    if manifest.world_size < 1:
        raise ValueError(f"world_size is {manifest.world_size}")


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(type(each) is str for each in value):
        raise TypeError(f"{name} is no list of strings")
    return tuple(value)


_FIELD_TYPES: dict[str, type] = {"str": str, "int": int}


def _as_tuple(blocks: list[str] | None) -> tuple[str, ...] | None:
    return None if blocks is None else tuple(blocks)
