"""Any sequence of saves to both tiers, loads, kills and losses, against a memory of the saves.

In RAM, where files take turns, and on a disk, where the writer writes them. What a load gives must
be the newest commit that is left, to the last bit; whatever was acknowledged and is kept must lie
there unchanged between any two steps.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from holdfast.errors import StoreIdentityError, StoreNotLoadedError, SupersededAttemptError
from holdfast.filesystem import is_memory
from tests.faults.jobs import Job, load, train_to
from tests.faults.local_crashes import check_at_rest
from tests.faults.local_stories import Story, start
from tests.faults.report import record
from tests.faults.tiers import Left, sequences
from tests.support.kernel_calls import Call, tree_of

pytest.importorskip("nvidia_resiliency_ext")

CALLS_OF_A_SAVE = 60
"""About so many on the node; a fault beyond the last one does not come."""


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


HARMS: dict[str, Callable[[Path], None]] = {
    "truncate": _truncate,
    "flip": _flip,
    "unlink": lambda path: path.unlink(),
    "zero": _zero,
}
LAST = st.lists(st.booleans(), min_size=1, max_size=3)
"""Of a few saves: whether each is local alone."""


class Runs(RuleBasedStateMachine):
    """A node and a store, the processes that use them one after another, and what they saved."""

    @initialize(in_memory=st.booleans(), from_local=st.booleans(), saves=LAST)
    def begin(self, in_memory: bool, from_local: bool, saves: list[bool]) -> None:
        parent = "/dev/shm" if in_memory else None
        self.base = Path(tempfile.mkdtemp(prefix="holdfast-faults-", dir=parent))
        persistent = {
            "directory": str(self.base / "store"),
            "keep": {"last": None},
            "from_local": from_local,
        }
        self.story = Story(self.base, persistent=persistent, async_save=from_local)
        self.story.is_looking = False
        self.story.disk = None
        self.story.calls.done = lambda call: None
        self.story.restart()
        self.story.save(1, to_local=False)
        self.save(saves)
        assert is_memory(self.base) or not in_memory

    def teardown(self) -> None:
        if hasattr(self, "story"):
            try:
                self.story.job.close()
            finally:
                shutil.rmtree(self.base)

    # -- a run -------------------------------------------------------------------------------

    def _next(self, ahead: int = 1) -> int:
        return self.story.job.step + ahead

    @rule(saves=LAST)
    def save(self, saves: list[bool]) -> None:
        for to_local in saves:
            self.story.save(self._next(), to_local=to_local)

    @rule(to_local=st.booleans())
    def save_again(self, to_local: bool) -> None:
        """The same iteration, as after a step back that did not ask for a load."""
        self.story.save(self._next(0), to_local=to_local)

    @rule()
    def resume(self) -> None:
        self.story.restart()

    @rule()
    def kill(self) -> None:
        self.story.kill()
        record("local: kill points")

    @rule(back=st.integers(0, 3), saves=LAST)
    def roll_back(self, back: int, saves: list[bool]) -> None:
        story = self.story
        there = [each for each in story.order if each in story.local + story.persisted]
        newest = {iteration: each for each in there for iteration in [each[0]]}
        targets = [each for each in there if newest[each[0]] == each][::-1]
        story.restart(step=targets[min(back, len(targets) - 1)][0])
        self.save(saves)

    # -- faults ------------------------------------------------------------------------------

    @rule(ahead=st.integers(0, 2), to_local=st.booleans(), moment=st.integers(0, 999))
    def be_killed(self, ahead: int, to_local: bool, moment: int) -> None:
        story = self.story
        persisted, order = [*story.persisted], [*story.order]
        story.instants.clear()
        story.is_looking = True
        story.save(self._next(ahead), to_local=to_local)
        story.is_looking = False
        instant = story.instants[moment % len(story.instants)]
        check_at_rest(story, Left(instant.where, instant.tree, instant.known, is_killed=True))
        story.persisted, story.order = persisted, order
        story.travel_to(instant)
        record("local: crash states tried")

    @rule(
        ahead=st.integers(0, 2),
        to_local=st.booleans(),
        step=st.integers(0, CALLS_OF_A_SAVE),
        code=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EACCES]),
        lasts=st.booleans(),
    )
    def fail(self, ahead: int, to_local: bool, step: int, code: int, lasts: bool) -> None:
        story, seen = self.story, list[Call]()

        def fails(call: Call) -> int | None:
            if not call.path.startswith(f"{self.base}/local"):
                return None
            seen.append(call)
            position = len(seen) - 1
            return code if position == step or (lasts and position > step) else None

        error = story.fail_to_save(self._next(ahead), fails, to_local=to_local)
        if error is not None:
            assert to_local
            assert error.failures[0].errno == code
            assert str(error.failures[0].path).startswith("/")
        story.take_stock(is_sure=to_local)
        if error is not None:
            story.restart()
        record("local: errno x call pairs")

    @precondition(lambda self: self.story.local and len(self.story.known.durable) == 1)
    @rule(harm=st.sampled_from(sorted(HARMS)))
    def damage_the_newest(self, harm: str) -> None:
        story = self.story
        if story.known.durable != (story.persisted[-1] if story.persisted else None,):
            return
        story.damage(story.local[-1], HARMS[harm])
        record("local: damaged files")

    @precondition(lambda self: None not in self.story.known.durable)
    @rule()
    def lose_the_node(self) -> None:
        self.story.lose_the_node()
        record("local: nodes lost")

    # -- others ------------------------------------------------------------------------------

    @rule()
    def refuse_another_run(self) -> None:
        self._refuse(start(self.base, run_id="theirs"), StoreIdentityError)

    @rule()
    def refuse_a_job_that_loaded_nothing(self) -> None:
        self._refuse(start(self.base), StoreNotLoadedError)

    @rule()
    def refuse_a_forgotten_twin(self) -> None:
        story = self.story
        if not story.has_claimed:
            story.save(self._next(), to_local=True)
        twin = story.job
        story.job = start(self.base)  # so that the twin is not ended in order
        story.restart()
        story.save(self._next(), to_local=True)
        self._refuse(twin, SupersededAttemptError)

    def _refuse(self, job: Job, kind: type[Exception]) -> None:
        known = self.story.known
        train_to(job, job.step + 1)
        for to_local in (True, False):
            with pytest.raises(kind):
                job.save(to_local=to_local)
        job.close()
        fresh = start(self.base)
        assert load(fresh) in known.outcomes
        fresh.close()

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def promises_hold(self) -> None:
        if hasattr(self, "story"):
            known = self.story.known
            left = Left("between steps", tree_of(self.base), known, is_killed=True)
            check_at_rest(self.story, left)


Runs.TestCase.settings = sequences(examples=16, steps=12)
TestAnySequence = Runs.TestCase
