"""One root directory of checkpoints.

Owns the names on disk, the order of durable writes, and what counts as a checkpoint: a directory
iter_N whose manifest is present and lists what is there, or a symbolic link of that name to such a
directory (a checkpoint that was moved to an archive). Promises that a crash at any point leaves
every earlier checkpoint loadable, that a partial one is never listed, and that the target of a link
is only read. Knows nothing about tensors, tiers, ranks, or when to save.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from holdfast.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FormatTooNewError,
    is_process_failure,
)
from holdfast.storage.digests import Difference, FileRecord, describe_content, find_difference
from holdfast.storage.manifest import MANIFEST_NAME, Manifest
from holdfast.storage.posix import (
    PENDING_MARK,
    Filesystem,
    naming,
    read_bytes,
    remove_tree,
    replace_file,
    write_new,
)

logger = logging.getLogger(__name__)

TRACKER_NAME = "latest_checkpointed_iteration.txt"
REPLACED_MARK = ".replaced-"
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

    def __init__(self, root: Path, filesystem: Filesystem) -> None:
        self.root = root
        self._filesystem = filesystem

    # -- reading ---------------------------------------------------------------------------------

    def listing(self) -> Listing:
        """Read every manifest; a missing root holds nothing."""
        try:
            entries = self._filesystem.list_directory(self.root)
        except FileNotFoundError:
            entries = []
        names = {each.name for each in entries if each.is_directory or each.is_link}
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
            path = self.root / name
            try:
                checkpoints.append(self.open(path, iteration))
            except CorruptCheckpointError as error:
                broken.append(Broken(path, iteration, str(error)))
            except FormatTooNewError as error:
                too_new.append(TooNew(path, iteration, error.sequence, error))
        checkpoints.sort(key=lambda each: (each.manifest.sequence, each.iteration), reverse=True)
        broken.sort(key=lambda each: each.iteration, reverse=True)
        too_new.sort(key=lambda each: each.iteration, reverse=True)
        return Listing(tuple(checkpoints), tuple(broken), tuple(too_new))

    def open(self, path: Path, iteration: int) -> Checkpoint:
        """Read the manifest of one directory or of a link's target.

        Raises:
            CorruptCheckpointError: it is missing, damaged, or of another iteration.
            FormatTooNewError: a later version wrote it.
            OSError: this process has too little memory or too many open files.
        """
        manifest_path = path / MANIFEST_NAME
        try:
            content = read_bytes(self._filesystem, manifest_path)
        except FileNotFoundError:
            if path.is_symlink() and not path.exists():
                reason = f"is a link to {path.readlink()}, which is not there"
            else:
                reason = "has no manifest.json: it was never committed, or lost it since"
            raise CorruptCheckpointError(str(path), reason) from None
        except OSError as error:
            if is_process_failure(error):
                raise
            raise CorruptCheckpointError(str(manifest_path), f"cannot be read: {error}") from error
        manifest = Manifest.from_bytes(content, str(manifest_path))
        if manifest.iteration != iteration:
            raise CorruptCheckpointError(
                str(manifest_path),
                f"is of iteration {manifest.iteration}: the directory was renamed or mixed up",
            )
        return Checkpoint(path, manifest)

    def find(self, iteration: int) -> Checkpoint:
        """Open the checkpoint of one iteration, damaged ones included in the search.

        Raises:
            CheckpointNotFoundError: there is none.
            CorruptCheckpointError: its manifest is missing or damaged.
        """
        listing = self.listing()
        for each in listing.checkpoints:
            if each.iteration == iteration:
                return each
        for damaged in listing.broken:
            if damaged.iteration == iteration:
                raise CorruptCheckpointError(str(damaged.path), damaged.reason)
        for newer in listing.too_new:
            if newer.iteration == iteration:
                raise newer.error
        present = ", ".join(str(each.iteration) for each in listing.checkpoints) or "none"
        raise CheckpointNotFoundError(
            f"{self.root} has no checkpoint of iteration {iteration}; it has: {present}."
        )

    def read_tracker(self) -> tuple[int | None, str]:
        """Return the tracker's iteration and, where that is None, the reason."""
        path = self.root / TRACKER_NAME
        try:
            content = read_bytes(self._filesystem, path)
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
        return self._damages(checkpoint, checkpoint.manifest.files, self._compare_size)

    def verify(
        self, checkpoint: Checkpoint, records: Sequence[FileRecord] | None = None
    ) -> list[Damage]:
        """Read files in full and compare them with the manifest. None: all of them."""
        chosen = checkpoint.manifest.files if records is None else records
        return self._damages(checkpoint, chosen, self._compare_bytes)

    def _damages(
        self,
        checkpoint: Checkpoint,
        records: Sequence[FileRecord],
        compare: Callable[[Path, FileRecord], Difference | None],
    ) -> list[Damage]:
        damages = []
        for record in records:
            try:
                found = self._find_link(checkpoint, record)
                if found is None:
                    found = compare(checkpoint.path / record.path, record)
            except FileNotFoundError:
                found = Difference("is missing")
            except OSError as error:
                if is_process_failure(error):
                    raise
                found = Difference(f"cannot be read: {error.strerror or error}")
            if found is not None:
                name = f"{checkpoint.path.name}/{record.path}"
                damages.append(Damage(name, found.reason, found.byte_range))
        return damages

    def _find_link(self, checkpoint: Checkpoint, record: FileRecord) -> Difference | None:
        """Refuse a parent folder that is a link: it may lead to files anywhere."""
        for name in reversed(PurePosixPath(record.path).parents[:-1]):
            if not self._filesystem.is_directory(checkpoint.path / name):
                return Difference(f"cannot be read: {name} is missing or a link, not a directory")
        return None

    def _compare_size(self, path: Path, record: FileRecord) -> Difference | None:
        size_bytes = self._filesystem.size_bytes(path)
        if size_bytes == record.size_bytes:
            return None
        return Difference(f"has {size_bytes} bytes, {record.size_bytes} were committed")

    def _compare_bytes(self, path: Path, record: FileRecord) -> Difference | None:
        # The size first: for a truncated file it is a clearer reason than a wrong digest.
        found = self._compare_size(path, record)
        if found is None:
            with naming(path), self._filesystem.open_existing(path) as stream:
                found = find_difference(record, stream)
        return found

    # -- writing ---------------------------------------------------------------------------------

    def begin(self, iteration: int) -> Path:
        """Create and return the pending directory of a new checkpoint."""
        pending = self.root / f"{checkpoint_name(iteration)}{PENDING_MARK}{secrets.token_hex(4)}"
        self._filesystem.make_directory(pending)
        return pending

    def write_file(self, pending: Path, name: str, content: bytes) -> FileRecord:
        """Write one small file of a pending checkpoint; its name is not durable yet."""
        path = pending / name
        if path.parent != pending:
            self._filesystem.make_directory(path.parent)
        write_new(self._filesystem, path, content)
        return describe_content(name, content)  # of the bytes given, not of what the disk holds

    def commit(self, pending: Path, manifest: Manifest) -> Checkpoint:
        """Make a pending checkpoint durable and visible, and move the tracker to it.

        Every file that the manifest lists must be written and synced. An earlier checkpoint of the
        same iteration stays loadable until this one is.
        """
        filesystem = self._filesystem
        write_new(filesystem, pending / MANIFEST_NAME, manifest.to_bytes())
        folders = {(pending / each.path).parent for each in manifest.files} | {pending}
        for folder in sorted(folders, reverse=True):
            filesystem.sync_directory(folder)  # the files' names, before the rename shows them
        final = self.root / checkpoint_name(manifest.iteration)
        replaced = None
        if self._is_taken(final):
            # The removal of what an earlier commit moved aside must be durable before the name is
            # free, or a power cut could bring back its remains as this iteration.
            filesystem.sync_directory(self.root)
            replaced = final.with_name(f"{final.name}{REPLACED_MARK}{secrets.token_hex(4)}")
            # It still counts as this iteration. No sync is needed before the next rename: if only
            # that one survives a power cut, the successor is complete.
            filesystem.rename(final, replaced)
        try:
            filesystem.rename(pending, final)  # visible from here
        except OSError:
            if replaced is not None:
                with suppress(OSError):  # it counts under either name; the next sweep retries
                    filesystem.rename(replaced, final)
            raise
        filesystem.sync_directory(self.root)  # durable from here; only now may the tracker move
        replace_file(filesystem, self.root / TRACKER_NAME, str(manifest.iteration).encode())
        filesystem.sync_directory(self.root)  # the tracker's new bytes under its name
        if replaced is not None:
            with suppress(OSError):  # the commit is done; the next sweep removes it
                self._remove_all(replaced)
        return Checkpoint(final, manifest)

    def _is_taken(self, path: Path) -> bool:
        """Whether this name is a directory or a link."""
        return self._filesystem.is_directory(path) or self._is_link(path)

    def _is_link(self, path: Path) -> bool:
        entries = self._filesystem.list_directory(path.parent)
        return any(each.is_link and each.name == path.name for each in entries)

    def _remove_all(self, path: Path) -> None:
        """Remove a directory with its contents; of a link only the link, never its target."""
        if self._is_link(path):
            self._filesystem.remove_file(path)
        else:
            remove_tree(self._filesystem, path)

    def abandon(self, pending: Path) -> None:
        """Remove a pending checkpoint that will not be committed."""
        remove_tree(self._filesystem, pending)

    def remove(self, checkpoint: Checkpoint) -> None:
        """Delete a committed checkpoint: first unlist it by a rename, then remove its files.

        If it is a link to an archive, remove only the link.
        """
        removed = self.root / (
            f"{checkpoint_name(checkpoint.iteration)}{PENDING_MARK}{secrets.token_hex(4)}"
        )
        self._filesystem.rename(checkpoint.path, removed)  # not listed from here
        self._filesystem.sync_directory(self.root)  # or a power cut could list it half deleted
        self._remove_all(removed)

    def sweep(self, confirm: Callable[[], None] = lambda: None) -> list[str]:
        """Remove leftovers of crashed saves and return their names; other names stay.

        `confirm` is called after the leftovers were listed, and raises to refuse. A checkpoint
        moved aside for a successor that was never committed gets its name back. What cannot be
        removed is left for the next sweep: leftovers must not fail a save.
        """
        leftovers = (
            each
            for each in self._filesystem.list_directory(self.root)
            if _PENDING.fullmatch(each.name) or _REPLACED.fullmatch(each.name)
        )
        if not any(leftovers):
            return []
        # A commit whose last sync failed may have left renames that are not durable. Without this
        # sync, a power cut after the removal could bring back, half deleted, a checkpoint that is
        # obsolete only by the new names.
        self._filesystem.sync_directory(self.root)
        for checkpoint in self.listing().checkpoints:  # newest first: of two, the newer
            final = self.root / checkpoint_name(checkpoint.iteration)
            if checkpoint.path != final and not self._is_taken(final):
                self._filesystem.rename(checkpoint.path, final)
        entries = self._filesystem.list_directory(self.root)
        names = {each.name for each in entries if each.is_directory or each.is_link}
        confirm()
        swept = []
        for each in entries:
            match = _REPLACED.fullmatch(each.name)
            obsolete = match is not None and checkpoint_name(int(match[1])) in names
            if not obsolete and not _PENDING.fullmatch(each.name):
                continue
            try:
                if each.is_directory:
                    remove_tree(self._filesystem, self.root / each.name)
                else:
                    self._filesystem.remove_file(self.root / each.name)
            except OSError as error:
                logger.warning("%s stays for the next sweep: %s", self.root / each.name, error)
                continue
            swept.append(each.name)
        return swept
