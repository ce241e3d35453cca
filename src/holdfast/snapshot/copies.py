"""Whether the ranks' own copies of a name are equal.

Owns the digest of a copy, over type, size and value and not over the slot it is in, and how many
digests a rank reports: one for each value, and for many tensors one for each of a few groups.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence

import xxhash

from holdfast.format.items import Source
from holdfast.format.layout import Layout
from holdfast.format.values import is_component
from holdfast.snapshot.copy import bytes_of

_GROUPS = 24
"""Tensors are reported in so many groups at most."""


def digest_copies(layout: Layout, content_of: Callable[[int], Source]) -> dict[str, str]:
    """Return hexadecimal digests of what is per rank, by name or by group of names.

    `content_of`: returns what is in a slot, by its number.
    """
    numbers = {id(slot): number for number, slot in enumerate(layout.slots)}
    values: dict[str, str] = {}
    tensors: dict[str, str] = {}
    for item, slot in layout.items:
        if item.per_rank:
            content = content_of(numbers[id(slot)])
            described = f"{item.dtype} {item.lengths} {item.kind}".encode()
            digest = xxhash.xxh3_128_hexdigest(described + _digest(content))
            is_alone = item.dtype is None or is_component(item.name)
            (values if is_alone else tensors)[item.name] = digest
    return _joined(values) | _grouped(tensors)


def find_differing(copies: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    """Return the names or groups of which not all ranks that have them reported one digest."""
    first: dict[str, str] = {}
    found: dict[str, None] = {}
    for each in copies:
        for name, digest in each.items():
            if first.setdefault(name, digest) != digest:
                found[name] = None
    return tuple(sorted(found))


def _grouped(digests: Mapping[str, str]) -> dict[str, str]:
    """Join the digests of consecutive names, if there are many."""
    names = sorted(digests)
    size = -(-len(names) // _GROUPS)
    groups = [names[at : at + size] for at in range(0, len(names), max(size, 1))]
    return {_label(group): _join(group, digests) for group in groups}


def _joined(digests: Mapping[str, str]) -> dict[str, str]:
    """Join the digests of each component: whether it differs is asked by its own name."""
    found = {name: each for name, each in digests.items() if not is_component(name)}
    parts: dict[str, list[str]] = {}
    for name in digests.keys() - found.keys():
        parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
    return found | {base: _join(sorted(names), digests) for base, names in parts.items()}


def _label(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _join(names: Sequence[str], digests: Mapping[str, str]) -> str:
    if len(names) == 1:
        return digests[names[0]]
    described = "\n".join(f"{each} {digests[each]}" for each in names)
    return xxhash.xxh3_128_hexdigest(described.encode())


def _digest(content: Source) -> bytes:
    digest = xxhash.xxh3_128()
    if isinstance(content, bytes):
        # Equal values may be in slots of different sizes: only what the archive holds counts.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for each in archive.infolist():
                digest.update(each.filename.encode())
                digest.update(archive.read(each))
    else:
        for piece in bytes_of(content):
            digest.update(piece)
    return digest.digest()
