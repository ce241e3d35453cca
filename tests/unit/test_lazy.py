"""Tensors as views of mapped files: no copies, read when they are asked for, verified then."""

from __future__ import annotations

import io
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

import holdfast
from holdfast.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NoLoadableCheckpointError,
)
from holdfast.storage.digests import BLOCK_BYTES
from tests.support.managers import Live, linear, manager_of, step
from tests.support.stores import flip_bit, reseal


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Live]:
    """A store with checkpoints of iterations 1 and 2, and the live objects as of 2."""
    live = linear()
    manager = manager_of(tmp_path / "store")
    for _ in range(2):
        step(live)
        live.save(manager)
    return tmp_path / "store", live


def _weight(live: Live) -> torch.Tensor:
    assert isinstance(live.model, nn.Linear)
    return live.model.weight.detach()


def _is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the bytes of a tensor lie in a mapping of a shard file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, _, high = line.split()[0].partition("-")
        if int(low, 16) <= address < int(high, 16):
            return ".distcp" in line
    return False


def test_the_newest_checkpoint_of_a_store_is_opened(saved: tuple[Path, Live]) -> None:
    """A store means its newest checkpoint, a step means that one, a directory means itself."""
    store, live = saved
    tensors = holdfast.open_tensors(store)
    assert torch.equal(tensors["model.weight"], _weight(live))
    assert tensors.path == store / "iter_0000002"
    assert "optimizer.state.bias.exp_avg" in tensors
    older = holdfast.open_tensors(store, step=1)
    assert not torch.equal(older["model.weight"], _weight(live))
    assert torch.equal(
        holdfast.open_tensors(store / "iter_0000001")["model.weight"], older["model.weight"]
    )


@pytest.mark.parametrize(
    "name", ["copy", "a\\b", "two words", "no-break\u00a0space", "line\nbreak"]
)
def test_a_copy_may_have_any_name(saved: tuple[Path, Live], tmp_path: Path, name: str) -> None:
    """A checkpoint that was copied elsewhere is opened and loaded under whatever name it has."""
    store, live = saved
    copy = tmp_path / "copies" / name
    shutil.copytree(store / "iter_0000002", copy)
    assert torch.equal(holdfast.open_tensors(copy)["model.weight"], _weight(live))
    other = linear()
    manager = manager_of(tmp_path / "other", load={"directory": str(copy)})
    assert other.load(manager).iteration == 2
    assert torch.equal(_weight(other), _weight(live))


def test_a_tensor_in_one_piece_is_a_view_of_its_file(saved: tuple[Path, Live]) -> None:
    """No bytes are copied, and what is written into the tensor never reaches the file."""
    store, live = saved
    tensors = holdfast.open_tensors(store)
    weight = tensors["model.weight"]
    assert _is_mapped(weight)
    before = (store / "iter_0000002/__0_0.distcp").read_bytes()
    weight.fill_(7)
    assert torch.equal(weight, torch.full((2, 4), 7.0))
    assert (store / "iter_0000002/__0_0.distcp").read_bytes() == before
    assert torch.equal(holdfast.open_tensors(store)["model.weight"], _weight(live))


def test_a_model_takes_its_own_tensors_by_prefix(saved: tuple[Path, Live]) -> None:
    """With `prefix`, the names are those of the model, which can be assigned without a copy."""
    store, live = saved
    tensors = holdfast.open_tensors(store, prefix="model.")
    assert set(tensors) == {"weight", "bias"}
    with torch.device("meta"):
        model = nn.Linear(4, 2)
    model.load_state_dict(tensors, assign=True)
    assert _is_mapped(model.weight)
    inputs = torch.ones(1, 4)
    assert isinstance(live.model, nn.Linear)
    assert torch.equal(model(inputs), live.model(inputs))


def test_a_removed_checkpoint_stays_readable_while_it_is_open(saved: tuple[Path, Live]) -> None:
    """Retention may take a mapped file away; its bytes stay until the last tensor goes."""
    store, live = saved
    tensors = holdfast.open_tensors(store)
    weight = tensors["model.weight"]
    for each in (store / "iter_0000002").glob("*.distcp"):
        each.unlink()
    assert torch.equal(weight, _weight(live))
    assert isinstance(live.model, nn.Linear)
    assert torch.equal(tensors["model.bias"], live.model.bias)


def _big(tmp_path: Path) -> tuple[Path, nn.Module]:
    """Two tensors of two blocks each, so that each has blocks of its own."""
    torch.manual_seed(0)
    model = nn.ParameterList(torch.randn(BLOCK_BYTES // 2) for _ in range(2))
    Live(model).save(manager_of(tmp_path / "store"), 1)
    return tmp_path / "store", model


def test_damage_is_told_when_its_tensor_is_touched(tmp_path: Path) -> None:
    """Only the tensor in the bad block is refused, by file, block and name; others are fine."""
    store, model = _big(tmp_path)
    shard = store / "iter_0000001/__0_0.distcp"
    flip_bit(shard, BLOCK_BYTES // 2)
    tensors = holdfast.open_tensors(store)
    for _ in range(2):  # a failure is not taken for verified the second time
        with pytest.raises(CorruptCheckpointError, match=r"block 0 .*, in model\.0") as caught:
            tensors["model.0"]
        assert caught.value.path == str(shard)
        assert caught.value.byte_range == (0, BLOCK_BYTES - 1)
    assert torch.equal(tensors["model.1"], list(model.parameters())[1])
    unverified = holdfast.open_tensors(store, verify=False)["model.0"]
    assert not torch.equal(unverified, next(iter(model.parameters())))


def test_a_block_is_verified_once(tmp_path: Path) -> None:
    """Touched again, a tensor costs no digest: damage that comes later is not looked for."""
    store, _ = _big(tmp_path)
    tensors = holdfast.open_tensors(store)
    before = tensors["model.0"].clone()
    shard = store / "iter_0000001/__0_0.distcp"
    with shard.open("r+b") as stream:
        stream.seek(BLOCK_BYTES // 2)
        byte = stream.read(1)
        stream.seek(BLOCK_BYTES // 2)
        stream.write(bytes([byte[0] ^ 1]))
    assert not torch.equal(tensors["model.0"], before)
    with pytest.raises(CorruptCheckpointError):
        holdfast.open_tensors(store)["model.0"]


def test_a_tensor_in_several_chunks_is_put_together(tmp_path: Path) -> None:
    """What ranks saved in parts is whole, and a part that is nowhere is told."""
    store, whole = tmp_path / "store", torch.arange(24.0).view(4, 6)
    model = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(whole)
    Live(model).save(manager_of(store), 1)
    folder = store / "iter_0000001"
    _cut_in_two(folder, whole, keep=2)
    assert torch.equal(holdfast.open_tensors(store)["model.weight"], whole)
    _cut_in_two(folder, whole, keep=1)
    with pytest.raises(CorruptCheckpointError, match=r"no place for all of model\.weight"):
        holdfast.open_tensors(store)["model.weight"]


def _cut_in_two(folder: Path, whole: torch.Tensor, keep: int) -> None:
    """Replace the shard file by one that holds the tensor in two halves, or the first alone."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    content, chunks, places = b"", [], {}
    for column in (0, 3)[:keep]:
        stream = io.BytesIO()
        torch.save(whole[:, column : column + 3].clone(), stream)
        offsets = torch.Size([0, column])
        chunks.append(ChunkStorageMetadata(offsets, torch.Size([4, 3])))
        info = _StorageInfo("__0_0.distcp", len(content), len(stream.getvalue()))
        places[MetadataIndex("model.weight", offsets)] = info
        content += stream.getvalue()
    metadata.state_dict_metadata["model.weight"].chunks = chunks
    metadata.storage_data = places
    (folder / "__0_0.distcp").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(folder)


def test_shapes_that_are_special(tmp_path: Path) -> None:
    """Empty, zero-dimensional, 16-bit, boolean and complex tensors come out as they went in."""
    model = nn.Module()
    values = {
        "a_empty": torch.zeros(0, 3),
        "a_scalar": torch.tensor(5),
        "a_half": torch.randn(3).bfloat16(),
        "a_mask": torch.tensor([True, False]),
        "a_complex": torch.randn(2, dtype=torch.complex64),
    }
    for name, value in values.items():
        model.register_buffer(name, value)
    Live(model).save(manager_of(tmp_path), 1)
    tensors = holdfast.open_tensors(tmp_path, prefix="model.")
    assert len(tensors) == len(values)
    for name, value in values.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_what_is_not_there_is_told(tmp_path: Path, saved: tuple[Path, Live]) -> None:
    """No directory, an empty one, and a store whose checkpoints are all damaged."""
    with pytest.raises(CheckpointNotFoundError):
        holdfast.open_tensors(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError):
        holdfast.open_tensors(tmp_path / "empty")
    store, _ = saved
    for each in store.glob("iter_*/manifest.json"):
        each.write_bytes(b"garbage")
    with pytest.raises(NoLoadableCheckpointError):
        holdfast.open_tensors(store)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_torch_is_opened_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There are no digests to hold it against, which is said."""
    weight = torch.randn(3, 3)
    save({"model": {"weight": weight}}, checkpoint_id=tmp_path / "plain", no_dist=True)
    tensors = holdfast.open_tensors(tmp_path / "plain", prefix="model.")
    assert torch.equal(tensors["weight"], weight)
    assert "nothing vouches for its bytes" in caplog.text


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_memory_that_runs_out_at_an_access_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that only torch can extract needs memory; the file is not to blame without it."""
    save({"model": {"w": torch.rand(4, 3).t()}}, checkpoint_id=tmp_path, no_dist=True)
    tensors = holdfast.open_tensors(tmp_path)

    def run_out(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", run_out)
    with pytest.raises(MemoryError):
        tensors["model.w"]


def test_the_package_names_it_without_importing_torch() -> None:
    """`holdfast.open_tensors` is found on first use, as all of the public surface."""
    program = (
        "import sys, holdfast\n"
        "assert 'open_tensors' in holdfast.__all__ and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
