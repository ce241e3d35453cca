"""Both tiers of one run: what goes where, which one a load takes, and what each survives."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import (
    CheckpointNotFoundError,
    ConfigError,
    NoLoadableCheckpointError,
    SaveFailedError,
    StoreNotLoadedError,
)
from holdfast.events import (
    ON_CHECKPOINT_SAVE,
    ON_CHECKPOINT_SAVE_FAILED,
    CallbackManager,
    CheckpointEvent,
)
from holdfast.protocol import CheckpointSaveContext
from holdfast.storage.store import TRACKER_NAME
from tests.support.managers import linear, manager_of, step
from tests.support.mounts import small_memory
from tests.support.stores import FaultyFilesystem, flip_bit

MEMORY = Path("/dev/shm")


@pytest.fixture(params=["memory", "disk"])
def local(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A local directory in RAM, where the arena is the file, or on a disk, where it is written."""
    if request.param == "disk":
        yield tmp_path / "local"
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


class _Job:
    """One start of a run with two tiers."""

    def __init__(self, root: Path, local: Path, seed: int = 0, **values: Any) -> None:
        self.live = linear(seed)
        self.events: list[CheckpointEvent] = []
        self._callbacks = CallbackManager()
        for name in (ON_CHECKPOINT_SAVE, ON_CHECKPOINT_SAVE_FAILED):
            self._callbacks.register(name, self.events.append)
        filesystem = values.pop("filesystem", None)
        settings = {"directory": str(local), **values.pop("local", {})}
        self.manager = manager_of(root / "store", filesystem, local=settings, **values)

    def load(self) -> tuple[int, str | None]:
        result = self.live.load(self.manager)
        self.skipped = result.skipped
        return result.iteration, result.tier

    def save(self, iteration: int, *, to_local: bool) -> None:
        """Take a step and save."""
        live = self.live
        step(live, iteration)
        live.optimizer.zero_grad()
        live.state.train_state.step = iteration
        context = CheckpointSaveContext(
            live.state, live.model, live.optimizer, None, non_persistent_ckpt=to_local
        )
        self.manager.save(context, self._callbacks)

    def close(self, *, loses_local: Path | None = None) -> None:
        self.manager.finalize_async_saves(self.live.state, terminate=True)
        if loses_local is not None:
            shutil.rmtree(loses_local)


def _run(root: Path, local: Path, saves: list[tuple[int, bool]], **values: Any) -> dict[str, str]:
    """Start, load what there is, save at iterations (True: locally); return digests of the end."""
    job = _Job(root, local, **values)
    job.load()
    for iteration, to_local in saves:
        job.save(iteration, to_local=to_local)
    job.close()
    return job.live.digests()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_the_newest_commit_of_either_tier_is_loaded(
    tmp_path: Path, local: Path, is_async: bool
) -> None:
    """A later local save wins over a persistent one, and is restored to the last bit."""
    expected = _run(tmp_path, local, [(1, True), (2, False), (3, True)], async_save=is_async)
    job = _Job(tmp_path, local, seed=5)
    assert job.load() == (3, "local")
    assert job.live.digests() == expected
    job.close()


def test_a_persistent_save_is_committed_locally_too(tmp_path: Path, local: Path) -> None:
    """Of the same snapshot in both tiers the local one is read; without it the persistent one."""
    expected = _run(tmp_path, local, [(1, True), (2, False)])
    job = _Job(tmp_path, local, seed=5)
    assert job.load() == (2, "local")
    assert job.live.digests() == expected
    job.close(loses_local=local)
    job = _Job(tmp_path, local, seed=6)
    assert job.load() == (2, "persistent")
    assert job.live.digests() == expected
    job.close()


def test_events_name_the_tier(tmp_path: Path, local: Path) -> None:
    """Each save is told once, with its tier; one that was promoted for both."""
    job = _Job(tmp_path, local, async_save=True, persistent={"from_local": True})
    job.load()
    job.save(1, to_local=True)
    job.save(2, to_local=False)
    job.close()
    told = [(each.iteration, each.tier) for each in job.events]
    in_memory = MEMORY in local.parents
    assert told == [(1, "local"), *[(2, "local")] * in_memory, (2, "persistent")]


def test_a_local_save_needs_a_local_tier(tmp_path: Path) -> None:
    """Without a local directory it is an error, and nothing is written."""
    live = linear()
    with pytest.raises(ConfigError, match=r"local\.directory is null"):
        live.save(manager_of(tmp_path), 1, non_persistent_ckpt=True)
    assert list(tmp_path.glob("iter_*")) == []


def test_a_rollback_discards_newer_local_commits(tmp_path: Path, local: Path) -> None:
    """Resumed from an older checkpoint by number, the run never comes back to what came after."""
    _run(tmp_path, local, [(1, False), (2, True), (3, True)])
    job = _Job(tmp_path, local, load={"step": 1})
    assert job.load()[0] == 1
    job.save(2, to_local=True)
    job.close()
    expected = job.live.digests()
    job = _Job(tmp_path, local, seed=5)
    assert job.load() == (2, "local")
    assert job.live.digests() == expected
    job.close()


def test_a_number_may_be_in_the_local_tier_alone(tmp_path: Path, local: Path) -> None:
    """`load.step` finds a local commit; a number in neither tier is an error."""
    _run(tmp_path, local, [(1, False), (2, True), (3, True)])
    job = _Job(tmp_path, local, load={"step": 2})
    assert job.load() == (2, "local")
    job.close()
    job = _Job(tmp_path, local, load={"step": 7})
    with pytest.raises(CheckpointNotFoundError, match="iteration 7"):
        job.load()
    job.close()


def _damage(local: Path, iteration: int) -> None:
    (shard,) = local.glob(f"*/0/iter_{iteration:07d}_0_local.pt")
    flip_bit(shard, shard.stat().st_size // 3)


def test_damage_falls_back_over_both_tiers(tmp_path: Path, local: Path) -> None:
    """The next older local commit, then the persistent one, each time with the reasons."""
    _run(tmp_path, local, [(1, False), (2, True), (3, True)])
    _damage(local, 3)
    job = _Job(tmp_path, local, seed=5)
    assert job.load() == (2, "local")
    assert [(each.iteration, each.tier) for each in job.skipped] == [(3, "local")]
    job.close()
    _damage(local, 2)
    job = _Job(tmp_path, local, seed=6)
    assert job.load() == (1, "persistent")
    assert {each.iteration for each in job.skipped} >= {2, 3}
    job.close()


def test_a_run_never_starts_fresh_over_broken_local_commits(tmp_path: Path, local: Path) -> None:
    """With only damaged local commits a load raises with every reason."""
    _run(tmp_path, local, [(1, True), (2, True)])
    for iteration in (1, 2):
        _damage(local, iteration)
    job = _Job(tmp_path, local, seed=5)
    with pytest.raises(NoLoadableCheckpointError) as caught:
        job.load()
    assert len(caught.value.reasons) >= 2
    job.close()


def test_another_runs_local_commits_never_win(tmp_path: Path, local: Path) -> None:
    """Two runs may share a local directory: each finds its own."""
    for name in ("one", "other"):
        _run(tmp_path / name, local, [(1, True), (2 if name == "one" else 3, True)])
    for name, newest in (("one", 2), ("other", 3)):
        job = _Job(tmp_path / name, local, seed=5)
        assert job.load() == (newest, "local")
        job.close()


def test_the_own_store_may_be_named_in_any_spelling(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Naming the run's own store is as naming nothing: the newer local checkpoint is taken."""
    _run(tmp_path, local, [(1, False), (2, True)])
    (tmp_path / "link").symlink_to(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path))
    named = [
        f"{tmp_path}/store", f"{tmp_path}/store/", f"{tmp_path}//x/../store", "store", "./store",
        "~/store", "$WHERE/store", "${WHERE}/store", "link", "link/", "store/latest",
        f"store/{TRACKER_NAME}", "store/run.json",
    ]  # fmt: skip
    for name in named:
        job = _Job(tmp_path, local, seed=5, load={"directory": name})
        assert job.load() == (2, "local"), name
        job.close()


def test_a_directory_that_was_named_is_never_local(tmp_path: Path, local: Path) -> None:
    """A load from another run's store takes no local checkpoint of that run."""
    _run(tmp_path, local, [(1, False), (2, True)])
    job = _Job(tmp_path / "own", local, seed=5, load={"directory": str(tmp_path / "store")})
    assert job.load() == (1, "persistent")
    job.close()


def test_a_first_save_beside_local_commits_is_refused(tmp_path: Path, local: Path) -> None:
    """A job that loaded nothing does not go on over a run's local commits."""
    _run(tmp_path, local, [(1, True), (2, True)])
    job = _Job(tmp_path, local, seed=5)
    with pytest.raises(StoreNotLoadedError, match="has not loaded"):
        job.save(1, to_local=True)
    job.close()
    job = _Job(tmp_path, local, seed=5)
    assert job.load() == (2, "local")
    job.close()


@pytest.fixture
def small_directory(tmp_path: Path) -> Iterator[Path]:
    """A local directory with room for a few small shards."""
    with small_memory(tmp_path / "memory", "256k") as folder:
        yield folder


def test_what_cannot_fit_is_told_before_anything_is_copied(
    tmp_path: Path, small_directory: Path
) -> None:
    """What became too much since the load is an error with the numbers at the save, too."""
    job = _Job(tmp_path, small_directory)
    job.load()
    job.live = linear(width=20_000)
    with pytest.raises(ConfigError, match=r"MiB of 0\.[0-9] MiB free .*keep\.last"):
        job.save(1, to_local=True)
    job.close()


def _fill(folder: Path) -> None:
    """Leave no room in a file system."""
    content = bytes(4096)
    with suppress(OSError), (folder / f"rubbish {len([*folder.iterdir()])}").open("wb", 0) as file:
        while True:
            file.write(content)


def test_a_full_local_directory_costs_no_persistent_save(
    tmp_path: Path, small_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A local save fails; the persistent one is committed, with a warning."""
    job = _Job(tmp_path, small_directory)
    job.load()
    job.save(1, to_local=True)
    _fill(small_directory)
    for each in small_directory.glob("*/0/*pending*"):
        each.unlink()  # the room that was set aside for the next save
    _fill(small_directory)
    with pytest.raises(SaveFailedError):
        job.save(2, to_local=True)
    job.save(3, to_local=False)
    assert "local copy of this save" in caplog.text
    job.close()
    for each in small_directory.glob("rubbish*"):
        each.unlink()  # else the next start is told that there is no room
    job = _Job(tmp_path, small_directory, seed=5)
    assert job.load() == (3, "persistent")
    job.close()


@pytest.mark.parametrize(
    ("asynchronous", "from_local"),
    [(False, False), (True, False), (True, True)],
    ids=["sync", "async", "drained"],
)
def test_local_commits_do_not_hide_persistent_failures(
    tmp_path: Path, local: Path, asynchronous: bool, from_local: bool
) -> None:
    """Local saves that succeed between failed persistent ones do not put the limit off."""
    filesystem = FaultyFilesystem()
    job = _Job(
        tmp_path,
        local,
        filesystem=filesystem,
        async_save=asynchronous,
        persistent={"from_local": from_local},
        on_save_failure="warn",
        save_failure_limit=2,
    )
    job.load()
    filesystem.refuses = lambda name, path: (
        name == "sync_file" and path.suffix == ".distcp" and path.is_relative_to(tmp_path / "store")
    )

    def save(iteration: int, *, to_local: bool) -> None:
        job.save(iteration, to_local=to_local)
        job.manager.finalize_async_saves(job.live.state, blocking=True)

    save(1, to_local=False)
    save(2, to_local=True)
    save(3, to_local=True)
    with pytest.raises(SaveFailedError, match="failure 2 in a row of saves to the persistent tier"):
        save(4, to_local=False)
    job.close()


def test_the_local_copy_of_a_persistent_save_resets_local_failures(
    tmp_path: Path, local: Path
) -> None:
    """A save that was committed to both tiers ends the row of failures of both."""
    filesystem = FaultyFilesystem()
    job = _Job(tmp_path, local, filesystem=filesystem, on_save_failure="warn", save_failure_limit=2)
    job.load()
    failed = 0
    for iteration, to_local, is_full in [(1, True, True), (2, False, False), (3, True, True)]:
        filesystem.refuses = lambda name, path, is_full=is_full: (  # type: ignore[misc]
            is_full and path.is_relative_to(local)
        )
        job.save(iteration, to_local=to_local)
        failed += job.events[-1].error is not None
    assert failed == 2
    with pytest.raises(SaveFailedError, match="failure 2 in a row of saves to the local tier"):
        job.save(4, to_local=True)
    job.close()


@pytest.mark.parametrize("local", ["memory"], indirect=True)
def test_local_saves_go_on_while_one_drains(tmp_path: Path, local: Path) -> None:
    """With `from_local` a persistent write that takes long keeps no local save waiting.

    What those stage never reaches the file that is being written.
    """
    filesystem = FaultyFilesystem()
    job = _Job(
        tmp_path, local, filesystem=filesystem, async_save=True, persistent={"from_local": True}
    )
    job.load()
    job.save(1, to_local=True)
    job.manager.finalize_async_saves(job.live.state, blocking=True)
    store = tmp_path / "store"
    filesystem.holds = lambda path: store in path.parents
    filesystem.gate.clear()
    job.save(2, to_local=False)
    expected = job.live.digests()
    for iteration in (3, 4, 5, 6):
        job.save(iteration, to_local=True)
    assert [(each.iteration, each.tier) for each in job.events] == [
        (1, "local"), (2, "local"), (3, "local"), (4, "local"), (5, "local"),
    ]  # fmt: skip
    filesystem.gate.set()
    job.close(loses_local=local)
    job = _Job(tmp_path, local, seed=5)
    assert job.load() == (2, "persistent")
    assert job.live.digests() == expected
    job.close()


@pytest.mark.parametrize("local", ["disk"], indirect=True)
def test_what_follows_a_save_to_a_disk_never_reaches_it(tmp_path: Path, local: Path) -> None:
    """Where the arena is no local file, `from_local` keeps the next save until both are done."""
    job = _Job(tmp_path, local, async_save=True, persistent={"from_local": True})
    job.load()
    job.save(1, to_local=True)
    job.save(2, to_local=False)
    expected = job.live.digests()
    for iteration in (3, 4, 5):
        job.save(iteration, to_local=True)
    job.close(loses_local=local)
    job = _Job(tmp_path, local, seed=5)
    assert job.load() == (2, "persistent")
    assert job.live.digests() == expected
    job.close()


def test_a_drain_that_fails_is_told_once(tmp_path: Path, local: Path) -> None:
    """The local commit stands, the failure surfaces at a later step, and the next save works."""
    filesystem = FaultyFilesystem()
    job = _Job(
        tmp_path, local, filesystem=filesystem, async_save=True, persistent={"from_local": True}
    )
    job.load()
    job.save(1, to_local=True)
    filesystem.refuses = lambda name, path: path.suffix == ".distcp"
    job.save(2, to_local=False)
    with pytest.raises(SaveFailedError, match="EIO"):
        job.manager.finalize_async_saves(job.live.state, blocking=True)
    job.manager.finalize_async_saves(job.live.state, blocking=True)
    filesystem.refuses = lambda name, path: False
    job.save(3, to_local=False)
    job.close()
    job = _Job(tmp_path, local, seed=5)
    assert job.load() == (3, "local")
    job.close(loses_local=local)
    job = _Job(tmp_path, local, seed=5)
    assert job.load() == (3, "persistent")
    job.close()
