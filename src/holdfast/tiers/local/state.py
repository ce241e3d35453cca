"""One shard as nvidia-resiliency-ext passes it around: a single uint8 tensor over the image.

Owns the package's view of a snapshot. Promises that it never holds live objects: the package's own
class maps tensors in place, which takes a live optimizer apart, demands that all of them lie on a
GPU, and sends strided ones wrongly. Where tensors belong is the business of whoever reads them out
of the image.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from nvidia_resiliency_ext.checkpointing.local.base_state_dict import TensorAwareStateDict

from holdfast.tiers.local.tail import Tail
from holdfast.tiers.local.turns import TurnFile


class ShardState(TensorAwareStateDict):  # type: ignore[misc]  # the package ships no types
    """The image of one shard, its tail, and where it lies until it is published."""

    def __init__(self, image: memoryview, tail: Tail, pending: Path, file: TurnFile | None) -> None:
        self.tail = tail
        self.image = image
        self.pending = pending
        """Where it lies, sealed, until it is published."""
        self.file = file
        """The same, where files take turns."""
        self._image: torch.Tensor | None = torch.frombuffer(image, dtype=torch.uint8)

    def pop_tensors(self) -> list[torch.Tensor]:
        """Return the image; the state is hollow until it is given one back."""
        (tensor,) = self.tensors
        self._image = None
        return [tensor]

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        """The image."""
        assert self._image is not None, "this state is hollow"
        return [self._image]

    @property
    def is_hollow(self) -> bool:
        """Whether the image was taken away."""
        return self._image is None

    def insert_tensors(self, tensor_data: Iterable[torch.Tensor]) -> None:
        """Undo `pop_tensors`."""
        (self._image,) = tensor_data

    def init_tensors(self) -> None:
        """Make room for an image."""
        self._image = torch.empty(self.tail.record.image_bytes, dtype=torch.uint8, device="cpu")

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        """The image lies in host memory: there is nothing to copy, and nothing to wait for."""

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        """Where tensors belong is the business of whoever reads them from the image."""
