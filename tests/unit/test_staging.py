"""The copy of live tensors that training can no longer reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.errors import UnsupportedStateError
from holdfast.shards.staging import Stager
from tests.support.states import digest

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.complex128,
]  # fmt: skip
SHAPES = [(), (0,), (0, 3), (1,), (7,), (3, 5), (2, 3, 4)]


def _filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 100, shape, generator=generator)
    return (values / 100).to(dtype) if dtype.is_floating_point else values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_staged_tensor_is_equal_and_apart(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """For every dtype and shape the copy has the same bits and keeps them when the live changes."""
    live = _filled(shape, dtype, 1)
    expected = digest(live.clone())
    stager = Stager()
    for _ in range(2):  # the second time into the buffers of the first
        staged = stager.stage({"a": {"b": [live]}})["a"]["b"][0]
        assert (staged.shape, staged.dtype, digest(staged)) == (live.shape, dtype, expected)
        kept = live.clone()
        live.copy_(_filled(shape, dtype, 2))
        assert digest(staged) == expected
        live.copy_(kept)


VIEWS = {
    "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "strided": lambda: torch.arange(12.0)[::3],
    "expanded": lambda: torch.tensor([1.0, 2.0]).unsqueeze(1).expand(2, 3),
    "offset": lambda: torch.arange(12.0)[5:],
    "channels last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "requires grad": lambda: torch.rand(3, requires_grad=True) * 2,
    "parameter": lambda: torch.nn.Parameter(torch.rand(3)),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_is_staged_by_its_values(kind: str) -> None:
    """Views of any layout are copied by value, free of the graph and of live memory."""
    live = VIEWS[kind]()
    expected = digest(live.detach().clone())
    staged = Stager().stage({"a": live})["a"]
    assert digest(staged) == expected
    assert not staged.requires_grad
    assert staged.untyped_storage().data_ptr() != live.untyped_storage().data_ptr()


def test_tied_tensors_stay_tied() -> None:
    """One tensor under two names is copied once and is one tensor in the copy."""
    tied, other = torch.rand(5), torch.rand(5)
    staged = Stager().stage({"a": tied, "b": other, "c": [tied]})
    assert staged["a"] is staged["c"][0]
    assert staged["a"] is not staged["b"]


DIFFERENT_VIEWS = {
    "conjugated": lambda base: (base, base.conj()),
    "shifted": lambda base: (base[:2], base[2:]),
    "transposed": lambda base: (base.reshape(2, 2), base.reshape(2, 2).t()),
    "reinterpreted": lambda base: (torch.view_as_real(base), torch.view_as_real(base).int()),
    "parts": lambda base: (base.real, base.imag),
    "negated": lambda base: (base.imag, base.conj().imag),
}


@pytest.mark.parametrize("kind", DIFFERENT_VIEWS)
def test_different_views_of_one_memory_stay_different(kind: str) -> None:
    """Two views of the same memory that show different values are not taken for one tensor."""
    live = DIFFERENT_VIEWS[kind](torch.tensor([1 + 2j, 3 + 4j, 5 + 6j, 7 + 8j]))
    expected = [digest(each.clone()) for each in live]
    staged = Stager().stage({"a": live[0], "b": live[1]})
    assert [digest(staged["a"]), digest(staged["b"])] == expected


def test_empty_tensors_are_not_tied() -> None:
    """Empty tensors all lie at address zero; each keeps its own shape."""
    staged = Stager().stage({"a": torch.empty(0, 3), "b": torch.empty(0, 3), "c": torch.empty(0)})
    assert staged["a"] is not staged["b"]
    assert staged["c"].shape == (0,)


def test_buffers_are_reused_and_released() -> None:
    """An unchanged state is copied into the same memory; what it no longer has is let go."""
    stager = Stager()
    first = stager.stage({"a": torch.rand(4), "b": torch.rand(4)})
    places = {name: each.data_ptr() for name, each in first.items()}
    again = stager.stage({"a": torch.rand(4), "b": torch.rand(4)})
    assert {name: each.data_ptr() for name, each in again.items()} == places
    stager.stage({"a": torch.rand(4)})
    changed = stager.stage({"a": torch.rand(5), "b": torch.rand(4)})
    assert changed["a"].shape == (5,)


def test_untied_tensors_get_buffers_of_their_own() -> None:
    """Tensors that were tied at one save and are not at the next keep their own values."""
    stager, tied = Stager(), torch.rand(4)
    stager.stage({"a": tied, "b": tied})
    one, two = torch.rand(4), torch.rand(4)
    staged = stager.stage({"a": one, "b": two})
    assert torch.equal(staged["a"], one)
    assert torch.equal(staged["b"], two)
    staged = stager.stage({"a": two, "b": two})
    assert staged["a"] is staged["b"]
    assert torch.equal(staged["a"], two)


def test_plain_values_are_copied_in_depth() -> None:
    """Lists, dicts and numbers beside tensors keep their values and types when the live change."""
    live: dict[str, Any] = {
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "names": ["a"], "on": True, "none": None}],
        "sizes": {1, 2},
        "shape": torch.Size([2, 3]),
    }
    staged = Stager().stage(live)
    assert staged == live
    live["groups"][0]["lr"] = 0.2
    live["groups"][0]["names"].append("b")
    live["sizes"].add(3)
    assert staged["groups"][0]["lr"] == 0.1
    assert staged["groups"][0]["names"] == ["a"]
    assert staged["sizes"] == {1, 2}
    assert type(staged["groups"][0]["betas"]) is tuple
    assert type(staged["shape"]) is torch.Size


class _Opaque(torch.Tensor):
    """A subclass that cannot be taken apart."""


def test_an_unknown_tensor_type_is_refused_by_name() -> None:
    """A subclass without inner tensors is refused, naming its place."""
    live = torch.rand(3).as_subclass(_Opaque)
    with pytest.raises(UnsupportedStateError, match=r"model\.a is a _Opaque"):
        Stager().stage({"model": {"a": live}})
