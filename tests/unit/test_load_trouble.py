"""What a load makes of trouble: damage, a checkpoint that does not fit, a failure of this process.

Only damage may send a load to an older checkpoint.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

from holdfast.errors import (
    NoLoadableCheckpointError,
    NothingFitsError,
    StageFailedError,
    StateMismatchError,
    UnsupportedStateError,
)
from holdfast.filesystem import LocalFilesystem
from holdfast.format.layout import container_of
from holdfast.read.reader import ForeignReader
from holdfast.storage import open_storage
from tests.support.managers import Live, linear, manager_of, step
from tests.support.states import digest
from tests.support.stores import tree


class _Refusing(LocalFilesystem):
    """Files of one checkpoint raise what they are told to when they are opened for reading."""

    def __init__(self, error: Callable[[Path], BaseException], name: str, part: str) -> None:
        super().__init__()
        self._error, self._name, self._part = error, name, part

    def open_existing(self, path: Path) -> BinaryIO:
        if path.name == self._part and self._name in str(path):
            raise self._error(path)
        return super().open_existing(path)


def _store(root: Path) -> Live:
    """Save iterations 1 and 2; return what was saved last."""
    live, manager = linear(), manager_of(root)
    for _ in range(2):
        step(live)
        live.save(manager)
    return live


PARTS = ("__0_0.distcp", ".metadata", "run_config.yaml", "train_state.json")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, part: str, number: int) -> None:
    """The next older checkpoint is loaded, and the result names the file and why."""
    _store(tmp_path)
    filesystem = _Refusing(
        lambda path: OSError(number, os.strerror(number), str(path)), "iter_0000002", part
    )
    result = linear(1).load(manager_of(tmp_path, filesystem))
    assert result.iteration == 1
    (skipped,) = result.skipped
    assert skipped.iteration == 2
    assert part in skipped.reason


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "error",
    [
        lambda path: MemoryError(),
        lambda path: OSError(errno.ENOMEM, "Cannot allocate memory", str(path)),
        lambda path: OSError(errno.EMFILE, "Too many open files", str(path)),
        lambda path: OSError(errno.ENFILE, "Too many open files in system", str(path)),
        lambda path: torch.OutOfMemoryError("CUDA out of memory"),
        lambda path: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["memory", "ENOMEM", "EMFILE", "ENFILE", "device memory", "allocator"],
)
def test_a_failure_of_this_process_loads_nothing_older(
    tmp_path: Path, part: str, error: Callable[[Path], BaseException]
) -> None:
    """The error reaches the caller, and counters are those from before."""
    _store(tmp_path)
    live = linear(1)
    manager = manager_of(tmp_path, _Refusing(error, "iter_0000002", part))
    with pytest.raises(StageFailedError) as caught:
        live.load(manager)
    assert not isinstance(caught.value, NoLoadableCheckpointError)
    assert live.state.train_state.step == 0


class _Hooked(nn.Linear):
    """A module whose state dict may raise, as a user's hook may."""

    raises: BaseException | None = None

    def get_extra_state(self) -> dict[str, int]:
        if self.raises is not None:
            raise self.raises
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        if self.raises is not None:
            raise self.raises


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "a table"), ValueError("hook"), KeyError("hook")], ids=repr
)
def test_a_hook_that_raises_is_not_damage(tmp_path: Path, error: Exception) -> None:
    """A user's own error reaches the caller, even one that a missing file would raise."""
    saving = manager_of(tmp_path)
    for iteration in (1, 2):
        Live(_Hooked(4, 2)).save(saving, iteration)
    model = _Hooked(4, 2)
    model.raises = error
    live = Live(model)
    before = tree(tmp_path)
    with pytest.raises(StageFailedError, match=type(error).__name__):
        live.load(manager_of(tmp_path))
    assert live.state.train_state.step == 0
    assert tree(tmp_path) == before


class _Stubborn(torch.Tensor):
    """A tensor that takes no copies, as one on a device that refuses."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") == "copy_":
            raise RuntimeError("the device refuses")
        return super().__torch_function__(function, types, arguments, named or {})  # type: ignore[no-untyped-call]


def test_a_target_that_refuses_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that fails in the live tensor is an error, and nothing older is loaded."""
    live, saving = Live(_with_buffer(torch.ones(3))), manager_of(tmp_path)
    for iteration in (1, 2):
        live.save(saving, iteration)
    table, copy = torch.zeros(3, dtype=torch.float64), torch.Tensor.copy_

    def refuse(target: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if target.data_ptr() == table.data_ptr():
            raise RuntimeError("the device refuses")
        return copy(target, *arguments)

    monkeypatch.setattr(torch.Tensor, "copy_", refuse)
    with pytest.raises(StageFailedError, match="the device refuses"):
        Live(_with_buffer(table)).load(manager_of(tmp_path), strict=False)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_target_that_refuses_what_torch_wrote_is_not_damage(tmp_path: Path) -> None:
    """Torch's own reader copies as it reads; what the live tensor raises is still told apart."""
    state: Any = {"model": _with_buffer(torch.ones(3)).state_dict()}
    save(state, checkpoint_id=tmp_path, no_dist=True)
    records: Any = dict.fromkeys(each.name for each in tmp_path.iterdir())
    metadata = (tmp_path / ".metadata").read_bytes()
    reader = ForeignReader.open(open_storage(tmp_path, LocalFilesystem()), metadata, records)
    with pytest.raises(RuntimeError, match="the device refuses"):
        reader.read_tensors({"model.table": torch.zeros(3).as_subclass(_Stubborn)})


# -- nothing is assumed restored -----------------------------------------------------------------


class _Nest(nn.Module):
    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("saved", "live", "hint"),
    [
        (nn.Linear(4, 2), _Nest("inner", nn.Linear(4, 2)), 'the prefix "inner."'),
        (_Nest("inner", nn.Linear(4, 2)), nn.Linear(4, 2), 'drop the prefix "inner."'),
        (nn.Linear(4, 2), _Nest("a", _Nest("b", nn.Linear(4, 2))), 'the prefix "a.b."'),
    ],
    ids=["too little", "too much", "two parts"],
)
def test_a_model_that_would_get_nothing_is_refused(
    tmp_path: Path, saved: nn.Module, live: nn.Module, hint: str, strict: bool
) -> None:
    """Not one name in common is an error, strict or not, and says which prefix would do."""
    Live(saved).save(manager_of(tmp_path), 3)
    before = digest(live.state_dict())
    with pytest.raises(NothingFitsError, match="no name of the checkpoint fits") as caught:
        Live(live).load(manager_of(tmp_path), strict=strict)
    assert hint in str(caught.value)
    assert isinstance(caught.value, StateMismatchError)
    assert digest(live.state_dict()) == before


def test_names_that_nothing_explains_get_no_advice(tmp_path: Path) -> None:
    """Without a prefix in sight the error only says what either side has."""
    Live(_Nest("one", nn.Linear(4, 2))).save(manager_of(tmp_path), 3)
    with pytest.raises(NothingFitsError) as caught:
        Live(_Nest("other", nn.BatchNorm1d(2, affine=False))).load(
            manager_of(tmp_path), strict=False
        )
    assert "prefix" not in str(caught.value)
    assert "model.one.bias" in str(caught.value)


def test_what_is_loaded_in_part_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However many names are missing, one line says how many and names the first."""
    Live(nn.ModuleList([nn.Linear(2, 2)])).save(manager_of(tmp_path), 3)
    Live(nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])).load(
        manager_of(tmp_path), strict=False
    )
    (told,) = [each.message for each in caplog.records if "in part" in each.message]
    assert "16 (model.1.bias, model.1.weight, model.2.bias, ...)" in told


def _meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 2)


def _meta_buffer() -> nn.Module:
    model = nn.Linear(4, 2)
    model.register_buffer("table", torch.empty(3, device="meta"))
    return model


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("build", [_meta, _meta_buffer])
def test_a_tensor_without_memory_is_refused(
    tmp_path: Path, build: Callable[[], nn.Module], strict: bool
) -> None:
    """A meta tensor is named before anything is touched, in the checkpoint or not."""
    Live(nn.Linear(4, 2)).save(manager_of(tmp_path), 3)
    model = build()
    live = Live(model)
    with pytest.raises(UnsupportedStateError, match=r"Materialise first.*to_empty") as caught:
        live.load(manager_of(tmp_path), strict=strict)
    assert "model." in str(caught.value)
    assert live.state.train_state.step == 0


def test_parameters_left_on_meta_in_an_optimizer_are_refused(tmp_path: Path) -> None:
    """An optimizer made before `to_empty` holds the parameters from before: they are named."""
    linear().save(manager_of(tmp_path), 3)
    model = _meta()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.to_empty(device="cpu")
    with pytest.raises(UnsupportedStateError, match=r"param_groups\[0\]\.params\[0\]"):
        Live(model, optimizer).load(manager_of(tmp_path))


def _with_buffer(value: torch.Tensor) -> nn.Module:
    model = nn.Linear(4, 2)
    model.register_buffer("table", value)
    return model


UNREACHABLE: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.empty(3, device="meta"),
    "mkldnn": lambda: torch.ones(3, 3).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "lazy": nn.parameter.UninitializedBuffer,
    "opaque": lambda: torch.ones(3).as_subclass(_Stubborn),
}


@pytest.mark.parametrize("kind", UNREACHABLE)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_no_copy_reaches_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """At the save, at a later save where the buffer has changed its kind, and at the load."""
    manager = manager_of(tmp_path)
    with pytest.raises(UnsupportedStateError, match=r"model\.table"):
        Live(_with_buffer(UNREACHABLE[kind]())).save(manager, 1)
    model = _with_buffer(torch.ones(3))
    Live(model).save(manager, 1)
    model.table = UNREACHABLE[kind]()
    with pytest.raises(UnsupportedStateError, match=r"model\.table"):
        Live(model).save(manager, 2)
    weight = digest(model.weight)
    with pytest.raises(UnsupportedStateError, match=r"model\.table"):
        Live(model).load(manager_of(tmp_path), strict=False)
    assert digest(model.weight) == weight


def test_a_meta_tensor_in_other_state_is_refused_at_the_save(tmp_path: Path) -> None:
    """Data and scheduler state are looked at too."""

    class _Data:
        def state_dict(self) -> dict[str, Any]:
            return {"order": [torch.empty(3, device="meta")]}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    with pytest.raises(UnsupportedStateError, match=r"rank 0 data\.order\[0\]"):
        Live(nn.Linear(4, 2), data=_Data()).save(manager_of(tmp_path), 1)


# -- what was saved and not asked for ------------------------------------------------------------


class _Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(9))


class _Loader(torch.utils.data.DataLoader[int]):
    """Has no length, so that its truth value cannot be asked for."""

    position = 3

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class _Empty:
    """A scheduler or an iterator that is false, as one without entries may be."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def __bool__(self) -> bool:
        return False

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def test_an_iterator_without_length_or_truth_is_saved(tmp_path: Path) -> None:
    """Whether something is there is never asked of its truth value."""
    loader = _Loader(_Stream())
    loader.position = 7
    Live(nn.Linear(4, 2), scheduler=_Empty(5), data=loader).save(manager_of(tmp_path), 1)
    restored, scheduler = _Loader(_Stream()), _Empty()
    Live(nn.Linear(4, 2), scheduler=scheduler, data=restored).load(manager_of(tmp_path))
    assert (restored.position, scheduler.value) == (7, 5)


def test_state_that_nobody_asked_for_is_named_once_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Optimizer, scheduler and data that are saved and not given to the load are one line each."""
    saved = linear()
    step(saved)
    saved.scheduler, saved.data = _Empty(5), _Empty(7)
    saved.save(manager_of(tmp_path))
    Live(linear(1).model).load(manager_of(tmp_path), strict=False)
    told = [each.message for each in caplog.records if "left out" in each.message]
    parts = sorted(part for each in told for part in _COMPONENTS if part in each)
    assert parts == sorted(_COMPONENTS), told


_COMPONENTS = ("optimizer state,", "scheduler state,", "data position,")


def test_a_load_of_less_names_only_what_it_could_have_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With model and optimizer skipped, the optimizer was not forgotten."""
    saved = linear()
    step(saved)
    saved.scheduler = _Empty(5)
    saved.save(manager_of(tmp_path))
    live = Live(linear(1).model)
    live.load(manager_of(tmp_path), skip_load_to_model_and_opt=True)
    assert "scheduler state" in caplog.text
    assert "optimizer state" not in caplog.text


def test_an_ordinary_resume_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All that was saved is asked for, and all that is asked for was saved."""
    saved = linear()
    step(saved)
    saved.scheduler, saved.data = _Empty(5), _Empty(7)
    saved.save(manager_of(tmp_path))
    live = linear(1)
    live.scheduler, live.data = _Empty(), _Empty()
    assert live.load(manager_of(tmp_path)).found
    assert [each.message for each in caplog.records if each.levelname == "WARNING"] == []


class _Half:
    def state_dict(self) -> dict[str, int]:
        return {"position": 1}


@pytest.mark.parametrize(
    "data",
    [_Half(), iter(range(3)), (each for each in range(3))],
    ids=["half", "iterator", "generator"],
)
def test_an_iterator_that_cannot_come_back_is_named_at_the_first_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: Any
) -> None:
    """Once, by its type, with what it lacks."""
    live = Live(nn.Linear(4, 2), data=data)
    manager = manager_of(tmp_path)
    for iteration in (1, 2):
        live.save(manager, iteration)
    told = [each.message for each in caplog.records if "train_data_iterator" in each.message]
    assert len(told) == 1
    assert type(data).__name__ in told[0]
    assert "load_state_dict" in told[0]


# -- default device and dtype --------------------------------------------------------------------


@contextmanager
def _other_defaults() -> Iterator[None]:
    container_of.cache_clear()  # what was made under the usual ones is no proof
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        container_of.cache_clear()


def _trained(seed: int, steps: int) -> Live:
    """Return a model with an empty tensor and one of a dtype of its own."""
    live = linear(seed)
    live.model.register_buffer("nothing", torch.empty(0, 3))  # type: ignore[union-attr]
    live.model.register_buffer("narrow", torch.full((5,), float(seed), dtype=torch.bfloat16))  # type: ignore[union-attr]
    live.scheduler = torch.optim.lr_scheduler.StepLR(live.optimizer, 7)
    for _ in range(steps):
        step(live)
    return live


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_default_device_and_dtype_change_nothing(tmp_path: Path, asynchronous: bool) -> None:
    """Saved and loaded under another default device and dtype, the bytes are the same."""

    def write(root: Path, around: AbstractContextManager[None]) -> dict[str, Any]:
        live, manager = _trained(0, 2), manager_of(root, run_id="r", async_save=asynchronous)
        with around:
            live.save(manager)
            manager.finalize_async_saves(live.state, blocking=True, terminate=True)
        return {name: each for name, each in tree(root).items() if name.endswith(".distcp")}

    expected = write(tmp_path / "plain", nullcontext())
    assert write(tmp_path / "meta", _other_defaults()) == expected
    live = _trained(1, 0)
    with _other_defaults():
        assert live.load(manager_of(tmp_path / "plain")).iteration == 2
    saved = _trained(0, 2)
    assert digest(live.model.state_dict()) == digest(saved.model.state_dict())  # type: ignore[union-attr]
    ours, theirs = live.optimizer.state_dict()["state"], saved.optimizer.state_dict()["state"]
    assert digest(ours) == digest(theirs)
