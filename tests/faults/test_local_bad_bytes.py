"""Local shard files that are not the bytes that were committed are found, told, and not trained on.

Every region of a shard file (slots, padding, index, footer, record, small states, sealed end) and
the file as a whole are damaged in every way that memory, disks and people damage files. Without a
copy the load goes on to the next older commit, and at last to the persistent tier, with reasons;
with a copy on another node the same commit comes back bit for bit, and the copy that was lost is
written again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from tests.faults.damage import (
    ALL_DAMAGES,
    ITERATIONS,
    LOSSES,
    NEWEST,
    OLDER,
    UNSEEN_IN_A_COPY,
    cut_in_half,
    fill_with_zeros,
    flipped,
    lose,
    lose_the_body,
    regions,
)
from tests.faults.jobs import Job, load, state_of, train_to
from tests.faults.local_stories import place_in_memory, start
from tests.faults.places import Pair
from tests.faults.report import record
from tests.faults.tiers import FULL
from tests.support.deadlines import ANSWER_SECONDS, LAUNCH_SECONDS
from tests.support.kernel_calls import Tree, plant, tree_of
from tests.support.nodes import Job as TierJob
from tests.support.nodes import shard_path
from tests.support.ranks import run_ranks

pytest.importorskip("nvidia_resiliency_ext")

SEED = 40


@dataclass
class Saved:
    """10 in both tiers, 20 and 30 in the local one, which keeps these two."""

    base: Path
    states: dict[int, tuple[int, str]]
    tree: Tree

    @property
    def newest(self) -> Path:
        """The shard file of the newest commit."""
        return self.shard(NEWEST)

    def shard(self, iteration: int) -> Path:
        (found,) = (self.base / "local").glob(f"*/0/iter_{iteration:07d}_0_local.pt")
        return found


@pytest.fixture
def saved(base: Path) -> Saved:
    """What a job of one rank has left."""
    job = start(base)
    job.load()
    states = {}
    for iteration in ITERATIONS:
        states[iteration] = train_to(job, iteration)
        job.save(to_local=iteration != ITERATIONS[0])
    job.close()
    return Saved(base, states, tree_of(base))


# -- one flipped bit -------------------------------------------------------------------------------


def _positions(span: range, rng: random.Random, stride: int) -> Iterable[int]:
    if FULL or not span:
        return span
    return sorted({span[0], span[-1], *span[rng.randrange(stride) :: stride]})


def test_a_bit_flipped_anywhere_is_found(tmp_path: Path) -> None:
    """Whatever bit of whatever byte: the tail is refused, or a block is; no byte is uncovered.

    In the regular run every fortieth byte, and the first and last of each region.
    """
    job = TierJob(tmp_path)
    for iteration in (OLDER, NEWEST):
        job.save(iteration)
    path, rng, flips = shard_path(tmp_path, "node0", 0, NEWEST), random.Random(SEED), 0
    for name, span in regions(path).items():
        for position in _positions(span, rng, 40):
            with flipped(path, position, rng.randrange(8)):
                availability = job.tier.availability
                found = job.tier.find(job.control, lambda record: None)
                assert found is not None
                if found.record.iteration == NEWEST:
                    assert availability.verify(found), f"byte {position}, in {name}"
                    availability.damaged.clear()
                else:
                    assert any(each.iteration == NEWEST for each in job.tier.passed), position
                flips += 1
    found = job.tier.find(job.control, lambda record: None)
    assert found is not None
    assert found.record.iteration == NEWEST, "the flips were not undone"
    assert not job.tier.availability.verify(found)
    job.close()
    record("local: byte flips", flips)


def test_a_load_goes_past_a_flipped_bit(saved: Saved) -> None:
    """In every region: the commit before is loaded, bit for bit, and the reason names the file."""
    rng, flips = random.Random(SEED), 0
    for name, span in regions(saved.newest).items():
        chosen = {span[0], span[-1], *(rng.choice(span) for _ in range(4))} if span else set()
        for position in sorted(chosen):
            where = f"byte {position}, in {name}"
            with flipped(saved.newest, position, rng.randrange(8)):
                _expect_older(saved, where)
                flips += 1
    job = start(saved.base)
    assert load(job) == saved.states[NEWEST], "the flips were not undone"
    job.close()
    record("local: byte flips", flips)


def _expect_older(saved: Saved, where: str, verify: str = "while_reading") -> None:
    job = start(saved.base)
    job.manager.checkpoint_config.load.verify = verify
    result = job.load()
    job.close()
    assert (state_of(job), result.tier) == (saved.states[OLDER], "local"), where
    told = [f"{each.path}: {each.reason}" for each in result.skipped if each.iteration == NEWEST]
    assert any(f"{NEWEST:07d}" in each for each in told), f"{where}: {told}"


# -- whole files -----------------------------------------------------------------------------------


def test_a_lost_file_is_a_commit_that_is_no_more(saved: Saved) -> None:
    """A deleted file, a directory or a link in its place: the commit before is loaded."""
    for damage in LOSSES:
        plant(saved.base, saved.tree)
        damage(saved.newest)
        job = start(saved.base)
        assert load(job) == saved.states[OLDER], damage.__name__
        job.close()
        record("local: damaged files")


def test_with_no_local_commit_left_the_persistent_tier_serves(saved: Saved) -> None:
    """Both local commits damaged: the persistent checkpoint, and a reason for each."""
    for damage in (cut_in_half, lose_the_body, fill_with_zeros):
        plant(saved.base, saved.tree)
        for iteration in (OLDER, NEWEST):
            damage(saved.shard(iteration))
        job = start(saved.base)
        result = job.load()
        job.close()
        assert (state_of(job), result.tier) == (saved.states[ITERATIONS[0]], "persistent")
        assert {each.iteration for each in result.skipped} == {OLDER, NEWEST}


# -- two ranks on two nodes ------------------------------------------------------------------------


def _pair(root: Path, factor: int) -> Job:
    """Start one of two ranks, each on a node of its own, which holds a copy for the other."""
    return Pair(root, to_local=True).start(factor=factor, timeout_seconds=ANSWER_SECONDS)


def _save_pair(root: Path, factor: int) -> dict[int, dict[str, str]]:
    job, found = _pair(root, factor), {}
    job.load()
    for iteration in ITERATIONS:
        job.train_to(iteration)
        job.save(to_local=iteration != ITERATIONS[0])
        found[iteration] = job.digests()
    job.close()
    return found


@dataclass(frozen=True)
class Outcome:
    """What one load of two ranks came to, on one of them."""

    iteration: int
    tier: str | None
    digests: dict[str, str]
    reasons: list[str]


def _harm_and_load(
    root: Path, factor: int, harms: Sequence[tuple[str, Sequence[tuple[str, int]]]]
) -> list[Outcome]:
    """Damage files (node and owner of each) in copies of what was saved, and load each."""
    found, sound = [], tree_of(root) if distributed.get_rank() == 0 else {}
    known = {each.__name__: each for each in (*ALL_DAMAGES, *LOSSES)}
    for damage, files in harms:
        if distributed.get_rank() == 0:
            plant(root, sound)
            for node, owner in files:
                known[damage](_file(root, node, owner))
        distributed.barrier()
        job = _pair(root, factor)
        result = job.load()
        reasons = [each.reason for each in result.skipped]
        found.append(Outcome(result.iteration, result.tier, job.digests(), reasons))
        job.close()
        distributed.barrier()
        # A copy whose record is sound is read by nobody as long as the shard itself is there.
        is_seen = damage not in UNSEEN_IN_A_COPY or all(
            "ab"[owner] == node for node, owner in files
        )
        if distributed.get_rank() == 0 and result.iteration == NEWEST and is_seen:
            _expect_whole(root, sound, f"{damage} {files}")
    return found


def _file(root: Path, node: str, owner: int, iteration: int = NEWEST) -> Path:
    (found,) = (root / node).glob(f"*/{'ab'.index(node)}/iter_{iteration:07d}_{owner}_local.pt")
    return found


def _expect_whole(root: Path, sound: Tree, where: str) -> None:
    """Demand that every file of the newest commit is again what it was, byte for byte."""
    left = tree_of(root)
    for name, content in sound.items():
        if f"iter_{NEWEST:07d}" in name and name.endswith("_local.pt"):
            assert left.get(name) == content, f"{where}: {name} was not written again"


def test_a_damaged_shard_comes_back_from_its_copy(tmp_path: Path) -> None:
    """Either rank's own file or the copy of it: bit for bit, and both are there again."""
    with place_in_memory() as root:
        saved = run_ranks(_save_pair, 2, root, 2)
        # In the regular run a file is damaged in a third of the ways, and lost.
        ways = [each.__name__ for each in (*ALL_DAMAGES[:: 1 if FULL else 3], lose)]
        files: list[Any] = [[("a", 0)], [("b", 0)], [("b", 1)], [("a", 0), ("b", 1)]]
        harms = [
            (way, files[(number + shift) % len(files)])
            for shift in (range(4) if FULL else (0,))
            for number, way in enumerate(ways)
        ]
        columns = run_ranks(
            _harm_and_load, 2, root, 2, harms, timeout_seconds=(10 if FULL else 2) * LAUNCH_SECONDS
        )
    for rank, outcomes in enumerate(columns):
        for harm, outcome in zip(harms, outcomes, strict=True):
            assert (outcome.iteration, outcome.tier) == (NEWEST, "local"), (harm, outcome.reasons)
            assert outcome.digests == saved[rank][NEWEST], harm
    record("local: damaged files", len(harms))


def test_a_shard_that_is_damaged_with_its_copy_costs_one_commit(tmp_path: Path) -> None:
    """All ranks load the commit before, and say why."""
    with place_in_memory() as root:
        saved = run_ranks(_save_pair, 2, root, 2)
        ways = (*ALL_DAMAGES, lose) if FULL else (cut_in_half, lose_the_body, lose)
        # Sharded over the ranks the state of a pair under DDP is on both nodes: each holds all.
        files: list[Any] = [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
        harms = [(each.__name__, files) for each in ways]
        columns = run_ranks(_harm_and_load, 2, root, 2, harms)
    for rank, outcomes in enumerate(columns):
        for harm, outcome in zip(harms, outcomes, strict=True):
            assert (outcome.iteration, outcome.tier) == (OLDER, "local"), (harm, outcome.reasons)
            assert outcome.digests == saved[rank][OLDER], harm
            assert outcome.reasons or harm[0] == "lose", harm
    record("local: damaged files", len(harms))
