"""Capture the app state of a run and apply it again.

Owns which names the state has in a checkpoint and how each part is taken from live objects and
given back: model and optimizer as one nested state for the shard files, scheduler as shared state,
RNG and data as this rank's state. Promises that capturing changes nothing (no hidden optimizer
step, no draw), that `check` touches nothing, and that `apply` restores RNG last. Reads and writes
no files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from holdfast.format.chunks import Placed
from holdfast.format.dcp import KeyPath, flatten, put
from holdfast.protocol import Stateful
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.requests import Target
from holdfast.state.codec import check_keys, check_plain, check_reachable
from holdfast.state.compare import (
    Differences,
    SavedTensors,
    check_kind,
    compare_model,
    describe_left_out,
    is_extra,
)
from holdfast.state.model import MODEL, ModelWalk, is_live, model_state, restore_model, run_each
from holdfast.state.optimizer import OptimizerWalk, optimizer_state, restore_optimizers
from holdfast.state.sharding import NO_CLAIMS, Claims, Shardings, find_claims, named_tensors
from holdfast.state.small import Place, apply_data, capture_rng, check_data
from holdfast.torch_internals import local_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leaves:
    """Model and optimizer as flat named leaves, referring to live tensors."""

    values: Mapping[str, Any]
    """Tensors and plain values by DCP's flat name."""
    paths: Mapping[str, KeyPath]
    """The nested keys of each name: strings for mappings, integers for lists."""
    changed_by_steps: frozenset[str]
    """Names that only an optimizer step changes: trainable parameters, optimizer state."""
    hollow: tuple[tuple[str, ...], ...] = ()
    """The nested keys of mappings without a leaf, which have no name."""
    claims: Claims = NO_CLAIMS
    """Which plain tensors are parts of global ones."""


class Bindings:
    """Where the leaves of one model and its optimizers are, for the saves that follow.

    A full capture builds, names and flattens whole state dicts; `follow` only looks every leaf up
    again. It is never silently stale: what was added, removed, replaced or hooked since requires a
    full capture.
    """

    def __init__(
        self, model: ModelWalk, optimizers: Sequence[OptimizerWalk], leaves: Leaves
    ) -> None:
        """Use `bind`."""
        self._model = model
        self._optimizers = optimizers
        self._leaves = leaves

    @classmethod
    def bind(
        cls,
        root: nn.Module,
        optimizers: Sequence[Optimizer],
        leaves: Leaves,
        walk: ModelWalk | None,
    ) -> Bindings | None:
        """Find every leaf; None: one has no place where it could be looked up again.

        `walk`: that the leaves were read by; None: torch's getters were asked.
        """
        model = walk or ModelWalk.find(root)
        if model is None:
            return None
        walks = OptimizerWalk.find_all(optimizers, model.parameter_names())
        if walks is None:
            return None
        bindings = cls(model, walks, replace(leaves, values={}))
        live = bindings._collect()
        are_found = (
            live is not None
            and list(live) == list(leaves.values)
            and all(map(is_live, leaves.values.values(), live.values()))
        )
        return bindings if are_found else None

    def follow(self, root: nn.Module, optimizers: Sequence[Optimizer]) -> Leaves | None:
        """Return the current leaves; None: something changed and must be bound again."""
        if not self._model.holds(root) or len(optimizers) != len(self._optimizers):
            return None
        if not all(
            walk.holds(each) for walk, each in zip(self._optimizers, optimizers, strict=True)
        ):
            return None
        if self._model.run_hooks() and not self._model.holds(root):
            return None
        live = self._collect()
        if live is None or not self._leaves.claims.hold(live):
            return None
        return replace(self._leaves, values=live)

    def _collect(self) -> dict[str, Any] | None:
        """Return the live leaves in the order of a full capture; None: some are not there."""
        found = self._model.values()
        is_there = all(each.add_state(found) for each in self._optimizers)
        is_there = is_there and all(each.add_groups(found) for each in self._optimizers)
        return found if is_there else None


@dataclass(frozen=True)
class Captured:
    """The app state at one step, still referring to live tensors."""

    leaves: Leaves
    """Of `{"model": {...}, "optimizer": {"state": {...}, "param_groups": [...]}}`."""
    shared: dict[str, Any]
    """The same on every rank: the scheduler's, and which mappings of the nested state are empty."""
    rank: dict[str, Any]
    """This rank's own: RNG and data."""
    bindings: Bindings | None
    """Where the leaves live, for the next capture. None: they cannot be looked up."""


class AppState:
    """The live objects of a run, by the names they have in a checkpoint."""

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer] | None,
        scheduler: Any | None,
        data: Any | None,
        place: Place,
        pg_collection: Any | None = None,
    ) -> None:
        models = [model] if isinstance(model, nn.Module) else list(model)
        # Several modules (virtual pipeline stages) become one root, named 0., 1., ... in it.
        self._model = models[0] if len(models) == 1 else nn.ModuleList(models)
        if optimizer is None:
            optimizers = []
        elif isinstance(optimizer, Sequence):
            optimizers = list(optimizer)
        else:
            optimizers = [optimizer]
        self.optimizers = optimizers
        self._scheduler = scheduler
        self._given_data = data
        self._data = data if isinstance(data, Stateful) else None
        self._place = place
        self._pg_collection = pg_collection
        self._kept: frozenset[str] = frozenset()
        self._shardings = Shardings()

    def without(self, kept: Collection[str]) -> AppState:
        """Return the same state but for components that are to keep their live values."""
        rest = AppState(
            self._model,
            None if "optimizer" in kept else self.optimizers,
            None if "scheduler" in kept else self._scheduler,
            None if "data" in kept else self._given_data,
            self._place,
            self._pg_collection,
        )
        rest._kept = frozenset(kept)
        return rest

    def of_tensors_alone(self) -> AppState:
        """Return model and optimizers without scheduler and data."""
        return self.without({"scheduler", "data"} | self._kept)

    @property
    def scheduler(self) -> Any | None:
        """The live scheduler, if it is to be restored."""
        return self._scheduler

    def capture(self, bindings: Bindings | None = None) -> Captured:
        """Return the current state, referring to live tensors.

        `bindings`: of an earlier capture; while they hold, the state is looked up through them.

        Raises:
            UnsupportedStateError: some state could not be read back safely.
        """
        rng = capture_rng()  # before anything that might draw
        (leaves, bindings), scheduler, data = run_each(
            lambda: self._find_leaves(bindings),
            lambda: None if self._scheduler is None else self._scheduler.state_dict(),
            lambda: None if self._data is None else self._data.state_dict(),
        )
        shared = {"scheduler": scheduler, "hollow": list(leaves.hollow)}
        rank = {
            "rng": rng,
            "data": data,
            "data_rank": self._place.data_rank,
            "data_size": self._place.data_size,
        }
        for name, part in (("", shared), (f"rank {self._place.rank} ", rank)):
            for key, value in part.items():
                check_plain(value, f"{name}{key}")
        return Captured(leaves, shared, rank, bindings)

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
        _, model, optimizer = run_each(
            lambda: check_reachable(self._optimized),
            lambda: model_state(root, walk),
            lambda: optimizer_state(root, optimizers, walk) if optimizers else None,
        )
        tensors: dict[str, Any] = {"model": model}
        if optimizer is not None:
            tensors["optimizer"] = optimizer
        for key, value in tensors.items():
            check_plain(value, key)
            check_keys(value, key)
        flat, paths = flatten(tensors)
        stepped = {
            _address(parameter)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        }
        changed_by_steps = frozenset(
            name
            for name, value in flat.items()
            if isinstance(value, torch.Tensor)
            and (
                paths[name][:2] == ("optimizer", "state")
                or (paths[name][0] == "model" and _address(value) in stepped)
            )
        )
        claims = self._find_claims(walk, flat, paths)
        return Leaves(flat, paths, changed_by_steps, tuple(_find_hollow(tensors)), claims)

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

    def look(self) -> None:
        """Look up model and optimizers: it may run collectives, and nothing later in the load does.

        Raises:
            Exception: whatever torch's getters or a hook raised.
        """
        run_each(
            lambda: self._live_model, lambda: self._live_optimizer if self.optimizers else None
        )

    def check(
        self,
        path: str,
        saved: SavedTensors | None,
        shared: Mapping[str, Any],
        rank: Mapping[str, Any],
        *,
        strict: bool,
        accept_data_restart: bool,
    ) -> None:
        """Compare names, shapes and types with a checkpoint's, touching nothing.

        `saved` None: model and optimizer are left alone.

        Raises:
            StateMismatchError: shapes or kinds of optimizers differ, nothing fits, or `strict` and
                anything else does not.
            UnsupportedStateError: live tensors that no value could be restored into.
            DataReshardError: another data-parallel size, and the iterator cannot reshard.
        """
        found = Differences()
        if saved is not None:
            check_kind(self.optimizers, saved.option_names(), path)
            live = self._live_model
            self._check_reachable(live, saved)
            found = compare_model(live, saved, path, strict, self._shardings.size_of)
            if self.optimizers:
                live_names, saved_names = self._parameter_names, saved.parameter_names()
                found.missing += [f"optimizer.{name}" for name in sorted(live_names - saved_names)]
                found.unexpected += [
                    f"optimizer.{name}" for name in sorted(saved_names - live_names)
                ]
        if self._scheduler is not None and shared.get("scheduler") is None:
            found.missing.append("scheduler")
        if self._data is not None and rank["data"] is None:
            found.missing.append("data")
        found.refuse(path, strict)
        if self._place.rank == 0:
            if (summary := found.summary()) is not None:
                logger.warning("%s is loaded in part. %s", path, summary)
            here = {
                "optimizer": bool(self.optimizers),
                "scheduler": self._scheduler is not None,
                "data": self._data is not None,
            }
            absent = {name for name, is_here in here.items() if not is_here} - self._kept
            for each in describe_left_out(absent, saved, shared, rank, self._given_data):
                logger.warning("%s: %s", path, each)
        if self._data is not None:
            check_data(self._data, rank, self._place, path, accept_data_restart)

    def _check_reachable(self, live: Mapping[str, Any], saved: SavedTensors) -> None:
        """Refuse live tensors that no value could be restored into.

        Raises:
            UnsupportedStateError: naming them.
        """
        check_reachable(live)
        check_reachable(
            {name: each for name, each in live.items() if name in saved.tensors}, written_to=True
        )
        # Those that an optimizer was given before the model was materialised are in no model.
        check_reachable(self._optimized)
        if self.optimizers:
            check_reachable(
                {
                    f"optimizer.state.{owner}.{key}": value
                    for owner, entries in self._live_optimizer["state"].items()
                    for key, value in entries.items()
                }
            )

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
        """Return the tensors to fill, by flat name: live ones where they exist, else new ones.

        Those that are parts of global tensors are local: `place` says which part each is.
        """
        live = self._live_model
        state = self._live_optimizer["state"] if self.optimizers else {}
        size_at = self._shardings.size_at
        found = {}
        for name, source in saved.tensors.items():
            path = saved.key_paths[name]
            if not self._takes(path):  # as `check` has said
                continue
            target: Any = None
            if path[0] == "model":
                # A part of a module's extra state is given to the module, which may copy it.
                target = None if is_extra(name) else live[MODEL + path[1]]
            elif path[1] == "state":
                present = state.get(path[2], {}).get(path[3]) if len(path) == 4 else None
                owner = live.get(MODEL + path[2])
                target = _fitting(present, owner, source, partial(size_at, path, live))
            found[name] = target if isinstance(target, torch.Tensor) else _new(source)
        return found

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
            return MODEL + path[1] in self._live_model
        return bool(self.optimizers) and (path[1] != "state" or path[2] in self._parameter_names)

    def apply(self, filled: Mapping[str, Any], saved: SavedTensors) -> bool:
        """Give model and optimizer their state; `filled` holds tensors and values by flat name.

        Returns whether the optimizer got any.
        """
        known = self._parameter_names if self.optimizers else set()
        nested: dict[str, Any] = {"model": {}, "optimizer": {"state": {}}}
        parts: list[tuple[Sequence[Any], Any]]
        parts = [(path, {}) for path in saved.hollow if path[2:] or path[0] == "model"]
        parts += [(saved.key_paths[name], value) for name, value in filled.items()]
        for path, value in parts:
            if self._takes(path):
                put(nested, path, value)

        def give_optimizers() -> bool:
            saved_names = saved.parameter_names()
            if not known & saved_names:
                return False
            restore_optimizers(
                self._model,
                self.optimizers,
                self._live_optimizer,
                nested["optimizer"],
                known - saved_names,
            )
            return True

        _, has_optimizer = run_each(
            lambda: restore_model(self._model, self._live_model, nested["model"]), give_optimizers
        )
        return bool(has_optimizer)

    def apply_scheduler(self, shared: Mapping[str, Any]) -> bool:
        """Give the scheduler its state, where both sides have one; return whether they have."""
        if self._scheduler is None or shared.get("scheduler") is None:
            return False
        self._scheduler.load_state_dict(shared["scheduler"])
        return True

    def apply_data(self, states: Sequence[Mapping[str, Any]]) -> bool:
        """Restore the data position from these ranks' states; see `state.small`."""
        return self._data is not None and apply_data(self._data, states, self._place)

    @cached_property
    def _live_model(self) -> dict[str, Any]:
        """The model's state as it was when first asked for; its tensors stay the live ones."""
        state = model_state(self._model, self._walk)
        return {MODEL + name: each for name, each in state.items()}

    @cached_property
    def _live_optimizer(self) -> dict[str, Any]:
        """The optimizers' state, likewise."""
        return optimizer_state(self._model, self.optimizers, self._walk)

    @cached_property
    def _walk(self) -> ModelWalk | None:
        return ModelWalk.find_unhooked(self._model)

    @cached_property
    def _parameter_names(self) -> set[str]:
        groups = self._live_optimizer["param_groups"]
        return {name for group in groups for name in group["params"]}


def _address(tensor: torch.Tensor) -> tuple[torch.device, int]:
    local = local_of(tensor)
    if local.layout is not torch.strided:
        return local.device, -1  # a sparse one has no single address
    return local.device, local.data_ptr()


def _find_hollow(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield where mappings in mappings are empty."""
    for key, each in value.items():
        if isinstance(each, Mapping):
            if not each:
                yield (*path, key)
            yield from _find_hollow(each, (*path, key))


def _new(saved: TensorStorageMetadata) -> torch.Tensor:
    return torch.empty(saved.size, dtype=saved.properties.dtype, device="cpu")


def _fitting(
    present: Any,
    parameter: Any,
    saved: TensorStorageMetadata,
    size_of: Callable[[torch.Tensor], torch.Size],
) -> torch.Tensor | None:
    """Return the tensor to read optimizer state into, placed as its parameter; None: none fits.

    `size_of`: the size of the global tensor that a local one is a part of.
    """
    dtype = saved.properties.dtype
    if (
        isinstance(present, torch.Tensor)
        and size_of(present) == saved.size
        and present.dtype == dtype
    ):
        return present
    if isinstance(parameter, torch.Tensor) and saved.size == size_of(parameter):
        return torch.empty_like(parameter, dtype=dtype)
    return None
