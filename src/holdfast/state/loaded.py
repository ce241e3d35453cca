"""What a load found of the small states, for those who ask for it again later.

Owns `restore_rng` and `restore_data` of a manager: the generators and the position in the data are
given as they were saved, as often as they are asked for. Refuses to give what no load has found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from holdfast.errors import NothingLoadedError, UnsupportedStateError
from holdfast.protocol import Stateful
from holdfast.state.overrides import Overrides
from holdfast.state.small import Place, SavedRun, apply_data, apply_generators, check_data


@dataclass(frozen=True)
class LoadedStates:
    """What a load found of each rank's own state, for those who ask for it again later."""

    rng: dict[str, Any] | None
    """As this rank saved it, or the lowest one; None: the checkpoint holds none."""
    positions: list[dict[str, Any]]
    saved: SavedRun
    place: Place
    path: str
    overrides: Overrides

    def restore_rng(self) -> bool:
        """Give the generators their state, unless the run keeps its own; return whether it did."""
        if self.rng is None or self.overrides.keeps("rng"):
            return False
        return apply_generators(self.rng, self.saved, self.place)

    def restore_data(self, data: Any, accept_restart: bool) -> None:
        """Give an iterator the saved position, unless the run keeps its own.

        Raises:
            NothingLoadedError: the checkpoint has no position.
            UnsupportedStateError: the iterator cannot take one.
            DataReshardError: another data-parallel size, and the iterator cannot reshard.
        """
        if self.overrides.keeps("data"):
            return
        if not self.positions:
            raise NothingLoadedError(
                f"{self.path} holds no data position: it was saved without train_data_iterator, or "
                "with one that has no state_dict and load_state_dict."
            )
        if not isinstance(data, Stateful):
            raise UnsupportedStateError(
                f"a {type(data).__name__} has no state_dict and load_state_dict: no data position "
                "can be restored into it."
            )
        check_data(data, self.positions, self.place, self.path, accept_restart)
        apply_data(data, self.positions, self.place)


class LastLoad:
    """What can be asked for again of the last load of a manager."""

    def __init__(self) -> None:
        self._has_loaded = False
        self._states: LoadedStates | None = None

    def note(self, states: LoadedStates | None) -> None:
        """Keep what a load has found; None: it found no checkpoint."""
        self._has_loaded, self._states = True, states

    def restore_rng(self) -> None:
        """Give the generators their state again; raises as `DefaultCheckpointManager` says."""
        self._check("restore_rng")
        if self._states is not None:
            self._states.restore_rng()

    def restore_data(self, iterator: Any, accept_restart: bool) -> None:
        """Give an iterator the saved position; raises as `DefaultCheckpointManager` says."""
        self._check("restore_data")
        if self._states is None:
            raise NothingLoadedError(
                "restore_data: the last load found no checkpoint. Ask its result for `found` first."
            )
        self._states.restore_data(iterator, accept_restart)

    def _check(self, method: str) -> None:
        if not self._has_loaded:
            raise NothingLoadedError(f"{method} gives back what a load has found: call load first.")
