"""Compare a checkpoint with the live state, and skip load_state_dict for tensors read in place.

Owns the comparison of names, shapes and types: what is missing, left over or different, whether
anything fits at all, and which prefix would make it fit. Reads no values of either side.

Also owns whether torch's setters are needed at all: they walk every module and rebuild every
dictionary to copy tensors onto themselves. `has_landed` returns whether all restored state of a
model was read into its own tensors; `finish_optimizers` restores what else an optimizer has. Both
apply only to state dicts that nothing overrides or hooks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from holdfast.errors import NothingFitsError, StateMismatchError
from holdfast.torch_internals import (
    EXTRA_STATE,
    has_default_loading,
    optimizer_has_default_loading,
)

_SHOWN = 3
"""Names that one message lists."""
_MODEL = "model."


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
        return {
            name
            for key, path in self.key_paths.items()
            if path[:2] == ("optimizer", "param_groups") and path[3:] == ("params",)
            for name in self.values[key]
        }

    def option_names(self) -> set[str]:
        """Return the names of the options that saved groups of parameters have."""
        return {
            path[3]
            for path in self.key_paths.values()
            if path[:2] == ("optimizer", "param_groups") and len(path) > 3
        }

    def groups(self, filled: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return the options of each saved group of parameters, in order.

        `filled`: tensors already read, for options that are tensors; None: leave those out.
        """
        found: dict[int, dict[str, Any]] = {}
        for name, path in self.key_paths.items():
            if path[:2] == ("optimizer", "param_groups") and len(path) == 4:
                values = self.values if name in self.values else filled or {}
                if name in values:
                    found.setdefault(path[2], {})[path[3]] = values[name]
        return [found[number] for number in sorted(found)]


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
    live: Mapping[str, Any], saved: SavedTensors, path: str, strict: bool
) -> Differences:
    """Compare a model's live state, by flat name, with its saved state.

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
        _find_different(live, saved.tensors, strict),
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
    live: Mapping[str, Any], saved: Mapping[str, TensorStorageMetadata], strict: bool
) -> list[str]:
    different = []
    for name, target in live.items():
        source = saved.get(name)
        if source is None or not isinstance(target, torch.Tensor) or is_extra(name):
            continue
        if source.size != target.size():
            different.append(f"{name} is {list(source.size)}, here {list(target.size())}")
        elif strict and source.properties.dtype != target.dtype:
            different.append(f"{name} is {source.properties.dtype}, here {target.dtype}")
    return different


def has_landed(model: nn.Module, live: Mapping[str, Any], restored: Mapping[str, Any]) -> bool:
    """Whether every restored entry of a model is the live tensor in its state dict."""
    return all(map(has_default_loading, model.modules())) and _are_same(restored, live)


def finish_optimizers(
    optimizers: Sequence[Optimizer], live: Mapping[str, Any], restored: Mapping[str, Any]
) -> bool:
    """Restore the options of optimizers whose tensors were read in place.

    `live` and `restored` are nested as torch's getter returns them. False: nothing was changed,
    since names, groups or options differ, or hooks or overrides are involved.
    """
    groups, saved_groups = live["param_groups"], restored.get("param_groups", ())
    own_groups = [group for each in optimizers for group in each.param_groups]
    if not (
        all(map(optimizer_has_default_loading, optimizers))
        and len(own_groups) == len(groups) == len(saved_groups)
        and live["state"].keys() == restored["state"].keys()
        and all(map(_is_alike, own_groups, groups, saved_groups))
        and all(
            live["state"][name].keys() == state.keys() and _are_same(state, live["state"][name])
            for name, state in restored["state"].items()
        )
    ):
        return False
    for group, saved in zip(own_groups, saved_groups, strict=True):
        group.update({key: deepcopy(saved[key]) for key in saved if key != "params"})
    for each in optimizers:
        # The last step of torch's own load_state_dict: some optimizers upgrade older state here.
        each.__setstate__({"state": each.state, "param_groups": each.param_groups})
    return True


def _are_same(restored: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    return all(
        isinstance(value, torch.Tensor) and live.get(name) is value
        for name, value in restored.items()
    )


def _is_alike(own: Mapping[str, Any], live: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether a group has the same parameters in the same order, and the same plain options."""
    return (
        own.keys() == live.keys() == saved.keys()
        and len(own["params"]) == len(live["params"])
        and live["params"] == saved["params"]
        and not any(
            isinstance(each, torch.Tensor)
            for key in saved
            if key != "params"
            for each in (own[key], saved[key])
        )
    )
