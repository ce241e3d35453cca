"""Who may save into a store, and what a save leaves in it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from holdfast.errors import (
    CorruptCheckpointError,
    OwnCheckpointsExistError,
    SaveFailedError,
    StoreIdentityError,
    StoreNotLoadedError,
    SupersededAttemptError,
)
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.identity import Parent, RunIdentity
from holdfast.storage.posix import PosixStorage
from holdfast.tiers.persistent import PersistentTier
from tests.support.managers import Live, linear, manager_of, step
from tests.support.stores import FaultyFilesystem, find, tree


def _iterations(root: Path) -> list[int]:
    return sorted(int(each.name[5:]) for each in root.glob("iter_*"))


def _manifest(root: Path, iteration: int) -> dict[str, object]:
    content = (root / f"iter_{iteration:07d}/manifest.json").read_bytes()
    body: dict[str, object] = json.loads(content.rstrip(b"\n").rpartition(b"\n")[0])
    return body


def test_a_checkpoint_has_the_files_of_the_format(tmp_path: Path) -> None:
    """A committed directory holds DCP's files, the small state, and a manifest of all of them."""
    linear().save(manager_of(tmp_path), 40)
    names = {name for name, content in tree(tmp_path / "iter_0000040").items() if content}
    assert names == {
        ".metadata", "__0_0.distcp", "manifest.json", "run_config.yaml", "train_state.json",
    }  # fmt: skip
    files = _manifest(tmp_path, 40)["files"]
    assert isinstance(files, list)
    assert {each["path"] for each in files} == names - {"manifest.json"}
    assert {each.name for each in tmp_path.iterdir()} == {
        "iter_0000040", "latest_checkpointed_iteration.txt", "run.json", "attempt_0000001.json",
    }  # fmt: skip
    counters = json.loads((tmp_path / "iter_0000040/train_state.json").read_bytes())
    assert counters["train_state"]["step"] == 40


def test_a_checkpoint_names_no_place_on_this_machine(tmp_path: Path) -> None:
    """Neither the pending name nor the store's path is written into a checkpoint."""
    linear().save(manager_of(tmp_path / "secret"), 40)
    for name, content in tree(tmp_path / "secret/iter_0000040").items():
        if isinstance(content, bytes):
            assert b"secret" not in content, name
            assert b"pending" not in content, name


def test_sequence_counts_commits_over_attempts(tmp_path: Path) -> None:
    """Sequence goes on from what is there, whatever the iterations and whoever commits."""
    live = linear()
    first = manager_of(tmp_path)
    for iteration in (10, 20, 30):
        live.save(first, iteration)
    second = manager_of(tmp_path, load={"step": 10})
    live.load(second)
    live.save(second, 15)
    found = {number: _manifest(tmp_path, number) for number in (15, 20, 30)}
    assert {number: each["sequence"] for number, each in found.items()} == {15: 4, 20: 2, 30: 3}
    assert {number: each["attempt"] for number, each in found.items()} == {15: 2, 20: 1, 30: 1}
    assert len({each["run_id"] for each in found.values()}) == 1


def test_retention_keeps_the_last_commits(tmp_path: Path) -> None:
    """After each save the newest `keep.last` remain, also after a rollback."""
    live = linear()
    first = manager_of(tmp_path, persistent={"keep": {"last": 3}})
    for iteration in (100, 200, 300):
        live.save(first, iteration)
    assert _iterations(tmp_path) == [100, 200, 300]
    second = manager_of(tmp_path, load={"step": 100}, persistent={"keep": {"last": 2}})
    live.load(second)
    live.save(second, 150)
    assert _iterations(tmp_path) == [150, 300]
    live.save(second, 160)
    assert _iterations(tmp_path) == [150, 160]
    everything = manager_of(tmp_path, persistent={"keep": {"last": None}})
    live.load(everything)
    for iteration in (170, 180, 190):
        live.save(everything, iteration)
    assert _iterations(tmp_path) == [150, 160, 170, 180, 190]


def test_a_first_save_beside_checkpoints_not_loaded_is_refused(tmp_path: Path) -> None:
    """A manager that loaded nothing may not save beside checkpoints; the message has ways out."""
    linear().save(manager_of(tmp_path), 10)
    before = tree(tmp_path)
    stranger = manager_of(tmp_path)
    with pytest.raises(StoreNotLoadedError) as caught:
        linear().save(stranger, 20)
    for part in (str(tmp_path), "Call load first", "checkpoint.persistent.directory"):
        assert part in str(caught.value)
    assert tree(tmp_path) == before
    live = linear()
    live.load(stranger)
    live.save(stranger, 20)
    assert _iterations(tmp_path) == [10, 20]


def test_a_broken_checkpoint_counts_as_one(tmp_path: Path) -> None:
    """Also beside checkpoints that cannot be read a stranger's first save is refused."""
    linear().save(manager_of(tmp_path), 10)
    (tmp_path / "iter_0000010/manifest.json").unlink()
    with pytest.raises(StoreNotLoadedError):
        linear().save(manager_of(tmp_path), 20)


def test_loading_elsewhere_does_not_open_this_store(tmp_path: Path) -> None:
    """A load from elsewhere beside checkpoints of this run's own is refused, untouched."""
    linear().save(manager_of(tmp_path / "a"), 10)
    linear().save(manager_of(tmp_path / "b"), 10)
    live = linear(5)
    manager = manager_of(tmp_path / "b", load={"directory": str(tmp_path / "a")})
    before = live.digests()
    with pytest.raises(OwnCheckpointsExistError, match=r"load\.pretrained\.directory"):
        live.load(manager)
    assert live.digests() == before
    with pytest.raises(StoreNotLoadedError):
        live.save(manager, 20)
    fresh = manager_of(tmp_path / "c", load={"directory": str(tmp_path / "a")})
    live.load(fresh)
    live.save(fresh, 20)
    ids = {_manifest(tmp_path / name, at)["run_id"] for name, at in (("a", 10), ("c", 20))}
    assert len(ids) == 2


def test_an_attempt_records_what_its_load_asked_for(tmp_path: Path) -> None:
    """The claim of a first save names the `load.step` of the load that it follows, or none."""
    live = linear()
    first = manager_of(tmp_path)
    for iteration in (10, 20):
        live.save(first, iteration)
    for settings in ({"step": 10}, {}):
        manager = manager_of(tmp_path, load=settings)
        live.load(manager)
        live.save(manager, 15)
    found = RunIdentity(PosixStorage(tmp_path, LocalFilesystem())).attempts()
    assert [(each.resumed_from, each.asked_step) for each in found] == [
        (None, None), (10, 10), (15, None),
    ]  # fmt: skip


def test_a_parent_is_recorded_until_the_run_has_its_own(tmp_path: Path) -> None:
    """The first attempt names what the run began from; one that loads its own names nothing."""
    parent = Parent("/other/iter_0000007", "theirs", 7, "weights")
    first, second = (
        PersistentTier(PosixStorage(tmp_path, LocalFilesystem()), None, None) for _ in range(2)
    )
    first.begin_from(parent)
    first.admit()
    linear().save(manager_of(tmp_path), 10)
    second.begin_from(parent)
    second.resume_from(find(second.store, 10), is_own=True)
    second.admit()
    found = RunIdentity(PosixStorage(tmp_path, LocalFilesystem())).attempts()
    assert [each.parent for each in found] == [parent, None, None]


def test_an_older_twin_is_refused_and_the_newest_goes_on(tmp_path: Path) -> None:
    """Of two jobs on one store the one that began to save later wins; the other changes nothing."""
    live = linear()
    older = manager_of(tmp_path)
    live.save(older, 10)
    newer = manager_of(tmp_path)
    live.load(newer)
    live.save(older, 11)  # the newer one has not begun to save
    live.save(newer, 20)
    before = tree(tmp_path)
    for _ in range(2):
        with pytest.raises(SupersededAttemptError, match="attempt 2 of this run has taken over"):
            live.save(older, 30)
        assert tree(tmp_path) == before
    live.save(newer, 40)
    assert 40 in _iterations(tmp_path)
    assert 30 not in _iterations(tmp_path)


@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_a_twin_overtaken_in_the_middle_of_a_save_is_refused(tmp_path: Path, policy: str) -> None:
    """A save that was in flight when a newer attempt began is never committed."""
    filesystem, live = FaultyFilesystem(), linear()
    live.save(manager_of(tmp_path), 10)
    older = manager_of(tmp_path, filesystem, async_save=True, on_save_failure=policy)
    live.load(older)
    live.save(older, 20)
    older.finalize_async_saves(live.state, blocking=True)
    filesystem.gate.clear()
    live.save(older, 30)
    newer = manager_of(tmp_path)
    live.load(newer)
    live.save(newer, 25)
    filesystem.gate.set()
    with pytest.raises(SupersededAttemptError):
        older.finalize_async_saves(live.state, blocking=True)
    assert _iterations(tmp_path) == [10, 20, 25]
    assert linear().load(manager_of(tmp_path)).iteration == 25


def test_the_last_look_is_before_the_commit(tmp_path: Path) -> None:
    """A newer attempt that has claimed its number and swept nothing yet is enough to refuse."""
    filesystem, live = FaultyFilesystem(), linear()
    manager = manager_of(tmp_path, filesystem, async_save=True)
    live.save(manager, 10)
    manager.finalize_async_saves(live.state, blocking=True)
    claimed = []

    def claim(name: str, path: Path) -> bool:
        if name == "sync_file" and path.name == ".metadata":  # the writes are all but done
            claimed.append(
                RunIdentity(PosixStorage(tmp_path, LocalFilesystem())).claim_attempt("x", 10, None)
            )
        return False

    filesystem.refuses = claim
    live.save(manager, 20)
    with pytest.raises(SupersededAttemptError, match="attempt 2"):
        manager.finalize_async_saves(live.state, blocking=True)
    assert [each.number for each in claimed] == [2]
    assert _iterations(tmp_path) == [10]


def test_two_fresh_jobs_on_one_store(tmp_path: Path) -> None:
    """Of two jobs that find an empty store the second to save is refused."""
    one, two = manager_of(tmp_path), manager_of(tmp_path)
    assert not linear().load(one).found
    assert not linear().load(two).found
    linear().save(one, 10)
    with pytest.raises(StoreNotLoadedError):
        linear().save(two, 10)
    linear().save(one, 20)
    assert _iterations(tmp_path) == [10, 20]


def test_another_runs_id_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A configured run id that is not the store's is refused at load and at save."""
    linear().save(manager_of(tmp_path, run_id="theirs"), 10)
    before = tree(tmp_path)
    with pytest.raises(StoreIdentityError, match="belongs to run 'theirs'"):
        linear().save(manager_of(tmp_path, run_id="mine"), 20)
    with pytest.raises(StoreIdentityError, match="belongs to run 'theirs'"):
        linear().load(manager_of(tmp_path, run_id="mine"))
    assert tree(tmp_path) == before


def test_a_lost_run_record_is_made_again_from_what_was_loaded(tmp_path: Path) -> None:
    """Without run.json a job that loaded a checkpoint goes on under that checkpoint's run id."""
    live = linear()
    live.save(manager_of(tmp_path), 10)
    (tmp_path / "run.json").unlink()
    manager = manager_of(tmp_path)
    live.load(manager)
    live.save(manager, 20)
    assert _manifest(tmp_path, 10)["run_id"] == _manifest(tmp_path, 20)["run_id"]
    assert _manifest(tmp_path, 20)["attempt"] == 2
    (tmp_path / "run.json").write_bytes(b"{")
    with pytest.raises(CorruptCheckpointError, match=r"run\.json"):
        live.save(manager_of(tmp_path), 30)


def test_a_store_through_a_link_is_the_same_store(tmp_path: Path) -> None:
    """A job that names the store by a link may go on with what it loaded by its real name."""
    live = linear()
    live.save(manager_of(tmp_path / "store"), 10)
    (tmp_path / "link").symlink_to(tmp_path / "store")
    manager = manager_of(
        tmp_path / "link", load={"directory": str(tmp_path / "store/iter_0000010")}
    )
    live.load(manager)
    live.save(manager, 20)
    assert _iterations(tmp_path / "store") == [10, 20]


def test_a_commit_that_fails_behind_the_rename_spends_its_sequence(tmp_path: Path) -> None:
    """What became visible in a failed save does not share its sequence with the next."""
    filesystem, live = FaultyFilesystem(), linear()
    manager = manager_of(tmp_path, filesystem)
    live.save(manager, 10)
    filesystem.refuses = lambda name, path: name == "rename" and path.suffix == ".txt"
    with pytest.raises(SaveFailedError):
        live.save(manager, 20)
    filesystem.refuses = lambda name, path: False
    step(live)
    live.save(manager, 30)
    found = [_manifest(tmp_path, number)["sequence"] for number in _iterations(tmp_path)]
    assert len(set(found)) == len(found)
    assert linear().load(manager_of(tmp_path)).iteration == 30


def test_metadata_does_not_depend_on_holdfast(tmp_path: Path) -> None:
    """`.metadata` holds types of torch alone, so that plain DCP reads it anywhere."""
    live = Live(linear().model)
    live.save(manager_of(tmp_path), 10)
    content = (tmp_path / "iter_0000010/.metadata").read_bytes()
    assert b"holdfast" not in content
    assert type(pickle.loads(content)).__module__.startswith("torch.")
