"""Saves by the last plan compare a rotating share of what several ranks hold alike."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from holdfast.cli import main
from holdfast.config import CheckpointConfig
from holdfast.errors import CheckpointError, ReplicaMismatchError
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext, GlobalState
from tests.support.deadlines import LAUNCH_SECONDS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
MOMENTS = ("exp_avg", "exp_avg_sq")
MANY_SAVES = 4 * LAUNCH_SECONDS


class Run:
    """One rank of a run whose values are bits drawn alike on all ranks."""

    def __init__(self, root: Path, fraction: float, large: int = 0, **options: Any) -> None:
        values = {
            "persistent": {"directory": str(root), "keep": {"last": 2}},
            "timeout_seconds": 60,
            "replicas": {"audit_fraction": fraction},
            **options,
        }
        self.manager = DefaultCheckpointManager(CheckpointConfig.from_mapping(values))
        self.rank = distributed.get_rank()
        self.state = GlobalState()
        self.model = nn.Module()
        for name, dtype in DTYPES.items():
            for shape in ((3, 5), (7,), ()):
                label = f"{name}_{len(shape)}"
                setattr(self.model, label, nn.Parameter(torch.zeros(shape, dtype=dtype)))
        if large:
            self.model.large = nn.Parameter(torch.zeros(large))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            self.tensors[f"model.{name}"] = parameter.data
            own = self.optimizer.state[parameter]
            own["step"] = torch.tensor(1.0)
            for key in MOMENTS:
                own[key] = torch.zeros_like(parameter.data)
                self.tensors[f"optimizer.state.{name}.{key}"] = own[key]
        self.draw(0)
        self.manager.load(CheckpointLoadContext(self.state, self.model, self.optimizer, None))

    def draw(self, seed: int) -> None:
        """Give every tensor other bits, the same on all ranks; NaNs of any payload among them."""
        generator = torch.Generator().manual_seed(seed)
        for each in self.tensors.values():
            flat = each.view(-1).view(torch.uint8)
            flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=generator))

    def save(self, trains: Any = None) -> ReplicaMismatchError | None:
        """Save the next step; `trains` is called once `save` has returned."""
        self.state.train_state.step += 1
        try:
            context = CheckpointSaveContext(self.state, self.model, self.optimizer, None)
            self.manager.save(context)
            if trains is not None:
                trains()
            self.manager.finalize_async_saves(self.state, blocking=True)
        except ReplicaMismatchError as error:
            return error
        return None

    def settle(self, seed: int) -> None:
        """Save until only the rotation is left to compare anything, by the last plan."""
        for each in range(2):
            self.draw(seed + each)
            assert self.save() is None
        assert self.is_by_plan

    @property
    def is_by_plan(self) -> bool:
        """Whether the next save sends nothing before it is staged."""
        return not self.manager._saver._why_agree

    def flip(self, name: str, bit: int) -> None:
        """Change one bit on this rank."""
        flat = self.tensors[name].view(-1).view(torch.uint8)
        flat[bit // 8] ^= 1 << bit % 8

    def end(self) -> None:
        self.manager.finalize_async_saves(self.state, blocking=True, terminate=True)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A store in memory, for tests of many saves: they are not about the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def flip_bits(root: Path, flips: int, fraction: float, seed: int) -> list[str]:
    """Flip single bits on single ranks; return what was not named as it should be."""
    run, wrong = Run(root, fraction), []
    chosen, count = random.Random(seed), distributed.get_world_size()
    saves = round(1 / fraction)
    for number in range(flips):
        run.settle(1000 * number)
        name = chosen.choice([*run.tensors])
        bit, rank = chosen.randrange(8 * run.tensors[name].nbytes), chosen.randrange(count)
        if run.rank == rank:
            run.flip(name, bit)
        before = run.state.train_state.step
        error = next(filter(None, (run.save() for _ in range(saves))), None)
        sides = {tuple(each) for each in error.sides} if error is not None else set()
        others = tuple(each for each in range(count) if each != rank)
        suspects = (rank,) if count > 2 else (0, 1)
        element = bit // 8 // run.tensors[name].element_size()
        if (
            error is None
            or (error.name, error.block, error.suspects) != (name, 0, suspects)
            or sides != {(rank,), others}
            or error.agreed is None
            or error.agreed > before
            or error.index is None
            or sum(each * stride for each, stride in zip(
                error.index, run.tensors[name].stride(), strict=True)) != element
        ):  # fmt: skip
            wrong.append(f"bit {bit} of {name} on rank {rank}: {error}")
    run.end()
    return wrong


@pytest.mark.parametrize(("ranks", "fraction"), [(2, 1 / 3), (3, 1.0)])
def test_each_flipped_bit_is_named(ranks: int, fraction: float, memory: Path) -> None:
    """Tensor, rank, element and the last agreement, within as many saves as there are shares."""
    found = run_ranks(flip_bits, ranks, memory, 12, fraction, ranks, timeout_seconds=MANY_SAVES)
    assert found == [[]] * ranks


def _flip_large(root: Path) -> list[Any]:
    """Change the second and third block of a large tensor, whether training goes on or not."""
    run = Run(root, 1.0, large=5 << 20)  # 20 MiB
    values = run.tensors["model.large"]
    found: list[Any] = []

    def change() -> None:
        values.add_(1)

    for block, is_rotation, trains in ((1, True, change), (2, False, change), (2, False, None)):
        for each in range(2 if is_rotation else 1):
            values.copy_(torch.arange(5 << 20).add_(each))
            assert run.save() is None
        if run.rank == 1:
            values[block * (2 << 20) + 5] = -1
        error = run.save(trains)
        assert error is not None
        found.append((error.name, error.block, error.index, error.values, error.agreed))
    run.end()
    return found


def test_a_block_is_named_and_its_values_where_they_are_kept(memory: Path) -> None:
    """What the rotation compares is kept; in the second save of a plan, digests of what others
    write may be all that is left when training has gone on.
    """
    wanted = [
        ("model.large", 1, ((2 << 20) + 5,), ("2097158.0", "-1.0"), 2),
        ("model.large", 2, None, None, 4),
        ("model.large", 2, ((4 << 20) + 5,), ("4194309.0", "-1.0"), 6),
    ]
    assert run_ranks(_flip_large, 2, memory) == [wanted] * 2


def save_cleanly(root: Path, saves: int) -> int:
    """Save equal replicas; return how many checkpoints are kept."""
    run = Run(root, 1 / 8)
    name = "model.fp32_1"
    for step in range(saves):
        run.draw(step)
        run.tensors[name][:2] = torch.tensor([-0.0, 0.0])
        run.tensors[name].view(torch.int32)[2] = 0x7FC00000 + step
        assert run.save() is None
    run.end()
    return len([*root.glob("iter_*")])


def test_clean_saves_raise_no_alarm(memory: Path) -> None:
    """NaNs of every payload and negative zeros, at every turn of the rotation."""
    found = run_ranks(save_cleanly, 2, memory, 200, timeout_seconds=MANY_SAVES)
    assert found[0] >= 2


def _diverge_late(root: Path) -> tuple[str, int]:
    """Values that are zero on all ranks for long, as shards that no rank has said are shards."""
    run = Run(root, 1 / 4)
    for each in run.tensors.values():
        each.zero_()
    for _ in range(7):
        assert run.save() is None
    run.tensors["optimizer.state.fp32_2.exp_avg"].fill_(float(run.rank))
    saves = 1
    while (error := run.save()) is None:
        saves += 1
    run.end()
    return error.name, saves


def test_zeros_that_only_later_differ_are_found(memory: Path) -> None:
    """Equal zeros prove nothing, and the rotation goes on."""
    found = run_ranks(_diverge_late, 2, memory)
    assert found[0] == found[1]
    assert found[0][0] == "optimizer.state.fp32_2.exp_avg"
    assert found[0][1] <= 4


def _set_aside(root: Path, mode: str) -> tuple[list[float], list[int]]:
    """Let replicas drift apart between saves by the last plan; return what each rank gets back."""
    run = Run(root, 1.0, on_replica_mismatch=mode)
    run.settle(0)
    values = run.tensors["model.fp32_2"]
    values.fill_(float(run.rank + 1))
    assert run.save() is None
    values.add_(10)
    assert run.save() is None
    run.end()
    values.zero_()
    run = Run(root, 1.0, on_replica_mismatch=mode)
    steps = sorted(int(each.name[5:]) for each in root.glob("iter_*"))
    return run.tensors["model.fp32_2"].unique().tolist(), steps


@pytest.mark.parametrize(
    ("mode", "wanted"), [("per_rank", [[11.0], [12.0]]), ("rank0", [[11.0], [11.0]])]
)
def test_what_drifts_apart_is_set_aside(mode: str, wanted: Any, tmp_path: Path) -> None:
    """The save that finds it is given up, and made again as `on_replica_mismatch` says."""
    found = run_ranks(_set_aside, 2, tmp_path, mode)
    assert [values for values, _ in found] == wanted
    assert found[0][1][-2:] == [3, 4]


def _warn(root: Path) -> list[str]:
    """A run that lives with failed saves: the copies are repaired, and it saves again."""
    run = Run(root, 1.0, on_save_failure="warn")
    run.settle(0)
    if run.rank == 1:
        run.flip("model.bf16_1", 3)
    for _ in range(2):  # by the last plan, then agreed on
        assert run.save() is None
    if run.rank == 1:
        run.flip("model.bf16_1", 3)
    assert run.save() is None
    run.end()
    return sorted(each.name for each in root.glob("iter_*"))


def test_a_mismatch_is_a_failure_of_that_save(tmp_path: Path) -> None:
    """Nothing of it is committed, and the next save of equal replicas is."""
    found = run_ranks(_warn, 2, tmp_path)
    assert found[0] == ["iter_0000002", "iter_0000005"]


def _settings(root: Path) -> str:
    try:
        Run(root, (0.5, 1.0)[distributed.get_rank()])
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_ranks_must_compare_the_same_share(tmp_path: Path) -> None:
    """Another fraction on one rank is told by name."""
    for message in run_ranks(_settings, 2, tmp_path):
        assert "checkpoint.replicas.audit_fraction=1.0" in message


def _local(root: Path) -> list[str]:
    """With a local tier, which commits first: neither tier has what differs."""
    rank = distributed.get_rank()
    run = Run(root / "store", 1.0, local={"directory": str(root / f"local{rank}")})
    run.settle(0)
    if rank == 1:
        run.flip("model.bf16_1", 3)
    error = run.save()
    assert error is not None
    if rank == 1:
        run.flip("model.bf16_1", 3)
    assert run.save() is None
    run.end()
    local = sorted(each.name for each in (root / f"local{rank}").rglob("iter_*"))
    return [error.name, *(each for each in local if "0000003" in each)]


def test_a_mismatch_is_found_before_the_local_commit(tmp_path: Path) -> None:
    """What differs is in neither tier."""
    assert run_ranks(_local, 2, tmp_path) == [["model.bf16_1"]] * 2
    assert not [*tmp_path.glob("store/iter_0000003")]


def _rotate(root: Path, saves: int) -> list[int]:
    run = Run(root, 1 / 3)
    for step in range(saves):
        run.draw(step)
        assert run.save() is None
    run.end()
    # Another rank may still be removing the files of what is no longer listed.
    names = (each.name[5:] for each in root.glob("iter_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def test_the_last_checkpoint_whose_replicas_agreed_is_kept(
    memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the next one to be proved; `verify --lineage` prints it for each."""
    # Shares are compared in iterations 2, 3, 4; 5, 6, 7; 8, 9, 10.
    steps = run_ranks(_rotate, 2, memory, 10)[0]
    capsys.readouterr()  # of the ranks
    assert main(["verify", "--lineage", "--json", str(memory)]) == 0
    found = {
        int(Path(each["path"]).name[5:]): each["replicas"]
        for each in json.loads(capsys.readouterr().out)["checkpoints"]
    }
    assert [*found] == steps[::-1]
    assert steps[-2:] == [9, 10]
    assert found[10] == {"agree": False, "compared": 1, "shares": 3}
    assert found[9] == {"agree": False, "compared": 2, "shares": 3}
    agreed = [step for step in steps if found[step]["agree"]]
    assert agreed
    assert agreed[-1] >= 4
    assert main(["verify", "--lineage", str(memory)]) == 0
    printed = capsys.readouterr().out
    assert "attempt 1, from the start; replicas agree\n" in printed
    assert "attempt 1, from the start; replicas agree as far as compared since, 1 of 3" in printed
