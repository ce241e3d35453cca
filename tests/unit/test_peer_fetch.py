"""Borrowed blocks are those that were promised, or they are not there."""

from __future__ import annotations

from pathlib import Path

import xxhash

from holdfast.filesystem import LocalFilesystem
from holdfast.read.index import Index
from holdfast.read.requests import Piece
from holdfast.storage.digests import BLOCK_BYTES
from holdfast.storage.posix import PosixStorage
from holdfast.tiers.local.peers import BlockSource, Shard, _FileSink, _TensorSink

BODY_BYTES = 2 * BLOCK_BYTES + 4096


def _content() -> bytes:
    return b"".join(bytes([number]) * BLOCK_BYTES for number in (1, 2)) + bytes([3]) * 4096


def _shard(content: bytes, owner: int, provider: int | None = 1) -> Shard:
    blocks = [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
    digests = tuple(xxhash.xxh3_128_hexdigest(block) for block in blocks)
    return Shard(owner, f"borrowed_{owner}", Index(b"", 0, digests), BODY_BYTES, provider)


def test_blocks_of_several_files_arrive_at_their_places(tmp_path: Path) -> None:
    """A short last block too; what nobody asked for is a hole."""
    content = _content()
    for owner in (0, 1):
        (tmp_path / f"file{owner}").write_bytes(content)
    wanted = [(0, 0), (0, 2), (1, 1)]
    shards = {owner: _shard(content, owner) for owner in (0, 1)}
    source = BlockSource(
        PosixStorage(tmp_path, LocalFilesystem()),
        [(f"file{owner}", number) for owner, number in wanted],
        [BLOCK_BYTES, 4096, BLOCK_BYTES],
    )
    sink = _FileSink(tmp_path, [(shards[owner], number) for owner, number in wanted])
    sink.begin(source.size_bytes, source.body_bytes)
    for offset in range(0, source.size_bytes, source.block_bytes):
        block = memoryview(bytearray(source.block_bytes))
        source.read_into(offset, block)
        sink.put(offset, block)
    sink.close()
    source.close()
    assert sink.damaged == []
    hole = bytes(BLOCK_BYTES)
    first = (tmp_path / "borrowed_0").read_bytes()
    assert first == content[:BLOCK_BYTES] + hole + content[2 * BLOCK_BYTES :]
    second = (tmp_path / "borrowed_1").read_bytes()
    assert second == hole + content[BLOCK_BYTES : 2 * BLOCK_BYTES]


def test_a_block_that_does_not_match_is_told_and_not_written(tmp_path: Path) -> None:
    """Its owner's copy at the provider is what is damaged."""
    shard = _shard(_content(), 4)
    sink = _FileSink(tmp_path, [(shard, 0)])
    sink.begin(BLOCK_BYTES, 0)
    sink.put(0, memoryview(bytes(BLOCK_BYTES)))
    sink.close()
    assert sink.damaged == [4]
    assert not (tmp_path / "borrowed_4").exists()


class _Intake:
    """Stands for tensors: notes what was put in place."""

    def __init__(self) -> None:
        self.taken: dict[int, bytes] = {}

    def pieces(self, number: int, size_bytes: int) -> list[Piece]:
        start = number * BLOCK_BYTES
        middle, end = start + size_bytes // 3, start + size_bytes
        return [Piece(range(start, middle), None), Piece(range(middle, end), None)]

    def expect(self, number: int, pieces: list[Piece], spare: memoryview) -> list[memoryview]:
        return [memoryview(bytearray(len(each.place))) for each in pieces]

    def take(self, number: int, content: memoryview) -> None:
        self.taken[number] = bytes(content)

    def take_pieces(self, number: int, pieces: list[Piece], contents: list[memoryview]) -> None:
        self.taken[number] = b"".join(contents)


def test_what_arrives_in_its_place_is_told_if_it_does_not_match() -> None:
    """Each block is what its pieces are together, and the last one of a file is short."""
    content = _content()
    shard, intake = _shard(content, 4), _Intake()
    sink = _TensorSink([(shard, 0), (shard, 1), (shard, 2)], {shard.path: intake})  # type: ignore[dict-item]
    assert [sum(each) for each in sink.cuts] == [BLOCK_BYTES, BLOCK_BYTES, 4096]
    harmed = bytearray(content)
    harmed[BLOCK_BYTES + 5] ^= 1
    for number in (2, 0, 1):
        at = number * BLOCK_BYTES
        for piece in sink.expect(number, memoryview(b"")):
            piece[:] = harmed[at : at + len(piece)]
            at += len(piece)
        sink.arrived(number)
    assert sink.damaged == [4]
    assert intake.taken == {0: content[:BLOCK_BYTES], 2: content[2 * BLOCK_BYTES :]}


def test_no_byte_is_put_in_place_before_its_block_has_matched() -> None:
    """A damaged block is told; the others of its stream go where they belong."""
    content = _content()
    shard, intake = _shard(content, 4), _Intake()
    sink = _TensorSink([(shard, 0), (shard, 1), (shard, 2)], {shard.path: intake})  # type: ignore[dict-item]
    sink.begin(3 * BLOCK_BYTES, 0)
    harmed = bytearray(content.ljust(3 * BLOCK_BYTES, b"\0"))
    harmed[BLOCK_BYTES + 5] ^= 1
    for number in range(3):
        at = number * BLOCK_BYTES
        sink.put(at, memoryview(harmed)[at : at + BLOCK_BYTES])
    assert sink.damaged == [4]
    assert intake.taken == {0: content[:BLOCK_BYTES], 2: content[2 * BLOCK_BYTES :]}
