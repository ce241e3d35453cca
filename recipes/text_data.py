"""Text as bytes, cut into samples, in an order that a checkpoint can name.

Owns which bytes are trained on, which are held out, and the loader that deals samples to
data-parallel ranks. Promises that the same text and seed always give the same order, and that a
restored loader continues at the very next sample, at any data-parallel size: its position is the
number of samples that all ranks together have taken. Refuses to continue with other text than it
was saved with, and does not read ahead.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from run_config import DataConfig, RecipeError

_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
"""Below the standard library, but not its source: installed packages, and tests (mostly tables)."""


@dataclass(frozen=True)
class Text:
    """All bytes of a run, divided once."""

    training: Tensor
    validation: Tensor
    fingerprint: str
    """Digest of the training bytes: saved positions only mean something in the same text."""
    file_count: int


def read_text(config: DataConfig) -> Text:
    """Read every file in a fixed order and hold out the end of each.

    Raises:
        RecipeError: a path is missing or unreadable, or there is no text at all.
    """
    training, validation, file_count = bytearray(), bytearray(), 0
    for path in _list_files(config):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RecipeError(
                f"data.paths: {path} cannot be read: {error.strerror}.\n"
                "Name existing files or directories, as in data.paths=[notes.txt,books]."
            ) from error
        held_out_bytes = int(len(content) * config.validation_fraction)
        training += content[: len(content) - held_out_bytes]
        validation += content[len(content) - held_out_bytes :]
        file_count += 1
    if not training or not validation:
        raise RecipeError(
            f"data.paths: {file_count} files hold {len(training)} bytes to train on and "
            f"{len(validation)} to validate on.\nName more text, or raise data.validation_fraction."
        )
    return Text(
        training=torch.frombuffer(training, dtype=torch.uint8),
        validation=torch.frombuffer(validation, dtype=torch.uint8),
        fingerprint=hashlib.sha256(training).hexdigest()[:16],
        file_count=file_count,
    )


def _list_files(config: DataConfig) -> Iterator[Path]:
    if config.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        for path in sorted(root.rglob("*.py")):
            if not _FOREIGN_FOLDERS.intersection(path.relative_to(root).parts):
                yield path
        return
    for name in config.paths:
        path = Path(name)
        if path.is_dir():
            yield from (each for each in sorted(path.rglob("*")) if each.is_file())
        else:
            yield path


def cut_sample(text: Tensor, index: int, length: int) -> Tensor:
    """Return sample `index`: `length` bytes and the one after, the last byte's target."""
    return text[index * length : (index + 1) * length + 1]


def count_samples(text: Tensor, length: int) -> int:
    """Count the samples of this length in a text; neighbours share one byte."""
    return (len(text) - 1) // length


class ShardedLoader:
    """Deal the samples of a text to data-parallel ranks, reshuffled each epoch, for ever.

    Each batch is this rank's (samples, length + 1) byte values, as int64. An epoch's last batch is
    filled up from the next epoch, so that every sample is dealt exactly once per epoch.
    """

    def __init__(
        self, text: Text, length: int, batch_size: int, seed: int, rank: int = 0, size: int = 1
    ) -> None:
        """Start before the first sample; `batch_size` counts the samples of all `size` ranks.

        Raises:
            RecipeError: the text is shorter than one sample, or the ranks cannot share a batch.
        """
        self._text = text
        self._length = length
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._size = size
        self._sample_count = count_samples(text.training, length)
        self._position = 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        if self._sample_count < 1:
            raise RecipeError(
                f"data: {len(text.training)} bytes of text are less than one sample of {length}.\n"
                "Name more text, or lower model.context."
            )
        if batch_size % size:
            raise RecipeError(
                f"batch_size is {batch_size}; {size} processes cannot share that evenly.\n"
                f"Make it a multiple of {size}."
            )

    def __iter__(self) -> ShardedLoader:
        return self

    def __next__(self) -> Tensor:
        share = self._batch_size // self._size
        first = self._position + self._rank * share
        batch = [self._sample_at(position) for position in range(first, first + share)]
        self._position += self._batch_size
        return torch.stack(batch).long()

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it refers to, the same on every rank."""
        return {
            "position": self._position,
            "seed": self._seed,
            "length": self._length,
            "fingerprint": self._text.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last sample dealt when the state was taken.

        Raises:
            RecipeError: the state was taken over another text, seed or sample length.
        """
        own = self.state_dict()
        for name, setting in (
            ("seed", "seed"),
            ("length", "model.context"),
            ("fingerprint", "the text (data, or the Python version for data=stdlib)"),
        ):
            if state_dict[name] != own[name]:
                raise RecipeError(
                    f"The checkpoint's data position does not fit: {setting} was "
                    f"{state_dict[name]}, now {own[name]}.\nResume with the settings of the saved "
                    "run, or start another run in another run_dir."
                )
        self._position = int(state_dict["position"])

    def load_resharded_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue where all ranks of the saved run stood, whatever their number.

        Raises:
            RecipeError: the ranks stood at different positions, or as for `load_state_dict`.
        """
        if any(state != states[0] for state in states):
            positions = ", ".join(str(state["position"]) for state in states)
            raise RecipeError(
                f"The checkpoint's ranks stood at different samples ({positions}): it is not one "
                "moment of one run.\nLoad another checkpoint with checkpoint.load.step."
            )
        self.load_state_dict(states[0])

    def _sample_at(self, position: int) -> Tensor:
        epoch, offset = divmod(position, self._sample_count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = torch.randperm(self._sample_count, generator=generator)
            self._epoch = epoch
        return cut_sample(self._text.training, int(self._order[offset]), self._length)
