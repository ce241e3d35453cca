"""The loss curve of a run, on disk, over all its attempts.

Owns `losses.jsonl`: one JSON object per line, each loss as a number for people and as a hexadecimal
float that is exact. Promises that reading gives one curve however often the run was killed: an
attempt begins with the step it resumed from, and every row beyond that step which an earlier
attempt wrote is void. Refuses to be a checkpoint: rows are not synced to disk.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run_config import RecipeError

LOSSES_NAME = "losses.jsonl"


@dataclass
class LossCurve:
    """What a run's rows say, the newest attempt's where they overlap."""

    training: dict[int, float] = field(default_factory=dict)
    """Step to mean loss, in nats per byte."""
    validation: dict[int, float] = field(default_factory=dict)
    resumed_from: list[int] = field(default_factory=list)
    """Where each attempt began."""
    furthest_step: int = 0
    """The largest step that any attempt reached, void or not."""


def read_losses(run_dir: Path) -> LossCurve:
    """Read the curve of a run; an empty one where there is none yet."""
    curve = LossCurve()
    path = run_dir / LOSSES_NAME
    if not path.exists():
        return curve
    for line in path.read_text(encoding="ascii").splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue  # the machine died in the middle of this row
        if "resumed_from" in row:
            step = row["resumed_from"]
            curve.resumed_from.append(step)
            for values in (curve.training, curve.validation):
                for void in [each for each in values if each > step]:
                    del values[void]
            continue
        values = curve.training if "loss" in row else curve.validation
        values[row["step"]] = float.fromhex(row["hex"])
        curve.furthest_step = max(curve.furthest_step, row["step"])
    return curve


class LossLog:
    """Append the rows of one attempt; a context, which closes the file."""

    def __init__(self, run_dir: Path, resumed_from: int, rank: int = 0) -> None:
        """Begin an attempt; only the first process's rows are kept.

        Raises:
            RecipeError: the run directory cannot be written.
        """
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            path = run_dir / LOSSES_NAME if rank == 0 else Path(os.devnull)
            self._file = path.open("a", encoding="ascii", buffering=1)
        except OSError as error:
            raise RecipeError(
                f"run_dir: {run_dir} cannot be written: {error.strerror}.\n"
                "Name a directory that you may write to: run_dir=..."
            ) from error
        if self._file.tell() > 0:
            self._file.write("\n")  # ends the row that a dying machine may have left unfinished
        self._append({"resumed_from": resumed_from})

    def __enter__(self) -> LossLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append_training(self, step: int, loss: float) -> None:
        """Note the mean loss of one step, in nats per byte."""
        self._append({"step": step, "loss": loss, "hex": loss.hex()})

    def append_validation(self, step: int, loss: float) -> None:
        """Note the validation loss after one step, in nats per byte."""
        self._append({"step": step, "validation_loss": loss, "hex": loss.hex()})

    def _append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")  # one write per row: a kill leaves whole rows
