"""The table at the end of the fault tests, for people and, in pytest's cache, for programs."""

from __future__ import annotations

import pytest

from tests.faults.report import counts, table


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
