"""Kind and options of the optimizers that saved, compared with those of this run.

Owns which kinds of optimizers a state may move between: by the class of torch that each is derived
from, and by the options that each has where a class says nothing. Also owns which live options
differ from the saved ones: compared is what was chosen as an argument of a constructor. What a
schedule changes during training is not a choice. Changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import optim
from torch.optim.lr_scheduler import LRScheduler

from holdfast.errors import StateMismatchError
from holdfast.state.groups import Group, Match, comparable
from holdfast.state.overrides import Overrides, walk_schedules
from holdfast.torch_internals import NESTED_SCHEDULES, nested_schedules

_OF_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
)
"""Options that torch's schedulers add to groups."""
_PROGRESS = frozenset({"last_epoch", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter"})
_RATES = ("base_lrs", "max_lrs", "min_lrs")
"""Scheduler attributes that hold a constructor argument expanded to one value per group."""
_DRIVEN = ("lr", "weight_decay", "momentum", "betas")
"""Options that a scheduler other than torch's may change."""


_DECOUPLED = "decoupled_weight_decay"
"""The option by which Adam and AdamW, one derived from the other, are different algorithms."""


def check_kinds(
    optimizer: Any, live: Sequence[Group], saved: Sequence[Group], label: str, path: str
) -> None:
    """Refuse groups that another kind of optimizer saved; `saved`: those that have its parameters.

    Kinds are equal where the class of torch that both are derived from is the same, or where one
    class is derived from the other and both decouple the weight decay or both do not. Where torch
    does not have the class of one side, they differ if each side has options that the other lacks.
    Options of one side alone are those of another version of torch, or were added by a scheduler.

    Raises:
        StateMismatchError: with both classes, and the options of both sides.
    """
    if not saved or not live:
        return
    kinds = {each.kind for each in saved}
    own = live[0].kind
    options = set[str]().union(*(each.options for each in live))
    theirs = set[str]().union(*(each.options for each in saved))
    lacking = (options & _arguments(type(optimizer))) - theirs
    unknown = theirs - options - _OF_SCHEDULERS
    if all(_is_torchs(each) for each in (own, *kinds)):
        is_other = any(not _are_alike(own, each.kind, live, saved) for each in saved)
    else:
        is_other = bool(lacking and unknown)
    if not is_other:
        return
    others = ", ".join(sorted(each for each in kinds if each is not None)) or "another class"
    error = StateMismatchError(
        path,
        [f"{label}.param_groups.{each}" for each in sorted(lacking)],
        [f"{label}.param_groups.{each}" for each in sorted(unknown)],
        [f"{label} was saved by {others}, here is {type(optimizer).__name__}"],
        strict=False,
    )
    error.message += (
        f"\nAnother optimizer than this {type(optimizer).__name__} was saved (classes and options "
        "are compared): load.override=[optimizer] keeps this one beside the saved model."
    )
    raise error


def check_schedule(
    scheduler: Any, saved: Mapping[str, Any] | None, matches: Sequence[Match], path: str
) -> None:
    """Refuse the state of another schedule of torch's, or of one with a rate for other groups.

    Raises:
        StateMismatchError: each side has settings that the other lacks, or it has a rate per group
            for another number or order of groups.
    """
    if saved is None or not isinstance(scheduler, LRScheduler):
        return
    live = scheduler.state_dict()
    problems = list(_find_other_rates(scheduler, live, saved, matches))
    chosen = _arguments(type(scheduler)) & live.keys() - saved.keys()
    unknown = {each for each in saved.keys() - live.keys() if not each.startswith("_")}
    if chosen and unknown:
        has = ", ".join(sorted(unknown))
        problems = [f"scheduler has {has}, which no {type(scheduler).__name__} has"]
    if problems:
        error = StateMismatchError(path, different=problems, strict=False)
        error.message = (
            f"{path} does not fit the live state: {'; '.join(problems)}.\n"
            "Make the groups and the schedule that were saved, or start the schedule afresh: "
            "load.override=[scheduler]."
        )
        raise error


def _find_other_rates(
    schedule: Any, live: Mapping[str, Any], saved: Mapping[str, Any], matches: Sequence[Match]
) -> Iterator[str]:
    if NESTED_SCHEDULES in live and NESTED_SCHEDULES in saved:
        parts = (nested_schedules(schedule), live[NESTED_SCHEDULES], saved[NESTED_SCHEDULES])
        for each in zip(*parts, strict=False):
            yield from _find_other_rates(*each, matches)
    for key in _RATES:
        here, there = live.get(key), saved.get(key)
        if not isinstance(here, list) or not isinstance(there, list):
            continue
        if len(here) != len(there):
            yield f"scheduler.{key} was saved for {len(there)} groups, here are {len(here)}"
            continue
        moved = [
            (at, source)
            for each in matches
            if len(each.sources) == len(there)
            for at, sources in enumerate(each.sources)
            for source in sources
            if source < len(there) and comparable(there[source]) != comparable(there[at])
        ]
        if moved:
            at, source = moved[0]
            yield f"scheduler.{key} was saved for group {source} where group {at} is here"


def _is_torchs(kind: str | None) -> bool:
    found = getattr(optim, kind or "", None)
    return isinstance(found, type) and found is not optim.Optimizer


def _are_alike(
    own: str | None, other: str | None, live: Sequence[Group], saved: Sequence[Group]
) -> bool:
    if own == other:
        return True
    one, two = getattr(optim, own or ""), getattr(optim, other or "")
    if not (issubclass(one, two) or issubclass(two, one)):
        return False
    return len({bool(each.options.get(_DECOUPLED)) for each in (*live, *saved)}) == 1


@dataclass(frozen=True)
class OptionPair:
    """One group here and what it is given."""

    optimizer: Any
    group: Mapping[str, Any]
    saved: Group | None
    """None: it keeps its own options."""


@dataclass(frozen=True)
class OptionDifferences:
    """Options of restored objects that differ from those of this run."""

    reported: Sequence[str]
    """For each the name and both values."""
    names: Sequence[str]
    """What to list in `load.override` to keep those of this run."""

    def sentence(self) -> str | None:
        """Return what differs, and how to keep it; None: nothing does."""
        if not self.reported:
            return None
        keep = ",".join(dict.fromkeys(self.names))
        return (
            "options of this run differ from the saved ones, which are used: "
            f"{'; '.join(self.reported)}. "
            f"checkpoint.load.override=[{keep}] keeps those of this run"
        )


def find_option_differences(
    pairs: Sequence[OptionPair],
    scheduler: Any | None,
    saved_scheduler: Any | None,
    overrides: Overrides,
) -> OptionDifferences:
    """Return every option that differs, except those that `load.override` keeps."""
    schedule = scheduler if saved_scheduler is not None else None
    reported: list[str] = []
    names: list[str] = []
    for number, pair in enumerate(pairs):
        if pair.saved is None:
            continue
        for key, live, old in _differing(pair.optimizer, pair.group, pair.saved.options, schedule):
            name = f"optimizer.{key}"
            if name not in overrides.names:
                where = f" (group {number})" if len(pairs) > 1 else ""
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
    return OptionDifferences(reported, names)


def _differing(
    optimizer: Any, group: Mapping[str, Any], saved: Mapping[str, Any], schedule: Any | None
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
        live, old = comparable(live), comparable(old)
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
            one, other = comparable(live[key]), comparable(saved[key])
            if one != other:
                yield key.lstrip("_"), one, other


def _arguments(kind: type) -> set[str]:
    """Return the parameter names of a class's constructor and of its base classes'."""
    found: set[str] = set()
    for each in kind.__mro__:
        if "__init__" in vars(each) and each is not object:
            found |= set(inspect.signature(vars(each)["__init__"]).parameters)
    return found
