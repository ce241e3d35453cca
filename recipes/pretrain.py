"""Train a small byte-level GPT on real text; killed and started again, it goes on where it stopped.

Owns the program: Hydra composes configs/pretrain.yaml, the result becomes dataclasses once, here,
and `training.train` does the rest. Promises that whatever the person at the keyboard can mend ends
in a message of at most three lines and a non-zero exit, printed by one process. Anything else is a
defect and keeps its traceback.

    python recipes/pretrain.py recipe=quickstart
    torchrun --nproc-per-node 2 recipes/pretrain.py parallel=fsdp
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from complaints import PLAIN_ERRORS, condense
from display import Display, describe_command
from holdfast import hydra_schema
from run_config import RunConfig

SPEAKING_SECONDS = 10.0
"""How long silent processes wait for the one that prints the message."""


def compose() -> list[RunConfig]:
    """Let Hydra read the command line; `--cfg job` asks for no run, `--multirun` for several."""
    composed: list[DictConfig] = []

    @hydra.main(config_path="../configs", config_name="pretrain", version_base="1.3")
    def keep(config: DictConfig) -> None:
        composed.append(config)

    keep()  # training happens outside of it: Hydra prints its own line over every exception inside
    return [cast(RunConfig, OmegaConf.to_object(config)) for config in composed]


def run(config: RunConfig) -> None:
    """Train as configured, together with the other processes of this launch."""
    config.validate()
    # torch is imported here and not above: see `_quieten_torch`, and a bad setting is told at once.
    from parallel import open_processes
    from training import train

    processes = open_processes(config.parallel)
    with Display(processes.rank, config.steps, config.log_interval) as display:
        train(config, processes, display)
    processes.close()


def main() -> int:
    """Run and return the exit status."""
    speaks = os.environ.get("RANK", "0") == "0"
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing a page
    sys.path.append(os.getcwd())  # so that a manager's module beside the caller imports
    _quieten_torch()
    warnings.showwarning = _WarningPrinter(speaks)
    hydra_schema.register()
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    try:
        for config in compose():
            run(config)
    except PLAIN_ERRORS as error:
        if speaks:
            print(condense(error), file=sys.stderr, flush=True)
        else:
            # The launcher ends all processes when the first one does: let that be the one to speak.
            time.sleep(SPEAKING_SECONDS)
        return 1
    except KeyboardInterrupt:
        if speaks:
            print(f"interrupted; to go on: {describe_command()}", file=sys.stderr)
        return 130
    return 0


def _quieten_torch() -> None:
    """Set what torch reads when it is imported."""
    # Its threads otherwise spin while they wait for one another: on a machine where something else
    # runs too, a step then takes forty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # nvidia-resiliency-ext brings pynvml along: nothing the reader could mend.
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)


class _WarningPrinter:
    """Print each warning once, however many rooms check the same settings, and in one process."""

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self._printed: set[str] = set()

    def __call__(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if self._speaks and str(message) not in self._printed:
            self._printed.add(str(message))
            print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
