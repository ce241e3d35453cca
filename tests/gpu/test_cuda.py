"""On a GPU every promise holds that holds for host memory: streams, pinned memory, resumed draws.

Skipped as a whole where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.manager import DefaultCheckpointManager
from tests.support.managers import Live, manager_of, zero
from tests.support.ranks import run_ranks
from tests.support.states import digest
from tests.support.tensors import DTYPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MODES: dict[str, dict[str, Any]] = {
    "blocking": {"async_save": True},
    "overlapped": {"async_save": True, "staging": "overlapped"},
    "synchronous": {"async_save": False},
}


class _Net(nn.Module):
    """Large and small parameters, one frozen, one half in precision, a buffer, one on the host."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        with torch.device(device):
            self.wide = nn.Linear(width, width)
            self.low = nn.Linear(width, 8, dtype=torch.bfloat16)
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.frozen = nn.Parameter(torch.rand(3, width), requires_grad=False)
            self.register_buffer("mean", torch.rand(width))
        self.register_buffer("calls", torch.tensor(7))


def _build(seed: int = 0, width: int = 512, device: str = "cuda") -> Live:
    torch.manual_seed(seed)
    net = _Net(width, device)
    trained = [each for each in net.parameters() if each.requires_grad]
    return Live(net, torch.optim.AdamW(trained, lr=0.1))


def _step(live: Live, seed: int = 0) -> None:
    assert isinstance(live.model, nn.Module)
    generator = torch.Generator().manual_seed(seed)
    for parameter in live.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.rand(parameter.shape, generator=generator).to(parameter)
    live.optimizer.step()
    live.state.train_state.step += 1


def _state(live: Live) -> list[str]:
    assert isinstance(live.model, nn.Module)
    return [digest(live.model.state_dict()), digest(live.optimizer.state_dict())]


def _finish(live: Live, manager: DefaultCheckpointManager) -> None:
    manager.finalize_async_saves(live.state, terminate=True)


def _spin(seconds: float = 0.05) -> None:
    """Keep the current stream busy, so that whoever does not wait for it is too early."""
    torch.cuda._sleep(int(seconds * 1.5e9))  # type: ignore[no-untyped-call]


# -- save and load -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("source", "target"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_every_bit_comes_back(tmp_path: Path, mode: str, source: str, target: str) -> None:
    """Whatever the mode, a save from one device loads on the other, bit for bit."""
    live = _build(device=source)
    for number in range(3):  # the second and third reuse plan and arena
        _step(live, number)
    manager = manager_of(tmp_path, **MODES[mode])
    for number in (3, 4, 5):
        _step(live, number)
        live.save(manager)
    expected = _state(live)
    _finish(live, manager)
    other = _build(seed=9, device=target)
    _step(other)
    other.load(manager_of(tmp_path))
    assert _state(other) == expected


@pytest.mark.parametrize("mode", MODES)
def test_tensors_of_every_kind(tmp_path: Path, mode: str) -> None:
    """Every type, views, empty tensors and tensors without a dimension survive the way."""

    class Odd(nn.Module):
        def __init__(self, fill: int) -> None:
            super().__init__()
            for number, dtype in enumerate(DTYPES):
                values = torch.full((33, 7), fill, device="cuda").to(dtype)
                self.register_buffer(f"kind{number}", values)
            self.register_buffer("view", torch.arange(600.0, device="cuda").view(20, 30).t())
            self.register_buffer("strided", torch.arange(90_000.0, device="cuda")[::2])
            self.register_buffer("empty", torch.empty(0, 3, device="cuda"))
            self.register_buffer("scalar", torch.tensor(float(fill), device="cuda"))
            turned = torch.full((5, 4), complex(fill, 1), device="cuda").conj()
            self.register_buffer("conjugate", turned)

    live = Live(Odd(3))
    manager = manager_of(tmp_path, **MODES[mode])
    live.save(manager, 1)
    _finish(live, manager)
    other = Live(Odd(0))
    other.load(manager_of(tmp_path))
    assert isinstance(live.model, nn.Module)
    assert isinstance(other.model, nn.Module)
    assert digest(other.model.state_dict()) == digest(live.model.state_dict())


def test_the_next_draw_on_the_gpu_is_the_same(tmp_path: Path) -> None:
    """The GPU's random numbers go on where the save was made."""
    live = _build()
    torch.rand(5, device="cuda")
    manager = manager_of(tmp_path)
    live.save(manager, 1)
    expected = torch.rand(100, device="cuda")
    torch.rand(7, device="cuda")
    live.load(manager)
    assert torch.equal(torch.rand(100, device="cuda"), expected)


def test_a_large_state_comes_back(tmp_path: Path) -> None:
    """Tensors beyond a digest block, loaded in pieces through pinned memory, arrive whole."""
    live = _build(width=4096)
    _step(live)
    manager = manager_of(tmp_path, async_save=True)
    live.save(manager, 1)
    expected = _state(live)
    _finish(live, manager)
    zero(live)
    live.load(manager_of(tmp_path))
    assert _state(live) == expected


# -- beside training -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_a_step_after_the_save_is_not_in_it(tmp_path: Path, mode: str) -> None:
    """Steps that follow at once, with the copy still to be made, leave the checkpoint alone."""
    live = _build(width=4096)
    _step(live)
    manager = manager_of(tmp_path, **MODES[mode])
    for number in range(4):
        expected = _state(live)
        _spin()  # the copy begins later than the host goes on
        live.save(manager, number + 1)
        _step(live, number)
        manager.finalize_async_saves(live.state, blocking=True)
        other = _build(seed=9, width=4096)
        other.load(manager_of(tmp_path))
        assert _state(other) == expected, number
        assert _state(live) != expected
    _finish(live, manager)


def test_a_step_on_another_stream_waits_too(tmp_path: Path) -> None:
    """The stream that an optimizer steps on is the one that waits."""
    live = _build(width=4096)
    _step(live)
    manager = manager_of(tmp_path, **MODES["overlapped"])
    live.save(manager, 1)
    _finish(live, manager)
    expected = _state(live)
    manager = manager_of(tmp_path, **MODES["overlapped"])
    live.load(manager)
    torch.cuda.synchronize()
    _spin()
    live.save(manager, 2)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        _step(live, 5)
    _finish(live, manager)
    other = _build(seed=9, width=4096)
    other.load(manager_of(tmp_path))
    assert _state(other) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("computes_on_default", [True, False])
def test_a_save_on_another_stream_waits_for_what_is_computed(
    tmp_path: Path, mode: str, computes_on_default: bool
) -> None:
    """A save sees what the current stream and the default one had been given to compute."""
    live = _build(width=4096)
    _step(live)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    computing = torch.cuda.default_stream() if computes_on_default else side
    manager = manager_of(tmp_path, **MODES[mode])
    with torch.cuda.stream(computing):
        _spin()
        zero(live)
    with torch.cuda.stream(side):
        live.save(manager, 1)
    _finish(live, manager)
    expected = _state(live)
    other = _build(seed=9, width=4096)
    other.load(manager_of(tmp_path))
    assert _state(other) == expected


def test_another_road_waits_by_name(tmp_path: Path) -> None:
    """After `wait_staged` parameters may be changed by hand."""
    live = _build(width=4096)
    _step(live)
    expected = _state(live)
    manager = manager_of(tmp_path, **MODES["overlapped"])
    _spin()
    live.save(manager, 1)
    manager.wait_staged()
    zero(live)
    _finish(live, manager)
    live.load(manager_of(tmp_path))
    assert _state(live) == expected


def test_a_blocking_save_is_done_with_every_stream(tmp_path: Path) -> None:
    """When a blocking save has returned any stream may write to the parameters."""
    live = _build(width=4096)
    _step(live)
    expected = _state(live)
    manager = manager_of(tmp_path, **MODES["blocking"])
    _spin()
    live.save(manager, 1)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        zero(live)
    _finish(live, manager)
    live.load(manager_of(tmp_path))
    assert _state(live) == expected


def test_an_overlapped_save_keeps_the_host_from_nothing(tmp_path: Path) -> None:
    """A save, and the step after it, return while the GPU is still at what came before."""
    torch.manual_seed(0)
    net = nn.Linear(2048, 2048, device="cuda")
    live = Live(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    manager = manager_of(tmp_path, **MODES["overlapped"])
    _step(live)
    for number in (1, 2):
        live.save(manager, number)
        manager.finalize_async_saves(live.state, blocking=True)
        _step(live, number)
    expected = _state(live)
    torch.cuda.synchronize()
    ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
    _spin(1.0)
    ended.record()
    live.save(manager, 3)
    assert not ended.query(), "the save waited for the GPU"  # type: ignore[no-untyped-call]
    live.optimizer.step()
    assert not ended.query(), "the step made the host wait"  # type: ignore[no-untyped-call]
    _finish(live, manager)
    assert _state(live) != expected
    live.load(manager_of(tmp_path))
    assert _state(live) == expected


# -- ranks ---------------------------------------------------------------------------------------


def _save_and_load(root: Path, backend: str) -> list[str]:
    """On each rank: save what is sharded over, or replicated on, the GPU; load it; compare."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group(backend)
    found = []
    for mode, settings in MODES.items():
        states = []
        for seed in (0, 9):
            torch.manual_seed(seed)
            net: nn.Module = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 70)).cuda()
            if backend == "nccl":
                mesh = init_device_mesh("cuda", (distributed.get_world_size(),))
                fully_shard(net, mesh=mesh)
                live = Live(net, torch.optim.AdamW(net.parameters(), lr=0.1))
            else:
                net = DistributedDataParallel(net)
                live = Live(net, torch.optim.AdamW(net.parameters(), lr=0.1))
            net(torch.ones(3, 512, device="cuda")).sum().backward()
            live.optimizer.step()
            manager = manager_of(root / mode, **settings)
            if seed == 0:
                live.save(manager, 1)
                states.append(_state(live))
                live.optimizer.step()
            else:
                live.load(manager)
                states.append(_state(live))
            _finish(live, manager)
        found.append(f"{mode}: {states[0] == states[1]}")
    distributed.destroy_process_group()
    return found


@pytest.mark.parametrize(("backend", "ranks"), [("nccl", 1), ("gloo", 2)])
def test_ranks_on_a_gpu(tmp_path: Path, backend: str, ranks: int) -> None:
    """FSDP2 over NCCL, and DDP with two ranks that share a GPU, load what they saved."""
    results = run_ranks(
        _save_and_load, ranks, tmp_path, backend, timeout_seconds=100, initialise=False
    )
    assert results == [[f"{mode}: True" for mode in MODES]] * ranks


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_save_takes_no_memory_of_the_gpu(tmp_path: Path, mode: str) -> None:
    """Nothing of a save is staged on the GPU, where there is never room."""
    live = _build(width=2048)
    _step(live)
    manager = manager_of(tmp_path, **MODES[mode])
    live.save(manager, 1)
    manager.finalize_async_saves(live.state, blocking=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    live.save(manager, 2)
    manager.finalize_async_saves(live.state, blocking=True)
    assert torch.cuda.max_memory_allocated() - before <= 2 << 20
    _finish(live, manager)
    assert torch.cuda.memory_allocated() == before


def test_the_arena_is_pinned_until_it_is_given_back(tmp_path: Path) -> None:
    """The memory that a GPU copies into is fixed in place, and let go of at the end."""
    live = _build()
    _step(live)
    manager = manager_of(tmp_path, **MODES["blocking"])
    live.save(manager, 1)
    arena = manager._snapshotter._shards._arena
    assert arena is not None
    memory = torch.frombuffer(arena.memory, dtype=torch.uint8)
    assert memory.is_pinned()
    _finish(live, manager)
    assert not memory.is_pinned()


def test_another_structure_pins_anew(tmp_path: Path) -> None:
    """A state that has grown is laid out anew, in memory that is pinned as well."""
    live = _build(width=64)
    manager = manager_of(tmp_path, **MODES["blocking"])
    live.save(manager, 1)
    _step(live)  # the optimizer has state from now on
    live.save(manager, 2)
    expected = _state(live)
    arena = manager._snapshotter._shards._arena
    assert arena is not None
    assert torch.frombuffer(arena.memory, dtype=torch.uint8).is_pinned()
    _finish(live, manager)
    zero(live)
    live.load(manager_of(tmp_path))
    assert _state(live) == expected


# -- the local tier ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_local_checkpoints_of_a_gpu(tmp_path: Path, mode: str) -> None:
    """Files that take turns in RAM are pinned, filled by the GPU, and loaded back into it."""
    pytest.importorskip("nvidia_resiliency_ext")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("there is no /dev/shm")
    import tempfile

    with tempfile.TemporaryDirectory(dir=shared) as folder:
        local = {"directory": folder, "keep": {"last": 2}}
        live = _build(width=2048)
        _step(live)
        manager = manager_of(tmp_path / "store", local=local, **MODES[mode])
        live.save(manager, 1)
        for number in range(2, 7):
            _step(live, number)
            expected = _state(live)
            _spin(0.01)
            live.save(manager, number, non_persistent_ckpt=True)
        _step(live, 20)
        _finish(live, manager)
        other = _build(seed=9, width=2048)
        other_manager = manager_of(tmp_path / "store", local=local, **MODES[mode])
        result = other.load(other_manager)
        assert (result.iteration, result.tier) == (6, "local")
        assert _state(other) == expected
        _finish(other, other_manager)
