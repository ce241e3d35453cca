"""Faults addressed by rank and stage, and many small jobs in one launch.

Owns what a fault test of ranks needs: one fault that strikes once, in a named stage of holdfast's
on the thread that runs it, wherever live objects or the file system are touched there; and groups
of a launch's processes that are jobs of their own. Promises that nothing strikes that was not
armed. The stage is read from the coordinator's own frames: nothing of holdfast is replaced.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import distributed

from holdfast.filesystem import Filesystem, LocalFilesystem

Action = Callable[[str], None]
"""Carries out a fault; given the path that is being touched, or a name."""


def running_stage() -> str | None:
    """Return the stage that the coordinator runs on this thread; None: none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (
            frame.f_globals.get("__name__", "").startswith("holdfast.ranks.")
            and "stage" in frame.f_locals
        ):
            stage: str = frame.f_locals["stage"]
            return stage
        frame = frame.f_back
    return None


class Fault:
    """At most one armed fault of this rank. Whatever can fail calls `reach` first."""

    def __init__(self) -> None:
        self._armed: tuple[str, Action] | None = None
        self.struck = 0

    def arm(self, stage: str, action: Action) -> None:
        """Strike the next time that something is touched in this stage."""
        self._armed = (stage, action)

    def reach(self, path: object) -> None:
        """Strike, if this is the place."""
        armed = self._armed
        if armed is not None and running_stage() == armed[0]:
            self._armed = None
            self.struck += 1
            armed[1](str(path))

    def filesystem(self) -> Filesystem:
        """Return the local file system with this fault before every operation."""
        return cast("Filesystem", _FaultyFilesystem(self))

    def watch(self, model: torch.nn.Module) -> None:
        """Put this fault before every reading of the model's state."""
        register: Any = model.register_state_dict_pre_hook
        register(lambda *_: self.reach("the model"))


class _FaultyFilesystem:
    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._filesystem = LocalFilesystem()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._filesystem, name)

        def reach_and_operate(path: Path, *others: Path) -> Any:
            self._fault.reach(path)
            return operation(path, *others)

        return reach_and_operate


def disk_is_full(path: str) -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def exit_at_once(_: str) -> None:
    """End this process without a word to anybody."""
    os._exit(7)


def die(_: str) -> None:
    """End this process as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


class Job:
    """A group of a launch's processes that is a job of its own, with its own process group."""

    def __init__(self, size: int) -> None:
        launched_rank = int(os.environ["RANK"])
        self.number, self.rank = divmod(launched_rank, size)
        self.size = size
        stores: Any = distributed  # its stores are public, but not in its __all__
        store = stores.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        self._launch = store.clone()
        self._store = stores.PrefixStore(f"job{self.number}", store)
        # A client of its own: whoever waits in one blocks every other call through it.
        self._signals = self._store.clone()
        distributed.init_process_group(
            "gloo", store=self._store, rank=self.rank, world_size=self.size
        )

    def gather_all(self, processes: int) -> None:
        """Wait for every process of the launch, so that no job is timed while others start."""
        if self._launch.add("gathered", 1) == processes:
            self._launch.set("all are here", "")
        self._launch.wait(["all are here"], timedelta(seconds=60))

    def tell(self, name: str) -> None:
        """Say to the other ranks that this one has come so far."""
        self._signals.set(f"told/{name}/{self.rank}", "")

    def await_others(self, name: str, seconds: float) -> None:
        """Wait until every other rank has told so."""
        others = [f"told/{name}/{rank}" for rank in range(self.size) if rank != self.rank]
        self._store.clone().wait(others, timedelta(seconds=seconds))
