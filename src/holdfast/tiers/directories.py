"""Refuse directories that cannot be used, or in which checkpoints would damage one another.

Owns three rules, held when a manager is made, before anything is created: the directories of the
two tiers lie apart, neither lies inside a committed checkpoint, and no path leads through a file, a
circle of links or a directory that this user may not enter. Paths are compared as the system sees
them: links, relative paths, `..`, `~` and mounts of the same directory make no difference.
"""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from holdfast.config import CheckpointConfig
from holdfast.errors import ConfigError
from holdfast.filesystem import Filesystem
from holdfast.manifest import MANIFEST_NAME
from holdfast.shards.inventory import METADATA_NAME
from holdfast.store import parse_checkpoint_name

LASTING = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
"""What no waiting changes."""


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
                "one another's files: name two directories that lie apart"
            )
    if problems:
        raise ConfigError(problems)


def find_obstacle(path: Path) -> str | None:
    """Say why no directory can be, or be made, at a path; None: nothing is in the way."""
    for each in (path, *path.parents):
        try:
            mode = each.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue  # may come to be; if a file is in the way, that is one of the parents
        except ValueError:
            return f"{str(path)!r} is no path: it holds a null character"
        except OSError as error:
            if error.errno not in LASTING:
                return None  # a fault that may pass: opening it reports it
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
    except (OSError, RuntimeError):  # links in a circle: opening it reports so
        return path.absolute()


def _find_checkpoint_around(path: Path, filesystem: Filesystem) -> Path | None:
    """Return the directory, or the closest one above it, that is a checkpoint; None: none is."""
    for each in (path, *path.parents):
        is_named = parse_checkpoint_name(each.name) is not None
        if is_named and _is_file(each / MANIFEST_NAME, filesystem):
            return each
        if _is_file(each / METADATA_NAME, filesystem):  # under whatever name, by whomever written
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
    """Whether a directory is another one or lies above it, by its path or by what it is."""
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
