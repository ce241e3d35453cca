"""Live tensors are copied into memory that training cannot reach.

Owns the copy and its speed: large tensors as plain memory on every core, the rest in one call of
torch, from a GPU on a stream of its own. Promises that `wait` returns when the last byte is there,
that whoever reads the front of the target meanwhile is told how far it has come, and that a copy
which goes on beside training can be waited for without being told of its failure. Decides neither
what is copied nor where to.
"""

from __future__ import annotations

import _thread
import ctypes
import itertools
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from holdfast.format.items import Source

_LARGE_BYTES = 256 << 10
"""From here a copy is worth a call of its own, shared between threads."""
_PIECE_BYTES = 8 << 20
_TICK_SECONDS = 0.05
"""A wake-up that an interrupt swallowed costs who waits no more than this."""
_EVERYWHERE = sys.maxsize
"""Beyond every address."""

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Targets in host memory, each with its source of the same shape and type."""


class Copying:
    """A copy that is to be made, beside training or by whoever waits for it first."""

    def __init__(self, pairs: Pairs) -> None:
        """Nobody may change the sources before `hold` has returned."""
        self._pairs = pairs
        # What was computed so far is what is copied, whenever that is.
        self._computed = mark_streams(source for _, source in pairs)
        self._copied: dict[torch.device, Any] = {}
        self._front = _Front()
        self._taking = threading.Lock()
        self._is_taken = not pairs
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_over = self._is_taken
        self._over = _thread.allocate_lock()
        self._over.acquire()
        if self._is_taken:
            self._front.finish()

    def begin(self) -> None:
        """Copy on a thread from now on."""
        if self._take():
            self._thread = threading.Thread(target=self._copy, name="holdfast-staging")
            self._thread.start()

    def hold(self) -> None:
        """Keep training from changing the sources before they are copied.

        The host waits for what it copies itself; for a GPU's copy the GPU's streams wait: the
        caller's and the default one, on which training may go on after the caller's. An interrupt
        leaves nothing behind: an interrupted caller calls it again.
        """
        if self._thread is None:
            self._finish_on_host()
        while not self._is_over:  # with a lock of C, which is never left half taken
            self._over.acquire(timeout=_TICK_SECONDS)
        for device, copied in self._copied.items():
            for stream in _streams_of(device):
                stream.wait_event(copied)

    def finish(self) -> None:
        """Return when nobody reads the sources any more, whatever became of it."""
        self._finish_on_host()
        for copied in self._copied.values():
            copied.synchronize()

    def wait(self) -> None:
        """Wait until every byte is there; raise what kept it from coming."""
        self.finish()
        self.wait_below(_EVERYWHERE)

    def wait_below(self, address: int) -> None:
        """Wait until all of the targets below an address is there.

        Unless the host copies beside training that is all of it: training waits for it, and whoever
        went on now would take memory's time from it. Raises what kept it from coming.
        """
        if self._thread is None or self._computed:
            self.finish()
        self._front.wait_for(address)
        if self._error is not None:
            raise self._error

    def _finish_on_host(self) -> None:
        if self._take():
            self._copy()
        self._front.wait_for(_EVERYWHERE)
        if self._thread is not None:
            self._thread.join()

    def _take(self) -> bool:
        """Whether it falls to the caller to copy."""
        with self._taking:
            was_taken, self._is_taken = self._is_taken, True
            return not was_taken

    def _copy(self) -> None:
        try:
            for device, computed in self._computed.items():
                on_device = [pair for pair in self._pairs if pair[1].device == device]
                self._copied[device] = _copy_from_device(on_device, device, computed)
            _copy_on_host([pair for pair in self._pairs if not pair[1].is_cuda], self._front)
        except Exception as error:  # noqa: BLE001  # raised where somebody waits for the bytes
            self._error = error
        except BaseException as error:  # an interrupt, which is also for who was interrupted
            self._error = error
            raise
        finally:
            self._pairs = ()
            self._front.finish()
            self._is_over = True
            self._over.release()


class _Front:
    """How far a copy has come, through memory from low to high."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._reached = [0]
        self._awaited: list[int] = []

    def divide(self, workers: int) -> None:
        """Let so many workers move it, each of whom takes higher places as it goes on."""
        with self._moved:
            self._reached = [0] * workers

    def reach(self, worker: int, address: int) -> None:
        """Note that a worker will touch nothing below an address any more."""
        with self._moved:
            self._reached[worker] = address
            # Nobody is woken in vain: that would take the interpreter from who copies.
            if self._awaited and min(self._reached) >= min(self._awaited):
                self._moved.notify_all()

    def finish(self) -> None:
        """Note that nobody will touch anything any more."""
        self.divide(1)
        self.reach(0, _EVERYWHERE)

    def wait_for(self, address: int) -> None:
        """Wait until nobody will touch anything below an address."""
        with self._moved:
            self._awaited.append(address)
            self._moved.wait_for(lambda: min(self._reached) >= address)
            self._awaited.remove(address)


def mark_streams(sources: Iterable[Source]) -> dict[torch.device, list[Any]]:
    """Return, for each GPU that something is to be read from, events behind what it has to compute.

    Of the current stream, and of the default one: training runs there, whatever the caller is in.
    """
    marks: dict[torch.device, list[Any]] = {}
    if torch.cuda.is_available():
        for source in sources:
            if not isinstance(source, bytes) and source.is_cuda and source.device not in marks:
                marks[source.device] = [
                    stream.record_event() for stream in _streams_of(source.device)
                ]
    return marks


def _streams_of(device: torch.device) -> list[Any]:
    cuda: Any = torch.cuda
    return list({cuda.current_stream(device), cuda.default_stream(device)})


@torch.no_grad()
def _copy_from_device(pairs: Pairs, device: torch.device, computed: Sequence[Any]) -> Any:
    """Begin the copies on a stream beside the current one; return the event behind the last."""
    cuda: Any = torch.cuda
    stream = cuda.Stream(device)
    for each in computed:
        stream.wait_event(each)
    with cuda.stream(stream):
        torch._foreach_copy_(
            [target for target, _ in pairs],
            [source for _, source in pairs],
            non_blocking=True,
        )
    for _, source in pairs:
        source.record_stream(stream)  # its memory is not given away before the copy is done
    return stream.record_event()


@torch.no_grad()
def _copy_on_host(pairs: Pairs, front: _Front) -> None:
    jobs: list[tuple[int, int, int]] = []
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for target, source in pairs:
        size_bytes = target.nbytes
        if size_bytes >= _LARGE_BYTES and _is_plain_memory(source):
            to, start = target.data_ptr(), source.data_ptr()
            jobs += [
                (to + at, start + at, min(_PIECE_BYTES, size_bytes - at))
                for at in range(0, size_bytes, _PIECE_BYTES)
            ]
        else:
            targets.append(target)
            sources.append(source)
    if targets:
        torch._foreach_copy_(targets, sources)
    _copy_memory(sorted(jobs), front)  # low addresses first: the front follows the large ones


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _copy_memory(jobs: Sequence[tuple[int, int, int]], front: _Front) -> None:
    """Copy pieces of memory on as many threads as torch may use here; each lets go of the GIL."""
    workers = max(min(torch.get_num_threads(), len(jobs)), 1)
    front.divide(workers)
    turns = itertools.count()

    def work(worker: int) -> None:
        while (turn := next(turns)) < len(jobs):
            # A turn that was taken and not noted yet lies above the last one that was.
            front.reach(worker, jobs[turn][0])
            _memcpy(*jobs[turn])
        front.reach(worker, _EVERYWHERE)  # nor holds the others up

    threads = [
        threading.Thread(target=work, args=(each,), name="holdfast-copy")
        for each in range(1, workers)
    ]
    for each in threads:
        each.start()
    try:
        work(0)
    finally:
        for each in threads:
            each.join()


_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcpy.restype = ctypes.c_void_p
