"""What a tier is: one kind of place where a run keeps checkpoints.

Owns the interface of a tier and the values that pass through it: the snapshot that a save writes,
the contents that a load reads, and the memory that a tier provides to stage into. A tier decides
how bytes are kept and how its ranks agree on that. Which tiers a save goes to is decided in
`routing`, which checkpoint a load takes in `select`; neither is known here.

Another tier needs a class that `holdfast.testing.TierContract` accepts, its name in
`storage.manifest`, its settings in `config`, its place in `routing`, in `search` and in the order
of commits in `select`, and a look at what tells tiers apart by name: `ranks.job`, `policies.guards`
and `tiers.places`. A caller names the tier of a save by one boolean, `non_persistent_ckpt` of
`CheckpointSaveContext` in `protocol`, which `manager`, `snapshotting` and `ranks.job` read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from holdfast.errors import CorruptCheckpointError
from holdfast.format.layout import Layout
from holdfast.protocol import ShardSource
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.job import Committed
from holdfast.read.reader import ShardReader
from holdfast.read.requests import Target
from holdfast.snapshot.arena import Arena
from holdfast.snapshot.audit import NOTHING_LEFT, Audited
from holdfast.snapshot.shard import StagedShard
from holdfast.storage.identity import CommitIdentity
from holdfast.storage.manifest import Base
from holdfast.storage.store import Checkpoint
from holdfast.tiers.select import Commit

TRAIN_STATE_NAME = "train_state.json"
RUN_CONFIG_NAME = "run_config.yaml"
_SHARD = re.compile(r"__([0-9]+)_[0-9]+\.distcp")


@dataclass(frozen=True)
class Snapshot:
    """What one save writes, unaffected by training: this rank's shard, the rest as bytes."""

    iteration: int
    shard: StagedShard
    """The parts of model and optimizer that this rank writes, and its small states."""
    train_state: bytes
    """This rank's counters, for people and tools; rank 0 writes them, and its config."""
    run_config: bytes
    confirm: Callable[[], None] = lambda: None
    """Called when all of it has been read, before the commit. Returns if training cannot have
    changed the state until then; otherwise raises."""
    audit: Audited = NOTHING_LEFT
    """What is compared while it is written."""
    base: Base | None = None
    """What has the tensors of the model that this one leaves out; None: it leaves out none."""


class Recorded(Protocol):
    """The fields of a commit's record that decide whether it may be loaded."""

    @property
    def iteration(self) -> int: ...
    @property
    def attempt(self) -> int: ...


Objection = Callable[[Recorded], str | None]
"""Why a sound commit must not be loaded; None: it may be."""


@dataclass(frozen=True)
class Contents:
    """The contents of an opened checkpoint, tensors not yet read."""

    checkpoint: Checkpoint
    reader: ShardReader
    values: dict[str, Any]
    """All values of model and optimizer that are not tensors, by flat name."""
    small: dict[str, Any]
    """The small states by name, as this rank saved them if the reader's `own_names` has them, else
    as the lowest rank did. Empty: torch alone wrote the checkpoint."""
    counters: dict[str, Any]
    """`train_state`, and `num_floating_point_operations_so_far`, as rank 0 saved them."""
    copies: Mapping[str, Sequence[Any]]
    """The distinct copies of all ranks that saved, lowest first, of names that `is_united` names;
    empty where this rank's own suffice."""
    run_config: bytes = field(default=b"", kw_only=True)
    """The config of the run as YAML; empty: it was not read."""

    @property
    def is_shared(self) -> bool:
        """Whether every rank reads the same files, so that one rank can read for all."""
        return True

    def bring(
        self, find_targets: Callable[[], Mapping[str, Target]], coordinator: Coordinator
    ) -> None:
        """Fetch what these tensors need and only other ranks can read; no-op where all can.

        Every rank calls it, before any rank reads.

        Raises:
            CorruptCheckpointError: on every rank: what was fetched is damaged.
            StageFailedError: it could not be written, or a rank is gone.
        """

    def sources(self) -> tuple[ShardSource, ...]:
        """Return the files that this rank has read tensors from."""
        root, tier = self.checkpoint.path, self.checkpoint.manifest.tier
        return tuple(
            ShardSource(tier, f"{root.name}/{path}", size_bytes, _owner_of(path))
            for path, size_bytes in sorted(self.reader.taken.items())
        )


@dataclass(frozen=True)
class Wanted:
    """What a load wants of a checkpoint while it is opened."""

    suffices: Callable[[Contents], bool]
    """Whether a rank needs no copies of what others saved; asked only where as many ranks saved as
    are loading."""
    accept: Callable[[Contents], None]
    """Called on every rank with the contents. Damage that it finds counts as damage of the
    checkpoint, and is reported on every rank."""
    verify_first: bool = False
    """Whether every byte is to be verified before anything is used."""
    model_only: bool = False
    """Whether nothing but the model is needed: a source may leave all other state unread."""


class Source(Protocol):
    """Where a load finds checkpoints: a tier, or another directory that was named."""

    def open(self, commit: Commit, coordinator: Coordinator, wanted: Wanted) -> Contents:
        """Open a commit on all ranks and verify its small state.

        Raises:
            CorruptCheckpointError: on every rank, naming what is damaged or cannot be read.
            StageFailedError: a rank failed or is gone, and the checkpoint is not to blame.
        """
        ...

    def pass_over(
        self, commit: Commit, coordinator: Coordinator, error: CorruptCheckpointError
    ) -> Commit:
        """Record that a commit could not be loaded; return it with its condition and reason.

        A survey after it need not offer it again; it offers every older one that is sound.
        """
        ...

    def finish_load(self) -> Callable[[Coordinator], None] | None:
        """End a successful load; return, alike on every rank, what is left to do on a thread."""
        ...


class Tier(Source, Protocol):
    """One kind of place for the checkpoints of a run.

    Every rank calls each method, in the same order; a failure on one rank is raised on all.
    """

    @property
    def name(self) -> str:
        """What manifests and messages call it."""
        ...

    def reserve(self, layout: Layout, coordinator: Coordinator, *, pinned: bool) -> Arena | None:
        """Return memory of the tier to stage a shard of this layout into; None: it has none.

        Raises:
            CheckpointError: on every rank: not enough space, or none became free in time.
        """
        ...

    def release(self) -> None:
        """Give the reserved memory back; the staging failed."""
        ...

    def write(
        self,
        snapshot: Snapshot,
        identify: Callable[[], CommitIdentity],
        coordinator: Coordinator,
    ) -> Committed:
        """Write and commit a snapshot, then remove what retention does not keep; on any thread.

        `identify` is called on rank 0; it returns the commit's place in the order of commits, or
        refuses the save.

        Raises:
            CheckpointError: on every rank, naming the stage, the ranks and the cause. Earlier
                commits are intact, and the next save works.
        """
        ...

    def survey(
        self, coordinator: Coordinator, objection: Objection, step: int | None = None
    ) -> Sequence[Commit]:
        """Return on rank 0 the commits of the run in this tier, each with its condition.

        The other ranks take part and need not be told. At least the newest commit that can be
        loaded is among them. `objection`: for tiers whose ranks agree on the commit to load.
        `step`: the iteration that was requested by number.

        Raises:
            CheckpointError: on every rank: the place cannot be read, or belongs to another run.
        """
        ...

    def close(self) -> None:
        """Release what the tier holds; committed checkpoints stay."""
        ...


@dataclass(frozen=True)
class Reserved:
    """The memory that a save is staged into."""

    arena: Arena | None
    """Of a tier; None: the caller's own."""
    to_local: bool
    """Whether the local tier takes part in the save."""


class MemoryProvider(Protocol):
    """What provides the memory that snapshots are staged into."""

    @property
    def nodes(self) -> Sequence[int] | None:
        """The node of each rank, if each node is to stage the whole state; None: the job does."""
        ...

    def reserve(
        self, layout: Layout, plan: bytes, coordinator: Coordinator, *, pinned: bool, required: bool
    ) -> Reserved:
        """Reserve memory for a shard of this layout; `plan`: the identity of the plan it is from.

        Raises:
            CheckpointError: on every rank: there is none, and it is `required`.
        """
        ...

    def release(self) -> None:
        """Give reserved memory back; the staging failed."""
        ...


def check_counters(content: bytes, iteration: int, where: Path | str) -> dict[str, Any]:
    """Decode the counters of a checkpoint.

    Raises:
        CorruptCheckpointError: they are no counters, or of another iteration.
    """
    try:
        counters: dict[str, Any] = json.loads(content)
        # Whether the live counters accept the other values is checked later, before any change.
        step = dict(counters["train_state"])["step"]
        int(counters["num_floating_point_operations_so_far"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(str(where), f"is not a train state: {error}") from error
    if type(step) is not int or step != iteration:
        raise CorruptCheckpointError(str(where), f"is of step {step!r}")
    return counters


def _owner_of(path: str) -> int | None:
    """Return the rank that wrote a shard file, if it has a name as torch gives it."""
    match = _SHARD.fullmatch(path)
    return int(match[1]) if match else None
