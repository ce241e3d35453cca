"""Refuse state that cannot be given back as soon as it exists, not at the first save.

Owns what a load looks at although nothing is saved yet (`check_values`; `check_inner` for
optimizers inside optimizers), the order of optimizers that were given by name (`listed`), and the
look at the state that optimizers make at their first step, once, by the first
`finalize_async_saves` after it has appeared. Promises that nothing is copied or changed, that no
other rank is needed, and that a step without new entries costs one count for each optimizer. Keeps
no live object alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from holdfast.errors import UnsupportedStateError
from holdfast.format.nondense import is_dense, pickle_tensor
from holdfast.state.codec import check_keys, check_plain, check_reachable
from holdfast.state.naming import ROOT, STATE
from holdfast.torch_internals import local_of


def check_values(leaves: Mapping[str, Any]) -> None:
    """Refuse values that could not be saved and read back; the first of each subclass is tried.

    Raises:
        UnsupportedStateError: naming the first.
    """
    check_reachable(leaves)
    tried: set[type] = set()
    for name, value in leaves.items():
        if not isinstance(value, torch.Tensor):
            check_plain(value, name)
        elif not is_dense(local := local_of(value)) and type(local) not in tried:
            tried.add(type(local))
            pickle_tensor(local.detach(), name, is_first=True)


def check_inner(optimizers: Sequence[Any]) -> None:
    """Refuse an optimizer that steps with another one, whose state is no part of its own.

    Wrappers whose `state` is the inner one's are whole; so is a pair of which both are given.

    Raises:
        UnsupportedStateError: naming both classes and the attribute.
    """
    given = {id(each) for each in optimizers}
    for optimizer in optimizers:
        own = getattr(optimizer, "__dict__", {})
        if STATE not in own:
            continue
        for name, inner in own.items():
            if (
                isinstance(inner, torch.optim.Optimizer)
                and id(inner) not in given
                and inner.state is not own[STATE]
                and not _parameters_of(inner).isdisjoint(_parameters_of(optimizer))
            ):
                raise UnsupportedStateError(
                    f"{type(optimizer).__name__}.{name} is an optimizer ({type(inner).__name__}) "
                    f"with state of its own, which {type(optimizer).__name__}.state does not "
                    "hold: it would be lost.\n"
                    "Pass both to save and load, as a list or dict of optimizers."
                )


def _parameters_of(optimizer: Any) -> set[int]:
    return {id(each) for group in optimizer.param_groups for each in group["params"]}


class LazyState:
    """The optimizers of a run, whose state appears at their first step."""

    def __init__(self) -> None:
        self._models: list[weakref.ref[nn.Module]] = []
        self._optimizers: list[weakref.ref[Any]] = []
        self._seen = 0

    def watch(self, model: Any, optimizer: Any) -> None:
        """Look at these from now on: what a load or a save was given, whose state was checked."""
        self._models = [weakref.ref(each) for each in listed(model)]
        self._optimizers = [weakref.ref(each) for each in listed(optimizer)]
        self._seen = self._count()

    def check(self) -> None:
        """Look at the state of the optimizers if entries were added; once for each addition.

        Raises:
            UnsupportedStateError: some of it cannot be saved.
        """
        if not self._optimizers or (count := self._count()) == self._seen:
            return
        self._seen = count
        names = {
            id(parameter): name
            for each in self._models
            if (model := each()) is not None
            for name, parameter in model.named_parameters()
        }
        for optimizer in self._optimizers:
            for parameter, entries in _state_of(optimizer()).items():
                owner = names.get(id(parameter), "(a parameter outside the model)")
                if isinstance(entries, Mapping):
                    place = f"{ROOT}.{STATE}.{owner}"
                    check_keys(entries, place)
                    check_values({f"{place}.{key}": value for key, value in entries.items()})

    def _count(self) -> int:
        return sum(len(_state_of(each())) for each in self._optimizers)


def _state_of(optimizer: Any) -> Mapping[Any, Any]:
    found = getattr(optimizer, STATE, None)
    return found if isinstance(found, Mapping) else {}


def listed(given: Any) -> list[Any]:
    """Return what was given as a list: one object, a sequence, None, or a mapping by its keys.

    Two optimizers may hold one parameter: which is the second must not depend on their making.
    """
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [given[key] for key in sorted(given, key=str)]
    return [*given] if isinstance(given, Sequence) else [given]
