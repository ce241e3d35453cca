"""holdfast's own ways to save and load: blocking, overlapped, synchronous, the local tier.

Owns the settings that each of them stands for. Promises that holdfast is used through its public
interface alone.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.method import VOLATILE, Method

if TYPE_CHECKING:
    from benchmarks.states import State


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
HOLDFAST: list[type[Method]] = [
    Holdfast,
    HoldfastOverlapped,
    HoldfastSync,
    HoldfastLocal,
    HoldfastReplicated,
]


def _node() -> str:
    return f"node{os.environ.get('RANK', '0')}"
