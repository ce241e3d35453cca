"""Shards of any number of ranks merge into one view, and cover the state or do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import LocalFilesystem
from holdfast.format.layout import Entry, Item, lay_out
from holdfast.format.merging import merge_shards
from holdfast.read.index import read_index
from holdfast.read.reader import ShardReader
from holdfast.snapshot.arena import Arena
from holdfast.snapshot.shard import seal_image
from holdfast.storage.posix import PosixStorage
from holdfast.tiers.local.availability import find_gap
from holdfast.tiers.local.peers import ReadRequest, divide
from holdfast.tiers.local.shard_file import Chunk, ShardRecord, outline
from tests.support.local_shards import RECORD
from tests.support.nodes import flip


def _rows(name: str, start: int, stop: int, size: int = 8) -> Chunk:
    return (name, (size, 3), (start, 0), (stop - start, 3))


VALUE: Chunk = ("lr", (), (), ())


@pytest.mark.parametrize(
    ("chunks", "names", "gap"),
    [
        ([_rows("w", 0, 8), VALUE], 2, None),
        ([_rows("w", 0, 4), _rows("w", 4, 8), VALUE], 2, None),
        ([_rows("w", 0, 4), _rows("w", 4, 8), _rows("w", 0, 4), VALUE], 2, None),
        ([_rows("w", 0, 8)], 2, "1 of 2 names"),
        ([_rows("w", 0, 4), VALUE], 2, "all of w"),
        ([_rows("w", 0, 3), _rows("w", 4, 8), VALUE], 2, "all of w"),
        ([_rows("w", 0, 8), VALUE], None, "of None names"),
        ([("empty", (0, 3), (0, 0), (0, 3))], 1, None),
        ([("scalar", (), (), ())], 1, None),
        ([], 0, None),
    ],
)
def test_a_gap_is_named(chunks: list[Chunk], names: int | None, gap: str | None) -> None:
    """Every name must be there, and the chunks of each tensor must tile it."""
    found = find_gap(chunks, names)
    assert found is None if gap is None else gap in str(found)


def _write(path: Path, items: list[Item], values: list[torch.Tensor]) -> ShardRecord:
    layout = lay_out(items)
    arena = Arena(layout)
    arena.stage(values).wait()
    written = seal_image(arena.memory, layout.body_bytes, path.name)
    path.write_bytes(arena.memory)
    from dataclasses import replace

    return replace(RECORD, body_bytes=layout.body_bytes, digest=written.digest)


def _item(name: str, start: int, stop: int) -> Item:
    return Item(name, ("model", name), torch.float32, (8, 3), (start, 0), (stop - start, 3))


def test_two_files_are_read_as_one(tmp_path: Path) -> None:
    """Chunks from both, and where both have the same, from the first."""
    whole = torch.arange(24.0).reshape(8, 3)
    first = _write(tmp_path / "a", [_item("w", 0, 4)], [whole[:4]])
    second = _write(tmp_path / "b", [_item("w", 4, 8), _item("v", 0, 8)], [whole[4:], whole + 100])
    third = _write(tmp_path / "c", [_item("v", 0, 8)], [whole - 100])
    files = PosixStorage(tmp_path, LocalFilesystem())
    shards: list[tuple[int, str, list[Entry]]] = []
    records = {}
    for owner, (name, record) in enumerate((("a", first), ("b", second), ("c", third))):
        index = read_index(files, name, record.image_record(name))
        shards.append((owner, name, index.entries(name)))
        records[name] = record.image_record(name)
    reader = ShardReader(files, merge_shards(shards), records)
    assert reader.key_path("w") == ("model", "w")
    targets = {"w": torch.zeros(8, 3), "v": torch.zeros(8, 3)}
    reader.read_tensors(targets)
    assert torch.equal(targets["w"], whole)
    assert torch.equal(targets["v"], whole + 100)
    assert outline(files, "a", first) == [_rows("w", 0, 4)]


@pytest.mark.parametrize("where", ["index", "footer", "gone"])
def test_a_damaged_index_is_refused(tmp_path: Path, where: str) -> None:
    """Its block must match its digest, and the digests those of the record."""
    path = tmp_path / "a"
    record = _write(path, [_item("w", 0, 8)], [torch.zeros(8, 3)])
    layout = lay_out([_item("w", 0, 8)])
    if where == "gone":
        path.unlink()
    else:
        flip(path, layout.index_offset + 5 if where == "index" else record.body_bytes + 3)
    files = PosixStorage(tmp_path, LocalFilesystem())
    with pytest.raises(CorruptCheckpointError):
        read_index(files, path.name, record.image_record(path.name))


def test_each_place_fetches_each_block_once() -> None:
    """Straight to the one who wants it; what several want is dealt to their place in runs."""
    wishes = [
        {5: ReadRequest((0, 1, 2))},
        {5: ReadRequest((1, 2, 3)), 6: ReadRequest((0,))},
        {5: ReadRequest((0,))},
        {7: ReadRequest((4, 5), by_file=True)},
    ]
    straight, filed = divide(wishes, places=[0, 0, 1, 1])
    assert straight == [[(5, 0)], [(5, 3), (6, 0)], [(5, 0)], []]
    assert filed == [[(5, 1)], [(5, 2)], [(7, 4)], [(7, 5)]]
    rng = np.random.default_rng(0)
    for _ in range(20):
        places = rng.integers(0, 3, size=6).tolist()
        wishes = [
            {
                int(owner): ReadRequest(tuple({*rng.integers(0, 9, size=4).tolist()}))
                for owner in range(3)
            }
            for _ in places
        ]
        straight, filed = divide(wishes, places)
        for place in set(places):
            ranks = [rank for rank in range(6) if places[rank] == place]
            wanted = [(o, n) for r in ranks for o, wish in wishes[r].items() for n in wish.numbers]
            alone = [each for each in wanted if wanted.count(each) == 1]
            assert sorted(block for rank in ranks for block in straight[rank]) == sorted(alone)
            dealt = [block for rank in ranks for block in filed[rank]]
            assert sorted(dealt) == sorted({*wanted} - {*alone})
