"""The documentation says what the code does."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

import holdfast
from holdfast import errors
from holdfast import events as event_names
from holdfast.config import CheckpointConfig
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def _training() -> dict[str, Any]:
    """Return the names that the example loop expects to find."""
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)

    def train_one_step(*_: object) -> None:
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return {
        "model": model, "optimizer": optimizer, "scheduler": scheduler,
        "train_one_step": train_one_step,
    }  # fmt: skip


def test_the_loop_in_the_readme_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied word by word, the example trains, saves, and loads what it saved the second time."""
    monkeypatch.chdir(tmp_path)
    loop = next(block for block in _blocks(ROOT / "README.md", "python") if "while " in block)
    names = _training()
    exec(loop, names)
    again = _training()
    exec(loop, again)
    assert again["state"].train_state.step == 1000
    assert capsys.readouterr().out == "starting from step 0\nresumed from step 1000\n"
    assert torch.equal(again["model"].weight, names["model"].weight)


def test_the_components_in_state_md_are_saved_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The declarations are valid, and the two calls restore what they have saved."""
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_text("{}")
    (block,) = _blocks(ROOT / "docs/state.md", "python")
    ids: list[str] = []
    config = CheckpointConfig.from_mapping({"persistent": {"directory": "store"}})
    for start in (1, 2):
        names = _training() | {
            "manager": holdfast.create_checkpoint_manager(config),
            "state": holdfast.GlobalState(train_state=holdfast.TrainState(step=start)),
            "averaged_model": torch.nn.Linear(4, 2),
            "grad_scaler": torch.amp.GradScaler("cpu"),
            "numpy_generator": numpy.random.default_rng(start),
            "logger": SimpleNamespace(get_id=lambda: "run-7", set_id=ids.append),
            "CheckpointLoadContext": holdfast.CheckpointLoadContext,
            "CheckpointSaveContext": holdfast.CheckpointSaveContext,
        }
        exec(block, names)
        names["manager"].finalize_async_saves(names["state"], blocking=True, terminate=True)
    assert ids == ["run-7"]


def test_the_manager_in_the_readme_has_the_right_shape(tmp_path: Path) -> None:
    """The skeleton shown for one's own manager passes the factory's checks."""
    skeleton = next(b for b in _blocks(ROOT / "README.md", "python") if "class MyManager" in b)
    names: dict[str, Any] = {}
    exec(skeleton, names)
    assert issubclass(names["MyManager"], holdfast.CheckpointManager)
    assert names["MyManager"](CheckpointConfig()).load(None) == (0, 0)


def test_the_layout_in_the_readme_is_what_a_save_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every name on disk is explained, and nothing is explained that is not there."""
    monkeypatch.chdir(tmp_path)
    loop = next(block for block in _blocks(ROOT / "README.md", "python") if "while " in block)
    exec(loop, _training())
    root = tmp_path / "checkpoints"
    (newest, *_) = Store(PosixStorage(root, LocalFilesystem())).listing().checkpoints
    found = {each.name for each in root.iterdir() if not each.name.startswith("iter_")}
    found |= {str(each.relative_to(newest.path)) for each in newest.path.rglob("*")}
    found = {re.sub(r"\d{5,}", "N", name) for name in found}
    assert found == {
        "run.json", "attempt_N.json", "latest_checkpointed_iteration.txt", ".metadata",
        "__0_0.distcp", "train_state.json", "run_config.yaml", "manifest.json",
    }  # fmt: skip
    layout = (ROOT / "README.md").read_text().split("## On disk")[1]
    for name in found:
        assert re.sub(r"N|__0_0", "", name).split("_")[0].strip("/") in layout


def test_every_setting_is_documented_with_its_default() -> None:
    """docs/configuration.md has a row for each field, and the default in it is the real one."""
    page = (ROOT / "docs/configuration.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|", page, re.MULTILINE))
    settings = dict(_leaves(CheckpointConfig(), ""))
    documented = set(settings)
    assert set(rows) == documented
    for name in documented - {"persistent.directory"}:
        assert rows[name] == f"`{_as_yaml(settings[name])}`", name


def _leaves(node: Any, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for each in dataclasses.fields(node):
        value = getattr(node, each.name)
        if dataclasses.is_dataclass(value):
            found += _leaves(value, f"{prefix}{each.name}.")
        else:
            found.append((prefix + each.name, value))
    return found


def _as_yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def test_the_public_interface_is_what_its_page_lists() -> None:
    """Every name of the package, no other, and each of them is there."""
    page = (ROOT / "docs/api.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert listed == sorted(holdfast.__all__)
    assert all(getattr(holdfast, name) is not None for name in listed)
    for name in ("wait_staged", "progress", "restore_rng", "restore_data", "restore_component"):
        assert f"`{name}`" in page
        assert hasattr(holdfast.DefaultCheckpointManager, name)
    events = {value for name, value in vars(event_names).items() if name.startswith("ON_")}
    assert events == set(re.findall(r"`(on_\w+)`", page))
    for module in ("filesystem", "testing"):
        section = page.split(f"## `holdfast.{module}`")[1].split("\n## ")[0]
        for name in import_module(f"holdfast.{module}").__all__:
            assert f"`{name}`" in section, name


def test_every_error_is_documented() -> None:
    """docs/errors.md lists each error that a user can meet."""
    page = (ROOT / "docs/errors.md").read_text()
    kinds = [
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.CheckpointError)
    ]
    assert [name for name in kinds if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_tests_that_pages_name_exist(page: Path) -> None:
    """Each link leads somewhere, and each proof named in the guarantees is a file."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    known = {each.name for each in (ROOT / "tests").rglob("*.py")}
    for name in re.findall(r"\b(test_\w+\.py|soak\.py)\b", text):
        assert name in known, name


def test_every_make_target_that_pages_name_exists() -> None:
    """A command in the documentation is a command of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", page.read_text()))
        assert named <= targets, page.name


def test_no_command_needs_a_program_that_make_did_not_install() -> None:
    """Each command of a page names the program in `.venv`, where `make` puts it."""
    for page in PAGES:
        for block in _blocks(page, "sh"):
            for line in block.splitlines():
                assert not re.match(r"(python|torchrun|holdfast) ", line), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_that_pages_name_exists(page: Path) -> None:
    """A program, an overlay or a config in a command is there, and so is each benchmark."""
    text = page.read_text()
    files = set(re.findall(r"(?<![\w/])((?:recipes|configs|benchmarks)/[\w/]+\.(?:py|yaml))", text))
    files |= {f"configs/recipe/{name}.yaml" for name in re.findall(r"\brecipe=(\w+)", text)}
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []


def test_every_module_is_listed_in_the_architecture() -> None:
    """The tree in docs/architecture.md has each module once, in its folder, and no other."""
    page = (ROOT / "docs/architecture.md").read_text()
    tree = page.split("## Modules")[1].split("```")[1]
    listed: list[str] = []
    folders: list[str] = []
    for line in filter(str.strip, tree.splitlines()):
        name, *_ = re.split(r" {3,}", line.strip(), maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        if name.endswith("/"):
            folders = [*folders[:depth], name]
        elif re.fullmatch(r"\w+(  \w+)*", name):  # else the line before goes on
            listed += ["".join(folders[:depth]) + each for each in name.split()]
    package = ROOT / "src/holdfast"
    modules = [
        str(each.relative_to(package).with_suffix(""))
        for each in package.rglob("*.py")
        if each.name != "__init__.py"
    ]
    assert sorted(listed) == sorted(modules)
