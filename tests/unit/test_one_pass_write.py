"""One pass puts the bytes of a file where they belong, and their digests behind them."""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn

from holdfast.filesystem import LocalFilesystem
from holdfast.ranks.job import Progress
from holdfast.snapshot.arena import allocate
from holdfast.snapshot.shard import _keep_pace, seal_image, write_shard
from holdfast.storage.digests import BLOCK_BYTES, find_difference, footer_size
from holdfast.storage.posix import writing_past_cache
from tests.support.managers import Live, linear, manager_of

SIZES = [4096, BLOCK_BYTES - 4096, BLOCK_BYTES, BLOCK_BYTES + 4096, 3 * BLOCK_BYTES]


class _Memory:
    """An image in memory."""

    keeps_stretches = True

    def __init__(self, size_bytes: int) -> None:
        self.memory = allocate(size_bytes + footer_size(size_bytes))
        self.memory[:size_bytes] = (os.urandom(4099) * (size_bytes // 4099 + 1))[:size_bytes]
        self.body_bytes = size_bytes

    def stretches(self) -> Iterator[memoryview]:
        for start in range(0, self.body_bytes, BLOCK_BYTES):
            yield self.memory[start : min(start + BLOCK_BYTES, self.body_bytes)]


class _Whole(_Memory):
    """The same, in one stretch of many blocks."""

    def stretches(self) -> Iterator[memoryview]:
        yield self.memory[: self.body_bytes]


class _Reused(_Memory):
    """The same, in two buffers that take turns."""

    keeps_stretches = False

    def stretches(self) -> Iterator[memoryview]:
        buffers = [allocate(BLOCK_BYTES), allocate(BLOCK_BYTES)]
        for number, stretch in enumerate(super().stretches()):
            buffer = buffers[number % 2]
            buffer[:] = bytes(BLOCK_BYTES)
            buffer[: len(stretch)] = stretch
            yield buffer[: len(stretch)]


class _Raw(io.FileIO):
    """A file whose writes a test may answer itself."""

    answer: Callable[[_Raw, memoryview], int | None]

    def write(self, block: Any) -> int:
        count = self.answer(self, block)
        return count if count is not None else super().write(block)

    @property
    def is_direct(self) -> bool:
        return bool(fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT)


class _Answering(LocalFilesystem):
    """A file system whose new files write as a function says; None: as usual."""

    def __init__(self, answer: Callable[[_Raw, memoryview], int | None]) -> None:
        super().__init__()
        self.answer = answer

    def open_new(self, path: Path) -> BinaryIO:
        raw = _Raw(path, "x+b")
        raw.answer = self.answer
        return io.BufferedRandom(raw)


def _is_sound(path: Path, record: Any, image: _Memory) -> bool:
    assert path.stat().st_size == record.size_bytes
    with path.open("rb") as stream:
        assert stream.read(image.body_bytes) == image.memory[: image.body_bytes]
        return find_difference(record, stream) is None


@pytest.mark.parametrize("kind", [_Memory, _Whole, _Reused])
@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_file_is_its_image_and_the_footer(
    tmp_path: Path, size_bytes: int, kind: type[_Memory]
) -> None:
    """What lies on disk is the body and its footer, and the record returned is theirs."""
    image = kind(size_bytes)
    record = write_shard(writing_past_cache(LocalFilesystem(), tmp_path / "a"), "b/a", image)
    assert record.path == "b/a"
    assert record.blocks is None
    assert _is_sound(tmp_path / "a", record, image)
    sealed = seal_image(image.memory, size_bytes, "b/a")
    assert sealed == record
    assert (tmp_path / "a").read_bytes() == image.memory


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    """A name that is taken is an error, and its bytes stay."""
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_shard(writing_past_cache(LocalFilesystem(), tmp_path / "a"), "a", _Memory(4096))
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_short_write_is_continued(tmp_path: Path) -> None:
    """A system that takes less than it is given is given the rest, at any odd length."""
    lengths = iter([1, 4096, 5000, 4095, 123_457])

    def answer(raw: _Raw, block: memoryview) -> int | None:
        length = next(lengths, None)
        return None if length is None else os.write(raw.fileno(), bytes(block[:length]))

    image = _Memory(BLOCK_BYTES + 4096)
    record = write_shard(
        writing_past_cache(_Answering(_unaligned(answer)), tmp_path / "a"), "a", image
    )
    assert _is_sound(tmp_path / "a", record, image)


def _unaligned(
    answer: Callable[[_Raw, memoryview], int | None],
) -> Callable[[_Raw, memoryview], int | None]:
    """Refuse as O_DIRECT does what does not start and end on pages, or is not on one."""

    def checked(raw: _Raw, block: memoryview) -> int | None:
        if raw.is_direct and (raw.tell() % 4096 or len(block) % 4096):
            raise OSError(errno.EINVAL, "Invalid argument")
        if raw.is_direct:
            # What is shorter goes through the cache here, or this kernel would refuse it.
            flags = fcntl.fcntl(raw.fileno(), fcntl.F_GETFL)
            fcntl.fcntl(raw.fileno(), fcntl.F_SETFL, flags & ~os.O_DIRECT)
            try:
                return answer(raw, block)
            finally:
                fcntl.fcntl(raw.fileno(), fcntl.F_SETFL, flags)
        return answer(raw, block)

    return checked


@pytest.mark.parametrize("write", [0, 1, 2, 3])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_write_names_its_file(tmp_path: Path, write: int, number: int) -> None:
    """An error at any block, the footer among them, is raised once with errno and path."""
    turns = iter(range(100))

    def answer(raw: _Raw, block: memoryview) -> int | None:
        if next(turns) == write:
            raise OSError(number, os.strerror(number))
        return None

    gc.collect()  # what earlier tests have left to be collected must not be counted
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    progress = Progress()
    with pytest.raises(OSError, match=r".") as caught:
        write_shard(
            writing_past_cache(_Answering(answer), tmp_path / "a"),
            "a",
            _Memory(2 * BLOCK_BYTES + 4096),
            progress,
        )
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / "a")
    assert progress.written_bytes == min(write * BLOCK_BYTES, 2 * BLOCK_BYTES + 4096)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert threading.active_count() == threads
    assert next(turns) == write + 1, "it went on writing"


def test_a_disk_that_fills_up_is_an_error(tmp_path: Path) -> None:
    """A system that takes part of a block and then has no space is not taken for done."""
    taken = iter([4096])

    def answer(raw: _Raw, block: memoryview) -> int | None:
        count = next(taken, None)
        if count is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(raw.fileno(), block[:count])

    with pytest.raises(OSError, match="No space"):
        write_shard(
            writing_past_cache(_Answering(answer), tmp_path / "a"), "a", _Memory(BLOCK_BYTES)
        )


def test_an_image_that_cannot_be_read_fails_the_pass(tmp_path: Path) -> None:
    """What a later block raises reaches the caller, and no footer is put."""

    class Torn(_Memory):
        def stretches(self) -> Iterator[memoryview]:
            yield next(super().stretches())
            raise RuntimeError("the second block is gone")

    with pytest.raises(RuntimeError, match="second block"):
        write_shard(
            writing_past_cache(LocalFilesystem(), tmp_path / "a"), "a", Torn(2 * BLOCK_BYTES)
        )
    assert (tmp_path / "a").stat().st_size <= BLOCK_BYTES


def test_progress_counts_what_is_written(tmp_path: Path) -> None:
    """From block to block another thread reads how many bytes are on their way out, of how many."""
    progress, seen = Progress(), []
    assert (progress.total_bytes, progress.bytes_per_second) == (0, 0.0)

    def answer(raw: _Raw, block: memoryview) -> int | None:
        seen.append((progress.written_bytes, len(block)))
        return None

    image = _Memory(2 * BLOCK_BYTES + 4096)
    record = write_shard(
        writing_past_cache(_Answering(answer), tmp_path / "a"), "a", image, progress
    )
    assert seen == [
        (0, BLOCK_BYTES),
        (BLOCK_BYTES, BLOCK_BYTES),
        (2 * BLOCK_BYTES, 4096),
        (2 * BLOCK_BYTES + 4096, footer_size(image.body_bytes)),
    ]
    assert progress.written_bytes == progress.total_bytes == record.size_bytes
    assert progress.bytes_per_second > 0
    progress.begin(5)
    assert (progress.total_bytes, progress.written_bytes) == (5, 0)


# -- the cap on bandwidth ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written_bytes", "seconds_ago", "pause"),
    [(0, 0.0, None), (1000, 20.0, None), (1000, 5.0, 5.0), (300, 1.0, 2.0), (100, 1.5, None)],
)
def test_a_cap_waits_for_what_is_too_early(
    written_bytes: int, seconds_ago: float, pause: float | None
) -> None:
    """At 100 bytes a second the pause is as long as the bytes so far are ahead of their time."""
    pauses: list[float] = []
    progress = Progress(0, written_bytes, time.monotonic() - seconds_ago)
    _keep_pace(progress, 100.0, pauses.append)
    if pause is None:
        assert not pauses
    else:
        assert pauses == [pytest.approx(pause, abs=0.5)]
    _keep_pace(progress, None, pauses.append)
    assert len(pauses) == (0 if pause is None else 1)


def test_a_capped_file_is_never_a_block_ahead_of_its_time(tmp_path: Path) -> None:
    """Every block is written no earlier than the rate allows those before it, and all are."""
    rate, begun = 200 * 2.0**20, time.monotonic()
    early: list[float] = []
    progress = Progress()

    def answer(raw: _Raw, block: memoryview) -> int | None:
        early.append(progress.written_bytes / rate - (time.monotonic() - progress.started))
        return None

    image = _Memory(4 * BLOCK_BYTES)
    record = write_shard(
        writing_past_cache(_Answering(answer), tmp_path / "a"), "a", image, progress, rate
    )
    assert len(early) == 5
    assert max(early) <= 0
    assert time.monotonic() - begun >= image.body_bytes / rate
    assert _is_sound(tmp_path / "a", record, image)


# -- memory --------------------------------------------------------------------------------------


class _Quick(LocalFilesystem):
    """Nobody takes the power away here."""

    def sync_file(self, path: Path, stream: Any) -> None:
        """Leave it to the page cache."""


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def test_a_save_without_an_arena_takes_little_memory(tmp_path: Path) -> None:
    """With `async_save: false` 128 MiB of state are written with at most 64 MiB of memory more."""
    small = linear()
    small.save(manager_of(tmp_path / "small"), 1)  # whatever is imported at a first save
    model = nn.Module()
    model.large = nn.Parameter(torch.ones(32 << 18))
    model.turned = nn.Parameter(torch.ones(4096, 4096).t())
    for number in range(32):
        model.register_buffer(f"b{number}", torch.ones(1 << 18))
    live = Live(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert sum(each.nbytes for each in model.state_dict().values()) == 128 << 20
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
    before = _peak_bytes()
    live.save(manager_of(tmp_path / "large", _Quick()), 1)
    assert _peak_bytes() - before <= 64 << 20
