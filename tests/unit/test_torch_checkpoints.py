"""Directories that torch.distributed.checkpoint wrote by itself: loaded, and not vouched for."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from holdfast.errors import (
    ConfigError,
    CorruptCheckpointError,
    NothingFitsError,
    StateMismatchError,
    StatePartlyLoadedError,
)
from holdfast.format.dcp import key_path_of
from holdfast.storage.manifest import MANIFEST_NAME, Manifest
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store
from tests.support.hostile import hostile_pickle
from tests.support.managers import Live, counters, linear, manager_of, step, zero
from tests.support.stores import tree

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _write(path: Path, live: Live, **more: Any) -> Path:
    """Save as people do without holdfast."""
    state = {"model": get_model_state_dict(live.model)} | more  # type: ignore[arg-type]
    if live.optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(live.model, live.optimizer)  # type: ignore[arg-type]
    save(state, checkpoint_id=path, no_dist=True)
    return path


@pytest.fixture
def trained() -> Live:
    """A small model after two steps."""
    live = linear()
    step(live)
    step(live)
    return live


class _Data:
    """Data with a position that only a load would move."""

    position = 4

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = state_dict["position"]


def test_model_and_optimizer_are_loaded_and_nothing_else(
    trained: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Counters, scheduler, data and generators stay as they are, and the lack of proof is told."""
    path = _write(tmp_path / "plain", trained)
    before = tree(path)
    live = linear(1)
    step(live, 5)
    live.scheduler = torch.optim.lr_scheduler.StepLR(live.optimizer, 7)
    live.data = _Data()
    live.state = counters(step=31, consumed_train_samples=8)
    untouched = {
        name: each for name, each in live.digests().items()
        if not name.startswith(("model.", "optimizer."))
    }  # fmt: skip
    result = live.load(manager_of(tmp_path / "own", load={"directory": str(path)}))
    assert (result.found, result.iteration, result.path) == (True, 0, path)
    assert "nothing vouches for its bytes" in caplog.text
    after, expected = live.digests(), trained.digests()
    assert {name: after[name] for name in untouched} == untouched
    assert all(after[name] == each for name, each in expected.items() if name[:6] == "model.")
    for mine, theirs in zip(live.model.parameters(), trained.model.parameters(), strict=True):  # type: ignore[union-attr]
        for key, value in trained.optimizer.state[theirs].items():
            assert torch.equal(live.optimizer.state[mine][key], value)
    assert tree(path) == before, "something was written into it"


@pytest.mark.parametrize(("name", "iteration"), [("iter_0000040", 40), ("iter_7", 7), ("x", 0)])
def test_the_iteration_is_that_of_the_name(
    trained: Live, tmp_path: Path, name: str, iteration: int
) -> None:
    """`iter_N` says N, anything else says nothing; a step that was asked for must agree."""
    path = _write(tmp_path / name, trained)
    directory = {"directory": str(path)}
    assert linear(1).load(manager_of(tmp_path / "own", load=directory)).iteration == iteration
    with pytest.raises(ConfigError, match=r"load\.directory is iteration"):
        linear(1).load(manager_of(tmp_path / "own", load={**directory, "step": iteration + 1}))


def test_a_save_afterwards_is_a_first_save(trained: Live, tmp_path: Path) -> None:
    """The own store begins with a run id and an attempt of its own, and goes on by itself."""
    path = _write(tmp_path / "iter_0000040", trained)
    manager = manager_of(tmp_path / "own", load={"directory": str(path)})
    live = linear(1)
    live.load(manager)
    live.save(manager, 41)
    (checkpoint,) = Store(PosixStorage(tmp_path / "own", manager._filesystem)).listing().checkpoints
    manifest: Manifest = checkpoint.manifest
    assert (manifest.iteration, manifest.attempt, manifest.sequence) == (41, 1, 1)
    assert manifest.run_id
    again = linear(2)
    assert again.load(manager_of(tmp_path / "own")).iteration == 41
    assert again.digests()["model.0.weight"] == trained.digests()["model.0.weight"]


def test_a_checkpoint_without_optimizer_is_as_strict_says(trained: Live, tmp_path: Path) -> None:
    """Strictly it does not fit; else the model is loaded and the optimizer keeps its state."""
    path = str(_write(tmp_path / "plain", Live(trained.model)))
    live = linear(1)
    step(live, 3)
    before = live.digests()
    with pytest.raises(StateMismatchError, match=r"optimizer\.weight"):
        live.load(manager_of(tmp_path / "own", load={"directory": path}))
    assert live.digests() == before
    live.load(manager_of(tmp_path / "own", load={"directory": path, "strict": False}))
    after = live.digests()
    assert after["optimizer.0"] == before["optimizer.0"]
    assert after["model.0.weight"] == trained.digests()["model.0.weight"]


def test_what_is_neither_model_nor_optimizer_is_left_out(trained: Live, tmp_path: Path) -> None:
    """People put more into such checkpoints: it is in nobody's way."""
    more = {"step": 3, "ema": {"weight": torch.ones(2)}, "model_name": torch.ones(1)}
    path = _write(tmp_path / "plain", trained, **more)
    live = linear(1)
    live.load(manager_of(tmp_path / "own", load={"directory": str(path)}))
    assert live.digests()["model.0.weight"] == trained.digests()["model.0.weight"]


def test_a_checkpoint_of_ours_without_its_manifest_is_damaged(tmp_path: Path) -> None:
    """Losing the commit record makes nothing foreign: it is refused, as it always was."""
    live = linear()
    live.save(manager_of(tmp_path / "store"), 1)
    path = tmp_path / "store/iter_0000001"
    (path / MANIFEST_NAME).unlink()
    with pytest.raises(CorruptCheckpointError, match=r"no manifest\.json"):
        live.load(manager_of(tmp_path / "own", load={"directory": str(path)}))


def test_no_code_runs_and_no_other_file_is_opened(trained: Live, tmp_path: Path) -> None:
    """Hostile metadata, and metadata that names files elsewhere, are refused untouched."""
    path = _write(tmp_path / "plain", trained)
    sound = (path / ".metadata").read_bytes()
    metadata = pickle.loads(sound)
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere.distcp"
    (tmp_path / "elsewhere.distcp").write_bytes((path / "__0_0.distcp").read_bytes())
    live = linear(1)
    before = live.digests()
    for content in (hostile_pickle(tmp_path / "ran"), pickle.dumps(metadata)):
        (path / ".metadata").write_bytes(content)
        with pytest.raises(CorruptCheckpointError):
            live.load(manager_of(tmp_path / "own", load={"directory": str(path)}))
    assert live.digests() == before
    assert not (tmp_path / "ran").exists()


def test_torn_tensors_are_an_error_and_never_trained_on(trained: Live, tmp_path: Path) -> None:
    """A shard file that ends too early is found while it is read, and the load says so."""
    path = _write(tmp_path / "plain", trained)
    live = linear(1)
    zero(live)
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])
    with pytest.raises((CorruptCheckpointError, StatePartlyLoadedError)):
        live.load(manager_of(tmp_path / "own", load={"directory": str(path)}))


def test_the_own_store_may_hold_one(trained: Live, tmp_path: Path) -> None:
    """Lying where the run saves, it still is no lineage of this store: saving is refused."""
    path = _write(tmp_path / "own/iter_0000040", trained)
    manager = manager_of(tmp_path / "own", load={"directory": str(path)})
    live = linear(1)
    assert live.load(manager).iteration == 40
    assert isinstance(live.model, nn.Linear)
    with pytest.raises(Exception, match="has not loaded"):
        live.save(manager, 41)


# -- metadata as Megatron-Core writes it -----------------------------------------------------------


def _plans(path: Path) -> list[Any]:
    """Return plans as torch's own planner makes them, with every kind of item."""
    planner = DefaultSavePlanner()
    planner.set_up_planner({"model": {"weight": torch.ones(2), "note": "x"}}, None, True)
    return [planner.create_local_plan()]


class _MegatronPlan(SavePlan):
    """Pickled under a name that nothing here can import."""


def _megatron_plans(path: Path) -> list[Any]:
    return [_MegatronPlan(_plans(path)[0].items)]


@pytest.mark.parametrize(
    "plans", [_plans, _megatron_plans, lambda _: None], ids=["torch", "megatron", "none"]
)
@pytest.mark.parametrize("keeps_keys", [True, False], ids=["keys", "no keys"])
def test_metadata_with_plans_is_read_as_torch_reads_it(
    trained: Live, tmp_path: Path, keeps_keys: bool, plans: Any
) -> None:
    """Cached plans stay unread, and nested keys that are not there follow from the names."""
    path = _write(tmp_path / "plain", trained)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.all_local_plans = plans(path)
    if not keeps_keys:
        metadata.planner_data = None
    renamed = pickle.dumps(metadata, protocol=2).replace(
        b"ctests.unit.test_torch_checkpoints\n_MegatronPlan\n",
        b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreSavePlan\n",
    )
    assert b"_MegatronPlan" not in renamed
    (path / ".metadata").write_bytes(renamed)
    live = linear(1)
    step(live, 5)
    live.load(manager_of(tmp_path / "own", load={"directory": str(path)}))
    after, expected = live.digests(), trained.digests()
    for name in ("model.0.weight", "model.0.bias", "optimizer.0"):
        assert after[name] == expected[name], name


class _Runs:
    """Pickles as a call of a function in torch.distributed that would do something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_write_all_tensors_for_dtensor_save, ("ran",))


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    return {f"model.{name}": each for name, each in state.items()}


def _nested(state: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {"model": {}}
    for name, each in state.items():
        *parents, last = name.split(".")
        node = nested["model"]
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = each
    return nested


@pytest.mark.parametrize("shape", [_flat, _nested, lambda state: {"model": state}])
@pytest.mark.parametrize("keys", ["kept", "none", "empty"])
def test_a_model_is_found_however_its_names_were_nested(
    tmp_path: Path, shape: Any, keys: str
) -> None:
    """Flat names, nested ones, and metadata that says nothing of nesting mean the same tensors."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2)))
    path = tmp_path / "plain"
    save(shape(dict(model.state_dict())), checkpoint_id=path, no_dist=True)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    if keys != "kept":
        metadata.planner_data = None if keys == "none" else {}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    other = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2)))
    result = Live(other).load(manager_of(tmp_path / "own", load={"directory": str(path)}))
    assert result.restored["model"].tensors == 4
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_metadata_of_megatron_is_metadata(trained: Live, tmp_path: Path) -> None:
    """Its subclass with a field more is read as what it is, and nothing of Megatron is imported."""
    path = _write(tmp_path / "plain", trained)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    content = pickle.dumps(_MegatronMetadata(**vars(metadata)), protocol=2)
    renamed = content.replace(
        f"c{__name__}\n_MegatronMetadata\n".encode(),
        b"cmegatron.core.dist_checkpointing.strategies.checkpointable\nMCoreMetadata\n",
    )
    assert renamed != content
    (path / ".metadata").write_bytes(renamed)
    live = linear(1)
    live.load(manager_of(tmp_path / "own", load={"directory": str(path)}))
    assert live.digests()["model.0.weight"] == trained.digests()["model.0.weight"]


class _MegatronMetadata(Metadata):
    """Pickled under a name that nothing here can import."""


def _write_all_tensors_for_dtensor_save(name: str) -> None:
    Path(name).touch()


@pytest.mark.parametrize("module", ["torch.distributed.run", "megatron.core", "torch.distributed"])
def test_a_name_that_stands_for_nothing_runs_nothing(
    trained: Live, tmp_path: Path, module: str
) -> None:
    """Functions of the modules whose names are let through are neither imported nor called."""
    path = _write(tmp_path / "plain", trained)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.all_local_plans = [_Runs()]
    content = pickle.dumps(metadata, protocol=2)
    known = f"c{__name__}\n".encode()
    assert known in content
    (path / ".metadata").write_bytes(content.replace(known, f"c{module}\n".encode()))
    live = linear(1)
    live.load(manager_of(tmp_path / "own", load={"directory": str(path)}))
    assert live.digests()["model.0.weight"] == trained.digests()["model.0.weight"]
    assert "megatron" not in sys.modules


@pytest.mark.parametrize("module", ["torch", "torch.distributed_", "megatronx", "os", "builtins"])
def test_other_names_are_refused_as_ever(trained: Live, tmp_path: Path, module: str) -> None:
    """What only looks like one of those modules is no exception."""
    path = _write(tmp_path / "plain", trained)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.all_local_plans = [_Runs()]
    content = pickle.dumps(metadata, protocol=2)
    (path / ".metadata").write_bytes(
        content.replace(f"c{__name__}\n".encode(), f"c{module}\n".encode())
    )
    with pytest.raises(CorruptCheckpointError, match="which no checkpoint needs"):
        linear(1).load(manager_of(tmp_path / "own", load={"directory": str(path)}))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.layer.0.weight", ("model", "layer.0.weight")),
        ("model", ("model",)),
        ("optimizer.state.a.0.weight.exp_avg", ("optimizer", "state", "a.0.weight", "exp_avg")),
        ("optimizer.param_groups.1.lr", ("optimizer", "param_groups", 1, "lr")),
        ("optimizer.param_groups.layer.weight.lr", ("optimizer.param_groups.layer.weight.lr",)),
        ("optimizer.state.x", ("optimizer.state.x",)),
        ("optimizer", ("optimizer",)),
        ("ema.weight", ("ema.weight",)),
    ],
)  # fmt: skip
def test_nested_keys_follow_from_names(name: str, path: tuple[str | int, ...]) -> None:
    """Ends are cut and a parameter's own dots stay; what is not of ours is one key."""
    assert key_path_of(name) == path


def test_a_model_saved_without_its_prefix_is_refused_with_the_prefix(
    trained: Live, tmp_path: Path
) -> None:
    """As torchtitan saves: nothing fits, and the error says `model.` is what lacks."""
    save(dict(trained.model.state_dict()), checkpoint_id=tmp_path / "plain", no_dist=True)
    with pytest.raises(NothingFitsError, match=r'did you mean the prefix "model\."') as caught:
        linear(1).load(
            manager_of(
                tmp_path / "own", load={"directory": str(tmp_path / "plain"), "strict": False}
            )
        )
    assert caught.value.held == ("bias", "weight")
