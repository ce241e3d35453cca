"""Model and optimizers as flat named leaves, and where each leaf is, for the saves that follow.

Owns what a leaf is called, in which order leaves come, and which of them only an optimizer step
changes; and the one walk over an optimizer, which like that of a model is compared with it before
each reading. A full capture builds, names and flattens whole state dicts; the bindings only look
every leaf up again. They are never silently stale: what was added, removed, replaced or hooked
since requires a full capture. The groups of one root are one leaf, made anew each time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from holdfast.format.dcp import KeyPath, flatten, is_leaf
from holdfast.format.nondense import is_dense
from holdfast.state.codec import check_keys, check_plain
from holdfast.state.groups import GROUPS, Group, kind_of, options_of
from holdfast.state.kinds import names_of_shards
from holdfast.state.model import MODEL, ModelWalk, is_live
from holdfast.state.naming import PARAMETERS, STATE, Named, is_root, name_optimizers
from holdfast.state.optimizer import LiveOptimizers
from holdfast.state.sharding import NO_CLAIMS, Claims
from holdfast.torch_internals import is_plain_optimizer, local_of

_MISSING = object()


@dataclass(frozen=True)
class Leaves:
    """Model and optimizer as flat named leaves, referring to live tensors."""

    values: Mapping[str, Any]
    """Tensors and plain values by DCP's flat name."""
    paths: Mapping[str, KeyPath]
    """The nested keys of each name: strings for mappings, integers for lists."""
    changed_by_steps: frozenset[str]
    """Names that only an optimizer step changes: trainable parameters, optimizer state."""
    hollow: tuple[tuple[str, ...], ...] = ()
    """The nested keys of mappings without a leaf, which have no name."""
    roots: tuple[str, ...] = ()
    """For each optimizer, the root of its names."""
    claims: Claims = NO_CLAIMS
    """Which plain tensors are parts of global ones."""
    per_rank: frozenset[str] = frozenset()
    """Names of which every rank saves its own copy."""
    buffers: frozenset[str] = frozenset()
    """Names of tensors that training may change on each rank for itself."""

    @classmethod
    def of(
        cls, model: Mapping[str, Any], live: LiveOptimizers | None, optimizers: Sequence[Any]
    ) -> Leaves:
        """Name and flatten a model's state and that of its optimizers.

        Raises:
            UnsupportedStateError: some state could not be read back safely.
        """
        tensors: dict[str, dict[str, Any]] = {"model": dict(model)}
        values: dict[str, Any] = {}
        paths: dict[str, KeyPath] = {}
        records: dict[str, list[dict[str, Any]]] = {}
        roots = tuple(live.roots) if live is not None else ()
        for root in dict.fromkeys(roots):
            assert live is not None
            outside = live.outside(root)
            tensors[root] = {**({PARAMETERS: outside} if outside else {}), STATE: live.state(root)}
            records[root] = [each.entry() for each in live.groups(root)]
        for key, nested in tensors.items():
            check_plain(nested, key)
            check_keys(nested, key)
            found, found_paths = flatten({key: nested})
            values |= found
            paths |= found_paths
            if key in records:
                name = f"{key}.{GROUPS}"
                check_plain(records[key], name)
                values[name], paths[name] = records[key], (key, GROUPS)
        stepped = {
            _address(parameter)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        }
        changed_by_steps = frozenset(
            name
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
            and (
                (is_root(paths[name][0]) and paths[name][1] == STATE) or _address(value) in stepped
            )
        )
        hollow, per_rank = tuple(_find_hollow(tensors)), names_of_shards(values, paths)
        return cls(values, paths, changed_by_steps, hollow, roots, per_rank=per_rank)


class _States(NamedTuple):
    """The state of one parameter, as it was when it was walked."""

    parameter: torch.Tensor
    keys: Mapping[str, str]
    """Each key, with its name in a checkpoint."""


class _Members(NamedTuple):
    """One group, as it was when it was walked."""

    names: tuple[str, ...]
    parameters: Sequence[tuple[torch.Tensor, str | None, bool]]
    """Each parameter, the name of its leaf in the model (None: it is not the model's), and whether
    steps change it."""


class OptimizerWalk:
    """Where the groups and the state of one optimizer are."""

    def __init__(self, named: Named, states: Sequence[_States]) -> None:
        """Use `find_all`."""
        self._optimizer = named.optimizer
        self._kind = kind_of(named.optimizer)
        self._root = named.root
        self._outside = {f"{named.root}.{PARAMETERS}.{k}": v for k, v in named.outside.items()}
        self._states = states
        self._entry_count = len(named.optimizer.state)
        self._groups = [
            _Members(
                names,
                [
                    (each, None if name in named.outside else MODEL + name, each.requires_grad)
                    for each, name in zip(group["params"], names, strict=True)
                ],
            )
            for group, names in zip(named.optimizer.param_groups, named.groups, strict=True)
        ]

    @classmethod
    def find_all(
        cls, optimizers: Sequence[Any], names: Mapping[int, str]
    ) -> list[OptimizerWalk] | None:
        """Walk optimizers; None: one is not plain, or has state of no parameter.

        `names`: in the model, of each parameter by its id.
        """
        if not all(map(is_plain_optimizer, optimizers)):
            return None
        found: list[OptimizerWalk] = []
        for named in name_optimizers(optimizers, names):
            owners = {id(each): name for name, each in named.by_name().items()}
            states: list[_States] = []
            for parameter, entries in named.optimizer.state.items():
                owner = owners.get(id(parameter))
                if owner is None:
                    if entries:
                        return None
                    continue
                at = f"{named.root}.{STATE}.{owner}"
                states.append(_States(parameter, {key: f"{at}.{key}" for key in entries}))
            found.append(cls(named, states))
        return found

    @property
    def root(self) -> str:
        """The root of its names."""
        return self._root

    def holds(self, optimizer: Any) -> bool:
        """Whether it is the same optimizer, with the same groups and as much state."""
        groups = optimizer.param_groups
        return (
            optimizer is self._optimizer
            and is_plain_optimizer(optimizer)
            and len(groups) == len(self._groups)
            and len(optimizer.state) == self._entry_count
            and all(
                len(group["params"]) == len(walked.names)
                for group, walked in zip(groups, self._groups, strict=True)
            )
        )

    def add_parameters(self, into: dict[str, Any]) -> None:
        """Add the values of parameters that are not the model's."""
        into.update(self._outside)

    def add_state(self, into: dict[str, Any]) -> bool:
        """Add the live entries; False: one is missing, or has become a nested container."""
        live = self._optimizer.state
        for each in self._states:
            state = live.get(each.parameter)
            if state is None or len(state) != len(each.keys):
                return False
            for key, name in each.keys.items():
                value = state.get(key, _MISSING)
                if value is _MISSING or not is_leaf(value):
                    return False
                into[name] = value
        return True

    def entries(self, leaves: Mapping[str, Any]) -> Iterator[dict[str, Any]] | None:
        """Return what a record has of each group; None: a parameter is another one.

        `leaves`: has the model's.
        """
        for group, walked in zip(self._optimizer.param_groups, self._groups, strict=True):
            for parameter, (known, name, steps) in zip(
                group["params"], walked.parameters, strict=True
            ):
                own = known if name is None else leaves[name]
                if own is not parameter or parameter.requires_grad != steps:
                    return None
        return (
            Group(walked.names, options_of(group), self._kind).entry()
            for group, walked in zip(self._optimizer.param_groups, self._groups, strict=True)
        )


class Bindings:
    """Where the leaves of one model and its optimizers are, for the saves that follow."""

    def __init__(
        self, model: ModelWalk, optimizers: Sequence[OptimizerWalk], leaves: Leaves
    ) -> None:
        """Use `bind`."""
        self._model = model
        self._optimizers = optimizers
        self._leaves = leaves
        self._by_root: dict[str, list[OptimizerWalk]] = {}
        for each in optimizers:
            self._by_root.setdefault(each.root, []).append(each)

    @classmethod
    def bind(
        cls,
        root: nn.Module,
        optimizers: Sequence[Any],
        leaves: Leaves,
        walk: ModelWalk | None,
    ) -> Bindings | None:
        """Find every leaf; None: one has no place where it could be looked up again.

        `walk`: that the leaves were read by; None: torch's getters were asked.
        """
        model = walk or ModelWalk.find(root)
        if model is None:
            return None
        walks = OptimizerWalk.find_all(optimizers, model.parameter_names())
        if walks is None:
            return None
        bindings = cls(model, walks, replace(leaves, values={}))
        live = bindings._collect()
        are_found = (
            live is not None
            and list(live) == list(leaves.values)
            and all(
                leaves.paths[name][1:] == (GROUPS,) or is_live(leaf, live[name])
                for name, leaf in leaves.values.items()
            )
        )
        return bindings if are_found else None

    def follow(self, root: nn.Module, optimizers: Sequence[Any]) -> Leaves | None:
        """Return the current leaves; None: something changed and must be bound again."""
        if not self._model.holds(root) or len(optimizers) != len(self._optimizers):
            return None
        if not all(
            walk.holds(each) for walk, each in zip(self._optimizers, optimizers, strict=True)
        ):
            return None
        if self._model.run_hooks() and not self._model.holds(root):
            return None
        live = self._collect()
        if live is None or not self._leaves.claims.hold(live):
            return None
        return replace(self._leaves, values=live)

    def _collect(self) -> dict[str, Any] | None:
        """Return the live leaves in the order of a full capture; None: some are not there."""
        found = self._model.values()
        for root, walks in self._by_root.items():
            for each in walks:
                each.add_parameters(found)
            if not all(each.add_state(found) for each in walks):
                return None
            record: list[dict[str, Any]] = []
            for each in walks:
                entries = each.entries(found)
                if entries is None:
                    return None
                record += entries
            found[f"{root}.{GROUPS}"] = record
        return found


def find_buffers(root: nn.Module, values: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of a model's buffers, by their memory: torch's getters return copies."""
    places = {_address(each) for each in root.buffers()}
    places -= {_address(each) for each in root.parameters()}
    return _names_at(places, values)


def names_in_memory(tensors: Iterable[torch.Tensor], values: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of a model's state that are these tensors, likewise."""
    return _names_at({_address(each) for each in tensors if each.numel()}, values)


def _names_at(places: Collection[Any], values: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(
        name
        for name, value in values.items()
        if name.startswith(MODEL) and isinstance(value, torch.Tensor) and _address(value) in places
    )


def _address(tensor: torch.Tensor) -> tuple[torch.device, int]:
    local = local_of(tensor)
    if not is_dense(local):
        return local.device, -1  # a sparse one has no single address
    return local.device, local.data_ptr()


def _find_hollow(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield where mappings in mappings are empty."""
    for key, each in value.items():
        if isinstance(each, Mapping):
            if not each:
                yield (*path, key)
            yield from _find_hollow(each, (*path, key))
