"""Which ranks share a node and a directory, and which ranks hold copies of whose shards.

Owns the two groupings of ranks: a node, which is lost as a whole, and a place, a directory that
several ranks of a node see. Copies are placed on different nodes as far as there are such, spread
evenly, for any number of nodes and of ranks on each; where the world divides evenly these are the
cliques of nvidia-resiliency-ext. Pure except for `node_name`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def nodes(self) -> tuple[int, ...]:
        """The node of each rank, numbered in the order of first ranks."""
        return _numbered([each.node for each in self.seats])

    @property
    def places(self) -> tuple[int, ...]:
        """The place of each rank, numbered in the order of first ranks."""
        return _numbered([(each.node, each.directory) for each in self.seats])

    def place_mates(self, rank: int) -> list[int]:
        """Return the ranks that see the same files as this one, itself included."""
        places = self.places
        return [each for each, place in enumerate(places) if place == places[rank]]


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


def _first_of(ring: Sequence[Sequence[int]], column: int, count: int) -> tuple[int, ...]:
    """Return the ranks of one column, node by node, continuing with the next column if needed."""
    found: dict[int, None] = {}
    for shift in range(max(map(len, ring))):
        for ranks in ring:
            found.setdefault(ranks[(column + shift) % len(ranks)])
    return tuple(found)[:count]
