"""Events and the callback manager that delivers them."""

from __future__ import annotations

import pytest

from holdfast.events import (
    EVENT_NAMES,
    ON_CHECKPOINT_SAVE,
    ON_CHECKPOINT_STAGED,
    CallbackManager,
    CheckpointEvent,
)


def test_callbacks_are_called_in_order_of_registration() -> None:
    """Each callback of an event gets the very context; those of other events get nothing."""
    manager, calls = CallbackManager(), []
    manager.register(ON_CHECKPOINT_SAVE, lambda context: calls.append(("first", context)))
    manager.register(ON_CHECKPOINT_SAVE, lambda context: calls.append(("second", context)))
    manager.register(ON_CHECKPOINT_STAGED, lambda context: calls.append(("other", context)))
    event = CheckpointEvent(iteration=5, tier="persistent")
    manager.fire(ON_CHECKPOINT_SAVE, event)
    assert calls == [("first", event), ("second", event)]
    assert calls[0][1] is event


def test_a_callback_error_reaches_the_caller() -> None:
    """An exception in a callback is not swallowed."""
    manager = CallbackManager()
    manager.register(ON_CHECKPOINT_SAVE, lambda context: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        manager.fire(ON_CHECKPOINT_SAVE, None)


def test_an_event_without_callbacks_is_silent() -> None:
    """Firing what nobody registered for does nothing, even for a name that is not known."""
    for name in (*EVENT_NAMES, "on_something_of_the_loop"):
        CallbackManager().fire(name, None)


def test_a_misspelt_event_is_refused() -> None:
    """A name that would never fire is an error that lists the known ones."""
    with pytest.raises(ValueError, match="unknown event 'on_save'; known are on_checkpoint_staged"):
        CallbackManager().register("on_save", print)


def test_an_event_has_what_bridge_callbacks_read() -> None:
    """A callback written for Megatron-Bridge finds its attributes on every event."""
    event = CheckpointEvent(iteration=5, tier="persistent")
    assert (event.state, event.model, event.optimizer, event.scheduler) == (None,) * 4
    event.user_state["seen"] = True
    assert CheckpointEvent(iteration=6, tier="persistent").user_state == {}
