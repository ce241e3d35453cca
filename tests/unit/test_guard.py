"""A guard is asked before anything is read, and shows both sides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.config import CheckpointConfig
from holdfast.errors import ConfigError, StageFailedError, StateMismatchError
from holdfast.manager import DefaultCheckpointManager
from holdfast.state.guard import RunFacts, same_model_config
from tests.support.managers import Live, linear, manager_of, step

HERE = "tests.unit.test_guard"
MODEL = {"layers": 2, "attention": {"heads": 4, "kind": "full"}, "sizes": [1, 2]}


def _run(config: Any, seed: int = 1) -> Live:
    live = linear(seed)
    live.state.cfg = config
    return live


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A store with one checkpoint of a run with this config."""
    live = _run({"model": MODEL, "tokenizer": "bytes", "steps": 5})
    step(live)
    live.save(manager_of(tmp_path / "base"), 3)
    return tmp_path / "base"


TABLE = [
    ({}, []),
    ({"layers": 3}, ["model.layers is 2 in the checkpoint, 3 here"]),
    ({"layers": 2.0}, ["model.layers is 2 in the checkpoint, 2.0 here"]),
    ({"attention": {"heads": 8, "kind": "full"}},
     ["model.attention.heads is 4 in the checkpoint, 8 here"]),
    ({"attention": {"heads": 4}},
     ["model.attention.kind is 'full' in the checkpoint, absent here"]),
    ({"attention": None},
     ["model.attention is {'heads': 4, 'kind': 'full'} in the checkpoint, None here"]),
    ({"sizes": [1, 3]}, ["model.sizes is [1, 2] in the checkpoint, [1, 3] here"]),
    ({"rope": True}, ["model.rope is absent in the checkpoint, True here"]),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "found"), TABLE)
def test_the_built_in_names_every_key_with_both_values(
    changed: dict[str, Any], found: list[str]
) -> None:
    """Nested keys, absent ones, lists, and numbers of another type."""
    saved, current = RunFacts({"model": MODEL}), RunFacts({"model": {**MODEL, **changed}})
    assert same_model_config(saved, current) == found


@pytest.mark.parametrize(
    ("saved", "current", "named"),
    [({}, {"model": {}}, "the checkpoint"), ({"model": {}}, {}, "this run"),
     ({}, {}, "the checkpoint and this run")],
)  # fmt: skip
def test_the_built_in_never_passes_what_it_does_not_know(
    saved: dict[str, Any], current: dict[str, Any], named: str
) -> None:
    """A side without a model config is named."""
    (problem,) = same_model_config(RunFacts(saved), RunFacts(current))
    assert problem.endswith(f"known of {named}")


def test_another_model_config_is_refused_untouched(base: Path) -> None:
    """Other parts of the config may differ; nothing live changes; the same config loads."""
    other = _run({"model": {**MODEL, "layers": 4}, "steps": 5}, seed=2)
    before = other.digests()
    with pytest.raises(StateMismatchError) as caught:
        other.load(manager_of(base, load={"guard": "model_config"}))
    assert caught.value.different == ("model.layers is 2 in the checkpoint, 4 here",)
    assert "load.guard=model_config" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert other.digests() == before
    same = _run({"model": MODEL, "steps": 9}, seed=2)
    assert same.load(manager_of(base, load={"guard": "model_config"})).iteration == 3


def test_a_guard_holds_for_a_parent_too(base: Path, tmp_path: Path) -> None:
    """`load.pretrained` is guarded, and a fresh start is not."""
    load = {"guard": "model_config", "pretrained": {"directory": str(base)}}
    with pytest.raises(StateMismatchError, match="layers"):
        _run({"model": {"layers": 1}}).load(manager_of(tmp_path / "own", load=load))
    fresh = manager_of(tmp_path / "fresh", load={"guard": "model_config"})
    assert not _run({"model": {"layers": 1}}).load(fresh).found


def test_a_guard_holds_for_the_local_tier(tmp_path: Path) -> None:
    """The config of a local commit is the one that it was saved with."""
    local = {"directory": str(tmp_path / "local")}
    live = _run({"model": MODEL})
    manager = manager_of(tmp_path / "run", local=local, async_save=True)
    live.save(manager, 1)
    live.save(manager, 2, non_persistent_ckpt=True)
    manager.finalize_async_saves(live.state, blocking=True, terminate=True)
    other = _run({"model": {**MODEL, "layers": 4}}, seed=2)
    guarded = {"guard": "model_config"}
    with pytest.raises(StateMismatchError, match=r"model\.layers is 2 .* 4 here"):
        other.load(manager_of(tmp_path / "run", local=local, load=guarded))
    other.state.cfg = {"model": MODEL}
    result = other.load(manager_of(tmp_path / "run", local=local, load=guarded))
    assert (result.iteration, result.tier) == (2, "local")


def frozen_stays_frozen(saved: RunFacts, current: RunFacts) -> Iterator[str]:
    """Yield what was frozen and is trained now."""
    for name in sorted(saved.frozen & current.trained):
        yield f"{name} was frozen"


def same_vocabulary(saved: RunFacts, current: RunFacts) -> str | None:
    """Compare a part of the config, and the shape of a tensor."""
    there, here = saved.config["tokenizer"], current.config["tokenizer"]
    shapes = saved.tensors["weight"], current.tensors["weight"]
    return None if there == here and shapes[0] == shapes[1] else f"{there} is now {here}"


def objects(saved: RunFacts, current: RunFacts) -> bool:
    """Object without a reason."""
    return False


def agrees(saved: RunFacts, current: RunFacts) -> bool:
    """Agree in the third way."""
    return True


def fails(saved: RunFacts, current: RunFacts) -> None:
    """Ask for what is not there."""
    saved.config["nothing"]


def test_a_guard_of_ones_own_sees_both_sides(tmp_path: Path) -> None:
    """Frozen parameters, a vocabulary, a plain bool; its own failure is no verdict."""
    live = _run({"tokenizer": "bytes"})
    assert isinstance(live.model, nn.Linear)
    live.model.bias.requires_grad_(False)
    live.optimizer = torch.optim.AdamW([live.model.weight], lr=0.1)
    live.save(manager_of(tmp_path / "base"), 1)

    def load(live: Live, guard: str) -> int:
        load = {"guard": f"{HERE}.{guard}", "pretrained": {"directory": str(tmp_path / "base")}}
        return live.load(manager_of(tmp_path / "own", load=load)).iteration

    with pytest.raises(StateMismatchError, match="bias was frozen"):
        load(_run({}), "frozen_stays_frozen")
    with pytest.raises(StateMismatchError, match="bytes is now words"):
        load(_run({"tokenizer": "words"}), "same_vocabulary")
    with pytest.raises(StateMismatchError, match="returned False"):
        load(_run({}), "objects")
    with pytest.raises(StageFailedError, match="nothing"):
        load(_run({}), "fails")
    for guard in ("same_vocabulary", "agrees"):
        assert load(_run({"tokenizer": "bytes"}), guard) == 0


@pytest.mark.parametrize(
    ("guard", "named"),
    [("model", "load.guard is 'model'; use model_config or"), ("nowhere.guard", "cannot be"),
     ("torch.pi", "which is a float")],
)  # fmt: skip
def test_a_guard_that_cannot_be_is_named(tmp_path: Path, guard: str, named: str) -> None:
    """When the manager is made."""
    values = {"persistent": {"directory": str(tmp_path)}, "load": {"guard": guard}}
    with pytest.raises(ConfigError) as caught:
        DefaultCheckpointManager(CheckpointConfig.from_mapping(values))
    assert named in str(caught.value)
