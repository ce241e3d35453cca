"""However its processes share the work, a recipe trains the same model and resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from holdfast import CheckpointConfig
from run_config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RecipeError, RunConfig
from tests.support.deadlines import LAUNCH_SECONDS
from tests.support.ranks import run_ranks

STEPS = 4
SAVED_AT = 2
ON_TWO = ("ddp", "fsdp", "tp")
ON_FOUR = ("hsdp", "fsdp_tp")
PIPELINES = ("pp",)


def _settings(root: Path, text: Path, kind: str, dropout: float, **load: Any) -> RunConfig:
    run_dir = str(root / f"{kind}-{dropout}")
    persistent = {"directory": f"{run_dir}/checkpoints", "save_interval": SAVED_AT}
    return RunConfig(
        steps=STEPS,
        batch_size=8,
        run_dir=run_dir,
        validation_batches=1,
        model=ModelConfig(layers=2, width=16, heads=2, context=16, dropout=dropout),
        data=DataConfig("files", [str(text)]),
        parallel=ParallelConfig(kind, device="cpu"),
        optim=OptimConfig(warmup_steps=1, learning_rate=1e-2),
        checkpoint=CheckpointConfig.from_mapping({"persistent": persistent, "load": load}),
    )


def _train(config: RunConfig) -> Any:
    """Train in the process group that there is, and return the curve that the run wrote."""
    from display import Display  # the folder is on the path of the process that this is a fork of
    from losses import read_losses
    from parallel import Processes, choose_row_size, divide
    from training import train

    device, kind = torch.device("cpu"), config.parallel.kind
    if distributed.is_initialized():
        row_size = choose_row_size(config.parallel, distributed.get_world_size())
        processes = divide(kind, device, row_size)
    else:
        processes = Processes(device)
    train(config, processes, Display(processes.rank, config.steps, STEPS))
    if distributed.is_initialized():
        distributed.barrier()
    return read_losses(Path(config.run_dir))


def _train_alone(root: Path, text: Path) -> Any:
    return _train(_settings(root, text, "single", 0.0))


def _train_and_resume(root: Path, text: Path, kinds: tuple[str, ...]) -> dict[str, list[Any]]:
    found = {}
    for kind in kinds:
        exact = _train(_settings(root, text, kind, 0.0))
        whole = _train(_settings(root, text, kind, 0.1))
        resumed = _train(_settings(root, text, kind, 0.1, step=SAVED_AT))
        found[kind] = [exact, whole, resumed]
    return found


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        (2, ON_TWO),
        (4, ON_FOUR),
        (2, PIPELINES),
        (4, PIPELINES),
    ],
)
def test_every_way_of_sharing_trains_alike_and_resumes_exactly(
    ranks: int, kinds: tuple[str, ...], tmp_path: Path, text: Path
) -> None:
    """The losses are those of one process, but for rounding; a resumed run's are its own, exactly.

    Dropout is on where a run is resumed, and the processes draw different numbers.
    """
    (alone,) = run_ranks(_train_alone, 1, tmp_path, text, initialise=False)
    assert alone.training[STEPS] < 0.95 * alone.training[1], "nothing was learned"
    found, *_ = run_ranks(
        _train_and_resume, ranks, tmp_path, text, kinds, timeout_seconds=3 * LAUNCH_SECONDS
    )
    for kind, (exact, whole, resumed) in found.items():
        assert exact.training == pytest.approx(alone.training, rel=1e-4), kind
        assert exact.validation == pytest.approx(alone.validation, rel=1e-4), kind
        assert whole.training != exact.training, kind
        assert resumed.resumed_from == [0, SAVED_AT], kind
        assert resumed.training == whole.training, kind
        assert resumed.validation == whole.validation, kind


@pytest.mark.parametrize(
    ("kind", "size", "row"),
    [
        ("ddp", 3, 1),
        ("fsdp", 3, 3),
        ("tp", 3, 3),
        ("hsdp", 4, 2),
        ("fsdp_tp", 2, 2),
        ("pp", 4, 2),
        ("pp", 3, None),
        ("hsdp", 5, None),
    ],
)
def test_processes_make_whole_rows(kind: str, size: int, row: int | None) -> None:
    """A number of processes that does not divide is refused by name, before anything is built."""
    from parallel import choose_row_size

    if row is None:
        with pytest.raises(RecipeError, match=f"{kind}, which works in groups of 2"):
            choose_row_size(ParallelConfig(kind), size)
    else:
        assert choose_row_size(ParallelConfig(kind), size) == row


def test_a_model_that_cannot_be_cut_is_refused() -> None:
    """A pipeline needs a layer for each stage, a slice whole attention heads."""
    from gpt import GPT
    from pipeline import cut_stage
    from slices import slice_layers

    class _OfThree:
        def size(self) -> int:
            return 3

    model: Any = GPT(ModelConfig(layers=1, width=8, heads=2))
    with pytest.raises(RecipeError, match=r"model\.layers is 1"):
        cut_stage(model, 0)
    mesh: Any = _OfThree()
    with pytest.raises(RecipeError, match=r"model\.heads is 2"):
        slice_layers(model, mesh)
