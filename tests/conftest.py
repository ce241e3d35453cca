"""What holds for every test: the same surroundings on a laptop and inside a scheduled job."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.support")

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
