"""The error tree: what each error is to code that knows holdfast, and to code that does not."""

from __future__ import annotations

import copy
import errno
import pickle
from typing import Any

import pytest

import holdfast.errors
from holdfast.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointOverdueError,
    ConcurrentUseError,
    ConfigError,
    CorruptCheckpointError,
    DataReshardError,
    FormatTooNewError,
    LoadIncompleteError,
    ManagerImportError,
    ManagerNotFoundError,
    ManagerPathError,
    ManagerRefusedError,
    ManagerShapeError,
    NoFileFreeError,
    NoLoadableCheckpointError,
    NotEnoughMemoryError,
    NothingFitsError,
    NothingLoadedError,
    OwnCheckpointsExistError,
    RankFailure,
    ReplicaMismatchError,
    SaveAbandonedError,
    SaveFailedError,
    SaveGivenUpError,
    StageFailedError,
    StageTimeoutError,
    StateMismatchError,
    StatePartlyLoadedError,
    StepRewoundError,
    StoreIdentityError,
    StoreNotLoadedError,
    StoreNotWritableError,
    SupersededAttemptError,
    UnsupportedStateError,
    WrongArgumentError,
)

_FAILURES = (
    RankFailure(1, "OSError", "ENOSPC No space left on device", "/store/x", errno.ENOSPC),
    RankFailure(3, "ValueError", "bad"),
)

EXAMPLES: list[tuple[CheckpointError, tuple[type[BaseException], ...], dict[str, Any]]] = [
    (CheckpointError("a"), (Exception,), {}),
    (ConfigError(["a b", "c d"]), (ValueError,), {"problems": ("a b", "c d")}),
    (ManagerPathError("a"), (ValueError,), {}),
    (ManagerRefusedError("a"), (ManagerPathError, ValueError), {}),
    (ManagerImportError("a"), (ImportError,), {}),
    (ManagerNotFoundError("a"), (AttributeError,), {}),
    (ManagerShapeError("a"), (TypeError,), {}),
    (CheckpointNotFoundError("a"), (FileNotFoundError, OSError), {}),
    (CorruptCheckpointError("p", "r"), (ValueError,), {"path": "p", "reason": "r"}),
    (
        NoLoadableCheckpointError("/store", ["x", "y"]),
        (RuntimeError,),
        {"root": "/store", "reasons": ("x", "y")},
    ),
    (
        StatePartlyLoadedError("/store", ["x"]),
        (NoLoadableCheckpointError, RuntimeError),
        {"root": "/store", "reasons": ("x",)},
    ),
    (NothingLoadedError("a"), (RuntimeError,), {}),
    (
        NothingFitsError("p", ["weight"], ["model.weight"], "a hint"),
        (StateMismatchError, ValueError),
        {"path": "p", "held": ("weight",), "missing": ("model.weight",), "hint": "a hint"},
    ),
    (
        StateMismatchError("p", missing=["m"], unexpected=["u"], different=["d"]),
        (ValueError,),
        {"path": "p", "missing": ("m",), "unexpected": ("u",), "different": ("d",)},
    ),
    (UnsupportedStateError("a"), (TypeError,), {}),
    (DataReshardError("a"), (ValueError,), {}),
    (
        ReplicaMismatchError("model.w", [(0, 2), (1,)], 3, (4, 5), ("1.0", "2.0"), 6),
        (ValueError,),
        {
            "name": "model.w",
            "sides": ((0, 2), (1,)),
            "block": 3,
            "index": (4, 5),
            "values": ("1.0", "2.0"),
            "others": 6,
        },
    ),
    (
        FormatTooNewError("p", "format 3", "up to format 1", 7),
        (ValueError,),
        {"path": "p", "found": "format 3", "known": "up to format 1", "sequence": 7},
    ),
    (
        OwnCheckpointsExistError("/base", "/own", "iteration 7 in the local tier"),
        (StoreIdentityError,),
        {"directory": "/base", "root": "/own"},
    ),
    (
        StepRewoundError(1, 6, "loaded"),
        (ValueError,),
        {"step": 1, "reached": 6, "origin": "loaded"},
    ),
    (StoreIdentityError("a"), (ValueError,), {}),
    (StoreNotLoadedError("a"), (StoreIdentityError,), {}),
    (
        StoreNotWritableError("/a", OSError(13, "Permission denied", "/a")),
        (OSError,),
        {"path": "/a", "code": "EACCES"},
    ),
    (SupersededAttemptError("a"), (StoreIdentityError,), {}),
    (
        CheckpointOverdueError(930.0, 40, "the disk is full"),
        (TimeoutError,),
        {"seconds": 930.0, "iteration": 40, "reason": "the disk is full"},
    ),
    (NoFileFreeError("a"), (TimeoutError,), {}),
    (
        WrongArgumentError("load", "model", "is None", "Pass the nn.Module itself."),
        (TypeError,),
        {"method": "load", "argument": "model"},
    ),
    (ConcurrentUseError("a"), (RuntimeError,), {}),
    (SaveAbandonedError("the save of iteration 3"), (RuntimeError,), {}),
    (LoadIncompleteError(), (RuntimeError,), {}),
    (SaveGivenUpError("x was given up"), (RuntimeError,), {}),
    (
        NotEnoughMemoryError(3 << 30, 1 << 30, "the machine's available memory"),
        (MemoryError,),
        {"needed_bytes": 3 << 30, "free_bytes": 1 << 30},
    ),
    (
        StageFailedError("write", _FAILURES),
        (RuntimeError,),
        {"stage": "write", "failures": _FAILURES},
    ),
    (
        StageTimeoutError("commit", [2, 5], 1.5),
        (StageFailedError, TimeoutError),
        {"stage": "commit", "missing_ranks": (2, 5), "timeout_seconds": 1.5},
    ),
    (
        SaveFailedError(40, "write", _FAILURES),
        (StageFailedError, RuntimeError),
        {"iteration": 40, "stage": "write", "failures": _FAILURES},
    ),
]


def _name(example: object) -> str:
    return type(example).__name__ if isinstance(example, CheckpointError) else ""


@pytest.mark.parametrize(("error", "bases", "values"), EXAMPLES, ids=_name)
def test_an_error_is_also_the_builtin_it_resembles(
    error: CheckpointError, bases: tuple[type[BaseException], ...], values: dict[str, Any]
) -> None:
    """Each error is a CheckpointError, the builtins it claims to be, and carries its fields."""
    assert isinstance(error, CheckpointError)
    assert all(isinstance(error, base) for base in bases)
    assert {name: getattr(error, name) for name in values} == values


@pytest.mark.parametrize(("error", "bases", "values"), EXAMPLES, ids=_name)
@pytest.mark.parametrize("carry", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_survives_the_way_to_another_rank(
    carry: Any, error: CheckpointError, bases: tuple[type[BaseException], ...], values: Any
) -> None:
    """Pickled or copied, an error keeps its type, its message and every field."""
    arrived = carry(error)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
    assert getattr(arrived, "msg", None) == getattr(error, "msg", None)  # ImportError's own field
    assert {name: getattr(arrived, name) for name in values} == values


@pytest.mark.parametrize(("error", "bases", "values"), EXAMPLES, ids=_name)
def test_a_message_has_at_most_three_lines(error: CheckpointError, bases: Any, values: Any) -> None:
    """A message is what str shows, and fits three lines."""
    assert str(error) == error.message
    assert 1 <= len(str(error).splitlines()) <= 3


def test_the_examples_cover_the_tree() -> None:
    """No error type is left out of the table, nor of the tree drawn in the module's docstring."""
    types = {
        value
        for value in vars(holdfast.errors).values()
        if isinstance(value, type) and issubclass(value, CheckpointError)
    }
    assert types == {type(error) for error, _, _ in EXAMPLES}
    drawn = holdfast.errors.__doc__ or ""
    assert [each.__name__ for each in types if each.__name__ not in drawn] == []


RANK_FAILURES = [
    (
        OSError(errno.ENOSPC, "No space left on device", "/store/x"),
        RankFailure(2, "OSError", "ENOSPC No space left on device", "/store/x", errno.ENOSPC),
        "rank 2: OSError: ENOSPC No space left on device (/store/x)",
    ),
    (
        CorruptCheckpointError("/store/y", "is short"),
        RankFailure(2, "CorruptCheckpointError", "/store/y: is short", "/store/y"),
        "rank 2: CorruptCheckpointError: /store/y: is short",
    ),
    (
        CheckpointNotFoundError("nothing at /store"),
        RankFailure(2, "CheckpointNotFoundError", "nothing at /store"),
        "rank 2: CheckpointNotFoundError: nothing at /store",
    ),
    (ValueError("bad"), RankFailure(2, "ValueError", "bad"), "rank 2: ValueError: bad"),
    (
        KeyboardInterrupt(),
        RankFailure(2, "KeyboardInterrupt", "KeyboardInterrupt"),
        "rank 2: KeyboardInterrupt: KeyboardInterrupt",
    ),
]


@pytest.mark.parametrize(("error", "failure", "text"), RANK_FAILURES)
def test_a_failure_is_described_for_other_ranks(
    error: BaseException, failure: RankFailure, text: str
) -> None:
    """A rank's exception becomes a value with its type, reason, path and errno, and one line."""
    assert RankFailure.of(2, error) == failure
    assert str(failure) == text
    assert pickle.loads(pickle.dumps(failure)) == failure


def test_a_long_list_of_failures_is_cut() -> None:
    """A thousand failing ranks give a message that names three and counts the rest."""
    many = [RankFailure(rank, "OSError", "EIO") for rank in range(1000)]
    message = str(StageFailedError("write", many))
    assert "rank 2: OSError: EIO; and 997 more ranks" in message
    assert "rank 3:" not in message


def test_a_mismatch_names_only_what_differs() -> None:
    """The message leaves out the empty lists."""
    message = str(StateMismatchError("iter_0000040", missing=["model.a", "model.b"]))
    assert "missing from the checkpoint: model.a, model.b" in message
    assert "unexpected" not in message


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("is missing", "/s/iter_2: is missing"),
        ("/s/iter_2/a: is missing", "/s/iter_2/a: is missing"),
        ("iter_2/a: is missing", "/s/iter_2/a: is missing"),
        ("/s/iter_2: is missing", "/s/iter_2: is missing"),
        ("iter_20/a: is missing", "/s/iter_2: iter_20/a: is missing"),
    ],
)
def test_a_message_states_a_path_once(reason: str, message: str) -> None:
    """A reason that names a file in the damaged directory does not make the path stand twice."""
    assert str(CorruptCheckpointError("/s/iter_2", reason)) == message


@pytest.mark.parametrize(
    ("code", "told"),
    [(errno.EEXIST, "something that is no directory is in its place"), (errno.EROFS, "EROFS")],
)
def test_a_store_that_cannot_be_written_is_named_once(code: int, told: str) -> None:
    """The path is not repeated where it is the store itself, and EEXIST is said in words."""
    message = str(StoreNotWritableError("/store", OSError(code, "x", "/store")))
    assert message.count("/store") == 1
    assert told in message


def test_no_advice_is_given_that_was_followed() -> None:
    """A load that was not strict is not told to be less strict, nor is one whose shapes differ."""
    assert "strict=false" in str(StateMismatchError("/a", ["x"]))
    assert "strict=false" not in str(StateMismatchError("/a", ["x"], strict=False))
    assert "strict=false" not in str(StateMismatchError("/a", ["x"], different=["y"]))
