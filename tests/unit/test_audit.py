"""Which blocks a save compares, and what is kept of them: pure, on one process."""

from __future__ import annotations

import math

import pytest
import torch

from holdfast.format.layout import Item
from holdfast.snapshot.audit import Place, Scratch, deal
from holdfast.snapshot.fingerprints import block_of
from holdfast.storage.digests import BLOCK_BYTES


def _place(number: int, name: str, elements: int, dtype: torch.dtype | None = None) -> Place:
    dtype = dtype or torch.float32
    item = Item(name, (name,), dtype, (elements,), (0,), (elements,))
    return Place(number, name, (0,), 0, item)


def _size_bytes(place: Place) -> int:
    assert place.item.dtype is not None
    return place.item.lengths[0] * place.item.dtype.itemsize


MIXED = [
    *(_place(1, f"a{each:03}", 1 + 7 * each) for each in range(100)),
    _place(1, "b", 10 * BLOCK_BYTES // 4 + 1),
    _place(2, "c", 3 * BLOCK_BYTES, torch.uint8),
    _place(2, "d", 0),
    _place(3, "e", 12, torch.complex128),
]


@pytest.mark.parametrize("shares", [1, 2, 3, 32, 500])
def test_every_block_is_in_one_share(shares: int) -> None:
    """All shares together are all blocks, none twice."""
    dealt = deal(MIXED, shares)
    assert len(dealt) == shares
    blocks = [
        (index, block) for each in dealt for index, own in each.items() for block in own or ()
    ]
    wanted = [
        (index, block)
        for index, place in enumerate(MIXED)
        for block in range(
            math.ceil(place.item.lengths[0] * place.item.dtype.itemsize / BLOCK_BYTES)
        )
    ]
    assert sorted(blocks) == wanted


def test_shares_are_about_equal_in_bytes() -> None:
    """No share has a block more of the largest ones than another."""
    dealt = deal([_place(1, f"{each:03}", BLOCK_BYTES // 4) for each in range(70)], 32)
    counts = [len(each) for each in dealt]
    assert (min(counts), max(counts)) == (2, 3)


def test_holders_of_several_sets_deal_each_alike() -> None:
    """Ranks that have one set in common compare the same blocks of it at each turn."""
    one = deal([each for each in MIXED if each.number in (1, 2)], 7)
    other = deal([each for each in MIXED if each.number in (2, 3)], 7)
    moved = len([each for each in MIXED if each.number == 1])
    for left, right in zip(one, other, strict=True):
        ours = {index - moved: own for index, own in left.items() if index >= moved}
        assert ours == {index: own for index, own in right.items() if index < 2}


def test_values_are_compared_whole() -> None:
    """What is no dense tensor is in one share."""
    value = Item("v", ("state", "v"), None, (), (), (), capacity_bytes=64)
    dealt = deal([Place(1, "v", (), 0, value)], 3)
    assert [*filter(None, dealt)] == [{0: None}]


def test_copies_are_kept_up_to_a_limit() -> None:
    """Copies stay as they were while the memory grows, and what exceeds the limit is left."""
    scratch = Scratch(3 * BLOCK_BYTES)
    tensors = [torch.full((BLOCK_BYTES // 4 + each,), float(each)) for each in range(3)]
    wanted = [[bytes(block_of(each, block)) for block in (0, 1)] for each in tensors]
    for _ in range(2):
        scratch.clear()
        kept = [
            scratch.keep(tensors[0], (0,)),
            *(scratch.keep(each, (0, 1)) for each in tensors[1:]),
        ]
        assert kept[2] is None is scratch.keep(tensors[2], (0,))
        for each in tensors:
            each.add_(100)
        assert kept[0] is not None
        assert kept[1] is not None
        assert [bytes(each) for each in kept[0].values()] == wanted[0][:1]
        assert [bytes(each) for each in kept[1].values()] == wanted[1]
        for number, each in enumerate(tensors):
            each.fill_(float(number))
    scratch.release()


def test_a_strided_tensor_is_kept_in_row_major_order() -> None:
    """As the bytes of a contiguous copy."""
    tensor = torch.arange(3 << 20).float().view(3, 1 << 20).t()
    kept = Scratch().keep(tensor, (1,))
    assert kept is not None
    whole = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert bytes(kept[1]) == whole[BLOCK_BYTES:]
