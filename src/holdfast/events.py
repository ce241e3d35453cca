"""What happened to checkpoints, as values, and who is told.

Owns the event values and the small callback manager that delivers them; the manager accepts any
object with the same `fire(name, context)`, Megatron-Bridge's among them. Promises that an event
named `on_checkpoint_save` is fired on every rank at the same step and only after the commit is
durable. Knows nothing about how checkpoints are made. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import WrongArgumentError

ON_CHECKPOINT_STAGED = "on_checkpoint_staged"
"""The snapshot is taken: training may change every tensor. Context: `CheckpointEvent`."""
ON_CHECKPOINT_SAVE = "on_checkpoint_save"
"""The checkpoint is committed: complete, durable and visible. Context: `CheckpointEvent`."""
ON_CHECKPOINT_SAVE_FAILED = "on_checkpoint_save_failed"
"""The save was given up; earlier checkpoints stand. Context: `CheckpointEvent` with `error`."""
ON_CHECKPOINT_OVERDUE = "on_checkpoint_overdue"
"""No durable commit for too long; fired on rank 0 alone, at each warning. Context: `OverdueEvent`.
"""
EVENT_NAMES = (
    ON_CHECKPOINT_STAGED,
    ON_CHECKPOINT_SAVE,
    ON_CHECKPOINT_SAVE_FAILED,
    ON_CHECKPOINT_OVERDUE,
)


@dataclass
class CheckpointEvent:
    """One thing that happened in the life of a save.

    Carries the attributes that callbacks written for Megatron-Bridge read (`state`, `model`,
    `optimizer`, `scheduler`, `user_state`) beside the facts of the save itself: `state` is live and
    may be steps ahead, `iteration` is the one that was saved.
    """

    iteration: int
    tier: str
    """`persistent` or `local`."""
    path: str | None = None
    """The committed directory; None while there is none."""
    size_bytes: int = 0
    """Of all files of the checkpoint, over all ranks."""
    stall_seconds: float = 0.0
    """How long `save` kept the training thread."""
    total_seconds: float = 0.0
    """From the call of `save` to this event."""
    removed_iterations: tuple[int, ...] = ()
    """What retention removed after this commit."""
    error: BaseException | None = None
    state: Any = None
    model: Any = None
    optimizer: Any = None
    scheduler: Any = None
    user_state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OverdueEvent:
    """How long nothing was committed to the persistent tier, and what seems to be the reason."""

    seconds: float
    """Since the last durable commit, or since the load."""
    limit_seconds: float
    """What it may be: `alarm_after_seconds`, or three save intervals as measured."""
    iteration: int | None
    """Of that commit; None: none is known since the load."""
    reason: str
    """One line: the last failure, the save in flight, or that nobody asks for such saves."""
    last_failure: BaseException | None = None
    """Of a persistent save since that commit."""


def _check_callable(callback: Any) -> None:
    if not callable(callback):
        found = f"is of type {type(callback).__name__}"
        raise WrongArgumentError("register", "callback", found, "Pass a function of one event.")


class CallbackManager:
    """Call functions when named things happen, in the order in which they were registered."""

    def __init__(self) -> None:
        self._callbacks: dict[str, list[Callable[[Any], None]]] = {}

    def register(self, event_name: str, callback: Callable[[Any], None]) -> None:
        """Call `callback(context)` at every event of this name (see `EVENT_NAMES`).

        Raises:
            ValueError: the name is not one of `EVENT_NAMES`.
            WrongArgumentError: the callback cannot be called.
        """
        if event_name not in EVENT_NAMES:
            raise ValueError(f"unknown event {event_name!r}; known are {', '.join(EVENT_NAMES)}")
        _check_callable(callback)
        self._callbacks.setdefault(event_name, []).append(callback)

    def fire(self, event_name: str, context: Any) -> None:
        """Call everything registered under this name; an exception reaches the caller."""
        for callback in self._callbacks.get(event_name, ()):
            callback(context)
