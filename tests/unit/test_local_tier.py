"""The local tier of one rank: what it keeps, what it finds, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.config import LocalConfig, LocalKeepConfig
from holdfast.errors import ConfigError, CorruptCheckpointError, StageFailedError
from holdfast.filesystem import LocalFilesystem
from holdfast.ranks.coordinator import SingleProcess
from holdfast.tiers.local.budget import Budget, measure_place
from holdfast.tiers.local.replication import load_package
from holdfast.tiers.local.shard_file import ShardRecord
from holdfast.tiers.local.tier import LocalTier
from tests.support.mounts import small_memory
from tests.support.nodes import (
    DAMAGES,
    RUN_ID,
    Job,
    failure_of,
    flip,
    hide_package,
    memory_directory,
    published,
    shard_path,
)

pytest.importorskip("nvidia_resiliency_ext")


@pytest.fixture(params=["memory", "disk"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory in RAM, where the arena is the file, or on a disk, where it is written."""
    if request.param == "disk":
        yield tmp_path
    else:
        with memory_directory() as path:
            yield path


def _saved(root: Path, *iterations: int, **settings: Any) -> Job:
    job = Job(root, **settings)
    for iteration in iterations:
        job.save(iteration)
    return job


def _iterations(root: Path) -> list[int]:
    return [int(each.split("iter_")[1].split("_")[0]) for each in published(root, "node0")]


def test_what_was_saved_is_loaded_bit_for_bit(root: Path) -> None:
    """By the job that saved it, and by the next one."""
    job = _saved(root, 10, 20)
    assert job.load().iteration == 20
    job.close()
    loaded = Job(root).load()
    assert (loaded.iteration, loaded.wrong, loaded.reasons) == (20, [], [])


def test_so_many_are_kept_as_was_asked_for(root: Path) -> None:
    """In one job and over a restart; nothing else stays but what the next save will fill."""
    job = _saved(root, 10, 20, 30, keep=3)
    job.save(40)
    assert _iterations(root) == [20, 30, 40]
    job.close()
    job = _saved(root, 50, keep=3)
    assert _iterations(root) == [30, 40, 50]
    assert [each for each in job.files() if "pending" in each and "spare" not in each] == []
    job.close()


def test_an_iteration_can_be_saved_again(root: Path) -> None:
    """The second save takes the first one's place, and an older commit stays beside it."""
    job = _saved(root, 10, 20)
    first = shard_path(root, "node0", 0, 20).stat().st_ino
    job.save(20)
    assert _iterations(root) == [10, 20]
    assert shard_path(root, "node0", 0, 20).stat().st_ino != first
    assert job.load().iteration == 20
    job.close()


def test_iterations_of_more_than_seven_digits_work(root: Path) -> None:
    """As nvidia-resiliency-ext's own manager asserts that they do not."""
    job = _saved(root, 9_999_999, 10_000_000, 123_456_789_012)
    loaded = job.load()
    assert (loaded.iteration, loaded.wrong) == (123_456_789_012, [])
    assert _iterations(root) == [10_000_000, 123_456_789_012]
    job.close()


@pytest.mark.parametrize("kind", sorted(DAMAGES))
def test_a_damaged_shard_is_told_and_the_one_before_is_loaded(root: Path, kind: str) -> None:
    """Never a wrong value, and never silence."""
    _saved(root, 10, 20).close()
    DAMAGES[kind](shard_path(root, "node0", 0, 20))
    loaded = Job(root).load()
    assert (loaded.iteration, loaded.wrong) == (10, [])
    assert any("iter_0000020" in each for each in loaded.reasons) == (kind != "deleted")


def test_every_part_of_a_file_is_vouched_for(root: Path) -> None:
    """A bit flipped anywhere makes the commit before it the one that is loaded."""
    _saved(root, 10, 20).close()
    path = shard_path(root, "node0", 0, 20)
    sound = path.read_bytes()
    for offset in range(0, len(sound), 611):
        flip(path, offset)
        loaded = Job(root).load()
        assert (loaded.iteration, loaded.wrong) == (10, []), offset
        path.write_bytes(sound)
    assert Job(root).load().iteration == 20


def test_with_nothing_left_the_reasons_are_given(root: Path) -> None:
    """The caller turns to the persistent tier, and can say why."""
    _saved(root, 10, 20).close()
    for iteration in (10, 20):
        flip(shard_path(root, "node0", 0, iteration))
    loaded = Job(root).load()
    assert loaded.iteration is None
    assert len(loaded.reasons) == 2


def test_another_runs_files_never_win(root: Path) -> None:
    """Not by their directory, and not when somebody moves them into ours."""
    _saved(root, 10).close()
    stranger = Job(root)
    stranger.tier.close()
    stranger.tier = _tier(root / "node0", "other")
    stranger.save(99)
    stranger.close()
    assert Job(root).load().iteration == 10
    theirs = root / "node0" / "other" / "0" / "iter_0000099_0_local.pt"
    theirs.rename(root / "node0" / RUN_ID / "0" / theirs.name)
    loaded = Job(root).load()
    assert loaded.iteration == 10
    assert any("belongs to run 'other'" in each for each in loaded.reasons)


def _tier(directory: Path, run_id: str = RUN_ID, keep: int | None = 2) -> LocalTier:
    config = LocalConfig(directory=str(directory), keep=LocalKeepConfig(last=keep))
    return LocalTier(config, run_id, LocalFilesystem(), SingleProcess(), 5.0)


def test_what_a_rollback_supersedes_is_discarded(root: Path) -> None:
    """A save after it is the newest, though its iteration is smaller."""
    job = _saved(root, 10, 20, 30, keep=3)
    job.tier.discard_after(10, job.control)
    assert _iterations(root) == [10]
    job.save(15)
    assert job.load().iteration == 15
    job.close()
    assert Job(root).load().iteration == 15


def test_a_later_commit_wins_over_a_larger_iteration(root: Path) -> None:
    """Also where nothing was discarded."""
    job = _saved(root, 30)
    job.save(20)
    assert job.load().iteration == 20
    job.close()


def test_a_commit_that_is_objected_to_is_passed_over(root: Path) -> None:
    """With the reason of whoever knows what was superseded."""
    job = _saved(root, 10, 20)

    def objection(record: ShardRecord) -> str | None:
        return "superseded" if record.iteration == 20 else None

    found = job.tier.find(job.control, objection)
    assert found is not None
    assert found.record.iteration == 10
    assert [(each.iteration, each.reason) for each in job.tier.passed] == [(20, "superseded")]
    job.close()


def test_leftovers_of_a_killed_save_are_swept_at_start(root: Path) -> None:
    """Ours, and the package's own, over which its own manager fails for ever."""
    _saved(root, 10).close()
    own = root / "node0" / RUN_ID / "0"
    for name in ("spare.pending-0123abcd", "iter_0000020_0_local.dirty.pt"):
        (own / name).write_bytes(b"torn")
    job = Job(root)
    job.save(20)
    assert _iterations(root) == [10, 20]
    assert not [each for each in job.files() if "dirty" in each or "0123abcd" in each]
    job.close()


def test_a_commit_is_pruned_only_by_one_that_all_ranks_have(root: Path) -> None:
    """A save that is refused at its last stage leaves every file as it was."""
    job = _saved(root, 10, 20)
    before = {name: (root / "node0" / RUN_ID / name).read_bytes() for name in
              published(root, "node0")}  # fmt: skip

    class Refusing(SingleProcess):
        def all_reduce(self, stage: str, work: Any, judge: Any) -> Any:
            value = super().all_reduce(stage, work, judge)
            if stage == "local publish":
                raise StageFailedError(stage, [])
            return value

    job.writer = Refusing()
    failure_of(lambda: job.save(20))
    failure_of(lambda: job.save(30))
    after = {name: (root / "node0" / RUN_ID / name).read_bytes() for name in
             published(root, "node0")}  # fmt: skip
    assert after == before
    job.writer = SingleProcess()
    job.save(30)
    assert _iterations(root) == [20, 30]
    job.close()


def test_a_refused_admission_leaves_no_trace(root: Path) -> None:
    """A newer attempt has taken over: nothing is published and the memory is free again."""
    job = _saved(root, 10)

    def refuse() -> Any:
        raise CorruptCheckpointError("store", "taken over")

    job._identify = refuse  # type: ignore[method-assign]  # the caller's part of the save
    for _ in range(4):
        failure_of(lambda: job.save(20))
    assert _iterations(root) == [10]
    job.close()


def test_a_drain_reads_what_a_later_save_would_have_filled() -> None:
    """The file that it holds is not given another turn; a save waits only for a second such."""
    with memory_directory() as root:
        job = _saved(root, 10, keep=2)
        with job.tier.keep(10), shard_path(root, "node0", 0, 10).open("rb") as stream:
            whole = stream.read()
            for iteration in (20, 30, 40):
                job.save(iteration)
            with job.tier.keep(30):
                job.save(50)
                failure = failure_of(lambda: _with_patience(job, 0.2).save(60))
            stream.seek(0)
            assert stream.read() == whole
            assert _iterations(root) == [10, 40, 50]
        assert "no file became free" in str(failure)
        job.save(60)
        assert _iterations(root) == [50, 60]
        assert len(job.files()) == 3, "the file that was one too many is gone"
        job.close()


def _with_patience(job: Job, seconds: float) -> Job:
    job.tier._timeout_seconds = seconds
    return job


def test_a_memory_save_reuses_the_memory_of_older_ones() -> None:
    """From the fourth save on no file is made: three take turns, arenas and all."""
    with memory_directory() as root:
        job = _saved(root, 10, 20, 30)
        made = {each.stat().st_ino for each in (root / "node0").rglob("*") if each.is_file()}
        arenas = set()
        for iteration in (40, 50, 60, 70):
            arenas.add(id(job.tier.reserve(job.layout, job.control)))
            job.tier.release()
            job.save(iteration)
        after = {each.stat().st_ino for each in (root / "node0").rglob("*") if each.is_file()}
        assert after == made
        assert len(made) == 3
        assert len(arenas) <= 3
        job.close()


def test_verifying_first_finds_what_reading_would(root: Path) -> None:
    """Every file of the commit is read once, and a damaged one counts as missing from then on."""
    job = _saved(root, 10, 20)
    found = job.tier.find(job.control, lambda record: None)
    assert found is not None
    job.tier.verify(found, job.control)
    flip(shard_path(root, "node0", 0, 20))
    with pytest.raises(CorruptCheckpointError, match="block 0"):
        job.tier.verify(found, job.control)
    assert job.load().iteration == 10
    job.close()


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, 0, 1])
def test_fewer_than_two_kept_is_an_error(tmp_path: Path, keep: int | None) -> None:
    """One whole commit must stand while the next one is made."""
    with pytest.raises(ConfigError, match=r"checkpoint\.local\.keep\.last"):
        _tier(tmp_path, keep=keep)


def test_without_the_package_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of an ImportError from somewhere inside."""
    hide_package(monkeypatch)
    with pytest.raises(ConfigError, match="nvidia-resiliency-ext") as caught:
        _tier(tmp_path)
    assert "local.directory to null" in str(caught.value)


def test_the_package_is_imported_only_where_there_is_a_local_tier() -> None:
    """Importing the tier's module costs nothing to those who have none."""
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import holdfast.tiers.local.tier; "
        "sys.exit(any(name.startswith('nvidia_resiliency') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_directory_in_which_others_write_is_refused(tmp_path: Path) -> None:
    """What they put there would be loaded."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="written by others"):
        _tier(tmp_path / "open")


# -- the budget ------------------------------------------------------------------------------------


def test_the_budget_is_told_before_anything_is_allocated(tmp_path: Path) -> None:
    """Own shards and copies, times the files that take turns, against what is free."""
    tier = _tier(tmp_path)
    budget = tier.budget(1 << 20, SingleProcess())
    assert budget.own_bytes == 3 << 20
    assert budget.copy_bytes == 0
    assert budget.room is not None
    assert "3 files in rotation" in budget.line
    with pytest.raises(ConfigError, match=r"local tier at .* TiB free .* limited by"):
        tier.budget(1 << 50, SingleProcess())
    tier.close()


def test_what_lies_there_already_is_room(tmp_path: Path) -> None:
    """A restarted job fills its old files' room again."""
    with small_memory(tmp_path / "own", "8m") as folder:  # a file system that no other test fills
        before = measure_place(folder, in_memory=False, reused=[folder])
        (folder / "old").write_bytes(b"x" * (4 << 20))
        after = measure_place(folder, in_memory=False, reused=[folder])
        not_reused = measure_place(folder, in_memory=False, reused=[])
    assert after.room.free_bytes == before.room.free_bytes
    assert before.room.free_bytes - not_reused.room.free_bytes == 4 << 20
    assert Budget("d", 1, 1, 3, None).problem is None


# -- nvidia-resiliency-ext -------------------------------------------------------------------------


def test_importing_the_package_warns_of_nothing_new() -> None:
    """Only what torch says about pynvml is silenced."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load_package()
    assert [str(each.message) for each in found] == []
