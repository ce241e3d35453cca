"""Whether an error says something about a checkpoint, or about the process that was reading it.

Owns that distinction: damage sends all ranks to another checkpoint, and what happened to a process
(memory, descriptors, threads) never does. Knows torch's errors by their names only.
"""

from __future__ import annotations

import errno

from holdfast.errors import RankFailure, StageFailedError

_EXHAUSTED = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS})
_TORCH_NAMES = frozenset({"OutOfMemoryError", "AcceleratorError"})
_BROKEN_EXCHANGE = "GroupBrokenError"
"""The local tier's error for an interrupted transfer between ranks."""
_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "can't start new thread",
)
"""Messages of plain RuntimeErrors by which torch and Python report exhausted resources."""


def is_process_failure(error: BaseException) -> bool:
    """Whether this process caused an error, and not the bytes that it was reading."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    if any(kind.__name__ in _TORCH_NAMES for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _MESSAGES)


def blames_checkpoint(error: StageFailedError) -> bool:
    """Whether every failure of a stage is an unreadable file or a failed transfer between ranks.

    That is a reason to try another checkpoint, and not a defect of this program.
    """
    return all(map(_is_out_of_reach, error.failures))


def _is_out_of_reach(failure: RankFailure) -> bool:
    if failure.errno is not None:
        return failure.errno not in _EXHAUSTED
    return failure.error == _BROKEN_EXCHANGE
