"""Checkpoint events as values, and the callbacks that receive them.

Owns the event values and the small callback manager that delivers them. The manager accepts any
object with the same `fire(name, context)`, such as that of Megatron-Bridge, which is given
`on_checkpoint_save` only. Promises that `on_checkpoint_save` is fired on every rank at the same
step and only after the commit is durable. Knows nothing about how checkpoints are made. Importing
this module does not import torch.

A new event needs a name in `EVENT_NAMES` and a call that fires it. `manager` fires
`on_checkpoint_staged`, and `Flight` in `ranks.job` the two outcomes of a save, both through
`Save.fire`; `Alarm` in `policies.guards` fires `on_checkpoint_overdue`.
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
"""The save failed; earlier checkpoints are intact. Context: `CheckpointEvent` with `error`."""
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
    """One event of a save.

    Has the attributes that callbacks written for Megatron-Bridge read (`state`, `model`,
    `optimizer`, `scheduler`, `user_state`) beside the fields of the save itself: `state` is live
    and may be steps ahead, `iteration` is the one that was saved.
    """

    iteration: int
    tier: str
    """`persistent` or `local`."""
    path: str | None = None
    """The committed directory; None before the commit."""
    size_bytes: int = 0
    """Total size of the checkpoint's files, over all ranks."""
    stall_seconds: float = 0.0
    """How long `save` blocked the training thread."""
    total_seconds: float = 0.0
    """From the call of `save` to this event."""
    removed_iterations: tuple[int, ...] = ()
    """Iterations that retention removed after this commit."""
    error: BaseException | None = None
    state: Any = None
    model: Any = None
    optimizer: Any = None
    scheduler: Any = None
    user_state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OverdueEvent:
    """How long nothing was committed to the persistent tier, and the likely reason."""

    seconds: float
    """Since the last durable commit, or since the load."""
    limit_seconds: float
    """The limit: `alarm_after_seconds`, or three measured save intervals."""
    iteration: int | None
    """Iteration of that commit; None: none is known since the load."""
    reason: str
    """One line: the last failure, the save in flight, or that no persistent save was requested."""
    last_failure: BaseException | None = None
    """The latest failure of a persistent save since that commit."""


def _check_callable(callback: Any) -> None:
    if not callable(callback):
        found = f"is of type {type(callback).__name__}"
        raise WrongArgumentError("register", "callback", found, "Pass a function of one event.")


class CallbackManager:
    """Call functions at named events, in the order in which they were registered."""

    def __init__(self) -> None:
        self._callbacks: dict[str, list[Callable[[Any], None]]] = {}

    def register(self, event_name: str, callback: Callable[[Any], None]) -> None:
        """Call `callback(context)` at every event of this name (see `EVENT_NAMES`).

        Raises:
            ValueError: the name is not one of `EVENT_NAMES`.
            WrongArgumentError: the callback is not callable.
        """
        if event_name not in EVENT_NAMES:
            raise ValueError(f"unknown event {event_name!r}; known are {', '.join(EVENT_NAMES)}")
        _check_callable(callback)
        self._callbacks.setdefault(event_name, []).append(callback)

    def fire(self, event_name: str, context: Any) -> None:
        """Call every callback of this event; an exception propagates to the caller."""
        for callback in self._callbacks.get(event_name, ()):
            callback(context)
