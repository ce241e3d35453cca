"""The two tiers as fault tests meet them, so that one claim is tried on both.

Owns what the suites of both tiers share: a promise that is broken, a state that a crash has left,
and a tier whose every crash can be tried. What is there before each step, and what may be relied on
by then, each tier knows by itself: `crashes` for the persistent one, `local_stories` and
`local_crashes` for the local one. What needs the local tier is skipped where it is not installed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pytest
from hypothesis import HealthCheck, settings

FULL = os.environ.get("HOLDFAST_FAULTS") == "full"
"""Leave nothing out, however long it takes."""
NEEDS_LOCAL = pytest.mark.skipif(
    find_spec("nvidia_resiliency_ext") is None, reason="nvidia-resiliency-ext is not installed"
)

What = TypeVar("What")
Known = TypeVar("Known")


def sequences(examples: int, steps: int) -> settings:
    """Return how many sequences of how many steps a state machine tries in the regular run."""
    return settings(
        max_examples=300 if FULL else examples,
        stateful_step_count=25 if FULL else steps,
        derandomize=not FULL,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


class Violation(AssertionError):
    """A state that breaks a promise."""


@dataclass(frozen=True)
class Left(Generic[What, Known]):
    """One state that a crash may leave, with where it came from."""

    where: str
    what: What
    known: Known
    """What holds there."""
    is_killed: bool
    """Whether the machine went on; else it lost power."""


class States(Protocol):
    """Every different state that a crash of a story may leave."""

    def __call__(self, story: Any, *, samples: int = 0) -> Iterator[Left[Any, Any]]: ...


@dataclass(frozen=True)
class CrashedTier:
    """A tier in one place, whose every crash is tried."""

    name: str
    label: str
    """Before the rows of the table that it counts for."""
    scenarios: Sequence[str]
    tell: Callable[[str, Path], AbstractContextManager[Any]]
    """Run a scenario to its end, and give what there is to know of it."""
    states: States
    check: Callable[[Any, Left[Any, Any], random.Random], int | None]
    """Check the promises on a state, as thoroughly as there is time for.

    Returns which of the outcomes known there a load finds; None: not asked. Raises `Violation`.
    """
    marks: Sequence[pytest.MarkDecorator] = ()


def cases(tiers: Sequence[CrashedTier]) -> list[Any]:
    """Return every scenario of some tiers, to be tried by one test."""
    return [
        pytest.param(tier, name, id=f"{tier.name}-{name}", marks=tier.marks)
        for tier in tiers
        for name in tier.scenarios
    ]
