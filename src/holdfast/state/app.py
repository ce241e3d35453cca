"""Capture the app state of a run and apply it again.

Owns which names the state has in a checkpoint and how each part is taken from live objects and
given back: model and optimizer as one nested state, scheduler, RNG and data as values beside it.
Promises that capturing changes nothing (no hidden optimizer
step, no draw), that `check` touches nothing, and that `apply` restores RNG last. Reads and writes
no files.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from holdfast.config import RAISE, WARN
from holdfast.errors import StateMismatchError
from holdfast.format.chunks import Placed
from holdfast.format.dcp import KeyPath, put
from holdfast.format.values import DATA, EMPTY, RNG, SCHEDULER
from holdfast.protocol import Stateful
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.requests import Target
from holdfast.state.bindings import Bindings, Leaves, find_buffers
from holdfast.state.codec import check_keys, check_plain, check_reachable
from holdfast.state.compare import compare_model, describe_left_out
from holdfast.state.components import ComponentLeaves, StateComponent, capture_components
from holdfast.state.filters import SaveFilter
from holdfast.state.fitting import OptimizerFit
from holdfast.state.groups import GROUPS, names_of
from holdfast.state.guard import RunFacts
from holdfast.state.model import (
    MODEL,
    ModelWalk,
    join_models,
    model_state,
    restore_model,
    run_each,
)
from holdfast.state.naming import PARAMETERS, STATE
from holdfast.state.optimizer import LiveOptimizers, look_up
from holdfast.state.options import check_schedule
from holdfast.state.per_rank import names_per_rank
from holdfast.state.rehearsal import check_inner, check_values, listed
from holdfast.state.saved import SavedTensors
from holdfast.state.sharding import Claims, Shardings, find_claims, named_tensors
from holdfast.state.small import (
    Place,
    apply_data,
    capture_rng,
    check_data,
    join_iterators,
    position_of,
)
from holdfast.state.strictness import Differences, Strictness
from holdfast.state.targets import Targets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """The app state at one step, still referring to live tensors."""

    leaves: Leaves
    """Of `{"model": {...}, "optimizer": {"state": {...}, "param_groups": [...]}}`; the last of them
    is one leaf."""
    small: dict[str, Any]
    """The small states of this rank by name: RNG, scheduler, data position, and which mappings of
    the nested state are empty."""
    bindings: Bindings | None
    """Where the leaves live, for the next capture. None: they cannot be looked up."""
    components: ComponentLeaves


class AppState:
    """The live objects of a run, by the names they have in a checkpoint."""

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
        optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None,
        scheduler: Any | None,
        data: Any | None,
        place: Place,
        pg_collection: Any | None = None,
        components: Sequence[StateComponent] = (),
    ) -> None:
        self._model = join_models(model)
        self.components = components
        self.optimizers = listed(optimizer)
        self._scheduler = scheduler
        self._given_data = data
        self._data = one if isinstance(one := join_iterators(data), Stateful) else None
        self._place = place
        self._pg_collection = pg_collection
        self._kept: frozenset[str] = frozenset()
        self._shardings = Shardings()
        self._fit: OptimizerFit | None = None
        self._targets: Targets | None = None
        self._skipped: frozenset[str] = frozenset()
        """Names of tensors of another shape, which keep their value."""
        self.expects_position = True
        """Whether a saved data position is this rank's to restore."""

    def without(self, kept: Collection[str]) -> AppState:
        """Return the same state but for components that are to keep their live values."""
        rest = AppState(
            self._model,
            None if "optimizer" in kept else self.optimizers,
            None if "scheduler" in kept else self._scheduler,
            None if "data" in kept else self._given_data,
            self._place,
            self._pg_collection,
            self.components,
        )
        rest._kept = frozenset(kept)
        return rest

    def of_tensors_alone(self) -> AppState:
        """Return model and optimizers without scheduler and data."""
        return self.without({"scheduler", "data"} | self._kept)

    @property
    def model(self) -> nn.Module:
        """The model; several are under one root."""
        return self._model

    @property
    def scheduler(self) -> Any | None:
        """The live scheduler, if it is to be restored."""
        return self._scheduler

    def capture(self, bindings: Bindings | None = None, *, with_position: bool = True) -> Captured:
        """Return the current state, referring to live tensors.

        `bindings`: of an earlier capture; while they hold, the state is looked up through them.
        `with_position`: ask the iterator for its position, for which it may draw numbers; else
        there is an empty one.

        Raises:
            UnsupportedStateError: some state could not be read back safely.
        """
        rng = capture_rng()  # before anything that might draw
        (leaves, bindings), scheduler, data, components = run_each(
            lambda: self._find_leaves(bindings),
            lambda: None if self._scheduler is None else self._scheduler.state_dict(),
            lambda: (
                None
                if self._data is None
                else position_of(self._data.state_dict() if with_position else None, self._place)
            ),
            lambda: capture_components(
                self.components, self._place, is_rehearsal=not with_position
            ),
        )
        small: dict[str, Any] = {RNG: rng}
        if scheduler is not None:
            small[SCHEDULER] = scheduler
        if data is not None:
            small[DATA] = data
        if leaves.hollow:
            small[EMPTY] = [list(path) for path in leaves.hollow]
        for name, value in small.items():
            rank = f"rank {self._place.rank} " if name in (RNG, DATA) else ""
            check_plain(value["position"] if name == DATA else value, f"{rank}{name}")
        return Captured(leaves, small, bindings, components)

    def _find_leaves(self, bindings: Bindings | None) -> tuple[Leaves, Bindings | None]:
        """Return model and optimizers by their bindings, else gathered and bound again."""
        leaves = bindings.follow(self._model, self.optimizers) if bindings is not None else None
        if leaves is None:
            walk = ModelWalk.find_unhooked(self._model)
            leaves = self._gather(walk)
            return leaves, Bindings.bind(self._model, self.optimizers, leaves, walk)
        for name, value in leaves.values.items():
            if not isinstance(value, torch.Tensor):
                check_plain(value, name)
        return leaves, bindings

    def gather_leaves(self) -> Leaves:
        """Take the whole state, from torch's getters where it must be, flat as DCP makes it.

        Raises:
            UnsupportedStateError: some state could not be read back safely.
        """
        return self._gather(ModelWalk.find_unhooked(self._model))

    def _gather(self, walk: ModelWalk | None) -> Leaves:
        root, optimizers = self._model, self.optimizers
        _, _, model, live = run_each(
            lambda: check_inner(optimizers),
            lambda: check_reachable(self._optimized),
            lambda: model_state(root, walk),
            lambda: look_up(root, optimizers, walk) if optimizers else None,
        )
        leaves = Leaves.of(model, live, optimizers)
        claims = self._find_claims(walk, leaves.values, leaves.paths)
        per_rank = names_per_rank(root, leaves.values, leaves.paths)
        return replace(
            leaves,
            claims=claims,
            per_rank=leaves.per_rank | per_rank | claims.per_rank,
            buffers=find_buffers(root, leaves.values),
        )

    def _find_claims(
        self, walk: ModelWalk | None, flat: Mapping[str, Any], paths: Mapping[str, KeyPath]
    ) -> Claims:
        named = named_tensors(self._model, walk, flat)
        return find_claims(named, flat, paths, self._pg_collection, self._place.world_size)

    def agree_on_shardings(self, coordinator: Coordinator) -> None:
        """Agree with all ranks which tensors are parts of global ones, for `check` and `targets`.

        Raises:
            CheckpointError: on every rank: whatever torch's getters or a hook raised on one, or
                ranks contradict each other.
        """

        def find() -> tuple[Claims, dict[str, Any]]:
            self.look()
            return self._find_claims(self._walk, self._live_model, {}), self._live_model

        self._shardings = Shardings.agree(find, coordinator)

    def rehearse(self) -> None:
        """Look at all that a save would take, but for the data position, and keep nothing.

        Iterators may draw numbers to tell their position.

        Raises:
            UnsupportedStateError: a save would refuse some state.
        """
        self.look()
        check_inner(self.optimizers)
        leaves = dict(self._live_model)
        for root in self._roots:
            leaves[f"{root}.{GROUPS}"] = [each.entry() for each in self._live.groups(root)]
            for owner, entries in self._live.state(root).items():
                check_keys(entries, f"{root}.{STATE}.{owner}")
                leaves |= {f"{root}.{STATE}.{owner}.{key}": each for key, each in entries.items()}
        if self._scheduler is not None:
            leaves["scheduler"] = self._scheduler.state_dict()
        leaves |= capture_components(self.components, self._place, is_rehearsal=True).values
        check_values(leaves)

    def look(self) -> None:
        """Look up model and optimizers: it may run collectives, and nothing later in the load does.

        Raises:
            Exception: whatever torch's getters or a hook raised.
        """
        run_each(lambda: self._live_model, lambda: self._live if self.optimizers else None)

    def compare(
        self,
        path: str,
        saved: SavedTensors | None,
        small: Mapping[str, Any],
        positions: Sequence[Mapping[str, Any]],
    ) -> Differences:
        """Compare names, shapes and types on this rank with a checkpoint's, touching nothing.

        `saved` None: model and optimizer are left alone. `small`: the saved small states by name.
        `positions`: of the data, as `apply_data` takes them.

        Raises:
            StateMismatchError: kinds of optimizers differ, or nothing fits.
            UnsupportedStateError: live tensors that no value could be restored into.
        """
        found = Differences()
        if saved is not None:
            if self.optimizers:
                self.fit(saved).check_kinds(path)
            live = self._live_model
            self._check_reachable(live, saved)
            found = compare_model(live, saved, path, self._shardings.size_of)
            found.kinds = self._find_targets(saved).differences()
            if self.optimizers:
                self.fit(saved).compare_names(found)
        if self._scheduler is not None and small.get(SCHEDULER) is None:
            found.components.append("scheduler")
        if self._data is not None and not positions:
            found.components.append("data")
        return found

    def check(
        self,
        found: Differences,
        path: str,
        saved: SavedTensors | None,
        small: Mapping[str, Any],
        positions: Sequence[Mapping[str, Any]],
        *,
        strictness: Strictness,
        accept_data_restart: bool,
    ) -> list[str]:
        """Refuse what `compare` found, and all that does not fit else; return what to warn of.

        Raises:
            StateMismatchError: what must not differ does.
            DataReshardError: another data-parallel size, and the iterator cannot reshard.
        """
        schedule = small.get(SCHEDULER)
        found.refuse(path, strictness)
        self._skipped = frozenset(found.shapes) | found.kept
        fit = self.fit(saved) if saved is not None and self.optimizers else None
        told = []
        if fit is not None:
            fit.skipped = self._skipped
            told = fit.check_groups(path, strictness)
        if self._scheduler is not None:
            matches = [*fit.matches.values()] if fit is not None else []
            check_schedule(self._scheduler, schedule, matches, path)
        left_out = [*self._describe_left_out(saved, schedule, positions)]
        if left_out and strictness.left_out == RAISE:
            raise StateMismatchError(path, different=left_out, strict=False)
        if self._data is not None:
            check_data(self._data, positions, self._place, path, accept_data_restart)
        warnings = []
        if (summary := found.summary(strictness)) is not None:
            warnings.append(f"{path} is loaded in part. {summary}")
        if told:
            warnings.append(f"{path}: these groups keep their own options: {'; '.join(told)}")
        if strictness.left_out == WARN:
            warnings += [f"{path}: {each}" for each in left_out]
        return warnings

    def _describe_left_out(
        self, saved: SavedTensors | None, schedule: Any, positions: Sequence[Any]
    ) -> Iterator[str]:
        here = {
            "optimizer": bool(self.optimizers),
            "scheduler": self._scheduler is not None,
            "data": self._data is not None,
        }
        absent = {name for name, is_here in here.items() if not is_here} - self._kept
        wanted = positions if self.expects_position else ()
        held = {name for name, each in ((SCHEDULER, schedule), (DATA, wanted)) if each}
        return describe_left_out(absent, saved, held, self._given_data)

    def wants_records(self, saved: SavedTensors) -> bool:
        """Whether the groups that this rank saved are not those of the parameters that it has."""
        return not saved.are_united and any(
            self._names.get(root, frozenset()) != saved.parameter_names(root)
            for root in dict.fromkeys((*self._roots, *saved.roots))
        )

    def facts(self, config: bytes) -> RunFacts:
        """Return the facts of the live side, for a guard; `config`: of the run, as YAML."""
        live = self._live_model.items()
        shapes = {n: (t.shape, t.dtype) for n, t in live if isinstance(t, torch.Tensor)}
        return RunFacts.of(config, shapes, {each for n in self._names.values() for each in n})

    def names_that_begin(self, save_filter: SaveFilter) -> set[str]:
        """Return the names of trained tensors that a filter keeps: the base need not have them."""
        return save_filter.names_that_begin(self._model, self._live_model)

    def live_names(self) -> set[str]:
        """Return the names of the model's state and of all parameters of the optimizers."""
        parameters = {f"{root}.{name}" for root in self._roots for name in self._names[root]}
        return parameters | self._live_model.keys()

    def _check_reachable(self, live: Mapping[str, Any], saved: SavedTensors) -> None:
        """Refuse live tensors that no value could be restored into, beside what `rehearse` did.

        Raises:
            UnsupportedStateError: naming them.
        """
        unknown = saved.tensors.keys() - saved.kinds.keys()  # expanded, then or not
        check_reachable(
            {name: each for name, each in live.items() if name in unknown}, written_to=True
        )
        # Those that an optimizer was given before the model was materialised are in no model.
        check_reachable(self._optimized)

    def fit(self, saved: SavedTensors) -> OptimizerFit:
        """Return what the optimizers are given of a checkpoint's state."""
        if self._fit is None or self._fit.saved is not saved:
            self._fit = OptimizerFit(self.optimizers, self._live, saved)
        return self._fit

    @cached_property
    def _roots(self) -> list[str]:
        return list(dict.fromkeys(self._live.roots)) if self.optimizers else []

    @property
    def _optimized(self) -> dict[str, torch.Tensor]:
        """The parameters of all optimizers, by their position in them."""
        return {
            f"optimizer.param_groups[{number}].params[{position}]": parameter
            for optimizer in self.optimizers
            for number, group in enumerate(optimizer.param_groups)
            for position, parameter in enumerate(group["params"])
        }

    def targets(self, saved: SavedTensors) -> dict[str, torch.Tensor]:
        """Return the tensors to fill, by flat name: live ones where they fit, else new ones.

        Those that are parts of global tensors are local: `place` says which part each is.
        """
        return self._find_targets(saved).make()

    def _find_targets(self, saved: SavedTensors) -> Targets:
        if self._targets is None or self._targets.saved is not saved:
            live = self._live_model
            self._targets = Targets(
                live,
                self._live if self.optimizers else None,
                saved,
                self._takes,
                lambda path, each: self._shardings.size_at(path, live, each),
            )
        return self._targets

    def place(self, targets: Mapping[str, torch.Tensor], saved: SavedTensors) -> dict[str, Target]:
        """Return the targets, those that are parts of global tensors with their places there."""
        find, live = self._shardings.cut_at, self._live_model
        found: dict[str, Target] = {}
        for name, target in targets.items():
            part = find(saved.key_paths[name], target, live)
            found[name] = target if part is None else Placed(target, part)
        return found

    def _takes(self, path: Sequence[Any]) -> bool:
        """Whether saved state with these nested keys has a place here."""
        if path[0] == "model":
            name = MODEL + path[1]
            return name in self._live_model and name not in self._skipped
        if path[0] not in self._roots or len(path) < 3:
            return False
        if self._fit is not None and self._fit.keeps(path[0], path[2]):
            return False
        if path[1] == PARAMETERS:
            return path[2] in self._live.outside(path[0])
        return path[1] == STATE and path[2] in self._names[path[0]]

    def apply(self, filled: Mapping[str, Any], saved: SavedTensors) -> bool:
        """Give model and optimizer their state; `filled` holds tensors and values by flat name.

        Returns whether the optimizer got any.
        """
        nested: dict[str, Any] = {"model": {}, **{root: {STATE: {}} for root in self._roots}}
        parts: list[tuple[Sequence[Any], Any]]
        parts = [(path, {}) for path in saved.hollow if path[2:] or list(path[:-1]) == ["model"]]
        if self._targets is not None:
            filled = self._targets.finish(filled)
        parts += [(saved.key_paths[name], value) for name, value in filled.items()]
        for path, value in parts:
            if self._takes(path):
                put(nested, path, value)

        def give_optimizers() -> bool:
            if not self.optimizers:
                return False
            return self.fit(saved).restore({root: nested[root][STATE] for root in self._roots})

        _, has_optimizer = run_each(
            lambda: restore_model(self._model, self._live_model, nested["model"]), give_optimizers
        )
        return bool(has_optimizer)

    def apply_scheduler(self, state: Any | None) -> bool:
        """Give the scheduler its state, where both sides have one; return whether they have."""
        if self._scheduler is None or state is None:
            return False
        self._scheduler.load_state_dict(state)
        return True

    def apply_data(self, positions: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Restore the data position from these; see `state.small`."""
        return None if self._data is None else apply_data(self._data, positions, self._place)

    @cached_property
    def _live_model(self) -> dict[str, Any]:
        """The model's state as it was when first asked for; its tensors stay the live ones."""
        state = model_state(self._model, self._walk)
        return {MODEL + name: each for name, each in state.items()}

    @cached_property
    def _live(self) -> LiveOptimizers:
        """The optimizers as they were, likewise."""
        return look_up(self._model, self.optimizers, self._walk)

    @cached_property
    def _names(self) -> dict[str, frozenset[str]]:
        """For each root the names of its parameters."""
        return {root: names_of(self._live.groups(root)) for root in self._roots}

    @cached_property
    def _walk(self) -> ModelWalk | None:
        return ModelWalk.find_unhooked(self._model)
