"""What keeps its live value in a load.

Owns the names that `load.override` accepts and how a live value survives a restore. Unknown names
and schedules that cannot be rescaled are refused before anything is changed. With a restored
schedule, a kept learning rate has the expected meaning: the schedule continues where it was, scaled
to the live base rate, which is exact only if rates are proportional to the base; other schedulers
are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from holdfast.errors import ConfigError
from holdfast.torch_internals import (
    NESTED_SCHEDULES,
    hides_schedules,
    last_rates,
    nested_schedules,
    set_last_rates,
)

COMPONENTS = ("optimizer", "scheduler", "data", "rng", "train_state")
_PROPORTIONAL = frozenset(
    {
        lr_scheduler.LambdaLR,
        lr_scheduler.MultiplicativeLR,
        lr_scheduler.StepLR,
        lr_scheduler.MultiStepLR,
        lr_scheduler.ConstantLR,
        lr_scheduler.LinearLR,
        lr_scheduler.ExponentialLR,
        lr_scheduler.PolynomialLR,
        lr_scheduler.CosineAnnealingLR,  # with eta_min=0, like the next
        lr_scheduler.CosineAnnealingWarmRestarts,
        lr_scheduler.SequentialLR,
        lr_scheduler.ChainedScheduler,
    }
)
"""Schedulers whose rates are a multiple of the base rate; a subclass may not be."""


@dataclass(frozen=True)
class Overrides:
    """The names in `load.override`, which keep their live values."""

    names: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, names: Sequence[str], *, rng: bool = True) -> Overrides:
        """Return the config's overrides; `rng` false also keeps the generators as they are."""
        return cls(frozenset(names) | (frozenset() if rng else {"rng"}))

    def keeps(self, component: str) -> bool:
        """Return whether a whole component keeps its live values."""
        return component in self.names

    def parts_of(self, component: str) -> set[str]:
        """Return which options of the optimizer, or fields of the counters, keep their values."""
        start = f"{component}."
        return {each.removeprefix(start) for each in self.names if each.startswith(start)}

    def check(
        self,
        optimizers: Sequence[Optimizer],
        scheduler: Any | None,
        counters: Sequence[str],
        saved_scheduler: Any | None,
        taken: Sequence[Any],
        components: Collection[str] = (),
    ) -> None:
        """Refuse unknown names, and learning rates that could not be kept.

        `counters`: names of the live ones. `taken`: for each group, what was saved of it; None:
        nothing. `components`: names of declared and saved ones.

        Raises:
            ConfigError: listing unknown and known names, or why the rate cannot be kept.
        """
        groups = [group for each in optimizers for group in each.param_groups]
        options = sorted({key for group in groups for key in group} - {"params", "initial_lr"})
        known = [
            *COMPONENTS,
            *(f"optimizer.{each}" for each in options),
            *(f"train_state.{each}" for each in sorted(counters) if each != "step"),
            *(f"components.{each}" for each in sorted(components)),
        ]
        unknown = set(self.names.difference(known))
        if not optimizers:  # a load without one may use the same config as the others
            unknown = {each for each in unknown if not each.startswith("optimizer.")}
        if unknown:
            names, there = ", ".join(sorted(unknown)), ", ".join(known)
            problem = f"checkpoint.load.override: not known here: {names}; known are {there}"
            raise ConfigError([problem])
        if not self.rebases or not optimizers or scheduler is None or saved_scheduler is None:
            return
        if (reason := _why_not_proportional(scheduler, saved_scheduler)) is not None:
            raise ConfigError([f"{_BESIDE}: {reason}. {_INSTEAD}"])
        if self.keeps("optimizer") and any(each is None for each in taken):
            at = next(at for at, each in enumerate(taken) if each is None)
            counts = f"what was saved of the parameters of group {at} is not one group"
            raise ConfigError([f"{_BESIDE}: {counts}. {_INSTEAD}"])

    @property
    def rebases(self) -> bool:
        """Whether a restored schedule would continue with a different base rate."""
        is_kept = self.keeps("optimizer") or "lr" in self.parts_of("optimizer")
        return is_kept and not self.keeps("scheduler")


_BESIDE = "checkpoint.load.override cannot keep the learning rate beside the restored scheduler"
_INSTEAD = "Add scheduler to load.override, which starts the schedule afresh"


class LiveOptions:
    """Optimizer options and base rates of schedules as they were before a restore."""

    def __init__(
        self, overrides: Overrides, optimizers: Sequence[Optimizer], scheduler: Any | None
    ) -> None:
        """Copy the options; `scheduler` None: none is restored."""
        self._overrides = overrides
        self._optimizers = optimizers
        self._scheduler = scheduler
        options = overrides.parts_of("optimizer")
        if "lr" in options:
            options.add("initial_lr")
        self._kept = [
            {key: _copy(group[key]) for key in options & group.keys()} for group in self._groups
        ]
        self._base_rates = [_base_rate(group) for group in self._groups]
        self._base_lists = [
            list(each.base_lrs) for each in walk_schedules(scheduler) if _has_bases(each)
        ]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for each in self._optimizers for group in each.param_groups]

    def put_back(self, saved_groups: Sequence[Mapping[str, Any]]) -> None:
        """Restore the kept options; the current rate is the saved one, scaled to the live base."""
        rebases = self._overrides.rebases and self._scheduler is not None
        if self._overrides.keeps("optimizer"):
            rated = [(_rate(each), _base_rate(each)) for each in saved_groups]
        else:
            rated = [(_rate(group), _base_rate(group)) for group in self._groups]
        for group, kept in zip(self._groups, self._kept, strict=True):
            group.update({key: _copy(value) for key, value in kept.items()})
        if not rebases or not self._groups:
            return
        factors = []
        for group, base, (saved_rate, saved_base) in zip(
            self._groups, self._base_rates, rated, strict=True
        ):
            # Exact if the schedule has not changed the rate yet, or the base is the same.
            factor = base / saved_base if saved_base else 1.0
            factors.append(factor)
            _set(group, "lr", base if saved_rate == saved_base else saved_rate * factor)
        self._rebase_schedules(factors)

    def _rebase_schedules(self, factors: Sequence[float]) -> None:
        schedules = list(walk_schedules(self._scheduler))
        with_bases = [each for each in schedules if _has_bases(each)]
        for schedule, bases in zip(with_bases, self._base_lists, strict=True):
            schedule.base_lrs = bases
        root = self._scheduler
        assert root is not None
        if type(root) is lr_scheduler.LambdaLR:  # bit-identical to what its next step computes
            rates = [
                base * each(root.last_epoch)
                for base, each in zip(root.base_lrs, root.lr_lambdas, strict=True)
            ]
            for group, rate in zip(self._groups, rates, strict=True):
                _set(group, "lr", float(rate))
        for schedule in schedules:
            last = last_rates(schedule)
            if last is not None and len(last) == len(factors):
                scaled = [float(rate) * each for rate, each in zip(last, factors, strict=True)]
                set_last_rates(schedule, scaled)
        set_last_rates(root, [_rate(group) for group in self._groups])


def _why_not_proportional(scheduler: Any, saved: Any) -> str | None:
    """Return why a schedule cannot continue with a different base rate; None: it can."""
    for each in walk_schedules(scheduler):
        if type(each) not in _PROPORTIONAL:
            return f"the rates of a {type(each).__name__} are not known to follow the base rate"
        if hides_schedules(each):
            version = torch.__version__
            return f"torch {version} does not show the schedules inside a {type(each).__name__}"
    for each in _walk_saved(saved):
        if each.get("eta_min", 0):
            return f"its rates do not fall below eta_min={each['eta_min']}, whatever the base rate"
    return None


def walk_schedules(scheduler: Any | None) -> Iterator[Any]:
    """Yield a schedule and all those inside it; None: none."""
    if scheduler is not None:
        yield scheduler
        for each in nested_schedules(scheduler):
            yield from walk_schedules(each)


def _walk_saved(state: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(state, Mapping):
        yield state
        for each in state.get(NESTED_SCHEDULES, ()):
            yield from _walk_saved(each)


def _has_bases(scheduler: Any) -> bool:
    return isinstance(getattr(scheduler, "base_lrs", None), list)


def _rate(group: Mapping[str, Any]) -> float:
    return float(group["lr"])


def _base_rate(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group.get("lr", 0.0)))


def _set(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group[key], torch.Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
