"""The small states of a run: random number generators, position in the data, counters.

Owns how each is taken from live objects and given back. Generators (python, numpy, torch CPU and
every CUDA device) and data positions belong to a rank; a run with another number of ranks gives a
position to the same data-parallel reader if there is one, lets the iterator reshard if it can, and
refuses otherwise; it reseeds the generators, with a separate stream for each rank, the same on
every machine. Counters are converted between any kind of `state.train_state` and JSON values.
Promises that the next draw after a restore equals the next draw after the capture, that counters
are restored exactly, that `.step` is then the checkpoint's, and that `check_data` and
`check_counters` change nothing. Reads and writes no files.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from holdfast.errors import DataReshardError, StateMismatchError, UnsupportedStateError
from holdfast.format.values import RNG
from holdfast.protocol import (
    ReshardableData,
    Stateful,
    TrainState,
    fit_counter,
    fit_fields,
    set_fields,
)
from holdfast.state.overrides import Overrides

logger = logging.getLogger(__name__)

_ROUNDING = 1e-5
"""Relative error that a 32-bit float may have introduced into a counter."""


def capture_rng() -> dict[str, Any]:
    """Return the state of every generator as plain values and tensors, without drawing."""
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = legacy
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def apply_rng(state: dict[str, Any]) -> list[str]:
    """Restore what `capture_rng` returned; return the names of generators missing here."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    saved = state["cuda"]
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, each in enumerate(saved[:present]):
        torch.cuda.set_rng_state(each, device)
    return [f"cuda:{device}" for device in range(present, len(saved))]


def reseed(run_id: str, iteration: int, rank: int) -> None:
    """Seed every generator from the identity of a checkpoint and the rank only."""
    digest = hashlib.sha256(f"{run_id}/{iteration}/{rank}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Place:
    """A rank's coordinates in the job."""

    rank: int
    world_size: int
    data_rank: int
    """Rank among those that read different data."""
    data_size: int

    @classmethod
    def of(cls, rank: int, world_size: int, pg_collection: Any | None) -> Place:
        """Read the data-parallel group from `pg_collection.dp`; None: every rank of the world."""
        group = getattr(pg_collection, "dp", None)
        if group is None:
            return cls(rank, world_size, rank, world_size)
        return cls(rank, world_size, group.rank(), group.size())

    def reads_on_from(self, state: Mapping[str, Any]) -> bool:
        """Whether a saved data state has this rank's data-parallel rank and size."""
        saved = (state["data_rank"], state["data_size"])
        return saved == (self.data_rank, self.data_size)


@dataclass(frozen=True)
class SavedRun:
    """What applying per-rank state needs to know of the run that wrote the checkpoint."""

    run_id: str
    iteration: int
    world_size: int
    differing: tuple[str, ...] | None = None
    """Names of which its ranks saved copies that differ; None: not compared."""

    @property
    def drew_alike(self) -> bool:
        """Whether it had several ranks, and their generators all had one state."""
        return self.world_size > 1 and self.differing is not None and RNG not in self.differing


def is_position(state: Any) -> bool:
    """Whether a saved value has the form of a data position."""
    return isinstance(state, dict) and state.keys() >= {"position", "data_rank", "data_size"}


def position_of(position: Any, place: Place) -> dict[str, Any]:
    """Return an iterator's position with which of the data-parallel ranks has it."""
    return {
        "position": position,
        "data_rank": place.data_rank,
        "data_size": place.data_size,
    }


_BY_NAME = "iterators by name"
"""The one key of a position that several iterators have together."""


class Iterators:
    """Several data iterators as one, each by its name."""

    def __init__(self, iterators: Mapping[str, Any]) -> None:
        self.iterators = {name: each for name, each in iterators.items() if is_stateful(each)}
        """Those whose position can be saved."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position of each."""
        return {_BY_NAME: {name: each.state_dict() for name, each in self.iterators.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the position of each."""
        for name, each in self.iterators.items():
            each.load_state_dict(state[_BY_NAME][name])


class ReshardableIterators(Iterators):
    """Several iterators that all can continue at another data-parallel size."""

    def load_resharded_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore each from its states on all data-parallel ranks of the saved run."""
        for name, each in self.iterators.items():
            each.load_resharded_state([state[_BY_NAME][name] for state in states])


def is_stateful(value: Any) -> bool:
    """Whether a position can be saved and restored."""
    return isinstance(value, Stateful)


def join_iterators(data: Any) -> Any:
    """Return several iterators, given by name, as one; anything else as it is."""
    if not isinstance(data, Mapping) or is_stateful(data):
        return data
    can_reshard = all(isinstance(each, ReshardableData) for each in data.values())
    joined = (ReshardableIterators if can_reshard else Iterators)(data)
    return joined if joined.iterators else None


def _names_in(position: Any) -> list[str] | None:
    """Return the names of the iterators that a position is of; None: it is of a single one."""
    if isinstance(position, Mapping) and position.keys() == {_BY_NAME}:
        return sorted(position[_BY_NAME])
    return None


def check_data(
    data: Stateful,
    positions: Sequence[Mapping[str, Any]],
    place: Place,
    path: str,
    accept_restart: bool,
) -> None:
    """Check early whether an iterator can restore a saved position, changing nothing.

    Raises:
        DataReshardError: nobody saved the position of this rank's reader: the data-parallel size
            differs and the iterator cannot reshard, or no rank had it.
        StateMismatchError: it is of iterators with other names.
    """
    here = sorted(data.iterators) if isinstance(data, Iterators) else None
    for each in positions:
        if (there := _names_in(each["position"])) != here:
            problem = f"the data position is of {_named(there)}, here {_named(here)}"
            raise StateMismatchError(path, different=[problem], strict=False)
    if accept_restart or not positions or any(map(place.reads_on_from, positions)):
        return
    saved_size = positions[0]["data_size"]
    restart = "set load.accept_data_restart=true to start the data from its beginning."
    if missing := _find_missing(positions):
        shown = ", ".join(map(str, missing))
        raise DataReshardError(
            f"{path} holds no data position of data-parallel rank(s) {shown} of {saved_size}: no "
            "rank had their iterator when it was saved.\n"
            f"Pass it to every save on some rank, or {restart}"
        )
    if not isinstance(data, ReshardableData):
        raise DataReshardError(
            f"{path} holds data state of {saved_size} data-parallel ranks, this run has "
            f"{place.data_size}, and {type(data).__name__} has no load_resharded_state.\n"
            f"Give it one, or {restart}"
        )


def _find_missing(positions: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the data-parallel ranks of which nobody saved the position."""
    found = {each["data_rank"] for each in positions}
    return sorted(set(range(positions[0]["data_size"])) - found)


def warn_of_lost_position(data: Any | None) -> bool:
    """Warn of an iterator whose position cannot be saved; return whether there is an iterator."""
    if data is None:
        return False
    is_one = not isinstance(data, Mapping) or is_stateful(data)
    for name, each in ({"": data} if is_one else data).items():
        missing = [
            method for method in ("state_dict", "load_state_dict") if not hasattr(each, method)
        ]
        if not missing:
            continue
        logger.warning(
            "train_data_iterator%s is a %s without %s: its position is not saved, and a resumed "
            "run reads its data from the beginning",
            f"[{name!r}]" if name else "",
            type(each).__name__,
            " and ".join(missing),
        )
    return True


def _named(names: Sequence[str] | None) -> str:
    return "a single iterator" if names is None else f"the iterators {', '.join(names)}"


def apply_data(
    data: Stateful, positions: Sequence[Mapping[str, Any]], place: Place
) -> Mapping[str, Any] | None:
    """Restore an iterator's position and return it; None: it starts from the beginning.

    `positions`: the one of this rank alone, or every distinct one that was saved.
    """
    # Another rank may have saved this reader's state; another reader's state is never restored.
    reader = next((each for each in positions if place.reads_on_from(each)), None)
    if reader is None:
        return positions[0] if _reshard_data(data, positions, place) else None
    data.load_state_dict(copy.deepcopy(reader["position"]))  # it may be applied again
    return reader


def apply_generators(state: dict[str, Any], saved: SavedRun, place: Place) -> bool:
    """Restore every generator; False: the number of ranks differs, so they were reseeded.

    `state`: as this rank saved it, where as many ranks saved, else as the lowest one did. Ranks
    that all drew alike do so at any other number.
    """
    if saved.world_size == place.world_size or saved.drew_alike:
        for name in apply_rng(state):
            logger.warning("rank %d has no %s: its RNG state was left out", place.rank, name)
        return True
    reseed(saved.run_id, saved.iteration, place.rank)
    if place.rank == 0:
        logger.warning(
            "saved by %d ranks, loaded by %d: RNG reseeded from run id, iteration and rank",
            saved.world_size,
            place.world_size,
        )
    return False


def _reshard_data(data: Stateful, positions: Sequence[Mapping[str, Any]], place: Place) -> bool:
    if not positions:
        return False
    by_rank = {each["data_rank"]: each["position"] for each in positions}
    ordered = [by_rank[rank] for rank in sorted(by_rank)]
    reshards = False
    if isinstance(data, ReshardableData) and not _find_missing(positions):
        reshards = True
        data.load_resharded_state(copy.deepcopy(ordered))
    if place.rank == 0:
        logger.warning(
            "data of %d data-parallel ranks, now %d: %s",
            positions[0]["data_size"],
            place.data_size,
            "resharded" if reshards else "restarted from its beginning (load.accept_data_restart)",
        )
    return reshards


def read_counters(train_state: Any) -> dict[str, Any]:
    """Return the counters as JSON values, including `step`.

    Raises:
        UnsupportedStateError: the object's type cannot be saved, or its `.step` and its state_dict
            disagree.
    """
    if _converts_itself(train_state):
        found = dict(train_state.to_dict())
    elif isinstance(train_state, Stateful):
        found = {key: _plain(value) for key, value in train_state.state_dict().items()}
        for name, exact in _numbers_of(train_state).items():
            if name in found and _is_rounded(found[name], exact):
                found[name] = exact
    elif is_dataclass(train_state):
        fields_now = asdict(train_state)  # type: ignore[arg-type]  # an instance, not a class
        found = {key: _plain(value) for key, value in fields_now.items()}
    else:
        raise UnsupportedStateError(
            f"state.train_state is a {type(train_state).__name__}, which cannot be saved.\n"
            "Use holdfast.TrainState, a subclass of it, another dataclass, or an object with "
            "state_dict and load_state_dict."
        )
    step = train_state.step
    if found.setdefault("step", step) != step:
        raise UnsupportedStateError(
            f"state.train_state.step is {step!r}, and its state_dict() says {found['step']!r}: "
            "it is ambiguous which iteration a checkpoint would be of."
        )
    return found


def check_counters(train_state: Any, saved: Mapping[str, Any], path: str) -> None:
    """Refuse counters that cannot be restored into the live object, changing nothing.

    Raises:
        StateMismatchError: naming each field whose saved value has a different type.
        UnsupportedStateError: the live object's type cannot be restored.
    """
    if not saved:
        return
    problems: list[str] = []
    if _converts_itself(train_state):
        if getattr(type(train_state), "update_from", None) is TrainState.update_from:
            problems = fit_fields(train_state, saved)[1]
    elif isinstance(train_state, Stateful) or not is_dataclass(train_state):
        problems = _fit(read_counters(train_state), saved)
        if not problems:
            _merged(train_state, saved)
    else:
        problems = fit_fields(train_state, saved)[1]
        if getattr(type(train_state), "__dataclass_params__").frozen:  # noqa: B009  # untyped
            problems.append("train_state is a frozen dataclass, which nothing can be restored into")
    if problems:
        raise StateMismatchError(path, different=problems)


def restore_counters(train_state: Any, saved: Mapping[str, Any]) -> None:
    """Overwrite the counters in place; a name that was not saved keeps its value.

    Raises:
        UnsupportedStateError: `.step` differs from the saved one afterwards and cannot be set.
    """
    if not saved:
        return
    if _converts_itself(train_state):
        train_state.update_from(saved)
    elif isinstance(train_state, Stateful):
        train_state.load_state_dict(_merged(train_state, saved))
        for name, now in _numbers_of(train_state).items():
            if name in saved and _is_rounded(now, saved[name]):
                setattr(train_state, name, type(now)(saved[name]))
    else:
        set_fields(train_state, saved)
    if train_state.step != saved["step"]:
        try:
            train_state.step = saved["step"]
        except AttributeError as error:
            raise UnsupportedStateError(
                f"state.train_state.step is {train_state.step!r} after load_state_dict, and not "
                f"{saved['step']}: restore it there."
            ) from error


def without_fields(saved: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Return saved counters without those that keep their live values; `step` always stays."""
    if overrides.keeps("train_state"):
        return {name: value for name, value in saved.items() if name == "step"}
    kept = overrides.parts_of("train_state")
    found = {name: value for name, value in saved.items() if name not in kept}
    if isinstance(extra := found.get("extra"), Mapping):
        found["extra"] = {name: value for name, value in extra.items() if name not in kept}
    return found


def _converts_itself(train_state: Any) -> bool:
    return isinstance(train_state, TrainState) or (
        hasattr(train_state, "to_dict") and hasattr(train_state, "update_from")
    )


def _fit(live: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in live.keys() & saved.keys():
        try:
            fit_counter(name, live[name], saved[name])
        except ValueError as error:
            problems.append(str(error))
    return sorted(problems)


def _merged(train_state: Stateful, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the argument for load_state_dict: the live state dict, updated by saved values."""
    live = train_state.state_dict()
    merged = {**live, **{key: _like(live.get(key), value) for key, value in saved.items()}}
    if "step" not in live:  # added when it was saved
        del merged["step"]
    return merged


def _plain(value: Any) -> Any:
    """Convert tensors and numpy numbers to plain Python values."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return value.tolist()
    return value


def _like(live: Any, value: Any) -> Any:
    """Return a saved value as the kind of value that the live object uses."""
    if isinstance(live, torch.Tensor):
        return torch.tensor(value, dtype=live.dtype, device=live.device)
    return value


def _numbers_of(train_state: Any) -> dict[str, int | float]:
    """Return the fields of a dataclass that are plain numbers."""
    if not is_dataclass(train_state):
        return {}
    live = {each.name: getattr(train_state, each.name) for each in fields(train_state)}
    return {name: value for name, value in live.items() if type(value) in (int, float)}


def _is_rounded(value: Any, exact: Any) -> bool:
    """Whether a number differs from another only by the rounding of a narrow tensor."""
    numbers = type(value) in (int, float) and type(exact) in (int, float)
    return numbers and value != exact and math.isclose(value, exact, rel_tol=_ROUNDING)
