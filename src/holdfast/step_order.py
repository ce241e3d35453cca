"""Refuse a save whose step is below the step that this manager last loaded or saved.

Owns that step. A loop that forgot its counter, or reset it, would otherwise supersede the newest
checkpoints, and retention would then delete them. Saving the same step again is allowed. A failed
save does not raise the step; a load sets it to what was loaded. Knows nothing about files.
"""

from __future__ import annotations

from holdfast.errors import StepRewoundError


class StepOrder:
    """The step that later saves may not fall below, of one manager."""

    def __init__(self, *, allow_rewind: bool) -> None:
        self._allow_rewind = allow_rewind
        self._reached: int | None = None
        self._origin = ""

    def note_load(self, iteration: int | None) -> None:
        """Start from what was loaded; None: nothing was, or nothing that has a step."""
        self._reached, self._origin = iteration, "loaded"

    def note_commit(self, iteration: int, tier: str) -> None:
        """Raise the step to that of a committed save; a drain may commit an older one later."""
        if self._reached is None or iteration >= self._reached:
            self._reached, self._origin = iteration, "saved"

    def note_failure(self, iteration: int, tier: str, error: BaseException) -> None:
        """Ignore it: what was not committed cannot be lost."""

    def check(self, step: object) -> None:
        """Refuse a step below the one reached; what is no whole number is judged elsewhere.

        Raises:
            StepRewoundError: with both steps.
        """
        if self._allow_rewind or self._reached is None or type(step) is not int:
            return
        if step < self._reached:
            raise StepRewoundError(step, self._reached, self._origin)
