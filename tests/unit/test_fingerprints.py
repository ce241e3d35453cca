"""Digests of live tensors tell every bit apart, and equal bits never."""

from __future__ import annotations

import pytest
import torch

from holdfast.snapshot.fingerprints import (
    bytes_between,
    fingerprints,
    hash_on_device,
    host_digests,
)
from holdfast.storage.digests import BLOCK_BYTES


def _pair(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(hash_on_device(tensor).tolist())


@pytest.mark.parametrize("count", [1, 3, 8, 9, 1000])
def test_a_device_tells_every_bit_apart(count: int) -> None:
    """Each of the first and last bits of a tensor changes both halves of its digest."""
    values = torch.randint(0, 256, (count,), dtype=torch.uint8)
    seen = {_pair(values)}
    places = {place for edge in (range(9), range(count - 9, count)) for place in edge}
    for place in sorted(places & {*range(count)}):
        for bit in range(8):
            other = values.clone()
            other[place] ^= 1 << bit
            seen.add(_pair(other))
    assert len(seen) == 1 + 8 * len(places & {*range(count)})
    assert len({one for one, _ in seen}) == len({other for _, other in seen}) == len(seen)


def test_a_device_tells_places_apart() -> None:
    """Exchanged elements, and rows, give another digest; a copy, a view and a slice do not."""
    tensor = torch.randn(64, 32)
    exchanged = tensor.clone()
    exchanged[[0, 1]] = tensor[[1, 0]]
    zeros = torch.zeros(64, 32)
    assert len({_pair(each) for each in (tensor, exchanged, zeros)}) == 3
    assert _pair(tensor) == _pair(tensor.clone()) == _pair(tensor.t().contiguous().t())
    padded = torch.cat((torch.ones(3), tensor.flatten()))
    assert _pair(padded[3:]) == _pair(tensor)  # at an odd place in memory
    assert _pair(torch.tensor(0.0)) != _pair(torch.tensor(-0.0))


def test_a_device_hashes_in_pieces() -> None:
    """A tensor larger than a piece: a bit of the second piece counts."""
    tensor = torch.zeros((32 << 20) + 24, dtype=torch.uint8)
    before = _pair(tensor)
    tensor[-1] = 1
    assert _pair(tensor) != before


def test_equal_bits_have_equal_digests() -> None:
    """Small, large, strided, tied and empty tensors, and bytes."""
    large = torch.arange(3 << 20).float()
    sources = [torch.randn(3), large, large, large.view(3, 1 << 20).t(), torch.empty(0), b"value"]
    copies = [each if isinstance(each, bytes) else each.clone() for each in sources]
    one, other = fingerprints(sources), fingerprints(copies)
    assert one == other
    assert one[1] == one[2]
    assert len(set(one)) == len(one) - 1
    large[-1] += 1
    assert [a == b for a, b in zip(fingerprints(sources), other, strict=True)] == [
        *(True, False, False, False, True, True)
    ]


def test_blocks_and_bytes_are_of_row_major_order() -> None:
    """A block's digest and a range of bytes are those of a contiguous copy."""
    tensor = torch.arange(3 << 20).float().view(3, 1 << 20).t()
    whole = tensor.contiguous()
    assert len(host_digests(tensor)) == 2
    assert host_digests(tensor) == host_digests(whole)
    content = whole.view(-1).view(torch.uint8).numpy().tobytes()
    assert bytes_between(tensor, 100, 4200) == content[100:4200]
    assert bytes_between(tensor, BLOCK_BYTES, len(content) + 9) == content[BLOCK_BYTES:]
    assert host_digests(torch.empty(0)) == []
