"""Every tensor is copied bit for bit, also beside training."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from holdfast.snapshot.copy import Copying, Pairs
from tests.support.tensors import DTYPES, SHAPES, VIEWS, Gated, bits, filled

KIB, MIB = 1 << 10, 1 << 20


def _copy(pairs: Pairs) -> None:
    Copying(pairs).wait()


def _target(source: Tensor) -> Tensor:
    return torch.empty(source.shape, dtype=source.dtype)


def test_every_type_and_shape_is_copied() -> None:
    """In one call, tensors of every type, with no dimension, no element or many, keep all bits."""
    sources = [filled(dtype, shape) for dtype in DTYPES for shape in SHAPES]
    targets = [_target(each) for each in sources]
    _copy(list(zip(targets, sources, strict=True)))
    for target, source in zip(targets, sources, strict=True):
        assert bits(target) == bits(source), (source.dtype, source.shape)


@pytest.mark.parametrize("width", [6, 60_000], ids=["small", "large"])
@pytest.mark.parametrize("name", VIEWS)
def test_every_view_is_copied(name: str, width: int) -> None:
    """What is not its own row-major memory arrives row-major, whatever its size."""
    source = VIEWS[name](width)
    target = _target(source)
    _copy([(target, source)])
    assert bits(target) == bits(source)


@pytest.mark.parametrize(
    "size_bytes",
    [
        1,
        256 * KIB - 1, 256 * KIB, 256 * KIB + 1,
        8 * MIB - 1, 8 * MIB, 8 * MIB + 1,
        24 * MIB + 3,
    ],
)  # fmt: skip
def test_large_memory_is_copied_to_its_last_byte_and_no_further(size_bytes: int) -> None:
    """Around the sizes at which the way of copying changes, nothing is left out or overrun."""
    source = torch.randint(0, 255, (size_bytes,), dtype=torch.uint8)
    around = torch.full((size_bytes + 128,), 255, dtype=torch.uint8)
    target = around[64:-64]
    _copy([(target, source)])
    assert torch.equal(target, source)
    assert bool((around[:64] == 255).all())
    assert bool((around[-64:] == 255).all())


@pytest.mark.parametrize("threads", [1, 3])
def test_many_sizes_at_once(threads: int) -> None:
    """Large and small tensors, plain and not, go where they belong in one copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sources = [filled(torch.int32, (size,), size) for size in range(60_000, 70_000, 1000)]
        sources += [each.flip(0).t() for each in (torch.rand(700, 400), torch.rand(3, 2))]
        sources += [torch.rand(4, requires_grad=True), torch.rand(90_000, requires_grad=True)]
        targets = [_target(each) for each in sources]
        _copy(list(zip(targets, sources, strict=True)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, targets, sources))
    assert not any(each.requires_grad for each in targets)
    assert all(each.grad is None for each in sources)


def test_nothing_is_copied_at_once() -> None:
    """No pairs are no work, no thread and no error."""
    copying = Copying([])
    copying.wait_below(1 << 60)
    copying.begin()
    copying.hold()
    copying.wait()


def test_a_copy_beside_training_is_held() -> None:
    """A copy that was begun returns at once; who holds it goes on when the last byte is there."""
    let, held = threading.Event(), threading.Event()
    source = torch.arange(5.0)
    targets = [torch.zeros(5), torch.zeros(100_000)]
    copying = Copying([(targets[0], Gated.of(source, let)), (targets[1], torch.ones(100_000))])
    copying.begin()
    assert targets[0].tolist() == [0.0] * 5

    def hold() -> None:
        copying.hold()
        held.set()

    holder = threading.Thread(target=hold)
    holder.start()
    assert not held.wait(0.05)
    let.set()
    holder.join()
    assert targets[0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert bool(targets[1].all())
    copying.wait()
    copying.wait()


def test_who_waits_first_copies() -> None:
    """Nothing is copied before somebody asks for it, and then once, by whoever asked first."""
    source, target = torch.ones(300_000), torch.zeros(300_000)
    copying = Copying([(target, source)])
    assert not bool(target.any())
    copying.finish()
    assert bool(target.all())
    source.zero_()
    copying.begin()
    copying.wait()
    assert bool(target.all())


@pytest.mark.parametrize("beside", [False, True])
def test_a_copy_that_fails_says_so_to_who_waits(beside: bool) -> None:
    """Who waits for the bytes is told each time; a step that holds is not stopped."""
    let = threading.Event()
    let.set()
    pairs = [(torch.zeros(2), Gated.of(torch.ones(2), let, RuntimeError("as planned")))]
    copying = Copying(pairs)
    if beside:
        copying.begin()
    copying.hold()
    copying.finish()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="as planned"):
            copying.wait()
        with pytest.raises(RuntimeError, match="as planned"):
            copying.wait_below(0)


def test_an_interrupt_reaches_who_was_interrupted_and_who_reads() -> None:
    """Ctrl-C in the middle of a copy is not swallowed, and nobody waits for the rest in vain."""
    let = threading.Event()
    let.set()
    copying = Copying([(torch.zeros(2), Gated.of(torch.ones(2), let, KeyboardInterrupt()))])
    with pytest.raises(KeyboardInterrupt):
        copying.finish()
    with pytest.raises(KeyboardInterrupt):
        copying.wait_below(0)


def test_the_front_is_never_ahead_of_the_bytes() -> None:
    """Who reads below the front while a copy goes on reads what was to be copied."""
    count, size = 40, 1 << 20
    memory = torch.zeros(count * size, dtype=torch.uint8)
    targets = memory.view(count, size).unbind()
    for turn in range(1, 30):
        sources = [torch.full((size,), turn, dtype=torch.uint8) for _ in range(count)]
        copying = Copying(list(zip(targets, sources, strict=True))[::-1])  # in whatever order
        copying.begin()
        for each in targets:
            copying.wait_below(each.data_ptr() + size)
            assert int(each[-1]) == int(each[0]) == turn
        copying.wait()


def test_nothing_is_read_while_training_waits() -> None:
    """Of a copy that training waits for, no part is given away before all of it is there."""
    let, read = threading.Event(), threading.Event()
    low, high = torch.zeros(300_000), torch.zeros(2)
    copying = Copying([(low, torch.ones(300_000)), (high, Gated.of(torch.ones(2), let))])
    training = threading.Thread(target=copying.finish)

    def reading() -> None:
        copying.wait_below(0)
        assert bool(low.all())
        assert bool(high.all())
        read.set()

    reader = threading.Thread(target=reading)
    for each in (training, reader):
        each.start()
    assert not read.wait(0.05)
    let.set()
    assert read.wait(30)
    for each in (training, reader):
        each.join()
