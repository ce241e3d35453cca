"""The settings of a run, beside those of its checkpoints.

Owns the recipe's own settings: types, safe values and limits. Promises that all impossible values
of a run are reported together, each with the path of its field. The checkpoint settings are
holdfast's own `CheckpointConfig`. The YAML files under configs/ only choose among these settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from holdfast import CheckpointConfig
from holdfast.errors import ConfigError

DATA_SOURCES = ("stdlib", "files")
PARALLEL_KINDS = ("single", "ddp", "fsdp", "hsdp", "tp", "fsdp_tp", "pp")
DEVICES = ("auto", "cpu", "cuda")
OPTIMIZERS = ("adamw", "sgd")


class RecipeError(Exception):
    """A run cannot continue, and the person who typed the command can fix it: no traceback."""


@dataclass
class ModelConfig:
    """The shape of the GPT."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    """Bytes that a prediction can look back on; also the length of a sample."""
    dropout: float = 0.0


@dataclass
class DataConfig:
    """The text."""

    source: str = "stdlib"
    """`stdlib`: the running Python's standard library; `files`: what `paths` names."""
    paths: list[str] = field(default_factory=list)
    """Files, or directories of which every file is read."""
    validation_fraction: float = 0.05
    """The part of every file that is held out, at its end."""


@dataclass
class ParallelConfig:
    """How processes share the work."""

    kind: str = "single"
    """`single`: one process; `ddp`: a replica each; `fsdp`: parameters sharded (FSDP2); `hsdp`:
    sharded in groups that are replicas; `tp`: layers sliced; `fsdp_tp`: sliced in groups, slices
    sharded over the groups; `pp`: two pipeline stages, several pairs of them are replicas."""
    device: str = "auto"
    """`auto`: GPUs where there are enough of them, else CPU."""
    group_size: int = 2
    """Processes that share one replica (`hsdp`) or slice one layer (`fsdp_tp`)."""


@dataclass
class OptimConfig:
    """The optimizer, and the schedule of the learning rate: linear warm-up, then half a cosine."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    final_learning_rate_ratio: float = 0.1
    """The learning rate at the last step, as a fraction of `learning_rate`."""
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    """The momentum, for sgd."""
    beta2: float = 0.95
    gradient_norm_limit: float = 1.0


@dataclass
class RunConfig:
    """All settings of a run."""

    steps: int = 2000
    """Optimizer steps in all, those of earlier attempts included."""
    batch_size: int = 16
    """Samples per step over all processes, so that another process count trains the same way."""
    seed: int = 1
    run_dir: str = "runs/pretrain"
    """Where the run keeps everything; stable, so that the same command finds it again."""
    crash_at_step: int | None = None
    """SIGKILL after this step, unless an earlier attempt got that far. None: never."""
    crash_during_save: bool = False
    """Whether to die in the middle of the first save at or after `crash_at_step` instead."""
    log_interval: int = 10
    """Steps between printed lines."""
    validation_interval: int = 100
    """Steps between validations; there is always one at the end."""
    validation_batches: int = 16
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def validate(self) -> None:
        """Check every value.

        Raises:
            ConfigError: with all problems of the recipe's settings, or else of the checkpoint's.
        """
        if problems := self.problems():
            raise ConfigError(problems)
        self.checkpoint.validate()

    def problems(self) -> list[str]:
        """Name every impossible value of the recipe's own settings; empty: none."""
        found: list[str] = []

        def require(holds: bool, path: str, rule: str) -> None:
            if not holds:
                value: Any = self
                for name in path.split("."):
                    value = getattr(value, name)
                found.append(f"{path} is {value!r}; {rule}")

        for path, value in (
            ("steps", self.steps),
            ("batch_size", self.batch_size),
            ("log_interval", self.log_interval),
            ("validation_interval", self.validation_interval),
            ("validation_batches", self.validation_batches),
            ("crash_at_step", self.crash_at_step),
            ("model.layers", self.model.layers),
            ("model.width", self.model.width),
            ("model.heads", self.model.heads),
            ("model.context", self.model.context),
            ("parallel.group_size", self.parallel.group_size),
            ("optim.learning_rate", self.optim.learning_rate),
            ("optim.gradient_norm_limit", self.optim.gradient_norm_limit),
        ):
            require(value is None or value > 0, path, "it must be above 0")
        for path, choice, choices in (
            ("data.source", self.data.source, DATA_SOURCES),
            ("parallel.kind", self.parallel.kind, PARALLEL_KINDS),
            ("parallel.device", self.parallel.device, DEVICES),
            ("optim.name", self.optim.name, OPTIMIZERS),
        ):
            require(choice in choices, path, f"choose one of {', '.join(choices)}")
        require(0 <= self.seed < 2**32, "seed", "it must be from 0 to 4294967295")
        require(self.run_dir.strip() != "", "run_dir", "name a directory")
        require(0 <= self.model.dropout < 1, "model.dropout", "it must be from 0 to below 1")
        require(
            self.model.heads < 1 or self.model.width % (2 * self.model.heads) == 0,
            "model.width",
            f"it must be an even multiple of model.heads={self.model.heads}",
        )
        fraction = self.data.validation_fraction
        require(0 < fraction < 1, "data.validation_fraction", "it must be between 0 and 1")
        require(
            self.data.source != "files" or bool(self.data.paths),
            "data.paths",
            "name files or directories, as in data.paths=[notes.txt,books]",
        )
        require(
            not self.crash_during_save or self.crash_at_step is not None,
            "crash_at_step",
            "crash_during_save=true needs the step from which on to die in a save",
        )
        require(
            not self.crash_during_save or self.checkpoint.persistent.directory is not None,
            "checkpoint.persistent.directory",
            "crash_during_save=true needs a store to watch",
        )
        return found
