"""Live tensors are copied into memory that training cannot reach.

Owns the copy and its speed: large tensors as plain memory on every core, the rest in one call of
torch, from a GPU on a stream of its own. Promises that `wait` returns when the last byte is there,
and that a copy which goes on beside training can be waited for without being told of its failure.
Decides neither what is copied nor where to.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch

_LARGE_BYTES = 256 << 10
"""From here a copy is worth a call of its own, shared between threads."""
_PIECE_BYTES = 8 << 20

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Targets in host memory, each with its source of the same shape and type."""


def copy(pairs: Pairs) -> None:
    """Copy every source into its target and return when that is done."""
    copying = Copying(pairs)
    copying.wait()


class Copying:
    """A copy that was begun, perhaps beside training."""

    def __init__(self, pairs: Pairs, *, beside: bool = False) -> None:
        """Begin. `beside`: return at once; nobody may change the sources before `hold` returns."""
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._event: Any = None
        on_device = [pair for pair in pairs if pair[1].is_cuda] if torch.cuda.is_available() else []
        on_host = [pair for pair in pairs if not pair[1].is_cuda] if on_device else pairs
        if on_device:
            self._event = _copy_from_device(on_device)
        if beside and on_host:
            self._thread = threading.Thread(
                target=self._run, args=(on_host,), name="holdfast-staging"
            )
            self._thread.start()
        elif on_host:
            _copy_on_host(on_host)

    def _run(self, pairs: Pairs) -> None:
        try:
            _copy_on_host(pairs)
        except BaseException as error:  # noqa: BLE001  # raised where somebody waits for the bytes
            self._error = error

    def hold(self) -> None:
        """Keep training from changing the sources before they are copied.

        The host waits for a copy that it makes itself; for a GPU's copy the GPU's stream waits.
        """
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """Wait until every byte is there; raise what kept it from coming."""
        if self._event is not None:
            self._event.synchronize()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


@torch.no_grad()
def _copy_from_device(pairs: Pairs) -> Any:
    """Begin the copies on a stream beside the current one; return the event behind the last."""
    cuda: Any = torch.cuda
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())  # what was computed so far is what is copied
    with cuda.stream(stream):
        torch._foreach_copy_(
            [target for target, _ in pairs],
            [source for _, source in pairs],
            non_blocking=True,
        )
        event = cuda.Event()
        event.record(stream)
    for _, source in pairs:
        source.record_stream(stream)  # its memory is not given away before the copy is done
    return event


@torch.no_grad()
def _copy_on_host(pairs: Pairs) -> None:
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
    _copy_memory(jobs)
    if targets:
        torch._foreach_copy_(targets, sources)


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _copy_memory(jobs: Sequence[tuple[int, int, int]]) -> None:
    """Copy pieces of memory on as many threads as torch may use here; each lets go of the GIL."""
    workers = min(torch.get_num_threads(), len(jobs))
    turns = itertools.count()

    def work() -> None:
        while (turn := next(turns)) < len(jobs):
            _memcpy(*jobs[turn])

    threads = [threading.Thread(target=work, name="holdfast-copy") for _ in range(workers - 1)]
    for each in threads:
        each.start()
    work()
    for each in threads:
        each.join()


_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcpy.restype = ctypes.c_void_p
