"""What a load means: whose checkpoint it takes, once or always, and what people are told."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from holdfast.config import CheckpointConfig
from holdfast.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    FormatTooNewError,
    NoLoadableCheckpointError,
    OwnCheckpointsExistError,
    StoreNotLoadedError,
)
from holdfast.filesystem import LocalFilesystem
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import LoadResult
from holdfast.storage.manifest import MANIFEST_NAME, Manifest
from holdfast.tiers.local.shard_file import read_trailer
from tests.support.managers import Live, linear, manager_of, step
from tests.support.stores import flip_bit, tree


@pytest.fixture
def local() -> Iterator[Path]:
    """A local directory in RAM."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def base(tmp_path: Path) -> Live:
    """Another run, in `base`, with checkpoints of 10 and 20; its live objects are those of 20."""
    live, manager = _trained(1), manager_of(tmp_path / "base")
    for iteration in (10, 20):
        step(live, iteration)
        live.state.train_state.consumed_train_samples = 8 * iteration
        live.save(manager, iteration)
    return live


def _trained(seed: int) -> Live:
    live = linear(seed)
    live.scheduler = torch.optim.lr_scheduler.StepLR(live.optimizer, 7)
    return live


def _pretrained(tmp_path: Path, name: str = "own", **values: Any) -> DefaultCheckpointManager:
    settings = {"directory": str(tmp_path / "base"), **values}
    return manager_of(tmp_path / name, load={"pretrained": settings})


def _manifest(path: Path) -> Manifest:
    return Manifest.from_bytes((path / MANIFEST_NAME).read_bytes(), "manifest")


def _iterations(root: Path) -> list[str]:
    return sorted(each.name for each in root.glob("iter_*"))


# -- load.pretrained -----------------------------------------------------------------------------


def test_a_run_begins_with_the_weights_alone(base: Live, tmp_path: Path) -> None:
    """The model is the parent's; counters, optimizer, scheduler and random numbers are fresh."""
    live = _trained(5)
    before = live.digests()
    result = live.load(_pretrained(tmp_path))
    assert (result.found, result.is_pretrained, result.is_durable) == (True, True, True)
    assert tuple(result) == (0, 0)
    assert result.path == tmp_path / "base/iter_0000020"
    assert set(result.restored) == {"model"}
    after = live.digests()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {name for name in after if name.startswith("model.")}
    assert all(after[name] == base.digests()[name] for name in changed)
    assert live.state.train_state.step == 0


def test_the_same_command_starts_a_run_and_resumes_it(base: Live, tmp_path: Path) -> None:
    """From the second start on the run goes on from its own, the parent being there or not."""
    before = tree(tmp_path / "base")
    live = _trained(5)
    manager = _pretrained(tmp_path)
    live.load(manager)
    step(live, 3)
    live.save(manager, 2)
    again = _trained(6)
    result = again.load(_pretrained(tmp_path))
    assert (result.iteration, result.is_pretrained) == (2, False)
    mine, theirs = again.digests(), live.digests()
    assert {name for name in mine if mine[name] != theirs[name]} <= {
        "gradient.0.weight", "gradient.0.bias",
    }  # fmt: skip
    assert tree(tmp_path / "base") == before, "the parent was written to"
    shutil.rmtree(tmp_path / "base")
    assert _trained(7).load(_pretrained(tmp_path)).iteration == 2


def test_a_run_may_take_over_everything(base: Live, tmp_path: Path) -> None:
    """`what: everything` goes on as the other run would have, in a store of its own."""
    live = _trained(5)
    manager = _pretrained(tmp_path, what="everything", step=10)
    result = live.load(manager)
    assert (result.iteration, result.is_pretrained) == (10, True)
    assert live.state.train_state.consumed_train_samples == 80
    live.save(manager, 12)
    again = _trained(6)
    assert again.load(_pretrained(tmp_path, what="everything", step=10)).iteration == 12


@pytest.mark.parametrize("what", ["weights", "everything"])
def test_the_parent_is_recorded_for_good(base: Live, tmp_path: Path, what: str) -> None:
    """run.json and each manifest name it, those of later starts included."""
    live = _trained(5)
    for iteration in (30, 31):
        manager = _pretrained(tmp_path, what=what)
        live.load(manager)
        live.save(manager, iteration)
    parent = {
        "path": str(tmp_path / "base/iter_0000020"),
        "run_id": _manifest(tmp_path / "base/iter_0000020").run_id,
        "iteration": 20,
        "what": what,
    }
    for name in ("iter_0000030", "iter_0000031"):
        assert _manifest(tmp_path / "own" / name).parent == parent
    recorded = json.loads((tmp_path / "own/run.json").read_text())["attempts"]
    assert [each["parent"] for each in recorded] == [parent, None]
    assert _manifest(tmp_path / "base/iter_0000020").parent is None


def test_a_broken_run_never_starts_from_its_parent(base: Live, tmp_path: Path) -> None:
    """Own checkpoints that are damaged are own checkpoints: the load is an error."""
    live, manager = _trained(5), _pretrained(tmp_path)
    live.load(manager)
    live.save(manager, 2)
    flip_bit(tmp_path / "own/iter_0000002/__0_0.distcp")
    with pytest.raises(NoLoadableCheckpointError, match="iter_0000002"):
        live.load(_pretrained(tmp_path))
    (tmp_path / "own/iter_0000002/__0_0.distcp").unlink()
    with pytest.raises(NoLoadableCheckpointError, match="iter_0000002"):
        live.load(_pretrained(tmp_path))


def test_local_checkpoints_are_own_checkpoints(base: Live, tmp_path: Path, local: Path) -> None:
    """A run that has saved into memory alone goes on from there, and not from its parent."""
    settings: dict[str, Any] = {
        "local": {"directory": str(local)},
        "load": {"pretrained": {"directory": str(tmp_path / "base")}},
    }
    live, manager = _trained(5), manager_of(tmp_path / "own", **settings)
    live.load(manager)
    live.save(manager, 3, non_persistent_ckpt=True)
    manager.finalize_async_saves(live.state, terminate=True)
    again, manager = _trained(6), manager_of(tmp_path / "own", **settings)
    result = again.load(manager)
    assert (result.iteration, result.tier, result.is_durable) == (3, "local", False)
    manager.finalize_async_saves(live.state, terminate=True)


def test_a_parent_that_is_not_there_is_an_error(base: Live, tmp_path: Path) -> None:
    """Whatever on_missing says, and with what is near; so is an iteration that it lacks."""
    for directory, named in (("bas", "Nearby: .*base"), ("", "Did you mean .*base")):
        settings = {"directory": str(tmp_path / directory)}
        with pytest.raises(CheckpointNotFoundError, match=named) as caught:
            _trained(5).load(manager_of(tmp_path / "own", load={"pretrained": settings}))
        assert "checkpoint.load.pretrained.directory" in str(caught.value)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of iteration 15; it has: 20"):
        _trained(5).load(_pretrained(tmp_path, step=15))


# -- load.directory ------------------------------------------------------------------------------


def test_another_place_beside_own_checkpoints_is_refused(base: Live, tmp_path: Path) -> None:
    """Before anything is touched, with what to set instead; `strict` and `step` change nothing."""
    live, manager = _trained(5), manager_of(tmp_path / "own")
    live.save(manager, 2)
    before = live.digests()
    for more in ({}, {"step": 20}, {"strict": False}, {"on_missing": "error"}):
        load = {"directory": str(tmp_path / "base"), **more}
        with pytest.raises(OwnCheckpointsExistError, match=r"load\.pretrained\.directory"):
            live.load(manager_of(tmp_path / "own", load=load))
    assert live.digests() == before


@pytest.mark.parametrize("on_missing", ["start_fresh", "error"])
def test_a_named_place_must_hold_a_checkpoint(base: Live, tmp_path: Path, on_missing: str) -> None:
    """An empty directory that was named is no fresh start."""
    (tmp_path / "empty").mkdir()
    load = {"directory": str(tmp_path / "empty"), "on_missing": on_missing}
    with pytest.raises(CheckpointNotFoundError, match="it is empty"):
        _trained(5).load(manager_of(tmp_path / "own", load=load))


def test_an_own_checkpoint_may_be_named(base: Live, tmp_path: Path) -> None:
    """One checkpoint of the run's own store is that iteration, as load.step is."""
    live = _trained(5)
    load = {"directory": str(tmp_path / "base/iter_0000010/.metadata")}
    manager = manager_of(tmp_path / "base", load=load)
    assert live.load(manager).iteration == 10
    live.save(manager, 11)
    assert _trained(6).load(manager_of(tmp_path / "base", load=load)).iteration == 11
    with pytest.raises(ConfigError, match=r"load\.step is 20, but load\.directory is iteration 10"):
        _trained(6).load(manager_of(tmp_path / "base", load={**load, "step": 20}))


def test_two_places_to_start_from_contradict_each_other(base: Live, tmp_path: Path) -> None:
    """load.directory elsewhere and load.pretrained are an error; the own store is no other."""
    pretrained = {"directory": str(tmp_path / "base")}
    load = {"directory": str(tmp_path / "base"), "pretrained": pretrained}
    with pytest.raises(ConfigError, match="both name where to start"):
        _trained(5).load(manager_of(tmp_path / "own", load=load))
    load["directory"] = str(tmp_path / "own")
    assert _trained(5).load(manager_of(tmp_path / "own", load=load)).is_pretrained


def test_paths_may_be_objects_and_name_variables(
    base: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pathlib.Path`, `~` and $VARIABLES work in every path; an unset variable is an error."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BASE", "base")
    monkeypatch.delenv("NOWHERE", raising=False)
    for spelled in (tmp_path / "base", "~/base", "~/$BASE", "$HOME/${BASE}"):
        config = CheckpointConfig.from_mapping({"persistent": {"directory": spelled}})
        assert _trained(5).load(DefaultCheckpointManager(config)).iteration == 20
        built = CheckpointConfig()
        built.persistent.directory = spelled  # type: ignore[assignment]  # people do
        assert _trained(5).load(DefaultCheckpointManager(built)).iteration == 20
        assert built.persistent.directory is spelled
    for field in ("persistent", "local", "load"):
        with pytest.raises(ConfigError, match=r"\$NOWHERE is not set in the environment"):
            CheckpointConfig.from_mapping({field: {"directory": "/x/$NOWHERE/y"}})
    with pytest.raises(ConfigError, match=r"checkpoint\.load\.pretrained\.directory is '\$\{A"):
        CheckpointConfig.from_mapping({"load": {"pretrained": {"directory": "${A_B_C}"}}})


# -- load.step -----------------------------------------------------------------------------------


def _start(tmp_path: Path, step_: int | None, saves: int | None, **values: Any) -> int:
    """Start with a load.step, save once, and return what was loaded."""
    live = _trained(5)
    keep = {"keep": {"last": None}}
    manager = manager_of(tmp_path / "base", load={"step": step_}, persistent=keep, **values)
    result = live.load(manager)
    if saves is not None:
        live.save(manager, saves)
    return result.iteration


def test_a_step_that_stays_in_the_configuration_applies_once(
    base: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A restart goes on from what came after; it applies again only if that was said."""
    assert _start(tmp_path, 10, None) == 10
    assert _start(tmp_path, 10, 11) == 10, "nothing was saved after the first"
    caplog.clear()
    assert _start(tmp_path, 10, 12) == 11
    assert "load.step=10 was applied by attempt 2" in caplog.text
    assert "allow_rewind=true" in caplog.text
    assert _start(tmp_path, None, 13) == 12
    assert _start(tmp_path, 10, None) == 13, "once per run"
    assert _start(tmp_path, 12, 14) == 12, "another step is another wish"
    assert _start(tmp_path, 12, None) == 14
    caplog.clear()
    assert _start(tmp_path, 10, None, allow_rewind=True) == 10
    assert "was applied" not in caplog.text


def test_a_step_that_was_applied_counts_in_memory_too(
    base: Live, tmp_path: Path, local: Path
) -> None:
    """After a rollback the newest local checkpoint is what came after."""
    for expected, iteration in ((10, 15), (15, 16), (16, 17)):
        live = _trained(5)
        settings: dict[str, Any] = {"local": {"directory": str(local)}, "load": {"step": 10}}
        manager = manager_of(tmp_path / "base", **settings)
        assert live.load(manager).iteration == expected
        live.save(manager, iteration, non_persistent_ckpt=True)
        manager.finalize_async_saves(live.state, terminate=True)


# -- versions ------------------------------------------------------------------------------------


def _as_later(path: Path) -> None:
    """Write a manifest as a later version of holdfast would."""
    later = dataclasses.replace(_manifest(path), format=99).to_bytes()
    (path / MANIFEST_NAME).write_bytes(later)


def test_a_later_version_is_never_passed_over_nor_removed(base: Live, tmp_path: Path) -> None:
    """The load names both versions; after an older one was chosen, retention leaves it alone."""
    root = tmp_path / "base"
    _as_later(root / "iter_0000020")
    live = _trained(5)
    before = live.digests()
    with pytest.raises(FormatTooNewError, match="format 99; this version of holdfast reads up to"):
        live.load(manager_of(root))
    assert live.digests() == before
    with pytest.raises(StoreNotLoadedError):
        live.save(manager_of(root), 21)
    manager = manager_of(root, load={"step": 10}, persistent={"keep": {"last": 1}})
    assert live.load(manager).iteration == 10
    for iteration in (11, 12, 21, 22):
        live.save(manager, iteration)
    assert _iterations(root) == ["iter_0000020", "iter_0000022"]
    assert _trained(6).load(manager_of(root)).iteration == 22


def test_a_later_version_in_memory_stops_the_load(base: Live, tmp_path: Path, local: Path) -> None:
    """The same of a local shard: nothing older is taken, in either tier, and it is not pruned."""
    settings: dict[str, Any] = {"local": {"directory": str(local)}}
    live, manager = _trained(5), manager_of(tmp_path / "base", **settings)
    live.load(manager)
    live.save(manager, 25, non_persistent_ckpt=True)
    manager.finalize_async_saves(live.state, terminate=True)
    (shard,) = local.glob("*/0/iter_0000025_0_local.pt")
    with shard.open("rb") as stream:
        tail = read_trailer(stream, str(shard))
    image = shard.read_bytes()[: tail.record.image_bytes]
    later = dataclasses.replace(tail, record=dataclasses.replace(tail.record, format=99))
    shard.write_bytes(image + later.to_bytes())
    manager = manager_of(tmp_path / "base", **settings)
    with pytest.raises(FormatTooNewError, match="iter_0000025_0_local"):
        _trained(6).load(manager)
    manager.finalize_async_saves(live.state, terminate=True)
    live, manager = _trained(6), manager_of(tmp_path / "base", load={"step": 20}, **settings)
    assert live.load(manager).iteration == 20
    for iteration in (21, 22, 23, 26):
        live.save(manager, iteration, non_persistent_ckpt=True)
    manager.finalize_async_saves(live.state, terminate=True)
    assert shard.exists()


# -- what people are told ------------------------------------------------------------------------


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    caplog.clear()
    return found


def _lose_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).unlink()


def _flip(path: Path) -> None:
    flip_bit(path / "__0_0.distcp")


def _cut(path: Path) -> None:
    (path / "run_config.yaml").write_bytes(b"")


def _lose_file(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


@pytest.mark.parametrize("harm", [_lose_manifest, _flip, _cut, _lose_file])
def test_falling_back_is_a_warning(
    base: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Any
) -> None:
    """An older checkpoint in place of a damaged one is told once, with the reason."""
    harm(tmp_path / "base/iter_0000020")
    assert _trained(5).load(manager_of(tmp_path / "base")).iteration == 10
    (warning,) = [each for each in _warnings(caplog) if "tracker" not in each]
    assert "iter_0000020" in warning
    assert "passed over" in warning or "iteration 10 is loaded although later ones" in warning


@pytest.mark.parametrize(("harm", "reason"), [(_cut, "has 0 bytes, "), (_lose_file, "is missing")])
def test_a_named_checkpoint_that_is_not_whole_is_refused(
    base: Live, tmp_path: Path, harm: Any, reason: str
) -> None:
    """Asked for by number or by directory, one that lacks bytes is an error that names the file."""
    path = tmp_path / "base/iter_0000020"
    harm(path)
    for load in ({"step": 20}, {"directory": str(path)}):
        with pytest.raises(CorruptCheckpointError, match="iter_0000020") as caught:
            _trained(5).load(manager_of(tmp_path / "base", load=load))
        assert reason in str(caught.value)


def test_only_the_checkpoint_at_hand_is_measured(base: Live, tmp_path: Path) -> None:
    """A load asks for the size of each file of the checkpoint it takes, and of no other."""
    asked: Counter[str] = Counter()

    class Counting(LocalFilesystem):
        def size_bytes(self, path: Path) -> int:
            if "/iter_" in str(path):
                asked[str(path.relative_to(tmp_path / "base"))] += 1
            return super().size_bytes(path)

    assert _trained(5).load(manager_of(tmp_path / "base", filesystem=Counting())).found
    listed = {each.path for each in _manifest(tmp_path / "base/iter_0000020").files}
    assert asked == Counter(f"iter_0000020/{each}" for each in listed)


def test_an_ordinary_resume_warns_of_nothing(
    base: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is said where nothing is wrong."""
    assert _trained(5).load(manager_of(tmp_path / "base")).iteration == 20
    assert _warnings(caplog) == []


def test_a_wiped_store_beside_local_checkpoints_is_told(
    base: Live, tmp_path: Path, local: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a run id the local checkpoints are an orphaned run's; with it they are loaded."""
    settings: dict[str, Any] = {"local": {"directory": str(local)}}
    live, manager = _trained(5), manager_of(tmp_path / "base", **settings)
    live.load(manager)
    live.save(manager, 25, non_persistent_ckpt=True)
    manager.finalize_async_saves(live.state, terminate=True)
    run_id = _manifest(tmp_path / "base/iter_0000020").run_id
    shutil.rmtree(tmp_path / "base")
    caplog.clear()
    # Another run beside it, in the same memory, is told nothing.
    other = manager_of(tmp_path / "other", **settings)
    assert not _trained(6).load(other).found
    other.finalize_async_saves(live.state, terminate=True)
    assert _warnings(caplog) == []
    manager = manager_of(tmp_path / "base", **settings)
    assert not _trained(6).load(manager).found
    manager.finalize_async_saves(live.state, terminate=True)
    (warning,) = _warnings(caplog)
    assert "up to iteration 25" in warning
    assert f"checkpoint.run_id={run_id}" in warning
    assert str(local / run_id) in warning
    shutil.rmtree(tmp_path / "base", ignore_errors=True)
    manager = manager_of(tmp_path / "base", run_id=run_id, **settings)
    result = _trained(6).load(manager)
    assert (result.iteration, result.tier, result.is_durable) == (25, "local", False)
    (warning,) = _warnings(caplog)
    assert "holds nothing of this run; iteration 25 is loaded from the local tier alone" in warning
    manager.finalize_async_saves(live.state, terminate=True)


def test_a_result_says_whether_it_is_durable(base: Live, tmp_path: Path, local: Path) -> None:
    """A local commit that the persistent tier has too is safe; a newer one is not."""
    settings: dict[str, Any] = {"local": {"directory": str(local)}}
    found: list[LoadResult] = []
    for saves in ({}, {"non_persistent_ckpt": True}):
        live, manager = _trained(5), manager_of(tmp_path / "base", **settings)
        live.load(manager)
        live.save(manager, 30 + len(found), **saves)
        manager.finalize_async_saves(live.state, terminate=True)
        manager = manager_of(tmp_path / "base", **settings)
        found.append(_trained(6).load(manager))
        manager.finalize_async_saves(live.state, terminate=True)
    assert [(each.iteration, each.tier, each.is_durable) for each in found] == [
        (30, "local", True),
        (31, "local", False),
    ]


def test_a_step_that_is_damaged_is_the_damage(base: Live, tmp_path: Path) -> None:
    """Asked for by number, the error is the file's, and no word of another checkpoint."""
    (tmp_path / "base/iter_0000020/run_config.yaml").write_bytes(b"")
    for load in ({"step": 20}, {"directory": str(tmp_path / "base/iter_0000020")}):
        with pytest.raises(CorruptCheckpointError, match=r"run_config\.yaml: has 0 bytes"):
            _trained(5).load(manager_of(tmp_path / "base", load=load))


def test_a_relative_path_means_one_directory_for_good(
    base: Live, tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A working directory that changes after the manager was made moves neither tier."""
    (tmp_path / "elsewhere").mkdir()
    for expected, iteration in ((20, 25), (25, 26)):
        monkeypatch.chdir(tmp_path)
        settings: dict[str, Any] = {"local": {"directory": "memory"}, "load": {"directory": "base"}}
        live, manager = _trained(5), manager_of(Path("base"), **settings)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert live.load(manager).iteration == expected
        live.save(manager, iteration, non_persistent_ckpt=True)
        manager.finalize_async_saves(live.state, terminate=True)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_own_checkpoint_that_is_gone_or_archived_is_own(base: Live, tmp_path: Path) -> None:
    """Named by its place in the store it is that iteration, pruned, linked back or never there."""
    root = tmp_path / "base"
    (root / "iter_0000010").rename(tmp_path / "archive")
    (root / "iter_0000010").symlink_to(tmp_path / "archive")
    load = {"directory": str(root / "iter_0000010")}
    live, manager = _trained(5), manager_of(root, load=load, persistent={"keep": {"last": 1}})
    assert live.load(manager).iteration == 10
    live.save(manager, 11)
    assert _iterations(root) == ["iter_0000011"]
    assert live.load(manager_of(root, load=load)).iteration == 11
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of iteration 12; it has: 11"):
        live.load(manager_of(root, load={"directory": str(root / "iter_0000012")}))


@pytest.mark.parametrize("name", ["latest", "latest_checkpointed_iteration.txt", "iter_0000005"])
def test_names_in_the_own_store_count_in_memory_too(tmp_path: Path, local: Path, name: str) -> None:
    """Where all there is lies in memory, what the store would have of it stands for the run."""
    settings: dict[str, Any] = {"local": {"directory": str(local)}}
    live, manager = _trained(5), manager_of(tmp_path / "own", **settings)
    live.load(manager)
    live.save(manager, 5, non_persistent_ckpt=True)
    manager.finalize_async_saves(live.state, terminate=True)
    settings["load"] = {"directory": str(tmp_path / "own" / name)}
    manager = manager_of(tmp_path / "own", **settings)
    result = _trained(6).load(manager)
    assert (result.iteration, result.tier) == (5, "local")
    manager.finalize_async_saves(live.state, terminate=True)


def test_an_emptied_store_beside_local_checkpoints_is_told(
    base: Live, tmp_path: Path, local: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty directory in place of the store, as an unmounted disk leaves it, is no store."""
    settings: dict[str, Any] = {"local": {"directory": str(local)}, "run_id": "r1"}
    live, manager = _trained(5), manager_of(tmp_path / "own", **settings)
    live.load(manager)
    live.save(manager, 5, non_persistent_ckpt=True)
    manager.finalize_async_saves(live.state, terminate=True)
    caplog.clear()
    for lost in (False, True):
        if lost:
            shutil.rmtree(tmp_path / "own")
            (tmp_path / "own").mkdir()
        manager = manager_of(tmp_path / "own", **settings)
        assert _trained(6).load(manager).iteration == 5
        manager.finalize_async_saves(live.state, terminate=True)
        told = [each for each in _warnings(caplog) if "holds nothing of this run" in each]
        assert len(told) == lost


def test_a_checkpoint_of_torch_in_the_store_says_how_to_go_on(tmp_path: Path) -> None:
    """The advice in the error leads on: moved out of the store, a run starts from it."""
    live = _trained(1)
    assert isinstance(live.model, torch.nn.Module)
    path = tmp_path / "own/iter_0000005"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": live.model.state_dict()}, checkpoint_id=path)
    with pytest.raises(NoLoadableCheckpointError, match="move it out of this store"):
        _trained(5).load(manager_of(tmp_path / "own"))
    path.rename(tmp_path / "moved")
    pretrained = {"pretrained": {"directory": str(tmp_path / "moved")}}
    other, manager = _trained(5), manager_of(tmp_path / "own", load=pretrained)
    assert other.load(manager).is_pretrained
    assert torch.equal(other.model.weight, live.model.weight)  # type: ignore[union-attr,arg-type]
    other.save(manager, 1)
    assert other.load(manager_of(tmp_path / "own", load=pretrained)).iteration == 1
