"""Torch's normal mode, whatever mode the caller's thread is in.

Owns one decorator. Inference mode belongs to a thread, and a tensor made within it can never be
changed in place outside: memory that one save makes would fail the next one, and state that a load
makes would fail the next optimizer step. Promises that tensors made by a decorated function are
normal ones. Default dtype, default device, autocast and determinism need no guard: what is made
here names its own dtype and device and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def in_normal_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function outside inference mode, and without gradients."""
    # Leaving inference mode turns gradients on: they are turned off within.
    return torch.inference_mode(False)(torch.no_grad()(function))
