"""Reading parts of a file straight into memory, verified."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import LocalFilesystem
from holdfast.read.direct import Part, read_verified
from holdfast.storage.digests import BLOCK_BYTES, FileRecord, describe_content
from holdfast.storage.posix import PosixStorage, read_into

SIZE = 2 * BLOCK_BYTES + 12345


@pytest.fixture(scope="module")
def content() -> bytes:
    """Two blocks and a bit of bytes that do not repeat."""
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> tuple[Path, FileRecord]:
    """A file on disk and its record."""
    path = tmp_path / "shard"
    path.write_bytes(content)
    return path, describe_content("shard", content)


def _read(path: Path, record: FileRecord, parts: list[Part], ranges: Sequence[range] = ()) -> None:
    storage = PosixStorage(path.parent, LocalFilesystem())
    read_verified(storage, path.name, record, parts, ranges)


def _part(offset: int, length: int) -> tuple[Part, bytearray]:
    memory = bytearray(length)
    return Part(offset, memoryview(memory)), memory


def test_parts_are_filled_wherever_they_lie(file: tuple[Path, FileRecord], content: bytes) -> None:
    """Parts at both ends, across blocks, side by side, empty or overlapping are right."""
    places = [
        (0, 1), (1, 700), (BLOCK_BYTES - 5, 10), (BLOCK_BYTES - 5, 2 * 5), (BLOCK_BYTES + 5, 5),
        (100, 0), (SIZE - 7, 7), (3, BLOCK_BYTES * 2), (0, SIZE),
    ]  # fmt: skip
    made = [(offset, *_part(offset, length)) for offset, length in places]
    _read(*file, [part for _, part, _ in made])
    for offset, _, memory in made:
        assert memory == content[offset : offset + len(memory)]


def test_thousands_of_small_parts_in_one_block(
    file: tuple[Path, FileRecord], content: bytes
) -> None:
    """More parts than one system call takes are filled all the same."""
    made = [(offset, *_part(offset, 100)) for offset in range(0, 900_000, 300)]
    _read(*file, [part for _, part, _ in made])
    assert all(memory == content[offset : offset + 100] for offset, _, memory in made)


@pytest.mark.parametrize("flipped", [0, BLOCK_BYTES - 1, BLOCK_BYTES, SIZE - 1])
def test_a_flipped_bit_is_named_by_block_and_bytes(
    file: tuple[Path, FileRecord], content: bytes, flipped: int
) -> None:
    """One bit anywhere in a block that is read is found, outside of the parts too."""
    path, record = file
    damaged = bytearray(content)
    damaged[flipped] ^= 16
    path.write_bytes(damaged)
    number = flipped // BLOCK_BYTES
    first, last = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, SIZE) - 1
    part, _ = _part(first + 50, 10)
    with pytest.raises(CorruptCheckpointError) as caught:
        _read(path, record, [part])
    assert caught.value.byte_range == (first, last)
    assert f"block {number} (bytes {first}-{last})" in str(caught.value)


def test_only_blocks_that_are_asked_for_are_read(
    file: tuple[Path, FileRecord], content: bytes
) -> None:
    """Damage in a block that no part lies in is not this reader's business."""
    path, record = file
    path.write_bytes(b"x" + content[1:])
    part, memory = _part(BLOCK_BYTES, 10)
    _read(path, record, [part])
    assert memory == content[BLOCK_BYTES : BLOCK_BYTES + 10]


def test_a_file_cut_short_is_damage(file: tuple[Path, FileRecord], content: bytes) -> None:
    """Bytes that are not there any more do not match a digest."""
    path, record = file
    path.write_bytes(content[:-1])
    part, _ = _part(SIZE - 100, 10)
    with pytest.raises(CorruptCheckpointError, match="block 2"):
        _read(path, record, [part])


def test_a_part_behind_the_end_is_refused(file: tuple[Path, FileRecord]) -> None:
    """Metadata that points behind the committed end is damage, whatever lies there now."""
    part, _ = _part(3 * BLOCK_BYTES, 10)
    with pytest.raises(CorruptCheckpointError, match="too few"):
        _read(*file, [part])


def test_streams_without_a_descriptor_are_read_too() -> None:
    """A file system in memory needs no file descriptor."""
    first, second = bytearray(3), bytearray(10)
    stream = io.BytesIO(b"0123456789")
    assert read_into(stream, 2, [memoryview(first), memoryview(second)]) == 8
    assert (bytes(first), bytes(second[:5])) == (b"234", b"56789")


def test_ranges_are_verified_without_memory(file: tuple[Path, FileRecord], content: bytes) -> None:
    """Bytes that matter though nobody wants them are held against their digests as well."""
    path, record = file
    _read(path, record, [], [range(BLOCK_BYTES, SIZE)])
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(CorruptCheckpointError, match="block 2"):
        _read(path, record, [], [range(BLOCK_BYTES, SIZE)])
