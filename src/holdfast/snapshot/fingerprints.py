"""Digests of tensors, to compare what several ranks hold.

Owns how the bytes of a tensor become digests of its blocks of 8 MiB, and these become 16 bytes: in
host memory by xxh3 on a few threads, on another device by an exact integer hash that is computed
there, so that only digests are copied to the host, and only when they are asked for. Equal bits
have equal digests, NaNs and negative zeros included, on the same kind of device. Digests of host
and device differ: `host_digests` is for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash

from holdfast.format.items import Source
from holdfast.snapshot.copy import bytes_of, mark_streams
from holdfast.storage.digests import BLOCK_BYTES

Wanted = tuple[Source, Sequence[int] | None]
"""A source and the numbers of its blocks; None: all."""

_WORKERS = 2
"""Threads that digest: one thread reaches half of the memory's read speed."""
_LARGE_BYTES = 64 << 10
"""From this size on a digest releases the GIL for long enough to be worth a thread."""
_DEVICE_PIECE_BYTES = 32 << 20
"""A device hashes pieces of this size, which bounds the extra memory that it needs."""
_LANES = (0x7FEB352D9E3779B1, 0x3C6EF372FE94F82B)
"""Odd factors of the two halves of a digest on a device; below 2**63."""


def fingerprints(sources: Sequence[Source]) -> list[bytes]:
    """Return 16 bytes for each source; views of the same memory are digested once."""
    digests = BlockDigests([(source, None) for source in sources])
    return [fingerprint(each) for each in digests.result()]


def fingerprint(digests: Sequence[bytes]) -> bytes:
    """Return 16 bytes for some blocks of one source."""
    return digests[0] if len(digests) == 1 else xxhash.xxh3_128_digest(b"".join(digests))


class BlockDigests:
    """Digests of blocks as they are now: of host memory at once, of a device when awaited."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self._found: list[list[bytes]] = [[] for _ in wanted]
        self._repeated: list[tuple[int, int]] = []
        self._hashed: list[tuple[list[int], list[int], torch.Tensor]] = []
        """For each device: what was wanted of it, by number, their counts of blocks, the hashes."""
        self._computed: list[Any] = []
        places: dict[Any, int] = {}
        large: list[int] = []
        remote: dict[torch.device, list[int]] = {}
        for number, (source, blocks) in enumerate(wanted):
            if isinstance(source, torch.Tensor) and source.numel():
                place = _place_of(source), None if blocks is None else tuple(blocks)
                first = places.setdefault(place, number)
                if first != number:
                    self._repeated.append((number, first))
                    continue
                if source.device.type != "cpu":
                    remote.setdefault(source.device, []).append(number)
                    continue
                if source.nbytes >= _LARGE_BYTES:
                    large.append(number)
                    continue
            self._found[number] = host_digests(source, blocks)
        for numbers in remote.values():  # first: a device computes while the host does
            self._hash([wanted[number] for number in numbers], numbers)
        if large:
            with ThreadPoolExecutor(_WORKERS, thread_name_prefix="holdfast-compare") as pool:
                digests = pool.map(lambda number: host_digests(*wanted[number]), large)
                for number, each in zip(large, digests, strict=True):
                    self._found[number] = each

    @torch.no_grad()
    def _hash(self, wanted: Sequence[Any], numbers: list[int]) -> None:
        hashes: list[torch.Tensor] = []
        counts: list[int] = []
        for source, blocks in wanted:
            own = [hash_on_device(each) for each in _blocks_on_device(source, blocks)]
            hashes += own
            counts.append(len(own))
        stacked = torch.stack(hashes)
        self._computed += [each for events in mark_streams([stacked]).values() for each in events]
        self._hashed.append((numbers, counts, stacked))

    def result(self) -> list[list[bytes]]:
        """Return the digests of each, waiting for devices; on any thread."""
        for each in self._computed:  # another thread's stream would not wait for them
            each.synchronize()
        for numbers, counts, stacked in self._hashed:
            hashes = iter(stacked.cpu())
            for number, count in zip(numbers, counts, strict=True):
                self._found[number] = [next(hashes).numpy().tobytes() for _ in range(count)]
        for number, first in self._repeated:
            self._found[number] = self._found[first]
        self._hashed, self._computed, self._repeated = [], [], []
        return self._found


def host_digests(source: Source, blocks: Sequence[int] | None = None) -> list[bytes]:
    """Return digests of a source's blocks of 8 MiB, the same on every kind of device."""
    if blocks is not None:
        return [xxhash.xxh3_128_digest(block_of(source, number)) for number in blocks]
    found: list[bytes] = []
    digest = xxhash.xxh3_128()
    filled = 0
    for part in _bytes_of(source):
        rest = part
        while len(rest):
            count = min(len(rest), BLOCK_BYTES - filled)
            digest.update(rest[:count])
            rest = rest[count:]
            filled += count
            if filled == BLOCK_BYTES:
                found.append(digest.digest())
                digest, filled = xxhash.xxh3_128(), 0
    return [*found, digest.digest()] if filled else found


def block_of(source: Source, number: int) -> memoryview:
    """Return the bytes of a block: a view of them where the source is plain memory of the host."""
    start, end = number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES
    if isinstance(source, bytes):
        return memoryview(source)[start:end]
    if source.device.type == "cpu" and source.is_contiguous():
        parts = list(bytes_of(source))
        if len(parts) == 1:
            return parts[0][start:end]
    return memoryview(bytes_between(source, start, end))


def bytes_between(source: Source, start: int, end: int) -> bytes:
    """Return some of the row-major bytes of a source."""
    found = bytearray()
    position = 0
    for part in _bytes_of(source):
        low, high = max(start - position, 0), min(end - position, len(part))
        if low < high:
            found += part[low:high]
        position += len(part)
    return bytes(found)


def _bytes_of(source: Source) -> Iterator[memoryview]:
    if isinstance(source, bytes):
        yield memoryview(source)
    elif source.numel():
        yield from bytes_of(source)


def _place_of(tensor: torch.Tensor) -> Any:
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _blocks_on_device(tensor: torch.Tensor, blocks: Sequence[int] | None) -> Iterator[torch.Tensor]:
    """Yield blocks of a tensor on its device, flat."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    size = BLOCK_BYTES // flat.element_size()
    for number in range(-(-flat.numel() // size)) if blocks is None else blocks:
        yield flat[number * size : (number + 1) * size]


@torch.no_grad()
def hash_on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return two 64-bit integers that depend on every bit of a tensor and its place; exact.

    Sums of integers that wrap do not depend on the order in which a device adds them.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = plain.view(-1).view(torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), _DEVICE_PIECE_BYTES):
        piece = flat[start : start + _DEVICE_PIECE_BYTES]
        if rest := -piece.numel() % 8:
            piece = torch.cat((piece, piece.new_zeros(rest)))
        if piece.storage_offset() % 8:
            piece = piece.clone()
        words = piece.view(torch.int64)
        places = torch.arange(words.numel(), dtype=torch.int64, device=tensor.device)
        places += start // 8 + 1
        for lane, factor in enumerate(_LANES):
            mixed = (words ^ (places * factor)) * factor
            mixed ^= mixed >> 29
            mixed *= _LANES[1 - lane]
            mixed ^= mixed >> 32
            sums[lane] += mixed.sum()
    return sums
