"""The factory's table of checks, each against a real module on disk."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

import holdfast.factory
from holdfast.config import CheckpointConfig
from holdfast.errors import (
    ConfigError,
    ManagerImportError,
    ManagerNotFoundError,
    ManagerPathError,
    ManagerRefusedError,
    ManagerShapeError,
)
from holdfast.factory import create_checkpoint_manager

FIELD = "checkpoint.custom_manager_class"

MANAGER = """
class Manager:
    def __init__(self, checkpoint_config):
        self.config = checkpoint_config
    def save(self, ctx, callback_manager=None): ...
    def load(self, ctx): return 0, 0
    def finalize_async_saves(self, state, blocking=False, terminate=False): ...
"""

Write = Callable[..., str]


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write an importable module and return its name; forget every such module afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(source: str, name: str = "written_manager") -> str:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        importlib.invalidate_caches()  # a folder changed within one tick of its clock
        return name

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) is None or str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def _config(path: Any, allowlist: Any = None) -> SimpleNamespace:
    return SimpleNamespace(custom_manager_class=path, custom_manager_allowlist=allowlist)


def _refusal(kind: type[Exception], config: Any) -> str:
    """Return the message of the refusal, having checked what holds for all of them."""
    with pytest.raises(kind) as caught:
        create_checkpoint_manager(config)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(f"{FIELD} is {config.custom_manager_class!r}")
    assert len(message.splitlines()) <= 3
    return message


# The path.


@pytest.mark.parametrize(
    "path", ["", "NoDot", ".X", "a.", "a..B", "a.b.", ".", "..", " a.B", "a.B ", "a/b.C", "a.1B",
             "a-b.C", "a:B", 5, True, ["a.B"], b"a.B"],
)  # fmt: skip
def test_what_names_no_class_is_refused(path: Any) -> None:
    """A path that is not dotted names is a ValueError that shows it and the form wanted."""
    message = _refusal(ManagerPathError, _config(path))
    assert '"package.module.Class"' in message
    assert issubclass(ManagerPathError, ValueError)


def test_a_config_object_is_validated_first() -> None:
    """A CheckpointConfig with a problem is refused before its manager is looked for."""
    config = CheckpointConfig(custom_manager_class="no.such.Manager", staging="sideways")
    with pytest.raises(ConfigError, match=r"checkpoint\.staging is 'sideways'"):
        create_checkpoint_manager(config)
    with pytest.raises(ValueError, match=r"checkpoint\.custom_manager_class is 5"):
        create_checkpoint_manager(CheckpointConfig(custom_manager_class=5))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [None, "checkpoints", object(), 5])
def test_what_is_no_config_is_refused(config: Any) -> None:
    """What is neither a config nor a mapping is an error that says what to pass."""
    with pytest.raises(ConfigError, match=r"pass a CheckpointConfig or a mapping"):
        create_checkpoint_manager(config)


@pytest.mark.parametrize("make", [dict, OmegaConf.create])
def test_a_mapping_is_taken_for_the_config_it_describes(
    write_module: Write, make: Callable[[Any], Any]
) -> None:
    """A dict or a DictConfig with interpolations becomes a CheckpointConfig for the manager."""
    path = write_module(MANAGER) + ".Manager"
    values = {
        "custom_manager_class": path,
        "custom_manager_allowlist": ["written_manager"],
        "persistent": {"directory": "here", "save_interval": 5},
        "local": {"directory": None},
    }
    given = make(values)
    if make is not dict:
        given.run_id = "${persistent.directory}"
    manager: Any = create_checkpoint_manager(given)
    assert type(manager.config) is CheckpointConfig
    assert manager.config.persistent.save_interval == 5
    assert manager.config.run_id == (None if make is dict else "here")
    with pytest.raises(ConfigError, match=r"checkpoint\.persistant is unknown"):
        create_checkpoint_manager(make({"persistant": {}}))


def test_a_dict_config_with_a_missing_value_names_it() -> None:
    """What OmegaConf calls missing is a problem with the path of its field."""
    config = OmegaConf.create({"persistent": {"directory": "???"}})
    with pytest.raises(ConfigError, match=r"^checkpoint\.persistent\.directory cannot be read"):
        create_checkpoint_manager(config)


# What only a call can show.


@pytest.mark.parametrize("name", ["save", "load", "finalize_async_saves"])
@pytest.mark.parametrize(
    "line",
    [
        "def {name}(self, *rest, **others): return asyncio.sleep(0)",
        "{name} = lambda self, *rest, **others: (each for each in ())",
    ],
)
def test_a_method_that_returns_a_coroutine_is_refused_at_the_first_call(
    write_module: Write, name: str, line: str
) -> None:
    """A result that somebody would have to await or iterate means that nothing was done."""
    source = _with(**{name: line.format(name=name)})
    manager: Any = create_checkpoint_manager(_config(write_module(source) + ".Manager"))
    with pytest.raises(ManagerShapeError, match=f"whose '{name}' returned a .*: nothing was done"):
        getattr(manager, name)(None, *([None] if name == "save" else []))


@pytest.mark.parametrize("name", ["save", "load", "finalize_async_saves"])
def test_an_object_with_an_async_call_is_refused(write_module: Write, name: str) -> None:
    """A callable object whose `__call__` is a coroutine function does nothing when called."""
    called = "class Called:\n    async def __call__(self, *rest, **others): ...\n"
    source = called + _with(**{name: f"{name} = Called()"})
    message = _refusal(ManagerShapeError, _config(write_module(source) + ".Manager"))
    assert "a coroutine or a generator" in message


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        ("None", "None"),
        ("5", "a value of type int"),
        ("(1, 2, 3)", "a value of type tuple"),
        ("(None, None)", "(None, None)"),
    ],
)
def test_a_load_that_returns_no_pair_is_refused_at_the_first_call(
    write_module: Write, result: str, shown: str
) -> None:
    """The loop reads two numbers: anything else is named with what to return."""
    source = _with(load=f"def load(self, ctx): return {result}")
    manager = create_checkpoint_manager(_config(write_module(source) + ".Manager"))
    with pytest.raises(ManagerShapeError) as caught:
        manager.load(None)  # type: ignore[arg-type]
    assert f"whose 'load' returned {shown}." in str(caught.value)
    assert "(0, 0)" in str(caught.value)


def test_a_manager_is_what_it_was_after_its_first_calls(write_module: Write) -> None:
    """Nothing of the look at the first results stays on the manager; its type is never another."""
    path = write_module(_with("def __init__(self, config): self.load = lambda ctx: (7, 8)"))
    manager: Any = create_checkpoint_manager(_config(path + ".Manager"))
    own = type(manager)
    assert own.__name__ == "Manager"
    assert manager.load(None) == (7, 8)
    manager.save(None, None)
    manager.finalize_async_saves(None)
    assert list(vars(manager)) == ["load"]
    assert manager.load.__name__ == "<lambda>"
    assert manager.save.__func__ is own.save


def test_a_manager_with_slots_is_taken_as_it_is(write_module: Write) -> None:
    """Where there is no room on the object, the manager still works."""
    source = _with("__slots__ = ()\n    def __init__(self, config): ...")
    manager = create_checkpoint_manager(_config(write_module(source) + ".Manager"))
    assert manager.load(None) == (0, 0)  # type: ignore[arg-type]


# The allow-list.

ALLOWED = [
    (None, True),
    (["written_manager"], True),
    (["written_manager."], True),
    (["other", "written_manager"], True),
    (["written_manager.Manager"], True),
    (("written_manager",), True),
    ([], False),
    ([""], False),
    (["."], False),
    (["written"], False),
    (["written_manage"], False),
    (["written_manager.Man"], False),
    (["written_manager.Manager.more"], False),
    (["Manager"], False),
]


@pytest.mark.parametrize(("allowlist", "allowed"), ALLOWED)
def test_the_allow_list_matches_whole_names(
    write_module: Write, allowlist: Any, allowed: bool
) -> None:
    """A prefix allows what lies under it, never a name that merely begins with the same letters."""
    path = write_module(MANAGER) + ".Manager"
    if allowed:
        assert type(create_checkpoint_manager(_config(path, allowlist))).__name__ == "Manager"
    else:
        message = _refusal(ManagerRefusedError, _config(path, allowlist))
        assert "custom_manager_allowlist" in message


def test_a_refused_path_imports_nothing(write_module: Write, tmp_path: Path) -> None:
    """Not even the package around a refused class runs."""
    trace = tmp_path / "trace"
    write_module(f"import pathlib; pathlib.Path({str(trace)!r}).touch()", "package.__init__")
    write_module(MANAGER, "package.inner")
    _refusal(ManagerRefusedError, _config("package.inner.Manager", ["other"]))
    assert not trace.exists()
    assert "package" not in sys.modules
    create_checkpoint_manager(_config("package.inner.Manager", ["package"]))
    assert trace.exists()  # the check above could have failed


@pytest.mark.parametrize("allowlist", ["written_manager", [5], 5])
def test_an_allow_list_that_is_no_list_is_refused(allowlist: Any) -> None:
    """A single text would be read as a list of letters."""
    with pytest.raises(ConfigError, match=r"^checkpoint\.custom_manager_allowlist is "):
        create_checkpoint_manager(_config("written_manager.Manager", allowlist))


def test_the_default_needs_no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allow-list speaks of custom managers; null still means the default."""
    monkeypatch.setattr(holdfast.factory, "DEFAULT_MANAGER", f"{__name__}.StandIn")
    config = _config(None, ["nothing"])
    manager = create_checkpoint_manager(config)
    assert type(manager).__name__ == "StandIn"


class StandIn:
    def __init__(self, checkpoint_config: Any) -> None: ...

    def save(self, ctx: Any, callback_manager: Any) -> None: ...

    def load(self, ctx: Any) -> tuple[int, int]:
        return 0, 0

    def finalize_async_saves(self, state: Any, blocking: bool, terminate: bool) -> None: ...


def test_the_default_is_holdfasts_own(tmp_path: Path) -> None:
    """Without a custom class the manager is DefaultCheckpointManager, held to the same checks."""
    from holdfast.manager import DefaultCheckpointManager  # imports torch

    config = CheckpointConfig.from_mapping({"persistent": {"directory": str(tmp_path)}})
    manager = create_checkpoint_manager(config)
    assert type(manager) is DefaultCheckpointManager
    named = CheckpointConfig.from_mapping(
        {
            "custom_manager_class": "holdfast.DefaultCheckpointManager",
            "persistent": {"directory": str(tmp_path)},
        }
    )
    assert type(create_checkpoint_manager(named)) is DefaultCheckpointManager


# The import.

BROKEN = [
    ("import no_such_thing", ModuleNotFoundError, "ModuleNotFoundError: No module named 'no_such"),
    ("raise ImportError('half a library')", ImportError, "ImportError: half a library"),
    ("1 / 0", ZeroDivisionError, "ZeroDivisionError: division by zero"),
    ("raise RuntimeError", RuntimeError, "RuntimeError: no message"),
    ("raise ValueError('one\\ntwo\\nthree\\nfour')", ValueError, "ValueError: one"),
    ("class Manager(:", SyntaxError, "SyntaxError: invalid syntax"),
    ("import sys; sys.exit(0)", SystemExit, "SystemExit: 0"),
    ("undefined_name", NameError, "NameError: name 'undefined_name' is not defined"),
    ("import sys; sys.undefined_name", AttributeError, "AttributeError: "),
]


@pytest.mark.parametrize(("source", "cause", "text"), BROKEN)
def test_a_broken_module_is_named_with_its_cause(
    write_module: Write, source: str, cause: type[BaseException], text: str
) -> None:
    """Whatever importing raises becomes an ImportError that names it and chains it."""
    config = _config(write_module(source) + ".Manager")
    message = _refusal(ManagerImportError, config)
    assert f"importing 'written_manager' failed: {text}" in message
    with pytest.raises(ImportError) as caught:
        create_checkpoint_manager(config)
    assert type(caught.value.__cause__) is cause


def test_a_missing_module_is_an_import_error() -> None:
    """A module that is not there is named, and so is the search path."""
    message = _refusal(ManagerImportError, _config("no_such_package.inner.Manager"))
    assert "No module named 'no_such_package'" in message
    assert "sys.path" in message


def test_an_interrupt_while_importing_is_no_failure(write_module: Write) -> None:
    """Ctrl-C stays Ctrl-C."""
    path = write_module("raise KeyboardInterrupt") + ".Manager"
    with pytest.raises(KeyboardInterrupt):
        create_checkpoint_manager(_config(path))


# The class.


def test_a_missing_class_lists_those_that_are_there(write_module: Write) -> None:
    """A misspelt class is an AttributeError that lists the module's own classes."""
    path = write_module("from pathlib import Path\n" + MANAGER) + ".Manger"
    message = _refusal(ManagerNotFoundError, _config(path))
    assert "module 'written_manager' has no 'Manger'" in message
    assert "Name one of its classes: Manager." in message
    assert issubclass(ManagerNotFoundError, AttributeError)


def test_a_name_loaded_on_first_use_may_fail_too(write_module: Write) -> None:
    """A module that imports its names lazily reports the failed import, not a missing name."""
    path = write_module("def __getattr__(name): import no_such_module_at_all") + ".Manager"
    message = _refusal(ManagerImportError, _config(path))
    assert "No module named 'no_such_module_at_all'" in message


NO_CLASS = [
    ("def Manager(config): return config", "which is of type function, not a class"),
    (MANAGER + "\nManager = Manager(None)", "which is of type Manager, not a class"),
    ("Manager = 5", "which is of type int, not a class"),
    ("Manager = None", "which is of type NoneType, not a class"),
    ("import json as Manager", "which is of type module, not a class"),
]


@pytest.mark.parametrize(("source", "text"), NO_CLASS)
def test_what_is_no_class_is_refused(write_module: Write, source: str, text: str) -> None:
    """A function, an instance or a module is a TypeError that says what it is."""
    assert text in _refusal(ManagerShapeError, _config(write_module(source) + ".Manager"))
    assert issubclass(ManagerShapeError, TypeError)


def _with(constructor: str = "", **methods: str) -> str:
    """Write a manager with some lines replaced; an empty replacement leaves the method out."""
    lines = {
        "save": "def save(self, ctx, callback_manager=None): ...",
        "load": "def load(self, ctx): return 0, 0",
        "finalize_async_saves": "def finalize_async_saves(self, state, blocking=False,"
        " terminate=False): ...",
        **methods,
    }
    constructor = constructor or "def __init__(self, checkpoint_config): ..."
    body = "\n    ".join([constructor, *filter(None, lines.values())])
    return f"import abc, asyncio, functools, typing\nclass Manager:\n    {body}\n"


CONSTRUCTORS_REFUSED = [
    "def __init__(self): ...",
    "def __init__(self, config, more): ...",
    "def __init__(self, *, checkpoint_config): ...",
    "def __init__(self, **settings): ...",
    "x = 1",
]
CONSTRUCTORS_ACCEPTED = [
    "def __init__(self, config): ...",
    "def __init__(self, config, /): ...",
    "def __init__(self, *arguments): ...",
    "def __init__(self, config, more=None, *, most=1): ...",
    "def __new__(cls, config): return object.__new__(cls)",
]


@pytest.mark.parametrize("constructor", CONSTRUCTORS_REFUSED)
def test_a_constructor_must_take_the_config(write_module: Write, constructor: str) -> None:
    """A constructor that one positional argument does not fit is refused with its signature."""
    path = write_module(_with(constructor)) + ".Manager"
    message = _refusal(ManagerShapeError, _config(path))
    assert "whose constructor (" in message
    assert "__init__(self, checkpoint_config)" in message


@pytest.mark.parametrize("constructor", CONSTRUCTORS_ACCEPTED)
def test_a_constructor_may_take_more(write_module: Write, constructor: str) -> None:
    """Other names and further parameters with defaults do no harm."""
    create_checkpoint_manager(_config(write_module(_with(constructor)) + ".Manager"))


@pytest.mark.parametrize("error", ["TypeError('mine')", "ValueError('mine')", "KeyError('mine')"])
def test_what_the_constructor_raises_comes_through(write_module: Write, error: str) -> None:
    """The constructor's own error is not taken for a wrong shape."""
    constructor = f"def __init__(self, config): raise {error}"
    path = write_module(_with(constructor)) + ".Manager"
    with pytest.raises((TypeError, ValueError, KeyError), match="mine") as caught:
        create_checkpoint_manager(_config(path))
    assert type(caught.value).__name__ == error.split("(")[0]
    assert f"raised by the constructor of {path}" in caught.value.__notes__


CALLS = {
    "save": "manager.save(ctx, callback_manager)",
    "load": "manager.load(ctx)",
    "finalize_async_saves": "manager.finalize_async_saves(state, blocking=..., terminate=...)",
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "which has no method '{name}'"),
        ("{name} = None", "which has no method '{name}'"),
        ("{name} = 5", "whose '{name}' is of type int, not a method"),
        ("{name} = property(lambda self: 'text')", "whose '{name}' is of type str, not a method"),
        ("def {name}(self): ...", "whose {name}() cannot be called so"),
        ("def {name}(self, *, ctx=1, state=1, blocking=1, terminate=1): ...", "cannot be called"),
        ("def {name}(self, a, b, c, d): ...", "whose {name}(a, b, c, d) cannot be called so"),
        ("def {name}(self, *rest, needed, **others): ...", "cannot be called so"),
        ("async def {name}(self, *rest, **others): ...", "a coroutine or a generator"),
        ("def {name}(self, *rest, **others): yield", "a coroutine or a generator"),
        ("async def {name}(self, *rest, **others): yield", "a coroutine or a generator"),
        ("{name} = functools.partialmethod(asyncio.sleep, 1)", "a coroutine or a generator"),
    ],
)
def test_each_method_must_be_callable_as_the_loop_calls_it(
    write_module: Write, name: str, line: str, text: str
) -> None:
    """Missing, None, no function, a signature that does not fit: each names method and call."""
    source = _with(**{name: line.format(name=name)})
    message = _refusal(ManagerShapeError, _config(write_module(source) + ".Manager"))
    assert text.format(name=name) in message
    assert CALLS[name] in message


REFUSED = [
    ("save", "def save(self, ctx): ..."),
    ("save", "def save(self, ctx, *, callback_manager=None): ..."),
    ("save", "def save(self, ctx, callback_manager, more): ..."),
    ("save", "@staticmethod\n    def save(ctx): ..."),
    ("load", "def load(self, ctx, strict): ..."),
    ("load", "def load(self, *, ctx): ..."),
    ("finalize_async_saves", "def finalize_async_saves(self, state): ..."),
    ("finalize_async_saves", "def finalize_async_saves(self, state, blocking=False): ..."),
    ("finalize_async_saves", "def finalize_async_saves(self, state, *flags): ..."),
    ("finalize_async_saves", "def finalize_async_saves(self, state, blocking, terminate, /): ..."),
    (
        "finalize_async_saves",
        "def finalize_async_saves(self, blocking=False, terminate=False): ...",
    ),
    ("finalize_async_saves", "def finalize_async_saves(self, state, wait=0, terminate=0): ..."),
]
ACCEPTED = [
    ("save", "def save(self, ctx, callback_manager): ..."),
    ("save", "def save(self, ctx, callback_manager=None, *, fast=True): ..."),
    ("save", "def save(self, context, callbacks, more=1): ..."),
    ("save", "def save(self, *arguments): ..."),
    ("save", "@staticmethod\n    def save(ctx, callback_manager): ..."),
    ("save", "@classmethod\n    def save(cls, ctx, callback_manager): ..."),
    ("save", "save = functools.partialmethod(print, 1)"),
    ("load", "def load(self, context, strict=None): ..."),
    ("load", "def load(self, *arguments, **settings): ..."),
    ("finalize_async_saves", "def finalize_async_saves(self, state, blocking, terminate): ..."),
    ("finalize_async_saves", "def finalize_async_saves(self, state, *, blocking, terminate): ..."),
    ("finalize_async_saves", "def finalize_async_saves(self, state, **flags): ..."),
    ("finalize_async_saves", "def finalize_async_saves(self, *states, **flags): ..."),
]


@pytest.mark.parametrize(("name", "line"), REFUSED)
def test_a_signature_that_the_loop_cannot_call_is_refused(
    write_module: Write, name: str, line: str
) -> None:
    """A call that would fail at the first save fails now, with both signatures."""
    path = write_module(_with(**{name: line})) + ".Manager"
    message = _refusal(ManagerShapeError, _config(path))
    assert f"whose {name}(" in message
    assert CALLS[name] in message


@pytest.mark.parametrize(("name", "line"), ACCEPTED)
def test_a_signature_that_the_loop_can_call_is_accepted(
    write_module: Write, name: str, line: str
) -> None:
    """Only whether the call works matters: names, defaults and kinds of methods are free."""
    create_checkpoint_manager(_config(write_module(_with(**{name: line})) + ".Manager"))


PROTOCOL = """
from typing import Protocol
class Base(Protocol):
    def __init__(self, checkpoint_config): ...
    def save(self, ctx, callback_manager=None): ...
    def load(self, ctx): ...
    def finalize_async_saves(self, state, blocking=False, terminate=False): ...
"""
OURS = "from holdfast.protocol import CheckpointManager as Base"


@pytest.mark.parametrize("base", [PROTOCOL, OURS])
def test_a_body_inherited_from_a_protocol_is_no_method(write_module: Write, base: str) -> None:
    """A manager that derives from a protocol and forgets `save` would save nothing, in silence."""
    methods = (
        "    def __init__(self, config): ...\n"
        "    def load(self, ctx): return 0, 0\n"
        "    def finalize_async_saves(self, state, blocking=False, terminate=False): ...\n"
    )
    path = write_module(f"{base}\nclass Manager(Base):\n{methods}") + ".Manager"
    assert "has no method 'save'" in _refusal(ManagerShapeError, _config(path))
    whole = f"{base}\nclass Manager(Base):\n{methods}    def save(self, ctx, callbacks): ...\n"
    create_checkpoint_manager(_config(write_module(whole, "whole_manager") + ".Manager"))
    made = whole.replace(
        "def __init__(self, config): ...", "def __init__(self, config): self.save = print"
    )
    made = made.replace("    def save(self, ctx, callbacks): ...", "")
    create_checkpoint_manager(_config(write_module(made, "made_manager") + ".Manager"))


def test_an_abstract_class_is_refused(write_module: Write) -> None:
    """A protocol and a class with abstract methods left name what they lack."""
    message = _refusal(ManagerShapeError, _config("holdfast.protocol.CheckpointManager"))
    assert "abstract: it does not implement save, load, finalize_async_saves" in message
    source = _with(load="@abc.abstractmethod\n    def load(self, ctx): ...")
    source = source.replace("class Manager:", "class Manager(abc.ABC):")
    message = _refusal(ManagerShapeError, _config(write_module(source) + ".Manager"))
    assert "abstract: it does not implement load" in message


def test_methods_may_be_made_or_delegated_by_the_object(write_module: Write) -> None:
    """A wrapper that passes on what it does not define is as good as the manager inside it."""
    source = MANAGER + (
        "class Wrapper:\n"
        "    def __init__(self, config):\n"
        "        self.inner = Manager(config)\n"
        "        self.save = lambda ctx, callback_manager=None: None\n"
        "    def __getattr__(self, name): return getattr(self.inner, name)\n"
    )
    create_checkpoint_manager(_config(write_module(source) + ".Wrapper"))


def test_the_manager_gets_the_very_config(write_module: Write) -> None:
    """Not a copy: what a loop changes later in its config, the manager sees."""
    config = CheckpointConfig(custom_manager_class=write_module(MANAGER) + ".Manager")
    manager: Any = create_checkpoint_manager(config)
    assert manager.config is config
