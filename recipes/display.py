"""What a person sees of a run.

Owns every line that the recipe prints: a progress bar at a terminal, plain lines anywhere else, the
closing table, the command that resumes. Promises that only the first process prints, so that every
process may have a display. Decides nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from commands import describe_command
from due import LOCAL
from holdfast import CheckpointConfig, LoadResult
from holdfast.messages import describe_size
from holdfast.protocol import ShardSource
from saving import SaveRecord

PLAIN_WIDTH = 100
"""Columns where there is no terminal to ask."""
_RESTORE = b"\r\x1b[2K\x1b[?25h"
"""To the start of the line, erase it, show the cursor: ECMA-48, and DEC's private mode 25."""
BUDGET_LINE = "local tier at "
"""How holdfast's message on the room that the local tier takes begins."""


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
        self._messages = _Messages(self.say if rank == 0 else None)
        self._window_began, self._window_tokens = time.perf_counter(), 0
        self._before: Any = None
        """What handled SIGTERM before; None: it was not touched."""

    def __enter__(self) -> Display:
        self._messages.listen()
        if not self._progress.disable:  # the bar hides the cursor
            self._before = signal.signal(signal.SIGTERM, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._messages.leave()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _end(self, number: int, _: FrameType | None) -> None:
        """Clear the bar's line, show the cursor, and end as the signal does.

        By hand: the signal may have come in the middle of what rich does.
        """
        os.write(self._console.file.fileno(), _RESTORE)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def say(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        self._console.print(line, markup=False)

    def show_load(self, iteration: int, result: object, config: CheckpointConfig) -> None:
        """Print what was resumed, if anything. What was skipped is logged by holdfast."""
        store, local = config.persistent.directory, config.local.directory
        where, tier = store, ""
        if isinstance(result, LoadResult):
            where = str(result.path or store)
            if local is not None and result.tier is not None:
                tier = f", {result.tier} tier"
                is_reported = any(each.tier == LOCAL for each in result.skipped)
                if result.tier != LOCAL and config.load.directory is None and not is_reported:
                    tier += f"; {local} holds nothing newer"
        if isinstance(result, LoadResult) and result.is_pretrained:
            self.say(f"starting from step {iteration} with what {where} holds")
        elif iteration > 0:
            self.say(f"resumed from iteration {iteration} of {where}{tier}")
        elif not isinstance(result, LoadResult):
            self.say("starting from step 0: the manager found no checkpoint")
        elif store is not None:
            elsewhere = "" if local is None else f" or {local}"
            self.say(f"starting from step 0: no checkpoint of this run in {store}{elsewhere} yet")

    def show_complete(self, step: int) -> None:
        """Say that there is nothing left to train, in a run as long as was asked for or longer."""
        if step == self._steps:
            self.say(f"already complete: {step} of {self._steps} steps are done")
        else:
            self.say(
                f"already complete: {step} steps are done, and steps={self._steps} asks for fewer"
            )

    def show_sources(self, sources: Sequence[Sequence[ShardSource]]) -> None:
        """Say from which files each process, by rank, has its part of the state."""
        for rank, files in enumerate(sources):
            for each in files:
                size = describe_size(each.size_bytes)
                self.say(f"source: rank {rank} has {size} from {describe_source(each, rank)}")

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

    def show_saves(self, records: Sequence[SaveRecord], config: CheckpointConfig) -> None:
        """Print the closing table: what was saved, where, and how long training waited.

        Local saves are many and soon replaced: they share a row.
        """
        self._progress.stop()
        if not records:
            self.say("no checkpoint was saved")
            return
        local = [each for each in records if each.tier == LOCAL]
        title = f"checkpoints in {config.persistent.directory}"
        if local:
            title += f" and {config.local.directory}"
        table = Table(box=box.SIMPLE, title=title, title_justify="left")
        for heading in ("iteration", "state", "size", "committed after", "training waited"):
            table.add_column(heading, justify="left" if heading == "state" else "right")
        if local:
            self._add_local_row(table, local)
        for record in records:
            if record.tier == LOCAL:
                continue
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

    def _add_local_row(self, table: Table, records: Sequence[SaveRecord]) -> None:
        counts = Counter(each.outcome for each in records)
        sizes = [each.size_bytes for each in records if each.size_bytes is not None]
        times = [each.total_seconds for each in records if each.total_seconds is not None]
        waited_seconds = [each.waited_seconds for each in records]
        table.add_row(
            f"{len(records)} local",
            ", ".join(f"{count} {outcome}" for outcome, count in counts.items()),
            describe_size(round(median(sizes))) if sizes else "-",
            f"{median(times):.2f} s each" if times else "-",
            f"{sum(waited_seconds):.3f} s, {median(waited_seconds):.3f} s each",
        )

    def show_ways_on(self, steps: int, config: CheckpointConfig) -> None:
        """Print the commands that go on from here."""
        if (local := _find_local_directory(config)) is not None:
            self.say(f"its local checkpoints take room until you say: rm -r {local}")
        self.say(f"the same command resumes an interrupted run: {describe_command()}")
        self.say(f"to train on from here: {describe_command(2 * steps)}")


class _Messages(logging.Handler):
    """Print what holdfast logs among the lines of the display, not across its bar."""

    def __init__(self, say: Callable[[str], None] | None) -> None:
        """None: another process prints; of this one only warnings are printed, to stderr."""
        super().__init__(logging.INFO if say is not None else logging.WARNING)
        self._say = say
        self._logger = logging.getLogger("holdfast")
        self._level = self._logger.level

    def listen(self) -> None:
        self._logger.addHandler(self)
        self._logger.setLevel(logging.INFO)

    def leave(self) -> None:
        self._logger.setLevel(self._level)
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            line = f"warning: {record.getMessage()}"
        elif record.getMessage().startswith(BUDGET_LINE):
            line = record.getMessage()
        else:
            return  # the manager's decisions, of interest when one of them is in question
        if self._say is not None:
            self._say(line)
        else:
            print(line, file=sys.stderr)


def _find_local_directory(config: CheckpointConfig) -> Path | None:
    """Return the directory of this run alone on this node; None: there is none."""
    store, directory = config.persistent.directory, config.local.directory
    if store is None or directory is None:
        return None
    try:
        run_id = json.loads(Path(store, "run.json").read_bytes())["run_id"]
    except (OSError, ValueError, KeyError):
        return None  # another manager's store
    local = Path(directory, run_id)
    return local if local.is_dir() else None


def describe_source(source: ShardSource, rank: int) -> str:
    """Return where the process of this rank got a part of its state from."""
    if source.rank is None:
        return f"{source.tier} tier"
    if source.rank == rank:
        return "own file" if source.owner == rank else f"own copy for rank {source.owner}"
    return f"peer: rank {source.rank} on {source.node}"
