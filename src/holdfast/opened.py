"""A chosen checkpoint, opened on all ranks, with its small state read and looked at.

Owns which positions in the data a rank needs, and what small states must look like beside their
digests. Promises that what is not sound is damage, and that nothing live is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from holdfast.errors import CorruptCheckpointError
from holdfast.format.values import DATA, EMPTY, RNG, TRAIN_STATE
from holdfast.ranks.coordinator import Coordinator
from holdfast.state.component_load import read_frames
from holdfast.state.small import Place, is_position
from holdfast.storage.store import Checkpoint
from holdfast.tiers.bases import Bases
from holdfast.tiers.select import Commit
from holdfast.tiers.tier import Contents, Source, Wanted

_RNG_KEYS = frozenset({"python", "numpy", "torch", "cuda"})


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose small state was read, every byte of it verified."""

    contents: Contents
    positions: list[dict[str, Any]]
    """Positions in the data: this rank's own alone, or the distinct ones of all that saved."""

    @property
    def small(self) -> Mapping[str, Any]:
        """The small states; empty: the checkpoint holds nothing but model and optimizer."""
        return self.contents.small

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint itself."""
        return self.contents.checkpoint


def open_selected(
    source: Source,
    commit: Commit,
    coordinator: Coordinator,
    place: Place,
    *,
    verify_first: bool,
    bases: Bases,
    model_only: bool = False,
) -> Opened:
    """Open a commit on all ranks and check its small state; raises as `Source.open`.

    `bases`: where what it lacks of the model is looked for, if it is a part. `model_only`: nothing
    but the model will be restored.
    """
    opened: list[Opened] = []

    def suffices(contents: Contents) -> bool:
        if DATA not in contents.reader.per_rank_names:
            return True  # no rank saved a position
        is_own = DATA in contents.reader.own_names
        position = contents.small.get(DATA)
        return is_own and is_position(position) and place.reads_on_from(position or {})

    def accept(contents: Contents) -> None:
        where = str(contents.checkpoint.path)
        if model_only:
            opened.append(Opened(contents, []))
            return
        if contents.small:
            _check_small(contents.small, contents.checkpoint.iteration, where)
            read_frames(contents.small, contents.reader.tensors(), where)
        positions = list(contents.copies.get(DATA, ()))
        if not positions and DATA in contents.reader.own_names:
            positions = [contents.small[DATA]]
        if not all(map(is_position, positions)):
            raise CorruptCheckpointError(where, "holds no data position where one should be")
        opened.append(Opened(contents, positions))

    source.open(commit, coordinator, Wanted(suffices, accept, verify_first, model_only))
    contents = bases.join(opened[0].contents, coordinator, verify_first=verify_first)
    return replace(opened[0], contents=contents)


def _check_small(small: Mapping[str, Any], iteration: int, where: str) -> None:
    """Refuse small states that are none of ours, though they matched their digests.

    Raises:
        CorruptCheckpointError: naming the first.
    """
    counters = small.get(TRAIN_STATE)
    counters = counters.get("train_state") if isinstance(counters, dict) else None
    sound = {
        RNG: isinstance(small.get(RNG), dict) and small[RNG].keys() >= _RNG_KEYS,
        TRAIN_STATE: isinstance(counters, dict) and counters.get("step") == iteration,
        EMPTY: isinstance(small.get(EMPTY, []), list),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise CorruptCheckpointError(where, f"holds no state where {name} should be")
