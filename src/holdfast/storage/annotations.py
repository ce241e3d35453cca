"""What is found out about a checkpoint after its commit: scores, an evaluation that has ended.

Owns the record beside a manifest, `annotations_<number>.json`, and the two public functions. A
change is a new record with the next number, made by exclusive creation, whole or not at all after
any crash; the largest number counts, and earlier ones are then deleted. So two writers lose nothing
of one another, without a lock. Each record ends with its digest. Promises that the files of the
checkpoint are never touched; readers that know no annotations ignore the record. A checkpoint that
is saved again begins without any, and one that is removed takes them along. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from holdfast.config import expand_path
from holdfast.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FormatTooNewError,
    WrongArgumentError,
)
from holdfast.filesystem import Filesystem, LocalFilesystem
from holdfast.storage import open_storage
from holdfast.storage.backend import Storage
from holdfast.storage.manifest import check_format, seal, unseal
from holdfast.storage.store import (
    TRACKER_NAME,
    Store,
    checkpoint_name,
    open_checkpoint,
    parse_checkpoint_name,
)

FORMAT = 1
_NAME = re.compile(r"annotations_([0-9]{1,12})\.json")
_LATEST = "latest"
_TRIES = 100
"""How often another writer may be faster; each time it has made progress."""


def annotate(
    path: str | os.PathLike[str],
    values: Mapping[str, Any],
    *,
    step: int | None = None,
    filesystem: Filesystem | None = None,
) -> dict[str, Any]:
    """Add values to what is recorded of a committed checkpoint; return all of them.

    Durable when it returns. One process calls it, at any time, also while the run goes on. `path`:
    one checkpoint, or a store. `step`: the iteration in it; None: the newest. `values`: JSON values
    by name; a name that is there already gets the new value.

    Raises:
        WrongArgumentError: an argument is of the wrong kind, or a value is no JSON.
        CheckpointNotFoundError: there is no such checkpoint.
        CorruptCheckpointError, FormatTooNewError: its manifest, or what is recorded, is damaged or
            of a later version.
    """
    _check_values(values)
    files = _find("annotate", path, step, filesystem or LocalFilesystem())
    for _ in range(_TRIES):
        number, known = _read(files)
        merged = {**known, **values}
        text = json.dumps({"format": FORMAT, "values": merged}, indent=1, sort_keys=True)
        try:
            files.put_new(_name(number + 1), seal(text.encode() + b"\n"))
        except FileExistsError:
            continue  # another writer was first: begin from what it wrote
        files.settle([_name(number + 1)])
        _remove_earlier(files, number + 1)
        return merged
    raise CorruptCheckpointError(files.where(), "others change its annotations without a pause")


def read_annotations(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    filesystem: Filesystem | None = None,
) -> dict[str, Any]:
    """Return what `annotate` has recorded of a checkpoint; empty: nothing. Arguments as there.

    Raises:
        CheckpointError: as `annotate`.
    """
    return _read(_find("read_annotations", path, step, filesystem or LocalFilesystem()))[1]


def annotations_of(files: Storage) -> dict[str, Any]:
    """Return what is recorded of the checkpoint with these files; empty: nothing.

    Raises:
        CorruptCheckpointError: the record is torn or altered.
        FormatTooNewError: a later version wrote it.
    """
    return _read(files)[1]


def _read(files: Storage) -> tuple[int, dict[str, Any]]:
    """Return the number of the record that counts, 0 for none, and its values."""
    while True:
        numbers = [int(match[1]) for each in files.list() if (match := _NAME.fullmatch(each.name))]
        if not numbers:
            return 0, {}
        number = max(numbers)
        where = files.where(_name(number))
        try:
            content = files.get(_name(number))
        except FileNotFoundError:
            continue  # a later record has replaced it
        try:
            record = json.loads(unseal(content, where))
            check_format(record, FORMAT, where)
            values = record["values"]
            if not isinstance(values, dict):
                raise TypeError(f"values is {values!r}")
        except (CorruptCheckpointError, FormatTooNewError):
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(where, f"is no record of annotations: {error}") from error
        return number, values


def _remove_earlier(files: Storage, number: int) -> None:
    for each in files.list():
        match = _NAME.fullmatch(each.name)
        if match and int(match[1]) < number:
            with suppress(OSError):  # it does not count; the next change removes it
                files.delete(each.name)


def _name(number: int) -> str:
    return f"annotations_{number}.json"


def _check_values(values: Any) -> None:
    advice = "Pass numbers, strings, booleans, None, and lists and dicts of them by name."
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        found = f"is of type {type(values).__name__}"
        if isinstance(values, Mapping):
            found = "has a name that is no string"
        raise WrongArgumentError("annotate", "values", found, advice)
    for name, value in values.items():
        try:
            is_exact = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError) as error:
            found = f"is no JSON: {error}"
            raise WrongArgumentError("annotate", f"values[{name!r}]", found, advice) from error
        if not is_exact:
            found = "would come back from JSON as another value"
            raise WrongArgumentError("annotate", f"values[{name!r}]", found, advice)


def _find(caller: str, path: Any, step: Any, filesystem: Filesystem) -> Storage:
    """Return the files of the checkpoint that a path names; its manifest was read."""
    if not isinstance(path, str | os.PathLike):
        found, advice = f"is of type {type(path).__name__}", "Pass the directory of a checkpoint."
        raise WrongArgumentError(caller, "path", found, advice)
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise WrongArgumentError(caller, "step", f"is {step!r}", "Pass an iteration, or None.")
    given = Path(expand_path(path)).absolute()
    if given.name in (_LATEST, TRACKER_NAME):
        given = given.parent
    given = given.parent.resolve() / given.name  # a link of a checkpoint's name is one
    if not filesystem.is_directory(given.resolve()):
        raise CheckpointNotFoundError(f"{caller}: {given} does not exist or is no directory.")
    iteration = parse_checkpoint_name(given.name)
    if iteration is not None:
        if step not in (None, iteration):
            found = f"is {step}, but path is of iteration {iteration}"
            raise WrongArgumentError(caller, "step", found, "Leave it out, or name the store.")
        files = open_storage(given, filesystem)
        open_checkpoint(files, iteration)
        return files
    store = Store(open_storage(given.resolve(), filesystem))
    listing = store.listing()
    if step is not None:
        name = checkpoint_name(step)
        if not store.storage.has_group(name):
            there = ", ".join(str(each.iteration) for each in listing.checkpoints) or "none"
            raise CheckpointNotFoundError(
                f"{caller}: {given} has no checkpoint of iteration {step}; it has: {there}."
            )
        files = store.storage.under(name)
        open_checkpoint(files, step)
        return files
    if not listing.checkpoints:
        raise CheckpointNotFoundError(f"{caller}: {given} holds no checkpoint.")
    return store.files_of(listing.checkpoints[0])
