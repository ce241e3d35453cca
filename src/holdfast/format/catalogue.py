"""Every name of a job, and what all ranks must agree on about it.

Owns the table that proposals have in common, and the one description that each name gets from all
of them: nested keys, type, global size, kind, and whether it is per rank. Refuses by name what two
ranks describe differently.
"""

from __future__ import annotations

import json

import numpy as np

from holdfast.errors import UnsupportedStateError
from holdfast.format.layout import IntArray


class Catalogue:
    """Every name of the job, with the description that all ranks must agree on."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.paths: list[tuple[str | int, ...]] = []
        self.dtypes: list[str | None] = []
        self.sizes: list[tuple[int, ...]] = []
        self.kinds: list[str] = []
        self.per_rank: list[bool] = []
        self._ranks: list[int] = []

    def add(self, table: Table, rank: int) -> IntArray:
        """Add one rank's table; return the number of each of its items' names."""
        numbers = []
        for position, name in enumerate(table.names):
            number = self.numbers.setdefault(name, len(self.paths))
            dtype, size = table.dtypes[position], table.sizes[position]
            per_rank = bool(table.per_rank[position])
            if number == len(self.paths):
                self.paths.append(table.paths.get(position) or tuple(name.split(".")))
                self.dtypes.append(dtype)
                self.sizes.append(size)
                self.kinds.append(table.kinds[position])
                self.per_rank.append(per_rank)
                self._ranks.append(rank)
            elif per_rank != self.per_rank[number]:
                own, whole = (rank, self._ranks[number])[:: 1 if per_rank else -1]
                raise UnsupportedStateError(
                    f"{name} is rank {own}'s own copy there, and one value for all on rank "
                    f"{whole}.\nOne name must mean the same on every rank; name them apart."
                )
            elif per_rank:
                pass  # each rank may have what it has
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


class Table:
    """The common part of proposals, which most ranks share byte for byte."""

    def __init__(self, content: bytes) -> None:
        described = json.loads(content)
        self.names: list[str] = described["names"]
        self.paths: dict[int, tuple[str | int, ...]] = {
            position: tuple(path) for position, path in described["paths"]
        }
        dtypes, kinds = described["dtypes"], described["kinds"]
        self.dtypes: list[str | None] = [dtypes[code] for code in described["codes"]]
        self.kinds: list[str] = [kinds[code] for code in described["kind_codes"]]
        self.per_rank = np.zeros(len(self.names), dtype=np.bool_)
        self.per_rank[described["per_rank"]] = True
        self.sizes: list[tuple[int, ...]] = [tuple(size) for size in described["sizes"]]
        self.dimensions = np.array([len(size) for size in self.sizes], dtype=np.int64)
