"""Copy live tensors into host memory that training does not change.

Owns the copy and its speed: large tensors as plain memory on every core, the rest in one call of
torch, from a GPU on a separate stream; for a file without an arena, their bytes piece by piece.
Promises that `wait` returns when the last byte is copied, that a concurrent reader of the target
can wait for the part it needs, and that training can wait for a copy in the background without an
error of the copy being raised there. Decides neither what is copied nor where to.
"""

from __future__ import annotations

import _thread
import ctypes
import itertools
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from holdfast.format.items import Source
from holdfast.torch_internals import copy_each

_LARGE_BYTES = 256 << 10
"""From this size on a tensor is copied with memcpy, divided between threads."""
_PIECE_BYTES = 8 << 20
_STREAMED_BYTES = 1 << 20
"""Tensors not in plain host memory are streamed in pieces; larger ones cost malloc more."""
_TICK_SECONDS = 0.05
"""The longest delay for a waiting thread whose wake-up was lost to an interrupt."""
_EVERYWHERE = sys.maxsize
"""Above every address."""

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Targets in host memory, each with its source of the same shape and type."""


class Copying:
    """A pending copy, made on a background thread or by the first caller that waits for it."""

    def __init__(self, pairs: Pairs) -> None:
        """The sources must not be changed before `hold` has returned."""
        self._pairs = pairs
        # The copy waits for the work queued so far, whenever it is made.
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
        """Start the copy on a background thread."""
        if self._take():
            self._thread = threading.Thread(target=self._copy, name="holdfast-staging")
            self._thread.start()

    def hold(self) -> None:
        """Keep training from changing the sources before they are copied.

        The host waits for host copies; for copies from a GPU, its streams wait: the caller's and
        the default one, on which training may continue after the caller's. It may be interrupted
        at any point; an interrupted caller calls it again.
        """
        if self._thread is None:
            self._finish_on_host()
        while not self._is_over:  # a C-level lock, which an interrupt never leaves half acquired
            self._over.acquire(timeout=_TICK_SECONDS)
        for device, copied in self._copied.items():
            for stream in _streams_of(device):
                stream.wait_event(copied)

    def finish(self) -> None:
        """Return when the sources are no longer read, whether the copy succeeded or failed."""
        self._finish_on_host()
        for copied in self._copied.values():
            copied.synchronize()

    def wait(self) -> None:
        """Wait until every byte is copied; raise the error of a failed copy."""
        self.finish()
        self.wait_below(_EVERYWHERE)

    def wait_below(self, address: int) -> None:
        """Wait until all targets below an address are copied; raise the error of a failed copy.

        Unless this is a host copy in the background, wait for the whole copy: training waits for
        it, and a concurrent write would compete for memory bandwidth.
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
        """Claim the copy; True: this caller has to make it."""
        with self._taking:
            was_taken, self._is_taken = self._is_taken, True
            return not was_taken

    def _copy(self) -> None:
        try:
            for device, computed in self._computed.items():
                on_device = [pair for pair in self._pairs if pair[1].device == device]
                self._copied[device] = _copy_from_device(on_device, device, computed)
            _copy_on_host([pair for pair in self._pairs if not pair[1].is_cuda], self._front)
        except Exception as error:  # noqa: BLE001  # raised in the thread that waits for the bytes
            self._error = error
        except BaseException as error:  # an interrupt, which the interrupted thread must also see
            self._error = error
            raise
        finally:
            self._pairs = ()
            self._front.finish()
            self._is_over = True
            self._over.release()


class _Front:
    """Progress of a copy through memory, from low to high addresses."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._reached = [0]
        self._awaited: list[int] = []

    def divide(self, workers: int) -> None:
        """Set the number of workers, each of which copies to ascending addresses."""
        with self._moved:
            self._reached = [0] * workers

    def reach(self, worker: int, address: int) -> None:
        """Record that a worker will no longer write below an address."""
        with self._moved:
            self._reached[worker] = address
            # No needless wake-ups: they would take the GIL from the copying threads.
            if self._awaited and min(self._reached) >= min(self._awaited):
                self._moved.notify_all()

    def finish(self) -> None:
        """Record that no worker will write any more."""
        self.divide(1)
        self.reach(0, _EVERYWHERE)

    def wait_for(self, address: int) -> None:
        """Wait until no worker will write below an address."""
        with self._moved:
            self._awaited.append(address)
            self._moved.wait_for(lambda: min(self._reached) >= address)
            self._awaited.remove(address)


def mark_streams(sources: Iterable[Source]) -> dict[torch.device, list[Any]]:
    """Return, for each GPU with sources, events after the work queued on it.

    On the current stream and on the default one: training may run there while the caller does not.
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
    """Start the copies on a separate stream; return the event after the last."""
    cuda: Any = torch.cuda
    stream = cuda.Stream(device)
    for each in computed:
        stream.wait_event(each)
    with cuda.stream(stream):
        copy_each(
            [target for target, _ in pairs],
            [source for _, source in pairs],
            non_blocking=True,
        )
    for _, source in pairs:
        source.record_stream(stream)  # its memory is not reused before the copy is done
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
        copy_each(targets, sources)
    _copy_memory(sorted(jobs), front)  # low addresses first: the front follows the large ones


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


@torch.no_grad()
def bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the row-major bytes of a tensor; in pieces if it is not plain host memory."""
    tensor = tensor.detach()
    if _is_plain_memory(tensor):
        flat: Any = tensor.view(-1).view(torch.uint8).numpy()
        yield memoryview(flat)
        return
    if tensor.nbytes <= _STREAMED_BYTES or tensor.dim() == 0:
        yield from bytes_of(tensor.resolve_conj().resolve_neg().cpu().contiguous())
        return
    rows = max(tensor.shape[0] * _STREAMED_BYTES // tensor.nbytes, 1)
    for start in range(0, tensor.shape[0], rows):
        part = tensor[start : start + rows]
        yield from bytes_of(part[0] if rows == 1 else part)


def _copy_memory(jobs: Sequence[tuple[int, int, int]], front: _Front) -> None:
    """Copy pieces of memory on as many threads as torch may use here; each releases the GIL."""
    workers = max(min(torch.get_num_threads(), len(jobs)), 1)
    front.divide(workers)
    numbers = itertools.count()

    def work(worker: int) -> None:
        while (number := next(numbers)) < len(jobs):
            # A job that was taken but not recorded yet is above the last one that was recorded.
            front.reach(worker, jobs[number][0])
            _memcpy(*jobs[number])
        front.reach(worker, _EVERYWHERE)  # an idle worker must not hold back the front

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
