"""What a save or a load is asked for, taken from the context that the loop hands over.

Owns which fields of a context become the app state, the rank's place in the data and the strategy
of a load. Checks nothing: `arguments` has done so.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.config import LoadConfig
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext
from holdfast.ranks.coordinator import Coordinator
from holdfast.state.app import AppState
from holdfast.state.components import StateComponent, components_of
from holdfast.state.small import Place
from holdfast.state.strategy import LoadStrategy


def app_state_of(
    ctx: CheckpointSaveContext | CheckpointLoadContext,
    coordinator: Coordinator,
    given: Sequence[StateComponent] | None = None,
) -> AppState:
    """Return the live objects; `given`: the components in place of the context's own."""
    return AppState(
        ctx.model,
        ctx.optimizer,
        ctx.opt_param_scheduler,
        ctx.train_data_iterator,
        place_of(ctx, coordinator),
        ctx.pg_collection,
        components_of(ctx) if given is None else given,
    )


def place_of(ctx: CheckpointSaveContext | CheckpointLoadContext, coordinator: Coordinator) -> Place:
    """Return which share of the data this rank reads."""
    return Place.of(coordinator.rank, coordinator.world_size, ctx.pg_collection)


def strategy_of(load: LoadConfig, ctx: CheckpointLoadContext) -> LoadStrategy:
    """Return what is restored: as the context says, else as the settings do.

    Raises:
        ConfigError: it is no strategy.
    """
    own = getattr(ctx, "strategy", None)
    return LoadStrategy.of(load.strategy if own is None else own)
