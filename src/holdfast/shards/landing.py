"""Where the bytes of one stored tensor go when they are read without unpickling.

Owns the arithmetic from a region of a stored chunk to a byte range of its container, and the memory
it is read into: the target itself where its bytes lie in the same order, host memory of the same
shape otherwise (another device, dtype or stride, or a region with gaps). Reads nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from holdfast.shards.container import Container
from holdfast.shards.direct import Part

_WAVE_BYTES = 256 << 20
"""Host memory for tensors that cannot be read in place, at one time."""


class Landing:
    """One region of one stored chunk on its way into one target."""

    def __init__(
        self,
        item: ReadItem,
        offset: int,
        container: Container,
        described: TensorStorageMetadata,
        chunk_size: torch.Size,
        target: torch.Tensor,
    ) -> None:
        self.item = item
        self._offset = offset
        self._container = container
        self._dtype = described.properties.dtype
        self._target = target
        self._chunk_size = chunk_size
        dense = _is_dense(item.lengths, chunk_size)
        self._in_place = (
            dense
            and target.device.type == "cpu"
            and target.dtype == self._dtype
            and target.is_contiguous()
            and not (target.is_conj() or target.is_neg())  # lazily, their bytes are others
        )
        # A region with gaps is read with all of its chunk and cut out afterwards.
        self._read_size = item.lengths if dense else chunk_size
        self._first_element = (
            sum(
                start * stride
                for start, stride in zip(item.storage_offsets, _strides(chunk_size), strict=True)
            )
            if dense
            else 0
        )

    @property
    def whole(self) -> range:
        """The file's bytes that must be right for this landing to be: all of the container's.

        A region of a chunk needs only the part that it is read from.
        """
        end = self._offset + self._container.size_bytes
        return range(self._offset, end) if self._read_size == self._chunk_size else range(0)

    @property
    def extra_bytes(self) -> int:
        """Host memory that this landing needs beside its target."""
        return 0 if self._in_place else prod(self._read_size) * self._dtype.itemsize

    def open(self) -> list[Part]:
        """Make the memory and return the parts to read: the header, and the bytes wanted."""
        if self._in_place:
            self._landed = self._target
        else:
            pinned = self._target.is_cuda
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
            region = self._landed
            if self._read_size != self.item.lengths:
                for dimension, (start, length) in enumerate(
                    zip(self.item.storage_offsets, self.item.lengths, strict=True)
                ):
                    region = region.narrow(dimension, start, length)
            self._target.copy_(region)
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
