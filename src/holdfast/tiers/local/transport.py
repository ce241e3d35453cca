"""Send copies through device memory, for a backend without host memory support (NCCL).

Owns the second transport: a block is copied to the device, sent from there, and copied back at the
receiver, while the next one is in flight. Keeps the promises of `OwnGroup` by other means: such a
backend has no tags and matches operations by order alone, so all ranks proceed in rounds, post all
operations of a round at once and in the same order on both sides of a pair, and start no round
before the last one has ended. A failed wait aborts the group here, before the backend ends the
process. Runs on any device that torch can copy to and has a backend for.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import distributed

from holdfast.caller import in_normal_mode
from holdfast.tiers.local.exchange import GroupBrokenError, Incoming, Outgoing, OwnGroup, bytes_of

_SLOTS = 2
"""Blocks of one stream on the device: one is in flight, one is copied."""
_HEADER = struct.Struct("<QQQ")
"""Of a stream: its bytes, the bytes covered by block digests, and the bytes per message."""
_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Operation:
    """One message of a round."""

    sends: bool
    tensor: torch.Tensor
    """On the device."""
    rank: int
    """The peer."""


class DeviceGroup(OwnGroup):
    """A group whose backend sends from the memory of one device."""

    def __init__(self, group: Any, timeout_seconds: float, device: torch.device) -> None:
        """Connect all ranks of the group; a collective call."""
        super().__init__(group, timeout_seconds)
        self.device = device
        # On training's own stream each copy would wait for the work that training has queued.
        self._queue: Any = None
        if device.type == "cuda":
            self._queue = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._connect()

    def renew(self, group: Any) -> None:
        """Replace the broken group, and connect all ranks of the new one."""
        super().renew(group)
        self._connect()

    def _connect(self) -> None:
        # The first operation connects ranks. Run it where all ranks take part: in an exchange some
        # may have nothing to send or to receive.
        with self._beside_training():
            tensor = torch.zeros(1, device=self.device)
            self.wait(distributed.all_reduce(tensor, group=self.group, async_op=True))

    def stream(self, outgoing: Sequence[Outgoing], incoming: Sequence[Incoming]) -> None:
        """Carry out all transfers of this rank; a collective call over the group.

        Errors of sources and sinks are recorded in the transfers, which still run to their end.

        Raises:
            GroupBrokenError: a rank is gone or silent.
        """
        try:
            with (
                self._beside_training(),
                ThreadPoolExecutor(1, thread_name_prefix="holdfast-receiver") as beside,
            ):
                self._go_in_rounds(
                    [
                        *(_SendLane(self, each) for each in outgoing),
                        *(_ReceiveLane(self, each, beside) for each in incoming),
                    ]
                )
        except RuntimeError as error:
            self.is_broken = True
            reason = str(error).rpartition("] ")[2] or str(error)
            raise GroupBrokenError(f"the exchange between ranks broke off: {reason}") from error

    def _go_in_rounds(self, lanes: Sequence[_Lane]) -> None:
        # Both sides of a stream have the same number of rounds, so a round of one rank matches the
        # same round of its peers: the rank furthest behind finds theirs posted, however streams
        # cross.
        while lanes:
            works = self.post([lane.operation() for lane in lanes])
            for lane in lanes:
                lane.meanwhile()
            for work in works:
                self.wait(work)
            lanes = [lane for lane in lanes if lane.advance()]

    def share(self, content: bytes, sizes: Sequence[int]) -> list[bytes]:
        """All-gather the content of every rank of the group; `sizes` were agreed on before.

        Raises:
            GroupBrokenError: as `stream`.
        """
        shared = []
        try:
            with self._beside_training():
                for rank, size_bytes in enumerate(sizes):
                    mine = content if rank == self.my_group_rank else bytes(size_bytes)
                    shared.append(self._broadcast(mine, rank) if size_bytes else b"")
        except RuntimeError as error:
            self.is_broken = True
            raise GroupBrokenError(f"ranks could not share: {error}") from error
        return shared

    def _broadcast(self, content: bytes, rank: int) -> bytes:
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)
        source = self.get_global_rank(rank)
        self.wait(distributed.broadcast(tensor, src=source, group=self.group, async_op=True))
        return tensor.cpu().numpy().tobytes()

    def post(self, operations: Sequence[Operation]) -> list[Any]:
        """Post all operations of a round as one batch."""
        posted = [
            distributed.P2POp(
                distributed.isend if each.sends else distributed.irecv,
                each.tensor,
                self.get_global_rank(each.rank),
                self.group,
            )
            for each in operations
        ]
        works: list[Any] = distributed.batch_isend_irecv(posted)
        return works

    def wait(self, work: Any) -> None:
        """Wait for a posted operation, a little shorter than the backend would.

        Raises:
            RuntimeError: it failed or timed out.
        """
        if self._queue is None:
            super().wait(work)
            return
        # Do not use the backend's timeout: when it expires, NCCL's watchdog ends the process.
        deadline = time.monotonic() + self._wait.total_seconds()
        while not work.is_completed():
            if time.monotonic() > deadline:
                distributed.distributed_c10d._abort_process_group(self.group)
                raise RuntimeError(f"no answer within {self._wait.total_seconds():g} s")
            time.sleep(_POLL_SECONDS)
        work.wait()  # raises the operation's error

    @in_normal_mode  # other threads copy into it
    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Return host memory for copies to and from the device, pinned where that is CUDA."""
        return torch.empty(
            size_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._queue is not None
        )

    @in_normal_mode  # likewise
    def device_buffer(self, size_bytes: int) -> torch.Tensor:
        """Return memory of the device."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        if self._queue is None:
            yield
        else:
            with torch.cuda.stream(self._queue):
                yield


class _Lane(Protocol):
    """One stream, round by round; the first round is its header."""

    def operation(self) -> Operation:
        """Return the operation to post in this round."""
        ...

    def meanwhile(self) -> None:
        """Do the copies that can run while the round is in flight."""
        ...

    def advance(self) -> bool:
        """Advance to the next round; False: the stream has ended."""
        ...


class _Slots:
    """Buffers reused in rotation, allocated on first use."""

    def __init__(self, make: Callable[[int], torch.Tensor], size_bytes: int) -> None:
        self._make, self._size = make, size_bytes
        self._buffers: dict[int, torch.Tensor] = {}

    def at(self, number: int, length: int) -> torch.Tensor:
        place = number % _SLOTS
        if place not in self._buffers:
            self._buffers[place] = self._make(self._size)
        return self._buffers[place][:length]


class _SendLane:
    def __init__(self, group: DeviceGroup, transfer: Outgoing) -> None:
        self._receiver = transfer.receiver
        self._source = source = transfer.source
        self._size, self._step = source.size_bytes, source.block_bytes
        largest = min(self._step, self._size)
        self._on_device = _Slots(group.device_buffer, largest)
        self._on_host = _Slots(group.host_buffer, largest)
        header = bytearray(_HEADER.pack(self._size, source.body_bytes, self._step))
        self._under_way = torch.frombuffer(header, dtype=torch.uint8).to(group.device)
        self._coming: torch.Tensor | None = None
        self._number = 0
        """Of the block to copy next."""

    def operation(self) -> Operation:
        return Operation(True, self._under_way, self._receiver)

    def meanwhile(self) -> None:
        offset = self._number * self._step
        self._coming = None
        if offset < self._size:
            length = min(self._step, self._size - offset)
            self._coming = self._on_device.at(self._number, length)
            self._coming.copy_(self._read(offset, length))
            self._number += 1

    def _read(self, offset: int, length: int) -> torch.Tensor:
        if (in_place := self._source.view(offset, length)) is not None:
            return torch.frombuffer(in_place, dtype=torch.uint8)
        tensor = self._on_host.at(self._number, length)
        try:
            self._source.read_into(offset, bytes_of(tensor))
        except Exception:  # noqa: BLE001  # the receiver reports the digest mismatch
            tensor.zero_()
        return tensor

    def advance(self) -> bool:
        if self._coming is None:
            return False
        self._under_way = self._coming
        return True


class _ReceiveLane:
    def __init__(self, group: DeviceGroup, transfer: Incoming, beside: ThreadPoolExecutor) -> None:
        self._group, self._transfer, self._beside = group, transfer, beside
        self._under_way = group.device_buffer(_HEADER.size)
        self._has_header = False
        self._size, self._step = 0, 1
        self._on_device = self._on_host = _Slots(group.device_buffer, 0)
        self._arrived: tuple[int, torch.Tensor] | None = None
        """The number of a received block, and its memory on the device."""
        self._number = 0
        """Of the block in flight."""
        self._puts: dict[int, Future[None]] = {}
        """By slot: what must end before its host buffer is filled again."""

    def operation(self) -> Operation:
        return Operation(False, self._under_way, self._transfer.sender)

    def meanwhile(self) -> None:
        if self._arrived is None:
            return
        (number, block), self._arrived = self._arrived, None
        if (earlier := self._puts.pop(number % _SLOTS, None)) is not None:
            earlier.result()
        content = self._on_host.at(number, len(block))
        content.copy_(block)
        offset, received = number * self._step, bytes_of(content)
        self._puts[number % _SLOTS] = self._beside.submit(
            self._transfer.guard, lambda: self._transfer.sink.put(offset, received)
        )

    def advance(self) -> bool:
        if self._has_header:
            self._arrived = (self._number, self._under_way)
            self._number += 1
        else:
            self._read_header()
        offset = self._number * self._step
        if offset < self._size:
            length = min(self._step, self._size - offset)
            self._under_way = self._on_device.at(self._number, length)
            return True
        self.meanwhile()
        for each in self._puts.values():
            each.result()
        return False

    def _read_header(self) -> None:
        content = self._under_way.cpu().numpy().tobytes()
        self._size, body_bytes, self._step = _HEADER.unpack(content)
        self._has_header = True
        largest = min(self._step, self._size)
        self._on_device = _Slots(self._group.device_buffer, largest)
        self._on_host = _Slots(self._group.host_buffer, largest)
        self._transfer.guard(lambda: self._transfer.sink.begin(self._size, body_bytes))
