"""Fine-tune the GPT of a pretraining run with low-rank adapters; its checkpoints stay as they are.

Owns the settings of the adapters and the program; the loop is that of pretraining. Each checkpoint
holds the adapters and their optimizer alone, and names the one that it began from: a load reads
both. Killed and started again, the same command goes on where it stopped.

    python recipes/pretrain.py recipe=quickstart
    python recipes/finetune.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from entry import run_program  # isort: skip  # first: it sets what torch reads

from hydra.core.config_store import ConfigStore

from holdfast import hydra_schema
from pretrain import compose, run
from run_config import RunConfig

LAYERS = ("query_key_value", "attention_out", "mlp_in", "mlp_out")
PARALLEL_KINDS = ("single", "ddp", "fsdp", "hsdp")
"""The others slice layers or divide them into stages, and do not know adapters."""


@dataclass
class LoraConfig:
    """The adapters."""

    rank: int = 4
    alpha: float = 8.0
    """The update is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["query_key_value", "attention_out"])
    """Names of the linear layers that are adapted, in every block."""


@dataclass
class FinetuneConfig(RunConfig):
    """All settings of a run that fine-tunes."""

    lora: LoraConfig = field(default_factory=LoraConfig)

    def problems(self) -> list[str]:
        """Name every impossible value; empty: none."""
        found = super().problems()
        if self.lora.rank < 1:
            found.append(f"lora.rank is {self.lora.rank}; it must be above 0")
        unknown = sorted(set(self.lora.targets).difference(LAYERS))
        if unknown or not self.lora.targets:
            known = ", ".join(LAYERS)
            found.append(f"lora.targets is {list(self.lora.targets)}; choose among {known}")
        if self.parallel.kind not in PARALLEL_KINDS:
            kinds = ", ".join(PARALLEL_KINDS)
            found.append(f"parallel.kind is {self.parallel.kind!r}; adapters work with {kinds}")
        if self.checkpoint.load.pretrained.directory is None:
            found.append(
                "checkpoint.load.pretrained.directory is null; name the checkpoints of pretraining"
            )
        return found


def finetune(config: RunConfig) -> None:
    """Train the adapters as configured."""
    assert isinstance(config, FinetuneConfig)
    lora = config.lora

    def adapt_model(model: object) -> None:
        from torch import nn  # not above: a bad setting is reported without waiting for it

        from lora import adapt

        assert isinstance(model, nn.Module)
        adapt(model, lora.targets, lora.rank, lora.alpha)

    run(config, adapt_model)


def compose_and_run() -> None:
    """Run what the command line asks for."""
    hydra_schema.register()
    ConfigStore.instance().store(name="finetune_schema", node=FinetuneConfig)
    for config in compose("finetune"):
        finetune(config)


def main() -> int:
    """Run and return the exit status."""
    return run_program(compose_and_run)


if __name__ == "__main__":
    sys.exit(main())
