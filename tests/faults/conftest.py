"""Where local checkpoints lie in a fault test, and the table at the end for people and programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.places import PLACES, Place
from tests.faults.report import counts, record, table


@pytest.fixture(params=["memory", "disk"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A place in RAM, where the arena is the file, or on a disk, where it is written."""
    from tests.faults.local_stories import place_in_memory, place_on_disk

    if request.param == "memory":
        with place_in_memory() as place:
            yield place
    else:
        with place_on_disk(tmp_path) as place:
            yield place


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A run's directory, for a claim that is tried on each tier wherever it can lie."""
    with request.param(tmp_path) as made:
        yield made


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what this process has tried to the one that prints the table."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what a process of this session has tried; one that has died can no longer say."""
    for name, count in getattr(node, "workeroutput", {}).get("faults", {}).items():
        record(name, count)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print what was tried, and keep it as JSON under .pytest_cache/v/holdfast/faults."""
    if not any(counts().values()):
        return
    failed = [
        each
        for outcome in ("failed", "error")
        for each in terminalreporter.stats.get(outcome, [])
        if each.nodeid.startswith("tests/faults/")
    ]
    terminalreporter.section("faults")
    for line in table(len(failed)):
        terminalreporter.write_line(line)
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    if cache is not None:
        cache.set("holdfast/faults", {**counts(), "violations": len(failed)})
