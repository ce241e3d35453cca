"""The counters of a run, for any kind of object that a loop keeps them in.

Owns the conversion between `state.train_state` and its saved JSON. Our TrainState and subclasses
convert themselves; an object with `state_dict` and `load_state_dict` (Megatron-Bridge's, which uses
tensors) returns and receives its own kind of values; of any other dataclass the fields are used.
Promises that counters are restored exactly, that `.step` is then the checkpoint's, and that
`check_counters` changes nothing. Refuses objects that are none of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import torch

from holdfast.errors import StateMismatchError, UnsupportedStateError
from holdfast.protocol import Stateful, TrainState, fit_counter, fit_fields, set_fields
from holdfast.state.options import Overrides

_ROUNDING = 1e-5
"""Relative error that a 32-bit float may have introduced into a counter."""


def read_counters(train_state: Any) -> dict[str, Any]:
    """Return the counters as JSON values, including `step`.

    Raises:
        UnsupportedStateError: the object's type cannot be saved, or its `.step` and its state_dict
            disagree.
    """
    if _converts_itself(train_state):
        found = dict(train_state.to_dict())
    elif isinstance(train_state, Stateful):
        found = {key: _plain(value) for key, value in train_state.state_dict().items()}
        for name, exact in _numbers_of(train_state).items():
            if name in found and _is_rounded(found[name], exact):
                found[name] = exact
    elif is_dataclass(train_state):
        fields_now = asdict(train_state)  # type: ignore[arg-type]  # an instance, not a class
        found = {key: _plain(value) for key, value in fields_now.items()}
    else:
        raise UnsupportedStateError(
            f"state.train_state is a {type(train_state).__name__}, which cannot be saved.\n"
            "Use holdfast.TrainState, a subclass of it, another dataclass, or an object with "
            "state_dict and load_state_dict."
        )
    step = train_state.step
    if found.setdefault("step", step) != step:
        raise UnsupportedStateError(
            f"state.train_state.step is {step!r}, and its state_dict() says {found['step']!r}: "
            "it is ambiguous which iteration a checkpoint would be of."
        )
    return found


def check_counters(train_state: Any, saved: Mapping[str, Any], path: str) -> None:
    """Refuse counters that cannot be restored into the live object, changing nothing.

    Raises:
        StateMismatchError: naming each field whose saved value has a different type.
        UnsupportedStateError: the live object's type cannot be restored.
    """
    if not saved:
        return
    problems: list[str] = []
    if _converts_itself(train_state):
        if getattr(type(train_state), "update_from", None) is TrainState.update_from:
            problems = fit_fields(train_state, saved)[1]
    elif isinstance(train_state, Stateful) or not is_dataclass(train_state):
        problems = _fit(read_counters(train_state), saved)
        if not problems:
            _merged(train_state, saved)
    else:
        problems = fit_fields(train_state, saved)[1]
        if getattr(type(train_state), "__dataclass_params__").frozen:  # noqa: B009  # untyped
            problems.append("train_state is a frozen dataclass, which nothing can be restored into")
    if problems:
        raise StateMismatchError(path, different=problems)


def restore_counters(train_state: Any, saved: Mapping[str, Any]) -> None:
    """Overwrite the counters in place; a name that was not saved keeps its value.

    Raises:
        UnsupportedStateError: `.step` differs from the saved one afterwards and cannot be set.
    """
    if not saved:
        return
    if _converts_itself(train_state):
        train_state.update_from(saved)
    elif isinstance(train_state, Stateful):
        train_state.load_state_dict(_merged(train_state, saved))
        for name, now in _numbers_of(train_state).items():
            if name in saved and _is_rounded(now, saved[name]):
                setattr(train_state, name, type(now)(saved[name]))
    else:
        set_fields(train_state, saved)
    if train_state.step != saved["step"]:
        try:
            train_state.step = saved["step"]
        except AttributeError as error:
            raise UnsupportedStateError(
                f"state.train_state.step is {train_state.step!r} after load_state_dict, and not "
                f"{saved['step']}: restore it there."
            ) from error


def without_fields(saved: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Return saved counters without those that keep their live values; `step` always stays."""
    if overrides.keeps("train_state"):
        return {name: value for name, value in saved.items() if name == "step"}
    kept = overrides.parts_of("train_state")
    found = {name: value for name, value in saved.items() if name not in kept}
    if isinstance(extra := found.get("extra"), Mapping):
        found["extra"] = {name: value for name, value in extra.items() if name not in kept}
    return found


def _converts_itself(train_state: Any) -> bool:
    return isinstance(train_state, TrainState) or (
        hasattr(train_state, "to_dict") and hasattr(train_state, "update_from")
    )


def _fit(live: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in live.keys() & saved.keys():
        try:
            fit_counter(name, live[name], saved[name])
        except ValueError as error:
            problems.append(str(error))
    return sorted(problems)


def _merged(train_state: Stateful, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the argument for load_state_dict: the live state dict, updated by saved values."""
    live = train_state.state_dict()
    merged = {**live, **{key: _like(live.get(key), value) for key, value in saved.items()}}
    if "step" not in live:  # added when it was saved
        del merged["step"]
    return merged


def _plain(value: Any) -> Any:
    """Convert tensors and numpy numbers to plain Python values."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return value.tolist()
    return value


def _like(live: Any, value: Any) -> Any:
    """Return a saved value as the kind of value that the live object uses."""
    if isinstance(live, torch.Tensor):
        return torch.tensor(value, dtype=live.dtype, device=live.device)
    return value


def _numbers_of(train_state: Any) -> dict[str, int | float]:
    """Return the fields of a dataclass that are plain numbers."""
    if not is_dataclass(train_state):
        return {}
    live = {each.name: getattr(train_state, each.name) for each in fields(train_state)}
    return {name: value for name, value in live.items() if type(value) in (int, float)}


def _is_rounded(value: Any, exact: Any) -> bool:
    """Whether a number differs from another only by the rounding of a narrow tensor."""
    numbers = type(value) in (int, float) and type(exact) in (int, float)
    return numbers and value != exact and math.isclose(value, exact, rel_tol=_ROUNDING)
