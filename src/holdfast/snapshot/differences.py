"""Where the copies of one item differ first, found by all its holders together.

Owns the descent from a block of 8 MiB over pages of 4 KiB to one element, and the error that names
it. Only two ranks are asked, one of each of the first two sides, and never for more than digests
and one page. Promises the same error on every rank. Where a rank no longer has the bytes that were
compared, since training has changed them, the block is named and no values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import xxhash

from holdfast.errors import ReplicaMismatchError
from holdfast.format.layout import Item
from holdfast.ranks.coordinator import Coordinator
from holdfast.storage.digests import BLOCK_BYTES

T = TypeVar("T")
Read = Callable[[int, int], bytes | None]
"""Returns the bytes of a rank's copy from one position to another; None: they have changed."""

_PAGE_BYTES = 4096
"""Bytes that are compared one by one once digests have found where to look."""


@dataclass(frozen=True)
class Difference:
    """What is known of an item that differs before its bytes are compared."""

    sides: Sequence[Sequence[int]]
    """Ranks that hold the same value together, by their lowest rank."""
    block: int
    """The first one that differs."""
    others: int
    """How many more items differ."""
    agreed: int | None
    """The last iteration at which all copies agreed."""


def find_sides(values: Mapping[int, Any]) -> list[list[int]]:
    """Return the ranks that have equal values, by their lowest rank."""
    sides: dict[Any, list[int]] = {}
    for rank, value in sorted(values.items()):
        sides.setdefault(value, []).append(rank)
    return list(sides.values())


def ask(
    stage: str, of: Iterable[int], work: Callable[[], T], coordinator: Coordinator
) -> Mapping[int, T]:
    """Return what some ranks answer; every rank calls it."""
    asked = sorted(set(of))

    def answer() -> list[T]:
        return [work()] if coordinator.rank in asked else []

    return coordinator.all_reduce(
        stage, answer, lambda found: {rank: found[rank][0] for rank in asked}
    )


def refuse(
    difference: Difference, item: Item | None, read: Read | None, coordinator: Coordinator
) -> NoReturn:
    """Find the first element that differs and raise it; every rank calls it.

    `item`, `read`: of a rank that holds it.

    Raises:
        ReplicaMismatchError: on every rank.
    """
    pair = one, other = difference.sides[0][0], difference.sides[1][0]
    start = difference.block * BLOCK_BYTES

    def digest_pages() -> tuple[Item, list[int] | None]:
        assert item is not None
        assert read is not None
        content = read(start, start + BLOCK_BYTES)
        return item, None if content is None else _digests_of_pages(content)

    pages = ask("replica pages", pair, digest_pages, coordinator)
    found, first = pages[one]
    second = pages[other][1]
    index, values = None, None
    if first is not None and second is not None:
        start += first_unlike(first, second) * _PAGE_BYTES

        def read_page() -> bytes | None:
            assert read is not None
            return read(start, start + _PAGE_BYTES)

        contents = ask("replica values", pair, read_page, coordinator)
        left, right = contents[one], contents[other]
        if left is not None and right is not None:
            index, values = _first_element(found, start, left, right)
    raise ReplicaMismatchError(
        found.name,
        [tuple(each) for each in difference.sides],
        difference.block,
        index,
        values,
        difference.others,
        difference.agreed,
    )


def first_unlike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the first place at which two sequences differ."""
    pairs = zip(one, other, strict=False)
    common = min(len(one), len(other))
    return next((at for at, (first, second) in enumerate(pairs) if first != second), common)


def _digests_of_pages(content: bytes) -> list[int]:
    return [
        xxhash.xxh3_64_intdigest(content[at : at + _PAGE_BYTES])
        for at in range(0, len(content), _PAGE_BYTES)
    ]


def _first_element(
    item: Item, start: int, first: bytes, second: bytes
) -> tuple[tuple[int, ...] | None, tuple[str, str]]:
    """Return the index of the first element that differs, in the global tensor, and both values.

    The index is None for what is no dense tensor.
    """
    if item.dtype is None or item.capacity_bytes:
        at = first_unlike(first, second)
        return None, (repr(first[at : at + 16]), repr(second[at : at + 16]))
    size = item.dtype.itemsize
    at = first_unlike(first, second) // size
    place = np.unravel_index(start // size + at, item.lengths)
    index = tuple(int(own) + low for own, low in zip(place, item.offsets, strict=True))
    one, other = (each[at * size : (at + 1) * size] for each in (first, second))
    shown = _show(one, item.dtype), _show(other, item.dtype)
    if shown[0] == shown[1]:  # two NaNs, say
        shown = f"{shown[0]} (bits {one[::-1].hex()})", f"{shown[1]} (bits {other[::-1].hex()})"
    return index, shown


def _show(content: bytes, dtype: torch.dtype) -> str:
    return str(torch.frombuffer(bytearray(content), dtype=dtype)[0].item())
