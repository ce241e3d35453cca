"""From regions of stored chunks to byte ranges, against slicing as the truth."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from holdfast.shards.container import container_of
from holdfast.shards.landing import Landing, waves
from holdfast.shards.regions import Region


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
    item = ReadItem(
        LoadItemType.TENSOR,
        MetadataIndex("w"),
        torch.Size([0] * len(lengths)),
        MetadataIndex("w"),
        torch.Size(starts),
        lengths,
    )
    container = container_of(stored.dtype, stored.size())
    landing = Landing(Region(item, stored.size(), target), at, container, stored.dtype)
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
    item = ReadItem(
        LoadItemType.TENSOR, MetadataIndex("w"), torch.Size([0]), MetadataIndex("w"),
        torch.Size([0]), torch.Size([30 << 20]),
    )  # fmt: skip
    size = torch.Size([30 << 20])
    container = container_of(torch.float32, size)
    far = torch.empty(30 << 20, dtype=torch.float64, device="meta")
    near = torch.empty(30 << 20, device="meta")
    landings = [
        Landing(Region(item, size, each), 0, container, torch.float32)
        for each in (far, near, far, far, far)
    ]
    assert [len(wave) for wave in waves(landings)] == [2, 2, 1]
