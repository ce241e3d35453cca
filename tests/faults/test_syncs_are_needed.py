"""Each sync is needed: without any one of them, some crash breaks a promise."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from tests.faults.crashes import SCENARIOS, Violation, check, states, tell
from tests.faults.report import record
from tests.support.crash_filesystem import SYNC_KINDS, CrashFilesystem, Operation

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
            for where, after, known in states(story):
                count += 1
                try:
                    check(story, after.image, known, goes_on=goes_on)
                except Violation as violation:
                    record("crash states tried", count)
                    return f"{name}: {where}: {violation}"
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
