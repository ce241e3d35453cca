"""The promises of the tier protocol as tests, to be run on any implementation.

Owns one test per promise of `holdfast.tiers.tier` that a job of one rank can see. Each test begins
with a place that holds nothing. What several ranks agree on, durability, and behaviour under faults
are the implementation's own to test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import pytest
import torch

from holdfast.errors import CheckpointError, CorruptCheckpointError
from holdfast.format.items import Itemizer
from holdfast.ranks.coordinator import SingleProcess
from holdfast.ranks.job import Committed
from holdfast.snapshot.shard import ShardSaver
from holdfast.storage.identity import CommitIdentity
from holdfast.tiers.select import Commit, Condition
from holdfast.tiers.tier import Contents, Recorded, Snapshot, Tier, Wanted


@dataclass
class StartedTier:
    """A tier in a new process of the run, which has found what is newest and may save."""

    tier: Tier
    identify: Callable[[], CommitIdentity]
    """The place of the next commit in the order of commits: after all that are there."""


StartTier = Callable[[], StartedTier]


def tensors_at(iteration: int, version: int = 0) -> dict[str, torch.Tensor]:
    """Return the tensors of an iteration in one of its versions; no two have one in common."""
    generator = torch.Generator().manual_seed(1000 * version + iteration)
    return {
        "model.weight": torch.randn(300, 40, generator=generator),
        "model.steps": torch.tensor(1000 * version + iteration),
        "optimizer.state.weight.exp_avg": torch.randn(300, 40, generator=generator).double(),
    }


@dataclass(frozen=True)
class Loaded:
    """What a commit gave back."""

    iteration: int | None
    tensors: Mapping[str, torch.Tensor]
    contents: Contents


@dataclass
class Process:
    """One process that saves and loads through a tier, as a manager does."""

    started: StartedTier
    rank: SingleProcess = field(default_factory=SingleProcess)
    saver: ShardSaver = field(default_factory=ShardSaver)
    itemizer: Itemizer = field(default_factory=Itemizer)
    passed: list[Commit] = field(default_factory=list)
    """What could not be loaded, as the tier has returned it."""

    @property
    def tier(self) -> Tier:
        """The tier that is tested."""
        return self.started.tier

    def save(
        self,
        iteration: int,
        version: int = 0,
        *,
        identify: Callable[[], CommitIdentity] | None = None,
        confirm: Callable[[], None] = lambda: None,
    ) -> Committed:
        """Save the state of an iteration, of which there may be several versions."""
        leaves = {**tensors_at(iteration, version), "optimizer.lr": iteration / 7}
        leaves |= {"rng": f"rank 0 at {iteration}"}
        paths = {name: tuple(name.split(".")) for name in leaves}
        plan = self.saver.agree_on_plan(
            lambda: self.itemizer.describe(leaves, paths, per_rank={"rng"}), self.rank
        )
        arena = self.tier.reserve(plan[0].staged.layout, self.rank, pinned=False)
        staged = self.saver.stage(*plan, arena=arena)
        assert staged.copying is not None
        staged.copying.begin()
        counters = {
            "train_state": {"step": iteration},
            "num_floating_point_operations_so_far": 7 * iteration,
        }
        snapshot = Snapshot(
            iteration,
            staged,
            train_state=json.dumps(counters).encode(),
            run_config=b"{}\n",
            confirm=confirm,
        )
        return self.tier.write(snapshot, identify or self.started.identify, self.rank)

    def survey(self, step: int | None = None) -> list[Commit]:
        """Return the commits that may be loaded, the newest first; `step`: of an iteration.

        A tier may offer a commit again that was passed over, if it offers the one before it, too.
        """

        def objection(record: Recorded) -> str | None:
            return None if step in (None, record.iteration) else "is of another iteration"

        commits = self.tier.survey(self.rank, objection, step)
        passed = {(each.iteration, each.sequence) for each in self.passed}
        sound = [
            each
            for each in commits
            if each.condition is Condition.SOUND and (each.iteration, each.sequence) not in passed
        ]
        if step is not None:
            sound = [each for each in sound if each.iteration == step]
        return sorted(sound, key=lambda each: each.order, reverse=True)

    def find(self, step: int) -> Commit:
        """Return the commit of an iteration, which must be there once."""
        found = self.survey(step)
        assert [each.iteration for each in found] == [step]
        return found[0]

    def open(self, commit: Commit, *, verify_first: bool = False) -> Contents:
        """Open a commit, accepting what it holds."""
        wanted = Wanted(lambda state: True, lambda contents: None, verify_first)
        return self.tier.open(commit, self.rank, wanted)

    def read(self, commit: Commit) -> Loaded:
        """Open a commit and read all of it."""
        contents = self.open(commit)
        targets = {name: torch.zeros_like(each) for name, each in tensors_at(0).items()}
        contents.bring(lambda: targets, self.rank)
        contents.reader.read_tensors(targets)
        return Loaded(commit.iteration, targets, contents)

    def load(self) -> Loaded:
        """Read the newest commit, and end the load."""
        loaded = self.read(self.survey()[0])
        rest = self.tier.finish_load()
        if rest is not None:
            rest(self.rank)
        return loaded

    def pass_over(self, commit: Commit) -> Commit:
        """Tell the tier that a commit could not be loaded."""
        error = CorruptCheckpointError(commit.path, "was found damaged")
        self.passed.append(self.tier.pass_over(commit, self.rank, error))
        return self.passed[-1]


def expect(loaded: Loaded, iteration: int, version: int = 0) -> None:
    """Demand that what was loaded is the state of an iteration, to the last bit."""
    assert loaded.iteration == iteration
    for name, expected in tensors_at(iteration, version).items():
        assert torch.equal(loaded.tensors[name], expected), name
    contents = loaded.contents
    assert contents.values == {"optimizer.lr": iteration / 7}
    assert contents.counters["train_state"]["step"] == iteration
    assert contents.counters["num_floating_point_operations_so_far"] == 7 * iteration
    assert contents.small == {"rng": f"rank 0 at {iteration}"}
    assert contents.reader.own_names == {"rng"}


class GivenUpError(CheckpointError):
    """What a save of these tests fails with."""


def give_up() -> NoReturn:
    """Fail in the middle of a save."""
    raise GivenUpError("given up")


class TierContract:
    """Derive a test class and give it a fixture `start`, the number `keeps`, and `harm`.

    `start` returns a function that starts a process of the run: the first call finds nothing, each
    later one what is there by then. The process before it is over.

        class TestMyTier(TierContract):
            keeps = 3

            @pytest.fixture
            def start(self, tmp_path: Path) -> StartTier:
                ...

            def harm(self, commit: Commit) -> None:
                flip_a_bit(Path(commit.path) / "tensors")
    """

    keeps = 2
    """How many commits the tier keeps at least."""

    @pytest.fixture
    def start(self) -> StartTier:
        """Return the function that starts a process; see the class."""
        raise NotImplementedError

    def harm(self, commit: Commit) -> None:
        """Change a byte of the tensors of a commit, behind the tier's back."""
        raise NotImplementedError

    @pytest.fixture
    def process(self, start: StartTier) -> Process:
        """The first process."""
        return Process(start())

    # -- saves and loads -------------------------------------------------------------------------

    def test_where_nothing_was_saved_nothing_is_offered(self, process: Process) -> None:
        """An empty place is no error, and no checkpoint."""
        assert process.survey() == []

    def test_what_was_saved_is_loaded(self, process: Process, start: StartTier) -> None:
        """Tensors, values, counters and small states come back as they were, in any process."""
        committed = process.save(10)
        assert committed.size_bytes > 0
        expect(process.load(), 10)
        process.tier.close()
        expect(Process(start()).load(), 10)

    def test_a_commit_says_what_it_is(self, process: Process) -> None:
        """Its tier, its iteration and its place in the order of commits are those of the save."""
        given: list[CommitIdentity] = []

        def identify() -> CommitIdentity:
            given.append(process.started.identify())
            return given[-1]

        committed = process.save(10, identify=identify)
        commit = process.find(10)
        assert committed.tier == commit.tier == process.tier.name
        assert (commit.iteration, commit.sequence) == (10, given[0].sequence)
        assert len(given) == 1

    def test_the_newest_commit_is_offered_first(self, process: Process, start: StartTier) -> None:
        """Newer is what was committed later, also with a smaller iteration."""
        for iteration in (30, 20):
            process.save(iteration)
        expect(process.load(), 20)
        process.tier.close()
        expect(Process(start()).load(), 20)

    def test_an_iteration_may_be_saved_again(self, process: Process, start: StartTier) -> None:
        """The later state is the one that is loaded, and there is one commit of the iteration."""
        for version in (0, 1):
            for iteration in (10, 20):
                process.save(iteration, version)
        expect(process.read(process.find(10)), 10, version=1)
        expect(process.load(), 20, version=1)
        process.tier.close()
        expect(Process(start()).load(), 20, version=1)

    def test_a_commit_is_found_by_its_iteration(self, process: Process, start: StartTier) -> None:
        """What is kept can be asked for by number, and what never was is not found."""
        for iteration in (10, 20):
            process.save(iteration)
        for each in (process, Process(start())):
            expect(each.read(each.find(10)), 10)
            assert each.survey(step=15) == []

    def test_a_load_names_its_sources(self, process: Process) -> None:
        """After a read the contents tell which files it came from, and how large they are."""
        process.save(10)
        sources = process.load().contents.sources()
        assert {each.tier for each in sources} == {process.tier.name}
        assert all(each.size_bytes > 0 for each in sources)

    def test_state_may_change_once_it_was_staged(self, process: Process) -> None:
        """A later save does not reach the commits before it."""
        for iteration in (10, 20):
            process.save(iteration)
        loaded = process.read(process.find(10))
        process.save(30)
        expect(loaded, 10)
        expect(process.load(), 30)

    # -- retention -------------------------------------------------------------------------------

    def test_the_newest_commits_are_kept(self, process: Process, start: StartTier) -> None:
        """After many saves at least as many commits load as the tier keeps, the newest ones."""
        iterations = range(1, self.keeps + 4)
        for iteration in iterations:
            process.save(iteration)
        process.tier.close()
        fresh = Process(start())
        for iteration in [*iterations][: -self.keeps - 1 : -1]:
            newest = fresh.survey()[0]
            expect(fresh.read(newest), iteration)
            fresh.pass_over(newest)

    # -- saves that fail -------------------------------------------------------------------------

    @pytest.mark.parametrize("moment", ["identify", "confirm"])
    def test_a_save_that_fails_leaves_earlier_commits(
        self, process: Process, start: StartTier, moment: str
    ) -> None:
        """The error reaches the caller, nothing is offered of it, and the next save works."""
        for iteration in (10, 20):
            process.save(iteration)
        failing = {"identify": {"identify": give_up}, "confirm": {"confirm": give_up}}[moment]
        for iteration in (30, 20):  # a new iteration, and one that exists
            with pytest.raises(CheckpointError, match="given up"):
                process.save(iteration, 1, **failing)
            assert process.survey(step=30) == []
            expect(process.load(), 20)
        expect(process.read(process.find(10)), 10)
        process.save(40)
        process.tier.close()
        expect(Process(start()).load(), 40)

    def test_memory_that_was_reserved_is_given_back(self, process: Process) -> None:
        """However often staging fails, the next save finds memory."""
        process.save(10)
        leaves = tensors_at(20)
        paths = {name: tuple(name.split(".")) for name in leaves}
        for _ in range(self.keeps + 3):
            plan, _ = process.saver.agree_on_plan(
                lambda: process.itemizer.describe(leaves, paths), process.rank
            )
            process.tier.reserve(plan.staged.layout, process.rank, pinned=False)
            process.tier.release()
        process.tier.release()
        process.save(20)
        expect(process.load(), 20)

    # -- damage ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("verify_first", [False, True])
    def test_damaged_tensors_are_never_returned(
        self, process: Process, start: StartTier, verify_first: bool
    ) -> None:
        """A changed byte is an error that says where: before anything is used, or as it is read."""
        process.save(10)
        commit = process.find(10)
        self.harm(commit)
        process.tier.close()
        fresh = Process(start())
        commit = fresh.find(10)
        attempt = partial(fresh.open, verify_first=True) if verify_first else fresh.read
        with pytest.raises(CorruptCheckpointError) as caught:
            attempt(commit)
        assert str(commit.iteration) in str(caught.value)

    def test_what_was_found_damaged_is_passed_over(
        self, process: Process, start: StartTier
    ) -> None:
        """It is damaged from then on, with the reason; the one before is offered; saves go on."""
        for iteration in (10, 20):
            process.save(iteration)
        process.tier.close()
        fresh = Process(start())
        newest = fresh.survey()[0]
        assert newest.iteration == 20
        passed = fresh.pass_over(newest)
        assert passed.condition is Condition.DAMAGED
        assert "was found damaged" in passed.reason
        expect(fresh.load(), 10)
        fresh.save(30)
        expect(fresh.load(), 30)

    def test_contents_that_are_refused_are_damage(self, process: Process) -> None:
        """What `accept` finds damaged is told as damage of the checkpoint."""
        process.save(10)
        commit = process.find(10)
        seen: list[Contents] = []

        def refuse(contents: Contents) -> None:
            seen.append(contents)
            raise CorruptCheckpointError(commit.path, "its state is nonsense")

        with pytest.raises(CorruptCheckpointError, match="its state is nonsense"):
            process.tier.open(commit, process.rank, Wanted(lambda state: True, refuse))
        assert [each.counters["train_state"]["step"] for each in seen] == [10]

    # -- the end ---------------------------------------------------------------------------------

    def test_what_was_committed_outlives_the_process(
        self, process: Process, start: StartTier
    ) -> None:
        """With and without an orderly end, and a tier may be closed twice."""
        process.save(10)
        process.tier.close()
        process.tier.close()
        second = Process(start())
        expect(second.load(), 10)
        second.save(20)
        expect(Process(start()).load(), 20)
