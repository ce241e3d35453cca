"""One checkpoint on its way into the live state.

Owns the steps between a chosen candidate and a restored run: verify and open it, compare it with
what is live, fill tensors in place, apply the rest. Promises that nothing live is touched before
`fill`, that damage is distinguished from a checkpoint that does not fit, and that RNG comes last.
Chooses nothing.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import Any

import torch

from holdfast.caller import in_normal_mode
from holdfast.config import RAISE, WARN
from holdfast.errors import (
    StateMismatchError,
)
from holdfast.format.nondense import size_bytes_of
from holdfast.format.values import (
    DATA,
    RNG,
    SCHEDULER,
    SMALL_STATES,
    TRAIN_STATE,
    is_component,
    is_united,
)
from holdfast.messages import name_first
from holdfast.opened import Opened
from holdfast.protocol import Restored
from holdfast.ranks.coordinator import Coordinator
from holdfast.read.gathered import read_together
from holdfast.read.requests import Target
from holdfast.read.shared import ReadAlone, Reading, ReadShared
from holdfast.state.app import AppState
from holdfast.state.codec import count_tensors, encode
from holdfast.state.component_load import ComponentLoad, SavedComponents
from holdfast.state.filters import SaveFilter
from holdfast.state.guard import Guard, facts_of_checkpoint
from holdfast.state.loaded import LoadedStates, Stash
from holdfast.state.model import run_each
from holdfast.state.naming import is_root
from holdfast.state.options import find_option_differences
from holdfast.state.overrides import COMPONENTS, LiveOptions, Overrides
from holdfast.state.saved import SavedTensors
from holdfast.state.small import (
    Place,
    SavedRun,
    check_counters,
    read_counters,
    restore_counters,
    without_fields,
)
from holdfast.state.strategy import LoadStrategy, Renaming, find_unused, make_unused_error
from holdfast.state.strictness import Differences, Strictness
from holdfast.state.union import ALL_FOUND, NONE, Leftover, find_unexpected, gather_records, judge
from holdfast.torch_internals import local_of

logger = logging.getLogger(__name__)


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
        strategy: LoadStrategy,
        broadcast: bool = False,
    ) -> None:
        """Touch nothing yet.

        `train_state`: the live counters. `overrides`: what keeps its live value; None: all but the
        model, for a run that takes over weights and starts fresh. `strategy`: which parts and names
        are restored. `broadcast`: what every rank needs in full is read by one rank and sent to the
        others.
        """
        self._opened = opened
        self.takes_weights_only = overrides is None
        """Whether the run starts fresh but for the model."""
        self._overrides = overrides = overrides or Overrides(frozenset(COMPONENTS))
        self._train_state = train_state
        self._strategy = strategy
        names = strategy.kept(overrides.names)
        self._overrides = overrides = Overrides(overrides.names | (names & {*COMPONENTS}))
        kept = {each for each in COMPONENTS if overrides.keeps(each)}
        self._given = app if opened.small else app.of_tensors_alone()
        self._app = self._given.without(kept)
        self._broadcast = broadcast
        self._saved: SavedTensors | None = None
        self._renaming: Renaming | None = None
        self._old_names: dict[str, str] = {}
        """By new name, as the checkpoint has them."""
        with_tensors = with_tensors and "model" not in names
        manifest = opened.checkpoint.manifest
        where, contents = str(opened.checkpoint.path), opened.contents
        reader, size = contents.reader, manifest.world_size
        if with_tensors:
            held = contents.values, contents.small, contents.copies
            self._saved = SavedTensors.of(reader, *held, where, size)
        self._filled: dict[str, Any] = {}
        # Nothing of this object: what waits for components outlives the load.
        own = frozenset({"components"}) if self.takes_weights_only else overrides.names
        keeps = partial(strategy.keeps_component, own)
        self._targets, self._places = dict[str, torch.Tensor](), dict[str, Target]()
        self._components = ComponentLoad(
            app.components,
            SavedComponents.of(opened.small, reader, manifest, where, contents.is_shared),
            place,
            keeps,
            with_sharded=with_tensors,
        )
        self.loaded = LoadedStates(
            opened.small.get(RNG),
            opened.positions,
            SavedRun(manifest.run_id, manifest.iteration, manifest.world_size, manifest.differing),
            place,
            where,
            overrides,
            Stash(where, keeps, self._components.waiting),
        )
        """What can be asked for again."""
        self.restored: dict[str, Restored] = {}
        """By component, what this rank got back so far."""

    @property
    def goes_on(self) -> bool:
        """Whether the run has the counters of the checkpoint from here on."""
        return not self.takes_weights_only and self._strategy.iteration

    def _rename(self) -> None:
        """Give saved names of the model their new names, once."""
        if self._saved is None or self._renaming is not None:
            return
        found = Renaming.find(self._strategy, self._saved, self._app.model)
        self._renaming, before = found, self._saved
        self._saved = found.apply(before)
        self._old_names = {found.name(n, path): n for n, path in before.key_paths.items()}

    def agree_on_shardings(self, coordinator: Coordinator) -> None:
        """Agree with all ranks on how live tensors are sharded; raises as `AppState`'s."""
        if self._saved is not None:
            self._app.agree_on_shardings(coordinator)

    def ask(self, guard: Guard, config: bytes, coordinator: Coordinator) -> None:
        """Ask a guard on all ranks, before any tensor is read; `config`: of this run, as YAML.

        Raises:
            StateMismatchError: on every rank: the guard objects on one.
        """
        found = coordinator.all_reduce(
            "run config",
            lambda: self._opened.contents.run_config,
            lambda configs: next(filter(None, configs), b""),
        )

        def check() -> None:
            saved = facts_of_checkpoint(found, self._saved)
            # Of all objects that were given, those that keep their live state included.
            guard.check(self.loaded.path, saved, self._given.facts(config))

        coordinator.all_reduce("guard", check, lambda _: None)

    def compare(
        self,
        coordinator: Coordinator,
        strictness: Strictness,
        accept_data_restart: bool,
        adapting: SaveFilter | None = None,
    ) -> None:
        """Compare with the live state of all ranks, and refuse what does not fit; touch nothing.

        `adapting`: of a run that begins with what this filter keeps, which need not be there.

        Raises:
            StateMismatchError, DataReshardError: it is sound, but not for this run as built.
            UnsupportedStateError: a save would refuse some of the live state.
            ConfigError: `load.override` names what is not there, or cannot be kept.
        """
        found = Differences()
        known: set[str] = set()
        warnings: list[str] | None = None

        def check() -> None:
            nonlocal warnings
            if warnings is None:
                warnings = self._check(found, strictness, accept_data_restart)

        def compare_own() -> tuple[bool, Leftover]:
            nonlocal found, known
            self._rename()
            saved = self._saved
            if saved is not None:
                self._app.rehearse()
            self._components.look()
            if saved is not None and self._given.optimizers:
                if saved.flat_tensors:
                    self._opened.contents.reader.read_tensors(saved.flat_tensors)
                if not self.takes_weights_only and self._given.wants_records(saved):
                    return True, Leftover.of((), ())
            small, positions = self._opened.small, self._opened.positions
            found = self._app.compare(self.loaded.path, saved, small, positions)
            if saved is not None and self._strategy.ignore_keys:
                found.leave_out(self._strategy.ignores, self._app.live_names())
            if adapting is not None and saved is not None:
                begun = self._app.names_that_begin(adapting).intersection(found.missing)
                found.missing = [name for name in found.missing if name not in begun]
                if begun and self.loaded.place.rank == 0:
                    shown = name_first(sorted(begun))
                    logger.warning("%s lacks, and fresh values begin: %s", self.loaded.path, shown)
            known = saved.shared_names() if saved is not None else set()
            return False, Leftover.of(found.unexpected, known)

        def join(parts: list[tuple[bool, Leftover]]) -> str | None:
            wants_records = any(wants for wants, _ in parts)
            return None if wants_records else judge([leftover for _, leftover in parts])

        def compare_and_check() -> tuple[bool, Leftover]:
            wants_records, leftover = compare_own()
            if not (wants_records or leftover.lacking):
                check()  # nothing of the other ranks can change it
            return wants_records, leftover

        verdict = coordinator.all_reduce("compare", compare_and_check, join)
        if self._strategy.ignore_keys and self._saved is not None:
            self._check_globs(coordinator)
        if verdict is None:
            assert self._saved is not None
            self._saved = gather_records(self._saved, coordinator)
            warnings = None
            verdict = coordinator.all_reduce("compare", compare_and_check, join) or NONE
        if verdict != ALL_FOUND:
            live = self._app.live_names() if self._saved is not None else set()
            found.unexpected = find_unexpected(found.unexpected, live, known, verdict, coordinator)
            coordinator.all_reduce("accept", check, lambda _: None)
        if self.loaded.place.rank == 0:
            for each in warnings or ():
                logger.warning("%s", each)

    def _check(
        self, found: Differences, strictness: Strictness, accept_data_restart: bool
    ) -> list[str]:
        """Refuse what does not fit this rank; return what to warn of."""
        opened, saved, given = self._opened, self._saved, self._given
        path, schedule = self.loaded.path, opened.small.get(SCHEDULER)
        optimizers = given.optimizers if saved is not None else []
        if self._overrides.names and not self.takes_weights_only:
            counters = list(read_counters(self._train_state))
            pairs = given.fit(saved).pairs() if saved is not None and optimizers else []
            taken = [each.saved for each in pairs]
            names = self._components.names()
            self._overrides.check(optimizers, given.scheduler, counters, schedule, taken, names)
        is_same_world = opened.checkpoint.manifest.world_size == self.loaded.place.world_size
        has_own = DATA in opened.contents.reader.own_names
        self._app.expects_position = has_own or not is_same_world
        warnings = self._app.check(
            found,
            path,
            saved,
            opened.small,
            opened.positions,
            strictness=strictness,
            accept_data_restart=accept_data_restart,
        )
        warnings += self._components.check()
        check_counters(self._train_state, self._counters, path)
        self._tell_foreign_copies(path)
        differences = find_option_differences(
            self._app.fit(saved).pairs() if saved is not None and self._app.optimizers else [],
            self._app.scheduler,
            schedule,
            self._overrides,
        )
        if differences.reported and strictness.options == RAISE:
            raise StateMismatchError(path, different=differences.reported, strict=False)
        if differences.reported and strictness.options == WARN:
            warnings.append(f"{path}: {differences.sentence()}")
        return warnings

    def _check_globs(self, coordinator: Coordinator) -> None:
        """Refuse globs that match no name of the checkpoint and of any rank.

        Raises:
            ConfigError: on every rank.
        """
        assert self._saved is not None
        names = {*self._saved.key_paths, *self._opened.small} | self._app.live_names()
        names |= {f"components.{name}" for name in self._components.names()}
        parts = coordinator.all_gather("names", lambda: find_unused(self._strategy, names))
        if unused := sorted(set.intersection(*map(set, parts))):
            raise make_unused_error(unused, names)

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
                name
                for name in saved.tensors
                if self._old_names.get(name, name) in foreign and is_root(saved.key_paths[name][0])
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
        told = [
            name
            for name in manifest.differing or ()
            if name != RNG and not is_united(name) and not is_component(name)
        ]
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
    def prepare(self, coordinator: Coordinator) -> None:
        """Find what is read into which tensors, from where; touch nothing. Raises as `fill`."""
        saved = self._saved
        if saved is None and self._components.is_empty:
            return

        def find_targets() -> None:
            self._targets, self._places = {}, {}
            if saved is not None:
                self._targets = self._app.targets(saved)
                found = self._app.place(self._targets, saved)
                self._places.update({self._old_names.get(n, n): each for n, each in found.items()})
            self._places.update(self._components.find_targets())

        # Before reading: what a hook of the user's raises is not damage of a file.
        coordinator.all_reduce("targets", find_targets, lambda _: None)
        self._opened.contents.bring(lambda: self._places, coordinator)

    @in_normal_mode  # likewise
    def fill(self, coordinator: Coordinator) -> None:
        """Read the tensors into place on all ranks: from here on the live state is changed.

        Raises:
            CorruptCheckpointError: on every rank; tensors hold wrong values.
            StageFailedError: on every rank; a rank failed, and the checkpoint is not to blame.
        """
        saved, targets, places = self._saved, self._targets, self._places
        if saved is None and self._components.is_empty:
            return
        reader = self._opened.contents.reader
        reading: Reading = ReadAlone()
        if self._broadcast and coordinator.world_size > 1:
            reading = ReadShared.agree(lambda: places, reader, coordinator)

        def read() -> None:
            reading.read(reader, places)
            self._filled = {**saved.values, **targets} if saved is not None else {}

        read_together("read", read, self._opened.checkpoint, coordinator)
        reading.pass_on(coordinator)

    @property
    def filled_names(self) -> frozenset[str]:
        """The names that this rank was given of the checkpoint."""
        return frozenset(self._filled)

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
        if not self.goes_on:
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
            self._components.apply,
            give_data,
        )
        self.restored |= self._components.restored
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
        self.restored[component] = Restored(count_tensors(state), len(encode(state)))


def _component_of(key: Any) -> Any:
    return "optimizer" if is_root(key) else key
