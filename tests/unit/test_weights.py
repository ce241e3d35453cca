"""A model from a checkpoint without a run: what is read, what fits, and whose code runs."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import holdfast
from holdfast import SharingPattern, StateComponent
from holdfast.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    NoLoadableCheckpointError,
    StageFailedError,
    StateMismatchError,
    StatePartlyLoadedError,
    WrongArgumentError,
)
from holdfast.filesystem import LocalFilesystem
from tests.support.managers import Live, linear, manager_of, step
from tests.support.states import digest
from tests.support.stores import flip_bit, tree

BLOCK_BYTES = 8 << 20


@pytest.fixture
def run(tmp_path: Path) -> Live:
    """A run in `base` with checkpoints of 10 and 20; its live objects are those of 20."""
    live, manager = linear(1), manager_of(tmp_path / "base")
    live.state.cfg = {"model": {"width": 4}, "run_dir": str(tmp_path)}
    for iteration in (10, 20):
        step(live, iteration)
        live.save(manager, iteration)
    return live


def _fresh(seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 2)


def _digest(model: Any) -> str:
    return digest(model.state_dict())


def test_a_model_alone_comes_back(run: Live, tmp_path: Path) -> None:
    """The newest checkpoint of a store; the result says what was restored, and from where."""
    before = tree(tmp_path / "base")
    model, drawn = _fresh(), torch.get_rng_state()
    result = holdfast.load_model_weights(model, tmp_path / "base")
    assert _digest(model) == _digest(run.model)
    assert (result.iteration, result.found, result.skipped) == (20, True, ())
    assert result.path == tmp_path / "base/iter_0000020"
    restored = result.restored["model"]
    assert (set(result.restored), restored.tensors, restored.size_bytes) == ({"model"}, 2, 40)
    assert torch.equal(torch.get_rng_state(), drawn), "random numbers were restored"
    assert tree(tmp_path / "base") == before, "the store was written to"


@pytest.mark.parametrize(
    ("place", "iteration"),
    [("base", 20), ("base/latest", 20), ("base/iter_0000010", 10),
     ("base/latest_checkpointed_iteration.txt", 20), ("base/iter_0000010/__0_0.distcp", 10)],
)  # fmt: skip
def test_a_path_names_what_it_names_in_a_load(
    run: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, iteration: int
) -> None:
    """A store, one checkpoint, a file in it, `latest`; relative, or with a variable in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASES", str(tmp_path))
    for path in (place, Path(place), f"$BASES/{place}"):
        assert holdfast.load_model_weights(_fresh(), path).iteration == iteration


def test_an_iteration_is_named(run: Live, tmp_path: Path) -> None:
    """That one and no other; what is not there is an error that lists what is."""
    assert holdfast.load_model_weights(_fresh(), tmp_path / "base", step=10).iteration == 10
    with pytest.raises(CheckpointNotFoundError, match=r"iteration 15; it has: 20, 10"):
        holdfast.load_model_weights(_fresh(), tmp_path / "base", step=15)
    with pytest.raises(CheckpointNotFoundError, match=r"load_model_weights: .*does not exist"):
        holdfast.load_model_weights(_fresh(), tmp_path / "nowhere")


class _Counted(io.FileIO):
    """A file that counts what is read of it, and hides its descriptor so that nothing goes past."""

    def __init__(self, path: Path, counts: list[int]) -> None:
        super().__init__(path)
        self._counts = counts

    def fileno(self) -> int:
        raise OSError("no descriptor")

    def readinto(self, buffer: Any) -> int:
        count: int = super().readinto(buffer)
        self._counts.append(count)
        return count

    def readall(self) -> bytes:
        content = super().readall()
        self._counts.append(len(content))
        return content


class _Counting(LocalFilesystem):
    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def open_existing(self, path: Path) -> BinaryIO:
        return _Counted(path, self.counts)  # type: ignore[return-value]  # has what is used of it


def test_nothing_but_the_model_is_read(tmp_path: Path) -> None:
    """Optimizer state of twice the size stays unread, but for the blocks that it shares."""
    torch.manual_seed(0)
    live = Live(nn.Linear(2048, 2048, bias=False))
    assert isinstance(live.model, nn.Module)
    live.optimizer = torch.optim.AdamW(live.model.parameters(), lr=0.1)
    step(live)
    live.save(manager_of(tmp_path / "base"), 1)
    stored = sum(each.stat().st_size for each in tmp_path.rglob("*.distcp"))
    model_bytes = 2048 * 2048 * 4
    assert stored > 3 * model_bytes
    fresh = nn.Linear(2048, 2048, bias=False)
    filesystem = _Counting()
    result = holdfast.load_model_weights(fresh, tmp_path / "base", filesystem=filesystem)
    assert _digest(fresh) == _digest(live.model)
    assert sum(each.size_bytes for each in result.sources) == model_bytes
    # One block more than the model fills, one with values, the records of digests, the metadata.
    assert model_bytes < sum(filesystem.counts) < model_bytes + 2 * BLOCK_BYTES + (1 << 20)


def test_damage_passes_a_checkpoint_over_in_a_store(run: Live, tmp_path: Path) -> None:
    """The one before it is loaded, with the reason; the damaged one by name is an error."""
    newest = tmp_path / "base/iter_0000020"
    flip_bit(newest / "__0_0.distcp", 200)
    result = holdfast.load_model_weights(_fresh(), tmp_path / "base")
    assert result.iteration == 10
    assert [(each.iteration, "digest" in each.reason) for each in result.skipped] == [(20, True)]
    with pytest.raises(CorruptCheckpointError, match="digest"):
        holdfast.load_model_weights(_fresh(), newest)
    with pytest.raises((CorruptCheckpointError, StatePartlyLoadedError), match="digest"):
        holdfast.load_model_weights(_fresh(), tmp_path / "base", step=20)
    flip_bit(tmp_path / "base/iter_0000010/__0_0.distcp", 200)
    with pytest.raises(NoLoadableCheckpointError, match="iter_0000020"):
        holdfast.load_model_weights(_fresh(), tmp_path / "base")


def test_what_does_not_fit_is_refused_untouched(run: Live, tmp_path: Path) -> None:
    """Names, shapes and types as in a load; a table, or `false`, says what may differ."""
    store = tmp_path / "base"
    narrow = nn.Linear(3, 2)
    before = _digest(narrow)
    with pytest.raises(StateMismatchError, match=r"model\.weight is \[2, 4\], here \[2, 3\]"):
        holdfast.load_model_weights(narrow, store)
    assert _digest(narrow) == before
    half = nn.Linear(4, 2, dtype=torch.bfloat16)
    with pytest.raises(StateMismatchError, match="bfloat16"):
        holdfast.load_model_weights(half, store)
    holdfast.load_model_weights(half, store, strict={"dtypes": "ignore"})
    assert isinstance(run.model, nn.Module)
    assert _digest(half) == _digest(run.model.to(torch.bfloat16))
    bare = nn.Linear(4, 2, bias=False)
    with pytest.raises(StateMismatchError, match=r"unexpected in the checkpoint: model\.bias"):
        holdfast.load_model_weights(bare, store)
    assert holdfast.load_model_weights(bare, store, strict=False).restored["model"].tensors == 1


def test_named_models_come_back_by_name(tmp_path: Path) -> None:
    """A dict of models, as in a load's context."""
    live = Live({"actor": _fresh(1), "critic": _fresh(2)})  # type: ignore[arg-type]
    live.save(manager_of(tmp_path / "base"), 1)
    models = {"actor": _fresh(3), "critic": _fresh(4)}
    holdfast.load_model_weights(models, tmp_path / "base")
    assert [_digest(each) for each in models.values()] == [_digest(_fresh(1)), _digest(_fresh(2))]


def test_further_state_is_left_where_it_is(tmp_path: Path) -> None:
    """Components, data and scheduler of the run are neither read nor asked for."""
    averaged = StateComponent("ema", _fresh(7), SharingPattern.SHARDED)
    extra = StateComponent("extra", (lambda: {"a": torch.ones(3)}, print), SharingPattern.GLOBAL)
    live = linear(1)
    live.save(manager_of(tmp_path / "base"), 1, components=[averaged, extra])
    fresh = _fresh(2)
    result = holdfast.load_model_weights(fresh, tmp_path / "base")
    assert set(result.restored) == {"model"}
    assert _digest(fresh) == _digest(live.model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_wrote_alone_is_loaded(tmp_path: Path) -> None:
    """A directory of torch.distributed.checkpoint, of which nothing vouches for the bytes."""
    model = _fresh(1)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "plain", no_dist=True)
    fresh = _fresh(2)
    holdfast.load_model_weights(fresh, tmp_path / "plain")
    assert _digest(fresh) == _digest(model)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model": {"weight": torch.zeros(1)}}, "load_model_weights: model is a dict of tensors"),
        ({"model": None}, "model is None"),
        ({"path": 7}, "path is of type int"),
        ({"step": -1}, "step is -1"),
        ({"step": True}, "step is True"),
        ({"strict": {"colours": "warn"}}, "colours"),
        ({"strict": "yes"}, "strict"),
    ],
)
def test_a_wrong_argument_is_named(
    run: Live, tmp_path: Path, arguments: dict[str, Any], named: str
) -> None:
    """Before anything is read."""
    with pytest.raises(WrongArgumentError, match=named):
        holdfast.load_model_weights(**{"model": _fresh(), "path": tmp_path / "base"} | arguments)


# -- build_model_from_checkpoint -----------------------------------------------------------------

SPY = """
import builtins
from torch import nn

builtins.spied = "imported"


def make(width, depth=1):
    builtins.spied = "called"
    return nn.Linear(width, 2)


def size():
    return 4
"""


@pytest.fixture
def spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `spied_models` that leaves a mark when it is imported; returns how to read it."""
    import builtins

    (tmp_path / "spied_models.py").write_text(SPY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(builtins, "spied", None, raising=False)
    yield lambda: vars(builtins)["spied"]
    sys.modules.pop("spied_models", None)


def _save(root: Path, config: Any) -> Live:
    live = linear(1)
    live.state.cfg = config
    live.save(manager_of(root), 1)
    return live


def test_a_builder_is_given_the_stored_part(run: Live, tmp_path: Path) -> None:
    """As a DictConfig, its interpolations resolved; the model has the saved weights."""
    given = []

    def build(config: Any) -> nn.Module:
        given.append(config)
        return nn.Linear(config.width, 2)

    model = holdfast.build_model_from_checkpoint(tmp_path / "base", builder=build)
    assert _digest(model) == _digest(run.model)
    assert given == [{"width": 4}]
    live = _save(tmp_path / "other", {"wide": 4, "net": {"inner": {"width": "${wide}"}}})
    model = holdfast.build_model_from_checkpoint(tmp_path / "other", builder=build, key="net.inner")
    assert _digest(model) == _digest(live.model)


def test_a_stored_path_runs_only_if_it_is_allowed(tmp_path: Path, spy: Any) -> None:
    """Nothing is imported before; nested paths are checked too, and prefixes end at a dot."""
    named = {"_target_": "spied_models.make", "width": {"_target_": "spied_models.size"}}
    live = _save(tmp_path / "base", {"model": named})
    for allow in ([], ["spied"], ["spied_models.make"], ["spied_models.size"]):
        with pytest.raises(ConfigError, match=r"spied_models\.(make|size)") as caught:
            holdfast.build_model_from_checkpoint(tmp_path / "base", allow=allow)
        assert "allow=[...]" in str(caught.value)
        assert spy() is None
        assert "spied_models" not in sys.modules
    model = holdfast.build_model_from_checkpoint(
        tmp_path / "base", builder=lambda config: nn.Linear(4, 2)
    )
    assert spy() is None
    model = holdfast.build_model_from_checkpoint(tmp_path / "base", allow=["spied_models"])
    assert spy() == "called"
    assert _digest(model) == _digest(live.model)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (None, "no settings under 'model' (it has: none)"),
        ({"net": {"a": 1}}, "no settings under 'model' (it has: net)"),
        ({"model": 3}, "no settings under 'model'"),
        ({"model": {"layers": 2}}, "has no _target_"),
        ({"model": {"_target_": 7}}, "_target_ is 7"),
        ({"model": {"_target_": "torch.nn.Linear", "x": "${nowhere}"}}, "nowhere"),
        ({"model": {"_target_": "torch.device", "type": "cpu"}}, "made a device, not a module"),
    ],
)
def test_a_config_that_builds_nothing_is_named(tmp_path: Path, config: Any, named: str) -> None:
    """With what is there, and what to do."""
    _save(tmp_path / "base", config)
    with pytest.raises(ConfigError) as caught:
        holdfast.build_model_from_checkpoint(tmp_path / "base", allow=["torch"])
    assert named in str(caught.value)


def test_a_builder_that_fails_is_no_damage(run: Live, tmp_path: Path) -> None:
    """Its error is raised, and no older checkpoint is built instead."""
    calls = []

    def fail(config: Any) -> nn.Module:
        calls.append(config)
        raise RuntimeError("no such layer")

    with pytest.raises(StageFailedError, match="no such layer"):
        holdfast.build_model_from_checkpoint(tmp_path / "base", builder=fail)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"allow": "torch"}, "allow is 'torch'"), ({"allow": [1]}, "allow"),
     ({"builder": "torch.nn.Linear"}, "builder is 'torch.nn.Linear'")],
)  # fmt: skip
def test_a_wrong_way_to_build_is_named(
    run: Live, tmp_path: Path, arguments: dict[str, Any], named: str
) -> None:
    """Before anything is read."""
    with pytest.raises(WrongArgumentError, match=named):
        holdfast.build_model_from_checkpoint(tmp_path / "base", **arguments)
