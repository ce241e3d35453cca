"""Ranks agree through a store that was handed to the manager, whatever kind of store it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed import (  # type: ignore[attr-defined]  # not in its __all__
    FileStore,
    HashStore,
    PrefixStore,
    TCPStore,
)

from holdfast import create_checkpoint_manager
from holdfast.errors import ManagerShapeError, WrongArgumentError
from holdfast.manager import DefaultCheckpointManager
from holdfast.torch_internals import rendezvous_store
from tests.support.deadlines import LAUNCH_SECONDS
from tests.support.managers import linear
from tests.support.ranks import run_ranks
from tests.support.thread_ranks import ThreadRank, run_threads

KINDS = ["tcp", "file", "prefix"]


def _given(kind: str, root: Path, port: int) -> Any:
    if kind == "file":
        return FileStore(str(root / "rendezvous"), distributed.get_world_size())
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    return PrefixStore("ours", PrefixStore("mine", store)) if kind == "prefix" else store


def _save_and_load(root: Path, port: int) -> list[Any]:
    """Save twice by each kind of store, load by it, and look who used the group's own."""
    before = rendezvous_store().num_keys()
    found = []
    for kind in KINDS:
        directory = {"persistent": {"directory": str(root / kind)}, "timeout_seconds": 60.0}
        manager = create_checkpoint_manager(directory, store=_given(kind, root, port))
        assert isinstance(manager, DefaultCheckpointManager)
        live = linear()
        for step in (1, 2):
            live.save(manager, step)
            manager.finalize_async_saves(live.state, blocking=True)
        manager.finalize_async_saves(live.state, terminate=True)
        other = DefaultCheckpointManager(directory, store=_given(kind, root, port))
        found.append((other._channels.world_size, live.load(other).iteration))
    distributed.barrier()
    return [*found, rendezvous_store().num_keys() - before]


def test_processes_agree_through_the_store_they_were_given(tmp_path: Path) -> None:
    """A TCPStore, a FileStore and prefixes of one; nothing is left in the group's own store."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for *found, keys in run_ranks(
        _save_and_load, 2, tmp_path, server.port, timeout_seconds=3 * LAUNCH_SECONDS
    ):
        assert found == [(2, 2)] * len(KINDS)
        assert keys < 8, "those of the barrier"


def _save_thrice(rank: ThreadRank) -> list[tuple[str, int]]:
    for _ in range(3):
        rank.train()
        rank.save()
    rank.end()
    return [each[:2] for each in rank.told]


@pytest.mark.parametrize("ranks", [2, 6])
@pytest.mark.parametrize("make", [HashStore, lambda: PrefixStore("ours", HashStore())])
def test_threads_agree_through_a_store_in_memory(make: Any, ranks: int, tmp_path: Path) -> None:
    """A HashStore, also under a prefix, is enough where ranks are threads."""
    found = run_threads(ranks, tmp_path, _save_thrice, make())
    assert found == [[("save", 1), ("save", 2), ("save", 3)]] * ranks


@pytest.mark.parametrize("wrong", ["tcp://127.0.0.1", {}, torch.nn.Linear(1, 1), TCPStore])
def test_what_is_no_store_is_refused_by_name(wrong: Any, tmp_path: Path) -> None:
    """When the manager is made, with what it is and what to pass."""
    config = {"persistent": {"directory": str(tmp_path)}}
    for make in (DefaultCheckpointManager, create_checkpoint_manager):
        with pytest.raises(WrongArgumentError, match=r"store is .*\n.*torch.distributed.Store"):
            make(config, store=wrong)


class OneArgument:
    """A manager that takes no store."""

    def __init__(self, checkpoint_config: Any) -> None: ...
    def save(self, ctx: Any, callback_manager: Any) -> None: ...
    def load(self, ctx: Any) -> tuple[int, int]:
        return 0, 0

    def finalize_async_saves(self, state: Any, blocking: bool, terminate: bool) -> None: ...


class WithStore(OneArgument):
    """A manager that takes one."""

    def __init__(self, checkpoint_config: Any, store: Any = None) -> None:
        self.store = store


def test_a_manager_of_ones_own_gets_the_store_if_it_takes_one() -> None:
    """By the name `store`; one that does not is refused before it is made."""
    config, store = {"custom_manager_class": f"{__name__}.WithStore"}, HashStore()
    assert create_checkpoint_manager(config, store=store).store is store  # type: ignore[attr-defined]
    config = {"custom_manager_class": f"{__name__}.OneArgument"}
    create_checkpoint_manager(config)
    with pytest.raises(ManagerShapeError, match="takes no store"):
        create_checkpoint_manager(config, store=store)
