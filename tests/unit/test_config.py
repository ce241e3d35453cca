"""Configuration: what is accepted, and that everything wrong is said at once with its path."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields
from typing import Any

import pytest

from holdfast.config import (
    CheckpointConfig,
    KeepConfig,
    LocalConfig,
    PersistentConfig,
    ReplicationConfig,
)
from holdfast.errors import CheckpointError, ConfigError


def _nest(path: str, value: Any) -> dict[str, Any]:
    """Turn `"load.step", 5` into `{"load": {"step": 5}}`."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def _set(config: CheckpointConfig, path: str, value: Any) -> CheckpointConfig:
    *parents, last = path.split(".")
    node: Any = config
    for name in parents:
        node = getattr(node, name)
    setattr(node, last, value)
    return config


def test_defaults_are_sound_and_those_of_the_documentation() -> None:
    """The defaults validate without a warning and are the documented ones."""
    config = CheckpointConfig()
    config.validate()
    assert config == CheckpointConfig.from_mapping({})
    assert (config.custom_manager_class, config.custom_manager_allowlist) == (None, None)
    assert (config.async_save, config.staging, config.on_save_failure) == (
        True,
        "blocking",
        "raise",
    )
    assert (config.timeout_seconds, config.run_id, config.options) == (600.0, None, {})
    assert (config.persistent.save_interval, config.persistent.keep.last) == (1000, 3)
    assert (config.local.directory, config.local.keep.last) == (None, 2)
    assert (config.local.replication.factor, config.local.replication.jump) == (1, None)
    assert (config.load.step, config.load.strict) == (None, True)
    assert (config.load.verify, config.load.on_missing) == ("while_reading", "start_fresh")
    assert config.load.accept_data_restart is False


def test_no_two_configs_share_a_mutable_default() -> None:
    """Changing one config leaves the next one alone."""
    first = CheckpointConfig()
    first.options["x"] = 1
    first.persistent.keep.last = 99
    assert CheckpointConfig().options == {}
    assert CheckpointConfig().persistent.keep.last == 3


def test_a_mapping_reaches_every_level() -> None:
    """A nested mapping sets what it names and leaves the rest at the defaults."""
    config = CheckpointConfig.from_mapping(
        {
            "async_save": False,
            "timeout_seconds": 5,
            "persistent": {"directory": "/scratch/run", "keep": {"last": None}},
            "load": {"step": 0, "on_missing": "error"},
        }
    )
    assert config.async_save is False
    assert config.timeout_seconds == 5
    assert config.persistent == PersistentConfig("/scratch/run", 1000, KeepConfig(None))
    assert (config.load.step, config.load.on_missing, config.load.strict) == (0, "error", True)


IMPOSSIBLE = [
    ("staging", "async", "is 'async'; choose one of blocking, overlapped"),
    ("on_save_failure", "ignore", "is 'ignore'; choose one of raise, warn"),
    ("replicas.audit_fraction", -0.5, "is -0.5; it must be 0, or from 1/4096 to 1"),
    ("replicas.audit_fraction", 1.5, "is 1.5; it must be 0, or from 1/4096 to 1"),
    ("replicas.audit_fraction", 1e-9, "is 1e-09; it must be 0, or from 1/4096 to 1"),
    ("replicas.audit_fraction", math.nan, "is nan; it must be 0, or from 1/4096 to 1"),
    ("load.verify", "no", "is 'no'; choose one of while_reading, first"),
    ("load.on_missing", "", "is ''; choose one of start_fresh, error"),
    ("timeout_seconds", 0, "must be above 0 and finite"),
    ("timeout_seconds", -1.5, "must be above 0 and finite"),
    ("timeout_seconds", math.inf, "must be above 0 and finite"),
    ("timeout_seconds", math.nan, "must be above 0 and finite"),
    ("persistent.save_interval", 0, "is 0; it must be above 0, or null"),
    ("persistent.save_interval", -5, "is -5; it must be above 0, or null"),
    ("persistent.keep.last", 0, "is 0; it must be above 0, or null"),
    ("local.save_interval", -1, "is -1; it must be above 0, or null"),
    ("local.keep.last", 0, "is 0; it must be above 0, or null"),
    ("local.replication.factor", 0, "must be at least 1"),
    ("local.replication.jump", 0, "is 0; it must be above 0, or null"),
    ("local.replication.transport", "mpi", "is 'mpi'; choose one of gloo, nccl"),
    ("load.step", -1, "must be 0 or more, or null"),
    ("run_id", "", "is ''; use 1 to 64 letters"),
    ("run_id", ".hidden", "is '.hidden'; use 1 to 64 letters"),
    ("run_id", "a/b", "is 'a/b'; use 1 to 64 letters"),
    ("run_id", "x" * 65, "use 1 to 64 letters"),
    ("run_id", "caf\u00e9", "use 1 to 64 letters"),
    ("persistent.directory", "  ", "is empty; name a directory or use null"),
    ("persistent.directory", "s3://bucket/run", "mounted file systems only"),
    ("load.directory", "", "is empty; name a directory or use null"),
    ("load.directory", "gs://bucket", "mounted file systems only"),
    ("local.directory", "s3://bucket/x", "name a path on this node"),
    ("local.directory", " ", "is empty"),
]

MISTYPED = [
    ("persistent.save_interval", True, "is True; it must be a whole number or null"),
    ("persistent.save_interval", "100", "is '100'; it must be a whole number or null"),
    ("persistent.save_interval", 2.5, "is 2.5; it must be a whole number or null"),
    ("timeout_seconds", True, "is True; it must be a number"),
    ("timeout_seconds", None, "is None; it must be a number"),
    ("async_save", 1, "is 1; it must be true or false"),
    ("load.strict", "yes", "is 'yes'; it must be true or false"),
    ("load.step", False, "is False; it must be a whole number or null"),
    ("staging", None, "is None; it must be a string"),
    ("custom_manager_class", 5, "is 5; it must be a string or null"),
    ("custom_manager_allowlist", "mypkg", "is 'mypkg'; it must be a list of strings or null"),
    ("custom_manager_allowlist", [1], "is [1]; it must be a list of strings or null"),
    ("options", [1], "is [1]; it must be a mapping"),
    ("options", {1: "x"}, "is {1: 'x'}; it must be a mapping"),
]


@pytest.mark.parametrize(("path", "value", "rule"), IMPOSSIBLE + MISTYPED)
@pytest.mark.parametrize("road", ["mapping", "attributes"])
def test_a_bad_value_is_named_by_its_path(road: str, path: str, value: Any, rule: str) -> None:
    """One bad value gives one problem that starts with the path of its field, by either road."""
    configure = {
        "mapping": lambda: CheckpointConfig.from_mapping(_nest(path, value)),
        "attributes": lambda: _set(CheckpointConfig(), path, value).validate(),
    }
    with pytest.raises(ConfigError) as caught:
        configure[road]()
    (problem,) = caught.value.problems
    assert problem.startswith(f"checkpoint.{path} ")
    assert rule in problem
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CheckpointError)


ACCEPTED = [
    ("persistent.save_interval", None),
    ("persistent.keep.last", 1),
    ("persistent.directory", "relative/path"),
    ("load.step", 0),
    ("timeout_seconds", 1),
    ("run_id", "Run-7_b.2"),
    ("replicas.audit_fraction", 0),
    ("replicas.audit_fraction", 1),
    ("on_save_failure", "warn"),
    ("load.verify", "first"),
    ("custom_manager_class", "mypkg.module.Manager"),
]


@pytest.mark.parametrize(("path", "value"), ACCEPTED)
def test_a_good_value_is_taken_without_a_warning(path: str, value: Any) -> None:
    """Values at the edge of what is allowed pass, silently."""
    config = CheckpointConfig.from_mapping(_nest(path, value))
    assert config == _set(CheckpointConfig(), path, value)
    config.validate()


def test_all_problems_of_a_mapping_are_reported_together() -> None:
    """Unknown names, wrong types and impossible values at every depth come in one error."""
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig.from_mapping(
            {
                "asynch_save": True,
                "staging": "async",
                "persistent": {"save_interval": -5, "keep": {"first": 1}},
                "load": {"step": "latest"},
                "local": None,
            }
        )
    paths = {problem.split(" ")[0] for problem in caught.value.problems}
    assert paths == {
        "checkpoint.asynch_save",
        "checkpoint.staging",
        "checkpoint.persistent.save_interval",
        "checkpoint.persistent.keep.first",
        "checkpoint.load.step",
        "checkpoint.local",
    }
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_all_problems_of_an_object_are_reported_together() -> None:
    """A value of the wrong type does not hide an impossible value beside it, nor change it."""
    config = CheckpointConfig(staging="async")
    config.persistent.save_interval = True
    config.load.step = -1
    config.local = "/dev/shm"  # type: ignore[assignment]  # the mistake under test
    with pytest.raises(ConfigError) as caught:
        config.validate()
    paths = {problem.split(" ")[0] for problem in caught.value.problems}
    assert paths == {
        "checkpoint.staging",
        "checkpoint.persistent.save_interval",
        "checkpoint.load.step",
        "checkpoint.local",
    }
    assert config.persistent.save_interval is True


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("nonsense", CheckpointConfig),
        ("persistent.nonsense", PersistentConfig),
        ("persistent.keep.nonsense", KeepConfig),
        ("local.nonsense", LocalConfig),
        ("local.replication.nonsense", ReplicationConfig),
    ],
)
def test_an_unknown_field_lists_the_known_ones(path: str, known: type[Any]) -> None:
    """A misspelt name is an error that lists every name its section has."""
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig.from_mapping(_nest(path, 1))
    (problem,) = caught.value.problems
    assert problem.startswith(f"checkpoint.{path} is unknown; checkpoint")
    assert problem.endswith(" has " + ", ".join(each.name for each in fields(known)))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"keep": {"last": 3}}, "keep is unknown; did you mean checkpoint.persistent.keep.last?"),
        ({"keep": 3}, "keep is unknown; did you mean checkpoint.persistent.keep.last?"),
        ({"replication": {"factor": 2}}, "did you mean checkpoint.local.replication.factor?"),
        ({"persistent": {"keep_last": 3}}, "did you mean checkpoint.persistent.keep.last?"),
        ({"persistent": {"dir": "x"}}, "checkpoint.persistent has directory, save_interval"),
        ({"persistent": {"facter": 2}}, "did you mean checkpoint.local.replication.factor?"),
        ({"load": {"stric": True}}, "did you mean checkpoint.load.strict?"),
        ({"async": True}, "checkpoint has custom_manager_class,"),
        ({"asyncsave": True}, "did you mean checkpoint.async_save?"),
        ({"verify": "first"}, "did you mean checkpoint.load.verify?"),
        ({"persistent.keep.last": 3}, 'nest it: {"persistent": {"keep": {"last": ...}}}'),
    ],
)
def test_an_unknown_field_is_answered_with_the_one_that_was_meant(
    values: dict[str, Any], told: str
) -> None:
    """A section left out, another separator, a letter too few: the dotted path is shown."""
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig.from_mapping(values)
    assert told in str(caught.value)


@pytest.mark.parametrize("values", [None, "checkpoint.yaml", [("staging", "blocking")]])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    """Only a mapping is taken for a configuration."""
    with pytest.raises(ConfigError, match=r"^checkpoint is .*; it must be a mapping$"):
        CheckpointConfig.from_mapping(values)


INERT = [
    ({"staging": "overlapped", "async_save": False}, "checkpoint.staging=overlapped"),
    ({"local": {"save_interval": 10}}, "checkpoint.local.save_interval"),
    ({"local": {"replication": {"factor": 2}}}, "checkpoint.local.replication.factor"),
    (
        {"local": {"replication": {"transport": "nccl"}}},
        "checkpoint.local.replication.transport",
    ),
    ({"options": {"bucket": "x"}}, "checkpoint.options"),
    ({"custom_manager_allowlist": ["mypkg"]}, "checkpoint.custom_manager_allowlist"),
]


@pytest.mark.parametrize(("values", "setting"), INERT)
def test_a_setting_without_effect_is_warned_about(values: dict[str, Any], setting: str) -> None:
    """A known setting that changes nothing is named in one warning that says why."""
    with pytest.warns(UserWarning, match=setting) as caught:
        CheckpointConfig.from_mapping(values)
    (warning,) = caught
    assert str(warning.message).startswith(f"setting without effect: {setting}: ")
    assert warning.filename == __file__  # it points at whoever asked for the config


def test_settings_of_a_custom_manager_have_effect() -> None:
    """With a custom manager, options and allow-list are silent."""
    CheckpointConfig.from_mapping(
        {
            "custom_manager_class": "mypkg.Manager",
            "custom_manager_allowlist": ["mypkg"],
            "options": {"bucket": "x"},
        }
    )


def test_a_refused_config_does_not_warn_as_well() -> None:
    """The errors come first; a warning beside them would only distract."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError):
            CheckpointConfig.from_mapping({"staging": "overlapped", "load": {"step": -1}})
