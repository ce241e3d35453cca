"""Options that the run asks for now and that were others when the checkpoint was saved.

Owns which options are compared: those that somebody chose, by the arguments of the optimizer's and
of the scheduler's constructor. Promises one sentence for all of them and no false alarm: what a
schedule changes as it goes, and how far it has come, is no choice.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.state.overrides import Overrides

_PROGRESS = frozenset({"last_epoch", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter"})
_RATES = ("base_lrs", "max_lrs", "min_lrs")
"""What a scheduler keeps per group of an argument that it was given once."""
_DRIVEN = ("lr", "weight_decay", "momentum", "betas")
"""What a scheduler that is not torch's may change."""


def describe_differences(
    optimizers: Sequence[Optimizer],
    saved_groups: Sequence[Mapping[str, Any]],
    scheduler: Any | None,
    saved_scheduler: Any | None,
    overrides: Overrides,
) -> str | None:
    """Name every live option that differs and what would keep it; None: none does.

    `saved_groups` empty, or `saved_scheduler` None: not restored.
    """
    restored = saved_scheduler is not None and not overrides.keeps("scheduler")
    schedule = scheduler if restored else None
    told: list[str] = []
    names: list[str] = []
    groups = [(each, group) for each in optimizers for group in each.param_groups]
    if len(groups) == len(saved_groups) and not overrides.keeps("optimizer"):
        for number, ((optimizer, group), saved) in enumerate(
            zip(groups, saved_groups, strict=True)
        ):
            for key, live, old in _differing(optimizer, group, saved, schedule):
                name = f"optimizer.{key}"
                if name not in overrides.names:
                    where = f" (group {number})" if len(groups) > 1 else ""
                    told.append(f"{name}{where} is {live} here and was {old}")
                    names.append(name)
    if isinstance(schedule, LRScheduler):
        rate_is_told = "optimizer.lr" in (*names, *overrides.names)
        for key, live, old in _differing_schedule(
            schedule, schedule.state_dict(), saved_scheduler or {}
        ):
            if not (rate_is_told and key == "base_lrs"):
                told.append(f"scheduler.{key} is {live} here and was {old}")
                names.append("scheduler")
    if not told:
        return None
    keep = ",".join(dict.fromkeys(names))
    return (
        f"options of this run differ from the saved ones, which are used: {'; '.join(told)}. "
        f"checkpoint.load.override=[{keep}] keeps those of this run"
    )


def _differing(
    optimizer: Optimizer, group: Mapping[str, Any], saved: Mapping[str, Any], schedule: Any | None
) -> Iterator[tuple[str, Any, Any]]:
    chosen = _arguments(type(optimizer))
    driven: set[str] = set()
    if isinstance(schedule, LRScheduler):
        driven = {"lr"}
        if any(getattr(each, "cycle_momentum", False) for each in _all_of(schedule)):
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
        if key == "_schedulers":
            parts = zip(schedule._schedulers, live[key], saved[key], strict=False)
            for each in parts:
                yield from _differing_schedule(*each)
        elif key.lstrip("_") in chosen or key in _RATES:
            one, other = _comparable(live[key]), _comparable(saved[key])
            if one != other:
                yield key.lstrip("_"), one, other


def _arguments(kind: type) -> set[str]:
    """Return the names of what a class's constructor, and those it passes them on to, is given."""
    found: set[str] = set()
    for each in kind.__mro__:
        if "__init__" in vars(each) and each is not object:
            found |= set(inspect.signature(vars(each)["__init__"]).parameters)
    return found


def _all_of(schedule: Any) -> Iterator[Any]:
    yield schedule
    for each in getattr(schedule, "_schedulers", ()):
        yield from _all_of(each)


def _comparable(value: Any) -> Any:
    if hasattr(value, "tolist"):  # of torch or numpy
        return _comparable(value.tolist())
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    if isinstance(value, Mapping):
        return {key: _comparable(each) for key, each in value.items()}
    return value
