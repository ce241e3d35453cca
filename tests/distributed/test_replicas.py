"""What several ranks hold under one name is compared before one of them writes it for all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import holdfast
from holdfast.config import CheckpointConfig
from holdfast.errors import CheckpointError, ReplicaMismatchError
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext, GlobalState
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LARGE = (3, 1024, 1024)
"""Of 12 MiB: two blocks."""


def _manager(root: Path, **options: Any) -> DefaultCheckpointManager:
    values = {"persistent": {"directory": str(root)}, "timeout_seconds": 60, **options}
    return DefaultCheckpointManager(CheckpointConfig.from_mapping(values))


def _save(manager: DefaultCheckpointManager, step: int, model: Any, optimizer: Any = None) -> None:
    state = GlobalState()
    state.train_state.step = step
    manager.save(CheckpointSaveContext(state, model, optimizer, None))
    manager.finalize_async_saves(state, blocking=True)


def _load(manager: DefaultCheckpointManager, model: Any, optimizer: Any = None) -> bool:
    return manager.load(CheckpointLoadContext(GlobalState(), model, optimizer, None)).found


def _end(manager: DefaultCheckpointManager) -> None:
    manager.finalize_async_saves(GlobalState(), blocking=True, terminate=True)


def _trained(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4, dtype=dtype)).sum().backward()
    optimizer.step()
    return model, optimizer


def _bits(number: int) -> torch.Tensor:
    return torch.tensor([number], dtype=torch.int32).view(torch.float32)[0]


def _one_weight(rank: int) -> Any:
    model, optimizer = _trained()
    if rank == 2:
        model[1].weight.data[1, 2] = 5.0  # type: ignore[index]
    return model, optimizer


def _several_sides(rank: int) -> Any:
    model, optimizer = _trained()
    model[0].bias.data[1] = float(rank // 2)  # type: ignore[index]
    return model, optimizer


def _second_block(rank: int) -> Any:
    model = nn.Module()
    model.large = nn.Parameter(torch.arange(3 << 20).view(LARGE).float())
    if rank == 3:
        model.large.data[2, 700, 5] += 1
    return model, None


def _moment(rank: int) -> Any:
    model, optimizer = _trained(torch.bfloat16)
    if rank == 0:
        optimizer.state[model[0].weight]["exp_avg"][2, 3] = 0.5  # type: ignore[index]
    return model, optimizer


def _steps(rank: int) -> Any:
    model, optimizer = _trained()
    optimizer.state[model[0].weight]["step"] = 4 + rank % 2  # type: ignore[index]
    return model, optimizer


def _nan_payloads(rank: int) -> Any:
    model, optimizer = _trained()
    model[0].bias.data[0] = _bits(0x7FC00000 + rank)  # type: ignore[index]
    return model, optimizer


def _negative_zero(rank: int) -> Any:
    model, optimizer = _trained()
    model[0].bias.data[2] = -0.0 if rank else 0.0  # type: ignore[index]
    return model, optimizer


def _hybrid_shards(rank: int) -> Any:
    """Replicas of shards: rank 3 has another value in what ranks 1 and 3 hold."""
    mesh = init_device_mesh("cpu", (2, 2))
    local = torch.full((2, 3), float(rank % 2))
    if rank == 3:
        local[1, 1] = 7.0
    model = nn.Module()
    model.weight = nn.Parameter(DTensor.from_local(local, mesh, [Replicate(), Shard(0)]))
    return model, None


def _declared_shards(rank: int) -> Any:
    """The same with declared shards, interleaved: the index is that of the global tensor."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    model = nn.Module()
    model.weight = nn.Parameter(torch.full((4, 3), float(rank % 2)))
    if rank == 3:
        model.weight.data[2, 1] = 7.0
    holdfast.declare_sharding(model.weight, dim=0, group=groups[rank // 2], stride=2)
    return model, None


CASES: dict[Callable[[int], Any], tuple[str, Any, int, Any, tuple[str, str]]] = {
    _one_weight: ("model.1.weight", ((0, 1, 3), (2,)), 0, (1, 2), ("*", "5.0")),
    _several_sides: ("model.0.bias", ((0, 1), (2, 3)), 0, (1,), ("0.0", "1.0")),
    _second_block: (
        "model.large",
        ((0, 1, 2), (3,)),
        1,
        (2, 700, 5),
        ("2813957.0", "2813958.0"),
    ),
    _moment: ("optimizer.state.0.weight.exp_avg", ((0,), (1, 2, 3)), 0, (2, 3), ("0.5", "*")),
    _steps: ("optimizer.state.0.weight.step", ((0, 2), (1, 3)), 0, None, ("*", "*")),
    _nan_payloads: (
        "model.0.bias",
        ((0,), (1,), (2,), (3,)),
        0,
        (0,),
        ("nan (bits 7fc00000)", "nan (bits 7fc00001)"),
    ),
    _negative_zero: ("model.0.bias", ((0,), (1, 2, 3)), 0, (2,), ("0.0", "-0.0")),
    _hybrid_shards: ("model.weight", ((1,), (3,)), 0, (3, 1), ("1.0", "7.0")),
    _declared_shards: ("model.weight", ((1,), (3,)), 0, (6, 1), ("1.0", "7.0")),
}


def _expect_refusals(root: Path) -> list[CheckpointError | None]:
    found: list[CheckpointError | None] = []
    for number, make in enumerate(CASES):
        model, optimizer = make(distributed.get_rank())
        manager = _manager(root / str(number))
        _load(manager, model, optimizer)
        try:
            _save(manager, 1, model, optimizer)
            found.append(None)
        except ReplicaMismatchError as error:
            found.append(error)
        _end(manager)
    return found


def test_different_replicas_are_refused_with_the_first_difference(tmp_path: Path) -> None:
    """Tensor, ranks on each side, block, element and both values, the same on every rank."""
    columns = run_ranks(_expect_refusals, 4, tmp_path)
    for found in columns:
        for make, error, wanted in zip(CASES, found, CASES.values(), strict=True):
            assert isinstance(error, ReplicaMismatchError), make
            assert (error.name, error.sides, error.block, error.index) == wanted[:4], make
            for value, expected in zip(error.values, wanted[4], strict=True):
                assert expected in ("*", value), make
            assert error.name in str(error)
            assert len(str(error).splitlines()) <= 3
    assert not [*tmp_path.glob("*/iter_*")]


def _same_bits(rank: int) -> Any:
    model, optimizer = _trained()
    model[0].bias.data[0] = _bits(0x7FC00001)  # type: ignore[index]
    return model, optimizer


def _own_names(rank: int) -> Any:
    """Pipeline stages: a name that one rank has is its own."""
    model = nn.ModuleDict({f"layer{rank}": nn.Linear(2, 2), "shared": nn.Linear(2, 2)})
    torch.manual_seed(rank)
    nn.init.normal_(model[f"layer{rank}"].weight)  # type: ignore[arg-type]
    nn.init.ones_(model["shared"].weight)  # type: ignore[arg-type]
    nn.init.ones_(model["shared"].bias)  # type: ignore[arg-type]
    return model, None


def _own_statistics(rank: int) -> Any:
    model = nn.BatchNorm1d(3)
    torch.manual_seed(rank)
    model(torch.randn(8, 3))
    return model, None


def _expect_saves(root: Path) -> list[bool]:
    found = []
    for number, make in enumerate((_same_bits, _own_names, _own_statistics)):
        model, optimizer = make(distributed.get_rank())
        manager = _manager(root / str(number))
        _load(manager, model, optimizer)
        for step in range(1, 4):
            _save(manager, step, model, optimizer)
        before = {name: each.clone() for name, each in model.state_dict().items()}
        _end(manager)
        if make is not _own_names:  # which names a load may lack is another matter
            for each in model.state_dict().values():
                each.zero_()
            assert _load(_manager(root / str(number)), model, optimizer)
        after = model.state_dict()
        found.append(
            all(
                torch.equal(each.nan_to_num(), after[name].nan_to_num())
                for name, each in before.items()
            )
        )
    return found


def test_what_may_differ_or_does_not_is_saved(tmp_path: Path) -> None:
    """Equal NaNs, names of one rank alone, and each rank's own buffers, which come back to it."""
    assert run_ranks(_expect_saves, 2, tmp_path) == [[True] * 3] * 2


def _diverge(root: Path) -> list[str]:
    """Let a rank's moments differ once they are no longer zero, and later once more."""
    rank = distributed.get_rank()
    found = []

    def save(manager: DefaultCheckpointManager, step: int) -> str:
        try:
            _save(manager, step, model, optimizer)
        except ReplicaMismatchError as error:
            return error.name
        return "saved"

    for number in range(2):
        model = nn.Linear(3, 2)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        # Every save is agreed on, and none compares what has changed.
        rotation = {"audit_fraction": 0.0}
        manager = _manager(root / str(number), async_save=False, replicas=rotation)
        _load(manager, model, optimizer)
        found.append(save(manager, 1))
        if number == 0 and rank == 1:
            optimizer.state[model.bias]["momentum_buffer"][1] = 1.0
            found.append(save(manager, 2))
        elif number == 0:
            found.append(save(manager, 2))
        else:
            for each in (
                *model.parameters(),
                *(s["momentum_buffer"] for s in optimizer.state.values()),
            ):
                each.data.add_(2.0)
            found.append(save(manager, 2))
            model.weight.data[0, 0] += rank
            found.append(save(manager, 3))
        _end(manager)
    return found


def test_a_value_is_compared_until_it_has_changed(tmp_path: Path) -> None:
    """Equal zeros prove nothing; what was equal before and after a change is not compared again."""
    wanted = ["saved", "optimizer.state.bias.momentum_buffer", "saved", "saved", "saved"]
    assert run_ranks(_diverge, 2, tmp_path) == [wanted, wanted]


def _set_aside(root: Path, mode: str) -> tuple[list[float], list[str], bool]:
    """Save replicas that differ under a mode; return what each rank gets back."""
    rank = distributed.get_rank()
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("holdfast.snapshot.replicas").addHandler(handler)
    model = nn.Linear(2, 2)
    model.head = model.weight  # tied: both names differ
    nn.init.ones_(model.bias)
    nn.init.constant_(model.weight, float(rank + 1))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    manager = _manager(root, on_replica_mismatch=mode)
    _load(manager, model, optimizer)
    for step in range(1, 4):
        _save(manager, step, model, optimizer)
        nn.init.constant_(model.weight, float(rank + 1) * 10**step)
    _end(manager)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    assert _load(_manager(root, on_replica_mismatch=mode), model, optimizer)
    is_whole = torch.equal(model.bias, torch.ones(2)) and model.head is model.weight
    return model.weight.unique().tolist(), records, is_whole


def test_each_rank_gets_its_own_replica_back(tmp_path: Path) -> None:
    """`per_rank`: what differed once is saved per rank from then on."""
    found = run_ranks(_set_aside, 2, tmp_path, "per_rank")
    assert found == [([100.0], [], True), ([200.0], [], True)]


def test_all_ranks_get_the_lowest_ranks_replica(tmp_path: Path) -> None:
    """`rank0`: one warning names what differed."""
    (one, first, is_whole), other = run_ranks(_set_aside, 2, tmp_path, "rank0")
    assert other == ([100.0], [], True)
    assert one == [100.0]
    assert is_whole
    (warning,) = first
    assert "ranks 0, 1 hold different values of model.head, model.weight" in warning
    whole = {"model.weight": torch.zeros(2, 2)}
    torch.distributed.checkpoint.load(whole, checkpoint_id=tmp_path / "iter_0000003", no_dist=True)
    assert torch.equal(whole["model.weight"], torch.full((2, 2), 100.0))


def _hybrid(root: Path) -> str:
    model, _ = _hybrid_shards(distributed.get_rank())
    manager = _manager(root, on_replica_mismatch="per_rank")
    _load(manager, model)
    try:
        _save(manager, 1, model)
    except ReplicaMismatchError as error:
        return error.name
    finally:
        _end(manager)
    return "saved"


def test_a_chunk_cannot_be_saved_per_rank(tmp_path: Path) -> None:
    """A rank's own copy must be whole: replicas of chunks that differ are refused."""
    assert run_ranks(_hybrid, 4, tmp_path) == ["model.weight"] * 4


def _settings(root: Path, modes: tuple[str, str]) -> str:
    manager = _manager(root, on_replica_mismatch=modes[distributed.get_rank()])
    try:
        _load(manager, nn.Linear(2, 2))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_ranks_must_agree_on_what_to_do(tmp_path: Path) -> None:
    """Another setting on one rank is told by name."""
    for message in run_ranks(_settings, 2, tmp_path, ("raise", "rank0")):
        assert "checkpoint.on_replica_mismatch=rank0" in message


def _nodes(root: Path) -> list[str]:
    """With a local tier each node stages the whole state; replicas on all nodes are compared."""
    rank = distributed.get_rank()
    model, optimizer = _trained()
    found = []
    manager = _manager(root / "store", local={"directory": str(root / f"local{rank}")})
    _load(manager, model, optimizer)
    for step in (1, 2):
        if rank == step:
            model[0].bias.data[0] = 3.0  # type: ignore[index]
        try:
            _save(manager, step, model, optimizer)
            found.append("saved")
        except ReplicaMismatchError as error:
            found.append(f"{error.name} {error.sides}")
    _end(manager)
    return found


def test_replicas_are_compared_over_nodes(tmp_path: Path) -> None:
    """The plan divides items within each node; the comparison is over all of them."""
    wanted = ["model.0.bias ((0, 2), (1,))", "model.0.bias ((0,), (1, 2))"]
    assert run_ranks(_nodes, 3, tmp_path) == [wanted] * 3
