"""Which tensors lie in which bytes, told without torch."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from holdfast.format.inventory import list_names, names_in

PLACES = {
    MetadataIndex("small"): _StorageInfo("__0_0.distcp", 0, 10),
    MetadataIndex("large", torch.Size([0])): _StorageInfo("__0_0.distcp", 10, 90),
    MetadataIndex("large", torch.Size([4])): _StorageInfo("__1_0.distcp", 0, 90),
    MetadataIndex("last"): _StorageInfo("__0_0.distcp", 100, 20),
}


@pytest.mark.parametrize(
    ("file_name", "byte_range", "names"),
    [
        ("__0_0.distcp", (0, 119), ["large", "last", "small"]),
        ("__0_0.distcp", (9, 10), ["small", "large"]),
        ("__0_0.distcp", (0, 9), ["small"]),
        ("__0_0.distcp", (99, 100), ["large", "last"]),
        ("__1_0.distcp", (89, 200), ["large"]),
        ("__2_0.distcp", (0, 200), []),
    ],
)
def test_items_are_named_largest_part_first(
    file_name: str, byte_range: tuple[int, int], names: list[str]
) -> None:
    """Only items of that file with a byte in the range, the one with most bytes in it first."""
    content = pickle.dumps(Metadata({}, storage_data=PLACES))
    assert names_in(content, file_name, byte_range) == names


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(3), pickle.dumps(Metadata({}))])
def test_unreadable_metadata_names_nothing(content: bytes) -> None:
    """Damage is reported with or without names: the metadata may be what is damaged."""
    assert names_in(content, "__0_0.distcp", (0, 100)) == []


def test_nothing_in_the_file_runs() -> None:
    """A pickle that asks for a function gets a stand-in, which does nothing."""
    stream = io.BytesIO()
    pickle.Pickler(stream).dump(_Payload())
    assert names_in(stream.getvalue(), "__0_0.distcp", (0, 1)) == []


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def test_a_message_names_three_and_counts_the_rest() -> None:
    """A block of small tensors does not make an endless message."""
    assert list_names([]) == ""
    assert list_names(["a"]) == ", in a"
    assert list_names(["a", "b", "c", "d", "e"]) == ", in a, b, c and 2 more"
