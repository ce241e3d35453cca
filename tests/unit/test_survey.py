"""What is seen of a store before a load, and which checkpoint is taken for it."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from holdfast.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    FormatTooNewError,
    StoreIdentityError,
)
from holdfast.filesystem import DirectoryEntry, LocalFilesystem
from holdfast.storage.identity import RunIdentity
from holdfast.storage.manifest import MANIFEST_NAME
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import TRACKER_NAME, Store
from holdfast.tiers.select import Action, Asked, Commit, Condition, Seen, choose, mark_damaged
from holdfast.tiers.survey import Survey, make_refusal, survey_place, survey_store
from tests.support.stores import commit, find

FILESYSTEM = LocalFilesystem()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of run `run` with iterations 10, 20 and 30, saved by attempt 1."""
    root = tmp_path / "store"
    root.mkdir()
    identity = RunIdentity(PosixStorage(root, FILESYSTEM))
    identity.claim_attempt(identity.agree_run_id("run"), None, None)
    store = Store(PosixStorage(root, FILESYSTEM))
    for iteration in (10, 20, 30):
        commit(store, iteration)
    return store


@dataclass(frozen=True)
class _Taken:
    """What a load would try, one after the other, were each found damaged."""

    survey: Survey
    candidates: tuple[Commit, ...]

    @property
    def skipped(self) -> list[Commit]:
        return [each for each in self.survey.commits if each.reason]


def _resolve(
    store: Store, run_id: str | None = None, step: int | None = None, directory: str | None = None
) -> _Taken:
    """Look at the own store, or at a place that is named, and follow the choices to their end."""
    if directory is None:
        survey = survey_store(store.storage, is_own=True, run_id=run_id, step=step)
    else:
        survey = survey_place(Path(directory), FILESYSTEM, step)
    asked = Asked(names_other_place=directory is not None, step=step)
    commits, taken = survey.commits, []
    while True:
        seen = Seen(own=commits) if directory is None else Seen(other=commits)
        choice = choose(asked, seen)
        if choice.action is Action.REFUSE and not taken:
            raise make_refusal(choice, survey, "load.directory", FILESYSTEM)
        if choice.commit is None or choice.action is Action.REFUSE:
            return _Taken(survey, tuple(taken))
        taken.append(choice.commit)
        commits = mark_damaged(commits, choice.commit, "tried", CorruptCheckpointError("x", "y"))


def _iterations(taken: _Taken) -> list[int | None]:
    return [each.iteration for each in taken.candidates]


def test_nothing_there_is_no_candidate(tmp_path: Path) -> None:
    """A store that does not exist, or is empty, gives no candidates and no complaint."""
    store = Store(PosixStorage(tmp_path / "store", FILESYSTEM))
    for _ in range(2):
        taken = _resolve(store)
        assert (taken.candidates, taken.survey.commits) == ((), ())
        store.root.mkdir(exist_ok=True)


def test_the_newest_commit_comes_first(store: Store) -> None:
    """A store gives all checkpoints of the run, by order of commit."""
    decision = _resolve(store)
    assert _iterations(decision) == [30, 20, 10]
    assert decision.skipped == []


TRACKERS = [
    (None, "missing"),
    (b"", "torn"),
    (b"release", "torn"),
    (b"99", "names iteration 99, which is not there"),
    (b"10", "names iteration 10, and the newest commit is of iteration 30 (load.step=10 loads"),
    (b"30", None),
    (b"30\n", None),
]


@pytest.mark.parametrize(("content", "problem"), TRACKERS)
def test_the_tracker_decides_nothing(
    store: Store, content: bytes | None, problem: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Missing, torn, dangling or stale, the tracker leaves the choice to the order of commits."""
    if content is None:
        (store.root / TRACKER_NAME).unlink()
    else:
        (store.root / TRACKER_NAME).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert _iterations(_resolve(store)) == [30, 20, 10]
    if problem is None:
        assert caplog.records == []
    else:
        assert problem in caplog.text


def test_a_step_is_that_step_alone(store: Store) -> None:
    """A step asked for by number is the only candidate."""
    assert _iterations(_resolve(store, step=20)) == [20]


def test_a_step_that_is_not_there_is_an_error(store: Store) -> None:
    """A missing step never falls back: the error says what there is."""
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of iteration 25; it has: 30"):
        _resolve(store, step=25)


def _lose_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).unlink()


def test_a_damaged_step_is_an_error(store: Store) -> None:
    """A step asked for by number or by directory whose record is damaged never falls back."""
    path = store.root / "iter_0000020"
    _lose_manifest(path)
    for load in ({"step": 20}, {"directory": str(path)}):
        with pytest.raises(CorruptCheckpointError, match="iter_0000020") as caught:
            _resolve(store, **load)
        assert "has no manifest.json" in str(caught.value)


def test_a_damaged_newest_is_passed_over(store: Store) -> None:
    """A damaged record leaves the next checkpoint first, with the reason."""
    _lose_manifest(store.root / "iter_0000030")
    decision = _resolve(store)
    assert _iterations(decision) == [20, 10]
    assert [each.iteration for each in decision.skipped] == [30]
    assert "has no manifest.json" in decision.skipped[0].reason


def test_every_reason_is_kept(store: Store) -> None:
    """What is older than the best candidate is named as well: the best may yet fail to verify."""
    _lose_manifest(store.root / "iter_0000020")
    _lose_manifest(store.root / "iter_0000010")
    decision = _resolve(store)
    assert _iterations(decision) == [30]
    assert [each.iteration for each in decision.skipped] == [20, 10]


def test_a_directory_that_is_named_must_exist(store: Store, tmp_path: Path) -> None:
    """A named directory that is absent, or a file, is an error whatever on_missing says."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(b"")
    for name in ("absent", "a/file", "a", "store/iter_0000099"):
        with pytest.raises(CheckpointNotFoundError, match=r"checkpoint\.load\.directory"):
            _resolve(store, directory=str(tmp_path / name))


def test_another_store_may_be_named(store: Store, tmp_path: Path) -> None:
    """A store root other than one's own gives its own run's checkpoints, whatever run id is set."""
    own = Store(PosixStorage(tmp_path / "own", FILESYSTEM))
    for run_id in (None, "mine"):
        decision = _resolve(own, run_id, directory=str(store.root))
        assert _iterations(decision) == [30, 20, 10]
        assert decision.survey.root == store.root


def test_one_checkpoint_may_be_named(store: Store, tmp_path: Path) -> None:
    """An iter_* directory stands for itself, also through a link, also with its own step."""
    link = tmp_path / "link"
    link.symlink_to(store.root / "iter_0000020")
    for directory in (store.root / "iter_0000020", link):
        for step in (None, 20):
            decision = _resolve(store, directory=str(directory), step=step)
            assert _iterations(decision) == [20]
            assert decision.survey.is_one
            assert decision.candidates[0].path == str(store.root / "iter_0000020")


def test_a_copy_under_another_name_is_what_its_manifest_says(store: Store, tmp_path: Path) -> None:
    """A checkpoint that was copied elsewhere under any name loads as its iteration."""
    shutil.copytree(store.root / "iter_0000020", tmp_path / "best")
    decision = _resolve(store, directory=str(tmp_path / "best"))
    assert _iterations(decision) == [20]
    assert decision.candidates[0].path == str(tmp_path / "best")


@pytest.mark.parametrize("name", ["store/iter_0000020", "best"])
def test_a_step_must_agree_with_the_checkpoint_named(
    store: Store, tmp_path: Path, name: str
) -> None:
    """load.step beside an iter_* directory of another iteration is a contradiction, and is said."""
    shutil.copytree(store.root / "iter_0000020", tmp_path / "best")
    with pytest.raises(ConfigError, match=r"load\.step is 30, but load\.directory is iteration 20"):
        _resolve(store, directory=str(tmp_path / name), step=30)


def test_superseded_checkpoints_load_only_by_number(store: Store) -> None:
    """Once an attempt resumed from 10, what earlier attempts saved beyond 10 is no candidate."""
    identity = RunIdentity(PosixStorage(store.root, FILESYSTEM))
    identity.claim_attempt("run", 10, str(store.root / "iter_0000010"))
    decision = _resolve(store)
    assert _iterations(decision) == [10]
    assert [each.iteration for each in decision.skipped] == [30, 20]
    assert "superseded when attempt 2 resumed from iteration 10" in decision.skipped[0].reason
    assert "load.step=30" in decision.skipped[0].reason
    assert _iterations(_resolve(store, step=30)) == [30]
    commit(store, 15, sequence=31, attempt=2)
    assert _iterations(_resolve(store)) == [15, 10]


def test_a_later_commit_of_a_smaller_iteration_wins(store: Store) -> None:
    """Newest means committed last: a save at 15 after a rollback outranks 30 and the tracker."""
    commit(store, 15, sequence=31)
    (store.root / TRACKER_NAME).write_bytes(b"30")
    assert _iterations(_resolve(store)) == [15, 30, 20, 10]


def test_an_attempt_supersedes_only_what_came_before_it(store: Store) -> None:
    """A chain of resumptions keeps each attempt's checkpoints up to where the next resumed."""
    identity = RunIdentity(PosixStorage(store.root, FILESYSTEM))
    identity.claim_attempt("run", 20, "x")
    commit(store, 25, sequence=31, attempt=2)
    commit(store, 35, sequence=32, attempt=2)
    identity.claim_attempt("run", 25, "x")
    commit(store, 40, sequence=33, attempt=3)
    decision = _resolve(store)
    assert _iterations(decision) == [40, 25, 20, 10]
    assert sorted(each.iteration or 0 for each in decision.skipped) == [30, 35]


def test_another_runs_checkpoints_never_win(store: Store) -> None:
    """A checkpoint of another run, however new, is passed over with both ids in the reason."""
    commit(store, 90, sequence=900, run_id="theirs")
    decision = _resolve(store)
    assert _iterations(decision) == [30, 20, 10]
    assert [each.iteration for each in decision.skipped] == [90]
    assert "'theirs'" in decision.skipped[0].reason
    assert "'run'" in decision.skipped[0].reason


def test_another_configured_run_is_refused(store: Store) -> None:
    """A configured run id that is not the own store's is an error, not an empty store."""
    with pytest.raises(StoreIdentityError, match="belongs to run 'run'"):
        _resolve(store, "mine")
    assert _iterations(_resolve(store, "run")) == [30, 20, 10]


def test_a_store_without_its_run_record_is_the_run_of_its_checkpoints(store: Store) -> None:
    """With run.json lost, one run's checkpoints still load; of several, one must be named."""
    (store.root / "run.json").unlink()
    assert _iterations(_resolve(store)) == [30, 20, 10]
    commit(store, 90, sequence=900, run_id="theirs")
    with pytest.raises(StoreIdentityError, match="several runs: run, theirs"):
        _resolve(store)
    assert _iterations(_resolve(store, "run")) == [30, 20, 10]
    assert _iterations(_resolve(store, "theirs")) == [90]
    assert _iterations(_resolve(store, step=90)) == [90]


def test_a_torn_run_record_is_an_error(store: Store) -> None:
    """A run.json that cannot be read is told, never taken for an empty store."""
    (store.root / "run.json").write_bytes(b"{")
    with pytest.raises(CorruptCheckpointError, match=r"run\.json"):
        _resolve(store)


def test_an_interrupted_replacement_is_a_candidate(store: Store) -> None:
    """The old checkpoint of an iteration whose successor never took the name still loads."""
    (store.root / "iter_0000030").rename(store.root / "iter_0000030.replaced-0123abcd")
    assert _iterations(_resolve(store)) == [30, 20, 10]
    assert _iterations(_resolve(store, step=30)) == [30]


def test_a_checkpoint_of_a_later_version_stops_the_load(store: Store) -> None:
    """The newest being of a later version, nothing older is taken for it but by number."""
    newest = find(store, 30)
    later = dataclasses.replace(newest.manifest, format=99).to_bytes()
    (newest.path / MANIFEST_NAME).write_bytes(later)
    for load in ({}, {"step": 30}, {"directory": str(newest.path)}, {"directory": str(store.root)}):
        with pytest.raises(FormatTooNewError, match="format 99; this version of holdfast reads up"):
            _resolve(store, **load)  # type: ignore[arg-type]
    assert _iterations(_resolve(store, step=20)) == [20]
    commit(store, 40, sequence=40)
    assert _iterations(_resolve(store)) == [40]  # committed later, by this version


def test_what_torch_wrote_into_the_store_is_nobodys(store: Store) -> None:
    """A checkpoint without any file of ours is no damage: the reason says how to load it."""
    plain = store.root / "iter_0000050"
    plain.mkdir()
    (plain / ".metadata").write_bytes(b"torch's")
    decision = _resolve(store)
    assert _iterations(decision) == [30, 20, 10]
    (other,) = decision.skipped
    assert other.condition is Condition.OTHER_RUN
    assert "move it out of this store" in other.reason


def test_a_tracker_of_a_damaged_checkpoint_is_not_told_twice(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """What is wrong with the checkpoint it names is told as such; another run's is no newest."""
    (store.root / TRACKER_NAME).write_bytes(b"30")
    commit(store, 90, sequence=900, run_id="theirs")
    with caplog.at_level(logging.WARNING):
        _resolve(store)
        _lose_manifest(store.root / "iter_0000030")
        _resolve(store)
    assert caplog.records == []


def test_a_checkpoint_that_cannot_be_looked_into_is_damaged(store: Store) -> None:
    """A directory whose very listing fails is passed over like any other damage."""

    class Blind(LocalFilesystem):
        def list_directory(self, path: Path) -> list[DirectoryEntry]:
            if path.name == "iter_0000030":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return super().list_directory(path)

        def open_existing(self, path: Path) -> BinaryIO:
            if path.parent.name == "iter_0000030":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return super().open_existing(path)

    survey = survey_store(PosixStorage(store.root, Blind()), is_own=True)
    conditions = {each.iteration: each.condition for each in survey.commits}
    assert conditions == {30: Condition.DAMAGED, 20: Condition.SOUND, 10: Condition.SOUND}
