"""Send copies through device memory, for a backend without host memory support (NCCL).

Owns the second transport: a block is copied to the device, sent from there, and copied back at the
receiver, while the next one is in flight. Keeps the promises of `OwnGroup` by other means: such a
backend has no tags and matches operations by order alone, so all ranks proceed in rounds, post all
operations of a round at once and in the same order on both sides of a pair, and start no round
before the last one has ended. A failed wait aborts the group here, before the backend ends the
process. Runs on any device that torch can copy to and has a backend for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import distributed

from holdfast.caller import in_normal_mode
from holdfast.tiers.local.exchange import OwnGroup
from holdfast.tiers.local.streams import (
    HEADER,
    Incoming,
    IncomingBlocks,
    Outgoing,
    OutgoingBlocks,
    Slots,
)
from holdfast.torch_internals import abort_group

_SLOTS = 2
"""Blocks of one stream on the device: one is in flight, one is copied."""
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

    def _stream(self, outgoing: Sequence[Outgoing], incoming: Sequence[Incoming]) -> None:
        with (
            self._beside_training(),
            ThreadPoolExecutor(1, thread_name_prefix="holdfast-receiver") as beside,
        ):
            lanes: list[_Lane] = [
                *(_SendLane(self, each) for each in outgoing),
                *(_ReceiveLane(self, each, beside) for each in incoming),
            ]
            # Both sides of a stream have the same number of rounds, so a round of one rank matches
            # the same round of its peers: the rank furthest behind finds theirs posted, however
            # streams cross.
            while lanes:
                works = self.post([lane.operation() for lane in lanes])
                for lane in lanes:
                    lane.meanwhile()
                for work in works:
                    self.wait(work)
                lanes = [lane for lane in lanes if lane.advance()]

    def _broadcast(self, content: bytes, rank: int) -> bytes:
        with self._beside_training():
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
                abort_group(self.group)
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


class _SendLane:
    def __init__(self, group: DeviceGroup, transfer: Outgoing) -> None:
        self._receiver = transfer.receiver
        self._blocks = OutgoingBlocks(transfer.source, group.host_buffer, _SLOTS)
        self._on_device = Slots(group.device_buffer, _SLOTS, self._blocks.length(0))
        self._under_way = self._blocks.header().to(group.device)
        self._coming: torch.Tensor | None = None
        self._number = 0
        """Of the block to copy next."""

    def operation(self) -> Operation:
        return Operation(True, self._under_way, self._receiver)

    def meanwhile(self) -> None:
        self._coming = None
        if length := self._blocks.length(self._number):
            self._coming = self._on_device.at(self._number, length)
            self._coming.copy_(self._blocks.read(self._number, length))
            self._number += 1

    def advance(self) -> bool:
        if self._coming is None:
            return False
        self._under_way = self._coming
        return True


class _ReceiveLane:
    def __init__(self, group: DeviceGroup, transfer: Incoming, beside: ThreadPoolExecutor) -> None:
        self._group, self._sender = group, transfer.sender
        self._blocks = IncomingBlocks(transfer, beside, group.host_buffer, _SLOTS)
        self._under_way = group.device_buffer(HEADER.size)
        self._on_device: Slots | None = None
        """None until the header has arrived."""
        self._arrived: tuple[int, torch.Tensor] | None = None
        """The number of a received block, and its memory on the device."""
        self._number = 0
        """Of the block in flight."""

    def operation(self) -> Operation:
        return Operation(False, self._under_way, self._sender)

    def meanwhile(self) -> None:
        if self._arrived is not None:
            (number, block), self._arrived = self._arrived, None
            content = self._blocks.buffer(number, len(block))
            content.copy_(block)
            self._blocks.put(number, content)

    def advance(self) -> bool:
        if self._on_device is None:
            self._blocks.read_header(self._under_way.cpu().numpy().tobytes())
            self._on_device = Slots(self._group.device_buffer, _SLOTS, self._blocks.length(0))
        else:
            self._arrived = (self._number, self._under_way)
            self._number += 1
        if length := self._blocks.length(self._number):
            self._under_way = self._on_device.at(self._number, length)
            return True
        self.meanwhile()
        self._blocks.wait()
        return False
