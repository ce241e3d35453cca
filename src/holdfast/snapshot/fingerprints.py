"""Digests of live tensors, to compare what several ranks hold.

Owns how the bytes of a tensor become 16 bytes: in host memory by xxh3 on a few threads, on another
device by an exact integer hash that is computed there, so that only digests are copied to the host.
Equal bits have equal digests, NaNs and negative zeros included, on the same kind of device. Digests
of host and device differ: `host_digests` is for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash

from holdfast.format.items import Source
from holdfast.snapshot.copy import bytes_of
from holdfast.storage.digests import BLOCK_BYTES

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
    found: list[bytes] = [b""] * len(sources)
    places: dict[Any, int] = {}
    repeated: list[tuple[int, int]] = []
    large: list[int] = []
    remote: list[int] = []
    for number, source in enumerate(sources):
        if isinstance(source, torch.Tensor) and source.numel():
            place = _place_of(source)
            first = places.setdefault(place, number)
            if first != number:
                repeated.append((number, first))
                continue
            if source.device.type != "cpu":
                remote.append(number)
                continue
            if source.nbytes >= _LARGE_BYTES:
                large.append(number)
                continue
        found[number] = _digest(source)
    hashed = _hash_on_devices([sources[number] for number in remote])
    if large:
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="holdfast-compare") as pool:
            digests = pool.map(lambda number: _digest(sources[number]), large)
            found = _put(found, large, digests)
    found = _put(found, remote, hashed)
    for number, first in repeated:
        found[number] = found[first]
    return found


def host_digests(source: Source) -> list[bytes]:
    """Return the digests of a source's blocks of 8 MiB, the same on every kind of device."""
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


def _digest(source: Source) -> bytes:
    if isinstance(source, torch.Tensor) and source.nbytes <= BLOCK_BYTES:
        digest = xxhash.xxh3_128()
        for part in bytes_of(source):
            digest.update(part)
        return digest.digest()
    return xxhash.xxh3_128_digest(b"".join(host_digests(source)))


def _bytes_of(source: Source) -> Iterator[memoryview]:
    if isinstance(source, bytes):
        yield memoryview(source)
    elif source.numel():
        yield from bytes_of(source)


def _put(found: list[bytes], numbers: Sequence[int], digests: Any) -> list[bytes]:
    for number, digest in zip(numbers, digests, strict=True):
        found[number] = digest
    return found


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


@torch.no_grad()
def _hash_on_devices(tensors: Sequence[Any]) -> list[bytes]:
    """Hash tensors where they are; the results are copied to the host once per device."""
    by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for number, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append((number, hash_on_device(tensor)))
    found = [b""] * len(tensors)
    for hashed in by_device.values():
        values = torch.stack([each for _, each in hashed]).cpu()
        for (number, _), value in zip(hashed, values, strict=True):
            found[number] = value.numpy().tobytes()
    return found


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
