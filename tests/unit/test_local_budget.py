"""What the local tier takes of a node is told at the load, and refused there if it cannot fit."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.config import LocalConfig, LocalKeepConfig, ReplicationConfig
from holdfast.errors import ConfigError
from holdfast.ranks.coordinator import SingleProcess
from holdfast.ranks.topology import Seat, Topology
from holdfast.snapshot.arena import Room
from holdfast.tiers.local.budget import Budget, Need, report_budget
from tests.support.deadlines import ANSWER_SECONDS
from tests.support.managers import Live, linear, manager_of, step
from tests.support.mounts import small_memory
from tests.support.nodes import hide_package
from tests.support.ranks import run_ranks

pytest.importorskip("nvidia_resiliency_ext")

_LINE = re.compile(r"local tier at (\S+): .*own shards (\S+ \S+), copies for others (\S+ \S+)\)")


@pytest.fixture
def small_directory(tmp_path: Path) -> Iterator[Path]:
    """A local directory in RAM with room for 8 MB."""
    with small_memory(tmp_path / "memory", "8m") as folder:
        yield folder


class _Start:
    """One start of a run whose shard takes 24 bytes for each unit of its model's width."""

    def __init__(
        self,
        root: Path,
        local: Path | None,
        width: int,
        factor: int = 1,
        keep: int = 2,
        **values: Any,
    ) -> None:
        self.live = linear(width=width)
        settings: dict[str, Any] = {"directory": None if local is None else str(local)}
        if keep > 2:
            settings["keep"] = {"last": keep}
        if factor > 1:
            settings["replication"] = {"factor": factor}
        self.manager = manager_of(root / "store", local=settings, **values)

    def load(self, **context: Any) -> int:
        return self.live.load(self.manager, **context).iteration

    def save(self, iteration: int, *, to_local: bool = True) -> None:
        step(self.live, iteration)
        self.live.optimizer.zero_grad()
        self.live.save(self.manager, iteration, non_persistent_ckpt=to_local)

    def close(self) -> None:
        self.manager.finalize_async_saves(self.live.state, terminate=True)


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each for each in caplog.messages if each.startswith("local tier at")]


# -- told --------------------------------------------------------------------------------------


def test_the_sum_is_told_at_the_load_and_holds_at_the_first_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An optimizer without state counts as what it will be: the save finds the same."""
    caplog.set_level(logging.INFO, "holdfast")
    start = _Start(tmp_path, tmp_path / "local", 50_000)
    assert start.load() == 0
    (told,) = _lines(caplog)
    start.save(1)
    start.close()
    _, at_save = _lines(caplog)
    assert _numbers(told) == _numbers(at_save)
    assert "own shards 3.6 MiB, copies for others 0 B" in told
    assert re.search(r", and in memory 1\.2 MiB of .* left$", told), "the disk needs an arena"
    assert "planning again" not in caplog.text, "the plan was made in vain"


def test_a_resumed_run_is_told_what_it_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The commit that is loaded shows it; and where more is to be kept, more is needed."""
    start = _Start(tmp_path, tmp_path / "local", 50_000)
    start.load()
    start.save(1)
    start.close()
    caplog.set_level(logging.INFO, "holdfast")
    start = _Start(tmp_path, tmp_path / "local", 50_000, keep=4)
    assert start.load() == 1
    start.save(2)
    start.close()
    told, at_save = _lines(caplog)
    assert "5 files in rotation" in told
    assert _mebibytes(told) == pytest.approx(_mebibytes(at_save), abs=0.1), "small states differ"


def _numbers(line: str) -> tuple[str, ...]:
    match = _LINE.match(line)
    assert match is not None, line
    return match.groups()


def test_the_sum_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A manager that rolls back has said it before."""
    caplog.set_level(logging.INFO, "holdfast")
    start = _Start(tmp_path, tmp_path / "local", 4)
    start.load()
    start.load()
    assert len(_lines(caplog)) == 1
    start.close()


def test_what_will_not_save_state_is_told_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a local tier, or with model and optimizer left alone, nothing is asked or made."""
    caplog.set_level(logging.INFO, "holdfast")
    start = _Start(tmp_path, None, 4)
    start.load()
    start.close()
    start = _Start(tmp_path, tmp_path / "local", 4)
    start.load(skip_load_to_model_and_opt=True)
    start.close()
    assert _lines(caplog) == []
    assert not (tmp_path / "local").exists()


def test_a_missing_package_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fresh store too, where nothing is loaded, and not at the first save."""
    hide_package(monkeypatch)
    with pytest.raises(ConfigError, match="nvidia-resiliency-ext"):
        _Start(tmp_path, tmp_path / "local", 4).load()


def test_what_is_not_counted_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of an unknown optimizer without state the sum is a least one."""
    from torch.optim import Adafactor

    caplog.set_level(logging.INFO, "holdfast")
    start = _Start(tmp_path, tmp_path / "local", 4)
    start.live = Live(start.live.model, Adafactor(start.live.model.parameters()))  # type: ignore[union-attr]
    start.load()
    start.close()
    (line,) = _lines(caplog)
    assert line.endswith("; not counting what Adafactor will keep")


def _mebibytes(line: str) -> list[float]:
    factors = {"B": 2.0**-20, "KiB": 2.0**-10, "MiB": 1.0}
    sizes = [each.split() for each in _numbers(line)[1:]]
    return [float(number) * factors[unit] for number, unit in sizes]


# -- refused -----------------------------------------------------------------------------------


def test_what_cannot_fit_is_refused_before_training(tmp_path: Path, small_directory: Path) -> None:
    """With the numbers, every time it is asked, and nothing was taken."""
    start = _Start(tmp_path, small_directory, 200_000)  # 3 files of 4.6 MiB
    before = start.live.digests()
    for _ in range(2):
        with pytest.raises(
            ConfigError,
            match=r"13\.9 MiB of [78]\.\d MiB free \(3 files in rotation.*limited by the free "
            r"space.*lower local\.keep\.last",
        ):
            start.load()
    assert start.live.digests() == before
    assert list(small_directory.iterdir()) == []
    start.close()
    start = _Start(tmp_path, small_directory, 100_000)  # 3 files of 2.3 MiB
    assert start.load() == 0
    start.close()


def test_a_disk_needs_memory_to_copy_into() -> None:
    """Files there are no memory: what the container has left must hold the copy of the state."""
    found = Budget("d", 30, 0, 3, Room(1000, "the disk"), 10, Room(9, "the group"))
    assert "limited by the group; give the job more memory" in (found.problem or "")
    fits = Budget("d", 30, 0, 3, Room(30, "the disk"), 10, Room(10, "the group"))
    assert fits.problem is None
    assert Budget("d", 0, 0, 3, Room(0, "the disk")).problem is None


# -- what lies there already -------------------------------------------------------------------


def _save_and_be_killed(root: Path, local: Path, to_local: bool) -> None:
    """Save three times, and leave everything as it is."""
    start = _Start(root, local, 100_000)
    start.load()
    for iteration in (1, 2, 3):
        start.save(iteration, to_local=to_local)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("names_it", [False, True], ids=["newest", "named"])
def test_a_restart_over_a_full_directory_goes_on(
    tmp_path: Path, small_directory: Path, names_it: bool
) -> None:
    """The files of the run's earlier attempts make way: they are no reason to refuse.

    Also where a load names a directory, and does not look at the local tier.
    """
    run_ranks(_save_and_be_killed, 1, tmp_path, small_directory, not names_it, may_die={0})
    found = os.statvfs(small_directory)
    assert found.f_bavail * found.f_frsize < 2 << 20, "it was to be full"
    load = {"directory": str(tmp_path / "store")} if names_it else {}
    start = _Start(tmp_path, small_directory, 100_000, load=load)
    assert start.load() == 3
    start.save(4)
    start.close()
    start = _Start(tmp_path, small_directory, 100_000)
    assert start.load() == 4
    start.close()


def test_another_runs_files_are_no_room(tmp_path: Path, small_directory: Path) -> None:
    """Nothing removes them: what they leave is all there is."""
    other = _Start(tmp_path / "other", small_directory, 100_000)
    other.load()
    other.save(1)
    other.save(2)
    other.close()
    start = _Start(tmp_path, small_directory, 100_000)
    with pytest.raises(ConfigError, match=r"7\.0 MiB of [23]\.\d MiB free"):
        start.load()
    start.close()


# -- several ranks -----------------------------------------------------------------------------


def _seats(*places: tuple[str, int]) -> Topology:
    return Topology(tuple(Seat(node, (1, inode)) for node, inode in places))


def test_ranks_of_one_directory_are_added_up(tmp_path: Path) -> None:
    """Both ranks' shards and the drain's turn; what other optimizers keep is named."""
    config = LocalConfig(
        directory=str(tmp_path),
        keep=LocalKeepConfig(last=2),
        replication=ReplicationConfig(factor=2),
    )
    topology = _seats(("a", 1), ("a", 1), ("b", 1), ("b", 1))
    found = report_budget(
        config,
        topology,
        None,
        Need(1 << 20, ("Lion",)),
        _AsIfFour([1 << 20, 2 << 20, 4 << 20, 8 << 20]),
        drains=True,
    )
    assert found.own_bytes == 4 * (3 << 20)
    assert found.copy_bytes == 4 * (12 << 20), "rank 0 holds for 2, rank 1 for 3"
    assert found.buffers == 4
    assert found.line.endswith("; on node a; not counting what Lion will keep")


@pytest.mark.parametrize(
    ("nodes", "factor", "jump", "cost"),
    [
        ("aaaa", 2, None, "45.0 MiB there (3 files in rotation)"),
        ("aaaa", 3, None, "90.0 MiB there (3 files in rotation)"),
        ("aaaa", 2, 4, "45.0 MiB there (3 files in rotation)"),
        ("abab", 2, 4, "45.0 MiB there (3 files in rotation)"),
        ("aaaa", 2, 2, None),
        ("aaab", 2, None, None),
        ("aaaa", 1, None, None),
        ("abcd", 2, None, None),
    ],
)
def test_copies_on_one_node_are_told_with_their_cost(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    nodes: str,
    factor: int,
    jump: int | None,
    cost: str | None,
) -> None:
    """Where all ranks are lost together, rank 0 warns of the memory that copies take in vain."""
    config = LocalConfig(
        directory=str(tmp_path), replication=ReplicationConfig(factor=factor, jump=jump)
    )
    ranks = _AsIfFour([1 << 20, 2 << 20, 4 << 20, 8 << 20])
    with caplog.at_level(logging.WARNING):
        found = report_budget(
            config, _seats(*((each, 1) for each in nodes)), None, Need(1 << 20), ranks, drains=False
        )
    messages = [each.getMessage() for each in caplog.records]
    if cost is None:
        assert messages == []
        return
    (message,) = messages
    assert f"factor is {factor}, but all 4 ranks are on one node (a)" in message
    assert cost in message
    assert len(message.splitlines()) <= 3
    if set(nodes) == {"a"}:
        assert f"copies for others {cost.split(' there')[0]}" in found.line, "the budget's own sum"


def test_a_factor_without_a_second_rank_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One rank alone makes no copies, whatever the factor, and is told so."""
    start = _Start(tmp_path, tmp_path / "local", 100, factor=2)
    with caplog.at_level(logging.WARNING):
        start.load()
    start.close()
    assert ["the job has one rank: no copy" in each.getMessage() for each in caplog.records] == [
        True
    ]


class _AsIfFour(SingleProcess):
    """Rank 0 of four, of which the others need other sizes."""

    world_size = 4

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self._sizes = sizes

    def all_reduce(self, stage: str, work: Any, judge: Any) -> Any:
        """Answer for the others too; only what this rank's place has was measured."""
        need, measured = work()
        needs = [Need(each, need.uncounted) for each in self._sizes]
        return judge([(each, None if at else measured) for at, each in enumerate(needs)])


def _load_on_nodes(root: Path, width: int, small: str | None) -> tuple[str, list[str]]:
    """Load and save on two simulated nodes; return the error, and what was told."""
    rank = int(os.environ["RANK"])
    node = "ab"[rank]
    os.environ["HOLDFAST_NODE"] = node
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("holdfast").setLevel(logging.INFO)
    logging.getLogger("holdfast").addHandler(handler)
    directory = root / node if node != small else Path(root, "memory")
    start = _Start(root, directory, width, factor=2, timeout_seconds=ANSWER_SECONDS)
    problem = ""
    try:
        start.load()
        start.save(1)
    except ConfigError as error:
        problem = str(error)
    start.close()
    return problem, [each for each in messages if each.startswith("local tier at")]


def test_copies_count_and_the_save_finds_the_same(tmp_path: Path) -> None:
    """Two nodes with the whole state on each, and a copy for the other."""
    (first, told), (second, silent) = run_ranks(_load_on_nodes, 2, tmp_path, 50_000, None)
    assert first == second == ""
    assert silent == []
    # Both places are on one file system, measured one after the other: either may have the least.
    for line in (told[0], told[1]):
        place, *sizes = _numbers(line)
        assert Path(place) in (tmp_path / "a", tmp_path / "b")
        assert sizes == ["3.6 MiB", "3.6 MiB"]
    assert told[0].endswith("; of 2 places this has the least to spare")
    shutil.rmtree(tmp_path / "b")
    (first, again), (second, _) = run_ranks(_load_on_nodes, 2, tmp_path, 50_000, None)
    assert first == second == ""
    assert _mebibytes(again[0]) == pytest.approx(_mebibytes(told[0]), abs=0.1), "b needs the same"


def test_one_node_that_is_too_small_is_told_on_every_rank(
    tmp_path: Path, small_directory: Path
) -> None:
    """With its numbers, and nobody waits for anybody."""
    (first, told), (second, _) = run_ranks(_load_on_nodes, 2, tmp_path, 100_000, "b")
    assert first == second
    assert re.search(r"memory: 1[34]\.\d MiB of [78]\.\d MiB free .*on node b", first)
    assert told == []
