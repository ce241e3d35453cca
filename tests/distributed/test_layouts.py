"""Every layout loads what every layout saved, at any number of ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import distributed

from holdfast.config import CheckpointConfig
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext, GlobalState
from tests.distributed.layouts import ON, State
from tests.support.deadlines import ANSWER_SECONDS, LAUNCH_SECONDS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _manager(directory: Path) -> DefaultCheckpointManager:
    values = {
        "async_save": False,
        "timeout_seconds": ANSWER_SECONDS,
        "persistent": {"directory": str(directory)},
        "load": {"rng": False},
    }
    return DefaultCheckpointManager(CheckpointConfig.from_mapping(values))


def _save(root: Path, layouts: tuple[str, ...]) -> None:
    for layout in layouts:
        own = State(layout)
        own.fill()
        state = GlobalState()
        state.train_state.step = 1
        context = CheckpointSaveContext(
            state, own.model, own.optimizer, None, pg_collection=own.groups
        )
        manager = _manager(root / layout)
        manager.save(context)
        manager.finalize_async_saves(state, blocking=True, terminate=True)


def _load(root: Path, saved: tuple[str, ...], layouts: tuple[str, ...]) -> dict[str, list[str]]:
    """Return what is wrong on this rank, by `saved -> loaded`."""
    found = {}
    states = {layout: State(layout) for layout in layouts}
    for source in saved:
        for layout, own in states.items():
            own.forget()
            state = GlobalState()
            context = CheckpointLoadContext(
                state, own.model, own.optimizer, None, pg_collection=own.groups
            )
            manager = _manager(root / source)
            try:
                result = manager.load(context)
            except Exception as error:  # noqa: BLE001  # one pair must not hide the others
                wrong = [f"{type(error).__name__}: {error}"]
            else:
                wrong = own.differences() if result.found else ["nothing found"]
            manager.finalize_async_saves(state, blocking=True, terminate=True)
            found[f"{source} -> {layout}"] = wrong
            distributed.barrier()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return where all layouts of a number of ranks are saved, having saved them once."""

    @functools.cache
    def save(ranks: int) -> Path:
        root = tmp_path_factory.mktemp(f"on_{ranks}")
        run_ranks(_save, ranks, root, ON[ranks], timeout_seconds=2 * LAUNCH_SECONDS)
        return root

    return save


_AT_ONCE = 3
"""Layouts that one launch loads: it must end in time on a busy machine too."""
LOADS = [
    pytest.param(before, after, ON[after][at : at + _AT_ONCE], id=f"{before}-{after}-{at}")
    for before in sorted(ON)
    for after in sorted(ON)
    for at in range(0, len(ON[after]), _AT_ONCE)
]


@pytest.mark.parametrize(("before", "after", "layouts"), LOADS)
def test_every_layout_loads_what_every_layout_saved(
    before: int, after: int, layouts: tuple[str, ...], saved: Callable[[int], Path]
) -> None:
    """Model, optimizer and its options are on each rank what the whole values say, bit for bit."""
    results = run_ranks(
        _load, after, saved(before), ON[before], layouts, timeout_seconds=2 * LAUNCH_SECONDS
    )
    pairs = [f"{source} -> {layout}" for source in ON[before] for layout in layouts]
    wrong = {
        pair: by_rank
        for pair in pairs
        if (by_rank := {rank: each[pair] for rank, each in enumerate(results) if each[pair]})
    }
    assert not wrong, "\n".join(f"{pair}: {by_rank}" for pair, by_rank in wrong.items())
