"""One checkpoint on its way into the live state.

Owns the steps between a chosen candidate and a restored run: verify and open it, compare it with
what is live, fill tensors in place, apply the rest. Promises that nothing live is touched before
`fill`, that damage is told apart from a checkpoint that does not fit, and that RNG comes last.
Chooses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from holdfast.coordination import Coordinator
from holdfast.errors import CorruptCheckpointError, StageFailedError, StageTimeoutError
from holdfast.filesystem import Filesystem
from holdfast.state.capture import AppState, Place, SavedRun, SavedTensors
from holdfast.state.safety import decode
from holdfast.store import Checkpoint, Store
from holdfast.tiers.reading import Contents, open_contents, verify_together


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose every file was verified and whose small state was read."""

    contents: Contents
    shared: dict[str, Any]
    rank_states: list[dict[str, Any]]
    """This rank's own alone; every saving rank's, in rank order, where ranks have changed."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint itself."""
        return self.contents.checkpoint


def open_verified(
    checkpoint: Checkpoint, coordinator: Coordinator, filesystem: Filesystem, place: Place
) -> Opened:
    """Verify every byte and read the small state, on all ranks.

    Raises:
        CorruptCheckpointError: on every rank, naming what is damaged or cannot be read.
    """
    store = Store(checkpoint.path.parent, filesystem)
    damages = verify_together(store, checkpoint, coordinator)
    if damages:
        shown = "; ".join(str(damage) for damage in damages[:3])
        more = f"; and {len(damages) - 3} more files" if len(damages) > 3 else ""
        raise CorruptCheckpointError(str(checkpoint.path), shown + more)
    opened: list[Opened] = []

    def read() -> None:
        contents = open_contents(checkpoint, filesystem)
        saved_size = checkpoint.manifest.world_size
        states = []
        if place.world_size == saved_size:
            states = [_read_rank_state(contents, place.rank, filesystem)]
        if not states or not place.reads_on_from(states[0]):
            states = [_read_rank_state(contents, rank, filesystem) for rank in range(saved_size)]
        shared = decode(contents.shared_state, str(checkpoint.path))
        opened.append(Opened(contents, shared, states))

    try:
        coordinator.together("open", read)
    except StageTimeoutError:
        raise  # a rank is gone: the checkpoint is not to blame
    except StageFailedError as error:
        raise CorruptCheckpointError(str(checkpoint.path), str(error)) from error
    return opened[0]


class Restoration:
    """An opened checkpoint and the live state that it is to fill."""

    def __init__(self, opened: Opened, app: AppState, *, with_tensors: bool) -> None:
        self._opened = opened
        self._app = app
        self._saved: SavedTensors | None = None
        if with_tensors:
            reader, values = opened.contents.reader, opened.contents.values
            tensors = reader.tensors()
            key_paths = {name: reader.key_path(name) for name in (*tensors, *values)}
            self._saved = SavedTensors(tensors, values, key_paths, opened.shared.get("hollow", ()))
        self._filled: dict[str, Any] = {}

    def compare(self, strict: bool, accept_data_restart: bool) -> None:
        """Refuse a checkpoint that does not fit, touching nothing.

        Raises:
            StateMismatchError, DataReshardError: it is sound, but not for this run as built.
        """
        opened, own = self._opened, self._opened.rank_states[0]
        path = str(opened.checkpoint.path)
        self._app.check(path, self._saved, opened.shared, own, strict)
        self._app.check_data(own, path, accept_data_restart)

    def fill(self) -> None:
        """Read the tensors into place: from here on the live state is changed."""
        if self._saved is None:
            return
        targets = self._app.targets(self._saved)
        self._opened.contents.reader.read_tensors(targets)
        self._filled = {**self._saved.values, **targets}

    def apply(self) -> None:
        """Give every live object its state; RNG last."""
        if self._saved is not None:
            self._app.apply(self._filled, self._saved)
        self._app.apply_scheduler(self._opened.shared)
        manifest = self._opened.checkpoint.manifest
        saved = SavedRun(manifest.run_id, manifest.iteration, manifest.world_size)
        self._app.apply_rank(self._opened.rank_states, saved)


def _read_rank_state(contents: Contents, rank: int, filesystem: Filesystem) -> dict[str, Any]:
    content = contents.read_rank_state(rank, filesystem)
    state: dict[str, Any] = decode(content, f"{contents.checkpoint.path}: state of rank {rank}")
    return state
