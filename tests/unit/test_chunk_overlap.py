"""Which parts of stored chunks a tensor needs, against putting the whole together and cutting."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from holdfast.read.requests import UncoveredError, regions_of


def _metadata(
    size: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> Metadata:
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(shape)) for at, shape in boxes]
    described = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), chunks)
    return Metadata({"w": described})


HALVES = [((0, 0), (4, 3)), ((0, 3), (4, 3))]
QUARTERS = [((0, 0), (1, 6)), ((1, 0), (3, 2)), ((1, 2), (3, 4))]


@pytest.mark.parametrize("boxes", [[((0, 0), (4, 6))], HALVES, QUARTERS])
@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_chunks_fill_a_whole_tensor(
    boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], kind: type[torch.Tensor]
) -> None:
    """However a tensor was cut, each part arrives where it was."""
    whole = torch.arange(24.0).view(4, 6)
    target = torch.full((4, 6), -1.0)
    live = torch.nn.Parameter(target) if kind is torch.nn.Parameter else target
    for region in regions_of({"w": live}, _metadata((4, 6), boxes)):
        at = region.chunk.offset
        assert at is not None
        assert region.chunk_size in [shape for _, shape in boxes]
        chunk = whole[tuple(slice(a, a + n) for a, n in zip(at, region.chunk_size, strict=True))]
        starts, lengths = region.starts, region.lengths
        part = chunk[tuple(slice(a, a + n) for a, n in zip(starts, lengths, strict=True))]
        region.target.copy_(part)
    assert torch.equal(target, whole)


def test_a_tensor_that_is_not_covered_is_told() -> None:
    """A gap between the chunks is an error, never memory that keeps what it held."""
    with pytest.raises(UncoveredError, match="w"):
        list(regions_of({"w": torch.zeros(4, 6)}, _metadata((4, 6), HALVES[:1])))
    with pytest.raises(UncoveredError, match="w"):
        list(regions_of({"w": torch.zeros(4, 6)}, _metadata((4, 6), [])))


def test_a_tensor_of_another_size_is_refused() -> None:
    """Sizes are known to agree before; should they not, nothing is read."""
    with pytest.raises(ValueError, match="here"):
        list(regions_of({"w": torch.zeros(4, 5)}, _metadata((4, 6), HALVES)))


def test_nothing_is_read_for_an_empty_tensor() -> None:
    """A tensor without elements needs no chunk."""
    assert not list(regions_of({"w": torch.zeros(0, 6)}, _metadata((0, 6), [((0, 0), (0, 6))])))
