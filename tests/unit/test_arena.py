"""The memory of a snapshot is, byte for byte, the file."""

from __future__ import annotations

import io
import mmap
import resource
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.errors import NotEnoughMemoryError
from holdfast.format.items import Inventory, Itemizer
from holdfast.format.layout import Item, Layout, lay_out, read_index
from holdfast.snapshot.arena import Arena, StreamedShard, image_bytes
from holdfast.storage.digests import BLOCK_BYTES, footer_size
from tests.support.proc import in_fork, mapping_of
from tests.support.tensors import DTYPES, SHAPES, VIEWS, Gated, bits, filled

MIB = 1 << 20


def _describe(leaves: dict[str, Any], itemizer: Itemizer | None = None) -> Inventory:
    return (itemizer or Itemizer()).describe(leaves, {name: (name,) for name in leaves})


def _own(inventory: Inventory) -> tuple[Layout, list[Any]]:
    """Return the layout of an inventory, and what goes into each slot of it."""
    layout = lay_out(inventory.items)
    by_name = dict(zip((each.name for each in inventory.items), inventory.sources, strict=True))
    return layout, [by_name[slot.item.name] for slot in layout.slots]


def _staged(leaves: dict[str, Any]) -> Arena:
    layout, sources = _own(_describe(leaves))
    arena = Arena(layout)
    arena.stage(sources).wait()
    return arena


def _body(image: Arena | StreamedShard) -> bytes:
    return b"".join(map(bytes, image.stretches()))


def _loaded(body: bytes) -> dict[str, Any]:
    """Read every item of a body as stock torch does, from its slot alone."""
    return {
        each.name: torch.load(
            io.BytesIO(body[each.offset : each.offset + each.length]), weights_only=True
        )
        for each in read_index(body)
    }


EVERYTHING: dict[str, Any] = {
    **{
        f"{dtype} {shape}": filled(dtype, shape, seed=3).view(shape)
        for dtype in DTYPES
        for shape in SHAPES
    },
    **{f"{name} {width}": VIEWS[name](width) for name in VIEWS for width in (6, 50_000)},
    "number": 7,
    "text": "x" * 1000,
    "nothing": None,
    "list": [1, 2.5, "three"],
    "parameter": torch.nn.Parameter(torch.rand(3)),
}


def test_every_item_is_in_its_slot() -> None:
    """Each slot is what torch.load reads: tensors of every type, shape and view, and values."""
    body = _body(_staged(EVERYTHING))
    loaded = _loaded(body)
    assert loaded.keys() == EVERYTHING.keys()
    for name, expected in EVERYTHING.items():
        if isinstance(expected, Tensor):
            assert loaded[name].dtype == expected.dtype, name
            assert loaded[name].shape == expected.shape, name
            assert bits(loaded[name]) == bits(expected), name
        else:
            assert loaded[name] == expected, name


def _crossing(extra: int) -> dict[str, Any]:
    """Return a state whose body is `extra` bytes over two blocks, before rounding to pages."""
    leaves = {"a": torch.zeros(0, dtype=torch.uint8), "b": torch.rand(5, 7).t(), "c": [1]}
    rest = 2 * BLOCK_BYTES - lay_out(_describe(leaves).items).body_bytes
    return {**leaves, "a": torch.randint(0, 255, (rest + extra,), dtype=torch.uint8)}


@pytest.mark.parametrize(
    "leaves",
    [
        EVERYTHING,
        {},
        {"only": 1},
        _crossing(-8192),
        _crossing(0),
        _crossing(4096),
        {f"{number}": torch.rand(300_000) for number in range(20)},
        {"large view": torch.rand(3000, 1100).t(), "rows": torch.rand(3, 3 * MIB).expand(3, -1)},
        {"wide": torch.rand(1, 5 * MIB)[:, ::2], "deep": torch.rand(1, 1, 6 * MIB)[..., ::2]},
    ],
    ids=["everything", "nothing", "a value", "below", "at", "above", "many", "views", "row"],
)  # fmt: skip
def test_a_streamed_shard_has_the_bytes_of_an_arena(leaves: dict[str, Any]) -> None:
    """Made block by block from live tensors, the file is the one that an arena would be."""
    layout, sources = _own(_describe(leaves))
    arena, streamed = Arena(layout), StreamedShard(layout, sources)
    arena.stage(sources).wait()
    assert streamed.body_bytes == arena.body_bytes == layout.body_bytes
    body, sizes = memoryview(_body(arena)), []
    assert len(body) == layout.body_bytes
    for stretch in streamed.stretches():
        start = sum(sizes)
        assert stretch == body[start : start + len(stretch)], len(sizes)
        sizes.append(len(stretch))
    assert all(size == BLOCK_BYTES for size in sizes[:-1])
    assert sum(sizes) == layout.body_bytes


def test_memory_that_cannot_be_pinned_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """Where host memory cannot be registered, each arena stages all the same; it is said once."""
    layout, sources = _own(_describe(EVERYTHING))
    undone = []

    def refuse(tensor: Tensor) -> Any:
        raise RuntimeError("CUDA error: out of memory\nfor a test")

    bodies = []
    for pinning in (refuse, refuse, lambda _: lambda: undone.append(True)):
        arena = Arena(layout, pinned=True, pinning=pinning)
        arena.stage(sources).wait()
        bodies.append(_body(arena))
        arena.release()
    assert bodies[0] == bodies[1] == bodies[2]
    assert undone == [True]
    (warning,) = caplog.messages
    assert "cannot be registered with CUDA (CUDA error: out of memory)" in warning


class _Computing:
    """A tensor that somebody has yet to compute, and the event behind that."""

    def __init__(self) -> None:
        self.result = torch.zeros(300_000)

    def synchronize(self) -> None:
        self.result.fill_(7)


def test_a_streamed_shard_waits_for_what_is_computed() -> None:
    """Nothing is read before every event has passed that the caller's stream had still to reach."""
    computing = _Computing()
    layout, sources = _own(_describe({"a": computing.result}))
    early = StreamedShard(layout, sources)
    assert not any(b"\x00\x00\xe0\x40" in stretch for stretch in map(bytes, early.stretches()))
    waiting = b"".join(StreamedShard(layout, sources, [computing]).stretches())
    assert waiting.count(b"\x00\x00\xe0\x40") == 300_000  # 7.0


def test_a_streamed_block_stays_until_the_one_after_the_next() -> None:
    """What was yielded is not overwritten while its successor is made."""
    leaves = {"a": torch.randint(0, 255, (5 * BLOCK_BYTES,), dtype=torch.uint8)}
    layout, sources = _own(_describe(leaves))
    before: tuple[memoryview, int] | None = None
    for block in StreamedShard(layout, sources).stretches():
        if before is not None:
            assert hash(bytes(before[0])) == before[1]
        before = block, hash(bytes(block))


def test_an_arena_takes_memory_as_large_as_the_file() -> None:
    """It fills memory that it is given, a file's for one, and nothing behind the body."""
    layout, sources = _own(_describe({"a": torch.rand(1000), "b": 5}))
    pages = mmap.mmap(-1, image_bytes(layout))
    arena = Arena(layout, memoryview(pages))
    arena.stage(sources).wait()
    assert bytes(pages[: layout.body_bytes]) == _body(_staged({"a": sources[0], "b": 5}))
    assert image_bytes(layout) == layout.body_bytes + footer_size(layout.body_bytes)
    assert not any(pages[layout.body_bytes :])


def test_an_arena_that_does_not_fit_is_refused() -> None:
    """A layout larger than this machine's memory is an error with the numbers, at once."""
    layout = lay_out([Item("x", ("x",), None, (), (), (), capacity_bytes=1 << 50)])
    with pytest.raises(NotEnoughMemoryError) as caught:
        Arena(layout)
    assert caught.value.needed_bytes == image_bytes(layout)


# -- from save to save ---------------------------------------------------------------------------


def test_values_shrink_and_grow_inside_their_slot() -> None:
    """A value of another length overwrites the one before, and what is left over is zeros."""
    itemizer = Itemizer()
    first = _describe({"note": "a" * 900, "x": torch.ones(3)}, itemizer)
    layout, sources = _own(first)
    arena = Arena(layout)
    arena.stage(sources).wait()
    for text in ("b" * 1000, "", "c" * 500, "d" * 1000):
        inventory = _describe({"note": text, "x": torch.ones(3)}, itemizer)
        assert inventory.structure == first.structure
        _, sources = _own(inventory)
        arena.stage(sources).wait()
        assert _loaded(_body(arena))["note"] == text
        start = layout.slots[0].offset
        slot = bytes(arena.memory[start : start + layout.slots[0].size_bytes])
        content = inventory.sources[0]
        assert isinstance(content, bytes)
        assert slot == content.ljust(len(slot), b"\0")
        assert _body(StreamedShard(layout, sources)) == _body(arena)


def test_a_value_outgrows_its_slot() -> None:
    """A value that no longer fits has another structure, is laid out anew and loads right.

    One that has become smaller keeps its slot.
    """
    itemizer = Itemizer()
    first = _describe({"note": "a", "x": torch.ones(3)}, itemizer)
    for size in (5_000, 500_000, 2):
        before = first
        first = _describe({"note": "b" * size, "x": torch.ones(3)}, itemizer)
        assert (first.structure == before.structure) == (size == 2), size
        layout, sources = _own(first)
        arena = Arena(layout)
        arena.stage(sources).wait()
        assert _loaded(_body(arena))["note"] == "b" * size


def test_a_save_overwrites_all_of_the_one_before() -> None:
    """Staged again with other values, an arena is the one that was staged with them alone."""
    layout, _ = _own(_describe(EVERYTHING))
    arena = Arena(layout)
    others = {
        name: each.clone().zero_() if isinstance(each, Tensor) else each
        for name, each in EVERYTHING.items()
    }
    for leaves in (EVERYTHING, others, EVERYTHING):
        _, sources = _own(_describe(leaves))
        arena.stage(sources).wait()
        fresh = Arena(layout)
        fresh.stage(sources).wait()
        assert arena.memory == fresh.memory


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_the_steady_state_takes_no_memory() -> None:
    """A second save of 48 MiB touches no page that was not there after the first."""
    leaves = {f"{number}": torch.ones(MIB // 4) for number in range(40)}
    leaves |= {"large": torch.ones(2 * MIB), "turned": torch.ones(64, 64).t()}
    layout, sources = _own(_describe(leaves))
    arena = Arena(layout)
    address = arena._tensor.data_ptr()
    arena.stage(sources).wait()
    dirty = mapping_of(arena.memory)["Private_Dirty"]
    before = _faults()
    arena.stage(sources).wait()
    assert _faults() - before < 1500  # of 12,288 pages, were it copied anywhere else
    assert mapping_of(arena.memory)["Private_Dirty"] == dirty
    assert arena._tensor.data_ptr() == address


def test_a_fork_between_two_saves_changes_nothing() -> None:
    """While a child lives, staging faults on no page of the arena, and none is doubled."""
    leaves = {f"{number}": torch.ones(MIB) for number in range(6)}
    layout, sources = _own(_describe(leaves))
    arena = Arena(layout)
    arena.stage(sources).wait()
    alone = mapping_of(arena.memory)
    with in_fork(lambda: None):
        assert mapping_of(arena.memory)["Private_Dirty"] >= image_bytes(layout)
        before = _faults()
        arena.stage(sources).wait()
        assert _faults() - before < 1500  # of 6,144 pages, were they copied; others are, all over
        assert mapping_of(arena.memory)["Rss"] == alone["Rss"]


# -- beside training -----------------------------------------------------------------------------


def test_only_what_may_wait_is_copied_later() -> None:
    """What is not marked is in the arena when `stage` returns; the rest when it was waited for."""
    let = threading.Event()
    layout, _ = _own(_describe({"a": torch.ones(3), "b": torch.ones(3), "c": 1}))
    arena = Arena(layout)
    _, (_, b, c) = _own(_describe({"a": torch.ones(3), "b": torch.ones(3) * 2, "c": 5}))
    copying = arena.stage([Gated.of(torch.ones(3), let), b, c], [True, False, False])
    early = _loaded(bytes(arena.memory[: arena.body_bytes]))
    assert early["a"].tolist() == [0.0] * 3
    assert early["b"].tolist() == [2.0] * 3
    assert early["c"] == 5
    let.set()
    copying.wait()
    assert _loaded(_body(arena))["a"].tolist() == [1.0] * 3


def test_an_arena_is_read_in_stretches_as_it_is_staged() -> None:
    """With a copy beside training the front is given out early; each stretch is whole blocks."""
    leaves = {str(number): torch.full((3 * MIB,), float(number)) for number in range(20)}
    layout, sources = _own(_describe(leaves))
    arena = Arena(layout)
    arena.stage(sources, [True] * len(sources)).begin()
    stretches = list(arena.stretches())
    assert len(stretches) > 1
    assert all(len(each) % BLOCK_BYTES == 0 for each in stretches[:-1])
    assert _loaded(b"".join(stretches))["19"][-1] == 19.0


@pytest.mark.parametrize("count", [1, 3])
def test_sources_must_be_one_for_each_slot(count: int) -> None:
    """A list of another length is a mistake of the caller's and copies nothing silently."""
    layout, sources = _own(_describe({"a": torch.ones(3), "b": torch.ones(3)}))
    with pytest.raises(ValueError, match="zip"):
        Arena(layout).stage((sources * 2)[:count])
