"""A checkpoint's weights without a run: into a model at hand, or into one that its config builds.

Owns the two functions for evaluation, serving and fine-tuning by hand. Promises what a load of a
manager promises: every rank takes the same checkpoint, damage passes it over where a store was
named, names, shapes and types are compared before anything is touched, and each byte is verified.
Of the files only what the model needs is read. Code that a stored config names runs only where the
caller has allowed it, and before that nothing of it is imported. Writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from holdfast.arguments import check_model
from holdfast.config import expand_path, find_strict_problems
from holdfast.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpointError,
    StatePartlyLoadedError,
    WrongArgumentError,
)
from holdfast.filesystem import Filesystem, LocalFilesystem
from holdfast.opened import Opened, open_selected
from holdfast.protocol import LoadResult, SkippedCheckpoint
from holdfast.ranks.channels import Channels
from holdfast.ranks.coordinator import Coordinator
from holdfast.restoring import Restoration
from holdfast.snapshotting import collection_put_off
from holdfast.state.app import AppState
from holdfast.state.small import Place
from holdfast.state.strategy import LoadStrategy
from holdfast.state.strictness import Strictness
from holdfast.storage import open_storage
from holdfast.tiers.bases import Bases
from holdfast.tiers.opening import SurveyedStore
from holdfast.tiers.select import Action, Asked, Commit, Condition, Seen, choose
from holdfast.tiers.survey import Survey, as_skipped, list_reasons, make_refusal, survey_place

Model = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]


def load_model_weights(
    model: Model,
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    strict: bool | Mapping[str, str] = True,
    pg_collection: Any | None = None,
    timeout_seconds: float = 600.0,
    filesystem: Filesystem | None = None,
) -> LoadResult:
    """Restore a model from a checkpoint, and nothing else; every rank of the job calls it.

    `path`: a store, one checkpoint or `latest`, as in `load.directory`. `step`: the iteration in
    it; None: the newest that can be loaded. `strict`: as `load.strict`. `pg_collection`: as in a
    load's context. The result's `iteration` is the checkpoint's.

    Raises:
        WrongArgumentError: an argument is of the wrong kind.
        CheckpointNotFoundError: the path or the iteration holds no checkpoint.
        NoLoadableCheckpointError, CorruptCheckpointError: those that are there are damaged.
        StateMismatchError: the checkpoint is sound and does not fit this model.
    """
    name = "load_model_weights"
    check_model(name, model)
    loading = _Loading(name, path, step, strict, timeout_seconds, filesystem)
    return loading.load(lambda _: model, pg_collection)


def build_model_from_checkpoint(
    path: str | os.PathLike[str],
    *,
    builder: Any | None = None,
    allow: Sequence[str] = (),
    key: str | None = "model",
    step: int | None = None,
    strict: bool | Mapping[str, str] = True,
    pg_collection: Any | None = None,
    timeout_seconds: float = 600.0,
) -> nn.Module:
    """Build the model that a checkpoint's own config describes, and restore it.

    `builder`: called with the part of the run's config under `key` (None: all of it), as a
    DictConfig; no code that the config names runs. None: that part has a `_target_`, which Hydra's
    `instantiate` calls.
    `allow`: prefixes of dotted paths that the config may name, such as `my_project.models`; without
    a match nothing is imported. The other arguments are those of `load_model_weights`.

    Raises:
        ConfigError: there is no such part, or it names no path, or one that is not allowed.
        CheckpointError: as `load_model_weights`.
    """
    name = "build_model_from_checkpoint"
    if isinstance(allow, str) or not all(isinstance(each, str) for each in allow):
        advice = 'Pass a list of prefixes, such as allow=["my_project.models"].'
        raise WrongArgumentError(name, "allow", f"is {allow!r}", advice)
    if builder is not None and not callable(builder):
        advice = f"Pass what makes the model from the config under {key!r}, such as its class."
        raise WrongArgumentError(name, "builder", f"is {builder!r}", advice)
    built: list[nn.Module] = []

    def build(opened: Opened) -> nn.Module:
        config = _read_part(opened.contents.run_config, key, str(opened.checkpoint.path))
        made: object
        if builder is not None:
            made = builder(config)
        else:
            from holdfast.hydra_schema import instantiate  # imports hydra

            where = f"{opened.checkpoint.path}: {key or 'run config'}"
            made = instantiate(_checked(config, where, allow))
        if not isinstance(made, nn.Module):
            what = builder or config.get("_target_")
            raise ConfigError(
                [f"{key or 'run config'}: {what} made a {type(made).__name__}, not a module"]
            )
        built[:] = [made]
        return made

    _Loading(name, path, step, strict, timeout_seconds, None).load(build, pg_collection)
    return built[0]


def _read_part(content: bytes, key: str | None, path: str) -> DictConfig:
    """Return a part of a stored config, its interpolations resolved.

    Raises:
        ConfigError: it has none, or an interpolation in it cannot be resolved.
    """
    try:
        config = OmegaConf.create(content.decode()) if content.strip() else OmegaConf.create({})
        part = config if key is None else OmegaConf.select(config, key)
        resolved = OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
    except (OmegaConfBaseException, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            [f"{path}: its run config cannot be used at {key!r}: {reason}"]
        ) from error
    if not isinstance(resolved, dict):
        keys = ", ".join(map(str, config)) if isinstance(config, DictConfig) else ""
        problem = (
            f"{path}: its run config has no settings under {key!r} (it has: {keys or 'none'}); "
            "pass key=, or build the model yourself and call load_model_weights"
        )
        raise ConfigError([problem])
    made = OmegaConf.create(resolved)
    assert isinstance(made, DictConfig)
    return made


def _checked(config: DictConfig, where: str, allow: Sequence[str]) -> DictConfig:
    """Return a config of which every path that it names is allowed.

    Raises:
        ConfigError: it names none, or listing those that are not allowed.
    """
    named = dict(_targets(OmegaConf.to_container(config), ""))
    if "_target_" not in config:
        raise ConfigError(
            [f"{where} has no _target_, so it names nothing that builds a model; pass builder="]
        )
    refused = [
        f"{where}{place}._target_ is {path!r}, which the caller has not allowed; nothing was "
        "imported. Pass allow=[...] with its package if you trust its code, or builder="
        for place, path in named.items()
        if not (isinstance(path, str) and any(_begins(path, each) for each in allow))
    ]
    if refused:
        raise ConfigError(refused)
    return config


def _begins(path: str, prefix: str) -> bool:
    """Whether a dotted path begins with a prefix, in whole parts."""
    allowed = prefix.removesuffix(".").split(".")
    return path.split(".")[: len(allowed)] == allowed


def _targets(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield place, value["_target_"]
        for key, each in value.items():
            yield from _targets(each, f"{place}.{key}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _targets(each, f"{place}[{number}]")


def _check_place(name: str, path: Any, step: Any) -> None:
    """Refuse what names no checkpoint; `name`: of the function that was called.

    Raises:
        WrongArgumentError: naming the argument.
    """
    if not isinstance(path, str | os.PathLike):
        found = f"is of type {type(path).__name__}"
        raise WrongArgumentError(name, "path", found, "Pass the directory of a checkpoint.")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise WrongArgumentError(name, "step", f"is {step!r}", "Pass an iteration, or None.")


class _Loading:
    """The candidates of one place, tried in order on all ranks."""

    def __init__(
        self,
        name: str,
        path: str | os.PathLike[str],
        step: int | None,
        strict: bool | Mapping[str, str],
        timeout_seconds: float,
        filesystem: Filesystem | None,
    ) -> None:
        """`name`: of the function, for messages."""
        _check_place(name, path, step)
        if problems := find_strict_problems(strict, "strict"):
            found = problems[0].removeprefix("strict ")
            raise WrongArgumentError(name, "strict", found, "Pass true, false, or a table.")
        self._name = name
        self._path = Path(expand_path(path)).absolute()
        self._asked = Asked(names_other_place=True, step=step)
        self._strictness = Strictness.of(strict)
        self._filesystem = filesystem or LocalFilesystem()
        self._channels = Channels(1, timeout_seconds, name)
        self._source: SurveyedStore | None = None
        """Surveyed on rank 0 alone."""
        self._tried: list[Commit] = []

    def load(self, find_model: Callable[[Opened], Model], pg_collection: Any | None) -> LoadResult:
        """Restore what `find_model` returns, on every rank, from the first candidate that can be.

        `find_model` is called once for each candidate, on every rank.
        """
        entry = f"{self._name} from {self._path}", f"step={self._asked.step}"
        self._channels.begin_call("arrive", lambda: entry, lambda: None, None, ())
        (control,) = self._channels.open()
        place = Place.of(control.rank, control.world_size, pg_collection)
        touched = False
        while True:
            choose_next = partial(self._choose, touched=touched)
            commit, root, skipped = control.broadcast("select", choose_next)
            source = self._source or self._open(Survey(root))
            try:
                with collection_put_off():
                    opened = open_selected(
                        source,
                        commit,
                        control,
                        place,
                        verify_first=False,
                        bases=Bases(filesystem=self._filesystem),
                        model_only=True,
                    )
                    restoration = self._compare(find_model, opened, place, pg_collection, control)
                    restoration.prepare(control)
                    touched = True
                    restoration.fill(control)
            except CorruptCheckpointError as error:
                self._tried.append(source.pass_over(commit, control, error))
                continue
            control.all_reduce("apply", restoration.apply, lambda _: None)
            return LoadResult(
                iteration=opened.checkpoint.iteration,
                found=True,
                tier=opened.checkpoint.manifest.tier,
                path=opened.checkpoint.path,
                skipped=skipped,
                sources=opened.contents.sources(),
                restored=restoration.restored,
                is_durable=True,
            )

    def _compare(
        self,
        find_model: Callable[[Opened], Model],
        opened: Opened,
        place: Place,
        pg_collection: Any | None,
        control: Coordinator,
    ) -> Restoration:
        models: list[Model] = []
        control.all_reduce("build", lambda: models.append(find_model(opened)), lambda _: None)
        restoration = Restoration(
            opened,
            AppState(models[0], None, None, None, place, pg_collection),
            None,
            place,
            with_tensors=True,
            overrides=None,
            strategy=LoadStrategy(),
        )
        restoration.agree_on_shardings(control)
        restoration.compare(control, self._strictness, accept_data_restart=True)
        return restoration

    def _open(self, survey: Survey) -> SurveyedStore:
        return SurveyedStore(survey, open_storage(survey.root, self._filesystem))

    def _choose(self, *, touched: bool) -> tuple[Commit, Path, tuple[SkippedCheckpoint, ...]]:
        """Choose on rank 0.

        Raises:
            CheckpointError: nothing can be loaded.
        """
        if self._source is None:
            survey = survey_place(self._path, self._filesystem, self._asked.step)
            self._source = self._open(survey)
        survey = self._source.survey
        choice = choose(self._asked, Seen(other=survey.commits))
        if choice.commit is None or choice.action is Action.REFUSE:
            raise self._make_error(choice, survey, touched=touched)
        skipped = tuple(as_skipped(each) for each in reversed(self._tried))
        # Errors stay here: they are for a refusal, which this rank makes.
        return replace(choice.commit, error=None), survey.root, skipped

    def _make_error(self, choice: Any, survey: Survey, *, touched: bool) -> CheckpointError:
        if touched:
            commits = [each for each in survey.commits if each.condition is not Condition.SOUND]
            return StatePartlyLoadedError(str(survey.root), list_reasons(commits))
        return make_refusal(choice, survey, None, self._filesystem, caller=self._name)
