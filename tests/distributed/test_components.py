"""Components by sharing pattern on four ranks, and what two ranks get of what four have saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from holdfast import SharingPattern, StateComponent
from holdfast.errors import CheckpointError, ReplicaMismatchError, UnsupportedStateError
from tests.support.managers import linear, manager_of
from tests.support.ranks import run_ranks

PATTERNS = {
    "one": SharingPattern.GLOBAL,
    "copies": SharingPattern.REPLICATED,
    "own": SharingPattern.PER_RANK,
    "own_equal": SharingPattern.PER_RANK,
    "group": SharingPattern.PER_GROUP,
    "group_equal": SharingPattern.PER_GROUP,
    "node": SharingPattern.PER_NODE,
    "node_equal": SharingPattern.PER_NODE,
    "parts": SharingPattern.SHARDED,
}
WHOLE = torch.arange(16.0).reshape(8, 2)


class _Box:
    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        if distributed.get_world_size() > 1:
            distributed.barrier()  # state dicts may run collectives: every rank is asked
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def _sharded(value: torch.Tensor) -> DTensor:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    return distribute_tensor(value, mesh, [Shard(0)])


def _state(name: str, rank: int) -> Any:
    """Of a rank: its number, in a plain value and in a tensor that is of its own size if it may."""
    if name == "parts":
        return {"w": _sharded(WHOLE), "n": 3}
    number = rank if name in ("one", "own", "group", "node") else 7
    size = rank + 1 if name == "own" else 2
    return {"v": number, "deep": [{"t": torch.full((size,), float(number))}]}


def _nodes_of_two(rank: int) -> None:
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}


def _group(rank: int, *groups: list[int]) -> Any:
    made = [distributed.new_group(each) for each in groups]
    return next(each for each, ranks in zip(made, groups, strict=True) if rank in ranks)


def _declare(boxes: Mapping[str, _Box], group: Any) -> list[StateComponent]:
    return [
        StateComponent(name, box, PATTERNS[name], group=group if name.startswith("group") else None)
        for name, box in boxes.items()
    ]


def _shown(state: Any) -> Any:
    if state is None or "deep" not in state:
        return None if state is None else [state["n"], state["w"].to_local().tolist()]
    return [state["v"], state["deep"][0]["t"].tolist()]


def _load(root: Path, boxes: Mapping[str, _Box], group: Any, **config: Any) -> Any:
    """Return what each component has afterwards, or the error."""
    live, manager = linear(9), manager_of(root / "store", **config)
    try:
        live.load(manager, components=_declare(boxes, group))
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        manager.finalize_async_saves(live.state, terminate=True)
    return {name: _shown(box.state) for name, box in boxes.items()}


def _empty(names: Any = PATTERNS) -> dict[str, _Box]:
    return {
        name: _Box({"w": _sharded(torch.zeros(8, 2)), "n": 0} if name == "parts" else None)
        for name in names
    }


def _on_four(root: Path) -> dict[str, Any]:
    rank = distributed.get_rank()
    _nodes_of_two(rank)
    group = _group(rank, [0, 2], [1, 3])
    boxes = {name: _Box(_state(name, rank)) for name in PATTERNS}
    tiers: Any = {"local": {"directory": str(root / "local")}}
    live, manager = linear(), manager_of(root / "store", async_save=True, **tiers)
    live.load(manager)
    for number in (1, 2, 3):  # the last by the plan of those before
        live.save(manager, number, components=_declare(boxes, group))
    manager.finalize_async_saves(live.state, blocking=True, terminate=True)
    found: dict[str, Any] = {"saved": {name: _shown(box.state) for name, box in boxes.items()}}
    found["local"] = _load(root, _empty(), group, **tiers)
    found["persistent"] = _load(root, _empty(), group)
    others = _group(rank, [0, 1], [2, 3])
    found["regrouped"] = _load(root, _empty(["group"]), others)
    found["regrouped equal"] = _load(root, _empty(["group_equal"]), others)
    found |= _later(root, group)
    return found | _refused(root, rank)


def _later(root: Path, group: Any) -> dict[str, Any]:
    """Load without any object, save that, load again without any, and only then make them."""
    live, manager = linear(9), manager_of(root / "store", load={"override": ["components.parts"]})
    live.load(manager)
    live.save(manager, 4)
    manager.finalize_async_saves(live.state, terminate=True)
    live, manager = linear(9), manager_of(root / "store")
    live.load(manager)
    boxes = _empty([name for name in PATTERNS if name != "parts"])
    given = [manager.restore_component(each) for each in _declare(boxes, group)]
    assert all(given)
    manager.finalize_async_saves(live.state, terminate=True)
    return {"later": {name: _shown(box.state) for name, box in boxes.items()}}


def _refused(root: Path, rank: int) -> dict[str, Any]:
    """What each of some wrong saves raises."""

    def save(box: _Box, sharing: SharingPattern, group: Any = None) -> str:
        live, manager = linear(), manager_of(root / "refused")
        live.load(manager)
        try:
            live.save(manager, 1, components=[StateComponent("copies", box, sharing, group)])
        except (ReplicaMismatchError, UnsupportedStateError, CheckpointError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            manager.finalize_async_saves(live.state, terminate=True)
        return "saved"

    copies = SharingPattern.REPLICATED
    values = {"plain": {"a": {"b": [rank == 3]}}, "tensor": {"t": torch.tensor([rank == 3])}}
    found = {name: save(_Box(each), copies) for name, each in values.items()}
    found["dtensor"] = save(_Box({"w": _sharded(WHOLE)}), copies)
    found["other group"] = save(_Box(1), SharingPattern.PER_GROUP, [0, 1])
    return found


def _on_two(root: Path) -> dict[str, Any]:
    rank = distributed.get_rank()
    _nodes_of_two(rank)
    group = _group(rank, [0, 1])
    found = {name: _load(root, _empty([name]), group, load={"step": 3}) for name in PATTERNS}
    left_alone = {"ignore_keys": ["components.own", "model.weight"]}
    config = {"step": 3, "strategy": left_alone}
    return found | {"left alone": _load(root, _empty(["own"]), group, load=config)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the store of both runs."""
    return tmp_path_factory.mktemp("components")


@pytest.fixture(scope="module")
def four(root: Path) -> list[dict[str, Any]]:
    """What the ranks of the run that saves have seen."""
    return run_ranks(_on_four, 4, root)


@pytest.fixture(scope="module")
def two(root: Path, four: list[Any]) -> list[dict[str, Any]]:
    """What the ranks of the smaller run have seen."""
    assert four
    return run_ranks(_on_two, 2, root)


def _expect(four: list[dict[str, Any]], name: str, wanted: list[Any]) -> None:
    for way in ("local", "persistent", "later"):
        if name != "parts" or way != "later":
            assert [each[way][name] for each in four] == wanted, way


def _of(number: int, size: int = 2) -> list[Any]:
    return [number, [float(number)] * size]


def test_global_is_the_value_of_rank_0(four: list[Any], two: list[Any]) -> None:
    """On every rank, at any number of them."""
    _expect(four, "one", [_of(0)] * 4)
    assert [each["one"] for each in two] == [{"one": _of(0)}] * 2


def test_replicated_is_compared_and_read_by_all(four: list[Any], two: list[Any]) -> None:
    """Plain values too: Forgather's check looked one level deep, and found moments 100 apart alike.

    The error is raised on every rank.
    """
    _expect(four, "copies", [_of(7)] * 4)
    assert [each["copies"] for each in two] == [{"copies": _of(7)}] * 2
    for each in four:
        assert each["plain"].startswith("ReplicaMismatchError: components.copies@plain_values")
        assert each["tensor"].startswith("ReplicaMismatchError: components.copies.t")
        assert "components.copies.w is a DTensor" in each["dtensor"]
        assert "SHARDED" in each["dtensor"]


def test_per_rank_is_each_ranks_own(four: list[Any], two: list[Any]) -> None:
    """Of its own size; another number of ranks gets what was equal on all, and nothing else."""
    _expect(four, "own", [_of(rank, rank + 1) for rank in range(4)])
    _expect(four, "own_equal", [_of(7)] * 4)
    for each in two:
        assert "components.own has a value for each of 4 ranks, which differ" in each["own"]
        assert each["own_equal"] == {"own_equal": _of(7)}
        assert each["left alone"] == {"own": None}


def test_per_group_is_the_value_of_the_lowest_member(four: list[Any], two: list[Any]) -> None:
    """Given to members that are no leaders, never that of another group.

    Forgather's members found nothing, and a leader took the first file of any group.
    """
    _expect(four, "group", [_of(rank % 2) for rank in range(4)])
    _expect(four, "group_equal", [_of(7)] * 4)
    for each in four:
        assert each["regrouped equal"] == {"group_equal": _of(7)}
        # The lowest rank that refuses speaks for all.
        there = "the groups [0, 2], [1, 3], this rank is in ["
        assert f"components.group was saved by {there}" in each["regrouped"]
        assert "has the ranks [0, 1], and this is rank 2 of 4" in each["other group"]
    for each in two:
        assert "components.group was saved by the groups [0, 2], [1, 3]" in each["group"]
        assert each["group_equal"] == {"group_equal": _of(7)}


def test_per_node_is_the_value_of_the_first_rank_there(four: list[Any], two: list[Any]) -> None:
    """A node that is still there gets its own back, whatever became of the others."""
    _expect(four, "node", [_of(rank // 2 * 2) for rank in range(4)])
    _expect(four, "node_equal", [_of(7)] * 4)
    assert [each["node"] for each in two] == [{"node": _of(0)}] * 2
    assert [each["node_equal"] for each in two] == [{"node_equal": _of(7)}] * 2


def test_sharded_is_divided_anew(four: list[Any], two: list[Any]) -> None:
    """Each rank has its part, at any number of ranks."""
    for found, ranks in ((four, 4), (two, 2)):
        parts = [each.tolist() for each in WHOLE.chunk(ranks)]
        wanted = [[3, part] for part in parts]
        for way in ("local", "persistent") if ranks == 4 else ("parts",):
            assert [each[way]["parts"] for each in found] == wanted
