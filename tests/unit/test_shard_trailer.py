"""A shard file is whole or it is none: its tail is read back exactly, or refused with a reason."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest

from holdfast.errors import CorruptCheckpointError, FormatTooNewError
from holdfast.tiers.local.shard_file import (
    Trailer,
    pack_nodes,
    parse_trailer,
    read_trailer,
    unpack_nodes,
)
from tests.support.local_shards import FILE, PARTS, RECORD, TAIL


def _read(content: bytes) -> Trailer:
    return read_trailer(io.BytesIO(content), "shard")


def test_a_tail_is_read_back_exactly() -> None:
    """Record and parts, from a whole file and from one with a rank's own copies alone."""
    assert _read(FILE) == TAIL
    alone = TAIL.of_own_copies(8192, "01" * 16)
    assert _read(bytes(alone.record.image_bytes) + alone.to_bytes()) == alone
    assert not alone.record.is_whole
    assert alone.record.commit == RECORD.commit


@pytest.mark.parametrize("length", [0, 10, 100, RECORD.image_bytes, len(FILE) - 1])
def test_a_torn_file_is_no_shard(length: int) -> None:
    """Cut anywhere, it is refused."""
    with pytest.raises(CorruptCheckpointError):
        _read(FILE[:length])


def test_every_changed_bit_of_a_tail_is_found() -> None:
    """In the record, in the small states, or in the end that seals them."""
    start = RECORD.image_bytes
    for offset in range(start, len(FILE)):
        changed = bytearray(FILE)
        changed[offset] ^= 1
        with pytest.raises(CorruptCheckpointError):
            _read(bytes(changed))


def test_what_follows_a_file_makes_it_another() -> None:
    """A tail that lies over an older, longer one is not taken for sound."""
    with pytest.raises(CorruptCheckpointError):
        _read(FILE + b"x")


@pytest.mark.parametrize(
    "change",
    [
        {"iteration": -1},
        {"iteration": 1.0},
        {"owner": 2},
        {"world_size": 3},
        {"nodes": (0,)},
        {"audit": 3},
        {"run_id": 3},
        {"state_names": "many"},
        {"is_whole": 1},
        {"format": 0},
        {"body_bytes": 8192},
    ],
)
def test_a_sealed_record_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    """A digest vouches for the bytes, not for what they say."""
    wrong = replace(RECORD, **change)
    tail = Trailer(wrong, PARTS)
    content = bytes(RECORD.image_bytes) + tail.to_bytes()
    if "body_bytes" in change:
        content = _sealed_with_image(tail, RECORD.image_bytes)
    with pytest.raises(CorruptCheckpointError):
        _read(content)


def _sealed_with_image(tail: Trailer, image_bytes: int) -> bytes:
    import holdfast.tiers.local.shard_file as format_

    rest = tail.to_bytes()[: -format_._END.size]
    end = format_._END.pack(
        format_._MARK, image_bytes, len(rest), format_._digest(image_bytes, rest)
    )
    return bytes(image_bytes) + rest + end


def _sealed(**changes: Any) -> bytes:
    """Return a trailer whose record has other fields than this version writes."""
    import holdfast.tiers.local.shard_file as format_

    content = Trailer(RECORD, PARTS).to_bytes()
    text, _, states = content[: -format_._END.size].partition(b"\n")
    rest = json.dumps({**json.loads(text), **changes}).encode() + b"\n" + states
    rest += b"x" * changes.get("parts", {}).get("more", 0)
    size = RECORD.image_bytes
    return rest + format_._END.pack(format_._MARK, size, len(rest), format_._digest(size, rest))


def test_what_a_later_version_adds_is_ignored() -> None:
    """Unknown fields of the record and unknown parts behind the known ones change nothing."""
    sizes = {name: len(PARTS[name]) for name in PARTS}
    content = _sealed(colour="red", requires=[], parts={"more": 7, **sizes})
    tail = parse_trailer(content, "shard")
    assert tail.record == RECORD
    assert tail.parts == PARTS


@pytest.mark.parametrize("change", [{"format": 3}, {"requires": ["striped"]}])
def test_a_later_format_is_told_with_both_versions(change: dict[str, Any]) -> None:
    """A record that this version cannot read is not damaged: the error says what it needs."""
    with pytest.raises(FormatTooNewError, match="this version of holdfast reads") as caught:
        parse_trailer(_sealed(**change), "shard")
    assert caught.value.sequence == RECORD.sequence


def test_a_record_without_its_parts_is_refused() -> None:
    """What does not hold every known part is damaged."""
    with pytest.raises(CorruptCheckpointError, match="no sound record"):
        parse_trailer(_sealed(parts={}), "shard")


@pytest.mark.parametrize(
    "nodes",
    [
        (0,),
        (0, 0, 0),
        (0, 0, 1, 1, 2, 2),
        (0, 1, 0, 1, 2),
        (0, 0, 1, 2, 2, 2, 1),
        (0, 1, 2, 3, 4, 0, 1, 2, 3, 4),
        (5, 3, 1, 1, 3, 5, 7),
        tuple(rank // 8 for rank in range(4096)),
    ],
)
def test_a_table_of_nodes_is_read_back_exactly(nodes: tuple[int, ...]) -> None:
    """Whatever the placement is; where nodes are filled one after the other it takes one run."""
    packed = json.loads(json.dumps(pack_nodes(nodes)))
    assert unpack_nodes(packed) == nodes
    if len(nodes) > 100:
        assert packed == [[0, 1, 8, 512]]


@pytest.mark.parametrize(
    "nodes", [None, 3, [3], [[0, 0]], [[0, 0, 1, "x"]], [[0, 0, 0, 9]], [[0, 0, 1 << 12, 1 << 40]]]
)
def test_a_table_that_is_none_is_refused(nodes: Any) -> None:
    """Neither a crash nor all memory comes of it."""
    with pytest.raises(CorruptCheckpointError, match="no sound record"):
        parse_trailer(_sealed(nodes=nodes), "shard")


def test_there_is_room_for_an_audit() -> None:
    """What was compared of replicas is a field of the record, absent where nothing was."""
    assert b"audit" not in TAIL.to_bytes()
    record = replace(RECORD, audit={"agreed": 7})
    content = Trailer(record, PARTS).to_bytes()
    assert parse_trailer(content, "shard").record == record
