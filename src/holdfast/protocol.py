"""The contract between a training loop and a checkpoint manager.

Owns the protocol, the two contexts, the result, and the counters of a run. Names and positional
order follow Megatron-Bridge, so that a loop or a manager written for its protocol works unchanged.
Promises to import no torch and to have no behaviour: everything here is a value or a signature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from holdfast.config import CheckpointConfig
    from holdfast.state.components import StateComponent
    from holdfast.state.strategy import LoadStrategy


@dataclass
class TrainState:
    """The counters of a run. Saved with every checkpoint and restored in place by `load`."""

    step: int = 0
    """Completed optimizer steps; a checkpoint's iteration."""
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    skipped_train_samples: int = 0
    tokens_seen: int = 0
    floating_point_operations_so_far: int = 0
    """An exact integer of any size."""
    do_train: bool = True
    do_valid: bool = True
    do_test: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    """Other counters of a loop; JSON values only."""

    def to_dict(self) -> dict[str, Any]:
        """Return the counters as plain JSON values."""
        return asdict(self)

    def update_from(self, values: Mapping[str, Any]) -> None:
        """Overwrite the counters in place; a counter without a saved value keeps its own.

        Unknown names go to `extra`, unless the saved `extra` has that name; a counter that was
        saved in `extra` becomes the field of that name, if there is one.

        Raises:
            ValueError: a value has another type than its counter; nothing was overwritten.
        """
        set_fields(self, values)


def set_fields(counters: Any, values: Mapping[str, Any]) -> None:
    """Overwrite the fields of a dataclass in place, as `TrainState.update_from`.

    Raises:
        ValueError: naming each value of another type; nothing was overwritten.
    """
    fitting, problems = fit_fields(counters, values)
    if problems:
        raise ValueError("; ".join(problems))
    for name, value in fitting.items():
        live = getattr(counters, name)
        if is_dataclass(live) and isinstance(value, Mapping):
            set_fields(live, value)
        else:
            setattr(counters, name, value)


def fit_fields(counters: Any, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the new value of each field of a dataclass, and the problems."""
    live = {each.name: getattr(counters, each.name) for each in fields(counters)}
    optional = {
        each.name for each in fields(counters) if re.search("None|Optional", str(each.type))
    }
    fitting: dict[str, Any] = {}
    problems: list[str] = []
    extra = values.get("extra", live.get("extra"))
    more = dict(extra) if isinstance(extra, Mapping) else {}
    saved = dict(values)
    for name in live.keys() & more.keys() - values.keys():
        if _fits(name, live[name], more[name]):
            saved[name] = more.pop(name)
    for name, value in saved.items():
        if name not in live:
            if name != "step" and name not in values.get("extra", ()):
                more[name] = value
            continue
        if value is None and name in optional:
            fitting[name] = None
            continue
        try:
            fitting[name] = fit_counter(name, live[name], value)
        except ValueError as error:
            problems.append(str(error))
    if isinstance(live.get("extra"), Mapping) and isinstance(extra, Mapping):
        fitting["extra"] = more
    return fitting, sorted(problems)


def fit_counter(name: str, live: Any, value: Any) -> Any:
    """Convert a saved value to the type of the live counter; only JSON types are checked.

    Raises:
        ValueError: naming the counter and both types.
    """
    kind = type(live)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    elif is_dataclass(live) and isinstance(value, Mapping):
        _, problems = fit_fields(live, value)
        if not problems:
            return value
        raise ValueError(f"in train_state.{name}: {'; '.join(problems)}")
    elif kind not in _JSON_TYPES or type(value) is kind:
        return value
    raise ValueError(
        f"train_state.{name} is saved as {value!r}, here it is of type {kind.__name__}"
    )


_JSON_TYPES = (bool, int, float, str, list, dict)


def _fits(name: str, live: Any, value: Any) -> bool:
    try:
        fit_counter(name, live, value)
    except ValueError:
        return False
    return True


@dataclass
class GlobalState:
    """The state that a loop keeps between steps and passes to its manager."""

    cfg: Any = None
    """The composed run config: a dataclass, a DictConfig, a mapping or None. Saved as YAML."""
    train_state: Any = field(default_factory=TrainState)
    """The counters: `TrainState`, a subclass, another dataclass, or an object with `state_dict` and
    `load_state_dict`; `step` is read from it as an attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Set here, a counter would have no effect: each save would be one of step 0.
        own = {each.name for each in fields(self)}  # a subclass may have a field of this name
        if name in _COUNTERS and name not in own and not hasattr(type(self), name):
            raise AttributeError(f"counters are in train_state: set state.train_state.{name}")
        super().__setattr__(name, value)


_COUNTERS = frozenset(each.name for each in fields(TrainState))


@dataclass
class CheckpointSaveContext:
    """Everything one save covers."""

    state: GlobalState
    model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
    """One module, the chunks of one in order, or several by name."""
    optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None
    opt_param_scheduler: Any | None
    """An object with `state_dict` and `load_state_dict`; None: there is no scheduler."""
    num_floating_point_operations_so_far: int = 0
    """Saved, and returned by `load`."""
    train_data_iterator: Any | None = None
    """Saved, one state per data-parallel rank, if it has `state_dict` and `load_state_dict`."""
    non_persistent_ckpt: bool = False
    """True: save to the local tier only."""
    pg_collection: Any | None = None
    """Process groups; only `dp`, the data-parallel group, is used. None: the world."""
    module_name: str | None = None
    """Megatron-Bridge's name for one of several co-trained modules; kept for custom managers."""
    components: Sequence[StateComponent] = ()
    """Further named state."""


@dataclass
class CheckpointLoadContext:
    """The objects that a load restores into."""

    state: GlobalState
    model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
    optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None
    opt_param_scheduler: Any | None
    strict: bool | Mapping[str, str] | None = None
    """Whether names must match exactly, or a table as `load.strict` has; None: the config's."""
    skip_load_to_model_and_opt: bool = False
    """True: restore counters, scheduler, RNG and data only."""
    pg_collection: Any | None = None
    module_name: str | None = None
    train_data_iterator: Any | None = None
    components: Sequence[StateComponent] = ()
    """What further named state is given to; `restore_component` gives it later."""
    strategy: LoadStrategy | Mapping[str, Any] | None = None
    """Which parts are restored, and under which names; None: as the config says."""


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A candidate that a load skipped."""

    path: str
    reason: str
    iteration: int | None = None
    """None: the iteration could not be read."""
    tier: str = "persistent"


@dataclass(frozen=True)
class ShardSource:
    """One file that tensors of this rank came from, in the last load."""

    tier: str
    path: str
    """Relative to the directory of the tier; of the local tier, on that node."""
    size_bytes: int
    """Bytes that this rank read from it."""
    owner: int | None = None
    """The rank that saved it; None: unknown from its name."""
    rank: int | None = None
    """The rank that read the file: this one, or the peer that sent from it; None: any rank can."""
    node: str | None = None
    """The node that stores it; None: storage that all nodes share."""


@dataclass(frozen=True)
class Restored:
    """What was restored of one component on this rank."""

    tensors: int = 0
    """Number of tensors that were restored."""
    size_bytes: int = 0
    """Their size; for state that is not a tensor, its size in the checkpoint."""


class LoadResult(tuple[int, int]):
    """The result of a load: the pair `(iteration, num_floating_point_operations_so_far)`.

    A tuple of two, as Megatron-Bridge's loop expects, with attributes, like `os.stat_result`.
    Immutable. Equal to a plain pair of the same numbers; equal to another result only if all
    attributes are equal.
    """

    iteration: int
    num_floating_point_operations_so_far: int
    found: bool
    """False: no checkpoint was found; the run starts fresh and both numbers are 0."""
    tier: str | None
    path: Path | None
    skipped: tuple[SkippedCheckpoint, ...]
    """Newer candidates that were skipped, newest first, each with its reason."""
    sources: tuple[ShardSource, ...]
    """Where this rank's tensors came from: its own files, copies at peers, the persistent tier."""
    restored: Mapping[str, Restored]
    """By component (`model, optimizer, scheduler, data, rng, train_state, components.<name>`): what
    was restored on this rank. A component without an entry kept its live state."""
    is_durable: bool
    """Whether the persistent tier has the loaded commit; a local one may be newer."""
    is_pretrained: bool
    """Whether the run began from `load.pretrained` instead of a checkpoint of its own."""

    def __new__(
        cls,
        iteration: int = 0,
        num_floating_point_operations_so_far: int = 0,
        found: bool = False,
        tier: str | None = None,
        path: Path | None = None,
        skipped: Sequence[SkippedCheckpoint] = (),
        sources: Sequence[ShardSource] = (),
        restored: Mapping[str, Restored] | None = None,
        is_durable: bool = False,
        is_pretrained: bool = False,
    ) -> LoadResult:
        result = super().__new__(cls, (iteration, num_floating_point_operations_so_far))
        vars(result).update(
            iteration=iteration,
            num_floating_point_operations_so_far=num_floating_point_operations_so_far,
            found=found,
            tier=tier,
            path=path,
            skipped=tuple(skipped),
            sources=tuple(sources),
            restored=MappingProxyType(dict(restored or {})),
            is_durable=is_durable,
            is_pretrained=is_pretrained,
        )
        return result

    def __setattr__(self, name: str, _: Any) -> None:
        raise AttributeError(f"{name} of a load's result cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} of a load's result cannot be deleted")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, LoadResult):
            return vars(self) == vars(other)
        return tuple.__eq__(self, other) if isinstance(other, tuple) else NotImplemented

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        return tuple.__hash__(self)

    def __repr__(self) -> str:
        values = {**vars(self), "restored": dict(self.restored)}
        return f"LoadResult({', '.join(f'{name}={each!r}' for name, each in values.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        values = {**vars(self), "restored": dict(self.restored)}
        return LoadResult, tuple(values.values())


@runtime_checkable
class CheckpointManager(Protocol):
    """The methods that a training loop calls. Every rank makes each call."""

    def __init__(self, checkpoint_config: CheckpointConfig) -> None: ...

    def save(self, ctx: CheckpointSaveContext, callback_manager: Any | None = None) -> None:
        """Save at `ctx.state.train_state.step`, due or not; return when training may continue."""

    def load(self, ctx: CheckpointLoadContext) -> LoadResult:
        """Restore the newest loadable checkpoint; the result may be a plain `(int, int)`."""
        raise NotImplementedError  # a protocol's body; implementations never reach it

    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Finish async saves: call once per step, and with both flags set once at the end."""


@runtime_checkable
class Stateful(Protocol):
    """An object whose state can be saved and restored."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@runtime_checkable
class ReshardableData(Protocol):
    """A data iterator that can continue at another data-parallel size."""

    def load_resharded_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Restore from the states of all data-parallel ranks of the saved run, in rank order."""
