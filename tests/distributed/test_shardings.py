"""Plain tensors that say how they are sharded are saved as chunks of a global tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import holdfast
from holdfast.config import CheckpointConfig
from holdfast.errors import StageFailedError, UnsupportedStateError, WrongArgumentError
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext, GlobalState
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# name: global size, dimension, stride, the lengths on 2 and on 4 ranks
TENSORS: dict[str, tuple[tuple[int, ...], int | None, int, dict[int, list[int]]]] = {
    "column": ((12, 5), 0, 1, {2: [6, 6], 4: [3, 3, 3, 3]}),
    "row": ((5, 12), 1, 1, {2: [6, 6], 4: [3, 3, 3, 3]}),
    "gated": ((16, 3), 0, 2, {2: [8, 8], 4: [4, 4, 4, 4]}),
    "gated_row": ((3, 16), 1, 2, {2: [8, 8], 4: [4, 4, 4, 4]}),
    "uneven": ((7, 3), 0, 1, {2: [4, 3], 4: [2, 2, 2, 1]}),
    "uneven_gated": ((12, 2), 0, 2, {2: [8, 4], 4: [4, 4, 2, 2]}),
    "scarce": ((3, 2), 0, 1, {2: [2, 1], 4: [1, 1, 1, 0]}),
    "norm": ((5,), None, 1, {}),
}
STATES = ("exp_avg", "exp_avg_sq")


def _truth(name: str, key: str = "") -> torch.Tensor:
    """Return a global tensor, the same everywhere."""
    size = TENSORS[name][0]
    seed = sorted(TENSORS).index(name) * 10 + ("", *STATES).index(key)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _own(name: str, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Cut as Megatron does: with stride n, the piece of every rank from each n-th of the tensor."""
    _, dim, stride, lengths = TENSORS[name]
    if dim is None or ranks == 1:
        return whole
    parts = whole.chunk(stride, dim)
    cut = [each.split([length // stride for length in lengths[ranks]], dim) for each in parts]
    return torch.cat([each[rank] for each in cut], dim)


class Model(nn.Module):
    """Parameters of a part of the global tensors, with Megatron's attributes."""

    def __init__(self, rank: int, ranks: int, *, fill: float | None = None) -> None:
        super().__init__()
        for name, (_, dim, stride, _) in TENSORS.items():
            own = _own(name, _truth(name), rank, ranks).clone()
            parameter = nn.Parameter(own if fill is None else torch.full_like(own, fill))
            self.register_parameter(name, parameter)
            if dim is not None and not name.startswith("uneven"):
                vars(parameter).update(
                    tensor_model_parallel=True, partition_dim=dim, partition_stride=stride
                )
            elif dim is not None and ranks > 1:
                holdfast.declare_sharding(parameter, dim=dim, stride=stride)
        self.head = self.column  # tied


def _optimizer(model: Model, rank: int, ranks: int, *, is_fresh: bool) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters())
    if is_fresh:
        return optimizer
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        del name
    optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_own(name, _truth(name), rank, ranks))
            for key in STATES:
                optimizer.state[parameter][key].copy_(_own(name, _truth(name, key), rank, ranks))
    return optimizer


def _groups() -> Any:
    return SimpleNamespace(dp=None, tp=distributed.group.WORLD)


def _manager(root: Path, **options: Any) -> DefaultCheckpointManager:
    values = {"persistent": {"directory": str(root)}, "timeout_seconds": 60, **options}
    return DefaultCheckpointManager(CheckpointConfig.from_mapping(values))


def _to_load(model: nn.Module, optimizer: Any = None, groups: Any = _groups) -> Any:
    groups = groups() if callable(groups) else groups
    return CheckpointLoadContext(GlobalState(), model, optimizer, None, pg_collection=groups)


def _to_save(step: int, model: nn.Module, optimizer: Any = None, groups: Any = _groups) -> Any:
    state = GlobalState()
    state.train_state.step = step
    groups = groups() if callable(groups) else groups
    return CheckpointSaveContext(state, model, optimizer, None, pg_collection=groups)


def _save(root: Path, model: nn.Module, optimizer: Any, step: int = 1, **options: Any) -> None:
    manager = _manager(root, **options)
    manager.load(_to_load(model, optimizer))
    for number in (step, step + 1):  # the second one repeats the first one's plan
        manager.save(_to_save(number, model, optimizer))
    manager.finalize_async_saves(GlobalState(), blocking=True, terminate=True)


def _save_truth(root: Path, options: dict[str, Any]) -> None:
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    model = Model(rank, ranks)
    _save(root, model, _optimizer(model, rank, ranks, is_fresh=False), **options)


def _load_truth(root: Path, has_state: bool, again: Path | None = None) -> None:
    """Load on any number of ranks and compare every local tensor with the truth; save again."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    model = Model(rank, ranks, fill=-1.0)
    optimizer = _optimizer(model, rank, ranks, is_fresh=not has_state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1)
    assert _manager(root).load(_to_load(model, optimizer)).found
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, _own(name, _truth(name), rank, ranks)), name
        for key in STATES:
            own = _own(name, _truth(name, key), rank, ranks)
            assert torch.equal(optimizer.state[parameter][key], own), (name, key)
    if again is not None:
        _save(again, model, optimizer)


def _expect_whole(root: Path) -> None:
    """Read the newest checkpoint with torch alone."""
    (newest,) = [*root.glob("iter_0000002")]
    names = {f"model.{name}": _truth(name) for name in TENSORS}
    names |= {f"optimizer.state.{n}.{k}": _truth(n, k) for n in TENSORS for k in STATES}
    found = {name: torch.zeros_like(each) for name, each in names.items()}
    load(found, checkpoint_id=newest, no_dist=True)
    for name, each in names.items():
        assert torch.equal(found[name], each), name


@pytest.mark.parametrize(
    ("options", "has_state"),
    [({}, True), ({"async_save": False}, False), ({"staging": "overlapped"}, False)],
    ids=str,
)
def test_tensor_parallel_state_reshards_from_2_to_4_to_1(
    options: dict[str, Any], has_state: bool, tmp_path: Path
) -> None:
    """Even, uneven and interleaved parts are read as the global tensor at any number of ranks."""
    two, four = tmp_path / "two", tmp_path / "four"
    run_ranks(_save_truth, 2, two, options)
    _expect_whole(two)
    run_ranks(_load_truth, 4, two, has_state, four)
    _expect_whole(four)
    run_ranks(_load_truth, 1, four, has_state)
    run_ranks(_load_truth, 2, four, has_state)


def _load_as_dtensors(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Module()
    for name, (size, dim, _, _) in TENSORS.items():
        whole = distribute_tensor(torch.zeros(size), mesh, [Shard(dim or 0)])
        model.register_parameter(name, nn.Parameter(whole))
    model.register_parameter("head", model.column)
    assert _manager(root).load(_to_load(model)).found
    for name in TENSORS:
        parameter: Any = getattr(model, name)
        assert torch.equal(parameter.full_tensor(), _truth(name)), name


def test_a_model_of_dtensors_loads_what_attributes_described(tmp_path: Path) -> None:
    """The checkpoint says nothing of how its chunks were known."""
    run_ranks(_save_truth, 2, tmp_path, {})
    run_ranks(_load_as_dtensors, 2, tmp_path)


def _change(root: Path) -> None:
    """Save, declare or mark otherwise, and save again: nothing is taken from the first save."""
    rank = distributed.get_rank()
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(rank)
    marked: Any = model.weight
    marked.tensor_model_parallel, marked.partition_dim, marked.partition_stride = True, 0, 1
    manager = _manager(root)
    manager.load(_to_load(model))
    for step, change in enumerate((("partition_dim", 0), ("partition_dim", 1), ("stride", 2))):
        if change[0] == "stride":
            holdfast.declare_sharding(model.weight, dim=0, stride=2)
        else:
            marked.partition_dim = change[1]
        manager.save(_to_save(step, model))
        manager.finalize_async_saves(GlobalState(), blocking=True)
    manager.finalize_async_saves(GlobalState(), blocking=True, terminate=True)


def test_changed_attributes_are_seen_at_the_next_save(tmp_path: Path) -> None:
    """What is reused between saves is compared with the live parameters."""
    run_ranks(_change, 2, tmp_path)
    sizes = [(8, 4), (4, 8), (8, 4)]
    rows = [[0] * 4 + [1] * 4, [0] * 4 + [1] * 4, [0, 0, 1, 1, 0, 0, 1, 1]]
    for step, (size, row) in enumerate(zip(sizes, rows, strict=True)):
        whole = {"model.weight": torch.full(size, -1.0)}
        load(whole, checkpoint_id=tmp_path / f"iter_{step:07d}", no_dist=True)
        found = whole["model.weight"]
        assert (found[0] if size == (4, 8) else found[:, 0]).tolist() == row


def _plan_before_the_first_step(root: Path) -> list[str]:
    """Load before the optimizer has state, save after it has; return what planning logged."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("holdfast.snapshot.shard").addHandler(handler)
    logging.getLogger("holdfast.snapshot.shard").setLevel(logging.INFO)
    model = Model(rank, ranks)
    optimizer = torch.optim.AdamW(model.parameters())
    manager = _manager(root / "store", local={"directory": str(root / f"local{rank}")})
    manager.load(_to_load(model, optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    manager.save(_to_save(1, model, optimizer))
    manager.finalize_async_saves(GlobalState(), blocking=True, terminate=True)
    return records


def test_the_estimate_is_of_the_parts_that_the_first_save_has(tmp_path: Path) -> None:
    """The plan made before the optimizer has state is the first save's, uneven parts included."""
    assert run_ranks(_plan_before_the_first_step, 2, tmp_path) == [[], []]


def _mark(model: nn.Linear, **attributes: Any) -> None:
    vars(model.weight).update({"tensor_model_parallel": True, **attributes})


def _without_a_group(model: nn.Linear) -> Any:
    _mark(model, partition_dim=0, partition_stride=1)
    return None


def _without_a_dimension(model: nn.Linear) -> Any:
    _mark(model, partition_dim=-1, partition_stride=1)
    return _groups()


def _of_another_shape(model: nn.Linear) -> Any:
    _mark(model, partition_dim=0, partition_stride=1)
    if distributed.get_rank():
        model.weight = nn.Parameter(torch.zeros(4, 3))
        _mark(model, partition_dim=0, partition_stride=1)
    return _groups()


def _on_one_rank(model: nn.Linear) -> Any:
    if distributed.get_rank():
        _mark(model, partition_dim=0, partition_stride=1)
    return _groups()


def _in_pieces_that_do_not_divide(model: nn.Linear) -> Any:
    _mark(model, partition_dim=0, partition_stride=3)
    return _groups()


def _over_other_ranks(model: nn.Linear) -> Any:
    groups = [distributed.new_group([rank]) for rank in range(2)]
    holdfast.declare_sharding(model.weight, dim=0, group=groups[1 - distributed.get_rank()])
    return _groups()


REFUSED: dict[Callable[[nn.Linear], Any], str] = {
    _without_a_group: "model.weight has tensor_model_parallel set, and its group is not known",
    _without_a_dimension: "model.weight has tensor_model_parallel set, and partition_dim -1",
    _of_another_shape: r"rank 0 has float32\[4, 4\] cut along .* and rank 1 has float32\[4, 3\]",
    _on_one_rank: "model.weight is sharded over ranks 0, 1: rank 1 has .* and rank 0 has no such",
    _in_pieces_that_do_not_divide: "model.weight has 4 elements .* do not divide into 3 pieces",
    _over_other_ranks: "model.weight: the group that it is sharded over|rank 0 is none of them",
}


def _expect_refusals(root: Path) -> list[list[str]]:
    found = []
    for number, prepare in enumerate(REFUSED):
        model = nn.Linear(4, 4, bias=False)
        groups = prepare(model)
        messages = []
        manager = _manager(root / str(number))
        plain = nn.Linear(4, 4, bias=False)
        manager.load(_to_load(plain, groups=groups))
        try:
            manager.save(_to_save(1, model, groups=groups))
            messages.append("saved")
        except (UnsupportedStateError, StageFailedError) as error:
            messages.append(str(error))
        manager.finalize_async_saves(GlobalState(), blocking=True, terminate=True)
        found.append(messages)
    return found


def test_contradictions_are_refused_by_name_on_every_rank(tmp_path: Path) -> None:
    """Attributes without a group, or against the tensor or the other ranks, save nothing."""
    for messages in run_ranks(_expect_refusals, 2, tmp_path):
        for (message,), wanted in zip(messages, REFUSED.values(), strict=True):
            with pytest.raises(ValueError, match=wanted):
                raise ValueError(message)
    assert not [*tmp_path.glob("*/iter_*")]


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("dim", {"dim": 2}),
        ("dim", {"dim": True}),
        ("stride", {"dim": 0, "stride": 3}),
        ("stride", {"dim": 0, "stride": 0}),
    ],
)
def test_a_wrong_declaration_is_refused_at_once(argument: str, values: dict[str, Any]) -> None:
    """It names the argument."""
    with pytest.raises(WrongArgumentError) as caught:
        holdfast.declare_sharding(torch.zeros(4, 4), **values)
    assert caught.value.argument == argument


def test_only_plain_tensors_can_be_declared() -> None:
    """A name is no tensor."""
    name: Any = "weight"
    with pytest.raises(WrongArgumentError, match="is a str, no tensor"):
        holdfast.declare_sharding(name, dim=0)
