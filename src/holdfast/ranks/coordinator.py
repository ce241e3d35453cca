"""Ranks agree on values and on failures.

Owns how ranks wait for one another: through the rendezvous store, with a deadline in every wait,
and never in a collective. Promises that a stage which fails on one rank fails on all of them with
the same named reason, that a rank which never arrives is named, and that any thread may hold a
channel of its own beside the trainer's process groups. The requests that a rank sends do not grow
in number with the ranks, where the store can append; a verdict is stored once for all. The single
process is the null case and needs no torch.distributed. How ranks enter a call is in `entry`; one
that a rank refuses before it begins reaches the others through `Channels.begin_call`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from holdfast.errors import CheckpointError, RankFailure, StageFailedError, StageTimeoutError
from holdfast.ranks.entry import (
    FOLLOWER_GRACE_SECONDS,
    NOTICE_SECONDS,
    Arrival,
    CallEntry,
    Entry,
    Outcome,
    Ruling,
    attempt,
    name_ranks,
)
from holdfast.ranks.rendezvous import StoreClient
from holdfast.ranks.single import SingleProcess as SingleProcess

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_FEW_RANKS = 4
"""With so few ranks, one list of outcomes takes more requests than a key for each."""
_LOOKS = 4
"""How often a follower looks, within one deadline, whether rank 0 has gone on to what follows."""


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

    def begin_as(
        self,
        stage: str,
        arrival: Arrival,
        cause: BaseException | None,
        admit: Callable[[bool], R],
    ) -> Ruling[R]:
        """As `begin`, with an arrival made before; `cause`: what its failure is made from.

        `admit` is told whether all ranks have a copy.
        """
        ...

    def decline(self, stage: str, name: str | None) -> None:
        """Before `begin_as`: tell ranks that may come alike that this one does not.

        `begin`, and `begin_as` on the training thread, do so themselves. `name`: of the call; None:
        it is refused here.
        """
        ...

    def begin_alike(self, stage: str, entry: Entry, admit: Callable[[], R]) -> R:
        """As `begin`, where all ranks are expected to come with this entry: by one counter.

        Only after `expect_alike`, which all ranks call once they have completed a call together.

        Raises:
            OthersDifferError: they do not all come with it; call `begin_as`.
            StageTimeoutError: ranks did not come.
        """
        ...

    def expect_alike(self) -> None:
        """Record that all ranks completed the last call, so that any may come alike to the next."""
        ...

    @property
    def call(self) -> object:
        """The call that the ranks are in, for `follow` on other channels."""
        ...

    def follow(self, call: object) -> None:
        """Use the keys of this call from here on; what earlier calls left behind is not read."""
        ...

    def all_gather(self, stage: str, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return everyone's result, in rank order."""
        ...

    def gather(self, stage: str, work: Callable[[], T]) -> list[T] | None:
        """As `all_gather`, but only rank 0 is given the results; the others get None."""
        ...

    def all_reduce(
        self,
        stage: str,
        work: Callable[[], T],
        judge: Callable[[list[T]], R],
        *,
        then: str | None = None,
    ) -> R:
        """Run `work` on every rank, let rank 0 judge all results; return its verdict on every rank.

        What each rank receives does not grow with the number of ranks; with `all_gather` it does.
        `then`: the stage that judging is, where it takes a while.
        """
        ...

    def broadcast(self, stage: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone and return its result on every rank."""
        ...

    def scatter(self, stage: str, work: Callable[[], Sequence[T]]) -> T:
        """Run `work` on rank 0 alone and return its n-th result on rank n."""
        ...


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
        self._call: object = 0
        self._entry = CallEntry(self, self._store, channel)
        self._turns: Counter[str] = Counter()
        self._spent_keys: list[str] = []
        """Keys that all ranks have read once they come to the next turn."""
        self._spent_before = 0
        """How many such keys there were before, of which each rank deletes its share."""

    def begin(
        self, stage: str, enter: Callable[[], Entry], admit: Callable[[], R]
    ) -> tuple[int, R]:
        """Begin the call that rank 0 begins now, or is in; errors as `all_gather`.

        Raises:
            StageFailedError: ranks are in different calls.
        """
        outcome, cause = self.attempt(enter)
        ruling = self.begin_as(stage, Arrival(outcome, stage), cause, lambda _: admit())
        return ruling.call, ruling.unpack(cause)

    def begin_as(
        self,
        stage: str,
        arrival: Arrival,
        cause: BaseException | None,
        admit: Callable[[bool], R],
    ) -> Ruling[R]:
        """Begin the call that rank 0 begins now, or is in."""
        if not arrival.in_background:
            kind, value = arrival.outcome
            self.decline(stage, value[0] if kind == "value" and value else None)
        return self._entry.begin(stage, arrival, cause, admit)

    def decline(self, stage: str, name: str | None) -> None:
        """Tell ranks that may come alike that this one does not."""
        self._entry.decline(stage, name)

    def begin_alike(self, stage: str, entry: Entry, admit: Callable[[], R]) -> R:
        """Begin a call by one counter."""
        return self._entry.enter_alike(stage, entry, admit)

    def expect_alike(self) -> None:
        """Let ranks come alike to the next call."""
        self._entry.expect_alike()

    @property
    def call(self) -> object:
        """The call that this channel is in."""
        return self._call

    @property
    def _shares_list(self) -> bool:
        """Whether ranks append the outcomes of a turn to one list: one request for rank 0."""
        return self.world_size > self._list_above and self._store.has_lists

    def follow(self, call: object) -> None:
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

    def all_reduce(
        self,
        stage: str,
        work: Callable[[], T],
        judge: Callable[[list[T]], R],
        *,
        then: str | None = None,
    ) -> R:
        """Run the work on every rank and judge it on rank 0; errors as `all_gather`."""
        verdict: R = self._run_on_all(stage, work, judge, then)
        return verdict

    def broadcast(self, stage: str, work: Callable[[], T]) -> T:
        """Run the work on rank 0; errors as `all_gather`."""
        turn = self.next_turn(stage)
        if self.rank > 0:
            self.note_spent([f"{turn}/reply"])
            return self._unpack(self._await_reply(stage, turn), None)  # type: ignore[no-any-return]  # pickled
        outcome, cause = self.attempt(work)
        verdict = self._settle(stage, [outcome], lambda values: values[0])
        self._reply(stage, turn, verdict)
        self.note_spent([f"{turn}/reply"])
        return self._unpack(verdict, cause)  # type: ignore[no-any-return]  # pickled

    def scatter(self, stage: str, work: Callable[[], Sequence[T]]) -> T:
        """Run the work on rank 0; errors as `all_gather`."""
        turn = self.next_turn(stage)
        keys = [f"{turn}/{rank}/reply" for rank in range(1, self.world_size)]
        self.note_spent(keys)
        if self.rank > 0:
            verdict = self._await_reply(stage, f"{turn}/{self.rank}")
            return self._unpack(verdict, None)  # type: ignore[no-any-return]  # pickled
        outcome, cause = self.attempt(work)
        kind, value = self._settle(stage, [outcome], lambda values: values[0])
        shares = (
            [(kind, each) for each in value]
            if kind == "value"
            else [(kind, value)] * self.world_size
        )
        self._store.set_many(keys, shares[1:], stage)
        return self._unpack(shares[0], cause)  # type: ignore[no-any-return]  # pickled

    def _run_on_all(
        self,
        stage: str,
        work: Callable[[], T],
        answer: Callable[[list[T]], Any],
        then: str | None = None,
    ) -> Any:
        turn = self.next_turn(stage)
        outcome, cause = self.attempt(work)
        return self.exchange(stage, turn, outcome, cause, answer, then)

    def exchange(
        self,
        stage: str,
        turn: str,
        outcome: Outcome,
        cause: BaseException | None,
        answer: Callable[[list[Any]], Any],
        then: str | None = None,
    ) -> Any:
        """Post the outcome here, let rank 0 collect all of them, and return its answer."""
        posted = (
            [f"{turn}/{each}" for each in ("list", "count", "full")]
            if self._shares_list
            else [f"{turn}/{rank}" for rank in range(1, self.world_size)]
        )
        if then is not None:
            posted.append(f"{turn}/then")
        if self.rank == 0:
            outcomes = self._collect(stage, turn, outcome, cause)
            if then is not None:
                self._store.set(f"{turn}/then", None, stage)
            verdict = self._settle(then or stage, outcomes, answer, stage)
            self._reply(stage, turn, verdict)
        else:
            self._post(stage, turn, outcome)
            verdict = self._await_reply(stage, turn, then)
        if not isinstance(verdict[1], StageTimeoutError):
            # Every rank has read all earlier replies: it has come this far.
            self.forget_spent(stage)
            self.note_spent([*posted, f"{turn}/reply"])
        return self._unpack(verdict, cause)

    def next_turn(self, stage: str) -> str:
        """Name a turn. By its stage: a rank that left early must not be answered by another one."""
        self._turns[stage] += 1
        return f"{self._channel}/{self._call}/{stage}/{self._turns[stage]}"

    def attempt(self, work: Callable[[], T]) -> tuple[tuple[str, Any], BaseException | None]:
        return attempt(self.rank, work)

    def _settle(
        self,
        stage: str,
        outcomes: list[tuple[str, Any]],
        answer: Callable[[list[Any]], Any],
        worked_in: str | None = None,
    ) -> tuple[str, Any]:
        """Make the verdict: the answer, or one failure that all ranks raise.

        `worked_in`: the stage of the outcomes, where that is another than that of the answer.
        """
        failure = self._judge(worked_in or stage, outcomes)
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
        for patience in (min(NOTICE_SECONDS, self.timeout_seconds), self.timeout_seconds):
            if missing and patience > NOTICE_SECONDS:
                logger.warning('waiting for %s in stage "%s"', name_ranks(missing), stage)
            is_full = self._store.wait(awaited, began + patience - time.monotonic(), stage)
            arrived = self._read_outcomes(stage, turn, keys, is_full=is_full)
            missing = [rank for rank in range(1, self.world_size) if rank not in arrived]
            if not missing:
                break
        outcomes = [own, *(arrived[rank] for rank in sorted(arrived))]
        if missing:
            failures = [
                value if kind == "failure" else RankFailure.of(rank, value)
                for rank, (kind, value) in zip(
                    [0, *sorted(arrived)], map(_inner, outcomes), strict=True
                )
                if kind != "value"
            ]
            verdict = "error", StageTimeoutError(stage, missing, self.timeout_seconds, failures)
            self._reply(stage, turn, verdict)
            self._unpack(verdict, cause)
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
        self._store.set(f"{turn}/reply", verdict, stage)

    def _await_reply(self, stage: str, turn: str, then: str | None = None) -> Outcome:
        """Wait for rank 0's verdict; `then`: the stage it goes on to when it has all outcomes."""
        key, timeout = f"{turn}/reply", self.timeout_seconds
        patience = timeout + FOLLOWER_GRACE_SECONDS
        looks = 1 if then is None else _LOOKS
        until = time.monotonic() + patience
        while True:
            verdict: Outcome | None = self._store.get_within(key, patience / looks, stage)
            if verdict is not None:
                return verdict
            if then is not None and self._store.is_there(f"{turn}/then", stage):
                stage, then, until = then, None, time.monotonic() + patience
            if time.monotonic() >= until - 0.05 * patience:
                return "error", StageTimeoutError(stage, [0], timeout)

    def note_spent(self, keys: Sequence[str]) -> None:
        """Note keys of this turn, every rank the same; they are deleted after the next one."""
        self._spent_keys += keys

    def forget_spent(self, stage: str) -> None:
        """Delete this rank's share of the keys that all ranks have read."""
        spent, self._spent_keys = self._spent_keys, []
        first, self._spent_before = self._spent_before, self._spent_before + len(spent)
        own = (self.rank - first) % self.world_size
        self._store.delete(spent[own :: self.world_size], stage)


def _inner(outcome: Outcome) -> Outcome:
    """Return how a rank arrived, or any other outcome itself."""
    return outcome[1].outcome if isinstance(outcome[1], Arrival) else outcome
