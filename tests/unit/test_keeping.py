"""Which committed checkpoints stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.policies.keeping import Candidate, find_agreement, retain

TABLE = [
    ("nothing there", [], 3, None, set()),
    ("fewer than asked", [(10, 1), (20, 2)], 3, 20, {10, 20}),
    ("the oldest go", [(10, 1), (20, 2), (30, 3), (40, 4)], 2, 40, {30, 40}),
    ("only one", [(10, 1), (20, 2)], 1, 20, {20}),
    ("null keeps all", [(10, 1), (20, 2), (30, 3)], None, 30, {10, 20, 30}),
    ("after a rollback", [(200, 1), (300, 2), (150, 3)], 1, 150, {150}),
    ("after a rollback, two", [(200, 1), (300, 2), (150, 3)], 2, 150, {150, 300}),
    ("the tracker's target is old", [(10, 1), (20, 2), (30, 3)], 1, 10, {10, 30}),
    ("a dangling tracker", [(10, 1), (20, 2)], 1, 99, {20}),
    ("no tracker", [(10, 1), (20, 2)], 1, None, {20}),
    ("equal sequences", [(20, 5), (10, 5)], 1, None, {20}),
    ("step zero", [(0, 1), (10, 2)], 1, 0, {0, 10}),
]


@pytest.mark.parametrize(
    ("candidates", "last", "tracker", "kept"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_what_stays(
    candidates: list[tuple[int, int]], last: int | None, tracker: int | None, kept: set[int]
) -> None:
    """The last commits stay, and the tracker's target, whatever their iterations."""
    verdicts = retain([Candidate(*each) for each in candidates], last, tracker)
    assert {each.iteration for each in verdicts if each.keep} == kept
    assert sorted(each.iteration for each in verdicts) == sorted(each[0] for each in candidates)
    assert all(each.reason for each in verdicts)


def test_verdicts_come_newest_first_with_reasons() -> None:
    """Each verdict says why, in the order of commits."""
    candidates = [Candidate(10, 1), Candidate(40, 4), Candidate(20, 2), Candidate(30, 3)]
    assert [(each.iteration, each.reason) for each in retain(candidates, 2, 20)] == [
        (40, "the newest"),
        (30, "among the last 2"),
        (20, "the tracker's target"),
        (10, "older than the last 2"),
    ]


@given(
    numbers=st.lists(
        st.tuples(st.integers(0, 50), st.integers(1, 50)),
        unique_by=(lambda each: each[0], lambda each: each[1]),
    ),
    last=st.integers(1, 10),
    tracker=st.none() | st.integers(0, 50),
)
def test_the_newest_and_the_target_always_stay(
    numbers: list[tuple[int, int]], last: int, tracker: int | None
) -> None:
    """For any store: the newest and the target stay, and at most one more than asked for does."""
    verdicts = retain([Candidate(*each) for each in numbers], last, tracker)
    kept = {each.iteration for each in verdicts if each.keep}
    newest_first = [each[0] for each in sorted(numbers, key=lambda each: -each[1])]
    assert set(newest_first[:last]) <= kept
    assert kept - set(newest_first[:last]) <= {tracker}
    if tracker in newest_first:
        assert tracker in kept


def _saves(*rows: tuple[int, tuple[int, ...]], attempt: int = 1, first: int = 1) -> list[Candidate]:
    return [
        Candidate(iteration, sequence, attempt, compared)
        for sequence, (iteration, compared) in enumerate(rows, first)
    ]


ROTATION = _saves((10, (10, 10)), (20, (20, 10)), (30, (20, 30)), (40, (40, 30)))
AGREED = [
    (
        "nothing is known",
        [Candidate(10, 1), Candidate(20, 2)],
        {1: (0, 0, False), 2: (0, 0, False)},
    ),
    (
        "a rotation",
        ROTATION,
        {1: (2, 2, True), 2: (2, 2, True), 3: (2, 2, True), 4: (1, 2, False)},
    ),
    ("no rotation", _saves((10, (10,)), (20, (10,))), {1: (1, 1, True), 2: (0, 1, False)}),
    (
        "a load gives all ranks one value",
        [*ROTATION[:2], *_saves((30, (30, 30)), attempt=2, first=3)],
        {1: (2, 2, True), 2: (1, 2, False), 3: (2, 2, True)},
    ),
    (
        "training went back",
        _saves((10, (10, 10)), (30, (30, 10)), (20, (20, 20)), (40, (40, 40))),
        {1: (2, 2, True), 2: (1, 2, False), 3: (2, 2, True), 4: (2, 2, True)},
    ),
    (
        "another number of shares",
        _saves((10, (10, 0)), (20, (20, 20, 20))),
        {1: (3, 3, True), 2: (3, 3, True)},
    ),
]


@pytest.mark.parametrize(
    ("candidates", "wanted"), [row[1:] for row in AGREED], ids=[row[0] for row in AGREED]
)
def test_whose_replicas_agreed(
    candidates: list[Candidate], wanted: dict[int, tuple[int, int, bool]]
) -> None:
    """Every share was compared at the iteration or later, in the same attempt."""
    found = find_agreement(candidates)
    assert {
        sequence: (each.compared, each.shares, each.is_whole) for sequence, each in found.items()
    } == wanted


def test_the_last_whose_replicas_agreed_stays() -> None:
    """So does the next one, until it is proved in turn, at whatever length of the rotation."""
    kept: list[Candidate] = []
    compared, seen = [0] * 5, set()
    for step in range(60):
        compared[step % 5] = step
        kept.append(Candidate(step, step, 1, (step,) * 5 if step == 0 else tuple(compared)))
        verdicts = retain(kept, 2, None)
        stays = {each.iteration for each in verdicts if each.keep}
        seen |= {each.reason for each in verdicts if each.keep}
        kept = [each for each in kept if each.iteration in stays]
        agreed = [each for each in kept if find_agreement(kept)[each.sequence].is_whole]
        assert agreed
        assert len(kept) <= 4
        assert step - max(each.iteration for each in agreed) <= 10
    assert {"the last whose replicas agreed", "the next whose replicas may prove to agree"} < seen


def test_without_a_rotation_no_next_one_is_waited_for() -> None:
    """The first of an attempt was compared in full, and stays; others never will be."""
    candidates = _saves(*((step, (10,)) for step in (10, 20, 30, 40)))
    kept = {each.iteration for each in retain(candidates, 1, None) if each.keep}
    assert kept == {10, 40}
