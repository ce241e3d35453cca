"""torchdata's StatefulDataLoader goes on at the very next sample, workers and epochs included."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from holdfast.errors import DataReshardError
from tests.support.managers import Live, manager_of

stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")

pytestmark = [
    # Workers are forked from a process that has threads, as every program with torch forks them.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    # torchdata 0.11 calls what torch 2.13 has deprecated, and tells of what it fast-forwards.
    pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*state_dict.*:UserWarning"),
]
SAMPLES, BATCH = 23, 2


class Numbers(Dataset[int]):
    """A map dataset."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """An iterable dataset that deals its samples to workers and knows where it is."""

    def __init__(self) -> None:
        self.start = self.position = 0

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info is not None else (0, 1)
        self.position, self.start = self.start, 0
        while (sample := first + self.position * step) < SAMPLES:
            self.position += 1
            yield sample

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


class Forgetful(IterableDataset[int]):
    """An iterable dataset without a state: the loader skips what was read."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info is not None else (0, 1)
        yield from range(first, SAMPLES, step)


def _loader(kind: type[Any], workers: int) -> Any:
    return stateful_dataloader.StatefulDataLoader(
        kind(), batch_size=BATCH, shuffle=kind is Numbers, num_workers=workers
    )


def _batches(loader: Any) -> Generator[list[int]]:
    """Yield batches for ever, epoch after epoch."""
    while True:
        for batch in loader:
            yield batch.tolist()


@pytest.mark.parametrize(
    ("kind", "workers", "taken"),
    [(Numbers, 0, 5), (Numbers, 0, 12), (Stream, 0, 5), (Stream, 0, 12), (Forgetful, 0, 5),
     (Numbers, 2, 5), (Stream, 2, 5), (Stream, 2, 12), (Forgetful, 2, 5)],
)  # fmt: skip
def test_the_next_sample_is_the_next_sample(
    kind: type[Any], workers: int, taken: int, tmp_path: Path
) -> None:
    """In the middle of an epoch and at its end, to the end of it, without one twice or left out."""
    torch.manual_seed(3)
    loader = _loader(kind, workers)
    live = Live(nn.Linear(2, 2), data=loader)
    batches = _batches(loader)
    seen = [next(batches) for _ in range(taken)]
    live.save(manager_of(tmp_path), taken)
    epoch = len(loader) if kind is Numbers else len([*_loader(kind, workers)])
    rest = epoch - taken % epoch
    expected = [next(batches) for _ in range(rest)]
    torch.manual_seed(4)
    again = Live(nn.Linear(2, 2), data=_loader(kind, workers))
    assert again.load(manager_of(tmp_path)).restored["data"]
    resumed = _batches(again.data)
    assert [next(resumed) for _ in range(rest)] == expected
    if taken < epoch:
        assert sorted(each for batch in seen + expected for each in batch) == list(range(SAMPLES))
    for each in (batches, resumed):
        each.close()
    for each in (loader, again.data):
        each._iterator = None  # which ends its workers, as the end of the program would
    gc.collect()


def test_another_data_parallel_size_is_refused(tmp_path: Path) -> None:
    """The loader cannot be divided anew: it is named, with the remedy."""
    loader = _loader(Numbers, 0)
    live = Live(nn.Linear(2, 2), data=loader)
    next(iter(loader))
    group = type("Group", (), {"rank": lambda self: 0, "size": lambda self: 2})()
    groups = type("Groups", (), {"dp": group})()
    live.save(manager_of(tmp_path), 1, pg_collection=groups)
    with pytest.raises(DataReshardError, match=r"rank\(s\) 1 of 2"):
        live.load(manager_of(tmp_path))
