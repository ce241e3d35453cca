"""Check the arguments of a manager's methods before anything is changed.

Owns the checks of contexts, states and callback managers, and the rule that only one call at a time
is inside a manager. Promises that a wrong argument is refused at the first call, by name, with what
to pass instead, and that a second call, from another thread or from inside a callback, raises at
once and never waits. Accepts any object with the attributes that are read, so that contexts and
states of other trainers pass. Reads no tensor.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.caller import THREAD_NAME
from holdfast.config import CheckpointConfig, find_strict_problems
from holdfast.errors import ConcurrentUseError, UnsupportedStateError, WrongArgumentError
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext, Stateful

_COMMON = ("state", "model", "optimizer", "opt_param_scheduler", "pg_collection")
_OF_SAVE = (
    *_COMMON,
    "num_floating_point_operations_so_far",
    "train_data_iterator",
    "non_persistent_ckpt",
)
_OF_LOAD = (*_COMMON, "strict", "skip_load_to_model_and_opt", "train_data_iterator")
_STATE_ADVICE = "Pass a holdfast.GlobalState(), whose train_state has the counters."
_MODEL_ADVICE = "Pass the nn.Module itself, a list of modules, or a dict of modules by name."
_OPTIMIZER_ADVICE = "Pass the torch.optim.Optimizer, a list or dict of optimizers, or None."
_SCHEDULER_ADVICE = "Pass one object with state_dict and load_state_dict, or None."
_ORDER = "The order is (state, model, optimizer, opt_param_scheduler)."

P = ParamSpec("P")
R = TypeVar("R")


def check_save(ctx: Any, callback_manager: Any | None, *, overlaps: bool) -> None:
    """Check the arguments of `save`; `overlaps`: whether optimizer steps wait for the copy.

    Raises:
        WrongArgumentError: naming the first argument that is wrong.
        UnsupportedStateError: `overlaps`, and an optimizer has no `register_step_pre_hook`.
    """
    _check_context("save", ctx, CheckpointSaveContext, CheckpointLoadContext, _OF_SAVE)
    if overlaps:
        _check_hooks(ctx.optimizer)
    operations = ctx.num_floating_point_operations_so_far
    if isinstance(operations, bool) or not isinstance(operations, int | float):
        raise WrongArgumentError(
            "save",
            "num_floating_point_operations_so_far",
            f"is {_describe(operations)}",
            "Pass a plain number.",
        )
    if callback_manager is not None and (
        isinstance(callback_manager, type) or not callable(getattr(callback_manager, "fire", None))
    ):
        raise WrongArgumentError(
            "save",
            "callback_manager",
            f"is {_describe(callback_manager)}, which has no fire(name, event)",
            "Pass a holdfast.CallbackManager() on which callbacks are registered, or None.",
        )


def check_load(ctx: Any, *, overlaps: bool) -> None:
    """Check the arguments of `load`; raises as `check_save`."""
    _check_context("load", ctx, CheckpointLoadContext, CheckpointSaveContext, _OF_LOAD)
    if ctx.strict is not None and (problems := find_strict_problems(ctx.strict, "strict")):
        found = problems[0].removeprefix("strict ")
        raise WrongArgumentError("load", "strict", found, "None stands for load.strict.")
    if overlaps:
        _check_hooks(ctx.optimizer)


def check_state(method: str, state: Any) -> None:
    """Check that a state has counters with a step; raises as `check_save`."""
    if isinstance(state, type):
        raise WrongArgumentError(method, "state", f"is {_describe(state)}", _STATE_ADVICE)
    if not hasattr(state, "train_state"):
        found = f"is {_describe(state)}"
        if isinstance(state, CheckpointSaveContext | CheckpointLoadContext):
            raise WrongArgumentError(method, "state", found, "Pass the context's state.")
        if hasattr(state, "step"):
            advice = "Pass a holdfast.GlobalState(train_state=...) with these counters inside."
            raise WrongArgumentError(method, "state", found, advice)
        raise WrongArgumentError(
            method, "state", f"{found}, which has no train_state", _STATE_ADVICE
        )
    if isinstance(state.train_state, type) or not hasattr(state.train_state, "step"):
        raise WrongArgumentError(
            method,
            "state.train_state",
            f"is {_describe(state.train_state)}, which has no step",
            "Use a holdfast.TrainState() or another object with a step.",
        )


def _check_context(
    method: str, ctx: Any, kind: type[Any], other: type[Any], names: Sequence[str]
) -> None:
    advice = (
        f"Pass holdfast.{kind.__name__}(state, model, optimizer, scheduler) to manager.{method}."
    )
    if isinstance(ctx, type | other):
        raise WrongArgumentError(method, "ctx", f"is {_describe(ctx)}", advice)
    lacking = [name for name in names if not hasattr(ctx, name)]
    if lacking:
        found = f"is {_describe(ctx)}, which has no {', '.join(lacking[:3])}"
        raise WrongArgumentError(method, "ctx", found, advice)
    check_state(method, ctx.state)
    check_model(method, ctx.model)
    _check_optimizer(method, ctx.optimizer)
    _check_scheduler(method, ctx.opt_param_scheduler)


def check_model(method: str, model: Any) -> None:
    """Check that a model is a module, a list of them or a dict of them; raises as `check_save`."""
    if isinstance(model, nn.Module):
        return
    found, advice = f"is {_describe(model)}", _MODEL_ADVICE
    if isinstance(model, list | tuple):
        wrong = [number for number, each in enumerate(model) if not isinstance(each, nn.Module)]
        if not wrong:
            return
        found = f"is {_describe(model)} whose item {wrong[0]} is {_describe(model[wrong[0]])}"
    elif isinstance(model, Mapping):
        values = list(model.values())
        if any(isinstance(each, nn.Module) for each in values):
            problem = _find_wrong_name(model) or _find_other(model, nn.Module)
            if problem is None:
                return
            found = f"is {_describe(model)} of modules {problem}"
        elif any(isinstance(each, torch.Tensor) for each in values):
            found = f"is {_describe(model)} of tensors, as model.state_dict() returns"
    elif _is_optimizer(model) or isinstance(model, LRScheduler):
        advice += f" {_ORDER}"
    raise WrongArgumentError(method, "model", found, advice)


def _find_wrong_name(models: Mapping[Any, Any]) -> str | None:
    """Return what is wrong with the first name that cannot be part of names of parameters."""
    taken = nn.ModuleDict()
    for name in models:
        if not isinstance(name, str):
            return f"with the key {name!r}, which is no string"
        if not name or "." in name:
            return f"with the key {name!r}: names have no dots, and are not empty"
        if hasattr(taken, name):
            return f"with the key {name!r}, which is an attribute of every nn.ModuleDict"
    return None


def _find_other(models: Mapping[str, Any], kind: type[Any]) -> str | None:
    wrong = [name for name, each in models.items() if not isinstance(each, kind)]
    return f"whose {wrong[0]!r} is {_describe(models[wrong[0]])}" if wrong else None


def _check_optimizer(method: str, optimizer: Any) -> None:
    if optimizer is None or _is_optimizer(optimizer):
        return
    found, advice = f"is {_describe(optimizer)}", _OPTIMIZER_ADVICE
    if isinstance(optimizer, list | tuple):
        wrong = [number for number, each in enumerate(optimizer) if not _is_optimizer(each)]
        if not wrong:
            return
        item = _describe(optimizer[wrong[0]])
        found = f"is {_describe(optimizer)} whose item {wrong[0]} is {item}"
    elif isinstance(optimizer, Mapping) and "param_groups" in optimizer:
        found += ", as optimizer.state_dict() returns"
    elif isinstance(optimizer, Mapping) and any(map(_is_optimizer, optimizer.values())):
        wrong_keys = [key for key in optimizer if not isinstance(key, str)]
        wrong = [key for key, each in optimizer.items() if not _is_optimizer(each)]
        if not wrong and not wrong_keys:
            return
        if wrong_keys:
            found += f" of optimizers with the key {wrong_keys[0]!r}, which is no string"
        else:
            found += f" of optimizers whose {wrong[0]!r} is {_describe(optimizer[wrong[0]])}"
    elif isinstance(optimizer, LRScheduler | nn.Module):
        kind = "a module" if isinstance(optimizer, nn.Module) else "a scheduler"
        found += f", {kind}"
        advice += f" {_ORDER}"
    raise WrongArgumentError(method, "optimizer", found, advice)


def _check_scheduler(method: str, scheduler: Any) -> None:
    if scheduler is None:
        return
    found = f"is {_describe(scheduler)}"
    if _is_optimizer(scheduler) or isinstance(scheduler, nn.Module):
        kind = "a module" if isinstance(scheduler, nn.Module) else "an optimizer"
        raise WrongArgumentError(
            method, "opt_param_scheduler", f"{found}, {kind}", f"{_SCHEDULER_ADVICE} {_ORDER}"
        )
    if isinstance(scheduler, type) or not isinstance(scheduler, Stateful):
        found += ", which has no state_dict and load_state_dict"
        raise WrongArgumentError(method, "opt_param_scheduler", found, _SCHEDULER_ADVICE)


def _check_hooks(optimizer: Any) -> None:
    given: Any = [optimizer]
    if isinstance(optimizer, list | tuple):
        given = optimizer
    elif isinstance(optimizer, Mapping):
        given = optimizer.values()
    for each in given:
        if each is not None and not _takes_hooks(each):
            raise UnsupportedStateError(
                f"checkpoint.staging=overlapped: {_describe(each)} has no register_step_pre_hook, "
                "and its step could not wait for the copy.\n"
                "Use checkpoint.staging=blocking, or pass the torch optimizer inside it."
            )


def _takes_hooks(optimizer: Any) -> bool:
    """Whether its steps can be made to wait; a wrapper may inherit the method without its parts."""
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except (AttributeError, TypeError):
        return False
    return True


def _is_optimizer(value: Any) -> bool:
    """Whether a value is an optimizer or has its attributes, as wrappers have."""
    if isinstance(value, Optimizer):
        return True
    return (
        not isinstance(value, type | nn.Module)
        and hasattr(value, "param_groups")
        and hasattr(value, "state")
        and isinstance(value, Stateful)
    )


def _describe(value: Any) -> str:
    """Describe a value briefly, never printing a tensor or dict."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}, not an object of it"
    if isinstance(value, bool | int | float | str) and len(str(value)) <= 40:
        return f"{value!r}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


# -- what ranks must have alike ------------------------------------------------------------------


def settings_of_save(config: CheckpointConfig) -> tuple[str, ...]:
    """Return what ranks must have alike in a save, beside the directory, as `name=value`."""
    return (
        f"checkpoint.async_save={config.async_save}",
        f"checkpoint.on_replica_mismatch={config.on_replica_mismatch}",
        f"checkpoint.replicas.audit_fraction={config.replicas.audit_fraction}",
        f"checkpoint.local.directory={'null' if config.local.directory is None else 'set'}",
        f"checkpoint.persistent.from_local={config.persistent.from_local}",
    )


def describe_load(config: CheckpointConfig, ctx: CheckpointLoadContext) -> tuple[str, ...]:
    """Return the name of a load, and what ranks must have alike in it as `name=value`."""
    load = config.load
    own = getattr(ctx, "strategy", None)
    strategy = load.strategy if own is None else own
    name = "the load" if load.step is None else f"the load of step {load.step}"
    return (
        name if load.directory is None else f"{name} from {load.directory}",
        *settings_of_save(config),
        f"checkpoint.load.verify={load.verify}",
        f"checkpoint.load.broadcast={load.broadcast}",
        f"skip_load_to_model_and_opt={bool(ctx.skip_load_to_model_and_opt)}",
        *([] if strategy is None else [f"checkpoint.load.strategy={strategy}"]),
    )


# -- one call at a time --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """One call inside a manager."""

    method: str
    thread: threading.Thread


class Calls:
    """The current call inside a manager, if any."""

    def __init__(self) -> None:
        self.inside: dict[str, _Call] = {}
        """At most one entry. A dict, since `setdefault` is atomic: exactly one thread enters."""


class _HasCalls(Protocol):
    @property
    def _calls_inside(self) -> Calls: ...


M = TypeVar("M", bound=_HasCalls)


def one_at_a_time(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Refuse a call of the method while another call is inside the same manager.

    The manager keeps its `Calls` in `_calls_inside`. The decorated method raises
    ConcurrentUseError at once, whether the other call is on another thread or on this one.
    """
    name = method.__name__

    @functools.wraps(method)
    def enter(manager: M, *args: P.args, **kwargs: P.kwargs) -> R:
        inside = manager._calls_inside.inside
        this_call = _Call(name, threading.current_thread())
        try:
            other = inside.setdefault("call", this_call)
            if other is not this_call:
                if _is_running(other):
                    raise _make_conflict_error(name, other, this_call.thread)
                inside["call"] = this_call  # an interrupt kept the other from removing its entry
            return method(manager, *args, **kwargs)
        finally:
            # Call no function here: an interrupt could come between the call and the next line.
            if "call" in inside and inside["call"] is this_call:
                del inside["call"]

    return cast(Callable[Concatenate[M, P], R], enter)


def _is_running(call: _Call) -> bool:
    """Whether a call is still on the stack of its thread; called by `enter` of another call."""
    entry = sys._getframe(1).f_code  # all entries share their code
    frame: FrameType | None = sys._current_frames().get(call.thread.ident or 0)
    while frame is not None:
        if frame.f_code is entry and frame.f_locals.get("this_call") is call:
            return True
        frame = frame.f_back
    return False


def _make_conflict_error(name: str, other: _Call, thread: threading.Thread) -> ConcurrentUseError:
    if other.thread is thread or thread.name == THREAD_NAME:
        return ConcurrentUseError(
            f"manager.{name} was called from inside manager.{other.method}, by a callback, a hook "
            "or a signal handler.\n"
            "Note there what is to be done, and call the manager after that call has returned."
        )
    return ConcurrentUseError(
        f"manager.{name} was called on thread {thread.name} while manager.{other.method} runs on "
        f"thread {other.thread.name}.\n"
        "Call a manager from one thread at a time: saves run in the background by themselves."
    )
