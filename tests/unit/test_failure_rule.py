"""Which failure in a row ends the run, tier by tier."""

from __future__ import annotations

import logging

import pytest

from holdfast.config import CheckpointConfig
from holdfast.errors import CheckpointError, SupersededAttemptError
from holdfast.ranks.job import FailureRule

P, L = "persistent", "local"
OUTCOMES = [
    # outcomes in order: "p" and "l" failures, "P" and "L" commits, "B" a commit to both tiers
    ("p p", P),
    ("p L p", P),
    ("l P l", L),
    ("l l", L),
    ("p l", None),
    ("p P p", None),
    ("l L l", None),
    ("p B p", None),
    ("l B l", None),
    ("p L l L p", P),
]


@pytest.mark.parametrize(("outcomes", "ends"), OUTCOMES)
def test_each_tier_counts_its_own_failures(outcomes: str, ends: str | None) -> None:
    """With a limit of 2 the second failure in a row of one tier is raised, and only that one."""
    rule = FailureRule(CheckpointConfig(on_save_failure="warn", save_failure_limit=2))
    commits = {"P": (P,), "L": (L,), "B": (P, L)}
    *before, last = outcomes.split()
    for outcome in before:
        if outcome in commits:
            rule.note_success(commits[outcome])
        else:
            rule.judge(CheckpointError("full"), OSError(), P if outcome == "p" else L)
    tier = P if last == "p" else L
    if ends is None:
        rule.judge(CheckpointError("full"), OSError(), tier)
        return
    with pytest.raises(CheckpointError, match=f"failure 2 in a row of saves to the {ends} tier"):
        rule.judge(CheckpointError("full"), OSError(), tier)


def test_a_warning_names_the_tier_and_the_count(caplog: pytest.LogCaptureFixture) -> None:
    """What is lived with is told with its tier, its number in a row and the limit."""
    rule = FailureRule(CheckpointConfig(on_save_failure="warn", save_failure_limit=3))
    with caplog.at_level(logging.WARNING):
        rule.judge(CheckpointError("full"), OSError(), P)
        rule.judge(CheckpointError("full"), OSError(), L)
        rule.judge(CheckpointError("full"), OSError(), P)
    assert [each.getMessage() for each in caplog.records] == [
        "full (persistent tier: failure 1 in a row, the run ends at 3)",
        "full (local tier: failure 1 in a row, the run ends at 3)",
        "full (persistent tier: failure 2 in a row, the run ends at 3)",
    ]


def test_a_message_stays_within_three_lines() -> None:
    """The sentence about the limit makes no fourth line."""
    rule = FailureRule(CheckpointConfig(on_save_failure="warn", save_failure_limit=1))
    with pytest.raises(CheckpointError, match="limit is 1") as caught:
        rule.judge(CheckpointError("a\nb\nc"), OSError(), P)
    assert str(caught.value).count("\n") <= 2


def test_an_overtaken_attempt_is_raised_at_once() -> None:
    """No later save of an overtaken attempt can succeed: there is nothing to count."""
    rule = FailureRule(CheckpointConfig(on_save_failure="warn", save_failure_limit=None))
    with pytest.raises(SupersededAttemptError):
        rule.judge(SupersededAttemptError("gone"), OSError(), P)
