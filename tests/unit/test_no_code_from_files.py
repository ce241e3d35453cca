"""State that can be read back without running code from a file."""

from __future__ import annotations

import collections
import datetime
import enum
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from holdfast.errors import CorruptCheckpointError, UnsupportedStateError
from holdfast.state.codec import check_plain, decode, encode
from tests.support.hostile import hostile_pickle, hostile_torch_file

SAFE = [
    None,
    True,
    2**80,
    -0.0,
    float("nan"),
    1 + 2j,
    "text",
    b"bytes",
    [1, [2, (3, "x")]],
    {"a": {1: {2.5: None}}},
    {1, 2},
    collections.OrderedDict(a=1),
    collections.Counter("aab"),
    torch.Size([1, 2]),
    torch.float8_e5m2,
    torch.device("cuda:1"),
    torch.rand(3),
    torch.nn.Parameter(torch.rand(2)),
    {"deep": [torch.tensor(True), {"x": torch.empty(0, dtype=torch.bfloat16)}]},
]


@pytest.mark.parametrize("value", SAFE, ids=lambda value: type(value).__name__)
def test_plain_state_is_read_back(value: Any) -> None:
    """Plain values and tensors pass the check and come back with their types."""
    check_plain(value, "data")
    back = decode(encode(value), "x")
    assert type(back) is type(value)
    assert repr(back) == repr(value)


class _Colour(enum.Enum):
    RED = 1


class _Point(NamedTuple):
    x: int


class _Custom:
    pass


class _Number(int):
    pass


FOREIGN = [
    (np.zeros(3), "numpy.ndarray"),
    (np.float64(1), "numpy.float64"),
    (np.int64(1), "numpy.int64"),
    (_Custom(), "_Custom"),
    (_Colour.RED, "_Colour"),
    (_Point(1), "_Point"),
    (_Number(1), "_Number"),
    (Path("/x"), "PosixPath"),
    (datetime.date(2026, 1, 1), "datetime.date"),
    (threading.Lock(), "lock"),
    (lambda: 1, "function"),
    ((each for each in ()), "generator"),
    (_Custom, "type"),
]


@pytest.mark.parametrize(("value", "kind"), FOREIGN, ids=[row[1] for row in FOREIGN])
def test_foreign_state_is_refused_with_its_place(value: Any, kind: str) -> None:
    """What only running code could read back is refused, naming where it stands and its type."""
    for state, place in (
        ({"inner": [0, {"deep": value}]}, "data.inner[1].deep is a"),
        ((value,), "data[0] is a"),
        (value, "data is a"),
    ):
        with pytest.raises(UnsupportedStateError) as caught:
            check_plain(state, "data")
        assert place in str(caught.value)
        assert kind in str(caught.value)


def test_a_foreign_key_is_refused() -> None:
    """Keys are checked as values are."""
    with pytest.raises(UnsupportedStateError, match=r"the key .* of data"):
        check_plain({_Point(1): 2}, "data")


@pytest.mark.parametrize("make", [hostile_pickle, hostile_torch_file])
def test_a_hostile_file_does_not_run(make: Any, tmp_path: Path) -> None:
    """A pickle that asks for code is refused by name, and its code did not run."""
    marker = tmp_path / "ran"
    with pytest.raises(CorruptCheckpointError, match="state of rank 0: cannot be read"):
        decode(make(marker), "state of rank 0")
    assert not marker.exists()


def test_every_torn_file_is_refused() -> None:
    """Cut at any length, a state file is refused and nothing else is raised."""
    content = encode({"a": torch.rand(3), "b": [1, 2]})
    for length in range(0, len(content) - 1, 7):
        with pytest.raises(CorruptCheckpointError):
            decode(content[:length], "x")


_SHORT_OF_MEMORY = """
import resource
from pathlib import Path
import torch
from holdfast.state.codec import decode, encode
content = encode(torch.zeros(128 << 20, dtype=torch.uint8))
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (32 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    decode(content, "state of rank 0")
except Exception as error:
    print(type(error).__name__)
"""


def test_memory_that_runs_out_is_not_damage() -> None:
    """Sound bytes that this process has no room for are an error of its own, whoever says so."""
    # A process of its own: one that has run for a while has room that no limit takes away.
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SHORT_OF_MEMORY],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout.strip() in ("MemoryError", "RuntimeError"), ended.stdout
