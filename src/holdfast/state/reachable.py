"""Live tensors that bytes can be taken from and put into.

Owns which tensors a checkpoint cannot hold or restore: they have no memory (meta), or their values
do not lie in one dense array (sparse, quantised, MKL-DNN, nested). Promises that each is refused by
its name, with the way out, and that nothing is touched to find out. A load that copied into such a
tensor would restore nothing and say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from holdfast.errors import UnsupportedStateError

_SHOWN = 5
"""Names that one message lists."""
_META = "on the meta device, with no memory to hold values"
_SPARSE = "not dense"
_QUANTISED = "quantised"
_OVERLAPPING = "of elements that share memory (expanded)"
_REMEDIES = {
    _META: "Materialise first: build the model, call model.to_empty(device=...), make the "
    "optimizer from its parameters, then load or save.",
    _SPARSE: "Keep it out of the state (register_buffer(..., persistent=False)) and build it from "
    "dense parts, such as its indices and values, which can be saved.",
    _QUANTISED: "Save the model before it is quantised, or keep int_repr(), scale and zero point "
    "as plain buffers.",
    _OVERLAPPING: "Give it memory of its own, with .clone() or .contiguous(), before loading.",
}
_DENSE = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def check_reachable(state: Mapping[str, Any], *, written_to: bool = False) -> None:
    """Refuse tensors whose values cannot be saved; `written_to`: or not be restored in place.

    Raises:
        UnsupportedStateError: naming the tensors of the first kind found.
    """
    found: dict[str, list[str]] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            local = getattr(value, "_local_tensor", value)
            if (reason := _why_not(local, written_to)) is not None:
                layout = f" ({local.layout})" if reason == _SPARSE else ""
                found.setdefault(reason, []).append(name + layout)
    for reason, names in found.items():
        listed = ", ".join(names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        verb = "is" if len(names) == 1 else "are"
        raise UnsupportedStateError(f"{listed}{more} {verb} {reason}.\n{_REMEDIES[reason]}")


def _why_not(tensor: torch.Tensor, written_to: bool) -> str | None:
    if tensor.device.type == "meta":
        return _META
    if tensor.layout is not torch.strided:
        return _SPARSE
    if tensor.is_quantized:
        return _QUANTISED
    if written_to and type(tensor) in _DENSE and _overlaps(tensor):
        return _OVERLAPPING
    return None


def _overlaps(tensor: torch.Tensor) -> bool:
    return 0 in tensor.stride() and any(
        stride == 0 and size > 1
        for stride, size in zip(tensor.stride(), tensor.size(), strict=True)
    )
