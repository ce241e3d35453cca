"""The release of nvidia-resiliency-ext that is tested is the one that was meant."""

from __future__ import annotations

import inspect
import os
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.nvrx_versions import SOURCES_VARIABLE
from tests.support.ranks import run_ranks

pytest.importorskip("nvidia_resiliency_ext")


def _imported() -> tuple[str, str]:
    """Return the version, and where the base of the engine's manager was found."""
    from holdfast.tiers.local.nvrx import LocalCheckpointManager

    return version("nvidia-resiliency-ext"), inspect.getfile(LocalCheckpointManager)


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
