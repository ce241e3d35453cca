"""Tensors of a committed checkpoint for people who only look at them: inference, evaluation.

Owns the way from a path to tensors without a manager, a model or a job. Promises the checkpoint
that a load would try first, and to touch nothing but `.metadata`, the manifest and the tensors
asked for. Falls back to no older checkpoint: damage is an error here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from holdfast.config import expand_path
from holdfast.errors import WrongArgumentError
from holdfast.read.lazy import LazyTensors
from holdfast.storage.posix import LocalFilesystem
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

    `path`: one `iter_*` directory, or a store, whose newest checkpoint it then is, or that of
    iteration `step`. `prefix`: only names that begin so, given without it; `model.` leaves what
    `load_state_dict(..., assign=True)` takes. `verify`: hold each block against its digest when a
    tensor in it is first asked for.

    Raises:
        WrongArgumentError: `path` is no path.
        CheckpointNotFoundError: there is nothing of that name, or nothing in the store.
        CorruptCheckpointError: a file is missing or is not what it should be.
        NoLoadableCheckpointError: the store holds checkpoints, and none can be loaded.
    """
    _check_path(path)
    filesystem = LocalFilesystem()
    survey = survey_place(Path(expand_path(path)), filesystem, step)
    asked = Asked(names_other_place=True, step=step)
    choice = choose(asked, Seen(other=survey.commits))
    if choice.commit is None or choice.action is Action.REFUSE:
        raise make_refusal(choice, survey, "load.directory", filesystem)
    checkpoint = survey.checkpoints[choice.commit]
    has_digests = not isinstance(checkpoint, ForeignCheckpoint)
    reader = open_shards(checkpoint, filesystem)
    return LazyTensors(reader, prefix, verify=verify and has_digests)


def _check_path(path: Any) -> None:
    if not isinstance(path, str | os.PathLike):
        found, advice = f"is of type {type(path).__name__}", "Pass the directory of a checkpoint."
        raise WrongArgumentError("open_tensors", "path", found, advice)
