"""A failure of the process that loads is no damage: nothing older is taken for it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from holdfast.errors import CheckpointError, StageFailedError
from holdfast.filesystem import LocalFilesystem
from tests.support.managers import Live, linear, manager_of, step
from tests.support.states import digest


class _Failing(LocalFilesystem):
    """A file system on which the n-th opening of a file fails as it does for lack of something."""

    def __init__(self, make_error: Callable[[Path], Exception]) -> None:
        super().__init__()
        self.fails_at: int | None = None
        self.opened = 0
        self._make_error = make_error

    def open_existing(self, path: Path) -> BinaryIO:
        self.opened += 1
        if self.opened == self.fails_at:
            raise self._make_error(path)
        return super().open_existing(path)


def _too_many_files(path: Path) -> Exception:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))


def _no_memory(_: Path) -> Exception:
    return MemoryError()


def _cannot_be_read(path: Path) -> Exception:
    return OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def _settings(tmp_path: Path, tier: str) -> dict[str, Any]:
    return {"local": {"directory": str(tmp_path / "local")}} if tier == "local" else {}


def _saved(tmp_path: Path, tier: str) -> None:
    """Save iterations 1 and 2 to the tier; each is a good checkpoint."""
    live, manager = linear(), manager_of(tmp_path / "store", **_settings(tmp_path, tier))
    live.load(manager)
    for iteration in (1, 2):
        step(live, iteration)
        live.save(manager, iteration, non_persistent_ckpt=tier == "local")
    manager.finalize_async_saves(live.state, terminate=True)


@pytest.mark.parametrize("tier", ["persistent", "local"])
@pytest.mark.parametrize("make_error", [_too_many_files, _no_memory])
def test_a_lack_of_something_never_costs_a_checkpoint(
    tmp_path: Path, tier: str, make_error: Callable[[Path], Exception]
) -> None:
    """At whichever file it happens, the load raises, and the next one takes the newest."""
    _saved(tmp_path, tier)
    shutil.copytree(tmp_path, tmp_path / "kept")
    counting = _Failing(make_error)
    live, manager = linear(5), manager_of(tmp_path / "store", counting, **_settings(tmp_path, tier))
    assert live.load(manager).iteration == 2
    manager.finalize_async_saves(live.state, terminate=True)
    raised = 0
    for number in range(1, counting.opened + 1):
        filesystem = _Failing(make_error)
        filesystem.fails_at = number
        live = linear(5)
        manager = manager_of(tmp_path / "store", filesystem, **_settings(tmp_path, tier))
        try:
            result = live.load(manager)
        except (StageFailedError, MemoryError):  # never one that says damage
            raised += 1
            result = live.load(manager)
        assert (result.iteration, result.tier, result.skipped) == (2, tier, ()), number
        manager.finalize_async_saves(live.state, terminate=True)
    assert raised >= counting.opened // 2, "it was raised"


@pytest.mark.parametrize("tier", ["persistent", "local"])
def test_a_file_that_cannot_be_read_does(tmp_path: Path, tier: str) -> None:
    """The same with EIO is damage: somewhere on the way an older checkpoint is taken."""
    _saved(tmp_path, tier)
    found = set()
    for number in range(1, 12):
        filesystem = _Failing(_cannot_be_read)
        filesystem.fails_at = number
        live = linear(5)
        manager = manager_of(tmp_path / "store", filesystem, **_settings(tmp_path, tier))
        try:
            found.add(live.load(manager).iteration)
        except CheckpointError:
            found.add(-1)
        manager.finalize_async_saves(live.state, terminate=True)
    assert {1, 2} <= found


@pytest.mark.parametrize("tier", ["persistent", "local"])
def test_a_hook_that_raises_is_an_error(tmp_path: Path, tier: str) -> None:
    """Whatever a hook of the user's raises, an OSError included, no older checkpoint is taken."""
    _saved(tmp_path, tier)
    for error in (OSError(errno.ENOENT, "my own file"), ValueError("mine"), MemoryError()):
        live = linear(5)
        assert isinstance(live.model, torch.nn.Module)

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        live.model.register_state_dict_post_hook(fail)
        manager = manager_of(tmp_path / "store", **_settings(tmp_path, tier))
        with pytest.raises(StageFailedError) as caught:
            live.load(manager)
        assert type(error).__name__ in str(caught.value)
        manager.finalize_async_saves(live.state, terminate=True)


def _under_default_device(live: Live, manager: Any) -> None:
    with torch.device("meta"):
        live.load(manager)


@pytest.mark.parametrize("tier", ["persistent", "local"])
def test_a_default_device_does_not_matter(tmp_path: Path, tier: str) -> None:
    """With another default device than the CPU the newest is loaded, to the last bit."""
    _saved(tmp_path, tier)
    plain, elsewhere = linear(5), linear(6)
    for live, load in ((plain, Live.load), (elsewhere, _under_default_device)):
        manager = manager_of(tmp_path / "store", **_settings(tmp_path, tier))
        load(live, manager)
        manager.finalize_async_saves(live.state, terminate=True)
    for name, value in plain.model.state_dict().items():  # type: ignore[union-attr]  # one module
        assert digest(value) == digest(elsewhere.model.state_dict()[name])  # type: ignore[union-attr]
    assert digest(plain.optimizer.state_dict()) == digest(elsewhere.optimizer.state_dict())
