"""Which tensors are in which bytes of a shard file, found without torch.

Owns reading `.metadata` only for the locations of its items, and naming the tensors of damaged
blocks. Runs no code from the file and imports nothing: every type in it is replaced by a stand-in.
Metadata that cannot be read names no tensors; that is no error: damage is reported anyway.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from holdfast.storage.backend import Storage
from holdfast.storage.store import Damage

METADATA_NAME = ".metadata"
_SHOWN = 3


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
    try:
        content = files.get(METADATA_NAME)
    except OSError:
        return ""
    _, _, file_name = damage.path.partition("/")  # after the checkpoint's own name
    return list_names(names_in(content, file_name, damage.byte_range))
