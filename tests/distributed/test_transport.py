"""Streams over a backend without tags arrive whole, cross, and tell failures.

What runs with NCCL on a GPU runs here with gloo on host memory: rounds, slots and order are the
same; the stream of the device, pinned memory and the watch over a wait are not.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from holdfast.errors import ConfigError
from holdfast.filesystem import LocalFilesystem
from holdfast.tiers.local.exchange import Incoming, Message, Outgoing
from holdfast.tiers.local.pool import BufferPool
from holdfast.tiers.local.replication import DeviceGroup, GroupBrokenError
from holdfast.tiers.local.shards import MemoryShard, ReceivedShard
from tests.support.deadlines import ANSWER_SECONDS
from tests.support.local_shards import Collected, Letters
from tests.support.nodes import Job, Loaded, lose_node, published, wait_for_all
from tests.support.ranks import run_ranks

pytest.importorskip("nvidia_resiliency_ext")


def _group(timeout_seconds: float = ANSWER_SECONDS) -> DeviceGroup:
    made = distributed.new_group(backend="gloo")
    return DeviceGroup(made, timeout_seconds, torch.device("cpu"))


def _message(sender: int, receiver: int) -> bytes:
    return bytes([sender, receiver]) * (7 * (3 * sender + receiver))


def _send_to_all(group: Any, rank: int, size: int) -> list[bytes]:
    """Everybody sends to everybody, streams of very different length and one of nothing."""
    others = [each for each in range(size) if each != rank]
    sinks = {each: Collected() for each in others}
    group.stream(
        [Outgoing(each, Letters(_message(rank, each))) for each in others],
        [Incoming(each, sinks[each]) for each in others],
    )
    return [bytes(sinks[each].content) for each in others]


def _expected(rank: int, size: int) -> list[bytes]:
    return [_message(each, rank) for each in range(size) if each != rank]


def _cross() -> list[bytes]:
    group = _group()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    _send_to_all(group, rank, size)
    return _send_to_all(group, rank, size)


@pytest.mark.parametrize("ranks", [2, 4])
def test_streams_cross_in_all_directions(ranks: int) -> None:
    """Each arrives whole, the second time as the first."""
    for rank, found in enumerate(run_ranks(_cross, ranks)):
        assert found == _expected(rank, ranks)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_streams_cross_between_gpus() -> None:
    """The same over NCCL, each rank with a GPU of its own."""
    for rank, found in enumerate(run_ranks(_cross_between_gpus, 2, initialise=False)):
        assert found == _expected(rank, 2)


def _cross_between_gpus() -> list[bytes]:
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl")
    return _send_to_all(DeviceGroup(distributed.new_group(backend="nccl"), 20.0, device), rank, 2)


# -- a backend that matches by order alone ---------------------------------------------------------


class _Meeting:
    """Where the ranks of a strict backend, each a thread, find one another's operations.

    A batch is carried out as a whole, when every operation of it has its counterpart in what the
    other rank has posted at that moment: the n-th message from one rank to another meets the n-th
    that is taken there. So NCCL has it, of which a rank's next batch waits for the one before.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._posted: dict[int, Sequence[Message]] = {}
        self._is_over = False

    def carry_out(self, rank: int, operations: Sequence[Message]) -> None:
        with self._changed:
            self._posted[rank] = operations
            ready = self._component(rank)
            if ready is not None:
                self._exchange(ready)
                for each in ready:
                    del self._posted[each]
                self._changed.notify_all()
                return
            mine = operations
            met = self._changed.wait_for(
                lambda: self._is_over or self._posted.get(rank) is not mine, 5
            )
            if not met or self._is_over:
                self._is_over = True
                self._changed.notify_all()
                raise RuntimeError(f"rank {rank} waits in vain")

    def _component(self, rank: int) -> list[int] | None:
        """Return the ranks whose batches hang together with this one's; None: one is missing."""
        found, left = [rank], [rank]
        while left:
            for each in self._posted[left.pop()]:
                if each.rank not in self._posted:
                    return None
                if each.rank not in found:
                    found.append(each.rank)
                    left.append(each.rank)
        return found

    def _exchange(self, ranks: Sequence[int]) -> None:
        lines: dict[tuple[int, int], list[list[torch.Tensor]]] = defaultdict(lambda: [[], []])
        for rank in ranks:
            for each in self._posted[rank]:
                pair = (rank, each.rank) if each.sends else (each.rank, rank)
                lines[pair][each.sends].append(each.tensor)
        for pair, (taken, sent) in lines.items():
            assert len(taken) == len(sent), f"{pair}: {len(sent)} sent, {len(taken)} taken"
            for source, target in zip(sent, taken, strict=True):
                assert source.shape == target.shape, f"{pair}: another message than was expected"
                target.copy_(source)


class _Round:
    """The messages that one rank posts at once; carried out when first waited for, if not yet."""

    def __init__(self, meeting: _Meeting, rank: int, messages: Sequence[Message]) -> None:
        self._meeting, self._rank, self._messages = meeting, rank, messages
        self._is_over = False

    def carry_out(self) -> None:
        if not self._is_over:
            self._meeting.carry_out(self._rank, self._messages)
            self._is_over = True


def _strict_group(meeting: _Meeting, rank: int, *, is_late: bool = False) -> DeviceGroup:
    """Return a group whose rounds are carried out as they are posted, or not before the wait."""

    class StrictGroup(DeviceGroup):
        def _connect(self) -> None:
            """There is no process group."""

        def post(self, messages: Iterable[Message]) -> None:
            batch = list(messages)
            work = _Round(meeting, rank, batch)
            for each in batch:
                each.work = work
            if not is_late:
                work.carry_out()

        def wait(self, work: Any) -> None:
            work.carry_out()

    return StrictGroup(None, 20.0, torch.device("cpu"))


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_no_order_of_streams_waits_in_a_circle(ranks: int, is_late: bool) -> None:
    """Where a round is carried out as a whole, and only together with its peers' rounds.

    Whatever is copied meanwhile is of another block: at the post, or late, it is all the same.
    """
    meeting = _Meeting()
    with ThreadPoolExecutor(ranks) as threads:
        found = [
            threads.submit(_send_to_all, _strict_group(meeting, rank, is_late=is_late), rank, ranks)
            for rank in range(ranks)
        ]
        for rank, each in enumerate(found):
            assert each.result() == _expected(rank, ranks)


def test_two_streams_between_two_ranks_are_told_apart() -> None:
    """By their order: the longer one goes on when the other has ended; a third rank looks on."""
    meeting = _Meeting()
    sinks = [Collected() for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        streams = [
            ([Outgoing(1, Letters(b"short")), Outgoing(1, Letters(b"much longer"))],
             [Incoming(1, sinks[2])]),
            ([Outgoing(0, Letters(b"back"))], [Incoming(0, sinks[0]), Incoming(0, sinks[1])]),
            ([], []),
        ]  # fmt: skip
        for each in [
            threads.submit(_strict_group(meeting, rank).stream, *streams[rank]) for rank in range(3)
        ]:
            each.result()
    assert [bytes(each.content) for each in sinks] == [b"short", b"much longer", b"back"]


# -- failures --------------------------------------------------------------------------------------


def _fail_in_the_middle() -> tuple[str, bytes, bytes]:
    """Rank 1's disk fills up while 0 sends to it; 0's own disk fails while it sends to 2."""
    group = _group()
    rank = distributed.get_rank()
    sink, again = Collected(fails_at=9 if rank == 1 else None), Collected()
    outgoing, after, incoming = [], [], []
    if rank == 0:
        outgoing = [
            Outgoing(1, Letters(b"x" * 100)),
            Outgoing(2, Letters(b"x" * 100, fails_at=50)),
        ]
        after = [Outgoing(1, Letters(b"after")), Outgoing(2, Letters(b"after"))]
    else:
        incoming = [Incoming(0, sink)]
    group.stream(outgoing, incoming)
    group.stream(after, [Incoming(0, again) for _ in incoming])
    error = "".join(str(each.error) for each in incoming)
    return error, bytes(sink.content), bytes(again.content)


def test_a_disk_that_fails_leaves_no_rank_waiting() -> None:
    """The stream goes on to its end, the failure is noted where it was, the group still works."""
    _, full, garbled = run_ranks(_fail_in_the_middle, 3)
    assert "No space left" in full[0]
    assert full[1:] == (b"x" * 9, b"after")
    assert garbled == ("None", b"x" * 51 + b"\0" * 49, b"after")


def _lose_one() -> tuple[str, float, bool]:
    """Rank 2 dies instead of sending; the others go on over a group without it."""
    group = _group(8.0)
    distributed.barrier()
    rank = distributed.get_rank()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(GroupBrokenError) as caught:
        group.stream([], [Incoming(2, Collected())])
    return str(caught.value), time.monotonic() - started, group.is_broken


def test_a_rank_that_dies_is_noticed_before_the_timeout() -> None:
    """Its peers raise, well within the time that ranks wait for one another."""
    for reason, seconds, is_broken in run_ranks(_lose_one, 3, may_die=(2,))[:2]:
        assert "broke off" in reason
        assert seconds < 8.0
        assert is_broken


def _share() -> list[bytes]:
    group = _group()
    rank = distributed.get_rank()
    group.renew(distributed.new_group(backend="gloo"))
    shared: list[bytes] = group.share(bytes([rank]) * (rank * 5), [0, 5, 10])
    return shared


def test_every_rank_is_told_what_each_had_to_tell() -> None:
    """Whatever its size, nothing included, and over a group that was renewed."""
    for found in run_ranks(_share, 3):
        assert found == [b"", bytes([1]) * 5, bytes([2]) * 10]


# -- shards ----------------------------------------------------------------------------------------


def _replicate(folder: Path) -> bytes:
    """Send a shard of several blocks from memory to the next rank, which writes it to a file."""
    group = _group()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    directory = folder / str(rank)
    directory.mkdir()
    turns = BufferPool(directory, LocalFilesystem(), spares=0, mapped=False, in_memory=False)
    sink = ReceivedShard(lambda size_bytes: turns.take(size_bytes, 0.0))
    image = memoryview(bytearray([rank + 1]) * (20 << 20))
    source = MemoryShard(image, 20 << 20, b"tail")
    transfer = Incoming((rank - 1) % size, sink)
    group.stream([Outgoing((rank + 1) % size, source)], [transfer])
    assert transfer.error is None
    assert sink.file is not None
    content = sink.file.path.read_bytes()
    turns.close()
    assert content[-4:] == b"tail"
    assert len(content) == (20 << 20) + 4
    return bytes(set(content[:-4]))


def test_shards_of_several_blocks_go_round(tmp_path: Path) -> None:
    """In a ring, from memory into files."""
    assert run_ranks(_replicate, 2, tmp_path) == [b"\2", b"\1"]


def _lose_a_node(root: Path) -> tuple[Loaded, list[str]]:
    """Save with copies, lose one of two nodes, load, and say what its node has then."""
    size = distributed.get_world_size()
    nodes = ["ab"[2 * rank // size] for rank in range(size)]
    for number in range(2):
        job = Job(root, nodes, factor=2)
        assert job.tier.replication is not None
        job.tier.replication.group = _group()
        if number == 0:
            job.save(10)
            job.save(20)
            wait_for_all()
            job.close()
            if job.rank == 0:
                lose_node(root, "b")
            wait_for_all()
    found = job.load()
    wait_for_all()
    job.close()
    return found, published(root, "b")


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_lost_node_is_recovered_from_copies(tmp_path: Path, ranks: int) -> None:
    """The whole tier stands on this transport as on the other: copies there, and back again."""
    for found, files in run_ranks(_lose_a_node, ranks, tmp_path):
        assert (found.iteration, found.wrong) == (20, [])
        assert len(files) == 2 * (ranks // 2), "its own shards, and the copies for the other node"


# -- what it needs ---------------------------------------------------------------------------------


def _ask_for_nccl(folder: Path) -> str:
    from tests.support.managers import linear, manager_of

    settings = {"directory": str(folder / "local"), "replication": {"transport": "nccl"}}
    manager = manager_of(folder / "store", local=settings, timeout_seconds=ANSWER_SECONDS)
    with pytest.raises(ConfigError) as caught:
        linear().load(manager)
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_an_error_before_training(tmp_path: Path) -> None:
    """On every rank, by name of the setting, and nothing was made."""
    for problem in run_ranks(_ask_for_nccl, 2, tmp_path):
        assert re.search(r"local\.replication\.transport is 'nccl', .* no GPU; use 'gloo'", problem)
    assert not (tmp_path / "local").exists()
