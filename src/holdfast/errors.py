"""Every error that holdfast raises on purpose, as one tree.

Owns the types and their fields; each also derives from the builtin that it resembles, so that code
unaware of holdfast still catches it. Promises that a message says what happened, where, and what to
do, in at most three lines, and that every error survives pickling with its fields (ranks send
failures to each other). Holds no policy: the code that raises decides.

    CheckpointError
    |-- ConfigError                    (ValueError)       every problem of a configuration at once
    |-- ManagerPathError               (ValueError)       custom_manager_class is not a dotted path
    |   `-- ManagerRefusedError                           ... or is not on the allow-list
    |-- ManagerImportError             (ImportError)      its module cannot be imported
    |-- ManagerNotFoundError           (AttributeError)   its module has no such class
    |-- ManagerShapeError              (TypeError)        it is not a checkpoint manager
    |-- WrongArgumentError             (TypeError)        an argument of the wrong kind
    |-- ConcurrentUseError             (RuntimeError)     a call while another is in the manager
    |-- CheckpointNotFoundError        (FileNotFoundError) what was requested does not exist
    |-- CorruptCheckpointError         (ValueError)       bytes differ from the manifest
    |-- FormatTooNewError              (ValueError)       written by a later version of holdfast
    |-- NoLoadableCheckpointError      (RuntimeError)     candidates exist, none can be loaded
    |   `-- StatePartlyLoadedError                        ... and live state was already overwritten
    |-- StateMismatchError             (ValueError)       names or shapes differ from the live state
    |   `-- NothingFitsError                              ... and not one tensor of the model fits
    |-- NothingLoadedError             (RuntimeError)     state requested that no load has found
    |-- UnsupportedStateError          (TypeError)        state that no safe loader could read back
    |-- ReplicaMismatchError           (ValueError)       ranks hold different values of one name
    |-- DataReshardError               (ValueError)       data state of another world size
    |-- StepRewoundError               (ValueError)       a save below the step loaded or saved last
    |-- StoreIdentityError             (ValueError)       the store belongs to another run
    |   |-- StoreNotLoadedError                           first save beside checkpoints never loaded
    |   |-- OwnCheckpointsExistError                      a load from elsewhere in spite of own ones
    |   `-- SupersededAttemptError                        a newer attempt of this run has taken over
    |-- StoreNotWritableError          (OSError)          the store cannot be written at all
    |-- CheckpointOverdueError         (TimeoutError)     nothing durable for too long
    |-- SaveAbandonedError             (RuntimeError)     a save that was interrupted too early
    |-- SaveGivenUpError               (RuntimeError)     a save that needs another plan: no failure
    |-- LoadIncompleteError            (RuntimeError)     a save after a load that did not complete
    |-- NotEnoughMemoryError           (MemoryError)      a snapshot that would not fit
    |-- NoFileFreeError                (TimeoutError)     every local buffer was being read
    `-- StageFailedError               (RuntimeError)     a stage failed, on which ranks and why
        |-- StageTimeoutError          (TimeoutError)     ranks that never reached a stage
        `-- SaveFailedError                               the save that a stage belonged to
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.messages import describe_mismatch, describe_size, list_first, name_first, suspects_of


class CheckpointError(Exception):
    """Base of every error raised by holdfast on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception.__reduce__ would call the subclass with the message alone; fields must survive.
        return (_rebuild, (type(self), self.message, dict(self.__dict__)))


def _rebuild(kind: type[CheckpointError], message: str, fields: dict[str, Any]) -> CheckpointError:
    # The builtin whose memory layout the type has: `kind.__new__` may be another one's.
    builtin: Any = kind
    while builtin.__module__ != "builtins":
        builtin = builtin.__base__
    error: CheckpointError = builtin.__new__(kind, message)
    builtin.__init__(error, message)  # sets attributes outside __dict__, such as ImportError.msg
    error.__dict__.update(fields)
    return error


class ConfigError(CheckpointError, ValueError):
    """A configuration has problems; all of them are listed, each with its field path."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        """One sentence each, starting with the path of the field."""
        super().__init__("; ".join(self.problems))


class ManagerPathError(CheckpointError, ValueError):
    """`custom_manager_class` is not of the form `package.module.Class`."""


class ManagerRefusedError(ManagerPathError):
    """`custom_manager_class` is not on `custom_manager_allowlist`; nothing was imported."""


class ManagerImportError(CheckpointError, ImportError):
    """The module named by `custom_manager_class` could not be imported; the cause is chained."""


class ManagerNotFoundError(CheckpointError, AttributeError):
    """The module was imported but has no class of that name."""


class ManagerShapeError(CheckpointError, TypeError):
    """The named object is not a class that the training loop could use as a manager."""


class WrongArgumentError(CheckpointError, TypeError):
    """An argument of a manager's method is of the wrong kind; nothing was touched."""

    def __init__(self, method: str, argument: str, found: str, advice: str) -> None:
        self.method = method
        """`save`, `load`, `finalize_async_saves`."""
        self.argument = argument
        """Its name, or the dotted name of the wrong part."""
        super().__init__(f"{method}: {argument} {found}.\n{advice}")


class ConcurrentUseError(CheckpointError, RuntimeError):
    """A manager was called while another call was inside it; the other call is not affected."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A requested checkpoint, store or file does not exist."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """Bytes on disk are not the bytes that were committed."""

    def __init__(self, path: str, reason: str, byte_range: tuple[int, int] | None = None) -> None:
        self.path = path
        """The damaged file or directory."""
        self.reason = reason
        self.byte_range = byte_range
        """First and last byte of the damaged block; None: the whole file or directory."""
        super().__init__(join_path(path, reason))


def join_path(path: str, reason: str) -> str:
    """Put a path before a reason, without repeating it if the reason begins with it."""
    inner = reason_inside(path, reason)
    if inner == reason:
        return f"{path}: {reason}"
    return f"{path}: {inner}" if reason.startswith(f"{path}: ") else f"{path}/{inner}"


def reason_inside(path: str, reason: str) -> str:
    """Return a reason without the path, or the last part of it, that it begins with."""
    for prefix in (f"{path}: ", f"{path}/", f"{path.rpartition('/')[2]}/"):
        if reason.startswith(prefix):
            return reason.removeprefix(prefix)
    return reason


class FormatTooNewError(CheckpointError, ValueError):
    """A file was written by a later version of holdfast and cannot be understood by this one.

    It is never treated as damage, and never skipped in favour of an older checkpoint.
    """

    def __init__(self, path: str, found: str, known: str, sequence: int | None = None) -> None:
        self.path = path
        self.found = found
        """The format of the file, such as `format 2`, or a feature that it requires."""
        self.known = known
        """The formats that this version reads."""
        self.sequence = sequence
        """Its sequence number, if it could be read."""
        self.summary = f"is of {found}; this version of holdfast reads {known}"
        super().__init__(
            f"{path} {self.summary}.\n"
            "Use the version that wrote it, or a later one. Nothing was loaded."
        )


class NoLoadableCheckpointError(CheckpointError, RuntimeError):
    """Checkpoints of this run exist and none of them can be loaded."""

    def __init__(self, root: str, reasons: Sequence[str]) -> None:
        self.root = root
        self.reasons = tuple(reasons)
        """One per candidate, newest first: its path and why it was skipped."""
        shown = "; ".join(self.reasons[:3]) + ("; ..." if len(self.reasons) > 3 else "")
        super().__init__(
            f"{root}: no checkpoint can be loaded: {shown}\n"
            f'Run "holdfast verify {root}" to see every damaged file. To start over, use an empty '
            "directory: a run never starts fresh over broken checkpoints."
        )


class StatePartlyLoadedError(NoLoadableCheckpointError):
    """As its base, and model or optimizer tensors were already overwritten: stop training."""


class StateMismatchError(CheckpointError, ValueError):
    """The checkpoint and the live state differ in names, shapes or types."""

    def __init__(
        self,
        path: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        different: Sequence[str] = (),
        *,
        strict: bool = True,
    ) -> None:
        """`strict`: whether the load was strict; only then the message advises strict=false."""
        self.path = path
        self.missing = tuple(missing)
        """Names the live state has and the checkpoint lacks."""
        self.unexpected = tuple(unexpected)
        """Names the checkpoint has and the live state lacks."""
        self.different = tuple(different)
        """Names both have, with what differs."""
        parts = [
            f"{label}: {', '.join(names)}"
            for label, names in (
                ("missing from the checkpoint", self.missing),
                ("unexpected in the checkpoint", self.unexpected),
                ("different", self.different),
            )
            if names
        ]
        advice = "Build the model and optimizer as they were saved"
        if self.different:
            advice += ", or say in a table under load.strict what may differ"
        elif strict:
            advice += ", or set load.strict=false to load what fits"
        super().__init__(f"{path} does not fit the live state: {'; '.join(parts)}.\n{advice}.")


class NothingFitsError(StateMismatchError):
    """No tensor of the model has its name in the checkpoint: a load would restore nothing."""

    def __init__(
        self, path: str, held: Sequence[str], missing: Sequence[str], hint: str | None = None
    ) -> None:
        super().__init__(path, missing)
        self.held = tuple(held)
        """Names the checkpoint has, in order."""
        self.hint = hint
        """The prefix that would make them fit, if known."""
        holds, needs = name_first(self.held) or "no tensors", name_first(self.missing)
        self.message = (
            f"{path}: no name of the checkpoint fits; it holds {holds}; the model has {needs}"
            f"{f'; {hint}' if hint else ''}.\n"
            "Nothing would be restored, strict or not. Load the model that was saved, or "
            "save it under these names."
        )


class NothingLoadedError(CheckpointError, RuntimeError):
    """State of the last load was requested again, and no load has found it."""


class UnsupportedStateError(CheckpointError, TypeError):
    """State holds a type that cannot be read back without running code from the file."""


class ReplicaMismatchError(CheckpointError, ValueError):
    """Ranks hold different values under one name, of which one rank would write its own."""

    def __init__(
        self,
        name: str,
        sides: Sequence[Sequence[int]],
        block: int,
        index: tuple[int, ...] | None,
        values: tuple[str, str] | None,
        others: int = 0,
        agreed: int | None = None,
    ) -> None:
        self.name = name
        """Of the first such tensor, as in the checkpoint; it begins with its component."""
        self.sides = tuple(map(tuple, sides))
        """Ranks that hold the same value together; at least two sides."""
        self.suspects = suspects_of(self.sides)
        """Ranks that are not on the largest side; every rank where no side is the largest."""
        self.block = block
        """The number of the first block of 8 MiB that differs."""
        self.index = index
        """Of the first such element in the whole tensor; None: not known, or no dense tensor."""
        self.values = values
        """That element on the first rank of the first two sides; None: it has changed since."""
        self.others = others
        """How many more names, or chunks of a name, differ."""
        self.agreed = agreed
        """The last iteration at which all replicas agreed; None: none is known."""
        super().__init__(describe_mismatch(name, sides, block, index, values, others, agreed))


class DataReshardError(CheckpointError, ValueError):
    """Data state was saved at another data-parallel size and the loader cannot reshard it."""


class StepRewoundError(CheckpointError, ValueError):
    """A save whose step is below the step that this manager last loaded or saved."""

    def __init__(self, step: int, reached: int, origin: str) -> None:
        self.step = step
        """The step of the save that was refused."""
        self.reached = reached
        """The step that was loaded or saved last."""
        self.origin = origin
        """`loaded` or `saved`."""
        super().__init__(
            f"train_state.step is {step}, below step {reached}, which this manager {origin} last: "
            "the save would supersede newer checkpoints, and retention would remove them.\n"
            "Continue with the counter that load wrote into its state.train_state.step. To go back "
            "on purpose, load the older checkpoint first, or set checkpoint.allow_rewind=true."
        )


class StoreIdentityError(CheckpointError, ValueError):
    """The store belongs to another run than the one configured."""


class StoreNotWritableError(CheckpointError, OSError):
    """The store's directory cannot be created or written to; raised before training starts."""

    def __init__(self, root: str, cause: OSError) -> None:
        self.path = root
        self.code = errno.errorcode.get(cause.errno or 0, type(cause).__name__)
        """The symbol of the errno, such as `EACCES`."""
        is_elsewhere = cause.filename is not None and str(cause.filename) != root
        where = f" at {cause.filename}" if is_elsewhere else ""
        reason = f"{self.code} {cause.strerror or cause}"
        if cause.errno in (errno.EEXIST, errno.ENOTDIR):
            reason = "something that is no directory is in its place"
        super().__init__(
            f"checkpoint.persistent.directory: {root} cannot be written{where}: {reason}.\n"
            "Name a directory that this user may write to, on a file system that all ranks share."
        )


class StoreNotLoadedError(StoreIdentityError):
    """A first save into a store that holds checkpoints which this manager has not loaded."""


class OwnCheckpointsExistError(StoreIdentityError):
    """`load.directory` names another place, and the run has checkpoints of its own."""

    def __init__(self, directory: str, root: str, newest: str) -> None:
        self.directory = directory
        """The value of `load.directory`."""
        self.root = root
        """The run's own store."""
        super().__init__(
            f"checkpoint.load.directory: {directory} is another place than this run's store {root},"
            f" and the run has checkpoints of its own ({newest}).\n"
            "Leave load.directory null to resume from them. To start a run from another one's "
            "checkpoint use load.pretrained.directory, which counts only while the run has none."
        )


class SupersededAttemptError(StoreIdentityError):
    """Another start of the same run has begun to save; this one must stop."""


@dataclass(frozen=True)
class RankFailure:
    """The failure of one rank, in a form that can be sent to other ranks."""

    rank: int
    error: str
    """Name of the exception type."""
    reason: str
    path: str | None = None
    errno: int | None = None

    @classmethod
    def of(cls, rank: int, error: BaseException) -> RankFailure:
        """Describe an exception raised on a rank, keeping errno and path of an OSError."""
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            path = None if error.filename is None else str(error.filename)
            name = errno.errorcode.get(error.errno or 0, "")
            reason = f"{name} {error.strerror or error}".strip()
            return cls(rank, type(error).__name__, reason, path, error.errno)
        path = getattr(error, "path", None)
        reason = str(error) or type(error).__name__
        return cls(rank, type(error).__name__, reason, path if isinstance(path, str) else None)

    def __str__(self) -> str:
        where = f" ({self.path})" if self.path and self.path not in self.reason else ""
        return f"rank {self.rank}: {self.error}: {self.reason}{where}"


class SaveAbandonedError(CheckpointError, RuntimeError):
    """A save was abandoned because its caller was interrupted before the copy was complete."""

    def __init__(self, call: str) -> None:
        self.call = call
        """The abandoned save."""
        super().__init__(
            f"{call} was abandoned: it was interrupted before its copy was complete.\n"
            "It changed no earlier checkpoint; save again."
        )


class SaveGivenUpError(CheckpointError, RuntimeError):
    """A save was given up before it wrote anything: a rank could not save by the last plan."""


class LoadIncompleteError(CheckpointError, RuntimeError):
    """A save was refused: the last load had begun to overwrite live state and did not complete."""

    def __init__(self) -> None:
        super().__init__(
            "the last load was interrupted, or failed, after it had begun to overwrite model and "
            "optimizer: they hold parts of a checkpoint.\nCall load again before saving."
        )


class NotEnoughMemoryError(CheckpointError, MemoryError):
    """A snapshot needs more host memory than is left; nothing was allocated."""

    def __init__(self, needed_bytes: int, free_bytes: int, limited_by: str) -> None:
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.limited_by = limited_by
        super().__init__(
            f"a snapshot needs {describe_size(needed_bytes)} of host memory, and "
            f"{describe_size(free_bytes, needed_bytes)} are left ({limited_by}).\n"
            "Give the job more memory, or shard the state over more ranks. With "
            "checkpoint.async_save=false a save takes no snapshot."
        )


class CheckpointOverdueError(CheckpointError, TimeoutError):
    """Nothing was committed to the persistent tier for too long, and `alarm_stops` ends the run."""

    def __init__(self, seconds: float, iteration: int | None, reason: str) -> None:
        self.seconds = seconds
        """Since the last durable commit, or since the load."""
        self.iteration = iteration
        """Of that commit; None: there is none since the load."""
        self.reason = reason
        """The likely cause."""
        last = "none since the load" if iteration is None else f"the last is iteration {iteration}"
        super().__init__(
            f"No checkpoint was committed to the persistent tier for {seconds:.0f} s "
            f"({last}): {reason}.\n"
            "The run stops because checkpoint.alarm_stops is true. Repair the cause, or raise "
            "checkpoint.alarm_after_seconds (inf: no alarm)."
        )


class NoFileFreeError(CheckpointError, TimeoutError):
    """Every buffer of the local tier was in use until the save gave up waiting."""


class StageFailedError(CheckpointError, RuntimeError):
    """A stage of all ranks failed on some of them; every rank raises this."""

    def __init__(self, stage: str, failures: Sequence[RankFailure]) -> None:
        self.stage = stage
        self.failures = tuple(failures)
        """At least one, in rank order."""
        super().__init__(f'stage "{stage}" failed: {list_first(self.failures, "ranks")}')


class StageTimeoutError(StageFailedError, TimeoutError):
    """Some ranks did not reach a stage within `timeout_seconds`."""

    def __init__(
        self,
        stage: str,
        missing_ranks: Sequence[int],
        timeout_seconds: float,
        others: Sequence[RankFailure] = (),
    ) -> None:
        """`others`: what failed on ranks that did."""
        self.missing_ranks = tuple(missing_ranks)
        self.timeout_seconds = timeout_seconds
        failures = [
            RankFailure(rank, "Timeout", f"did not answer within {timeout_seconds:g} s")
            for rank in self.missing_ranks
        ]
        super().__init__(stage, [*others, *failures])


class SaveFailedError(StageFailedError):
    """The save of one iteration failed; it changed no earlier checkpoint, the next save works."""

    def __init__(self, iteration: int, stage: str, failures: Sequence[RankFailure]) -> None:
        super().__init__(stage, failures)
        self.iteration = iteration
        self.message = (
            f'The save of iteration {iteration} failed in stage "{stage}": '
            f"{list_first(self.failures, 'ranks')}.\n"
            "It changed no earlier checkpoint. Fix the cause, or set on_save_failure=warn to "
            "train on without this checkpoint."
        )
