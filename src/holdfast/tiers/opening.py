"""Open a checkpoint before anything live is touched: on all ranks for a load, or alone to read it.

Owns how ranks share the work of verifying, or at least of comparing the sizes of all files; which
files a rank needs the records of, and which small files it reads; and the substitutes for what a
checkpoint of torch alone lacks: digests, and counters, which then change nothing. Where as many
ranks load as saved, each reads the index of its own shard and no rank reads `.metadata`; otherwise
one rank of each node does. A job of one process reads it, which is as large as its index. Promises
that every rank receives all damage found on any rank, that damage is told from a failure of a
process, and that a checkpoint is handed over only after all small state was read and matched its
digests. Also the way from a path to tensors without a job: it opens the checkpoint that a load
would try first and falls back to an older one only where files are missing or of the wrong size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from io import BytesIO
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from holdfast.caller import in_normal_mode
from holdfast.config import expand_path
from holdfast.errors import (
    CorruptCheckpointError,
    WrongArgumentError,
)
from holdfast.filesystem import LocalFilesystem
from holdfast.format.inventory import METADATA_NAME, name_tensors
from holdfast.format.merging import files_in
from holdfast.format.plan import shard_name
from holdfast.format.values import is_united, split_small
from holdfast.messages import list_first
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.gathered import (
    Lookup,
    decode_copies,
    join_copies,
    pick_records,
    read_copies,
    read_together,
    share_of_shards,
)
from holdfast.read.index import parse_metadata
from holdfast.read.names import SharedNames, names_of_model
from holdfast.read.reader import ForeignReader, LazyTensors, ShardReader
from holdfast.read.requests import Target
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
        checkpoint, share = self._describe(commit, coordinator)
        files = self._storage.under(checkpoint.path.name)
        return open_together(checkpoint, share, coordinator, files, wanted)

    def _describe(
        self, commit: Commit, coordinator: Coordinator
    ) -> tuple[Checkpoint, Sequence[FileRecord]]:
        """Return a checkpoint, and the files that this rank compares with the manifest.

        On rank 0 the manifest lists every file, elsewhere those that the rank reads itself.
        """

        def describe() -> list[tuple[Checkpoint, bytes, bytes]]:
            found = self.survey.checkpoints[commit]
            bare = replace(found, manifest=found.manifest.without_files())
            records = {each.path: each for each in found.manifest.files}
            saved = min(found.manifest.world_size, len(records) + 1)
            told = []
            for rank, share in enumerate(_shares(found.manifest.files, coordinator.world_size)):
                own = [shard_name(each) for each in range(rank, saved, coordinator.world_size)]
                names = [each for each in (METADATA_NAME, *own) if each in records]
                told.append((bare, pack_records(share), pack_records([records[n] for n in names])))
            return told

        bare, share, own = coordinator.scatter("describe", describe)
        if coordinator.rank == 0:
            return self.survey.checkpoints[commit], unpack_records(share)
        manifest = replace(bare.manifest, files=unpack_records(own))
        return replace(bare, manifest=manifest), unpack_records(share)

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


@dataclass(frozen=True)
class SharedContents(Contents):
    """The contents of a checkpoint that all ranks read, of which each was told a part."""

    lookup: Lookup

    def bring(
        self, find_targets: Callable[[], Mapping[str, Target]], coordinator: Coordinator
    ) -> None:
        """Learn where the chunks are that these tensors need; see `Lookup.bring`."""
        self.lookup.bring(self.reader, find_targets, coordinator)


@in_normal_mode  # live objects may keep what is read here
def open_together(
    checkpoint: Checkpoint,
    share: Sequence[FileRecord],
    coordinator: Coordinator,
    files: Storage,
    wanted: Wanted,
) -> Contents:
    """Open a checkpoint that every rank can read, on all ranks; see `Source.open`.

    `share`: the files that this rank compares with the manifest.
    """
    _check_together(checkpoint, share, coordinator, files, verify=wanted.verify_first)
    same_ranks = coordinator.world_size == checkpoint.manifest.world_size
    has_copies = False
    make: Callable[[], Contents] = lambda: open_contents(  # noqa: E731
        checkpoint, files, model_only=wanted.model_only
    )
    if coordinator.world_size > 1 and not isinstance(checkpoint, ForeignCheckpoint):
        make = _learn_names(checkpoint, files, coordinator, model_only=wanted.model_only)
        has_copies = not same_ranks
    opened: list[Contents] = []
    accepted: list[Contents] = []

    def read() -> bool:
        contents = make()
        opened.append(contents)
        is_enough = not contents.small or (same_ranks and wanted.suffices(contents))
        is_enough = is_enough or has_copies or wanted.model_only
        if is_enough:
            wanted.accept(contents)
            accepted.append(contents)
        return is_enough

    if read_together("open", read, checkpoint, coordinator, all):
        return opened[0]
    names = frozenset(filter(is_united, opened[0].reader.per_rank_names))
    copies = read_together(
        "open copies",
        lambda: read_copies(files, share_of_shards(checkpoint, coordinator), names),
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


def _learn_names(
    checkpoint: Checkpoint, files: Storage, coordinator: Coordinator, *, model_only: bool
) -> Callable[[], Contents]:
    """Exchange with all ranks what the checkpoint holds; return what opens the contents here.

    `model_only`: see `Wanted`.

    Raises:
        CorruptCheckpointError: on every rank, naming what is damaged.
    """

    def read_metadata() -> Metadata:
        content = _read_checked(checkpoint, METADATA_NAME, files)
        where = files.where(METADATA_NAME)
        metadata = parse_metadata(content, where)
        if coordinator.rank == 0:  # which has the whole manifest
            records = {each.path: each for each in checkpoint.manifest.files}
            pick_records(files_in(metadata), records, where)
        return metadata

    lookup = Lookup(checkpoint, read_metadata)
    names = SharedNames(checkpoint, files, coordinator, lookup, model_only)
    counters, run_config = names.learn(lambda: _read_first(checkpoint, files))

    def make() -> Contents:
        reader = names.reader()
        values, small = split_small(names.values(reader))
        copies = names.copies() or {}
        held = checkpoint, reader, values, small, counters, copies
        return SharedContents(*held, lookup, run_config=run_config)

    return make


def open_contents(checkpoint: Checkpoint, files: Storage, *, model_only: bool) -> Contents:
    """Read the small state of a checkpoint alone, without what other ranks know.

    `model_only`: see `Wanted`.

    Raises:
        CorruptCheckpointError: a file is missing or damaged.
    """
    if isinstance(checkpoint, ForeignCheckpoint):
        foreign = open_shards(checkpoint, files)
        values = foreign.read_values(names_of_model(foreign) if model_only else None)
        return Contents(checkpoint, foreign, values, {}, _NO_COUNTERS, {})
    counters, run_config = _read_first(checkpoint, files)
    own_file = shard_name(0) if checkpoint.manifest.world_size == 1 else None
    reader = open_shards(checkpoint, files, own_file)
    names = names_of_model(reader) if model_only else None
    values, small = split_small(reader.read_values(names))
    return Contents(checkpoint, reader, values, small, counters, {}, run_config=run_config)


def _read_first(checkpoint: Checkpoint, files: Storage) -> tuple[dict[str, Any], bytes]:
    """Read what one rank reads for all: the counters of rank 0, and the config of the run.

    Raises:
        CorruptCheckpointError: a file is missing or damaged.
    """
    content = _read_checked(checkpoint, TRAIN_STATE_NAME, files)
    counters = check_counters(content, checkpoint.iteration, files.where(TRAIN_STATE_NAME))
    return counters, _read_checked(checkpoint, RUN_CONFIG_NAME, files)


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
    checkpoint: Checkpoint,
    share: Sequence[FileRecord],
    coordinator: Coordinator,
    files: Storage,
    *,
    verify: bool,
) -> None:
    """Compare every file with the manifest, each rank its share: in full, or the size alone.

    Raises:
        CorruptCheckpointError: on every rank: files are missing or differ.
    """

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
