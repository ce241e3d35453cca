"""Run the local tier's tests against newer releases of nvidia-resiliency-ext than is installed.

    python -m tests.nvrx_versions [--quick] [--into .venv/nvrx] [what pytest is told]

The wheels of newer releases want a newer C library than many machines have; what the local tier
uses of them is Python. So they are fetched for a machine that would take them, unpacked beside the
environment, native parts left out, and put first on the path. Promises that no run passes which
imported anything else on any rank, that a release which cannot be had is told, and an exit code of
1 unless at least one was tried and every one that was passed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES_VARIABLE = "HOLDFAST_NVRX_SOURCES"
"""Tells the tests which sources are meant; unset: whatever is installed."""
LINES = ("0.5", "0.6", "0.7")
"""Of releases, beside the one that is installed; of each the newest is tried."""
_DISTRIBUTED = "tests/distributed/test_local_tier.py"
QUICK = (
    "tests/distributed/test_nvrx_version.py",
    "tests/unit/test_local_tier.py",
    "tests/unit/test_peer_streams.py",
    f"{_DISTRIBUTED}::test_with_replicas_any_one_loss_costs_nothing",
    f"{_DISTRIBUTED}::test_replication_settings_may_change_between_runs",
)
ALL = (
    *QUICK[:3],
    "tests/unit/test_two_tiers.py",
    _DISTRIBUTED,
)
_PACKAGE = "nvidia-resiliency-ext"
_PYTHONS = ("3.12", "3.11", "3.10")
"""Whose wheels will do where there is none for the running one."""
_LIMIT_SECONDS = 1200


@dataclass(frozen=True)
class Release:
    """One release, unpacked."""

    version: str
    sources: Path


class NotToBeHadError(Exception):
    """A release could not be fetched; the message is pip's."""


def find(line: str, folder: Path) -> Release:
    """Return the newest release of a line, fetching it unless one lies there.

    Raises:
        NotToBeHadError: the package index has none, or cannot be reached.
    """
    present = [each for each in folder.glob(f"{line}.*") if each.is_dir()]
    if present:
        newest = max(present, key=lambda each: [*map(int, each.name.split("."))])
        return Release(newest.name, newest)
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    reasons = []
    with tempfile.TemporaryDirectory() as aside:
        for python in dict.fromkeys((running, *_PYTHONS)):
            reasons.append(_download(line, python, Path(aside)))
            if wheels := [*Path(aside).glob("*.whl")]:
                return _unpack(wheels[0], folder)
    raise NotToBeHadError(reasons[-1])


def _download(line: str, python: str, into: Path) -> str:
    """Fetch a wheel for an interpreter; return what pip had to say if it did not."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary", ":all:", "--python-version", python,
        "--platform", f"manylinux_2_39_{platform.machine()}", "--dest", str(into),
        f"{_PACKAGE}=={line}.*",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "the package index does not answer"
    said = [each for each in done.stderr.splitlines() if each.startswith("ERROR")]
    return said[-1] if said else f"pip exited with {done.returncode}"


def _unpack(wheel: Path, folder: Path) -> Release:
    version = wheel.name.split("-")[1]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside, zipfile.ZipFile(wheel) as archive:
        names = [each for each in archive.namelist() if not each.endswith(".so")]
        archive.extractall(aside, names)
        target = folder / version
        shutil.rmtree(target, ignore_errors=True)
        Path(aside, "whole").mkdir()
        for each in {Path(name).parts[0] for name in names}:
            Path(aside, each).rename(Path(aside, "whole", each))
        Path(aside, "whole").rename(target)  # there only when it is whole
    return Release(version, target)


def run(release: Release, tests: Sequence[str]) -> int:
    """Run tests with a release first on the path; return pytest's exit code."""
    path = [str(release.sources), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        SOURCES_VARIABLE: str(release.sources),
    }
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    try:
        done = subprocess.run(
            command, check=False, cwd=ROOT, env=environment, timeout=_LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return 1
    return done.returncode


def _try_all(folder: Path, tests: Sequence[str]) -> Iterator[tuple[str, bool | None, str]]:
    """Yield each release with whether it passed, None if it was not tried, and more words."""
    for line in LINES:
        try:
            release = find(line, folder)
        except NotToBeHadError as error:
            yield f"{line}.x", None, f"cannot be had: {error}"
            continue
        _say(f"== {_PACKAGE} {release.version}")
        began = time.monotonic()
        code = run(release, tests)
        words = "passed" if code == 0 else f"pytest exited with {code}"
        yield release.version, code == 0, f"{words} in {time.monotonic() - began:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Try every release and print a table; the exit code says whether it was good."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the adapter's own tests alone")
    parser.add_argument(
        "--into", type=Path, default=ROOT / ".venv" / "nvrx", help="where releases are unpacked"
    )
    known, told = parser.parse_known_args(arguments)
    tried = [*_try_all(known.into.absolute(), [*(QUICK if known.quick else ALL), *told])]
    for version, _, words in tried:
        _say(f"{_PACKAGE} {version}: {words}")
    verdicts = [passed for _, passed, _ in tried if passed is not None]
    if not verdicts:
        _say("no newer release was tried: that proves nothing")
    return 0 if verdicts and all(verdicts) else 1


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()  # before what pytest prints


if __name__ == "__main__":
    sys.exit(main())
