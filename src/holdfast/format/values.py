"""Values that are no tensors: the slots that hold them, and the names of a run's small states.

Owns how the bytes of a value fill a slot that is larger than they are, so that a value may grow
from save to save without another plan, and which small states of a run there are. Promises that
`torch.load` reads a filled slot as it would read the bytes alone.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from holdfast.storage.digests import round_up

SCHEDULER, RNG, DATA, TRAIN_STATE, EMPTY = (
    "scheduler",
    "rng",
    "data",
    "train_state",
    "empty_mappings",
)
SMALL_STATES = (RNG, SCHEDULER, DATA, TRAIN_STATE, EMPTY)
"""Names of the states beside model and optimizer. `empty_mappings` are the nested keys of mappings
without a leaf, which DCP has no name for."""
COMPONENTS = "components."
"""Begin of the names of components (`state.components`): their plain parts are small states."""
GROUPS = ".param_groups"
"""End of the names of the records of an optimizer's groups."""
SLOT_ALIGNMENT = 64
_LEAST_HEADROOM_BYTES = 1 << 10
_MOST_DOUBLED_BYTES = 1 << 20
_END = struct.Struct("<4sHHHHIIH")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<4sIQI")
_IN_END_64 = 0xFFFFFFFF
"""In place of an offset that only the 64-bit record has room for."""
_MARKS = (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06")


def is_component(name: str) -> bool:
    """Whether a name is of a component."""
    return name.startswith(COMPONENTS)


def is_united(name: str) -> bool:
    """Whether another number of ranks needs the copies of all ranks that saved, not one of them."""
    return name == DATA or name.endswith(GROUPS)


def split_small(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of model and optimizer, and the small states, each by name."""
    small = {
        name: value for name, value in values.items() if name in SMALL_STATES or is_component(name)
    }
    return {name: value for name, value in values.items() if name not in small}, small


def capacity_for(size_bytes: int, name: str) -> int:
    """Return the size of a slot for a value of this size: twice as much, or a quarter if large.

    The state of generators does not grow.
    """
    headroom = max(min(size_bytes, _MOST_DOUBLED_BYTES), size_bytes // 4, _LEAST_HEADROOM_BYTES)
    headroom = _LEAST_HEADROOM_BYTES if name == RNG else headroom
    return round_up(size_bytes + headroom, SLOT_ALIGNMENT)


def fill(content: bytes, capacity_bytes: int) -> bytes:
    """Return what `torch.save` wrote as an archive of exactly this size.

    The archive's directory is moved to the end of the slot: readers search for it there, and only
    in the last 64 KiB. Source of the format: PKWARE's APPNOTE, 4.3.14 to 4.3.16.

    Raises:
        ValueError: it is larger, or no archive that torch writes.
    """
    gap = capacity_bytes - len(content)
    start_64 = len(content) - _END.size - _LOCATOR_64.size - _END_64.size
    if gap < 0 or start_64 < 0:
        raise ValueError(f"{len(content)} bytes do not fill a slot of {capacity_bytes}")
    end_64 = list(_END_64.unpack_from(content, start_64))
    locator = list(_LOCATOR_64.unpack_from(content, start_64 + _END_64.size))
    end = list(_END.unpack_from(content, len(content) - _END.size))
    directory = end_64[9]
    is_ours = (end_64[0], locator[0], end[0]) == _MARKS and locator[2] == start_64
    if not is_ours or end[6] not in (directory, _IN_END_64):
        raise ValueError("not an archive as torch.save writes it")
    end_64[9] += gap
    locator[2] += gap
    end[6] = min(directory + gap, _IN_END_64)
    return b"".join(
        (
            content[:directory],
            bytes(gap),
            content[directory:start_64],
            _END_64.pack(*end_64),
            _LOCATOR_64.pack(*locator),
            _END.pack(*end),
        )
    )
