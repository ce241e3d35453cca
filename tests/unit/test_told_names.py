"""What ranks tell one another of a checkpoint: names, and the places of the chunks asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from holdfast.format.dcp import kinds_of, per_rank_names
from holdfast.format.layout import Entry
from holdfast.format.merging import (
    ChunkTable,
    add_chunks,
    find_uncovered,
    merge_shards,
    outline,
    pack,
    pack_boxes,
    split,
    unite,
    unpack,
    unpack_boxes,
)
from holdfast.read.requests import boxes_of

ROWS = 4
"""Of one rank's part of a matrix."""


def _entry(name: str, size: tuple[int, ...] | None, **changes: Any) -> Entry:
    dtype = None if size is None else torch.float32
    known: dict[str, Any] = {"offsets": (0,) * len(size or ()), "lengths": size or ()}
    known |= {"offset": 64, "length": 1200, "payload_offset": None, "kind": "Tensor"} | changes
    return Entry(name, tuple(name.split(".")), dtype, size or (), **known)


def _shard(rank: int, ranks: int, *more: Entry) -> tuple[int, str, list[Entry]]:
    part = _entry(
        "model.w", (ROWS * ranks, 3), offsets=(ROWS * rank, 0), lengths=(ROWS, 3), offset=64 * rank
    )
    own = _entry("model.mean", (2,), per_rank=True, offset=640 + rank)
    return rank, f"__{rank}_0.distcp", [part, own, *more]


def _told(ranks: int, *first: Entry) -> Metadata:
    """Return what all ranks are told, of whom the first wrote these."""
    shards = [_shard(rank, ranks, *(first if rank == 0 else ())) for rank in range(ranks)]
    return unite(unpack(pack(each)) for shard in shards for each in split(merge_shards([shard])))


def _fields(metadata: Metadata) -> tuple[Any, ...]:
    return (
        metadata.state_dict_metadata,
        metadata.planner_data,
        metadata.storage_data,
        kinds_of(metadata),
        per_rank_names(metadata),
    )


def test_what_is_packed_comes_back() -> None:
    """Chunks, values, scalars, nested keys, kinds and names per rank."""
    entries = [
        _entry("optimizer.state.a.b.step", ()),
        _entry("data", None, per_rank=True, kind=""),
        _entry("model.a.b", (2, 0), kind="DTensor"),
    ]
    entries.append(entries[0]._replace(name="model.x.y", path=("model", "x.y", 3)))
    metadata = merge_shards([_shard(1, 3, *entries)])
    assert _fields(unpack(pack(metadata))) == _fields(metadata)


def test_an_outline_does_not_grow_with_ranks() -> None:
    """Names are those of all; only the places of parts of tensors are left out."""
    few, many = (_told(ranks, _entry("optimizer.state.w.step", ())) for ranks in (2, 64))
    for told, ranks in ((few, 2), (many, 64)):
        assert told.state_dict_metadata["model.w"].size == (ROWS * ranks, 3)  # type: ignore[union-attr]
        assert told.state_dict_metadata["model.w"].chunks == []  # type: ignore[union-attr]
        assert {each.fqn for each in told.storage_data} == {"model.mean", "optimizer.state.w.step"}  # type: ignore[union-attr]
    assert len(pack(many)) < len(pack(few)) + 8
    whole = merge_shards([_shard(rank, 2) for rank in range(2)])
    assert pack(outline(whole)) == pack(_told(2))


def test_of_what_is_per_rank_the_lowest_rank_is_told() -> None:
    """As `.metadata` has it."""
    [place] = [info for at, info in _told(3).storage_data.items() if at.fqn == "model.mean"]  # type: ignore[union-attr]
    assert (place.relative_path, place.offset) == ("__0_0.distcp", 640)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (_entry("model.w", (9, 9)), r"describe model\.w as .*\[8, 3\] and as .*\[9, 9\]"),
        (_entry("model.w", None), r"describe model\.w as .* and as a value"),
        (_entry("model.mean", (2,)), r"differ in whether model\.mean is per rank"),
    ],
)
def test_names_that_shards_describe_differently_are_refused(other: Entry, reason: str) -> None:
    """Whichever of them is right, one of the files is not what a save wrote."""
    outlines = [merge_shards([_shard(0, 2)]), merge_shards([(1, "__1_0.distcp", [other])])]
    with pytest.raises(ValueError, match=reason):
        unite(outlines)


@pytest.mark.parametrize(
    ("box", "ranks"),
    [
        (((0, 0), (ROWS, 3)), [0]),
        (((ROWS - 1, 0), (2, 1)), [0, 1]),
        (((0, 2), (4 * ROWS, 1)), [0, 1, 2, 3]),
        (((2 * ROWS, 1), (2 * ROWS, 2)), [2, 3]),
    ],
)
def test_a_rank_is_told_the_chunks_that_overlap_its_box(
    box: tuple[tuple[int, int], tuple[int, int]], ranks: list[int]
) -> None:
    """And no others; with them its box is covered."""
    whole = ChunkTable(merge_shards([_shard(rank, 4) for rank in range(4)]))
    known = _told(4)
    lacking = find_uncovered(known, {"model.w": [box], "model.mean": [((0,), (2,))]})
    assert lacking == {"model.w": [box]}
    add_chunks(known, unpack(pack(whole.cut(unpack_boxes(pack_boxes(lacking))))))
    chunks = known.state_dict_metadata["model.w"].chunks  # type: ignore[union-attr]
    assert [each.offsets[0] // ROWS for each in chunks] == ranks
    places = [known.storage_data[MetadataIndex("model.w", each.offsets)] for each in chunks]  # type: ignore[index]
    assert [each.relative_path for each in places] == [f"__{rank}_0.distcp" for rank in ranks]
    assert not find_uncovered(known, lacking)
    add_chunks(known, whole.cut(lacking))  # again: nothing is there twice
    assert len(chunks) == len(ranks)


def test_without_a_box_every_chunk_is_told() -> None:
    """For targets of a type that only torch can place; and scalars have no dimension to overlap."""
    step = _entry("optimizer.state.w.step", ())
    whole = ChunkTable(merge_shards([_shard(rank, 2, *[step] * (rank == 0)) for rank in range(2)]))
    known = _told(2)
    assert find_uncovered(known, {"model.w": None, "model.mean": None}) == {"model.w": None}
    add_chunks(known, whole.cut({"model.w": None, "unknown": None}))
    assert len(known.state_dict_metadata["model.w"].chunks) == 2  # type: ignore[union-attr]
    assert len(whole.cut({step.name: [((), ())]}).storage_data or ()) == 1


def test_empty_targets_need_nothing() -> None:
    """A rank may hold no row of a tensor."""
    assert boxes_of({"model.w": torch.zeros(0, 3)}) == {"model.w": []}
