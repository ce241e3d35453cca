"""The container of a tensor in a shard file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from holdfast.format.layout import container_of

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint16,
    torch.bool,
    torch.complex64,
]
SHAPES = [(), (1,), (3,), (0,), (7, 0, 2), (64, 33), (2, 3, 5, 7)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_container_is_what_torch_save_writes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Size, header and place of the payload are those of a tensor that torch really saved."""
    tensor = torch.randint(0, 2, shape).to(dtype)
    stream = io.BytesIO()
    torch.save(tensor, stream)
    written = stream.getvalue()
    container = container_of(dtype, torch.Size(shape))
    assert container.size_bytes == len(written)
    assert written.startswith(container.header)
    assert container.payload_bytes == tensor.numel() * tensor.element_size()
    payload = written[len(container.header) :][: container.payload_bytes]
    assert payload == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_reads_a_container_that_was_filled_in(dtype: torch.dtype) -> None:
    """Header, payload and trailer put together are a file that stock torch loads weights-only."""
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    container = container_of(dtype, tensor.shape)
    payload = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    stream = io.BytesIO(container.header + payload + container.trailer)
    loaded = torch.load(stream, weights_only=True)
    assert loaded.dtype == dtype
    assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))


def test_no_tensor_is_filled_to_learn_its_container() -> None:
    """A large tensor's container takes none of its memory, with deterministic algorithms too."""
    size_bytes = 512 << 20
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        start = _peak_bytes()
        container_of(torch.uint8, torch.Size((size_bytes,)))
        assert _peak_bytes() - start < size_bytes // 8
    finally:
        torch.use_deterministic_algorithms(before)


def _peak_bytes() -> int:
    (line,) = [
        each
        for each in Path("/proc/self/status").read_text().splitlines()
        if each.startswith("VmHWM:")
    ]
    return int(line.split()[1]) << 10


def test_a_strided_tensor_has_another_header() -> None:
    """A transposed tensor of equal size is told apart by its header: its bytes lie otherwise."""
    stream = io.BytesIO()
    torch.save(torch.zeros(4, 4).t(), stream)
    assert not stream.getvalue().startswith(container_of(torch.float32, torch.Size((4, 4))).header)
