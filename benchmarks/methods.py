"""The face that every method has, and holdfast's own methods behind it.

Owns `Method`: prepare, save, settle, wait, load, close, and what must be said of a method so that
equals are compared with equals: whether it returns before the data is written, how durable it is
when `wait` returns, and whether it copies what it snapshots. Promises that holdfast is used through
its public surface alone. Another method is a class of some twenty lines in `peers` or `foreign`.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.states import State

SYNCS = "syncs its files"
SYNC_ADDED = "never syncs; fsync of its files added, and counted"
VOLATILE = "memory: survives processes, not power loss"


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


class Holdfast(Method):
    """The default manager, staging blocking: `save` returns once the snapshot is taken."""

    name = "holdfast"
    label = "holdfast"
    asynchronous = True
    ours = True
    many_ranks = True
    package = "holdfast"
    settings: dict[str, Any] = {}  # noqa: RUF012  # read only

    def unavailable(self) -> str | None:
        import holdfast

        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                holdfast.CheckpointConfig.from_mapping(self._mapping(Path("x")))
        except holdfast.CheckpointError as error:
            return str(error)
        inert = [str(each.message) for each in caught if "without effect" in str(each.message)]
        return inert[0] if inert else None

    def prepare(self, state: State, folder: Path) -> None:
        import holdfast
        from holdfast.events import ON_CHECKPOINT_SAVE

        super().prepare(state, folder)
        self._config = holdfast.CheckpointConfig.from_mapping(self._mapping(folder))
        self._manager: Any = holdfast.DefaultCheckpointManager(self._config)
        self._global = holdfast.GlobalState()
        self._callbacks = holdfast.CallbackManager()
        self._committed = 0
        self._callbacks.register(ON_CHECKPOINT_SAVE, self._count)

    def save(self, step: int) -> None:
        import holdfast

        self._global.train_state.step = step
        self._expected = self._committed + 1
        context = holdfast.CheckpointSaveContext(
            self._global, self.state.model, self.state.optimizer, None, **self._to_local()
        )
        self._manager.save(context, self._callbacks)

    def settle(self) -> None:
        if hasattr(self._manager, "wait_staged"):
            self._manager.wait_staged()

    def is_done(self) -> bool:
        self._manager.finalize_async_saves(self._global)
        return self._committed >= self._expected

    def wait(self) -> None:
        self._manager.finalize_async_saves(self._global, blocking=True)

    def load(self) -> None:
        import holdfast

        result = self._manager.load(
            holdfast.CheckpointLoadContext(
                holdfast.GlobalState(), self.state.model, self.state.optimizer, None
            )
        )
        if not result.found:
            raise RuntimeError(f"nothing was found under {self.folder}")

    def newest(self) -> Path:
        return max(self.folder.glob("store/iter_" + "[0-9]" * 7))

    def close(self) -> None:
        self._manager.finalize_async_saves(self._global, blocking=True, terminate=True)

    def _mapping(self, folder: Path) -> dict[str, Any]:
        persistent = {"directory": str(folder / "store"), "keep": {"last": None}}
        return {"persistent": persistent, **self.settings}

    def _to_local(self) -> dict[str, Any]:
        return {}

    def _count(self, _: object) -> None:
        self._committed += 1


class HoldfastOverlapped(Holdfast):
    """`staging: overlapped`: the copy runs beside the next forward and backward."""

    name = "holdfast-overlapped"
    label = "holdfast, overlapped"
    overlapped = True
    settings = {"staging": "overlapped"}  # noqa: RUF012  # read only


class HoldfastSync(Holdfast):
    """`async_save: false`: durable when `save` returns, no snapshot in memory."""

    name = "holdfast-sync"
    label = "holdfast, synchronous"
    asynchronous = False
    settings = {"async_save": False}  # noqa: RUF012  # read only


class HoldfastLocal(Holdfast):
    """The local tier on a RAM-backed folder; each rank is a node with a directory of its own."""

    name = "holdfast-local"
    label = "holdfast, local tier (RAM)"
    local = True
    durability = VOLATILE
    losses: tuple[str, ...] = ("own",)
    factor = 1

    def prepare(self, state: State, folder: Path) -> None:
        os.environ["HOLDFAST_NODE"] = _node()
        super().prepare(state, folder)

    def lose(self, loss: str) -> None:
        if loss == "peer" and _node() == LOST_NODE:
            shutil.rmtree(self.folder / "local" / LOST_NODE)

    def restart(self) -> None:
        import holdfast

        self._manager.finalize_async_saves(self._global, blocking=True, terminate=True)
        self._manager = holdfast.DefaultCheckpointManager(self._config)

    def recover(self) -> None:
        self.wait()

    def newest(self) -> Path:
        return self.folder / "local"

    def _mapping(self, folder: Path) -> dict[str, Any]:
        local = {
            "directory": str(folder / "local" / _node()),
            "replication": {"factor": self.factor},
        }
        return {**super()._mapping(folder), "local": local}

    def _to_local(self) -> dict[str, Any]:
        return {"non_persistent_ckpt": True}


class HoldfastReplicated(HoldfastLocal):
    """The local tier with a copy of each shard on another node."""

    name = "holdfast-local-2"
    label = "holdfast, local tier, 2 copies"
    fewest_ranks = 2
    losses = ("own", "peer")
    factor = 2


LOST_NODE = "node1"
OURS: list[type[Method]] = [
    Holdfast,
    HoldfastOverlapped,
    HoldfastSync,
    HoldfastLocal,
    HoldfastReplicated,
]


def _node() -> str:
    return f"node{os.environ.get('RANK', '0')}"


def registry() -> dict[str, type[Method]]:
    """Return every method by name, ours first; importing it imports no peer's package."""
    from benchmarks.foreign import FOREIGN
    from benchmarks.peers import PEERS

    return {each.name: each for each in [*OURS, *PEERS, *FOREIGN]}
