"""Copies of one name that several ranks have saved, read from their shards.

For loads that need more than their own copy: another number of ranks reads the shards once, each
rank a share, and exchanges what is distinct. Promises that every byte used matched its digest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from holdfast.format.merging import merge_shards
from holdfast.read.index import read_index
from holdfast.read.reader import ShardReader, decode_value
from holdfast.storage.backend import Storage
from holdfast.storage.digests import FileRecord

Copies = Sequence[tuple[int, str, bytes]]
"""Rank that saved, name, and the bytes of a value; the lowest rank of those with equal bytes."""


def read_copies(
    files: Storage, shards: Mapping[int, tuple[str, FileRecord]], names: Collection[str]
) -> Copies:
    """Read the distinct copies of these names from shards, given by the rank that wrote them.

    Raises:
        CorruptCheckpointError: a file is missing or damaged.
        OSError: it cannot be read.
    """
    found: list[tuple[int, str, bytes]] = []
    for rank, (name, record) in shards.items():
        entries = read_index(files, name, record).entries(files.where(name))
        own = [each for each in entries if each.per_rank and each.name in names]
        reader = ShardReader(files, merge_shards([(rank, name, own)]), {name: record})
        contents = reader.read_contents(reader.value_names())
        found += [(rank, each, bytes(content)) for each, content in contents.items()]
    return join_copies([found])


def join_copies(parts: Sequence[Copies]) -> Copies:
    """Return the distinct copies among these, sorted by rank."""
    lowest: dict[tuple[str, bytes], int] = {}
    for rank, name, content in sorted(each for part in parts for each in part):
        lowest.setdefault((name, content), rank)
    return [(rank, name, content) for (name, content), rank in lowest.items()]


def decode_copies(copies: Copies, where: str) -> dict[str, list[Any]]:
    """Return the values by name, running no code.

    Raises:
        CorruptCheckpointError: one needs code, or is torn.
    """
    values: dict[str, list[Any]] = {}
    for rank, name, content in copies:
        values.setdefault(name, []).append(decode_value(content, where, f"{name} of rank {rank}"))
    return values
