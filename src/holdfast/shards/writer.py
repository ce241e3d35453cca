"""The bytes of a shard file go to disk in one pass, digested on the way.

Owns the pass: stretches of 8 MiB blocks, past the page cache where the file system takes that, each
block digested while others are written, the footer behind the last. Promises that every byte goes
through the filesystem seam, that what it reports as digests is of the bytes in memory and not of
what a disk made of them, that somebody may watch and slow it down, and that the bytes are durable
at the end; the name is the caller's. Knows bytes, not tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from holdfast.digests import BLOCK_BYTES, FileRecord, describe_body, footer_size, make_footer
from holdfast.filesystem import Filesystem, writing_past_cache
from holdfast.shards.memory import allocate

_DIGESTERS = 2
"""Threads over an image in memory: one alone reads memory at half the speed it can be read at."""


class Image(Protocol):
    """The body of a shard file, to be had piece by piece and in order."""

    @property
    def body_bytes(self) -> int:
        """A multiple of 4096."""
        ...

    @property
    def keeps_stretches(self) -> bool:
        """Whether each stretch stays as it is; else until the one after the next is asked for."""
        ...

    def stretches(self) -> Iterator[memoryview]:
        """Yield the body in stretches of whole 8 MiB blocks, on pages of memory.

        The last block may be shorter.
        """
        ...


@dataclass
class Progress:
    """How far a pass has come; another thread may read it at any time."""

    total_bytes: int = 0
    written_bytes: int = 0
    started: float = 0.0
    """By `time.monotonic`; 0: not yet."""

    @property
    def bytes_per_second(self) -> float:
        """The mean rate since the start; 0 before."""
        seconds = time.monotonic() - self.started
        return self.written_bytes / seconds if self.started and seconds > 0 else 0.0

    def begin(self, total_bytes: int) -> None:
        """Start from nothing."""
        self.total_bytes, self.written_bytes = total_bytes, 0
        self.started = time.monotonic()


def write_shard(
    filesystem: Filesystem,
    path: Path,
    name: str,
    image: Image,
    progress: Progress | None = None,
    bytes_per_second: float | None = None,
) -> FileRecord:
    """Write a new file, body and footer, and return its record under a relative name.

    `bytes_per_second`: no faster than that, over the whole file. None: as fast as it goes.

    Raises:
        OSError: it cannot be written.
    """
    progress = progress or Progress()
    progress.begin(image.body_bytes + footer_size(image.body_bytes))
    digests: list[Future[bytes]] = []
    with (
        ThreadPoolExecutor(1, thread_name_prefix="holdfast-digest") as digesting,
        ThreadPoolExecutor(1, thread_name_prefix="holdfast-stretch") as preparing,
        writing_past_cache(filesystem, path) as append,
    ):
        # Making the next stretch, digesting this one and writing it let go of the interpreter, and
        # run side by side.
        stretches = image.stretches()
        stretch = next(stretches, None)
        while stretch is not None:
            blocks = _cut(stretch, BLOCK_BYTES)
            digests += [digesting.submit(xxhash.xxh3_128_digest, each) for each in blocks]
            following = preparing.submit(next, stretches, None)
            for part in [stretch] if bytes_per_second is None else blocks:
                _keep_pace(progress, bytes_per_second)
                append(part)
                progress.written_bytes += len(part)
            if not image.keeps_stretches:
                wait(digests[-len(blocks) :])
            stretch = following.result()
        results = [each.result() for each in digests]
        footer = allocate(footer_size(image.body_bytes))
        footer[:] = make_footer(image.body_bytes, results)
        _keep_pace(progress, bytes_per_second)
        append(footer)
        progress.written_bytes += len(footer)
    return describe_body(name, image.body_bytes, results)


def seal_image(memory: memoryview, body_bytes: int, name: str) -> FileRecord:
    """Put the footer behind a body in memory, and return the record of the file that they are."""
    with ThreadPoolExecutor(_DIGESTERS, thread_name_prefix="holdfast-digester") as pool:
        blocks = _cut(memory[:body_bytes], BLOCK_BYTES)
        digests = list(pool.map(xxhash.xxh3_128_digest, blocks))
    memory[body_bytes : body_bytes + footer_size(body_bytes)] = make_footer(body_bytes, digests)
    return describe_body(name, body_bytes, digests)


def _cut(memory: memoryview, size_bytes: int) -> list[memoryview]:
    """Cut memory into pieces of one size; the last may be shorter."""
    return [memory[start : start + size_bytes] for start in range(0, len(memory), size_bytes)]


def _keep_pace(
    progress: Progress,
    bytes_per_second: float | None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the bytes written so far are no more than the rate allows."""
    if bytes_per_second is None:
        return
    early = progress.written_bytes / bytes_per_second - (time.monotonic() - progress.started)
    if early > 0:
        pause(early)
