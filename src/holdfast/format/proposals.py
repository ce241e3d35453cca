"""What each rank sends to the planner about its items, and all proposals as one table.

Owns the compact, canonical proposal: the part that data-parallel ranks have in common is stored
apart from each rank's own part, so that a thousand identical proposals cost no more than one.
Promises that a structure changes whenever a plan for it would. Refuses ranks that disagree about a
name, and reports which. Decides nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
import xxhash

from holdfast.errors import UnsupportedStateError
from holdfast.format.layout import IntArray, Item, containers_of, leaders_of

_HEADER = struct.Struct("<16sQQ")  # structure, bytes of the table, items


def structure_of(items: Sequence[Item]) -> bytes:
    """Return a 16-byte digest of everything about the items that a plan depends on."""
    digest = xxhash.xxh3_128(_table_of(items))
    digest.update(_chunks_of(items))
    digest.update(json.dumps([(item.capacity_bytes, item.alias_of) for item in items]).encode())
    return digest.digest()


def propose(items: Sequence[Item]) -> bytes:
    """Return what the planner must know about the items of one rank.

    Raises:
        ValueError: items contradict themselves or one another.
    """
    leaders = leaders_of(items)
    slot_bytes = [
        item.capacity_bytes if container is None else container.size_bytes
        for item, container in zip(items, containers_of(items), strict=True)
    ]
    table = _table_of(items)
    header = _HEADER.pack(structure_of(items), len(table), len(items))
    return b"".join((header, table, _chunks_of(items), _int64(slot_bytes), _int64(leaders)))


def _table_of(items: Sequence[Item]) -> bytes:
    """Encode what data-parallel ranks have in common: names, paths, dtypes, global sizes."""
    codes: dict[torch.dtype | None, int] = {}
    described = {
        "names": [item.name for item in items],
        "paths": [
            (position, item.path)
            for position, item in enumerate(items)
            if item.path != tuple(item.name.split("."))
        ],
        "codes": [codes.setdefault(item.dtype, len(codes)) for item in items],
        "dtypes": [None if dtype is None else str(dtype).removeprefix("torch.") for dtype in codes],
        "sizes": [item.size for item in items],
    }
    return json.dumps(described, separators=(",", ":"), check_circular=False).encode("ascii")


def _chunks_of(items: Sequence[Item]) -> bytes:
    parts = chain((item.offsets for item in items), (item.lengths for item in items))
    return _int64(list(chain.from_iterable(parts)))


def _int64(numbers: Sequence[int]) -> bytes:
    return np.array(numbers, dtype=np.int64).tobytes()


class Catalogue:
    """Every name of the job, with the description that all ranks must agree on."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.paths: list[tuple[str | int, ...]] = []
        self.dtypes: list[str | None] = []
        self.sizes: list[tuple[int, ...]] = []
        self._ranks: list[int] = []

    def add(self, table: _Table, rank: int) -> IntArray:
        """Add one rank's table; return the number of each of its items' names."""
        numbers = []
        for position, name in enumerate(table.names):
            number = self.numbers.setdefault(name, len(self.paths))
            dtype, size = table.dtypes[position], table.sizes[position]
            if number == len(self.paths):
                self.paths.append(table.paths.get(position) or tuple(name.split(".")))
                self.dtypes.append(dtype)
                self.sizes.append(size)
                self._ranks.append(rank)
            elif dtype != self.dtypes[number] or size != self.sizes[number]:
                raise UnsupportedStateError(
                    f"{name} is {_kind(self.dtypes[number], self.sizes[number])} on rank "
                    f"{self._ranks[number]} and {_kind(dtype, size)} on rank {rank}.\n"
                    "One name must mean one tensor on every rank; name them apart."
                )
            numbers.append(number)
        return np.array(numbers, dtype=np.int64)


def _kind(dtype: str | None, size: tuple[int, ...]) -> str:
    return "a value" if dtype is None else f"{dtype}{list(size)}"


class _Table:
    """The common part of proposals, which most ranks share byte for byte."""

    def __init__(self, content: bytes) -> None:
        described = json.loads(content)
        self.names: list[str] = described["names"]
        self.paths: dict[int, tuple[str | int, ...]] = {
            position: tuple(path) for position, path in described["paths"]
        }
        kinds = described["dtypes"]
        self.dtypes: list[str | None] = [kinds[code] for code in described["codes"]]
        self.sizes: list[tuple[int, ...]] = [tuple(size) for size in described["sizes"]]
        self.dimensions = np.array([len(size) for size in self.sizes], dtype=np.int64)


@dataclass(eq=False)
class Profiles:
    """The distinct proposals: ranks with equal proposals share one profile."""

    of_rank: IntArray
    first_rank: IntArray
    """By profile."""
    ranks: list[list[int]]
    """By profile."""
    tables: dict[bytes, list[tuple[int, bytes]]]
    """By table: the profiles that share it, each with its own part."""
    structures: list[bytes]


def profiles_of(proposals: Sequence[bytes]) -> Profiles:
    """Group ranks by equal proposals, which are given in rank order."""
    known: dict[tuple[int, bytes], int] = {}
    tables: dict[bytes, tuple[int, list[tuple[int, bytes]]]] = {}
    of_rank: list[int] = []
    ranks: list[list[int]] = []
    structures = []
    for rank, proposal in enumerate(proposals):
        structure, table_bytes, _ = _HEADER.unpack_from(proposal)
        split = _HEADER.size + table_bytes
        number, members = tables.setdefault(proposal[_HEADER.size : split], (len(tables), []))
        own = proposal[split:]
        profile = known.setdefault((number, own), len(ranks))
        if profile == len(ranks):
            ranks.append([])
            members.append((profile, own))
        ranks[profile].append(rank)
        of_rank.append(profile)
        structures.append(structure)
    return Profiles(
        of_rank=np.array(of_rank, dtype=np.int64),
        first_rank=np.array([each[0] for each in ranks], dtype=np.int64),
        ranks=ranks,
        tables={table: members for table, (_, members) in tables.items()},
        structures=structures,
    )


@dataclass(eq=False)
class Rows:
    """One row per profile and item; all arrays have one length."""

    name: IntArray
    profile: IntArray
    item: IntArray
    offsets: IntArray
    lengths: IntArray
    slot_bytes: IntArray
    leader: IntArray
    """The item of the same profile whose bytes this one shares; -1: none."""

    def take(self, chosen: Any) -> Rows:
        """Return the rows at these positions, or where a mask is true."""
        return Rows(**{name: column[chosen] for name, column in vars(self).items()})


def rows_of(profiles: Profiles, catalogue: Catalogue) -> tuple[Rows, IntArray]:
    """Return all rows, and the item count of each profile; adds the names to the catalogue.

    Raises:
        UnsupportedStateError: ranks disagree about a name.
    """
    tables = [(_Table(table), members) for table, members in profiles.tables.items()]
    dimensions = max((int(max(table.dimensions, default=0)) for table, _ in tables), default=0)
    counts = np.zeros(len(profiles.ranks), dtype=np.int64)
    parts = []
    for table, members in tables:
        numbers = np.array([profile for profile, _ in members], dtype=np.int64)
        names = catalogue.add(table, profiles.ranks[members[0][0]][0])
        items, repeats = len(names), len(members)
        counts[numbers] = items
        own = np.frombuffer(b"".join(own for _, own in members), dtype=np.int64)
        total = int(table.dimensions.sum())
        own = own.reshape(repeats, 2 * total + 2 * items)
        present = np.arange(dimensions) < table.dimensions[:, None]
        offsets = np.zeros((repeats, items, dimensions), dtype=np.int64)
        lengths = np.ones((repeats, items, dimensions), dtype=np.int64)
        offsets[:, present] = own[:, :total]
        lengths[:, present] = own[:, total : 2 * total]
        parts.append(
            Rows(
                name=np.tile(names, repeats),
                profile=np.repeat(numbers, items),
                item=np.tile(np.arange(items), repeats),
                offsets=offsets.reshape(repeats * items, dimensions),
                lengths=lengths.reshape(repeats * items, dimensions),
                slot_bytes=own[:, 2 * total : 2 * total + items].reshape(-1),
                leader=own[:, 2 * total + items :].reshape(-1),
            )
        )
    if len(parts) == 1:
        return parts[0], counts
    columns = Rows.__dataclass_fields__
    return (
        Rows(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in columns}),
        counts,
    )
