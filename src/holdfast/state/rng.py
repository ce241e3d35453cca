"""The random number generators of one rank: python, numpy, torch CPU and every CUDA device.

Owns capturing and restoring them as plain values, and reseeding where a saved state has no rank to
go to. Promises that the next draw after a restore is the next draw after the capture, and that
reseeding gives every rank its own stream, the same on every machine. Reads and writes no files.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """Return the state of every generator as plain values and tensors, drawing from none."""
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = legacy
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def apply_rng(state: dict[str, Any]) -> list[str]:
    """Restore what `capture_rng` returned; the result names every generator that could not be."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    saved = state["cuda"]
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, each in enumerate(saved[:present]):
        torch.cuda.set_rng_state(each, device)
    return [f"cuda:{device}" for device in range(present, len(saved))]


def reseed(run_id: str, iteration: int, rank: int) -> None:
    """Seed every generator from the identity of a checkpoint and the rank, nothing else."""
    digest = hashlib.sha256(f"{run_id}/{iteration}/{rank}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
