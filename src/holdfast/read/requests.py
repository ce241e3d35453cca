"""Which bytes of which stored chunk each live tensor needs, and the memory that they go to.

Owns the mapping from how a tensor was sharded when it was saved to how it is sharded here, from
regions of chunks to byte ranges of their containers. The target memory is the tensor itself where
its bytes have the same order, otherwise host memory of the same shape (another device, dtype or
stride, or a region with gaps). Parts of a file are requested in waves; bytes from a peer are
accepted block by block. Promises that regions cover the whole local part of a tensor, or raises.
A tensor that is not dense is read as one (`ReadWhole`); any other type is left to torch's own
planner, which is slower and supports more. Reads nothing itself.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import mul
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.tensor import DTensor

from holdfast.format.chunks import Placed
from holdfast.format.layout import Container
from holdfast.format.merging import Box
from holdfast.format.nondense import PLAIN_TENSORS, ReadWhole
from holdfast.read.direct import Part, blocks_of
from holdfast.storage.digests import BLOCK_BYTES
from holdfast.torch_internals import chunks_of, local_and_spec, local_of

Target = torch.Tensor | Placed
"""A tensor to be filled. A plain one is filled with the whole tensor of its name."""


class Region(NamedTuple):
    """One part of one stored chunk, and its target."""

    chunk: MetadataIndex
    """Its key in the metadata."""
    starts: torch.Size
    """Start within the chunk, by dimension."""
    lengths: torch.Size
    chunk_size: torch.Size
    """Of the whole stored chunk."""
    target: torch.Tensor
    """A view of live memory with the region's size."""

    def to_item(self) -> ReadItem:
        """Return the ReadItem for torch's reader, which ignores its destination offsets."""
        kind, unused = LoadItemType.TENSOR, torch.Size([0] * len(self.lengths))
        return ReadItem(kind, self.chunk, unused, self.chunk, self.starts, self.lengths)


class UncoveredError(Exception):
    """The stored chunks do not cover a tensor; readers convert it before it reaches a caller."""


def regions_of(targets: Mapping[str, Target], metadata: Metadata) -> Iterator[Region]:
    """Yield the regions to read to fill tensors whose names and sizes are known to agree.

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
        if isinstance(target, Placed):
            for offsets, lengths, local in target.cut.chunks(target.tensor.detach()):
                yield from _within(name, described, offsets, torch.Size(lengths), local)
        elif type(target) is ReadWhole:
            yield from _exactly(name, described, target)
        elif type(target) in PLAIN_TENSORS:
            yield from _within(name, described, (0,) * target.dim(), target.size(), target.detach())
        elif type(target) is DTensor and type(local_of(target)) in PLAIN_TENSORS:
            if target.device_mesh.get_coordinate() is None:
                continue
            # Equal for all tensors with the same spec, and slow to compute.
            local, spec = local_and_spec(target)
            if (span := spans.get(spec)) is None:
                (span,) = chunks_of(target)
                spans[spec] = span
            yield from _within(name, described, *span, local.detach())
        else:
            others[name] = target
    if others:
        yield from _by_torch(others, metadata)


def boxes_of(targets: Mapping[str, Target]) -> dict[str, list[Box] | None]:
    """Return which parts of whole tensors these targets hold; None: it is left to torch."""
    found: dict[str, list[Box] | None] = {}
    for name, target in targets.items():
        if isinstance(target, Placed):
            chunks = target.cut.chunks(target.tensor.detach())
            boxes: list[Box] = [(offsets, lengths) for offsets, lengths, _ in chunks]
        elif type(target) is ReadWhole:
            boxes = [(target.offsets, target.lengths)]
        elif type(target) in PLAIN_TENSORS:
            boxes = [((0,) * target.dim(), target.size())]
        elif type(target) is not DTensor:
            found[name] = None
            continue
        elif target.device_mesh.get_coordinate() is None:
            continue
        else:
            boxes = list(chunks_of(target))
        found[name] = [each for each in boxes if prod(each[1])]
    return found


def _within(
    name: str,
    described: TensorStorageMetadata,
    offsets: Sequence[int],
    sizes: Sequence[int],
    local: torch.Tensor,
) -> Iterator[Region]:
    """Yield the parts of stored chunks that overlap one box of the whole tensor."""
    missing = local.numel()
    if not missing:
        return
    for chunk in described.chunks:  # the common case: a chunk that matches the box exactly
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
        target = local if lengths == local.size() else part_of(local, here, lengths)
        missing -= prod(lengths)
        yield Region(MetadataIndex(name, chunk.offsets), there, lengths, chunk.sizes, target)
    if missing > 0:
        raise UncoveredError(f"has no place for all of {name}")


def _exactly(name: str, described: TensorStorageMetadata, target: ReadWhole) -> Iterator[Region]:
    """Yield the one stored chunk that is this target."""
    for chunk in described.chunks:
        if (tuple(chunk.offsets), tuple(chunk.sizes)) == (target.offsets, target.lengths):
            index, origin = MetadataIndex(name, chunk.offsets), torch.Size((0,) * len(chunk.sizes))
            yield Region(index, origin, chunk.sizes, chunk.sizes, target)
            return
    raise UncoveredError(f"has no chunk of {name} at {list(target.offsets)}")


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


_WAVE_BYTES = 256 << 20
"""Host memory for tensors that cannot be read in place, at one time."""
_LARGE_BYTES = 64 << 10
"""From this size on a memory copy uses numpy, which releases the GIL."""
_ALONE_BYTES = BLOCK_BYTES // 32
"""From this size on a payload gets its own message and arrives in place, which saves a copy."""
MOST_PIECES = 2 * (BLOCK_BYTES // _ALONE_BYTES) + 1
"""Upper bound per block: the large payloads and the gaps between them."""


class ReadRequest:
    """A read request: one region of one stored chunk to be read into one target."""

    def __init__(
        self, region: Region, offset: int, container: Container, dtype: torch.dtype
    ) -> None:
        self.region = region
        self._offset = offset
        self._container = container
        self._dtype = dtype
        target, lengths = region.target, region.lengths
        self._is_whole = lengths == region.chunk_size
        dense = self._is_whole or _is_dense(lengths, region.chunk_size)
        self._in_place = (
            dense
            and target.device.type == "cpu"
            and target.dtype == dtype
            and target.is_contiguous()
            and not (target.is_conj() or target.is_neg())  # lazy: the stored bytes differ
        )
        # For a region with gaps the whole chunk is read, and the region is cut out afterwards.
        self._read_size = lengths if dense else region.chunk_size
        self._first_element = 0
        if dense and not self._is_whole:
            strides = _strides(region.chunk_size)
            self._first_element = sum(map(mul, region.starts, strides))

    @property
    def whole(self) -> range:
        """The container's byte range if the whole chunk is read, all of which is verified.

        Empty for a region of a chunk, which needs only the part that it is read from.
        """
        return self.container if self._read_size == self.region.chunk_size else range(0)

    @property
    def container(self) -> range:
        """The byte range of the whole container."""
        return range(self._offset, self._offset + self._container.size_bytes)

    @property
    def ranges(self) -> list[range]:
        """The file's bytes that this request needs."""
        if self.whole:
            return [self.whole]
        header = range(self._offset, self._offset + len(self._container.header))
        return [header, self.payload]

    @property
    def size_bytes(self) -> int:
        """The bytes read of the tensor itself."""
        return prod(self._read_size) * self._dtype.itemsize

    @property
    def extra_bytes(self) -> int:
        """Host memory that this request needs in addition to its target."""
        return 0 if self._in_place else self.size_bytes

    @property
    def payload(self) -> range:
        """The file's byte range of the tensor bytes to read."""
        first = self._offset + len(self._container.header)
        start = first + self._first_element * self._dtype.itemsize
        return range(start, start + self.size_bytes)

    def open(self) -> list[Part]:
        """Allocate the memory and return the parts to read: the header and the payload."""
        if self._in_place:
            self._memory = self.region.target
        else:
            pinned = self.region.target.is_cuda
            self._memory = torch.empty(
                self._read_size, dtype=self._dtype, device="cpu", pin_memory=pinned
            )
        self._header = bytearray(len(self._container.header))
        payload: Any = bytes_of(self._memory)
        return [
            Part(self._offset, memoryview(self._header)),
            Part(self.payload.start, memoryview(payload.numpy())),
        ]

    def close(self) -> bool:
        """Copy what was read into the target; False: the header is not the expected one."""
        recognised = self._header == self._container.header
        if recognised and not self._in_place:
            source, region = self._memory, self.region
            if self._read_size != region.lengths:
                source = part_of(source, region.starts, region.lengths)
            self.region.target.copy_(source)
        del self._memory
        return recognised


@dataclass
class FileRequests:
    """The read requests for one file."""

    direct: list[ReadRequest] = field(default_factory=list)
    through_torch: list[tuple[Region, range]] = field(default_factory=list)
    """Regions that only torch can extract, each with the byte range of its container."""
    sent: list[Region] = field(default_factory=list)
    """Regions of tensors whose bytes another rank has sent; they are of no file."""

    @property
    def ranges(self) -> list[range]:
        """The bytes that must be read and verified."""
        return [
            *(each for request in self.direct for each in request.ranges),
            *(place for _, place in self.through_torch),
        ]

    @property
    def containers(self) -> list[range]:
        """The bytes that are needed if torch has to extract everything from its containers."""
        places = [place for _, place in self.through_torch]
        return [*(each.container for each in self.direct), *places]

    @property
    def size_bytes(self) -> int:
        """The bytes read of tensors."""
        direct = sum(each.size_bytes for each in self.direct)
        return direct + sum(len(place) for _, place in self.through_torch)


class Piece(NamedTuple):
    """Consecutive bytes of a block, which arrive in one message."""

    place: range
    """In the file."""
    request: ReadRequest | None
    """The request whose payload they are; they arrive in place. None: of several, or of none."""


class Intake:
    """Fills the read requests of one file as blocks arrive, in any order and on any thread.

    A block is copied from memory that holds all of it (`take`), or its pieces arrive in memory that
    `expect` returned. Host memory beside the targets is held only from the first to the last block
    of a request.
    """

    def __init__(self, requests: Sequence[ReadRequest]) -> None:
        self._touched: dict[int, list[ReadRequest]] = {}
        self._missing: dict[ReadRequest, set[int]] = {}
        for request in requests:
            numbers = blocks_of(request.ranges)
            self._missing[request] = numbers
            for number in numbers:
                self._touched.setdefault(number, []).append(request)
        self._opened: dict[ReadRequest, list[Part]] = {}
        self._lock = threading.Lock()
        self.unrecognised: list[ReadRequest] = []
        """Requests whose container is not the expected one: their targets hold wrong bytes."""

    @property
    def blocks(self) -> set[int]:
        """The numbers of the blocks that have not arrived yet."""
        return set().union(*self._missing.values())

    def pieces(self, number: int, size_bytes: int) -> list[Piece]:
        """Cut a block of this size where large payloads begin and end."""
        position, end = number * BLOCK_BYTES, number * BLOCK_BYTES + size_bytes
        large = []
        for request in self._touched.get(number, ()):
            place = request.payload
            place = range(max(place.start, position), min(place.stop, end))
            if len(place) >= _ALONE_BYTES:
                large.append(Piece(place, request))
        pieces = []
        for piece in sorted(large, key=lambda each: each.place.start):
            if piece.place.start < position:
                continue  # overlaps another payload: copied from where that arrives
            if piece.place.start > position:
                pieces.append(Piece(range(position, piece.place.start), None))
            pieces.append(piece)
            position = piece.place.stop
        if position < end:
            pieces.append(Piece(range(position, end), None))
        return pieces

    def expect(self, number: int, pieces: Sequence[Piece], spare: memoryview) -> list[memoryview]:
        """Return the memory for the pieces of a block: their targets, or parts of `spare`."""
        self._open(number)
        found = []
        for place, request in pieces:
            if request is None:
                found.append(spare[: len(place)])
                spare = spare[len(place) :]
            else:
                _, payload = self._opened[request]
                start = place.start - payload.offset
                found.append(payload.target[start : start + len(place)])
        return found

    def take(self, number: int, content: memoryview) -> None:
        """Copy the verified bytes of one block into their targets."""
        start = number * BLOCK_BYTES
        self._open(number)
        self.take_pieces(number, [Piece(range(start, start + len(content)), None)], [content])

    def take_pieces(
        self, number: int, pieces: Sequence[Piece], contents: Sequence[memoryview]
    ) -> None:
        """Copy verified pieces, which arrived in the memory from `expect`, into their targets."""
        touched = self._touched.get(number, ())
        starts = [each.place.start for each in pieces]
        for request in touched:
            for part in self._opened[request]:
                is_payload = part.offset == request.payload.start
                first = max(0, bisect_right(starts, part.offset) - 1)
                for index in range(first, bisect_left(starts, part.end)):
                    if not (is_payload and pieces[index].request is request):
                        _copy_common(part, starts[index], contents[index])
        for request in touched:
            with self._lock:
                self._missing[request].discard(number)
                if self._missing[request]:
                    continue
                del self._opened[request]
            if not request.close():
                self.unrecognised.append(request)

    def _open(self, number: int) -> None:
        with self._lock:
            for request in self._touched.get(number, ()):
                if request not in self._opened:
                    self._opened[request] = request.open()


def _copy_common(part: Part, start: int, content: memoryview) -> None:
    """Copy the overlap of a part with file content that begins at `start`."""
    low, high = max(part.offset, start), min(part.end, start + len(content))
    if low < high:
        target = part.target[low - part.offset : high - part.offset]
        _copy(target, content[low - start : high - start])


def _copy(target: memoryview, source: memoryview) -> None:
    if len(target) < _LARGE_BYTES:
        target[:] = source
    else:  # releases the GIL during the copy
        np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))


def waves(requests: Sequence[ReadRequest]) -> Iterator[list[ReadRequest]]:
    """Group read requests so that each group needs a bounded amount of extra host memory."""
    wave: list[ReadRequest] = []
    extra_bytes = 0
    for request in requests:
        if wave and extra_bytes + request.extra_bytes > _WAVE_BYTES:
            yield wave
            wave, extra_bytes = [], 0
        wave.append(request)
        extra_bytes += request.extra_bytes
    if wave:
        yield wave


def _is_dense(lengths: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a region of a row-major array is contiguous."""
    outer = next((index for index, length in enumerate(lengths) if length != 1), len(lengths))
    return all(
        length == full for length, full in zip(lengths[outer + 1 :], size[outer + 1 :], strict=True)
    )


def _strides(size: Sequence[int]) -> list[int]:
    return [prod(size[index + 1 :]) for index in range(len(size))]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor, sharing its memory."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def part_of(tensor: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """Return a box of a tensor, sharing its memory."""
    for dimension, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tensor = tensor.narrow(dimension, start, length)
    return tensor
