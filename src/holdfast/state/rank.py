"""Per-rank state: random number generators and position in the data.

Owns capturing the generators (python, numpy, torch CPU and every CUDA device) and how per-rank
state is distributed to a run with another number of ranks: to the same data-parallel reader if
there is one, resharded by the iterator itself if it can, refused otherwise; generators without a
saved state are reseeded, with a separate stream for each rank, the same on every machine. Promises
that the next draw after a restore equals the next draw after the capture, and that `check_data`
changes nothing. Reads and writes no files.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.errors import DataReshardError
from holdfast.protocol import ReshardableData, Stateful


def capture_rng() -> dict[str, Any]:
    """Return the state of every generator as plain values and tensors, without drawing."""
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = legacy
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def apply_rng(state: dict[str, Any]) -> list[str]:
    """Restore what `capture_rng` returned; return the names of generators missing here."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    saved = state["cuda"]
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, each in enumerate(saved[:present]):
        torch.cuda.set_rng_state(each, device)
    return [f"cuda:{device}" for device in range(present, len(saved))]


def reseed(run_id: str, iteration: int, rank: int) -> None:
    """Seed every generator from the identity of a checkpoint and the rank only."""
    digest = hashlib.sha256(f"{run_id}/{iteration}/{rank}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A rank's coordinates in the job."""

    rank: int
    world_size: int
    data_rank: int
    """Rank among those that read different data."""
    data_size: int

    @classmethod
    def of(cls, rank: int, world_size: int, pg_collection: Any | None) -> Place:
        """Read the data-parallel group from `pg_collection.dp`; None: every rank of the world."""
        group = getattr(pg_collection, "dp", None)
        if group is None:
            return cls(rank, world_size, rank, world_size)
        return cls(rank, world_size, group.rank(), group.size())

    def reads_on_from(self, state: Mapping[str, Any]) -> bool:
        """Whether a saved data state has this rank's data-parallel rank and size."""
        saved = (state["data_rank"], state["data_size"])
        return saved == (self.data_rank, self.data_size)


@dataclass(frozen=True)
class SavedRun:
    """What applying per-rank state needs to know of the run that wrote the checkpoint."""

    run_id: str
    iteration: int
    world_size: int


def check_data(
    data: Stateful, rank: Mapping[str, Any], place: Place, path: str, accept_restart: bool
) -> None:
    """Check early whether an iterator can restore the data state, changing nothing.

    Raises:
        DataReshardError: the data-parallel size differs and the iterator cannot reshard.
    """
    saved_data_size = rank["data_size"]
    if rank["data"] is None or saved_data_size == place.data_size:
        return
    if not isinstance(data, ReshardableData) and not accept_restart:
        raise DataReshardError(
            f"{path} holds data state of {saved_data_size} data-parallel ranks, this run has "
            f"{place.data_size}, and {type(data).__name__} has no "
            "load_resharded_state.\nGive it one, or set load.accept_data_restart=true to start "
            "the data from its beginning."
        )


def warn_of_lost_position(data: Any | None) -> bool:
    """Warn of an iterator whose position cannot be saved; return whether there is an iterator."""
    if data is None:
        return False
    missing = [name for name in ("state_dict", "load_state_dict") if not hasattr(data, name)]
    if missing:
        logger.warning(
            "train_data_iterator is a %s without %s: its position is not saved, and a resumed "
            "run reads its data from the beginning",
            type(data).__name__,
            " and ".join(missing),
        )
    return True


def apply_data(data: Stateful, states: Sequence[Mapping[str, Any]], place: Place) -> bool:
    """Restore an iterator's position; False: none was saved, or it starts from the beginning.

    `states`: of this rank alone, or of every rank of the run that saved.
    """
    # Another rank may have saved this reader's state; another reader's state is never restored.
    reader = next((each for each in states if place.reads_on_from(each)), None)
    if reader is None:
        return _reshard_data(data, states, place)
    if reader["data"] is None:
        return False
    data.load_state_dict(copy.deepcopy(reader["data"]))  # it may be applied again
    return True


def apply_generators(states: Sequence[Mapping[str, Any]], saved: SavedRun, place: Place) -> bool:
    """Restore every generator; False: the number of ranks differs, so they were reseeded."""
    if saved.world_size == place.world_size:
        own = own_state(states, place)
        for name in apply_rng(own["rng"]):
            logger.warning("rank %d has no %s: its RNG state was left out", place.rank, name)
        return True
    reseed(saved.run_id, saved.iteration, place.rank)
    if place.rank == 0:
        logger.warning(
            "saved by %d ranks, loaded by %d: RNG reseeded from run id, iteration and rank",
            saved.world_size,
            place.world_size,
        )
    return False


def own_state(states: Sequence[Mapping[str, Any]], place: Place) -> Mapping[str, Any]:
    """Return the state of this rank, or of the last one if there are fewer."""
    return states[0] if len(states) == 1 else states[min(place.rank, len(states) - 1)]


def _reshard_data(data: Stateful, states: Sequence[Mapping[str, Any]], place: Place) -> bool:
    saved_size = own_state(states, place)["data_size"]
    by_rank = {each["data_rank"]: each["data"] for each in states}
    ordered = [by_rank[rank] for rank in sorted(by_rank) if by_rank[rank] is not None]
    if not ordered:
        return False
    reshards = isinstance(data, ReshardableData)
    if isinstance(data, ReshardableData):
        data.load_resharded_state(copy.deepcopy(ordered))
    if place.rank == 0:
        logger.warning(
            "data of %d data-parallel ranks, now %d: %s",
            saved_size,
            place.data_size,
            "resharded" if reshards else "restarted from its beginning (load.accept_data_restart)",
        )
    return reshards
