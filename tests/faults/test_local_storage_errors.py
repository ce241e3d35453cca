"""A node whose memory or disk refuses a call costs one local save, or one commit of a load."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import CheckpointError, SaveFailedError
from tests.faults.jobs import Job, load, state_of, train_to
from tests.faults.local_crashes import check, check_at_rest
from tests.faults.local_stories import (
    KEEP,
    Mark,
    Story,
    commits_in,
    place_in_memory,
    refuse_with,
    start,
)
from tests.faults.report import record
from tests.faults.tiers import FULL, Left
from tests.support.kernel_calls import Call, KernelCalls, plant, tree_of
from tests.support.mounts import small_memory

pytest.importorskip("nvidia_resiliency_ext")

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EDQUOT, errno.EROFS)


def _nothing(story: Story) -> None:
    pass


def _three_saves(story: Story) -> None:
    story.save(10, to_local=False)
    story.save(20, to_local=True)
    story.save(30, to_local=True)


SITUATIONS: dict[str, tuple[Callable[[Story], None], list[int], bool]] = {
    "a first save": (_nothing, [10], True),
    "a save over files of an earlier process": (_three_saves, [40], True),
    "a save into a file's next turn": (_three_saves, [40, 50, 60], True),
    "a save of an iteration that exists": (_three_saves, [40, 40], True),
    "a first save to both tiers": (_three_saves, [40], False),
    "a save to both tiers": (_three_saves, [40, 50], False),
}
"""What earlier processes did, what this one saves, and whether the last of it is local alone."""


def _prepare(base: Path, name: str, **settings: Any) -> tuple[Story, Mark, list[int], bool]:
    earlier, iterations, to_local = SITUATIONS[name]
    story = Story(base, **settings)
    story.is_looking = False
    story.restart()
    earlier(story)
    with story.calls.unseen():
        story.job.close()
    return story, story.mark(), iterations, to_local


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_an_error_at_any_call_costs_one_local_save(name: str, lasts: bool, base: Path) -> None:
    """Whatever call on the node fails however, errno and path are told, and the next save works."""
    _try_everything(*_prepare(base, name), lasts=lasts)


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
def test_an_error_at_any_call_costs_no_promotion(lasts: bool) -> None:
    """The same while the persistent checkpoint is made from the local commit, on its own thread."""
    with place_in_memory() as base:
        settings = {"directory": str(base / "store"), "from_local": True}
        prepared = _prepare(base, "a save to both tiers", async_save=True, persistent=settings)
        _try_everything(*prepared, lasts=lasts)


def _try_everything(
    story: Story, mark: Mark, iterations: list[int], to_local: bool, *, lasts: bool
) -> None:
    number = 1 if lasts and not FULL else 0
    stride = 1 if FULL else 4  # a quarter of the calls, and another one with errors that last
    pairs = 0
    while True:
        for code in ERRNOS if FULL else (ERRNOS[number % 5],):
            failed = _fail_once(story, mark, iterations, number, code, lasts, to_local=to_local)
            if failed is None:
                record("local: errno x call pairs", pairs)
                assert number > 15
                return
            pairs += 1
        number += stride


def _fail_once(
    story: Story,
    mark: Mark,
    iterations: list[int],
    number: int,
    code: int,
    lasts: bool,
    *,
    to_local: bool,
) -> Call | None:
    """Let one call of a save fail, and check what that comes to; None: there are not so many."""
    story.go_back(mark)
    for each in iterations[:-1]:
        story.save(each, to_local=True)
    seen: list[Call] = []

    def fails(call: Call) -> int | None:
        if not call.path.startswith(f"{story.base}/local"):
            return None
        seen.append(call)
        position = len(seen) - 1
        return code if position == number or (lasts and position > number) else None

    error = story.fail_to_save(iterations[-1], fails, to_local=to_local)
    if len(seen) <= number:
        return None
    where = f"{errno.errorcode[code]} at call {number}: {seen[number]}"
    if error is not None:
        assert to_local, f"a local failure cost a persistent save: {where}: {error}"
        failure = error.failures[0]
        assert failure.errno == code, f"{where}: {error}"
        assert failure.path is not None, f"{where}: {error}"
        assert failure.path.startswith("/"), f"{where}: {error}"
    left = Left(where, tree_of(story.base), story.known, is_killed=False)
    if to_local:
        check_at_rest(story, left)
        if error is None:
            assert story.known.outcomes[-1] == state_of(story.job), where
    story.take_stock(is_sure=to_local)
    story.save(99, to_local=True)
    with story.calls.unseen():
        story.job.close()
    assert to_local or len(commits_in(story, tree_of(story.base))) == KEEP, where
    after = Left(f"the save after {where}", tree_of(story.base), story.known, is_killed=False)
    check(story, after, thoroughly=FULL or number % 10 == 0)
    return seen[number]


def test_short_writes_are_continued(base: Path) -> None:
    """A disk that takes half of what it is given each time ends up with all of it."""
    story, mark, iterations, _ = _prepare(base, "a save over files of an earlier process")
    story.go_back(mark)
    story.calls.shortens = lambda call: True
    story.save(iterations[-1], to_local=True)
    story.calls.shortens = lambda call: False
    with story.calls.unseen():
        story.job.close()
    check(story, Left("the end", tree_of(base), story.known, is_killed=False))


def test_an_error_at_any_call_of_a_load_is_told_or_costs_one_commit(base: Path) -> None:
    """Never a wrong value, never a fresh start; what is passed over has a reason."""
    _, mark, _, _ = _prepare(base, "a save over files of an earlier process")
    sound = {*mark.local, *mark.persisted}
    newest = mark.local[-1]
    number, told, older = 0, 0, 0
    while True:
        plant(base, mark.tree)
        calls, seen = KernelCalls(base / "local"), 0
        code = ERRNOS[number % len(ERRNOS)]

        def fails(call: Call, number: int = number, code: int = code) -> None:
            nonlocal seen
            seen += 1
            refuse_with(code if seen == number + 1 else None, call)

        calls.before = fails
        job = start(base)
        before = state_of(job)
        with calls.watching():
            try:
                result = job.load()
            except CheckpointError as error:
                assert errno.errorcode[code] in str(error), error  # noqa: PT017  # most do not fail
                assert state_of(job) == before
                told += 1
            else:
                assert result.found
                found = state_of(job)
                assert found in sound
                older += found != newest
                assert found == newest or result.skipped
        job.close()
        if seen <= number:
            break
        fresh = start(base)
        assert load(fresh) == newest
        fresh.close()
        number += 1
    record("local: errno x call pairs", number)
    assert told > 0
    assert older > 0


# -- a file system that is really full -------------------------------------------------------------


@pytest.fixture
def small_place(tmp_path: Path) -> Iterator[Path]:
    """A place in RAM for a few commits, where the machine lets us mount one."""
    with small_memory(tmp_path / "small", "2m") as place:
        yield place


def _fill(ballast: Path) -> None:
    """Leave no byte in a file system."""
    with suppress(OSError), ballast.open("ab", buffering=0) as stream:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    stream.write(bytes(size))


def test_memory_that_is_really_full_from_any_call_on(small_place: Path) -> None:
    """However full it is, no signal comes: the save fails with ENOSPC, or it holds all of it."""
    ballast = small_place / "ballast"
    number, successes = 0, 0
    while True:
        job = start(small_place)
        older = load(job)
        saves = [train_to(job, job.step + 1)]
        job.save(to_local=True)
        coming = train_to(job, job.step + 1)
        calls, seen = KernelCalls(small_place / "local"), 0

        def fills(_: Call, number: int = number) -> None:
            nonlocal seen
            seen += 1
            if seen == number + 1:
                _fill(ballast)

        calls.before = fills
        expected: tuple[int, str] = coming
        with calls.watching():
            try:
                job.save(to_local=True)
                successes += 1
            except SaveFailedError as error:
                _check_says_full(error, small_place)
                expected = saves[-1]
        _expect_newest(small_place, expected)
        if seen > number:
            expected = _save_while_full(small_place, job, expected)
            _expect_newest(small_place, expected)
        ballast.unlink(missing_ok=True)
        if seen <= number:
            break
        again = train_to(job, job.step + 1)
        job.save(to_local=True)
        job.close()
        _expect_newest(small_place, again)
        assert older is None or older[0] < again[0]
        number += 1
    job.close()
    record("local: errno x call pairs", number)
    assert successes > 1


def _save_while_full(base: Path, job: Job, before: tuple[int, str]) -> tuple[int, str]:
    """Save once more; return what is the newest then. What was allocated must not be a promise."""
    coming = train_to(job, job.step + 1)
    try:
        job.save(to_local=True)
    except SaveFailedError as error:
        _check_says_full(error, base)
        return before
    return coming


def _check_says_full(error: SaveFailedError, base: Path) -> None:
    failure = error.failures[0]
    assert failure.errno == errno.ENOSPC, error
    assert str(failure.path).startswith(str(base)), error


def _expect_newest(base: Path, expected: tuple[int, str]) -> None:
    """Look at what there is without disturbing the job that uses it."""
    copy = base.parent / "copy"
    tree = tree_of(base)
    plant(copy, {name: content for name, content in tree.items() if name != "ballast"})
    job: Job = start(copy)
    found = load(job)
    job.close()
    assert found == expected
    assert os.path.isdir(copy)
