"""Everything under configs/ composes to valid dataclasses and steps into none of Hydra's traps."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf

from complaints import condense
from holdfast import CheckpointConfig, hydra_schema
from holdfast.errors import ConfigError
from run_config import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONFIGS.glob("*/*.yaml"))
OVERLAYS = sorted(path.stem for path in (CONFIGS / "recipe").glob("*.yaml"))
NEEDED = {"data=files": ["data.paths=[text.txt]"]}
"""What an option cannot do without."""


@pytest.fixture(autouse=True)
def composing() -> Iterator[None]:
    """Stand where the program stands when Hydra begins."""
    hydra_schema.register()
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def _compose(*overrides: str) -> RunConfig:
    config = OmegaConf.to_object(compose("pretrain", list(overrides)))
    assert isinstance(config, RunConfig)
    return config


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option: str) -> None:
    """Each choice of each group is a valid run, with dataclasses all the way down."""
    config = _compose(option, *NEEDED.get(option, []))
    config.validate()
    assert type(config.checkpoint) is CheckpointConfig


def test_there_are_the_groups_that_people_choose_from() -> None:
    """The table above is not empty by accident."""
    assert {option.split("=")[0] for option in OPTIONS} == {
        "model", "data", "parallel", "checkpoint", "optim", "recipe",
    }  # fmt: skip
    assert OVERLAYS == [
        "crash_drill", "custom_manager", "lost_node", "quickstart", "resume_elsewhere", "tiered",
    ]  # fmt: skip


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_changes_the_run_and_gives_way_to_the_command_line(overlay: str) -> None:
    """Overlays are merged at the top, over the defaults and under what is typed."""
    assert _compose(f"recipe={overlay}").run_dir == _overlay(overlay)["run_dir"]
    typed = _compose(f"recipe={overlay}", "run_dir=mine", "model=medium")
    assert typed.run_dir == "mine"
    assert typed.checkpoint.persistent.directory == "mine/checkpoints"
    assert typed.model == _compose("model=medium").model


def test_two_tiers_are_one_word() -> None:
    """`checkpoint=tiered` saves often to memory, in a directory of each user's own."""
    tiered = _compose("checkpoint=tiered").checkpoint
    assert (tiered.local.save_interval, tiered.persistent.save_interval) == (20, 200)
    assert str(tiered.local.directory).startswith("/dev/shm/holdfast-")
    assert tiered.persistent.directory == "runs/pretrain/checkpoints"
    assert _compose("recipe=lost_node").checkpoint.local.replication.factor == 2
    assert _compose("recipe=lost_node", "checkpoint.local.directory=here").checkpoint.local == (
        dataclasses.replace(_compose("recipe=lost_node").checkpoint.local, directory="here")
    )


def test_a_run_directory_is_never_named_by_the_clock() -> None:
    """The same command finds its run again, and Hydra leaves nothing behind per process."""
    for path in CONFIGS.rglob("*.yaml"):
        assert "now:" not in path.read_text()
    composed = compose("pretrain", return_hydra_config=True)
    assert composed.hydra.output_subdir is None
    assert composed.hydra.run.dir == "."
    assert composed.hydra.job.chdir is False
    assert "file" not in (composed.hydra.job_logging.get("handlers") or {})


def test_the_schema_is_registered_only_when_asked() -> None:
    """Importing the module has no effect; registering twice has that of once."""
    repository = ConfigStore.instance().repo
    del repository["checkpoint"]
    importlib.reload(hydra_schema)
    assert "checkpoint" not in repository
    hydra_schema.register()
    hydra_schema.register()
    assert _compose().checkpoint.persistent.keep.last == 3


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("checkpoint.local.keep.last=5", "local.keep.last", 5),
        ("checkpoint.local.replication.jump=2", "local.replication.jump", 2),
        ("checkpoint.persistent.keep.last=null", "persistent.keep.last", None),
        ("checkpoint.load.step=7", "load.step", 7),
        ("checkpoint.on_save_failure=raise", "on_save_failure", "raise"),
        ("checkpoint.custom_manager_allowlist=[a.,b.]", "custom_manager_allowlist", ["a.", "b."]),
        ("+checkpoint.options.depth={of: 2}", "options", {"depth": {"of": 2}}),
        ("checkpoint.timeout_seconds=5", "timeout_seconds", 5.0),
    ],
)
def test_every_node_can_be_reached_from_the_command_line(
    override: str, path: str, expected: object
) -> None:
    """Nodes that are off stay nodes; `raise` is a text; lists and free options pass."""
    value: object = _compose(override).checkpoint
    for name in path.split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_no_file_leaves_a_value_to_be_given() -> None:
    """`???` in an overlay never overrides: what has to be given is checked by the program."""
    for path in CONFIGS.rglob("*.yaml"):
        assert "???" not in path.read_text()


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["stepz=1"], ["stepz: there is no such setting", "Did you mean steps?"]),
        (["checkpoint.foo=1"], ["checkpoint.foo: there is no such setting", "async_save"]),
        (
            ["checkpoint.persistent.keep.lst=1"],
            ["keep.lst", "Did you mean checkpoint.persistent.keep.last?"],
        ),
        (["checkpoint.keep.last=3"], ["Did you mean checkpoint.persistent.keep.last?"]),
        (["learning_rate=3"], ["Did you mean optim.learning_rate?"]),
        (["checkpoint.options.x=1"], ["write +checkpoint.options.x=..."]),
        (["steps=soon"], ["steps: Value 'soon'"]),
        (
            ["checkpoint.persistent=3"],
            ["checkpoint.persistent: this is a group of settings", "directory, save_interval"],
        ),
        (
            ["checkpoint.load.pretrained=runs/x"],
            ["Did you mean checkpoint.load.pretrained.directory?", "directory, step, what"],
        ),
        (["pretrained=runs/x"], ["Did you mean checkpoint.load.pretrained.directory?"]),
        (["lr=0.1"], ["lr: there is no such setting", "Did you mean optim.learning_rate?"]),
        (["model=huge"], ["model=huge: there is no such choice", "medium, small, tiny"]),
        (["recipe=nope"], ["quickstart"]),
        (["data.paths=[a"], ["[a"]),
    ],
)
def test_what_hydra_refuses_is_told_in_three_lines(overrides: list[str], wanted: list[str]) -> None:
    """The message names the field, and the choices where there are any."""
    message = _refusal("pretrain", overrides)
    assert len(message.splitlines()) <= 3
    for each in wanted:
        assert each in message


def test_a_suggestion_is_a_setting_of_the_recipe_at_hand() -> None:
    """The known settings are those of the config that was composed, without Hydra's own."""
    message = _refusal("minimal", ["lr=0.1"])
    assert "Did you mean learning_rate?" in message
    assert "hydra" not in message


def _refusal(name: str, overrides: list[str]) -> str:
    with pytest.raises(HydraException) as refused:
        compose(name, overrides)
    return condense(refused.value)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("steps=0", "steps is 0; it must be above 0"),
        ("batch_size=-1", "batch_size is -1"),
        ("seed=-1", "seed is -1"),
        ("model.width=33", "model.width is 33; it must be an even multiple of model.heads=3"),
        ("model.heads=0", "model.heads is 0"),
        ("model.dropout=1", "model.dropout is 1.0"),
        ("data=files", "data.paths is []; name files"),
        ("data.validation_fraction=0", "data.validation_fraction is 0.0"),
        ("optim.name=lion", "optim.name is 'lion'; choose one of adamw, sgd"),
        ("parallel.device=tpu", "parallel.device is 'tpu'"),
        ("crash_during_save=true", "crash_at_step is None"),
        ("checkpoint.persistent.save_interval=-5", "save_interval is -5; it must be above 0"),
        ("checkpoint.staging=sometimes", "checkpoint.staging is 'sometimes'"),
        ("checkpoint.load.strict=maybe", "checkpoint.load.strict is 'maybe'"),
    ],
)
def test_impossible_values_are_named(override: str, problem: str) -> None:
    """What types allow and sense forbids is refused before anything is built."""
    with pytest.raises(ConfigError) as refused:
        _compose(override).validate()
    assert problem in condense(refused.value)


def test_all_problems_come_at_once() -> None:
    """One message lists them; beyond three lines it says how many more there are."""
    config = _compose("steps=0", "batch_size=0", "seed=-1", "run_dir=''")
    with pytest.raises(ConfigError) as refused:
        config.validate()
    assert len(refused.value.problems) == 4
    lines = condense(refused.value).splitlines()
    assert len(lines) == 3
    assert lines[-1] == "and 2 more such problems"


def _overlay(name: str) -> dict[str, object]:
    loaded = OmegaConf.to_container(OmegaConf.load(CONFIGS / "recipe" / f"{name}.yaml"))
    assert isinstance(loaded, dict)
    return {str(key): value for key, value in loaded.items()}
