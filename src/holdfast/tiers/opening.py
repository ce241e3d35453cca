"""Open a checkpoint before anything live is touched: on all ranks for a load, or alone to read it.

Owns how ranks share the work of verifying, or at least of comparing the sizes of all files; which
small files a rank needs; and the substitutes for what a checkpoint of torch alone lacks: digests,
and counters, which then change nothing. Promises that every rank receives all damage found on any
rank, that damage is told from a failure of a process, and that a checkpoint is handed over only
after all small state was read and matched its digests. Also the way from a path to tensors without
a job: it opens the checkpoint that a load would try first and falls back to an older one only where
files are missing or of the wrong size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from heapq import heapreplace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from holdfast.blame import is_process_failure
from holdfast.caller import in_normal_mode
from holdfast.config import expand_path
from holdfast.errors import (
    CheckpointError,
    CorruptCheckpointError,
    RankFailure,
    WrongArgumentError,
)
from holdfast.filesystem import LocalFilesystem
from holdfast.format.inventory import METADATA_NAME, name_tensors
from holdfast.format.plan import shard_name
from holdfast.format.values import EMPTY, is_united, split_small
from holdfast.messages import list_first
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.copies import decode_copies, join_copies, read_copies
from holdfast.read.reader import ForeignReader, LazyTensors, ShardReader
from holdfast.storage import open_storage
from holdfast.storage.backend import Storage
from holdfast.storage.digests import (
    FileRecord,
    find_difference,
    pack_records,
    unpack_records,
)
from holdfast.storage.manifest import MANIFEST_NAME
from holdfast.storage.store import Checkpoint, Damage, compare_sizes, verify_files
from holdfast.tiers.places import ForeignCheckpoint
from holdfast.tiers.select import Action, Asked, Commit, Condition, Seen, choose, mark_damaged
from holdfast.tiers.survey import Survey, make_refusal, survey_place
from holdfast.tiers.tier import (
    RUN_CONFIG_NAME,
    TRAIN_STATE_NAME,
    Contents,
    Wanted,
    check_counters,
)

T = TypeVar("T")
R = TypeVar("R")

_NO_COUNTERS: dict[str, Any] = {"train_state": {}, "num_floating_point_operations_so_far": 0}
"""Of a checkpoint that has none; they change nothing."""


class SurveyedStore:
    """The checkpoints of one directory as surveyed, and the condition of those that were tried.

    Rank 0 has surveyed them; the other ranks have an empty survey, and are told what they open.
    """

    def __init__(self, survey: Survey, storage: Storage) -> None:
        """`storage`: of the directory, of which each checkpoint is a group."""
        self.survey = survey
        self._storage = storage

    def open(self, commit: Commit, coordinator: Coordinator, wanted: Wanted) -> Contents:
        """Read the small state, verified, on all ranks; see `Source.open`."""
        checkpoint = self._describe(commit, coordinator)
        files = self._storage.under(checkpoint.path.name)
        return open_together(checkpoint, coordinator, files, wanted)

    def _describe(self, commit: Commit, coordinator: Coordinator) -> Checkpoint:
        """Send a checkpoint's manifest to the ranks that have not read it, in a compact form."""

        def pack() -> tuple[Checkpoint, bytes]:
            found = self.survey.checkpoints[commit]
            bare = replace(found, manifest=replace(found.manifest, files=()))
            return bare, pack_records(found.manifest.files)

        bare, records = coordinator.broadcast("describe", pack)
        if coordinator.rank == 0:
            return self.survey.checkpoints[commit]
        return replace(bare, manifest=replace(bare.manifest, files=unpack_records(records)))

    def pass_over(
        self, commit: Commit, coordinator: Coordinator, error: CorruptCheckpointError
    ) -> Commit:
        """Note that a commit could not be loaded; see `Source.pass_over`."""
        reason = error.reason if error.path == commit.path else str(error)
        commits = mark_damaged(self.survey.commits, commit, reason, error)
        self.survey = replace(self.survey, commits=commits)
        return replace(commit, condition=Condition.DAMAGED, reason=reason)

    def finish_load(self) -> None:
        """Nothing is left to do."""


@in_normal_mode  # live objects may keep what is read here
def open_together(
    checkpoint: Checkpoint, coordinator: Coordinator, files: Storage, wanted: Wanted
) -> Contents:
    """Open a checkpoint that every rank can read, on all ranks; see `Source.open`."""
    _check_together(checkpoint, coordinator, files, verify=wanted.verify_first)
    opened: list[Contents] = []

    accepted: list[Contents] = []
    same_ranks = coordinator.world_size == checkpoint.manifest.world_size

    def read() -> bool:
        contents = open_contents(checkpoint, files, coordinator, model_only=wanted.model_only)
        opened.append(contents)
        is_enough = not contents.small or (same_ranks and wanted.suffices(contents))
        is_enough = is_enough or wanted.model_only
        if is_enough:
            wanted.accept(contents)
            accepted.append(contents)
        return is_enough

    if read_together("open", read, checkpoint, coordinator, all):
        return opened[0]
    names = frozenset(filter(is_united, opened[0].reader.per_rank_names))
    copies = read_together(
        "open copies",
        lambda: read_copies(files, _shards_of(checkpoint, coordinator), names),
        checkpoint,
        coordinator,
        join_copies,
    )

    def accept() -> None:
        if not accepted:
            accepted.append(replace(opened[0], copies=decode_copies(copies, files.where())))
            wanted.accept(accepted[0])

    read_together("open united", accept, checkpoint, coordinator)
    return accepted[0]


def _shards_of(
    checkpoint: Checkpoint, coordinator: Coordinator
) -> dict[int, tuple[str, FileRecord]]:
    """Return this rank's share of the shard files, by the rank that wrote them.

    Raises:
        CorruptCheckpointError: the manifest does not list one of them.
    """
    records = {each.path: each for each in checkpoint.manifest.files}
    ranks = range(coordinator.rank, checkpoint.manifest.world_size, coordinator.world_size)
    for rank in ranks:
        if shard_name(rank) not in records:
            where = str(checkpoint.path / MANIFEST_NAME)
            raise CorruptCheckpointError(where, f"does not list the file of rank {rank}")
    return {rank: (shard_name(rank), records[shard_name(rank)]) for rank in ranks}


def _nothing(_: object) -> None:
    return None


def read_together(
    stage: str,
    work: Callable[[], T],
    checkpoint: Checkpoint,
    coordinator: Coordinator,
    join: Callable[[list[T]], R] = _nothing,  # type: ignore[assignment]  # R is None then
) -> R:
    """Read on every rank; what any of them finds damaged is reported on all, file by file.

    `join`: makes of all results what every rank is given, on rank 0. `work` reads the checkpoint's
    own files and calls nothing of the user's, so that a file that cannot be read is damage.
    Anything else that fails is no reason to take an older checkpoint.

    Raises:
        CorruptCheckpointError: on every rank, the same.
        StageFailedError: a rank failed or is gone; the checkpoint is not to blame.
    """

    def find_damage() -> tuple[CorruptCheckpointError | None, Any]:
        try:
            return None, work()
        except CorruptCheckpointError as error:
            return error, None
        except OSError as error:
            if isinstance(error, CheckpointError) or is_process_failure(error):
                raise
            failure = RankFailure.of(coordinator.rank, error)
            reason = f"cannot be read on rank {failure.rank}: {failure.reason}"
            return CorruptCheckpointError(failure.path or str(checkpoint.path), reason), None

    def judge(
        found: list[tuple[CorruptCheckpointError | None, Any]],
    ) -> tuple[CorruptCheckpointError | None, Any]:
        # Ranks that read the same file say the same of it.
        damages = list({str(each): each for each, _ in found if each is not None}.values())
        if len(damages) > 1:
            damages = [CorruptCheckpointError(str(checkpoint.path), list_first(damages, "files"))]
        return (damages[0], None) if damages else (None, join([each for _, each in found]))

    damage, joined = coordinator.all_reduce(stage, find_damage, judge)
    if damage is not None:
        raise damage
    return joined  # type: ignore[no-any-return]  # what `join` has returned


def open_contents(
    checkpoint: Checkpoint, files: Storage, coordinator: Coordinator, *, model_only: bool = False
) -> Contents:
    """Read the small state of a checkpoint, on this rank; `model_only`: see `Wanted`.

    Raises:
        CorruptCheckpointError: a file is missing or damaged.
    """
    if isinstance(checkpoint, ForeignCheckpoint):
        foreign = open_shards(checkpoint, files)
        values = foreign.read_values(_model_names(foreign) if model_only else None)
        return Contents(checkpoint, foreign, values, {}, _NO_COUNTERS, {})
    content = _read_checked(checkpoint, TRAIN_STATE_NAME, files)
    counters = check_counters(content, checkpoint.iteration, files.where(TRAIN_STATE_NAME))
    run_config = _read_checked(checkpoint, RUN_CONFIG_NAME, files)
    same_ranks = coordinator.world_size == checkpoint.manifest.world_size
    own_file = shard_name(coordinator.rank) if same_ranks else None
    reader = open_shards(checkpoint, files, own_file)
    names = _model_names(reader) if model_only else None
    values, small = split_small(reader.read_values(names))
    return Contents(checkpoint, reader, values, small, counters, {}, run_config=run_config)


def _model_names(reader: ShardReader) -> list[str]:
    """Return the names of the values that a model needs: its own, and which mappings are empty."""
    return [
        name
        for name in reader.value_names()
        if name == EMPTY or reader.key_path(name)[0] == "model"
    ]


def open_shards(checkpoint: Checkpoint, files: Storage, own_file: str | None = None) -> ShardReader:
    """Find where tensors and values are stored, reading none of them.

    `own_file`: see `ShardReader.open`.

    Raises:
        CorruptCheckpointError: `.metadata` is missing or damaged.
    """
    if isinstance(checkpoint, ForeignCheckpoint):
        return _open_foreign(files)
    metadata = _read_checked(checkpoint, METADATA_NAME, files)
    records = {each.path: each for each in checkpoint.manifest.files}
    return ShardReader.open(files, metadata, records, own_file)


def _open_foreign(files: Storage) -> ForeignReader:
    """Read the metadata of a checkpoint written by torch alone.

    Raises:
        CorruptCheckpointError: its metadata cannot be read, or names files that are not there.
    """
    records = {
        each.name: FileRecord(each.name, files.size_bytes(each.name), "", ())
        for each in files.list()
        if not each.is_group
    }
    try:
        content = files.get(METADATA_NAME)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(files.where(METADATA_NAME), "is missing") from error
    return ForeignReader.open(files, content, records)


def _check_together(
    checkpoint: Checkpoint, coordinator: Coordinator, files: Storage, *, verify: bool
) -> None:
    """Compare every file with the manifest, each rank its share: in full, or the size alone.

    Raises:
        CorruptCheckpointError: on every rank: files are missing or differ.
    """
    share = _shares(checkpoint.manifest.files, coordinator.world_size)[coordinator.rank]

    def check() -> list[Damage]:
        if verify:
            return name_tensors(files, verify_files(files, share))
        return compare_sizes(files, share)

    reason = coordinator.all_reduce("verify" if verify else "sizes", check, _describe_damages)
    if reason is not None:
        raise CorruptCheckpointError(str(checkpoint.path), reason)


def _describe_damages(parts: Sequence[Sequence[Damage]]) -> str | None:
    damages = [each for part in parts for each in part]
    return list_first(damages, "files") if damages else None


def _shares(records: Sequence[FileRecord], world_size: int) -> list[list[FileRecord]]:
    """Assign files to ranks, largest first, each to the least loaded rank."""
    shares: list[list[FileRecord]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for record in sorted(records, key=lambda each: (-each.size_bytes, each.path)):
        load, rank = loads[0]
        shares[rank].append(record)
        heapreplace(loads, (load + record.size_bytes + 1, rank))
    return shares


def _read_checked(checkpoint: Checkpoint, name: str, files: Storage) -> bytes:
    """Return the content of a small file, checked against its digest."""
    record = next((each for each in checkpoint.manifest.files if each.path == name), None)
    if record is None:
        raise CorruptCheckpointError(
            files.where(MANIFEST_NAME), f"does not list {name}, which a load needs"
        )
    where = files.where(name)
    try:
        content = files.get(name)
    except FileNotFoundError as error:  # removed since, or not visible on this node yet
        raise CorruptCheckpointError(where, "is missing") from error
    if (difference := find_difference(record, BytesIO(content))) is not None:
        raise CorruptCheckpointError(where, difference.reason, difference.byte_range)
    return content


def open_tensors(
    path: str | os.PathLike[str],
    *,
    prefix: str = "",
    step: int | None = None,
    verify: bool = True,
) -> LazyTensors:
    """Open the tensors of a checkpoint without reading them, by name.

    `path`: one `iter_*` directory, or a store, of which the newest checkpoint or iteration
    `step` is opened. `prefix`: only names with this prefix, which is removed; `model.` gives the
    names that `load_state_dict(..., assign=True)` takes. `verify`: check each block against its
    digest at the first access to a tensor in it.

    Raises:
        WrongArgumentError: `path` is not a path.
        CheckpointNotFoundError: the path or the iteration does not exist, or the store is empty.
        CorruptCheckpointError: a file is missing or damaged.
        NoLoadableCheckpointError: the store holds checkpoints, and none can be loaded.
    """
    _check_path(path)
    filesystem = LocalFilesystem()
    survey = survey_place(Path(expand_path(path)), filesystem, step)
    asked = Asked(names_other_place=True, step=step)
    while True:
        choice = choose(asked, Seen(other=survey.commits))
        if choice.commit is None or choice.action is Action.REFUSE:
            raise make_refusal(choice, survey, None, filesystem)
        checkpoint = survey.checkpoints[choice.commit]
        files = open_storage(checkpoint.path, filesystem)
        reason = _describe_damages([compare_sizes(files, checkpoint.manifest.files)])
        if reason is None:
            break
        error = CorruptCheckpointError(str(checkpoint.path), reason)
        commits = mark_damaged(survey.commits, choice.commit, reason, error)
        survey = replace(survey, commits=commits)
    has_digests = not isinstance(checkpoint, ForeignCheckpoint)
    reader = open_shards(checkpoint, files)
    return LazyTensors(reader, prefix, verify=verify and has_digests)


def _check_path(path: Any) -> None:
    if not isinstance(path, str | os.PathLike):
        found, advice = f"is of type {type(path).__name__}", "Pass the directory of a checkpoint."
        raise WrongArgumentError("open_tensors", "path", found, advice)
