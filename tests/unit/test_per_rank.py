"""Items that are per rank: every rank writes its own copy, and reads it back."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load

from holdfast.errors import CorruptCheckpointError, UnsupportedStateError
from holdfast.filesystem import LocalFilesystem
from holdfast.format.dcp import encode_metadata
from holdfast.format.inventory import name_tensors
from holdfast.format.items import Itemizer, choose, propose, structure_of
from holdfast.format.layout import Item, lay_out
from holdfast.format.plan import Decision, decide, shard_name
from holdfast.read.reader import ShardReader
from holdfast.snapshot.arena import Arena
from holdfast.snapshot.shard import seal_image
from holdfast.storage.digests import FileRecord
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import verify_files

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning"  # torch's word on loading without ranks
)

OWN = frozenset({"model.mean", "model.again", "rng"})
SHARED = torch.arange(12.0).reshape(3, 4)


def _state(rank: int, ranks: int) -> dict[str, Any]:
    """Of one rank: its copies have sizes and types of their own, and one name is rank 1's alone."""
    mean = torch.full((rank + 2,), float(rank), dtype=[torch.float32, torch.float64][rank % 2])
    found: dict[str, Any] = {"model.mean": mean, "rng": list(range(rank + 3))}
    found |= {"model.again": mean, "model.weight": SHARED, "model.bias": SHARED[rank % 2] + 1}
    if rank == ranks - 1:
        found["model.late"] = torch.tensor([float(rank)])
    found["model.bias"] = SHARED + 1
    return found


def _paths(leaves: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(name.split(".", 1)) for name in leaves}


def _save(folder: Path, ranks: int) -> tuple[Decision, dict[str, FileRecord]]:
    worlds = []
    for rank in range(ranks):
        leaves = _state(rank, ranks)
        itemizer = Itemizer(lambda leaf: type(leaf).__name__)
        own = OWN | {"model.late"}
        worlds.append(itemizer.describe(leaves, _paths(leaves), per_rank=own))
    decision = decide([propose(each.items) for each in worlds])
    records = {}
    for rank, inventory in enumerate(worlds):
        chosen = choose(inventory.items, decision.shares[rank])
        layout = lay_out(chosen)
        assert decision.body_bytes[rank] == layout.index_offset
        arena = Arena(layout)
        sources = {
            item.name: source
            for item, source in zip(inventory.items, inventory.sources, strict=True)
        }
        arena.stage([sources[slot.item.name] for slot in layout.slots]).wait()
        name = shard_name(rank)
        records[name] = seal_image(arena.memory, layout.body_bytes, name)
        (folder / name).write_bytes(arena.memory)
    (folder / ".metadata").write_bytes(encode_metadata(decision))
    return decision, records


def _open(folder: Path, records: dict[str, FileRecord], rank: int | None) -> ShardReader:
    own = None if rank is None else shard_name(rank)
    files = PosixStorage(folder, LocalFilesystem())
    return ShardReader.open(files, (folder / ".metadata").read_bytes(), records, own)


def _read(reader: ShardReader) -> dict[str, Any]:
    targets = {
        name: torch.zeros(each.size, dtype=each.properties.dtype)
        for name, each in reader.tensors().items()
    }
    reader.read_tensors(targets)
    return targets | reader.read_values()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_reads_its_own_copy_and_others_that_of_the_lowest(
    ranks: int, tmp_path: Path
) -> None:
    """With its own file every copy is the rank's own; without, as `.metadata` has it."""
    _, records = _save(tmp_path, ranks)
    for rank in range(ranks):
        reader = _open(tmp_path, records, rank)
        found, saved = _read(reader), _state(rank, ranks)
        assert all(_same(each, found[name]) for name, each in saved.items())
        late = {"model.late"} if rank == ranks - 1 else set()
        assert reader.own_names == OWN | late
        assert reader.per_rank_names == OWN | {"model.late"}
    found, saved = _read(_open(tmp_path, records, None)), _state(0, ranks)
    saved["model.late"] = torch.tensor([ranks - 1.0])
    assert found.keys() == saved.keys()
    assert all(_same(each, found[name]) for name, each in saved.items())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_stock_torch_reads_the_copy_of_the_lowest_rank(ranks: int, tmp_path: Path) -> None:
    """Every name is a plain DCP name: `load` and `dcp_to_torch_save` find one value under it."""
    _save(tmp_path, ranks)
    saved = _state(0, ranks) | {"model.late": torch.tensor([ranks - 1.0])}
    target: dict[str, Any] = {
        name: torch.zeros_like(each) if isinstance(each, torch.Tensor) else None
        for name, each in saved.items()
    }
    load(target, checkpoint_id=tmp_path, no_dist=True)
    assert all(_same(each, target[name]) for name, each in saved.items())
    dcp_to_torch_save(tmp_path, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)["model"]
    assert all(
        _same(each, whole[name.removeprefix("model.")])
        for name, each in saved.items()
        if name != "rng"
    )


def test_each_rank_writes_its_copies_once_and_shares_the_rest(tmp_path: Path) -> None:
    """Copies count towards a rank's bytes; what is shared is still written by one rank."""
    big = Item("own", ("own",), torch.float32, (9000,), (0,), (9000,), per_rank=True)
    small = replace(big, size=(10,), lengths=(10,))
    shared = [Item(f"s{n}", (f"s{n}",), torch.float32, (1000,), (0,), (1000,)) for n in range(6)]
    worlds = [[small, *shared], [big, *shared], [small, *shared]]
    decision = decide([propose(each) for each in worlds])
    chosen = [choose(each, share) for each, share in zip(worlds, decision.shares, strict=True)]
    assert [sum(item.per_rank for item in items) for items in chosen] == [1, 1, 1]
    assert [len(items) - 1 for items in chosen] == [3, 0, 3]
    assert decision.body_bytes == [lay_out(items).index_offset for items in chosen]


def test_a_plan_is_for_what_is_per_rank_and_for_its_kinds() -> None:
    """Items that differ in nothing else have another structure."""
    item = Item("a", ("a",), torch.float32, (2,), (0,), (2,))
    variants = [item, replace(item, per_rank=True), replace(item, kind="{}")]
    assert len({structure_of([each]) for each in variants}) == 3


def test_a_name_is_per_rank_on_all_ranks_or_on_none() -> None:
    """Ranks that disagree are refused by name."""
    item = Item("a", ("a",), torch.float32, (2,), (0,), (2,))
    own = replace(item, per_rank=True)
    for world in ([item], [own]), ([own], [item]):
        with pytest.raises(UnsupportedStateError, match=r"a is rank \d's own copy") as caught:
            decide([propose(each) for each in world])
        assert f"rank {world.index([own])}'s own" in str(caught.value)


def test_a_name_that_becomes_per_rank_is_described_again() -> None:
    """The items of the last save are not reused for names whose rule has changed."""
    leaves = {"a": torch.zeros(2), "v": 1}
    paths = {"a": ("a",), "v": ("v",)}
    itemizer = Itemizer()
    for names in (frozenset(), frozenset({"a", "v"}), frozenset({"v"}), frozenset()):
        found = itemizer.describe(leaves, paths, per_rank=names)  # type: ignore[arg-type]
        assert {each.name for each in found.items if each.per_rank} == names
        assert found.structure == structure_of(found.items)


def test_a_copy_of_a_rank_shares_no_bytes_with_what_is_the_same_on_all() -> None:
    """A buffer that shares a parameter's memory has bytes of its own: another may write those."""
    whole = torch.zeros(4)
    leaves = {"a": whole, "b": whole, "c": whole}
    found = Itemizer().describe(leaves, {n: (n,) for n in leaves}, per_rank={"b", "c"})
    assert [each.alias_of for each in found.items] == [None, None, "b"]


def test_flipped_bits_in_a_copy_are_told_by_name_and_file(tmp_path: Path) -> None:
    """Rank 1 learns which of its own values is damaged; rank 0 reads its own all the same."""
    _, records = _save(tmp_path, 2)
    place = _open(tmp_path, records, 1).place_of_value("rng")
    path = tmp_path / shard_name(1)
    content = bytearray(path.read_bytes())
    content[place.offset + 9] ^= 1
    path.write_bytes(content)
    assert _open(tmp_path, records, 0).read_values()["rng"] == [0, 1, 2]
    with pytest.raises(CorruptCheckpointError, match=r"__1_0\.distcp: block 0 .*rng"):
        _open(tmp_path, records, 1)
    files = PosixStorage(tmp_path, LocalFilesystem())
    (damage,) = name_tensors(files, verify_files(files, list(records.values())))
    assert "rng" in damage.reason


def test_kinds_are_recorded_and_stock_torch_ignores_them(tmp_path: Path) -> None:
    """The reader gives each name's kind, of the own copy where it is one."""
    _, records = _save(tmp_path, 2)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert sorted(metadata.kinds[0]) == ["Tensor", "list"]
    for rank in (0, 1, None):
        reader = _open(tmp_path, records, rank)
        assert (reader.kind("model.mean"), reader.kind("rng")) == ("Tensor", "list")
        assert reader.kind("nothing") == ""
