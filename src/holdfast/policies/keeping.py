"""Retention: which committed checkpoints stay, and whose replicas are known to have agreed.

Owns the rules of retention as one pure function, `retain`, in which a rule is added. Promises that
the newest checkpoint and the tracker's target always stay, that the base of what stays does, that
"newest" means committed last, so that a save after a rollback outlives the larger iterations it
supersedes, and that the last checkpoint whose replicas agreed stays. Each save compares a share of
them only: a checkpoint's agreed once every share was compared at its iteration or later
(`find_agreement`). The one that is next to be proved so stays too, or there would never be another.
Removes nothing: the persistent
tier acts on the verdicts (`PersistentTier._retain`, which is given the settings of `KeepConfig` by
`tiers.routing`). The local tier has no rules: it keeps as many commits as it has files for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol


class Recorded(Protocol):
    """The fields of a commit record that count here."""

    @property
    def iteration(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def compared(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Candidate:
    """One checkpoint, as retention sees it."""

    iteration: int
    sequence: int
    attempt: int = 1
    compared: tuple[int, ...] = ()
    """The iteration at which each share of the replicas was compared last; empty: not known."""
    base: int | None = None
    """The iteration of this store that has the rest of its model; None: it needs none of them."""

    @classmethod
    def of(cls, record: Recorded) -> Candidate:
        """Return a checkpoint by its commit record."""
        return cls(record.iteration, record.sequence, record.attempt, record.compared)


@dataclass(frozen=True)
class Verdict:
    """Whether one checkpoint stays, and why."""

    iteration: int
    keep: bool
    reason: str


@dataclass(frozen=True)
class Agreement:
    """How many shares of a checkpoint's replicas were compared at its iteration or later."""

    compared: int = 0
    shares: int = 0
    """0: nothing is known."""

    @property
    def is_whole(self) -> bool:
        """Whether all were."""
        return 0 < self.shares == self.compared


def find_agreement(candidates: Sequence[Candidate]) -> dict[int, Agreement]:
    """Return what is known of the replicas of each candidate, by sequence.

    Only from comparisons of its own attempt: a load gives all ranks one value.
    """
    newest_first = sorted(candidates, key=lambda each: each.sequence, reverse=True)
    found: dict[int, Agreement] = {}
    for position, each in enumerate(newest_first):
        best = Agreement(0, len(each.compared))
        for later in reversed(newest_first[: position + 1]):
            if later.attempt != each.attempt:
                break
            if later is not each and later.iteration <= each.iteration:
                break  # training went back behind this one: what comes later is not its successor
            count = sum(iteration >= each.iteration for iteration in later.compared)
            now = Agreement(count, len(later.compared))
            if now.is_whole or (count > best.compared and not best.is_whole):
                best = now
        found[each.sequence] = best
    return found


def retain(
    candidates: Sequence[Candidate], last: int | None, tracker_iteration: int | None
) -> list[Verdict]:
    """Decide for each candidate, newest first. `last`: how many of them stay; None: all."""
    newest_first = sorted(candidates, key=lambda each: each.sequence, reverse=True)
    agreed, following = _find_last_agreed(newest_first)
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
        elif each is agreed:
            verdict = Verdict(each.iteration, True, "the last whose replicas agreed")
        elif each is following:
            verdict = Verdict(each.iteration, True, "the next whose replicas may prove to agree")
        else:
            verdict = Verdict(each.iteration, False, f"older than the last {last}")
        verdicts.append(verdict)
    kept = {each.iteration for each in verdicts if each.keep}
    needed_by = {
        each.base: each.iteration
        for each in reversed(newest_first)
        if each.base is not None and each.iteration in kept
    }
    return [
        replace(each, keep=True, reason=f"the base of iteration {needed_by[each.iteration]}")
        if not each.keep and each.iteration in needed_by
        else each
        for each in verdicts
    ]


def _find_last_agreed(
    newest_first: Sequence[Candidate],
) -> tuple[Candidate | None, Candidate | None]:
    """Return the last candidate whose replicas agreed, and the one that was committed next."""
    agreement = find_agreement(newest_first)
    before = None
    for each in newest_first:
        if agreement[each.sequence].is_whole:
            # Without a rotation no later one is ever proved.
            return each, before if len(newest_first[0].compared) > 1 else None
        before = each
    return None, None
