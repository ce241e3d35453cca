"""What the fault tests tried, counted and shown as one table at the end.

Owns the counters and the table. A test that tried something says so with `record`; nothing here
decides whether it went well: violations are the tests that failed.
"""

from __future__ import annotations

from collections import Counter

ROWS = ("crash states tried", "kill points", "byte flips", "errno x operation pairs",
        "rank failures", "local: crash states tried", "local: kill points", "local: byte flips",
        "local: damaged files", "local: errno x call pairs", "local: rank failures")  # fmt: skip
"""Always shown, in this order, with 0 where nothing was tried; other names follow."""

_counts: Counter[str] = Counter()


def record(name: str, count: int = 1) -> None:
    """Add to what was tried under a name, one of `ROWS` or another."""
    _counts[name] += count


def counts() -> dict[str, int]:
    """Return what was tried so far."""
    return dict.fromkeys(ROWS, 0) | dict(_counts)


def table(violations: int) -> list[str]:
    """Return the lines to print."""
    rows = [*counts().items(), ("violations", violations)]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {count:>9,}" for name, count in rows]
