"""Small committed checkpoints, made through the store itself, and a file system that misbehaves.

Owns what tests of names, order and resolution need: checkpoints that hold a few bytes and no
tensors. Promises that they are committed as a save commits them. Knows no manager.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from holdfast.filesystem import LocalFilesystem
from holdfast.storage.digests import FileRecord, describe_content
from holdfast.storage.manifest import MANIFEST_NAME, Manifest
from holdfast.storage.store import Checkpoint, Store


def manifest_of(
    iteration: int,
    sequence: int = 1,
    run_id: str = "run",
    attempt: int = 1,
    files: tuple[FileRecord, ...] = (),
) -> Manifest:
    """Return a manifest with the fields that decisions are made from."""
    return Manifest(
        run_id=run_id,
        attempt=attempt,
        sequence=sequence,
        iteration=iteration,
        tier="persistent",
        world_size=1,
        saved_at="2026-01-01T00:00:00+00:00",
        files=files,
    )


def commit(
    store: Store,
    iteration: int,
    sequence: int | None = None,
    run_id: str = "run",
    attempt: int = 1,
    content: bytes = b"shards",
) -> Checkpoint:
    """Commit a checkpoint of two small files. `sequence` None: the iteration, as saves go on."""
    pending = store.begin(iteration)
    files = (
        store.write_file(pending, "y.distcp", b"state"),
        store.write_file(pending, "x.distcp", content),
    )
    sequence = iteration if sequence is None else sequence
    manifest = manifest_of(iteration, sequence, run_id, attempt, files)
    return store.commit(pending, manifest)


def find(store: Store, iteration: int) -> Checkpoint:
    """Return the checkpoint of an iteration, which must be there once and sound."""
    (found,) = [each for each in store.listing().checkpoints if each.iteration == iteration]
    return found


def tree(root: Path) -> dict[str, bytes | str | None]:
    """Return everything under a directory by relative name: bytes, a link's target, or None."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


class FaultyFilesystem(LocalFilesystem):
    """A real file system that can be told to refuse, or to wait at, the steps of a save."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: Callable[[str, Path], bool] = lambda step, path: False
        """Asked before each writing step by its method's name; True: it fails with EIO."""
        self.gate = threading.Event()
        """Every new file waits for it; open at first."""
        self.gate.set()
        self.holds: Callable[[Path], bool] = lambda path: True
        """Which new files that are."""

    def _pass(self, step: str, path: Path) -> None:
        if self.refuses(step, path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def open_new(self, path: Path) -> BinaryIO:
        assert not self.holds(path) or self.gate.wait(60), "nobody opened the gate"
        self._pass("open_new", path)
        return super().open_new(path)

    def rename(self, source: Path, target: Path) -> None:
        self._pass("rename", target)
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._pass("link", target)
        super().link(source, target)

    def sync_directory(self, path: Path) -> None:
        self._pass("sync_directory", path)
        super().sync_directory(path)

    def sync_file(self, path: Path, stream: Any) -> None:
        self._pass("sync_file", path)
        super().sync_file(path, stream)


def reseal(path: Path, add: tuple[str, ...] = (), drop: tuple[str, ...] = ()) -> None:
    """Rewrite a checkpoint's manifest so that it agrees with its altered files, as an attacker can.

    `add` and `drop`: files to list beside, or to leave out of, those that were listed.
    """
    where = path / MANIFEST_NAME
    manifest = Manifest.from_bytes(where.read_bytes(), str(where))
    names = {each.path for each in manifest.files} | {*add}
    records = []
    for name in sorted(names - {*drop}):
        with (path / name).open("rb") as stream:
            records.append(describe_content(name, stream.read()))
    where.write_bytes(dataclasses.replace(manifest, files=tuple(records)).to_bytes())


def flip_bit(path: Path, position: int = 0) -> None:
    """Change one bit of a file. Negative positions count from the end."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
