"""Any sequence of saves, loads, rollbacks, faults and intruders, against a memory of the saves."""

from __future__ import annotations

import errno
import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from holdfast.errors import (
    SaveFailedError,
    StoreIdentityError,
    StoreNotLoadedError,
    SupersededAttemptError,
)
from tests.faults.crashes import ROOT, Story, check_at_rest, start
from tests.faults.jobs import Job, train_to
from tests.faults.report import record
from tests.faults.tiers import sequences
from tests.support.crash_filesystem import CrashFilesystem, PowerCut, aftermaths

FOREIGN = ("notes.txt", "iter_10", "iter_0000010.bak", "iter_0000010.pending-zz", "run.json~",
           "attempt_1.json", "iter_0000020.replaced-", ".hidden")  # fmt: skip
STEPS_OF_A_SAVE = 160
"""About so many operations; a fault beyond the last one does not come."""


class Runs(RuleBasedStateMachine):
    """One store, the processes that use it one after another, and an oracle that cannot fail."""

    @initialize(keep_last=st.sampled_from([1, 2, 3, None]), saves=st.integers(1, 4))
    def begin(self, keep_last: int | None, saves: int) -> None:
        self.story = Story(CrashFilesystem(), keep_last)
        for _ in range(saves):  # an empty store has scenarios of its own
            self.story.save(self._next(3))
        self.foreign: dict[str, bytes] = {}

    # -- a run -------------------------------------------------------------------------------

    def _next(self, ahead: int) -> int:
        return self.story.job.step + ahead

    @rule(ahead=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def save(self, ahead: list[int]) -> None:
        for each in ahead:
            self.story.save(self._next(each))

    @rule()
    def resume(self) -> None:
        self.story.restart()
        self.story.load()

    @rule(back=st.integers(0, 3), ahead=st.lists(st.integers(1, 3), min_size=0, max_size=3))
    def roll_back(self, back: int, ahead: list[int]) -> None:
        listed = self.story.order[::-1]
        self.story.load(listed[min(back, len(listed) - 1)])
        for each in ahead:
            self.story.save(self._next(each))

    # -- faults ------------------------------------------------------------------------------

    @rule(ahead=st.integers(1, 3), step=st.integers(0, STEPS_OF_A_SAVE), loss=st.integers(0, 999))
    def crash(self, ahead: int, step: int, loss: int) -> None:
        story = self.story
        last = len(story.filesystem.operations) + step
        operations = story.filesystem.operations
        story.filesystem.cuts = lambda _: len(operations) == last
        with suppress(PowerCut):
            story.save(self._next(ahead))
        self._crash(loss)

    def _crash(self, loss: int) -> None:
        left = list(aftermaths(self.story.filesystem.image, random.Random(loss), samples=8))
        image = left[loss % len(left)].image
        check_at_rest(self.story, image, self.story.known)
        record("crash states tried")
        self.story = self.story.fork(CrashFilesystem(image))
        self.story.take_stock()
        self.story.load()

    @rule(
        ahead=st.integers(1, 3),
        step=st.integers(0, STEPS_OF_A_SAVE),
        code=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES]),
        lasts=st.booleans(),
    )
    def fail(self, ahead: int, step: int, code: int, lasts: bool) -> None:
        story = self.story
        operations = story.filesystem.operations
        first = len(operations) + step

        def fails(_: object) -> int | None:
            position = len(operations) - 1
            return code if position == first or (lasts and position > first) else None

        story.filesystem.fails = fails
        try:
            story.save(self._next(ahead))
        except SaveFailedError as error:
            assert error.failures[0].errno == code  # noqa: PT017  # most saves do not fail
            check_at_rest(story, story.filesystem.image, story.known)
        finally:
            story.filesystem.fails = lambda operation: None
        story.take_stock()
        record("errno x operation pairs")

    # -- others ------------------------------------------------------------------------------

    @rule(name=st.sampled_from(FOREIGN))
    def put_a_foreign_file(self, name: str) -> None:
        if name in self.foreign:
            return
        filesystem = self.story.filesystem
        with filesystem.open_new(ROOT / name) as stream:
            stream.write(name.encode())
        filesystem.sync_file(ROOT / name)
        filesystem.sync_directory(ROOT)
        self.foreign[name] = name.encode()

    @rule()
    def refuse_another_run(self) -> None:
        self._refuse(start(self.story.filesystem, run_id="theirs"), StoreIdentityError)

    @rule()
    def refuse_a_job_that_loaded_nothing(self) -> None:
        self._refuse(start(self.story.filesystem), StoreNotLoadedError)

    @rule()
    def refuse_a_forgotten_twin(self) -> None:
        if not self.story.has_claimed:
            self.story.save(self._next(1))
        twin = self.story.job
        self.resume()
        self.story.save(self._next(1))
        self._refuse(twin, SupersededAttemptError)

    def _refuse(self, job: Job, kind: type[Exception]) -> None:
        before = self.story.filesystem.image.tree()
        train_to(job, job.step + 1)
        with pytest.raises(kind):
            job.save()
        assert self.story.filesystem.image.tree() == before

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def promises_hold(self) -> None:
        image = self.story.filesystem.image
        check_at_rest(self.story, image, self.story.known)
        tree = image.tree()
        for name, content in self.foreign.items():
            assert tree.get(str(Path(ROOT, name))) == content, f"{name} was touched"


Runs.TestCase.settings = sequences(examples=25, steps=14)
TestAnySequence = Runs.TestCase
