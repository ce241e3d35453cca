"""Kinds are recorded, never guessed: what is saved comes back as what it was."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from holdfast.errors import StateMismatchError, UnsupportedStateError
from holdfast.format.nondense import find_class, is_same, name_of
from holdfast.state.kinds import Kind, kind_of
from tests.support.managers import Live, linear, manager_of
from tests.support.subclasses import Coded, CodedMomentum, Opaque, parts, unusual

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks",
    "ignore:Sparse CSR tensor support is in beta",
    "ignore:torch.quantize_per_tensor",
    "ignore:torch.distributed is disabled",
)
KINDS = [
    "coo", "coo, not coalesced", "csr", "csc", "bsr",
    "per tensor", "per channel", "float parameters", "subclass",
]  # fmt: skip


def _with_buffer(value: torch.Tensor, seed: int = 0) -> Live:
    live = linear(seed)
    assert isinstance(live.model, nn.Module)
    live.model.register_buffer("extra", value)
    return live


def _buffer(live: Live) -> torch.Tensor:
    assert isinstance(live.model, nn.Module)
    found: torch.Tensor = live.model.get_buffer("extra")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_that_is_not_dense_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """Into the live object, which others may hold; and again after another save."""
    saved = _with_buffer(unusual(1)[kind])
    manager = manager_of(tmp_path)
    saved.load(manager)
    saved.save(manager, 1)
    live = _with_buffer(unusual(2)[kind])
    before = _buffer(live)
    assert parts(before) != parts(unusual(1)[kind])
    result = live.load(manager_of(tmp_path))
    assert _buffer(live) is before
    assert parts(before) == parts(unusual(1)[kind])
    assert is_same(before, unusual(1)[kind])
    assert not is_same(before, unusual(2)[kind])
    assert result.restored["model"].tensors == 3


@pytest.mark.parametrize("kind", KINDS)
def test_plain_torch_reads_a_tensor_that_is_not_dense(tmp_path: Path, kind: str) -> None:
    """The metadata of plain DCP says where its container is, which is what torch.save writes."""
    _load_and_save(_with_buffer(unusual(1)[kind]), tmp_path)
    metadata: Any = FileSystemReader(tmp_path / "iter_0000001").read_metadata()
    index = MetadataIndex("model.extra", torch.Size([0] * unusual(1)[kind].dim()))
    place = metadata.storage_data[index]
    content = (tmp_path / "iter_0000001" / place.relative_path).read_bytes()
    container = io.BytesIO(content[place.offset : place.offset + place.length])
    with torch.serialization.safe_globals([Coded]):
        found = torch.load(container, weights_only=True)
    assert parts(found) == parts(unusual(1)[kind])


def test_plain_dcp_reads_a_subclass_into_a_plain_tensor(tmp_path: Path) -> None:
    """As torch's own checkpoint of one would: the values that it shows."""
    _load_and_save(_with_buffer(unusual(1)["subclass"]), tmp_path)
    target = torch.zeros(4, 4)
    with torch.serialization.safe_globals([Coded]):
        dcp.load({"model": {"extra": target}}, checkpoint_id=tmp_path / "iter_0000001")
    assert target.tolist() == unusual(1)["subclass"].decoded().tolist()  # type: ignore[attr-defined]


def test_state_of_a_subclass_comes_back_into_an_optimizer_without_state(tmp_path: Path) -> None:
    """And the next step of both is the same, bit for bit."""
    lives = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        lives.append(Live(model, CodedMomentum(model.parameters())))
    one, other = lives
    _step(one)
    manager = manager_of(tmp_path)
    one.load(manager)
    one.save(manager, 1)
    result = other.load(manager_of(tmp_path))
    assert result.restored["optimizer"].size_bytes == 8 * 8 + 8 + 2 * 4
    for live in lives:
        _step(live)
    assert isinstance(one.model, nn.Module)
    assert isinstance(other.model, nn.Module)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    states = [list(each.optimizer.state.values()) for each in lives]
    for mine, theirs in zip(*states, strict=True):
        assert type(theirs["momentum"]) is Coded
        assert is_same(mine["momentum"], theirs["momentum"])
        assert mine["step"] == theirs["step"] == 2


def _step(live: Live) -> None:
    assert isinstance(live.model, nn.Module)
    live.optimizer.zero_grad()
    (live.model(torch.arange(8.0)) - 1).square().mean().backward()
    live.optimizer.step()


@pytest.mark.parametrize(
    ("saved", "live", "words"),
    [
        ("coo", "csr", "a sparse_coo tensor, here a sparse_csr tensor"),
        ("coo", None, "a sparse_coo tensor, here a dense tensor"),
        (None, "coo", "a dense tensor, here a sparse_coo tensor"),
        ("subclass", None, "a Coded, here a dense tensor"),
        (None, "subclass", "a dense tensor, here a Coded"),
        ("per tensor", None, "a quantised tensor, here a dense tensor"),
    ],
)
def test_another_kind_in_the_model_is_refused_before_anything_is_touched(
    tmp_path: Path, saved: str | None, live: str | None, words: str
) -> None:
    """Whether `strict` or not: no copy would give the value back as it was."""
    values = [torch.zeros(4, 4) if each is None else unusual()[each] for each in (saved, live)]
    there, here = map(_with_buffer, values)
    manager = manager_of(tmp_path)
    there.load(manager)
    there.save(manager, 1)
    before = here.digests() if live is None else None
    with pytest.raises(StateMismatchError, match=f"model.extra is {words}"):
        here.load(manager_of(tmp_path, load={"strict": False}))
    assert before is None or here.digests() == before


def test_a_class_that_is_not_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file never imports a module; the message says which to import."""
    live = Live(model := nn.Linear(8, 8), CodedMomentum(model.parameters()))
    _step(live)
    _load_and_save(live, tmp_path)
    monkeypatch.setattr("holdfast.state.targets.find_class", lambda _: None)
    with pytest.raises(StateMismatchError, match=r"tests\.support\.subclasses is not loaded"):
        live.load(manager_of(tmp_path))


class _Keeper(nn.Module):
    """A module whose extra state is whatever it was given."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.kept = kept

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def _unusual_values(seed: int) -> dict[str, Any]:
    expanded = torch.full((1,), float(seed)).expand(3)
    return {**unusual(seed), "expanded": expanded, "plain": torch.ones(2)}


@pytest.mark.parametrize("is_nested", [False, True])
def test_extra_state_of_any_kind_comes_back(tmp_path: Path, is_nested: bool) -> None:
    """Tensors that are not dense, alone and in containers."""
    values = _unusual_values(1)

    def build(kept: Any) -> Live:
        each = [{"in": [kept]}] if is_nested else list(kept.values())
        model = nn.ModuleList(map(_Keeper, each))
        model.append(nn.Linear(2, 2))
        return Live(model, None)

    live = build(values)
    manager = manager_of(tmp_path)
    live.load(manager)
    live.save(manager, 1)
    other = build(dict.fromkeys(values))
    other.load(manager_of(tmp_path))
    models: Any = other.model
    found = models[0].kept["in"][0] if is_nested else dict(zip(values, models, strict=False))
    for kind, value in values.items():
        back = found[kind] if is_nested else found[kind].kept
        assert parts(back) == parts(value), kind
        assert kind != "expanded" or back.stride() == value.stride()


def test_nested_optimizer_state_of_any_kind_comes_back(tmp_path: Path) -> None:
    """Into an optimizer that has no state yet."""
    values = _unusual_values(2)

    def build() -> Live:
        model = nn.Linear(2, 2)
        return Live(model, torch.optim.SGD(model.parameters(), lr=0.1))

    live = build()
    manager = manager_of(tmp_path)
    live.load(manager)
    live.optimizer.state[live.model.weight] = {"in": [values]}  # type: ignore[union-attr]
    live.save(manager, 1)
    other = build()
    other.load(manager_of(tmp_path))
    found = other.optimizer.state[other.model.weight]["in"][0]  # type: ignore[union-attr]
    assert {kind: parts(each) for kind, each in found.items()} == {
        kind: parts(each) for kind, each in values.items()
    }


class _Marked(nn.Parameter):
    """A parameter with attributes, as trainers define them."""


def test_a_subclass_of_parameter_is_saved_as_one(tmp_path: Path) -> None:
    """At every save, the ones that follow the first included."""
    live, other = linear(), linear()
    manager = manager_of(tmp_path)
    for each in (live, other):
        assert isinstance(each.model, nn.Module)
        each.model.marked = _Marked(torch.zeros(3))
        each.optimizer = torch.optim.SGD(each.model.parameters(), lr=0.1)
    live.load(manager)
    for step in (1, 2):
        live.model.marked.data.fill_(step)  # type: ignore[union-attr, operator]
        live.save(manager, step)
    other.load(manager_of(tmp_path))
    assert other.model.marked.tolist() == [2.0] * 3  # type: ignore[union-attr, operator]


def test_a_model_without_tensors_is_saved_and_loaded(tmp_path: Path) -> None:
    """As a stage of a pipeline without a layer, or a stub."""
    for found in (False, True):
        live = Live(nn.Sequential(nn.ReLU()), None)
        manager = manager_of(tmp_path)
        live.load(manager)
        assert live.state.train_state.step == int(found)
        if not found:
            live.save(manager, 1)


def test_a_class_is_found_among_loaded_modules_alone() -> None:
    """By its module and its name there; nothing else than a tensor class is found."""
    assert find_class(name_of(Coded)) is Coded
    assert find_class("tests.support.subclasses.CodedMomentum") is None
    assert find_class("antigravity.Coded") is None
    assert find_class("os.system") is None


def test_what_cannot_be_taken_apart_is_refused_at_the_save(tmp_path: Path) -> None:
    """By name, with the reason."""
    for value, words in (
        (torch.ones(2).as_subclass(Opaque), "a Opaque, a tensor type without __tensor_flatten__"),
        (torch.ones(2, 2).to_mkldnn(), "of the layout torch._mkldnn"),
        (Coded.of(torch.ones(2), note=object()), "a Coded, which torch.save and weights-only"),
    ):
        live = _with_buffer(value)
        with pytest.raises(UnsupportedStateError, match=f"model.extra is {words}"):
            _load_and_save(live, tmp_path)


def _load_and_save(live: Live, path: Path) -> None:
    manager = manager_of(path)
    live.load(manager)
    live.save(manager, 1)


# -- expanded ------------------------------------------------------------------------------------


def test_an_expanded_buffer_comes_back_into_an_expanded_one(tmp_path: Path) -> None:
    """One element in memory for many: it keeps that memory, which others may share."""
    base = torch.arange(3.0).view(3, 1)
    saved = _with_buffer(base.expand(3, 4))
    manager = manager_of(tmp_path)
    saved.load(manager)
    saved.save(manager, 1)
    memory = torch.zeros(3, 1)
    live = _with_buffer(memory.expand(3, 4))
    live.load(manager_of(tmp_path))
    assert memory.tolist() == base.tolist()
    assert _buffer(live).tolist() == base.expand(3, 4).tolist()
    assert _buffer(live).stride() == (1, 0)
    whole = _with_buffer(torch.zeros(3, 4))
    whole.load(manager_of(tmp_path))
    assert _buffer(whole).tolist() == base.expand(3, 4).tolist()


def test_values_that_differ_do_not_go_into_an_expanded_buffer(tmp_path: Path) -> None:
    """Only what was one element is known to fit into one."""
    saved = _with_buffer(torch.arange(12.0).view(3, 4))
    manager = manager_of(tmp_path)
    saved.load(manager)
    saved.save(manager, 1)
    live = _with_buffer(torch.zeros(3, 1).expand(3, 4))
    with pytest.raises(StateMismatchError, match="a dense tensor, here an expanded tensor"):
        live.load(manager_of(tmp_path))


def test_a_buffer_that_is_no_longer_expanded_is_described_again(tmp_path: Path) -> None:
    """Its kind is of the present save, also where its address and size are as before."""
    memory = torch.zeros(16)
    live = _with_buffer(memory[:1].expand(4, 4))
    manager = manager_of(tmp_path)
    live.load(manager)
    live.save(manager, 1)
    assert isinstance(live.model, nn.Module)
    live.model.extra = memory.view(4, 4)
    memory.copy_(torch.arange(16.0))
    live.save(manager, 2)
    again = _with_buffer(torch.ones(1).expand(4, 4))
    with pytest.raises(StateMismatchError, match="here an expanded tensor"):
        again.load(manager_of(tmp_path))


# -- the record ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_read_back_from_its_json(kind: str) -> None:
    """Canonical JSON, in which equal kinds are equal."""
    one, other = unusual(1)[kind], unusual(2)[kind]
    assert kind_of(one) == kind_of(other) == Kind.of(one).to_json()
    assert Kind.parse(kind_of(one)) == Kind.of(one)


def test_kinds_of_plain_values() -> None:
    """The common ones, as they are in a file; nothing recorded is no kind."""
    assert json.loads(kind_of(torch.ones(2))) == {
        "type": "tensor", "device": "cpu", "layout": "strided",
    }  # fmt: skip
    assert kind_of(nn.Parameter(torch.ones(2))) == kind_of(torch.ones(3, 4).t())
    assert kind_of(1) == kind_of("text") == '{"type":"value"}'
    assert Kind.parse("") is None
    assert Kind.parse('{"type":"tensor","device":"cpu","layout":"strided","later":1}') == Kind.of(
        torch.ones(1)
    )
    found: Any = json.loads(kind_of(torch.ones(1, 2).expand(3, 2)))
    assert found["expanded"] == [0]
