"""Damage told in the words of the person who trained: which tensors a bad block belongs to.

Owns joining what the store found with what the shards' metadata says. Promises to be best effort
and to need no torch: damage whose tensors cannot be told is reported as it was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from holdfast.filesystem import Filesystem, read_bytes
from holdfast.shards.inventory import METADATA_NAME, list_names, names_in
from holdfast.store import Checkpoint, Damage


def name_tensors(
    checkpoint: Checkpoint, damages: Sequence[Damage], filesystem: Filesystem
) -> list[Damage]:
    """Add to every damaged block the tensors that it holds parts of, where that can be told."""
    return [
        replace(each, reason=each.reason + _clause(checkpoint, each, filesystem))
        for each in damages
    ]


def _clause(checkpoint: Checkpoint, damage: Damage, filesystem: Filesystem) -> str:
    if damage.byte_range is None:
        return ""
    try:
        content = read_bytes(filesystem, checkpoint.path / METADATA_NAME)
    except OSError:
        return ""
    file_name = damage.path.removeprefix(f"{checkpoint.path.name}/")
    return list_names(names_in(content, file_name, damage.byte_range))
