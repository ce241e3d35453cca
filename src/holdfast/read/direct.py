"""Verified bytes of a file: read directly into their target memory, or mapped.

Owns the pass over a file that reads and digests at once. Promises that every block that any part
overlaps has matched its digest when `read_verified` returns, and that bytes are copied once, from
the page cache into their target. Several threads share the blocks: reading and digesting both
release the GIL. Of a mapped file, each block is verified when bytes in it are first used; changes
on disk after that are not noticed. Knows bytes, not tensors.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

from holdfast.errors import CorruptCheckpointError
from holdfast.storage.backend import ObjectReader, Storage, as_stream
from holdfast.storage.digests import (
    BLOCK_BYTES,
    Blocks,
    DifferenceError,
    FileRecord,
    read_blocks,
)

THREADS = min(4, os.cpu_count() or 1)
_SCRATCH_BYTES = 256 << 10
_PIECE_BYTES = 1 << 20


class Part(NamedTuple):
    """Consecutive bytes of a file and the memory they go to."""

    offset: int
    target: memoryview
    """Writable, contiguous bytes."""

    @property
    def end(self) -> int:
        """The file offset after the last byte."""
        return self.offset + len(self.target)


def read_verified(
    storage: Storage,
    name: str,
    record: FileRecord,
    parts: Iterable[Part],
    ranges: Iterable[range] = (),
) -> None:
    """Fill every part from a file, verifying each block that a part or a range of bytes overlaps.

    Parts may overlap. Ranges are bytes to verify without keeping them.

    Raises:
        CorruptCheckpointError: a block does not match its digest; its parts hold wrong bytes.
        OSError: the file cannot be read.
    """
    also = blocks_of(ranges)
    with storage.open(name) as source:
        expected = read_expected(source, storage.where(name), record)
        for layer in _layers(parts) or [[]]:
            _Pass(storage, name, expected, layer).run(also, source)
            also = set()  # verified by the first pass


def read_expected(source: ObjectReader, where: str, record: FileRecord) -> Blocks:
    """Return the block digests of an open file, verified to be those committed.

    Raises:
        CorruptCheckpointError: the footer that holds them is not the one that was committed.
        OSError: the file cannot be read.
    """
    try:
        return read_blocks(record, as_stream(source))
    except DifferenceError as error:
        raise error.difference.as_error(where) from None


def _layers(parts: Iterable[Part]) -> list[list[Part]]:
    """Sort parts by offset into few lists without overlaps, greedily."""
    layers: list[list[Part]] = []
    for part in sorted((each for each in parts if len(each.target)), key=lambda each: each.offset):
        for layer in layers:
            if layer[-1].end <= part.offset:
                layer.append(part)
                break
        else:
            layers.append([part])
    return layers


def blocks_of(ranges: Iterable[range]) -> set[int]:
    """Return the numbers of all blocks that ranges of bytes overlap."""
    return {
        number
        for each in ranges
        if each
        for number in range(each.start // BLOCK_BYTES, (each.stop - 1) // BLOCK_BYTES + 1)
    }


class _Pass:
    """One pass over the blocks of a file that contain a list of non-overlapping parts."""

    def __init__(
        self, storage: Storage, name: str, expected: Blocks, parts: Sequence[Part]
    ) -> None:
        self._storage = storage
        self._name = name
        self._expected = expected
        self._parts = parts
        self._offsets = [each.offset for each in parts]

    def run(self, also: set[int], source: ObjectReader) -> None:
        """Read the blocks of the parts and these; `source`: the open file, for this thread."""
        numbers = sorted(also | blocks_of(range(each.offset, each.end) for each in self._parts))
        if numbers and numbers[-1] >= len(self._expected.digests):
            raise CorruptCheckpointError(
                self._storage.where(self._name),
                f"has {self._expected.covered_bytes} bytes, too few for what it should hold",
            )
        workers = min(THREADS, len(numbers))
        if workers <= 1:
            self._read_blocks(deque(numbers), source)
            return
        # Each thread reads a contiguous range: sequential reads from a cold disk get the kernel's
        # readahead, which interleaving blocks between threads would prevent.
        shares = [
            deque(numbers[len(numbers) * each // workers : len(numbers) * (each + 1) // workers])
            for each in range(workers)
        ]
        with ThreadPoolExecutor(workers, thread_name_prefix="holdfast-reader") as pool:
            try:
                for done in [pool.submit(self._open_and_read, share) for share in shares]:
                    done.result()
            finally:
                for share in shares:
                    share.clear()  # after an error, the rest is not needed

    def _open_and_read(self, waiting: deque[int]) -> None:
        with self._storage.open(self._name) as source:
            self._read_blocks(waiting, source)

    def _read_blocks(self, waiting: deque[int], source: ObjectReader) -> None:
        """Read the waiting blocks in file order until none is left."""
        scratch = _Scratch()
        while True:
            try:
                number = waiting.popleft()
            except IndexError:
                return
            self._read_block(source, number, scratch)

    def _read_block(self, source: ObjectReader, number: int, scratch: _Scratch) -> None:
        place = self._expected.place(number)
        views = self._views(place.start, place.stop, scratch)

        def read() -> Iterator[memoryview]:
            offset = place.start
            for piece in _pieces(views):
                count = source.get_into(offset, piece)
                if count < sum(map(len, piece)):
                    return  # the file ends here: what was read so far does not match
                offset += count
                yield from piece

        found = self._expected.compare(number, read())
        if found is not None:
            raise found.as_error(self._storage.where(self._name))

    def _views(self, start: int, end: int, scratch: _Scratch) -> list[memoryview]:
        """Return the memory for one block in file order: targets, and scratch between them."""
        views: list[memoryview] = []
        scratch.reset()
        position = start
        first = max(bisect_right(self._offsets, start) - 1, 0)
        for part in self._parts[first:]:
            if part.offset >= end:
                break
            if part.end <= start:
                continue
            low, high = max(part.offset, start), min(part.end, end)
            if low > position:
                views.append(scratch.take(low - position))
            views.append(part.target[low - part.offset : high - part.offset])
            position = high
        if position < end:
            views.append(scratch.take(end - position))
        return views


def _pieces(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Divide memory into pieces small enough to be in the CPU cache when they are digested."""
    piece: list[memoryview] = []
    size_bytes = 0
    for view in views:
        rest = view
        while len(rest):
            part = rest[: _PIECE_BYTES - size_bytes]
            piece.append(part)
            size_bytes += len(part)
            rest = rest[len(part) :]
            if size_bytes == _PIECE_BYTES:
                yield piece
                piece, size_bytes = [], 0
    if piece:
        yield piece


class _Scratch:
    """Memory for bytes that are read only to be digested; grows to the need of one block."""

    def __init__(self) -> None:
        self._pieces: list[memoryview] = []
        self._piece = 0
        self._taken = 0

    def reset(self) -> None:
        """Make all of the memory available again."""
        self._piece = self._taken = 0

    def take(self, size_bytes: int) -> memoryview:
        """Return this many bytes that were not handed out since the last reset."""
        while self._piece < len(self._pieces):
            piece = self._pieces[self._piece]
            if self._taken + size_bytes <= len(piece):
                self._taken += size_bytes
                return piece[self._taken - size_bytes : self._taken]
            self._piece, self._taken = self._piece + 1, 0
        self._pieces.append(memoryview(bytearray(max(size_bytes, _SCRATCH_BYTES))))
        self._taken = size_bytes
        return self._pieces[-1][:size_bytes]


@dataclass
class MappedFile:
    """One memory-mapped file, and which of its blocks are verified."""

    where: str
    """Its full name."""
    content: memoryview
    expected: Blocks | None
    """None: nothing is verified."""
    _verified: set[int] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def open(cls, storage: Storage, name: str, record: FileRecord | None) -> MappedFile:
        """Map a file, of which nothing is verified without a record.

        Raises:
            CorruptCheckpointError: it is missing, or its digests are not those committed.
        """
        where, expected = storage.where(name), None
        try:
            with storage.open(name) as source:
                if record is not None:
                    expected = read_expected(source, where, record)
                content = source.map()
        except FileNotFoundError as error:
            raise CorruptCheckpointError(where, "is missing") from error
        return cls(where, content, expected)

    def verify(self, wanted: range, name: str) -> None:
        """Check the blocks that a range overlaps against their digests, each only once.

        Raises:
            CorruptCheckpointError: one does not match, or the file ends before the range does.
        """
        if wanted.start < 0 or wanted.stop > len(self.content):
            raise CorruptCheckpointError(
                self.where, f"has {len(self.content)} bytes, too few for {name}"
            )
        if self.expected is None or not wanted:
            return
        if wanted.stop > self.expected.covered_bytes:
            raise CorruptCheckpointError(self.where, f"has {name} where no digest covers it")
        for number in sorted(blocks_of([wanted])):
            with self._lock:  # a thread that waits here then finds the block verified
                if number in self._verified:
                    continue
                place = self.expected.place(number)
                block = self.content[place.start : place.stop]
                if (found := self.expected.compare(number, [block])) is not None:
                    raise found.as_error(self.where, f", in {name}")
                self._verified.add(number)
