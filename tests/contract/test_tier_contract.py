"""Each promise of the tier contract is seen to fail: a tier that breaks it does not pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from holdfast.errors import CheckpointError, CorruptCheckpointError
from holdfast.format.layout import Layout
from holdfast.protocol import ShardSource
from holdfast.ranks.coordinator import Coordinator, SingleProcess
from holdfast.ranks.job import Committed
from holdfast.snapshot.arena import Arena
from holdfast.storage.identity import CommitIdentity
from holdfast.testing import MemoryStorage, StartedTier, TierContract
from holdfast.testing.tier import Process, StartTier
from holdfast.tiers.persistent import PersistentTier
from holdfast.tiers.select import Commit
from holdfast.tiers.tier import Contents, Objection, Snapshot, Wanted

Identify = Callable[[], CommitIdentity]


class _Inventive(PersistentTier):
    def survey(
        self, coordinator: Coordinator, objection: Objection, step: int | None = None
    ) -> Sequence[Commit]:
        return [*super().survey(coordinator, objection, step), Commit(self.name, 1, 0)]


class _Renumbering(PersistentTier):
    def survey(
        self, coordinator: Coordinator, objection: Objection, step: int | None = None
    ) -> Sequence[Commit]:
        found = super().survey(coordinator, objection, step)
        return [replace(each, sequence=(each.sequence or 0) + 1) for each in found]


class _NewestAlone(PersistentTier):
    def survey(
        self, coordinator: Coordinator, objection: Objection, step: int | None = None
    ) -> Sequence[Commit]:
        return sorted(super().survey(coordinator, objection), key=lambda each: each.order)[-1:]


class _ByIteration(PersistentTier):
    """Takes the largest iteration for the newest."""

    def survey(
        self, coordinator: Coordinator, objection: Objection, step: int | None = None
    ) -> Sequence[Commit]:
        found = super().survey(coordinator, objection, step)
        return sorted(found, key=lambda each: each.iteration or 0)[-1:]


class _Altering(PersistentTier):
    """Gives something else for what it has opened."""

    def open(self, commit: Commit, coordinator: Coordinator, wanted: Wanted) -> Contents:
        return self.alter(super().open(commit, coordinator, wanted))

    def alter(self, contents: Contents) -> Contents:
        return replace(contents, small={})


class _WithoutSources(Contents):
    def sources(self) -> tuple[ShardSource, ...]:
        return ()


class _Silent(_Altering):
    def alter(self, contents: Contents) -> Contents:
        return _WithoutSources(**vars(contents))


class _Once(PersistentTier):
    """Takes a save of an iteration that exists for done."""

    def write(self, snapshot: Snapshot, identify: Identify, coordinator: Coordinator) -> Committed:
        if any(each.iteration == snapshot.iteration for each in self.store.listing().checkpoints):
            return Committed(Path(), 1, ())
        return super().write(snapshot, identify, coordinator)


class _Late(PersistentTier):
    """Writes when somebody looks."""

    waiting: list[tuple[Snapshot, CommitIdentity]]

    def write(self, snapshot: Snapshot, identify: Identify, coordinator: Coordinator) -> Committed:
        self.waiting = [*getattr(self, "waiting", ()), (snapshot, identify())]
        return Committed(Path(), 1, ())

    def survey(
        self, coordinator: Coordinator, objection: Objection, step: int | None = None
    ) -> Sequence[Commit]:
        for snapshot, identity in getattr(self, "waiting", ()):
            super().write(snapshot, lambda identity=identity: identity, coordinator)  # type: ignore[misc]
        self.waiting = []
        return super().survey(coordinator, objection, step)


class _KeepingOne(PersistentTier):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._keep_last = 1


class _Hasty(PersistentTier):
    """Asks when it is too late."""

    def write(self, snapshot: Snapshot, identify: Identify, coordinator: Coordinator) -> Committed:
        hasty = replace(snapshot, confirm=lambda: None)
        committed = super().write(hasty, self.next_identity, coordinator)
        identify()
        snapshot.confirm()
        return committed


class _Leaking(PersistentTier):
    reserved = 0

    def reserve(self, layout: Layout, coordinator: Coordinator, *, pinned: bool) -> Arena | None:
        self.reserved += 1
        if self.reserved > TierContract.keeps + 2:
            raise CheckpointError("there is no memory left")
        return None


class _Blind(PersistentTier):
    """Returns what was written once, whatever has become of it."""

    written: ClassVar[dict[str, bytes]]

    def write(self, snapshot: Snapshot, identify: Identify, coordinator: Coordinator) -> Committed:
        committed = super().write(snapshot, identify, coordinator)
        type(self).written = {**_objects(self)}
        return committed

    def open(self, commit: Commit, coordinator: Coordinator, wanted: Wanted) -> Contents:
        _objects(self).update(self.written)
        return super().open(commit, coordinator, wanted)


class _Stubborn(PersistentTier):
    def pass_over(
        self, commit: Commit, coordinator: Coordinator, error: CorruptCheckpointError
    ) -> Commit:
        return commit


class _Deaf(PersistentTier):
    def open(self, commit: Commit, coordinator: Coordinator, wanted: Wanted) -> Contents:
        return super().open(commit, coordinator, replace(wanted, accept=lambda contents: None))


class _Forgetful(PersistentTier):
    def close(self) -> None:
        _objects(self).clear()


def _objects(tier: PersistentTier) -> dict[str, bytes]:
    storage = tier._storage
    assert isinstance(storage, MemoryStorage)
    return storage._contents.objects


@dataclass(frozen=True)
class Case:
    """A tier that breaks one promise, and with which arguments its test finds out."""

    kind: type[PersistentTier]
    arguments: dict[str, Any] = field(default_factory=dict)


BROKEN = {
    "test_where_nothing_was_saved_nothing_is_offered": [Case(_Inventive)],
    "test_what_was_saved_is_loaded": [Case(_Altering)],
    "test_a_commit_says_what_it_is": [Case(_Renumbering)],
    "test_the_newest_commit_is_offered_first": [Case(_ByIteration)],
    "test_an_iteration_may_be_saved_again": [Case(_Once)],
    "test_a_commit_is_found_by_its_iteration": [Case(_NewestAlone)],
    "test_a_load_names_its_sources": [Case(_Silent)],
    "test_state_may_change_once_it_was_staged": [Case(_Late)],
    "test_the_newest_commits_are_kept": [Case(_KeepingOne)],
    "test_a_save_that_fails_leaves_earlier_commits": [
        Case(_Hasty, {"moment": "identify"}),
        Case(_Hasty, {"moment": "confirm"}),
    ],
    "test_memory_that_was_reserved_is_given_back": [Case(_Leaking)],
    "test_damaged_tensors_are_never_returned": [
        Case(_Blind, {"verify_first": True}),
        Case(_Blind, {"verify_first": False}),
    ],
    "test_what_was_found_damaged_is_passed_over": [Case(_Stubborn)],
    "test_contents_that_are_refused_are_damage": [Case(_Deaf)],
    "test_what_was_committed_outlives_the_process": [Case(_Forgetful)],
}


def test_every_promise_has_its_culprit() -> None:
    """No test of the contract is left out above."""
    assert {name for name in vars(TierContract) if name.startswith("test_")} == {*BROKEN}


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in BROKEN.items() for case in cases], ids=str
)
def test_a_broken_promise_is_found(name: str, case: Case) -> None:
    """The test fails on the tier that breaks its promise, and passes on one that keeps it."""
    _call(name, PersistentTier, case.arguments)
    with pytest.raises((AssertionError, CheckpointError, IndexError, pytest.fail.Exception)):
        _call(name, case.kind, case.arguments)


def _call(name: str, kind: type[PersistentTier], arguments: dict[str, Any]) -> None:
    storage = MemoryStorage()

    class Contract(TierContract):
        def harm(self, commit: Commit) -> None:
            files = storage.under(Path(commit.path).name)
            content = bytearray(files.get("__0_0.distcp"))
            content[4100] ^= 4
            files.put("__0_0.distcp", bytes(content))

    def start() -> StartedTier:
        tier = kind(storage, "run", TierContract.keeps)
        PersistentTier.survey(tier, SingleProcess(), lambda record: None)
        found = tier.surveyed.checkpoints
        if found:
            newest = found[max(found, key=lambda each: each.order)]
            tier.resume_from(newest, is_own=True)
        tier.admit()
        return StartedTier(tier, tier.next_identity)

    test = getattr(Contract(), name)
    given: dict[str, StartTier | Process] = {"start": start, "process": Process(start())}
    wanted = inspect.signature(test).parameters
    test(**{each: given[each] for each in wanted if each in given}, **arguments)
