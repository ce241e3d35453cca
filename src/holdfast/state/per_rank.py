"""Which names of model and optimizer are per rank: every rank saves its own copy of them.

Decided by kind, never by the values of the moment, or plans would change with them: buffers of the
model, which training changes on each rank for itself, and the records of an optimizer's groups;
`kinds` names optimizer state of the size of a shard. Chunks of distributed tensors are none of
these. Of a rank's buffers those that together exceed a cap, the largest first, are replicated
values instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from holdfast.format.nondense import PLAIN_TENSORS
from holdfast.format.values import GROUPS
from holdfast.torch_internals import local_of

BUFFER_CAP_BYTES = 64 << 20
"""The most bytes of buffers of which a rank saves its own copies."""


def names_per_rank(
    model: nn.Module, leaves: Mapping[str, Any], paths: Mapping[str, Sequence[Any]]
) -> frozenset[str]:
    """Return the names of buffers and group records, of which every rank saves its own copy."""
    places = {_address(each) for each in model.buffers()} - {
        _address(local_of(each)) for each in model.parameters()
    }
    found: set[str] = set()
    buffers: dict[str, int] = {}
    for name, leaf in leaves.items():
        path = paths[name]
        if not isinstance(leaf, torch.Tensor):
            if len(path) == 2 and name.endswith(GROUPS):
                found.add(name)
        elif isinstance(leaf, DTensor) or not leaf.numel():
            continue
        elif path[0] == "model" and _address(leaf) in places:
            buffers[name] = leaf.numel() * leaf.itemsize
    return frozenset(found | _within_cap(buffers))


def _within_cap(sizes: Mapping[str, int]) -> set[str]:
    """Return the names that are left when the largest have been dropped."""
    total = sum(sizes.values())
    kept = dict(sorted(sizes.items(), key=lambda each: (each[1], each[0])))
    while total > BUFFER_CAP_BYTES:
        _, size = kept.popitem()
        total -= size
    return {*kept}


def _address(tensor: torch.Tensor) -> tuple[torch.device, int]:
    if type(tensor) not in PLAIN_TENSORS or tensor.layout is not torch.strided or tensor.is_meta:
        return tensor.device, -id(tensor)  # such a buffer has no single address
    return tensor.device, tensor.data_ptr()
