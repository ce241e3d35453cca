"""What happens to files: bits that flip, ends that are cut off, files that are lost or mixed up.

Owns the damages that are done to the files of either tier, and a model whose shard has several
blocks. Every damage but a flipped bit stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from holdfast.storage.digests import BLOCK_BYTES, footer_size
from holdfast.tiers.local.shard_file import PART_NAMES, read_trailer
from tests.faults.jobs import Job

Damage = Callable[[Path], None]

ITERATIONS = (10, 20, 30)
"""Of what is saved before files are damaged, those of `NEWEST` above all."""
OLDER, NEWEST = ITERATIONS[-2:]


@contextmanager
def flipped(path: Path, position: int, bit: int) -> Iterator[None]:
    """Flip one bit while the context lasts."""

    def flip() -> None:
        with path.open("r+b", buffering=0) as stream:
            stream.seek(position)
            [value] = stream.read(1)
            stream.seek(position)
            stream.write(bytes([value ^ 1 << bit]))

    flip()
    try:
        yield
    finally:
        flip()


def cut_to_nothing(path: Path) -> None:
    """Leave no byte."""
    os.truncate(path, 0)


def cut_in_half(path: Path) -> None:
    """Leave the first half."""
    os.truncate(path, path.stat().st_size // 2)


def cut_by_one(path: Path) -> None:
    """Take away the last byte."""
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    """Append one byte."""
    path.write_bytes(path.read_bytes() + b"\0")


def append_itself(path: Path) -> None:
    """Let the file be there twice, one after the other."""
    path.write_bytes(path.read_bytes() * 2)


def fill_with_zeros(path: Path) -> None:
    """Keep the size alone."""
    path.write_bytes(bytes(path.stat().st_size))


def lose(path: Path) -> None:
    """Remove the file."""
    path.unlink()


def put_a_directory_there(path: Path) -> None:
    """Let a directory have the file's name."""
    path.unlink()
    path.mkdir()


def _older(path: Path) -> Path:
    """Return the same file of the checkpoint before."""
    return Path(str(path).replace(f"iter_{NEWEST:07d}", f"iter_{OLDER:07d}"))


def take_an_older_one(path: Path) -> None:
    """Put the file of the checkpoint before there, as a copy that went wrong does."""
    path.write_bytes(_older(path).read_bytes())


DAMAGES: tuple[Damage, ...] = (
    cut_to_nothing, cut_in_half, cut_by_one, lengthen, append_itself, fill_with_zeros,
    take_an_older_one,
)  # fmt: skip
"""A file is there and is not what it should be."""


# -- of the local tier's files, which end in a trailer ------------------------------------------


def regions(path: Path) -> dict[str, range]:
    """Return every region of a shard file, in order, none left out."""
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        tail = read_trailer(stream, str(path))
        stream.seek(tail.record.image_bytes)
        text = stream.readline()
    body = tail.record.body_bytes
    found = {"body": range(body), "footer": range(body, body + footer_size(body))}
    position = body + footer_size(body)
    found["record"] = range(position, position + len(text))
    position += len(text)
    for name in PART_NAMES:
        found[name] = range(position, position + len(tail.parts[name]))
        position += len(tail.parts[name])
    found["end"] = range(position, size_bytes)
    return found


def cut_off_the_tail(path: Path) -> None:
    """Leave a file as torch would have written it."""
    os.truncate(path, regions(path)["record"].start)


def lose_the_body(path: Path) -> None:
    """Leave a hole, as a file system makes it of blocks that it lost."""
    content = path.read_bytes()
    start = regions(path)["body"].stop
    path.write_bytes(bytes(start) + content[start:])


def take_an_older_body(path: Path) -> None:
    """Put the tensors of the checkpoint before there."""
    older = _older(path).read_bytes()
    start = regions(path)["record"].start
    path.write_bytes(older[:start] + path.read_bytes()[start:])


def take_an_older_tail(path: Path) -> None:
    """Put the trailer of the checkpoint before there."""
    older = _older(path)
    start = regions(path)["record"].start
    old = older.read_bytes()[regions(older)["record"].start :]
    path.write_bytes(path.read_bytes()[:start] + old)


def put_a_link_there(path: Path) -> None:
    """Let a link have the file's name."""
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


ALL_DAMAGES: tuple[Damage, ...] = (
    *DAMAGES, cut_off_the_tail, lose_the_body, take_an_older_body, take_an_older_tail,
)  # fmt: skip
UNSEEN_IN_A_COPY = {lose_the_body.__name__, take_an_older_body.__name__}
"""The record at the end is sound: only who reads the body finds it damaged."""
LOSSES: tuple[Damage, ...] = (lose, put_a_directory_there, put_a_link_there)
"""No file is there; nobody can know that there was one."""


# -- a shard of several blocks ------------------------------------------------------------------


class _Large(nn.Module):
    """A little more than two blocks of parameters."""

    def __init__(self) -> None:
        super().__init__()
        elements = (2 * BLOCK_BYTES + BLOCK_BYTES // 2) // 4
        self.weight = nn.Parameter(torch.arange(elements, dtype=torch.float32))


def make_large(job: Job) -> Job:
    """Let a job train a model whose shard has several blocks."""
    job.run.model = _Large()
    job.run.optimizer = torch.optim.SGD(job.run.model.parameters())
    job.run.scheduler = torch.optim.lr_scheduler.ConstantLR(job.run.optimizer)
    return job


@torch.no_grad()
def change_large(job: Job, iteration: int) -> None:
    """Change the parameters of such a job, and call that an iteration."""
    job.run.model.weight.add_(1.0)  # type: ignore[operator]  # a parameter
    job.state.train_state.step = iteration
