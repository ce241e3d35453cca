"""Every changed byte of a file is found, footer included."""

from __future__ import annotations

import io
import random

import pytest
import xxhash

from holdfast.storage.digests import (
    ALIGNMENT_BYTES,
    BLOCK_BYTES,
    DIGEST_BYTES,
    DifferenceError,
    FileRecord,
    block_count,
    describe_body,
    describe_content,
    find_difference,
    footer_size,
    make_footer,
    pack_records,
    read_blocks,
    unpack_records,
)


def _sealed(body: bytes) -> tuple[FileRecord, bytes]:
    """Return a body with its footer, and the record of both."""
    digests = [
        xxhash.xxh3_128_digest(body[start : start + BLOCK_BYTES])
        for start in range(0, len(body), BLOCK_BYTES)
    ]
    return describe_body("x", len(body), digests), body + make_footer(len(body), digests)


SIZES = {
    "empty": 0,
    "a page": ALIGNMENT_BYTES,
    "less than a block": BLOCK_BYTES - ALIGNMENT_BYTES,
    "a block": BLOCK_BYTES,
    "a block and a page": BLOCK_BYTES + ALIGNMENT_BYTES,
    "two blocks": 2 * BLOCK_BYTES,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_footer_holds_the_digests_of_its_body(name: str) -> None:
    """At any size around a block, the footer is whole pages and gives back every block's digest."""
    body = bytes(SIZES[name])
    record, file = _sealed(body)
    assert len(file) == record.size_bytes == len(body) + footer_size(len(body))
    assert len(file) % ALIGNMENT_BYTES == 0
    assert record.blocks is None
    blocks = read_blocks(record, io.BytesIO(file))
    assert blocks.covered_bytes == len(body)
    assert list(blocks.digests) == list(describe_content("x", body).blocks or ())
    assert find_difference(record, io.BytesIO(file)) is None


def test_a_footer_grows_by_pages() -> None:
    """A footer is the smallest number of pages that holds its table and its tail of 32 bytes."""
    room = (ALIGNMENT_BYTES - 32) // DIGEST_BYTES
    assert footer_size(room * BLOCK_BYTES) == ALIGNMENT_BYTES
    assert footer_size(room * BLOCK_BYTES + 1) == 2 * ALIGNMENT_BYTES
    assert block_count(room * BLOCK_BYTES + 1) == room + 1


def test_every_changed_byte_is_found() -> None:
    """Each byte of a file, turned, is a difference; one in the footer keeps its blocks unread."""
    body = bytes(range(256)) * (ALIGNMENT_BYTES // 256)
    record, file = _sealed(body)
    changed = bytearray(file)
    for position in range(len(file)):
        changed[position] ^= 1 << (position % 8)
        stream = io.BytesIO(changed)
        difference = find_difference(record, stream)
        assert difference is not None, position
        if position < len(body):
            assert read_blocks(record, stream).covered_bytes == len(body)
            assert difference.byte_range == (0, len(body) - 1), position
        else:
            with pytest.raises(DifferenceError) as caught:
                read_blocks(record, stream)
            assert caught.value.difference == difference
            assert "footer" in str(difference)
        changed[position] = file[position]
    assert find_difference(record, io.BytesIO(changed)) is None


@pytest.mark.parametrize("position", [0, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 17])
@pytest.mark.parametrize("in_footer", [True, False])
def test_a_changed_byte_is_told_as_its_block(position: int, in_footer: bool) -> None:
    """The difference is the block that the byte lies in, the last and shorter one too."""
    body = bytes(2 * BLOCK_BYTES + ALIGNMENT_BYTES)
    record, file = _sealed(body) if in_footer else (describe_content("x", body), body)
    changed = bytearray(file)
    changed[position] ^= 1
    difference = find_difference(record, io.BytesIO(changed))
    number = position // BLOCK_BYTES
    assert difference is not None
    assert difference.byte_range == (
        number * BLOCK_BYTES,
        min((number + 1) * BLOCK_BYTES, len(body)) - 1,
    )
    assert f"block {number} " in str(difference)


@pytest.mark.parametrize("kept", [0, 1, 31, 4095, 4096, 8191])
def test_a_cut_file_is_found(kept: int) -> None:
    """A file that ends early differs, wherever it ends, with and without a footer."""
    body = bytes(ALIGNMENT_BYTES)
    record, file = _sealed(body)
    assert find_difference(record, io.BytesIO(file[:kept])) is not None
    listed = describe_content("x", file)
    assert find_difference(listed, io.BytesIO(file[:kept])) is not None


@pytest.mark.parametrize("size_bytes", [8192, BLOCK_BYTES])
def test_a_lengthened_file_without_a_footer_is_found(size_bytes: int) -> None:
    """Bytes behind what was committed are a difference, at the end of a block too."""
    content = bytes(size_bytes)
    record = describe_content("x", content)
    assert record.blocks is not None
    assert find_difference(record, io.BytesIO(content)) is None
    assert find_difference(record, io.BytesIO(content + b"\0")) is not None


def test_a_lengthened_file_with_a_footer_is_found() -> None:
    """Bytes behind the footer are a difference, though the body under it is what it was."""
    record, file = _sealed(bytes(ALIGNMENT_BYTES))
    for more in (b"\0", file[-ALIGNMENT_BYTES:], bytes(ALIGNMENT_BYTES)):
        assert find_difference(record, io.BytesIO(file + more)) is not None


@pytest.mark.parametrize("claimed", [0, 4096, 12288, 2**40, 2**64 - 1])
def test_a_footer_that_lies_about_its_body_is_refused(claimed: int) -> None:
    """A size in the footer that is not the committed one decides nothing, and reads nothing."""
    record, file = _sealed(bytes(2 * ALIGNMENT_BYTES))
    forged = file[:-16] + (claimed & 2**64 - 1).to_bytes(8, "little") + file[-8:]
    with pytest.raises(DifferenceError):
        read_blocks(record, io.BytesIO(forged))


def test_another_files_footer_is_refused() -> None:
    """A sound footer of another body of the same size is not the committed one."""
    record, file = _sealed(b"a" * ALIGNMENT_BYTES)
    _, other = _sealed(b"b" * ALIGNMENT_BYTES)
    with pytest.raises(DifferenceError):
        read_blocks(record, io.BytesIO(other))
    mixed = file[:ALIGNMENT_BYTES] + other[ALIGNMENT_BYTES:]
    assert find_difference(record, io.BytesIO(mixed)) is not None


def test_listed_blocks_are_held_against_the_digest() -> None:
    """A record whose own block digests were exchanged with the bytes under them is a difference."""
    record = describe_content("x", b"honest")
    forged = describe_content("x", b"forged")
    mixed = FileRecord("x", 6, record.digest, forged.blocks)
    assert find_difference(record, io.BytesIO(b"honest")) is None
    assert find_difference(mixed, io.BytesIO(b"forged")) is not None


def test_records_are_sent_in_little_more_than_their_digests() -> None:
    """Whatever they hold comes back; of thousands of shards no path takes its length."""
    generator = random.Random(7)
    records = [
        FileRecord(f"__{rank}_0.distcp", 4096 * 1000, generator.randbytes(16).hex(), None)
        for rank in range(4096)
    ]
    records.append(FileRecord("a b", 0, "00" * 16, ()))
    records.append(FileRecord("small", 5, "11" * 16, ("22" * 16, "33" * 16)))
    content = pack_records(records)
    assert unpack_records(content) == tuple(records)
    assert len(content) < 24 * len(records)
    assert unpack_records(pack_records([])) == ()
