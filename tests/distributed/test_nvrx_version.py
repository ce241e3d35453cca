"""The release of nvidia-resiliency-ext that is tested was meant, and little of it runs."""

from __future__ import annotations

import inspect
import os
import sys
import threading
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.nvrx_versions import SOURCES_VARIABLE
from tests.support.nodes import Job, lose_node, memory_directory, wait_for_all
from tests.support.ranks import run_ranks

pytest.importorskip("nvidia_resiliency_ext")


def _imported() -> tuple[str, str]:
    """Return the version, and where the wrapper of process groups was found."""
    from holdfast.tiers.local.replication import load_package

    return version("nvidia-resiliency-ext"), inspect.getfile(load_package().GroupWrapper)


def test_every_rank_imports_what_was_meant() -> None:
    """The package that pyproject.toml allows, and with sources named, those and no other."""
    found = {_imported(), *run_ranks(_imported, 2)}
    assert len(found) == 1
    ((release, place),) = found
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    (wanted,) = (
        Requirement(each)
        for each in project["project"]["dependencies"]
        if each.startswith("nvidia-resiliency-ext")
    )
    assert wanted.specifier.contains(release)
    if (sources := os.environ.get(SOURCES_VARIABLE)) is not None:
        assert Path(place).is_relative_to(sources)
        assert Path(sources).name == release


def _called_in(work: Callable[[], object]) -> set[str]:
    """Return the functions of the package that run during some work, on any thread."""
    found: set[str] = set()

    def note(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and "nvidia_resiliency_ext" in code.co_filename:
            found.add(code.co_qualname.partition(".<locals>")[0])

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def _save_and_restore(root: Path) -> tuple[set[str], set[str]]:
    """Save on two nodes that hold copies for each other; then lose one, and restore it."""
    job = Job(root, ("a", "b"), factor=2)
    in_save = _called_in(lambda: job.save(10))
    wait_for_all()
    job.close()
    if job.rank == 0:
        lose_node(root, "b")
    wait_for_all()
    job = Job(root, ("a", "b"), factor=2)
    in_restore = _called_in(job.load)
    job.close()
    return in_save, in_restore


def test_what_runs_of_the_package_is_its_groups_and_its_plans() -> None:
    """By name, in a replicated save and when a lost node is restored: nothing else of it runs."""
    groups = {"GroupWrapper.group"}
    plans = {"ExchangePlan.plan", "ExchangePlan.entries"}
    with memory_directory() as root:
        for in_save, in_restore in run_ranks(_save_and_restore, 2, root):
            assert in_save == groups | plans
            assert in_restore == groups | plans | {
                "ExchangePlan.required_ids",
                "GroupWrapper.__init__",  # the group of all ranks, which the loss demands
                "GroupWrapper.get_global_rank",
                "GroupWrapper.my_group_rank",
                "GroupWrapper.get_group_rank",
            }
