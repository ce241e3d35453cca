"""An example of a custom checkpoint manager: holdfast's, plus a second copy of every checkpoint.

Owns the mirror: a directory that holds each committed checkpoint and a tracker, and is itself a
store to load from. Promises to copy only what is committed, to show a copy only when it is
complete, and to make a copy that a crash prevented at the next start. Leaves everything else to the
manager it wraps. A mirror that cannot be written is a warning: the checkpoint itself is committed.

    python recipes/pretrain.py recipe=custom_manager
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist

from holdfast import (
    CheckpointConfig,
    CheckpointEvent,
    CheckpointLoadContext,
    CheckpointSaveContext,
    DefaultCheckpointManager,
    GlobalState,
    LoadResult,
)
from holdfast.errors import ConfigError
from holdfast.events import ON_CHECKPOINT_SAVE

# The name that loading looks for: with it the mirror is a store like any other.
TRACKER_NAME = "latest_checkpointed_iteration.txt"
PERSISTENT = "persistent"
"""The tier that is mirrored; local checkpoints come and go with the node's memory."""


class MirroringCheckpointManager:
    """Do as the default manager does, and copy each checkpoint once it is committed."""

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        """Wrap a default manager of the same configuration.

        Raises:
            ConfigError: `options.mirror_directory` does not name a directory.
        """
        directory = checkpoint_config.options.get("mirror_directory")
        if not isinstance(directory, str) or not directory:
            raise ConfigError(
                [f"checkpoint.options.mirror_directory is {directory!r}; name a directory"]
            )
        self._mirror = Mirror(Path(directory))
        self._manager = DefaultCheckpointManager(checkpoint_config)

    def save(self, ctx: CheckpointSaveContext, callback_manager: Any | None = None) -> None:
        """Save; the mirror is written when the commit is announced."""
        self._manager.save(ctx, _MirroringCallbacks(self._mirror, callback_manager))

    def load(self, ctx: CheckpointLoadContext) -> LoadResult:
        """Load, and mirror what was loaded if a crash came between its commit and its copy."""
        result = self._manager.load(ctx)
        if result.path is not None and result.tier == PERSISTENT:
            self._mirror.add(result.path, result.iteration)
        return result

    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Let the default manager finish what it can; commits are announced, and mirrored, here."""
        self._manager.finalize_async_saves(state, blocking, terminate)


class Mirror:
    """A directory of copies. Only the first process writes it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def add(self, checkpoint: Path, iteration: int) -> None:
        """Copy a committed checkpoint, unless the very same is there already."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        final = self._root / checkpoint.name
        if final.resolve() == checkpoint.resolve() or _holds_same_checkpoint(final, checkpoint):
            return
        try:
            self._copy(checkpoint, final)
            self._point_tracker_at(iteration)
        except OSError as error:
            warnings.warn(
                f"{checkpoint} is committed, but has no copy in {self._root}: {error}", stacklevel=2
            )

    def remove(self, iterations: tuple[int, ...]) -> None:
        """Forget the copies of checkpoints that retention has removed."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        for iteration in iterations:
            shutil.rmtree(self._root / f"iter_{iteration:07d}", ignore_errors=True)

    def _copy(self, checkpoint: Path, final: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        for left_over in self._root.glob("iter_*.pending-mirror"):
            shutil.rmtree(left_over)  # by an attempt that died while copying
        pending = self._root / f"{checkpoint.name}.pending-mirror"
        shutil.copytree(checkpoint, pending, copy_function=_copy_durably)
        for folder, _, _ in os.walk(pending):
            _sync(Path(folder))  # the files' names, before the rename shows them
        if final.exists():
            shutil.rmtree(final)  # another checkpoint of this iteration; the store has the new one
        pending.rename(final)  # visible from here
        _sync(self._root)  # durable from here; only now may the tracker move

    def _point_tracker_at(self, iteration: int) -> None:
        tracker = self._root / TRACKER_NAME
        aside = self._root / f"{TRACKER_NAME}.pending-mirror"
        aside.write_text(str(iteration), encoding="ascii")
        _sync(aside)
        aside.replace(tracker)
        _sync(self._root)


class _MirroringCallbacks:
    """Mirror on a commit, then pass every event on to the loop's own callbacks."""

    def __init__(self, mirror: Mirror, callbacks: Any | None) -> None:
        self._mirror = mirror
        self._callbacks = callbacks

    def fire(self, event_name: str, context: CheckpointEvent) -> None:
        is_commit = event_name == ON_CHECKPOINT_SAVE and context.tier == PERSISTENT
        if is_commit and context.path is not None:
            self._mirror.add(Path(context.path), context.iteration)
            self._mirror.remove(context.removed_iterations)
        if self._callbacks is not None:
            self._callbacks.fire(event_name, context)


def _holds_same_checkpoint(copy: Path, checkpoint: Path) -> bool:
    """Compare the commit records: they hold the digests of everything else."""
    record, other = copy / "manifest.json", checkpoint / "manifest.json"
    return record.exists() and other.exists() and record.read_bytes() == other.read_bytes()


def _copy_durably(source: str, target: str) -> str:
    shutil.copy2(source, target)
    _sync(Path(target))
    return target


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
