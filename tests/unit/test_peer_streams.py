"""Streams between ranks arrive whole, cross without waiting for one another, and tell failures."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from holdfast.errors import CorruptCheckpointError
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.posix import PosixStorage
from holdfast.tiers.local.exchange import HEADER, Incoming, Message, Outgoing
from holdfast.tiers.local.pool import BufferPool
from holdfast.tiers.local.replication import GroupBrokenError, HostGroup
from holdfast.tiers.local.shard_file import Trailer
from holdfast.tiers.local.shards import FileShard, MemoryShard, ReceivedShard
from tests.support.deadlines import ANSWER_SECONDS
from tests.support.local_shards import PARTS, RECORD, Collected, Letters
from tests.support.ranks import run_ranks

pytest.importorskip("nvidia_resiliency_ext")


def _own_group(timeout_seconds: float = ANSWER_SECONDS) -> HostGroup:
    return HostGroup(distributed.new_group(backend="gloo"), timeout_seconds)


def _message(sender: int, receiver: int) -> bytes:
    return bytes([sender, receiver]) * (7 * (3 * sender + receiver))


def _cross() -> list[bytes]:
    """Everybody sends to everybody, streams of very different length and one of nothing."""
    group = _own_group()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    others = [each for each in range(size) if each != rank]
    found = []
    for _ in range(2):
        sinks = {each: Collected() for each in others}
        group.stream(
            [Outgoing(each, Letters(_message(rank, each))) for each in others],
            [Incoming(each, sinks[each]) for each in others],
        )
        found = [bytes(sinks[each].content) for each in others]
    return found


def test_streams_cross_in_all_directions() -> None:
    """No circle of ranks waits for itself, and each stream arrives whole."""
    for rank, found in enumerate(run_ranks(_cross, 3)):
        assert found == [_message(each, rank) for each in range(3) if each != rank]


def _hear_from_0(group: Any) -> bytes:
    """Return what rank 0 sends to all others now."""
    heard = Collected()
    if distributed.get_rank() == 0:
        group.stream([Outgoing(each, Letters(b"after")) for each in (1, 2)], [])
    else:
        group.stream([], [Incoming(0, heard)])
    return bytes(heard.content)


def _fail_in_the_middle() -> tuple[str, str, bytes]:
    """Rank 1's disk fills up while 0 sends to it; 0's own disk fails while it sends to 2."""
    group = _own_group()
    rank = distributed.get_rank()
    outgoing, incoming = [], []
    sinks = {0: Collected(fails_at=9 if rank == 1 else None)}
    if rank == 0:
        outgoing = [
            Outgoing(1, Letters(b"x" * 100)),
            Outgoing(2, Letters(b"x" * 100, fails_at=50)),
        ]
    else:
        incoming = [Incoming(0, sinks[0])]
    group.stream(outgoing, incoming)
    again = _hear_from_0(group)
    errors = [str(each.error) for each in incoming]
    return "".join(errors), bytes(sinks[0].content).decode(), again


def test_a_disk_that_fails_leaves_no_rank_waiting() -> None:
    """The stream goes on to its end, the failure is noted where it was, the group still works."""
    sender, full, garbled = run_ranks(_fail_in_the_middle, 3)
    assert sender[0] == ""
    assert "No space left" in full[0]
    assert full[1] == "x" * 9
    assert garbled[0] == "None"
    assert garbled[1] == "x" * 51 + "\0" * 49, "what cannot be read is not what was there"
    assert [full[2], garbled[2]] == [b"after", b"after"]


def _lose_one() -> tuple[str, float]:
    """Rank 2 dies instead of sending."""
    group = _own_group(8.0)
    distributed.barrier()
    if distributed.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(GroupBrokenError) as caught:
        group.stream([], [Incoming(2, Collected())])
    assert group.is_broken
    return str(caught.value), time.monotonic() - started


def test_a_rank_that_dies_is_noticed_before_the_timeout() -> None:
    """Its peers raise, well within the time that ranks wait for one another."""
    for reason, seconds in run_ranks(_lose_one, 3, may_die=(2,))[:2]:
        assert "broke off" in reason
        assert seconds < 8.0


def _share() -> list[bytes]:
    group = _own_group()
    rank = distributed.get_rank()
    content = bytes([rank]) * (rank * 5)
    shared: list[bytes] = group.share(content, [0, 5, 10])
    return shared


def test_every_rank_is_told_what_each_had_to_tell() -> None:
    """Whatever its size, nothing included."""
    for found in run_ranks(_share, 3):
        assert found == [b"", bytes([1]) * 5, bytes([2]) * 10]


# -- blocks in pieces ------------------------------------------------------------------------------


class _Placed(Collected):
    """A sink with memory for every piece of a stream of three-byte blocks."""

    in_any_order = True

    def __init__(self, size_bytes: int, cuts: list[list[int]], fails_at: int | None = None) -> None:
        super().__init__()
        self.memory = bytearray(size_bytes)
        self.cuts = cuts
        self.seen: set[int] = set()
        self._refuses = fails_at

    def expect(self, number: int, spare: memoryview) -> list[memoryview]:
        if number == self._refuses:
            raise MemoryError("no room for it")
        at = 3 * number
        found = []
        for length in self.cuts[number]:
            found.append(memoryview(self.memory)[at : at + length])
            at += length
        return found

    def arrived(self, number: int) -> None:
        self.seen.add(number)


def _cuts(size_bytes: int) -> list[list[int]]:
    """Whole blocks and cut ones, and a short one at the end."""
    kinds = [[3], [1, 2], [1, 1, 1], [2, 1]]
    cuts = [kinds[number % 4] for number in range(size_bytes // 3)]
    return [*cuts, [size_bytes % 3]] if size_bytes % 3 else cuts


def _cross_in_pieces() -> list[tuple[bytes, bytes, bool]]:
    """Everybody sends to everybody twice at once: in pieces, and in blocks."""
    group = _own_group()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    others = [each for each in range(size) if each != rank]
    found = []
    for _ in range(2):
        sizes = {each: len(_message(each, rank)) for each in others}
        placed = {each: _Placed(sizes[each], _cuts(sizes[each])) for each in others}
        whole = {each: Collected() for each in others}
        outgoing, incoming = [], []
        for each in others:
            content = _message(rank, each)
            outgoing += [
                Outgoing(each, Letters(content[::-1], block_bytes=5)),
                Outgoing(each, Letters(content), is_cut=True),
            ]
            incoming += [
                Incoming(each, whole[each]),
                Incoming(each, placed[each], placed=placed[each]),
            ]
        group.stream(outgoing, incoming)
        found = [
            (
                bytes(placed[each].memory),
                bytes(whole[each].content[::-1]),
                placed[each].seen == set(range(len(placed[each].cuts))),
            )
            for each in others
        ]
    return found


def test_blocks_arrive_in_the_pieces_that_were_asked_for() -> None:
    """Beside streams of whole blocks between the same ranks, in all directions."""
    for rank, found in enumerate(run_ranks(_cross_in_pieces, 3)):
        expected = [_message(each, rank) for each in range(3) if each != rank]
        assert found == [(each, each, True) for each in expected]


def _fail_in_pieces() -> tuple[str, bytes, set[int], bytes]:
    """Rank 1 has no memory for a block; rank 0 cannot read one that it sends to 2."""
    group = _own_group()
    rank = distributed.get_rank()
    outgoing, incoming = [], []
    placed = _Placed(100, _cuts(100), fails_at=7 if rank == 1 else None)
    if rank == 0:
        outgoing = [
            Outgoing(1, Letters(b"x" * 100), is_cut=True),
            Outgoing(2, Letters(b"x" * 100, fails_at=50), is_cut=True),
        ]
    else:
        incoming = [Incoming(0, placed, placed=placed)]
    group.stream(outgoing, incoming)
    again = _hear_from_0(group)
    errors = "".join(str(each.error) for each in incoming)
    return errors, bytes(placed.memory), placed.seen, again


def test_memory_that_cannot_be_had_leaves_no_rank_waiting() -> None:
    """The stream goes on to its end, the failure is noted where it was, the group still works."""
    _, short, garbled = run_ranks(_fail_in_pieces, 3)
    assert short[0] == "no room for it"
    assert short[1].startswith(b"x" * 21 + b"\0" * 3)
    assert 7 not in short[2]
    assert garbled[0] == "None"
    assert garbled[1] == b"x" * 51 + b"\0" * 49, "what cannot be read is not what was there"
    assert [short[3], garbled[3]] == [b"after", b"after"]


class _Late(Letters):
    """A source that has nothing before it is told to."""

    def read_into(self, offset: int, target: memoryview) -> None:
        distributed.distributed_c10d._get_default_store().get("told")
        super().read_into(offset, target)


class _Deadly(Letters):
    """A source whose rank dies when it shall send."""

    def read_into(self, offset: int, target: memoryview) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def _receive_too_late() -> str:
    """Rank 1 dies in the middle; 2 sends once 0 has given up, to where that waited for it."""
    group = _own_group(8.0)
    rank = distributed.get_rank()
    store: Any = distributed.distributed_c10d._get_default_store()
    distributed.barrier()
    if rank == 1:
        group.stream([Outgoing(0, _Deadly(b"x" * 99, block_bytes=3))], [])
    if rank == 2:
        # The connection to 0 is sound: only the one between 0 and 1 is not.
        with suppress(GroupBrokenError):
            group.stream([Outgoing(0, _Late(b"x" * 99, block_bytes=3), is_cut=True)], [])
        store.set("sent", "")
        return ""
    placed = _Placed(99, _cuts(99))
    kept = []  # as whoever handles the error keeps it, and all that it holds
    try:
        group.stream([], [Incoming(2, placed, placed=placed), Incoming(1, Collected())])
    except GroupBrokenError as error:
        kept.append(error)
    placed.memory[:] = b"." * 99
    store.set("told", "")
    store.get("sent")
    time.sleep(0.5)
    return placed.memory.decode() if kept else "nobody noticed"


def test_nothing_arrives_in_memory_once_a_transfer_has_failed() -> None:
    """A rank that is late must not write into tensors which were loaded from elsewhere by then."""
    assert run_ranks(_receive_too_late, 3, may_die=(1,))[0] == "." * 99


class _Work:
    """An operation under way; it goes on for as long as anybody holds it."""


def _group_that_fails(failure: BaseException, waits: int) -> tuple[Any, list[Any]]:
    """Return a group of which a wait fails, and a reference to everything begun in it."""
    begun: list[Any] = []

    class Group(HostGroup):
        def post(self, messages: Iterable[Message]) -> None:
            for each in messages:
                if not each.sends and len(each.tensor) == HEADER.size:
                    header = bytearray(HEADER.pack(9, 0, 3))
                    each.tensor.copy_(torch.frombuffer(header, dtype=torch.uint8))
                each.work = _Work()
                begun.append(weakref.ref(each.work))

        def wait(self, work: Any) -> None:
            nonlocal waits
            waits -= 1
            if not waits:
                raise failure

    return Group(None, 20.0), begun


@pytest.mark.parametrize("failure", [RuntimeError("gone"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("waits", [1, 2, 3, 5])
def test_nothing_is_under_way_once_a_transfer_has_ended(failure: Any, waits: int) -> None:
    """However a transfer ends, also by an interrupt, nobody holds what it had begun to receive."""
    group, begun = _group_that_fails(failure, waits)
    placed = _Placed(9, [[1, 1, 1]] * 3)
    with pytest.raises(
        BaseException, match=str(failure) or None
    ) as kept:  # as whoever handles the error keeps it
        group.stream([], [Incoming(1, placed, placed=placed)])
    assert len(begun) >= 2
    assert [each() for each in begun if each() is not None] == []
    assert group.is_broken  # the next exchange has another one
    assert kept.value is not None


# -- shards as streams -----------------------------------------------------------------------------


def _receive(source: Any, directory: Path) -> ReceivedShard:
    turns = BufferPool(directory, LocalFilesystem(), spares=0, mapped=False, in_memory=False)
    sink = ReceivedShard(lambda size: turns.take(size, 0.0))
    sink.begin(source.size_bytes, source.body_bytes)
    for offset in range(0, source.size_bytes, source.block_bytes):
        block = memoryview(bytearray(min(source.block_bytes, source.size_bytes - offset)))
        source.read_into(offset, block)
        sink.put(offset, block)
    assert sink.file is not None
    sink.file.close()
    return sink


def _sealed_file() -> tuple[bytes, Trailer]:
    """Return a body with its true footer, and a tail that vouches for it."""
    from dataclasses import replace

    from holdfast.snapshot.shard import seal_image

    image = memoryview(bytearray(RECORD.image_bytes))
    image[:5] = b"hello"
    written = seal_image(image, RECORD.body_bytes, "x")
    tail = Trailer(replace(RECORD, digest=written.digest), PARTS)
    return bytes(image), tail


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("block_bytes", [8 << 20, 1024])
def test_a_shard_arrives_as_it_was(tmp_path: Path, from_file: bool, block_bytes: int) -> None:
    """Out of memory or out of a file, byte for byte, its tail included."""
    image, tail = _sealed_file()
    whole = image + tail.to_bytes()
    (tmp_path / "shard").write_bytes(whole)
    memory = MemoryShard(memoryview(image), RECORD.body_bytes, tail.to_bytes())
    file = FileShard(PosixStorage(tmp_path, LocalFilesystem()), "shard", RECORD.body_bytes)
    source: Any = file if from_file else memory
    if block_bytes < RECORD.body_bytes:
        source.block_bytes = RECORD.body_bytes  # a body's blocks arrive one by one
    sink = _receive(source, tmp_path)
    file.close()
    assert sink.file is not None
    assert sink.seal("run", tail.record.commit, 1) == tail
    assert sink.file.path.read_bytes() == whole


@pytest.mark.parametrize("offset", [0, 4095, 4100, 8191, RECORD.image_bytes + 9, -1])
def test_a_shard_that_changed_on_its_way_is_refused(tmp_path: Path, offset: int) -> None:
    """In its body, its footer, or its tail."""
    image, tail = _sealed_file()
    whole = bytearray(image + tail.to_bytes())
    whole[offset] ^= 1
    source = MemoryShard(memoryview(whole), RECORD.body_bytes, b"")
    sink = _receive(source, tmp_path)
    with pytest.raises(CorruptCheckpointError):
        sink.seal("run", tail.record.commit, 1)


def test_another_shard_than_was_to_be_sent_is_refused(tmp_path: Path) -> None:
    """Of another commit, of another owner, or nothing at all."""
    image, tail = _sealed_file()
    source = MemoryShard(memoryview(image), RECORD.body_bytes, tail.to_bytes())
    for run_id, commit, owner in (
        ("other", tail.record.commit, 1),
        ("run", (8, 2, 12_345_678), 1),
        ("run", tail.record.commit, 0),
    ):
        sink = _receive(source, tmp_path)
        with pytest.raises(CorruptCheckpointError, match="another shard"):
            sink.seal(run_id, commit, owner)
    nothing = FileShard(PosixStorage(tmp_path, LocalFilesystem()), "absent", RECORD.body_bytes)
    assert nothing.size_bytes == 0
    with pytest.raises(CorruptCheckpointError):
        _receive(nothing, tmp_path).seal("run", tail.record.commit, 1)
