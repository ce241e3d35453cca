"""What holds for every test: the same surroundings on a laptop and inside a scheduled job."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.turns import Turns

pytest.register_assert_rewrite("tests.support")

_turns = pytest.StashKey[Turns]()
_folder = pytest.StashKey[Path]()

# A test session that was itself started by a launcher must not take its ranks for the tests' own.
for _name in [*os.environ]:
    if _name.startswith(("TORCHELASTIC_", "SLURM_")) or _name in (
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK",
        "MASTER_ADDR", "MASTER_PORT",
    ):  # fmt: skip
        del os.environ[_name]


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    """A thread that the end of the interpreter finds inside torch's C++ aborts the whole run."""
    before = set(threading.enumerate())
    yield
    left = [each for each in threading.enumerate() if each not in before]
    for each in left:
        each.join(5)
    alive = [each.name for each in left if each.is_alive()]
    assert not alive, f"threads outlive the test: {alive}"


def pytest_configure(config: pytest.Config) -> None:
    """Let the tests of this process take turns with those of the others, if there are others."""
    if hasattr(config, "workerinput"):
        folder = Path(config.workerinput["turns"])
    else:
        folder = config.stash[_folder] = Path(tempfile.mkdtemp(prefix="holdfast-tests-"))
    config.stash[_turns] = Turns(folder)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a new process of this session where the others wait."""
    node.workerinput["turns"] = str(node.config.stash[_folder])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what the processes waited at."""
    if (folder := config.stash.get(_folder, None)) is not None:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Give a test its turn; waiting for it is no part of the time that a test may take."""
    with item.config.stash[_turns].take(alone=item.get_closest_marker("alone") is not None):
        return (yield)
