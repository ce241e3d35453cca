"""Files that take turns: allocated before they are written, out of sight before they are filled."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import NoFileFreeError
from holdfast.filesystem import LocalFilesystem
from holdfast.tiers.local.pool import BufferPool, PooledFile
from tests.support.nodes import memory_directory

SIZE = 8192


@pytest.fixture
def turns() -> Iterator[BufferPool]:
    """Three mapped files at most, in RAM."""
    with memory_directory() as path:
        made = BufferPool(path, LocalFilesystem(), limit=3, spares=3, mapped=True, in_memory=True)
        yield made
        made.close()


def _publish(turns: BufferPool, file: PooledFile, name: str) -> Path:
    final = file.path.with_name(name)
    file.rename(final)
    turns.published_as(file, final)
    return final


def test_the_memory_is_the_file(turns: BufferPool) -> None:
    """What is written to one is read from the other, and a tail follows it."""
    file = turns.take(SIZE, 0.0)
    file.memory[10:13] = b"abc"
    file.write_at(SIZE, b"tail")
    content = file.path.read_bytes()
    assert content[10:13] == b"abc"
    assert content[SIZE:] == b"tail"
    assert file.path.stat().st_blocks * 512 >= SIZE


def test_the_memory_of_a_large_file_is_the_file(turns: BufferPool) -> None:
    """In whatever pages it lies, its image is zeros at first, all there, and a tail follows it."""
    size_bytes = (5 << 20) + 4096
    file = turns.take(size_bytes, 0.0)
    assert bytes(file.memory) == bytes(size_bytes)
    assert file.path.stat().st_blocks * 512 == size_bytes
    file.memory[-3:] = b"abc"
    file.write_at(size_bytes, b"tail")
    assert file.path.read_bytes() == bytes(size_bytes - 3) + b"abctail"
    file.cut(size_bytes)
    assert bytes(file.memory[-3:]) == b"abc"


def test_a_file_comes_back_without_its_tail_and_under_another_name(turns: BufferPool) -> None:
    """Its memory is the same, so that what is laid out there serves again."""
    file = turns.take(SIZE, 0.0)
    file.memory[:3] = b"abc"
    file.write_at(SIZE, b"tail")
    final = _publish(turns, file, "shard")
    turns.retire(final)
    assert not final.exists()
    again = turns.take(SIZE, 0.0)
    assert again is file
    assert again.path.stat().st_size == SIZE
    assert bytes(again.memory[:3]) == b"abc"


def test_a_file_of_another_size_is_a_new_one(turns: BufferPool) -> None:
    """The room of those that no longer fit is given up first."""
    file = turns.take(SIZE, 0.0)
    turns.give_back(file)
    other = turns.take(2 * SIZE, 0.0)
    assert other is not file
    assert not file.path.exists()
    assert len(other.memory) == 2 * SIZE


def test_no_more_files_exist_than_there_are_turns(
    turns: BufferPool, caplog: pytest.LogCaptureFixture
) -> None:
    """With every file published or held, a save waits in vain, and says so first."""
    for number in range(3):
        _publish(turns, turns.take(SIZE, 0.0), f"shard{number}")
    with caplog.at_level(logging.WARNING), pytest.raises(NoFileFreeError):
        turns.take(SIZE, 0.01)
    assert "the save waits" in caplog.text


def test_a_save_gets_the_file_that_its_reader_lets_go_of(turns: BufferPool) -> None:
    """A held file is not filled while it is read, though its turn has come."""
    paths = [_publish(turns, turns.take(SIZE, 0.0), f"shard{number}") for number in range(3)]
    got: list[PooledFile] = []
    with turns.keep(paths[1]):
        with turns.keep(paths[0]), paths[0].open("rb") as stream:
            turns.retire(paths[0])
            turns.retire(paths[1])
            assert paths[0].exists()
            turns.take(SIZE, 0.0)  # one more than there are turns, while one is read
            waiting = threading.Thread(target=lambda: got.append(turns.take(SIZE, 20.0)))
            waiting.start()
            assert stream.read(1) == b"\0"
            assert not got
        waiting.join(20)
    assert got
    assert not paths[0].exists()


def test_a_file_of_an_earlier_process_is_removed(turns: BufferPool, tmp_path: Path) -> None:
    """It is mapped nowhere here."""
    (tmp_path / "old").write_bytes(b"x")
    turns.retire(tmp_path / "old")
    turns.retire(tmp_path / "old")
    assert not (tmp_path / "old").exists()


def test_files_are_allocated_ahead_of_their_turn(turns: BufferPool) -> None:
    """The next save then finds its memory touched."""
    turns.take(SIZE, 0.0)
    turns.top_up(SIZE)
    turns.top_up(SIZE)
    (directory,) = {each.parent for each in [turns.take(SIZE, 0.0).path]}
    assert len(os.listdir(directory)) == 2, "one ahead, no more"


def test_a_wiped_directory_is_made_again(turns: BufferPool) -> None:
    """Files whose names lead nowhere are not handed out."""
    file = turns.take(SIZE, 0.0)
    turns.give_back(file)
    file.path.unlink()
    other = turns.take(SIZE, 0.0)
    assert other is not file
    assert other.path.exists()


def test_more_spares_than_wanted_are_removed(tmp_path: Path) -> None:
    """A copy that was fetched once does not stay when it is pruned."""
    turns = BufferPool(tmp_path, LocalFilesystem(), spares=0, mapped=False, in_memory=False)
    final = _publish(turns, turns.take(SIZE, 0.0), "shard")
    turns.retire(final)
    assert os.listdir(tmp_path) == []


def test_a_full_directory_is_an_error_with_numbers_and_no_signal(tmp_path: Path) -> None:
    """Every byte is allocated at once: a sparse map would kill the process that writes to it."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)],
        check=False,
        capture_output=True,
    )
    if made.returncode != 0:
        pytest.skip("this user may not mount")
    try:
        turns = BufferPool(
            tmp_path, LocalFilesystem(), limit=3, spares=3, mapped=True, in_memory=True
        )
        with pytest.raises(OSError, match=r"1\.0 MiB are needed, \S+ \w+ are free") as caught:
            turns.take(1 << 20, 0.0)
        assert caught.value.errno == 28
        assert os.listdir(tmp_path) == []
        file = turns.take(1 << 14, 0.0)
        file.memory[:] = b"x" * (1 << 14)
        turns.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
