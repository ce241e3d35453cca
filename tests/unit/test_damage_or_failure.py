"""Damage of a checkpoint told from a failure of the process that reads it."""

from __future__ import annotations

import errno

import pytest
import torch

from holdfast.blame import is_process_failure


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("device-side assert"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENFILE, "Too many open files in system"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("can't start new thread"),
    ],
    ids=repr,
)
def test_exhaustion_and_devices_are_of_the_process(error: Exception) -> None:
    """What no other file would have been read by either is never the fault of this one."""
    assert is_process_failure(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.ESTALE, "Stale file handle"),
        EOFError(),
        RuntimeError("PytorchStreamReader failed reading zip archive"),
        RecursionError(),
    ],
    ids=repr,
)
def test_what_a_file_does_is_not(error: Exception) -> None:
    """A file that is gone, refused, unreadable or torn is damage: an older one may be sound."""
    assert not is_process_failure(error)
