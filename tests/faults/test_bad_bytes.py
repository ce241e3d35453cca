"""Bytes that are not the bytes that were committed are found, named, and never trained on.

Every file of a checkpoint is damaged in every way that storage, copying and people damage files.
Each time the load goes on to the next good checkpoint and says why, a load by number refuses, a
load with nothing good left refuses with every reason and touches nothing, and `holdfast verify`
names the same file.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.errors import CorruptCheckpointError, FormatTooNewError, NoLoadableCheckpointError
from holdfast.filesystem import LocalFilesystem
from holdfast.format.inventory import METADATA_NAME
from holdfast.storage.digests import BLOCK_BYTES
from holdfast.storage.manifest import MANIFEST_NAME
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import checkpoint_name, open_checkpoint, verify_files
from holdfast.tiers.persistent import PersistentTier
from holdfast.tiers.select import Condition
from holdfast.tiers.survey import survey_store
from tests.faults.damage import (
    Damage,
    cut_by_one,
    cut_in_half,
    cut_to_nothing,
    fill_with_zeros,
    flipped,
    lengthen,
    lose,
    put_a_directory_there,
)
from tests.faults.jobs import Job, copy_store, job_of_rank, make_store
from tests.faults.places import covered_bytes
from tests.faults.report import record
from tests.faults.tiers import FULL
from tests.support.ranks import run_ranks
from tests.support.stores import find

SEED = 30
STEPS = (2, 4, 6)
OLDER, NEWEST = STEPS[-2:]
FILES = (
    ".metadata",
    "__0_0.distcp",
    "manifest.json",
    "run_config.yaml",
    "train_state.json",
)

Digests = dict[int, dict[str, str]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Digests]:
    """A store with three checkpoints of one rank, and what each holds."""
    store = tmp_path_factory.mktemp("sound") / "store"
    return store, make_store(store, *STEPS)


@pytest.fixture
def store(saved: tuple[Path, Digests], tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    return copy_store(saved[0], tmp_path / "store")


def test_the_files_of_a_checkpoint_are_these(saved: tuple[Path, Digests]) -> None:
    """The damages below reach every kind of file that a checkpoint has."""
    folder = saved[0] / checkpoint_name(NEWEST)
    found = sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())
    assert found == sorted(FILES)


# One flipped bit.


def test_every_byte_of_every_file_is_covered(store: Path) -> None:
    """A flipped bit in any byte of a checkpoint is found, in its file and in its byte range.

    In the regular run every eighth byte and the last.
    """
    rng = random.Random(SEED)
    folder = store / checkpoint_name(NEWEST)
    files = PosixStorage(folder, LocalFilesystem())
    sound = open_checkpoint(files, NEWEST)
    flips = 0
    for file in sound.manifest.files:
        covered = covered_bytes(folder / file.path)
        for position in _positions(file.size_bytes, rng):
            expected = f"{folder.name}/{file.path}: {_place(position, covered)}"
            with flipped(folder / file.path, position, rng.randrange(8)):
                [damage] = verify_files(files, [file])
            assert str(damage).startswith(expected), position
            flips += 1
    manifest = folder / MANIFEST_NAME
    for position in _positions(manifest.stat().st_size, rng):
        with (
            flipped(manifest, position, rng.randrange(8)),
            pytest.raises(CorruptCheckpointError) as caught,
        ):
            open_checkpoint(files, NEWEST)
        assert caught.value.path == str(manifest), position
        flips += 1
    assert not verify_files(files, open_checkpoint(files, NEWEST).manifest.files), (
        "the flips were not undone"
    )
    record("byte flips", flips)


def _place(position: int, covered_bytes: int) -> str:
    """Return how damage to a byte is told."""
    if position >= covered_bytes:
        return "the footer"
    block = position // BLOCK_BYTES
    end = min((block + 1) * BLOCK_BYTES, covered_bytes) - 1
    return f"block {block} (bytes {block * BLOCK_BYTES}-{end})"


def _positions(size_bytes: int, rng: random.Random) -> Iterable[int]:
    if FULL:
        return range(size_bytes)
    return [*range(rng.randrange(8), size_bytes - 1, 8), size_bytes - 1]


@pytest.mark.parametrize("name", FILES)
def test_a_load_goes_past_a_flipped_bit(
    name: str, store: Path, saved: tuple[Path, Digests], capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever a bit flips, the next good checkpoint is loaded and the reason names the bytes."""
    path = store / checkpoint_name(NEWEST) / name
    size_bytes = path.stat().st_size
    rng = random.Random(f"{SEED} {name}")
    positions = [0, size_bytes - 1, *(rng.randrange(size_bytes) for _ in range(4))]
    covered = covered_bytes(path)
    for position in positions:
        expected = re.escape(f"{checkpoint_name(NEWEST)}/{name}: ")
        if name != MANIFEST_NAME:
            expected += re.escape(_place(position, covered))
        with flipped(path, position, rng.randrange(8)):
            _expect_older(store, saved[1], expected)
            _expect_refusal_by_number(store, expected)
            _expect_named_by_verify(store, expected, capsys)
    record("byte flips", len(positions))


# Whole files.


def _take_from_an_older_checkpoint(path: Path) -> None:
    name = path.relative_to(path.parents[1] if path.parent.name == "state" else path.parent)
    root = path.parents[2] if path.parent.name == "state" else path.parents[1]
    path.write_bytes((root / checkpoint_name(OLDER) / name).read_bytes())


DAMAGES: tuple[Damage, ...] = (
    cut_to_nothing,
    cut_in_half,
    cut_by_one,
    lengthen,
    lose,
    fill_with_zeros,
    _take_from_an_older_checkpoint,
    put_a_directory_there,
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__.strip("_"))
def test_a_damaged_file_is_named_and_passed_over(
    damage: Damage,
    name: str,
    store: Path,
    saved: tuple[Path, Digests],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cut, long, lost, zeroed, stale or misplaced file costs one checkpoint and is named."""
    path = store / checkpoint_name(NEWEST) / name
    before = path.read_bytes()
    damage(path)
    if path.is_file() and path.read_bytes() == before:
        pytest.skip("the older checkpoint has the same file")
    expected = checkpoint_name(NEWEST) + (
        r"|manifest\.json" if name == MANIFEST_NAME else f"/{re.escape(name)}: "
    )
    _expect_older(store, saved[1], expected)
    _expect_refusal_by_number(store, expected)
    _expect_named_by_verify(store, expected, capsys)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json", "train_state.json"])
@pytest.mark.parametrize("damage", [cut_in_half, lose, fill_with_zeros])
def test_with_nothing_good_left_nothing_is_touched(damage: Damage, name: str, store: Path) -> None:
    """When no checkpoint is good the load says why of each, and the live state is as it was."""
    for step in STEPS:
        damage(store / checkpoint_name(step) / name)
    job = Job(store, seed=1)
    job.run.train(3)
    before = job.digests()
    with pytest.raises(NoLoadableCheckpointError) as caught:
        job.load()
    assert job.digests() == before
    assert len(caught.value.reasons) == len(STEPS)
    for step, reason in zip(reversed(STEPS), caught.value.reasons, strict=True):
        assert checkpoint_name(step) in reason
        assert Path(name).name in reason
    assert "holdfast verify" in str(caught.value)


# Whole checkpoints.


def test_a_renamed_directory_is_no_checkpoint_of_that_iteration(
    store: Path, saved: tuple[Path, Digests], capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory renamed to a newer iteration is passed over, and its own is no longer there."""
    (store / checkpoint_name(NEWEST)).rename(store / checkpoint_name(9))
    expected = "is of iteration 6: the directory was renamed"
    _expect_older(store, saved[1], expected, iteration=9)
    _expect_refusal_by_number(store, expected, step=9)
    _expect_named_by_verify(store, expected, capsys)


def test_a_copied_directory_does_not_become_newer(store: Path, saved: tuple[Path, Digests]) -> None:
    """An old checkpoint copied under a newer name is passed over; the newest is loaded."""
    shutil.copytree(store / checkpoint_name(2), store / checkpoint_name(9))
    job = Job(store)
    result = job.load()
    assert (result.iteration, job.digests()) == (NEWEST, saved[1][NEWEST])
    assert [each.iteration for each in result.skipped] == [9]


def test_another_runs_checkpoint_never_wins(
    store: Path, saved: tuple[Path, Digests], tmp_path: Path
) -> None:
    """Another run's directory, or its manifest alone, is passed over by name of the run."""
    other = tmp_path / "other"
    make_store(other, *STEPS, 8, seed=1, run_id="other")
    shutil.copytree(other / checkpoint_name(8), store / checkpoint_name(8))
    shutil.copy(other / checkpoint_name(NEWEST) / MANIFEST_NAME, store / checkpoint_name(NEWEST))
    job = Job(store)
    result = job.load()
    assert (result.iteration, job.digests()) == (OLDER, saved[1][OLDER])
    assert [each.iteration for each in result.skipped] == [8, NEWEST]
    assert all("belongs to run 'other'" in each.reason for each in result.skipped)
    _expect_refusal_by_number(store, "does not match its digest|bytes, [0-9]+ were committed")


# The store's own files.


def test_a_flipped_bit_beside_the_checkpoints_decides_nothing(tmp_path: Path) -> None:
    """Whatever byte of the tracker, run.json or a claim flips, the choice is right or refused."""
    store, filesystem = tmp_path / "store", LocalFilesystem()
    make_store(store, *STEPS)
    back = Job(store, load={"step": 2})
    back.load()
    back.train_to(OLDER)
    back.save()
    # A third start goes back to 2 as well, and dies before its first commit.
    third = PersistentTier(PosixStorage(store, filesystem), None, None)
    third.resume_from(find(third.store, 2), is_own=True)
    third.admit()
    flips, rng = 0, random.Random(SEED)
    for path in sorted(each for each in store.iterdir() if each.is_file()):
        for position in range(path.stat().st_size):
            bit = rng.randrange(8)
            with flipped(path, position, bit):
                flips += 1
                with suppress(CorruptCheckpointError, FormatTooNewError):
                    commits = survey_store(PosixStorage(store, filesystem), is_own=True).commits
                    sound = [each for each in commits if each.condition is Condition.SOUND]
                    found = [each.iteration for each in sound]
                    assert found in ([2], []), f"{path.name}, byte {position}, bit {bit}"
    record("byte flips", flips)


# Two ranks.


def _save_together(directory: Path) -> dict[int, dict[str, str]]:
    job, found = job_of_rank(directory), {}
    for step in STEPS:
        job.train_to(step)
        job.save()
        found[step] = job.digests()
    return found


def _load_together(directories: list[Path]) -> list[tuple[int, dict[str, str], list[str]]]:
    found = []
    for directory in directories:
        job = job_of_rank(directory)
        result = job.load()
        found.append((result.iteration, job.digests(), [each.reason for each in result.skipped]))
    return found


def _swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_all_ranks_fall_back_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one rank's file damaged or two swapped, both ranks load the same older checkpoint."""
    sound = tmp_path / "sound"
    saved = run_ranks(_save_together, 2, sound)
    shards = ("__0_0.distcp", "__1_0.distcp")
    stores = [copy_store(sound, tmp_path / "swapped")]
    folder = stores[-1] / checkpoint_name(NEWEST)
    _swap(folder / shards[0], folder / shards[1])
    for name in (*shards, METADATA_NAME):
        stores.append(copy_store(sound, tmp_path / f"flipped_{len(stores)}"))
        path = stores[-1] / checkpoint_name(NEWEST) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found = run_ranks(_load_together, 2, stores)
    named: list[tuple[str, ...]] = [shards]
    named += [(each,) for each in (*shards, METADATA_NAME)]
    for number, files in enumerate(named):
        iterations, digests, reasons = zip(*(each[number] for each in found), strict=True)
        # As many ranks as saved do not read `.metadata`, and go on without it.
        expected = NEWEST if METADATA_NAME in files else OLDER
        assert iterations == (expected, expected)
        assert list(digests) == [each[expected] for each in saved]
        assert reasons[0] == reasons[1]
        if expected == OLDER:
            assert any(f"{checkpoint_name(NEWEST)}/{name}: " in reasons[0][0] for name in files)
        for name in files:
            _expect_named_by_verify(stores[number], re.escape(f"/{name}: "), capsys)
    record("byte flips", len(named) - 1)


# What is expected of a store whose newest checkpoint is damaged.


def _expect_older(store: Path, saved: Digests, expected: str, iteration: int = NEWEST) -> None:
    job = Job(store, seed=1)
    result = job.load()
    assert (result.iteration, result.found) == (OLDER, True)
    assert job.digests() == saved[OLDER]
    assert [each.iteration for each in result.skipped] == [iteration]
    assert re.search(expected, result.skipped[0].reason), result.skipped[0].reason


def _expect_refusal_by_number(store: Path, expected: str, step: int = NEWEST) -> None:
    job = Job(store, seed=1, load={"step": step})
    before = job.digests()
    with pytest.raises(CorruptCheckpointError, match=expected):
        job.load()
    assert job.digests() == before


def _expect_named_by_verify(store: Path, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["verify", str(store)]) == 1
    assert re.search(expected, capsys.readouterr().out)
