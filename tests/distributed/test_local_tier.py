"""The local tier on several ranks and simulated nodes: what is lost is recovered, or told."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from holdfast.errors import StageFailedError
from holdfast.filesystem import LocalFilesystem
from tests.support.deadlines import DEADLINE_SECONDS, told_within
from tests.support.nodes import (
    DAMAGES,
    Job,
    Loaded,
    failure_of,
    lose_node,
    memory_directory,
    published,
    shard_path,
    wait_for_all,
)
from tests.support.ranks import run_ranks

TWO_BY_TWO = ("a", "a", "b", "b")


@pytest.fixture(params=["memory", "disk"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory in RAM, where the arena is the file, or on a disk, where it is written."""
    if request.param == "disk":
        yield tmp_path
    else:
        with memory_directory() as path:
            yield path


def _save(root: Path, nodes: Sequence[str], settings: dict[str, Any]) -> None:
    """Save 10 and 20."""
    job = Job(root, nodes, **settings)
    job.save(10)
    job.save(20)
    job.close()


def _load(root: Path, nodes: Sequence[str], settings: dict[str, Any]) -> Loaded:
    job = Job(root, nodes, **settings)
    loaded = job.load()
    job.close()
    return loaded


def _save_harm_load(
    root: Path, nodes: Sequence[str], settings: dict[str, Any], harms: Sequence[str]
) -> list[Loaded]:
    """Save 10 and 20, do one harm, and load in a new job; once for each harm."""
    found = []
    for number, harm in enumerate(harms):
        folder = root / str(number)
        _save(folder, nodes, settings)
        wait_for_all()
        job = Job(folder, nodes, **settings)
        if job.rank == 0:
            HARMS[harm](folder)
        wait_for_all()
        found.append(job.load())
        wait_for_all()
        job.close()
    return found


def _damage(kind: str, node: str, rank: int, owner: int) -> Callable[[Path], None]:
    return lambda root: DAMAGES[kind](shard_path(root, node, rank, 20, owner))


def _both(*harms: Callable[[Path], None]) -> Callable[[Path], None]:
    def harm(root: Path) -> None:
        for each in harms:
            each(root)

    return harm


HARMS: dict[str, Callable[[Path], None]] = {
    "none": lambda root: None,
    "node b is lost": lambda root: lose_node(root, "b"),
    **{f"a shard is {kind}": _damage(kind, "b", 2, 2) for kind in DAMAGES},
    **{f"a replica is {kind}": _damage(kind, "a", 0, 2) for kind in DAMAGES},
    **{
        f"a shard and its replica are {kind}": _both(
            _damage(kind, "b", 2, 2), _damage(kind, "a", 0, 2)
        )
        for kind in DAMAGES
    },
}


def test_with_replicas_any_one_loss_costs_nothing(root: Path) -> None:
    """Node or file: iteration 20 comes back bit for bit on all ranks, and all copies are whole."""
    harms = [name for name in HARMS if " and " not in name]
    columns = run_ranks(_save_harm_load, 4, root, TWO_BY_TWO, {"factor": 2}, harms)
    for rank, found in enumerate(columns):
        for harm, loaded in zip(harms, found, strict=True):
            assert (loaded.iteration, loaded.wrong) == (20, []), (harm, rank, loaded)
    for number, harm in enumerate(harms):
        for node, ranks in (("a", (0, 1)), ("b", (2, 3))):
            expected = {
                f"{rank}/iter_{iteration:07d}_{owner}_local.pt"
                for rank in ranks
                for iteration in (10, 20)
                for owner in (rank, (rank + 2) % 4)
            }
            missing = expected - set(published(root / str(number), node))
            gone = {each for each in missing if "iter_0000020" in each}
            assert not gone, f"redundancy is restored: {harm}, {gone}"


def _find_connections(root: Path) -> tuple[list[int], bool, bool]:
    """Return the members of this rank's group, and whether all ranks are connected; then after."""
    job = Job(root, TWO_BY_TWO, factor=2)
    job.save(10)
    job.save(20)
    assert job.load().iteration == 20
    replication = job.tier.replication
    assert replication is not None
    assert replication.group is not None
    members = distributed.get_process_group_ranks(replication.group.wrapped.group)
    before = replication.has_all
    wait_for_all()
    if job.rank == 0:
        lose_node(root, "b")
    wait_for_all()
    assert job.load().iteration == 20
    found = members, before, replication.has_all
    job.close()
    return found


def test_ranks_are_connected_to_those_they_send_copies_to(root: Path) -> None:
    """No rank has a connection to each other one until a load after a loss needs that."""
    for rank, found in enumerate(run_ranks(_find_connections, 4, root)):
        assert found == ([rank % 2, rank % 2 + 2], False, True)


def test_without_any_copy_the_commit_before_is_loaded(root: Path) -> None:
    """Shard and replica broken: all ranks load iteration 10 and say why."""
    harms = [name for name in HARMS if " and " in name]
    for found in run_ranks(_save_harm_load, 4, root, TWO_BY_TWO, {"factor": 2}, harms):
        for harm, loaded in zip(harms, found, strict=True):
            assert (loaded.iteration, loaded.wrong) == (10, []), (harm, loaded)
            assert any("rank 2 of 4" in each for each in loaded.reasons), loaded.reasons


def _save_all(root: Path, cases: Sequence[tuple[Sequence[str], dict[str, Any]]]) -> None:
    for number, (nodes, settings) in enumerate(cases):
        _save(root / str(number), nodes, settings)


def _load_all(root: Path, cases: Sequence[tuple[Sequence[str], dict[str, Any]]]) -> list[Loaded]:
    """Load what each case saved, then save 30 and load that."""
    found = []
    for number, (nodes, settings) in enumerate(cases):
        job = Job(root / str(number), nodes, **settings)
        found.append(job.load())
        job.save(30)
        found.append(job.load())
        job.close()
    return found


def _check_all(
    root: Path,
    saved: tuple[int, Sequence[tuple[Sequence[str], dict[str, Any]]]],
    loaded: tuple[int, Sequence[tuple[Sequence[str], dict[str, Any]]]],
    harm: Callable[[Path], None] = lambda root: None,
) -> None:
    """Save with so many ranks in each case, harm, and load with so many: 20, then 30."""
    run_ranks(_save_all, saved[0], root, saved[1])
    for number in range(len(saved[1])):
        harm(root / str(number))
    for rank, found in enumerate(run_ranks(_load_all, loaded[0], root, loaded[1])):
        results = [(each.iteration, each.wrong) for each in found]
        assert results == [(20, []), (30, [])] * len(loaded[1]), (rank, found)


def test_shards_are_found_wherever_their_rank_is_now(root: Path) -> None:
    """Ranks numbered anew over the nodes, with and without replicas: all is there, bit for bit."""
    before = [(TWO_BY_TWO, {"factor": 1}), (TWO_BY_TWO, {"factor": 2})]
    after = [(("b", "a", "b", "a"), {"factor": 1}), (("b", "b", "a", "a"), {"factor": 2})]
    _check_all(root, (4, before), (4, after))


def _load_and_list(root: Path, nodes: Sequence[str]) -> tuple[Loaded, list[str]]:
    job = Job(root, nodes)
    loaded = job.load()
    wait_for_all()
    files = job.files()
    job.close()
    return loaded, files


def test_a_shard_follows_its_rank_to_another_node(root: Path) -> None:
    """It is written again where its rank is now, and read from there."""
    run_ranks(_save, 4, root, TWO_BY_TWO, {})
    for rank, (loaded, files) in enumerate(
        run_ranks(_load_and_list, 4, root, ("b", "a", "b", "a"))
    ):
        assert (loaded.iteration, loaded.wrong) == (20, [])
        assert f"{rank}/iter_0000020_{rank}_local.pt" in files


def test_fewer_ranks_load_what_more_have_written(root: Path) -> None:
    """4 to 2: on both nodes; on one of them, with replicas; and 4 to 1."""
    before = [(TWO_BY_TWO, {"factor": 1}), (TWO_BY_TWO, {"factor": 2})]
    _check_all(root, (4, before), (2, [(("a", "b"), {"factor": 1}), (("b", "b"), {"factor": 2})]))


def test_more_ranks_load_what_fewer_have_written(root: Path) -> None:
    """2 to 4, where half of the ranks sit on a node that has nothing."""
    before = [(("a", "b"), {"factor": 1}), (("a", "a"), {"factor": 1})]
    after = [(TWO_BY_TWO, {"factor": 1}), (("a", "a", "c", "c"), {"factor": 2})]
    _check_all(root, (2, before), (4, after))


def test_a_lost_node_is_covered_by_replicated_state(root: Path) -> None:
    """Without replication, where every node holds all of the state: the other node serves."""
    settings = {"factor": 1, "sharded": 0}
    cases = [(TWO_BY_TWO, settings)]
    _check_all(root, (4, cases), (4, cases), lambda folder: lose_node(folder, "b"))


def test_a_lost_node_and_fewer_ranks_are_covered_too(root: Path) -> None:
    """As before, and the job goes on with the ranks of the node that is left."""
    settings = {"factor": 1, "sharded": 0}
    _check_all(
        root,
        (4, [(TWO_BY_TWO, settings)]),
        (2, [(("a", "a"), settings)]),
        lambda folder: lose_node(folder, "b"),
    )


def test_replication_settings_may_change_between_runs(root: Path) -> None:
    """Factor 1 to 2, 2 to 1, and another jump: what was written before loads as it lies."""
    before = [(TWO_BY_TWO, {"factor": factor}) for factor in (1, 2, 2)]
    after = [
        (TWO_BY_TWO, {"factor": 2}),
        (TWO_BY_TWO, {"factor": 1}),
        (TWO_BY_TWO, {"factor": 2, "jump": 1}),
    ]
    _check_all(root, (4, before), (4, after))


def test_a_lost_clique_is_told_and_nothing_is_loaded(root: Path) -> None:
    """Both nodes that held a shard are gone: no rank loads anything, and all know why."""
    nodes = ("a", "b", "c", "d")
    run_ranks(_save, 4, root, nodes, {"factor": 2})
    lose_node(root, "a")
    lose_node(root, "b")
    for loaded in run_ranks(_load, 4, root, nodes, {"factor": 2}):
        assert loaded.iteration is None
        assert loaded.reasons == [
            f"iter_00000{iteration}: nothing is left of ranks 0, 1 of 4" for iteration in (20, 10)
        ]


class _Killer(LocalFilesystem):
    """Ends this process when a file is made for the second time after arming."""

    def __init__(self) -> None:
        super().__init__()
        self.strike_at: Callable[[Path], bool] = lambda path: False

    def open_new(self, path: Path) -> Any:
        self._strike(path)
        return super().open_new(path)

    def rename(self, source: Path, target: Path) -> None:
        self._strike(target)
        super().rename(source, target)

    def _strike(self, path: Path) -> None:
        if self.strike_at(path):
            os.kill(os.getpid(), signal.SIGKILL)


def _die_in_save(root: Path, where: str, dying: Sequence[int]) -> str:
    """Save 10 and 20, then have ranks killed in the save of 30."""
    killer = _Killer()
    job = Job(root, TWO_BY_TWO, factor=2, filesystem=killer, timeout_seconds=DEADLINE_SECONDS)
    job.save(10)
    job.save(20)
    wait_for_all()

    def arm() -> None:
        if job.rank in dying:
            if where == "staging":
                os.kill(os.getpid(), signal.SIGKILL)
            killer.strike_at = lambda path: where in path.name

    started = time.monotonic()
    try:
        job.save(30, before_write=arm)
    except StageFailedError as error:
        assert time.monotonic() - started < told_within(0)
        return str(error)
    return ""


def _resume(root: Path) -> tuple[Loaded, Loaded, list[str]]:
    job = Job(root, TWO_BY_TWO, factor=2)
    first = job.load()
    job.save(30)
    second = job.load()
    files = job.files()
    job.close()
    return first, second, files


@pytest.mark.parametrize("where", ["staging", "iter_0000030_", "iter_0000030_3"])
def test_a_job_killed_in_a_save_comes_back_to_that_iteration(root: Path, where: str) -> None:
    """All ranks killed at once: 20 loads, 30 can be saved again, and no leftover stays."""
    ranks = (0, 1, 2, 3)
    run_ranks(_die_in_save, 4, root, where, ranks, may_die=ranks)
    for first, second, files in run_ranks(_resume, 4, root):
        assert (first.iteration, first.wrong) == (20, [])
        assert (second.iteration, second.wrong) == (30, [])
        iterations = {each.split("/")[1][:12] for each in files if "spare" not in each}
        assert iterations == {"iter_0000020", "iter_0000030"}


@pytest.mark.parametrize("where", ["staging", "iter_0000030_3"])
def test_one_killed_rank_is_told_to_the_others(root: Path, where: str) -> None:
    """The others raise within the timeout, naming it, and the next job has what was there."""
    messages = run_ranks(_die_in_save, 4, root, where, (3,), may_die=(3,))
    for message in messages[:3]:
        assert "rank 3" in message
    for first, second, _ in run_ranks(_resume, 4, root):
        assert (first.iteration, first.wrong) == (20, [])
        assert (second.iteration, second.wrong) == (30, [])


def _fill_up(root: Path) -> tuple[str, Loaded, Loaded]:
    """Save where node b has room for two turns only: the third save does not fit."""
    job = Job(root, TWO_BY_TWO, factor=2, width=4096)
    job.save(10)
    job.save(20)
    error = failure_of(lambda: job.save(30))
    loaded = job.load()
    wait_for_all()
    if job.rank == 0:
        subprocess.run(
            ["mount", "-o", "remount,size=64m", str(root / "b")], check=True, capture_output=True
        )
    wait_for_all()
    job.save(30)
    after = job.load()
    job.close()
    return str(error), loaded, after


@pytest.mark.parametrize(("size", "stage"), [("4000k", "local exchange"), ("3300k", "local begin")])
def test_a_full_directory_on_one_node_fails_the_save_on_all(
    tmp_path: Path, size: str, stage: str
) -> None:
    """ENOSPC on one node: every rank raises it with the path, 20 loads, and with room 30 saves."""
    (tmp_path / "b").mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(tmp_path / "b")],
        check=False,
        capture_output=True,
    )
    if made.returncode != 0:
        pytest.skip("this user may not mount")
    try:
        for message, loaded, after in run_ranks(_fill_up, 4, tmp_path):
            assert "ENOSPC" in message
            assert stage in message
            assert str(tmp_path / "b") in message
            assert (loaded.iteration, loaded.wrong) == (20, [])
            assert (after.iteration, after.wrong) == (30, [])
    finally:
        subprocess.run(["umount", str(tmp_path / "b")], check=True)


def test_damage_is_found_on_the_way_to_another_world(root: Path) -> None:
    """A flipped bit in a file here or at a peer: its copy serves, or the commit before."""
    cases = [(TWO_BY_TWO, {"factor": 2})] * 2
    run_ranks(_save_all, 4, root, cases)
    DAMAGES["flipped"](shard_path(root / "0", "b", 3, 20))
    DAMAGES["flipped"](shard_path(root / "1", "a", 0, 20, owner=2))
    after: list[tuple[Sequence[str], dict[str, Any]]] = [
        (("a", "b"), {"factor": 2}),
        (("a", "c"), {"factor": 2}),
    ]
    for first, _, second, _ in run_ranks(_load_all, 2, root, after):
        assert (first.iteration, first.wrong, first.tries) == (20, [], 2)
        assert any("3/iter_0000020_3_local.pt" in each for each in first.reasons)
        assert (second.iteration, second.wrong, second.tries) == (10, [], 2)
        assert any("rank 2 of 4" in each for each in second.reasons)


def test_shards_of_many_blocks_travel_whole(root: Path) -> None:
    """More than one block of digests: exchanged, brought home, and read by another world."""
    settings = {"factor": 2, "width": 120_000}
    before = [(("a", "b"), settings)] * 4
    run_ranks(_save_all, 2, root, before)
    lose_node(root / "0", "a")
    lose_node(root / "1", "b")
    lose_node(root / "2", "b")
    for number in (2, 3):  # far from the index: found only where the block is read
        DAMAGES["flipped"](shard_path(root / str(number), "a", 0, 20))
    for loaded in run_ranks(_load, 2, root / "0", ("a", "b"), settings):
        assert (loaded.iteration, loaded.wrong) == (20, [])
    for loaded in run_ranks(_load, 3, root / "1", ("a", "b", "b"), settings):
        assert (loaded.iteration, loaded.wrong) == (20, [])
    for loaded in run_ranks(_load, 3, root / "2", ("b", "b", "a"), settings):
        assert (loaded.iteration, loaded.wrong, loaded.tries) == (10, [], 2)
    for loaded in run_ranks(_load, 2, root / "3", ("a", "b"), settings):
        assert (loaded.iteration, loaded.wrong, loaded.tries) == (20, [], 2)


def _die_in_load(root: Path, where: str) -> str:
    """Rank 2 is killed when it makes a file in a load: while it receives its own shard."""
    killer = _Killer()
    job = Job(root, TWO_BY_TWO, factor=2, filesystem=killer, timeout_seconds=DEADLINE_SECONDS)
    if job.rank == 2:
        killer.strike_at = lambda path: where in path.name
    started = time.monotonic()
    error = failure_of(job.load)
    assert time.monotonic() - started < told_within(2)
    return f"{type(error).__name__}: {error}"


def test_a_rank_that_dies_in_a_load_is_told_to_the_others(root: Path) -> None:
    """No rank waits for ever in the exchange that brings its shard home, and nothing is lost."""
    run_ranks(_save, 4, root, TWO_BY_TWO, {"factor": 2})
    lose_node(root, "b")
    messages = run_ranks(_die_in_load, 4, root, "spare", may_die=(2,))
    for rank in (0, 1, 3):
        assert "StageTimeoutError" in messages[rank]
        assert "rank 2" in messages[rank]
    for loaded in run_ranks(_load, 4, root, TWO_BY_TWO, {"factor": 2}):
        assert (loaded.iteration, loaded.wrong) == (20, [])


def _refuse_on_one(root: Path) -> list[str]:
    """Rank 1 cannot stage; then all save; then rank 1 is at another step."""
    job = Job(root, ("a", "b"), factor=2, timeout_seconds=DEADLINE_SECONDS)
    job.save(10)
    messages = []
    job.tier.release()
    iteration = 20 if job.rank == 0 else 21
    messages.append(str(failure_of(lambda: job.save(iteration))))
    job.save(30)
    loaded = job.load()
    messages.append(f"{loaded.iteration} {loaded.wrong} {job.files()}")
    job.close()
    return messages


def test_ranks_at_different_steps_are_named_and_nothing_is_published(root: Path) -> None:
    """The next save works, and what is kept are the two that all ranks made."""
    for message, after in run_ranks(_refuse_on_one, 2, root):
        assert "rank 1" in message
        assert "saves at step 21, rank 0 at step 20" in message
        assert after.startswith("30 []")
        assert "iter_0000020" not in after
        assert "iter_0000021" not in after
