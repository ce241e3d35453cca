"""A process is killed before every kernel call of local saves, or loses power, and nothing is lost.

On RAM what a killed process leaves is looked at before each call; on a disk of the node's own also
what a power cut leaves, for that is what the local tier claims to survive there. A fresh process
must load the newest commit that was acknowledged, or the one under way if that had become visible,
bit for bit; save again in both tiers; and leave nothing behind.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.faults.local_crashes import SCENARIOS, check, states, tell
from tests.faults.local_stories import (
    FULL,
    Story,
    Violation,
    place_in_memory,
    place_on_disk,
)
from tests.faults.report import record
from tests.support.kernel_calls import Call

pytest.importorskip("nvidia_resiliency_ext")

SAMPLES = 32 if FULL else 0


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_at_any_call_loses_nothing_in_memory(name: str) -> None:
    """Where the arena is the file: the old commit or the new one, whole, at every instant."""
    with place_in_memory() as base:
        _try_everything(tell(name, base), name)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_or_a_power_cut_loses_nothing_on_a_disk(name: str, tmp_path: Path) -> None:
    """Where the writer writes the file: whatever was acknowledged is there when power is back."""
    (tmp_path / "base").mkdir()
    with place_on_disk(tmp_path / "base") as base:
        _try_everything(tell(name, base), name)


def _try_everything(story: Story, name: str) -> None:
    broken = []
    count = 0
    chooser = random.Random(name)
    reached: dict[int, int] = {}
    for left in states(story, samples=SAMPLES):
        count += 1
        # Every state is looked at. What a killed process leaves is the hardest to go on from: none
        # of that is left out, and of the rest none that comes from a call of the local tier.
        goes_on = FULL or left.is_killed or "local/" in left.where or chooser.random() < 0.1
        thoroughly = FULL or chooser.random() < (0.15 if story.disk is None else 0.06)
        try:
            found = check(story, left, goes_on=goes_on, thoroughly=thoroughly)
        except Violation as violation:
            broken.append(f"{left.where}: {violation}")
            continue
        if left.is_killed and found is not None:
            chapter = id(left.known)
            if found < reached.get(chapter, 0):
                broken.append(f"{left.where}: the newer state was there before, and is gone")
            reached[chapter] = found
    record("local: crash states tried", count)
    assert count > 2
    assert broken == []


@pytest.mark.parametrize("name", ["both_tiers", "after_a_restart"])
def test_a_kill_while_a_local_commit_is_promoted_loses_nothing(name: str) -> None:
    """The writer commits locally, another thread makes the persistent checkpoint from that."""
    with place_in_memory() as base:
        persistent = {"directory": str(base / "store"), "from_local": True}
        _try_everything(tell(name, base, async_save=True, persistent=persistent), name)


def test_the_model_of_the_disk_holds_what_the_disk_holds(tmp_path: Path) -> None:
    """Every call was seen: what is computed from the calls is what is really there."""
    (tmp_path / "base").mkdir()
    with place_on_disk(tmp_path / "base") as base:
        story = tell("after_a_restart", base)
        assert story.disk is not None
        for instant in story.instants:
            assert instant.image is not None
            assert story.disk.tree(instant.image) == instant.tree, instant.where


# -- every sync is needed --------------------------------------------------------------------------


def _site(call: Call, base: Path) -> str:
    """Leave out of a sync's path what differs from save to save and from run to run."""
    path = call.path.removeprefix(str(base))
    path = re.sub(r"-[0-9a-f]{8}$", "-", path)
    path = re.sub(r"/[0-9a-f]{16}(/|$)", r"/RUN\1", path)
    return f"{call.kind} {re.sub(r'iter_[0-9]+', 'iter_N', path)}"


LOCAL_SYNCS = {
    "sync_directory ": "the directory of the tier has its name",
    "sync_directory /local": "the directory of the run has its name",
    "sync_directory /local/RUN": "the directory of the rank has its name",
    "sync_file /local/RUN/0/iter_N_0_local.pt.pending-": "the shard has its bytes",
    "sync_directory /local/RUN/0": "the shard has its name",
}
"""What is lost without each of them."""


@pytest.mark.parametrize("site", LOCAL_SYNCS, ids=LOCAL_SYNCS.get)
def test_without_any_one_sync_an_acknowledged_commit_is_lost(site: str, tmp_path: Path) -> None:
    """On a disk: some power cut then breaks a promise, which is how we know that each is needed."""
    (tmp_path / "base").mkdir()
    with place_on_disk(tmp_path / "base") as base:
        story = Story(base)
        assert story.disk is not None
        ignored = []

        def ignores(call: Call) -> bool:
            if _site(call, base) == site:
                ignored.append(call)
            return _site(call, base) == site

        story.disk.ignores = ignores
        story.restart()
        for iteration in (10, 20, 30):
            story.save(iteration, to_local=True)
        with story.calls.unseen():
            story.job.close()
        assert ignored
        violation, count = None, 0
        for left in states(story):
            count += 1
            try:
                check(story, left, thoroughly=False)
            except Violation as found:
                violation = found
                break
        record("local: crash states tried", count)
        assert violation is not None
    record("local: syncs proven needed")


def test_these_are_all_syncs_of_the_local_tier(tmp_path: Path) -> None:
    """None is left out above."""
    (tmp_path / "base").mkdir()
    with place_on_disk(tmp_path / "base") as base:
        story = Story(base)
        story.restart()
        seen: set[str] = set()
        story.calls.before = lambda call: seen.add(_site(call, base))
        for iteration in (10, 20, 30):
            story.save(iteration, to_local=True)
        with story.calls.unseen():
            story.job.close()
    found = {each for each in seen if each.startswith("sync_") and "/store" not in each}
    assert found == set(LOCAL_SYNCS)
