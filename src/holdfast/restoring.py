"""One checkpoint on its way into the live state.

Owns the steps between a chosen candidate and a restored run: verify and open it, compare it with
what is live, fill tensors in place, apply the rest. Promises that nothing live is touched before
`fill`, that damage is distinguished from a checkpoint that does not fit, and that RNG comes last.
Chooses nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.caller import in_normal_mode
from holdfast.errors import (
    CorruptCheckpointError,
    NothingLoadedError,
    StateMismatchError,
    UnsupportedStateError,
)
from holdfast.format.nondense import size_bytes_of
from holdfast.format.values import DATA, EMPTY, RNG, SCHEDULER, SMALL_STATES, TRAIN_STATE
from holdfast.protocol import Restored, Stateful
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.requests import Target
from holdfast.read.shared import ReadAlone, Reading, ReadShared
from holdfast.state.app import AppState
from holdfast.state.codec import encode
from holdfast.state.model import run_each
from holdfast.state.naming import is_root
from holdfast.state.options import find_option_differences
from holdfast.state.overrides import COMPONENTS, LiveOptions, Overrides
from holdfast.state.saved import SavedTensors
from holdfast.state.small import (
    Place,
    SavedRun,
    apply_data,
    apply_generators,
    check_counters,
    check_data,
    is_position,
    read_counters,
    restore_counters,
    without_fields,
)
from holdfast.storage.store import Checkpoint
from holdfast.tiers.opening import read_together
from holdfast.tiers.select import Commit
from holdfast.tiers.tier import Contents, Source, Wanted
from holdfast.torch_internals import local_of

logger = logging.getLogger(__name__)

_RNG_KEYS = frozenset({"python", "numpy", "torch", "cuda"})


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose small state was read, every byte of it verified."""

    contents: Contents
    positions: list[dict[str, Any]]
    """Positions in the data: this rank's own alone, or the distinct ones of all that saved."""

    @property
    def small(self) -> Mapping[str, Any]:
        """The small states; empty: the checkpoint holds nothing but model and optimizer."""
        return self.contents.small

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint itself."""
        return self.contents.checkpoint


def open_selected(
    source: Source, commit: Commit, coordinator: Coordinator, place: Place, *, verify_first: bool
) -> Opened:
    """Open a commit on all ranks and check its small state; raises as `Source.open`."""
    opened: list[Opened] = []

    def suffices(contents: Contents) -> bool:
        if DATA not in contents.reader.per_rank_names:
            return True  # no rank saved a position
        is_own = DATA in contents.reader.own_names
        position = contents.small.get(DATA)
        return is_own and is_position(position) and place.reads_on_from(position or {})

    def accept(contents: Contents) -> None:
        where = str(contents.checkpoint.path)
        if contents.small:
            _check_small(contents.small, contents.checkpoint.iteration, where)
        positions = list(contents.copies.get(DATA, ()))
        if not positions and DATA in contents.reader.own_names:
            positions = [contents.small[DATA]]
        if not all(map(is_position, positions)):
            raise CorruptCheckpointError(where, "holds no data position where one should be")
        opened.append(Opened(contents, positions))

    source.open(commit, coordinator, Wanted(suffices, accept, verify_first))
    return opened[0]


def _check_small(small: Mapping[str, Any], iteration: int, where: str) -> None:
    """Refuse small states that are none of ours, though they matched their digests.

    Raises:
        CorruptCheckpointError: naming the first.
    """
    counters = small.get(TRAIN_STATE)
    counters = counters.get("train_state") if isinstance(counters, dict) else None
    sound = {
        RNG: isinstance(small.get(RNG), dict) and small[RNG].keys() >= _RNG_KEYS,
        TRAIN_STATE: isinstance(counters, dict) and counters.get("step") == iteration,
        EMPTY: isinstance(small.get(EMPTY, []), list),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise CorruptCheckpointError(where, f"holds no state where {name} should be")


@dataclass(frozen=True)
class LoadedStates:
    """What a load found of each rank's own state, for those who ask for it again later."""

    rng: dict[str, Any] | None
    """As this rank saved it, or the lowest one; None: the checkpoint holds none."""
    positions: list[dict[str, Any]]
    saved: SavedRun
    place: Place
    path: str
    overrides: Overrides

    def restore_rng(self) -> bool:
        """Give the generators their state, unless the run keeps its own; return whether it did."""
        if self.rng is None or self.overrides.keeps("rng"):
            return False
        return apply_generators(self.rng, self.saved, self.place)

    def restore_data(self, data: Any, accept_restart: bool) -> None:
        """Give an iterator the saved position, unless the run keeps its own.

        Raises:
            NothingLoadedError: the checkpoint has no position.
            UnsupportedStateError: the iterator cannot take one.
            DataReshardError: another data-parallel size, and the iterator cannot reshard.
        """
        if self.overrides.keeps("data"):
            return
        if not self.positions:
            raise NothingLoadedError(
                f"{self.path} holds no data position: it was saved without train_data_iterator, or "
                "with one that has no state_dict and load_state_dict."
            )
        if not isinstance(data, Stateful):
            raise UnsupportedStateError(
                f"a {type(data).__name__} has no state_dict and load_state_dict: no data position "
                "can be restored into it."
            )
        check_data(data, self.positions, self.place, self.path, accept_restart)
        apply_data(data, self.positions, self.place)


class LastLoad:
    """What can be asked for again of the last load of a manager."""

    def __init__(self) -> None:
        self._has_loaded = False
        self._states: LoadedStates | None = None

    def note(self, states: LoadedStates | None) -> None:
        """Keep what a load has found; None: it found no checkpoint."""
        self._has_loaded, self._states = True, states

    def restore_rng(self) -> None:
        """Give the generators their state again; raises as `DefaultCheckpointManager` says."""
        self._check("restore_rng")
        if self._states is not None:
            self._states.restore_rng()

    def restore_data(self, iterator: Any, accept_restart: bool) -> None:
        """Give an iterator the saved position; raises as `DefaultCheckpointManager` says."""
        self._check("restore_data")
        if self._states is None:
            raise NothingLoadedError(
                "restore_data: the last load found no checkpoint. Ask its result for `found` first."
            )
        self._states.restore_data(iterator, accept_restart)

    def _check(self, method: str) -> None:
        if not self._has_loaded:
            raise NothingLoadedError(f"{method} gives back what a load has found: call load first.")


class Restoration:
    """An opened checkpoint and the live state that it is to fill."""

    def __init__(
        self,
        opened: Opened,
        app: AppState,
        train_state: Any,
        place: Place,
        *,
        with_tensors: bool,
        overrides: Overrides | None,
        broadcast: bool = False,
    ) -> None:
        """Touch nothing yet.

        `train_state`: the live counters. `overrides`: what keeps its live value; None: all but the
        model, for a run that takes over weights and starts fresh. `broadcast`: what every rank
        needs in full is read by one rank and sent to the others.
        """
        self._opened = opened
        self.takes_weights_only = overrides is None
        """Whether the run starts fresh but for the model."""
        self._overrides = overrides = overrides or Overrides(frozenset(COMPONENTS))
        self._train_state = train_state
        kept = {each for each in COMPONENTS if overrides.keeps(each)}
        self._given = app if opened.small else app.of_tensors_alone()
        self._app = self._given.without(kept)
        self._broadcast = broadcast
        self._saved: SavedTensors | None = None
        if with_tensors:
            reader, values = opened.contents.reader, opened.contents.values
            tensors = reader.tensors()
            key_paths = {name: reader.key_path(name) for name in (*tensors, *values)}
            hollow = opened.small.get(EMPTY, ())
            held = reader.metadata.state_dict_metadata.keys() - {*SMALL_STATES}
            path = str(opened.checkpoint.path)
            kinds = {name: kind for name in tensors if (kind := reader.kind(name))}
            self._saved = SavedTensors(tensors, values, key_paths, hollow, held, path, kinds=kinds)
        self._filled: dict[str, Any] = {}
        manifest = opened.checkpoint.manifest
        self.loaded = LoadedStates(
            opened.small.get(RNG),
            opened.positions,
            SavedRun(manifest.run_id, manifest.iteration, manifest.world_size),
            place,
            str(opened.checkpoint.path),
            overrides,
        )
        """What can be asked for again."""
        self.restored: dict[str, Restored] = {}
        """By component, what this rank got back so far."""

    def agree_on_shardings(self, coordinator: Coordinator) -> None:
        """Agree with all ranks on how live tensors are sharded; raises as `AppState`'s."""
        if self._saved is not None:
            self._app.agree_on_shardings(coordinator)

    def compare(self, strict: bool, accept_data_restart: bool) -> None:
        """Refuse a checkpoint that does not fit, touching nothing.

        Raises:
            StateMismatchError, DataReshardError: it is sound, but not for this run as built.
            UnsupportedStateError: a save would refuse some of the live state.
            ConfigError: `load.override` names what is not there, or cannot be kept.
        """
        opened, saved, given = self._opened, self._saved, self._given
        if saved is not None:
            self._app.rehearse()
        path = str(opened.checkpoint.path)
        schedule = opened.small.get(SCHEDULER)
        optimizers = given.optimizers if saved is not None else []
        if saved is not None and optimizers and saved.flat_tensors:
            opened.contents.reader.read_tensors(saved.flat_tensors)
        if self._overrides.names and not self.takes_weights_only:
            counters = list(read_counters(self._train_state))
            pairs = given.fit(saved).pairs() if saved is not None and optimizers else []
            taken = [each.saved for each in pairs]
            self._overrides.check(optimizers, given.scheduler, counters, schedule, taken)
        self._app.check(
            path,
            saved,
            opened.small,
            opened.positions,
            strict=strict,
            accept_data_restart=accept_data_restart,
        )
        check_counters(self._train_state, self._counters, path)
        self._tell_foreign_copies(path)
        differences = find_option_differences(
            self._app.fit(saved).pairs() if saved is not None and self._app.optimizers else [],
            self._app.scheduler,
            schedule,
            self._overrides,
        ).sentence()
        if differences is not None and self.loaded.place.rank == 0:
            logger.warning("%s: %s", path, differences)

    def _tell_foreign_copies(self, path: str) -> None:
        """Refuse, or warn of, copies that another rank saved and this one is to use.

        Raises:
            StateMismatchError: state of an optimizer that is of the size of a rank's shard.
        """
        opened, place, saved = self._opened, self.loaded.place, self._saved
        manifest, reader = opened.checkpoint.manifest, opened.contents.reader
        foreign = reader.per_rank_names - reader.own_names - {*SMALL_STATES}
        if saved is not None and self._app.optimizers:
            sharded = sorted(
                name for name in foreign & saved.tensors.keys() if is_root(saved.key_paths[name][0])
            )
            if sharded:
                raise StateMismatchError(
                    path,
                    different=[
                        f"{name} is of the size of a rank's shard, saved by {manifest.world_size} "
                        f"ranks, and this run has {place.world_size}"
                        for name in sharded
                    ],
                )
        told = [name for name in manifest.differing or () if name not in (RNG, DATA)]
        if manifest.world_size != place.world_size and place.rank == 0 and told:
            logger.warning(
                "%s: saved by %d ranks, loaded by %d. Ranks had copies that differ of %s: those of "
                "the lowest rank are used",
                path,
                manifest.world_size,
                place.world_size,
                ", ".join(told),
            )

    @in_normal_mode  # optimizers keep tensors that are made here
    def fill(self, coordinator: Coordinator) -> None:
        """Read the tensors into place on all ranks: from here on the live state is changed.

        Raises:
            CorruptCheckpointError: on every rank; tensors hold wrong values.
            StageFailedError: on every rank; a rank failed, and the checkpoint is not to blame.
        """
        if (saved := self._saved) is None:
            return

        reader = self._opened.contents.reader
        targets: dict[str, torch.Tensor] = {}
        places: dict[str, Target] = {}

        def find_targets() -> None:
            targets.update(self._app.targets(saved))
            places.update(self._app.place(targets, saved))

        # Before reading: what a hook of the user's raises is not damage of a file.
        coordinator.all_reduce("targets", find_targets, lambda _: None)
        self._opened.contents.bring(lambda: places, coordinator)
        reading: Reading = ReadAlone()
        if self._broadcast and coordinator.world_size > 1:
            reading = ReadShared.agree(lambda: places, reader, coordinator)

        def read() -> None:
            reading.read(reader, places)
            self._filled = {**saved.values, **targets}

        read_together("read", read, self._opened.checkpoint, coordinator)
        reading.pass_on(coordinator)

    @in_normal_mode  # likewise
    def apply(self) -> None:
        """Give every live object its state; RNG last but for the counters."""
        self._apply_state()
        if counters := self._counters:
            restore_counters(self._train_state, counters)
            self.restored["train_state"] = Restored(0, len(json.dumps(counters)))

    @property
    def _counters(self) -> dict[str, Any]:
        """The saved counters that are to be restored; empty: there are none."""
        if self.takes_weights_only:
            return {}
        contents = self._opened.contents
        own = contents.small if TRAIN_STATE in contents.reader.own_names else {}
        saved = own.get(TRAIN_STATE, contents.counters)
        return without_fields(saved["train_state"], self._overrides)

    def _apply_state(self) -> None:
        opened, given = self._opened, self._given
        schedule = opened.small.get(SCHEDULER)
        live = LiveOptions(
            self._overrides,
            given.optimizers if self._saved is not None else [],
            self._app.scheduler if schedule is not None else None,
        )
        saved = self._saved
        rated = [
            each.saved.options if each.saved is not None else dict(each.group)
            for each in (given.fit(saved).pairs() if saved is not None and given.optimizers else [])
        ]

        def give_tensors() -> None:
            if saved is not None:
                has_optimizer = self._app.apply(self._filled, saved)
                self._count("model")
                if has_optimizer:
                    self._count("optimizer")

        def give_schedule() -> None:
            if self._app.apply_scheduler(schedule):
                self._note("scheduler", schedule)

        def give_data() -> None:
            if (position := self._app.apply_data(opened.positions)) is not None:
                self._note("data", position["position"])

        run_each(
            give_tensors,
            give_schedule,
            lambda: live.put_back(rated),
            give_data,
        )
        if self.loaded.restore_rng():
            self._note("rng", self.loaded.rng)

    def _count(self, component: str) -> None:
        """Note the tensors of a component that were filled on this rank."""
        assert self._saved is not None
        filled = [
            local_of(value)
            for name, value in self._filled.items()
            if isinstance(value, torch.Tensor)
            and _component_of(self._saved.key_paths[name][0]) == component
        ]
        if filled or component == "optimizer":
            self.restored[component] = Restored(len(filled), sum(map(size_bytes_of, filled)))

    def _note(self, component: str, state: Any) -> None:
        """Note small state that a live object was given."""
        self.restored[component] = Restored(_tensors_in(state), len(encode(state)))


def _component_of(key: Any) -> Any:
    return "optimizer" if is_root(key) else key


def _tensors_in(state: Any) -> int:
    if isinstance(state, Mapping):
        return sum(map(_tensors_in, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(_tensors_in, state))
    return int(isinstance(state, torch.Tensor))
