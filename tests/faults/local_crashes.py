"""Scenarios of local and persistent saves, and the check of every state that a crash may leave.

Owns the stories whose every instant is tried, and the promises that what is left must keep: what
was acknowledged lies there byte for byte, a fresh process loads the newest of it, saves in both
tiers, and leaves nothing behind.
"""

from __future__ import annotations

import errno
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.faults.jobs import State, load, train_to
from tests.faults.local_stories import (
    KEEP,
    Instant,
    Known,
    Story,
    commits_in,
    place_in_memory,
    place_on_disk,
    start,
)
from tests.faults.tiers import FULL, NEEDS_LOCAL, CrashedTier, Left, Violation
from tests.support.crash_filesystem import aftermaths
from tests.support.kernel_calls import Call, KernelCalls, Tree, plant

# -- scenarios ----------------------------------------------------------------------------------


def first_saves(story: Story) -> None:
    """Into directories that do not exist yet."""
    story.restart()
    story.begin_here()
    story.save(10, to_local=True)
    story.save(20, to_local=True)


def a_file_takes_its_next_turn(story: Story) -> None:
    """What the oldest commit lies in is filled again."""
    story.restart()
    for iteration in (10, 20, 30):
        story.save(iteration, to_local=True)
    story.begin_here()
    story.save(40, to_local=True)
    story.save(50, to_local=True)


def both_tiers(story: Story) -> None:
    """Local saves around a persistent one, of which the local tier has a copy."""
    story.restart()
    story.save(10, to_local=False)
    story.save(20, to_local=True)
    story.begin_here()
    story.save(30, to_local=False)
    story.save(40, to_local=True)


def after_a_restart(story: Story) -> None:
    """The files that are pruned are those of an earlier process."""
    story.restart()
    story.save(10, to_local=True)
    story.save(20, to_local=False)
    story.save(30, to_local=True)
    story.begin_here()
    story.restart()
    story.save(40, to_local=True)
    story.save(50, to_local=True)


def a_rollback(story: Story) -> None:
    """Resumed from a persistent checkpoint by number: the newer local commits are discarded."""
    story.restart()
    story.save(10, to_local=False)
    story.save(20, to_local=True)
    story.save(30, to_local=True)
    story.restart(step=10)
    story.begin_here()
    story.save(20, to_local=True)
    story.save(30, to_local=True)


def a_rollback_to_a_local_commit(story: Story) -> None:
    """The same to one that only the local tier has."""
    story.restart()
    story.save(10, to_local=False)
    story.save(20, to_local=True)
    story.save(30, to_local=True)
    story.restart(step=20)
    story.begin_here()
    story.save(30, to_local=True)
    story.save(40, to_local=False)


def the_same_iteration_again(story: Story) -> None:
    """A commit takes the name of another one, by the same process and by the next."""
    story.restart()
    story.save(10, to_local=True)
    story.save(20, to_local=True)
    story.begin_here()
    story.save(20, to_local=True)
    story.restart()
    story.save(20, to_local=True)


def after_a_failed_save(story: Story) -> None:
    """A save failed when its shard was to get its name, and the process saves again."""
    story.restart()
    story.save(10, to_local=True)
    story.save(20, to_local=True)

    def gets_its_name(call: Call) -> int | None:
        is_it = call.kind == "rename" and call.path.endswith("iter_0000030_0_local.pt")
        return errno.EIO if is_it else None

    failed = story.fail_to_save(30, gets_its_name, to_local=True)
    assert failed is not None
    story.begin_here()
    story.save(30, to_local=True)


def after_kills(story: Story) -> None:
    """Processes were killed in the middle: what they left is swept, and stands in nobody's way."""
    story.restart()
    story.save(10, to_local=True)
    story.save(20, to_local=True)
    story.kill()
    story.begin_here()
    story.save(30, to_local=True)
    story.kill()
    story.save(40, to_local=False)


SCENARIOS: dict[str, Callable[[Story], None]] = {
    each.__name__: each
    for each in (
        first_saves, a_file_takes_its_next_turn, both_tiers, after_a_restart, a_rollback,
        a_rollback_to_a_local_commit, the_same_iteration_again, after_a_failed_save, after_kills,
    )
}  # fmt: skip


def tell(name: str, base: Path, **settings: Any) -> Story:
    """Run a scenario to its end and return what there is to know of it."""
    story = Story(base, **settings)
    SCENARIOS[name](story)
    with story.calls.unseen():
        story.job.close()
    return story


# -- the check ----------------------------------------------------------------------------------


def states(story: Story, *, samples: int = 0) -> Iterator[Left[Tree, Known]]:
    """Yield every different state that a crash of a story may leave.

    Unless everything is asked for, states that differ only in files that wait for their turn are
    one: nobody reads those.
    """
    seen: set[object] = set()
    chooser = random.Random(0)
    for number, instant in enumerate(story.instants):
        where = f"before call {number}, {instant.where}"
        for loss, tree in _losses(story, instant, chooser, samples):
            key = (_fingerprint(tree), id(instant.known))
            if key not in seen:
                seen.add(key)
                is_killed = loss == "killed"
                yield Left(f"{loss} {where}", tree, instant.known, is_killed)


def _losses(
    story: Story, instant: Instant, chooser: random.Random, samples: int
) -> Iterator[tuple[str, Tree]]:
    yield "killed", instant.tree
    if story.disk is not None and instant.image is not None:
        for each in aftermaths(instant.image, chooser, samples):
            yield f"power cut ({each.loss})", story.disk.tree(each.image)


def _fingerprint(tree: Tree) -> object:
    if FULL:
        return frozenset(tree.items())
    return frozenset(
        (re.sub(r"-[0-9a-f]{8}", "-", name), b"" if ".pending-" in name else content)
        for name, content in tree.items()
    )


def check_at_rest(story: Story, left: Left[Tree, Known]) -> None:
    """Check that what was acknowledged is there, byte for byte, reading only.

    Raises:
        Violation: naming what is lost.
    """
    found = commits_in(story, left.what)
    kept = left.known.kept
    if left.known.coming in found:
        kept = kept[-(KEEP - 1) :]
    if missing := set(kept) - found:
        there = sorted(each[0] for each in found)
        raise Violation(f"lost: {sorted(each[0] for each in missing)}; there are {there}")


def check_goes_on(story: Story, left: Left[Tree, Known], *, thoroughly: bool) -> int:
    """Check that a fresh process resumes and saves; return which outcome it found.

    Raises:
        Violation: naming the promise that is broken.
    """
    base = story.base
    plant(base, left.what)
    job = start(base)
    found, allowed = load(job), left.known.outcomes_in(left.what)
    if found not in allowed:
        raise Violation(f"{found} was loaded, not one of {allowed}")
    if thoroughly:
        iteration = job.step + 1
        saved = train_to(job, iteration)
        job.save(to_local=True)
        job.close()
        check_is_tidy(base / "local")  # the store is swept by the next save that goes there
        _expect(base, saved, "what was saved locally")
        job = start(base)
        load(job)
        saved = train_to(job, iteration)
        job.save()
        job.close()
        check_is_tidy(base)
        shutil.rmtree(base / "local")
        _expect(base, saved, "what was saved in both tiers, once the local one is lost")
        plant(base, {name: each for name, each in left.what.items() if name[:5] != "local"})
        _expect_one_of(base, left.known.durable, "with the local tier lost")
    else:
        job.close()
    return left.known.outcomes.index(found)


def check_is_tidy(base: Path) -> None:
    """Check that nothing waits to be swept once a job has ended.

    A replaced commit whose successor never came still counts, and is none of that.

    Raises:
        Violation: naming it.
    """
    names = {str(each) for each in base.rglob("*")}
    leftovers = [
        name
        for name in names
        if ".pending-" in name or (".replaced-" in name and name.partition(".repl")[0] in names)
    ]
    if leftovers:
        raise Violation(f"left behind after the next save: {leftovers}")


def _expect(base: Path, expected: State, what: str) -> None:
    _expect_one_of(base, (expected,), what)


def _expect_one_of(base: Path, expected: tuple[State, ...], what: str) -> None:
    job = start(base)
    found = load(job)
    job.close()
    if found not in expected:
        raise Violation(f"{what}: {found} was loaded, not one of {expected}")


def check(
    story: Story, left: Left[Tree, Known], *, goes_on: bool = True, thoroughly: bool = True
) -> int | None:
    """Check every promise on what a crash left; return which outcome a load finds.

    `goes_on`: that a fresh process does; else nothing is loaded. `thoroughly`: that it saves too.

    Raises:
        Violation: naming the promise that is broken.
    """
    try:
        check_at_rest(story, left)
        if not goes_on:
            return None
        with KernelCalls(story.base).watching():  # which spares the disk every sync
            return check_goes_on(story, left, thoroughly=thoroughly)
    except Violation:
        raise
    except Exception as error:
        raise Violation(f"a fresh process failed: {type(error).__name__}: {error}") from error


# -- as the tests of both tiers see it -----------------------------------------------------------


@contextmanager
def _in_memory(name: str, folder: Path) -> Iterator[Story]:
    with place_in_memory() as base:
        yield tell(name, base)


@contextmanager
def _promoted_in_memory(name: str, folder: Path) -> Iterator[Story]:
    with place_in_memory() as base:
        persistent = {"directory": str(base / "store"), "from_local": True}
        yield tell(name, base, async_save=True, persistent=persistent)


@contextmanager
def _on_disk(name: str, folder: Path) -> Iterator[Story]:
    with place_on_disk(folder) as base:
        yield tell(name, base)


def _check(story: Story, left: Left[Tree, Known], chooser: random.Random) -> int | None:
    # Every state is looked at. What a killed process leaves is the hardest to go on from: none of
    # that is left out, and of the rest none that comes from a call of the local tier.
    goes_on = FULL or left.is_killed or "local/" in left.where or chooser.random() < 0.1
    thoroughly = FULL or chooser.random() < (0.15 if story.disk is None else 0.06)
    return check(story, left, goes_on=goes_on, thoroughly=thoroughly)


IN_MEMORY = CrashedTier(
    "local_in_memory", "local: ", [*SCENARIOS], _in_memory, states, _check, [NEEDS_LOCAL]
)
"""The arena is the file: what a killed process leaves."""
ON_DISK = replace(IN_MEMORY, name="local_on_disk", tell=_on_disk)
"""The writer writes the file: what a power cut leaves, too."""
PROMOTED = replace(
    IN_MEMORY,
    name="local_promoted",
    scenarios=["both_tiers", "after_a_restart"],
    tell=_promoted_in_memory,
)
"""The writer commits locally; another thread makes the persistent checkpoint from that."""
