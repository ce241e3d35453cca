"""The exact layout of one rank's shard file, computed from its items before any byte is written.

Owns where each item is in the body of a shard file, the container of each tensor (what `torch.save`
would have written: header, payload, trailer), and the index after the items, from which the file
can be read without `.metadata`. Promises that stock torch can read every container, that every
slot starts at a multiple of 64 bytes, and that an index read back is in bounds and consistent, or
refused; nothing in it is ever unpickled. Refuses items that contradict themselves or one another.
Knows no bytes of tensors, no files and no digests. Source of the container's format: torch's own
zip archive, made by torch under `torch.serialization.skip_data`.

An item may be per rank: every rank that has it writes its own copy, and the index says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from holdfast.errors import FormatTooNewError
from holdfast.format.inventory import TAIL
from holdfast.format.values import is_component
from holdfast.storage.digests import round_up
from holdfast.storage.manifest import COMPONENTS, FORMAT, PER_RANK, check_format


@dataclass(frozen=True)
class Container:
    """The bytes around a dense, row-major tensor."""

    header: bytes
    payload_bytes: int
    trailer: bytes

    @property
    def size_bytes(self) -> int:
        """Of header, payload and trailer."""
        return len(self.header) + self.payload_bytes + len(self.trailer)


@lru_cache(maxsize=1 << 16)
def container_of(dtype: torch.dtype, shape: torch.Size) -> Container:
    """Return the container torch writes around a contiguous CPU tensor, without filling one."""
    sink = _Sink()
    # Not torch.empty: with deterministic algorithms it fills the memory.
    unfilled: Any = torch.UntypedStorage
    storage = unfilled(shape.numel() * dtype.itemsize, device="cpu")
    tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage).view(shape)
    with torch.serialization.skip_data():
        torch.save(tensor, sink)  # type: ignore[arg-type]  # write, seek
    return sink.container()


class _Sink:
    """Collects what torch writes and records the one range it seeks over: the payload."""

    def __init__(self) -> None:
        self._before = bytearray()
        self._after = bytearray()
        self._skipped = 0

    def write(self, part: bytes) -> int:
        side = self._after if self._skipped else self._before
        side += part
        return len(part)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = self.tell()
        target = position + offset if whence == os.SEEK_CUR else offset
        assert target >= position, "torch is expected to skip forward, once"
        self._skipped += target - position
        return target

    def tell(self) -> int:
        return len(self._before) + self._skipped + len(self._after)

    def flush(self) -> None:
        return

    def container(self) -> Container:
        return Container(bytes(self._before), self._skipped, bytes(self._after))


SLOT_ALIGNMENT = 64
BODY_ALIGNMENT = 4096

_TYPE = "holdfast-shard-index"
_FIELDS = (
    "name",
    "path",  # null: the name split at its dots
    "dtype",  # null: a value, as torch.save wrote it, zero-filled
    "size",
    "offsets",  # null: all zero
    "lengths",  # null: as size
    "offset",
    "length",
    "payload_offset",  # null: only torch.load can locate the bytes
    "kind",  # number in the table of kinds
    "per_rank",  # 1: the own copy of the rank that wrote the file, 0: the same on every rank
)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Item:
    """One chunk of a tensor, or one value, that a rank could write."""

    name: str
    """DCP's flat name."""
    path: tuple[str | int, ...]
    """The item's keys in the nested state."""
    dtype: torch.dtype | None
    """None: a value, which is no tensor."""
    size: tuple[int, ...]
    """Of the whole tensor; offsets and lengths say which part this is."""
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    capacity_bytes: int = 0
    """Slot size of a value, or of a tensor that only torch can pickle; 0: a dense tensor."""
    alias_of: str | None = None
    """Name of an earlier item of this rank that has the same bytes."""
    per_rank: bool = False
    """Whether every rank that has it writes its own copy, of whatever type and size. It is whole:
    `size` is that of this rank's copy."""
    kind: str = ""
    """What the value is, as canonical JSON; empty: not recorded."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The location of one item's bytes in the body."""

    item: Item
    """The item that the slot was made for; aliases share it."""
    offset: int
    container: Container | None
    """None: the torch.save bytes, zero-filled to the item's capacity."""

    @property
    def payload_offset(self) -> int:
        """Offset of the tensor's own bytes; for a value, the slot's start."""
        return self.offset if self.container is None else self.offset + len(self.container.header)

    @property
    def payload_bytes(self) -> int:
        """Of the tensor's own bytes; for a value, the slot's capacity."""
        return self.size_bytes if self.container is None else self.container.payload_bytes

    @property
    def size_bytes(self) -> int:
        """Of the whole slot, without the padding after it."""
        return self.item.capacity_bytes if self.container is None else self.container.size_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """The body of a shard file: slots, zero padding between them, the index, and its location."""

    slots: tuple[Slot, ...]
    """In file order."""
    items: tuple[tuple[Item, Slot], ...]
    """Every item in the order given, aliases included, with its slot."""
    index_offset: int
    index: bytes
    body_bytes: int

    @property
    def tail(self) -> bytes:
        """The last bytes of the body, which say where the index is."""
        return TAIL.pack(self.index_offset, len(self.index))


class Entry(NamedTuple):
    """One item as the index of a shard file describes it."""

    name: str
    path: tuple[str | int, ...]
    dtype: torch.dtype | None
    """None: a value."""
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    offset: int
    """Start of the slot, whose bytes torch.load can read."""
    length: int
    payload_offset: int | None
    """Start of the tensor's row-major bytes; None: only torch.load can locate them."""
    kind: str = ""
    per_rank: bool = False
    """Whether it is the own copy of the rank that wrote the file."""

    @property
    def payload_bytes(self) -> int:
        """Of the tensor's bytes; 0 where only torch.load can locate them."""
        if self.payload_offset is None or self.dtype is None:
            return 0
        return prod(self.lengths) * self.dtype.itemsize


def slot_offsets(slot_bytes: IntArray) -> IntArray:
    """Return the start offsets of consecutive slots of these sizes; size 0 takes no space."""
    padded = -(-slot_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    ends: IntArray = np.cumsum(padded, dtype=np.int64)
    return ends - padded


def containers_of(items: Sequence[Item]) -> list[Container | None]:
    """Return the container of each item; None where torch.save bytes fill the slot's capacity.

    Raises:
        ValueError: a value has no capacity, or sizes, offsets and lengths contradict one another.
    """
    known: dict[tuple[torch.dtype, tuple[int, ...]], Container] = {}
    containers: list[Container | None] = []
    for item in items:
        if not len(item.size) == len(item.offsets) == len(item.lengths):
            raise ValueError(f"{item.name}: size, offsets and lengths have different dimensions")
        if item.per_rank and item.lengths != item.size:
            raise ValueError(f"{item.name}: a rank's own copy must be whole")
        if item.capacity_bytes:
            containers.append(None)
            continue
        if item.dtype is None:
            raise ValueError(f"{item.name}: a value needs a slot, and its capacity is 0")
        key = (item.dtype, item.lengths)
        if (container := known.get(key)) is None:
            container = known[key] = container_of(item.dtype, torch.Size(item.lengths))
        containers.append(container)
    return containers


def leaders_of(items: Sequence[Item]) -> list[int]:
    """Return for each item the position of the item whose bytes it shares; -1: it has its own.

    An alias of a name with several chunks refers to the chunk at its own offsets.

    Raises:
        ValueError: an item is listed twice, or an alias has no matching earlier item.
    """
    by_chunk: dict[tuple[str, tuple[int, ...]], int] = {}
    by_name: dict[str, int] = {}
    leaders: list[int] = []
    for position, item in enumerate(items):
        leader = -1
        if item.alias_of is not None:
            found = by_chunk.get((item.alias_of, item.offsets), by_name.get(item.alias_of))
            if found is None:
                raise ValueError(f"{item.name}: no earlier item is named {item.alias_of!r}")
            first = items[found]
            if (first.dtype, first.lengths, first.capacity_bytes, first.per_rank) != (
                item.dtype,
                item.lengths,
                item.capacity_bytes,
                item.per_rank,
            ):
                raise ValueError(f"{item.name} cannot have the bytes of {item.alias_of}")
            leader = found if leaders[found] < 0 else leaders[found]
        leaders.append(leader)
        chunk = (item.name, item.offsets)
        if by_chunk.setdefault(chunk, position) != position:
            raise ValueError(f"{item.name} is listed twice at offsets {item.offsets}")
        by_name.setdefault(item.name, position)
    return leaders


def lay_out(items: Sequence[Item]) -> Layout:
    """Return the layout of a shard file that holds these items, in this order.

    Raises:
        ValueError: items contradict themselves or one another.
    """
    leaders = leaders_of(items)
    containers = containers_of(items)
    sizes = [
        0 if leader >= 0 else item.capacity_bytes if container is None else container.size_bytes
        for item, container, leader in zip(items, containers, leaders, strict=True)
    ]
    starts: list[int] = slot_offsets(np.array(sizes, dtype=np.int64)).tolist()
    slots: list[Slot] = []
    placed: list[tuple[Item, Slot]] = []
    for item, container, leader, start in zip(items, containers, leaders, starts, strict=True):
        if leader < 0:
            slot = Slot(item, start, container)
            slots.append(slot)
        else:
            slot = placed[leader][1]
        placed.append((item, slot))
    end = slots[-1].offset + slots[-1].size_bytes if slots else 0
    index_offset = round_up(end, SLOT_ALIGNMENT)
    index = _encode_index(placed)
    body_bytes = round_up(index_offset + len(index) + TAIL.size, BODY_ALIGNMENT)
    return Layout(tuple(slots), tuple(placed), index_offset, index, body_bytes)


def _encode_index(placed: Sequence[tuple[Item, Slot]]) -> bytes:
    dtypes: dict[torch.dtype | None, str | None] = {None: None}
    kinds: dict[str, int] = {"": 0}
    rows: list[tuple[Any, ...]] = []
    for item, slot in placed:
        if item.dtype not in dtypes:
            dtypes[item.dtype] = str(item.dtype).removeprefix("torch.")
        container = slot.container
        rows.append(
            (
                item.name,
                None if tuple(item.name.split(".")) == item.path else item.path,
                dtypes[item.dtype],
                item.size,
                item.offsets if any(item.offsets) else None,
                None if item.lengths == item.size else item.lengths,
                slot.offset,
                slot.size_bytes,
                None if container is None else slot.offset + len(container.header),
                kinds.setdefault(item.kind, len(kinds)),
                int(item.per_rank),
            )
        )
    described = {
        "type": _TYPE,
        "format": FORMAT,
        "requires": [
            *([PER_RANK] if any(item.per_rank for item, _ in placed) else ()),
            *([COMPONENTS] if any(is_component(item.name) for item, _ in placed) else ()),
        ],
        "fields": _FIELDS,
        "kinds": [*kinds],
        "items": rows,
    }
    return json.dumps(described, separators=(",", ":"), check_circular=False).encode("ascii")


def locate_index(end: bytes | memoryview, body_bytes: int) -> range:
    """Return the byte range of the index in the body, from the body's last 16 bytes.

    Raises:
        ValueError: no writer could have put the index there.
    """
    if len(end) != TAIL.size:
        raise ValueError(f"the end of the body has {len(end)} bytes, not {TAIL.size}")
    offset, length = TAIL.unpack(end)
    if offset % SLOT_ALIGNMENT or not length or offset + length > body_bytes - TAIL.size:
        raise ValueError(f"the index cannot be {length} bytes at {offset} of {body_bytes}")
    return range(offset, offset + length)


def read_index(body: bytes | memoryview) -> list[Entry]:
    """Return the items of a whole body.

    Raises:
        ValueError: the index is not where the body's end says, or contradicts itself.
    """
    place = locate_index(body[-TAIL.size :], len(body))
    return parse_index(body[place.start : place.stop], place.start)


def parse_index(
    content: bytes | memoryview, index_offset: int, where: str = "the index"
) -> list[Entry]:
    """Return the items that an index at this offset describes, in file order.

    Fields that a later version appended are ignored. `where`: for messages.

    Raises:
        ValueError: it is no index, or names ranges outside the body or types unknown here.
        FormatTooNewError: it has a later format, or requires a feature of a later version.
    """
    try:
        described = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the index cannot be read: {error}") from error
    if not isinstance(described, Mapping) or described.get("type") != _TYPE:
        raise ValueError("the index is not that of a shard file")
    try:
        check_format(described, FORMAT, where, FORMAT)
    except FormatTooNewError:
        raise
    except (KeyError, ValueError) as error:
        raise ValueError(f"the index has no format of ours: {error}") from None
    rows, fields = described.get("items"), described.get("fields")
    if (
        not isinstance(fields, list)
        or fields[: len(_FIELDS)] != list(_FIELDS)
        or not isinstance(rows, list)
    ):
        raise ValueError("the index has other fields than its format")
    kinds = described.get("kinds")
    if not isinstance(kinds, list) or not all(type(each) is str for each in kinds):
        raise ValueError("the index has no table of kinds")
    entries: list[Entry] = []
    dtypes: dict[str | None, torch.dtype | None] = {None: None}
    for row in rows:
        try:
            if type(row) is not list or len(row) != len(fields):
                raise ValueError(f"does not have {len(fields)} fields")
            entries.append(_entry_of(row[: len(_FIELDS)], dtypes, kinds, index_offset))
        except ValueError as error:
            is_named = type(row) is list and row and type(row[0]) is str
            name = f" ({row[0]})" if is_named else ""
            raise ValueError(f"item {len(entries)} of the index{name} {error}") from None
    if len({(entry.name, entry.offsets) for entry in entries}) != len(entries):
        raise ValueError("the index lists an item twice")
    return entries


def _entry_of(
    row: list[Any],
    dtypes: dict[str | None, torch.dtype | None],
    kinds: Sequence[str],
    index_offset: int,
) -> Entry:
    """Return one item; `dtypes` caches dtypes by name and is extended as needed.

    Raises:
        ValueError: it contradicts itself; the message is to follow the item's name.
    """
    name, path, dtype_name, size, offsets, lengths, offset, length, payload_offset, *rest = row
    if type(name) is not str:
        raise ValueError("has no name")
    if path is None:
        path = name.split(".")
    elif type(path) is not list or not all(type(key) in (str, int) for key in path):
        raise ValueError("has no path")
    if type(dtype_name) is str and dtype_name not in dtypes:
        found = getattr(torch, dtype_name, None)
        dtypes[dtype_name] = found if isinstance(found, torch.dtype) else None
    dtype = dtypes.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None and dtype_name is not None:
        raise ValueError(f"is of type {dtype_name!r}, which this torch does not know")
    size = _counts(size)
    is_part = offsets is not None or lengths is not None
    entry = Entry(
        name,
        tuple(path),
        dtype,
        size,
        (0,) * len(size) if offsets is None else _counts(offsets),
        size if lengths is None else _counts(lengths),
        _count(offset),
        _count(length),
        None if payload_offset is None else _count(payload_offset),
        *_recorded(rest, kinds),
    )
    if is_part:
        _check_part(entry)
    end = offset + length
    if offset % SLOT_ALIGNMENT or end > index_offset:
        raise ValueError(f"is at {offset}-{end} of {index_offset}")
    if payload_offset is not None and not (
        dtype is not None
        and offset <= payload_offset
        and payload_offset + entry.payload_bytes <= end
    ):
        raise ValueError("has its bytes outside its slot")
    return entry


def _recorded(rest: Sequence[Any], kinds: Sequence[str]) -> tuple[str, bool]:
    """Return kind, and whether it is a rank's own copy."""
    number, per_rank = rest
    if _count(number) >= len(kinds):
        raise ValueError(f"is of kind {number}, and there are {len(kinds)}")
    if type(per_rank) is not int or per_rank not in (0, 1):
        raise ValueError(f"has {per_rank!r} where 0 or 1 should be")
    return kinds[number], bool(per_rank)


def _check_part(entry: Entry) -> None:
    if entry.per_rank:
        raise ValueError("is a part of a rank's own copy")
    if not len(entry.size) == len(entry.offsets) == len(entry.lengths):
        raise ValueError("has sizes of different dimensions")
    if all(entry.lengths) and any(
        offset + length > full
        for offset, length, full in zip(entry.offsets, entry.lengths, entry.size, strict=True)
    ):
        raise ValueError("reaches beyond its tensor")


def _counts(value: Any) -> tuple[int, ...]:
    if type(value) is not list:
        raise ValueError(f"has {value!r} where a size should be")
    for each in value:
        _count(each)
    return tuple(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"has {value!r} where a count should be")
    return value
