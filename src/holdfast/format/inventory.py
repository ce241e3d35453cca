"""Which tensors are in which bytes of a shard file, found without torch.

Owns naming the tensors of damaged blocks, from the index of the file itself, which also lists the
own copies of the rank that wrote it, or else from `.metadata`. Runs no code from the files and
imports nothing: every type in `.metadata` is replaced by a stand-in. An index and metadata that
cannot be read name no tensors; that is no error: damage is reported anyway.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from holdfast.storage.backend import Storage, open_stream
from holdfast.storage.digests import body_bytes_of
from holdfast.storage.store import Damage

METADATA_NAME = ".metadata"
TAIL = struct.Struct("<QQ")
"""The last bytes of a shard file's body: where the index starts, and how long it is."""
_SHOWN = 3


def names_of(files: Storage, file_name: str, byte_range: tuple[int, int]) -> list[str]:
    """Return the names of the items in a byte range of a file of a checkpoint, as `names_in`."""
    try:
        with open_stream(files, file_name) as stream:
            body_bytes = body_bytes_of(stream)
            if body_bytes is not None and (names := names_in_body(stream, body_bytes, byte_range)):
                return names
        return names_in(files.get(METADATA_NAME), file_name, byte_range)
    except OSError:
        return []


def names_in_body(stream: BinaryIO, body_bytes: int, byte_range: tuple[int, int]) -> list[str]:
    """Return the names of the items in a byte range, from the index at the end of a body.

    The index itself may be what is damaged: then there are none.
    """
    try:
        stream.seek(body_bytes - TAIL.size)
        offset, length = TAIL.unpack(stream.read(TAIL.size))
        if offset + length > body_bytes:
            return []
        stream.seek(offset)
        described = json.loads(stream.read(length))
        fields = described["fields"]
        places = [fields.index(each) for each in ("name", "offset", "length")]
        first, last = byte_range
        shares = []
        for row in described["items"]:
            name, start, size = (row[place] for place in places)
            shares.append((min(start + size, last + 1) - max(start, first), str(name)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return []
    return _by_share(shares)


def names_in(metadata_content: bytes, file_name: str, byte_range: tuple[int, int]) -> list[str]:
    """Return the flat names of the items in a byte range (ends included), largest overlap first."""
    try:
        metadata = _InventoryUnpickler(io.BytesIO(metadata_content)).load()
    except Exception:  # noqa: BLE001  # the metadata itself may be what is damaged
        return []
    places = getattr(metadata, "storage_data", None)
    return names_at(places, file_name, byte_range) if isinstance(places, dict) else []


def names_at(places: Mapping[Any, Any], file_name: str, byte_range: tuple[int, int]) -> list[str]:
    """Like `names_in`, from the `storage_data` of metadata that was already read."""
    first, last = byte_range
    shares = [
        (min(info.offset + info.length, last + 1) - max(info.offset, first), index.fqn)
        for index, info in places.items()
        if info.relative_path == file_name
    ]
    return _by_share(shares)


def _by_share(shares: Sequence[tuple[int, str]]) -> list[str]:
    return [name for share, name in sorted(shares, key=lambda each: -each[0]) if share > 0]


def list_names(names: Sequence[str]) -> str:
    """Return a message suffix that names the first affected tensors; empty for none."""
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f", in {', '.join(names[:_SHOWN])}{more}"


class _StandIn:
    """Accepts the pickled state of an object whose type is not imported."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        slots: Any = None
        if isinstance(state, tuple) and len(state) == 2:
            state, slots = state
        for part in (state, slots):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _InventoryUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _StandIn


def name_tensors(files: Storage, damages: Sequence[Damage]) -> list[Damage]:
    """Add to each damaged block of a checkpoint the names of the tensors in it, where known."""
    return [replace(each, reason=each.reason + _clause(files, each)) for each in damages]


def _clause(files: Storage, damage: Damage) -> str:
    if damage.byte_range is None:
        return ""
    _, _, file_name = damage.path.partition("/")  # after the checkpoint's own name
    return list_names(names_of(files, file_name, damage.byte_range))
