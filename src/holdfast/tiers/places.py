"""What a path names, and whether checkpoints may be written there.

Owns how a path of a load is resolved (links, a file inside a checkpoint, `latest`, the tracker),
and the message when it holds no checkpoint: what is there, and where nearby a checkpoint is. Owns
also the checks when a manager is made: the two tiers' directories do not overlap, neither is inside
a committed checkpoint, and no path passes through a file, a circle of links or a directory that
this user may not enter. Warns of an accidental second start: the newest attempt may still be
running, judged by its process on the same host and by its last checkpoint's age on another. Writes
nothing, reads no tensors, and does not decide which checkpoint to load.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from holdfast.config import CheckpointConfig
from holdfast.errors import CheckpointError, ConfigError
from holdfast.filesystem import DirectoryEntry, Filesystem
from holdfast.format.inventory import METADATA_NAME
from holdfast.storage.backend import PENDING_MARK, Storage
from holdfast.storage.identity import Attempt, Process, RunIdentity, find_start_mark, this_process
from holdfast.storage.manifest import MANIFEST_NAME
from holdfast.storage.posix import PosixStorage, read_bytes
from holdfast.storage.store import TRACKER_NAME, Store, parse_checkpoint_name
from holdfast.tiers.local.shard_file import parse_shard_name
from holdfast.tiers.opening import is_foreign

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
_LEVELS_UP = 3
"""The largest depth of a file inside a checkpoint."""
_SHOWN = 6
_LOOKED_AT = 200
"""Entries of one directory that the search for a nearby checkpoint reads at most."""


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
    if is_checkpoint(directory, filesystem) or is_foreign(PosixStorage(directory, filesystem)):
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


logger = logging.getLogger(__name__)


def warn_of_living_attempt(storage: Storage) -> None:
    """Warn if the newest attempt at a store may be running; call it on rank 0, at the load.

    Read errors are left to the load, which reports them.
    """
    try:
        reason = _find_in_store(storage)
    except (CheckpointError, OSError):
        return
    if reason is not None:
        logger.warning(
            "%s: %s.\nThe first save of this job will stop it: an overtaken attempt may not save. "
            "If that is not what you want, stop this job, or give it its own "
            "checkpoint.persistent.directory.",
            storage.where(),
            reason,
        )


def _find_in_store(storage: Storage) -> str | None:
    here = this_process()
    attempts = RunIdentity(storage).attempts()
    if not attempts:
        return None
    attempt = attempts[-1]
    commits: list[datetime] = []
    if attempt.host != here.host:  # only then are the manifests needed
        for each in Store(storage).listing().checkpoints:
            found = _parse_time(each.manifest.saved_at)
            if each.manifest.attempt == attempt.number and found is not None:
                commits.append(found)
    living_mark = find_start_mark(attempt.pid) if attempt.pid is not None else None
    return find_living_attempt(attempt, commits, here, living_mark, datetime.now(UTC))


def find_living_attempt(
    attempt: Attempt,
    commits: Sequence[datetime],
    here: Process,
    living_mark: str | None,
    now: datetime,
) -> str | None:
    """Return why an attempt seems to be running; None: there is no sign of it.

    `commits`: the times of its checkpoints. `living_mark`: the start mark of the process that has
    its pid on this host now; None: there is none.
    """
    since = f", since {attempt.claimed_at}" if attempt.claimed_at is not None else ""
    if attempt.host is None:
        return None  # a claim of an older version, or damaged
    if attempt.host == here.host:
        if attempt.start_mark is None or attempt.start_mark != living_mark:
            return None  # it has ended; its pid may have been reused
        if (attempt.pid, attempt.start_mark) == (here.pid, here.start_mark):
            return None
        return (
            f"attempt {attempt.number} (process {attempt.pid} on this host{since}) is still running"
        )
    times = sorted(commits)
    if not times:
        return None
    start = times[-2] if len(times) > 1 else _parse_time(attempt.claimed_at)
    if start is None:
        return None
    interval, age = times[-1] - start, now - times[-1]
    if age >= interval:
        return None
    return (
        f"attempt {attempt.number} (on host {attempt.host}{since}) may still be running: its last "
        f"checkpoint is {_seconds(age)} s old, and it took {_seconds(interval)} s to that one"
    )


def _parse_time(value: str | None) -> datetime | None:
    """Parse a time of a manifest or a claim; None: it is invalid."""
    with suppress(TypeError, ValueError):
        found = datetime.fromisoformat(value or "")
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return None


def _seconds(duration: timedelta) -> int:
    return max(0, round(duration.total_seconds()))  # clocks of two hosts differ
