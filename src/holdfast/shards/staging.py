"""The device-to-host copy: live tensors become a snapshot that training can no longer reach.

Owns the host buffers, which are reused from save to save, pinned where there is a GPU. Promises
that when `stage` returns no tensor of the result shares memory with its source, that tied tensors
are copied once and stay tied, and that distributed tensors keep their placement. Refuses tensor
types it cannot take apart.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from holdfast.errors import UnsupportedStateError


class Stager:
    """Copies nested states of tensors into buffers of its own; one snapshot is valid at a time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def stage(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a nested state with every tensor in host memory.

        The previous result of this stager is overwritten: its writer must be done with it. Values
        that are no tensors must be plain, and are copied in depth.

        Raises:
            UnsupportedStateError: a tensor subclass that names no inner tensors.
        """
        pass_over = _Pass(self._buffers)
        staged: dict[str, Any] = pass_over.copy(state, ())
        pass_over.run()
        self._buffers = pass_over.used  # what the state no longer has is released
        return staged


class _Pass:
    """One walk over a state: collects source and target pairs, then copies them all at once."""

    def __init__(self, buffers: dict[tuple[Any, ...], torch.Tensor]) -> None:
        self._buffers = buffers
        self.used: dict[tuple[Any, ...], torch.Tensor] = {}
        self._sources: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []
        self._copied: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach(), path)
        if isinstance(value, dict):
            return {key: self.copy(each, (*path, key)) for key, each in value.items()}
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(
                self.copy(each, (*path, position)) for position, each in enumerate(value)
            )
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
        if type(tensor) is not torch.Tensor:
            return self._copy_subclass(tensor, path)
        place = _place_of(tensor)
        if place in self._copied:
            return self._copied[place]
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.used[path] = buffer
        self._sources.append(tensor)
        self._targets.append(buffer)
        if tensor.numel():  # empty tensors all have address 0
            self._copied[place] = buffer
        return buffer

    def _copy_subclass(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
        if not hasattr(tensor, "__tensor_flatten__"):
            raise UnsupportedStateError(
                f"{'.'.join(map(str, path))} is a {type(tensor).__name__}, a tensor type without "
                "__tensor_flatten__, which cannot be staged; convert it to a plain tensor."
            )
        names, context = tensor.__tensor_flatten__()
        # Some name other things beside tensors: a DTensor its device mesh, which is not data.
        parts = {name: getattr(tensor, name) for name in names}
        inner = {
            name: self._copy_tensor(part.detach(), (*path, name))
            if isinstance(part, torch.Tensor)
            else part
            for name, part in parts.items()
        }
        kind: Any = type(tensor)
        rebuilt: torch.Tensor = kind.__tensor_unflatten__(
            inner, context, tensor.size(), tensor.stride()
        )
        return rebuilt

    @torch.no_grad()
    def run(self) -> None:
        on_gpu = any(each.is_cuda for each in self._sources)
        if self._sources:
            torch._foreach_copy_(self._targets, self._sources, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()


def _place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.is_conj(),  # a lazy conjugate or negative lies where its source does
        tensor.is_neg(),
    )
