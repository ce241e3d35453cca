"""What every method of the benchmark is: one way to save and load a state.

Owns the interface `Method` (prepare, save, settle, wait, load, close) and the facts that are stated
about each method, so that equals are compared with equals: whether `save` returns before the data
is written, how durable the data is when `wait` returns, and whether the method copies what it
snapshots. Also owns what several peers share: torch's state dictionary of model and optimizer,
whose cost is recorded separately from the library's own. Imports no method.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.states import State

SYNCS = "syncs its files"
SYNC_ADDED = "never syncs; fsync of its files added, and counted"
VOLATILE = "memory: survives processes, not power loss"
WRITER_THREADS = 2


class Aside:
    """Seconds spent beside the library itself: making and applying the state dictionary."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Return the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Method:
    """One way to save and load; made and used in a process of its own."""

    name = ""
    label = ""
    asynchronous = False
    """Whether `save` returns before everything is durable."""
    copies = True
    """Whether an asynchronous save owns a copy of the state; False: a fork shares its pages."""
    overlapped = False
    """Whether `save` may return before training may change the state."""
    durability = SYNCS
    ours = False
    local = False
    """Whether it saves to the RAM-backed folder."""
    many_ranks = False
    """Whether it can save the states of several ranks."""
    fewest_ranks = 1
    """How many ranks it takes to show what this method is for."""
    needs_group = False
    """Whether even one rank needs a default process group."""
    losses: tuple[str, ...] = ()
    """What can be lost before a restart, of those that `lose` knows."""
    package = "torch"
    note = ""

    def __init__(self) -> None:
        self.aside = Aside()
        """Entered around what is not the library's own: making and applying state dictionaries."""

    def unavailable(self) -> str | None:
        """Say why this method cannot run here; None: it can."""
        return None

    def prepare(self, state: State, folder: Path) -> None:
        """Get ready to save `state` under `folder`; before the first save, timed apart."""
        self.state = state
        self.folder = folder

    def save(self, step: int) -> None:
        """Begin a save, and return when the library does."""
        raise NotImplementedError

    def settle(self) -> None:
        """Return when training may change the state."""

    def is_done(self) -> bool:
        """Say whether the save has ended, giving the library the turn that it needs per step."""
        return True

    def wait(self) -> None:
        """Return when the save is durable."""

    def load(self) -> None:
        """Load the newest save back into the state."""
        raise NotImplementedError

    def newest(self) -> Path:
        """Return the file or folder of the newest save."""
        return self.folder

    def lose(self, loss: str) -> None:
        """Take away what is lost on this rank."""
        raise NotImplementedError

    def restart(self) -> None:
        """Go on as a job does that was started again: nothing is set up yet."""
        raise NotImplementedError

    def recover(self) -> None:
        """Return when all that was lost is as it was."""

    def close(self) -> None:
        """Give back threads and processes."""


def state_dictionary(method: Method) -> dict[str, Any]:
    """Return the state dictionary of model and optimizer, its tensors the live ones."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    with method.aside:
        model, optimizer = get_state_dict(method.state.model, method.state.optimizer)
        return {"model": model, "optimizer": optimizer}


def apply_state_dictionary(method: Method, values: dict[str, Any]) -> None:
    """Give a loaded state dictionary back to model and optimizer."""
    from torch.distributed.checkpoint.state_dict import set_state_dict

    with method.aside:
        set_state_dict(
            method.state.model,
            method.state.optimizer,
            model_state_dict=values["model"],
            optim_state_dict=values["optimizer"],
        )
