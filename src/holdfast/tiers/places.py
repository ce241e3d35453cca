"""What a path given to a load names: a store, one checkpoint of it, or nothing that can be loaded.

Owns how a person may spell it (through links, a file inside a checkpoint, `latest`, the tracker)
and what to say when there is nothing: what the directory holds, and where nearby a checkpoint is.
Promises to write nothing and to read no tensors. Decides nothing about which checkpoint to take.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from holdfast.filesystem import PENDING_MARK, DirectoryEntry, Filesystem, read_bytes
from holdfast.manifest import MANIFEST_NAME
from holdfast.store import TRACKER_NAME, parse_checkpoint_name
from holdfast.tiers.directories import LASTING
from holdfast.tiers.foreign import is_foreign
from holdfast.tiers.local.files import parse_shard_name

LATEST_NAME = "latest"
_LEVELS_UP = 3
"""How far a file can lie inside a checkpoint."""
_SHOWN = 6
_LOOKED_AT = 200
"""Entries of one directory, where a neighbour is looked for."""


@dataclass(frozen=True)
class Place:
    """What a path names, links resolved."""

    store: Path
    """The store, or the directory that the one checkpoint lies in."""
    checkpoint: Path | None = None
    """The one checkpoint that is named; None: the store."""


def find_place(path: Path, filesystem: Filesystem) -> Place | None:
    """Return what a path names; None: nothing that holds a checkpoint, or can be reached."""
    try:
        start = _find_start(path, filesystem)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in LASTING:
            raise  # a fault that may pass does not say that nothing is there
        return None
    if start is None:
        return None
    if (place := _look_at(start, filesystem)) is not None:
        return place
    for directory in start.parents[:_LEVELS_UP]:
        place = _look_at(directory, filesystem)
        if place is not None and place.checkpoint is not None:
            return place  # of which something inside was named
    return None


def is_same_directory(first: Path, second: Path) -> bool:
    """Whether two paths lead to one directory, however they are spelled or mounted."""
    try:
        return first.resolve() == second.resolve() or first.samefile(second)
    except (OSError, RuntimeError, ValueError):  # links in a circle, or no path at all
        return False


def describe(path: Path, filesystem: Filesystem) -> str:
    """Say what is at a path that holds no checkpoint, and where nearby one is."""
    try:
        exists = path.exists()
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, type(error).__name__)
        return f"{path} cannot be reached: {code} {error.strerror}."
    if not exists and path.is_symlink():
        return f"{path} is a link that leads nowhere."
    if not exists:
        present = next(each for each in path.absolute().parents if each.exists())
        told = [f"{path} does not exist."]
        if near := _find_near(present, filesystem, levels=1):
            told.append(f"Nearby: {near}.")
        return "\n".join(told)
    if not path.is_dir():
        return f"{path} is a file, and belongs to no checkpoint."
    entries = _entries(path, filesystem)
    if runs := _find_local_runs(path, filesystem):
        return (
            f"{path} holds checkpoints of the local tier, of run {' and '.join(runs)}.\n"
            f"Leave load.directory null, and set checkpoint.run_id={runs[0]} and "
            "checkpoint.local.directory."
        )
    told = [f"{path} holds no checkpoint: {_describe_entries(entries)}."]
    near = _find_near(path, filesystem, levels=2)
    if not near and (place := _look_at(path.resolve().parent, filesystem)) is not None:
        near = _describe_place(place)
    if near:
        told.append(f"Did you mean {near}?")
    return "\n".join(told)


def _find_start(path: Path, filesystem: Filesystem) -> Path | None:
    """Return the directory that a path leads to; of a file, the one that it lies in."""
    parent = path.parent.resolve()
    if path.name == TRACKER_NAME:
        return parent
    if path.name == LATEST_NAME and not (path.is_dir() and not path.is_symlink()):
        if _is_store(parent, filesystem) or not path.exists():
            return parent  # the newest, whatever a link of this name was last set to
        if path.is_file():
            # A text file that names a directory beside it, as some trainers keep one.
            with suppress(OSError, UnicodeDecodeError):
                named = read_bytes(filesystem, path.resolve()).decode().strip()
                if named and (parent / named).is_dir():
                    return (parent / named).resolve()
    if not path.exists():
        return None
    found = path.resolve()
    return found if found.is_dir() else found.parent


def _look_at(directory: Path, filesystem: Filesystem) -> Place | None:
    if not directory.is_dir() or PENDING_MARK in directory.name:
        return None  # what was never committed is nothing to load from
    if is_checkpoint(directory, filesystem) or is_foreign(directory, filesystem):
        return Place(directory.parent, directory)
    return Place(directory) if _is_store(directory, filesystem) else None


def is_checkpoint(directory: Path, filesystem: Filesystem) -> bool:
    """Whether a directory is a checkpoint of ours, damaged or not: by its name, or its manifest."""
    if parse_checkpoint_name(directory.name) is not None:
        return True
    return any(each.name == MANIFEST_NAME for each in _entries(directory, filesystem))


def _is_store(directory: Path, filesystem: Filesystem) -> bool:
    return any(
        (each.is_directory or each.is_link) and parse_checkpoint_name(each.name) is not None
        for each in _entries(directory, filesystem)
    )


def _find_near(path: Path, filesystem: Filesystem, levels: int) -> str:
    """Name the stores and checkpoints that directories under a path hold; empty: there are none."""
    found: list[str] = []
    folders = [path]
    for _ in range(levels):
        children = [
            folder / each.name
            for folder in folders
            for each in _entries(folder, filesystem)[:_LOOKED_AT]
            if each.is_directory or each.is_link
        ]
        for child in children[:_LOOKED_AT]:
            with suppress(OSError):
                if (place := _look_at(child, filesystem)) is not None:
                    found.append(_describe_place(place))
        if found:
            break
        folders = children[:_LOOKED_AT]
    return " or ".join(found[:3]) + (" ..." if len(found) > 3 else "")


def _find_local_runs(path: Path, filesystem: Filesystem) -> list[str]:
    """Return the runs whose local checkpoints lie in a directory, or the one that it is of."""

    def holds_shards(folder: Path) -> bool:
        return any(
            parse_shard_name(shard.name) is not None
            for each in _entries(folder, filesystem)
            if each.is_directory and each.name.isdecimal()
            for shard in _entries(folder / each.name, filesystem)
        )

    if holds_shards(path):
        return [path.name]
    children = _entries(path, filesystem)[:_LOOKED_AT]
    return [each.name for each in children if each.is_directory and holds_shards(path / each.name)]


def _describe_place(place: Place) -> str:
    return f"{place.checkpoint or place.store}"


def _describe_entries(entries: Sequence[DirectoryEntry]) -> str:
    if not entries:
        return "it is empty"
    names = [f"{each.name}/" if each.is_directory else each.name for each in entries]
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    if any(name.endswith(".safetensors") for name in names):
        return f"it has {shown} (safetensors, which this version does not load)"
    if any(name.endswith((".pt", ".pth", ".bin", ".ckpt")) for name in names):
        return f"it has {shown} (files of torch.save, which this version does not load)"
    return f"it has {shown}"


def _entries(directory: Path, filesystem: Filesystem) -> list[DirectoryEntry]:
    try:
        return filesystem.list_directory(directory)
    except OSError:
        return []
