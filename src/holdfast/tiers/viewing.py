"""Read-only access to the tensors of a committed checkpoint, for inference and evaluation.

Owns the way from a path to tensors without a manager, a model or a job. Promises to open the
checkpoint that a load would try first, and to read only `.metadata`, the manifest and the requested
tensors. Does not fall back to an older checkpoint: damage is an error here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from holdfast.config import expand_path
from holdfast.errors import WrongArgumentError
from holdfast.filesystem import LocalFilesystem
from holdfast.read.lazy import LazyTensors
from holdfast.storage.posix import PosixStorage
from holdfast.tiers.opening import ForeignCheckpoint, open_shards
from holdfast.tiers.select import Action, Asked, Seen, choose
from holdfast.tiers.survey import make_refusal, survey_place


def open_tensors(
    path: str | os.PathLike[str],
    *,
    prefix: str = "",
    step: int | None = None,
    verify: bool = True,
) -> LazyTensors:
    """Open the tensors of a checkpoint without reading them, by name.

    `path`: one `iter_*` directory, or a store, of which the newest checkpoint or iteration
    `step` is opened. `prefix`: only names with this prefix, which is removed; `model.` gives the
    names that `load_state_dict(..., assign=True)` takes. `verify`: check each block against its
    digest at the first access to a tensor in it.

    Raises:
        WrongArgumentError: `path` is not a path.
        CheckpointNotFoundError: the path or the iteration does not exist, or the store is empty.
        CorruptCheckpointError: a file is missing or damaged.
        NoLoadableCheckpointError: the store holds checkpoints, and none can be loaded.
    """
    _check_path(path)
    filesystem = LocalFilesystem()
    survey = survey_place(Path(expand_path(path)), filesystem, step)
    asked = Asked(names_other_place=True, step=step)
    choice = choose(asked, Seen(other=survey.commits))
    if choice.commit is None or choice.action is Action.REFUSE:
        raise make_refusal(choice, survey, None, filesystem)
    checkpoint = survey.checkpoints[choice.commit]
    has_digests = not isinstance(checkpoint, ForeignCheckpoint)
    reader = open_shards(checkpoint, PosixStorage(checkpoint.path, filesystem))
    return LazyTensors(reader, prefix, verify=verify and has_digests)


def _check_path(path: Any) -> None:
    if not isinstance(path, str | os.PathLike):
        found, advice = f"is of type {type(path).__name__}", "Pass the directory of a checkpoint."
        raise WrongArgumentError("open_tensors", "path", found, advice)
