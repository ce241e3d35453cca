"""One root directory of checkpoints.

Owns the names on disk, the order in which a checkpoint becomes one, and what counts as a
checkpoint: a directory iter_N whose manifest is present and lists what is there, or a symbolic link
of that name to such a directory (a checkpoint that was moved to an archive). Promises that a crash
at any point leaves every earlier checkpoint loadable, that a partial one is never listed, and that
the target of a link is only read. Knows nothing about tensors, tiers, ranks, or when to save.

The order of durable writes has three levels: which rank writes what, and when all have
(`tiers.persistent`); files, then the manifest's publication, then the tracker (`commit`, here);
each sync and rename of a publication (`PosixStorage.publish`). Before them an attempt is claimed
(`storage.identity`). The local tier has an order of its own, in `tiers.local.tier`, with its syncs
in `tiers.local.shards`; a save to both tiers begins with that.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from holdfast.blame import is_process_failure
from holdfast.errors import (
    CorruptCheckpointError,
    FormatTooNewError,
)
from holdfast.storage.backend import (
    PENDING_MARK,
    REPLACED_MARK,
    GroupUnreachableError,
    Storage,
    open_stream,
    pending_name,
)
from holdfast.storage.digests import Difference, FileRecord, describe_content, find_difference
from holdfast.storage.manifest import MANIFEST_NAME, Manifest

logger = logging.getLogger(__name__)

TRACKER_NAME = "latest_checkpointed_iteration.txt"
_NONCE = "[0-9a-f]{8}"
_NUMBER = "[0-9]{7}|[1-9][0-9]{7,}"  # exactly as checkpoint_name writes it
_COMMITTED = re.compile(f"iter_({_NUMBER})")
_REPLACED = re.compile(f"iter_({_NUMBER}){re.escape(REPLACED_MARK)}{_NONCE}")
_PENDING = re.compile(
    rf"(iter_({_NUMBER})|{re.escape(TRACKER_NAME)}|run\.json|attempt_({_NUMBER})\.json)"
    rf"{re.escape(PENDING_MARK)}{_NONCE}"
)


@dataclass(frozen=True)
class Checkpoint:
    """A committed directory whose manifest was read."""

    path: Path
    manifest: Manifest

    @property
    def iteration(self) -> int:
        """The training step it belongs to."""
        return self.manifest.iteration

    @property
    def base_here(self) -> int | None:
        """The iteration of the same store that has the rest of its model, if it is one."""
        base = self.manifest.base_record
        return None if base is None else parse_checkpoint_name(base.relative_path)


@dataclass(frozen=True)
class Broken:
    """A directory with a checkpoint's name but without a usable manifest."""

    path: Path
    iteration: int
    reason: str


@dataclass(frozen=True)
class TooNew:
    """A checkpoint of a later version of holdfast: this version neither reads nor removes it."""

    path: Path
    iteration: int
    sequence: int | None
    """Its place in the order of commits; None: it could not be read."""
    error: FormatTooNewError


@dataclass(frozen=True)
class Listing:
    """The contents of a store, newest commit first."""

    checkpoints: tuple[Checkpoint, ...]
    broken: tuple[Broken, ...]
    too_new: tuple[TooNew, ...] = ()


@dataclass(frozen=True)
class Damage:
    """One file that differs from the manifest."""

    path: str
    """Relative to the store, starting with the checkpoint's directory."""
    reason: str
    byte_range: tuple[int, int] | None = None
    """First and last byte of the damaged block; None: the file as a whole."""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def checkpoint_name(iteration: int) -> str:
    """Return the directory name of an iteration: `iter_` and at least seven digits."""
    return f"iter_{iteration:07d}"


def parse_checkpoint_name(name: str) -> int | None:
    """Return the iteration of a committed directory's name; None: it is no such name."""
    match = _COMMITTED.fullmatch(name)
    return int(match[1]) if match else None


class Store:
    """One root of checkpoints. One process at a time may write; any may read."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @property
    def root(self) -> Path:
        """Its full name, for messages and to compare."""
        return Path(self.storage.where())

    def files_of(self, checkpoint: Checkpoint) -> Storage:
        """Return the storage of one checkpoint's files."""
        return self.storage.under(checkpoint.path.name)

    # -- reading ---------------------------------------------------------------------------------

    def listing(self) -> Listing:
        """Read every manifest; a missing root holds nothing."""
        names = {each.name for each in self.storage.list() if each.is_group}
        places: dict[str, int] = {}
        for name in names:
            if (iteration := parse_checkpoint_name(name)) is not None:
                places[name] = iteration
            elif (match := _REPLACED.fullmatch(name)) and checkpoint_name(
                int(match[1])
            ) not in names:
                # Moved aside for a successor: it counts until the successor has the name.
                places[name] = int(match[1])
        checkpoints: list[Checkpoint] = []
        broken: list[Broken] = []
        too_new: list[TooNew] = []
        for name, iteration in places.items():
            path = Path(self.storage.where(name))
            try:
                checkpoints.append(open_checkpoint(self.storage.under(name), iteration))
            except CorruptCheckpointError as error:
                broken.append(Broken(path, iteration, str(error)))
            except FormatTooNewError as error:
                too_new.append(TooNew(path, iteration, error.sequence, error))
        checkpoints.sort(key=lambda each: (each.manifest.sequence, each.iteration), reverse=True)
        broken.sort(key=lambda each: each.iteration, reverse=True)
        too_new.sort(key=lambda each: each.iteration, reverse=True)
        return Listing(tuple(checkpoints), tuple(broken), tuple(too_new))

    def read_tracker(self) -> tuple[int | None, str]:
        """Return the tracker's iteration and, where that is None, the reason."""
        try:
            content = self.storage.get(TRACKER_NAME)
        except FileNotFoundError:
            return None, "missing"
        except OSError as error:
            return None, f"unreadable: {error}"
        text = content.decode("ascii", "replace").strip()
        if not re.fullmatch("[0-9]{1,18}", text):
            return None, f"torn: it holds {text[:20]!r}, not an iteration"
        return int(text), ""

    def check_sizes(self, checkpoint: Checkpoint) -> list[Damage]:
        """Compare the size of every listed file; cheap, finds missing and truncated files."""
        return compare_sizes(self.files_of(checkpoint), checkpoint.manifest.files)

    def verify(self, checkpoint: Checkpoint) -> list[Damage]:
        """Read every file in full and compare it with the manifest."""
        return verify_files(self.files_of(checkpoint), checkpoint.manifest.files)

    # -- writing ---------------------------------------------------------------------------------

    def begin(self, iteration: int) -> str:
        """Begin a pending checkpoint and return its name."""
        pending = pending_name(checkpoint_name(iteration))
        self.storage.begin(pending)
        return pending

    def write_file(self, pending: str, name: str, content: bytes) -> FileRecord:
        """Write one small file of a pending checkpoint."""
        self.storage.under(pending).put(name, content)
        return describe_content(name, content)  # of the bytes given, not of what the disk holds

    def commit(self, pending: str, manifest: Manifest) -> Checkpoint:
        """Make a pending checkpoint durable and visible, and move the tracker to it.

        Every file that the manifest lists must have been written. An earlier checkpoint of the same
        iteration stays loadable until this one is.
        """
        storage, final = self.storage, checkpoint_name(manifest.iteration)
        replaced = storage.publish(
            pending,
            final,
            MANIFEST_NAME,
            manifest.to_bytes(),
            [each.path for each in manifest.files],
        )
        # Visible and durable; only now may the tracker move.
        storage.replace(TRACKER_NAME, str(manifest.iteration).encode())
        storage.settle([TRACKER_NAME])
        if replaced is not None:
            with suppress(OSError):  # the commit is done; the next sweep removes it
                storage.delete(replaced)
        return Checkpoint(Path(storage.where(final)), manifest)

    def abandon(self, pending: str) -> None:
        """Remove a pending checkpoint that will not be committed."""
        self.storage.delete(pending)

    def remove(self, checkpoint: Checkpoint) -> None:
        """Delete a committed checkpoint: first unlist it, then remove its files.

        If it was moved to an archive, remove only its name here.
        """
        self.storage.delete(self.retract(checkpoint))

    def retract(self, checkpoint: Checkpoint) -> str:
        """Unlist a committed checkpoint; return the name of what is left to delete."""
        return self.storage.retract(checkpoint.path.name)

    def sweep(self, confirm: Callable[[], None] = lambda: None) -> list[str]:
        """Remove leftovers of crashed saves and return their names; other names stay.

        `confirm` is called after the leftovers were listed, and raises to refuse. A checkpoint
        moved aside for a successor that was never committed gets its name back. What cannot be
        removed is left for the next sweep: leftovers must not fail a save.
        """
        leftovers = [
            each.name
            for each in self.storage.list()
            if _PENDING.fullmatch(each.name) or _REPLACED.fullmatch(each.name)
        ]
        if not leftovers:
            return []
        # A commit whose last sync failed may have left renames that are not durable. Without this
        # sync, a power cut after the removal could bring back, half deleted, a checkpoint that is
        # obsolete only by the new names.
        self.storage.settle(leftovers)
        for checkpoint in self.listing().checkpoints:  # newest first: of two, the newer
            final = checkpoint_name(checkpoint.iteration)
            if checkpoint.path.name != final:
                self.storage.restore(checkpoint.path.name, final)
        entries = self.storage.list()
        names = {each.name for each in entries if each.is_group}
        confirm()
        swept = []
        for each in entries:
            match = _REPLACED.fullmatch(each.name)
            obsolete = match is not None and checkpoint_name(int(match[1])) in names
            if not obsolete and not _PENDING.fullmatch(each.name):
                continue
            try:
                self.storage.delete(each.name)
            except OSError as error:
                where = self.storage.where(each.name)
                logger.warning("%s stays for the next sweep: %s", where, error)
                continue
            swept.append(each.name)
        return swept


def open_checkpoint(files: Storage, iteration: int | None = None) -> Checkpoint:
    """Read the manifest of one checkpoint. `iteration` None: whichever it is of.

    Raises:
        CorruptCheckpointError: it is missing, damaged, or of another iteration.
        FormatTooNewError: a later version wrote it.
        OSError: this process has too little memory or too many open files.
    """
    path, where = files.where(), files.where(MANIFEST_NAME)
    try:
        content = files.get(MANIFEST_NAME)
    except GroupUnreachableError as error:
        raise CorruptCheckpointError(path, str(error.strerror)) from None
    except FileNotFoundError:
        raise CorruptCheckpointError(
            path, "has no manifest.json: it was never committed, or lost it since"
        ) from None
    except OSError as error:
        if is_process_failure(error):
            raise
        raise CorruptCheckpointError(where, f"cannot be read: {error}") from error
    manifest = Manifest.from_bytes(content, where)
    if iteration not in (None, manifest.iteration):
        raise CorruptCheckpointError(
            where, f"is of iteration {manifest.iteration}: the directory was renamed or mixed up"
        )
    return Checkpoint(Path(path), manifest)


def compare_sizes(files: Storage, records: Sequence[FileRecord]) -> list[Damage]:
    """Compare the size of files of a checkpoint with their records."""
    return _find_damages(files, records, _compare_size)


def verify_files(files: Storage, records: Sequence[FileRecord]) -> list[Damage]:
    """Read files of a checkpoint in full and compare them with their records."""
    return _find_damages(files, records, _compare_bytes)


def _find_damages(
    files: Storage,
    records: Sequence[FileRecord],
    compare: Callable[[Storage, FileRecord], Difference | None],
) -> list[Damage]:
    damages = []
    for record in records:
        try:
            found = compare(files, record)
        except FileNotFoundError:
            found = Difference("is missing")
        except OSError as error:
            if is_process_failure(error):
                raise
            found = Difference(f"cannot be read: {error.strerror or error}")
        if found is not None:
            name = f"{Path(files.where()).name}/{record.path}"
            damages.append(Damage(name, found.reason, found.byte_range))
    return damages


def _compare_size(files: Storage, record: FileRecord) -> Difference | None:
    size_bytes = files.size_bytes(record.path)
    if size_bytes == record.size_bytes:
        return None
    return Difference(f"has {size_bytes} bytes, {record.size_bytes} were committed")


def _compare_bytes(files: Storage, record: FileRecord) -> Difference | None:
    # The size first: for a truncated file it is a clearer reason than a wrong digest.
    found = _compare_size(files, record)
    if found is None:
        with open_stream(files, record.path) as stream:
            found = find_difference(record, stream)
    return found
