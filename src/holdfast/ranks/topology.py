"""Which ranks share a node and a directory, and which ranks hold copies of whose shards.

Owns the two groupings of ranks: a node, which is lost as a whole, and a place, a directory that
several ranks of a node see. Copies are placed on different nodes as far as there are such, spread
evenly, for any number of nodes and of ranks on each; where the world divides evenly these are the
cliques of nvidia-resiliency-ext. Tables of all ranks have a compact form to be sent in. Pure except
for `node_name`.
"""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

NODE_VARIABLE = "HOLDFAST_NODE"
"""Names the node of this process in place of its host name; simulates nodes on one machine."""


def node_name(override: str | None = None) -> str:
    """Return the name of the node this process runs on."""
    return override or os.environ.get(NODE_VARIABLE) or socket.gethostname()


@dataclass(frozen=True)
class Seat:
    """The placement of one rank."""

    node: str
    directory: tuple[int, int] = (0, 0)
    """Device and inode of its directory: two ranks of a node need not see the same files."""


@dataclass(frozen=True)
class Topology:
    """The placement of all ranks, by rank."""

    seats: tuple[Seat, ...]

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.seats)

    @cached_property
    def nodes(self) -> tuple[int, ...]:
        """The node of each rank, numbered in the order of first ranks."""
        return _numbered([each.node for each in self.seats])

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The place of each rank, numbered in the order of first ranks."""
        return _numbered([(each.node, each.directory) for each in self.seats])

    def place_mates(self, rank: int) -> list[int]:
        """Return the ranks that see the same files as this one, itself included."""
        return list(self._by_place[self.places[rank]])

    @cached_property
    def _by_place(self) -> dict[int, list[int]]:
        ranks: dict[int, list[int]] = {}
        for rank, place in enumerate(self.places):
            ranks.setdefault(place, []).append(rank)
        return ranks

    def to_bytes(self) -> bytes:
        """Return a compact form: each node is named once, and directories are only numbered."""
        names = list(dict.fromkeys(each.node for each in self.seats))
        tables = pack_numbers(self.nodes), pack_numbers(self.places)
        return zlib.compress(json.dumps([names, *(each.hex() for each in tables)]).encode())

    @classmethod
    def from_bytes(cls, content: bytes) -> Topology:
        """Parse the output of `to_bytes`; a directory has its number for an inode."""
        names, nodes, places = json.loads(zlib.decompress(content))
        tables = (unpack_numbers(bytes.fromhex(each)) for each in (nodes, places))
        seats = [Seat(names[node], (0, place)) for node, place in zip(*tables, strict=True)]
        return cls(tuple(seats))


def pack_numbers(numbers: Sequence[int]) -> bytes:
    """Return a table of one number for each rank in few bytes where it is regular."""
    return zlib.compress(np.diff(np.array(numbers, dtype=np.int64), prepend=0).tobytes())


@lru_cache(maxsize=64)
def unpack_numbers(content: bytes) -> tuple[int, ...]:
    """Return the numbers that `pack_numbers` was given; equal tables are one object."""
    differences = np.frombuffer(zlib.decompress(content), dtype=np.int64)
    return tuple(np.cumsum(differences).tolist())


def _numbered(values: Sequence[object]) -> tuple[int, ...]:
    numbers: dict[object, int] = {}
    return tuple(numbers.setdefault(each, len(numbers)) for each in values)


def assign_holders(
    nodes: Sequence[int], factor: int, jump: int | None = None
) -> list[tuple[int, ...]]:
    """Return for each rank the holders of its shard, itself first.

    `nodes`: the node of each rank. `factor`: the total copies of a shard, fewer in a smaller world.
    `jump`: count this many consecutive ranks as one node instead. Nodes form groups of `factor`, in
    order; remaining nodes join the last group, in which copies are then placed as on a ring.
    """
    if jump is not None:
        nodes = [rank // jump for rank in range(len(nodes))]
    members: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    order = list(members)
    groups = [order[start : start + factor] for start in range(0, len(order), factor)]
    if len(groups) > 1 and len(groups[-1]) < factor:
        groups[-2:] = [groups[-2] + groups[-1]]
    holders: list[tuple[int, ...]] = [()] * len(nodes)
    for group in groups:
        for position, node in enumerate(group):
            ring = [members[each] for each in group[position:] + group[:position]]
            for column, rank in enumerate(members[node]):
                holders[rank] = _first_of(ring, column, factor)
    return holders


def find_clique(holders: Sequence[Sequence[int]], rank: int) -> list[int]:
    """Return the ranks that send each other copies, directly or through others, in order.

    `holders`: as of `assign_holders`.
    """
    leaders = list(range(len(holders)))

    def leader_of(one: int) -> int:
        while leaders[one] != one:
            leaders[one] = one = leaders[leaders[one]]
        return one

    for owner, ranks in enumerate(holders):
        for each in ranks:
            first, second = sorted((leader_of(owner), leader_of(each)))
            leaders[second] = first
    return [each for each in range(len(holders)) if leader_of(each) == leader_of(rank)]


def _first_of(ring: Sequence[Sequence[int]], column: int, count: int) -> tuple[int, ...]:
    """Return the ranks of one column, node by node, continuing with the next column if needed."""
    found: dict[int, None] = {}
    for shift in range(max(map(len, ring))):
        for ranks in ring:
            found.setdefault(ranks[(column + shift) % len(ranks)])
    return tuple(found)[:count]
