"""The default manager: async honesty, failures told once, fallbacks, empty stores."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.config import CheckpointConfig
from holdfast.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    NoLoadableCheckpointError,
    SaveFailedError,
    StateMismatchError,
    StoreNotWritableError,
)
from holdfast.events import (
    ON_CHECKPOINT_SAVE,
    ON_CHECKPOINT_SAVE_FAILED,
    ON_CHECKPOINT_STAGED,
    CallbackManager,
    CheckpointEvent,
)
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import CheckpointManager
from holdfast.storage.store import TRACKER_NAME
from tests.support.managers import Live, counters, linear, manager_of, step, zero
from tests.support.states import MODELS, digest, make_run
from tests.support.stores import FaultyFilesystem, flip_bit, tree

# -- asynchronous saves --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", MODELS)
def test_what_training_does_after_a_save_never_reaches_the_file(
    tmp_path: Path, kind: str, seed: int
) -> None:
    """With the writer held back, every tensor overwritten after `save` is saved as it was."""
    filesystem = FaultyFilesystem()
    manager = manager_of(tmp_path, filesystem, async_save=True)
    run = make_run(kind, seed=seed)
    live = Live(run.model, run.optimizer, run.scheduler, run.stream, counters(extra={"list": [1]}))
    run.train(2)
    live.save(manager, 2)  # fills the buffers that the next save reuses
    manager.finalize_async_saves(live.state, blocking=True)
    run.train(1)
    run.optimizer.zero_grad()
    live.state.train_state.step = 3
    expected = live.digests()
    filesystem.gate.clear()
    live.save(manager)
    zero(live)
    run.optimizer.param_groups[0]["lr"] = 99.0
    run.stream.position = 999
    torch.manual_seed(999)
    live.state.train_state.extra["list"].append(2)
    live.state.train_state.step = 99
    filesystem.gate.set()
    manager.finalize_async_saves(live.state, blocking=True)
    other = make_run(kind, seed=seed + 100)
    again = Live(other.model, other.optimizer, other.scheduler, other.stream)
    assert again.load(manager_of(tmp_path)).iteration == 3
    assert again.digests() == expected


def test_a_save_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    """A second save while the first is being written settles the first before it copies."""
    filesystem, live = FaultyFilesystem(), linear()
    manager = manager_of(tmp_path, filesystem, async_save=True)
    filesystem.gate.clear()
    # The first save's claim on the store is written before `save` returns.
    opener = threading.Thread(target=filesystem.gate.set)
    opener.start()
    expected = {}
    for iteration in range(1, 6):
        step(live, iteration)
        live.save(manager, iteration)
        live.optimizer.zero_grad()
        expected[iteration] = digest(live.model.state_dict())  # type: ignore[union-attr]
    opener.join()
    manager.finalize_async_saves(live.state, blocking=True, terminate=True)
    found = {}
    for iteration in (3, 4, 5):
        other = linear(9)
        other.load(manager_of(tmp_path, load={"step": iteration}))
        found[iteration] = digest(other.model.state_dict())  # type: ignore[union-attr]
    assert found == {iteration: expected[iteration] for iteration in (3, 4, 5)}
    assert len(set(expected.values())) == 5


def test_saves_of_changing_values_differ_on_disk(tmp_path: Path) -> None:
    """No two of many saves with changing values leave the same shard file."""
    live = linear()
    manager = manager_of(tmp_path, async_save=True, persistent={"keep": {"last": None}})
    for iteration in range(1, 9):
        step(live, iteration)
        live.save(manager, iteration)
    manager.finalize_async_saves(live.state, blocking=True)
    shards = [each.read_bytes() for each in sorted(tmp_path.glob("iter_*/__0_0.distcp"))]
    assert len(set(shards)) == len(shards) == 8


def _poll(manager: DefaultCheckpointManager, live: Live) -> None:
    """Take steps until the failure of the save in flight reaches the caller."""
    while True:
        manager.finalize_async_saves(live.state)


TAKES: dict[str, Callable[[DefaultCheckpointManager, Live], None]] = {
    "a step": _poll,
    "blocking": lambda manager, live: manager.finalize_async_saves(live.state, blocking=True),
    "terminate": lambda manager, live: manager.finalize_async_saves(live.state, terminate=True),
    "the next save": lambda manager, live: live.save(manager, 3),
    "a load": lambda manager, live: live.load(manager) and None,
}


@pytest.mark.parametrize("take", TAKES)
def test_a_failure_surfaces_once_and_later_saves_work(tmp_path: Path, take: str) -> None:
    """A failed async save is raised by the next call, by no later one, and the next save stands."""
    filesystem, live = FaultyFilesystem(), linear()
    manager = manager_of(tmp_path, filesystem, async_save=True)
    live.save(manager, 1)
    manager.finalize_async_saves(live.state, blocking=True)
    filesystem.refuses = lambda name, path: name == "open_new" and path.suffix == ".distcp"
    live.save(manager, 2)
    with pytest.raises(SaveFailedError) as caught:
        TAKES[take](manager, live)
    assert (caught.value.iteration, caught.value.stage) == (2, "write")
    assert caught.value.failures[0].errno == 5
    assert str(caught.value.failures[0].path).endswith("__0_0.distcp")
    filesystem.refuses = lambda name, path: False
    for _ in range(3):
        manager.finalize_async_saves(live.state)
    live.save(manager, 4)
    manager.finalize_async_saves(live.state, blocking=True)
    assert sorted(each.name for each in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000004"]


def test_a_store_that_vanished_is_a_failure_and_no_crash(tmp_path: Path) -> None:
    """When a file stands where the store was, saves fail with the path, until it is back."""
    live, root = linear(), tmp_path / "disk/store"
    manager = manager_of(root, async_save=True)
    live.save(manager, 1)
    manager.finalize_async_saves(live.state, blocking=True)
    root.parent.rename(tmp_path / "away")
    root.parent.write_bytes(b"")
    with pytest.raises(SaveFailedError, match="disk"):
        live.save(manager, 2)  # refused at the door: the claims of the store cannot be read
    root.parent.unlink()
    (tmp_path / "away").rename(root.parent)
    live.save(manager, 3)
    manager.finalize_async_saves(live.state, blocking=True)
    assert linear().load(manager_of(root)).iteration == 3


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_failures_may_be_warnings_up_to_a_limit(
    tmp_path: Path, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With `warn` training goes on, failures in a row are counted, and the limit ends it."""
    filesystem, live = FaultyFilesystem(), linear()
    manager = manager_of(
        tmp_path, filesystem, async_save=asynchronous, on_save_failure="warn", save_failure_limit=3
    )

    def save(iteration: int) -> None:
        live.save(manager, iteration)
        manager.finalize_async_saves(live.state, blocking=True)

    save(1)
    for first in (2, 5):
        filesystem.refuses = lambda name, path: name == "sync_file" and path.suffix == ".distcp"
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            save(first)
            save(first + 1)
        assert [each.levelname for each in caplog.records] == ["WARNING"] * 2
        assert "failure 2 in a row" in caplog.text
        filesystem.refuses = lambda name, path: False
        save(first + 2)
    filesystem.refuses = lambda name, path: name == "sync_file" and path.suffix == ".distcp"
    save(8)
    save(9)
    with pytest.raises(SaveFailedError, match="iteration 10"):
        save(10)
    assert not list(tmp_path.glob("*.pending-*"))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_events_tell_of_every_save(tmp_path: Path, asynchronous: bool) -> None:
    """Staged, committed and failed saves are told in order, with what is known at each."""
    filesystem, live, told = FaultyFilesystem(), linear(), []
    manager = manager_of(
        tmp_path, filesystem, async_save=asynchronous, persistent={"keep": {"last": 1}}
    )
    listener = CallbackManager()

    def note(name: str) -> None:
        def call(event: CheckpointEvent) -> None:
            there = event.path is not None and os.path.isdir(event.path)
            told.append((name, event.iteration, there, event.removed_iterations))
            assert event.model is live.model
            assert event.state is live.state

        listener.register(name, call)

    for name in (ON_CHECKPOINT_STAGED, ON_CHECKPOINT_SAVE, ON_CHECKPOINT_SAVE_FAILED):
        note(name)
    for iteration in (1, 2, 3):
        if iteration == 3:
            filesystem.refuses = lambda name, path: name == "sync_file"
        live.state.train_state.step = iteration
        try:
            manager.save(
                _context(live),
                listener,
            )
            manager.finalize_async_saves(live.state, blocking=True)
        except SaveFailedError:
            assert iteration == 3
    staged = [(ON_CHECKPOINT_STAGED, number, False, ()) for number in (1, 2, 3)]
    ended = [
        (ON_CHECKPOINT_SAVE, 1, True, ()),
        (ON_CHECKPOINT_SAVE, 2, True, (1,)),
        (ON_CHECKPOINT_SAVE_FAILED, 3, False, ()),
    ]
    both = [each for pair in zip(staged, ended, strict=True) for each in pair]
    assert told == (both if asynchronous else ended)


def _context(live: Live) -> Any:
    from holdfast.protocol import CheckpointSaveContext

    return CheckpointSaveContext(live.state, live.model, live.optimizer, live.scheduler)


class _BridgeCallbacks:
    """Megatron-Bridge's kind of listener: knows one event."""

    def __init__(self) -> None:
        self.fired: list[str] = []

    def fire(self, name: str, context: Any) -> None:
        self.fired.append(name)


def test_a_foreign_listener_hears_only_of_commits(tmp_path: Path) -> None:
    """A callback manager of another kind is told of committed checkpoints and nothing else."""
    live, listener = linear(), _BridgeCallbacks()
    manager = manager_of(tmp_path, async_save=True)
    manager.save(_context(live), listener)
    manager.finalize_async_saves(live.state, blocking=True)
    assert listener.fired == [ON_CHECKPOINT_SAVE]


def test_many_saves_leave_no_threads_or_descriptors(tmp_path: Path) -> None:
    """After fifty async saves there are as many threads and open files as after two."""
    live = linear()
    manager = manager_of(tmp_path, async_save=True)

    def save(iteration: int) -> None:
        live.save(manager, iteration)
        manager.finalize_async_saves(live.state, blocking=True)

    def resources() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    for iteration in (1, 2):
        save(iteration)
    before = resources()
    for iteration in range(3, 53):
        save(iteration)
    assert all(now <= then for now, then in zip(resources(), before, strict=True))
    assert len(list(tmp_path.glob("iter_*"))) == 3


# -- what an empty store means -------------------------------------------------------------------


@pytest.mark.parametrize("there", ["absent", "empty", "foreign"])
@pytest.mark.parametrize("policy", ["start_fresh", "error"])
def test_an_empty_store_is_what_the_config_says(tmp_path: Path, policy: str, there: str) -> None:
    """`start_fresh` gives (0, 0) and an empty store to save to; `error` really is an error."""
    root = tmp_path / "store"
    if there != "absent":
        root.mkdir()
    if there == "foreign":
        (root / "iter_foo").mkdir()
    manager, live = manager_of(root, load={"on_missing": policy}), linear()
    before = live.digests()
    if policy == "start_fresh":
        result = live.load(manager)
        assert (tuple(result), result.found, result.path) == ((0, 0), False, None)
    else:
        with pytest.raises(CheckpointNotFoundError, match="on_missing is error"):
            live.load(manager)
    assert live.digests() == before
    assert root.exists() == (there != "absent" or policy == "start_fresh")
    assert not root.exists() or {each.name for each in root.iterdir()} <= {"iter_foo"}


def test_a_store_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    """A fresh start whose first save would fail hours later fails at once, naming the setting."""
    manager, live = manager_of(tmp_path / "file" / "store"), linear()
    (tmp_path / "file").write_text("")  # else the manager would not have been made
    with pytest.raises(StoreNotWritableError, match=r"checkpoint\.persistent\.directory") as caught:
        live.load(manager)
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize("policy", ["start_fresh", "error"])
def test_a_run_never_starts_fresh_over_broken_checkpoints(tmp_path: Path, policy: str) -> None:
    """When checkpoints are there and none loads, the error names every one with its reason."""
    live = linear()
    manager = manager_of(tmp_path, persistent={"keep": {"last": None}})
    for iteration in (1, 2, 3, 4):
        live.save(manager, iteration)
    flip_bit(tmp_path / "iter_0000004/__0_0.distcp")
    (tmp_path / "iter_0000003/manifest.json").unlink()
    (tmp_path / "iter_0000002/run_config.yaml").write_bytes(b"")
    (tmp_path / "iter_0000001/train_state.json").unlink()
    before = live.digests()
    with pytest.raises(NoLoadableCheckpointError) as caught:
        live.load(manager_of(tmp_path, load={"on_missing": policy}))
    expected = [
        ("iter_0000004", "block 0"),
        ("iter_0000003", "has no manifest.json"),
        ("iter_0000002", "0 bytes"),
        ("iter_0000001", "is missing"),
    ]
    assert len(caught.value.reasons) == 4
    for reason, (name, why) in zip(caught.value.reasons, expected, strict=True):
        assert name in reason
        assert why in reason
    assert "holdfast verify" in str(caught.value)
    assert live.digests() == before


# -- damage --------------------------------------------------------------------------------------


FILES = [
    ".metadata", "__0_0.distcp", "run_config.yaml", "train_state.json", "manifest.json",
]  # fmt: skip
HARMS: dict[str, Callable[[Path], object]] = {
    "first bit": flip_bit,
    "last bit": lambda path: flip_bit(path, -2),
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "missing": Path.unlink,
    "another file": lambda path: path.write_bytes(b"what another file holds"),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_is_passed_over_with_its_reason(
    tmp_path: Path, name: str, harm: str
) -> None:
    """Any damage to any file of the newest is named, and the one before it is loaded in full."""
    saved = linear()
    manager = manager_of(tmp_path)
    step(saved, 1)
    saved.save(manager, 1)
    saved.optimizer.zero_grad()
    expected = saved.digests()
    step(saved, 2)
    saved.save(manager, 2)
    path = tmp_path / "iter_0000002" / name
    HARMS[harm](path)
    live = linear(5)
    result = live.load(manager_of(tmp_path))
    assert (result.iteration, result.found, result.tier) == (1, True, "persistent")
    assert result.path == tmp_path / "iter_0000001"
    (skipped,) = result.skipped
    assert (skipped.iteration, skipped.path) == (2, str(tmp_path / "iter_0000002"))
    assert name in skipped.reason
    assert live.digests() == expected
    untouched = linear(6)
    before = untouched.digests()
    for load in ({"step": 2}, {"directory": str(path.parents[len(Path(name).parts) - 1])}):
        with pytest.raises(CorruptCheckpointError) as caught:
            untouched.load(manager_of(tmp_path, load=load))
        assert name in str(caught.value)
    assert untouched.digests() == before


def test_every_checkpoint_passed_over_is_told(tmp_path: Path) -> None:
    """Damage seen early and damage seen late are both in the result, newest first."""
    live = linear()
    manager = manager_of(tmp_path, persistent={"keep": {"last": None}})
    for iteration in (1, 2, 3, 4):
        live.save(manager, iteration)
    (tmp_path / "iter_0000001/manifest.json").unlink()
    (tmp_path / "iter_0000003/manifest.json").unlink()
    flip_bit(tmp_path / "iter_0000004/__0_0.distcp")
    result = live.load(manager_of(tmp_path))
    assert result.iteration == 2
    assert [each.iteration for each in result.skipped] == [4, 3]


def test_a_damaged_tracker_does_not_matter(tmp_path: Path) -> None:
    """With the tracker torn, gone or pointing nowhere, the newest checkpoint is loaded."""
    linear().save(manager_of(tmp_path), 10)
    for content in (b"", b"release", b"99", None):
        if content is None:
            (tmp_path / TRACKER_NAME).unlink()
        else:
            (tmp_path / TRACKER_NAME).write_bytes(content)
        assert linear().load(manager_of(tmp_path)).iteration == 10


def test_a_sound_checkpoint_that_does_not_fit_is_no_damage(tmp_path: Path) -> None:
    """A mismatch with the live state is raised and never answered with an older checkpoint."""
    manager = manager_of(tmp_path)
    Live(nn.Linear(2, 3)).save(manager, 1)
    Live(nn.Linear(4, 3)).save(manager, 2)
    live = Live(nn.Linear(2, 3))
    before = live.digests()
    with pytest.raises(StateMismatchError, match="iter_0000002"):
        live.load(manager_of(tmp_path))
    assert live.digests() == before


def test_superseded_checkpoints_stay_loadable_by_number(tmp_path: Path) -> None:
    """After a rollback the run goes on from its own line; the other loads by number."""
    live = linear()
    first = manager_of(tmp_path)
    for iteration in (10, 20):
        live.save(first, iteration)
    rolled_back = manager_of(tmp_path, load={"step": 10})
    live.load(rolled_back)
    live.save(rolled_back, 15)
    result = linear().load(manager_of(tmp_path))
    assert result.iteration == 15
    assert [each.iteration for each in result.skipped] == [20]
    assert linear().load(manager_of(tmp_path, load={"step": 20})).iteration == 20


def test_a_manager_may_roll_back_itself(tmp_path: Path) -> None:
    """One manager that saves, loads an earlier step and saves on supersedes its own later one."""
    live = linear()
    manager = manager_of(tmp_path)
    for iteration in (10, 20):
        live.save(manager, iteration)
    manager.checkpoint_config.load.step = 10
    live.load(manager)
    live.save(manager, 15)
    assert linear().load(manager_of(tmp_path)).iteration == 15


def test_a_second_load_reads_anew(tmp_path: Path) -> None:
    """Nothing is cached between loads of one process."""
    live, reader = linear(), manager_of(tmp_path)
    writer = manager_of(tmp_path)
    for iteration in (1, 2):
        live.save(writer, iteration)
        assert linear().load(reader).iteration == iteration


# -- configuration -------------------------------------------------------------------------------


def test_the_default_manager_keeps_the_contract(tmp_path: Path) -> None:
    """It is a CheckpointManager, and constructing it reads and writes nothing."""
    manager: CheckpointManager = manager_of(tmp_path / "store")
    assert isinstance(manager, CheckpointManager)
    assert list(tmp_path.iterdir()) == []


def test_a_manager_needs_a_directory() -> None:
    """Without a directory to save to, the constructor says which field to set."""
    with pytest.raises(ConfigError, match=r"checkpoint\.persistent\.directory"):
        DefaultCheckpointManager(CheckpointConfig())


def test_a_local_save_without_a_local_tier_is_an_error(tmp_path: Path) -> None:
    """non_persistent_ckpt=True is refused and nothing is written."""
    with pytest.raises(ConfigError, match=r"checkpoint\.local\.directory"):
        linear().save(manager_of(tmp_path), 1, non_persistent_ckpt=True)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    """A store whose path runs through a file since the manager was made fails at the save."""
    manager = manager_of(tmp_path / "file/store")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SaveFailedError, match="file"):
        linear().save(manager, 1)
    assert tree(tmp_path) == {"file": b""}


@pytest.mark.parametrize(("permissions", "modes"), [("private", (0o700, 0o600)),
                                                    ("umask", (0o755, 0o644))])  # fmt: skip
def test_files_are_private_unless_configured(
    tmp_path: Path, permissions: str, modes: tuple[int, int]
) -> None:
    """Everything a save creates is its owner's alone, or as the umask says when configured."""
    before = os.umask(0o022)
    try:
        linear().save(manager_of(tmp_path / "store", permissions=permissions), 1)
    finally:
        os.umask(before)
    for path in (tmp_path / "store", *(tmp_path / "store").rglob("*")):
        assert path.stat().st_mode & 0o777 == modes[path.is_file()], path
