"""Warn of an accidental second start: the newest attempt at a store may still be running.

Owns how that is judged. On the same host the process is looked up, by its pid and the mark of its
start. On another host only the clock is left: an attempt whose last checkpoint is younger than one
of its save intervals may live. Nothing but this warning depends on a clock, and nothing is refused:
the first save of this job takes the store over, as it always does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from holdfast.errors import CheckpointError
from holdfast.filesystem import Filesystem
from holdfast.identity import Attempt, RunIdentity
from holdfast.processes import Process, find_start_mark, this_process
from holdfast.store import Store

logger = logging.getLogger(__name__)


def warn_of_living_attempt(root: Path, filesystem: Filesystem) -> None:
    """Warn if the newest attempt at a store lives; call it on rank 0, at the load.

    What cannot be read is left to the load, which reports it.
    """
    try:
        reason = _find_in_store(root, filesystem)
    except (CheckpointError, OSError):
        return
    if reason is not None:
        logger.warning(
            "%s: %s.\nThe first save of this job will stop it: an overtaken attempt may not save. "
            "If that is not what you want, stop this job, or give it its own "
            "checkpoint.persistent.directory.",
            root,
            reason,
        )


def _find_in_store(root: Path, filesystem: Filesystem) -> str | None:
    here = this_process()
    attempts = RunIdentity(root, filesystem).attempts()
    if not attempts:
        return None
    attempt = attempts[-1]
    commits: list[datetime] = []
    if attempt.host != here.host:  # only then the manifests are asked
        for each in Store(root, filesystem).listing().checkpoints:
            found = _parse_time(each.manifest.saved_at)
            if each.manifest.attempt == attempt.number and found is not None:
                commits.append(found)
    living_mark = find_start_mark(attempt.pid) if attempt.pid is not None else None
    return find_living_attempt(attempt, commits, here, living_mark, datetime.now(UTC))


def find_living_attempt(
    attempt: Attempt,
    commits: Sequence[datetime],
    here: Process,
    living_mark: str | None,
    now: datetime,
) -> str | None:
    """Say why an attempt seems to be running; None: nothing speaks for it.

    `commits` are the times of its checkpoints, `living_mark` the start mark of the process that has
    its pid on this host now, None if there is none.
    """
    since = f", since {attempt.claimed_at}" if attempt.claimed_at is not None else ""
    if attempt.host is None:
        return None  # the claim is of an older version, or damaged
    if attempt.host == here.host:
        if attempt.start_mark is None or attempt.start_mark != living_mark:
            return None  # it has ended, and its pid may be in use again
        if (attempt.pid, attempt.start_mark) == (here.pid, here.start_mark):
            return None
        return (
            f"attempt {attempt.number} (process {attempt.pid} on this host{since}) is still running"
        )
    times = sorted(commits)
    if not times:
        return None
    start = times[-2] if len(times) > 1 else _parse_time(attempt.claimed_at)
    if start is None:
        return None
    interval, age = times[-1] - start, now - times[-1]
    if age >= interval:
        return None
    return (
        f"attempt {attempt.number} (on host {attempt.host}{since}) may still be running: its last "
        f"checkpoint is {_seconds(age)} s old, and it took {_seconds(interval)} s to that one"
    )


def _parse_time(value: str | None) -> datetime | None:
    """Return a time of a manifest or of a claim; None: it is no time."""
    with suppress(TypeError, ValueError):
        found = datetime.fromisoformat(value or "")
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return None


def _seconds(duration: timedelta) -> int:
    return max(0, round(duration.total_seconds()))  # clocks of two hosts differ
