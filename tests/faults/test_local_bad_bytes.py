"""Local shard files that are not the bytes that were committed are found, told, and not trained on.

Every region of a shard file (slots, padding, index, footer, record, small states, sealed end) and
the file as a whole are damaged in every way that memory, disks and people damage files. Without a
copy the load goes on to the next older commit, and at last to the persistent tier, with reasons;
with a copy on another node the same commit comes back bit for bit, and the copy that was lost is
written again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from holdfast.errors import NoLoadableCheckpointError
from holdfast.storage.digests import BLOCK_BYTES, footer_size
from holdfast.tiers.local.shard_file import PART_NAMES, read_trailer
from tests.faults.jobs import Job, load, state_of, train_to
from tests.faults.local_stories import place_in_memory, start
from tests.faults.report import record
from tests.faults.tiers import FULL
from tests.support.kernel_calls import Tree, plant, tree_of
from tests.support.nodes import Job as TierJob
from tests.support.nodes import shard_path
from tests.support.ranks import run_ranks

pytest.importorskip("nvidia_resiliency_ext")

SEED = 40
ITERATIONS = (10, 20, 30)
OLDER, NEWEST = ITERATIONS[-2:]


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


def regions(path: Path) -> dict[str, range]:
    """Return every region of a shard file, in order, none left out."""
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        tail = read_trailer(stream, str(path))
        stream.seek(tail.record.image_bytes)
        text = stream.readline()
    body = tail.record.body_bytes
    found = {"body": range(body), "footer": range(body, body + footer_size(body))}
    position = body + footer_size(body)
    found["record"] = range(position, position + len(text))
    position += len(text)
    for name in PART_NAMES:
        found[name] = range(position, position + len(tail.parts[name]))
        position += len(tail.parts[name])
    found["end"] = range(position, size_bytes)
    return found


@contextmanager
def _flipped(path: Path, position: int, bit: int) -> Iterator[None]:
    """Flip one bit while the context lasts."""

    def flip() -> None:
        with path.open("r+b", buffering=0) as stream:
            stream.seek(position)
            value = stream.read(1)[0]
            stream.seek(position)
            stream.write(bytes([value ^ 1 << bit]))

    flip()
    yield
    flip()


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
            with _flipped(path, position, rng.randrange(8)):
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
            with _flipped(saved.newest, position, rng.randrange(8)):
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


class _Large(nn.Module):
    """A little more than two blocks of parameters."""

    def __init__(self) -> None:
        super().__init__()
        elements = (2 * BLOCK_BYTES + BLOCK_BYTES // 2) // 4
        self.weight = nn.Parameter(torch.arange(elements, dtype=torch.float32))


def _large_job(base: Path) -> Job:
    job = start(base)
    job.run.model = _Large()
    job.run.optimizer = torch.optim.SGD(job.run.model.parameters())
    job.run.scheduler = torch.optim.lr_scheduler.ConstantLR(job.run.optimizer)
    return job


def test_every_block_of_a_large_shard_is_covered(base: Path) -> None:
    """In a file of several blocks the first and the last byte of each are missed by nobody."""
    job = _large_job(base)
    job.load()
    states = {}
    for iteration in (OLDER, NEWEST):
        with torch.no_grad():
            job.run.model.weight.add_(1.0)  # type: ignore[operator]  # a parameter
        job.state.train_state.step = iteration
        states[iteration] = state_of(job)
        job.save(to_local=True)
    job.close()
    (path,) = (base / "local").glob(f"*/0/iter_{NEWEST:07d}_0_local.pt")
    body = regions(path)["body"]
    starts = list(body[::BLOCK_BYTES])
    assert len(starts) == 3
    ends = [each - 1 for each in (*starts[1:], body.stop)]
    for position in (*starts, *ends):
        with _flipped(path, position, position % 8):
            fresh = _large_job(base)
            result = fresh.load()
            fresh.close()
            assert state_of(fresh) == states[OLDER], position
            assert [each.iteration for each in result.skipped] == [NEWEST]
    record("local: byte flips", len(starts) + len(ends))


# -- whole files -----------------------------------------------------------------------------------


def _cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def _cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _cut_by_one(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _cut_off_the_tail(path: Path) -> None:
    os.truncate(path, regions(path)["record"].start)


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _lose_the_body(path: Path) -> None:
    """As a hole that a file system has made of blocks it lost."""
    content = path.read_bytes()
    start = regions(path)["body"].stop
    path.write_bytes(bytes(start) + content[start:])


def _take_an_older_one(path: Path) -> None:
    path.write_bytes(path.with_name(path.name.replace(f"{NEWEST}", f"{OLDER}")).read_bytes())


def _take_an_older_body(path: Path) -> None:
    older = path.with_name(path.name.replace(f"{NEWEST}", f"{OLDER}")).read_bytes()
    start = regions(path)["record"].start
    path.write_bytes(older[:start] + path.read_bytes()[start:])


def _take_an_older_tail(path: Path) -> None:
    older = path.with_name(path.name.replace(f"{NEWEST}", f"{OLDER}"))
    start = regions(path)["record"].start
    old = older.read_bytes()[regions(older)["record"].start :]
    path.write_bytes(path.read_bytes()[:start] + old)


def _append_itself(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def _lose(path: Path) -> None:
    path.unlink()


def _put_a_directory_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _put_a_link_there(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES: tuple[Callable[[Path], None], ...] = (
    _cut_to_nothing, _cut_in_half, _cut_by_one, _cut_off_the_tail, _lengthen, _fill_with_zeros,
    _lose_the_body, _take_an_older_one, _take_an_older_body, _take_an_older_tail, _append_itself,
)  # fmt: skip
"""A file is there and is not what it should be."""
UNSEEN_IN_A_COPY = {_lose_the_body.__name__, _take_an_older_body.__name__}
"""The record at the end is sound: only who reads the body finds it damaged."""
LOSSES: tuple[Callable[[Path], None], ...] = (_lose, _put_a_directory_there, _put_a_link_there)
"""No file is there; nobody can know that there was one."""


def test_a_damaged_file_is_told_and_the_commit_before_is_loaded(saved: Saved) -> None:
    """Cut, long, zeroed, stale or mixed: with the reason, whether it is verified first or not."""
    for damage in DAMAGES:
        for verify in ("while_reading", "first"):
            plant(saved.base, saved.tree)
            damage(saved.newest)
            _expect_older(saved, damage.__name__, verify)
            record("local: damaged files")


def test_a_lost_file_is_a_commit_that_is_no_more(saved: Saved) -> None:
    """A deleted file, a directory or a link in its place: the commit before is loaded."""
    for damage in LOSSES:
        plant(saved.base, saved.tree)
        damage(saved.newest)
        job = start(saved.base)
        assert load(job) == saved.states[OLDER], damage.__name__
        job.close()
        record("local: damaged files")


def test_after_damage_the_run_goes_on(saved: Saved) -> None:
    """What was damaged is overwritten or pruned by the saves that follow, and never comes back."""
    for damage in (*DAMAGES, _lose):
        plant(saved.base, saved.tree)
        damage(saved.newest)
        job = start(saved.base)
        assert load(job) == saved.states[OLDER]
        expected = []
        for iteration in (NEWEST, NEWEST + 1):
            expected.append(train_to(job, iteration))
            job.save(to_local=True)
        job.close()
        job = start(saved.base)
        assert load(job) == expected[-1], damage.__name__
        job.close()
        names = [each.name for each in saved.newest.parent.iterdir()]
        assert sorted(names) == [f"iter_00000{each}_0_local.pt" for each in (NEWEST, NEWEST + 1)]


def test_with_no_local_commit_left_the_persistent_tier_serves(saved: Saved) -> None:
    """Both local commits damaged: the persistent checkpoint, and a reason for each."""
    for damage in (_cut_in_half, _lose_the_body, _fill_with_zeros):
        plant(saved.base, saved.tree)
        for iteration in (OLDER, NEWEST):
            damage(saved.shard(iteration))
        job = start(saved.base)
        result = job.load()
        job.close()
        assert (state_of(job), result.tier) == (saved.states[ITERATIONS[0]], "persistent")
        assert {each.iteration for each in result.skipped} == {OLDER, NEWEST}


def test_with_nothing_good_left_nothing_is_touched(base: Path) -> None:
    """Only damaged local commits: the load says why of each, and the live state is as it was."""
    job = start(base)
    job.load()
    for iteration in (OLDER, NEWEST):
        train_to(job, iteration)
        job.save(to_local=True)
    job.close()
    for iteration in (OLDER, NEWEST):
        (path,) = (base / "local").glob(f"*/0/iter_{iteration:07d}_0_local.pt")
        _cut_in_half(path)
    job = start(base)
    job.run.train(3)
    before = job.digests()
    with pytest.raises(NoLoadableCheckpointError) as caught:
        job.load()
    job.close()
    assert job.digests() == before
    assert len(caught.value.reasons) == 2
    assert all("torn" in each for each in caught.value.reasons)


# -- two ranks on two nodes ------------------------------------------------------------------------


def _pair(root: Path, factor: int) -> Job:
    """Start one of two ranks, each on a node of its own, which holds a copy for the other."""
    rank = distributed.get_rank()
    os.environ["HOLDFAST_NODE"] = "ab"[rank]
    return Job(
        root / "store",
        seed=1,
        rank=rank,
        ranks=2,
        local={
            "directory": str(root / "ab"[rank]),
            "keep": {"last": 2},
            "replication": {"factor": factor},
        },
        timeout_seconds=20.0,
    )


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
    known = {each.__name__: each for each in (*DAMAGES, *LOSSES)}
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
        ways = [each.__name__ for each in (*DAMAGES[:: 1 if FULL else 3], _lose)]
        files: list[Any] = [[("a", 0)], [("b", 0)], [("b", 1)], [("a", 0), ("b", 1)]]
        harms = [
            (way, files[(number + shift) % len(files)])
            for shift in (range(4) if FULL else (0,))
            for number, way in enumerate(ways)
        ]
        columns = run_ranks(_harm_and_load, 2, root, 2, harms, timeout_seconds=300.0)
    for rank, outcomes in enumerate(columns):
        for harm, outcome in zip(harms, outcomes, strict=True):
            assert (outcome.iteration, outcome.tier) == (NEWEST, "local"), (harm, outcome.reasons)
            assert outcome.digests == saved[rank][NEWEST], harm
    record("local: damaged files", len(harms))


def test_a_shard_that_is_damaged_with_its_copy_costs_one_commit(tmp_path: Path) -> None:
    """All ranks load the commit before, and say why."""
    with place_in_memory() as root:
        saved = run_ranks(_save_pair, 2, root, 2)
        ways = (*DAMAGES, _lose) if FULL else (_cut_in_half, _lose_the_body, _lose)
        # Sharded over the ranks the state of a pair under DDP is on both nodes: each holds all.
        files: list[Any] = [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
        harms = [(each.__name__, files) for each in ways]
        columns = run_ranks(_harm_and_load, 2, root, 2, harms)
    for rank, outcomes in enumerate(columns):
        for harm, outcome in zip(harms, outcomes, strict=True):
            assert (outcome.iteration, outcome.tier) == (OLDER, "local"), (harm, outcome.reasons)
            assert outcome.digests == saved[rank][OLDER], harm
            assert outcome.reasons or harm[0] == "_lose", harm
    record("local: damaged files", len(harms))
