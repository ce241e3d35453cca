"""The channels on which the ranks of one manager communicate.

Owns how a channel is named, so that all ranks use the same one: by the directory of the store. It
makes no difference which other managers a rank has made or used. Managers of one directory share
the count of calls, which is kept in the rendezvous store. Without an initialised torch.distributed,
or with one rank, each channel is a `SingleProcess`; one that was opened before torch.distributed
was initialised is opened again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from holdfast.errors import CheckpointError, WrongArgumentError
from holdfast.ranks.background import DecidedError
from holdfast.ranks.coordinator import Coordinator, SingleProcess, StoreCoordinator
from holdfast.ranks.entry import Arrival, Entry, attempt

R = TypeVar("R")


def open_channels(
    count: int, timeout_seconds: float, name: str, store: Any = None
) -> list[Coordinator]:
    """Open independent channels, one for each thread that will communicate.

    `name`: the same on all ranks, and of no other channels that are in use. `store`: through which
    the ranks communicate. None: the one of the default process group.
    """
    if not _has_peers():
        return [SingleProcess() for _ in range(count)]
    from torch import distributed

    from holdfast.torch_internals import rendezvous_store

    given = rendezvous_store() if store is None else store
    return [
        StoreCoordinator(
            given.clone(),  # a client of its own: a blocking wait holds the client's lock
            distributed.get_rank(),
            distributed.get_world_size(),
            timeout_seconds,
            f"holdfast/{name}/{number}",
        )
        for number in range(count)
    ]


def _has_peers() -> bool:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


class Channels:
    """The channels of one manager, for its calls and for each thread of its own; opened late.

    torch.distributed may be initialised after the manager is made, and before its first call.
    """

    def __init__(self, count: int, timeout_seconds: float, name: str, store: Any = None) -> None:
        """`name`, `store`: see `open_channels`.

        Raises:
            WrongArgumentError: it is no store.
        """
        if store is not None:
            _check_store(store)
        self._store = store
        self._count = count
        self._timeout_seconds = timeout_seconds
        self._name = name
        self._channels: list[Coordinator] = []
        self._has_peers = False

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.open()[0].rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.open()[0].world_size

    def open(self) -> list[Coordinator]:
        """Return the channels: first that of calls."""
        if not self._channels or (not self._has_peers and _has_peers()):
            self._has_peers = _has_peers()
            self._channels = open_channels(
                self._count, self._timeout_seconds, self._name, self._store
            )
        return self._channels

    def begin_call(
        self,
        stage: str,
        enter: Callable[[], Entry],
        admit: Callable[[], R],
        refusal: BaseException | None,
        in_use: Collection[int],
        *,
        reason: str = "",
        act_at: int | None = None,
    ) -> R:
        """Begin a call on all ranks and return what `admit` did; see `Coordinator.begin`.

        `refusal`: what this rank has to raise; the others get it too. None: it takes part.
        `in_use`: numbers of channels on which a job still communicates; they stay in their call.
        `reason`: why this rank does not come in the background. `act_at`: the step it is in, for a
        failure that it can act on later. None: at once.

        Raises:
            BaseException: the refusal itself, whatever another rank raises.
            DecidedError: `act_at` was given, other ranks are in this call in the background, and
                all have agreed on a step to act at.
            CheckpointError: on every rank: ranks are in different calls, or one refused it.
        """
        control = self.open()[0]
        outcome, cause = attempt(control.rank, enter if refusal is None else _raiser(refusal))
        arrival = Arrival(outcome, stage, reason=reason, act_at=act_at or 0)
        try:
            ruling = control.begin_as(stage, arrival, cause, lambda _: admit())
        except CheckpointError:
            if refusal is not None:
                raise refusal from None
            raise
        if ruling.error is not None and refusal is not None:
            raise refusal from None
        later = act_at is not None and ruling.act_at is not None and cause is None
        if ruling.error is not None and later:
            assert ruling.act_at is not None
            raise DecidedError(ruling.error, ruling.act_at)
        admitted = ruling.unpack(cause)
        self.follow(in_use)
        return admitted

    def follow(self, in_use: Collection[int]) -> None:
        """Let the other channels use the keys of the call that the first one is in."""
        control, *others = self.open()
        for number, each in enumerate(others, 1):
            if number not in in_use:
                each.follow(control.call)


def _name(found: object) -> str:
    return (found if isinstance(found, type) else type(found)).__name__


def _check_store(store: object) -> None:
    from torch import distributed

    kind: Any = getattr(distributed, "Store", None)
    if kind is None or not isinstance(store, kind):
        raise WrongArgumentError(
            "DefaultCheckpointManager",
            "store",
            f"is {'the class ' if isinstance(store, type) else 'of type '}{_name(store)}",
            "Pass a torch.distributed.Store that all ranks share, or None for that of the "
            "default process group.",
        )


def _raiser(error: BaseException) -> Callable[[], NoReturn]:
    def refuse() -> NoReturn:
        raise error

    return refuse
