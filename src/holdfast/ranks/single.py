"""The null case of a coordinator: one process, which agrees with itself.

Owns what every kind of exchange is where nobody else takes part: the work itself. Promises that a
failure is named with its stage, as ranks name theirs; also used for one rank's part of a stage that
has a name of its own. Needs no torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from holdfast.errors import CheckpointError, RankFailure, StageFailedError
from holdfast.ranks.entry import Arrival, Entry, Ruling

T = TypeVar("T")
R = TypeVar("R")


class SingleProcess:
    """The null case: one rank, which agrees with itself."""

    world_size = 1
    timeout_seconds = float("inf")

    def __init__(self, rank: int = 0) -> None:
        """`rank`: what failures name, where this is one rank's own part of a stage."""
        self.rank = rank

    def begin(
        self, stage: str, enter: Callable[[], Entry], admit: Callable[[], R]
    ) -> tuple[int, R]:
        """Enter here: nobody can be late."""
        self.broadcast(stage, enter)
        return 0, self.broadcast(stage, admit)

    def begin_as(
        self,
        stage: str,
        arrival: Arrival,
        cause: BaseException | None,
        admit: Callable[[bool], R],
    ) -> Ruling[R]:
        """Enter here."""
        if cause is not None:
            if isinstance(cause, CheckpointError) or not isinstance(cause, Exception):
                raise cause
            raise StageFailedError(stage, [RankFailure.of(self.rank, cause)]) from cause
        return Ruling(0, self.broadcast(stage, lambda: admit(arrival.has_copy)))

    def decline(self, stage: str, name: str | None) -> None:
        """Nobody comes alike."""

    def begin_alike(self, stage: str, entry: Entry, admit: Callable[[], R]) -> R:
        """Enter here."""
        return self.broadcast(stage, admit)

    def expect_alike(self) -> None:
        """Nobody can differ."""

    call: object = 0

    def follow(self, call: object) -> None:
        """Nobody can be late."""

    def all_gather(self, stage: str, work: Callable[[], T]) -> list[T]:
        """Run the work here."""
        return [self.broadcast(stage, work)]

    def gather(self, stage: str, work: Callable[[], T]) -> list[T] | None:
        """Run the work here."""
        return [self.broadcast(stage, work)]

    def all_reduce(
        self,
        stage: str,
        work: Callable[[], T],
        judge: Callable[[list[T]], R],
        *,
        then: str | None = None,
    ) -> R:
        """Run the work here, and judge it."""
        value = self.broadcast(stage, work)
        return self.broadcast(then or stage, lambda: judge([value]))

    def broadcast(self, stage: str, work: Callable[[], T]) -> T:
        """Run the work here; a failure that is not ours is named with its stage.

        Raises:
            StageFailedError: the work raised.
        """
        try:
            return work()
        except CheckpointError:
            raise
        except Exception as error:
            raise StageFailedError(stage, [RankFailure.of(self.rank, error)]) from error

    def scatter(self, stage: str, work: Callable[[], Sequence[T]]) -> T:
        """Run the work here."""
        return self.broadcast(stage, work)[0]
