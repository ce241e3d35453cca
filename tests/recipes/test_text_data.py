"""Every sample is dealt once per epoch, whatever is interrupted and however many ranks share it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from run_config import DataConfig, RecipeError
from text_data import ShardedLoader, Text, count_samples, read_text

LENGTH = 4
SAMPLES = 37  # shares no factor with the batch: epochs end in the middle of one
BATCH = 8


def _text(fingerprint: str = "a") -> Text:
    """Make a text whose sample i begins with byte i, so that samples can be told apart."""
    content = torch.zeros(SAMPLES * LENGTH + 1, dtype=torch.uint8)
    content[: SAMPLES * LENGTH : LENGTH] = torch.arange(SAMPLES, dtype=torch.uint8)
    return Text(content, content, fingerprint, 1)


def _loaders(size: int, seed: int = 3) -> list[ShardedLoader]:
    return [ShardedLoader(_text(), LENGTH, BATCH, seed, rank, size) for rank in range(size)]


def _deal(loaders: list[ShardedLoader], batches: int) -> list[int]:
    """Return the samples that all ranks got, in the order of the global batches."""
    dealt = []
    for _ in range(batches):
        for loader in loaders:
            dealt += [int(sample[0]) for sample in next(loader)]
    return dealt


def test_every_epoch_deals_every_sample_once() -> None:
    """Neither lost nor repeated, and in another order each time, across the ends of epochs."""
    dealt = _deal(_loaders(1), SAMPLES)  # SAMPLES batches are BATCH whole epochs
    epochs = [dealt[first : first + SAMPLES] for first in range(0, len(dealt), SAMPLES)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == BATCH


def test_samples_are_the_text() -> None:
    """A batch holds each sample's bytes and the one that follows, as int64."""
    batch = next(ShardedLoader(_text(), LENGTH, BATCH, 3))
    assert batch.shape == (BATCH, LENGTH + 1)
    assert batch.dtype == torch.int64
    for sample in batch:
        assert sample[0] + 1 == sample[-1] or sample[0] == SAMPLES - 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_together_deal_what_one_rank_would(size: int) -> None:
    """The global batches do not depend on how many ranks share them."""
    assert _deal(_loaders(size), 12) == _deal(_loaders(1), 12)


def test_seeds_differ() -> None:
    """Another seed is another order; the same seed the same."""
    assert _deal(_loaders(1, seed=3), 9) == _deal(_loaders(1, seed=3), 9)
    assert _deal(_loaders(1, seed=3), 9) != _deal(_loaders(1, seed=4), 9)


@pytest.mark.parametrize("before", [0, 1, 4, 5, 23])
@pytest.mark.parametrize(("size", "new_size"), [(1, 1), (2, 1), (2, 4), (4, 2), (1, 8)])
def test_a_restored_loader_goes_on_at_the_next_sample(
    before: int, size: int, new_size: int
) -> None:
    """In the middle of an epoch and at its end, at the same and at another number of ranks."""
    whole = _deal(_loaders(1), 30)
    first = _loaders(size)
    dealt = _deal(first, before)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in first]
    second = _loaders(new_size)
    _deal(second, 2)  # whatever they did before is forgotten
    for rank, loader in enumerate(second):
        if new_size == size:
            loader.load_state_dict(states[rank])
        else:
            loader.load_resharded_state(states)
    assert dealt + _deal(second, 30 - before) == whole


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (ShardedLoader(_text(), LENGTH, BATCH, 4), "seed was 4, now 3"),
        (ShardedLoader(_text("b"), LENGTH, BATCH, 3), "the text"),
        (ShardedLoader(_text(), LENGTH + 1, BATCH, 3), "model.context was 5, now 4"),
    ],
)
def test_a_position_in_another_text_is_refused(other: ShardedLoader, named: str) -> None:
    """A position means nothing in another text or order; the message names the setting."""
    with pytest.raises(RecipeError, match=named):
        ShardedLoader(_text(), LENGTH, BATCH, 3).load_state_dict(other.state_dict())


def test_ranks_at_different_positions_are_refused() -> None:
    """States that are not one moment of one run cannot be resharded."""
    behind, ahead = _loaders(2)
    next(ahead)
    with pytest.raises(RecipeError, match=r"different samples \(0, 8\)"):
        _loaders(1)[0].load_resharded_state([behind.state_dict(), ahead.state_dict()])


def test_ranks_that_cannot_share_a_batch_are_refused() -> None:
    """The global batch is the same at every number of ranks, or there is an error."""
    with pytest.raises(RecipeError, match="multiple of 3"):
        ShardedLoader(_text(), LENGTH, BATCH, 3, 0, 3)


def test_files_are_read_in_order_and_their_ends_held_out(tmp_path: Path) -> None:
    """Names decide the order, directories are read whole, training and validation are disjoint."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b").write_bytes(b"b" * 10)
    (tmp_path / "texts" / "a").write_bytes(b"a" * 9 + b"x")
    (tmp_path / "last").write_bytes(b"c" * 10)
    paths = [str(tmp_path / "texts"), str(tmp_path / "last")]
    text = read_text(DataConfig("files", paths, validation_fraction=0.1))
    assert bytes(text.training.tolist()) == b"a" * 9 + b"b" * 9 + b"c" * 9
    assert bytes(text.validation.tolist()) == b"xbc"
    assert text.file_count == 3


def test_the_standard_library_is_much_real_text() -> None:
    """The default text is megabytes of Python, the same on every reading."""
    text = read_text(DataConfig())
    assert len(text.training) > 5_000_000
    assert b"def " in bytes(text.validation[:100_000].tolist())
    assert text.fingerprint == read_text(DataConfig()).fingerprint
    assert count_samples(text.validation, 64) > 1000


def test_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A missing path and an empty text are complaints about data.paths."""
    with pytest.raises(RecipeError, match=r"data.paths: .*nowhere cannot be read"):
        read_text(DataConfig("files", [str(tmp_path / "nowhere")]))
    (tmp_path / "empty").touch()
    with pytest.raises(RecipeError, match=r"data.paths: 1 files hold 0 bytes"):
        read_text(DataConfig("files", [str(tmp_path / "empty")]))


def test_a_loader_is_an_endless_iterator() -> None:
    """It can be handed to whatever takes an iterator."""
    assert len(list(islice(ShardedLoader(_text(), LENGTH, BATCH, 3), 100))) == 100
