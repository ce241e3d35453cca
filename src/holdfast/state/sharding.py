"""Plain tensors that are one rank's part of a global tensor.

Owns how that is known: by Megatron's attributes on a parameter (`tensor_model_parallel`,
`partition_dim`, `partition_stride`) together with the tensor-parallel group of `pg_collection`, or
by `declare_sharding`. Optimizer state of the same shape as such a parameter is cut as it is.
Promises that what is cut is saved as chunks of the global tensor, also where the ranks of the group
hold different lengths, which they agree on before a plan is made and before a load compares.
Refuses by name attributes without a group, or that contradict the tensor or the other ranks.
DTensors describe themselves and are left alone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import xxhash
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from holdfast.errors import UnsupportedStateError, WrongArgumentError
from holdfast.format.chunks import Cut, cut
from holdfast.format.nondense import PLAIN_TENSORS
from holdfast.ranks.coordinator import Coordinator
from holdfast.state.model import MODEL, ModelWalk
from holdfast.torch_internals import local_of

_WAYS_OUT = (
    "Pass pg_collection with the group as its attribute tp, or call "
    "holdfast.declare_sharding(parameter, dim=..., group=...)."
)


@dataclass(frozen=True)
class Sharding:
    """One rank's claim that a plain tensor is cut over a group."""

    owner: str
    """The name of the parameter; its state is cut as it is."""
    dim: int
    stride: int
    ranks: tuple[int, ...]
    """Of the job, in the order of the group."""
    position: int
    """Of this rank in the group."""


@dataclass(frozen=True)
class _Declared:
    dim: int
    stride: int
    group: Any


_declared: dict[int, tuple[weakref.ref[torch.Tensor], _Declared]] = {}
"""By the id of the tensor."""
_declarations = itertools.count(1)
_newest = [0]
"""The number of the newest declaration: a change shows that claims must be looked up again."""


def declare_sharding(
    parameter: torch.Tensor, *, dim: int, group: Any | None = None, stride: int = 1
) -> None:
    """Declare that a plain tensor is this rank's part of a global tensor, cut along `dim`.

    Every rank of `group` declares it; None: all ranks. The parts need not be equally long. With
    `stride` n each rank holds n pieces that interleave with those of the other ranks, as Megatron's
    `partition_stride`: 2 for a gated linear unit whose two halves are cut separately. Call it
    before the first `load` or `save`; a later call replaces an earlier one.

    Raises:
        WrongArgumentError: it is a DTensor or no tensor, or has no such dimension.
    """

    def refuse(argument: str, found: str, advice: str) -> WrongArgumentError:
        return WrongArgumentError("declare_sharding", argument, found, advice)

    given: object = parameter
    if not isinstance(given, torch.Tensor):
        advice = "Pass the parameter itself."
        raise refuse("parameter", f"is a {type(given).__name__}, no tensor", advice)
    if isinstance(parameter, DTensor):
        raise refuse("parameter", "is a DTensor", "It says itself how it is sharded; leave it out.")
    if type(dim) is not int or not -parameter.dim() <= dim < parameter.dim():
        has = f"is {dim!r}, and the tensor has {parameter.dim()} dimensions"
        raise refuse("dim", has, "Name the dimension that is divided over the group.")
    dim %= parameter.dim()
    if type(stride) is not int or stride < 1 or parameter.shape[dim] % stride:
        has = (
            f"is {stride!r}, and the tensor has {parameter.shape[dim]} elements in dimension {dim}"
        )
        raise refuse("stride", has, "Name how many pieces of equal length each rank holds.")
    number = id(parameter)
    reference = weakref.ref(parameter, lambda _: _declared.pop(number, None))
    _declared[number] = reference, _Declared(dim, stride, group)
    _newest[0] = next(_declarations)


def _declaration_of(tensor: torch.Tensor) -> _Declared | None:
    reference, declared = _declared.get(id(tensor), (None, None))
    return declared if reference is not None and reference() is tensor else None


@dataclass(frozen=True)
class Claims:
    """What this rank's live tensors say about how they are sharded, by flat name."""

    shardings: Mapping[str, Sharding] = field(default_factory=dict)
    per_rank: frozenset[str] = frozenset()
    """Names of optimizer state of another shape than its parameter's part: each rank's own."""
    _parameters: Sequence[str] = ()
    """Names of the tensors that were asked."""
    _stamp: object = None

    def hold(self, values: Mapping[str, Any]) -> bool:
        """Whether the tensors of these names still say the same."""
        return self._stamp == _stamp_of(self._parameters, values)


NO_CLAIMS = Claims()


def named_tensors(
    root: nn.Module, walk: ModelWalk | None, flat: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the live parameters and buffers by flat name.

    `walk`: of the root; None: torch's getters made `flat`, and what was declared is found there by
    its memory.
    """
    walk = walk or ModelWalk.find(root)
    if walk is not None:
        values = walk.values()
        return {name: each for name, each in values.items() if isinstance(each, torch.Tensor)}
    claimed = {
        (local.device, local.data_ptr(), local.shape): each
        for each in chain(root.parameters(), root.buffers())
        if getattr(each, "tensor_model_parallel", False) or _declaration_of(each) is not None
        if (local := local_of(each)).numel()
    }
    found: dict[str, torch.Tensor] = {}
    for name, value in flat.items() if claimed else ():
        if name.startswith(MODEL) and isinstance(value, torch.Tensor):
            local = local_of(value)
            each = claimed.get((local.device, local.data_ptr(), local.shape))
            if each is not None:
                found[name] = each
    return found


def find_claims(
    named: Mapping[str, torch.Tensor],
    flat: Mapping[str, Any],
    paths: Mapping[str, Sequence[str | int]],
    pg_collection: Any | None,
    world_size: int,
) -> Claims:
    """Return the claims of a model's tensors, and of its optimizers' state.

    `named`: the live parameters and buffers by flat name. `flat`: the leaves of the app state, with
    their nested keys.

    Raises:
        UnsupportedStateError: a claim without a group, or that contradicts its tensor.
    """
    shardings: dict[str, Sharding] = {}
    per_rank: set[str] = set()
    groups: dict[int, tuple[int, ...]] = {}
    for name, tensor in named.items():
        found = _claim_of(name, tensor, pg_collection, world_size, groups)
        if found is not None and name in flat:
            shardings[name] = found
    if shardings:
        for name, value in flat.items():
            path = paths.get(name, ())
            if len(path) != 4 or path[1] != "state" or type(value) not in PLAIN_TENSORS:
                continue
            owner = f"{MODEL}{path[2]}"
            if owner in shardings and value.shape == named[owner].shape:
                shardings[name] = shardings[owner]
            elif owner in shardings and value.dim():
                per_rank.add(name)
    parameters = [name for name in named if name in flat]
    return Claims(shardings, frozenset(per_rank), parameters, _stamp_of(parameters, named))


def _stamp_of(names: Sequence[str], values: Mapping[str, Any]) -> object:
    marked = [
        (name, *marks)
        for name in names
        if (given := values[name].__dict__)
        and any(marks := tuple(given.get(key) for key in _ATTRIBUTES))
    ]
    return marked, _newest[0]


_ATTRIBUTES = ("tensor_model_parallel", "partition_dim", "partition_stride", "allreduce")


def _claim_of(
    name: str,
    tensor: torch.Tensor,
    pg_collection: Any | None,
    world_size: int,
    groups: dict[int, tuple[int, ...]],
) -> Sharding | None:
    declared = _declaration_of(tensor)
    if declared is None:
        if not getattr(tensor, "tensor_model_parallel", False):
            return None
        declared = _read_attributes(name, tensor, pg_collection, world_size)
        if declared is None:
            return None
    if world_size == 1:
        return None
    ranks = groups.get(id(declared.group))
    if ranks is None:
        ranks = groups[id(declared.group)] = _ranks_of(declared.group, name)
    own = distributed.get_rank()
    if own not in ranks:
        raise UnsupportedStateError(
            f"{name} is sharded over ranks {_few(ranks)}, and rank {own} is none of them.\n"
            + _WAYS_OUT
        )
    if len(ranks) == 1:
        return None
    if type(tensor) not in PLAIN_TENSORS or tensor.layout is not torch.strided:
        if isinstance(tensor, DTensor) and _covers(tensor, ranks):
            return None
        raise UnsupportedStateError(
            f"{name} is a {type(tensor).__name__}, and is said to be sharded over ranks "
            f"{_few(ranks)} as well: only plain dense tensors can be parts of a global one.\n"
            "Shard it as a DTensor over all its meshes, or not at all."
        )
    length = tensor.shape[declared.dim]
    if length % declared.stride:
        raise UnsupportedStateError(
            f"{name} has {length} elements in dimension {declared.dim}, which do not divide into "
            f"{declared.stride} pieces (partition_stride)."
        )
    return Sharding(name, declared.dim, declared.stride, ranks, ranks.index(own))


def _covers(tensor: DTensor, ranks: Iterable[int]) -> bool:
    """Whether the placements of a DTensor are over these ranks too."""
    return set(ranks) <= set(tensor.device_mesh.mesh.flatten().tolist())


def _read_attributes(
    name: str, tensor: torch.Tensor, pg_collection: Any | None, world_size: int
) -> _Declared | None:
    """Return Megatron's attributes as a declaration; None: they mean the whole tensor here."""
    is_expert = getattr(tensor, "allreduce", True) is False
    group = getattr(pg_collection, "expt_tp" if is_expert else "tp", None)
    if group is None and world_size == 1:
        return None
    if group is None:
        attribute = "expt_tp" if is_expert else "tp"
        raise UnsupportedStateError(
            f"{name} has tensor_model_parallel set, and its group is not known: pg_collection has "
            f"no {attribute}.\n{_WAYS_OUT}"
        )
    dim, stride = getattr(tensor, "partition_dim", None), getattr(tensor, "partition_stride", 1)
    if type(dim) is not int or not 0 <= dim < tensor.dim():
        raise UnsupportedStateError(
            f"{name} has tensor_model_parallel set, and partition_dim {dim!r} for a tensor of "
            f"{tensor.dim()} dimensions.\nSet partition_dim to the dimension that is divided."
        )
    if type(stride) is not int or stride < 1:
        raise UnsupportedStateError(
            f"{name} has partition_stride {stride!r}.\nSet it to the number of pieces that each "
            "rank holds: 1, or 2 for a gated linear unit."
        )
    return _Declared(dim, stride, group)


def _ranks_of(group: Any, name: str) -> tuple[int, ...]:
    try:
        return tuple(distributed.get_process_group_ranks(group))
    except (KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise UnsupportedStateError(
            f"{name}: the group that it is sharded over is a {type(group).__name__}, which "
            f"torch.distributed does not know.\n{_WAYS_OUT}"
        ) from error


class Shardings:
    """How plain tensors lie in global ones, as all ranks of their groups agree."""

    def __init__(
        self, claims: Claims = NO_CLAIMS, lengths: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        """`lengths`: by parameter, where the ranks of the group differ; else all have the same."""
        self.claims = claims
        self._lengths = dict(lengths or {})
        self._cuts: dict[str, Cut] = {}

    def with_claims(self, claims: Claims) -> Shardings:
        """Return these, or new ones where the claims are others."""
        return self if claims is self.claims else Shardings(claims, self._lengths)

    def cut_of(self, name: str, tensor: torch.Tensor) -> Cut | None:
        """Return how a tensor lies in the global one; None: it is the whole."""
        claim = self.claims.shardings.get(name)
        if claim is None:
            return None
        shape = tuple(tensor.shape)
        known = self._cuts.get(name)
        if known is None or known.shape != shape:
            own = shape[claim.dim]
            lengths = self._lengths.get(claim.owner, ())
            if len(lengths) != len(claim.ranks) or lengths[claim.position] != own:
                lengths = (own,) * len(claim.ranks)
            known = self._cuts[name] = cut(shape, claim.dim, lengths, claim.position, claim.stride)
        return known

    def size_of(self, name: str, tensor: torch.Tensor) -> torch.Size:
        """Return the size of the global tensor."""
        found = self.cut_of(name, tensor)
        return tensor.size() if found is None else torch.Size(found.size)

    def cut_at(
        self, path: Sequence[Any], tensor: torch.Tensor, model: Mapping[str, Any]
    ) -> Cut | None:
        """Return the same by the nested keys of a name, for state of parameters as for the model.

        `model`: its live tensors by flat name.
        """
        is_state = path[0] != "model" and len(path) == 4 and path[1] == "state"
        if not (is_state or path[0] == "model"):
            return None
        owner = MODEL + str(path[2] if is_state else path[1])
        parameter = model.get(owner)
        found = self.cut_of(owner, parameter) if isinstance(parameter, torch.Tensor) else None
        return found if found is not None and tuple(tensor.shape) == found.shape else None

    def size_at(
        self, path: Sequence[Any], model: Mapping[str, Any], tensor: torch.Tensor
    ) -> torch.Size:
        """Return the size of the global tensor, likewise."""
        found = self.cut_at(path, tensor, model)
        return tensor.size() if found is None else torch.Size(found.size)

    @classmethod
    def agree(
        cls, find: Callable[[], tuple[Claims, Mapping[str, Any]]], coordinator: Coordinator
    ) -> Shardings:
        """Agree on the lengths with all ranks; every rank calls it, also without any claim.

        `find`: returns this rank's claims, and its tensors by flat name.

        Raises:
            CheckpointError: on every rank: `find` raised it on one.
            UnsupportedStateError: on every rank: ranks of a group contradict each other.
        """
        claims: list[Claims] = []
        groups: dict[tuple[int, ...], dict[str, _Row]] = {}

        def describe() -> list[tuple[tuple[int, ...], bytes]]:
            found, values = find()
            claims.append(found)
            groups.update(_by_group(found, values))
            return [(ranks, _digest(rows)) for ranks, rows in groups.items()]

        # Usually all parts are equally long; lengths are gathered only if not.
        unlike = coordinator.all_reduce("shardings", describe, _find_unlike)
        if not unlike:
            return cls(claims[0])
        lengths: Mapping[tuple[int, ...], Mapping[str, tuple[int, ...]]] = coordinator.all_reduce(
            "lengths",
            lambda: {ranks: rows for ranks, rows in groups.items() if ranks in unlike},
            lambda found: _settle(unlike, found),
        )
        own = {name: each for ranks in groups for name, each in lengths.get(ranks, {}).items()}
        return cls(claims[0], own)

    @property
    def are_equal_parts(self) -> bool:
        """Whether all parts of each tensor are equally long."""
        return not self._lengths


_Row = tuple[tuple[int, ...], str, int, int]
"""Shape, dtype, dimension and stride of a part."""


def _by_group(claims: Claims, values: Mapping[str, Any]) -> dict[tuple[int, ...], dict[str, _Row]]:
    groups: dict[tuple[int, ...], dict[str, _Row]] = {}
    for name, claim in claims.shardings.items():
        if name != claim.owner:
            continue
        tensor = values[name]
        row = tuple(tensor.shape), str(tensor.dtype), claim.dim, claim.stride
        groups.setdefault(claim.ranks, {})[name] = row
    return groups


def _digest(rows: Mapping[str, _Row]) -> bytes:
    return xxhash.xxh3_128_digest(repr(sorted(rows.items())).encode())


def _find_unlike(
    records: Sequence[Sequence[tuple[tuple[int, ...], bytes]]],
) -> list[tuple[int, ...]]:
    """Return the groups whose ranks do not all report the same parts."""
    reported: dict[tuple[int, ...], dict[int, bytes]] = {}
    for rank, record in enumerate(records):
        for ranks, digest in record:
            reported.setdefault(ranks, {})[rank] = digest
    return [
        ranks
        for ranks, found in reported.items()
        if len(set(found.values())) > 1 or found.keys() != set(ranks)
    ]


def _settle(
    unlike: Iterable[tuple[int, ...]],
    records: Sequence[Mapping[tuple[int, ...], Mapping[str, _Row]]],
) -> dict[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Return the lengths of unequal parts by group and name.

    Raises:
        UnsupportedStateError: something else than the lengths differs.
    """
    lengths: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}
    for ranks in unlike:
        parts = [records[rank].get(ranks, {}) for rank in ranks]
        for name in sorted(set().union(*parts)):
            rows = [part.get(name) for part in parts]
            first = next(each for each in rows if each is not None)
            for row in rows:
                if row is None or _rest_of(row) != _rest_of(first):
                    raise UnsupportedStateError(
                        f"{name} is sharded over ranks {_few(ranks)}: {_describe(ranks, rows)}.\n"
                        "Every rank of the group must have it, cut in the same way."
                    )
            own = tuple(row[0][row[2]] for row in rows if row is not None)
            if len(set(own)) > 1:
                lengths.setdefault(ranks, {})[name] = own
    return lengths


def _rest_of(row: _Row) -> tuple[Any, ...]:
    """Return what all ranks must have alike: everything but the length along the dimension."""
    shape, dtype, dim, stride = row
    return *shape[:dim], None, *shape[dim + 1 :], dtype, dim, stride


def _describe(ranks: Sequence[int], rows: Sequence[_Row | None]) -> str:
    """Show what the first rank has, and the first that differs."""
    first = next(index for index, row in enumerate(rows) if row is not None)
    known = rows[first]
    assert known is not None
    other = next(
        index for index, row in enumerate(rows) if row is None or _rest_of(row) != _rest_of(known)
    )
    shown = (f"rank {ranks[index]} has {_describe_row(rows[index])}" for index in (first, other))
    return " and ".join(shown)


def _describe_row(row: _Row | None) -> str:
    if row is None:
        return "no such tensor"
    shape, dtype, dim, stride = row
    return f"{dtype.removeprefix('torch.')}{list(shape)} cut along dimension {dim}, stride {stride}"


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
