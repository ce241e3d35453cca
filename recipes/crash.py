"""Dying on purpose, so that resuming can be tried.

Owns when a run kills itself and how: SIGKILL, which nothing can catch or tidy up after. Promises
that the same command works twice: an attempt does not die at a step that an earlier one has passed.
Knows of checkpoints only that a save in flight has a `*.pending-*` directory.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CrashPlan:
    """When this attempt dies."""

    step: int | None
    """None: it does not."""
    during_save_in: Path | None = None
    """The store in which to wait for a save to be under way; None: die at the step itself."""

    def crash_if_due(self, step: int) -> None:
        """Die now, if this is the step."""
        if self.step == step and self.during_save_in is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_save_if_due(self, step: int) -> None:
        """Call before a save: from the planned step on, die once it has written its first bytes."""
        if self.step is None or self.during_save_in is None or step < self.step:
            return
        store = self.during_save_in
        threading.Thread(target=_die_in_save, args=(store,), daemon=True).start()


def plan_crash(
    step: int | None, during_save: bool, store: Path | None, furthest_step: int
) -> CrashPlan:
    """Decide whether this attempt dies, given the furthest step of all earlier ones."""
    if step is None or furthest_step >= step:
        return CrashPlan(None)
    return CrashPlan(step, store if during_save else None)


def _die_in_save(store: Path) -> None:
    while True:
        for pending in store.glob("*.pending-*"):
            for folder, _, names in os.walk(pending):
                if any(_has_bytes(Path(folder, name)) for name in names):
                    os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0002)  # lets the save go on; its first sync takes longer


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False  # renamed in the meantime
