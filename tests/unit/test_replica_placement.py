"""Copies lie on other nodes, evenly, however ranks and nodes divide."""

from __future__ import annotations

from collections import Counter

import pytest

from holdfast.ranks.topology import (
    NODE_VARIABLE,
    Seat,
    Topology,
    assign_holders,
    find_clique,
    node_name,
    pack_numbers,
    unpack_numbers,
)

TABLE = [
    # nodes of the ranks, factor, holders by owner
    ([0], 1, [(0,)]),
    ([0, 0], 2, [(0, 1), (1, 0)]),
    ([0, 1], 2, [(0, 1), (1, 0)]),
    ([0, 0, 1, 1], 1, [(0,), (1,), (2,), (3,)]),
    ([0, 0, 1, 1], 2, [(0, 2), (1, 3), (2, 0), (3, 1)]),
    ([0, 1, 0, 1], 2, [(0, 1), (1, 0), (2, 3), (3, 2)]),
    ([0, 1, 2], 2, [(0, 1), (1, 2), (2, 0)]),
    ([0, 1, 2, 3, 4], 2, [(0, 1), (1, 0), (2, 3), (3, 4), (4, 2)]),
    ([0, 0, 1], 2, [(0, 2), (1, 2), (2, 0)]),
    ([0, 0, 1, 1], 3, [(0, 2, 1), (1, 3, 0), (2, 0, 3), (3, 1, 2)]),
    ([0, 0], 3, [(0, 1), (1, 0)]),
]


@pytest.mark.parametrize(("nodes", "factor", "expected"), TABLE)
def test_holders(nodes: list[int], factor: int, expected: list[tuple[int, ...]]) -> None:
    """The owner first, then other nodes in turn, then neighbours where nodes are too few."""
    assert assign_holders(nodes, factor) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("node_count", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("factor", [2, 3])
def test_no_two_copies_share_a_node_while_there_are_enough(
    ranks: int, node_count: int, factor: int
) -> None:
    """Every owner has so many copies on different nodes, and no rank holds more than others."""
    nodes = [node for node in range(node_count) for _ in range(ranks)]
    holders = assign_holders(nodes, factor)
    for owner, each in enumerate(holders):
        assert each[0] == owner
        assert len({nodes[rank] for rank in each}) == min(factor, node_count)
        assert len(each) == min(factor, len(nodes))
    counts = Counter(rank for each in holders for rank in each)
    assert set(counts.values()) == {min(factor, len(nodes))}


@pytest.mark.parametrize(("jump", "factor", "world"), [(1, 2, 4), (2, 2, 4), (2, 2, 8), (4, 2, 8)])
def test_where_the_world_divides_evenly_the_cliques_are_the_packages(
    jump: int, factor: int, world: int
) -> None:
    """With a jump, and with nodes of equal size, copies lie as nvidia-resiliency-ext has them."""
    group_utils = pytest.importorskip(
        "nvidia_resiliency_ext.checkpointing.local.replication.group_utils"
    )
    cliques = group_utils.parse_group_sequence(jump, factor, world)
    expected = {rank: set(clique) for clique in cliques for rank in clique}
    for holders in (
        assign_holders([0] * world, factor, jump),
        assign_holders([rank // jump for rank in range(world)], factor),
    ):
        assert {rank: set(each) for rank, each in enumerate(holders)} == expected


def test_ranks_of_one_node_that_see_other_files_are_two_places() -> None:
    """A node is lost as a whole; files are shared only where the directory is the same."""
    one, other = (1, 10), (1, 11)
    topology = Topology((Seat("a", one), Seat("a", other), Seat("b", one), Seat("a", one)))
    assert topology.nodes == (0, 0, 1, 0)
    assert topology.places == (0, 1, 2, 0)
    assert topology.place_mates(3) == [0, 3]


def test_the_name_of_a_node_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The override wins over the variable, which wins over the host name."""
    monkeypatch.delenv(NODE_VARIABLE, raising=False)
    host = node_name()
    assert host
    monkeypatch.setenv(NODE_VARIABLE, "simulated")
    assert node_name() == "simulated"
    assert node_name("given") == "given"


@pytest.mark.parametrize(
    ("nodes", "factor", "cliques"),
    [
        ([0, 0, 1, 1], 2, [[0, 2], [1, 3]]),
        ([0, 1, 2, 3, 4], 2, [[0, 1], [2, 3, 4]]),
        ([0, 0, 0], 1, [[0], [1], [2]]),
        ([0, 0, 1], 2, [[0, 1, 2]]),
    ],
)
def test_a_clique_is_closed(nodes: list[int], factor: int, cliques: list[list[int]]) -> None:
    """Ranks that send each other copies form one group, each rank is in one, and none is larger."""
    holders = assign_holders(nodes, factor)
    for rank in range(len(nodes)):
        assert find_clique(holders, rank) in cliques
        assert rank in find_clique(holders, rank)


@pytest.mark.parametrize("ranks", [1, 4096])
def test_a_table_of_ranks_is_sent_in_few_bytes(ranks: int) -> None:
    """Where it is regular; whatever it holds comes back, and equal tables are one object."""
    seats = tuple(Seat(f"node{rank // 8}", (7, rank // 4)) for rank in range(ranks))
    topology = Topology(seats)
    content = topology.to_bytes()
    found = Topology.from_bytes(content)
    assert len(content) < 4096
    assert (found.nodes, found.places) == (topology.nodes, topology.places)
    assert [each.node for each in found.seats] == [each.node for each in seats]
    numbers = [rank * 7919 % 1000 for rank in range(ranks)]
    assert unpack_numbers(pack_numbers(numbers)) == tuple(numbers)
    assert unpack_numbers(pack_numbers(numbers)) is unpack_numbers(pack_numbers(numbers))
