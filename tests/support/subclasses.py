"""Tensor subclasses and tensors that are not dense, for tests of what is saved and given back.

Owns one subclass as low-bit optimizers have them (codes and a scale, taken apart through
`__tensor_flatten__`), one that nests it, one that says nothing of its parts, and an optimizer whose
state is of such a class. Knows nothing of holdfast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class Coded(torch.Tensor):
    """Eight-bit codes with one scale, shown as 32-bit floats."""

    codes: torch.Tensor
    scale: torch.Tensor
    note: Any

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, note: Any = "") -> Coded:
        size, device = codes.shape, codes.device
        make: Any = torch.Tensor._make_wrapper_subclass
        made: Coded = make(cls, size, dtype=torch.float32, device=device)
        return made

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, note: Any = "") -> None:
        self.codes, self.scale, self.note = codes, scale, note

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.note

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], note: Any, size: Any, stride: Any) -> Any:
        return cls(inner["codes"], inner["scale"], note)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            (tensor,) = arguments
            return cls(tensor.codes.detach(), tensor.scale.detach(), tensor.note)
        if function is torch.ops.aten.view.default:  # asked for by DTensor.from_local
            tensor, size = arguments
            return cls(tensor.codes.view(size), tensor.scale, tensor.note)
        plain = [each.decoded() if isinstance(each, Coded) else each for each in arguments]
        return function(*plain, **(options or {}))

    def decoded(self) -> torch.Tensor:
        """Return the values as plain floats."""
        return self.codes.float() * self.scale

    @classmethod
    def of(cls, values: torch.Tensor, note: Any = "") -> Coded:
        """Encode values."""
        scale = values.abs().amax().clamp(min=1e-12) / 127
        return cls((values / scale).round().to(torch.int8), scale, note)


class Opaque(torch.Tensor):
    """A subclass that does not say what it is made of."""


class CodedMomentum(torch.optim.Optimizer):
    """SGD whose momentum is kept in a `Coded` tensor, of shards in the local part of a DTensor."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                value, gradient = _local(parameter), _local(parameter.grad)
                before = state.get("momentum")
                momentum = gradient.clone()
                if before is not None:
                    momentum += 0.9 * _local(before).decoded()
                coded: Any = Coded.of(momentum)
                value -= group["lr"] * coded.decoded()
                if isinstance(parameter, DTensor):
                    coded = DTensor.from_local(
                        coded, parameter.device_mesh, parameter.placements, run_check=False,
                        shape=parameter.shape, stride=parameter.stride(),
                    )  # fmt: skip
                state["momentum"] = coded
                state["step"] = state.get("step", 0) + 1


def _local(tensor: Any) -> Any:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def unusual(seed: int = 1) -> dict[str, torch.Tensor]:
    """Return one tensor of each kind that is not dense and can be saved, by its kind."""
    torch.manual_seed(seed)
    square = torch.randn(4, 4)
    sparse = (square * (square > 0)).contiguous()
    scales, zeros = torch.rand(4) + 0.1, torch.randint(0, 3, (4,))
    return {
        "coo": sparse.to_sparse(),
        "coo, not coalesced": torch.sparse_coo_tensor(
            torch.tensor([[seed, 0, 0]]), torch.randn(3), (5,), check_invariants=True
        ),
        "csr": sparse.to_sparse_csr(),
        "csc": sparse.to_sparse_csc(),
        "bsr": sparse.to_sparse_bsr((2, 2)),
        "per tensor": torch.quantize_per_tensor(square, 0.1 * seed, seed, torch.qint8),
        "per channel": torch.quantize_per_channel(square, scales, zeros, 0, torch.quint8),
        "float parameters": torch.quantize_per_channel(
            square, scales, zeros.float() + 0.5, 0, torch.quint8
        ),
        "subclass": Coded.of(square, "a note"),
    }


def parts(tensor: torch.Tensor) -> Sequence[Any]:
    """Return everything that a tensor consists of, as lists that can be compared."""
    if isinstance(tensor, Coded):
        return [type(tensor), tensor.codes.tolist(), tensor.scale.item(), tensor.note]
    if tensor.is_quantized:
        kept = [tensor.qscheme(), tensor.int_repr().tolist()]
        if tensor.qscheme() == torch.per_tensor_affine:
            return [*kept, tensor.q_scale(), tensor.q_zero_point()]
        return [
            *kept, tensor.q_per_channel_scales().tolist(),
            tensor.q_per_channel_zero_points().tolist(), tensor.q_per_channel_axis(),
        ]  # fmt: skip
    if tensor.layout is torch.sparse_coo:
        indices, values = tensor._indices(), tensor._values()
        return [tensor.layout, tensor.is_coalesced(), indices.tolist(), values.tolist()]
    return [type(tensor), tensor.layout, tensor.to_dense().tolist()]
