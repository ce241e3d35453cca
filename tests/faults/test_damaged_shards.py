"""A shard that is not what was committed costs one checkpoint, in either tier, and is never used.

What is damaged is told; the commit before is loaded, bit for bit; the run goes on from there, and
what was damaged never comes back. With nothing good left the live state is as it was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from holdfast.cli import main
from holdfast.errors import NoLoadableCheckpointError
from holdfast.storage.digests import BLOCK_BYTES, footer_size
from tests.faults.damage import (
    ALL_DAMAGES,
    DAMAGES,
    ITERATIONS,
    NEWEST,
    OLDER,
    Damage,
    change_large,
    cut_in_half,
    flipped,
    lose,
    make_large,
)
from tests.faults.jobs import State, load, state_of, train_to
from tests.faults.places import Place
from tests.faults.report import record
from tests.support.kernel_calls import Tree, plant


@dataclass(frozen=True)
class Saved:
    """Three checkpoints of a run: the first in the persistent tier, the others in the tried one."""

    place: Place
    states: dict[int, State]
    tree: Tree

    @property
    def damages(self) -> tuple[Damage, ...]:
        """What may happen to a shard of this tier."""
        return ALL_DAMAGES if self.place.to_local else DAMAGES

    def harm(self, damage: Damage, *iterations: int) -> None:
        """Let nothing but these be damaged."""
        plant(self.place.base, self.tree)
        for each in iterations:
            damage(self.place.shard(each))


@pytest.fixture
def saved(place: Place) -> Saved:
    """What a job of one rank has left."""
    job = place.start()
    job.load()
    states: dict[int, State] = {}
    for iteration in ITERATIONS:
        states[iteration] = train_to(job, iteration)
        job.save(to_local=place.to_local and iteration != ITERATIONS[0])
    job.close()
    return Saved(place, states, place.tree())


@pytest.mark.parametrize("verify", ["while_reading", "first"])
def test_a_damaged_shard_is_told_and_the_commit_before_is_loaded(saved: Saved, verify: str) -> None:
    """Cut, long, zeroed or stale: with the reason, whether it is verified first or not."""
    for damage in saved.damages:
        saved.harm(damage, NEWEST)
        job = saved.place.start()
        job.manager.checkpoint_config.load.verify = verify
        result = job.load()
        job.close()
        assert state_of(job) == saved.states[OLDER], damage.__name__
        assert result.tier == ("local" if saved.place.to_local else "persistent")
        told = [f"{each.path}: {each.reason}" for each in result.skipped]
        assert len(told) == 1, told
        assert f"iter_{NEWEST:07d}" in told[0], told
        if saved.place.to_local:
            record("local: damaged files")


def test_after_damage_the_run_goes_on(saved: Saved) -> None:
    """What was damaged is overwritten or pruned by the saves that follow, and never comes back."""
    place = saved.place
    for damage in (*saved.damages, lose):
        saved.harm(damage, NEWEST)
        job = place.start()
        assert load(job) == saved.states[OLDER]
        for iteration in (NEWEST, NEWEST + 1):
            expected = train_to(job, iteration)
            place.save(job)
        job.close()
        assert place.newest() == expected, damage.__name__
        place.check_is_sound()
        for iteration in (NEWEST, NEWEST + 1):
            assert place.shard(iteration).exists()


def test_with_nothing_good_left_nothing_is_touched(place: Place) -> None:
    """Only damaged commits: the load says why of each, and the live state is as it was."""
    job = place.start()
    job.load()
    for iteration in (OLDER, NEWEST):
        train_to(job, iteration)
        place.save(job)
    job.close()
    for iteration in (OLDER, NEWEST):
        cut_in_half(place.shard(iteration))
    job = place.start()
    job.run.train(3)
    before = job.digests()
    with pytest.raises(NoLoadableCheckpointError) as caught:
        job.load()
    job.close()
    assert job.digests() == before
    assert len(caught.value.reasons) == 2
    for iteration, reason in zip((NEWEST, OLDER), caught.value.reasons, strict=True):
        assert f"iter_{iteration:07d}" in reason


def test_every_block_of_a_large_shard_is_covered(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a file of several blocks the first and the last byte of each are told by their block."""
    job = make_large(place.start())
    job.load()
    states = {}
    for iteration in (OLDER, NEWEST):
        change_large(job, iteration)
        states[iteration] = state_of(job)
        place.save(job)
    job.close()
    path = place.shard(NEWEST)
    body_bytes = place.body_bytes(NEWEST)
    spans = {
        f"block {block} (bytes {start}-{min(start + BLOCK_BYTES, body_bytes) - 1})": (
            start,
            min(start + BLOCK_BYTES, body_bytes) - 1,
        )
        for block, start in enumerate(range(0, body_bytes, BLOCK_BYTES))
    }
    assert len(spans) == 3
    spans["the footer"] = (body_bytes, body_bytes + footer_size(body_bytes) - 1)
    for name, (start, end) in spans.items():
        where = re.escape(f"{path.name}: {name}")
        for position in (start, (start + end) // 2, end):
            with flipped(path, position, position % 8):
                fresh = make_large(place.start())
                result = fresh.load()
                fresh.close()
                if not place.to_local:
                    capsys.readouterr()
                    assert main(["verify", str(place.base / "store")]) == 1
                    assert re.search(where, capsys.readouterr().out)
            assert state_of(fresh) == states[OLDER], position
            assert [each.iteration for each in result.skipped] == [NEWEST]
            told = f"{result.skipped[0].path}: {result.skipped[0].reason}"
            # The index of small states, and a trailer, are read before the blocks that hold them.
            early = "the index|.*footer" if place.to_local else "the index"
            where = f"{where}|{path.name}: ({early})"
            assert re.search(where, told), told
            record(f"{place.label}byte flips")
