"""One rank's shard: agreed with all ranks, planned once, staged into memory that stays."""

from __future__ import annotations

import logging
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, not in __all__
from torch.distributed.checkpoint.state_dict_loader import load

from holdfast.errors import NotEnoughMemoryError, StageFailedError
from holdfast.filesystem import LocalFilesystem
from holdfast.format.items import Inventory, Itemizer
from holdfast.ranks.coordinator import SingleProcess, StoreCoordinator
from holdfast.snapshot.arena import Arena
from holdfast.snapshot.shard import ShardPlan, ShardSaver, StagedShard
from holdfast.storage.posix import PosixStorage
from tests.support.tensors import bits

MIB = 1 << 20


class _Rank:
    """What one rank keeps from save to save."""

    def __init__(self) -> None:
        self.saver, self.itemizer = ShardSaver(), Itemizer()

    def settle(self, coordinator: Any, leaves: Any) -> tuple[ShardPlan, Inventory]:
        def take() -> Inventory:
            return self.itemizer.describe(leaves, {name: (name,) for name in leaves})

        return self.saver.agree_on_plan(take, coordinator)

    def stage(self, coordinator: Any, leaves: Any) -> StagedShard:
        return self.saver.stage(*self.settle(coordinator, leaves))


def _on_ranks(program: Callable[[StoreCoordinator], Any], ranks: int = 2) -> list[Any]:
    """Run a program on threads as ranks; return what each returned or raised."""
    store = HashStore()
    outcomes: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        try:
            outcomes[rank] = program(StoreCoordinator(store, rank, ranks, 20.0, "test"))
        except Exception as error:  # noqa: BLE001  # what a rank raises is what is tested
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive(), "a rank hangs"
    return outcomes


def _names(plan: ShardPlan) -> list[str]:
    return [slot.item.name for slot in plan.written.layout.slots]


def _write(staged: StagedShard, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    if not staged.is_empty:
        staged.write(PosixStorage(directory, LocalFilesystem()), None)
    if staged.plan.decision is not None:
        (directory / ".metadata").write_bytes(staged.plan.metadata)


def _read(directory: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Read a state with torch's own loader."""
    found = {
        name: torch.empty_like(each) if isinstance(each, Tensor) else None
        for name, each in like.items()
    }
    load(found, checkpoint_id=directory, no_dist=True)
    return found


def _is_equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        bits(found[name]) == bits(each) if isinstance(each, Tensor) else found[name] == each
        for name, each in expected.items()
    )


def _leaves(count: int = 8, scale: float = 1.0) -> dict[str, Any]:
    return {
        **{
            f"t{number}": torch.full((100 + number, 10), float(scale + number))
            for number in range(count)
        },
        "note": "text",
        "step": 7,
    }


# -- one rank ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # which torch's reader tells, as asked
@pytest.mark.parametrize("streams", [False, True])
def test_stock_torch_reads_every_save(tmp_path: Path, streams: bool) -> None:
    """Staged or streamed, saved once or again with other values, dcp.load gives back every bit."""
    rank = _Rank()
    for number in range(3):
        leaves = {**_leaves(scale=number), "note": "x" * (300 * number)}
        plan, inventory = rank.settle(SingleProcess(), leaves)
        stage = rank.saver.stream if streams else rank.saver.stage
        _write(stage(plan, inventory), tmp_path / f"{number}")
        assert _is_equal(_read(tmp_path / f"{number}", leaves), leaves)


def test_a_plan_is_kept_while_the_structure_is_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Other values, and other tensors of the same shape, are saved by the same plan, in silence."""
    caplog.set_level(logging.INFO, "holdfast")
    rank = _Rank()
    first, _ = rank.settle(SingleProcess(), _leaves())
    for number in range(3):
        plan, _ = rank.settle(SingleProcess(), {**_leaves(scale=number), "step": number})
        assert plan is first
    assert not caplog.records


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lambda leaves: leaves.update(t0=torch.rand(3)),
    "type": lambda leaves: leaves.update(t0=leaves["t0"].double()),
    "a name more": lambda leaves: leaves.update(more=torch.rand(3)),
    "a name less": lambda leaves: leaves.pop("t0"),
    "a name for another": lambda leaves: leaves.update(other=leaves.pop("t0")),
    "order": lambda leaves: leaves.update(t0=leaves.pop("t0")),
    "tie": lambda leaves: leaves.update(t0=leaves["t1"]),
    "outgrown": lambda leaves: leaves.update(note="x" * 100_000),
    "a value for a tensor": lambda leaves: leaves.update(t0=1),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_structure_is_planned_anew_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Whatever changes what a plan depends on gives another plan, says so once, and loads right."""
    caplog.set_level(logging.INFO, "holdfast")
    rank, leaves = _Rank(), _leaves()
    first = rank.stage(SingleProcess(), leaves).plan
    CHANGES[name](leaves)
    staged = rank.stage(SingleProcess(), leaves)
    assert staged.plan is not first
    assert staged.plan.identity != first.identity
    assert [each.message.split(":")[0] for each in caplog.records] == ["planning again"]
    assert rank.stage(SingleProcess(), leaves).plan is staged.plan
    assert len(caplog.records) == 1
    _write(staged, tmp_path / "a")
    assert _is_equal(_read(tmp_path / "a", leaves), leaves)


def test_metadata_is_made_when_it_is_asked_for() -> None:
    """`.metadata` names every item once, with its file, and is not encoded again."""
    staged = _Rank().stage(SingleProcess(), _leaves())
    content = staged.plan.metadata
    assert staged.plan.metadata is content
    found = pickle.loads(content)
    assert found.state_dict_metadata.keys() == _leaves().keys()
    assert {each.relative_path for each in found.storage_data.values()} == {"__0_0.distcp"}


# -- memory --------------------------------------------------------------------------------------


def _arena_of(staged: StagedShard) -> Arena:
    assert staged.arena is not None
    staged.wait()
    return staged.arena


def test_the_arena_stays_while_the_plan_does() -> None:
    """The next save with the same plan fills the same memory."""
    rank = _Rank()
    arena = _arena_of(rank.stage(SingleProcess(), _leaves()))
    assert _arena_of(rank.stage(SingleProcess(), _leaves(scale=3.0))) is arena
    rank.saver.release()
    assert _arena_of(rank.stage(SingleProcess(), _leaves())) is not arena


def test_memory_is_used_again_and_holds_nothing_old() -> None:
    """A new plan of about the size takes the old memory; its file is as in memory of its own."""
    rank = _Rank()
    before = _arena_of(rank.stage(SingleProcess(), {"a": torch.rand(4 * MIB), "b": "x" * 900}))
    pages = before.memory.obj
    leaves = {"c": torch.rand(3 * MIB + 1), "note": 5, "a": torch.rand(3, 2).t()}
    after = _arena_of(rank.stage(SingleProcess(), leaves))
    assert after.memory.obj is pages
    assert after.memory == _arena_of(_Rank().stage(SingleProcess(), leaves)).memory


@pytest.mark.parametrize("size", [40_000_000, 10], ids=["larger", "much smaller"])
def test_memory_that_does_not_suit_is_given_back_first(size: int) -> None:
    """What is too small, or far too large, is gone when the new arena is there."""
    rank = _Rank()
    gone = weakref.ref(
        _arena_of(rank.stage(SingleProcess(), {"a": torch.rand(2 * MIB)})).memory.obj
    )
    assert gone() is not None
    rank.stage(SingleProcess(), {"a": torch.rand(size)})
    assert gone() is None


def test_an_arena_that_does_not_fit_leaves_the_saver_sound() -> None:
    """A plan too large for memory is refused with the numbers; the next that fits is staged."""
    rank, coordinator = _Rank(), SingleProcess()
    gone = weakref.ref(_arena_of(rank.stage(coordinator, {"a": torch.rand(100)})).memory.obj)
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    wide = torch.zeros(1, dtype=torch.uint8).expand(half)
    plan, inventory = rank.settle(coordinator, {f"a{number}": wide[number:] for number in range(5)})
    with pytest.raises(NotEnoughMemoryError) as caught:
        rank.saver.stage(plan, inventory)
    assert caught.value.needed_bytes > 4 * half
    assert gone() is None, "it was not given back first"
    leaves = {"a": torch.rand(100)}
    staged = rank.stage(coordinator, leaves)
    entry = staged.plan.written.layout.slots[0]
    found = _arena_of(staged).memory[entry.payload_offset :][: entry.payload_bytes]
    assert found == bits(leaves["a"])


# -- ranks ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("ranks", [2, 3])
def test_replicas_are_written_once_and_balanced(tmp_path: Path, ranks: int) -> None:
    """What all ranks have in common, one of each writes, about as many bytes each; all is read."""
    leaves: dict[str, Any] = {
        f"t{number}": torch.full((64 * (number % 5 + 1), 256), float(number))
        for number in range(30)
    }
    leaves |= {"note": "text"}

    def program(coordinator: StoreCoordinator) -> Any:
        staged = _Rank().stage(coordinator, leaves)
        _write(staged, tmp_path)
        return _names(staged.plan), staged.plan.written.layout.body_bytes, staged.plan.name

    found = _on_ranks(program, ranks)
    assert sorted(name for names, _, _ in found for name in names) == sorted(leaves)
    sizes = [size for _, size, _ in found]
    assert max(sizes) - min(sizes) <= 2 * 64 * 5 * 256 * 4
    assert [name for _, _, name in found] == [f"__{rank}_0.distcp" for rank in range(ranks)]
    assert _is_equal(_read(tmp_path, leaves), leaves)


def test_a_rank_may_have_nothing_to_write(tmp_path: Path) -> None:
    """With one tensor for two ranks, one has an empty share and writes no file."""

    def program(coordinator: StoreCoordinator) -> bool:
        staged = _Rank().stage(coordinator, {"only": torch.rand(3)})
        _write(staged, tmp_path)
        return staged.is_empty

    assert sorted(_on_ranks(program)) == [False, True]
    assert len([*tmp_path.glob("*.distcp")]) == 1


def test_one_changed_rank_makes_all_plan_anew(caplog: pytest.LogCaptureFixture) -> None:
    """A plan is kept only while every rank's structure is the same; rank 0 says what is not."""
    caplog.set_level(logging.INFO, "holdfast")

    def program(coordinator: StoreCoordinator) -> Any:
        rank, plans = _Rank(), []
        leaves = {"all": torch.rand(3), f"own{coordinator.rank}": torch.rand(3)}
        for number in range(4):
            if number == 2 and coordinator.rank == 1:
                leaves["own1"] = torch.rand(5)
            plans.append(rank.settle(coordinator, leaves)[0])
        return plans

    mine, theirs = _on_ranks(program)
    for plans in (mine, theirs):
        assert plans[0] is plans[1]
        assert plans[1] is not plans[2]
        assert plans[2] is plans[3]
    assert [each.identity for each in mine] == [each.identity for each in theirs]
    assert len({each.identity for each in mine}) == 2
    (told,) = caplog.records
    assert "planning again" in told.message
    assert "1" in told.message


def test_a_rank_that_lost_its_plan_makes_all_plan_anew() -> None:
    """A rank that has no plan, with the same structure, is never given an old one to follow."""

    def program(coordinator: StoreCoordinator) -> Any:
        rank = _Rank()
        first = rank.settle(coordinator, _leaves())[0]
        if coordinator.rank == 1:
            rank = _Rank()
        second = rank.settle(coordinator, _leaves())[0]
        assert rank.settle(coordinator, _leaves())[0] is second
        return first, second, _names(second)

    found = _on_ranks(program)
    assert all(first is not second for first, second, _ in found)
    assert sorted(found[0][2] + found[1][2]) == sorted(_leaves())


def test_a_rank_that_cannot_capture_fails_all_and_keeps_the_plan() -> None:
    """What one rank's capture raises, all raise; the plan that they had still serves the next."""

    def program(coordinator: StoreCoordinator) -> Any:
        rank = _Rank()
        first = rank.settle(coordinator, _leaves())[0]

        def take() -> Any:
            if coordinator.rank == 1:
                raise RuntimeError("as planned")
            return rank.itemizer.describe(_leaves(), {name: (name,) for name in _leaves()})

        with pytest.raises(StageFailedError, match="as planned"):
            rank.saver.agree_on_plan(take, coordinator)
        return rank.settle(coordinator, _leaves())[0] is first

    assert _on_ranks(program) == [True, True]


def test_ranks_that_differ_about_a_name_are_refused() -> None:
    """A tensor of one name and two shapes is an error on every rank that names it."""

    def program(coordinator: StoreCoordinator) -> Any:
        return _Rank().settle(coordinator, {"w": torch.rand(3 + coordinator.rank)})

    for error in _on_ranks(program):
        assert isinstance(error, Exception)
        assert "w" in str(error)
