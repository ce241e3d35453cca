"""Which region of which stored chunk each live tensor needs, and the memory that it goes to.

Owns the arithmetic between how a tensor was divided when it was saved and how it is divided here.
Promises that regions cover all that is here of a tensor, or says that they do not. What is neither
a plain tensor nor a DTensor is left to torch's own planner, which is slower and knows more types.
Reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.tensor import DTensor

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Region(NamedTuple):
    """One part of one stored chunk, and where it belongs."""

    chunk: MetadataIndex
    """By which the metadata knows it."""
    starts: torch.Size
    """From where in the chunk, by dimension."""
    lengths: torch.Size
    chunk_size: torch.Size
    """Of the whole stored chunk."""
    target: torch.Tensor
    """A view of live memory, of the size of the region."""

    def to_item(self) -> ReadItem:
        """Return it in the words of torch's reader, which does not look at where it goes."""
        kind, nowhere = LoadItemType.TENSOR, torch.Size([0] * len(self.lengths))
        return ReadItem(kind, self.chunk, nowhere, self.chunk, self.starts, self.lengths)


class UncoveredError(Exception):
    """The stored chunks leave a part of a tensor without bytes; never leaves a reader."""


def regions_of(targets: Mapping[str, torch.Tensor], metadata: Metadata) -> Iterator[Region]:
    """Yield what has to be read to fill tensors whose names and sizes are known to agree.

    Raises:
        UncoveredError: naming a tensor that the chunks do not cover.
    """
    spans: dict[Any, tuple[Sequence[int], Sequence[int]]] = {}
    others: dict[str, torch.Tensor] = {}
    for name, target in targets.items():
        described = metadata.state_dict_metadata[name]
        assert isinstance(described, TensorStorageMetadata)
        if described.size != target.size():
            raise ValueError(f"{name} is {list(described.size)}, here {list(target.size())}")
        if type(target) in _PLAIN:
            yield from _within(name, described, (0,) * target.dim(), target.size(), target.detach())
        elif type(target) is DTensor and type(target._local_tensor) in _PLAIN:
            if target.device_mesh.get_coordinate() is None:
                continue
            # Equal for all that are divided alike, and slow to compute.
            if (span := spans.get(target._spec)) is None:
                (chunk,) = target.__create_chunk_list__()  # type: ignore[no-untyped-call]  # torch
                span = spans[target._spec] = (chunk.offsets, chunk.sizes)
            yield from _within(name, described, *span, target._local_tensor.detach())
        else:
            others[name] = target
    if others:
        yield from _by_torch(others, metadata)


def _within(
    name: str,
    described: TensorStorageMetadata,
    offsets: Sequence[int],
    sizes: Sequence[int],
    local: torch.Tensor,
) -> Iterator[Region]:
    """Yield the parts of stored chunks that lie in one box of the whole tensor."""
    missing = local.numel()
    if not missing:
        return
    for chunk in described.chunks:  # one that is all of it, and nothing else: nearly always so
        if chunk.sizes == sizes == local.size() and chunk.offsets == offsets:
            index, origin = MetadataIndex(name, chunk.offsets), torch.Size((0,) * len(sizes))
            yield Region(index, origin, chunk.sizes, chunk.sizes, local)
            return
    for chunk in described.chunks:
        lows = [max(pair) for pair in zip(offsets, chunk.offsets, strict=True)]
        lengths = torch.Size(
            min(offset + size, chunk_offset + chunk_size) - low
            for offset, size, chunk_offset, chunk_size, low in zip(
                offsets, sizes, chunk.offsets, chunk.sizes, lows, strict=True
            )
        )
        if any(length <= 0 for length in lengths):
            continue
        here = torch.Size(low - offset for low, offset in zip(lows, offsets, strict=True))
        there = torch.Size(low - offset for low, offset in zip(lows, chunk.offsets, strict=True))
        target = local
        if lengths != local.size():
            for dimension, (start, length) in enumerate(zip(here, lengths, strict=True)):
                target = target.narrow(dimension, start, length)
        missing -= prod(lengths)
        yield Region(MetadataIndex(name, chunk.offsets), there, lengths, chunk.sizes, target)
    if missing > 0:
        raise UncoveredError(f"has no place for all of {name}")


def _by_torch(targets: Mapping[str, torch.Tensor], metadata: Metadata) -> Iterator[Region]:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
    for item in planner.finish_plan(planner.create_local_plan()).items:
        target = planner.resolve_tensor(item).detach()
        chunk_size = _chunk_size(metadata, item)
        yield Region(item.storage_index, item.storage_offsets, item.lengths, chunk_size, target)


def _chunk_size(metadata: Metadata, item: ReadItem) -> torch.Size:
    described = metadata.state_dict_metadata[item.storage_index.fqn]
    assert isinstance(described, TensorStorageMetadata)
    for chunk in described.chunks:
        if item.storage_index.offset is None or chunk.offsets == item.storage_index.offset:
            return chunk.sizes
    raise ValueError(f"the metadata describes no chunk of {item.storage_index}")
