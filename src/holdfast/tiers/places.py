"""What a path names, and whether checkpoints may be written there.

Owns how a path of a load is resolved (links, a file inside a checkpoint, `latest`, the tracker),
how a directory that torch.distributed.checkpoint wrote without holdfast is recognised, and the
message for a path without a checkpoint: what is there, and where nearby a checkpoint is. Owns also
the checks when a manager is made: the two tiers' directories do not overlap, neither is inside a
committed checkpoint, and no path passes through a file, a circle of links or a directory that this
user may not enter. A damaged checkpoint of holdfast is never mistaken for one of torch. Writes
nothing, reads no tensors, and does not decide which checkpoint to load.

What a user typed is a path of a file system: this is the one module of the tiers that looks at
links and directories as such (`routing` resolves the root of the run itself). Everything behind a
path is read through its storage.
"""

from __future__ import annotations

import errno
import logging
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from holdfast.config import CheckpointConfig
from holdfast.errors import ConfigError
from holdfast.filesystem import DirectoryEntry, Filesystem
from holdfast.format.inventory import METADATA_NAME
from holdfast.storage import open_storage
from holdfast.storage.backend import PENDING_MARK, Storage
from holdfast.storage.identity import RUN_NAME
from holdfast.storage.manifest import FOREIGN, MANIFEST_NAME, Manifest
from holdfast.storage.posix import read_bytes
from holdfast.storage.store import TRACKER_NAME, Checkpoint, parse_checkpoint_name
from holdfast.tiers.local.shard_file import parse_shard_name
from holdfast.tiers.tier import RUN_CONFIG_NAME, TRAIN_STATE_NAME

logger = logging.getLogger(__name__)

LASTING = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors that a retry cannot fix."""


def check_directories(config: CheckpointConfig, filesystem: Filesystem) -> None:
    """Check the directories that checkpoints would be written to.

    Raises:
        ConfigError: with every problem.
    """
    given = {
        "checkpoint.persistent.directory": config.persistent.directory,
        "checkpoint.local.directory": config.local.directory,
    }
    directories = {field: each for field, each in given.items() if each is not None}
    problems = [
        f"{field}: {obstacle}"
        for field, each in directories.items()
        if (obstacle := find_obstacle(Path(each).absolute())) is not None
    ]
    if problems:
        raise ConfigError(problems)
    named = {field: _resolve(each) for field, each in directories.items()}
    for field, path in named.items():
        outer = _find_checkpoint_around(path, filesystem)
        if outer is not None:
            where = "is" if outer == path else f"is inside {outer},"
            problems.append(
                f"{field}: {path} {where} a committed checkpoint; name the directory of a store: "
                f"{outer.parent}, or a new one"
            )
    if len(named) == 2:
        (field, path), (other_field, other) = named.items()
        relation = _find_relation(other, path)
        if relation is not None:
            problems.append(
                f"{other_field}: {other} is {relation} {field} ({path}); the tiers would remove "
                "one another's files: name two directories that are separate"
            )
    if problems:
        raise ConfigError(problems)


def find_obstacle(path: Path) -> str | None:
    """Return why a path cannot be a directory; None: it is one, or can be created."""
    for each in (path, *path.parents):
        try:
            mode = each.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue  # may be created later; a file in the way is one of the parents
        except ValueError:
            return f"{str(path)!r} is no path: it holds a null character"
        except OSError as error:
            if error.errno not in LASTING:
                return None  # possibly transient: opening it reports it
            return (
                f"{each} cannot be reached: {errno.errorcode[error.errno or 0]} {error.strerror}; "
                "name a directory that this user may write to"
            )
        if stat.S_ISDIR(mode):
            return None
        where = "" if each == path else f", so that {path} cannot be made"
        return f"{each} is a file{where}; name a directory"
    return None


def _resolve(directory: str) -> Path:
    path = Path(directory)
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a circle of links: opening it reports that
        return path.absolute()


def _find_checkpoint_around(path: Path, filesystem: Filesystem) -> Path | None:
    """Return the directory or its closest parent that is a checkpoint; None: there is none."""
    for each in (path, *path.parents):
        is_named = parse_checkpoint_name(each.name) is not None
        if is_named and _is_file(each / MANIFEST_NAME, filesystem):
            return each
        if _is_file(each / METADATA_NAME, filesystem):  # any name, any writer
            return each
    return None


def _is_file(path: Path, filesystem: Filesystem) -> bool:
    try:
        filesystem.size_bytes(path)
    except OSError:
        return False
    return True


def _find_relation(one: Path, other: Path) -> str | None:
    if _holds(one, other) and _holds(other, one):
        return "the same as"
    if _holds(other, one):
        return "inside"
    return "around" if _holds(one, other) else None


def _holds(outer: Path, inner: Path) -> bool:
    """Whether a directory is another one or a parent of it, by path or by device and inode."""
    if inner.is_relative_to(outer):
        return True
    identity = _identify(outer)  # one directory may be mounted at two places
    return identity is not None and any(
        _identify(each) == identity for each in (inner, *inner.parents)
    )


def _identify(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


LATEST_NAME = "latest"
_OURS = {MANIFEST_NAME, TRAIN_STATE_NAME, RUN_CONFIG_NAME}
_ITERATION = re.compile("iter_([0-9]+)")
_LEVELS_UP = 3
"""The largest depth of a file inside a checkpoint."""
_SHOWN = 6
_LOOKED_AT = 200
"""Entries of one directory that the search for a nearby checkpoint reads at most."""


@dataclass(frozen=True)
class ForeignCheckpoint(Checkpoint):
    """A checkpoint written by torch alone, with a manifest that lists no files."""

    @classmethod
    def at(cls, path: Path) -> ForeignCheckpoint:
        """Make one for a directory; the iteration is N for a name `iter_N`, else 0."""
        match = _ITERATION.fullmatch(path.name)
        iteration = int(match[1]) if match else 0
        return cls(path, Manifest("", 0, 0, iteration, FOREIGN, 1, "", ()))


def is_foreign(files: Storage) -> bool:
    """Whether these are the files of a checkpoint written by torch alone.

    One with any file that only holdfast writes is holdfast's, and damaged without manifest.
    """
    names = {each.name for each in files.list()}
    return METADATA_NAME in names and not names & _OURS


def warn_of_foreign(path: Path) -> None:
    """Warn that such a checkpoint has no digests and only model and optimizer."""
    logger.warning(
        "%s was written without holdfast: nothing vouches for its bytes, and only model and "
        "optimizer are loaded from it",
        path,
    )


@dataclass(frozen=True)
class Place:
    """What a path names, with links resolved."""

    store: Path
    """The store, or the parent directory of the one checkpoint."""
    checkpoint: Path | None = None
    """The one checkpoint that the path names; None: it names the store."""


def find_place(path: Path, filesystem: Filesystem) -> Place | None:
    """Return what a path names; None: it holds no checkpoint or cannot be reached."""
    try:
        start = _find_start(path, filesystem)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in LASTING:
            raise  # a transient error does not prove that nothing is there
        return None
    if start is None:
        return None
    if (place := _look_at(start, filesystem)) is not None:
        return place
    for directory in start.parents[:_LEVELS_UP]:
        place = _look_at(directory, filesystem)
        if place is not None and place.checkpoint is not None:
            return place  # the path names something inside it
    return None


def is_same_directory(first: Path, second: Path) -> bool:
    """Whether two paths are one directory, however spelled or mounted."""
    try:
        return first.resolve() == second.resolve() or first.samefile(second)
    except (OSError, RuntimeError, ValueError):  # a circle of links, or not a valid path
        return False


def is_other_inside(path: Path, filesystem: Filesystem) -> bool:
    """Whether an entry of the run's own store is not part of the run.

    The run's checkpoints are recognised by name, also if they were removed meanwhile or are links
    to an archive; files, and `latest`, name the store.
    """
    if parse_checkpoint_name(path.name) is not None:
        return path.is_dir() and is_foreign(open_storage(path, filesystem))
    if path.name in (LATEST_NAME, TRACKER_NAME, RUN_NAME):
        return path.is_dir() and not path.is_symlink()
    return not path.is_file()


def describe(path: Path, filesystem: Filesystem) -> str:
    """Return what is at a path that holds no checkpoint, and where nearby one is."""
    try:
        exists = path.exists()
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, type(error).__name__)
        return f"{path} cannot be reached: {code} {error.strerror}."
    if not exists and path.is_symlink():
        return f"{path} is a link that leads nowhere."
    if not exists:
        present = next(each for each in path.absolute().parents if each.exists())
        lines = [f"{path} does not exist."]
        if near := _find_near(present, filesystem, levels=1):
            lines.append(f"Nearby: {near}.")
        return "\n".join(lines)
    if not path.is_dir():
        return f"{path} is a file, and belongs to no checkpoint."
    entries = _entries(path, filesystem)
    if runs := _find_local_runs(path, filesystem):
        return (
            f"{path} holds checkpoints of the local tier, of run {' and '.join(runs)}.\n"
            f"Leave load.directory null, and set checkpoint.run_id={runs[0]} and "
            "checkpoint.local.directory."
        )
    lines = [f"{path} holds no checkpoint: {_describe_entries(entries)}."]
    near = _find_near(path, filesystem, levels=2)
    if not near and (place := _look_at(path.resolve().parent, filesystem)) is not None:
        near = _describe_place(place)
    if near:
        lines.append(f"Did you mean {near}?")
    return "\n".join(lines)


def _find_start(path: Path, filesystem: Filesystem) -> Path | None:
    """Return the directory that a path resolves to; for a file, its directory."""
    parent = path.parent.resolve()
    if path.name == TRACKER_NAME:
        return parent
    if path.name == LATEST_NAME and not (path.is_dir() and not path.is_symlink()):
        if _is_store(parent, filesystem) or not path.exists():
            return parent  # the newest commit, wherever a link of this name points
        if path.is_file():
            # A text file with the name of a sibling directory, as some trainers write it.
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
        return None  # never committed: not loadable
    if is_checkpoint(directory, filesystem) or is_foreign(open_storage(directory, filesystem)):
        return Place(directory.parent, directory)
    return Place(directory) if _is_store(directory, filesystem) else None


def is_checkpoint(directory: Path, filesystem: Filesystem) -> bool:
    """Whether a directory is a holdfast checkpoint, damaged or not, by its name or manifest."""
    if parse_checkpoint_name(directory.name) is not None:
        return True
    return any(each.name == MANIFEST_NAME for each in _entries(directory, filesystem))


def _is_store(directory: Path, filesystem: Filesystem) -> bool:
    return any(
        (each.is_directory or each.is_link) and parse_checkpoint_name(each.name) is not None
        for each in _entries(directory, filesystem)
    )


def _find_near(path: Path, filesystem: Filesystem, levels: int) -> str:
    """Name the stores and checkpoints below a path; empty: there are none."""
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
    """Return the runs with local checkpoints in a directory, or the run whose directory it is."""

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
