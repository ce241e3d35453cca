"""Where the bytes of one stored tensor go when they are read without unpickling.

Owns the arithmetic from a region of a stored chunk to a byte range of its container, and the memory
it is read into: the target itself where its bytes lie in the same order, host memory of the same
shape otherwise (another device, dtype or stride, or a region with gaps). Reads nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from operator import mul
from typing import Any

import torch

from holdfast.shards.container import Container
from holdfast.shards.direct import Part
from holdfast.shards.regions import Region

_WAVE_BYTES = 256 << 20
"""Host memory for tensors that cannot be read in place, at one time."""


class Landing:
    """One region of one stored chunk on its way into one target."""

    def __init__(
        self, region: Region, offset: int, container: Container, dtype: torch.dtype
    ) -> None:
        self.region = region
        self._offset = offset
        self._container = container
        self._dtype = dtype
        target, lengths = region.target, region.item.lengths
        self._is_whole = lengths == region.chunk_size
        dense = self._is_whole or _is_dense(lengths, region.chunk_size)
        self._in_place = (
            dense
            and target.device.type == "cpu"
            and target.dtype == dtype
            and target.is_contiguous()
            and not (target.is_conj() or target.is_neg())  # lazily, their bytes are others
        )
        # A region with gaps is read with all of its chunk and cut out afterwards.
        self._read_size = lengths if dense else region.chunk_size
        self._first_element = 0
        if dense and not self._is_whole:
            strides = _strides(region.chunk_size)
            starts = region.item.storage_offsets
            self._first_element = sum(map(mul, starts, strides))

    @property
    def whole(self) -> range:
        """The file's bytes that must be right for this landing to be: all of the container's.

        A region of a chunk needs only the part that it is read from.
        """
        end = self._offset + self._container.size_bytes
        return range(self._offset, end) if self._read_size == self.region.chunk_size else range(0)

    @property
    def extra_bytes(self) -> int:
        """Host memory that this landing needs beside its target."""
        return 0 if self._in_place else prod(self._read_size) * self._dtype.itemsize

    def open(self) -> list[Part]:
        """Make the memory and return the parts to read: the header, and the bytes wanted."""
        if self._in_place:
            self._landed = self.region.target
        else:
            pinned = self.region.target.is_cuda
            self._landed = torch.empty(self._read_size, dtype=self._dtype, pin_memory=pinned)
        self._header = bytearray(len(self._container.header))
        payload = self._offset + len(self._header)
        start = payload + self._first_element * self._dtype.itemsize
        return [
            Part(self._offset, memoryview(self._header)),
            Part(start, _bytes_of(self._landed)),
        ]

    def close(self) -> bool:
        """Deliver what was read; False: the header is another's, the bytes mean something else."""
        recognised = self._header == self._container.header
        if recognised and not self._in_place:
            wanted, item = self._landed, self.region.item
            if self._read_size != item.lengths:
                for dimension, (start, length) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    wanted = wanted.narrow(dimension, start, length)
            self.region.target.copy_(wanted)
        del self._landed
        return recognised


def waves(landings: Sequence[Landing]) -> Iterator[list[Landing]]:
    """Group landings so that each group needs a bounded amount of extra host memory."""
    wave: list[Landing] = []
    extra_bytes = 0
    for landing in landings:
        if wave and extra_bytes + landing.extra_bytes > _WAVE_BYTES:
            yield wave
            wave, extra_bytes = [], 0
        wave.append(landing)
        extra_bytes += landing.extra_bytes
    if wave:
        yield wave


def _is_dense(lengths: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a region of a row-major array is one run of elements."""
    outer = next((index for index, length in enumerate(lengths) if length != 1), len(lengths))
    return all(
        length == full for length, full in zip(lengths[outer + 1 :], size[outer + 1 :], strict=True)
    )


def _strides(size: Sequence[int]) -> list[int]:
    return [prod(size[index + 1 :]) for index in range(len(size))]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    array: Any = flat.numpy()
    return memoryview(array)
