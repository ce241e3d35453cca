"""Local files that somebody made to do harm are refused: nothing in them is run or followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import CheckpointError, ConfigError
from holdfast.format.layout import read_index
from holdfast.snapshot.shard import seal_image
from holdfast.tiers.local.shard_file import PART_NAMES, ShardRecord, Trailer, read_trailer
from tests.faults.jobs import load, state_of, train_to
from tests.faults.local_stories import place_in_memory, start
from tests.support.hostile import hostile_pickle, hostile_torch_file
from tests.support.kernel_calls import plant, tree_of

pytest.importorskip("nvidia_resiliency_ext")

OLDER, NEWEST = 10, 20


@pytest.fixture
def base() -> Iterator[Path]:
    """A place in RAM with two local commits."""
    with place_in_memory() as place:
        yield place


@pytest.fixture
def states(base: Path) -> dict[int, tuple[int, str]]:
    """What they hold."""
    job = start(base)
    job.load()
    found = {}
    for iteration in (OLDER, NEWEST):
        found[iteration] = train_to(job, iteration)
        job.save(to_local=True)
    job.close()
    return found


def _newest(base: Path) -> Path:
    (found,) = (base / "local").glob(f"*/0/iter_{NEWEST:07d}_0_local.pt")
    return found


def _tail(path: Path) -> Trailer:
    with path.open("rb") as stream:
        return read_trailer(stream, str(path))


def _reseal(path: Path, tail: Trailer) -> None:
    """Give a file another tail that fits it, as somebody can who may write to the directory."""
    image = path.read_bytes()[: _tail(path).record.image_bytes]
    path.write_bytes(image + tail.to_bytes())


def _plant(path: Path, name: str, content: bytes) -> None:
    """Give a file another value that its digests agree with."""
    tail, file = _tail(path), bytearray(path.read_bytes())
    body = memoryview(file)[: tail.record.body_bytes]
    (entry,) = [each for each in read_index(body) if each.name == name]
    body[entry.offset : entry.offset + entry.length] = content.ljust(entry.length, b"\0")
    digest = seal_image(memoryview(file), tail.record.body_bytes, "").digest
    record = replace(tail.record, digest=digest)
    image = bytes(memoryview(file)[: tail.record.image_bytes])
    path.write_bytes(image + replace(tail, record=record).to_bytes())


@pytest.mark.parametrize("name", ["rng", "train_state"])
@pytest.mark.parametrize("make", [hostile_torch_file, hostile_pickle])
def test_code_in_a_small_state_is_not_run(
    name: str, make: Any, base: Path, states: dict[int, tuple[int, str]], tmp_path: Path
) -> None:
    """A sealed file with a state that asks for code is passed over; the code leaves no mark."""
    marker = tmp_path / "marker"
    _plant(_newest(base), name, make(marker))
    job = start(base)
    result = job.load()
    job.close()
    assert not marker.exists()
    assert state_of(job) == states[OLDER]
    assert [each.iteration for each in result.skipped] == [NEWEST]


def test_counters_and_configs_that_are_no_json_are_refused(
    base: Path, states: dict[int, tuple[int, str]]
) -> None:
    """Neither a crash nor a half-restored run comes of them."""
    path = _newest(base)
    sound = tree_of(base)
    for content in (b"", b"{", b"[]", b"{}", b'{"train_state": 3}', b"\xff" * 40, b"null"):
        plant(base, sound)
        tail = _tail(path)
        _reseal(path, replace(tail, parts={**tail.parts, "train_state": content}))
        job = start(base)
        try:
            found = load(job)
        except CheckpointError:
            found = states[OLDER]
        job.close()
        assert found == states[OLDER], content


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "../../elsewhere"}, {"iteration": 99}, {"owner": 3}, {"world_size": 0},
        {"world_size": 10**9}, {"body_bytes": 2**60}, {"nodes": (0, 1)}, {"digest": "0" * 32},
        {"structure": "zz"}, {"attempt": 10**6}, {"state_names": 10**6}, {"plan": ""},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_lies_is_no_way_in(
    change: dict[str, Any], base: Path, states: dict[int, tuple[int, str]]
) -> None:
    """What is loaded is one of the commits, bit for bit; nothing is written elsewhere."""
    path = _newest(base)
    tail = _tail(path)
    values = {**asdict(tail.record), **change}
    record = ShardRecord(**{**values, "nodes": tuple(values["nodes"])})
    image = path.read_bytes()[: tail.record.image_bytes]
    path.write_bytes(image + Trailer(record, tail.parts).to_bytes())
    before = {each.name for each in base.parent.iterdir()}
    job = start(base)
    try:
        found = load(job)
    except CheckpointError:
        found = states[OLDER]
    job.close()
    assert found in (states[OLDER], states[NEWEST])
    assert {each.name for each in base.parent.iterdir()} <= before


def test_names_outside_the_grammar_are_never_touched(
    base: Path, states: dict[int, tuple[int, str]]
) -> None:
    """Whatever else lies in the directories is not read, not counted and not removed."""
    own = _newest(base).parent
    names = [
        "notes.txt", "iter_20_0_local.pt", "iter_0000020_0_local.pt.bak", "iter_0000020_0.pt",
        "iter_0000020_00_local.pt", "x.pending-zz", ".hidden", "iter_0000099_0_local.pt~",
    ]  # fmt: skip
    for name in names:
        (own / name).write_bytes(name.encode())
    (own.parent / "x").mkdir()
    job = start(base)
    assert load(job) == states[NEWEST]
    for iteration in (30, 40, 50):
        train_to(job, iteration)
        job.save(to_local=True)
    job.close()
    assert {name: (own / name).read_bytes() for name in names} == {
        name: name.encode() for name in names
    }
    assert (own.parent / "x").is_dir()


def test_a_directory_that_others_may_write_to_is_refused(base: Path) -> None:
    """Before anything in it is read or written, by load and by save, with what to do."""
    local = base / "local"
    local.mkdir(mode=0o700)
    local.chmod(0o777)
    job = start(base)
    with pytest.raises(ConfigError, match="can be written by others"):
        job.save(to_local=True)
    job.close()
    assert os.listdir(local) == []


def test_a_link_in_the_place_of_a_directory_is_refused(base: Path, tmp_path: Path) -> None:
    """Nothing is followed out of the directory."""
    (tmp_path / "elsewhere").mkdir()
    (base / "local").symlink_to(tmp_path / "elsewhere")
    job = start(base)
    with pytest.raises(CheckpointError):
        job.save(to_local=True)
    job.close()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_these_are_the_parts_of_a_trailer(base: Path, states: dict[int, tuple[int, str]]) -> None:
    """The tests above reach every kind of them that is decoded."""
    assert PART_NAMES == ("train_state", "run_config")
