"""The persistent tier needs nothing of a storage but the protocol: here it has no file system."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.errors import CorruptCheckpointError, SupersededAttemptError
from holdfast.format.items import Itemizer
from holdfast.ranks.coordinator import SingleProcess
from holdfast.read.lazy import LazyTensors
from holdfast.snapshot.shard import ShardSaver
from holdfast.storage.backend import Storage
from holdfast.storage.store import TRACKER_NAME, Checkpoint
from holdfast.testing import MemoryStorage
from holdfast.tiers.opening import open_contents
from holdfast.tiers.persistent import PersistentTier
from holdfast.tiers.survey import survey_store
from holdfast.tiers.tier import Contents, Snapshot

WEIGHT = torch.arange(3_000_000.0)


class _Job:
    """One start of a run, without a model."""

    def __init__(self, storage: MemoryStorage, keep_last: int | None = None) -> None:
        self.tier = PersistentTier(storage, None, keep_last)
        self.saver, self.itemizer, self.rank = ShardSaver(), Itemizer(), SingleProcess()

    def save(self, iteration: int) -> None:
        leaves = {"model.w": WEIGHT, "model.b": torch.full((5,), iteration), "step": 7}
        paths = {name: (name,) for name in leaves}
        plan = self.saver.settle(lambda: self.itemizer.describe(leaves, paths), self.rank)
        staged = self.saver.stage(*plan)
        assert staged.copying is not None
        staged.copying.begin()
        counters = {
            "train_state": {"step": iteration},
            "num_floating_point_operations_so_far": 0,
        }
        self.tier.admit()
        self.tier.write(
            Snapshot(
                iteration, staged, b"rank", b"shared", json.dumps(counters).encode(), b"config"
            ),
            self.tier.next_identity,
            self.rank,
        )


def _open(checkpoint: Checkpoint, files: Storage) -> Contents:
    return open_contents(checkpoint, files, SingleProcess(), lambda state: True)


def _load(storage: MemoryStorage) -> tuple[int, dict[str, torch.Tensor]]:
    """Load the newest sound checkpoint."""
    survey = survey_store(storage, is_own=True)
    commit = max(survey.checkpoints, key=lambda each: each.order)
    checkpoint = survey.checkpoints[commit]
    contents = _open(checkpoint, storage.under(checkpoint.path.name))
    assert contents.rank_states == {0: b"rank"}
    assert contents.values == {"step": 7}
    targets = {"model.w": torch.zeros_like(WEIGHT), "model.b": torch.zeros(5, dtype=torch.int64)}
    contents.reader.read_tensors(targets)
    return checkpoint.iteration, targets


def test_a_checkpoint_is_saved_loaded_and_superseded_in_memory() -> None:
    """Saves, retention, a load, lazy tensors and a second start work without a file system."""
    storage = MemoryStorage()
    first = _Job(storage, keep_last=2)
    for iteration in (10, 20, 30, 30):
        first.save(iteration)
    iteration, tensors = _load(storage)
    assert iteration == 30
    assert torch.equal(tensors["model.w"], WEIGHT)
    assert torch.equal(tensors["model.b"], torch.full((5,), 30))
    names = [each.name for each in storage.list()]
    assert names == [
        "attempt_0000001.json", "iter_0000020", "iter_0000030", TRACKER_NAME, "run.json",
    ]  # fmt: skip
    checkpoint = first.tier.store.find(30)
    reader = _open(checkpoint, first.tier.store.files_of(checkpoint)).reader
    assert torch.equal(LazyTensors(reader, "model.")["w"], WEIGHT)
    second = _Job(storage)
    second.tier.resume_from(second.tier.store.find(20), is_own=True)
    second.save(25)
    assert _load(storage)[0] == 25
    with pytest.raises(SupersededAttemptError):
        first.save(40)
    assert _load(storage)[0] == 25


def test_a_changed_byte_is_found_in_memory_too() -> None:
    """Digests are above the storage: one that returns wrong bytes is found out, by name."""
    storage = MemoryStorage()
    _Job(storage).save(10)
    files = storage.under("iter_0000010")
    content = bytearray(files.get("__0_0.distcp"))
    content[9_000_000] ^= 1
    files.put("__0_0.distcp", bytes(content))
    with pytest.raises(CorruptCheckpointError, match="block 1") as caught:
        _load(storage)
    assert caught.value.path == "/memory/iter_0000010/__0_0.distcp"


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
