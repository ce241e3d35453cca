"""What the local tier requires of this process: nvidia-resiliency-ext, a device, a process group.

Owns the only import of the package, made when a job first uses a local tier: where it is missing or
broken, the error says what to do. Owns the choice of transport for copies: gloo from host memory,
or NCCL through each rank's GPU. A requirement this rank does not meet is an error before anything
is connected. NCCL, which ends the process at its timeout, gets a longer one than ours.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from holdfast.errors import ConfigError
from holdfast.read.shared import BACKEND_PATIENCE


def import_adapter() -> Any:
    """Return the module that adapts the package.

    Raises:
        ConfigError: it is missing, or does not work here.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "The pynvml package is deprecated", category=FutureWarning
            )
            from holdfast.tiers.local import nvrx
    except ImportError as error:
        problem = (
            "checkpoint.local.directory is set, but nvidia-resiliency-ext cannot be imported "
            f"({error}); install nvidia-resiliency-ext>=0.4.1,<0.8 (Linux, Python below 3.13), "
            "or set local.directory to null"
        )
        raise ConfigError([problem]) from error
    return nvrx


def device_of(transport: str) -> torch.device | None:
    """Return this rank's current GPU, as training has set it; None: the transport needs none.

    Raises:
        ConfigError: the transport needs a GPU and there is none, or torch has no NCCL.
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
    """Create a group for exchanges; a collective call, on the training thread."""
    if device is None:
        return distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    patience = timedelta(seconds=timeout_seconds * BACKEND_PATIENCE)
    return distributed.new_group(backend="nccl", timeout=patience)
