"""An accidental second start is told at its load, and nothing else is."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from holdfast.filesystem import LocalFilesystem
from holdfast.storage.identity import Attempt, Process, RunIdentity, find_start_mark, this_process
from holdfast.storage.manifest import seal, unseal
from holdfast.storage.posix import PosixStorage
from holdfast.tiers.survey import find_living_attempt
from tests.support.managers import linear, manager_of

HERE = Process("alpha", 100, "boot/5")
NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
ATTEMPT = Attempt(
    3, host="alpha", pid=4711, start_mark="boot/9", claimed_at="2026-01-01T10:00:00+00:00"
)


def _ago(*minutes: float) -> list[datetime]:
    return [NOW - timedelta(minutes=each) for each in minutes]


RUNNING = "attempt 3 (process 4711 on this host, since 2026-01-01T10:00:00+00:00) is still running"
MAY = "attempt 3 (on host beta, since 2026-01-01T10:00:00+00:00) may still be running"
CASES = [
    # the attempt, its commits in minutes ago, the mark of its pid on this host now, what is said
    ("the process lives", ATTEMPT, (90, 60), "boot/9", RUNNING),
    ("it lives and never committed", ATTEMPT, (), "boot/9", RUNNING),
    ("the process is gone", ATTEMPT, (1,), None, None),
    ("its pid is in use again", ATTEMPT, (1,), "boot/77", None),
    ("the host was booted since", ATTEMPT, (1,), "other/9", None),
    ("the system does not say", replace(ATTEMPT, start_mark=None), (1,), None, None),
    ("it is this process", replace(ATTEMPT, pid=100, start_mark="boot/5"), (1,), "boot/5", None),
    ("our pid, before the boot",
     replace(ATTEMPT, pid=100, start_mark="old/5"), (1,), "boot/5", None),
    ("an older claim", Attempt(3), (1,), None, None),
    ("elsewhere, young", replace(ATTEMPT, host="beta"), (50, 20), None, MAY),
    ("elsewhere, as old as an interval", replace(ATTEMPT, host="beta"), (60, 30), None, None),
    ("elsewhere, old", replace(ATTEMPT, host="beta"), (70, 60), None, None),
    ("elsewhere, in any order", replace(ATTEMPT, host="beta"), (20, 50, 110), None, MAY),
    ("elsewhere, one commit, young", replace(ATTEMPT, host="beta"), (50,), None, MAY),
    ("elsewhere, one commit, old", replace(ATTEMPT, host="beta"), (70,), None, None),
    ("elsewhere, no commit", replace(ATTEMPT, host="beta"), (), None, None),
    ("elsewhere, a clock ahead", replace(ATTEMPT, host="beta"), (20, -5), None, MAY),
    ("elsewhere, no time of the claim",
     replace(ATTEMPT, host="beta", claimed_at=None), (20,), None, None),
    ("elsewhere, no sound time of the claim",
     replace(ATTEMPT, host="beta", claimed_at="noon"), (20,), None, None),
    ("elsewhere, a pid that is in use here",
     replace(ATTEMPT, host="beta"), (70, 60), "boot/9", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("attempt", "minutes", "living_mark", "said"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_what_speaks_for_a_living_attempt(
    attempt: Attempt, minutes: tuple[float, ...], living_mark: str | None, said: str | None
) -> None:
    """On this host the process decides; on another one the age of the last checkpoint."""
    found = find_living_attempt(attempt, _ago(*minutes), HERE, living_mark, NOW)
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(said)


_SECOND = """
import sys
from pathlib import Path
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.identity import RunIdentity
from holdfast.storage.posix import PosixStorage
RunIdentity(PosixStorage(Path(sys.argv[1]), LocalFilesystem())).claim_attempt("run", 10, "x")
print("claimed", flush=True)
sys.stdin.readline()
"""


def test_a_second_start_is_told_at_its_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While the process of the newest attempt lives its pid is named; once it is dead, nothing."""
    live = linear()
    live.save(manager_of(tmp_path, run_id="run"), 10)
    with subprocess.Popen(
        [sys.executable, "-c", _SECOND, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        with caplog.at_level(logging.WARNING):
            assert live.load(manager_of(tmp_path)).iteration == 10
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        message = record.getMessage()
        for part in (str(tmp_path), "attempt 2", f"process {other.pid}", "first save of this job"):
            assert part in message
        assert len(message.splitlines()) <= 3
        other.kill()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        live.load(manager_of(tmp_path))
    assert caplog.records == []


def test_a_manager_is_not_warned_of_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a second load of a manager nor a second manager of one process is another start."""
    live, manager = linear(), manager_of(tmp_path)
    live.load(manager)
    live.save(manager, 10)
    with caplog.at_level(logging.WARNING):
        live.load(manager)
        live.load(manager_of(tmp_path))
    assert caplog.records == []
    (attempt,) = RunIdentity(PosixStorage(tmp_path, LocalFilesystem())).attempts()
    assert Process(str(attempt.host), int(attempt.pid or 0), attempt.start_mark) == this_process()
    assert find_start_mark(os.getpid()) == attempt.start_mark


@pytest.mark.parametrize(("hours", "is_said"), [(24, True), (-24, False)])
def test_an_attempt_on_another_host_is_judged_by_its_commits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hours: int, is_said: bool
) -> None:
    """The times are those of the claim and of the manifests of that attempt in the store."""
    live, manager = linear(), manager_of(tmp_path)
    live.load(manager)
    live.save(manager, 10)
    claim = tmp_path / "attempt_0000001.json"
    values = json.loads(unseal(claim.read_bytes(), ""))
    values["host"] = "beta"
    values["claimed_at"] = (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
    claim.write_bytes(seal(json.dumps(values).encode() + b"\n"))
    with caplog.at_level(logging.WARNING):
        live.load(manager_of(tmp_path))
    assert ["attempt 1 (on host beta" in each.getMessage() for each in caplog.records] == [
        True
    ] * is_said
