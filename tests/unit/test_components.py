"""Components: what may be declared, what comes back, and that nothing of it is lost in silence."""

from __future__ import annotations

import collections
import gc
import json
import logging
import random
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from holdfast import SharingPattern, StateComponent
from holdfast.errors import (
    ConfigError,
    CorruptCheckpointError,
    NothingLoadedError,
    StageFailedError,
    StateMismatchError,
    UnsupportedStateError,
    WrongArgumentError,
)
from holdfast.manager import DefaultCheckpointManager
from holdfast.state.codec import canonical
from holdfast.state.component_load import read_frames
from tests.support.managers import Live, linear, manager_of, step
from tests.support.states import digest

GLOBAL, PER_RANK = SharingPattern.GLOBAL, SharingPattern.PER_RANK
SHARDED, REPLICATED = SharingPattern.SHARDED, SharingPattern.REPLICATED


class Box:
    """Any object with a state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def _saved(root: Path, *components: StateComponent, number: int = 1, **config: Any) -> Live:
    """Save one checkpoint with components in a run of its own manager."""
    live, manager = linear(), manager_of(root, **config)
    live.load(manager)
    live.save(manager, number, components=components)
    manager.finalize_async_saves(live.state, blocking=True, terminate=True)
    return live


def _loaded(root: Path, *components: StateComponent, **config: Any) -> DefaultCheckpointManager:
    manager = manager_of(root, **config)
    assert linear(1).load(manager, components=components).found
    return manager


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": ""}, "name is ''"),
        ({"name": "a.b"}, "name is 'a.b'"),
        ({"name": "a@1"}, "name is 'a@1'"),
        ({"name": 3}, "name is 3"),
        ({"name": "optimizer"}, "a built-in component"),
        ({"name": "rng"}, "a built-in component"),
        ({"sharing": "global"}, "Use a holdfast.SharingPattern: GLOBAL"),
        ({"value": object()}, "which has no state_dict and load_state_dict"),
        ({"value": None}, "is None, which has no state_dict"),
        ({"value": Box}, "the class Box, not an object of it"),
        ({"value": (print,)}, "pair of functions"),
        ({"value": (print, 3)}, "pair of functions"),
        ({"sharing": SharingPattern.PER_GROUP}, "PER_GROUP needs the group of this rank"),
        ({"group": [0]}, "is given, and its pattern is GLOBAL"),
        ({"sharing": SharingPattern.PER_GROUP, "group": -100}, "a list of its ranks"),
        ({"sharing": SharingPattern.PER_GROUP, "group": []}, "a list of its ranks"),
        ({"sharing": SharingPattern.PER_GROUP, "group": [1, 1]}, "a list of its ranks"),
        ({"in_local_saves": False}, "no local checkpoint could be loaded"),
    ],
)
def test_a_wrong_declaration_is_refused_when_it_is_made(values: dict[str, Any], words: str) -> None:
    """By the argument's name, with what to pass instead."""
    given: Any = {"name": "thing", "value": Box(), "sharing": GLOBAL} | values
    with pytest.raises(WrongArgumentError, match="StateComponent: ") as refusal:
        StateComponent(**given)
    assert words in str(refusal.value)


def test_wrong_components_of_a_context_are_refused(tmp_path: Path) -> None:
    """Two of one name, what is no component, and no list."""
    live, manager = linear(), manager_of(tmp_path)
    twice = [StateComponent("a", Box(), GLOBAL), StateComponent("a", Box(), PER_RANK)]
    for wrong, words in ((twice, "two of the name a"), ([Box()], "a Box"), (3, "a list")):
        for call in (live.save, live.load):
            with pytest.raises(WrongArgumentError, match=words):
                call(manager, components=wrong)
    live.load(manager)  # no refused call has left anything behind


def _generators(seed: int) -> dict[str, Any]:
    kinds = (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64)
    found: dict[str, Any] = {each.__name__: np.random.Generator(each(seed)) for each in kinds}
    found |= {"legacy": np.random.RandomState(seed), "python": random.Random(seed)}
    return found | {"torch": torch.Generator().manual_seed(seed)}


def _draw(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return torch.rand(3, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1) for _ in range(3)]
    return generator.normal(size=3).tolist()


def test_generators_are_components_as_they_are(tmp_path: Path) -> None:
    """Numpy's, torch's and python's draw after the load what they would have drawn."""
    before, after = _generators(1), _generators(2)
    for each in before.values():
        _draw(each)
    _saved(tmp_path, *(StateComponent(name, each, PER_RANK) for name, each in before.items()))
    wanted = {name: _draw(each) for name, each in before.items()}
    _loaded(tmp_path, *(StateComponent(name, each, PER_RANK) for name, each in after.items()))
    assert {name: _draw(each) for name, each in after.items()} == wanted


NESTED = {
    "numbers": [1, 2.5, True, None, "text", b"bytes", 1 << 80, float("inf")],
    "pair": (1, (2, 3)),
    "ordered": collections.OrderedDict(b=1, a=2),
    3: {"tensor": torch.tensor([1.0, float("nan"), -0.0], dtype=torch.bfloat16)},
    "list": [torch.arange(3), {"inner": torch.tensor(True)}, torch.empty(0, 2)],
    "tuple": (torch.tensor(7, dtype=torch.uint8), "x"),
    "set": {1, 2},
    "sparse": torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("sharing", [GLOBAL, PER_RANK, REPLICATED, SharingPattern.PER_NODE])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_any_state_comes_back(tmp_path: Path, sharing: SharingPattern, asynchronous: bool) -> None:
    """Containers, plain values and tensors of any type, also those that change before the write."""
    box = Box(NESTED)
    live, manager = linear(), manager_of(tmp_path, async_save=asynchronous)
    live.load(manager)
    for number in (1, 2):  # the second one follows the plan of the first
        live.save(manager, number, components=[StateComponent("box", box, sharing)])
    manager.finalize_async_saves(live.state, blocking=True, terminate=True)
    other = Box()
    manager = manager_of(tmp_path)
    result = linear(1).load(manager, components=[StateComponent("box", other, sharing)])
    sparse, numbers = other.state.pop("sparse"), other.state.pop("set")
    assert sparse.is_sparse
    assert sparse.to_dense().tolist() == torch.eye(3).tolist()
    assert numbers == {1, 2}
    rest = {key: each for key, each in NESTED.items() if key not in ("sparse", "set")}
    assert digest(other.state) == digest(rest)
    assert list(map(type, other.state["numbers"])) == list(map(type, NESTED["numbers"]))
    assert type(other.state["ordered"]) is collections.OrderedDict
    assert type(other.state["tuple"]) is tuple
    assert result.restored["components.box"].tensors == 6


@pytest.mark.parametrize("state", [torch.arange(4), 3, [], {}, None, "text"])
def test_a_state_need_be_no_dict(tmp_path: Path, state: Any) -> None:
    """A pair of functions may return a tensor, a number, or nothing at all."""
    given: list[Any] = []
    _saved(tmp_path, StateComponent("pair", (lambda: state, given.append), GLOBAL))
    _loaded(tmp_path, StateComponent("pair", (lambda: 0, given.append), GLOBAL))
    assert len(given) == 1
    assert digest(given[0]) == digest(state)


@pytest.mark.parametrize("sharing", SharingPattern)
def test_an_averaged_model_goes_on(tmp_path: Path, sharing: SharingPattern) -> None:
    """Its tensors are filled in place, its count of updates too."""

    def averaged(seed: int) -> tuple[Live, AveragedModel]:
        live = linear(seed)
        assert isinstance(live.model, nn.Module)
        average: Any = get_ema_multi_avg_fn  # untyped
        return live, AveragedModel(live.model, multi_avg_fn=average(0.9))

    live, average = averaged(1)
    for number in range(3):
        step(live, number)
        average.update_parameters(live.model)  # type: ignore[arg-type]
    group = [0] if sharing is SharingPattern.PER_GROUP else None
    manager = manager_of(tmp_path)
    live.load(manager)
    live.save(manager, 1, components=[StateComponent("ema", average, sharing, group)])
    again, other = averaged(2)
    places = {name: each.data_ptr() for name, each in other.state_dict().items()}
    again.load(manager_of(tmp_path), components=[StateComponent("ema", other, sharing, group)])
    assert digest(other.state_dict()) == digest(average.state_dict())
    assert {name: each.data_ptr() for name, each in other.state_dict().items()} == places


def test_a_module_of_another_shape_is_refused_untouched(tmp_path: Path) -> None:
    """As the model itself would be: by name, with both sizes, before anything is changed."""
    _saved(tmp_path, StateComponent("ema", nn.Linear(4, 2), SHARDED))
    other, smaller, live = nn.Linear(5, 2), nn.Linear(4, 2, bias=False), linear(1)
    before = live.digests(), digest(other.state_dict())
    with pytest.raises(StateMismatchError, match=r"components\.ema\.weight is \[2, 4\]"):
        live.load(manager_of(tmp_path), components=[StateComponent("ema", other, SHARDED)])
    with pytest.raises(StateMismatchError, match=r"components\.ema\.bias was saved"):
        live.load(manager_of(tmp_path), components=[StateComponent("ema", smaller, SHARDED)])
    assert (live.digests(), digest(other.state_dict())) == before


def test_a_required_component_that_was_not_saved_is_refused_whatever_strict_says(
    tmp_path: Path,
) -> None:
    """Forgather's manager made it a warning and trained on without it."""
    _saved(tmp_path)
    live, box = linear(1), Box("live")
    before = live.digests()
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"components\.box is required"):
            live.load(
                manager_of(tmp_path),
                strict=strict,
                components=[StateComponent("box", box, GLOBAL)],
            )
    assert live.digests() == before
    _loaded(
        tmp_path,
        StateComponent("box", box, GLOBAL),
        load={"override": ["components.box"]},
    )
    assert box.state == "live"


def test_an_optional_component_that_was_not_saved_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps its live state, and a warning says so."""
    _saved(tmp_path)
    box = Box("live")
    _loaded(tmp_path, StateComponent("box", box, GLOBAL, required=False))
    assert box.state == "live"
    assert "holds no components.box: it is as it was" in caplog.text


def test_state_without_its_object_waits_and_is_given_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A logger that is built after the load gets the run id of its last start."""
    _saved(tmp_path, StateComponent("logger", Box({"id": "run-7", "n": torch.ones(2)}), GLOBAL))
    manager, box = _loaded(tmp_path), Box()
    assert manager.restore_component(StateComponent("logger", box, GLOBAL)) is True
    assert digest(box.state) == digest({"id": "run-7", "n": torch.ones(2)})
    optional = StateComponent("logger", Box("new"), GLOBAL, required=False)
    assert manager.restore_component(optional) is False
    with pytest.raises(NothingLoadedError, match=r"no components\.logger that waits"):
        manager.restore_component(StateComponent("logger", Box("new"), GLOBAL))
    assert caplog.text == ""


def test_restore_component_before_and_after_a_load_that_finds_nothing(tmp_path: Path) -> None:
    """Before: an error. After: nothing to give, as on every fresh start."""
    manager, component = manager_of(tmp_path), StateComponent("box", Box("new"), GLOBAL)
    with pytest.raises(NothingLoadedError, match="call load first"):
        manager.restore_component(component)
    linear().load(manager)
    assert manager.restore_component(component) is False


def test_what_nobody_asked_for_is_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Through any number of starts, named in one warning each."""
    state = {"id": "run-7", "n": torch.ones(2)}
    _saved(tmp_path, StateComponent("logger", Box(state), PER_RANK))
    for number in (2, 3):
        live, manager = linear(number), manager_of(tmp_path)
        live.load(manager)
        caplog.clear()
        for offset in (0, 1):
            live.save(manager, 10 * number + offset)
        assert caplog.text.count("held components.logger, and nothing has asked for it") == 1
    box = Box()
    _loaded(tmp_path, StateComponent("logger", box, PER_RANK))
    assert digest(box.state) == digest(state)


def test_a_state_that_waits_is_not_saved_over(tmp_path: Path) -> None:
    """A component given to save and not to load would replace its own state by a fresh one."""
    _saved(tmp_path, StateComponent("logger", Box("run-7"), GLOBAL))
    live, manager, box = linear(1), manager_of(tmp_path), Box("fresh")
    live.load(manager)
    component = StateComponent("logger", box, GLOBAL)
    with pytest.raises(WrongArgumentError, match="restore_component"):
        live.save(manager, 2, components=[component])
    manager.restore_component(component)
    live.save(manager, 2, components=[component])
    assert box.state == "run-7"


def test_override_leaves_a_component_out_for_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither given, nor kept, nor saved again; an unknown name is an error."""
    _saved(tmp_path, StateComponent("old", Box(1), GLOBAL), StateComponent("new", Box(2), GLOBAL))
    box, live = Box("live"), linear(1)
    manager = manager_of(tmp_path, load={"override": ["components.old", "components.new"]})
    live.load(manager, components=[StateComponent("new", box, GLOBAL)])
    assert box.state == "live"
    assert manager.restore_component(StateComponent("old", Box(), GLOBAL)) is False
    live.save(manager, 2)
    assert caplog.text == ""
    manifest = (tmp_path / "iter_0000002/manifest.json").read_text()
    assert '"components"' not in manifest
    with pytest.raises(ConfigError, match=r"components\.nwe; known are .*train_state"):
        linear().load(manager_of(tmp_path, load={"override": ["components.nwe"]}))


def test_a_state_that_only_code_could_read_is_refused_at_the_load(tmp_path: Path) -> None:
    """Of a fresh run, long before the first save; and at the save, if it changes until then."""
    live, manager, box = linear(), manager_of(tmp_path), Box({"fine": [1, Path("x")]})
    component = StateComponent("box", box, GLOBAL)
    with pytest.raises(UnsupportedStateError, match=r"components\.box\.fine\[1\] is a pathlib"):
        live.load(manager, components=[component])
    box.state = {}
    live.load(manager, components=[component])
    box.state = {"fine": [1, Path("x")]}
    with pytest.raises(UnsupportedStateError, match=r"components\.box\.fine\[1\] is a pathlib"):
        live.save(manager, 1, components=[component])
    box.state = {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}
    with pytest.raises(UnsupportedStateError, match=r"two tensors of component box"):
        live.save(manager, 1, components=[component])


@pytest.mark.parametrize(
    ("saved", "declared", "fits"),
    [
        (GLOBAL, REPLICATED, True),
        (REPLICATED, GLOBAL, True),
        (GLOBAL, PER_RANK, False),
        (PER_RANK, REPLICATED, False),
        (PER_RANK, SharingPattern.PER_NODE, False),
    ],
)
def test_another_pattern_than_the_saved_one_is_refused_and_not_unfindable(
    tmp_path: Path, saved: SharingPattern, declared: SharingPattern, fits: bool
) -> None:
    """Forgather looked for the file name of the declared pattern, found none and went on."""
    _saved(tmp_path, StateComponent("box", Box(1), saved))
    box = Box()
    if fits:
        _loaded(tmp_path, StateComponent("box", box, declared))
        assert box.state == 1
        return
    with pytest.raises(StateMismatchError, match=f"was saved as {saved.name}, and is declared"):
        _loaded(tmp_path, StateComponent("box", box, declared, required=False))
    manager = _loaded(tmp_path)
    with pytest.raises(StateMismatchError, match=f"was saved as {saved.name}, and is declared"):
        manager.restore_component(StateComponent("box", box, declared))
    assert box.state is None


def test_a_component_may_be_left_out_of_local_saves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both tiers hold a save to both; one to the local tier alone lacks it, and is loaded."""
    live, box = linear(), Box("far")
    tiers: Any = {"local": {"directory": str(tmp_path / "local")}}
    component = StateComponent("box", box, GLOBAL, required=False, in_local_saves=False)
    manager = manager_of(tmp_path / "store", **tiers)
    live.load(manager)
    for number in (1, 2):
        live.save(manager, number, components=[component], non_persistent_ckpt=number == 2)
    manager.finalize_async_saves(live.state, blocking=True, terminate=True)
    box.state = "live"
    again = manager_of(tmp_path / "store", **tiers)
    assert linear(1).load(again, components=[component]).iteration == 2
    again.finalize_async_saves(live.state, blocking=True, terminate=True)
    assert box.state == "live"
    assert "holds no components.box" in caplog.text
    again = manager_of(tmp_path / "store", load={"step": 1})
    assert linear(1).load(again, components=[component]).iteration == 1
    assert box.state == "far"


def test_an_older_reader_is_told_that_it_would_leave_components_out(tmp_path: Path) -> None:
    """The manifest requires the feature where there are components, and only there."""
    for name, components in (("with", [StateComponent("box", Box(1), GLOBAL)]), ("without", [])):
        _saved(tmp_path / name, *components)
        text = (tmp_path / name / "iter_0000001/manifest.json").read_text()
        requires = json.loads(text.rpartition("\n")[0].rpartition("\n")[0])["requires"]
        assert requires == ["per_rank", *(["components"] if components else [])]


def test_a_run_that_starts_from_weights_takes_no_component(tmp_path: Path) -> None:
    """Its components are fresh, and none waits."""
    _saved(tmp_path / "base", StateComponent("box", Box("parent"), GLOBAL))
    live, box = linear(1), Box("fresh")
    manager = manager_of(
        tmp_path / "own", load={"pretrained": {"directory": str(tmp_path / "base")}}
    )
    component = StateComponent("box", box, GLOBAL)
    assert live.load(manager, components=[component]).is_pretrained
    assert manager.restore_component(StateComponent("other", Box(), GLOBAL)) is False
    live.save(manager, 1, components=[component])
    assert box.state == "fresh"


def test_a_file_is_restored_where_there_is_none_and_never_overwritten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tokenizer comes back byte for byte; an edited one stays, and a warning names it."""
    source, target = tmp_path / "tokenizer.json", tmp_path / "new" / "tokenizer.json"
    source.write_bytes(b"\x00 words")
    empty = tmp_path / "empty"
    empty.touch()
    store = tmp_path / "store"
    _saved(store, StateComponent.file("tokenizer", source), StateComponent.file("nothing", empty))
    _loaded(store, StateComponent.file("tokenizer", target))
    assert target.read_bytes() == b"\x00 words"
    assert caplog.text == ""
    target.write_bytes(b"edited")
    manager = _loaded(store)
    manager.restore_component(StateComponent.file("tokenizer", target))
    assert target.read_bytes() == b"edited"
    assert "tokenizer.json is left as it is" in caplog.text
    manager.restore_component(StateComponent.file("nothing", tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == b""
    assert [each.name for each in target.parent.iterdir()] == ["tokenizer.json"]


def test_a_file_that_changes_is_saved_as_it_is_now(tmp_path: Path) -> None:
    """One that does not is not read again."""
    source = tmp_path / "vocabulary"
    source.write_text("a")
    component = StateComponent.file("words", source)
    assert component.read()["content"] is component.read()["content"]
    source.write_text("ab")
    assert component.read()["content"].tolist() == [97, 98]
    source.unlink()
    live, manager = linear(), manager_of(tmp_path / "store")
    live.load(manager, components=[component])  # a load may be what brings it
    with pytest.raises(StageFailedError, match="vocabulary"):
        live.save(manager, 1, components=[component])


def test_load_without_model_and_optimizer_restores_components(tmp_path: Path) -> None:
    """But for those that are divided as the model is."""
    _saved(
        tmp_path,
        StateComponent("box", Box({"t": torch.ones(2)}), GLOBAL),
        StateComponent("ema", nn.Linear(2, 2), SHARDED),
    )
    box, ema = Box(), nn.Linear(2, 2)
    before = digest(ema.state_dict())
    components = [StateComponent("box", box, GLOBAL), StateComponent("ema", ema, SHARDED)]
    linear(1).load(manager_of(tmp_path), skip_load_to_model_and_opt=True, components=components)
    assert digest(box.state) == digest({"t": torch.ones(2)})
    assert digest(ema.state_dict()) == before


def test_sharded_state_without_its_object_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It cannot wait, since only an object says which part a rank needs."""
    _saved(tmp_path, StateComponent("ema", nn.Linear(2, 2), SHARDED))
    caplog.set_level(logging.WARNING)
    _loaded(tmp_path)
    assert "holds components.ema, which is sharded, and this load was given no object" in (
        caplog.text
    )


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"x", "y", "z"}, {"z", "y", "x"}, True),
        ([1, 2], (1, 2), False),
        (["ab", "c"], ["a", "bc"], False),
        (1, 1.0, False),
        (1, True, False),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        ({"a": [1]}, {"a": [1, 2]}, False),
        ([[1], 2], [[1, 2]], False),
    ],
)
def test_equal_values_have_equal_bytes(one: Any, other: Any, equal: bool) -> None:
    """Whatever the order of a dict or set is; and no two different ones have the same."""
    assert (canonical(one) == canonical(other)) is equal


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sharing": None}, "holds no component where components.box should be"),
        ({"sharing": "woven"}, "'woven' is not a valid SharingPattern"),
        ({"members": ["a"]}, "holds no component"),
        ({"tensors": [["x"]]}, "holds no component"),
        ({"tensors": [[["x"], "components.box.y"]]}, "lacks components.box.y"),
    ],
)
def test_a_malformed_record_is_damage_of_the_checkpoint(
    changes: dict[str, Any], words: str
) -> None:
    """Though its bytes match their digest; a record of no component is none of ours."""
    frame: dict[str, Any] = {
        "sharing": "global",
        "members": None,
        "state": {"x": None},
        "tensors": [],
    }
    frame["tensors"] = [[["x"], "components.box.x"]]
    tensors = {"components.box.x"}
    (found,) = read_frames({"components.box": frame, "rng": {}}, tensors, "there")["box"]
    assert found.tensors == {("x",): "components.box.x"}
    with pytest.raises(CorruptCheckpointError, match=re.escape(words)):
        read_frames({"components.box": frame | changes}, tensors, "there")


def test_a_damaged_component_is_damage_though_it_is_optional(tmp_path: Path) -> None:
    """Forgather logged a truncated optional file, and trained on without it."""
    mark = b"state of an optional component"
    live, manager, box = linear(), manager_of(tmp_path), Box()
    component = StateComponent("box", box, GLOBAL, required=False)
    live.load(manager, components=[component])
    for number in (1, 2):
        box.state = {"mark": mark, "number": number}
        live.save(manager, number, components=[component])
    shard = tmp_path / "iter_0000002/__0_0.distcp"
    content = shard.read_bytes()
    assert content.count(mark) == 1
    shard.chmod(0o600)
    shard.write_bytes(content.replace(mark, mark[::-1]))
    result = linear(1).load(manager_of(tmp_path), components=[component])
    assert (result.iteration, box.state["number"]) == (1, 1)
    assert "does not match its digest" in result.skipped[0].reason


def test_what_waits_keeps_no_live_object_alive(tmp_path: Path) -> None:
    """A manager lives as long as the run; the model that a load was given need not."""
    _saved(tmp_path, StateComponent("box", Box(1), GLOBAL))
    live, manager = linear(1), manager_of(tmp_path)
    live.load(manager)
    model = weakref.ref(live.model)
    del live
    gc.collect()
    assert model() is None
    assert manager.restore_component(StateComponent("box", Box(), GLOBAL))
