"""Survey a directory before a load: which checkpoints it holds, and the condition of each.

Owns reading a store's names, manifests and attempts, on one rank, into the values that `select`
decides by. Promises that every checkpoint found is in the survey, with a reason if it is not sound,
and that notable facts about a store are logged: a tracker that is not followed, or a newest attempt
that may still be running (judged by its process on the same host, and by the age of its last
checkpoint on another). Reads manifests only, decides nothing, touches no live state. The sizes of
files are compared when a checkpoint is opened (`opening`), those of no other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from holdfast.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    FormatTooNewError,
    NoLoadableCheckpointError,
    StoreIdentityError,
    join_path,
)
from holdfast.filesystem import Filesystem
from holdfast.protocol import SkippedCheckpoint
from holdfast.storage import open_storage
from holdfast.storage.backend import Storage
from holdfast.storage.identity import Attempt, Process, RunIdentity, find_start_mark, this_process
from holdfast.storage.manifest import FOREIGN, PERSISTENT
from holdfast.storage.store import (
    Broken,
    Checkpoint,
    Listing,
    Store,
    TooNew,
    open_checkpoint,
    parse_checkpoint_name,
)
from holdfast.tiers.places import (
    ForeignCheckpoint,
    Place,
    describe,
    find_place,
    is_foreign,
    warn_of_foreign,
)
from holdfast.tiers.select import Choice, Commit, Condition, Refusal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """The checkpoints of one directory."""

    root: Path
    commits: tuple[Commit, ...] = ()
    """All commits, largest iteration first."""
    checkpoints: dict[Commit, Checkpoint] = field(default_factory=dict)
    """The commits whose manifest could be read."""
    is_one: bool = False
    """Whether one checkpoint was named instead of a store."""
    has_record: bool = False
    """Whether run.json exists: the run has saved here before."""
    run_id: str | None = None
    """The run whose checkpoints count; None: there are none, or one was named."""
    attempts: tuple[Attempt, ...] = ()
    """Attempts that supersede later iterations by where they resumed."""


def survey_store(
    storage: Storage,
    *,
    is_own: bool,
    run_id: str | None = None,
    step: int | None = None,
) -> Survey:
    """Survey a store; one that does not exist holds nothing.

    `is_own`: whether it is the run's. `run_id`: the configured one, if it is. `step`: the requested
    iteration, for which it does not matter whose checkpoint it is.

    Raises:
        StoreIdentityError: it belongs to another run than the one configured, or has no run.json
            and holds checkpoints of several runs.
        FormatTooNewError: a later version of holdfast wrote its run.json.
    """
    root = Path(storage.where())
    if not storage.has_group():
        return Survey(root)
    store, identity = Store(storage), RunIdentity(storage)
    listing = store.listing()
    found_id = identity.read_run_id()
    has_record = found_id is not None
    if found_id is not None and is_own:
        identity.check_run_id(run_id, found_id)
    if found_id is None and not (step is not None and run_id is None):
        found_id = _only_run_id(root, listing.checkpoints, run_id if is_own else None)
    attempts = [each for each in identity.attempts() if _has_footing(each, listing)]
    checkpoints = {
        _describe_checkpoint(each, found_id, attempts): each for each in listing.checkpoints
    }
    commits = list(checkpoints)
    commits += [_describe_broken(each, store) for each in listing.broken]
    commits += [_describe_too_new(each) for each in listing.too_new]
    commits.sort(key=lambda each: each.iteration or 0, reverse=True)
    _warn_of_tracker(store, commits)
    return Survey(
        root,
        tuple(commits),
        checkpoints,
        has_record=has_record,
        run_id=found_id,
        attempts=tuple(attempts),
    )


def survey_place(path: Path, filesystem: Filesystem, step: int | None = None) -> Survey:
    """Survey a path of the configuration: a store or one checkpoint.

    A path without checkpoints gives a survey without commits.

    Raises:
        StoreIdentityError, FormatTooNewError: as `survey_store`.
    """
    place = find_place(path, filesystem)
    if place is None:
        return Survey(path)
    if place.checkpoint is None:
        return survey_store(open_storage(place.store, filesystem), is_own=False, step=step)
    return survey_checkpoint(place, filesystem)


def survey_checkpoint(place: Place, filesystem: Filesystem) -> Survey:
    """Survey one checkpoint that was named."""
    path = place.checkpoint
    assert path is not None
    files = open_storage(path, filesystem)
    if is_foreign(files):
        foreign = ForeignCheckpoint.at(path)
        warn_of_foreign(path)
        commit = Commit(foreign.manifest.tier, foreign.iteration, 0, path=str(path))
        return Survey(place.store, (commit,), {commit: foreign}, is_one=True)
    iteration = parse_checkpoint_name(path.name)  # None: a copy under another name
    bare = Commit(PERSISTENT, iteration, None, path=str(path))
    try:
        checkpoint = open_checkpoint(files, iteration)
    except FormatTooNewError as error:
        commit = replace(bare, condition=Condition.TOO_NEW, reason=error.summary, error=error)
        return Survey(place.store, (commit,), is_one=True)
    except CorruptCheckpointError as error:
        commit = replace(bare, condition=Condition.DAMAGED, reason=str(error), error=error)
        return Survey(place.store, (commit,), is_one=True)
    manifest = checkpoint.manifest
    commit = replace(bare, iteration=manifest.iteration, sequence=manifest.sequence)
    return Survey(place.store, (commit,), {commit: checkpoint}, is_one=True)


def make_refusal(
    choice: Choice,
    survey: Survey,
    field_name: str | None,
    filesystem: Filesystem,
    *,
    caller: str = "open_tensors",
) -> CheckpointError:
    """Return the error of a load that is refused because of the contents of one place.

    `field_name`: the setting that names the place, for example `load.directory`. None: the caller
    of a function named it, which is `caller`.
    """
    refusal, commits = choice.refusal, survey.commits
    if refusal in (Refusal.TOO_NEW, Refusal.DAMAGED):
        assert choice.commit is not None
        return choice.commit.error or CorruptCheckpointError(choice.commit.path, choice.reason)
    if refusal is Refusal.NONE_LOADABLE:
        if survey.is_one and commits[0].error is not None:
            return commits[0].error
        return NoLoadableCheckpointError(str(survey.root), list_reasons(commits))
    if not commits:
        place = caller if field_name is None else f"checkpoint.{field_name}"
        return CheckpointNotFoundError(f"{place}: {describe(survey.root, filesystem)}")
    if survey.is_one and field_name is not None:
        found = f"iteration {commits[0].iteration}: {commits[0].path}"
        step_name = field_name.replace("directory", "step")
        return ConfigError(
            [f"checkpoint.{step_name} is {choice.step}, but {field_name} is {found}"]
        )
    return CheckpointNotFoundError(
        f"{survey.root} has no checkpoint of iteration {choice.step}; it has: "
        f"{list_iterations(commits)}."
    )


def list_iterations(commits: Sequence[Commit]) -> str:
    """Return the iterations of commits, largest first."""
    found = sorted({each.iteration or 0 for each in commits}, reverse=True)
    return ", ".join(map(str, found)) or "none"


def list_reasons(commits: Sequence[Commit]) -> list[str]:
    """Return why each of them was not loaded, largest iteration first."""
    ordered = sorted(commits, key=lambda each: each.iteration or 0, reverse=True)
    return [join_path(each.path, each.reason) for each in ordered if each.reason]


def as_skipped(commit: Commit) -> SkippedCheckpoint:
    """Return a commit that was not loaded as an entry of a load's result."""
    return SkippedCheckpoint(commit.path, commit.reason, commit.iteration, commit.tier)


def find_supersession(
    attempt_number: int, iteration: int, attempts: Sequence[Attempt]
) -> str | None:
    """Return why a checkpoint of an attempt no longer counts; None: it counts."""
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


def _describe_checkpoint(
    checkpoint: Checkpoint, run_id: str | None, attempts: Sequence[Attempt]
) -> Commit:
    manifest = checkpoint.manifest
    commit = Commit(PERSISTENT, manifest.iteration, manifest.sequence, path=str(checkpoint.path))
    if manifest.run_id != run_id:
        reason = f"belongs to run {manifest.run_id!r}, this store to {run_id!r}"
        return replace(commit, condition=Condition.OTHER_RUN, reason=reason)
    superseded = find_supersession(manifest.attempt, manifest.iteration, attempts)
    if superseded is not None:
        return replace(commit, condition=Condition.SUPERSEDED, reason=superseded)
    return commit


def _describe_broken(found: Broken, store: Store) -> Commit:
    path, reason = str(found.path), found.reason
    if _was_written_by_torch(store.storage.under(found.path.name)):
        reason = (
            "was written without holdfast, and is of no run: move it out of this store, and start "
            "from it with load.pretrained.directory"
        )
        return Commit(FOREIGN, found.iteration, None, Condition.OTHER_RUN, reason, path)
    reason = reason.removeprefix(f"{path}: ")
    error = CorruptCheckpointError(path, reason)
    return Commit(PERSISTENT, found.iteration, None, Condition.DAMAGED, reason, path, error)


def _describe_too_new(found: TooNew) -> Commit:
    path, reason = str(found.path), found.error.summary
    return Commit(
        PERSISTENT, found.iteration, found.sequence, Condition.TOO_NEW, reason, path, found.error
    )


def _has_footing(attempt: Attempt, listing: Listing) -> bool:
    """Whether an attempt committed anything, or the iteration it resumed from still exists.

    Between a start's load and its first save, another start's retention may remove the checkpoint
    that it loaded. If it then dies before its first commit, it must not supersede all that is left.
    """
    present = {each.iteration for each in listing.checkpoints}
    present |= {each.iteration for each in listing.broken}
    present |= {each.iteration for each in listing.too_new}
    return attempt.resumed_from in present or any(
        each.manifest.attempt == attempt.number for each in listing.checkpoints
    )


def _only_run_id(
    root: Path, checkpoints: Sequence[Checkpoint], configured: str | None
) -> str | None:
    """Return the run of a store without run.json; None: it has no checkpoint."""
    if configured is not None:
        return configured
    found = sorted({each.manifest.run_id for each in checkpoints})
    if len(found) > 1:
        raise StoreIdentityError(
            f"{root} has no run.json and holds checkpoints of several runs: {', '.join(found)}.\n"
            "Name one with checkpoint.run_id, or load one by number with checkpoint.load.step."
        )
    return found[0] if found else None


def _was_written_by_torch(files: Storage) -> bool:
    try:
        return is_foreign(files)
    except OSError:  # unreadable: treat it as damaged
        return False


def _warn_of_tracker(store: Store, commits: Sequence[Commit]) -> None:
    """Warn if the tracker does not name the checkpoint that a load would take."""
    newest = max(
        (each for each in commits if each.condition is Condition.SOUND),
        key=lambda each: each.order,
        default=None,
    )
    if newest is None:
        return
    iteration, problem = store.read_tracker()
    if iteration is not None and iteration != newest.iteration:
        named = [each for each in commits if each.iteration == iteration]
        if named and named[0].condition not in (Condition.SOUND, Condition.SUPERSEDED):
            return  # its condition is reported elsewhere
        problem = f"names iteration {iteration}, which is not there"
        if named:
            problem = (
                f"names iteration {iteration}, and the newest commit is of iteration "
                f"{newest.iteration} (load.step={iteration} loads the other)"
            )
    if problem:
        logger.warning(
            "%s: the tracker is not followed, the manifests decide: it %s",
            store.root,
            problem if iteration is not None else f"is {problem}",
        )


def warn_of_living_attempt(storage: Storage) -> None:
    """Warn if the newest attempt at a store may be running; call it on rank 0, at the load.

    Read errors are left to the load, which reports them.
    """
    try:
        reason = _find_living_attempt(storage)
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


def _find_living_attempt(storage: Storage) -> str | None:
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
