"""The search of one load: survey what is there, let `select` choose, try it, choose again.

Owns where the facts for that choice come from (rank 0 surveys directories, the local tier's ranks
agree on what they hold), the record of candidates found damaged, and what is said of a choice.
Promises that every rank gets the same candidate, that a directory is read only if the choice needs
it, and that the other ranks are sent the choice alone: a few hundred bytes, however many
checkpoints and files there are. Decides only what the settings ask for: which place a path names,
whether it is the run's own, and whether an attempt has applied `load.step`; all other rules are in
`select`.

What is skipped has its reason from `survey`, from `local.availability`, or from the failed try. It
is told in `LoadResult.skipped` always; a tried candidate is also logged by `pass_over`, and damaged
later ones by `warn`, on rank 0. The loop over candidates is `manager._load`: only a
CorruptCheckpointError passes one over; any other error ends the load.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.caller import stop_if_left
from holdfast.config import CheckpointConfig
from holdfast.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    OwnCheckpointsExistError,
    StatePartlyLoadedError,
    reason_inside,
)
from holdfast.filesystem import Filesystem
from holdfast.protocol import SkippedCheckpoint
from holdfast.ranks.coordinator import Coordinator
from holdfast.storage import open_storage
from holdfast.storage.identity import Parent
from holdfast.storage.store import Checkpoint, parse_checkpoint_name
from holdfast.tiers.local.shard_file import find_orphans
from holdfast.tiers.opening import SurveyedStore
from holdfast.tiers.places import find_place, is_foreign, is_other_inside, is_same_directory
from holdfast.tiers.routing import Tiers
from holdfast.tiers.select import (
    Action,
    Asked,
    Choice,
    Commit,
    Condition,
    Refusal,
    Seen,
    choose,
    effective_step,
    object_to,
)
from holdfast.tiers.survey import (
    Survey,
    as_skipped,
    find_supersession,
    list_reasons,
    make_refusal,
    survey_place,
)
from holdfast.tiers.tier import Recorded, Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selected:
    """The candidate that a load tries now."""

    source: Source
    """What opens it."""
    commit: Commit
    action: Action
    is_durable: bool = True
    """Whether the persistent tier has the same commit."""
    skipped: tuple[SkippedCheckpoint, ...] = ()
    """Failed candidates and unusable later iterations, largest iteration first."""

    @property
    def is_own(self) -> bool:
        """Whether it belongs to the run itself."""
        return self.action is Action.LOAD

    @property
    def is_parent(self) -> bool:
        """Whether it belongs to another run, from which this one begins."""
        return self.action is Action.LOAD_PARENT


@dataclass(frozen=True)
class _Decision:
    """What rank 0 tells the others of a choice."""

    action: Action
    commit: Commit
    root: Path
    """Of the store that holds it."""
    is_local: bool
    is_durable: bool
    skipped: tuple[SkippedCheckpoint, ...]


class Search:
    """The candidates of one load, one after another; every rank calls each method."""

    def __init__(
        self,
        config: CheckpointConfig,
        tiers: Tiers,
        filesystem: Filesystem,
        coordinator: Coordinator,
    ) -> None:
        """Look at the run's own checkpoints.

        Raises:
            StoreIdentityError: the store belongs to another run than the one configured.
            ConfigError: settings contradict each other.
        """
        self._config = config
        self._tiers = tiers
        self._filesystem = filesystem
        self._coordinator = coordinator
        self._root = tiers.persistent.store.root
        self._elsewhere: dict[Action, SurveyedStore] = {}
        """Other places that were surveyed so far, by the action that would load from each; on rank
        0, as are the next three."""
        self._orphans: list[tuple[str, int]] = []
        """Runs whose store was lost, each with its newest local iteration."""
        self._tried: list[Commit] = []
        """All commits that were tried and found damaged, in both tiers."""
        self._local: Sequence[Commit] = ()
        """Commits of the local tier at its last survey."""
        self._asked, run_id = coordinator.broadcast("survey", self._survey)
        if coordinator.rank == 0:
            self._warn_of_own()
        self._has_local = config.local.directory is not None and run_id is not None
        if self._has_local:
            assert run_id is not None
            tiers.open_local(run_id, coordinator)

    def next(self, *, touched: bool = False) -> Selected | None:
        """Return the next candidate; None: there is none, and the run starts fresh.

        `touched`: whether live state was overwritten by an earlier try.

        Raises:
            CheckpointNotFoundError: the named checkpoint is missing, or none exists and
                `load.on_missing` is `error`.
            CorruptCheckpointError: the one checkpoint that was named is damaged.
            NoLoadableCheckpointError: checkpoints exist and none can be loaded.
            FormatTooNewError: a later version of holdfast wrote the checkpoint to load.
            OwnCheckpointsExistError: another place is named, and the run has its own checkpoints.
        """
        stop_if_left()
        self._look_at_local()
        decision = self._coordinator.broadcast("select", lambda: self._decide(touched=touched))
        if decision is None:
            return None
        source: Source | None
        if decision.action is not Action.LOAD:
            source = self._elsewhere.get(decision.action) or self._open_store(Survey(decision.root))
        else:
            source = self._tiers.local if decision.is_local else self._tiers.persistent
        assert source is not None
        return Selected(
            source, decision.commit, decision.action, decision.is_durable, decision.skipped
        )

    def _decide(self, *, touched: bool) -> _Decision | None:
        """Choose, on rank 0; None: the run starts fresh. Raises as `next`."""
        while True:
            choice = choose(self._asked, self._seen())
            if choice.action is Action.LOOK_AT_OTHER:
                self._look_at(Action.LOAD_OTHER, self._config.load.directory)
            elif choice.action is Action.LOOK_AT_PARENT:
                self._look_at(Action.LOAD_PARENT, self._config.load.pretrained.directory)
            else:
                break
        if choice.action is Action.START_FRESH:
            return None
        if choice.action is Action.REFUSE:
            raise self._make_error(choice, touched=touched)
        commit, action = choice.commit, choice.action
        assert commit is not None
        is_local = action is Action.LOAD and commit in self._local
        is_durable = not is_local or self._is_durable(commit)
        root, skipped = self._survey_of(action).root, self._list_skipped(commit, action)
        return _Decision(action, commit, root, is_local, is_durable, skipped)

    def pass_over(self, selected: Selected, error: CorruptCheckpointError) -> None:
        """Record why a candidate was not loaded, so that `next` returns another one."""
        commit = selected.source.pass_over(selected.commit, self._coordinator, error)
        if self._coordinator.rank != 0:
            return
        self._tried.append(commit)
        is_one = effective_step(self._asked) is not None or self._survey_of(selected.action).is_one
        if not is_one:
            shown = reason_inside(commit.path, commit.reason)
            logger.warning("%s cannot be loaded and is passed over: %s", commit.path, shown)

    def _list_skipped(self, commit: Commit, action: Action) -> tuple[SkippedCheckpoint, ...]:
        """Return failed candidates and unusable later iterations, largest iteration first."""
        iteration = commit.iteration or 0
        tried = {_identity(each) for each in self._tried}
        passed = [
            each
            for each in self._list_all(action)
            if each.reason
            and (each.iteration is None or each.iteration > iteration)
            and _identity(each) not in tried
        ]
        found = sorted([*passed, *self._tried], key=lambda each: each.iteration or 0, reverse=True)
        return tuple(map(as_skipped, found))

    def warn(self, selected: Selected) -> None:
        """Log warnings about the loaded checkpoint, on rank 0."""
        if self._coordinator.rank != 0:
            return
        iteration = selected.commit.iteration or 0
        tried = {_identity(each) for each in self._tried}
        damaged = [
            each
            for each in self._list_all(selected.action)
            if each.condition is Condition.DAMAGED
            and (each.iteration is None or each.iteration > iteration)
            and _identity(each) not in tried
        ]
        if damaged and effective_step(self._asked) is None:
            logger.warning(
                "iteration %d is loaded although later ones are there, which cannot be: %s",
                iteration,
                "; ".join(list_reasons(damaged)[:3]),
            )
        own = self._own
        if selected.commit in self._local and not own.has_record and not own.commits:
            logger.warning(
                "%s holds nothing of this run; iteration %d is loaded from the local tier alone.\n"
                "If the store was lost, save persistently soon: memory does not survive a power "
                "cut.",
                self._root,
                iteration,
            )

    def resume_from(self, selected: Selected, checkpoint: Checkpoint) -> None:
        """Record on every rank what was loaded; the first save continues from there."""
        manifest, tier = checkpoint.manifest, self._tiers.persistent
        is_own = selected.is_own
        if manifest.run_id:  # else it has no run, and no lineage to continue
            step = effective_step(self._asked) if is_own else None
            tier.resume_from(checkpoint, is_own=is_own, asked_step=step)
        if not is_own:
            what = self._config.load.pretrained.what if selected.is_parent else "everything"
            run_id = manifest.run_id or None
            tier.begin_from(Parent(str(checkpoint.path), run_id, checkpoint.iteration, what))

    # -- what is there ---------------------------------------------------------------------------

    @property
    def _own(self) -> Survey:
        return self._tiers.persistent.surveyed

    def _survey_of(self, action: Action) -> Survey:
        return self._own if action is Action.LOAD else self._elsewhere[action].survey

    def _survey(self) -> tuple[Asked, str | None]:
        """Survey the run's own store, on rank 0; return what is asked for, and the run's id."""
        self._tiers.persistent.look(self._config.load.step)
        asked = self._understand()
        config, own = self._config, self._own
        if config.local.directory is not None and own.run_id is None and config.run_id is None:
            directory = Path(config.local.directory).absolute()
            self._orphans = find_orphans(directory, self._root, self._filesystem)
        return asked, own.run_id or config.run_id

    def _understand(self) -> Asked:
        """Return what the settings ask for, on rank 0."""
        load, config, own = self._config.load, self._config, self._own
        is_other, step = self._understand_directory()
        if is_other and load.pretrained.directory is not None:
            both = "checkpoint.load.directory and checkpoint.load.pretrained.directory"
            raise ConfigError([f"{both} both name where to start; set one of them"])
        applied = [each.number for each in own.attempts if each.asked_step == step]
        return Asked(
            names_other_place=is_other,
            step=step,
            spent_by=applied[-1] if applied and step is not None and not is_other else None,
            pretrained=load.pretrained.directory is not None,
            pretrained_step=load.pretrained.step,
            required=load.on_missing == "error",
            allow_rewind=config.allow_rewind,
        )

    def _understand_directory(self) -> tuple[bool, int | None]:
        """Return whether `load.directory` is another place, and the named own iteration."""
        load = self._config.load
        if load.directory is None:
            return False, load.step
        path = Path(load.directory)
        if is_same_directory(path, self._root):
            return False, load.step
        if is_same_directory(path.parent, self._root) and not is_other_inside(
            path, self._filesystem
        ):
            iteration = parse_checkpoint_name(path.name)
            if iteration is None:
                return False, load.step
            if load.step not in (None, iteration):
                found = f"iteration {iteration}: {path}"
                problem = f"checkpoint.load.step is {load.step}, but load.directory is {found}"
                raise ConfigError([problem])
            return False, iteration
        place = find_place(path, self._filesystem)
        if place is None or not is_same_directory(place.store, self._root):
            return True, load.step
        if place.checkpoint is None:
            return False, load.step
        if is_foreign(open_storage(place.checkpoint, self._filesystem)):
            return True, load.step  # in this store, but of no run
        survey = survey_place(path, self._filesystem)
        (commit,) = survey.commits
        if load.step is not None and load.step != commit.iteration:
            choice = Choice(Action.REFUSE, refusal=Refusal.NOT_THERE, step=load.step)
            raise make_refusal(choice, survey, "load.directory", self._filesystem)
        return False, commit.iteration

    def _look_at(self, action: Action, directory: str | None) -> None:
        assert directory is not None
        step = self._asked.step if action is Action.LOAD_OTHER else self._asked.pretrained_step
        survey = survey_place(Path(directory), self._filesystem, step)
        self._elsewhere[action] = self._open_store(survey)

    def _open_store(self, survey: Survey) -> SurveyedStore:
        return SurveyedStore(survey, open_storage(survey.root, self._filesystem))

    def _look_at_local(self) -> None:
        if self._has_local:
            assert self._tiers.local is not None
            self._local = self._tiers.local.survey(self._coordinator, self._object_to)

    def _object_to(self, record: Recorded) -> str | None:
        superseded = find_supersession(record.attempt, record.iteration, self._own.attempts)
        return object_to(self._asked, record.iteration, superseded)

    def _seen(self) -> Seen:
        other = self._elsewhere.get(Action.LOAD_OTHER)
        parent = self._elsewhere.get(Action.LOAD_PARENT)
        return Seen(
            (*self._own.commits, *self._local),
            None if other is None else other.survey.commits,
            None if parent is None else parent.survey.commits,
        )

    def _list_all(self, action: Action) -> list[Commit]:
        """Return the commits of one place; for the run itself, of both tiers."""
        commits = list(self._survey_of(action).commits)
        if action is Action.LOAD:
            commits += self._local
        return sorted(commits, key=lambda each: each.iteration or 0, reverse=True)

    def _is_durable(self, commit: Commit) -> bool:
        return any(
            (each.iteration, each.sequence) == (commit.iteration, commit.sequence)
            and each.condition is Condition.SOUND
            for each in self._own.commits
        )

    # -- messages --------------------------------------------------------------------------------

    def _warn_of_own(self) -> None:
        asked = self._asked
        if asked.spent_by is not None and not asked.allow_rewind:
            logger.warning(
                "checkpoint.load.step=%s was applied by attempt %d: the run resumes from its "
                "newest checkpoint.\nRemove the setting, or set checkpoint.allow_rewind=true to "
                "go back again.",
                asked.step,
                asked.spent_by,
            )
        for run_id, iteration in self._orphans:
            logger.warning(
                "%s holds no checkpoint, but %s has local ones of run %s that was saved there, up "
                "to iteration %d.\nTo resume from them set checkpoint.run_id=%s; to discard them, "
                "remove %s.",
                self._root,
                self._config.local.directory,
                run_id,
                iteration,
                run_id,
                Path(self._config.local.directory or "") / run_id,
            )

    def _make_error(self, choice: Choice, *, touched: bool) -> CheckpointError:
        load = self._config.load
        if choice.refusal is Refusal.OWN_EXISTS:
            return OwnCheckpointsExistError(str(load.directory), str(self._root), choice.reason)
        if choice.refusal is Refusal.NOTHING:
            return CheckpointNotFoundError(
                f"{self._root} holds no checkpoint, and checkpoint.load.on_missing is error.\n"
                "Name what to start from with checkpoint.load.pretrained.directory, or set "
                "on_missing=start_fresh."
            )
        if self._asked.names_other_place:
            survey, field_name = self._survey_of(Action.LOAD_OTHER), "load.directory"
        elif Action.LOAD_PARENT in self._elsewhere:
            survey, field_name = self._survey_of(Action.LOAD_PARENT), "load.pretrained.directory"
        else:
            survey, field_name = self._own, "load.step"
            survey = replace(survey, commits=(*survey.commits, *self._local))
            if choice.refusal is Refusal.NOT_THERE and not survey.commits:
                return CheckpointNotFoundError(
                    f"{self._root} has no checkpoint of iteration {choice.step}; it has: none."
                )
        if touched and choice.refusal in (Refusal.DAMAGED, Refusal.NONE_LOADABLE):
            commits = [each for each in survey.commits if each.condition is not Condition.SOUND]
            return StatePartlyLoadedError(str(survey.root), list_reasons(commits))
        return make_refusal(choice, survey, field_name, self._filesystem)


def _identity(commit: Commit) -> tuple[str, int | None, int | None]:
    return commit.tier, commit.iteration, commit.sequence
