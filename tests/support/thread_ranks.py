"""Ranks as threads of one process, each with a whole manager, over one rendezvous store.

Owns what a test of many short jobs needs: a job whose ranks run one program, a client of the store
that counts requests by the thread that sends them, and a deadline for a rank that hangs. What runs
is the code of a real job; only the process group is missing, so that rank and world size are given
to the channels.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

from holdfast.events import CallbackManager, CheckpointEvent
from holdfast.manager import DefaultCheckpointManager
from holdfast.ranks.channels import Channels
from holdfast.ranks.coordinator import Coordinator, StoreCoordinator
from tests.support.deadlines import LAUNCH_SECONDS
from tests.support.managers import Live, manager_of

WRITER = "holdfast-writer"
_STEP_SECONDS = 0.001


class CountingStore:
    """A rendezvous store that counts requests by the name of the thread that sends them."""

    def __init__(self, store: Any, requests: Counter[str] | None = None) -> None:
        """`requests`: where they are counted. None: in a counter of its own."""
        self._store = store
        self.requests: Counter[str] = Counter() if requests is None else requests

    def clone(self) -> CountingStore:
        """Return another client of the same store, which counts where this one does."""
        return CountingStore(self._store.clone(), self.requests)

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)
        if not callable(operation) or name == "has_extended_api":
            return operation

        def request(*arguments: Any) -> Any:
            self.requests[threading.current_thread().name] += 1
            return operation(*arguments)

        return request


class _Given(Channels):
    def __init__(self, store: Any, rank: int, ranks: int, timeout_seconds: float) -> None:
        super().__init__(3, timeout_seconds, "given")
        self._given: list[Coordinator] = [
            StoreCoordinator(store.clone(), rank, ranks, timeout_seconds, f"given/{number}")
            for number in range(3)
        ]

    def open(self) -> list[Coordinator]:
        return self._given


class ThreadRank:
    """One rank: a small replicated model, its manager, and what it was told."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        root: Path,
        store: Any,
        timeout_seconds: float = 20.0,
        **config: Any,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.in_step = threading.Barrier(1)
        """Where ranks wait for one another in every step, as a collective makes them."""
        self.store = CountingStore(store)
        model = nn.Linear(3, 2)
        self.live = Live(model, torch.optim.SGD(model.parameters(), lr=0.1))
        config = {
            "async_save": True,
            "timeout_seconds": timeout_seconds,
            "persistent": {"keep": {"last": None}},
            **config,
        }
        self.manager: DefaultCheckpointManager = manager_of(root, **config)
        channels = _Given(self.store, rank, ranks, timeout_seconds)
        self.manager._channels = self.manager._saver._channels = channels
        self.told: list[tuple[str, int, int]] = []
        """Event, iteration, and the step at which it was told."""
        self.listener = CallbackManager()
        for name in ("on_checkpoint_save", "on_checkpoint_save_failed"):
            self.listener.register(name, partial(self._note, name))

    def _note(self, name: str, event: CheckpointEvent) -> None:
        self.told.append((name.removeprefix("on_checkpoint_"), event.iteration, self.step))

    @property
    def step(self) -> int:
        """Steps that were trained."""
        step: int = self.live.state.train_state.step
        return step

    def train(self) -> None:
        """Take a step, after which all tensors hold its number, and look at saves."""
        self.in_step.wait()
        time.sleep(_STEP_SECONDS)  # or training would keep every other thread from running
        self.live.state.train_state.step += 1
        with torch.no_grad():
            for each in self.live.model.state_dict().values():  # type: ignore[union-attr]
                each.fill_(self.step)
        self.manager.finalize_async_saves(self.live.state)

    def grow(self) -> None:
        """Change the structure of this rank's state."""
        model: Any = self.live.model
        number = sum(name.startswith("extra") for name, _ in model.named_buffers())
        model.register_buffer(f"extra{number}", torch.full((2,), float(self.step)))

    def save(self) -> None:
        """Save the step trained last."""
        from holdfast.protocol import CheckpointSaveContext

        live = self.live
        context = CheckpointSaveContext(live.state, live.model, live.optimizer, None)
        self.manager.save(context, self.listener)

    def end(self, *, terminate: bool = True) -> None:
        """Wait for the outcome of the last save."""
        self.manager.finalize_async_saves(self.live.state, blocking=True, terminate=terminate)


def run_threads(
    ranks: int,
    root: Path,
    program: Callable[[ThreadRank], Any],
    store: Any | None = None,
    *,
    in_step: bool = True,
    **config: Any,
) -> list[Any]:
    """Run a program on each rank of a new job; return what each returned, or raise."""
    barrier = threading.Barrier(ranks)
    shared, found, errors = store or HashStore(), [None] * ranks, list[BaseException]()

    def run(rank: int) -> None:
        try:
            each = ThreadRank(rank, ranks, root, shared, **config)
            if in_step:
                each.in_step = barrier
            found[rank] = program(each)
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)
            barrier.abort()

    threads = [
        threading.Thread(target=run, args=(rank,), daemon=True, name=f"rank {rank}")
        for rank in range(ranks)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join(LAUNCH_SECONDS)
        assert not each.is_alive(), f"{each.name} hangs"
    if errors:
        raise errors[0]
    return found
