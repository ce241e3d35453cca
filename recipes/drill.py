"""Kill the main job and prove that resuming changes nothing.

Owns three runs of the same tiny training: one left alone, one killed at a step and one killed in
the middle of a save. The same command then starts each of the two again. Promises a zero exit only
when both died as planned, left an unfinished save where one was wanted, resumed from a checkpoint,
and every loss and the final validation loss equal those of the run left alone, to the last bit.

    python recipes/drill.py
    python recipes/drill.py --processes 2 --parallel fsdp
    python recipes/drill.py --processes 4 --parallel fsdp_tp
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from losses import LossCurve, read_losses
from run_config import PARALLEL_KINDS

PROGRAM = Path(__file__).with_name("pretrain.py")
STEPS = 80
CRASH_STEP = 50


class DrillError(Exception):
    """The drill did not go as planned; what it would have compared proves nothing."""


@dataclass(frozen=True)
class Verdict:
    """How one interrupted run compares with the one left alone."""

    name: str
    resumed_from: int
    different_steps: tuple[int, ...]
    validation_differs: bool

    @property
    def is_equal(self) -> bool:
        """Whether not one bit differs."""
        return not self.different_steps and not self.validation_differs


@dataclass(frozen=True)
class Launch:
    """How the drill starts the main job."""

    processes: int
    parallel: str
    root: Path

    def run(self, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        """Run the main job in a run directory of this name, to its end or its death."""
        command = [sys.executable]
        if self.processes > 1 or self.parallel != "single":
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command.append(str(self.processes))
        command += [str(PROGRAM), "recipe=crash_drill", f"parallel={self.parallel}"]
        command += [f"steps={STEPS}", f"run_dir={self.root / name}", *overrides]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}  # torchrun's own default, unasked
        return subprocess.run(
            command,
            check=False,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run_to_end(self, name: str, *overrides: str) -> LossCurve:
        """Run the main job and return its losses.

        Raises:
            DrillError: it failed.
        """
        finished = self.run(name, *overrides)
        if finished.returncode != 0:
            raise DrillError(f"{name}: exit status {finished.returncode}\n{finished.stdout}")
        return read_losses(self.root / name)

    def run_to_death(self, name: str, *overrides: str) -> None:
        """Run the main job and see it die.

        Raises:
            DrillError: it did not, or not by SIGKILL.
        """
        finished = self.run(name, *overrides)
        was_killed = finished.returncode == -signal.SIGKILL or (
            finished.returncode != 0 and "SIGKILL" in finished.stdout  # what torchrun says of it
        )
        if not was_killed:
            raise DrillError(f"{name}: it was to be killed, but\n{finished.stdout}")


def compare(name: str, resumed: LossCurve, alone: LossCurve) -> Verdict:
    """Compare every step and the last validation bit for bit."""
    steps = sorted(set(resumed.training) | set(alone.training))
    different = [step for step in steps if resumed.training.get(step) != alone.training.get(step)]
    validation_differs = resumed.validation[STEPS] != alone.validation[STEPS]
    return Verdict(name, resumed.resumed_from[-1], tuple(different), validation_differs)


def drill(launch: Launch) -> list[Verdict]:
    """Make the three runs and compare.

    Raises:
        DrillError: a run did not end as planned.
    """
    print(f"1/3 a run of {STEPS} steps, left alone", flush=True)
    alone = launch.run_to_end("alone", "crash_at_step=null")
    if sorted(alone.training) != list(range(1, STEPS + 1)):
        raise DrillError(f"the run left alone has {len(alone.training)} of {STEPS} steps")

    print(f"2/3 killed at step {CRASH_STEP}, then the same command again", flush=True)
    overrides = [f"crash_at_step={CRASH_STEP}"]
    launch.run_to_death("at_step", *overrides)
    verdicts = [compare("killed at a step", launch.run_to_end("at_step", *overrides), alone)]

    print("3/3 killed in the middle of a save, then the same command again", flush=True)
    overrides.append("crash_during_save=true")
    launch.run_to_death("in_save", *overrides)
    if not list((launch.root / "in_save" / "checkpoints").glob("*.pending-*")):
        raise DrillError("in_save: it died, but no save was under way")
    verdicts.append(compare("killed in a save", launch.run_to_end("in_save", *overrides), alone))
    for verdict in verdicts:
        if verdict.resumed_from == 0:
            raise DrillError(f"{verdict.name}: it started afresh instead of resuming")
    return verdicts


def conclude(verdicts: Sequence[Verdict]) -> int:
    """Print whether all interrupted runs equal the one left alone, and return the exit status."""
    if all(verdict.is_equal for verdict in verdicts):
        print("equal to the run left alone, to the last bit")
        return 0
    print("NOT equal to the run left alone")
    return 1


def main() -> int:
    """Run the drill, print a table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", choices=PARALLEL_KINDS)
    arguments = parser.parse_args()
    parallel = arguments.parallel or ("single" if arguments.processes == 1 else "fsdp")
    with tempfile.TemporaryDirectory(prefix="holdfast-drill-") as root:
        try:
            verdicts = drill(Launch(arguments.processes, parallel, Path(root)))
        except DrillError as error:
            print(f"drill failed: {error}", file=sys.stderr)
            return 1
    print(f"\n{'run':<18} {'resumed from':>12} {'steps differing':>16} {'validation':>11}")
    for verdict in verdicts:
        validation = "differs" if verdict.validation_differs else "equal"
        differing = f"{len(verdict.different_steps)} of {STEPS}"
        print(f"{verdict.name:<18} {verdict.resumed_from:>12} {differing:>16} {validation:>11}")
    return conclude(verdicts)


if __name__ == "__main__":
    sys.exit(main())
