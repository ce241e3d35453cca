"""What the checkpoints of one attempt cost.

Owns the record of every save: when it was asked for, how long training waited, and what the manager
reported of it. Promises figures for any manager: the wait is measured from outside, around `save`
and `finalize_async_saves`; size and duration come from events where the manager fires them. Refuses
to decide when to save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from due import LOCAL, PERSISTENT
from holdfast import (
    CallbackManager,
    CheckpointEvent,
    CheckpointManager,
    CheckpointSaveContext,
    GlobalState,
)
from holdfast.events import ON_CHECKPOINT_SAVE, ON_CHECKPOINT_SAVE_FAILED
from holdfast.messages import describe_size


@dataclass
class SaveRecord:
    """One save of this attempt."""

    iteration: int
    tier: str = PERSISTENT
    """Where it was asked to go."""
    outcome: str = "asked for"
    """What is known of it: `asked for`, `committed`, `failed`, `promoting` while it is local and
    on its way to the persistent tier, or `pruned` by retention later."""
    waited_seconds: float = 0.0
    """How long training waited for it."""
    total_seconds: float | None = None
    """From asking to commit; None: the manager fired no event."""
    size_bytes: int | None = None


class MeasuredSaves:
    """Pass calls on to a manager and keep a record of each save."""

    def __init__(self, manager: CheckpointManager, say: Callable[[str], None]) -> None:
        """`say` gets one line when a checkpoint is committed or abandoned."""
        self._manager = manager
        self._say = say
        self._records: dict[int, SaveRecord] = {}
        self._callbacks = CallbackManager()
        self._callbacks.register(ON_CHECKPOINT_SAVE, self._note_commit)
        self._callbacks.register(ON_CHECKPOINT_SAVE_FAILED, self._note_failure)

    @property
    def records(self) -> list[SaveRecord]:
        """All saves so far, oldest first."""
        return list(self._records.values())

    def save(self, context: CheckpointSaveContext) -> None:
        """Save now, as `CheckpointManager.save`."""
        iteration = context.state.train_state.step
        tier = LOCAL if context.non_persistent_ckpt else PERSISTENT
        self._records[iteration] = SaveRecord(iteration, tier)
        with self._measuring():
            self._manager.save(context, self._callbacks)

    def finalize(self, state: GlobalState, last: bool = False) -> None:
        """Let the manager finish what it can; at the last call, everything."""
        with self._measuring():
            self._manager.finalize_async_saves(state, blocking=last, terminate=last)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._records:  # the newest save is the one that is being waited for
            newest = next(reversed(self._records.values()))
            newest.waited_seconds += time.perf_counter() - began

    def _note_commit(self, event: Any) -> None:
        if not isinstance(event, CheckpointEvent):  # a manager made for Megatron-Bridge says less
            for record in self._records.values():
                record.outcome = "committed"
            return
        record = self._record_of(event)
        is_on_its_way = event.tier == LOCAL and record.tier == PERSISTENT
        record.outcome = "promoting" if is_on_its_way else "committed"
        record.total_seconds, record.size_bytes = event.total_seconds, event.size_bytes
        for iteration in event.removed_iterations:
            if iteration in self._records:
                self._records[iteration].outcome = "pruned"
        where = " locally" if event.tier == LOCAL else ""
        self._say(
            f"checkpoint {event.iteration} committed{where}: {describe_size(event.size_bytes)} in "
            f"{event.total_seconds:.2f} s, of which training waited {event.stall_seconds:.3f} s"
        )

    def _note_failure(self, event: Any) -> None:
        if not isinstance(event, CheckpointEvent):
            return
        self._record_of(event).outcome = "failed"
        self._say(f"checkpoint {event.iteration} ({event.tier} tier) FAILED: {event.error}")

    def _record_of(self, event: CheckpointEvent) -> SaveRecord:
        fresh = SaveRecord(event.iteration, event.tier)
        return self._records.setdefault(event.iteration, fresh)
