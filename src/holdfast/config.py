"""The settings of checkpoints: plain dataclasses with types, checks and safe defaults.

Owns every setting, its meaning and its limits. Promises that all problems of a configuration are
reported at once, each with the path of its field, and that a setting without effect given the
others causes a warning. Does not depend on Hydra (`hydra_schema` registers these classes) and reads
no files. `null` means off: there are no `enabled` flags.
"""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import ConfigError
from holdfast.settings import SettingsReader

STAGINGS = ("blocking", "overlapped")
FAILURE_POLICIES = ("raise", "warn")
MISMATCH_POLICIES = ("raise", "per_rank", "rank0")
VERIFY_MODES = ("while_reading", "first")
MISSING_POLICIES = ("start_fresh", "error")
PERMISSIONS = ("private", "umask")
TRANSPORTS = ("gloo", "nccl")
PRETRAINED_PARTS = ("weights", "everything")
STRICT_SUBJECTS = ("names", "shapes", "dtypes", "groups", "options", "components")
STRICT_ACTIONS = RAISE, WARN, IGNORE = ("raise", "warn", "ignore")
FILTER_WORDS = ("trainable", "adapters")
_PATH_FIELDS = (
    "persistent.directory",
    "local.directory",
    "load.directory",
    "load.pretrained.directory",
)
_UNSET_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
_OVERRIDABLE = ("optimizer", "scheduler", "data", "rng", "train_state")
_WITH_PARTS = ("optimizer", "train_state", "components")


@dataclass
class KeepConfig:
    """Which committed checkpoints are kept; the newest and the tracker's target always are."""

    last: int | None = 3
    """How many of the newest to keep, by order of commit. None: all of them."""


@dataclass
class PersistentConfig:
    """The durable tier: a store of torch.distributed.checkpoint directories on a shared disk."""

    directory: str | None = None
    save_interval: int | None = 1000
    """Iterations between saves, for loops that read it. None: no periodic save."""
    keep: KeepConfig = field(default_factory=KeepConfig)
    from_local: bool = False
    """Whether a save is committed locally first and promoted from there in the background, while
    local saves continue. Needs a local tier in RAM; otherwise both are written before the next."""
    write_mib_per_second: float | None = None
    """Write limit of each rank, to leave bandwidth to other jobs. None: no limit."""

    @property
    def write_bytes_per_second(self) -> float | None:
        """The same limit in bytes."""
        return None if self.write_mib_per_second is None else self.write_mib_per_second * 2**20


@dataclass
class LocalKeepConfig:
    """As `KeepConfig`, for the local tier."""

    last: int | None = 2


@dataclass
class ReplicationConfig:
    """Copies of each local shard file on other nodes."""

    factor: int = 1
    """Total number of copies; 1: no replication."""
    jump: int | None = None
    """Distance in ranks between the holders of one shard. None: computed from the host names."""
    transport: str = "gloo"
    """How copies are sent: `gloo`, from host memory; `nccl`, through each rank's GPU."""


@dataclass
class LocalConfig:
    """The fast tier on a node's own disk or RAM."""

    directory: str | None = None
    """None: no local tier."""
    save_interval: int | None = None
    keep: LocalKeepConfig = field(default_factory=LocalKeepConfig)
    replication: ReplicationConfig = field(default_factory=ReplicationConfig)


@dataclass
class PretrainedConfig:
    """The checkpoint that a run starts from while it has none of its own in any tier."""

    directory: str | None = None
    """A store or one checkpoint of another run. None: the run starts from its own model."""
    step: int | None = None
    """The iteration to load, and no other. None: the newest that can be loaded."""
    what: str = "weights"
    """`weights`: the model only, with fresh counters, optimizer, scheduler, data and random
    numbers; `everything`: as if that run continued."""


@dataclass
class ReplicasConfig:
    """How what several ranks hold alike is compared."""

    audit_fraction: float = 1 / 32
    """The share of all blocks that each save compares, in rotation, once a value has changed since
    it was first compared. 0: no rotation; 1: everything in every save."""


@dataclass
class LoadConfig:
    """Which checkpoint a load takes and how strictly."""

    directory: str | None = None
    """A store, or one `iter_*` directory of it. None, or the persistent tier's own directory in any
    spelling: the newest checkpoint of this run, in either tier."""
    step: int | None = None
    """The iteration to load, and no other; applied once per run. None: the newest that can be
    loaded."""
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)
    strict: Any = True
    """Whether names and types must be the same; or a table: `raise`, `warn` or `ignore` for any of
    `names`, `shapes`, `dtypes`, `groups`, `options`, `components`."""
    guard: str | None = None
    """What must agree before any tensor is read: `model_config`, the `model` part of the run's
    config, or `package.module.function` of the facts of both sides. None: nothing."""
    verify: str = "while_reading"
    """`while_reading`: in the pass that fills the tensors, if possible; `first`: before it."""
    broadcast: bool = False
    """Whether a tensor that every rank needs in full is read by one rank and sent to the others."""
    on_missing: str = "start_fresh"
    """What to do with an empty store: `start_fresh` or `error`."""
    accept_data_restart: bool = False
    """Whether data that cannot be resharded to another data-parallel size may start over."""
    rng: bool = True
    """Whether random number generators are restored."""
    strategy: Any = None
    """Which parts are restored: a mapping of the fields of `holdfast.LoadStrategy`. None: all."""
    override: list[str] = field(default_factory=list)
    """State that keeps its live value: `optimizer.<option>`, `optimizer`, `scheduler`, `data`,
    `rng`, `train_state` (except its step), `train_state.<field>`, `components.<name>`."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """All settings of a checkpoint manager."""

    custom_manager_class: str | None = None
    """`package.module.Class` of the manager to use; None: holdfast's own. This runs its code."""
    custom_manager_allowlist: list[str] | None = None
    """Prefixes that `custom_manager_class` must match; None: any."""
    options: dict[str, Any] = field(default_factory=dict)
    """Free-form, for custom managers."""
    run_id: str | None = None
    """None: the one in the store's run.json, or a fresh one."""
    async_save: bool = True
    """Whether `save` returns once the snapshot is taken and a thread writes it."""
    staging: str = "blocking"
    """`blocking` copies before `save` returns; `overlapped` copies what only an optimizer step
    changes during the next forward and backward, and each optimizer's step waits for it."""
    on_save_failure: str = "raise"
    """`raise` ends the run with the error; `warn` continues without that checkpoint."""
    save_failure_limit: int | None = 3
    """With `warn`: raise at this many consecutive failures of one tier. None: no limit."""
    on_replica_mismatch: str = "raise"
    """What to do if ranks hold different values under one name: `raise` refuses the save;
    `per_rank` saves each rank's own copy; `rank0` saves what the lowest rank holds, and warns."""
    allow_rewind: bool = False
    """Whether a save may have a lower step than the one last loaded or saved; it then supersedes
    the checkpoints of higher steps."""
    alarm_after_seconds: float | None = None
    """How long nothing may be committed to the persistent tier before rank 0 warns, at growing
    intervals. None: three measured save intervals, at least a minute; infinite: never."""
    alarm_stops: bool = False
    """Whether the next save after that limit raises on all ranks."""
    save_filter: str | None = None
    """What is saved of the model: `trainable`, `adapters`, or `package.module.function` of name,
    shape and requires_grad; the rest is in the checkpoint that the run began from. None: all."""
    permissions: str = "private"
    """Who may read created files: `private`, only the owner; `umask`, as the umask allows."""
    timeout_seconds: float = 600.0
    """How long ranks wait for each other in a stage."""
    persistent: PersistentConfig = field(default_factory=PersistentConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    load: LoadConfig = field(default_factory=LoadConfig)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> CheckpointConfig:
        """Build and validate from a nested mapping, for use without Hydra.

        Raises:
            ConfigError: with all unknown fields, wrong types and impossible values.
        """
        problems: list[str] = []
        config: CheckpointConfig = _READER.build(values, problems)
        problems += config.problems()
        if problems:
            raise ConfigError(problems)
        config.warn_without_effect()
        return config

    def validate(self) -> None:
        """Check every value and warn about every setting without effect.

        Raises:
            ConfigError: with all problems at once.
        """
        problems: list[str] = []
        sound = _READER.check(self, problems)
        problems += sound.problems()
        if problems:
            raise ConfigError(problems)
        self.warn_without_effect()

    def problems(self) -> list[str]:
        """Return a message per impossible value, assuming correct types; empty: none."""
        found: list[str] = []

        def require(holds: bool, path: str, rule: str) -> None:
            if not holds:
                found.append(f"checkpoint.{path} {rule}")

        def require_choice(value: str, path: str, choices: tuple[str, ...]) -> None:
            require(value in choices, path, f"is {value!r}; choose one of {', '.join(choices)}")

        def require_positive(value: float | None, path: str) -> None:
            require(value is None or value > 0, path, f"is {value}; it must be above 0, or null")

        require_choice(self.staging, "staging", STAGINGS)
        require_choice(self.on_save_failure, "on_save_failure", FAILURE_POLICIES)
        require_choice(self.on_replica_mismatch, "on_replica_mismatch", MISMATCH_POLICIES)
        fraction = self.replicas.audit_fraction
        require(
            fraction == 0 or 1 / 4096 <= fraction <= 1,
            "replicas.audit_fraction",
            f"is {fraction}; it must be 0, or from 1/4096 to 1",
        )
        require_choice(self.permissions, "permissions", PERMISSIONS)
        require(
            self.save_filter in (None, *FILTER_WORDS) or is_dotted_path(self.save_filter),
            "save_filter",
            f"is {self.save_filter!r}; use {', '.join(FILTER_WORDS)} or package.module.function",
        )
        require(
            self.save_filter is None or self.local.directory is None,
            "save_filter",
            "is set beside local.directory: the local tier saves whole models",
        )
        require_positive(self.save_failure_limit, "save_failure_limit")
        require_positive(self.alarm_after_seconds, "alarm_after_seconds")
        require_choice(self.load.verify, "load.verify", VERIFY_MODES)
        require(
            self.load.guard in (None, "model_config") or is_dotted_path(self.load.guard),
            "load.guard",
            f"is {self.load.guard!r}; use model_config or package.module.function",
        )
        found += find_strict_problems(self.load.strict, "checkpoint.load.strict")
        require_choice(self.load.on_missing, "load.on_missing", MISSING_POLICIES)
        require(
            0 < self.timeout_seconds < math.inf, "timeout_seconds", "must be above 0 and finite"
        )
        require_positive(self.persistent.save_interval, "persistent.save_interval")
        require_positive(self.persistent.keep.last, "persistent.keep.last")
        require_positive(self.persistent.write_mib_per_second, "persistent.write_mib_per_second")
        require_positive(self.local.save_interval, "local.save_interval")
        require_positive(self.local.keep.last, "local.keep.last")
        factor = self.local.replication.factor
        require(factor >= 1, "local.replication.factor", "must be at least 1")
        require_positive(self.local.replication.jump, "local.replication.jump")
        require_choice(self.local.replication.transport, "local.replication.transport", TRANSPORTS)
        require(
            self.load.step is None or self.load.step >= 0, "load.step", "must be 0 or more, or null"
        )
        for name in self.load.override:
            component, _, part = name.partition(".")
            require(
                name in _OVERRIDABLE or (component in _WITH_PARTS and bool(part)),
                "load.override",
                f"names {name!r}; use {', '.join(_OVERRIDABLE)}, optimizer.<option>, "
                "train_state.<field> or components.<name>",
            )
            require(
                name != "train_state.step",
                "load.override",
                "names 'train_state.step', which is the iteration of what is loaded",
            )
        require(
            self.run_id is None or _is_run_id(self.run_id),
            "run_id",
            f"is {self.run_id!r}; use 1 to 64 letters, digits, '.', '_' or '-', not '.' first",
        )
        require_choice(self.load.pretrained.what, "load.pretrained.what", PRETRAINED_PARTS)
        parent_step = self.load.pretrained.step
        require(
            parent_step is None or parent_step >= 0,
            "load.pretrained.step",
            "must be 0 or more, or null",
        )
        for path in _PATH_FIELDS:
            directory = _read_field(self, path)
            if directory is None:
                continue
            text = os.fspath(directory)
            require(text.strip() != "", path, "is empty; name a directory or use null")
            where = (
                "name a path on this node's own disk or RAM"
                if path == "local.directory"
                else "this version stores on mounted file systems only: name a path"
            )
            require("://" not in text, path, f"is {text!r}; {where}")
            unset = _UNSET_VARIABLE.search(os.path.expandvars(text))
            if unset is not None:
                found.append(
                    f"checkpoint.{path} is {text!r}; {unset[0]} is not set in the environment"
                )
        if self.local.directory is not None:
            require(
                self.local.keep.last is not None and self.local.keep.last >= 2,
                "local.keep.last",
                f"is {self.local.keep.last}; it must be 2 or more: one complete checkpoint must "
                "remain while the next is written",
            )
        return found

    def with_expanded_paths(self, base: str) -> CheckpointConfig:
        """Return a copy in which every path is absolute, with `~` and $VARIABLES replaced.

        `base`: the directory of relative paths, independent of later changes of directory.
        """
        expanded = copy.copy(self)
        expanded.persistent = copy.copy(self.persistent)
        expanded.local = copy.copy(self.local)
        expanded.load = copy.copy(self.load)
        expanded.load.pretrained = copy.copy(self.load.pretrained)
        for path in _PATH_FIELDS:
            directory = _read_field(expanded, path)
            if directory is not None:
                *parents, name = path.split(".")
                absolute = os.path.join(base, expand_path(directory))
                setattr(_read_field(expanded, ".".join(parents)), name, absolute)
        return expanded

    def warn_without_effect(self) -> None:
        """Warn once about every known setting that has no effect given the others."""
        inert = []
        if self.staging == "overlapped" and not self.async_save:
            inert.append("checkpoint.staging=overlapped: async_save is false, nothing is staged")
        if self.persistent.from_local and not self.async_save:
            inert.append("checkpoint.persistent.from_local: async_save is false")
        if self.alarm_stops and self.alarm_after_seconds == math.inf:
            inert.append("checkpoint.alarm_stops: alarm_after_seconds is infinite")
        if self.local.directory is None:
            if self.persistent.from_local:
                inert.append("checkpoint.persistent.from_local: local.directory is null")
            if self.local.save_interval is not None:
                inert.append("checkpoint.local.save_interval: local.directory is null")
            if self.local.replication.factor != 1:
                inert.append("checkpoint.local.replication.factor: local.directory is null")
            if self.local.replication.transport != "gloo":
                inert.append("checkpoint.local.replication.transport: local.directory is null")
        if self.load.pretrained.directory is None:
            if self.load.pretrained.step is not None:
                inert.append("checkpoint.load.pretrained.step: load.pretrained.directory is null")
            if self.load.pretrained.what != "weights":
                inert.append("checkpoint.load.pretrained.what: load.pretrained.directory is null")
        if self.custom_manager_class is None:
            if self.options:
                inert.append("checkpoint.options: only custom managers read it")
            if self.custom_manager_allowlist is not None:
                inert.append("checkpoint.custom_manager_allowlist: custom_manager_class is null")
        if not self.load.rng and "rng" in self.load.override:
            inert.append("checkpoint.load.override: rng, beside load.rng=false")
        for each in inert:
            warnings.warn(f"setting without effect: {each}", UserWarning, stacklevel=3)


def find_strict_problems(value: Any, path: str) -> list[str]:
    """Return a message for each thing that is wrong with `strict`."""
    if not isinstance(value, Mapping):
        rule = "it must be true or false, or as {names: warn}"
        return [] if isinstance(value, bool) else [f"{path} is {value!r}; {rule}"]
    return [
        f"{path}.{subject} is {action!r}; choose one of {', '.join(STRICT_ACTIONS)}"
        if subject in STRICT_SUBJECTS
        else f"{path}.{subject} is unknown; the subjects are {', '.join(STRICT_SUBJECTS)}"
        for subject, action in value.items()
        if subject not in STRICT_SUBJECTS or action not in STRICT_ACTIONS
    ]


def read_config(given: Any) -> CheckpointConfig:
    """Return a config from a config, a mapping or a DictConfig.

    Raises:
        ConfigError: it is none of these, or a mapping with problems; all are listed.
    """
    if isinstance(given, CheckpointConfig):
        return given
    if isinstance(given, Mapping):
        if type(given).__module__.partition(".")[0] == "omegaconf":
            given = _resolve(given)
        return CheckpointConfig.from_mapping(given)
    example = '{"persistent": {"directory": "checkpoints"}}'
    problem = f"pass a CheckpointConfig or a mapping, such as {example}"
    raise ConfigError([f"checkpoint is {_name_kind(given)}; {problem}"])


def _resolve(given: Any) -> Any:
    from omegaconf import OmegaConf  # given a DictConfig, it is already imported
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(given, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            [f"checkpoint.{error.full_key or '?'} cannot be read: {reason}"]
        ) from error


def _name_kind(value: Any) -> str:
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def expand_path(value: str | os.PathLike[str]) -> str:
    """Return a configured path as a string with `~` and $VARIABLES replaced."""
    return os.path.expanduser(os.path.expandvars(os.fspath(value)))


def _read_field(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def is_dotted_path(value: str) -> bool:
    """Whether a value has the form `package.module.name`."""
    parts = value.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _is_run_id(value: str) -> bool:
    allowed = all(letter.isascii() and (letter.isalnum() or letter in "._-") for letter in value)
    return allowed and 0 < len(value) <= 64 and value[0] != "."


_READER = SettingsReader(CheckpointConfig, "checkpoint", _PATH_FIELDS)
