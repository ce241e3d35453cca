"""Several data iterators by name: each has its own position, and none is lost in silence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import DataReshardError, StateMismatchError
from holdfast.state.small import Place, apply_data, check_data, join_iterators, position_of
from tests.support.managers import Live, linear, manager_of


class Counting:
    """An iterator that can say where it is."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Resharding(Counting):
    """One that can go on at another data-parallel size."""

    def load_resharded_state(self, states: Sequence[dict[str, Any]]) -> None:
        self.at = sum(each["at"] for each in states)


def _saved(root: Path, data: Any) -> None:
    live, manager = linear(), manager_of(root)
    live.data = data
    live.load(manager)
    live.save(manager, 1)


def _fresh(data: Any) -> Live:
    live = linear(1)
    live.data = data
    return live


def test_each_iterator_gets_its_own_position(tmp_path: Path) -> None:
    """Given to the load, or built after it."""
    _saved(tmp_path, {"text": Counting(3), "images": Counting(5)})
    both = {"images": Counting(), "text": Counting()}
    manager = manager_of(tmp_path)
    assert _fresh(both).load(manager).restored["data"].size_bytes > 0
    later = {"text": Counting(), "images": Counting()}
    manager.restore_data(later)
    for found in (both, later):
        assert (found["text"].at, found["images"].at) == (3, 5)


@pytest.mark.parametrize(
    ("saved", "here", "words"),
    [
        (("a", "b"), ("a",), "of the iterators a, b, here the iterators a"),
        (("a",), ("a", "b"), "of the iterators a, here the iterators a, b"),
        (("a",), None, "of the iterators a, here a single iterator"),
        (None, ("a",), "of a single iterator, here the iterators a"),
    ],
)
def test_iterators_of_other_names_are_refused_untouched(
    tmp_path: Path, saved: tuple[str, ...] | None, here: tuple[str, ...] | None, words: str
) -> None:
    """A position that no iterator would get, or an iterator that would start over."""

    def made(names: tuple[str, ...] | None, at: int) -> Any:
        return Counting(at) if names is None else {name: Counting(at) for name in names}

    _saved(tmp_path, made(saved, 3))
    live = _fresh(made(here, 9))
    with pytest.raises(StateMismatchError, match=words):
        live.load(manager_of(tmp_path))
    assert all(each.at == 9 for each in ([live.data] if here is None else live.data.values()))


def test_an_iterator_without_a_position_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By its name among the others, whose positions are saved."""
    _saved(tmp_path, {"text": Counting(3), "noise": iter([])})
    assert "train_data_iterator['noise'] is a list_iterator without state_dict" in caplog.text
    both = {"text": Counting(), "noise": iter([])}
    _fresh(both).load(manager_of(tmp_path))
    assert both["text"].at == 3  # type: ignore[attr-defined]


def test_another_size_needs_all_iterators_to_reshard() -> None:
    """One that cannot is enough to refuse; else each gets the states of its own name, in order."""
    positions = [
        position_of({"iterators by name": {"a": {"at": at}, "b": {"at": 10 * at}}}, place)
        for at, place in ((1, Place(0, 2, 0, 2)), (2, Place(1, 2, 1, 2)))
    ]
    here = Place(0, 1, 0, 1)
    some = join_iterators({"a": Resharding(), "b": Counting()})
    with pytest.raises(DataReshardError):
        check_data(some, positions, here, "there", False)
    both = {"a": Resharding(), "b": Resharding()}
    joined = join_iterators(both)
    check_data(joined, positions, here, "there", False)
    apply_data(joined, positions, here)
    assert (both["a"].at, both["b"].at) == (3, 30)
