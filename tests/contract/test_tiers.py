"""Every tier keeps the promises of the tier protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.config import LocalConfig, LocalKeepConfig
from holdfast.filesystem import LocalFilesystem
from holdfast.ranks.coordinator import SingleProcess
from holdfast.storage.identity import CommitIdentity
from holdfast.storage.posix import PosixStorage
from holdfast.testing import MemoryStorage, StartedTier, TierContract
from holdfast.testing.tier import StartTier
from holdfast.tiers.persistent import PersistentTier
from holdfast.tiers.select import Commit
from tests.support.nodes import flip, memory_directory

KEEPS = 2
RUN_ID = "run"


def _start_persistent(open_storage: Callable[[], MemoryStorage | PosixStorage]) -> StartedTier:
    """Start a job that has loaded the newest checkpoint, as its first save demands."""
    tier = PersistentTier(open_storage(), RUN_ID, KEEPS)
    tier.survey(SingleProcess(), lambda record: None)
    found = tier.surveyed.checkpoints
    if found:
        tier.resume_from(found[max(found, key=lambda each: each.order)], is_own=True)
    tier.admit()
    return StartedTier(tier, tier.next_identity)


class TestPersistentTier(TierContract):
    """The durable tier in a directory."""

    keeps = KEEPS

    @pytest.fixture
    def start(self, tmp_path: Path) -> StartTier:
        return lambda: _start_persistent(lambda: PosixStorage(tmp_path, LocalFilesystem()))

    def harm(self, commit: Commit) -> None:
        flip(Path(commit.path) / "__0_0.distcp")


class TestPersistentTierInMemory(TierContract):
    """The durable tier over a storage that is no file system."""

    keeps = KEEPS

    @pytest.fixture
    def start(self) -> StartTier:
        self._storage = MemoryStorage()
        return lambda: _start_persistent(lambda: self._storage)

    def harm(self, commit: Commit) -> None:
        files = self._storage.under(Path(commit.path).name)
        content = bytearray(files.get("__0_0.distcp"))
        content[4100] ^= 4
        files.put("__0_0.distcp", bytes(content))


class TestLocalTier(TierContract):
    """The fast tier of one rank, in RAM and on a disk."""

    keeps = KEEPS

    @pytest.fixture(params=["memory", "disk"])
    def directory(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
        if request.param == "disk":
            yield tmp_path
        else:
            with memory_directory() as path:
                yield path

    @pytest.fixture
    def start(self, directory: Path) -> StartTier:
        pytest.importorskip("nvidia_resiliency_ext")
        from holdfast.tiers.local.tier import LocalTier

        self._directory = directory
        attempts: list[int] = []

        def start() -> StartedTier:
            config = LocalConfig(directory=str(directory), keep=LocalKeepConfig(last=KEEPS))
            rank = SingleProcess()
            tier = LocalTier(config, RUN_ID, LocalFilesystem(), rank, 20.0, node="node0")
            tier.survey(rank, lambda record: None)
            attempts.append(len(attempts) + 1)
            number, sequence = attempts[-1], 0

            def identify() -> CommitIdentity:
                nonlocal sequence
                sequence = max(sequence, tier.newest_sequence) + 1
                return CommitIdentity(number, sequence)

            return StartedTier(tier, identify)

        return start

    def harm(self, commit: Commit) -> None:
        (path,) = self._directory.glob(f"*/0/iter_{commit.iteration:07d}_0_local.pt")
        flip(path)
