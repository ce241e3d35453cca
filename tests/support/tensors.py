"""Tensors of every type and shape that a snapshot meets, and their bits.

Owns what breaks copies: types that numpy does not know, views that are not row-major, lazy
conjugates and negatives, tensors of one element and of none. Promises that `bits` is what a
row-major copy of the values holds. Knows nothing of holdfast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.complex128,
]  # fmt: skip
SHAPES: list[tuple[int, ...]] = [(), (0,), (0, 3), (1,), (3, 5), (2, 3, 5, 7)]


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return a tensor of random bits that are values of its type."""
    generator = torch.Generator().manual_seed(seed)
    size_bytes = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size_bytes,), generator=generator)
    return raw.to(torch.uint8).view(dtype).view(shape)


VIEWS: dict[str, Callable[[int], Tensor]] = {
    "transposed": lambda width: torch.rand(width, 7).t(),
    "strided": lambda width: torch.rand(5, 2 * width)[:, ::2],
    "row": lambda width: torch.rand(3, width)[1],
    "offset": lambda width: torch.rand(width + 1)[1:],
    "expanded": lambda width: torch.rand(1, width).expand(3, width),
    "expanded from one": lambda width: torch.rand(()).expand(width),
    "conjugated": lambda width: torch.rand(3, width, dtype=torch.complex64).conj(),
    "negated": lambda width: torch.rand(3, width, dtype=torch.complex64).conj().imag,
    "negated whole": lambda width: torch._neg_view(torch.rand(3, width)),
    "channels last": lambda width: torch.rand(2, 3, 4, width).to(memory_format=torch.channels_last),
    "unfolded": lambda width: torch.rand(width + 2).unfold(0, 3, 1),
}
"""Each makes a tensor that is not its own row-major memory; the number is about how wide."""


def bits(tensor: Tensor) -> bytes:
    """Return the row-major bytes of a tensor's values."""
    plain = (
        tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    )
    flat: Any = plain.reshape(-1).view(torch.uint8).numpy()
    found: bytes = flat.tobytes()
    return found


class Gated(Tensor):
    """A tensor whose copy into others waits to be let, or fails."""

    let: Any
    error: BaseException | None

    @classmethod
    def of(cls, tensor: Tensor, let: Any, error: BaseException | None = None) -> Gated:
        """Return a tensor that is copied from when the event `let` is set, or then fails."""
        found: Gated = tensor.as_subclass(cls)
        found.let = let
        found.error = error
        return found

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if "foreach_copy" in getattr(function, "__name__", ""):
            for each in arguments[1]:
                if isinstance(each, Gated):
                    assert each.let.wait(30), "nobody let the copy go on"
                    if each.error is not None:
                        raise each.error
        return super().__torch_function__(function, types, arguments, named or {})  # type: ignore[no-untyped-call]
