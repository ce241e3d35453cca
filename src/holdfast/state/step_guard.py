"""What an optimizer step waits for: the copy of the tensors that it is about to change.

Owns the hooks on optimizers. Promises that no step of a watched optimizer changes a tensor before
the copy in hand has been held, whatever became of it, and that an optimizer is hooked once. Knows
nothing of copies: it is given what to call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer


class StepGuard:
    """Holds up the steps of every optimizer that it was shown."""

    def __init__(self) -> None:
        self._hold: Callable[[], None] | None = None
        self._hooked: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()

    def watch(self, optimizers: Sequence[Optimizer], hold: Callable[[], None]) -> None:
        """Let the next step of each optimizer call `hold` first, and any later step not wait."""
        self._hold = hold
        for each in optimizers:
            if each not in self._hooked:
                self._hooked[each] = each.register_step_pre_hook(self._before_step)

    def settle(self) -> None:
        """Run the pending wait; no-op without a pending copy.

        It stays pending until it has returned: one that was interrupted is waited for again.
        """
        hold = self._hold
        if hold is not None:
            hold()
            self._hold = None

    def leave(self) -> None:
        """Take every hook off again."""
        self.settle()
        for handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()

    def _before_step(self, *_: Any) -> None:
        self.settle()
