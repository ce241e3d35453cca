"""Any sequence of saves, loads, rollbacks, faults and intruders, against a memory of the saves."""

from __future__ import annotations

import errno
import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from holdfast.errors import (
    SaveFailedError,
    StoreIdentityError,
    StoreNotLoadedError,
    SupersededAttemptError,
)
from tests.faults.crashes import FULL, ROOT, Job, Story, check_at_rest
from tests.faults.report import record
from tests.support.crash_filesystem import CrashFilesystem, PowerCut, aftermaths

FOREIGN = ("notes.txt", "iter_10", "iter_0000010.bak", "iter_0000010.pending-zz", "run.json~",
           "attempt_1.json", "iter_0000020.replaced-", ".hidden")  # fmt: skip
STEPS_OF_A_SAVE = 160
"""About so many operations; a fault beyond the last one does not come."""


class Runs(RuleBasedStateMachine):
    """One store, the processes that use it one after another, and an oracle that cannot fail."""

    @initialize(keep_last=st.sampled_from([1, 2, 3, None]))
    def begin(self, keep_last: int | None) -> None:
        self.story = Story(CrashFilesystem(), keep_last)
        self.twin: Job | None = None
        self.foreign: dict[str, bytes] = {}

    # -- a run -------------------------------------------------------------------------------

    def _next(self, ahead: int) -> int:
        return self.story.job.state.train_state.step + ahead

    @rule(ahead=st.integers(1, 3))
    def save(self, ahead: int) -> None:
        self.story.save(self._next(ahead))

    @rule()
    def resume(self) -> None:
        if self.story.has_claimed:
            self.twin = self.story.job
        self.story.restart()
        self._load_newest()

    @rule(choice=st.randoms(use_true_random=False))
    @precondition(lambda self: self.story.known.required)
    def roll_back(self, choice: random.Random) -> None:
        self.story.load(choice.choice(sorted(self.story.known.required)))

    @rule()
    @precondition(lambda self: self.story.known.required)
    def load_newest(self) -> None:
        self.story.load()

    def _load_newest(self) -> None:
        if self.story.known.required:
            self.story.load()
        else:
            assert not self.story.job.load().found

    # -- faults ------------------------------------------------------------------------------

    @rule(ahead=st.integers(1, 3), step=st.integers(0, STEPS_OF_A_SAVE), loss=st.integers(0, 999))
    def crash_while_saving(self, ahead: int, step: int, loss: int) -> None:
        story = self.story
        last = len(story.filesystem.operations) + step
        operations = story.filesystem.operations
        story.filesystem.cuts = lambda _: len(operations) == last
        with suppress(PowerCut):
            story.save(self._next(ahead))
        self._crash(loss)

    @rule(loss=st.integers(0, 999))
    def crash_while_training(self, loss: int) -> None:
        self._crash(loss)

    def _crash(self, loss: int) -> None:
        left = list(aftermaths(self.story.filesystem.image, random.Random(loss), samples=8))
        image = left[loss % len(left)].image
        check_at_rest(self.story, image, self.story.known)
        record("crash states tried")
        self.story = self.story.fork(CrashFilesystem(image))
        self.story.take_stock()
        self.twin = None
        self._load_newest()

    @rule(
        ahead=st.integers(1, 3),
        step=st.integers(0, STEPS_OF_A_SAVE),
        code=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES]),
        lasts=st.booleans(),
    )
    def fail_while_saving(self, ahead: int, step: int, code: int, lasts: bool) -> None:
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
    @precondition(lambda self: self.story.known.required)
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
    @precondition(lambda self: self.story.known.required)
    def refuse_another_run(self) -> None:
        self._refuse(Job(self.story.filesystem, run_id="theirs"), StoreIdentityError)

    @rule()
    @precondition(lambda self: self.story.known.required)
    def refuse_a_job_that_loaded_nothing(self) -> None:
        self._refuse(Job(self.story.filesystem), StoreNotLoadedError)

    @rule()
    @precondition(lambda self: self.twin is not None and self.story.has_claimed)
    def refuse_a_forgotten_twin(self) -> None:
        assert self.twin is not None
        self._refuse(self.twin, SupersededAttemptError)

    def _refuse(self, job: Job, kind: type[Exception]) -> None:
        before = self.story.filesystem.image.tree()
        job.train_to(job.state.train_state.step + 1)
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


Runs.TestCase.settings = settings(
    max_examples=400 if FULL else 20,
    stateful_step_count=25 if FULL else 12,
    derandomize=not FULL,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnySequence = Runs.TestCase
