"""The base of a checkpoint that holds a part of a model: found again, and read together with it.

Owns how a base is looked for (by the recorded path, beside the checkpoint, and at what the settings
name), and the view of both as one. Promises that a base is taken only if its run id, iteration and
the digests of all its files are those that were recorded, that a missing or changed one is refused
by name before anything live is touched, and that of the base only what the part lacks of the model
is read. Writes nothing; what is left out of a save is decided in `state.filters`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from holdfast.config import CheckpointConfig
from holdfast.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from holdfast.filesystem import Filesystem, LocalFilesystem
from holdfast.format.values import EMPTY
from holdfast.protocol import ShardSource
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.reader import ShardReader
from holdfast.read.requests import Target
from holdfast.storage import open_storage
from holdfast.storage.manifest import Base
from holdfast.storage.store import Checkpoint, checkpoint_name
from holdfast.tiers.opening import SurveyedStore
from holdfast.tiers.select import Commit
from holdfast.tiers.survey import Survey, survey_place
from holdfast.tiers.tier import Contents, Wanted

MODEL = "model"


@dataclass(frozen=True)
class JoinedReader(ShardReader):
    """The tensors of a checkpoint, and those of the model that only its base has."""

    own: ShardReader
    base: ShardReader
    of_base: frozenset[str]
    """Names that are read from the base."""

    @classmethod
    def join(cls, own: ShardReader, base: ShardReader) -> Self:
        """Return one view of both; a name that both have is the checkpoint's own."""
        described = own.metadata.state_dict_metadata
        of_base = frozenset(
            name
            for name in base.metadata.state_dict_metadata
            if base.key_path(name)[0] == MODEL and name not in described
        )
        metadata = Metadata(
            {
                **described,
                **{
                    name: each
                    for name, each in base.metadata.state_dict_metadata.items()
                    if name in of_base
                },
            },
            {
                **(own.metadata.planner_data or {}),
                **{name: base.key_path(name) for name in of_base},
            },
            {
                **(own.metadata.storage_data or {}),
                **{
                    place: info
                    for place, info in (base.metadata.storage_data or {}).items()
                    if place.fqn in of_base
                },
            },
        )
        joined = cls(own.files, metadata, own.records, own=own, base=base, of_base=of_base)
        joined.own_names.update(own.own_names, base.own_names & of_base)
        return joined

    @property
    def per_rank_names(self) -> frozenset[str]:
        """See the base class."""
        return self.own.per_rank_names | (self.base.per_rank_names & self.of_base)

    def kind(self, name: str) -> str:
        """See the base class."""
        return self._part(name).kind(name)

    def place_of(self, index: MetadataIndex) -> Any:
        """See the base class; each part may have learned more places since."""
        return self._part(index.fqn).place_of(index)

    def _first_place(self, name: str) -> tuple[str, int]:
        return self._part(name)._first_place(name)

    def _part(self, name: str) -> ShardReader:
        return self.base if name in self.of_base else self.own

    def read_tensors(self, targets: Mapping[str, Target]) -> None:
        """Fill tensors in place, each from where it is; see the base class."""
        from_own, from_base = self.divide(targets)
        self.base.read_tensors(from_base)
        self.own.read_tensors(from_own)

    def divide(self, targets: Mapping[str, Target]) -> tuple[dict[str, Target], dict[str, Target]]:
        """Return what is read from the checkpoint, and what from its base."""
        from_own = {name: each for name, each in targets.items() if name not in self.of_base}
        return from_own, {n: each for n, each in targets.items() if n in self.of_base}


@dataclass(frozen=True)
class JoinedContents(Contents):
    """The contents of a checkpoint and of its base."""

    own: Contents = field(kw_only=True)
    base: Contents = field(kw_only=True)

    @property
    def is_shared(self) -> bool:
        """As that of the checkpoint alone."""
        return self.own.is_shared

    def bring(
        self, find_targets: Callable[[], Mapping[str, Target]], coordinator: Coordinator
    ) -> None:
        """Fetch from both what these tensors need; see the base class."""
        reader = self.reader
        assert isinstance(reader, JoinedReader)
        self.own.bring(lambda: reader.divide(find_targets())[0], coordinator)
        self.base.bring(lambda: reader.divide(find_targets())[1], coordinator)

    def sources(self) -> tuple[ShardSource, ...]:
        """Return the files of both that this rank has read tensors from."""
        return (*self.own.sources(), *self.base.sources())


@dataclass(frozen=True)
class Bases:
    """Where bases are looked for beside the recorded path."""

    places: Sequence[Path] = ()
    """What the settings name: stores or checkpoints."""
    filesystem: Filesystem = field(default_factory=LocalFilesystem)

    @classmethod
    def of(cls, config: CheckpointConfig, filesystem: Filesystem) -> Self:
        """Return the places that the settings of a load name."""
        directory = config.load.pretrained.directory
        return cls([] if directory is None else [Path(directory)], filesystem)

    def join(
        self, contents: Contents, coordinator: Coordinator, *, verify_first: bool = False
    ) -> Contents:
        """Return the contents with those of the base; as they are if they need none.

        Every rank calls it.

        Raises:
            CheckpointNotFoundError: on every rank: the base is not there, or has changed.
            CorruptCheckpointError: on every rank: it is damaged.
        """
        base = contents.checkpoint.manifest.base_record
        if base is None:
            return contents
        found: list[SurveyedStore] = []

        def find() -> tuple[Path, Commit]:
            source, commit = self._find(base, contents.checkpoint)
            found.append(source)
            return source.survey.root, replace(commit, error=None)

        root, commit = coordinator.broadcast("base", find)
        storage = open_storage(root, self.filesystem)
        source = found[0] if found else SurveyedStore(Survey(root), storage)
        wanted = Wanted(lambda _: True, lambda _: None, verify_first, model_only=True)
        below = source.open(commit, coordinator, wanted)
        reader = JoinedReader.join(contents.reader, below.reader)
        values = {name: each for name, each in below.values.items() if name in reader.of_base}
        hollow = [*contents.small.get(EMPTY, ())]
        hollow += [each for each in below.small.get(EMPTY, ()) if each[0] == MODEL]
        small = {**contents.small, EMPTY: hollow} if hollow else contents.small
        return JoinedContents(
            contents.checkpoint,
            reader,
            {**values, **contents.values},
            small,
            contents.counters,
            contents.copies,
            run_config=contents.run_config,
            own=contents,
            base=below,
        )

    def _find(self, base: Base, part: Checkpoint) -> tuple[SurveyedStore, Commit]:
        """Find the base on rank 0; raises as `join`."""
        store = part.path.parent
        places = [
            Path(base.path),
            store / base.relative_path,
            store / checkpoint_name(base.iteration),
            *self.places,
        ]
        told: list[str] = []
        for path in dict.fromkeys(Path(os.path.normpath(each)) for each in places):
            try:
                survey = survey_place(path, self.filesystem, base.iteration)
            except (CheckpointError, OSError) as error:
                told.append(f"{path}: {str(error).splitlines()[0]}")
                continue
            for commit, checkpoint in survey.checkpoints.items():
                manifest = checkpoint.manifest
                if (manifest.run_id, manifest.iteration) != (base.run_id, base.iteration):
                    continue
                if manifest.content_digest == base.digest:
                    storage = open_storage(survey.root, self.filesystem)
                    return SurveyedStore(survey, storage), commit
                told.append(f"{checkpoint.path} has changed: its digest is not the recorded one")
                break
            else:
                told.append(f"{path} does not hold it")
        raise CheckpointNotFoundError(
            f"{part.path} holds a part of a model, and its base is not there: iteration "
            f"{base.iteration} of run {base.run_id}, once {base.path}.\n"
            f"Looked at: {'; '.join(dict.fromkeys(told))}.\n"
            "Put it back, or name where it is with load.pretrained.directory. Nothing was touched."
        )


@dataclass(frozen=True)
class LoadedBase:
    """What a save of a part of the model leaves to the checkpoint that was loaded."""

    record: Base
    names: frozenset[str]
    """Of the model, as that checkpoint gave them to this rank."""

    @classmethod
    def of(cls, contents: Contents, filled: Collection[str], store: Path) -> Self | None:
        """Return it; None: nothing vouches for what was loaded.

        `filled`: the names that this rank was given. `store`: that the part will be saved to.
        """
        record = base_of(contents, store)
        return None if record is None else cls(record, names_in_base(contents).intersection(filled))


def base_of(contents: Contents, store: Path) -> Base | None:
    """Return what a later save of a part would record as its base; None: nothing vouches for it.

    `contents`: of what was loaded. `store`: that the part will be saved to.
    """
    checkpoint = _full(contents).checkpoint
    manifest = checkpoint.manifest
    if not manifest.run_id:
        return None
    return Base(
        str(checkpoint.path),
        os.path.relpath(checkpoint.path, store),
        manifest.run_id,
        manifest.iteration,
        manifest.content_digest,
    )


def names_in_base(contents: Contents) -> frozenset[str]:
    """Return the names of the model that the full checkpoint has, of which a part was loaded."""
    reader = _full(contents).reader
    return frozenset(
        name for name in reader.metadata.state_dict_metadata if reader.key_path(name)[0] == MODEL
    )


def _full(contents: Contents) -> Contents:
    return contents.base if isinstance(contents, JoinedContents) else contents


def require_base(contents: Contents | None, store: Path) -> None:
    """Refuse a run that would save a part of its model and has nothing for the rest.

    `contents`: of what is to be loaded; None: the run begins without a checkpoint.

    Raises:
        ConfigError: alike on every rank.
    """
    if contents is not None and base_of(contents, store) is not None:
        return
    why = "the run begins without a checkpoint"
    if contents is not None:
        why = f"{contents.checkpoint.path} was written without holdfast, so nothing vouches for it"
    problem = (
        f"checkpoint.save_filter saves a part of the model, and {why}: name a checkpoint that "
        "has the rest with load.pretrained.directory, or save without a filter first"
    )
    raise ConfigError([problem])
