"""What a load found of the small states, for those who ask for it again later.

Owns `restore_rng`, `restore_data` and `restore_component` of a manager: the generators and the
position in the data are given as they were saved, as often as they are asked for, and a component
once. Refuses to give what no load has found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import (
    NothingLoadedError,
    StateMismatchError,
    UnsupportedStateError,
    WrongArgumentError,
)
from holdfast.protocol import CheckpointSaveContext, Stateful
from holdfast.state.component_load import Frame, make_mismatch
from holdfast.state.components import (
    ONE_VALUE,
    SharingPattern,
    StateComponent,
    check_components,
    components_of,
    full_name,
)
from holdfast.state.overrides import Overrides
from holdfast.state.small import (
    Place,
    SavedRun,
    apply_data,
    apply_generators,
    check_data,
    join_iterators,
)

logger = logging.getLogger(__name__)


@dataclass
class Stash:
    """Saved components that no object was given for yet."""

    path: str
    """Of the checkpoint."""
    keeps: Callable[[str], bool]
    """Whether a component of this name keeps its live state."""
    waiting: dict[str, tuple[Frame, Any]]
    """By name of the component."""
    _has_warned: bool = False

    def restore(self, component: StateComponent, place: Place) -> bool:
        """Give a component the state that waits for it, once; False: none does.

        Raises:
            StateMismatchError: it was saved as another pattern, or by another group.
            NothingLoadedError: none waits, and the component is required.
        """
        found = self.waiting.get(component.name)
        if found is None:
            if component.required and not self.keeps(component.name):
                raise NothingLoadedError(
                    f"{self.path} holds no {full_name(component.name)} that waits for an object: "
                    "it was not saved, or was restored already."
                )
            return False
        frame, state = found
        sharing = component.sharing
        is_alike = sharing is frame.sharing or {sharing, frame.sharing} <= ONE_VALUE
        if not is_alike or sharing is SharingPattern.SHARDED:
            problem = f"was saved as {frame.sharing.name}, and is declared {sharing.name} here"
            raise self._mismatch(component, problem)
        members = component.members(place)
        if members != frame.members:
            raise self._mismatch(
                component,
                f"is of the ranks {list(frame.members or ())}, here {list(members or ())}",
            )
        component.give(state)
        del self.waiting[component.name]
        return True

    def _mismatch(self, component: StateComponent, problem: str) -> StateMismatchError:
        name = full_name(component.name)
        return make_mismatch(self.path, [f"{name} {problem}"])

    def check(self, given: Sequence[StateComponent]) -> None:
        """Refuse to save over a state that waits.

        Raises:
            WrongArgumentError: a component is given whose saved state still waits.
        """
        if early := [each.name for each in given if each.name in self.waiting]:
            raise WrongArgumentError(
                "save",
                "components",
                f"has {early[0]}, whose saved state waits for it since the load",
                "Call manager.restore_component(component) first, or name it in load.override.",
            )

    def join(self, given: Sequence[StateComponent], rank: int) -> Sequence[StateComponent]:
        """Return the components of a save with those that still wait, saved as they were."""
        if not self.waiting:
            return given
        if not self._has_warned and rank == 0:
            logger.warning(
                "%s held %s, and nothing has asked for it: it is saved again as it was. Give it to "
                "its object with manager.restore_component, or name it in load.override",
                self.path,
                ", ".join(map(full_name, self.waiting)),
            )
        self._has_warned = True
        waiting = [_as_component(*each) for each in self.waiting.values()]
        return [*given, *waiting]


def _as_component(frame: Frame, state: Any) -> StateComponent:
    """Return a component that is saved as the frame was."""
    is_group = frame.sharing is SharingPattern.PER_GROUP
    return StateComponent(
        frame.name,
        (lambda: state, lambda _: None),
        frame.sharing,
        group=frame.members if is_group else None,
        required=False,
    )


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
    components: Stash

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
        data = join_iterators(data)
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

    def restore_component(self, component: StateComponent) -> bool:
        """Give a component what waits for it; raises as `DefaultCheckpointManager` says."""
        self._check("restore_component")
        states = self._states
        return states is not None and states.components.restore(component, states.place)

    def check_components(self, ctx: CheckpointSaveContext) -> None:
        """Check those of a save; raises as its namesake in `components`, and `Stash.check`."""
        given = check_components("save", ctx)
        if self._states is not None:
            self._states.components.check(given)

    def components_to_save(self, ctx: CheckpointSaveContext, rank: int) -> Sequence[StateComponent]:
        """Return the components of a save, with those that wait for their objects."""
        to_local = ctx.non_persistent_ckpt
        given = [each for each in components_of(ctx) if each.in_local_saves or not to_local]
        return given if self._states is None else self._states.components.join(given, rank)

    def _check(self, method: str) -> None:
        if not self._has_loaded:
            raise NothingLoadedError(f"{method} gives back what a load has found: call load first.")
