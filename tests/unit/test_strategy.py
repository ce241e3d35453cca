"""Load strategies: which parts are restored and why, under which names, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast import LoadStrategy, SharingPattern, StateComponent
from holdfast.errors import ConfigError, StateMismatchError, StepRewoundError
from holdfast.state.model import migrate_names
from holdfast.state.strategy import PARTS, decide
from tests.support.managers import Live, linear, manager_of, step
from tests.support.states import digest, rng_digests

ROOT = Path(__file__).parents[2]


def _rows() -> list[tuple[str, str]]:
    """Of the table in docs/state.md."""
    page = (ROOT / "docs/state.md").read_text().split("## Load strategies")[1]
    rows: list[tuple[str, str]] = re.findall(
        r"^\| (`[^|]+|nothing) \| ([^|]+) \|$", page, re.MULTILINE
    )
    assert len(rows) > 10
    return rows


@pytest.mark.parametrize(("setting", "told"), _rows())
def test_the_table_in_the_docs_is_what_is_decided(setting: str, told: str) -> None:
    """Every row, word by word."""
    switches: dict[str, Any] = {}
    override: list[str] = []
    fields: dict[str, Any] = {}
    for each in re.findall(r"`([^`]+)`", setting):
        name, _, value = each.partition("=")
        if name.startswith("strategy."):
            fields[name.removeprefix("strategy.")] = value == "true"
        elif name == "load.override":
            override.append(value)
        else:
            key, given = {
                "load.rng": ("rng", False),
                "load.pretrained.what": ("weights_only", True),
                "skip_load_to_model_and_opt": ("skips_tensors", True),
            }[name]
            switches[key] = given
    found = decide(LoadStrategy(**fields), override, **switches)
    assert list(found) == list(PARTS)
    kept = [f"{part}: {each.reason}" for part, each in found.items() if not each.is_restored]
    assert told == ("; ".join(kept) or "everything is restored")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "it must be a mapping"),
        ({"optimiser": False}, "did you mean optimizer"),
        ({"zzz": False}, "it has model, optimizer"),
        ({"model": "no"}, "strategy.model is 'no'; it must be true or false"),
        ({"model": None}, "strategy.model is None"),
        ({"ignore_keys": "model.*"}, "it must be a list of names or globs"),
        ({"ignore_keys": [3]}, "it must be a list of names or globs"),
        ({"rename": "a"}, "it must be a mapping, or a list of pairs"),
        ({"rename": [["a"]]}, "it must be a mapping, or a list of pairs"),
        ({"rename": {"(": "b"}}, "rename has '(' -> 'b'"),
        ({"rename": {"a": r"\2"}}, r"rename has 'a' -> '\\\\2'"),
    ],
)
def test_a_wrong_strategy_is_refused_when_the_manager_is_made(
    tmp_path: Path, given: Any, words: str
) -> None:
    """By the setting's name; one of a context by the load."""
    with pytest.raises(ConfigError) as refusal:
        manager_of(tmp_path, load={"strategy": given})
    assert words.replace("\\\\\\\\", "\\\\") in str(refusal.value)
    with pytest.raises(ConfigError):
        linear().load(manager_of(tmp_path), strategy=given)


def _live(seed: int) -> Live:
    live = linear(seed)
    live.scheduler = torch.optim.lr_scheduler.StepLR(live.optimizer, 1, gamma=0.5)
    for number in range(seed):
        step(live, number)
    return live


def _saved(root: Path) -> Live:
    live, manager = _live(3), manager_of(root)
    live.load(manager)
    metrics = StateComponent("metrics", (lambda: 3, lambda _: None), SharingPattern.GLOBAL)
    live.save(manager, components=[metrics])
    return live


def _parts(live: Live) -> dict[str, str]:
    """Digests; of the optimizer the moments alone: its rate follows the schedule."""
    return live.digests() | {"moments": digest(live.optimizer.state_dict()["state"])}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_left_out_keeps_its_live_state(tmp_path: Path, part: str) -> None:
    """And every other one is restored, but the optimizer without its model."""
    saved = _parts(_saved(tmp_path))
    live, got = _live(1), list[Any]()
    before = _parts(live)
    metrics = StateComponent("metrics", (lambda: 0, got.append), SharingPattern.GLOBAL)
    manager = manager_of(tmp_path, load={"strategy": {part: False}})
    result = live.load(manager, components=[metrics])
    kept = {part, *(["optimizer"] if part == "model" else [])}
    after = _parts(live)
    wanted = {
        "model": ["model.0.weight", "model.0.bias"],
        "optimizer": ["moments"],
        "scheduler": ["scheduler"],
        "rng": [*rng_digests()],
        "iteration": ["counters"],
    }
    for each, names in wanted.items():
        side = before if each in kept else saved
        assert {name: after[name] for name in names} == {name: side[name] for name in names}, each
    assert got == ([] if part == "metrics" else [3])
    assert result.iteration == (0 if part == "iteration" else 3)
    assert kept.isdisjoint({*result.restored} - {"components.metrics"})


def test_a_context_has_a_strategy_of_its_own(tmp_path: Path) -> None:
    """It takes the place of the config's."""
    saved = _saved(tmp_path).digests()
    live = _live(1)
    manager = manager_of(tmp_path, load={"strategy": {"model": False}})
    live.load(manager, strategy=LoadStrategy())
    after = live.digests()
    assert {name for name in saved if after[name] != saved[name]} <= {
        "gradient.0.weight",
        "gradient.0.bias",
    }


def test_without_its_iteration_an_own_checkpoint_is_not_superseded_in_silence(
    tmp_path: Path,
) -> None:
    """A run that counts from 0 again may not prune what it has loaded."""
    _saved(tmp_path)
    live = linear(1)
    manager = manager_of(tmp_path, load={"strategy": {"iteration": False}})
    live.load(manager)
    with pytest.raises(StepRewoundError):
        live.save(manager, 1)


class _Two(nn.Module):
    def __init__(self, first: str = "body", last: str = "head", classes: int = 2) -> None:
        super().__init__()
        self.add_module(first, nn.Linear(3, 4))
        self.add_module(last, nn.Linear(4, classes))


def _two(seed: int, *names: Any) -> Live:
    torch.manual_seed(seed)
    model = _Two(*names)
    live = Live(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    for number in range(seed):
        step(live, number)
    return live


def _state(live: Live, prefix: str) -> dict[str, Any]:
    """Parameters and moments of what is under a prefix, which is cut off."""
    assert isinstance(live.model, nn.Module)
    return {
        name.removeprefix(prefix): [digest(each), digest(live.optimizer.state.get(each, {}))]
        for name, each in live.model.named_parameters()
        if name.startswith(prefix)
    }


def _save_two(root: Path) -> Live:
    live, manager = _two(3), manager_of(root)
    live.load(manager)
    live.save(manager)
    return live


@pytest.mark.parametrize("classes", [2, 5])
def test_ignored_names_keep_value_and_moments(tmp_path: Path, classes: int) -> None:
    """Of another shape or not; the rest is restored, strictly."""
    saved, live = _save_two(tmp_path), _two(1, "body", "head", classes)
    head = _state(live, "head.")
    live.load(manager_of(tmp_path, load={"strategy": {"ignore_keys": ["model.head.*"]}}))
    assert _state(live, "body.") == _state(saved, "body.")
    assert {name: each[0] for name, each in _state(live, "head.").items()} == {
        name: each[0] for name, each in head.items()
    }
    step(live)  # with whatever the optimizer has of it


def test_ignored_names_may_be_missing_on_either_side(tmp_path: Path) -> None:
    """A new head beside a saved one; what is not named must still fit."""
    saved, live = _save_two(tmp_path), _two(0, "body", "other")
    globs = ["model.head.*", "model.other.*"]
    live.load(manager_of(tmp_path, load={"strategy": {"ignore_keys": globs}}))
    assert _state(live, "body.") == _state(saved, "body.")
    with pytest.raises(StateMismatchError, match=r"model\.other\.weight"):
        _two(0, "body", "other").load(
            manager_of(tmp_path, load={"strategy": {"ignore_keys": globs[:1]}})
        )


def test_a_glob_that_matches_nothing_is_an_error_that_lists_what_is_near(tmp_path: Path) -> None:
    """Nothing was touched."""
    _save_two(tmp_path)
    live = _two(1)
    before = live.digests()
    with pytest.raises(
        ConfigError, match=r"model\.haed\.\* matches no name; did you mean model\.head\?"
    ):
        live.load(manager_of(tmp_path, load={"strategy": {"ignore_keys": ["model.haed.*"]}}))
    assert live.digests() == before


@pytest.mark.parametrize(
    "rename", [{"^body": "trunk", "^head": "top"}, [("body", "trunk"), (r"^h(\w+)", "top")]]
)
def test_renamed_parameters_come_with_their_moments_and_groups(tmp_path: Path, rename: Any) -> None:
    """Names of tensors, of optimizer state and of the members of groups."""
    saved, live = _save_two(tmp_path), _two(1, "trunk", "top")
    live.load(manager_of(tmp_path, load={"strategy": {"rename": rename}}))
    assert _state(live, "trunk.") == _state(saved, "body.")
    assert _state(live, "top.") == _state(saved, "head.")


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ({"^bdoy": "trunk"}, "'^bdoy' changes none of the saved names: body"),
        ({"body|head": "one"}, "would all become one."),
    ],
)
def test_a_rename_that_changes_nothing_or_joins_names_is_refused(
    tmp_path: Path, rename: Any, words: str
) -> None:
    """Before anything is touched."""
    _save_two(tmp_path)
    live = _two(1)
    before = live.digests()
    with pytest.raises(ConfigError, match=re.escape(words)):
        live.load(manager_of(tmp_path, load={"strategy": {"rename": rename}}))
    assert live.digests() == before


class _Migrating(_Two):
    """A model that was renamed, and knows how it was called."""

    def __init__(self) -> None:
        super().__init__("trunk", "top")
        register: Any = self.register_load_state_dict_pre_hook  # untyped
        register(self._migrate)

    @staticmethod
    def _migrate(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for old, new in (("body", "trunk"), ("head", "top")):
            for name in [each for each in state if each.startswith(f"{prefix}{old}.")]:
                state[prefix + new + name.removeprefix(prefix + old)] = state.pop(name)


@pytest.mark.parametrize("is_inner", [False, True])
def test_a_hook_of_the_model_that_migrates_names_is_asked(tmp_path: Path, is_inner: bool) -> None:
    """So that old checkpoints load without a setting, moments included."""

    def made(model: nn.Module) -> Live:
        model = nn.Sequential(model) if is_inner else model
        return Live(model, torch.optim.AdamW(model.parameters(), lr=0.1))

    start = "0." if is_inner else ""
    saved, manager = made(_Two()), manager_of(tmp_path)
    step(saved)
    saved.load(manager)
    saved.save(manager)
    live = made(_Migrating())
    live.load(manager_of(tmp_path))
    assert _state(live, f"{start}trunk.") == _state(saved, f"{start}body.")
    assert _state(live, f"{start}top.") == _state(saved, f"{start}head.")


def test_a_hook_is_shown_sizes_and_no_values() -> None:
    """Whatever it makes of values is no new name; a model without hooks is not asked."""
    form = (torch.Size([4, 3]), torch.float32)
    assert migrate_names(_Two(), {"body.weight": form}) == {}
    names = migrate_names(_Migrating(), {"body.weight": form, "other": form})
    assert names == {"body.weight": "trunk.weight"}
    model = _Two()

    def double(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
        assert all(each.is_meta for each in state.values())
        state["twice"] = state.pop("body.weight") * 2

    register: Any = model.register_load_state_dict_pre_hook  # untyped
    register(double)
    assert migrate_names(model, {"body.weight": form}) == {}
