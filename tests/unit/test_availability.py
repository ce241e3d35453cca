"""One decision from what all ranks see: the newest whole commit, and a reason for all others."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest

from holdfast.tiers.local.commits import Agreement, Candidate, Copy, Inventory, judge
from holdfast.tiers.local.shard_file import Found, ShardRecord, shard_name
from tests.support.local_shards import RECORD


def _found(
    iteration: int,
    owner: int,
    sequence: int | None = None,
    rank: int | None = None,
    **changes: Any,
) -> Found:
    record = replace(
        RECORD,
        iteration=iteration,
        owner=owner,
        sequence=iteration if sequence is None else sequence,
        **changes,
    )
    path = f"{owner if rank is None else rank}/{shard_name(iteration, owner)}"
    return Found(path, iteration, owner, record)


def _judge(*by_rank: list[Found], **settings: Any) -> Agreement:
    inventories = [Inventory(tuple(found)) for found in by_rank]
    return judge(inventories, lambda record: None, {}, **settings)


def _iteration(agreed: Agreement) -> int | None:
    return None if agreed.candidate is None else agreed.candidate.record.iteration


def test_nothing_is_nothing() -> None:
    """An empty directory is no error."""
    agreed = _judge([], [])
    assert agreed.candidate is None
    assert agreed.passed == ()
    assert agreed.newest_sequence == 0


def test_the_newest_commit_that_is_whole_wins() -> None:
    """A later one that lacks a shard is passed over, with what it lacks."""
    agreed = _judge(
        [_found(10, 0), _found(20, 0), _found(30, 0, state_names=None)],
        [_found(10, 1), _found(20, 1)],
    )
    assert _iteration(agreed) == 20
    assert [(each.iteration, each.reason) for each in agreed.passed] == [
        (30, "nothing is left of rank 1 of 2")
    ]
    assert [each[2] for each in agreed.whole] == [20, 10]
    assert agreed.newest_sequence == 30


def test_newer_means_committed_later() -> None:
    """After a rollback a smaller iteration may be the newest."""
    agreed = _judge(
        [_found(30, 0, sequence=3), _found(20, 0, sequence=4)],
        [_found(30, 1, sequence=3), _found(20, 1, sequence=4)],
    )
    assert _iteration(agreed) == 20


def test_two_saves_of_one_iteration_are_never_mixed() -> None:
    """One rank has published the second save, the other still shows the first: neither is whole."""
    agreed = _judge([_found(20, 0, sequence=5)], [_found(20, 1, sequence=4)])
    assert agreed.candidate is None
    assert len(agreed.passed) == 2


def test_shards_of_another_world_are_not_completed_by_ours() -> None:
    """2 shards of 4 are no checkpoint of 2 ranks."""
    four: dict[str, Any] = {"world_size": 4, "nodes": (0, 0, 1, 1)}
    agreed = _judge([_found(20, 0, **four)], [_found(20, 1, **four)])
    assert agreed.candidate is None
    assert agreed.passed[0].reason == "nothing is left of ranks 2, 3 of 4"


def test_a_copy_of_the_small_states_is_no_shard() -> None:
    """With it the rest may cover the state; without anybody knowing what that is, it may not."""
    small = _found(20, 1, rank=0, is_whole=False)
    agreed = _judge([_found(20, 0), small], [])
    assert agreed.candidate is not None
    assert agreed.candidate.lost == (1,)
    assert agreed.whole == ()
    unknown = replace(small, record=replace(_record(small), state_names=None))
    agreed = _judge([_found(20, 0, state_names=None), unknown], [])
    assert agreed.candidate is None
    assert agreed.passed[0].reason == "no shard is left of rank 1 of 2"


def _record(found: Found) -> ShardRecord:
    assert found.record is not None
    return found.record


def test_damage_that_was_noted_counts_as_missing() -> None:
    """The replica is then what is left; the file's path and its damage are told."""
    own, copy = _found(20, 1), _found(20, 1, rank=0)
    noted = frozenset({(1, own.path, 20)})
    inventories = [Inventory((_found(20, 0), copy)), Inventory((own,), noted)]
    agreed = judge(inventories, lambda record: None, {})
    assert agreed.candidate is not None
    assert [(each.rank, each.path) for each in agreed.candidate.copies[1]] == [(0, copy.path)]
    assert [each.path for each in agreed.passed] == [own.path]


def test_objections_and_rejections_are_reasons() -> None:
    """Superseded commits and such as could not be opened are passed over, each for its reason."""
    inventories = [
        Inventory(tuple(_found(iteration, owner) for iteration in (10, 20, 30))) for owner in (0, 1)
    ]
    agreed = judge(
        inventories,
        lambda record: "superseded" if record.iteration == 30 else None,
        {_record(_found(20, 0)).commit: "cannot be opened"},
    )
    assert _iteration(agreed) == 10
    assert [(each.iteration, each.reason) for each in agreed.passed] == [
        (30, "superseded"),
        (20, "cannot be opened"),
    ]
    assert [each[2] for each in agreed.whole] == [10]


def test_a_file_without_a_record_is_told() -> None:
    """By its path, with what is wrong with it."""
    broken = Found("1/iter_0000020_1_local.pt", 20, 1, None, "was torn")
    agreed = _judge([_found(20, 0)], [broken])
    assert agreed.candidate is None
    assert ("1/iter_0000020_1_local.pt", "was torn") in [
        (each.path, each.reason) for each in agreed.passed
    ]


@pytest.mark.parametrize("covered", [True, False])
def test_a_commit_that_is_known_to_be_covered_is_loadable(covered: bool) -> None:
    """Once its shards have been looked into, without being called whole."""
    small = _found(20, 1, rank=0, is_whole=False)
    found = _found(20, 0)
    agreed = _judge([found, small], [], covered=[_record(found).commit] if covered else [])
    assert _iteration(agreed) == 20
    assert agreed.whole == ()


def test_what_is_agreed_is_sent_in_few_bytes() -> None:
    """Thousands of ranks with two copies each: all comes back, and no path was sent."""
    ranks = 4096
    record = replace(RECORD, world_size=ranks, nodes=tuple(rank // 8 for rank in range(ranks)))
    copies = tuple(
        (
            Copy(rank, f"{rank}/{shard_name(record.iteration, rank)}", is_whole=True),
            Copy(rank ^ 8, f"{rank ^ 8}/{shard_name(record.iteration, rank)}.old", is_whole=False),
        )
        for rank in range(ranks)
    )
    candidate = Candidate(record, copies)
    content = pickle.dumps(candidate)
    assert pickle.loads(content) == candidate
    assert len(content) < 4096
    found = Found("0/x", 1, 0, record)
    inventory = Inventory((found, replace(found, record=None)), frozenset({(1, "a", 2)}), True)
    content = pickle.dumps(inventory)
    assert pickle.loads(content) == inventory
    assert len(content) < 2048
