"""Read each tensor that every rank needs in full on one rank, and broadcast it.

Owns which rank reads what (equal parts in file order, so that no rank reads a block for only a few
bytes) and the process groups used: one for each world group, created collectively on the training
thread, never the trainer's own. Promises that no rank enters a broadcast before all ranks have read
and verified their parts, and that a group in which a transfer failed is not used again. gloo times
out a little before we do; NCCL, which ends the process at its timeout, gets a longer timeout.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import xxhash
from torch import distributed
from torch.distributed.tensor import DTensor

from holdfast.errors import CheckpointError
from holdfast.format.chunks import Placed
from holdfast.format.nondense import PLAIN_TENSORS
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.reader import ShardReader
from holdfast.read.requests import Target, bytes_of
from holdfast.torch_internals import copy_each, local_of

BACKEND_PATIENCE = 10
"""NCCL's timeout as a multiple of ours: at its own timeout NCCL ends the process."""
_GLOO_PATIENCE = 0.75
"""gloo's, likewise: a rank that times out must still be able to report it to the others in time."""

_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Our group by world group: a job may destroy its world group and create another."""


def own_group(timeout_seconds: float) -> Any:
    """Return the group. Collective: the first call creates it."""
    world = distributed.group.WORLD
    if (found := _groups.get(world)) is None:
        only_gloo = distributed.get_backend(world) == distributed.Backend.GLOO
        patience = timeout_seconds * (_GLOO_PATIENCE if only_gloo else BACKEND_PATIENCE)
        found = distributed.new_group(timeout=timedelta(seconds=patience))
        _groups[world] = found
    return found


def forget_group() -> None:
    """Drop the group; the next call creates another. Collective, after a failed transfer."""
    _groups.pop(distributed.group.WORLD, None)


def device_types() -> set[str]:
    """Return the device types whose memory the group can send from."""
    world = distributed.group.WORLD
    if world is None:
        return set()
    pairs = distributed.get_backend_config(world).split(",")  # such as cpu:gloo,cuda:nccl
    return {each.partition(":")[0] for each in pairs}


_BUCKET_BYTES = 32 << 20
"""Tensors smaller than this are batched in a buffer of this size."""


class Reading(Protocol):
    """How the tensors of one checkpoint are restored on this rank."""

    def read(self, reader: ShardReader, targets: Mapping[str, Target]) -> None:
        """Fill the targets that this rank reads itself."""

    def pass_on(self, coordinator: Coordinator) -> None:
        """Fill the remaining targets, once every rank has read its part."""


class ReadAlone:
    """The null case: every rank reads everything it needs."""

    def read(self, reader: ShardReader, targets: Mapping[str, Target]) -> None:
        """Read everything."""
        reader.read_tensors(targets)

    def pass_on(self, coordinator: Coordinator) -> None:
        """Do nothing."""


class ReadShared:
    """Each rank reads its part of what all ranks need, and everything that only it needs."""

    def __init__(self, rank: int, parts: Sequence[Sequence[str]], group: Any) -> None:
        self._rank = rank
        self._group = group
        self._parts = parts
        self._steps: list[tuple[int, list[torch.Tensor], torch.Tensor | None]] = []

    @classmethod
    def agree(
        cls,
        find_targets: Callable[[], Mapping[str, Target]],
        reader: ShardReader,
        coordinator: Coordinator,
    ) -> ReadShared:
        """Divide what all ranks need in full; every rank computes the same division.

        What is per rank is never sent to another: each rank reads its own copy.

        Raises:
            StageFailedError: on every rank: finding targets or creating the group failed on one.
        """
        mine: dict[str, tuple[str, int]] = {}

        def describe() -> bytes:
            own = reader.per_rank_names
            targets = {name: each for name, each in find_targets().items() if name not in own}
            mine.update(_describe(targets))
            return xxhash.xxh3_128_digest("\n".join(mine).encode())

        # Usually all ranks need the same names; the names themselves are gathered only if not.
        if not coordinator.all_reduce("share", describe, lambda found: len(set(found)) == 1):
            common = coordinator.all_reduce(
                "share names",
                lambda: list(mine),
                lambda found: sorted(set(found[0]).intersection(*found[1:])),
            )
            mine = {each: mine[each] for each in common}
        sizes = dict(mine.values())
        parts = divide(reader.file_order(sizes), sizes, coordinator.world_size)
        groups: list[Any] = []
        coordinator.all_gather(
            "broadcast group", lambda: groups.append(own_group(coordinator.timeout_seconds))
        )
        return cls(coordinator.rank, parts, groups[0])

    def read(self, reader: ShardReader, targets: Mapping[str, Target]) -> None:
        """Read this rank's part and what only it needs; allocate all memory for the rest."""
        self._steps = list(self._plan_steps(targets))
        others = {
            name for rank, part in enumerate(self._parts) if rank != self._rank for name in part
        }
        reader.read_tensors({name: each for name, each in targets.items() if name not in others})

    def pass_on(self, coordinator: Coordinator) -> None:
        """Broadcast this rank's part and receive those of the others.

        Raises:
            StageFailedError: a rank was lost during the broadcast; tensors hold wrong values.
        """
        try:
            coordinator.all_gather("broadcast", self._broadcast)
        except CheckpointError:
            forget_group()  # gloo has closed its connections; NCCL is in an unknown state
            raise

    def _broadcast(self) -> None:
        for owner, tensors, buffer in self._steps:
            if buffer is None:
                distributed.broadcast(tensors[0], owner, self._group)
                continue
            sizes = [len(each) for each in tensors]
            batch = buffer[: sum(sizes)]
            pieces = list(torch.split(batch, sizes))
            if owner == self._rank:
                copy_each(pieces, tensors)
            distributed.broadcast(batch, owner, self._group)
            if owner != self._rank:
                copy_each(tensors, pieces)
        self._steps = []

    def _plan_steps(
        self, targets: Mapping[str, Target]
    ) -> Iterator[tuple[int, list[torch.Tensor], torch.Tensor | None]]:
        """Yield owner, tensor bytes, and the buffer they are batched in; None: sent directly."""
        buffers: dict[torch.device, torch.Tensor] = {}
        for owner, part in enumerate(self._parts):
            buckets: dict[torch.device, list[torch.Tensor]] = {}
            for name in part:
                target = targets[name]
                assert not isinstance(target, Placed)  # no rank needs all of it
                flat = bytes_of(local_of(target).detach())
                if len(flat) >= _BUCKET_BYTES:
                    yield owner, [flat], None
                    continue
                if flat.device not in buffers:
                    buffers[flat.device] = torch.empty(
                        _BUCKET_BYTES, dtype=torch.uint8, device=flat.device
                    )
                bucket = buckets.setdefault(flat.device, [])
                if sum(map(len, bucket)) + len(flat) > _BUCKET_BYTES:
                    yield owner, bucket, buffers[flat.device]
                    bucket = buckets[flat.device] = []
                bucket.append(flat)
            for device, bucket in buckets.items():
                yield owner, bucket, buffers[device]


def divide(names: Sequence[str], sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Cut a list of names into consecutive parts of about equal bytes."""
    parts: list[list[str]] = [[] for _ in range(count)]
    total = sum(sizes[name] for name in names)
    position = 0
    for name in names:
        # Assigned by the position of its middle; exactly on a border, to the first of the two.
        middle = (2 * position + sizes[name]) * count
        parts[max(middle - 1, 0) // max(2 * total, 1)].append(name)
        position += sizes[name]
    return parts


def _describe(targets: Mapping[str, Target]) -> dict[str, tuple[str, int]]:
    """Return name and size of what this rank needs in full, keyed by what all ranks must share."""
    supported = device_types()
    return {
        f"{name} {target.dtype} {target.device.type}": (name, target.numel() * target.itemsize)
        for name, target in sorted(targets.items())
        if not isinstance(target, Placed) and _is_whole(target) and target.device.type in supported
    }


def _is_whole(target: torch.Tensor) -> bool:
    """Whether a rank needs all of a tensor, in memory that can be sent without a copy."""
    if type(target) is DTensor:
        if target.device_mesh.get_coordinate() is None:
            return False
        if not all(each.is_replicate() for each in target.placements):
            return False
        target = local_of(target)
    return (
        type(target) in PLAIN_TENSORS
        and target.numel() > 0
        and target.is_contiguous()
        and not (target.is_conj() or target.is_neg())
    )
