"""Each sync of either tier is needed: without any one of them, some crash breaks a promise."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import local_crashes, local_stories
from tests.faults.crashes import SCENARIOS, check, states, tell
from tests.faults.local_stories import place_on_disk
from tests.faults.report import record
from tests.faults.tiers import NEEDS_LOCAL, Violation
from tests.support.crash_filesystem import SYNC_KINDS, CrashFilesystem, Operation
from tests.support.kernel_calls import Call

logger = logging.getLogger(__name__)

REDUNDANT = {
    "attempt_N.json.pending": "run.json repeats a claim that was torn; both fail only together",
}
"""Syncs that one fault alone does not prove, by the end of their path, and why they stay."""


@dataclass(frozen=True, order=True)
class Site:
    """One place in the code that syncs one kind of path."""

    kind: str
    path: str
    caller: str

    @classmethod
    def of(cls, operation: Operation) -> Site:
        """Leave out of the path what differs from save to save, and of the caller its line."""
        path = re.sub(r"\.pending-[0-9a-f]{8}", ".pending", operation.path)
        path = re.sub(r"(iter_|attempt_|rank_)\d+", r"\1N", path)
        return cls(operation.kind, path, operation.caller)

    def __str__(self) -> str:
        return f"{self.kind} {self.path} by {self.caller}"


def _sites() -> dict[Site, list[str]]:
    """Return every sync of every scenario, and in which scenarios it happens."""
    found: dict[Site, list[str]] = {}
    for name in SCENARIOS:
        story = tell(name)
        for operation in story.filesystem.operations[story.first_operation :]:
            if operation.kind in SYNC_KINDS:
                names = found.setdefault(Site.of(operation), [])
                if name not in names:
                    names.append(name)
    return found


def _first_violation(site: Site, names: list[str]) -> str | None:
    """Tell the scenarios without the syncs of one site; None: no crash breaks a promise."""
    count = 0
    for goes_on in (False, True):  # what needs only a look is tried first
        for name in names:
            filesystem = CrashFilesystem()
            filesystem.ignores = lambda operation: Site.of(operation) == site
            story = tell(name, filesystem=filesystem)
            for left in states(story):
                count += 1
                try:
                    check(story, left, goes_on=goes_on)
                except Violation as violation:
                    record("crash states tried", count)
                    return f"{name}: {left.where}: {violation}"
    record("crash states tried", count)
    return None


def test_each_sync_is_needed() -> None:
    """Leaving out the syncs of any one site lets some crash break a promise."""
    sites = _sites()
    assert len(sites) > 10
    needless = []
    for site, names in sorted(sites.items()):
        if site.path.endswith(tuple(REDUNDANT)):
            continue
        violation = _first_violation(site, names)
        logger.info("%s\n    without it: %s", site, violation)
        if violation is None:
            needless.append(str(site))
    record("syncs proven needed", len(sites) - len(needless))
    assert needless == []


# -- the local tier on a disk -----------------------------------------------------------------


def _local_site(call: Call, base: Path) -> str:
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


@NEEDS_LOCAL
@pytest.mark.parametrize("site", LOCAL_SYNCS, ids=LOCAL_SYNCS.get)
def test_without_any_one_sync_an_acknowledged_commit_is_lost(site: str, tmp_path: Path) -> None:
    """On a disk: some power cut then breaks a promise, which is how we know that each is needed."""
    with place_on_disk(tmp_path) as base:
        story = local_stories.Story(base)
        assert story.disk is not None
        ignored = []

        def ignores(call: Call) -> bool:
            if _local_site(call, base) == site:
                ignored.append(call)
            return _local_site(call, base) == site

        story.disk.ignores = ignores
        story.restart()
        for iteration in (10, 20, 30):
            story.save(iteration, to_local=True)
        with story.calls.unseen():
            story.job.close()
        assert ignored
        violation, count = None, 0
        for left in local_crashes.states(story):
            count += 1
            try:
                local_crashes.check(story, left, thoroughly=False)
            except Violation as found:
                violation = found
                break
        record("local: crash states tried", count)
        assert violation is not None
    record("local: syncs proven needed")


@NEEDS_LOCAL
def test_these_are_all_syncs_of_the_local_tier(tmp_path: Path) -> None:
    """None is left out above."""
    with place_on_disk(tmp_path) as base:
        story = local_stories.Story(base)
        story.restart()
        seen: set[str] = set()
        story.calls.before = lambda call: seen.add(_local_site(call, base))
        for iteration in (10, 20, 30):
            story.save(iteration, to_local=True)
        with story.calls.unseen():
            story.job.close()
    found = {each for each in seen if each.startswith("sync_") and "/store" not in each}
    assert found == set(LOCAL_SYNCS)
