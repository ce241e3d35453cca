"""Tests run side by side, except for those that must have the machine to themselves.

Owns two locks that all processes of one test session share. A test that is marked `alone` waits for
the tests that are running and keeps others from starting. Promises that a test which waits is not
overtaken for ever, and that the end of a process, however it comes, gives back what it held.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """The turns that the tests of one process take, beside those of the other processes."""

    def __init__(self, folder: Path) -> None:
        # Record locks: unlike those of flock, a fork of this process does not keep them.
        self._gate = (folder / "gate").open("a+")
        self._road = (folder / "road").open("a+")

    @contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Run what is inside beside other tests or, with `alone`, beside none."""
        # Whoever waits for the road keeps the gate closed: nobody comes past.
        fcntl.lockf(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.lockf(self._road, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.lockf(self._gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.lockf(self._road, fcntl.LOCK_UN)
