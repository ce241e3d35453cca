"""Slots of values: larger than the value, readable by torch, and kept while the value fits."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.format.items import Itemizer
from holdfast.format.layout import lay_out
from holdfast.format.values import RNG, capacity_for, fill
from holdfast.snapshot.copies import digest_copies, find_differing
from tests.support.states import digest

VALUES: dict[str, Any] = {
    "nothing": None,
    "nested": {"a": [1, "two", (3.0,)], "t": torch.arange(5)},
    "long": list(range(3000)),
    "bytes": b"x" * 300_000,
    "strided": torch.eye(3).t()[:, 1:],
}
"""What `torch.save` writes in different ways."""


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("room", [0, 1, 64, 70_000, 3_000_000])
@pytest.mark.parametrize("name", VALUES)
def test_a_filled_slot_is_what_torch_saved(name: str, room: int, tmp_path: Path) -> None:
    """Whatever the room: from memory, from a mapped file, and by Python's own zip reader."""
    content = _saved(VALUES[name])
    filled = fill(content, len(content) + room)
    assert len(filled) == len(content) + room
    assert digest(torch.load(io.BytesIO(filled), weights_only=True)) == digest(VALUES[name])
    (tmp_path / "file.pt").write_bytes(filled)
    mapped = torch.load(tmp_path / "file.pt", weights_only=True, mmap=True)
    assert digest(mapped) == digest(VALUES[name])
    with zipfile.ZipFile(io.BytesIO(filled)) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("content", [b"", b"x" * 500, _saved(1) + b"\0"])
def test_what_torch_does_not_write_is_refused(content: bytes) -> None:
    """Nothing is moved in bytes of another form."""
    with pytest.raises(ValueError, match=r"archive|fill"):
        fill(content, len(content) + 100)


def test_what_is_larger_than_its_slot_is_refused() -> None:
    """A value that has outgrown its slot is never cut."""
    content = _saved("x")
    with pytest.raises(ValueError, match="do not fill a slot"):
        fill(content, len(content) - 1)


def test_room_is_in_proportion() -> None:
    """Twice the value, a quarter more of a large one; generators do not grow."""
    assert capacity_for(100_000, "data") >= 200_000
    assert 40 << 20 <= capacity_for(32 << 20, "data") <= 41 << 20
    assert capacity_for(100_000, RNG) < 102_000
    assert all(capacity_for(size, "x") % 64 == 0 for size in range(1, 200))


def test_a_value_that_grows_keeps_its_items_until_it_no_longer_fits() -> None:
    """A data position of twice the length needs no other plan; the plan changes a few times."""
    itemizer, structures = Itemizer(), []
    for step in range(60):
        leaves = {"w": torch.zeros(2), "data": "x" * (1000 * step)}
        found = itemizer.describe(leaves, {name: (name,) for name in leaves}, per_rank={"data"})
        structures.append(found.structure)
        content = found.sources[1]
        assert isinstance(content, bytes)
        assert len(content) == found.items[1].capacity_bytes
        assert torch.load(io.BytesIO(content), weights_only=True) == leaves["data"]
    assert len(set(structures)) < 8


def test_equal_copies_have_equal_digests_in_slots_of_any_size() -> None:
    """Digests are of the values: another rank may have had a longer one in the same slot before."""
    reports = []
    for history in (["x" * 5000, "short"], ["short"], ["other"]):
        itemizer = Itemizer()
        for value in history:
            leaves = {"v": value, "t": torch.arange(3), "shared": torch.rand(1)}
            found = itemizer.describe(leaves, {n: (n,) for n in leaves}, per_rank={"v", "t"})
        reports.append(digest_copies(lay_out(found.items), found.sources.__getitem__))
    assert [*reports[0]] == ["v", "t"]
    assert find_differing(reports[:2]) == ()
    assert find_differing(reports) == ("v",)


def test_many_tensors_are_reported_in_a_few_groups() -> None:
    """One differing buffer of a thousand is told by the group that it is in."""
    reports = []
    for rank in range(2):
        leaves = {f"b{number:04}": torch.tensor([number]) for number in range(1000)}
        leaves["b0500"] += rank
        found = Itemizer().describe(leaves, {n: (n,) for n in leaves}, per_rank={*leaves})
        reports.append(digest_copies(lay_out(found.items), found.sources.__getitem__))
    assert len(reports[0]) <= 24
    assert find_differing(reports) == ("b0462 and 41 more",)
