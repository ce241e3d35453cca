"""Names that no rank has: a checkpoint's names compared with those of all ranks together.

Owns the exchange. A rank may lack what another has (a pipeline's stages, experts): only what all of
them lack is left over. Promises that nothing is sent in the usual case, where some rank has every
name or all ranks lack the same ones, and that what a rank receives does not grow with the number of
ranks: otherwise each sends one bit for each name of the checkpoint, compressed.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from holdfast.ranks.coordinator import Coordinator
from holdfast.state.codec import decode, encode
from holdfast.state.saved import SavedTensors


@dataclass(frozen=True)
class Leftover:
    """What one rank tells at first: digests of the names that it lacks, and of all names."""

    lacking: bytes
    """Empty: none."""
    known: bytes

    @classmethod
    def of(cls, lacking: Collection[str], known: Collection[str]) -> Leftover:
        """Describe a rank that lacks some of the names that it knows the checkpoint to have."""
        return cls(_digest(lacking) if lacking else b"", _digest(known))


ALL_FOUND, NONE, SAME = "all found", "none", "the same"
DIFFERENT, OF_OTHER_NAMES = "different", "of other names"


def judge(found: Sequence[Leftover]) -> str:
    """Return on rank 0 what the ranks lack together: nothing, all the same, or what is unknown."""
    if not any(each.lacking for each in found):
        return ALL_FOUND
    if any(not each.lacking for each in found):
        is_known = len({each.known for each in found}) == 1
        return NONE if is_known else OF_OTHER_NAMES
    if len({each.known for each in found}) > 1:
        return OF_OTHER_NAMES
    return SAME if len({each.lacking for each in found}) == 1 else DIFFERENT


def find_unexpected(
    lacking: Collection[str],
    live: Collection[str],
    known: Collection[str],
    verdict: str,
    coordinator: Coordinator,
) -> list[str]:
    """Return the names that all ranks lack; every rank calls it after the same `judge`.

    `lacking`, `live`, `known`: names of this rank: of the checkpoint and not here, here, and of the
    checkpoint.
    """
    if verdict in (ALL_FOUND, NONE):
        return []
    if verdict == SAME:
        return sorted(lacking)
    if verdict == DIFFERENT:
        names = sorted(known)
        return _all_lack(names, set(lacking), coordinator)
    # Ranks know different names of one checkpoint: first which names any of them lacks.
    joined = coordinator.all_reduce(
        "leftover names",
        lambda: _pack("\n".join(sorted(lacking)).encode()),
        lambda parts: _pack("\n".join(sorted({*_split(parts)})).encode()),
    )
    names = sorted({*_split([joined])})
    here = set(live)
    return _all_lack(names, {each for each in names if each not in here}, coordinator)


def _all_lack(
    names: Sequence[str], lacking: Collection[str], coordinator: Coordinator
) -> list[str]:
    def mark() -> bytes:
        bits = np.fromiter((each in lacking for each in names), np.bool_, len(names))
        return _pack(np.packbits(bits).tobytes())

    def join(marks: Sequence[bytes]) -> bytes:
        both = np.full(-(-len(names) // 8), 255, np.uint8)
        for each in marks:
            both &= np.frombuffer(zlib.decompress(each), np.uint8)
        return _pack(both.tobytes())

    packed = coordinator.all_reduce("names", mark, join)
    bits = np.unpackbits(np.frombuffer(zlib.decompress(packed), np.uint8), count=len(names))
    return [name for name, is_lacking in zip(names, bits.tolist(), strict=True) if is_lacking]


def _pack(content: bytes) -> bytes:
    return zlib.compress(content, 1)


def _split(parts: Sequence[bytes]) -> list[str]:
    texts = (zlib.decompress(each).decode() for each in parts)
    return [name for text in texts for name in text.split("\n") if name]


def _digest(names: Collection[str]) -> bytes:
    return xxhash.xxh3_128_digest("\n".join(sorted(names)).encode())


def gather_records(saved: SavedTensors, coordinator: Coordinator) -> SavedTensors:
    """Return what was saved with the groups of all ranks, since parameters are not where they were.

    Sent are the distinct records. Every rank calls it.
    """

    def pack() -> dict[str, bytes]:
        return {name: encode(saved.values[name]) for name in saved.own_records}

    def join(parts: Sequence[Mapping[str, bytes]]) -> dict[str, list[bytes]]:
        distinct: dict[str, dict[bytes, None]] = {}
        for part in parts:
            for name, content in part.items():
                distinct.setdefault(name, {})[content] = None
        return {name: list(contents) for name, contents in distinct.items()}

    packed = coordinator.all_reduce("records", pack, join)
    records = {name: [decode(each, name) for each in found] for name, found in packed.items()}
    return replace(saved, records=records, are_united=True)
