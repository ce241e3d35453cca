"""The items of a state are those of the state as it is now."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import UnsupportedStateError
from holdfast.format.items import Inventory, Itemizer
from holdfast.format.layout import Item
from tests.support.tensors import bits

Paths = dict[str, tuple[str | int, ...]]


def _describe(itemizer: Itemizer, leaves: dict[str, Any], paths: Paths | None = None) -> Inventory:
    return itemizer.describe(leaves, paths or {name: ("model", name) for name in leaves})


def _loaded(content: bytes) -> str:
    found = torch.load(io.BytesIO(content), weights_only=True)
    return repr((found, found.layout) if isinstance(found, Tensor) else found)


def _is_fresh(found: Inventory, leaves: dict[str, Any], paths: Paths | None = None) -> None:
    """Hold a description against that of an itemizer which has seen nothing else.

    The slots of values may differ: they were made for what they held first.
    """
    fresh = _describe(Itemizer(), leaves, paths)

    def rows(inventory: Inventory) -> list[tuple[Any, ...]]:
        return [
            (
                each.name, each.path, each.dtype, each.size, each.offsets, each.lengths,
                each.alias_of, _loaded(source) if isinstance(source, bytes) else bits(source),
            )
            for each, source in zip(inventory.items, inventory.sources, strict=True)
        ]  # fmt: skip

    assert rows(found) == rows(fresh)
    if all(each.capacity_bytes == 0 for each in found.items):
        assert found.structure == fresh.structure


def test_a_tensor_is_one_item() -> None:
    """A tensor is described by name, keys, type and size, and is its own source."""
    weight = torch.rand(3, 4)
    found = Itemizer().describe({"model.w": weight}, {"model.w": ("model", "w")})
    assert list(found.items) == [
        Item("model.w", ("model", "w"), torch.float32, (3, 4), (0, 0), (3, 4))
    ]
    (source,) = found.sources
    assert isinstance(source, Tensor)
    assert source.data_ptr() == weight.data_ptr()


def test_a_value_is_what_torch_saves() -> None:
    """A value's source is a container of torch's, with room to grow in its slot."""
    found = _describe(Itemizer(), {"note": {"a": [1, "two"]}})
    (item,), (content,) = found.items, found.sources
    assert isinstance(content, bytes)
    assert item.dtype is None
    assert item.capacity_bytes % 64 == 0
    assert len(content) == item.capacity_bytes
    assert torch.load(io.BytesIO(content), weights_only=True) == {"a": [1, "two"]}


_BASE = torch.rand(4, 4)
_WAVES = torch.view_as_complex(torch.rand(4, 4, 2))
TWINS: dict[str, tuple[Tensor, Tensor, bool]] = {
    "the same": (_BASE, _BASE, True),
    "the same memory": (_BASE, _BASE.detach().view(4, 4), True),
    "a parameter": (_BASE, nn.Parameter(_BASE, requires_grad=False), True),
    "equal values": (_BASE, _BASE.clone(), False),
    "turned": (_BASE, _BASE.t(), False),
    "a part": (_BASE, _BASE[:2], False),
    "another shape": (_BASE, _BASE.view(16), False),
    "another type": (_BASE, _BASE.view(torch.int32), False),
    "conjugated": (_WAVES, _WAVES.conj(), False),
    "negated": (_BASE, torch._neg_view(_BASE), False),
    "both conjugated": (_WAVES.conj(), _WAVES.conj(), True),
    "without elements": (torch.empty(0, 3), torch.empty(0, 3), False),
}


@pytest.mark.parametrize("name", TWINS)
def test_only_the_same_bytes_are_tied(name: str) -> None:
    """Two names are one item's bytes where they look at the same memory in the same way."""
    one, other, is_tied = TWINS[name]
    found = _describe(Itemizer(), {"one": one, "other": other})
    assert [each.alias_of for each in found.items] == [None, "one" if is_tied else None]


# -- from one description to the next ------------------------------------------------------------


def _base() -> Tensor:
    return torch.arange(16.0).reshape(4, 4)


def _leaves() -> dict[str, Any]:
    twin = _base()
    waves = torch.view_as_complex(torch.rand(4, 4, 2))
    return {
        "a": _base(),
        "b": nn.Parameter(_base()),
        "twin": twin,
        "other twin": twin,
        "square": _base(),
        "waves": waves,
        "other waves": waves,
        "number": 1,
        "text": "short",
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.0),
    }


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda leaves: None,
    "values": lambda leaves: leaves["a"].add_(1),
    "another tensor": lambda leaves: leaves.update(a=_base() * 2),
    "another shape": lambda leaves: leaves.update(a=torch.rand(2, 8)),
    "another type": lambda leaves: leaves.update(a=_base().double()),
    "another shape in place": lambda leaves: leaves.update(a=leaves["a"].view(2, 8)),
    "another type in place": lambda leaves: leaves.update(a=leaves["a"].view(torch.int32)),
    "turned": lambda leaves: leaves.update(square=leaves["square"].t()),
    "a parameter": lambda leaves: leaves.update(a=nn.Parameter(_base())),
    "no parameter": lambda leaves: leaves.update(b=leaves["b"].detach()),
    "a buffer": lambda leaves: leaves.update(b=nn.Buffer(_base())),
    "sparse": lambda leaves: leaves.update(a=torch.eye(4).to_sparse()),
    "a number for a tensor": lambda leaves: leaves.update(a=5),
    "a tensor for a number": lambda leaves: leaves.update(number=torch.tensor(1)),
    "another number": lambda leaves: leaves.update(number=2),
    "a number of another kind": lambda leaves: leaves.update(number=1.0),
    "true for one": lambda leaves: leaves.update(number=True),
    "minus nothing": lambda leaves: leaves.update(number=-0.0),
    "a longer text": lambda leaves: leaves.update(text="x" * 100_000),
    "a name more": lambda leaves: leaves.update(more=torch.rand(2)),
    "a name less": lambda leaves: leaves.pop("a"),
    "a name for another": lambda leaves: leaves.update(new=leaves.pop("scalar")),
    "another order": lambda leaves: leaves.update(a=leaves.pop("a")),
    "tied": lambda leaves: leaves.update(square=leaves["a"]),
    "tied by data": lambda leaves: leaves["square"].set_(leaves["a"]),
    "untied": lambda leaves: leaves.update({"other twin": leaves["twin"] + 1}),
    "one twin turned": lambda leaves: leaves.update({"other twin": leaves["twin"].t()}),
    "first twin turned": lambda leaves: leaves.update(twin=leaves["twin"].t()),
    "both twins turned": lambda leaves: leaves.update(
        {"twin": leaves["twin"].t(), "other twin": leaves["twin"].t()}
    ),
    "a twin conjugated": lambda leaves: leaves.update({"other waves": leaves["waves"].conj()}),
    "a part of a twin": lambda leaves: leaves.update({"other twin": leaves["twin"][:2]}),
    "a twin of another type": lambda leaves: leaves.update(
        {"other twin": leaves["twin"].view(torch.int32)}
    ),
    "the first twin gone": lambda leaves: leaves.pop("twin"),
    "filled": lambda leaves: leaves.update(empty=torch.rand(1, 3)),
    "empty": lambda leaves: leaves.update(a=torch.empty(4, 0)),
}


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.parametrize("name", CHANGES)
def test_a_later_description_is_as_a_first_one(name: str, again: int) -> None:
    """Whatever changed since the last time, the items are those that a fresh look finds."""
    itemizer, leaves = Itemizer(), _leaves()
    for _ in range(again):
        _describe(itemizer, leaves)
    CHANGES[name](leaves)
    for _ in range(2):
        _is_fresh(_describe(itemizer, leaves), leaves)


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_may_change_back(name: str) -> None:
    """After any change and back again, the items and their structure are what they were."""
    itemizer, leaves = Itemizer(), _leaves()
    before = _describe(itemizer, leaves)
    changed = {key: each.clone() if key == "a" else each for key, each in leaves.items()}
    changed["twin"] = changed["other twin"] = leaves["twin"].clone()
    changed["waves"] = changed["other waves"] = leaves["waves"].clone()
    changed["square"] = leaves["square"].clone()
    CHANGES[name](changed)
    _is_fresh(_describe(itemizer, changed), changed)
    after = _describe(itemizer, leaves)
    _is_fresh(after, leaves)
    if name not in ("a longer text", "sparse"):  # whose slots have grown since
        assert after.structure == before.structure


@pytest.mark.parametrize("leaf", [torch.rand(2), 5, "a text"], ids=["tensor", "number", "text"])
def test_a_name_may_come_to_mean_other_keys(leaf: Any) -> None:
    """A flat name that other nested keys now make is told with those, and with no older ones."""
    itemizer = Itemizer()
    leaves = {"model.a.b": leaf, "x": torch.rand(1)}
    for path in (("model", "a", "b"), ("model", "a.b"), ("model", "a", "b")):
        paths: Paths = {"model.a.b": path, "x": ("x",)}
        for _ in range(2):
            found = _describe(itemizer, leaves, paths)
            assert [each.path for each in found.items] == [path, ("x",)]
            _is_fresh(found, leaves, paths)
        _describe(itemizer, {"x": leaves["x"]}, {"x": ("x",)})


def test_the_steady_state_describes_nothing_anew() -> None:
    """While names, shapes and places stay, the same items are handed out again."""
    itemizer, leaves = Itemizer(), _leaves()
    first = _describe(itemizer, leaves)
    leaves["a"].add_(1)
    second = _describe(itemizer, leaves)
    assert all(one is other for one, other in zip(first.items, second.items, strict=True))
    assert second.structure == first.structure


def test_an_itemizer_keeps_no_tensor_alive() -> None:
    """A tensor that training drops is freed, though it was described."""
    import gc
    import weakref

    itemizer = Itemizer()
    leaves = {"a": torch.rand(3), "b": nn.Parameter(torch.rand(3))}
    gone = [weakref.ref(each) for each in leaves.values()]
    for _ in range(2):
        _describe(itemizer, leaves)
    leaves.clear()
    gc.collect()
    assert [each() for each in gone] == [None, None]


# -- slots of values -----------------------------------------------------------------------------


def test_a_value_keeps_its_slot_while_it_fits() -> None:
    """Growing and shrinking inside the slot keeps the structure; outgrowing it changes it."""
    itemizer = Itemizer()
    first = _describe(itemizer, {"note": "x" * 100})
    for size in (0, 300, 100, 350):
        found = _describe(itemizer, {"note": "x" * size})
        assert found.items == first.items, size
        assert found.structure == first.structure
    grown = _describe(itemizer, {"note": "x" * 5000})
    assert grown.structure != first.structure
    assert grown.items[0].capacity_bytes > first.items[0].capacity_bytes


def test_a_value_that_shrinks_far_gets_a_smaller_slot() -> None:
    """No more zeros stand behind a container than stock torch still reads it with."""
    itemizer = Itemizer()
    _describe(itemizer, {"note": "x" * 500_000})
    for size in (480_000, 440_000, 300_000, 10):
        found = _describe(itemizer, {"note": "x" * size})
        (item,), (content,) = found.items, found.sources
        assert isinstance(content, bytes)
        padded = content.ljust(item.capacity_bytes, b"\0")
        assert torch.load(io.BytesIO(padded), weights_only=True) == "x" * size


def test_a_mutable_value_is_looked_into() -> None:
    """A list that was changed in place is another value, though it is the same list."""
    itemizer, note = Itemizer(), [1, 2]
    _describe(itemizer, {"note": note})
    note.append(3)
    (content,) = _describe(itemizer, {"note": note}).sources
    assert isinstance(content, bytes)
    assert torch.load(io.BytesIO(content), weights_only=True) == [1, 2, 3]


# -- types ---------------------------------------------------------------------------------------


class _Opaque(Tensor):
    """A tensor type that nobody can take apart."""


@pytest.mark.parametrize("after_a_plain_one", [False, True])
def test_an_opaque_type_is_refused(after_a_plain_one: bool) -> None:
    """A type without __tensor_flatten__ is an error that names it and the leaf."""
    itemizer = Itemizer()
    if after_a_plain_one:
        _describe(itemizer, {"w": torch.rand(3)})
    with pytest.raises(UnsupportedStateError, match=r"^w is a _Opaque"):
        _describe(itemizer, {"w": torch.rand(3).as_subclass(_Opaque)})


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # of torch 2.14
def test_what_only_torch_can_pickle_is_a_tensor_in_a_slot_with_room() -> None:
    """A sparse tensor is torch's container, told as a tensor of its type and size."""
    sparse = torch.eye(5).to_sparse()
    found = _describe(Itemizer(), {"w": sparse})
    (item,), (content,) = found.items, found.sources
    assert isinstance(content, bytes)
    assert (item.dtype, item.size) == (torch.float32, (5, 5))
    assert item.capacity_bytes >= len(content)
    padded = content.ljust(item.capacity_bytes, b"\0")
    assert torch.equal(torch.load(io.BytesIO(padded), weights_only=True).to_dense(), torch.eye(5))
