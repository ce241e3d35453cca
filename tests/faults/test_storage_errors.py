"""Storage that refuses a step of a save costs that save and nothing else."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path

import pytest

from holdfast.errors import SaveFailedError
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store
from tests.faults.crashes import ROOT, Story, check, check_is_tidy, start
from tests.faults.jobs import Job, state_of, train_to
from tests.faults.report import record
from tests.faults.tiers import FULL, Left
from tests.support.crash_filesystem import CrashFilesystem, Image, Operation
from tests.support.mounts import small_memory
from tests.support.stores import find

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)
MUST_FAIL = frozenset({"open_new", "write", "close", "sync_file"})
"""Steps without which there is no checkpoint; others may be those of sweeping and retention."""


def _empty(story: Story) -> int:
    return 10


def _resumed(story: Story) -> int:
    for iteration in (10, 20, 30):
        story.save(iteration)
    return 40


def _again(story: Story) -> int:
    _resumed(story)
    return 30


SITUATIONS: dict[str, Callable[[Story], int]] = {
    "a first save": _empty,
    "a save that removes another": _resumed,
    "a save of an iteration that exists": _again,
}
"""What goes before, and the iteration that is then saved by a new process."""


def _prepare(name: str) -> tuple[Story, int]:
    story = Story(CrashFilesystem())
    iteration = SITUATIONS[name](story)
    return story, iteration


def _open(prepared: Story, image: Image) -> Story:
    story = prepared.fork(CrashFilesystem(image))
    if story.known.required:
        story.load(30)
    return story


def _save_under(story: Story, iteration: int) -> SaveFailedError | None:
    """Save, and return how that failed; None: it did not."""
    try:
        story.save(iteration)
    except SaveFailedError as error:
        return error
    return None


def _check(story: Story, *, goes_on: bool) -> None:
    left = Left("what is there now", story.filesystem.image, story.known, is_killed=True)
    check(story, left, goes_on=goes_on)


def _check_then_save(story: Story, *, goes_on: bool) -> None:
    """Check what a failed save has left, and that the same process saves again."""
    _check(story, goes_on=goes_on)
    story.save(50)
    _check(story, goes_on=goes_on)
    check_is_tidy(story.filesystem.image)


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_an_error_at_any_step_costs_one_save(name: str, lasts: bool) -> None:
    """Whatever step fails however, errno and path are told, and the next save works."""
    prepared, iteration = _prepare(name)
    image = prepared.filesystem.image
    number, pairs = 0, 0
    while True:
        for code in ERRNOS if FULL else (ERRNOS[(number + lasts) % len(ERRNOS)],):
            story = _open(prepared, image)
            operations = story.filesystem.operations
            failing = len(operations) + number

            def fails(
                _: Operation,
                operations: list[Operation] = operations,
                failing: int = failing,
                code: int = code,
            ) -> int | None:
                position = len(operations) - 1
                return code if position == failing or (lasts and position > failing) else None

            story.filesystem.fails = fails
            error = _save_under(story, iteration)
            if len(operations) <= failing:
                record("errno x operation pairs", pairs)
                assert number > 80
                return
            step = operations[failing]
            story.filesystem.fails = lambda operation: None
            where = f"{errno.errorcode[code]} at step {number}: {step}"
            if error is None:
                assert step.kind not in MUST_FAIL, where
            else:
                failure = error.failures[0]
                assert failure.errno == code, f"{where}: {error}"
                assert failure.path is not None, f"{where}: {error}"
                assert failure.path.startswith("/"), f"{where}: {error}"
            if step.kind == "sync_file":
                later = [each for each in operations[failing + 1 :] if each.kind == "sync_file"]
                assert step.path not in {each.path for each in later}, where
            _check_then_save(story, goes_on=FULL or number % 8 == 0)
            pairs += 1
        number += 1


def test_short_writes_are_continued() -> None:
    """A disk that takes half of what it is given each time ends up with all of it."""
    prepared, iteration = _prepare("a save that removes another")
    story = _open(prepared, prepared.filesystem.image)
    story.filesystem.shortens = lambda operation: True
    story.save(iteration)
    _check_then_save(story, goes_on=True)
    writes = [each for each in story.filesystem.operations if each.kind == "write"]
    record("errno x operation pairs", len(writes))


def test_a_short_write_before_a_full_disk_is_an_error() -> None:
    """A write that is taken in part, and then not at all, fails the save wherever it happens."""
    prepared, iteration = _prepare("a save that removes another")
    image = prepared.filesystem.image
    number = 0
    while True:
        story = _open(prepared, image)
        seen: list[Operation] = []

        def counts(operation: Operation, seen: list[Operation] = seen) -> bool:
            seen.append(operation)
            return True

        story.filesystem.shortens = lambda operation, seen=seen, number=number: (  # type: ignore[misc]
            counts(operation, seen) and len(seen) == number + 1
        )
        story.filesystem.fails = lambda operation, seen=seen, number=number: (  # type: ignore[misc]
            errno.ENOSPC if operation.kind == "write" and len(seen) == number + 1 else None
        )
        error = _save_under(story, iteration)
        if len(seen) <= number:
            break
        story.filesystem.fails = lambda operation: None
        story.filesystem.shortens = lambda operation: False
        if error is not None:
            assert error.failures[0].errno == errno.ENOSPC
        _check_then_save(story, goes_on=False)
        number += 1
    record("errno x operation pairs", number)
    assert number > 8


def test_warned_failures_are_counted_until_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    """With `warn` the run trains on, the failures in a row are counted, and the limit raises."""
    filesystem = CrashFilesystem()
    job = start(filesystem, on_save_failure="warn", save_failure_limit=3)

    def fill_up() -> None:
        filesystem.fails = lambda operation: errno.ENOSPC if operation.kind == "write" else None

    def save(iteration: int) -> None:
        train_to(job, iteration)
        job.save()

    fill_up()
    with caplog.at_level(logging.WARNING):
        for iteration in (10, 20):
            save(iteration)
    assert [
        each.getMessage().partition("(persistent tier: failure")[2] for each in caplog.records
    ] == [
        " 1 in a row, the run ends at 3)",
        " 2 in a row, the run ends at 3)",
    ]
    filesystem.fails = lambda operation: None
    save(30)
    fill_up()
    for iteration in (40, 50):
        save(iteration)
    with pytest.raises(SaveFailedError, match="ENOSPC"):
        save(60)
    filesystem.fails = lambda operation: None
    save(70)
    listed = [
        each.iteration for each in Store(PosixStorage(ROOT, filesystem)).listing().checkpoints
    ]
    assert listed == [70, 30]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few hundred KiB, where the machine lets us mount one."""
    with small_memory(tmp_path / "small", "512k") as place:
        yield place


def _takes(stream: RawIOBase) -> bool:
    try:
        stream.write(bytes(4096))
    except OSError:
        return False
    return True


def test_a_really_full_disk(small_disk: Path) -> None:
    """On a full disk a save fails with ENOSPC and leaves no trace; with room again it works."""
    root = small_disk / "checkpoints"
    job = Job(root, persistent={"directory": str(root), "keep": {"last": None}})
    iterations, failed = [], None
    ballast = small_disk / "ballast"
    for iteration in range(10, 1000, 10):
        train_to(job, iteration)
        try:
            job.save()
        except SaveFailedError as error:
            failed = error
            break
        iterations.append(iteration)
    assert failed is not None
    assert failed.failures[0].errno == errno.ENOSPC
    assert str(failed.failures[0].path).startswith(str(root))
    listed = [
        each.iteration
        for each in Store(PosixStorage(root, LocalFilesystem())).listing().checkpoints
    ]
    assert listed == iterations[::-1]
    assert not [each for each in os.listdir(root) if ".pending-" in each]
    # Now nothing at all is left to write into.
    with ballast.open("wb", buffering=0) as stream:
        while _takes(stream):
            pass
    with pytest.raises(SaveFailedError, match="ENOSPC"):
        job.save()
    ballast.unlink()
    store = Store(PosixStorage(root, LocalFilesystem()))
    store.remove(find(store, iterations[0]))
    job.save()
    fresh = Job(root, seed=1)
    fresh.load()
    assert state_of(fresh) == state_of(job)
    record("errno x operation pairs", 2)
