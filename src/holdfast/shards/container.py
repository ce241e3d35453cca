"""The container of one tensor inside a shard file: what `torch.save` would have written.

Owns where a tensor's bytes lie in its container, for any shape and dtype, without having the bytes.
Promises that header, payload and trailer together are what stock torch reads, and that a container
made elsewhere is recognised by its size and header. Source of the format: torch's own zip archive,
made by torch under `torch.serialization.skip_data`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Container:
    """The bytes around a dense, row-major tensor."""

    header: bytes
    payload_bytes: int
    trailer: bytes

    @property
    def size_bytes(self) -> int:
        """Of header, payload and trailer."""
        return len(self.header) + self.payload_bytes + len(self.trailer)


@lru_cache(maxsize=1 << 16)
def container_of(dtype: torch.dtype, shape: torch.Size) -> Container:
    """Return the container that torch gives a contiguous CPU tensor; no such tensor is filled."""
    sink = _Sink()
    # Not torch.empty: with deterministic algorithms that fills what it makes.
    unfilled: Any = torch.UntypedStorage
    storage = unfilled(shape.numel() * dtype.itemsize, device="cpu")
    tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage).view(shape)
    with torch.serialization.skip_data():
        torch.save(tensor, sink)  # type: ignore[arg-type]  # write, seek
    return sink.container()


class _Sink:
    """Takes what torch writes and notes the one place that it seeks over: the payload."""

    def __init__(self) -> None:
        self._before = bytearray()
        self._after = bytearray()
        self._skipped = 0

    def write(self, part: bytes) -> int:
        side = self._after if self._skipped else self._before
        side += part
        return len(part)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = self.tell()
        target = position + offset if whence == os.SEEK_CUR else offset
        assert target >= position, "torch is expected to skip forward, once"
        self._skipped += target - position
        return target

    def tell(self) -> int:
        return len(self._before) + self._skipped + len(self._after)

    def flush(self) -> None:
        return

    def container(self) -> Container:
        return Container(bytes(self._before), self._skipped, bytes(self._after))
