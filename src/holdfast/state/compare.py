"""Compare what a checkpoint holds with the live state, changing nothing.

Owns what is missing, left over or different by names, shapes and types; whether anything fits at
all, and which prefix would make it fit. What of it is an error is decided in `strictness`. Reads no
tensor of either side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from holdfast.errors import NothingFitsError
from holdfast.state.saved import SavedTensors
from holdfast.state.strictness import Differences
from holdfast.torch_internals import EXTRA_STATE


def compare_model(
    live: Mapping[str, Any],
    saved: SavedTensors,
    path: str,
    size_of: Callable[[str, torch.Tensor], torch.Size] = lambda _, tensor: tensor.size(),
) -> Differences:
    """Compare a model's live state, by flat name, with its saved state.

    `size_of`: of the global tensor that a live one is a part of.

    Raises:
        NothingFitsError: the model has tensors and the checkpoint has none for any of them.
    """
    names = saved.model_names()
    wanted = [
        name
        for name, value in live.items()
        if isinstance(value, torch.Tensor) and not is_extra(name)
    ]
    if wanted and not any(name in saved.tensors for name in wanted):
        raise NothingFitsError(path, sorted(saved.held), wanted, suggest_prefix(wanted, saved.held))
    shapes, dtypes = _find_different(live, saved.tensors, size_of)
    return Differences(
        sorted(name for name, value in live.items() if name not in names and not is_hollow(value)),
        sorted(names - set(live)),
        shapes,
        dtypes,
    )


def describe_left_out(
    absent: Collection[str],
    saved: SavedTensors | None,
    held: Collection[str],
    given_data: Any | None,
) -> Iterator[str]:
    """Yield what the checkpoint holds of components that this load has no object for.

    `held`: the small states that it holds. `given_data`: what was given for the data position and
    cannot take it, if anything.
    """
    if "optimizer" in absent and saved is not None and any(map(saved.groups, saved.roots)):
        yield "it holds optimizer state, and this load was given no optimizer: left out"
    if "scheduler" in absent and "scheduler" in held:
        yield "it holds scheduler state, and this load was given no scheduler: left out"
    if "data" in absent and "data" in held:
        why = "was given no data iterator"
        if given_data is not None:
            why = f"was given a {type(given_data).__name__}, which has no load_state_dict"
        yield (
            f"it holds a data position, and this load {why}: left out. Give it to an iterator "
            "that is built later with restore_data(iterator)"
        )


def suggest_prefix(live: Iterable[str], held: Iterable[str]) -> str | None:
    """Suggest a superfluous or missing prefix that explains why no name fits; None: none does.

    `live` names begin with `model.`, as the model's state does in a checkpoint.
    """
    by_end: dict[str, set[str]] = {}
    for name in held:
        for start, end in _ends(name):
            by_end.setdefault(end, set()).add(start)
    found: Counter[tuple[str, str]] = Counter()
    for name in live:
        here = _ends(name)
        # The longest common ending: what precedes it is the prefix on each side.
        start, end = next(((start, end) for start, end in here if end in by_end), ("", ""))
        found.update((start, there) for there in by_end.get(end, ()))
    for (here_start, there_start), _ in found.most_common():
        short, long = sorted((here_start, there_start), key=len)
        if not long.startswith(short):
            continue
        extra = long.removeprefix(short)
        if there_start == short:
            return f'did you mean the prefix "{extra}"? The names in the checkpoint lack it'
        return (
            f'did you mean to drop the prefix "{extra}"? Only the names in the checkpoint have it'
        )
    return None


def is_extra(name: str) -> bool:
    """Whether a name is a module's extra state, which may have any shape and need not match."""
    return name.rpartition(".")[2] == EXTRA_STATE


def is_hollow(value: Any) -> bool:
    """Whether a value has no leaf, so that DCP has nothing to write for it."""
    return isinstance(value, Mapping) and all(map(is_hollow, value.values()))


def _ends(name: str) -> list[tuple[str, str]]:
    """Return the ways to cut a name between its parts, the longest end first."""
    parts = name.split(".")
    return [
        (".".join(parts[:cut]) + "." if cut else "", ".".join(parts[cut:]))
        for cut in range(len(parts))
    ]


def _find_different(
    live: Mapping[str, Any],
    saved: Mapping[str, TensorStorageMetadata],
    size_of: Callable[[str, torch.Tensor], torch.Size],
) -> tuple[dict[str, str], dict[str, str]]:
    shapes: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    for name, target in live.items():
        source = saved.get(name)
        if source is None or not isinstance(target, torch.Tensor) or is_extra(name):
            continue
        if source.size != (size := size_of(name, target)):
            shapes[name] = f"{name} is {list(source.size)}, here {list(size)}"
        elif source.properties.dtype != target.dtype:
            dtypes[name] = f"{name} is {source.properties.dtype}, here {target.dtype}"
    return shapes, dtypes
