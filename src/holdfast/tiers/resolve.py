"""Choose the checkpoints to load, best first, with a reason for each that is passed over.

Owns what a directory given to `load` may be (a store, one iter_* directory of it, or a checkpoint
that torch made without us), whose checkpoints count, and their order: newest commit first, whatever
their iteration. Promises one decision, made on one rank, that says everything it saw. Reads
manifests and sizes only; never touches live state.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.config import LoadConfig
from holdfast.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    StoreIdentityError,
)
from holdfast.filesystem import Filesystem, read_bytes
from holdfast.identity import Attempt, RunIdentity
from holdfast.manifest import MANIFEST_NAME, Manifest
from holdfast.protocol import SkippedCheckpoint
from holdfast.store import Checkpoint, Listing, Store, parse_checkpoint_name
from holdfast.tiers.foreign import ForeignCheckpoint, is_foreign, warn_of_foreign

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What to try, in order."""

    root: Path
    candidates: tuple[Checkpoint, ...]
    asked_for: bool
    """One checkpoint was named: nothing else may be loaded in its place."""
    skipped: tuple[SkippedCheckpoint, ...] = ()
    """What was passed over already: superseded, another run's, unreadable, or of wrong size.
    Complete, largest iteration first: the best candidate may yet turn out to be damaged."""
    run_id: str | None = None
    """Whose checkpoints count; None: nobody's are there, or one was named."""
    attempts: tuple[Attempt, ...] = ()
    """Those whose resuming supersedes what came after."""


def resolve(
    load: LoadConfig, own_root: Path, run_id: str | None, filesystem: Filesystem
) -> Decision:
    """Decide which checkpoints a load may try.

    Raises:
        CheckpointNotFoundError: a directory or iteration that was named is not there.
        CorruptCheckpointError: the one checkpoint that was named is damaged.
        StoreIdentityError: the store belongs to another run than the one configured.
        ConfigError: load.step contradicts load.directory.
    """
    root = own_root if load.directory is None else Path(load.directory)
    if not filesystem.is_directory(root.resolve()):
        if load.directory is not None:
            raise CheckpointNotFoundError(
                f"checkpoint.load.directory: {root} does not exist or is no directory.\n"
                "Name a store or one of its iter_* directories, or use null."
            )
        if load.step is not None:
            raise CheckpointNotFoundError(f"{root} has no checkpoint of iteration {load.step}.")
        return Decision(root, (), asked_for=False)
    root = root.resolve()
    if load.directory is not None and is_foreign(root, filesystem):
        foreign = ForeignCheckpoint.at(root)
        _check_step(foreign, load.step)
        warn_of_foreign(root)
        return Decision(root.parent, (foreign,), asked_for=True)
    if _is_checkpoint_directory(root, filesystem):
        checkpoint = _open_named(root, load.step, filesystem)
        return Decision(root.parent, (_check_sizes(checkpoint, filesystem),), asked_for=True)
    store = Store(root, filesystem)
    if load.step is not None:
        checkpoint = store.find(load.step)
        run_id = RunIdentity(root, filesystem).read_run_id()
        return Decision(
            root, (_check_sizes(checkpoint, filesystem),), asked_for=True, run_id=run_id
        )
    return _newest_first(store, RunIdentity(root, filesystem), run_id, load.directory is None)


def _newest_first(
    store: Store, identity: RunIdentity, configured: str | None, is_own: bool
) -> Decision:
    listing = store.listing()
    run_id = identity.read_run_id()
    if run_id is not None and is_own:
        identity.check_run_id(configured, run_id)
    if run_id is None:
        run_id = _only_run_id(store.root, listing.checkpoints, configured if is_own else None)
    attempts = [each for each in identity.attempts() if _has_footing(each, listing)]
    skipped = [
        SkippedCheckpoint(str(each.path), each.reason, each.iteration) for each in listing.broken
    ]
    candidates = []
    for each in listing.checkpoints:
        reason = _objection(each, run_id, attempts)
        if reason is None and (damages := store.check_sizes(each)):
            reason = "; ".join(str(damage) for damage in damages[:3])
        if reason is None:
            candidates.append(each)
        else:
            skipped.append(SkippedCheckpoint(str(each.path), reason, each.iteration))
    _report_tracker(store, listing.checkpoints)
    skipped.sort(key=lambda each: each.iteration or 0, reverse=True)
    return Decision(
        store.root,
        tuple(candidates),
        asked_for=False,
        skipped=tuple(skipped),
        run_id=run_id,
        attempts=tuple(attempts),
    )


def _has_footing(attempt: Attempt, listing: Listing) -> bool:
    """Whether an attempt committed anything, or could still be resumed where it resumed.

    A start that loaded long before its first save may find that another start's retention has since
    removed what it loaded. Dead before its first commit, it would supersede all that is left.
    """
    present = {each.iteration for each in listing.checkpoints}
    present |= {each.iteration for each in listing.broken}
    return attempt.resumed_from in present or any(
        each.manifest.attempt == attempt.number for each in listing.checkpoints
    )


def _objection(
    checkpoint: Checkpoint, run_id: str | None, attempts: Sequence[Attempt]
) -> str | None:
    manifest = checkpoint.manifest
    if manifest.run_id != run_id:
        return f"belongs to run {manifest.run_id!r}, this store to {run_id!r}"
    return find_supersession(manifest.attempt, manifest.iteration, attempts)


def find_supersession(
    attempt_number: int, iteration: int, attempts: Sequence[Attempt]
) -> str | None:
    """Say why a checkpoint of an attempt does not count any more; None: it does."""
    for attempt in attempts:
        if (
            attempt.number > attempt_number
            and attempt.resumed_from is not None
            and attempt.resumed_from < iteration
        ):
            return (
                f"superseded when attempt {attempt.number} resumed from iteration "
                f"{attempt.resumed_from}; load.step={iteration} still loads it"
            )
    return None


def _only_run_id(
    root: Path, checkpoints: Sequence[Checkpoint], configured: str | None
) -> str | None:
    """Return the run that a store without run.json belongs to; None: it holds nothing."""
    if configured is not None:
        return configured
    found = sorted({each.manifest.run_id for each in checkpoints})
    if len(found) > 1:
        raise StoreIdentityError(
            f"{root} has no run.json and holds checkpoints of several runs: {', '.join(found)}.\n"
            "Name one with checkpoint.run_id, or load one by number with checkpoint.load.step."
        )
    return found[0] if found else None


def _is_checkpoint_directory(path: Path, filesystem: Filesystem) -> bool:
    if parse_checkpoint_name(path.name) is not None:
        return True
    names = {each.name for each in filesystem.list_directory(path)}
    return MANIFEST_NAME in names


def _open_named(path: Path, step: int | None, filesystem: Filesystem) -> Checkpoint:
    iteration = parse_checkpoint_name(path.name)
    if iteration is None:  # a copy under another name: the manifest says what it is
        manifest_path = path / MANIFEST_NAME
        content = read_bytes(filesystem, manifest_path)
        iteration = Manifest.from_bytes(content, str(manifest_path)).iteration
    checkpoint = Store(path.parent, filesystem).open(path, iteration)
    _check_step(checkpoint, step)
    return checkpoint


def _check_step(checkpoint: Checkpoint, step: int | None) -> None:
    if step is not None and step != checkpoint.iteration:
        found = f"iteration {checkpoint.iteration}: {checkpoint.path}"
        raise ConfigError([f"checkpoint.load.step is {step}, but load.directory is {found}"])


def _check_sizes(checkpoint: Checkpoint, filesystem: Filesystem) -> Checkpoint:
    damages = Store(checkpoint.path.parent, filesystem).check_sizes(checkpoint)
    if damages:
        raise CorruptCheckpointError(
            str(checkpoint.path), "; ".join(str(damage) for damage in damages[:3])
        )
    return checkpoint


def _report_tracker(store: Store, checkpoints: Sequence[Checkpoint]) -> None:
    """Say when the tracker is of no use; the manifests decide either way."""
    iteration, problem = store.read_tracker()
    if not checkpoints:
        return
    if iteration is not None and iteration not in {each.iteration for each in checkpoints}:
        problem = f"dangling: it names iteration {iteration}, which is not there"
    if problem:
        logger.warning("%s: tracker is %s; found the newest by scan", store.root, problem)
