"""The device that copies travel through, and the process group that they travel over.

Owns the choice of a backend: gloo, out of host memory, or NCCL, through each rank's GPU. Promises
that what this rank lacks for it is an error before anything is connected, and that NCCL, which ends
the process when its own patience is over, has more of it than we have.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from holdfast.errors import ConfigError
from holdfast.shards.groups import BACKEND_PATIENCE


def device_of(transport: str) -> torch.device | None:
    """Return the GPU of this rank, as training has set it; None: copies need none.

    Raises:
        ConfigError: they do, and there is none, or torch has no NCCL.
    """
    if transport != "nccl":
        return None
    lacks = None
    if not torch.cuda.is_available():
        lacks = "this rank sees no GPU"
    elif not distributed.is_nccl_available():
        lacks = "this torch has no NCCL"
    if lacks is not None:
        problem = f"checkpoint.local.replication.transport is 'nccl', and {lacks}; use 'gloo'"
        raise ConfigError([problem])
    return torch.device("cuda", torch.cuda.current_device())


def new_group(device: torch.device | None, timeout_seconds: float) -> Any:
    """Make a group that exchanges run over; all ranks together, on the training thread."""
    if device is None:
        return distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    patience = timedelta(seconds=timeout_seconds * BACKEND_PATIENCE)
    return distributed.new_group(backend="nccl", timeout=patience)
