"""One root of checkpoints: names, commits, listings, leftovers."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest

from holdfast.filesystem import LocalFilesystem
from holdfast.storage.manifest import MANIFEST_NAME
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import TRACKER_NAME, Store, checkpoint_name, parse_checkpoint_name
from tests.support.stores import FaultyFilesystem, commit, find, manifest_of, tree


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    root = tmp_path / "store"
    root.mkdir()
    return Store(PosixStorage(root, LocalFilesystem()))


def _listed(store: Store) -> list[int]:
    return [each.iteration for each in store.listing().checkpoints]


NAMES = [(0, "iter_0000000"), (40, "iter_0000040"), (9_999_999, "iter_9999999"),
         (10_000_000, "iter_10000000"), (10**15, "iter_1000000000000000")]  # fmt: skip


@pytest.mark.parametrize(("iteration", "name"), NAMES)
def test_a_name_and_an_iteration_stand_for_each_other(iteration: int, name: str) -> None:
    """A directory is named by at least seven digits, and read back as the same iteration."""
    assert checkpoint_name(iteration) == name
    assert parse_checkpoint_name(name) == iteration


FOREIGN = [
    "iter_foo", "iter_5", "iter_0000005.tmp", "iter_00000050.bak", "iter_00000050", "iter_0000005 ",
    "iter_-000005", "iter_+000005", "iter_000_005", "ITER_0000005", "xiter_0000005", "iter_",
    "iter_\u0660\u0660\u0660\u0660\u0660\u0660\u0661", "iter_0000005\n",
    "iter_0000005.pending-", "iter_0000005.pending-XYZ", "iter_0000005.pending-0123456",
    "iter_0000005.pending-012345678", "iter_5.pending-01234567", "iter_00000050.pending-01234567",
    "iter_\u0660\u0660\u0660\u0660\u0660\u0660\u0661.pending-01234567",
    "iter_0000005.replaced-nonsense", "iter_00000050.replaced-01234567", "other.pending-01234567",
    "iter_0000005.pending-01234567.bak", "best", ".git",
]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_name_is_no_checkpoint(name: str) -> None:
    """Whatever is not `iter_` and seven or more ASCII digits stands for no iteration."""
    assert parse_checkpoint_name(name) is None


def test_foreign_names_are_never_touched_or_counted(store: Store) -> None:
    """Saves, sweeps and removals leave everything alone whose name is not in the grammar."""
    foreign = store.root.parent / "foreign"
    foreign.mkdir()
    for name in FOREIGN:
        (store.root / name).mkdir()
        (store.root / name / MANIFEST_NAME).write_bytes(b"not ours")
    (store.root / "iter_0000006").write_bytes(b"a file, no directory")
    (store.root / "notes.txt").write_bytes(b"")
    before = tree(store.root)
    for iteration in (1, 2):
        commit(store, iteration)
    assert _listed(store) == [2, 1]
    assert store.listing().broken == ()
    assert store.sweep() == []
    for each in store.listing().checkpoints:
        store.remove(each)
    (store.root / TRACKER_NAME).unlink()
    assert tree(store.root) == before
    assert tree(foreign) == {}


def test_a_checkpoint_that_was_archived_and_linked_back_is_one(store: Store) -> None:
    """A link to a moved checkpoint is listed and verified; what it leads to is never changed."""
    for iteration in (1, 2):
        commit(store, iteration)
    archive = store.root.parent / "archive-of-2"
    (store.root / "iter_0000002").rename(archive)
    (store.root / "iter_0000002").symlink_to(archive)
    before = tree(archive)
    assert _listed(store) == [2, 1]
    linked = find(store, 2)
    assert store.check_sizes(linked) == store.verify(linked) == []
    commit(store, 3)
    assert store.sweep() == []
    commit(store, 2)  # the same iteration again: the link makes room, the archive stays
    assert not (store.root / "iter_0000002").is_symlink()
    assert _listed(store) == [3, 2, 1]
    assert tree(archive) == before


def test_retention_of_a_linked_checkpoint_removes_the_link(store: Store) -> None:
    """Removing a checkpoint that is a link leaves the archive as it is, and nothing else behind."""
    commit(store, 1)
    archive = store.root.parent / "archive-of-1"
    (store.root / "iter_0000001").rename(archive)
    (store.root / "iter_0000001").symlink_to(archive, target_is_directory=True)
    before = tree(archive)
    store.remove(find(store, 1))
    assert [each for each in store.root.iterdir() if "iter_" in each.name] == []
    assert tree(archive) == before


def test_a_link_that_leads_nowhere_is_named(store: Store) -> None:
    """A link to what is gone, or to no checkpoint, is broken with that reason, and can be saved."""
    foreign = store.root.parent / "foreign"
    foreign.mkdir()
    (foreign / "kept").write_bytes(b"kept")
    (store.root / "iter_0000007").symlink_to(foreign)
    (store.root / "iter_0000008").symlink_to(store.root.parent / "gone")
    reasons = [each.reason for each in store.listing().broken]
    assert "gone, which is not there" in reasons[0]
    assert "has no manifest.json" in reasons[1]
    for iteration in (7, 8):
        commit(store, iteration)
    assert _listed(store) == [8, 7]
    assert tree(foreign) == {"kept": b"kept"}


def test_a_checkpoint_of_a_later_version_is_listed_apart(store: Store) -> None:
    """What a later version wrote is no damage; it is told with both formats."""
    commit(store, 1)
    manifest = commit(store, 2).manifest
    later = dataclasses.replace(manifest, format=99).to_bytes()
    (store.root / "iter_0000002" / MANIFEST_NAME).write_bytes(later)
    listing = store.listing()
    assert [each.iteration for each in listing.checkpoints] == [1]
    assert listing.broken == ()
    assert [(each.iteration, each.sequence) for each in listing.too_new] == [(2, manifest.sequence)]
    assert "format 99; this version of holdfast reads up to" in str(listing.too_new[0].error)


def test_an_absent_or_empty_root_holds_nothing(tmp_path: Path) -> None:
    """A store that does not exist lists nothing, and has no tracker."""
    store = Store(PosixStorage(tmp_path / "absent", LocalFilesystem()))
    assert store.listing().checkpoints == store.listing().broken == ()
    assert store.read_tracker() == (None, "missing")


def test_a_commit_is_listed_found_and_tracked(store: Store) -> None:
    """After a commit the checkpoint is there under its name, verifies, and is the tracker's."""
    pending = store.begin(40)
    assert pending.startswith("iter_0000040.pending-")
    record = store.write_file(pending, "state/deep.pt", b"content")
    assert _listed(store) == []
    checkpoint = store.commit(pending, manifest_of(40, files=(record,)))
    assert checkpoint.path == store.root / "iter_0000040"
    assert find(store, 40) == checkpoint
    assert store.verify(checkpoint) == store.check_sizes(checkpoint) == []
    assert store.read_tracker() == (40, "")
    assert sorted(each.name for each in store.root.iterdir()) == ["iter_0000040", TRACKER_NAME]


def test_a_listing_goes_by_order_of_commit(store: Store) -> None:
    """The newest commit comes first, whatever its iteration."""
    for iteration, sequence in ((100, 1), (200, 2), (300, 3), (150, 4)):
        commit(store, iteration, sequence)
    assert _listed(store) == [150, 300, 200, 100]


def test_an_abandoned_save_leaves_nothing(store: Store) -> None:
    """A pending checkpoint that is given up disappears with all its files."""
    pending = store.begin(40)
    store.write_file(pending, "state/deep.pt", b"content")
    store.abandon(pending)
    assert tree(store.root) == {}


def test_a_removed_checkpoint_is_gone(store: Store) -> None:
    """Removal takes one checkpoint with all its files and no other."""
    doomed, kept = commit(store, 1), commit(store, 2)
    store.remove(doomed)
    assert store.listing().checkpoints == (kept,)
    assert sorted(each.name for each in store.root.iterdir()) == ["iter_0000002", TRACKER_NAME]


def test_saving_an_iteration_again_replaces_it(store: Store) -> None:
    """A second save of an iteration takes the place of the first and leaves no leftovers."""
    commit(store, 40, 1, content=b"old")
    commit(store, 40, 2, content=b"new")
    (found,) = store.listing().checkpoints
    assert found.manifest.sequence == 2
    assert (found.path / "x.distcp").read_bytes() == b"new"
    assert sorted(each.name for each in store.root.iterdir()) == ["iter_0000040", TRACKER_NAME]


@pytest.mark.parametrize("step", ["open_new", "sync_file", "sync_directory", "rename"])
def test_a_failed_second_save_keeps_the_first(store: Store, step: str) -> None:
    """Whatever step of a re-save fails, the iteration stays loadable: the old one or the new."""
    commit(store, 40, 1, content=b"old")
    count = 1
    while True:
        filesystem, asked = FaultyFilesystem(), []

        def refuses(name: str, path: Path, asked: list[Path] = asked, number: int = count) -> bool:
            asked += [path] if name == step else []
            return name == step and len(asked) == number

        filesystem.refuses = refuses
        try:
            commit(Store(PosixStorage(store.root, filesystem)), 40, 2, content=b"new")
        except OSError:
            (found,) = store.listing().checkpoints
            assert store.verify(found) == []
            assert (found.path / "x.distcp").read_bytes() == (
                b"old" if found.manifest.sequence == 1 else b"new"
            )
            store.sweep()
            assert len(_listed(store)) == 1
            commit(store, 40, 1, content=b"old")
            count += 1
        else:
            break
    assert count > 1


def test_a_replaced_directory_counts_while_its_name_is_free(store: Store) -> None:
    """After a crash between two renames the old checkpoint is found, and gets its name back."""
    committed = commit(store, 40, 1).path
    replaced = store.root / "iter_0000040.replaced-0123abcd"
    committed.rename(replaced)
    assert find(store, 40).path == replaced
    assert store.verify(find(store, 40)) == []
    assert store.sweep() == []
    assert find(store, 40).path == committed
    assert not replaced.exists()


def test_of_two_that_were_replaced_the_newer_gets_the_name(store: Store) -> None:
    """Where two were moved aside and no successor came, a sweep keeps the newer and no other."""
    for sequence, nonce in ((2, "0123abcd"), (1, "89ef4567")):
        path = commit(store, 40, sequence).path
        path.rename(store.root / f"iter_0000040.replaced-{nonce}")
    assert store.sweep() == ["iter_0000040.replaced-89ef4567"]
    assert find(store, 40).manifest.sequence == 2


def test_a_sweep_leaves_what_cannot_be_removed(tmp_path: Path) -> None:
    """A leftover that the disk will not let go stays, and everything else is swept."""

    class Stubborn(LocalFilesystem):
        def remove_file(self, path: Path) -> None:
            if path.parent.name.startswith("iter_0000001"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            super().remove_file(path)

    store = Store(PosixStorage(tmp_path, Stubborn()))
    left, other = store.begin(1), store.begin(2)
    for each in (left, other):
        (tmp_path / each / "x").write_bytes(b"torn")
    assert store.sweep() == [other]
    assert (tmp_path / left / "x").exists()


def test_a_sweep_removes_what_crashed_saves_left(store: Store) -> None:
    """Pending directories and files of the grammar go; everything else stays."""
    commit(store, 1)
    before = tree(store.root)
    leftovers = [
        store.begin(1),
        store.begin(12345678),
        f"{TRACKER_NAME}.pending-0123abcd",
        "run.json.pending-0123abcd",
        "attempt_0000001.json.pending-0123abcd",
    ]
    for name in leftovers[2:]:
        (store.root / name).write_bytes(b"torn")
    (store.root / leftovers[0] / "state").mkdir()
    (store.root / leftovers[0] / "state/x").write_bytes(b"torn")
    assert sorted(store.sweep()) == sorted(leftovers)
    assert tree(store.root) == before


TRACKERS = [
    (b"40", 40, ""),
    (b"40\n", 40, ""),
    (b" 40 \r\n", 40, ""),
    (b"0", 0, ""),
    (b"0000040", 40, ""),
    (b"10000000", 10_000_000, ""),
    (None, None, "missing"),
    (b"", None, "torn"),
    (b"\n", None, "torn"),
    (b"release", None, "torn"),
    (b"-40", None, "torn"),
    (b"+40", None, "torn"),
    (b"1_000", None, "torn"),
    (b"4.0", None, "torn"),
    (b"40 41", None, "torn"),
    (b"4\x000", None, "torn"),
    (b"\xff\xfe", None, "torn"),
    ("\u0664\u0660".encode(), None, "torn"),
    (b"9" * 5000, None, "torn"),
]


@pytest.mark.parametrize(("content", "iteration", "problem"), TRACKERS)
def test_a_tracker_is_an_iteration_or_a_reason(
    store: Store, content: bytes | None, iteration: int | None, problem: str
) -> None:
    """Plain ASCII digits are an iteration; anything else is told as what it is, never raised."""
    if content is not None:
        (store.root / TRACKER_NAME).write_bytes(content)
    found, reason = store.read_tracker()
    assert found == iteration
    assert reason.split(":")[0] == problem


def test_a_tracker_that_is_no_file_is_unreadable(store: Store) -> None:
    """A directory or a link in the tracker's place is a reason, not a crash."""
    (store.root / TRACKER_NAME).mkdir()
    assert store.read_tracker()[1].startswith("unreadable: ")
    (store.root / TRACKER_NAME).rmdir()
    (store.root / TRACKER_NAME).symlink_to("elsewhere")
    assert store.read_tracker()[1].startswith("unreadable: ")


def test_a_renamed_directory_is_broken(store: Store) -> None:
    """A checkpoint under the name of another iteration is not listed, and says why."""
    (commit(store, 40).path).rename(store.root / "iter_0000050")
    listing = store.listing()
    assert listing.checkpoints == ()
    assert [each.iteration for each in listing.broken] == [50]
    assert "is of iteration 40: the directory was renamed" in listing.broken[0].reason


def _lose_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).unlink()


def _cut_manifest(path: Path) -> None:
    content = (path / MANIFEST_NAME).read_bytes()
    (path / MANIFEST_NAME).write_bytes(content[: len(content) // 2])


def _link_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).rename(path / "elsewhere")
    (path / MANIFEST_NAME).symlink_to(path / "elsewhere")


def _foreign_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).write_bytes(b"\x80\x04.")


BROKEN = [
    (_lose_manifest, "has no manifest.json"),
    (_cut_manifest, "does not match the digest in its last line"),
    (_link_manifest, "cannot be read"),
    (_foreign_manifest, "does not match the digest in its last line"),
]


@pytest.mark.parametrize(("harm", "reason"), BROKEN)
def test_a_directory_without_its_manifest_is_broken(
    store: Store, harm: object, reason: str
) -> None:
    """A missing, torn, linked or foreign manifest makes a directory broken, never listed."""
    commit(store, 10)
    path = commit(store, 20).path
    assert callable(harm)
    harm(path)
    listing = store.listing()
    assert [each.iteration for each in listing.checkpoints] == [10]
    assert [each.iteration for each in listing.broken] == [20]
    assert reason in listing.broken[0].reason
    assert store.sweep() == []  # broken is not ours to throw away


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


DAMAGES = [
    ("missing", Path.unlink, "is missing", True),
    ("cut to nothing", lambda path: path.write_bytes(b""), "0 bytes, 6 were committed", True),
    ("cut by one", lambda path: path.write_bytes(b"shard"), "", True),
    ("longer", lambda path: path.write_bytes(b"shards!"), "", True),
    ("one bit", _flip, "block 0 (bytes 0-5) does not match its digest", False),
    ("a link", _link, "cannot be read", True),
]


@pytest.mark.parametrize(
    ("harm", "reason", "seen_by_size"),
    [row[1:] for row in DAMAGES],
    ids=[row[0] for row in DAMAGES],
)
def test_a_damaged_file_is_named(
    store: Store, harm: object, reason: str, seen_by_size: bool
) -> None:
    """Verifying names the damaged file and no other; sizes alone see all but changed bytes."""
    checkpoint = commit(store, 40)
    assert callable(harm)
    harm(checkpoint.path / "x.distcp")
    (damage,) = store.verify(checkpoint)
    assert damage.path == "iter_0000040/x.distcp"
    assert reason in damage.reason
    assert [each.path for each in store.check_sizes(checkpoint)] == (
        ["iter_0000040/x.distcp"] if seen_by_size else []
    )


def test_swapped_files_are_seen(store: Store) -> None:
    """The same file of another iteration, of equal size, is damage."""
    one, two = commit(store, 1, content=b"one"), commit(store, 2, content=b"two")
    shutil.copy(one.path / "x.distcp", two.path / "x.distcp")
    assert [each.path for each in store.verify(two)] == ["iter_0000002/x.distcp"]
    assert store.verify(one) == []
