"""Tells damage of a checkpoint from a failure of the process that reads it.

Owns the one question on which a load decides between an older checkpoint and an error: could a
healthy process have read these bytes? Running out of memory, file descriptors or threads, and a
device that refuses work, say nothing about the file. Promises to import no torch: its errors are
known by name. Whatever is not recognised here is judged by the room that was reading.
"""

from __future__ import annotations

import errno

from holdfast.errors import RankFailure, StageFailedError

_EXHAUSTED = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS})
_TORCH_NAMES = frozenset({"OutOfMemoryError", "AcceleratorError"})
_BROKEN_EXCHANGE = "GroupBrokenError"
"""What the local tier calls a transfer between ranks that broke off."""
_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread")
"""What torch and Python put into a plain RuntimeError for lack of a type."""


def is_process_failure(error: BaseException) -> bool:
    """Return whether an error is of this process: the bytes it was reading are not to blame."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    if any(kind.__name__ in _TORCH_NAMES for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _TEXTS)


def blames_checkpoint(error: StageFailedError) -> bool:
    """Return whether every failure of a stage is of files that cannot be read, or of what carries
    them from other ranks: a reason to try another checkpoint, and no defect of this program.
    """
    return all(map(_is_out_of_reach, error.failures))


def _is_out_of_reach(failure: RankFailure) -> bool:
    if failure.errno is not None:
        return failure.errno not in _EXHAUSTED
    return failure.error == _BROKEN_EXCHANGE
