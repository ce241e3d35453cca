"""Files that would run code if they were read carelessly.

Owns pickles whose code leaves a mark: a file that a test looks for. Promises that the code does run
under a careless reader (`test_hostile` sees it).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from holdfast.format.layout import read_index
from holdfast.format.values import fill
from holdfast.storage.digests import body_bytes_of


class _Payload:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._marker,))


def hostile_pickle(marker: Path) -> bytes:
    """Return a plain pickle that creates the marker when it is loaded."""
    return pickle.dumps(_Payload(marker))


def hostile_torch_file(marker: Path) -> bytes:
    """Return a torch file that creates the marker when it is loaded without weights_only."""
    stream = io.BytesIO()
    torch.save({"data": _Payload(marker)}, stream)
    return stream.getvalue()


def plant_value(shard: Path, name: str, content: bytes) -> None:
    """Overwrite a value in its slot of a shard file; its digests no longer match."""
    file = bytearray(shard.read_bytes())
    body_bytes = body_bytes_of(io.BytesIO(file))
    assert body_bytes is not None
    (entry,) = [each for each in read_index(bytes(file[:body_bytes])) if each.name == name]
    assert len(content) <= entry.length
    try:
        planted = fill(content, entry.length)
    except ValueError:  # no archive
        planted = content.ljust(entry.length, b"\0")
    file[entry.offset : entry.offset + entry.length] = planted
    shard.write_bytes(file)
