"""Compare what a checkpoint holds with the live state, changing nothing.

Owns what is missing, left over or different by names, shapes and types, whether anything fits at
all, and which prefix would make it fit; which kind of optimizer was saved; and which live options
differ from the saved ones. Everything that differs is said in one error or one sentence. Reads no
tensor of either side.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.errors import NothingFitsError, StateMismatchError
from holdfast.state.overrides import Overrides, walk_schedules
from holdfast.torch_internals import EXTRA_STATE, NESTED_SCHEDULES, nested_schedules

_SHOWN = 3
"""Names that one message lists."""
_OF_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
)
"""Options that torch's schedulers add to groups."""
_PROGRESS = frozenset({"last_epoch", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter"})
_RATES = ("base_lrs", "max_lrs", "min_lrs")
"""Scheduler attributes that hold a constructor argument expanded to one value per group."""
_DRIVEN = ("lr", "weight_decay", "momentum", "betas")
"""Options that a scheduler other than torch's may change."""


@dataclass(frozen=True)
class SavedTensors:
    """What the shard files of a checkpoint hold, by DCP's flat names."""

    tensors: Mapping[str, TensorStorageMetadata]
    values: Mapping[str, Any]
    """Everything that is not a tensor."""
    key_paths: Mapping[str, Sequence[Any]]
    """The nested keys of each flat name: strings for mappings, integers for lists."""
    hollow: Sequence[Sequence[str]]
    """The nested keys of mappings without a leaf, which DCP does not write."""
    held: Collection[str] = ()
    """Every flat name in the checkpoint, used here or not."""

    def model_names(self) -> set[str]:
        """Return the names of the model's state; a nested extra state counts as one."""
        paths = [*self.key_paths.values(), *self.hollow]
        return {f"model.{path[1]}" for path in paths if path[0] == "model" and path[1:]}

    def parameter_names(self) -> set[str]:
        """Return the names of the parameters that the saved optimizer had."""
        lists = [self.values[name] for name, path in self._options if path[3:] == ("params",)]
        return set[str]().union(*lists)

    def option_names(self) -> set[str]:
        """Return the names of the options that saved groups of parameters have."""
        return {path[3] for _, path in self._options}

    def groups(self, filled: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return the options of each saved group of parameters, in order; no nested ones.

        `filled`: tensors already read, for options that are tensors; None: leave those out.
        """
        values = {**(filled or {}), **self.values}
        found: dict[int, dict[str, Any]] = {}
        for name, path in self._options:
            if len(path) == 4 and name in values:
                found.setdefault(path[2], {})[path[3]] = values[name]
        return [found[number] for number in sorted(found)]

    @cached_property
    def _options(self) -> list[tuple[str, Sequence[Any]]]:
        """The flat name and the nested keys of each value in a group of parameters."""
        return [
            (name, path)
            for name, path in self.key_paths.items()
            if path[:2] == ("optimizer", "param_groups") and len(path) > 3
        ]


@dataclass
class Differences:
    """What differs between the two sides, each list in the order of the report."""

    missing: list[str] = field(default_factory=list)
    """Names the live state has and the checkpoint lacks."""
    unexpected: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    """Names both have, with what differs."""

    def refuse(self, path: str, strict: bool) -> None:
        """Raise what does not fit.

        Raises:
            StateMismatchError: shapes differ, or `strict` and anything else does.
        """
        if self.different or (strict and (self.missing or self.unexpected)):
            raise StateMismatchError(
                path, self.missing, self.unexpected, self.different, strict=strict
            )

    def summary(self) -> str | None:
        """Return one sentence about what is not loaded; None: everything is."""
        parts = []
        if self.missing:
            parts.append(f"not in the checkpoint, keeping the live value: {shown(self.missing)}")
        if self.unexpected:
            parts.append(f"in the checkpoint only, left out: {shown(self.unexpected)}")
        return "; ".join(parts) or None


def compare_model(
    live: Mapping[str, Any],
    saved: SavedTensors,
    path: str,
    strict: bool,
    size_of: Callable[[str, torch.Tensor], torch.Size] = lambda _, tensor: tensor.size(),
) -> Differences:
    """Compare a model's live state, by flat name, with its saved state.

    `size_of`: of the global tensor that a live one is a part of.

    Raises:
        NothingFitsError: the model has tensors and the checkpoint has none for any of them.
    """
    names = saved.model_names()
    wanted = [
        name
        for name, value in live.items()
        if isinstance(value, torch.Tensor) and not is_extra(name)
    ]
    if wanted and not any(name in saved.tensors for name in wanted):
        raise NothingFitsError(path, sorted(saved.held), wanted, suggest_prefix(wanted, saved.held))
    return Differences(
        sorted(name for name, value in live.items() if name not in names and not is_hollow(value)),
        sorted(names - set(live)),
        _find_different(live, saved.tensors, strict, size_of),
    )


def describe_left_out(
    absent: Collection[str],
    saved: SavedTensors | None,
    shared: Mapping[str, Any],
    rank: Mapping[str, Any],
    given_data: Any | None,
) -> Iterator[str]:
    """Yield what the checkpoint holds of components that this load has no object for.

    `given_data`: what was given for the data position and cannot take it, if anything.
    """
    if "optimizer" in absent and saved is not None and saved.parameter_names():
        yield "it holds optimizer state, and this load was given no optimizer: left out"
    if "scheduler" in absent and shared.get("scheduler") is not None:
        yield "it holds scheduler state, and this load was given no scheduler: left out"
    if "data" in absent and rank.get("data") is not None:
        why = "was given no data iterator"
        if given_data is not None:
            why = f"was given a {type(given_data).__name__}, which has no load_state_dict"
        yield (
            f"it holds a data position, and this load {why}: left out. Give it to an iterator "
            "that is built later with restore_data(iterator)"
        )


def suggest_prefix(live: Iterable[str], held: Iterable[str]) -> str | None:
    """Suggest a superfluous or missing prefix that explains why no name fits; None: none does.

    `live` names begin with `model.`, as the model's state does in a checkpoint.
    """
    by_end: dict[str, set[str]] = {}
    for name in held:
        for start, end in _ends(name):
            by_end.setdefault(end, set()).add(start)
    found: Counter[tuple[str, str]] = Counter()
    for name in live:
        here = _ends(name)
        # The longest common ending: what precedes it is the prefix on each side.
        start, end = next(((start, end) for start, end in here if end in by_end), ("", ""))
        found.update((start, there) for there in by_end.get(end, ()))
    for (here_start, there_start), _ in found.most_common():
        short, long = sorted((here_start, there_start), key=len)
        if not long.startswith(short):
            continue
        extra = long.removeprefix(short)
        if there_start == short:
            return f'did you mean the prefix "{extra}"? The names in the checkpoint lack it'
        return (
            f'did you mean to drop the prefix "{extra}"? Only the names in the checkpoint have it'
        )
    return None


def shown(names: Sequence[str]) -> str:
    """Return how many names there are and the first few of them."""
    first = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} ({first})"


def is_extra(name: str) -> bool:
    """Whether a name is a module's extra state, which may have any shape and need not match."""
    return name.rpartition(".")[2] == EXTRA_STATE


def is_hollow(value: Any) -> bool:
    """Whether a value has no leaf, so that DCP has nothing to write for it."""
    return isinstance(value, Mapping) and all(map(is_hollow, value.values()))


def _ends(name: str) -> list[tuple[str, str]]:
    """Return the ways to cut a name between its parts, the longest end first."""
    parts = name.split(".")
    return [
        (".".join(parts[:cut]) + "." if cut else "", ".".join(parts[cut:]))
        for cut in range(len(parts))
    ]


def _find_different(
    live: Mapping[str, Any],
    saved: Mapping[str, TensorStorageMetadata],
    strict: bool,
    size_of: Callable[[str, torch.Tensor], torch.Size],
) -> list[str]:
    different = []
    for name, target in live.items():
        source = saved.get(name)
        if source is None or not isinstance(target, torch.Tensor) or is_extra(name):
            continue
        if source.size != (size := size_of(name, target)):
            different.append(f"{name} is {list(source.size)}, here {list(size)}")
        elif strict and source.properties.dtype != target.dtype:
            different.append(f"{name} is {source.properties.dtype}, here {target.dtype}")
    return different


def check_kind(optimizers: Sequence[Optimizer], saved: Collection[str], path: str) -> None:
    """Refuse groups that another kind of optimizer saved; `saved`: the options that they have.

    Each side has options then that the other lacks. Options of one side alone are those of another
    version of torch, or were added by a scheduler.

    Raises:
        StateMismatchError: with the options of both sides.
    """
    for optimizer in optimizers if saved else ():
        live = set[str]().union(*(group.keys() for group in optimizer.param_groups)) - {"params"}
        lacking = (live & _arguments(type(optimizer))) - set(saved)
        unknown = set(saved) - live - {"params"} - _OF_SCHEDULERS
        if lacking and unknown:
            error = StateMismatchError(
                path,
                [f"optimizer.param_groups.{each}" for each in sorted(lacking)],
                [f"optimizer.param_groups.{each}" for each in sorted(unknown)],
                strict=False,
            )
            error.message += (
                f"\nAnother optimizer than this {type(optimizer).__name__} was saved: "
                "load.override=[optimizer] keeps this one beside the saved model."
            )
            raise error


def describe_options(
    optimizers: Sequence[Optimizer],
    saved_groups: Sequence[Mapping[str, Any]],
    scheduler: Any | None,
    saved_scheduler: Any | None,
    overrides: Overrides,
) -> str | None:
    """Report every option of restored objects that differs, and how to keep it; None: none does.

    Compared is what was chosen as an argument of a constructor. What a schedule changes during
    training is not a choice.
    """
    schedule = scheduler if saved_scheduler is not None else None
    reported: list[str] = []
    names: list[str] = []
    groups = [(each, group) for each in optimizers for group in each.param_groups]
    if len(groups) == len(saved_groups):
        for number, ((optimizer, group), saved) in enumerate(
            zip(groups, saved_groups, strict=True)
        ):
            for key, live, old in _differing(optimizer, group, saved, schedule):
                name = f"optimizer.{key}"
                if name not in overrides.names:
                    where = f" (group {number})" if len(groups) > 1 else ""
                    reported.append(f"{name}{where} is {live} here and was {old}")
                    names.append(name)
    if isinstance(schedule, LRScheduler):
        rate_is_reported = "optimizer.lr" in (*names, *overrides.names)
        for key, live, old in _differing_schedule(
            schedule, schedule.state_dict(), saved_scheduler or {}
        ):
            if not (rate_is_reported and key == "base_lrs"):
                reported.append(f"scheduler.{key} is {live} here and was {old}")
                names.append("scheduler")
    if not reported:
        return None
    keep = ",".join(dict.fromkeys(names))
    return (
        f"options of this run differ from the saved ones, which are used: {'; '.join(reported)}. "
        f"checkpoint.load.override=[{keep}] keeps those of this run"
    )


def _differing(
    optimizer: Optimizer, group: Mapping[str, Any], saved: Mapping[str, Any], schedule: Any | None
) -> Iterator[tuple[str, Any, Any]]:
    chosen = _arguments(type(optimizer))
    driven: set[str] = set()
    if isinstance(schedule, LRScheduler):
        driven = {"lr"}
        if any(getattr(each, "cycle_momentum", False) for each in walk_schedules(schedule)):
            driven |= {"momentum", "betas"}
    elif schedule is not None:
        driven = set(_DRIVEN)
    for key in sorted(group.keys() & saved.keys() & chosen - {"params"}):
        live, old = group[key], saved[key]
        if key in driven:
            if key != "lr" or "initial_lr" not in group or "initial_lr" not in saved:
                continue
            live, old = group["initial_lr"], saved["initial_lr"]
        live, old = _comparable(live), _comparable(old)
        if live != old:
            yield key, live, old


def _differing_schedule(
    schedule: Any, live: Mapping[str, Any], saved: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    chosen = _arguments(type(schedule)) - _PROGRESS
    for key in sorted(live.keys() & saved.keys()):
        if key == NESTED_SCHEDULES:
            parts = zip(nested_schedules(schedule), live[key], saved[key], strict=False)
            for each in parts:
                yield from _differing_schedule(*each)
        elif key.lstrip("_") in chosen or key in _RATES:
            one, other = _comparable(live[key]), _comparable(saved[key])
            if one != other:
                yield key.lstrip("_"), one, other


def _arguments(kind: type) -> set[str]:
    """Return the parameter names of a class's constructor and of its base classes'."""
    found: set[str] = set()
    for each in kind.__mro__:
        if "__init__" in vars(each) and each is not object:
            found |= set(inspect.signature(vars(each)["__init__"]).parameters)
    return found


def _comparable(value: Any) -> Any:
    if hasattr(value, "tolist"):  # a torch or numpy value
        return _comparable(value.tolist())
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    if isinstance(value, Mapping):
        return {key: _comparable(each) for key, each in value.items()}
    return value
