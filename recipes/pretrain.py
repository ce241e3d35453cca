"""Train a small byte-level GPT on real text; killed and started again, it goes on where it stopped.

Owns the program: Hydra composes configs/pretrain.yaml, the result becomes dataclasses once, here,
and `training.train` does the rest.

    python recipes/pretrain.py recipe=quickstart
    torchrun --nproc-per-node 2 recipes/pretrain.py parallel=fsdp
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from entry import run_program  # isort: skip  # first: it sets what torch reads

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from display import Display
from holdfast import hydra_schema
from run_config import RunConfig

CONFIGS = str(Path(__file__).resolve().parent.parent / "configs")


def compose(name: str = "pretrain") -> list[RunConfig]:
    """Let Hydra read the command line; `--cfg job` asks for no run, `--multirun` for several.

    `name`: of the file under configs/ that says what there is to set.
    """
    composed: list[DictConfig] = []

    @hydra.main(config_path=CONFIGS, config_name=name, version_base="1.3")
    def keep(config: DictConfig) -> None:
        composed.append(config)

    keep()  # training happens outside of it: Hydra prints its own line over every exception inside
    return [cast(RunConfig, OmegaConf.to_object(config)) for config in composed]


def run(config: RunConfig, adapt: Callable[[object], None] | None = None) -> None:
    """Train as configured, together with the other processes of this launch.

    `adapt`: changes the model in place before it is divided among them.
    """
    config.validate()
    # torch is imported here and not above: a bad setting is reported without waiting for it.
    from parallel import open_processes
    from training import train

    processes = open_processes(config.parallel)
    with Display(processes.rank, config.steps, config.log_interval) as display:
        train(config, processes, display, adapt)
    processes.close()


def compose_and_run() -> None:
    """Run what the command line asks for."""
    hydra_schema.register()
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    for config in compose():
        run(config)


def main() -> int:
    """Run and return the exit status."""
    return run_program(compose_and_run)


if __name__ == "__main__":
    sys.exit(main())
