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
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from holdfast.errors import CheckpointError, RankFailure, StageFailedError, StageTimeoutError

T = TypeVar("T")
R = TypeVar("R")

_FOLLOWER_GRACE_SECONDS = 5.0
"""Followers wait this much longer than the leader, so that its verdict names who is missing."""

_ENTRY = "entry"
"""Where ranks meet first in each call, whatever they call the stage."""
_CALLS_KEPT = 4
"""A rank that misses this many calls in a row is not met again; the others waited in each."""

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

    def begin(self, stage: str, enter: Callable[[], str], admit: Callable[[], R]) -> tuple[int, R]:
        """Meet the other ranks in a new call, wherever each of them left the calls before.

        A rank that was late and found the others gone, or that missed whole calls of theirs, meets
        them again here. `enter` runs on every rank and says which call this is, or refuses it;
        where all say the same, `admit` runs on rank 0. `stage`: how errors name this.

        Returns:
            The number of the call, which rank 0 counts, and what `admit` returned.

        Raises:
            StageFailedError: ranks are in different calls; otherwise as `all_reduce`.
        """
        ...

    def follow(self, call: int) -> None:
        """Leave whatever was said before: from here on ranks meet in this call only."""
        ...

    def all_gather(self, stage: str, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return everyone's result, in rank order."""
        ...

    def gather(self, stage: str, work: Callable[[], T]) -> list[T] | None:
        """As `all_gather`, but only rank 0 is given the results; the others get None."""
        ...

    def all_reduce(self, stage: str, work: Callable[[], T], judge: Callable[[list[T]], R]) -> R:
        """Run `work` on every rank, let rank 0 judge all results; return its verdict on every rank.

        What each rank is told does not grow with the number of ranks, as with `all_gather` it does.
        """
        ...

    def broadcast(self, stage: str, work: Callable[[], T]) -> T:
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

    def begin(self, stage: str, enter: Callable[[], str], admit: Callable[[], R]) -> tuple[int, R]:
        """Enter here: nobody can be late."""
        self.broadcast(stage, enter)
        return 0, self.broadcast(stage, admit)

    def follow(self, call: int) -> None:
        """Nobody can be late."""

    def all_gather(self, stage: str, work: Callable[[], T]) -> list[T]:
        """Run the work here."""
        return [self.broadcast(stage, work)]

    def gather(self, stage: str, work: Callable[[], T]) -> list[T] | None:
        """Run the work here."""
        return [self.broadcast(stage, work)]

    def all_reduce(self, stage: str, work: Callable[[], T], judge: Callable[[list[T]], R]) -> R:
        """Run the work here, and judge it."""
        return self.broadcast(stage, lambda: judge([work()]))

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
            raise StageFailedError(stage, [RankFailure.of(0, error)]) from error

    def scatter(self, stage: str, work: Callable[[], Sequence[T]]) -> T:
        """Run the work here."""
        return self.broadcast(stage, work)[0]


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
        self._call = 0
        self._turns: Counter[str] = Counter()
        self._spent_keys: list[str] = []

    def begin(self, stage: str, enter: Callable[[], str], admit: Callable[[], R]) -> tuple[int, R]:
        """Meet where rank 0 is now, at one key for all calls; errors as `all_gather`.

        Raises:
            StageFailedError: ranks are in different calls.
        """
        outcome, cause = self._attempt(enter)
        self.follow(self._find_call(stage, outcome))

        def judge(calls: list[str]) -> R:
            _check_same_call(stage, calls)
            return admit()

        verdict: R = self._exchange(
            stage,
            self._next_turn(_ENTRY),
            outcome,
            cause,
            lambda calls: [judge(calls)] * self.world_size,
        )
        return self._call, verdict

    def _find_call(self, stage: str, own: tuple[str, Any]) -> int:
        """Return the number of the call that rank 0 begins now, or is in.

        `own`: the name of this rank's call, or its failure. A rank that is late in the same call is
        answered there, with the verdict that the others were given. One that comes with another
        call when that one has been decided without it waits for the next.
        """
        newest, begun = f"{self._channel}/call", f"{self._channel}/begun"
        call: int = self._call + 1
        if self.rank == 0:
            self._set(newest, (call, own[1] if own[0] == "value" else None), stage)
            self._set(f"{begun}/{call}", call, stage)
            if call > _CALLS_KEPT:
                self._spent_keys.append(f"{begun}/{call - _CALLS_KEPT}")
            return call
        while True:
            if not self._wait(f"{begun}/{call}", self.timeout_seconds + _FOLLOWER_GRACE_SECONDS):
                raise StageTimeoutError(stage, [0], self.timeout_seconds)
            call, name = self._get(newest, stage)
            is_late = own != ("value", name) and self._is_there(
                f"{self._channel}/{call}/{_ENTRY}/1/reply/{self.rank}", stage
            )
            if not is_late:
                return call
            call += 1

    def follow(self, call: int) -> None:
        """Meet at other keys than before."""
        self._call = call
        self._turns.clear()

    def all_gather(self, stage: str, work: Callable[[], T]) -> list[T]:
        """Run the work on every rank.

        Raises:
            CheckpointError: raised by the work itself, on the lowest rank that did; on every rank.
            StageFailedError: the work raised anything else, on any rank; on every rank.
            StageTimeoutError: ranks did not arrive in time.
        """
        everything: list[T] = self._meet(stage, work, lambda outcomes: [outcomes] * self.world_size)
        return everything

    def gather(self, stage: str, work: Callable[[], T]) -> list[T] | None:
        """Run the work on every rank; errors as `all_gather`."""
        nothing = [None] * (self.world_size - 1)
        share: list[T] | None = self._meet(stage, work, lambda outcomes: [outcomes, *nothing])
        return share

    def all_reduce(self, stage: str, work: Callable[[], T], judge: Callable[[list[T]], R]) -> R:
        """Run the work on every rank and judge it on rank 0; errors as `all_gather`."""
        verdict: R = self._meet(stage, work, lambda outcomes: [judge(outcomes)] * self.world_size)
        return verdict

    def broadcast(self, stage: str, work: Callable[[], T]) -> T:
        """Run the work on rank 0; errors as `all_gather`."""
        return self.scatter(stage, lambda: [work()] * self.world_size)

    def scatter(self, stage: str, work: Callable[[], Sequence[T]]) -> T:
        """Run the work on rank 0; errors as `all_gather`."""
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
        turn = self._next_turn(stage)
        outcome, cause = self._attempt(work)
        return self._exchange(stage, turn, outcome, cause, answer)

    def _exchange(
        self,
        stage: str,
        turn: str,
        outcome: tuple[str, Any],
        cause: BaseException | None,
        answer: Callable[[list[Any]], Sequence[Any]],
    ) -> Any:
        """Post the outcome here, let rank 0 collect all of them, and return its answer."""
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
        return f"{self._channel}/{self._call}/{stage}/{self._turns[stage]}"

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

    def _is_there(self, key: str, stage: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:
            raise StageFailedError(stage, [_lost_contact(self.rank, error)]) from error

    def _set(self, key: str, value: Any, stage: str) -> None:
        content = pickle.dumps(value)
        try:
            self._store.set(key, content)
        except RuntimeError as error:
            raise StageFailedError(stage, [_lost_contact(self.rank, error)]) from error

    def _get(self, key: str, stage: str) -> Any:
        try:
            content = self._store.get(key)
        except RuntimeError as error:
            raise StageFailedError(stage, [_lost_contact(self.rank, error)]) from error
        return pickle.loads(content)  # noqa: S301  # written by a rank of this job


def _lost_contact(rank: int, error: BaseException) -> RankFailure:
    reason = f"lost contact with the rendezvous store; has rank 0 died? {error}"
    return RankFailure(rank, type(error).__name__, reason)


def _check_same_call(stage: str, calls: Sequence[str]) -> None:
    """Judge whether all ranks are in the same call; `calls`: what each says, by rank.

    Raises:
        StageFailedError: naming the ranks that are in another one than rank 0.
    """
    others = [
        RankFailure(rank, "OtherCall", f"is in {call}, and rank 0 in {calls[0]}")
        for rank, call in enumerate(calls)
        if call != calls[0]
    ]
    if others:
        raise StageFailedError(stage, others)


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


class Channels:
    """The channels of one manager, for its calls and for each thread of its own; opened late.

    torch.distributed may be initialised after the manager is made, and before its first call.
    """

    def __init__(self, count: int, timeout_seconds: float) -> None:
        self._count = count
        self._timeout_seconds = timeout_seconds
        self._channels: list[Coordinator] = []

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
        if not self._channels:
            self._channels = open_channels(self._count, self._timeout_seconds)
        return self._channels

    def begin_call(
        self,
        stage: str,
        enter: Callable[[], str],
        admit: Callable[[], R],
        in_use: Collection[int] = (),
    ) -> R:
        """Meet the other ranks in a new call and return what `admit` did; see `Coordinator.begin`.

        `in_use`: numbers of channels that are still being talked on, and stay in their call.
        """
        control, *others = self.open()
        call, admitted = control.begin(stage, enter, admit)
        for number, each in enumerate(others, 1):
            if number not in in_use:
                each.follow(call)
        return admitted
