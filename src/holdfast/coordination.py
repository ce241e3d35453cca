"""Ranks agree on values and on failures.

Owns how ranks wait for one another: through the rendezvous store, with a deadline in every wait,
and never in a collective. Promises that a stage which fails on one rank fails on all of them with
the same named reason, that a rank which never arrives is named, and that any thread may hold a
channel of its own beside the trainer's process groups. The single process is the null case and
needs no torch.distributed. Values are pickled: the ranks of one job trust each other, files are
never read so.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from holdfast.errors import CheckpointError, RankFailure, StageFailedError, StageTimeoutError

T = TypeVar("T")
R = TypeVar("R")

_FOLLOWER_GRACE_SECONDS = 5.0
"""Followers wait this much longer than the leader, so that its verdict names who is missing."""

_instances = itertools.count()
"""Every rank opens its channels in the same order, so equal numbers mean the same channel."""


class Coordinator(Protocol):
    """One channel between the ranks of a job; every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def timeout_seconds(self) -> float:
        """How long any rank is waited for."""
        ...

    def begin(self, conversation: str) -> None:
        """Leave whatever was said before: from here on ranks meet in this conversation only.

        A rank that was late and found the others gone meets them again in the next one.
        """
        ...

    def together(self, stage: str, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return everyone's result, in rank order."""
        ...

    def gather(self, stage: str, work: Callable[[], T]) -> list[T] | None:
        """As `together`, but only rank 0 is given the results; the others get None."""
        ...

    def settle(self, stage: str, work: Callable[[], T], judge: Callable[[list[T]], R]) -> R:
        """Run `work` on every rank, let rank 0 judge all results; return its verdict on every rank.

        What each rank is told does not grow with the number of ranks, as with `together` it does.
        """
        ...

    def lead(self, stage: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone and return its result on every rank."""
        ...

    def scatter(self, stage: str, work: Callable[[], Sequence[T]]) -> T:
        """Run `work` on rank 0 alone and return its n-th result on rank n."""
        ...


class SingleProcess:
    """The null case: one rank, which agrees with itself."""

    rank = 0
    world_size = 1
    timeout_seconds = float("inf")

    def begin(self, conversation: str) -> None:
        """Nobody can be late."""

    def together(self, stage: str, work: Callable[[], T]) -> list[T]:
        """Run the work here."""
        return [self.lead(stage, work)]

    def gather(self, stage: str, work: Callable[[], T]) -> list[T] | None:
        """Run the work here."""
        return [self.lead(stage, work)]

    def settle(self, stage: str, work: Callable[[], T], judge: Callable[[list[T]], R]) -> R:
        """Run the work here, and judge it."""
        return self.lead(stage, lambda: judge([work()]))

    def lead(self, stage: str, work: Callable[[], T]) -> T:
        """Run the work here; a failure that is not ours is named with its stage.

        Raises:
            StageFailedError: the work raised.
        """
        try:
            return work()
        except CheckpointError:
            raise
        except Exception as error:
            raise StageFailedError(stage, [RankFailure.of(0, error)]) from error

    def scatter(self, stage: str, work: Callable[[], Sequence[T]]) -> T:
        """Run the work here."""
        return self.lead(stage, work)[0]


class StoreCoordinator:
    """Ranks meet at keys of the job's rendezvous store, each with a client of its own."""

    def __init__(
        self, store: Any, rank: int, world_size: int, timeout_seconds: float, channel: str
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self.timeout_seconds = timeout_seconds
        self._channel = channel
        self._conversation = ""
        self._turns: Counter[str] = Counter()
        self._spent_keys: list[str] = []

    def begin(self, conversation: str) -> None:
        """Meet at other keys than before."""
        self._conversation = conversation
        self._turns.clear()

    def together(self, stage: str, work: Callable[[], T]) -> list[T]:
        """Run the work on every rank.

        Raises:
            CheckpointError: raised by the work itself, on the lowest rank that did; on every rank.
            StageFailedError: the work raised anything else, on any rank; on every rank.
            StageTimeoutError: ranks did not arrive in time.
        """
        everything: list[T] = self._meet(stage, work, lambda outcomes: [outcomes] * self.world_size)
        return everything

    def gather(self, stage: str, work: Callable[[], T]) -> list[T] | None:
        """Run the work on every rank; errors as `together`."""
        nothing = [None] * (self.world_size - 1)
        share: list[T] | None = self._meet(stage, work, lambda outcomes: [outcomes, *nothing])
        return share

    def settle(self, stage: str, work: Callable[[], T], judge: Callable[[list[T]], R]) -> R:
        """Run the work on every rank and judge it on rank 0; errors as `together`."""
        verdict: R = self._meet(stage, work, lambda outcomes: [judge(outcomes)] * self.world_size)
        return verdict

    def lead(self, stage: str, work: Callable[[], T]) -> T:
        """Run the work on rank 0; errors as `together`."""
        return self.scatter(stage, lambda: [work()] * self.world_size)

    def scatter(self, stage: str, work: Callable[[], Sequence[T]]) -> T:
        """Run the work on rank 0; errors as `together`."""
        turn = self._next_turn(stage)
        if self.rank == 0:
            outcome, cause = self._attempt(work)
            shares = self._settle(stage, [outcome], lambda values: values[0])
            self._reply(stage, turn, shares)
            return self._unpack(shares[0], cause)  # type: ignore[no-any-return]  # pickled
        return self._await_reply(stage, turn, None)  # type: ignore[no-any-return]  # pickled

    def _meet(
        self,
        stage: str,
        work: Callable[[], T],
        answer: Callable[[list[T]], Sequence[Any]],
    ) -> Any:
        """Post the outcome here, let rank 0 collect all of them, and return its answer."""
        turn = self._next_turn(stage)
        outcome, cause = self._attempt(work)
        if self.rank == 0:
            outcomes = [outcome, *self._collect(stage, turn)]
            shares = self._settle(stage, outcomes, answer)
            # Every rank has read all earlier replies: it has come this far.
            self._forget_spent(stage)
            self._reply(stage, turn, shares)
            return self._unpack(shares[0], cause)
        self._set(f"{turn}/{self.rank}", outcome, stage)
        return self._await_reply(stage, turn, cause)

    def _next_turn(self, stage: str) -> str:
        """Name a turn. By its stage: a rank that left early must not be answered by another one."""
        self._turns[stage] += 1
        return f"{self._channel}/{self._conversation}/{stage}/{self._turns[stage]}"

    def _attempt(self, work: Callable[[], T]) -> tuple[tuple[str, Any], BaseException | None]:
        try:
            return ("value", work()), None
        except CheckpointError as error:
            return ("ours", error), error
        except Exception as error:  # noqa: BLE001  # told to every rank, and raised there
            # A description, since not every exception can be pickled, or read back.
            return ("failure", RankFailure.of(self.rank, error)), error

    def _settle(
        self,
        stage: str,
        outcomes: list[tuple[str, Any]],
        answer: Callable[[list[Any]], Sequence[Any]],
    ) -> list[tuple[str, Any]]:
        """Make each rank's share: of the answer, or of one failure that all of them raise."""
        verdict = self._judge(stage, outcomes)
        if verdict is not None:
            return [("error", verdict)] * self.world_size
        try:
            return [("value", share) for share in answer([value for _, value in outcomes])]
        except CheckpointError as error:  # the others wait for a word
            return [("error", error)] * self.world_size
        except Exception as error:  # noqa: BLE001  # likewise
            failed = StageFailedError(stage, [RankFailure.of(self.rank, error)])
            return [("error", failed)] * self.world_size

    @staticmethod
    def _judge(stage: str, outcomes: list[tuple[str, Any]]) -> CheckpointError | None:
        for rank, (kind, value) in enumerate(outcomes):
            if kind == "ours":
                error: CheckpointError = value
                error.add_note(f'raised on rank {rank} in stage "{stage}"')  # it travels along
                return error
        failures = [value for kind, value in outcomes if kind == "failure"]
        return StageFailedError(stage, failures) if failures else None

    @staticmethod
    def _unpack(share: tuple[str, Any], cause: BaseException | None) -> Any:
        kind, value = share
        if kind == "value":
            return value
        verdict: CheckpointError = value
        if verdict is cause:
            raise verdict
        raise verdict from cause

    # -- the store -------------------------------------------------------------------------------

    def _collect(self, stage: str, turn: str) -> list[tuple[str, Any]]:
        """Wait for the outcome of every other rank and name those that never came."""
        deadline = time.monotonic() + self.timeout_seconds
        keys = [f"{turn}/{rank}" for rank in range(1, self.world_size)]
        missing = [
            rank
            for rank, key in enumerate(keys, 1)
            if not self._wait(key, deadline - time.monotonic())
        ]
        if missing:
            verdict = StageTimeoutError(stage, missing, self.timeout_seconds)
            self._reply(stage, turn, [("error", verdict)] * self.world_size)
            raise verdict
        self._spent_keys += keys
        return [self._get(key, stage) for key in keys]

    def _reply(self, stage: str, turn: str, shares: list[tuple[str, Any]]) -> None:
        for rank, share in enumerate(shares):
            if rank > 0:
                key = f"{turn}/reply/{rank}"
                self._set(key, share, stage)
                self._spent_keys.append(key)

    def _await_reply(self, stage: str, turn: str, cause: BaseException | None) -> Any:
        key = f"{turn}/reply/{self.rank}"
        if not self._wait(key, self.timeout_seconds + _FOLLOWER_GRACE_SECONDS):
            raise StageTimeoutError(stage, [0], self.timeout_seconds) from cause
        return self._unpack(self._get(key, stage), cause)

    def _forget_spent(self, stage: str) -> None:
        spent, self._spent_keys = self._spent_keys, []
        try:
            for key in spent:
                self._store.delete_key(key)
        except RuntimeError as error:
            raise StageFailedError(stage, [_lost_contact(self.rank, error)]) from error

    def _wait(self, key: str, seconds: float) -> bool:
        """Whether the key appears within so many seconds."""
        try:
            self._store.wait([key], timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError:  # DistStoreError on a timeout, DistNetworkError when the store is gone
            return False
        return True

    def _set(self, key: str, value: tuple[str, Any], stage: str) -> None:
        content = pickle.dumps(value)
        try:
            self._store.set(key, content)
        except RuntimeError as error:
            raise StageFailedError(stage, [_lost_contact(self.rank, error)]) from error

    def _get(self, key: str, stage: str) -> tuple[str, Any]:
        try:
            content = self._store.get(key)
        except RuntimeError as error:
            raise StageFailedError(stage, [_lost_contact(self.rank, error)]) from error
        value: tuple[str, Any] = pickle.loads(content)  # noqa: S301  # written by a rank of this job
        return value


def _lost_contact(rank: int, error: BaseException) -> RankFailure:
    reason = f"lost contact with the rendezvous store; has rank 0 died? {error}"
    return RankFailure(rank, type(error).__name__, reason)


def open_channels(count: int, timeout_seconds: float) -> list[Coordinator]:
    """Open independent channels, one for each thread that will talk; every rank calls this alike.

    Without an initialised torch.distributed, or with one rank, each is a `SingleProcess`.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [SingleProcess() for _ in range(count)]
    if distributed.get_world_size() == 1:
        return [SingleProcess() for _ in range(count)]
    store: Any = distributed.distributed_c10d._get_default_store()
    instance = next(_instances)
    return [
        StoreCoordinator(
            store.clone(),  # a client of its own: a blocking wait holds the client's lock
            distributed.get_rank(),
            distributed.get_world_size(),
            timeout_seconds,
            f"holdfast/{instance}/{number}",
        )
        for number in range(count)
    ]
