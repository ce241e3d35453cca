"""Make a checkpoint manager from a dotted path, and check it.

Owns the way from `custom_manager_class` to an object that the training loop can use; holdfast's own
manager is named by path and checked like any other. Promises that every method the loop will call
is checked now, not at the first save hours later, that a refused path imports nothing, and that
each error says which check failed and what to do. Does not guess: it completes no name, changes no
search path, adapts no method. Importing runs the named code: the author of the config is
responsible for it.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from holdfast.config import CheckpointConfig, read_config
from holdfast.errors import (
    ConfigError,
    ManagerImportError,
    ManagerNotFoundError,
    ManagerPathError,
    ManagerRefusedError,
    ManagerShapeError,
)
from holdfast.protocol import CheckpointManager

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # not in its __all__

DEFAULT_MANAGER = "holdfast.manager.DefaultCheckpointManager"

FIELD = "checkpoint.custom_manager_class"


@dataclass(frozen=True)
class LoopCall:
    """How a training loop calls one method of its manager."""

    name: str
    positional: tuple[str, ...]
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        arguments = [*self.positional, *(f"{keyword}=..." for keyword in self.keywords)]
        return f"manager.{self.name}({', '.join(arguments)})"


LOOP_CALLS = {
    call.name: call
    for call in (
        LoopCall("save", ("ctx", "callback_manager")),
        LoopCall("load", ("ctx",)),
        LoopCall("finalize_async_saves", ("state",), ("blocking", "terminate")),
    )
}


def create_checkpoint_manager(
    checkpoint_config: Any, *, store: Store | None = None
) -> CheckpointManager:
    """Make the manager that a config names and check that a training loop can use it.

    The config is a `CheckpointConfig`, which is validated first; a mapping or DictConfig, from
    which one is made; or any object with `custom_manager_class` and, optionally,
    `custom_manager_allowlist`. The manager's constructor gets that object itself, and its
    exceptions reach the caller unchanged. What only a call can show (a method that returns a
    coroutine, or a `load` that returns no pair) is refused at the first call. `store`: handed to
    the constructor under this name if it is given; see `DefaultCheckpointManager`.

    Raises:
        ConfigError: the config has problems, or is not a config.
        ManagerPathError: `custom_manager_class` is not of the form `package.module.Class`.
        ManagerRefusedError: it matches no prefix of the allow-list; nothing was imported.
        ManagerImportError: importing its module failed; the cause is chained.
        ManagerNotFoundError: its module has no such name.
        ManagerShapeError: it is not a class, or its constructor or a method cannot be called.
    """
    if checkpoint_config is None or isinstance(checkpoint_config, CheckpointConfig | Mapping):
        checkpoint_config = read_config(checkpoint_config)
        checkpoint_config.validate()
    path, allowlist = _read_choice(checkpoint_config)
    if path is None:
        path = DEFAULT_MANAGER
    else:
        _check_path(path)
        _check_allowed(path, allowlist)
    manager_class = _load_class(path)
    more = {} if store is None else {"store": store}
    _check_constructor(path, manager_class, tuple(more))
    try:
        manager = manager_class(checkpoint_config, **more)
    except Exception as error:
        if path != DEFAULT_MANAGER:
            error.add_note(f"raised by the constructor of {path}")
        raise
    for name in LOOP_CALLS:
        _check_method(path, manager, name)
    if path != DEFAULT_MANAGER:
        for name in LOOP_CALLS:
            _watch_first_call(path, manager, name)
    return cast(CheckpointManager, manager)


def _read_choice(checkpoint_config: Any) -> tuple[Any, Sequence[str] | None]:
    if not hasattr(checkpoint_config, "custom_manager_class"):
        problem = (
            f"checkpoint is of type {type(checkpoint_config).__name__} and has no "
            "custom_manager_class; pass a CheckpointConfig or a mapping, such as "
            '{"persistent": {"directory": "checkpoints"}}'
        )
        raise ConfigError([problem])
    allowlist = getattr(checkpoint_config, "custom_manager_allowlist", None)
    # A string is a sequence of strings too: its letters would be taken as the prefixes.
    if allowlist is not None and (
        isinstance(allowlist, str)
        or not isinstance(allowlist, Sequence)
        or not all(isinstance(prefix, str) for prefix in allowlist)
    ):
        raise ConfigError(
            [f"checkpoint.custom_manager_allowlist is {allowlist!r}; it must be a list of strings"]
        )
    return checkpoint_config.custom_manager_class, allowlist


def _check_path(path: Any) -> None:
    parts = path.split(".") if isinstance(path, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ManagerPathError(
            f"{FIELD} is {path!r}, which names no class.\n"
            'Write "package.module.Class", or null for the default manager.'
        )


def _check_allowed(path: str, allowlist: Sequence[str] | None) -> None:
    if allowlist is None:
        return
    parts = path.split(".")
    for prefix in allowlist:
        # Whole components, so that "lab" does not allow "labelled.Manager"; "lab." means "lab".
        allowed = prefix.removesuffix(".").split(".")
        if parts[: len(allowed)] == allowed:
            return
    raise ManagerRefusedError(
        f"{FIELD} is {path!r}, which is not on the allow-list {list(allowlist)!r}; nothing was "
        "imported.\nAdd its package to checkpoint.custom_manager_allowlist if you trust its code."
    )


def _load_class(path: str) -> Any:
    module_name, _, class_name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:  # a module that calls exit would end training silently
        raise ManagerImportError(
            f"{FIELD} is {path!r}, but importing {module_name!r} failed: {_summarise(error)}\n"
            "Fix that module, or check the spelling and that its folder is on sys.path."
        ) from error
    try:
        return getattr(module, class_name)
    except AttributeError as error:
        own = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        raise ManagerNotFoundError(
            f"{FIELD} is {path!r}, but module {module_name!r} has no {class_name!r}.\n"
            f"Name one of its classes: {', '.join(sorted(own)[:8]) or '(it defines none)'}."
        ) from error
    except (Exception, SystemExit) as error:  # a module that imports its names on first use
        raise ManagerImportError(
            f"{FIELD} is {path!r}, but importing it failed: {_summarise(error)}\n"
            "Fix that module; the whole error is chained to this one."
        ) from error


def _check_constructor(path: str, manager_class: Any, keywords: Sequence[str] = ()) -> None:
    if not isinstance(manager_class, type):
        raise ManagerShapeError(
            f"{FIELD} is {path!r}, which is of type {type(manager_class).__name__}, not a class.\n"
            "Name a class whose constructor takes the checkpoint config."
        )
    if vars(manager_class).get("_is_protocol", False) or inspect.isabstract(manager_class):
        lacking = sorted(getattr(manager_class, "__abstractmethods__", ())) or list(LOOP_CALLS)
        raise ManagerShapeError(
            f"{FIELD} is {path!r}, which is abstract: it does not implement {', '.join(lacking)}.\n"
            "Name a class that does."
        )
    if not _accepts(manager_class, ("checkpoint_config",), ()):
        raise ManagerShapeError(
            f"{FIELD} is {path!r}, whose constructor {_describe_signature(manager_class)} cannot "
            "be called with the config alone.\n"
            "Make it __init__(self, checkpoint_config); further parameters need defaults."
        )
    if not _accepts(manager_class, ("checkpoint_config",), keywords):
        raise ManagerShapeError(
            f"{FIELD} is {path!r}, whose constructor {_describe_signature(manager_class)} takes no "
            f"{', '.join(keywords)}.\nAdd that parameter, with the default None, or pass no store."
        )


def _check_method(path: str, manager: object, name: str) -> None:
    """Check the object, not its class: a manager may create or delegate methods at run time."""
    call = LOOP_CALLS[name]

    def refuse(what: str) -> ManagerShapeError:
        return ManagerShapeError(
            f"{FIELD} is {path!r}, {what}.\nThe training loop calls {call}: make that work."
        )

    method = getattr(manager, name, None)
    if method is None or _is_protocol_body(manager, name):
        raise refuse(f"which has no method {name!r}")
    if not callable(method):
        raise refuse(f"whose {name!r} is of type {type(method).__name__}, not a method")
    if _does_nothing_when_called(method):
        raise refuse(f"whose {name!r} does nothing when called: it is a coroutine or a generator")
    if not _accepts(method, call.positional, call.keywords):
        raise refuse(f"whose {name}{_describe_signature(method)} cannot be called so")


def _does_nothing_when_called(method: Any) -> bool:
    """Whether a callable, or its `__call__`, is a coroutine or generator function."""
    while isinstance(method, functools.partial):
        method = method.func
    entry = inspect.getattr_static(type(method), "__call__", None)
    kinds = (
        inspect.iscoroutinefunction,
        inspect.isasyncgenfunction,
        inspect.isgeneratorfunction,
    )
    return any(is_kind(each) for is_kind in kinds for each in (method, entry))


def _watch_first_call(path: str, manager: object, name: str) -> None:
    """Wrap a method to check the result of its first call, which removes the wrapper."""
    method = getattr(manager, name)
    attributes = getattr(manager, "__dict__", {})
    was_own = name in attributes

    def call(*args: Any, **kwargs: Any) -> Any:
        if was_own:
            object.__setattr__(manager, name, method)
        else:
            with suppress(AttributeError):  # two threads may make the first call
                object.__delattr__(manager, name)
        result = method(*args, **kwargs)
        _check_result(path, name, result)
        return result

    try:
        # On the object, so that its class stays the one in the config; bypassing its own
        # __setattr__, which could delegate to another object.
        object.__setattr__(manager, name, functools.wraps(method)(call))
    except (AttributeError, TypeError):
        return  # it has slots only: no attribute can hold the wrapper


def _check_result(path: str, name: str, result: Any) -> None:
    if isinstance(result, Awaitable) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        kind = type(result).__name__
        if (close := getattr(result, "close", None)) is not None:
            close()  # or Python warns in addition that it was never awaited
        raise ManagerShapeError(
            f"{FIELD} is {path!r}, whose {name!r} returned a {kind}: nothing was done.\n"
            f"The training loop calls {LOOP_CALLS[name]} and awaits nothing: make that work."
        )
    if name != "load":
        return
    is_pair = isinstance(result, tuple | list) and len(result) == 2
    if not is_pair or not all(isinstance(each, numbers.Real) for each in result):
        kind = type(result).__name__
        shown = repr(result) if result is None or is_pair else f"a value of type {kind}"
        raise ManagerShapeError(
            f"{FIELD} is {path!r}, whose 'load' returned {shown}.\n"
            "Return (iteration, floating point operations so far); (0, 0) where nothing is found."
        )


def _is_protocol_body(manager: object, name: str) -> bool:
    """Whether a method is only the body of a Protocol in the bases, which does nothing."""
    if name in getattr(manager, "__dict__", {}):
        return False
    for each in type(manager).__mro__:
        if name in vars(each):
            return bool(vars(each).get("_is_protocol", False))
    return False


def _accepts(
    target: Callable[..., Any], positional: Sequence[str], keywords: Sequence[str]
) -> bool:
    try:
        signature = inspect.signature(target)
    except ValueError:
        return True  # no readable signature (a C extension): only a call can tell
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def _describe_signature(target: Callable[..., Any]) -> str:
    parameters = inspect.signature(target).parameters.values()
    bare = [
        each.replace(annotation=inspect.Parameter.empty)
        for each in parameters  # names only: annotations would hide them
    ]
    return str(inspect.Signature(bare))


def _summarise(error: BaseException) -> str:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line}"
