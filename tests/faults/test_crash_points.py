"""A save is cut off before every step, in either tier, and what is left keeps the promises.

A process is killed before every step; where the tier claims to survive it, power is cut as well. A
fresh process must load the newest commit that was acknowledged, or the one under way if that had
become visible, bit for bit; save again; and leave nothing behind. The local tier runs in RAM, where
the arena is the file, and on a disk of the node's own, where its syncs count.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.faults import crashes, local_crashes
from tests.faults.local_stories import place_on_disk
from tests.faults.report import record
from tests.faults.tiers import FULL, NEEDS_LOCAL, CrashedTier, Violation, cases
from tests.support.crash_filesystem import CrashFilesystem, PowerCut

SAMPLES = 32 if FULL else 0
TIERS = [crashes.PERSISTENT, crashes.WITHOUT_LINKS, local_crashes.IN_MEMORY, local_crashes.ON_DISK,
         local_crashes.PROMOTED]  # fmt: skip


@pytest.mark.parametrize(("tier", "name"), cases(TIERS))
def test_every_crash_keeps_the_promises(tier: CrashedTier, name: str, tmp_path: Path) -> None:
    """Whatever is lost before whichever step, nothing acknowledged is lost and the run goes on."""
    broken = []
    count = 0
    chooser = random.Random(name)
    reached: dict[int, int] = {}
    with tier.tell(name, tmp_path) as story:
        for left in tier.states(story, samples=SAMPLES):
            count += 1
            try:
                found = tier.check(story, left, chooser)
            except Violation as violation:
                broken.append(f"{left.where}: {violation}")
                continue
            if left.is_killed and found is not None:
                chapter = id(left.known)
                if found < reached.get(chapter, 0):
                    broken.append(f"{left.where}: the newer state was there before, and is gone")
                reached[chapter] = found
    record(f"{tier.label}crash states tried", count)
    assert count > 2
    assert broken == []


@pytest.mark.parametrize(
    "name", [name for name in crashes.SCENARIOS if not name.startswith(("killed", "failed"))]
)
def test_nothing_tidies_up_after_a_power_cut(name: str) -> None:
    """A cut leaves what was there before the step: images taken in passing stand for real cuts."""
    story = crashes.tell(name)
    total = len(story.filesystem.operations)
    everything = range(story.first_operation, total)
    numbers = everything if FULL else random.Random(0).sample(everything, 8)
    for number in numbers:
        filesystem = CrashFilesystem()
        filesystem.cuts = lambda _, filesystem=filesystem, number=number: (  # type: ignore[misc]
            len(filesystem.operations) == number
        )
        with pytest.raises(PowerCut):
            crashes.tell(name, filesystem=filesystem)
        assert len(filesystem.operations) == number
        assert _names(filesystem.image.tree()) == _names(story.filesystem.images[number].tree())
        with pytest.raises(PowerCut):
            filesystem.list_directory(Path("/"))


def _names(tree: dict[str, bytes | str | None]) -> set[str]:
    return {re.sub(r"-[0-9a-f]{8}", "-", path) for path in tree}


@NEEDS_LOCAL
def test_the_model_of_the_disk_holds_what_the_disk_holds(tmp_path: Path) -> None:
    """Every call was seen: what is computed from the calls is what is really there."""
    with place_on_disk(tmp_path) as base:
        story = local_crashes.tell("after_a_restart", base)
        assert story.disk is not None
        for instant in story.instants:
            assert instant.image is not None
            assert story.disk.tree(instant.image) == instant.tree, instant.where
