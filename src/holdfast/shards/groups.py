"""Process groups of our own over all ranks, for what a load sends from rank to rank.

Owns one group beside each world: with the same backends, made when it is first asked for, and asked
for by all ranks together on the training thread. Promises that nothing runs on the trainer's own
group, and that a group in which a transfer failed is not used again. gloo gives up on a rank a
little before we do; NCCL, which ends the process when its patience is over, gets more of it.
"""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

BACKEND_PATIENCE = 10
"""Times ours: how long NCCL waits for a rank before it takes matters into its own hands."""
_GLOO_PATIENCE = 0.75
"""Likewise: who waited in vain must still be in time to tell the other ranks."""

_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""By the world that a group was made beside: a job may end one world and begin another."""


def own_group(timeout_seconds: float) -> Any:
    """Return the group; all ranks together, since the first call makes it."""
    world = distributed.group.WORLD
    if (found := _groups.get(world)) is None:
        only_gloo = distributed.get_backend(world) == distributed.Backend.GLOO
        patience = timeout_seconds * (_GLOO_PATIENCE if only_gloo else BACKEND_PATIENCE)
        found = distributed.new_group(timeout=timedelta(seconds=patience))
        _groups[world] = found
    return found


def forget_group() -> None:
    """Make another group next time; all ranks together, after a transfer failed on any."""
    _groups.pop(distributed.group.WORLD, None)


def device_types() -> set[str]:
    """Return the kinds of devices whose memory the group can send from."""
    world: Any = distributed.group.WORLD
    found: list[torch.device] = [] if world is None else world._device_types
    return {each.type for each in found}
