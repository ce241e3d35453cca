"""Jobs on a file system that can lose power, what they may rely on, and the check of one state.

Owns the scenarios whose every crash is tried, the knowledge of what had been acknowledged before
each step, and the promises that a state left by a crash must keep. A store joins by being what
`Job` builds. Promises to judge by the bytes that were saved, never by what the code under test says
of them.
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import SaveFailedError
from holdfast.filesystem import Filesystem
from holdfast.storage.identity import Attempt, RunIdentity
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store, checkpoint_name
from tests.faults.jobs import Job, state_of, train_to
from tests.faults.tiers import FULL, CrashedTier, Left, Violation
from tests.support.crash_filesystem import (
    CrashFilesystem,
    Image,
    Operation,
    PowerCut,
    aftermaths,
)

ROOT = Path("/runs/one/checkpoints")
"""No part of it exists at first."""
Tree = dict[str, bytes]
"""The files of one checkpoint."""


def start(
    filesystem: Filesystem, *, keep_last: int | None = 3, step: int | None = None, **settings: Any
) -> Job:
    """Start a process of the run."""
    persistent = {"directory": str(ROOT), "keep": {"last": keep_last}}
    load = {"step": step}
    return Job(ROOT, seed=1, filesystem=filesystem, persistent=persistent, load=load, **settings)


@dataclass(frozen=True)
class Known:
    """What holds from one operation on, whatever happens."""

    acceptable: dict[int, frozenset[str]] = field(default_factory=dict)
    """By iteration: the states that may be listed as it."""
    required: frozenset[int] = frozenset()
    """Iterations that must be listed."""
    current: frozenset[tuple[int, str]] = frozenset()
    """What a load without a wish may give."""
    may_be_empty: bool = True
    """Whether a load may find nothing."""
    trackers: frozenset[int | None] = frozenset()
    """Where the tracker may point once anything is required; None: nowhere."""
    attempts: tuple[Attempt, ...] = ()
    """Claims under which something was acknowledged."""


class Story:
    """Jobs that follow one another on one file system, and what is known at each operation."""

    def __init__(self, filesystem: CrashFilesystem, keep_last: int | None = 3) -> None:
        self.filesystem = filesystem
        self.keep_last = keep_last
        self.known = Known()
        self.chapters: list[tuple[int, Known]] = []
        """From which operation on what is known."""
        self.trees: dict[str, Tree] = {}
        """The files of each state that was saved, as they stood once it was acknowledged."""
        self.order: list[int] = []
        """Listed iterations, oldest commit first."""
        self.first_operation = 0
        self._start()

    def fork(self, filesystem: CrashFilesystem) -> Story:
        """Return a story that goes on from here on another file system, with another process."""
        other = Story(filesystem, self.keep_last)
        other.trees, other.order = dict(self.trees), [*self.order]
        other._learn(self.known)
        return other

    def _start(self) -> None:
        self.job = start(self.filesystem, keep_last=self.keep_last)
        self._resumed: tuple[int, str] | None = None
        self._resumed_path = ""
        self._asked_step: int | None = None
        self._has_claimed = False

    def _learn(self, known: Known) -> None:
        self.known = known
        self.chapters.append((len(self.filesystem.operations), known))

    def begin_here(self) -> None:
        """Let what went before be the setting: crashes are tried from here on."""
        self.first_operation = len(self.filesystem.operations)

    @property
    def has_claimed(self) -> bool:
        """Whether the process has saved since it last loaded."""
        return self._has_claimed

    def take_stock(self) -> None:
        """Let what a fault has left, which was found acceptable, be what holds from now on."""
        image = self.filesystem.image
        store = Store(PosixStorage(ROOT, CrashFilesystem(image)))
        acceptable = {}
        for each in store.listing().checkpoints:
            files = subtree(image, each.path)
            acceptable[each.iteration] = frozenset(
                digest
                for digest in self.known.acceptable[each.iteration]
                if self.trees.get(digest) == files
            )
        self.order = [each.iteration for each in reversed(store.listing().checkpoints)]
        self._learn(
            replace(
                self.known,
                acceptable=acceptable,
                required=frozenset(acceptable),
                current=frozenset(
                    (iteration, digest)
                    for iteration, digest in self.known.current
                    if digest in acceptable.get(iteration, ())
                ),
                may_be_empty=not acceptable,
                trackers=self.known.trackers | {store.read_tracker()[0]},
            )
        )

    def restart(self) -> None:
        """End the process; another one begins."""
        self._start()

    def load(self, step: int | None = None) -> None:
        """Resume, by number in a process of its own, and check the resumed state."""
        if step is not None:
            self.job = start(self.filesystem, keep_last=self.keep_last, step=step)
        result = self.job.load()
        _, digest = state_of(self.job)
        if digest not in self.known.acceptable.get(result.iteration, ()):
            raise Violation(f"iteration {result.iteration} was loaded as something else")
        if step is None and (result.iteration, digest) not in self.known.current:
            raise Violation(f"iteration {result.iteration} was loaded, which is not the newest")
        self._resumed = (result.iteration, digest)
        self._resumed_path = str(result.path)
        self._asked_step = step
        self._has_claimed = False

    def save(self, iteration: int) -> None:
        """Train a step and save it."""
        _, digest = train_to(self.job, iteration)
        before = self.known
        order = [each for each in self.order if each != iteration] + [iteration]
        kept = order if self.keep_last is None else order[-self.keep_last :]
        acceptable = dict(before.acceptable)
        acceptable[iteration] = acceptable.get(iteration, frozenset()) | {digest}
        self._learn(
            replace(
                before,
                acceptable=acceptable,
                required=before.required & frozenset(kept),
                # Once the attempt is claimed, what it resumed from outranks what it supersedes.
                current=before.current
                | {(iteration, digest)}
                | ({self._resumed} if self._resumed else set()),
                trackers=before.trackers | {iteration},
            )
        )
        try:
            self.job.save()
        except (PowerCut, SaveFailedError) as fault:
            self.trees[digest] = subtree(self.filesystem.image, ROOT / checkpoint_name(iteration))
            listing = Store(PosixStorage(ROOT, CrashFilesystem(self.filesystem.image))).listing()
            self.order = [each.iteration for each in reversed(listing.checkpoints)]
            if isinstance(fault, SaveFailedError):  # retention follows what has not failed
                self._learn(replace(self.known, required=before.required))
            raise
        self.trees[digest] = subtree(self.filesystem.image, ROOT / checkpoint_name(iteration))
        self.order = kept
        attempts = self.known.attempts
        if not self._has_claimed:
            self._has_claimed = True
            names = subtree(self.filesystem.image, ROOT)
            number = sum(re.fullmatch(r"attempt_\d{7,}\.json", name) is not None for name in names)
            path = None if self._resumed is None else self._resumed_path
            attempts = (
                *attempts,
                Attempt(
                    number,
                    self._resumed[0] if self._resumed else None,
                    path,
                    self._asked_step if self._resumed else None,
                ),
            )
        self._learn(
            Known(
                acceptable={**acceptable, iteration: frozenset({digest})},
                required=frozenset(kept),
                current=frozenset({(iteration, digest)}),
                may_be_empty=False,
                trackers=frozenset({iteration}),
                attempts=attempts,
            )
        )

    def save_and_fail(self, iteration: int, kind: str, pattern: str) -> None:
        """Save where the step right after one of a kind on a path fails; the process lives on."""
        operations = self.filesystem.operations

        def fails(_: Operation) -> int | None:
            return errno.EIO if _is_of(operations[-2:-1], kind, pattern) else None

        self.filesystem.fails = fails
        with pytest.raises(SaveFailedError):
            self.save(iteration)
        self.filesystem.fails = lambda operation: None

    def save_and_be_killed(self, iteration: int, kind: str, pattern: str) -> None:
        """Save in a process that is killed right after a step of a kind on a path.

        Another process follows on the same machine.
        """
        operations = self.filesystem.operations
        self.filesystem.cuts = lambda _: _is_of(operations[-1:], kind, pattern)
        with pytest.raises(PowerCut):
            self.save(iteration)
        self.filesystem.go_on()
        self.restart()

    def instants(self) -> Iterator[tuple[int, str, Image, Known]]:
        """Yield what was there before each operation, and at the end, with what was known."""
        operations, previous = self.filesystem.operations, None
        for number in range(self.first_operation, len(operations) + 1):
            known = [each for position, each in self.chapters if position <= number] or [Known()]
            if number < len(operations):
                step = f"{operations[number].kind} {operations[number].path}"
                image = self.filesystem.images[number]
            else:
                step, image = "the end", self.filesystem.image
            if previous != (id(image), id(known[-1])):  # a step that only reads changes nothing
                yield number, step, image, known[-1]
            previous = (id(image), id(known[-1]))


def _is_of(operations: Sequence[Operation], kind: str, pattern: str) -> bool:
    return any(each.kind == kind and re.fullmatch(pattern, each.path) for each in operations)


def subtree(image: Image, root: Path) -> Tree:
    """Return the files below a directory by relative name."""
    start = f"{root}/"
    return {
        path.removeprefix(start): content
        for path, content in image.tree().items()
        if path.startswith(start) and isinstance(content, bytes)
    }


# -- scenarios ----------------------------------------------------------------------------------


def first_save(story: Story) -> None:
    """A first save in a directory that does not exist."""
    story.save(10)


def second_save(story: Story) -> None:
    """A save beside an earlier one."""
    story.save(10)
    story.begin_here()
    story.save(20)


def save_again(story: Story) -> None:
    """A save of an iteration that exists, after a rollback by number."""
    for iteration in (10, 20):
        story.save(iteration)
    story.restart()
    story.load(10)
    story.begin_here()
    story.save(20)
    story.save(20)


def retention(story: Story) -> None:
    """Saves that push older ones out."""
    for iteration in (10, 20, 30):
        story.save(iteration)
    story.begin_here()
    story.save(40)
    story.save(50)


def first_save_after_resume(story: Story) -> None:
    """A new process claims the next attempt and saves."""
    for iteration in (10, 20):
        story.save(iteration)
    story.restart()
    story.load()
    story.begin_here()
    story.save(30)


def rollback(story: Story) -> None:
    """A new process goes back by number: what it supersedes must not come back."""
    for iteration in (10, 20, 30):
        story.save(iteration)
    story.restart()
    story.load(10)
    story.begin_here()
    story.save(15)


def killed_in_a_first_save(story: Story) -> None:
    """A process is killed once it made the first of the directories above the store."""
    story.save_and_be_killed(10, "make_directory", "/runs")
    story.begin_here()
    story.save(10)


def killed_while_replacing(story: Story) -> None:
    """A process is killed once the successor of a checkpoint is seen, durable or not."""
    for iteration in (10, 20):
        story.save(iteration)
    story.restart()
    story.load(10)
    story.save_and_be_killed(20, "rename", f"{ROOT}/iter_0000020")
    story.load()
    story.begin_here()
    story.save(30)


def failed_while_replacing(story: Story) -> None:
    """The sync that would make a successor durable fails, and the process saves again."""
    for iteration in (10, 20):
        story.save(iteration)
    story.restart()
    story.load(10)
    story.save_and_fail(20, "rename", f"{ROOT}/iter_0000020")
    story.begin_here()
    story.save(30)


def killed_while_removing(story: Story) -> None:
    """A process is killed once retention has taken a checkpoint's name, durably or not."""
    for iteration in (10, 20, 30):
        story.save(iteration)
    story.save_and_be_killed(40, "rename", rf"{ROOT}/iter_0000010\.pending-.*")
    story.load()
    story.begin_here()
    story.save(50)


SCENARIOS: dict[str, Callable[[Story], None]] = {
    each.__name__: each
    for each in (
        first_save, second_save, save_again, retention, first_save_after_resume, rollback,
        killed_in_a_first_save, killed_while_replacing, failed_while_replacing,
        killed_while_removing,
    )
}  # fmt: skip


def tell(
    name: str, *, filesystem: CrashFilesystem | None = None, has_hard_links: bool = True
) -> Story:
    """Run a scenario to its end, or to a power cut, and return what there is to know of it."""
    filesystem = filesystem or CrashFilesystem()
    filesystem.has_hard_links = has_hard_links
    story = Story(filesystem)
    SCENARIOS[name](story)
    return story


# -- the check ----------------------------------------------------------------------------------


def states(story: Story, *, samples: int = 0) -> Iterator[Left[Image, Known]]:
    """Yield every different state that a crash of a story may leave, with where it came from.

    Unless everything is asked for, states that differ only inside a pending directory are one: it
    is swept whatever it holds.
    """
    seen: set[object] = set()
    chooser = random.Random(0)
    for number, step, image, known in story.instants():
        for each in aftermaths(image, chooser, samples):
            key = (_fingerprint(each.image), id(known))
            if key in seen:
                continue
            seen.add(key)
            where = f"power cut before operation {number}, {step}; {each.loss}"
            yield Left(where, each.image, known, each.loss == "process killed")


def _fingerprint(image: Image) -> object:
    views = [image.tree()]
    if image.unsynced:
        views.append(image.after_power_loss((), lambda file: file.durable).tree())
    return tuple(
        frozenset(
            item for item in view.items() if FULL or ".pending-" not in str(Path(item[0]).parent)
        )
        for view in views
    )


def check_at_rest(story: Story, image: Image, known: Known) -> None:
    """Check promises 1 to 3 on what a crash left, reading only.

    Raises:
        Violation: naming the promise that is broken.
    """
    filesystem = CrashFilesystem(image)
    store, identity = (
        Store(PosixStorage(ROOT, filesystem)),
        RunIdentity(PosixStorage(ROOT, filesystem)),
    )
    listing = store.listing()
    if listing.broken:
        raise Violation(f"broken: {[(str(each.path), each.reason) for each in listing.broken]}")
    for each in listing.checkpoints:
        allowed = known.acceptable.get(each.iteration)
        if allowed is None:
            raise Violation(f"iteration {each.iteration} is listed and was never saved")
        files = subtree(image, each.path)
        if not any(story.trees.get(digest) == files for digest in allowed):
            saved = [story.trees.get(digest, {}) for digest in allowed]
            differ = [sorted({name for name, _ in tree.items() ^ files.items()}) for tree in saved]
            raise Violation(f"{each.path} is listed and is not what was saved: {differ}")
    listed = {each.iteration for each in listing.checkpoints}
    if missing := known.required - listed:
        raise Violation(f"lost: {sorted(missing)}; listed: {sorted(listed)}")
    sequences = [each.manifest.sequence for each in listing.checkpoints]
    if len(set(sequences)) != len(sequences) or len(listed) != len(sequences):
        raise Violation(f"no order between the checkpoints {sorted(listed)}: {sequences}")
    if known.required:
        tracker, problem = store.read_tracker()
        if tracker not in known.trackers or (tracker is not None and tracker not in listed):
            raise Violation(f"the tracker is at {tracker} {problem}, of {set(known.trackers)}")
    claims = identity.attempts()
    for attempt in known.attempts:
        if attempt not in claims:
            raise Violation(f"{attempt} was acknowledged; claimed are {claims}")
    newest_claim = max((each.number for each in claims), default=0)
    for each in listing.checkpoints:
        if each.manifest.attempt > newest_claim:
            raise Violation(f"{each.path} is of attempt {each.manifest.attempt}, never claimed")
        if each.manifest.run_id != identity.read_run_id():
            raise Violation(f"run.json does not name the run of {each.path}")


def check_is_tidy(image: Image) -> None:
    """Check that nothing is left behind of saves that came to nothing.

    Raises:
        Violation: naming what is.
    """
    leftovers = sorted(name for name in image.tree() if ".pending-" in name or ".replaced-" in name)
    if leftovers:
        raise Violation(f"left behind after the next save: {leftovers}")


def check_goes_on(story: Story, image: Image, known: Known) -> None:
    """Check promise 4: a fresh process resumes and saves, and after power loss that is there.

    Raises:
        Violation: naming the promise that is broken.
    """
    filesystem = CrashFilesystem(image)
    filesystem.has_hard_links = story.filesystem.has_hard_links
    filesystem.ignores = story.filesystem.ignores
    job = start(filesystem, keep_last=story.keep_last)
    result = job.load()
    if not result.found:
        if not known.may_be_empty:
            raise Violation("nothing was found to load")
    elif state_of(job) not in known.current:
        raise Violation(f"iteration {result.iteration} was loaded, or not as it was saved")
    saved = train_to(job, result.iteration + 1)
    job.save()
    check_is_tidy(filesystem.image)
    after = filesystem.image.after_power_loss((), lambda file: file.durable)
    surviving = start(CrashFilesystem(after))
    surviving.load()
    if (found := state_of(surviving)) != saved:
        raise Violation(f"the next save was acknowledged as {saved}, and {found} was loaded")


def check(story: Story, left: Left[Image, Known], *, goes_on: bool = True) -> None:
    """Check every promise on one state; with `goes_on` the fourth one too, which costs most.

    Raises:
        Violation: naming the promise that is broken.
    """
    try:
        check_at_rest(story, left.what, left.known)
        if goes_on:
            check_goes_on(story, left.what, left.known)
    except Violation:
        raise
    except Exception as error:
        raise Violation(f"a fresh process failed: {type(error).__name__}: {error}") from error


# -- as the tests of both tiers see it -----------------------------------------------------------


@contextmanager
def _telling(name: str, *, has_hard_links: bool) -> Iterator[Story]:
    yield tell(name, has_hard_links=has_hard_links)


def _check(story: Story, left: Left[Image, Known], chooser: random.Random) -> None:
    # What a killed process leaves is the hardest to go on from: none of that is left out.
    check(story, left, goes_on=FULL or left.is_killed or chooser.random() < 0.2)


PERSISTENT = CrashedTier(
    "persistent",
    "",
    [*SCENARIOS],
    lambda name, _: _telling(name, has_hard_links=True),
    states,
    _check,
)
WITHOUT_LINKS = replace(
    PERSISTENT,
    name="persistent_without_links",
    scenarios=["first_save", "first_save_after_resume"],
    tell=lambda name, _: _telling(name, has_hard_links=False),
)
"""On a file system that has no hard links."""
