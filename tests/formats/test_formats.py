"""Every on-disk format since the second, the first that was released is read, and damage in it is told by name.

The examples are frozen: they were made once by the version that introduced their format, and no
test writes to them.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from holdfast.cli import main
from holdfast.config import CheckpointConfig
from holdfast.errors import (
    CorruptCheckpointError,
    FormatTooNewError,
    NoLoadableCheckpointError,
    StatePartlyLoadedError,
)
from holdfast.manager import DefaultCheckpointManager
from holdfast.storage.manifest import FORMAT
from holdfast.protocol import CheckpointLoadContext, GlobalState, LoadResult
from tests.formats.make import (
    BASE,
    FLOATING_POINT_OPERATIONS,
    ITERATION,
    OLDER,
    SEED,
    Model,
    assemble,
    expected_momentum,
    expected_parameter,
    make,
)
from tests.support.states import draw_from_each_generator
from tests.support.stores import tree

HERE = Path(__file__).parent
VERSIONS = sorted(each.parent for each in HERE.glob("v*/expected.json"))
EXAMPLES = [
    pytest.param(version / name, expected, id=f"{version.name}-{name}")
    for version in VERSIONS
    for name, expected in json.loads((version / "expected.json").read_text()).items()
]
INTACT = [each for each in EXAMPLES if "intact" in str(each.id)]
SOUND = ("other_run", "superseded", "code_in_state")
"""Examples whose bytes are those of the manifest: what is wrong is what they mean."""
LIMIT_BYTES = 450 << 10
"""Of all examples of one format: they stay in the repository for good."""


class _Start:
    """A fresh run that may load an example."""

    def __init__(self, store: Path, step: int | None = None, with_optimizer: bool = False) -> None:
        self.model = Model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=5)
        self.state = GlobalState()
        self._with_optimizer = with_optimizer
        config: dict[str, Any] = {"persistent": {"directory": str(store)}, "load": {"step": step}}
        self._manager = DefaultCheckpointManager(CheckpointConfig.from_mapping(config))

    def load(self) -> LoadResult:
        context = CheckpointLoadContext(
            self.state,
            self.model,
            self.optimizer if self._with_optimizer else None,
            self.scheduler if self._with_optimizer else None,
        )
        return self._manager.load(context)

    def check_tensors(self, iteration: int) -> None:
        assert self.model.steps.item() == iteration
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter, expected_parameter(name, iteration)), name
            if self._with_optimizer:
                momentum = self.optimizer.state[parameter]["momentum_buffer"]
                assert torch.equal(momentum, expected_momentum(name, iteration)), name


def test_the_current_format_has_examples() -> None:
    """A format without frozen examples cannot be released."""
    assert HERE / f"v{FORMAT}" in VERSIONS
    for version in VERSIONS:
        sizes = [each.stat().st_size for each in version.rglob("*") if each.is_file()]
        assert sum(sizes) < LIMIT_BYTES, f"{version.name} has {sum(sizes)} bytes"


@pytest.mark.parametrize(("store", "expected"), INTACT)
def test_an_intact_example_is_restored(store: Path, expected: dict[str, Any]) -> None:
    """Every tensor, counter and setting of an intact example has the value it was made with."""
    with_optimizer = store.name != BASE
    start = _Start(store, with_optimizer=with_optimizer)
    result = start.load()
    assert (result.iteration, result.skipped) == (expected["loads"], ())
    assert result.num_floating_point_operations_so_far == FLOATING_POINT_OPERATIONS
    start.check_tensors(ITERATION)
    counters = start.state.train_state
    assert counters.step == ITERATION
    assert counters.consumed_train_samples == 8 * ITERATION
    assert counters.floating_point_operations_so_far == FLOATING_POINT_OPERATIONS
    assert start.optimizer.param_groups[0]["lr"] == (0.5 if with_optimizer else 0.1)
    assert start.scheduler.last_epoch == (ITERATION if with_optimizer else 0)


def test_the_generators_go_on() -> None:
    """The next random draws after a load are those that the writer would have had."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    Model()  # what the writer drew before its save
    expected = draw_from_each_generator()
    for version in VERSIONS:
        _Start(version / "intact_one_rank", with_optimizer=True).load()
        assert draw_from_each_generator() == expected, version.name


@pytest.mark.parametrize(("store", "expected"), INTACT)
def test_torch_reads_an_intact_example(
    store: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """An intact example is a plain DCP checkpoint."""
    dcp_to_torch_save(store / f"iter_{expected['loads']:07d}", tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    for name in ("linear.weight", "linear.bias"):
        assert torch.equal(plain["model"][name], expected_parameter(name, ITERATION))


@pytest.mark.parametrize(("example", "expected"), EXAMPLES)
def test_an_example_is_loaded_or_refused_as_the_table_says(
    example: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Each example gives the iteration and the reason that it gave when it was made."""
    store = assemble(example, expected, tmp_path / "store")
    before = tree(store)
    start = _Start(store)
    if "stops" in expected:
        for step in (None, ITERATION):
            with pytest.raises(FormatTooNewError, match=expected["stops"]):
                _Start(store, step=step).load()
        assert _Start(store, step=OLDER).load().iteration == OLDER
        assert tree(store) == before
        return
    if "loads" in expected:
        result = start.load()
        assert result.iteration == expected["loads"]
        reasons = [each.reason for each in result.skipped]
        start.check_tensors(expected["loads"])
    else:
        with pytest.raises(NoLoadableCheckpointError) as caught:
            start.load()
        reasons = list(caught.value.reasons)
    newest = max(int(each.name.removeprefix("iter_")) for each in store.glob("iter_*"))
    by_number = _Start(store, step=newest)
    if "skips" in expected:
        assert re.search(expected["skips"], reasons[0]), reasons
    if "skips" in expected and "loads_by_number" not in expected:
        # The latter where the damage was found while the tensors were being filled.
        refusals = (CorruptCheckpointError, StatePartlyLoadedError)
        with pytest.raises(refusals, match=expected["skips"]):
            by_number.load()
    else:
        assert by_number.load().iteration == newest
        by_number.check_tensors(newest)
    assert tree(store) == before


@pytest.mark.parametrize(("example", "expected"), EXAMPLES)
def test_verify_tells_damage_from_soundness(
    example: Path, expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`holdfast verify` finds damage to bytes, and nothing wrong where it is about meaning."""
    store = assemble(example, expected, tmp_path / "store")
    if "stops" in expected:
        assert main(["verify", str(store)]) == 2
        assert re.search(expected["stops"], capsys.readouterr().out)
        return
    is_sound = "skips" not in expected or example.name in SOUND
    code = main(["verify", str(store)])
    printed = capsys.readouterr().out
    assert code == (0 if is_sound else 1), printed
    if not is_sound:
        assert re.search(expected["skips"], printed)


def test_the_script_still_makes_them(tmp_path: Path) -> None:
    """The script makes the same files with the same outcomes, for the day a new format needs it."""
    made, frozen = tmp_path / "made", HERE / f"v{FORMAT}"
    make(made)
    assert sorted(tree(made)) == sorted(tree(frozen))
    assert (made / "expected.json").read_text() == (frozen / "expected.json").read_text()
