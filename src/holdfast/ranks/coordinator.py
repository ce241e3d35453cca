"""Ranks agree on values and on failures.

Owns how ranks wait for one another: through the rendezvous store, with a deadline in every wait,
and never in a collective. Promises that a stage which fails on one rank fails on all of them with
the same named reason, that a rank which never arrives is named, and that any thread may hold a
channel of its own beside the trainer's process groups. The requests that a rank sends do not grow
in number with the ranks, where the store can append; a verdict is stored once for all. The single
process is the null case and needs no torch.distributed. A call that one rank refuses before it
begins reaches the others through `Channels.begin_call`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from holdfast.errors import CheckpointError, RankFailure, StageFailedError, StageTimeoutError
from holdfast.ranks.rendezvous import StoreClient

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

Entry = tuple[str, ...]
"""The name of a call, and the settings that all ranks must have alike in it, as `name=value`."""

_FOLLOWER_GRACE_SECONDS = 5.0
"""Followers wait this much longer than the leader, so that its verdict names who is missing."""

_NOTICE_SECONDS = 20.0
"""Rank 0 logs which ranks it still waits for after this long, once in each stage."""
_ENTRY = "entry"
"""The first exchange of each call has this name, whatever its stage is called."""
_FEW_RANKS = 4
"""With so few ranks, one list of outcomes takes more requests than a key for each."""
_CALLS_KEPT = 4
"""A rank that misses this many calls in a row is not met again; the others waited in each."""


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

    def begin(
        self, stage: str, enter: Callable[[], Entry], admit: Callable[[], R]
    ) -> tuple[int, R]:
        """Begin a call together with the other ranks, wherever each of them left the calls before.

        A rank that was late and found the others gone, or that missed whole calls of theirs, joins
        them again here. `enter` runs on every rank and returns which call this is, or refuses it;
        where all return the same, `admit` runs on rank 0. `stage`: how errors name this.

        Returns:
            The number of the call, which rank 0 counts, and what `admit` returned.

        Raises:
            StageFailedError: ranks are in different calls, or have different settings; otherwise as
                `all_reduce`.
        """
        ...

    def follow(self, call: int) -> None:
        """Use the keys of this call from here on; what earlier calls left behind is not read."""
        ...

    def all_gather(self, stage: str, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return everyone's result, in rank order."""
        ...

    def gather(self, stage: str, work: Callable[[], T]) -> list[T] | None:
        """As `all_gather`, but only rank 0 is given the results; the others get None."""
        ...

    def all_reduce(self, stage: str, work: Callable[[], T], judge: Callable[[list[T]], R]) -> R:
        """Run `work` on every rank, let rank 0 judge all results; return its verdict on every rank.

        What each rank receives does not grow with the number of ranks; with `all_gather` it does.
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

    def begin(
        self, stage: str, enter: Callable[[], Entry], admit: Callable[[], R]
    ) -> tuple[int, R]:
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
    """Ranks exchange values through keys of the job's rendezvous store, each by its own client."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        channel: str,
        *,
        list_above: int = _FEW_RANKS,
    ) -> None:
        """`list_above`: with more ranks than this, their outcomes are appended to one list."""
        self.rank = rank
        self.world_size = world_size
        self._store = StoreClient(store, rank)
        self.timeout_seconds = timeout_seconds
        self._channel = channel
        self._list_above = list_above
        self._call = 0
        self._was_late = False
        """Whether this rank came to the last call when that had been decided without it."""
        self._turns: Counter[str] = Counter()
        self._spent_keys: list[str] = []

    def begin(
        self, stage: str, enter: Callable[[], Entry], admit: Callable[[], R]
    ) -> tuple[int, R]:
        """Begin the call that rank 0 begins now, or is in; errors as `all_gather`.

        Raises:
            StageFailedError: ranks are in different calls.
        """
        outcome, cause = self._attempt(enter)
        call = self._find_call(stage, outcome)
        self.follow(call)

        def judge(calls: list[Entry]) -> R:
            _check_same_call(stage, calls)
            return admit()

        verdict: R = self._exchange(
            stage,
            self._next_turn(_ENTRY),
            outcome,
            cause,
            judge,
        )
        return call, verdict

    @property
    def _shares_list(self) -> bool:
        """Whether ranks append the outcomes of a turn to one list: one request for rank 0."""
        return self.world_size > self._list_above and self._store.has_lists

    def _find_call(self, stage: str, own: tuple[str, Any]) -> int:
        """Return the number of the call that rank 0 begins now, or is in.

        `own`: this rank's call, or its failure. A rank that is late in the same call is answered
        there, with the verdict that the others were given. One that comes with another call when
        that one has been decided without it waits for the next; and so does one that was late the
        last time too: it lags behind by a call of the same name, and would do so for ever.
        """
        newest, joined = f"{self._channel}/calls", f"{self._channel}/joined/{self.rank}"
        if self.rank == 0:
            call = self._store.add(newest, 0, stage) + 1
            # Its name first: a rank that sees the number must not wait for the name of a dead rank.
            self._store.set(self._begun(call), own[1][0] if own[0] == "value" else None, stage)
            self._store.add(newest, 1, stage)
            if call > _CALLS_KEPT:
                self._spent_keys.append(self._begun(call - _CALLS_KEPT))
            return call
        # Counted also by other coordinators of this channel.
        call = last = self._store.add(joined, 0, stage)
        while True:
            begun = self._begun(call + 1)
            if not self._store.wait([begun], self.timeout_seconds + _FOLLOWER_GRACE_SECONDS):
                raise StageTimeoutError(stage, [0], self.timeout_seconds)
            call = max(call + 1, self._store.add(newest, 0, stage))
            is_same = own[0] == "value" and own[1][0] == self._store.get(self._begun(call), stage)
            reply = f"{self._channel}/{call}/{_ENTRY}/1/reply"
            is_decided = self._store.is_there(reply, stage)
            if not is_decided or (is_same and not self._was_late):
                self._was_late = is_decided
                self._store.add(joined, call - last, stage)
                return call

    def _begun(self, call: int) -> str:
        return f"{self._channel}/begun/{call}"

    def follow(self, call: int) -> None:
        """Use other keys than before."""
        self._call = call
        self._turns.clear()

    def all_gather(self, stage: str, work: Callable[[], T]) -> list[T]:
        """Run the work on every rank.

        Raises:
            CheckpointError: raised by the work itself, on the lowest rank that did; on every rank.
            StageFailedError: the work raised anything else, on any rank; on every rank.
            StageTimeoutError: ranks did not arrive in time.
        """
        everything: list[T] = self._run_on_all(stage, work, lambda outcomes: outcomes)
        return everything

    def gather(self, stage: str, work: Callable[[], T]) -> list[T] | None:
        """Run the work on every rank; errors as `all_gather`."""
        found: list[T] = []
        self._run_on_all(stage, work, found.extend)
        return found if self.rank == 0 else None

    def all_reduce(self, stage: str, work: Callable[[], T], judge: Callable[[list[T]], R]) -> R:
        """Run the work on every rank and judge it on rank 0; errors as `all_gather`."""
        verdict: R = self._run_on_all(stage, work, judge)
        return verdict

    def broadcast(self, stage: str, work: Callable[[], T]) -> T:
        """Run the work on rank 0; errors as `all_gather`."""
        turn = self._next_turn(stage)
        if self.rank > 0:
            return self._await_reply(stage, f"{turn}/reply", None)  # type: ignore[no-any-return]  # pickled
        outcome, cause = self._attempt(work)
        verdict = self._settle(stage, [outcome], lambda values: values[0])
        self._reply(stage, turn, verdict)
        return self._unpack(verdict, cause)  # type: ignore[no-any-return]  # pickled

    def scatter(self, stage: str, work: Callable[[], Sequence[T]]) -> T:
        """Run the work on rank 0; errors as `all_gather`."""
        turn = self._next_turn(stage)
        if self.rank > 0:
            key = f"{turn}/reply/{self.rank}"
            return self._await_reply(stage, key, None)  # type: ignore[no-any-return]  # pickled
        outcome, cause = self._attempt(work)
        kind, value = self._settle(stage, [outcome], lambda values: values[0])
        shares = (
            [(kind, each) for each in value]
            if kind == "value"
            else [(kind, value)] * self.world_size
        )
        keys = [f"{turn}/reply/{rank}" for rank in range(1, self.world_size)]
        self._store.set_many(keys, shares[1:], stage)
        self._spent_keys += keys
        return self._unpack(shares[0], cause)  # type: ignore[no-any-return]  # pickled

    def _run_on_all(
        self,
        stage: str,
        work: Callable[[], T],
        answer: Callable[[list[T]], Any],
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
        answer: Callable[[list[Any]], Any],
    ) -> Any:
        """Post the outcome here, let rank 0 collect all of them, and return its answer."""
        if self.rank == 0:
            outcomes = self._collect(stage, turn, outcome, cause)
            verdict = self._settle(stage, outcomes, answer)
            # Every rank has read all earlier replies: it has come this far.
            self._forget_spent(stage)
            self._reply(stage, turn, verdict)
            return self._unpack(verdict, cause)
        self._post(stage, turn, outcome)
        return self._await_reply(stage, f"{turn}/reply", cause)

    def _next_turn(self, stage: str) -> str:
        """Name a turn. By its stage: a rank that left early must not be answered by another one."""
        self._turns[stage] += 1
        return f"{self._channel}/{self._call}/{stage}/{self._turns[stage]}"

    def _attempt(self, work: Callable[[], T]) -> tuple[tuple[str, Any], BaseException | None]:
        try:
            return ("value", work()), None
        except CheckpointError as error:
            return ("ours", error), error
        except BaseException as error:  # noqa: BLE001  # reported to every rank, and raised there
            # A description, since not every exception can be pickled, or read back.
            return ("failure", RankFailure.of(self.rank, error)), error

    def _settle(
        self,
        stage: str,
        outcomes: list[tuple[str, Any]],
        answer: Callable[[list[Any]], Any],
    ) -> tuple[str, Any]:
        """Make the verdict: the answer, or one failure that all ranks raise."""
        failure = self._judge(stage, outcomes)
        if failure is not None:
            return "error", failure
        try:
            return "value", answer([value for _, value in outcomes])
        except CheckpointError as error:  # the others wait for a word
            return "error", error
        except Exception as error:  # noqa: BLE001  # likewise
            return "error", StageFailedError(stage, [RankFailure.of(self.rank, error)])

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
        if cause is not None and (verdict is cause or not isinstance(cause, Exception)):
            raise cause  # SystemExit, say: it is for this process, and the others know of it
        raise verdict from cause

    # -- the store -------------------------------------------------------------------------------

    def _post(self, stage: str, turn: str, outcome: tuple[str, Any]) -> None:
        """Give rank 0 this rank's outcome. The last one to append to the list says so."""
        if not self._shares_list:
            self._store.set(f"{turn}/{self.rank}", outcome, stage)
            return
        self._store.append(f"{turn}/list", outcome, stage)
        if self._store.add(f"{turn}/count", 1, stage) == self.world_size - 1:
            self._store.set(f"{turn}/full", None, stage)

    def _collect(
        self, stage: str, turn: str, own: tuple[str, Any], cause: BaseException | None
    ) -> list[tuple[str, Any]]:
        """Wait for the outcome of every other rank; return all of them, in rank order.

        Raises:
            StageTimeoutError: with the ranks that never came, and what failed on those that did.
        """
        keys = [f"{turn}/{rank}" for rank in range(1, self.world_size)]
        awaited = [f"{turn}/full"] if self._shares_list else keys
        began = time.monotonic()
        arrived: dict[int, tuple[str, Any]] = {}
        missing: list[int] = []
        for patience in (min(_NOTICE_SECONDS, self.timeout_seconds), self.timeout_seconds):
            if missing and patience > _NOTICE_SECONDS:
                logger.warning('waiting for %s in stage "%s"', _name_ranks(missing), stage)
            is_full = self._store.wait(awaited, began + patience - time.monotonic())
            arrived = self._read_outcomes(stage, turn, keys, is_full=is_full)
            missing = [rank for rank in range(1, self.world_size) if rank not in arrived]
            if not missing:
                break
        outcomes = [own, *(arrived[rank] for rank in sorted(arrived))]
        if missing:
            failures = [
                value if kind == "failure" else RankFailure.of(rank, value)
                for rank, (kind, value) in zip([0, *sorted(arrived)], outcomes, strict=True)
                if kind != "value"
            ]
            verdict = "error", StageTimeoutError(stage, missing, self.timeout_seconds, failures)
            self._reply(stage, turn, verdict)
            self._unpack(verdict, cause)
        self._spent_keys += (
            [f"{turn}/{each}" for each in ("list", "count", "full")] if self._shares_list else keys
        )
        return outcomes

    def _read_outcomes(
        self, stage: str, turn: str, keys: Sequence[str], *, is_full: bool
    ) -> dict[int, tuple[str, Any]]:
        """Return the outcomes that have arrived, by rank; `is_full`: all have."""
        if not self._shares_list:
            present = [each for each in keys if is_full or self._store.is_there(each, stage)]
            values = self._store.get_many(present, stage)
            return {
                int(key.rpartition("/")[2]): each for key, each in zip(present, values, strict=True)
            }
        if is_full or self._store.is_there(f"{turn}/list", stage):
            return self._store.get_list(f"{turn}/list", stage)
        return {}

    def _reply(self, stage: str, turn: str, verdict: tuple[str, Any]) -> None:
        """Store the verdict once, where every rank reads it."""
        key = f"{turn}/reply"
        self._store.set(key, verdict, stage)
        self._spent_keys.append(key)

    def _await_reply(self, stage: str, key: str, cause: BaseException | None) -> Any:
        if not self._store.wait([key], self.timeout_seconds + _FOLLOWER_GRACE_SECONDS):
            verdict = StageTimeoutError(stage, [0], self.timeout_seconds)
            return self._unpack(("error", verdict), cause)
        return self._unpack(self._store.get(key, stage), cause)

    def _forget_spent(self, stage: str) -> None:
        spent, self._spent_keys = self._spent_keys, []
        self._store.delete(spent, stage)


def _name_ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{more}"


def _check_same_call(stage: str, calls: Sequence[Entry]) -> None:
    """Judge whether all ranks are in the same call with the same settings.

    Raises:
        StageFailedError: naming the ranks that differ from rank 0.
    """
    first = calls[0]
    others = []
    for rank, call in enumerate(calls):
        if call[0] != first[0]:
            reason = f"is in {call[0]}, and rank 0 in {first[0]}"
            others.append(RankFailure(rank, "OtherCall", reason))
        elif call != first:
            own = [each for each in call if each not in first]
            wanted = [each for each in first if each not in call]
            reason = f"has {', '.join(own)}, and rank 0 has {', '.join(wanted)}"
            others.append(RankFailure(rank, "OtherSettings", reason))
    if others:
        raise StageFailedError(stage, others)
