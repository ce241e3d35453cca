"""Above a storage nothing knows a file system: whole runs in memory, and who may call what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.errors import CheckpointError
from holdfast.ranks.coordinator import SingleProcess
from holdfast.read.reader import LazyTensors
from holdfast.storage.store import TRACKER_NAME
from holdfast.testing import MemoryStorage, StartedTier
from holdfast.testing.tier import Process, tensors_at
from holdfast.tiers.opening import open_shards
from holdfast.tiers.persistent import PersistentTier
from tests.support.stores import find


def _start(storage: MemoryStorage, *, resumed_from: int | None = None) -> Process:
    """Start a process of a run that keeps two checkpoints."""
    tier = PersistentTier(storage, None, 2)
    tier.survey(SingleProcess(), lambda record: None)
    if resumed_from is not None:
        tier.resume_from(find(tier.store, resumed_from), is_own=True)
    tier.admit()
    return Process(StartedTier(tier, tier.next_identity))


def test_a_run_needs_no_file_system() -> None:
    """Saves, a repeated one, retention and a rollback by a second start work in memory."""
    storage = MemoryStorage()
    first = _start(storage)
    for iteration in (10, 20, 30, 30):
        first.save(iteration)
    assert [each.name for each in storage.list()] == [
        "attempt_0000001.json", "iter_0000020", "iter_0000030", TRACKER_NAME, "run.json",
    ]  # fmt: skip
    second = _start(storage, resumed_from=20)
    second.save(25)
    with pytest.raises(CheckpointError, match="attempt 2 of this run has taken over"):
        first.save(40)
    newest = second.survey()[0]
    assert newest.iteration == 25
    assert second.read(newest).iteration == 25
    assert storage.get(TRACKER_NAME) == b"25"


def test_tensors_are_mapped_without_a_file_system() -> None:
    """Lazy tensors need no file: what they map is the storage's own matter."""
    storage = MemoryStorage()
    process = _start(storage)
    process.save(10)
    tier = process.tier
    assert isinstance(tier, PersistentTier)
    checkpoint = find(tier.store, 10)
    tensors = LazyTensors(open_shards(checkpoint, tier.store.files_of(checkpoint)))
    expected = tensors_at(10)
    assert {*tensors} == {*expected}
    assert all(torch.equal(tensors[name], each) for name, each in expected.items())


FILE_CALLS = frozenset(
    {
        "dup", "fcntl", "fileno", "flock", "fstat", "fsync", "ftruncate", "is_symlink", "iterdir",
        "link", "list_directory", "listdir", "lstat", "make_directory", "mkdir", "open_existing",
        "open_new", "preadv", "pwrite", "readlink", "remove_directory", "remove_file", "rename",
        "rmdir", "scandir", "statvfs", "sync_directory", "sync_file", "symlink_to", "unlink",
    }
)  # fmt: skip
MAY_CALL = {
    "filesystem": "the single steps",
    "storage.posix": "keeps the promises of a storage with them",
    "snapshot.arena": "measures memory, under a lock of the node",
    "tiers.local.pool": "files that are mapped as arenas",
    "tiers.local.peers": "files that are mapped for blocks on their way",
    "tiers.local.shard_file": "files of a node's own directory, renamed into and out of the pool",
    "tiers.local.shards": "the same",
    "tiers.local.tier": "the same",
    "state.components": "writes a file that is a component where there is none",
    "state.strategy": "`rename` is a field of LoadStrategy",
    "tiers.places": "what a path names that a user typed",
    "cli": "what a path names that a user typed",
}
"""The modules that know descriptors, links, renames or directories, and why."""


def test_only_these_modules_know_a_file_system() -> None:
    """Every other module sees a storage: a new kind of storage is added without touching it."""
    root = Path(holdfast.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        if FILE_CALLS & {each.attr for each in nodes if isinstance(each, ast.Attribute)}:
            found.add(".".join(path.relative_to(root).with_suffix("").parts))
    assert found - set(MAY_CALL) == set()
