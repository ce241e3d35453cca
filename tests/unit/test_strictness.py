"""What a load does about each kind of difference is what `load.strict` says, and it is told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.config import STRICT_SUBJECTS
from holdfast.errors import StateMismatchError
from holdfast.ranks.coordinator import SingleProcess
from holdfast.state.strictness import Strictness
from holdfast.state.union import Leftover, find_unexpected, judge
from tests.support.managers import Live, manager_of, step
from tests.support.states import SampleStream, digest


def test_a_bool_means_what_it_always_meant() -> None:
    """And a table says something else for its subjects alone."""
    assert Strictness.of(True) == Strictness.of({})
    lenient = Strictness.of(False)
    assert (lenient.names, lenient.components, lenient.dtypes) == ("warn", "warn", "ignore")
    assert (lenient.shapes, lenient.groups, lenient.options) == ("raise", "raise", "warn")
    assert Strictness.of({"components": "ignore"}).left_out == "ignore"
    settable = {each.name for each in fields(Strictness)} - {"left_out"}
    assert settable == set(STRICT_SUBJECTS), "the config checks what a load knows"


def _build(*widths: int, rate: float = 0.1) -> Live:
    torch.manual_seed(sum(widths))
    model = nn.ModuleDict({f"layer{at}": nn.Linear(3, width) for at, width in enumerate(widths)})
    return Live(model, torch.optim.AdamW(model.parameters(), lr=rate))


def _half(live: Live) -> Live:
    live.model.layer0.half()  # type: ignore[union-attr]
    return live


def _grouped(live: Live) -> Live:
    parameters = live.model.parameters()  # type: ignore[union-attr]
    groups = [{"params": [each], "lr": 0.1 * at} for at, each in enumerate(parameters, 1)]
    live.optimizer = torch.optim.AdamW(groups)
    return live


def _fed(live: Live) -> Live:
    live.data = SampleStream()
    return live


CASES: dict[str, tuple[str, Callable[[], Live], Callable[[], Live], str]] = {
    "missing": ("names", lambda: _build(2), lambda: _build(2, 2), "keeping the live value: 4 ("),
    "unexpected": ("names", lambda: _build(2, 2), lambda: _build(2), "left out: 4 ("),
    "shapes": ("shapes", lambda: _build(2, 3), lambda: _build(2, 4), "of another shape, keeping"),
    "dtypes": ("dtypes", lambda: _build(2), lambda: _half(_build(2)), "of another type, converted"),
    "groups": ("groups", lambda: _grouped(_build(2)), lambda: _build(2), "keep their own options"),
    "options": ("options", lambda: _build(2), lambda: _build(2, rate=0.5), "optimizer.lr is 0.5"),
    "not saved": ("components", lambda: _build(2), lambda: _fed(_build(2)), "as they are: 1 (data"),
    "not given": (
        "components",
        lambda: _fed(_build(2)),
        lambda: _build(2),
        "a data position",
    ),
}


@pytest.mark.parametrize("action", ["raise", "warn", "ignore"])
@pytest.mark.parametrize("case", CASES)
def test_each_subject_has_its_action(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, action: str
) -> None:
    """Refused with nothing touched, or loaded as far as it fits, with a word or without."""
    subject, saving, loading, words = CASES[case]
    saved, live = saving(), loading()
    step(saved)
    saved.save(manager_of(tmp_path))
    manager = manager_of(tmp_path, load={"strict": {subject: action}})
    before = live.digests()
    if action == "raise":
        with pytest.raises(StateMismatchError):
            live.load(manager)
        assert live.digests() == before
        return
    with caplog.at_level(logging.WARNING):
        live.load(manager)
    told = [each.message for each in caplog.records if words in each.message]
    assert len(told) == (action == "warn")
    step(live)  # every optimizer works


def _held(live: Live, layer: nn.Module) -> list[Any]:
    return [(each, live.optimizer.state[each]) for each in layer.parameters()]


@pytest.mark.parametrize("steps", [0, 1])
def test_a_tensor_of_another_shape_keeps_value_and_state(tmp_path: Path, steps: int) -> None:
    """The others are restored, their optimizer state included."""
    saved, live = _build(2, 3), _build(2, 4)
    step(saved)
    saved.save(manager_of(tmp_path))
    for number in range(steps):
        step(live, number)
    layer = live.model.layer1  # type: ignore[union-attr]
    before = digest(_held(live, layer))
    live.load(manager_of(tmp_path), strict={"shapes": "ignore"})
    assert digest(_held(live, layer)) == before
    mine, theirs = (each.model.layer0 for each in (live, saved))  # type: ignore[union-attr]
    assert digest(mine.state_dict()) == digest(theirs.state_dict())
    moments = [live.optimizer.state[each] for each in mine.parameters()]
    assert digest(moments) == digest([saved.optimizer.state[each] for each in theirs.parameters()])
    step(live, 7)


# -- names of all ranks --------------------------------------------------------------------------


class _Ranks(SingleProcess):
    """Ranks that are run in turn, again and again, until all have what each exchange gave."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.stages: list[str] = []
        self.sizes: list[int] = []

    def run(self, each: Callable[[int, Any], Any]) -> list[Any]:
        results: dict[int, list[Any]] = {}
        while True:
            posted: dict[int, tuple[Any, Any]] = {}
            finished = []
            for rank in range(self.count):
                seat = _Seat(list(results.get(rank, [])))
                try:
                    finished.append(each(rank, seat))
                except _Posted as post:
                    posted[rank] = post.value, post.join
                    self.stages += [post.stage] if rank == 0 else []
            if finished:
                assert len(finished) == self.count
                return finished
            joined = posted[0][1]([posted[rank][0] for rank in range(self.count)])
            self.sizes += [len(value) for value, _ in posted.values() if isinstance(value, bytes)]
            for rank in range(self.count):
                results.setdefault(rank, []).append(joined)


class _Posted(BaseException):
    def __init__(self, stage: str, value: Any, join: Any) -> None:
        self.stage, self.value, self.join = stage, value, join


class _Seat(SingleProcess):
    def __init__(self, replies: list[Any]) -> None:
        self._replies = replies

    def all_reduce(self, stage: str, work: Any, judge: Any) -> Any:
        value = work()
        if self._replies:
            return self._replies.pop(0)
        raise _Posted(stage, value, judge)


def _union(known: Sequence[set[str]], live: Sequence[set[str]]) -> tuple[list[str], _Ranks]:
    ranks = _Ranks(len(live))

    def one(rank: int, coordinator: Any) -> list[str]:
        lacking = known[rank] - live[rank]
        leftover = Leftover.of(lacking, known[rank])
        verdict = coordinator.all_reduce("compare", lambda: leftover, judge)
        return find_unexpected(lacking, live[rank], known[rank], verdict, coordinator)

    found = ranks.run(one)
    assert all(each == found[0] for each in found)
    return found[0], ranks


@pytest.mark.parametrize(
    ("known", "live", "expected", "stages"),
    [
        (["abcd"] * 2, ["abcd", "abcd"], "", 1),
        (["abcd"] * 2, ["abcd", "ab"], "", 1),
        (["abcd"] * 2, ["ab", "abx"], "cd", 1),
        (["abcd"] * 2, ["ab", "cd"], "", 2),
        (["abcde"] * 3, ["a", "b", "cx"], "de", 2),
        (["abc", "abd"], ["abc", "ab"], "d", 3),
        (["abc", "abd"], ["abd", "abc"], "", 3),
        (["abc", "abcd"], ["ab", "abc"], "d", 3),
    ],
)
def test_a_name_is_left_over_only_where_no_rank_has_it(
    known: Any, live: Any, expected: str, stages: int
) -> None:
    """Whatever each rank has, and in as few exchanges as it takes to know."""
    found, ranks = _union([set(each) for each in known], [set(each) for each in live])
    assert found == list(expected)
    assert len(ranks.stages) == stages


def test_what_ranks_send_of_many_names_is_small() -> None:
    """20,000 names of 16 stages: a few hundred bytes from each rank."""
    names = [f"model.layers.{at:05}.attention.weight" for at in range(20_000)]
    stages = [set(names[at * 1250 : (at + 1) * 1250]) for at in range(16)]
    found, ranks = _union([set(names)] * 16, stages)
    assert found == []
    assert max(ranks.sizes) < 400
