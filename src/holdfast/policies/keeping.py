"""Retention: which committed checkpoints stay.

Owns the rules of retention as one pure function, `retain`, in which a rule is added. Promises that
the newest checkpoint and the tracker's target always stay, and that "newest" means committed last,
so that a save after a rollback outlives the larger iterations it supersedes. Removes nothing: the
persistent tier acts on the verdicts (`PersistentTier._retain`, which is given the settings of
`KeepConfig` by `tiers.routing`). The local tier has no rules: it keeps as many commits as it has
files for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One checkpoint, as retention sees it."""

    iteration: int
    sequence: int


@dataclass(frozen=True)
class Verdict:
    """Whether one checkpoint stays, and why."""

    iteration: int
    keep: bool
    reason: str


def retain(
    candidates: Sequence[Candidate], last: int | None, tracker_iteration: int | None
) -> list[Verdict]:
    """Decide for each candidate, newest first. `last`: how many of them stay; None: all."""
    newest_first = sorted(candidates, key=lambda each: each.sequence, reverse=True)
    verdicts = []
    for position, each in enumerate(newest_first):
        if last is None:
            verdict = Verdict(each.iteration, True, "keep.last is null: all stay")
        elif position == 0:
            verdict = Verdict(each.iteration, True, "the newest")
        elif position < last:
            verdict = Verdict(each.iteration, True, f"among the last {last}")
        elif each.iteration == tracker_iteration:
            verdict = Verdict(each.iteration, True, "the tracker's target")
        else:
            verdict = Verdict(each.iteration, False, f"older than the last {last}")
        verdicts.append(verdict)
    return verdicts
