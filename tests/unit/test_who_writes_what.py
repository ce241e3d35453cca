"""Who writes what, from every rank's items; and the `.metadata` that stock torch reads."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from holdfast.errors import UnsupportedStateError
from holdfast.format.dcp import encode_metadata
from holdfast.format.items import NO_PLAN, choose, pack_record, propose, structure_of
from holdfast.format.layout import Item, Layout, lay_out, read_index
from holdfast.format.plan import Decision, decide, judge, shard_name

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning"  # torch's word on loading without ranks
)

World = list[list[Item]]
"""By rank: the items that it could write."""


def _tensor(name: str, *size: int, dtype: torch.dtype = torch.float32, **other: Any) -> Item:
    return Item(name, tuple(name.split(".")), dtype, size, (0,) * len(size), size, **other)


def _chunk(name: str, size: Sequence[int], offsets: Sequence[int], *lengths: int) -> Item:
    path = tuple(name.split("."))
    return Item(name, path, torch.float32, tuple(size), tuple(offsets), lengths)


def _value(name: str, capacity_bytes: int = 2048) -> Item:
    return Item(name, (name,), None, (), (), (), capacity_bytes)


def _rows(name: str, rows: int, ranks: int, rank: int) -> Item:
    """As FSDP splits the first dimension: the last ranks may have less, or nothing."""
    share = -(-rows // ranks)
    first = min(rank * share, rows)
    return _chunk(name, (rows, 3), (first, 0), min(share, rows - first), 3)


def _plan(world: World) -> tuple[Decision, list[list[Item]]]:
    decision = decide([propose(items) for items in world])
    chosen = [choose(items, share) for items, share in zip(world, decision.shares, strict=True)]
    return decision, chosen


def _names(chosen: list[list[Item]]) -> list[list[str]]:
    return [[item.name for item in items] for items in chosen]


# Stock torch.


def _body(layout: Layout, contents: dict[str, Any]) -> bytes:
    """Put a body together from whole tensors and values, by name."""
    body = bytearray(layout.body_bytes)
    for slot in layout.slots:
        item, content = slot.item, contents[slot.item.name]
        if item.dtype is not None:
            for dimension, (start, length) in enumerate(
                zip(item.offsets, item.lengths, strict=True)
            ):
                content = content.narrow(dimension, start, length) if length else content[:0]
            content = content.contiguous() if all(item.lengths) else torch.empty(item.lengths)
        if slot.container is None:
            stream = io.BytesIO()
            torch.save(content, stream)
            written = stream.getvalue()
            assert len(written) <= slot.size_bytes
        else:
            raw = (
                content.reshape(-1).view(torch.uint8).numpy().tobytes() if content.numel() else b""
            )
            written = slot.container.header + raw + slot.container.trailer
            assert len(written) == slot.size_bytes
        body[slot.offset : slot.offset + len(written)] = written
    body[layout.index_offset : layout.index_offset + len(layout.index)] = layout.index
    body[-len(layout.tail) :] = layout.tail
    return bytes(body)


def _write(folder: Path, world: World, contents: dict[str, Any]) -> None:
    decision, chosen = _plan(world)
    for rank, items in enumerate(chosen):
        body = _body(lay_out(items), contents)
        assert len(read_index(body)) == len(items)
        (folder / shard_name(rank)).write_bytes(body)
    (folder / ".metadata").write_bytes(encode_metadata(decision))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.contiguous()
            .view(-1)
            .view(torch.uint8)
            .equal(other.contiguous().view(-1).view(torch.uint8))
        )
    return bool(one == other)


DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64, torch.uint8]
SIZES: list[tuple[int, ...]] = [(), (1,), (3,), (0,), (7, 0, 2), (16, 9), (2, 3, 5, 7)]


def _every_kind() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    contents: dict[str, Any] = {
        f"{str(dtype).removeprefix('torch.')}.{number}": torch.randint(
            0, 2, size, generator=generator
        ).to(dtype)
        for dtype in DTYPES
        for number, size in enumerate(SIZES)
    }
    contents["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    contents["text"] = "a value"
    contents["list"] = [1, 2.5, {"deep": (True, None)}]
    return contents


def _item_of(name: str, content: Any) -> Item:
    if isinstance(content, torch.Tensor):
        return _tensor(name, *content.shape, dtype=content.dtype)
    return _value(name, 4096)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_stock_torch_reads_what_is_written_by_plan(ranks: int, tmp_path: Path) -> None:
    """Replicas, shards, values and ties of every type and size load bit for bit, whole."""
    contents = _every_kind()
    replicated = [_item_of(name, content) for name, content in contents.items()]
    sharded = {f"sharded.{rows}": torch.randn(rows, 3) for rows in (1, 3, 4, 9)}
    contents |= sharded | {"tied": contents["float32.5"], "opaque": torch.randn(4, 4).t()}
    world = [
        [
            *replicated,
            *(_rows(name, len(whole), ranks, rank) for name, whole in sharded.items()),
            _tensor("tied", 16, 9, alias_of="float32.5"),
            _tensor("opaque", 4, 4, capacity_bytes=4096),
        ]
        for rank in range(ranks)
    ]
    _write(tmp_path, world, contents)

    loaded: dict[str, Any] = {
        name: torch.full_like(content, 1) if isinstance(content, torch.Tensor) else None
        for name, content in contents.items()
    }
    load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert [name for name in contents if not _same(contents[name], loaded[name])] == []

    whole = tmp_path / "whole.pt"
    dcp_to_torch_save(tmp_path, whole)
    nested = torch.load(whole, weights_only=True)
    for name, content in contents.items():
        found = nested
        for key in name.split("."):
            found = found[key]
        assert _same(content, found), name


def test_stock_torch_puts_a_grid_of_chunks_together(tmp_path: Path) -> None:
    """A grid of chunks over two dimensions comes back as one tensor."""
    whole = torch.randn(4, 6)
    world = [[_chunk("w", (4, 6), (row, column), 2, 3)] for row in (0, 2) for column in (0, 3)]
    _write(tmp_path, world, {"w": whole})
    target = {"w": torch.zeros(4, 6)}
    load(target, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(target["w"], whole)


def test_the_metadata_is_what_torch_would_pickle(tmp_path: Path) -> None:
    """Put together by hand, it unpickles to the very objects that describe the same plan."""
    world = [
        [
            _tensor("plain", 4, 2, dtype=torch.bfloat16),
            Item("list.0", ("list", 0), torch.int64, (), (), ()),
            _rows("rows", 3, 2, rank),
            _value("value"),
            _tensor("per%cent", 2**33, 0),
            _tensor("tied", 4, 2, dtype=torch.bfloat16, alias_of="plain"),
        ]
        for rank in range(2)
    ]
    decision, chosen = _plan(world)
    expected = Metadata({}, planner_data={}, storage_data={})
    places = {
        (item.name, item.offsets): (rank, slot)
        for rank, items in enumerate(chosen)
        for item, slot in lay_out(items).items
    }
    for item in world[0]:
        expected.planner_data[item.name] = item.path
        if item.dtype is None:
            expected.state_dict_metadata[item.name] = BytesStorageMetadata()
            index = MetadataIndex(item.name)
            rank, slot = places[item.name, ()]
            expected.storage_data[index] = _StorageInfo(
                shard_name(rank), slot.offset, slot.size_bytes
            )
            continue
        described = TensorStorageMetadata(TensorProperties(item.dtype), torch.Size(item.size), [])
        expected.state_dict_metadata[item.name] = described
        for (name, offsets), (rank, slot) in sorted(places.items(), key=lambda each: each[0][1]):
            if name == item.name:
                number = len(described.chunks)
                index = MetadataIndex(name, torch.Size(offsets), number)
                expected.storage_data[index] = _StorageInfo(
                    shard_name(rank), slot.offset, slot.size_bytes
                )
                described.chunks.append(
                    ChunkStorageMetadata(torch.Size(offsets), torch.Size(_lengths(chosen, index)))
                )
    content = encode_metadata(decision)
    found = pickle.loads(content)
    assert found == expected
    assert list(map(vars, found.storage_data)) == list(map(vars, expected.storage_data))
    for entry in found.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            assert type(entry.size) is torch.Size
            assert all(
                type(each.offsets) is type(each.sizes) is torch.Size for each in entry.chunks
            )
    assert pickle._loads(content) == expected  # type: ignore[attr-defined]  # Python's own reader


def _lengths(chosen: list[list[Item]], index: MetadataIndex) -> tuple[int, ...]:
    (lengths,) = {
        item.lengths
        for items in chosen
        for item in items
        if (item.name, item.offsets) == (index.fqn, index.offset)
    }
    return lengths


# Who writes what.


def test_replicas_are_written_once_and_balanced() -> None:
    """No rank writes more than its even part and one tensor."""
    rng = random.Random(1)
    items = [_tensor(f"t.{number}", rng.randint(1, 40), 1000) for number in range(200)]
    decision, chosen = _plan([items] * 8)
    assert Counter(name for names in _names(chosen) for name in names) == Counter(
        item.name for item in items
    )
    assert max(decision.body_bytes) - min(decision.body_bytes) <= 2 * 4000 + 2048
    ends = [lay_out(each).index_offset for each in chosen]
    assert decision.body_bytes == ends


def test_replicas_fill_up_ranks_with_less_of_their_own() -> None:
    """What one rank alone holds counts before anything is dealt."""
    shared = [_tensor(f"shared.{number}", 1000) for number in range(6)]
    _, chosen = _plan([[_tensor("own", 9000), *shared], shared, shared])
    assert _names(chosen) == [
        ["own"],
        ["shared.0", "shared.2", "shared.4"],
        ["shared.1", "shared.3", "shared.5"],
    ]


def test_a_replica_goes_to_one_of_its_holders_only() -> None:
    """With hybrid sharding each chunk has a few holders, and one of those writes it."""
    world = [[_rows("w", 8, 4, rank % 4), _tensor("step")] for rank in range(8)]
    _, chosen = _plan(world)
    held = [{(item.name, item.offsets) for item in items} for items in world]
    written = [{(item.name, item.offsets) for item in items} for items in chosen]
    assert all(mine <= all_mine for mine, all_mine in zip(written, held, strict=True))
    assert sorted(each for mine in written for each in mine) == sorted(set().union(*held))


def test_a_value_is_that_of_the_lowest_rank_that_has_it() -> None:
    """Values of one name may differ between ranks; rank 0's, or the first one's, is kept."""
    world = [[_tensor("big", 10_000), _value("step")], [_value("step"), _value("late")]]
    _, chosen = _plan([*world, [_value("late")]])
    assert _names(chosen) == [["big", "step"], ["late"], []]


def test_tied_names_go_to_one_file_together() -> None:
    """Where all holders agree on a tie, the alias stays on the bytes of its leader."""
    items = [_tensor("a", 100), _tensor("b", 100, alias_of="a"), _tensor("c", 90)]
    _, chosen = _plan([items, items])
    assert _names(chosen) == [["a", "b"], ["c"]]
    assert len(lay_out(chosen[0]).slots) == 1


@pytest.mark.parametrize(
    "other",
    [
        [_tensor("b", 100), _tensor("a", 100, alias_of="b")],
        [_tensor("a", 100), _tensor("b", 100)],
        [_tensor("b", 100)],
        [_tensor("a", 100)],
    ],
    ids=["turned round", "untied", "only the alias", "only the leader"],
)
def test_a_tie_that_ranks_disagree_on_loses_no_name(other: list[Item]) -> None:
    """Each name is written once, as itself where its leader lies elsewhere."""
    decision, chosen = _plan([[_tensor("a", 100), _tensor("b", 100, alias_of="a")], other])
    assert sorted(name for names in _names(chosen) for name in names) == ["a", "b"]
    _assert_places(decision, chosen)


def test_empty_chunks_at_one_place_are_written_once() -> None:
    """Ranks without a part of a small tensor give the same empty chunk; beside bytes it goes."""
    _, chosen = _plan([[_rows("w", 2, 8, rank)] for rank in range(8)])
    assert _names(chosen) == [["w"], ["w"], ["w"], *[[]] * 5]
    # An empty chunk at the place of one with bytes, on a lower rank.
    _, chosen = _plan([[_chunk("w", (4,), (0,), 0)], [_chunk("w", (4,), (0,), 4)]])
    assert _names(chosen) == [[], ["w"]]


def _assert_places(decision: Decision, chosen: list[list[Item]]) -> None:
    """`.metadata` says of every item where `lay_out` puts it, and nothing else."""
    metadata = pickle.loads(encode_metadata(decision))
    expected = {}
    for rank, items in enumerate(chosen):
        layout = lay_out(items)
        for item, slot in layout.items:
            key = (item.name, None if item.dtype is None else item.offsets)
            expected[key] = (shard_name(rank), slot.offset, slot.size_bytes)
        assert decision.body_bytes[rank] == layout.index_offset
    found = {
        (index.fqn, index.offset): (info.relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
    }
    assert found == expected
    assert metadata.planner_data == {item.name: item.path for items in chosen for item in items}


def _random_world(rng: random.Random) -> World:
    world: World = [[] for _ in range(rng.randint(1, 5))]
    for number in range(rng.randint(0, 12)):
        name = f"t.{number}"
        rng.choice(_RANDOM_KINDS)(rng, name, world)
    return world


def _add_value(rng: random.Random, name: str, world: World) -> None:
    for items in world:
        if rng.random() < 0.7:
            items.append(replace(_value(name, rng.randint(1, 999)), path=("t", name)))


def _add_replicas(rng: random.Random, name: str, world: World) -> None:
    size = [rng.randint(0, 5) for _ in range(rng.randint(0, 3))]
    item = _tensor(name, *size, dtype=rng.choice(DTYPES))
    item = replace(item, capacity_bytes=rng.choice((0, 0, 700)))
    for items in world:
        if rng.random() < 0.7:
            items.append(item)


def _add_rows(rng: random.Random, name: str, world: World) -> None:
    rows = rng.randint(0, 7)
    for rank, items in enumerate(world):
        items.append(_rows(name, rows, len(world), rank))


def _add_grid(rng: random.Random, name: str, world: World) -> None:
    for rank, items in enumerate(world):
        places = [(row, rank) for row in range(2)]
        rng.shuffle(places)
        items += [_chunk(name, (2, len(world)), place, 1, 1) for place in places]


def _add_ties(rng: random.Random, name: str, world: World) -> None:
    agreed = rng.random() < 0.5
    for items in world:
        names = [f"{name}.{letter}" for letter in "abc"]
        if not agreed:
            rng.shuffle(names)
            names = names[: rng.randint(1, 3)]
        for position, each in enumerate(names):
            leader = names[0 if agreed else rng.randrange(position)] if position else None
            items.append(_tensor(each, 4, alias_of=leader))


_RANDOM_KINDS: list[Callable[[random.Random, str, World], None]] = [
    _add_value,
    _add_replicas,
    _add_rows,
    _add_grid,
    _add_ties,
]


@pytest.mark.parametrize("seed", range(150))
def test_no_item_is_lost_or_written_twice(seed: int) -> None:
    """Whatever ranks hold, each chunk and value is written once, by a holder, where told."""
    world = _random_world(random.Random(seed))
    decision, chosen = _plan(world)
    written = Counter((item.name, item.offsets) for items in chosen for item in items)
    assert set(written.values()) <= {1}
    # Empty chunks beside one with bytes at the same place are the same place here.
    assert set(written) == {(item.name, item.offsets) for items in world for item in items}
    for mine, offered in zip(chosen, world, strict=True):
        assert {replace(item, alias_of=None) for item in mine} <= {
            replace(item, alias_of=None) for item in offered
        }
    _assert_places(decision, chosen)


def test_equal_proposals_give_equal_bytes() -> None:
    """Shares, plan and `.metadata` depend on what items are, not on which objects say it."""
    world = _random_world(random.Random(7))
    again = pickle.loads(pickle.dumps(world))
    for items in again:
        for position, item in enumerate(items):
            path = tuple("".join(list(key)) for key in item.path)
            items[position] = replace(item, name="".join(list(item.name)), path=path)
    one, other = (_plan(each)[0] for each in (world, again))
    assert (one.shares, one.plan) == (other.shares, other.plan)
    assert encode_metadata(one) == encode_metadata(other)


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (
            [[_tensor("w", 2)], [_tensor("w", 2, dtype=torch.float64)]],
            ["w is float32[2] on rank 0 and float64[2] on rank 1"],
        ),
        ([[_tensor("w", 2)], [_tensor("w", 3)]], ["w is float32[2] on rank 0", "rank 1"]),
        ([[_tensor("w", 2)], [_value("w")]], ["on rank 0 and a value on rank 1"]),
        (
            [[_chunk("w", (4,), (0,), 2)], [_chunk("w", (4,), (0,), 4)]],
            ["w: ranks 0 and 1 hold chunks of sizes [2] and [4]"],
        ),
        (
            [[], [_chunk("w", (4,), (0,), 3)], [_chunk("w", (4,), (2,), 2)]],
            ["w: ", "ranks 1, 2 hold 5 elements", "tile its 4"],
        ),
        ([[_chunk("w", (4,), (0,), 2)], []], ["w: ", "ranks 0 hold 2 elements"]),
        ([[_chunk("w", (4,), (4,), 0)], []], ["w: ", "hold 0 elements"]),
        ([[_chunk("w", (4,), (2,), 4)]], ["w: ", "reach beyond"]),
        (
            # One overlap and one gap of the same volume.
            [[_chunk("w", (6,), (0,), 3)], [_chunk("w", (6,), (2,), 3)]],
            ["w: ", "hold 6 elements"],
        ),
        (
            [
                [_chunk("w", (2, 2), (0, 0), 1, 1)],
                [_chunk("w", (2, 2), (0, 1), 2, 1)],
                [_chunk("w", (2, 2), (1, 1), 1, 1)],
            ],
            ["w: ", "hold 4 elements"],
        ),
    ],
)
def test_ranks_that_disagree_are_named(world: World, words: list[str]) -> None:
    """A disagreement is an error that names the tensor and the ranks, in at most three lines."""
    good = [_tensor("good", 4), _value("fine")]
    with pytest.raises(UnsupportedStateError) as caught:
        _plan([[*good, *items, _tensor("zz", 3)] for items in world])
    assert [each for each in words if each not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) <= 3


def test_chunks_that_tile_a_tensor_are_taken_in_any_cut() -> None:
    """Bricks of unequal size, in three dimensions, over ranks in any order, are a whole tensor."""
    cut = [((0, 0, 0), (1, 4, 2)), ((1, 0, 0), (2, 1, 2)), ((1, 1, 0), (2, 3, 1))]
    cut.append(((1, 1, 1), (2, 3, 1)))
    assert sum(prod(lengths) for _, lengths in cut) == 3 * 4 * 2
    _, chosen = _plan([[_chunk("w", (3, 4, 2), where, *size)] for where, size in reversed(cut)])
    assert _names(chosen) == [["w"]] * 4


def test_a_share_fits_only_the_items_it_is_for() -> None:
    """A share of another number of items is refused."""
    items = [_tensor(f"t.{number}", 2) for number in range(8)]
    share = decide([propose(items)]).shares[0]
    with pytest.raises(ValueError, match="not one bit for 9 items"):
        choose([*items, _tensor("more", 2)], share)


# The steady state.

BASE = [_tensor("a", 4, 2), _value("v"), _tensor("b", 4, 2, alias_of="a")]


@pytest.mark.parametrize(
    "items",
    [
        [],
        BASE[:2],
        [BASE[1], BASE[0], BASE[2]],
        [replace(BASE[0], name="A"), BASE[1], replace(BASE[2], alias_of="A")],
        [replace(BASE[0], path=("a", 0)), *BASE[1:]],
        [BASE[0], replace(BASE[1], capacity_bytes=4096), BASE[2]],
        [*BASE[:2], replace(BASE[2], alias_of=None)],
        [replace(each, dtype=each.dtype and torch.int32) for each in BASE],
        [replace(each, size=each.size and (8, 2)) for each in BASE],
        [replace(each, lengths=each.lengths and (2, 4)) for each in BASE],
        [replace(each, offsets=each.offsets and (0, 1)) for each in BASE],
    ],
)
def test_the_structure_changes_with_everything_a_plan_depends_on(items: list[Item]) -> None:
    """Equal items have one structure of 16 bytes, any other item has another."""
    assert structure_of(BASE) == structure_of(pickle.loads(pickle.dumps(BASE)))
    assert len(structure_of(BASE)) == 16
    assert structure_of(items) != structure_of(BASE)


def test_a_plan_is_of_all_structures() -> None:
    """One changed rank gives another plan, even where the shares come out the same."""
    one = decide([propose(BASE), propose(BASE)])
    grown = [BASE[0], replace(BASE[1], capacity_bytes=4096), BASE[2]]
    other = decide([propose(BASE), propose(grown)])
    assert one.shares == other.shares
    assert one.plan != other.plan
    assert one.structures == [structure_of(BASE)] * 2


PLAN, SHAPE = b"p" * 16, b"s" * 16


@pytest.mark.parametrize(
    ("records", "changed"),
    [
        ([(SHAPE, PLAN)] * 4, None),
        ([(SHAPE, PLAN)] * 3 + [(SHAPE, NO_PLAN)], "state of ranks 3"),
        ([(SHAPE, NO_PLAN)] * 4, "state of ranks 0, 1, 2, ..."),
        ([(SHAPE, PLAN)] * 3 + [(SHAPE, b"q" * 16)], "state of ranks 3"),
        ([(SHAPE, PLAN)] * 3 + [(b"t" * 16, PLAN)], "state of ranks 3"),
        ([(SHAPE, PLAN)] * 3, "3 ranks, where the plan is for 4"),
    ],
    ids=["one plan", "one has none", "first save", "another plan", "lies", "fewer"],
)
def test_a_plan_is_used_only_while_all_stand_by_it(
    records: list[tuple[bytes, bytes]], changed: str | None
) -> None:
    """All on one plan for the structures it was made for: go. Else the ranks are named."""
    reason = judge([pack_record(*each) for each in records], [SHAPE] * 4)
    assert reason == changed or (changed and reason and reason.endswith(changed))


def test_a_record_is_small_and_of_one_size() -> None:
    """At most 128 bytes each, and what is no record is refused."""
    assert {len(pack_record(SHAPE, each)) for each in (PLAN, NO_PLAN)} == {40}
    for records in ([], [b""], [bytes(40)], [pack_record(SHAPE, PLAN) + b"x"]):
        with pytest.raises(ValueError, match="record"):
            judge(records)


def test_a_proposal_is_small() -> None:
    """About 100 bytes for an item, so that thousands of ranks are a matter of megabytes."""
    items = [_tensor(f"model.layers.{number}.weight", 64, 64) for number in range(600)]
    assert len(propose(items)) < 120 * len(items)
    json.loads(lay_out(items).index)
