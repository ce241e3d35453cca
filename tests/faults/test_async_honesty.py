"""What an asynchronous save writes is what was live when `save` was called, whatever came after.

Training changes everything as soon as `save` has returned, before the first byte is written: a gate
sees to that, so that a snapshot which shares anything with the live state fails every time and not
by chance. A failure of the thread that writes is told once.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import threading
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_by_torch

from holdfast.caller import THREAD_NAME
from holdfast.errors import SaveFailedError
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Checkpoint, Store, checkpoint_name
from tests.faults.jobs import Job, damages, job_of_rank, leftovers, load, state_of
from tests.faults.local_stories import refuse_with, start
from tests.faults.places import Place
from tests.faults.report import record
from tests.faults.tiers import FULL, NEEDS_LOCAL
from tests.support.deadlines import LAUNCH_SECONDS
from tests.support.kernel_calls import Call
from tests.support.ranks import run_ranks
from tests.support.states import MODELS, digest
from tests.support.stores import FaultyFilesystem

SEEDS = range(100 if FULL else 8)

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64,
    torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


class _Everything(nn.Module):
    """Tensors of every dtype and of every relation to other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(5, 3)
        self.tied = nn.Linear(5, 3)
        self.tied.weight = self.plain.weight
        self.transposed = nn.Parameter(torch.randn(6, 4).t())
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        base = torch.randn(4, 6)
        self.register_buffer("whole", base)
        self.register_buffer("rows", base[1:3])
        self.register_buffer("columns", base[:, ::2])
        self.register_buffer("same_bytes", base.view(torch.int32))
        self.register_buffer("expanded", torch.randn(3, 1).expand(3, 5))
        self.register_buffer("part_of_much", torch.randn(10_000)[5:8])
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            self.register_buffer(f"{name}_matrix", torch.zeros(3, 5, dtype=dtype))
            self.register_buffer(f"{name}_scalar", torch.zeros((), dtype=dtype))
            self.register_buffer(f"{name}_empty", torch.zeros(0, dtype=dtype))


@torch.no_grad()
def _scramble(tensors: list[Tensor], generator: torch.Generator) -> None:
    """Give every storage new random bits."""
    for each in tensors:
        storage = each.untyped_storage()
        content = torch.empty(0, dtype=torch.uint8).set_(storage)
        low, high = (0, 2) if each.dtype is torch.bool else (0, 256)
        content.copy_(torch.randint(low, high, content.shape, generator=generator))


def _job_with_everything(directory: Path, **options: Any) -> Job:
    job = Job(directory, **options)
    job.run.model = _Everything()
    job.run.optimizer = torch.optim.SGD(job.run.model.parameters(), momentum=0.9)
    job.run.scheduler = torch.optim.lr_scheduler.ConstantLR(job.run.optimizer)
    for each in job.run.model.parameters():
        each.grad = torch.ones_like(each)
    job.run.optimizer.step()
    return job


def _live_tensors(job: Job) -> list[Tensor]:
    momenta = [each["momentum_buffer"] for each in job.run.optimizer.state.values()]
    return [*job.run.model.parameters(), *job.run.model.buffers(), *momenta]


def _expected(job: Job) -> dict[str, str]:
    """Digest what the shard files have to hold, by flat name."""
    model, found = job.run.model, {}
    for name, each in model.state_dict().items():
        found[f"model.{name}"] = digest(each)
    for name, parameter in model.named_parameters():
        momentum = job.run.optimizer.state[parameter]["momentum_buffer"]
        found[f"optimizer.state.{name}.momentum_buffer"] = digest(momentum)
    return found


def _stored(path: Path) -> dict[str, str]:
    """Digest every tensor of a checkpoint as torch reads it, without holdfast."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in metadata.items()
        if isinstance(each, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there are no other ranks
        load_by_torch(state, checkpoint_id=path, no_dist=True)
    return {name: digest(each) for name, each in state.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_tensors_changed_after_a_save_do_not_reach_the_file(seed: int, tmp_path: Path) -> None:
    """Whatever dtype, shape or relation a tensor has, its file holds what it was at the call."""
    generator = torch.Generator().manual_seed(seed)
    filesystem = FaultyFilesystem()
    job = _job_with_everything(tmp_path, filesystem=filesystem, async_save=True)
    _scramble(_live_tensors(job), generator)
    job.save()  # so that the next one goes into buffers that were used before
    for step in (1, 2):
        job.state.train_state.step = step
        _scramble(_live_tensors(job), generator)
        expected = _expected(job)
        filesystem.gate.clear()
        job.begin_save()
        _scramble(_live_tensors(job), generator)
        filesystem.gate.set()
        job.manager.finalize_async_saves(job.state, blocking=True)
        assert _expected(job) != expected
        stored = _stored(tmp_path / checkpoint_name(step))
        wrong = [name for name in expected if stored.get(name) != expected[name]]
        assert not wrong, f"seed {seed}, step {step}"


def _is_beside_training() -> bool:
    """Whether this thread works while training goes on: all do but those that it waits for."""
    thread = threading.current_thread()
    return thread is not threading.main_thread() and thread.name != THREAD_NAME


class _Gate:
    """Keeps every thread that works beside training from changing anything there."""

    def __init__(self, place: Place) -> None:
        self.calls = place.calls()
        self.calls.is_one_at_a_time = False
        self.calls.before = self._wait
        self._is_open = threading.Event()
        self._somebody_waits = threading.Event()

    def _wait(self, call: Call) -> None:
        if _is_beside_training() and call.changes:
            self._somebody_waits.set()
            assert self._is_open.wait(60), "nobody opened the gate"

    def close(self) -> None:
        self._is_open.clear()
        self._somebody_waits.clear()

    def open(self) -> None:
        """Let go of who waits, once somebody does."""
        assert self._somebody_waits.wait(60), "nobody came to the gate"
        self._is_open.set()


@pytest.mark.parametrize("staging", ["blocking", "overlapped"])
@pytest.mark.parametrize("kind", MODELS)
def test_training_on_does_not_reach_what_was_saved(place: Place, kind: str, staging: str) -> None:
    """Everything is restored as it was at the call, whatever training did before it was written.

    The thread that writes is kept from its first change while steps are taken. In RAM the memory
    that was staged into is the file: a later save that filled it too early would show as well.
    """
    for seed in SEEDS if FULL or not place.to_local else SEEDS[:1]:
        _train_on(place.inside(f"seed_{seed}"), kind, staging, seed)


def _train_on(place: Place, kind: str, staging: str, seed: int) -> None:
    job = place.start(kind=kind, seed=seed, async_save=True, staging=staging)
    job.load()
    gate = _Gate(place)
    for number in range(5 if place.to_local else 3):  # so that every buffer is used again
        job.train_to(job.step + 1 + number % 2)
        expected = state_of(job)
        with gate.calls.watching():
            gate.close()
            place.begin_save(job)
            job.train_to(job.step + 2)
            job.run.optimizer.param_groups[0]["lr"] = 0.5
            job.state.train_state.extra["later"] = [number]
            job.state.cfg["later"] = number
            gate.open()
            job.manager.finalize_async_saves(job.state, blocking=True)
        assert place.newest_beside(kind=kind, seed=seed + 1) == expected, (
            f"seed {seed}, save {number}"
        )
        if not place.to_local:
            run_config = place.shard(expected[0]).with_name("run_config.yaml").read_text()
            assert (f"later: {number - 1}" in run_config) == (number > 0)
    job.close()
    place.check_is_sound()


def test_a_failure_of_the_writer_is_told_once(place: Place) -> None:
    """At the step at which it is acted on, and never again; the save after it works."""
    job = place.start(async_save=True)
    job.load()
    told = 0
    for number in range(8):
        job.train_to(job.step + 1)
        place.save(job)
        stands = state_of(job)
        calls, seen = place.calls(), 0

        def fails(call: Call, number: int = number) -> None:
            nonlocal seen
            if _is_beside_training():
                seen += 1
                refuse_with(errno.EIO if seen > number else None, call)

        calls.before = fails
        job.train_to(job.step + 1)
        with calls.watching():
            place.begin_save(job)
            try:
                job.manager.finalize_async_saves(job.state, blocking=True)
                stands = state_of(job)
            except SaveFailedError as error:
                assert error.failures[0].errno == errno.EIO  # noqa: PT017  # some do not fail
                told += 1
        job.manager.finalize_async_saves(job.state, blocking=True)
        job.manager.finalize_async_saves(job.state)
        assert place.newest_beside() in (stands, state_of(job))
    job.train_to(job.step + 1)
    place.save(job)
    last = state_of(job)
    job.close()
    assert place.newest() == last
    assert told > 2
    if place.to_local:
        record("local: errno x call pairs", 8)


@NEEDS_LOCAL
def test_a_promoted_commit_is_what_was_saved(base: Path) -> None:
    """While a persistent checkpoint is made from a local commit, later saves do not reach it."""
    persistent = {"directory": str(base / "store"), "from_local": True}
    job: Job = start(base, async_save=True, persistent=persistent)
    job.load()
    for _ in range(3):
        job.train_to(job.step + 1)
        job.begin_save()
        expected = state_of(job)
        for _ in range(3):
            job.train_to(job.step + 1)
            job.begin_save(to_local=True)
        job.manager.finalize_async_saves(job.state, blocking=True)
        for each in (base / "local").glob("*/0/iter_*"):
            assert int(each.name[5:12]) <= job.step
        newest = start(base, local={"directory": str(base / "elsewhere")})
        assert load(newest) == expected
        newest.close()
    job.close()


def test_saves_of_changing_values_are_never_identical(tmp_path: Path) -> None:
    """While values change, no tensor of any save is that of another; while none does, all are."""
    generator = torch.Generator().manual_seed(0)
    keep = {"directory": str(tmp_path), "keep": {"last": None}}
    job = _job_with_everything(tmp_path, async_save=True, persistent=keep)
    saves = 60 if FULL else 20
    for step in range(saves):
        job.state.train_state.step = step
        _scramble(_live_tensors(job), generator)
        job.begin_save()
    for step in (saves, saves + 1):
        job.state.train_state.step = step
        job.begin_save()
    job.manager.finalize_async_saves(job.state, blocking=True)
    stored = [_stored(tmp_path / checkpoint_name(step)) for step in range(saves + 2)]
    # Of three bits or bytes random values agree now and then, and of nothing always.
    small = ("_empty", ".empty", ".empty.momentum_buffer", "_scalar", "bool_matrix")
    telling = [name for name in stored[0] if not name.endswith(small)]
    assert len(telling) > 20
    for one, other in combinations(range(saves), 2):
        assert not [name for name in telling if stored[one][name] == stored[other][name]]
    assert stored[saves - 1] == stored[saves] == stored[saves + 1]


# Nothing piles up.


class _Unsynced(LocalFilesystem):
    """Leaves out the waiting for the disk, which is not what is measured here."""

    def sync_file(self, path: Path, stream: Any) -> None: ...

    def sync_directory(self, path: Path) -> None: ...


def _resources() -> dict[str, int]:
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    own = [each for each in os.listdir("/dev/shm") if str(os.getpid()) in each]
    return {
        "threads": threading.active_count(),
        "system threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared memory": len(own) + sum("/dev/shm" in each for each in maps),
    }


def _resident_bytes() -> int:
    """Return what this process has of its own; pages of libraries come in as code is first run."""
    status = Path("/proc/self/status").read_text()
    (found,) = re.findall(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found) << 10


def _save_often(directory: Path, saves: int) -> tuple[dict[str, int], dict[str, int], int]:
    keep = {"directory": str(directory), "keep": {"last": 1}}
    job = Job(directory, filesystem=_Unsynced(), async_save=True, persistent=keep)
    job.load()

    def save(count: int) -> None:
        for _ in range(count):
            job.state.train_state.step += 1
            job.begin_save()
        job.manager.finalize_async_saves(job.state, blocking=True)

    save(50)  # imports, caches, allocator arenas
    before, resident_bytes = _resources(), _resident_bytes()
    save(saves)
    return before, _resources(), _resident_bytes() - resident_bytes


def test_many_saves_leave_nothing_behind(tmp_path: Path) -> None:
    """After many saves there are the same threads, descriptors and shared memory, and no files."""
    saves = 1000 if FULL else 200
    [(before, after, grown_bytes)] = run_ranks(
        _save_often,
        1,
        tmp_path,
        saves,
        timeout_seconds=(10 if FULL else 2) * LAUNCH_SECONDS,
        initialise=False,
    )
    assert after == before
    # One snapshot is some 10 KB: kept, they would be more.
    assert grown_bytes < 4 << 20, f"{grown_bytes} bytes more after {saves} saves"
    assert leftovers(tmp_path) == []
    assert damages(tmp_path) == []
    checkpoints = Store(PosixStorage(tmp_path, LocalFilesystem())).listing().checkpoints
    assert [each.iteration for each in checkpoints] == [50 + saves]
    assert len(list(tmp_path.iterdir())) == 4  # the checkpoint, run.json, a claim, the tracker


def _save_often_together(directory: Path) -> list[int]:
    job = job_of_rank(directory, filesystem=_Unsynced(), async_save=True)
    store: Any = distributed.distributed_c10d._get_default_store()
    keys = []
    for _ in range(3):
        for _ in range(20):
            job.state.train_state.step += 1
            job.begin_save()
            job.manager.finalize_async_saves(job.state)
        job.manager.finalize_async_saves(job.state, blocking=True)
        distributed.barrier()
        keys.append(store.num_keys())
    return keys


def test_many_saves_leave_no_keys_behind(tmp_path: Path) -> None:
    """What ranks said to one another in the rendezvous store is taken back as they go on."""
    for keys in run_ranks(_save_often_together, 2, tmp_path):
        assert max(keys) - min(keys) < 20, keys  # of 40 saves, each of a dozen turns


def test_a_save_is_seen_by_nobody_before_its_commit(tmp_path: Path) -> None:
    """While a save is being written the store lists what it listed before, and then both."""
    filesystem = FaultyFilesystem()
    job = Job(tmp_path, filesystem=filesystem, async_save=True)
    job.save()
    filesystem.gate.clear()
    job.train_to(3)
    job.begin_save()
    assert [each.iteration for each in _listed(tmp_path)] == [0]
    filesystem.gate.set()
    job.manager.finalize_async_saves(job.state, blocking=True)
    assert [each.iteration for each in _listed(tmp_path)] == [3, 0]


def _listed(directory: Path) -> tuple[Checkpoint, ...]:
    return Store(PosixStorage(directory, LocalFilesystem())).listing().checkpoints
