"""What a person sees of a run.

Owns every line that the recipe prints: a progress bar at a terminal, plain lines anywhere else, the
closing table, the command that resumes. Promises that only the first process speaks, so that any
number of them may hold a display. Decides nothing.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from holdfast import LoadResult
from saving import SaveRecord, describe_size

PLAIN_WIDTH = 100
"""Columns where there is no terminal to ask."""


def bits_per_byte(loss: float) -> float:
    """Turn nats per byte into bits: 8 is knowing nothing."""
    return loss / math.log(2)


class Display:
    """Show one run; a context, because a progress bar must be taken down again."""

    def __init__(self, rank: int, steps: int, log_interval: int) -> None:
        console = Console(quiet=rank != 0, highlight=False, soft_wrap=True)
        if not console.is_terminal:
            console = Console(quiet=rank != 0, highlight=False, width=PLAIN_WIDTH, soft_wrap=True)
        self._console = console
        self._steps = steps
        self._log_interval = log_interval
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=rank != 0 or not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=steps, figures="")
        self._window_began, self._window_tokens = time.perf_counter(), 0

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        self._console.print(line, markup=False)

    def show_load(self, iteration: int, result: object, store: str | None) -> None:
        """Say what was resumed, or that nothing was, and what was passed over and why."""
        where = store
        if isinstance(result, LoadResult):
            for skipped in result.skipped:
                self.say(f"skipped {skipped.path}: {skipped.reason}")
            where = str(result.path or store)
        if iteration > 0:
            self.say(f"resumed from iteration {iteration} of {where}")
        elif store is not None:
            self.say(f"starting from step 0: no checkpoint in {store} yet")

    def start_training(self, step: int) -> None:
        """Show the bar and begin to count time."""
        self._progress.update(self._task, completed=step)
        self._progress.start()
        self._window_began = time.perf_counter()

    def show_step(self, step: int, loss: float, learning_rate: float, tokens: int) -> None:
        """Show a step that trained on this many tokens."""
        self._window_tokens += tokens
        is_line_due = step % self._log_interval == 0 or step == self._steps
        if not is_line_due and self._progress.disable:
            return
        elapsed = max(time.perf_counter() - self._window_began, 1e-9)
        rate = self._window_tokens / elapsed
        figures = f"loss {bits_per_byte(loss):.3f} bits/byte, {rate:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, figures=figures)
        if is_line_due:
            if self._progress.disable:
                self.say(f"step {step:>5}/{self._steps}  {figures}  lr {learning_rate:.1e}")
            self._window_began, self._window_tokens = time.perf_counter(), 0

    def show_validation(self, step: int, loss: float) -> None:
        """Show a validation after a step."""
        self.say(f"validation after step {step}: {bits_per_byte(loss):.3f} bits/byte")

    def show_saves(self, records: Sequence[SaveRecord], store: str | None) -> None:
        """Print the closing table: what was saved, where, and how long training waited."""
        self._progress.stop()
        if not records:
            self.say("no checkpoint was saved")
            return
        table = Table(box=box.SIMPLE, title=f"checkpoints in {store}", title_justify="left")
        for heading in ("iteration", "state", "size", "committed after", "training waited"):
            table.add_column(heading, justify="left" if heading == "state" else "right")
        for record in records:
            table.add_row(
                str(record.iteration),
                record.outcome,
                "-" if record.size_bytes is None else describe_size(record.size_bytes),
                "-" if record.total_seconds is None else f"{record.total_seconds:.2f} s",
                f"{record.waited_seconds:.3f} s",
            )
        waited_seconds = sum(record.waited_seconds for record in records)
        table.add_section()
        table.add_row("all", "", "", "", f"{waited_seconds:.3f} s")
        self._console.print(table)

    def show_ways_on(self, steps: int) -> None:
        """Print the commands that go on from here."""
        self.say(f"the same command resumes an interrupted run: {describe_command()}")
        self.say(f"to train on from here: {describe_command(2 * steps)}")


def describe_command(steps: int | None = None) -> str:
    """Return what the user typed, to be typed again; with `steps`, to train up to that many."""
    arguments = sys.argv[1:]
    if steps is not None:
        arguments = [each for each in arguments if not each.startswith("steps=")]
        arguments.append(f"steps={steps}")
    script = shlex.join([sys.argv[0], *arguments])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} {script}"
    if shutil.which("python") == sys.executable:
        return f"python {script}"
    interpreter = Path(sys.executable)
    if interpreter.is_relative_to(Path.cwd()):
        interpreter = interpreter.relative_to(Path.cwd())
    return f"{shlex.quote(str(interpreter))} {script}"
