"""Starts of a run with both tiers that follow one another on one node, and what is known of them.

Owns the process under test, what was there before each kernel call that it made, and the knowledge
of what had been acknowledged by then: what a load may give, what must be kept. Shards are known by
the bytes that were there when a save was acknowledged, never by what the code under test says. In
RAM an instant is what a killed process leaves; on a disk a power cut leaves less.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import SaveFailedError
from holdfast.filesystem import is_memory
from tests.faults.jobs import Job, State, load, state_of, train_to
from tests.faults.tiers import Violation
from tests.support.crash_filesystem import Image
from tests.support.kernel_calls import Call, KernelCalls, Tree, plant, tree_of
from tests.support.mirrored_disk import MirroredDisk

KEEP = 2

_SHARD = re.compile(r"local/[^/]+/0/iter_(\d{7,})_0_local\.pt(\.replaced-[0-9a-f]{8})?")


@contextmanager
def place_in_memory() -> Iterator[Path]:
    """Make a directory in RAM, where the arena is the file."""
    with tempfile.TemporaryDirectory(prefix="holdfast-faults-", dir="/dev/shm") as folder:
        yield Path(folder)


@contextmanager
def place_on_disk(folder: Path) -> Iterator[Path]:
    """Make a directory on a disk, where the writer writes the file."""
    if is_memory(folder):
        pytest.skip(f"{folder} lies in RAM; --basetemp names a directory on a disk")
    base = folder / "base"
    base.mkdir()
    yield base


def start(base: Path, *, step: int | None = None, **settings: Any) -> Job:
    """Start a process of the run."""
    local = {"directory": str(base / "local"), "keep": {"last": KEEP}, **settings.pop("local", {})}
    options = {"seed": 1, "load": {"step": step}, **settings}
    return Job(base / "store", local=local, **options)


@dataclass(frozen=True)
class Known:
    """What holds from one call on, whatever happens."""

    outcomes: tuple[State, ...] = (None,)
    """What a load may give, in the order in which they may follow one another."""
    durable: tuple[State, ...] = (None,)
    """The same where the local directory is lost."""
    kept: tuple[tuple[int, str], ...] = ()
    """Local commits that must be there, the oldest first; one less once a newer one is seen."""
    coming: tuple[int, str] | None = None
    """The local commit under way."""
    rolled_back: tuple[State, ...] = ()
    """What of the outcomes is none any more once a new attempt has been claimed."""
    attempts: int = 0
    """How many had been claimed."""

    def outcomes_in(self, tree: Tree) -> tuple[State, ...]:
        """Return what a load may give of what is there."""
        if attempts_in(tree) <= self.attempts:
            return self.outcomes
        return tuple(each for each in self.outcomes if each not in self.rolled_back)


def attempts_in(tree: Tree) -> int:
    """Return how many starts of the run have claimed to be the newest."""
    return sum(re.fullmatch(r"store/attempt_\d+\.json", name) is not None for name in tree)


@dataclass(frozen=True)
class Instant:
    """What was there before a call."""

    where: str
    tree: Tree
    image: Image | None
    """The same with what of it is durable; None: in RAM."""
    known: Known


@dataclass(frozen=True)
class Mark:
    """An instant to which a story can go back."""

    tree: Tree
    known: Known
    local: tuple[tuple[int, str], ...]
    persisted: tuple[tuple[int, str], ...]


class Story:
    """Processes that follow one another over both tiers, and what is known at each call."""

    def __init__(self, base: Path, **settings: Any) -> None:
        base.mkdir(exist_ok=True)
        self.base = base
        self.known = Known()
        self.instants: list[Instant] = []
        self.shards: dict[int, dict[str, bytes]] = {}
        """By iteration and digest: the shard file as it was when its save was acknowledged."""
        self.local: list[tuple[int, str]] = []
        """Local commits that are kept, the oldest first."""
        self.persisted: list[tuple[int, str]] = []
        """Persistent checkpoints that were acknowledged, the oldest first."""
        self.order: list[tuple[int, str]] = []
        """All commits of either tier, the oldest first."""
        self.ruined: set[bytes] = set()
        """What shard files hold that somebody has damaged."""
        self._durable: tuple[State, ...] = (None,)
        """What a load may give without the local tier, once the save under way is committed."""
        self.calls = KernelCalls(base)
        self.disk = None if is_memory(base) else MirroredDisk(base)
        self.calls.before = self._look
        if self.disk is not None:
            self.calls.done = self.disk.note
        self.is_looking = True
        self._settings = settings
        self._previous: Tree | None = None
        self._start(None)

    def _start(self, step: int | None) -> None:
        self.job = start(self.base, step=step, **self._settings)
        self._resumed: State = None
        self._has_claimed = False

    def _look(self, call: Call) -> None:
        if not self.is_looking:
            return
        tree = tree_of(self.base)
        if self.instants and tree == self.instants[-1].tree:
            if self.known is self.instants[-1].known and self.disk is None:
                return
            tree = self.instants[-1].tree
        image = None if self.disk is None else self.disk.image
        where = str(call).replace(f"{self.base}/", "")
        self.instants.append(Instant(where, tree, image, self.known))

    @property
    def has_claimed(self) -> bool:
        """Whether the process has saved since it last loaded."""
        return self._has_claimed

    def begin_here(self) -> None:
        """Let what went before be the setting: instants are looked at from here on."""
        self.instants.clear()

    def mark(self) -> Mark:
        """Remember this instant; the process must have ended."""
        return Mark(tree_of(self.base), self.known, tuple(self.local), tuple(self.persisted))

    def go_back(self, mark: Mark) -> None:
        """Let a process begin where another one had left off, and load."""
        self.known, self.local, self.persisted = mark.known, [*mark.local], [*mark.persisted]
        self.disk = None  # what it would hold after a power cut is not known from here on
        self.calls.done = lambda call: None
        self.restart_over(mark.tree)

    def travel_to(self, instant: Instant) -> None:
        """Let the process have been killed at an instant, and another one begin."""
        self.known = instant.known
        self.restart_over(instant.tree)

    def take_stock(self, *, is_sure: bool = True) -> None:
        """Let what a fault has left, which was found acceptable, be what holds from now on.

        `is_sure`: else nobody said whether the last save has a local copy, and so which of those
        before it are kept.
        """
        with self.calls.unseen():
            found = commits_in(self, tree_of(self.base))
        self.local = [each for each in self.local if each in found and is_sure]
        self.known = replace(self.known, kept=tuple(self.local), coming=None)

    # -- what processes do -----------------------------------------------------------------------

    def restart(self, step: int | None = None) -> None:
        """End the process as an orderly one does; another one begins and loads."""
        with self.calls.watching():
            self.job.close()
            self._start(step)
            self._resumed = load(self.job)
        if step is None:
            self._settle(self._resumed)
        elif self._resumed not in self.local + self.persisted:
            raise Violation(f"{self._resumed} was loaded, which was not kept")

    def _settle(self, found: State) -> None:
        """Let what a load has found be the newest commit there is."""
        if found not in self.known.outcomes:
            raise Violation(f"{found} was loaded, not one of {self.known.outcomes}")
        if found is not None and found not in self.order:
            self.order.append(found)
        with self.calls.unseen():
            there = commits_in(self, tree_of(self.base))
        self.local = [each for each in self.order if each in there][-KEEP:]
        self.known = Known((found,), self.known.durable, tuple(self.local))

    def damage(self, state: tuple[int, str], harm: Callable[[Path], None]) -> None:
        """End the process, damage the local copy of a commit, and let another process begin.

        It must load the newest of what is left, and say why it is no newer one.
        """
        with self.calls.unseen():
            self.job.close()
            (path,) = (
                self.base / name
                for name, content in tree_of(self.base).items()
                if content is not None and content == self.shards[state[0]][state[1]]
            )
            harm(path)
            if path.exists():
                self.ruined.add(path.read_bytes())
        self.local.remove(state)
        left = [each for each in self.order if each in self.local + self.persisted[-1:]]
        self.known = replace(self.known, outcomes=(left[-1],), kept=tuple(self.local))
        with self.calls.watching():
            self._start(None)
            result = self.job.load()
            self._resumed = state_of(self.job) if result.found else None
        self._settle(self._resumed)
        if path.exists() and state[0] > left[-1][0] and not result.skipped:
            raise Violation(f"nobody was told why {state} was passed over")

    def lose_the_node(self) -> None:
        """End the process, lose all that is local, and let another process begin."""
        with self.calls.unseen():
            self.job.close()
            shutil.rmtree(self.base / "local")
        self.known = replace(self.known, outcomes=self.known.durable)
        self.restart()

    def kill(self) -> None:
        """End the process without a word; another one begins and loads."""
        self.restart_over(tree_of(self.base))

    def restart_over(self, tree: Tree) -> None:
        """Let another process begin over what a killed one has left, and load."""
        with self.calls.unseen():
            self.job.close()
            plant(self.base, tree)
        with self.calls.watching():
            self._start(None)
            self._resumed = load(self.job)
        self._settle(self._resumed)

    def save(self, iteration: int, *, to_local: bool) -> None:
        """Train a step and save it; returning is the acknowledgement."""
        coming = train_to(self.job, iteration)
        self.known = self._expect(coming, to_local=to_local)
        with self.calls.watching():
            try:
                self.job.save(to_local=to_local)
            finally:
                self._learn_shard(coming)
        self._acknowledge(coming, to_local=to_local)

    def _expect(self, coming: tuple[int, str], *, to_local: bool) -> Known:
        outcomes, durable = [*self.known.outcomes], [*self.known.durable]
        rolled_back: tuple[State, ...] = ()
        if not self._has_claimed and self._resumed is not None:
            # The claim of an attempt supersedes what is beyond the iteration it resumed from.
            reached = self._resumed[0]
            self.local = [each for each in self.local if each[0] <= reached]
            self.persisted = [each for each in self.persisted if each[0] <= reached]
            if self._resumed in self.persisted:
                # Only then: a claim on what the local tier alone has stands once it has a commit.
                rolled_back = tuple(each for each in outcomes if each != self._resumed)
            outcomes.append(self._resumed)
            durable = [each for each in durable if each is None or each[0] <= reached]
            durable = durable or [self.persisted[-1] if self.persisted else None]
        self._durable = _distinct(durable)
        durable = [*self.known.durable, *durable]
        outcomes.append(coming)
        if not to_local:
            durable.append(coming)
        kept = tuple(each for each in self.local if each[0] != coming[0])
        with self.calls.unseen():
            attempts = attempts_in(tree_of(self.base))
        return Known(_distinct(outcomes), _distinct(durable), kept, coming, rolled_back, attempts)

    def _learn_shard(self, coming: tuple[int, str]) -> None:
        with self.calls.unseen():
            for name, content in tree_of(self.base).items():
                match = _SHARD.fullmatch(name)
                if match and content is not None and int(match[1]) == coming[0] and not match[2]:
                    known = self.shards.setdefault(coming[0], {})
                    if content not in known.values():
                        known[coming[1]] = content

    def _acknowledge(self, coming: tuple[int, str], *, to_local: bool) -> None:
        self._has_claimed = True
        others = [each for each in self.local if each[0] != coming[0]]
        self.local = [*others, coming][-KEEP:]
        if not to_local:
            self.persisted = [*(x for x in self.persisted if x[0] != coming[0]), coming]
        self.order = [*(each for each in self.order if each != coming), coming]
        durable = self._durable if to_local else (coming,)
        self.known = Known((coming,), durable, tuple(self.local), None)

    def fail_to_save(
        self, iteration: int, fails: Callable[[Call], int | None], *, to_local: bool
    ) -> SaveFailedError | None:
        """Save where calls fail with an errno; return how the save failed, None: it did not."""
        look = self.calls.before

        def refuse(call: Call) -> None:
            look(call)
            refuse_with(fails(call), call)

        self.calls.before = refuse
        before = self.known
        try:
            self.save(iteration, to_local=to_local)
        except SaveFailedError as error:
            # It may have come as far as to be seen, and need not: both are true from now on.
            self._settle_failure(before)
            return error
        finally:
            self.calls.before = look
        return None

    def _settle_failure(self, before: Known) -> None:
        coming = self.known.coming
        assert coming is not None
        kept = tuple(each for each in before.kept if each[0] != coming[0] and each in self.local)
        self.known = replace(self.known, kept=kept)


def refuse_with(number: int | None, call: Call) -> None:
    """Fail a call as the kernel does: one on a descriptor knows no path. None: let it be.

    Raises:
        OSError: with that errno.
    """
    if number is not None:
        known = (call.path,) if call.is_by_name else ()
        raise OSError(number, os.strerror(number), *known)


def _distinct(states: list[State]) -> tuple[State, ...]:
    return tuple(dict.fromkeys(states))


def commits_in(story: Story, tree: Tree) -> set[tuple[int, str]]:
    """Return the local commits that are there, each of which must be what was acknowledged.

    Raises:
        Violation: a published file is not what was saved.
    """
    found = set()
    for name, content in tree.items():
        match = _SHARD.fullmatch(name)
        if match is None or content is None or content in story.ruined:
            continue
        iteration = int(match[1])
        shards = story.shards.get(iteration, {})
        for each, expected in shards.items():
            if expected == content:
                found.add((iteration, each))
                break
        else:
            raise Violation(f"{name} is published and is not what was saved")
    return found
