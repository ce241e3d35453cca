"""What holds for every test: the same surroundings on a laptop and inside a scheduled job."""

from __future__ import annotations

import os

import pytest

pytest.register_assert_rewrite("tests.support")

# A test session that was itself started by a launcher must not take its ranks for the tests' own.
for _name in [*os.environ]:
    if _name.startswith(("TORCHELASTIC_", "SLURM_")) or _name in (
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK",
        "MASTER_ADDR", "MASTER_PORT",
    ):  # fmt: skip
        del os.environ[_name]
