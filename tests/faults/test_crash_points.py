"""Power is cut before every step of a save, and what is left keeps the promises."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.faults.crashes import (
    FULL,
    SCENARIOS,
    Violation,
    check,
    states,
    tell,
)
from tests.faults.report import record
from tests.support.crash_filesystem import (
    CrashFilesystem,
    PowerCut,
    all_bytes,
    synced_bytes,
)

SAMPLES = 32 if FULL else 0


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_crash_keeps_the_promises(name: str) -> None:
    """Whatever is lost before whichever step, nothing acknowledged is lost and the run goes on."""
    _try_everything(name, has_hard_links=True)


@pytest.mark.parametrize("name", ["first_save", "first_save_after_resume"])
def test_every_crash_keeps_the_promises_without_hard_links(name: str) -> None:
    """The same on a file system that cannot link."""
    _try_everything(name, has_hard_links=False)


def _try_everything(name: str, *, has_hard_links: bool) -> None:
    story = tell(name, has_hard_links=has_hard_links)
    broken = []
    count = 0
    chooser = random.Random(name)
    for where, after, known in states(story, samples=SAMPLES):
        count += 1
        # What a killed process leaves is the hardest to go on from: none of that is left out.
        goes_on = FULL or after.loss == "process killed" or chooser.random() < 0.2
        try:
            check(story, after.image, known, goes_on=goes_on)
        except Violation as violation:
            broken.append(f"{where}: {violation}")
    record("crash states tried", count)
    assert count > 10
    assert broken == []


@pytest.mark.parametrize(
    "name", [name for name in SCENARIOS if not name.startswith(("killed", "failed"))]
)
def test_nothing_tidies_up_after_a_power_cut(name: str) -> None:
    """A cut leaves what was there before the step: images taken in passing stand for real cuts."""
    story = tell(name)
    total = len(story.filesystem.operations)
    everything = range(story.first_operation, total)
    numbers = everything if FULL else random.Random(0).sample(everything, 8)
    for number in numbers:
        filesystem = CrashFilesystem()
        filesystem.cuts = lambda _, filesystem=filesystem, number=number: (  # type: ignore[misc]
            len(filesystem.operations) == number
        )
        with pytest.raises(PowerCut):
            tell(name, filesystem=filesystem)
        assert len(filesystem.operations) == number
        assert _shape(filesystem) == _names(story.filesystem.images[number].tree())
        with pytest.raises(PowerCut):
            filesystem.list_directory(Path("/"))


def _shape(filesystem: CrashFilesystem) -> set[str]:
    return _names(filesystem.image.tree())


def _names(tree: dict[str, bytes | str | None]) -> set[str]:
    return {re.sub(r"-[0-9a-f]{8}", "-", path) for path in tree}


# -- the model itself ----------------------------------------------------------------------------


def _write(filesystem: CrashFilesystem, path: str, content: bytes) -> None:
    with filesystem.open_new(Path(path)) as stream:
        stream.write(content)


def _left(filesystem: CrashFilesystem) -> dict[str, bytes | str | None]:
    return filesystem.image.after_power_loss((), synced_bytes).tree()


def test_a_synced_file_has_no_durable_name() -> None:
    """Syncing a file keeps its bytes; its name, and the name above, need syncs of their own."""
    filesystem = CrashFilesystem()
    filesystem.make_directory(Path("/a"))
    _write(filesystem, "/a/x", b"bytes")
    filesystem.sync_file(Path("/a/x"))
    assert _left(filesystem) == {}
    filesystem.sync_directory(Path("/a"))
    assert _left(filesystem) == {}
    filesystem.sync_directory(Path("/"))
    assert _left(filesystem) == {"/a": None, "/a/x": b"bytes"}


def test_a_synced_name_has_no_durable_bytes() -> None:
    """Syncing a directory keeps the name of a file, empty."""
    filesystem = CrashFilesystem()
    _write(filesystem, "/x", b"bytes")
    filesystem.sync_directory(Path("/"))
    assert _left(filesystem) == {"/x": b""}


def test_a_rename_happens_in_full_or_not_at_all() -> None:
    """Every subset of un-synced changes has the old name or the new, and the name it took over."""
    filesystem = CrashFilesystem()
    for name in ("/x", "/y"):
        _write(filesystem, name, name.encode())
        filesystem.sync_file(Path(name))
    filesystem.sync_directory(Path("/"))
    filesystem.rename(Path("/x"), Path("/y"))
    image = filesystem.image
    assert image.after_power_loss((), all_bytes).tree() == {"/x": b"/x", "/y": b"/y"}
    assert image.after_power_loss(image.unsynced, all_bytes).tree() == {"/y": b"/x"}


def test_later_changes_may_outlive_earlier_ones() -> None:
    """Nothing un-synced comes before anything else: the second rename may be all that happened."""
    filesystem = CrashFilesystem()
    for name in ("/old", "/new"):
        filesystem.make_directory(Path(name))
    filesystem.sync_directory(Path("/"))
    filesystem.rename(Path("/old"), Path("/aside"))
    filesystem.rename(Path("/new"), Path("/old"))
    image = filesystem.image
    left = image.after_power_loss(image.unsynced[1:], all_bytes)
    assert left.tree() == {"/old": None}
