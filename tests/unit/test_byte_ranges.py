"""From regions of stored chunks to byte ranges, against slicing as the truth."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from holdfast.format.layout import container_of
from holdfast.read.requests import MOST_PIECES, Intake, ReadRequest, Region, waves
from holdfast.storage.digests import BLOCK_BYTES


@st.composite
def regions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A chunk's shape, and the offsets and lengths of a region in it."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    starts = tuple(draw(st.integers(0, size - 1)) for size in shape)
    lengths = tuple(
        draw(st.integers(1, size - start)) for size, start in zip(shape, starts, strict=True)
    )
    return shape, starts, lengths


def _land(
    stored: torch.Tensor, starts: tuple[int, ...], target: torch.Tensor, at: int = 64
) -> bool:
    stream = io.BytesIO()
    torch.save(stored, stream)
    file = bytes(at) + stream.getvalue()
    lengths = torch.Size(target.shape)
    region = Region(MetadataIndex("w"), torch.Size(starts), lengths, stored.size(), target)
    container = container_of(stored.dtype, stored.size())
    landing = ReadRequest(region, at, container, stored.dtype)
    for part in landing.open():
        part.target[:] = file[part.offset : part.end]
    return landing.close()


@given(regions(), st.sampled_from(["plain", "strided", "other dtype"]))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_a_region_lands_as_slicing_would_have_it(
    region: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], kind: str
) -> None:
    """Any region of any chunk reaches a target of any layout, element by element."""
    shape, starts, lengths = region
    stored = torch.randn(shape)
    expected = stored[tuple(slice(a, a + n) for a, n in zip(starts, lengths, strict=True))]
    if kind == "strided":
        target = torch.full((*lengths, 2), float("nan"))[..., 0]
    elif kind == "other dtype":
        target = torch.full(lengths, float("nan"), dtype=torch.float64)
    else:
        target = torch.full(lengths, float("nan"))
    assert _land(stored, starts, target)
    assert torch.equal(target, expected.to(target.dtype))


def test_a_header_of_another_layout_is_not_recognised() -> None:
    """A transposed tensor of the same size is left to torch."""
    assert not _land(torch.randn(4, 4).t(), (0, 0), torch.zeros(4, 4))


def test_a_conjugated_target_gets_values_not_bytes() -> None:
    """Lazy conjugation is not overwritten by the bytes of what it conjugates."""
    stored = torch.randn(3, dtype=torch.complex64)
    base = torch.zeros(3, dtype=torch.complex64)
    assert _land(stored, (0,), base.conj())
    assert torch.equal(base, stored.conj().resolve_conj())


def test_waves_bound_the_extra_memory(tmp_path: Path) -> None:
    """Targets that cannot be read in place are taken a bounded number of bytes at a time."""
    size = torch.Size([30 << 20])
    container = container_of(torch.float32, size)
    far = torch.empty(30 << 20, dtype=torch.float64, device="meta")
    near = torch.empty(30 << 20, device="meta")
    landings = [
        ReadRequest(
            Region(MetadataIndex("w"), torch.Size([0]), size, size, each),
            0,
            container,
            torch.float32,
        )
        for each in (far, near, far, far, far)
    ]
    assert [len(wave) for wave in waves(landings)] == [2, 2, 1]


def _stored(tensors: list[torch.Tensor], at: int) -> tuple[bytes, list[int]]:
    """Return a file of containers one after the other, and their offsets."""
    file, offsets = bytearray(at), []
    for tensor in tensors:
        stream = io.BytesIO()
        torch.save(tensor, stream)
        offsets.append(len(file))
        file += stream.getvalue()
    return bytes(file), offsets


def _whole(stored: torch.Tensor, target: torch.Tensor, offset: int) -> ReadRequest:
    zeros = torch.Size([0] * stored.dim())
    size = stored.size()
    region = Region(MetadataIndex("w"), zeros, size, size, target)
    container = container_of(stored.dtype, stored.size())
    return ReadRequest(region, offset, container, stored.dtype)


def test_blocks_that_arrive_in_any_order_land_where_they_belong() -> None:
    """Tensors over several blocks and several tensors in a block; in place, and through memory."""
    tensors = [torch.randn(5), torch.randn(BLOCK_BYTES // 4, 2), torch.randn(7, 3), torch.randn(())]
    file, offsets = _stored(tensors, BLOCK_BYTES - 100)
    targets = [torch.full_like(each, float("nan")) for each in tensors]
    targets[2] = torch.full((7, 3), float("nan"), dtype=torch.float64)
    landings = [_whole(*each) for each in zip(tensors, targets, offsets, strict=True)]
    intake = Intake(landings)
    assert intake.blocks == {0, 1, 2, 3}
    for number in (2, 0, 3):
        intake.take(number, memoryview(file)[number * BLOCK_BYTES :][:BLOCK_BYTES])
    assert intake.blocks == {1}
    intake.take(1, memoryview(file)[BLOCK_BYTES : 2 * BLOCK_BYTES])
    assert (intake.blocks, intake.unrecognised) == (set(), [])
    for target, tensor in zip(targets, tensors, strict=True):
        assert torch.equal(target, tensor.to(target.dtype))


def test_a_container_that_arrives_in_another_layout_is_told() -> None:
    """Its bytes mean something else than was taken in; its neighbour's do not."""
    tensors = [torch.randn(4, 4).t(), torch.randn(4, 4)]
    file, offsets = _stored(tensors, 64)
    targets = [torch.zeros(4, 4), torch.zeros(4, 4)]
    landings = [_whole(*each) for each in zip(tensors, targets, offsets, strict=True)]
    intake = Intake(landings)
    intake.take(0, memoryview(file))
    assert intake.unrecognised == landings[:1]
    assert torch.equal(targets[1], tensors[1])


def _blocks(file: bytes) -> list[tuple[int, memoryview]]:
    count = -(-len(file) // BLOCK_BYTES)
    return [
        (number, memoryview(file)[number * BLOCK_BYTES :][:BLOCK_BYTES]) for number in range(count)
    ]


def _arrive(intake: Intake, file: bytes, order: list[int]) -> None:
    """Have each block arrive in pieces, all of them expected before any is taken in."""
    blocks = dict(_blocks(file))
    pieces = {number: intake.pieces(number, len(blocks[number])) for number in order}
    memory = {
        number: intake.expect(number, each, memoryview(bytearray(BLOCK_BYTES)))
        for number, each in pieces.items()
    }
    for number in order:
        assert sum(len(each.place) for each in pieces[number]) == len(blocks[number])
        for piece, target in zip(pieces[number], memory[number], strict=True):
            assert len(target) == len(piece.place)
            target[:] = file[piece.place.start : piece.place.stop]
        intake.take_pieces(number, pieces[number], memory[number])


def test_blocks_that_arrive_in_pieces_land_where_they_belong() -> None:
    """Large payloads in place, or in memory of their own; small ones and headers by a copy."""
    tensors = [torch.randn(5), torch.randn(BLOCK_BYTES // 4, 2), torch.randn(300, 999)]
    tensors += [torch.randn(7, 3), torch.randn(400, 999)]
    file, offsets = _stored(tensors, BLOCK_BYTES - 100)
    targets = [torch.full_like(each, float("nan")) for each in tensors]
    targets[2] = torch.full((999, 300), float("nan")).t()
    landings = [_whole(*each) for each in zip(tensors, targets, offsets, strict=True)]
    intake = Intake(landings)
    _arrive(intake, file, [2, 0, 3, 1])
    assert (intake.blocks, intake.unrecognised) == (set(), [])
    for target, tensor in zip(targets, tensors, strict=True):
        assert torch.equal(target, tensor)


def test_pieces_are_a_block_in_order_and_large_ones_are_payload() -> None:
    """However many tensors lie in it, a block has no more pieces than both ends have room for."""
    tensors = [torch.randn(1 << 16) for _ in range(40)] + [torch.randn(9) for _ in range(40)]
    file, offsets = _stored(tensors, 0)
    landings = [
        _whole(each, torch.empty_like(each), at) for each, at in zip(tensors, offsets, strict=True)
    ]
    intake, in_place = Intake(landings), 0
    for number, content in _blocks(file):
        pieces = intake.pieces(number, len(content))
        assert len(pieces) <= MOST_PIECES
        places = [each.place for each in pieces]
        start = number * BLOCK_BYTES
        assert [each.start for each in places] == [start, *(each.stop for each in places[:-1])]
        assert places[-1].stop == start + len(content)
        for each in pieces:
            if each.request is not None:
                payload = each.request.payload
                assert payload.start <= each.place.start < each.place.stop <= payload.stop
                in_place += len(each.place)
    assert in_place > 0.9 * sum(each.nbytes for each in tensors[:40])


def test_what_two_targets_want_arrives_once_and_lands_in_both() -> None:
    """The same chunk, and a part of it, go to targets of their own."""
    stored = torch.randn(1000, 999)
    file, [offset] = _stored([stored], 70)
    targets = [torch.zeros(1000, 999), torch.zeros(1000, 999), torch.zeros(600, 999)]
    landings = [_whole(stored, each, offset) for each in targets[:2]]
    part = Region(
        MetadataIndex("w"), torch.Size([200, 0]), targets[2].size(), stored.size(), targets[2]
    )
    container = container_of(stored.dtype, stored.size())
    landings.append(ReadRequest(part, offset, container, stored.dtype))
    intake = Intake(landings)
    _arrive(intake, file, [0])
    assert intake.unrecognised == []
    for target, expected in zip(targets, (stored, stored, stored[200:800]), strict=True):
        assert torch.equal(target, expected)


def test_pieces_of_another_layout_are_told() -> None:
    """A header that is not as expected is found among what was copied, too."""
    stored = torch.randn(999, 1000).t()
    file, [offset] = _stored([stored], 0)
    landing = _whole(torch.randn(1000, 999), torch.zeros(1000, 999), offset)
    intake = Intake([landing])
    _arrive(intake, file, [0])
    assert intake.unrecognised == [landing]
