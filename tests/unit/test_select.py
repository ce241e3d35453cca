"""The decision of a load, row by row: what is configured, what is there, what is done."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from holdfast.errors import CorruptCheckpointError
from holdfast.storage.manifest import LOCAL
from holdfast.tiers.select import (
    Action,
    Asked,
    Choice,
    Commit,
    Condition,
    Refusal,
    Seen,
    choose,
    mark_damaged,
    object_to,
)

PAGE = Path(__file__).parents[2] / "docs/loading.md"

CONDITIONS = {
    "": Condition.SOUND,
    "!": Condition.DAMAGED,
    "^": Condition.TOO_NEW,
    "~": Condition.SUPERSEDED,
    "?": Condition.OTHER_RUN,
}
_COMMIT = re.compile(r"(\d+)([!^~?]?)(?:@(\d+))?")

ROWS = """
setting             | persistent  | local     | elsewhere | what a load does
                    |             |           |           | starts fresh
on_missing=error    |             |           |           | refuses: the run has no checkpoint
on_missing=error    | 10          |           |           | loads persistent 10
on_missing=error    |             | 10        |           | loads local 10
                    | 10          |           |           | loads persistent 10
                    | 10 20 30    |           |           | loads persistent 30
                    | 30 5@31     |           |           | loads persistent 5
                    |             | 10        |           | loads local 10
                    | 10          | 15        |           | loads local 15
                    | 20          | 15        |           | loads persistent 20
                    | 20          | 20        |           | loads local 20
                    | 20          | 30 5@31   |           | loads local 5
                    | 20@40       | 30        |           | loads persistent 20
                    | 10 20!      |           |           | loads persistent 10
                    | 10 20!      | 15        |           | loads local 15
                    | 20          | 20!       |           | loads persistent 20
                    | 10          | 15! 20!   |           | loads persistent 10
                    | 10!         |           |           | refuses: none can be loaded
                    | 10! 20!     | 15!       |           | refuses: none can be loaded
                    |             | 15!       |           | refuses: none can be loaded
on_missing=error    | 10!         |           |           | refuses: none can be loaded
                    | 10 20~      |           |           | loads persistent 10
                    | 10 20~ 30~  | 25~       |           | loads persistent 10
                    | 10~         |           |           | refuses: none can be loaded
                    | 10 20?      |           |           | loads persistent 10
                    | 20?         |           |           | refuses: none can be loaded
                    | 10 20^      |           |           | refuses: a later version wrote it
                    | 10 20^@20   |           |           | refuses: a later version wrote it
                    | 20^         |           |           | refuses: a later version wrote it
                    | 10! 20^     |           |           | refuses: a later version wrote it
                    | 20 10^      |           |           | loads persistent 20
                    | 30 10^@31   |           |           | refuses: a later version wrote it
                    | 20^@20      | 25        |           | loads local 25
                    | 20^@20      | 15        |           | refuses: a later version wrote it
                    | 10          | 15^@15    |           | refuses: a later version wrote it
                    | 10 20^      | 15!       |           | refuses: a later version wrote it
step=20             | 10 20 30    |           |           | loads persistent 20
step=20             | 10 20~ 30   |           |           | loads persistent 20
step=20             | 10 20? 30   |           |           | loads persistent 20
step=20             | 10          | 20        |           | loads local 20
step=20             | 20          | 20        |           | loads local 20
step=20             | 20          | 20!       |           | loads persistent 20
step=20             | 20!         | 20        |           | loads local 20
step=20             | 10 20!      |           |           | refuses: it is damaged
step=20             | 10 20! 30   | 20!       |           | refuses: it is damaged
step=20             | 10 20^      |           |           | refuses: a later version wrote it
step=20             | 20 30^      |           |           | loads persistent 20
step=20             | 20^         | 20        |           | loads local 20
step=20             | 10 30       | 15        |           | refuses: not there
step=20             |             |           |           | refuses: not there
step=0              | 0 10        |           |           | loads persistent 0
step=20 applied     | 10 20 30    |           |           | loads persistent 30
step=20 applied     | 20 25@40    | 30        |           | loads persistent 25
step=20 applied     | 20          | 22        |           | loads local 22
step=20 applied     | 20 30!      |           |           | loads persistent 20
step=20 applied     |             |           |           | starts fresh
step=20 rewind      | 10 20 30    |           |           | loads persistent 20
directory           |             |           | 10        | loads from load.directory 10
directory           |             |           | 10 20     | loads from load.directory 20
directory           |             |           | 10 20!    | loads from load.directory 10
directory           |             |           | 10 20^    | refuses: a later version wrote it
directory           |             |           | 10!       | refuses: none can be loaded
directory           |             |           |           | refuses: not there
directory on_missing=error |      |           |           | refuses: not there
directory           | 5           |           | 10        | refuses: the run has its own
directory           |             | 5         | 10        | refuses: the run has its own
directory           | 5!          |           | 10        | refuses: the run has its own
directory           | 5^          |           | 10        | refuses: the run has its own
directory           | 5           |           |           | refuses: the run has its own
directory           | 5?          |           | 10        | loads from load.directory 10
directory step=20   |             |           | 20 30     | loads from load.directory 20
directory step=20   |             |           | 20! 30    | refuses: it is damaged
directory step=20   |             |           | 30        | refuses: not there
directory step=20   | 20          |           | 20        | refuses: the run has its own
pretrained          |             |           | 10        | loads from load.pretrained 10
pretrained          |             |           | 10 20!    | loads from load.pretrained 10
pretrained          |             |           | 10 20^    | refuses: a later version wrote it
pretrained          |             |           | 10!       | refuses: none can be loaded
pretrained          |             |           |           | refuses: not there
pretrained on_missing=error |     |           | 10        | loads from load.pretrained 10
pretrained          | 5           |           | 10        | loads persistent 5
pretrained          |             | 5         | 10        | loads local 5
pretrained          | 5           |           |           | loads persistent 5
pretrained          | 5!          |           | 10        | refuses: none can be loaded
pretrained          |             | 5!        | 10        | refuses: none can be loaded
pretrained          | 5~          |           | 10        | refuses: none can be loaded
pretrained          | 5^          |           | 10        | refuses: a later version wrote it
pretrained.step=10  |             |           | 10 20     | loads from load.pretrained 10
pretrained.step=10  |             |           | 10! 20    | refuses: it is damaged
pretrained.step=10  |             |           | 20        | refuses: not there
pretrained.step=10  | 5           |           | 20        | loads persistent 5
pretrained step=20  |             |           | 10        | refuses: not there
""".strip("\n")

OUTCOMES = {
    Action.LOAD: "loads",
    Action.LOAD_OTHER: "loads from load.directory",
    Action.LOAD_PARENT: "loads from load.pretrained",
}
REFUSALS = {
    Refusal.NOT_THERE: "not there",
    Refusal.NOTHING: "the run has no checkpoint",
    Refusal.OWN_EXISTS: "the run has its own",
    Refusal.DAMAGED: "it is damaged",
    Refusal.NONE_LOADABLE: "none can be loaded",
    Refusal.TOO_NEW: "a later version wrote it",
}
TABLE = [[cell.strip() for cell in row.split("|")] for row in ROWS.splitlines()]


def _read_commits(cell: str, tier: str) -> tuple[Commit, ...]:
    found = []
    for word in cell.split():
        match = _COMMIT.fullmatch(word)
        assert match is not None, word
        condition = CONDITIONS[match[2]]
        sequence = int(match[3]) if match[3] else int(match[1]) if match[2] in "~?" else None
        reason = "" if condition is Condition.SOUND else condition.value
        found.append(Commit(tier, int(match[1]), sequence, condition, reason))
    return tuple(found)


def _read_asked(cell: str) -> Asked:
    words = cell.split()
    steps = {name: int(value) for name, value in (w.split("=") for w in words if w[-1].isdigit())}
    return Asked(
        names_other_place="directory" in words,
        step=steps.get("step"),
        spent_by=3 if {"applied", "rewind"} & set(words) else None,
        pretrained=any(word.startswith("pretrained") for word in words),
        pretrained_step=steps.get("pretrained.step"),
        required="on_missing=error" in words,
        allow_rewind="rewind" in words,
    )


def _describe(choice: Choice) -> str:
    if choice.action is Action.START_FRESH:
        return "starts fresh"
    if choice.refusal is not None:
        return f"refuses: {REFUSALS[choice.refusal]}"
    assert choice.commit is not None
    tier = f" {choice.commit.tier}" if choice.action is Action.LOAD else ""
    return f"{OUTCOMES[choice.action]}{tier} {choice.commit.iteration}"


def _choose(asked: Asked, own: tuple[Commit, ...], elsewhere: tuple[Commit, ...]) -> Choice:
    """Ask as a load does: another place is looked at when the choice wants it, and only then."""
    choice = choose(asked, Seen(own))
    if choice.action is Action.LOOK_AT_OTHER:
        return choose(asked, Seen(own, other=elsewhere))
    if choice.action is Action.LOOK_AT_PARENT:
        return choose(asked, Seen(own, parent=elsewhere))
    return choice


def test_the_table_is_large_enough_and_says_nothing_twice() -> None:
    """Every situation stands in the table once, and every kind of outcome appears."""
    assert len(TABLE) - 1 >= 60
    situations = [tuple(row[:4]) for row in TABLE]
    assert len(set(situations)) == len(situations)
    outcomes = {row[4] for row in TABLE[1:]}
    assert all(f"refuses: {each}" in outcomes for each in REFUSALS.values())
    assert all(any(each.startswith(word) for each in outcomes) for word in OUTCOMES.values())


@pytest.mark.parametrize("row", TABLE[1:], ids=" | ".join)
def test_each_row_of_the_table(row: list[str]) -> None:
    """What is asked for and what is there give the outcome of the row, in any order of seeing."""
    setting, persistent, local, elsewhere, expected = row
    own = _read_commits(persistent, "persistent") + _read_commits(local, LOCAL)
    for seen in (own, own[::-1]):
        choice = _choose(_read_asked(setting), seen, _read_commits(elsewhere, "persistent"))
        assert _describe(choice) == expected


def test_the_page_prints_the_table() -> None:
    """docs/loading.md shows exactly the rows that are tested here."""
    lines = PAGE.read_text().splitlines()
    start = lines.index("| setting | persistent | local | elsewhere | what a load does |")
    printed = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    ]
    assert [printed[0], *printed[2:]] == TABLE


def test_damage_that_is_found_later_is_decided_by_the_same_rules() -> None:
    """Trying one after the other, and finding each damaged, follows the order of commits."""
    own = _read_commits("10 20 5@30", "persistent") + _read_commits("20 22", LOCAL)
    error = CorruptCheckpointError("x", "torn")
    tried = []
    while (choice := choose(Asked(), Seen(own))).commit is not None:
        tried.append((choice.commit.tier, choice.commit.iteration))
        own = mark_damaged(own, choice.commit, "torn", error)
    assert tried == [
        ("persistent", 5), (LOCAL, 22), (LOCAL, 20), ("persistent", 20), ("persistent", 10),
    ]  # fmt: skip
    assert choice.refusal is Refusal.NONE_LOADABLE
    by_number = choose(Asked(step=20), Seen(own))
    assert (by_number.refusal, by_number.reason) == (Refusal.DAMAGED, "torn; torn")


def test_the_local_tier_is_asked_by_the_same_rules() -> None:
    """With a step only that iteration counts, superseded or not; without, what was superseded."""
    assert object_to(Asked(), 20, None) is None
    assert object_to(Asked(), 20, "superseded") == "superseded"
    assert object_to(Asked(step=20), 20, "superseded") is None
    assert object_to(Asked(step=20), 10, None) == "load.step is 20"
    assert object_to(Asked(step=20, spent_by=2), 10, None) is None
    assert object_to(Asked(step=20, spent_by=2, allow_rewind=True), 10, None) == "load.step is 20"
