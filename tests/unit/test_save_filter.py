"""A save of adapters alone: what is written, what is refused, and how the base is found again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.config import CheckpointConfig
from holdfast.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    NoLoadableCheckpointError,
    StateMismatchError,
    UnsupportedStateError,
)
from holdfast.manager import DefaultCheckpointManager
from holdfast.storage.manifest import MANIFEST_NAME, Manifest
from tests.support.managers import Live, manager_of, step
from tests.support.states import digest
from tests.support.stores import flip_bit, tree

WIDTH = 64


class Adapted(nn.Linear):
    """A linear layer with a low-rank update beside it, as LoRA has."""

    def __init__(self, width: int, adapters: bool = True) -> None:
        super().__init__(width, width)
        self.register_buffer("seen", torch.zeros(()))
        if adapters:
            self.weight.requires_grad_(False)
            self.lora_down = nn.Parameter(torch.randn(2, width))
            self.lora_up = nn.Parameter(torch.zeros(width, 2))
            self.bias.requires_grad_(False)


def _live(seed: int, *, adapters: bool = True) -> Live:
    torch.manual_seed(seed)
    model = nn.Sequential(Adapted(WIDTH, adapters), nn.ReLU(), Adapted(WIDTH, adapters))
    trained = [each for each in model.parameters() if each.requires_grad]
    return Live(model, torch.optim.AdamW(trained, lr=0.1))


@pytest.fixture
def base(tmp_path: Path) -> Live:
    """A run in `base`, with a full checkpoint of iteration 7."""
    live = _live(1, adapters=False)
    step(live, 3)
    live.save(manager_of(tmp_path / "base"), 7)
    return live


def _manager(
    tmp_path: Path, save_filter: str | None = "adapters", name: str = "tuned", **values: Any
) -> DefaultCheckpointManager:
    load = {"pretrained": {"directory": str(tmp_path / "base")}, **values.pop("load", {})}
    return manager_of(tmp_path / name, load=load, save_filter=save_filter, **values)


def _tune(tmp_path: Path, iterations: tuple[int, ...] = (1, 2), **settings: Any) -> Live:
    """Train adapters on the base, saving at these iterations."""
    live, manager = _live(5), _manager(tmp_path, **settings)
    live.load(manager)
    for iteration in iterations:
        step(live, iteration)
        live.save(manager, iteration)
    return live


def _state(live: Live) -> str:
    assert isinstance(live.model, nn.Module)
    return digest([live.model.state_dict(), live.optimizer.state_dict()])


def _names(checkpoint: Path) -> set[str]:
    return set(holdfast.open_tensors(checkpoint))


def _manifest(path: Path) -> Manifest:
    return Manifest.from_bytes((path / MANIFEST_NAME).read_bytes(), "manifest")


@pytest.mark.parametrize("save_filter", ["adapters", "trainable", f"{__name__}.only_lora"])
def test_adapters_are_saved_and_come_back_with_their_base(
    base: Live, tmp_path: Path, save_filter: str
) -> None:
    """Only what is kept is written, with its optimizer state; a resumed run has all of it."""
    if save_filter.endswith("only_lora"):
        save_filter = "tests.unit.test_save_filter.only_lora"
    before = tree(tmp_path / "base")
    live = _tune(tmp_path, save_filter=save_filter)
    written = {each for each in _names(tmp_path / "tuned") if each.startswith("model.")}
    kept = {f"model.{n}.lora_{part}" for n in (0, 2) for part in ("down", "up")}
    buffers = set() if "only_lora" in save_filter else {"model.0.seen", "model.2.seen"}
    assert written == kept | buffers
    again = _live(9)
    result = again.load(_manager(tmp_path, save_filter))
    assert (result.iteration, result.is_pretrained) == (2, False)
    assert _state(again) == _state(live)
    assert result.restored["model"].tensors == 10
    assert len({each.path for each in result.sources}) == 2
    assert tree(tmp_path / "base") == before, "the base was written to"
    assert tree(tmp_path / "tuned").keys() >= {"iter_0000001", "iter_0000002"}


def only_lora(name: str, shape: tuple[int, ...], requires_grad: bool) -> bool:
    """Keep low-rank updates, by name, shape and gradient."""
    return "lora" in name and 2 in shape and requires_grad


def test_an_adapter_save_is_small(tmp_path: Path) -> None:
    """It writes at most 1.2 times the bytes of what is trained, of a base many times as large."""
    torch.manual_seed(0)
    width, rank = 2048, 64
    full = Live(nn.Sequential(nn.Linear(width, width, bias=False)))
    full.save(manager_of(tmp_path / "base"), 7)

    def lora() -> nn.Module:
        model = nn.Sequential(nn.Linear(width, width, bias=False))
        model[0].weight.requires_grad_(False)
        model[0].lora_down = nn.Parameter(torch.randn(rank, width))
        model[0].lora_up = nn.Parameter(torch.zeros(width, rank))
        return model

    model = lora()
    trained = [each for each in model.parameters() if each.requires_grad]
    live = Live(model, torch.optim.AdamW(trained, lr=0.1))
    manager = _manager(tmp_path)
    live.load(manager)
    step(live, 1)
    live.save(manager, 1)
    state_bytes = sum(3 * each.numel() * each.itemsize for each in trained)
    written = sum(each.stat().st_size for each in (tmp_path / "tuned/iter_0000001").rglob("*"))
    assert written <= 1.2 * state_bytes
    base_bytes = sum(each.stat().st_size for each in (tmp_path / "base").rglob("*.distcp"))
    assert base_bytes > 2 * written


def test_the_manifest_names_the_base(base: Live, tmp_path: Path) -> None:
    """By path, run id, iteration and digest; a reader that knows no bases refuses it."""
    _tune(tmp_path)
    parent = _manifest(tmp_path / "base/iter_0000007")
    for name in ("iter_0000001", "iter_0000002"):
        manifest = _manifest(tmp_path / "tuned" / name)
        assert manifest.base == {
            "path": str(tmp_path / "base/iter_0000007"),
            "relative_path": "../base/iter_0000007",
            "run_id": parent.run_id,
            "iteration": 7,
            "digest": parent.content_digest,
        }
        assert "base" in manifest.requires


def test_a_resumed_run_keeps_its_base(base: Live, tmp_path: Path) -> None:
    """Saves after a resume record the full checkpoint, not the part that was loaded."""
    _tune(tmp_path)
    again, manager = _live(9), _manager(tmp_path)
    again.load(manager)
    step(again, 3)
    again.save(manager, 3)
    first, last = (_manifest(tmp_path / "tuned" / f"iter_000000{n}") for n in (1, 3))
    assert first.base == last.base
    third = _live(10)
    assert third.load(_manager(tmp_path)).iteration == 3
    assert _state(third) == _state(again)


def test_fresh_adapters_are_told(
    base: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the base lacks begins fresh, with a warning; anything else is still a mismatch."""
    with caplog.at_level(logging.WARNING):
        _tune(tmp_path)
    (told,) = [each.message for each in caplog.records if "fresh values" in each.message]
    assert "model.0.lora_down" in told
    live = _live(5)
    assert isinstance(live.model, nn.Sequential)
    live.model.append(Adapted(WIDTH, adapters=False).requires_grad_(False))
    with pytest.raises(StateMismatchError, match=r"model\.3\.weight"):
        live.load(_manager(tmp_path, name="other"))


def _move_both(root: Path) -> Path:
    (root / "archive").mkdir()
    for name in ("base", "tuned"):
        (root / name).rename(root / "archive" / name)
    return root / "archive/tuned"


def _copy_beside(root: Path) -> Path:
    shutil.move(root / "base/iter_0000007", root / "tuned/iter_0000007")
    return root / "tuned/iter_0000002"


def _leave(root: Path) -> Path:
    return root / "tuned"


@pytest.mark.parametrize("move", [_leave, _move_both, _copy_beside])
def test_the_base_is_found_again(base: Live, tmp_path: Path, move: Callable[[Path], Path]) -> None:
    """Where it was, moved together with the run, or put beside the checkpoint."""
    live = _tune(tmp_path)
    place = move(tmp_path)
    model = _live(9).model
    assert isinstance(model, nn.Module)
    holdfast.load_model_weights(model, place)
    assert isinstance(live.model, nn.Module)
    assert digest(model.state_dict()) == digest(live.model.state_dict())


def test_a_base_that_moved_alone_is_named(base: Live, tmp_path: Path) -> None:
    """Through load.pretrained; without it the load is refused with the places looked at."""
    live = _tune(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    again = _live(9)
    before = again.digests()
    with pytest.raises(CheckpointNotFoundError, match="iteration 7 of run") as caught:
        again.load(manager_of(tmp_path / "tuned", save_filter="adapters"))
    assert "base/iter_0000007" in str(caught.value)
    assert again.digests() == before
    load = {"pretrained": {"directory": str(tmp_path / "elsewhere")}}
    assert again.load(_manager(tmp_path, load=load)).iteration == 2
    assert _state(again) == _state(live)


def test_another_base_in_its_place_is_refused(base: Live, tmp_path: Path) -> None:
    """Same path, same iteration, same run id, other bytes: named, and nothing is touched."""
    _tune(tmp_path)
    path = tmp_path / "base/iter_0000007"
    run_id = _manifest(path).run_id
    shutil.rmtree(tmp_path / "base")
    other = _live(2, adapters=False)
    other.save(manager_of(tmp_path / "base", run_id=run_id), 7)
    assert _manifest(path).run_id == run_id
    again = _live(9)
    before = again.digests()
    with pytest.raises(CheckpointNotFoundError, match="has changed"):
        again.load(_manager(tmp_path))
    assert again.digests() == before


def test_damage_of_the_base_is_damage(base: Live, tmp_path: Path) -> None:
    """A flipped bit in what is read of it is found by its digest."""
    _tune(tmp_path)
    flip_bit(tmp_path / "base/iter_0000007/__0_0.distcp", 200)
    with pytest.raises((NoLoadableCheckpointError, CorruptCheckpointError), match="digest"):
        _live(9).load(_manager(tmp_path))


def test_a_part_starts_another_run(base: Live, tmp_path: Path) -> None:
    """`load.pretrained` of an adapter run takes both; its base is the new run's base too."""
    live = _tune(tmp_path)
    load = {"pretrained": {"directory": str(tmp_path / "tuned")}}
    again, manager = _live(9), _manager(tmp_path, name="second/store", load=load)
    assert again.load(manager).is_pretrained
    assert isinstance(again.model, nn.Module)
    assert isinstance(live.model, nn.Module)
    assert digest(again.model.state_dict()) == digest(live.model.state_dict())
    step(again, 1)
    again.save(manager, 1)
    record = _manifest(tmp_path / "second/store/iter_0000001").base_record
    assert record is not None
    assert record.path == str(tmp_path / "base/iter_0000007")
    assert record.relative_path == "../../base/iter_0000007"


def test_a_full_run_goes_on_with_parts(tmp_path: Path) -> None:
    """A run's own full checkpoint is the base of its later saves, and retention keeps it."""
    live, manager = _live(1), manager_of(tmp_path / "run")
    step(live, 1)
    live.save(manager, 1)
    again = _live(2)
    manager = manager_of(tmp_path / "run", save_filter="adapters", persistent={"keep": {"last": 1}})
    again.load(manager)
    with pytest.raises(UnsupportedStateError, match="its own base"):
        again.save(manager, 1)
    for iteration in (2, 3, 4):
        step(again, iteration)
        again.save(manager, iteration)
    names = sorted(each.name for each in (tmp_path / "run").glob("iter_*"))
    assert names == ["iter_0000001", "iter_0000004"]
    third = _live(3)
    assert third.load(manager_of(tmp_path / "run")).iteration == 4
    assert _state(third) == _state(again)


# -- what is refused -----------------------------------------------------------------------------


def test_what_training_changes_is_never_left_out(base: Live, tmp_path: Path) -> None:
    """A trained head beside the adapters is named, before anything is written."""
    live, manager = _live(5), _manager(tmp_path)
    assert isinstance(live.model, nn.Sequential)
    live.load(manager)
    bias = live.model[2].bias
    bias.requires_grad_(True)
    live.optimizer.add_param_group({"params": [bias]})
    with pytest.raises(UnsupportedStateError, match=r"leaves out model\.2\.bias, which training"):
        live.save(manager, 1)
    assert not list((tmp_path / "tuned").glob("iter_*"))


def test_what_the_base_lacks_is_never_left_out(base: Live, tmp_path: Path) -> None:
    """A frozen tensor that only the part before has, and one that no checkpoint has."""
    _tune(tmp_path)
    again, manager = _live(9), _manager(tmp_path, "trainable")
    assert isinstance(again.model, nn.Sequential)
    again.load(manager)
    again.model[0].lora_down.requires_grad_(False)
    again.optimizer = torch.optim.AdamW([again.model[2].lora_up], lr=0.1)
    with pytest.raises(UnsupportedStateError, match=r"model\.0\.lora_down, which the base"):
        again.save(manager, 3)


def test_a_run_without_a_base_is_refused_at_its_load(tmp_path: Path) -> None:
    """A fresh start, and a save without a load, with the remedy."""
    manager = manager_of(tmp_path / "run", save_filter="trainable")
    with pytest.raises(ConfigError, match=r"begins without a checkpoint.*load\.pretrained"):
        _live(1).load(manager)
    with pytest.raises(UnsupportedStateError, match=r"load\.pretrained"):
        _live(1).save(manager_of(tmp_path / "other", save_filter="trainable"), 1)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"save_filter": "adaptors"}, "save_filter is 'adaptors'; use trainable, adapters or"),
        ({"save_filter": "nowhere.module"}, "save_filter is 'nowhere.module', which cannot"),
        ({"save_filter": "torch.nothing"}, "torch.nothing"),
        ({"save_filter": "torch.pi"}, "which is a float"),
        ({"save_filter": "adapters", "local": {"directory": "local"}}, "local.directory"),
    ],
)
def test_a_filter_that_cannot_be_is_named(
    tmp_path: Path, values: dict[str, Any], named: str
) -> None:
    """When the manager is made."""
    values = {**values, "persistent": {"directory": str(tmp_path / "run")}}
    with pytest.raises(ConfigError) as caught:
        DefaultCheckpointManager(CheckpointConfig.from_mapping(values))
    assert named in str(caught.value)
