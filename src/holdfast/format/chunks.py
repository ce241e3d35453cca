"""Which chunks of a global tensor a plain local tensor is, where only its owner knows.

Owns the geometry of tensors that are cut along one dimension over a group of ranks without being
DTensors: in one piece per rank, or in several that interleave with those of the other ranks. The
pieces of all ranks of the group tile the global tensor, whatever their sizes are. Pure; knows no
groups and no names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Chunk(NamedTuple):
    """One chunk of the global tensor that a local tensor holds."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    local: torch.Tensor
    """A view of the local tensor."""


@dataclass(frozen=True)
class Cut:
    """How a local tensor of one shape lies in a global one."""

    size: tuple[int, ...]
    """Of the global tensor."""
    shape: tuple[int, ...]
    """Of the local tensor."""
    dim: int
    pieces: tuple[tuple[int, int], ...]
    """Along `dim`, in the order of the local tensor: where each begins globally, and its length."""

    def chunks(self, local: torch.Tensor) -> Iterator[Chunk]:
        """Yield what a local tensor of this shape holds."""
        start = 0
        for first, length in self.pieces:
            offsets, lengths = [0] * len(self.shape), list(self.shape)
            offsets[self.dim], lengths[self.dim] = first, length
            part = (
                local if length == self.shape[self.dim] else local.narrow(self.dim, start, length)
            )
            yield Chunk(tuple(offsets), tuple(lengths), part)
            start += length


class Placed(NamedTuple):
    """A plain tensor to be filled with its part of a global tensor."""

    tensor: torch.Tensor
    cut: Cut

    def size(self) -> torch.Size:
        """Return the size of the global tensor."""
        return torch.Size(self.cut.size)


def cut(
    shape: Sequence[int], dim: int, lengths: Sequence[int], position: int, stride: int = 1
) -> Cut:
    """Return how the local tensor of one rank of a group lies in the global one.

    `shape`: of the local tensor. `lengths`: along `dim`, of each rank of the group in its order;
    multiples of `stride`. With `stride` n each local tensor is n pieces end to end, and the global
    one holds the first pieces of all ranks, then the second ones, and so on, as Megatron's
    `partition_stride`: the two halves of a GLU are whole in the global tensor.
    """
    size = list(shape)
    size[dim] = sum(lengths)
    own = shape[dim] // stride
    before = sum(lengths[:position]) // stride
    starts = [turn * (size[dim] // stride) + before for turn in range(stride)]
    pieces: list[tuple[int, int]] = []
    for start in starts if own else starts[:1]:
        if pieces and sum(pieces[-1]) == start:  # one rank alone: the pieces are adjacent
            pieces[-1] = pieces[-1][0], pieces[-1][1] + own
        else:
            pieces.append((start, own))
    return Cut(tuple(size), tuple(shape), dim, tuple(pieces))
