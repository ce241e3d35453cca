"""The image of one rank's shard file: where items lie, and the index that says so."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from holdfast.errors import FormatTooNewError
from holdfast.format.inventory import TAIL
from holdfast.format.layout import (
    Item,
    Layout,
    container_of,
    lay_out,
    locate_index,
    parse_index,
    read_index,
)


def _tensor(name: str, *size: int, dtype: torch.dtype = torch.float32, **other: Any) -> Item:
    return Item(name, tuple(name.split(".")), dtype, size, (0,) * len(size), size, **other)


def _value(name: str, capacity_bytes: int) -> Item:
    return Item(name, (name,), None, (), (), (), capacity_bytes)


def _chunk(name: str, size: tuple[int, ...], offsets: tuple[int, ...], *lengths: int) -> Item:
    return Item(name, (name,), torch.float32, size, offsets, lengths)


MIXED = [
    _tensor("model.weight", 64, 33),
    _tensor("model.scalar", dtype=torch.bfloat16),
    _tensor("model.none", 0, 7, dtype=torch.int64),
    _value("step", 1300),
    _tensor("model.mask", 5, dtype=torch.bool),
    _tensor("model.tied", 64, 33, alias_of="model.weight"),
    _tensor("model.phase", 3, dtype=torch.complex64),
    _tensor("opaque", 2, 2, capacity_bytes=2000),
    _chunk("sharded", (8, 4), (2, 0), 3, 4),
    Item("list.0", ("list", 0), torch.int32, (1,), (0,), (1,)),
    _tensor("own", 3, per_rank=True, kind='{"type":"tensor"}'),
    replace(_value("rng", 640), per_rank=True, kind='{"type":"value"}'),
]


def _image_of_index(layout: Layout) -> bytes:
    body = bytearray(layout.body_bytes)
    body[layout.index_offset : layout.index_offset + len(layout.index)] = layout.index
    body[-TAIL.size :] = layout.tail
    return bytes(body)


@pytest.mark.parametrize(
    "items",
    [
        [],
        MIXED[:1],
        MIXED[2:3],
        MIXED[3:4],
        MIXED,
        [_value(f"v{size}", size) for size in range(1, 130)],
    ],
    ids=["nothing", "one", "empty", "value", "mixed", "odd sizes"],
)
def test_slots_follow_one_another_aligned_and_apart(items: list[Item]) -> None:
    """Every slot starts at the first multiple of 64 behind the last; the body is whole pages."""
    layout = lay_out(items)
    end = 0
    for slot in layout.slots:
        assert slot.offset % 64 == 0
        assert 0 <= slot.offset - end < 64
        end = slot.offset + slot.size_bytes
    assert layout.index_offset % 64 == 0
    assert 0 <= layout.index_offset - end < 64
    index_end = layout.index_offset + len(layout.index)
    assert layout.body_bytes % 4096 == 0
    assert 0 <= layout.body_bytes - TAIL.size - index_end < 4096


def test_the_tail_never_meets_the_index() -> None:
    """However long the index is, the place of its tail is its own."""
    for length in range(3000, 3000 + 4096, 7):
        layout = lay_out([_value("n" * length, 64)])
        assert layout.index_offset + len(layout.index) <= layout.body_bytes - TAIL.size


def test_a_slot_is_the_container_that_torch_reads() -> None:
    """A dense tensor's slot has the container of its chunk, and its payload is aligned."""
    layout = lay_out(MIXED)
    for item, slot in layout.items:
        if item.capacity_bytes:
            assert slot.container is None
            assert (slot.payload_offset, slot.payload_bytes) == (slot.offset, item.capacity_bytes)
            assert slot.size_bytes == item.capacity_bytes
            continue
        assert item.dtype is not None
        assert slot.container == container_of(item.dtype, torch.Size(item.lengths))
        assert slot.payload_offset == slot.offset + len(slot.container.header)
        assert slot.payload_bytes == slot.container.payload_bytes
        assert slot.payload_bytes == 0 or slot.payload_offset % 64 == 0


def test_an_alias_takes_no_room() -> None:
    """A tied name lies in the slot of its leader, also through another alias."""
    first, second = _tensor("a", 8), _tensor("b", 8, alias_of="a")
    layout = lay_out([first, second, _tensor("c", 8, alias_of="b"), _tensor("d", 8)])
    alone = lay_out([first, _tensor("d", 8)])
    assert [slot.offset for slot in layout.slots] == [slot.offset for slot in alone.slots]
    assert [slot.item.name for _, slot in layout.items] == ["a", "a", "a", "d"]


def test_an_alias_of_a_tensor_in_chunks_means_the_chunk_at_its_place() -> None:
    """Two chunks of a tied tensor are tied one by one."""
    items = [
        _chunk("a", (4,), (0,), 2),
        _chunk("a", (4,), (2,), 2),
        replace(_chunk("b", (4,), (2,), 2), alias_of="a"),
        replace(_chunk("b", (4,), (0,), 2), alias_of="a"),
    ]
    assert [slot.item.offsets for _, slot in lay_out(items).items] == [(0,), (2,), (2,), (0,)]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([_value("v", 0)], "v: a value needs a slot"),
        ([_tensor("a", 2), _tensor("a", 2)], "a is listed twice"),
        ([_tensor("a", 2, alias_of="b")], "a: no earlier item is named 'b'"),
        ([_tensor("a", 2, alias_of="b"), _tensor("b", 2)], "a: no earlier item is named 'b'"),
        ([_tensor("b", 2), _tensor("a", 3, alias_of="b")], "a cannot have the bytes of b"),
        (
            [_tensor("b", 2), _tensor("a", 2, dtype=torch.int32, alias_of="b")],
            "a cannot have the bytes of b",
        ),
        ([replace(_tensor("a", 2), offsets=(0, 0))], "a: size, offsets and lengths have different"),
        (
            [replace(_chunk("a", (4,), (2,), 2), per_rank=True)],
            "a: a rank's own copy must be whole",
        ),
        (
            [_tensor("b", 2), _tensor("a", 2, alias_of="b", per_rank=True)],
            "a cannot have the bytes of b",
        ),
    ],
)
def test_items_that_contradict_one_another_are_refused(items: list[Item], message: str) -> None:
    """What cannot be laid out is refused by name; nothing is guessed."""
    with pytest.raises(ValueError, match=message):
        lay_out(items)


def test_the_index_tells_every_item() -> None:
    """From the body alone, names, paths, types, sizes and places of all items come back."""
    layout = lay_out(MIXED)
    entries = read_index(_image_of_index(layout))
    assert len(entries) == len(MIXED)
    for entry, (item, slot) in zip(entries, layout.items, strict=True):
        assert (entry.name, entry.path, entry.dtype) == (item.name, item.path, item.dtype)
        assert (entry.kind, entry.per_rank) == (item.kind, item.per_rank)
        assert (entry.size, entry.offsets, entry.lengths) == (
            item.size,
            item.offsets,
            item.lengths,
        )
        assert (entry.offset, entry.length) == (slot.offset, slot.size_bytes)
        dense = slot.container is not None
        assert entry.payload_offset == (slot.payload_offset if dense else None)
        assert entry.payload_bytes == (slot.payload_bytes if dense else 0)


def test_a_name_may_hold_anything() -> None:
    """Dots, quotes, other scripts, lone surrogates and nothing at all survive the index."""
    names = ["", ".", 'a"b\\', "größe", "\ud800", "a\nb", "x.1"]
    items = [Item(name, (name, 1, ""), torch.uint8, (1,), (0,), (1,)) for name in names]
    entries = read_index(_image_of_index(lay_out(items)))
    assert [(entry.name, entry.path) for entry in entries] == [
        (each.name, each.path) for each in items
    ]


def test_equal_items_give_equal_bytes() -> None:
    """The layout is a function of the items."""
    assert lay_out(MIXED) == lay_out([replace(item) for item in MIXED])


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        bytes(15),
        TAIL.pack(0, 0),
        TAIL.pack(0, 4096),
        TAIL.pack(0, 4081),
        TAIL.pack(4096, 1),
        TAIL.pack(2**64 - 64, 128),
        TAIL.pack(1, 8),
    ],
)
def test_a_tail_that_no_writer_made_is_refused(tail: bytes) -> None:
    """An index outside the body, or unaligned, or of no bytes, is never looked for."""
    with pytest.raises(ValueError, match=r"end of the body|index"):
        locate_index(tail, 4096)


ROW: dict[str, Any] = {
    "name": "a",
    "path": None,
    "dtype": "float32",
    "size": [4, 2],
    "offsets": [2, 0],
    "lengths": [2, 2],
    "offset": 64,
    "length": 100,
    "payload_offset": 128,
    "kind": 0,
    "per_rank": 0,
}


def _index_of(*rows: Any, **other: Any) -> bytes:
    plain = json.loads(lay_out([]).index)
    listed = [list(row.values()) if isinstance(row, dict) else row for row in rows]
    return json.dumps(plain | {"items": listed} | other).encode()


def test_the_row_that_the_next_test_damages_is_sound() -> None:
    """Undamaged, the row is an entry."""
    (entry,) = parse_index(_index_of(ROW), 256)
    assert (entry.name, entry.lengths, entry.payload_bytes) == ("a", (2, 2), 16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"{}",
        _index_of(type="holdfast-shard-index-9"),
        _index_of(format=None),
        _index_of(format=0),
        _index_of(kinds=None),
        _index_of(kinds=[None]),
        _index_of(fields=["name"]),
        _index_of(items={}),
        _index_of(7),
        _index_of([]),
        _index_of(ROW, ROW),
        *(
            _index_of(ROW | change)
            for change in (
                {"name": None},
                {"path": "a"},
                {"path": [None]},
                {"path": [True]},
                {"dtype": "float33"},
                {"dtype": "nn"},
                {"dtype": "load"},
                {"dtype": 4},
                {"dtype": None},
                {"size": 4},
                {"size": [4, -2]},
                {"size": [4, 2.0]},
                {"size": [True, 2]},
                {"size": [4]},
                {"offsets": [3, 0]},
                {"lengths": [2]},
                {"lengths": [2**70, 2]},
                {"offset": -64},
                {"offset": 65},
                {"offset": 192},
                {"offset": 2**80},
                {"length": None},
                {"length": 193},
                {"payload_offset": 0},
                {"payload_offset": 149},
                {"payload_offset": "128"},
                {"kind": 1},
                {"kind": None},
                {"per_rank": 2},
                {"per_rank": True},
                {"per_rank": 1},
            )
        ),
    ],
)
def test_a_damaged_index_is_refused(content: bytes) -> None:
    """Whatever stands in the place of an index, reading it returns entries in bounds or refuses."""
    with pytest.raises(ValueError, match="index"):
        parse_index(content, 256)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 3}, "f is of format 3; this version of holdfast reads up to format 2"),
        ({"requires": ["per_rank", "woven"]}, "f is of format 2 and requires 'woven'"),
    ],
)
def test_an_index_of_a_later_version_is_no_damage(change: dict[str, Any], told: str) -> None:
    """A later format, or a feature that a reader must know, is told with both versions."""
    with pytest.raises(FormatTooNewError, match=told):
        parse_index(_index_of(**change), 256, "f")


def test_a_reader_must_know_that_copies_are_per_rank() -> None:
    """An index lists what it requires: nothing, unless there are copies of one rank."""
    assert json.loads(lay_out([_tensor("a", 2)]).index)["requires"] == []
    assert json.loads(lay_out([_tensor("a", 2, per_rank=True)]).index)["requires"] == ["per_rank"]


def test_fields_of_a_later_version_are_ignored() -> None:
    """A field appended to the rows changes nothing of what is known."""
    fields = [*json.loads(lay_out([]).index)["fields"], "colour"]
    later = _index_of(ROW | {"colour": "red"}, fields=fields)
    assert parse_index(later, 256) == parse_index(_index_of(ROW), 256)
