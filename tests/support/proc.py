"""What the kernel says of this process's memory, and children that only live.

Owns the reading of smaps and the forking of a child for as long as a test looks at its parent.
Promises that no child outlives its `with`. Knows nothing of holdfast.
"""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Child:
    """A fork of this process."""

    result: Any
    """What it returned, as JSON can carry it."""


@contextmanager
def in_fork(work: Callable[[], Any]) -> Iterator[Child]:
    """Run work in a fork that then waits to be let go; it must start no thread and use no torch."""
    told, tell = os.pipe()
    waits, let_go = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child has not
        child = os.fork()
    if child == 0:
        try:
            os.close(let_go)
            os.write(tell, json.dumps(work()).encode() + b"\n")
            os.read(waits, 1)  # ends when the parent closes its side
        finally:
            os._exit(0)
    os.close(tell)
    os.close(waits)
    try:
        with os.fdopen(told) as stream:
            yield Child(json.loads(stream.readline()))
    finally:
        os.close(let_go)
        os.waitpid(child, 0)


def mapping_of(memory: memoryview) -> dict[str, int]:
    """Return what smaps counts for the mapping that a view lies in, in bytes."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if first.endswith(":"):
            if inside and rest[-1] == "kB":
                found[first[:-1]] = int(rest[0]) << 10
            continue
        start, end = (int(each, 16) for each in first.split("-"))
        inside = start <= address < end
    return found
