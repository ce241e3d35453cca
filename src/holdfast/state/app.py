"""Capture the app state of a run and apply it again.

Owns which names the state has in a checkpoint and how each part is taken from live objects and
given back: model and optimizer as one nested state for the shard files, scheduler as shared state,
RNG and data as this rank's state. Promises that capturing changes nothing (no hidden optimizer
step, no draw), that `check` touches nothing, and that `apply` restores RNG last. Reads and writes
no files.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from holdfast.errors import UnsupportedStateError
from holdfast.format.dcp import flatten, put
from holdfast.protocol import Stateful
from holdfast.state.bindings import Bindings, Leaves
from holdfast.state.codec import check_plain
from holdfast.state.compare import (
    Differences,
    SavedTensors,
    compare_model,
    finish_optimizers,
    has_landed,
    is_extra,
)
from holdfast.state.model import (
    OptimizerView,
    ask_model,
    ask_optimizers,
    check_reachable,
    model_state,
    optimizer_state,
    run_each,
)
from holdfast.state.rank import Place, apply_data, capture_rng, check_data
from holdfast.torch_internals import local_of

logger = logging.getLogger(__name__)


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
        self._optimizers = [OptimizerView(each) for each in optimizers]
        self._scheduler = scheduler
        self._given_data = data
        self._data = data if isinstance(data, Stateful) else None
        self._place = place
        self._kept: frozenset[str] = frozenset()

    def without(self, kept: Collection[str]) -> AppState:
        """Return the same state but for components that are to keep their live values."""
        rest = AppState(
            self._model,
            None if "optimizer" in kept else self.optimizers,
            None if "scheduler" in kept else self._scheduler,
            None if "data" in kept else self._given_data,
            self._place,
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
            leaves = self.gather_leaves()
            return leaves, Bindings.bind(self._model, self.optimizers, leaves)
        for name, value in leaves.values.items():
            if not isinstance(value, torch.Tensor):
                check_plain(value, name)
        return leaves, bindings

    def gather_leaves(self) -> Leaves:
        """Take the whole state, from torch's getters where it must be, flat as DCP makes it.

        Raises:
            UnsupportedStateError: some state could not be read back safely.
        """
        _, model, optimizer = run_each(
            lambda: check_reachable(self._optimized),
            self._model_state,
            lambda: self._optimizer_state() if self._optimizers else None,
        )
        tensors: dict[str, Any] = {"model": model}
        if optimizer is not None:
            tensors["optimizer"] = optimizer
        for key, value in tensors.items():
            check_plain(value, key)
            _check_keys(value, key)
        flat, paths = flatten(tensors)
        check_reachable(flat)
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
        hollow = tuple(_find_hollow(tensors))
        return Leaves(flat, paths, changed_by_steps, hollow)

    def look(self) -> None:
        """Look up model and optimizers: it may run collectives, and nothing later in the load does.

        Raises:
            Exception: whatever torch's getters or a hook raised.
        """
        run_each(
            lambda: self._live_model, lambda: self._live_optimizer if self._optimizers else None
        )

    def check(
        self,
        path: str,
        saved: SavedTensors | None,
        shared: Mapping[str, Any],
        rank: Mapping[str, Any],
        strict: bool,
    ) -> None:
        """Compare names, shapes and types with a checkpoint's, touching nothing.

        `saved` None: model and optimizer are left alone.

        Raises:
            StateMismatchError: shapes differ, nothing fits, or `strict` and anything else does.
            UnsupportedStateError: live tensors that no value could be restored into.
        """
        found = Differences()
        if saved is not None:
            live = self._live_model
            self._check_reachable(live, saved)
            found = compare_model(live, saved, path, strict)
            if self._optimizers:
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
            for left_out in self._not_asked_for(saved, shared, rank):
                logger.warning("%s: %s", path, left_out)

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
        if self._optimizers:
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

    def _not_asked_for(
        self, saved: SavedTensors | None, shared: Mapping[str, Any], rank: Mapping[str, Any]
    ) -> Iterator[str]:
        """Yield what the checkpoint holds and this load has no object for."""
        kept = self._kept
        if (
            "optimizer" not in kept
            and saved is not None
            and not self._optimizers
            and saved.parameter_names()
        ):
            yield "it holds optimizer state, and this load was given no optimizer: left out"
        if (
            "scheduler" not in kept
            and self._scheduler is None
            and shared.get("scheduler") is not None
        ):
            yield "it holds scheduler state, and this load was given no scheduler: left out"
        if "data" not in kept and self._data is None and rank.get("data") is not None:
            given = self._given_data
            why = "was given no data iterator"
            if given is not None:
                why = f"was given a {type(given).__name__}, which has no load_state_dict"
            yield (
                f"it holds a data position, and this load {why}: left out. Give it to an iterator "
                "that is built later with restore_data(iterator)"
            )

    def targets(self, saved: SavedTensors) -> dict[str, torch.Tensor]:
        """Return the tensors to fill, by flat name: live ones where they exist, else new ones."""
        live = self._live_model
        state = self._live_optimizer["state"] if self._optimizers else {}
        found = {}
        for name, source in saved.tensors.items():
            path = saved.key_paths[name]
            if path[0] == "model":
                target = live.get(f"model.{path[1]}")
                if isinstance(target, torch.Tensor) and not is_extra(name):
                    found[name] = target
                elif f"model.{path[1]}" in live:  # part of a module's extra state
                    found[name] = _new(source)
            elif not self._optimizers:
                continue
            elif path[1] != "state":  # a learning rate kept as a tensor, say
                found[name] = _new(source)
            elif isinstance(parameter := live.get(f"model.{path[2]}"), torch.Tensor):
                present = state.get(path[2], {}).get(path[3]) if len(path) == 4 else None
                found[name] = _fitting(present, parameter, source)
            # else left out, as `check` has said
        return found

    def apply(self, filled: Mapping[str, Any], saved: SavedTensors) -> bool:
        """Give model and optimizer their state; `filled` holds tensors and values by flat name.

        Returns whether the optimizer got any.
        """
        options = StateDictOptions(strict=False)  # `check` has compared the names
        live = self._live_model
        known = self._parameter_names if self._optimizers else set()
        nested: dict[str, Any] = {"model": {}, "optimizer": {"state": {}}}
        parts: list[tuple[Sequence[Any], Any]]
        parts = [(path, {}) for path in saved.hollow if path[2:] or path[0] == "model"]
        parts += [(saved.key_paths[name], value) for name, value in filled.items()]
        for path, value in parts:
            if path[0] == "model":
                belongs = f"model.{path[1]}" in live
            else:
                belongs = path[1] != "state" or path[2] in known
            if belongs:
                put(nested, path, value)

        def give_model() -> None:
            restored = {f"model.{name}": value for name, value in nested["model"].items()}
            if not has_landed(self._model, live, restored):
                set_model_state_dict(self._model, nested["model"], options=options)

        def give_optimizers() -> bool:
            if not known & saved.parameter_names():
                return False
            if not finish_optimizers(self.optimizers, self._live_optimizer, nested["optimizer"]):
                self._keep_unknown(nested["optimizer"], known - saved.parameter_names())
                views: Any = self._optimizers
                set_optimizer_state_dict(self._model, views, nested["optimizer"], options=options)
            return True

        _, has_optimizer = run_each(give_model, give_optimizers)
        return bool(has_optimizer)

    def _keep_unknown(self, restored: dict[str, Any], unknown: set[str]) -> None:
        """Add the live state of parameters without saved state: an optimizer takes all its state at
        once, and drops what it is not given.
        """
        if not unknown:
            return
        live = self._live_optimizer
        restored["state"].update({name: live["state"][name] for name in unknown & {*live["state"]}})
        groups = [
            {**group, "params": [name for name in group["params"] if name in unknown]}
            for group in live["param_groups"]
        ]
        # First: the options of a group that both sides have are the checkpoint's.
        restored["param_groups"] = groups + restored["param_groups"]

    def apply_scheduler(self, shared: Mapping[str, Any]) -> bool:
        """Give the scheduler its state, where both sides have one; return whether they have."""
        if self._scheduler is None or shared.get("scheduler") is None:
            return False
        self._scheduler.load_state_dict(shared["scheduler"])
        return True

    def check_data(self, rank: Mapping[str, Any], path: str, accept_restart: bool) -> None:
        """Check early whether the data state can be restored, touching nothing; see `state.rank`.

        Raises:
            DataReshardError: another data-parallel size, and the loader cannot reshard.
        """
        if self._data is not None:
            check_data(self._data, rank, self._place, path, accept_restart)

    def apply_data(self, states: Sequence[Mapping[str, Any]]) -> bool:
        """Restore the data position from these ranks' states; see `state.rank`."""
        return self._data is not None and apply_data(self._data, states, self._place)

    @cached_property
    def _live_model(self) -> dict[str, Any]:
        """The model's state as it was when first asked for; its tensors stay the live ones."""
        return {f"model.{name}": each for name, each in self._model_state().items()}

    @cached_property
    def _live_optimizer(self) -> dict[str, Any]:
        """The optimizers' state, likewise."""
        return self._optimizer_state()

    def _model_state(self) -> dict[str, Any]:
        return model_state(self._model) or ask_model(self._model)

    def _optimizer_state(self) -> dict[str, Any]:
        state = optimizer_state(self._model, self.optimizers)
        return ask_optimizers(self._model, self._optimizers) if state is None else state

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


def _check_keys(value: Any, place: str) -> None:
    """Refuse keys that are no strings: DCP would restore them as strings.

    Raises:
        UnsupportedStateError: naming the first such key.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                raise UnsupportedStateError(
                    f"the key {key!r} of {place} is no string, and would be restored as one.\n"
                    "Use strings as keys in what get_extra_state and the optimizer return."
                )
            _check_keys(each, f"{place}.{key}")
    elif isinstance(value, list):
        for position, each in enumerate(value):
            _check_keys(each, f"{place}[{position}]")


def _new(saved: TensorStorageMetadata) -> torch.Tensor:
    return torch.empty(saved.size, dtype=saved.properties.dtype, device="cpu")


def _fitting(present: Any, parameter: torch.Tensor, saved: TensorStorageMetadata) -> torch.Tensor:
    """Return the tensor to read optimizer state into, placed as its parameter where it fits."""
    dtype = saved.properties.dtype
    if (
        isinstance(present, torch.Tensor)
        and present.size() == saved.size
        and present.dtype == dtype
    ):
        return present
    if saved.size == parameter.size():
        return torch.empty_like(parameter, dtype=dtype)
    return _new(saved)
