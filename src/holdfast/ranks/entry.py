"""How the ranks of a job enter one call: a save, a load.

Owns the two ways. `begin` asks every rank how it comes: rank 0 numbers the call, the others join
it wherever they left the calls before, and rank 0 rules on all arrivals. `enter_alike` is for ranks
that expect one another in the same call after one that all of them completed: each adds a number to
one counter and waits for one reply. If they are not in the same call, or some rank declines, every
rank is told so at once, and all turn to `begin`, which finds out who differs. Promises that a rank
which never comes is named, and that ranks which give up waiting are not answered later. Who came is
asked by name only where somebody is missing. Knows nothing about what a call does.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from holdfast.errors import (
    CheckpointError,
    RankFailure,
    SaveGivenUpError,
    StageFailedError,
    StageTimeoutError,
)
from holdfast.messages import list_first
from holdfast.ranks.rendezvous import StoreClient

logger = logging.getLogger(__name__)

R = TypeVar("R")

Entry = tuple[str, ...]
"""The name of a call, and the settings that all ranks must have alike in it, as `name=value`."""
Outcome = tuple[str, Any]
"""What a rank reports: `value`, `ours` (an error of holdfast) or `failure`, and which."""

FOLLOWER_GRACE_SECONDS = 5.0
"""Followers wait this much longer than the leader, so that its verdict names who is missing."""
NOTICE_SECONDS = 20.0
"""Rank 0 logs which ranks it still waits for after this long, once in each stage."""
ENTRY = "entry"
"""The first exchange of each call has this name, whatever its stage is called."""
_CALLS_KEPT = 4
"""A rank that misses this many calls in a row is not met again; the others waited in each."""

_ARRIVAL = 1 << 44
"""One arrival in a counter. Below it is room for the sum of 2**16 numbers of 28 bits."""
_Verdict = tuple[str, str | None, Any]
"""What becomes of those who came alike, in which call, and its value."""
_DIFFER = "differ"
_DIFFERENT: _Verdict = (_DIFFER, None, None)
_TOO_LATE = "too late"
_NAMES = "names"
"""Asks the ranks that are waiting for their names."""
_NAMES_SECONDS = 5.0
"""How long rank 0 waits for the names of ranks of which it knows that they are waiting."""


class OthersDifferError(Exception):
    """Not all ranks are in the call that this one expected: `begin` finds out who differs."""


@dataclass(frozen=True)
class Arrival:
    """How one rank comes to a call."""

    outcome: Outcome
    """Its entry, or why it cannot enter."""
    stage: str
    """In which that was found out."""
    in_background: bool = False
    """Whether its training goes on meanwhile: it counts on being admitted."""
    act_at: int = 0
    """The earliest step at which it can act on a refusal."""
    reason: str = ""
    """Why it is not in the background."""
    plan: bytes = b""
    """By which it has staged, in the background."""
    has_copy: bool = True
    """Whether it has staged what another tier can take, too."""


@dataclass(frozen=True)
class Ruling(Generic[R]):
    """What rank 0 decided on all arrivals."""

    call: int
    admitted: R | None = None
    error: CheckpointError | None = None
    act_at: int | None = None
    """The step at which ranks act on the error that are in the background; None: at once."""

    def unpack(self, cause: BaseException | None = None) -> R:
        """Return what was admitted, or raise the error."""
        if self.error is None:
            return self.admitted  # type: ignore[return-value]  # of whatever type admit has
        if cause is not None and (self.error is cause or not isinstance(cause, Exception)):
            raise cause  # SystemExit, say: it is for this process, and the others know of it
        raise self.error from cause


class Ranks(Protocol):
    """What the entry needs of the coordinator whose calls these are."""

    rank: int
    world_size: int
    timeout_seconds: float

    def exchange(
        self,
        stage: str,
        turn: str,
        outcome: Outcome,
        cause: BaseException | None,
        answer: Callable[[list[Any]], Any],
    ) -> Any: ...
    def next_turn(self, stage: str) -> str: ...
    def follow(self, call: object) -> None: ...
    def note_spent(self, keys: Sequence[str]) -> None: ...
    def forget_spent(self, stage: str) -> None: ...


class CallEntry:
    """The calls of one channel, as one rank enters them."""

    def __init__(self, ranks: Ranks, store: StoreClient, channel: str) -> None:
        self._ranks = ranks
        self._store = store
        self._channel = channel
        self._call = 0
        """The call that this rank entered last by `begin`."""
        self._alike = 0
        """How often it came to `enter_alike` since."""
        self._expects_alike = False
        self._was_late = False
        """Whether this rank came to the last call when that had been decided without it."""

    # -- by everyone's arrival -------------------------------------------------------------------

    def begin(
        self, stage: str, arrival: Arrival, cause: BaseException | None, admit: Callable[[bool], R]
    ) -> Ruling[R]:
        """Enter the call that rank 0 begins now, or is in.

        `admit` runs on rank 0; it is told whether all ranks have a copy.
        """
        self._expects_alike = False
        call = self._find_call(stage, arrival.outcome)
        self._call, self._alike = call, 0
        self._ranks.follow(call)

        def rule(arrivals: list[Arrival]) -> Ruling[R]:
            try:
                return Ruling(call, _admit(stage, arrivals, admit))
            except CheckpointError as error:
                steps = [each.act_at for each in arrivals]
                in_background = any(each.in_background for each in arrivals)
                return Ruling(call, error=error, act_at=max(steps) if in_background else None)

        turn = self._ranks.next_turn(ENTRY)
        ruling: Ruling[R] = self._ranks.exchange(stage, turn, ("value", arrival), cause, rule)
        return ruling

    def _find_call(self, stage: str, own: Outcome) -> int:
        """Return the number of the call that rank 0 begins now, or is in.

        `own`: this rank's call, or its failure. A rank that is late in the same call is answered
        there, with the verdict that the others were given. One that comes with another call when
        that one has been decided without it waits for the next; and so does one that was late the
        last time too: it lags behind by a call of the same name, and would do so for ever.
        """
        ranks, store = self._ranks, self._store
        newest, joined = f"{self._channel}/calls", f"{self._channel}/joined/{ranks.rank}"
        if ranks.rank == 0:
            call = store.add(newest, 0, stage) + 1
            # Its name first: a rank that sees the number must not wait for the name of a dead rank.
            store.set(self._begun(call), own[1][0] if own[0] == "value" else None, stage)
            store.add(newest, 1, stage)
            if call > _CALLS_KEPT:
                store.delete([self._begun(call - _CALLS_KEPT)], stage)
            return call
        # Counted also by other coordinators of this channel.
        call = last = store.add(joined, 0, stage)
        while True:
            begun = self._begun(call + 1)
            if not store.wait([begun], ranks.timeout_seconds + FOLLOWER_GRACE_SECONDS, stage):
                raise StageTimeoutError(stage, [0], ranks.timeout_seconds)
            call = max(call + 1, store.add(newest, 0, stage))
            is_same = own[0] == "value" and own[1][0] == store.get(self._begun(call), stage)
            is_decided = store.is_there(f"{self._channel}/{call}/{ENTRY}/1/reply", stage)
            if not is_decided or (is_same and not self._was_late):
                self._was_late = is_decided
                store.add(joined, call - last, stage)
                return call

    def _begun(self, call: int) -> str:
        return f"{self._channel}/begun/{call}"

    # -- by one counter --------------------------------------------------------------------------

    def expect_alike(self) -> None:
        """Record that all ranks completed this call, so that any may come alike to the next."""
        self._expects_alike = True

    def decline(self, stage: str, name: str | None) -> None:
        """Before `begin`: tell ranks that expect this one in the same call that it will begin it.

        `name`: of the call; None: it is refused here.

        Raises:
            StageTimeoutError: ranks did not come to a call at all.
        """
        if not self._expects_alike:
            return
        try:
            self._enter_alike(stage, name, _weight(None), lambda: None)
        except OthersDifferError:
            return

    def enter_alike(self, stage: str, entry: Entry, admit: Callable[[], R]) -> R:
        """Enter the next call, in which all ranks are expected with the same entry.

        `admit` runs on rank 0; its result, or failure, is that of all ranks.

        Raises:
            OthersDifferError: they are not; call `begin`.
            StageTimeoutError: ranks did not come.
            CheckpointError: on every rank: `admit` failed.
        """
        return self._enter_alike(stage, entry[0], _weight(entry), admit)

    def _enter_alike(self, stage: str, name: str | None, weight: int, admit: Callable[[], R]) -> R:
        """`name`: of the call, by which a rank that comes late knows whether it is this one."""
        ranks, store = self._ranks, self._store
        self._alike += 1
        turn = f"{self._channel}/{self._call}+{self._alike}/alike"
        ranks.follow(f"{self._call}+{self._alike}")
        try:
            total = store.add(f"{turn}/count", _ARRIVAL + weight, stage)
            is_last = total // _ARRIVAL == ranks.world_size
            are_alike = total == ranks.world_size * (_ARRIVAL + weight) and weight != _weight(None)
            if is_last and not are_alike:
                store.set_many([f"{turn}/full", f"{turn}/reply"], [False, _DIFFERENT], stage)
                verdict = _DIFFERENT
            elif ranks.rank == 0:
                verdict = self._lead(stage, turn, name, admit, is_last=is_last)
            else:
                if is_last:
                    store.set(f"{turn}/full", True, stage)
                verdict = self._await_reply(stage, turn)
            kind, of, value = verdict
            is_of_another = None not in (name, of) and name != of
            if kind == _DIFFER or is_of_another:
                raise OthersDifferError
            if kind != _TOO_LATE:  # all ranks came
                ranks.forget_spent(stage)
                ranks.note_spent([f"{turn}/{each}" for each in ("count", "full", "reply")])
            if kind != "value":
                raise value
        except (CheckpointError, OthersDifferError):
            self._expects_alike = False
            raise
        return value  # type: ignore[no-any-return]  # pickled

    def _lead(
        self,
        stage: str,
        turn: str,
        name: str | None,
        admit: Callable[[], Any],
        *,
        is_last: bool,
    ) -> _Verdict:
        """Wait for the others on rank 0, admit, and reply; ask who is there if some do not come."""
        ranks, store = self._ranks, self._store
        began = time.monotonic()
        reply, missing, is_full = f"{turn}/reply", list[int](), is_last
        for patience in (min(NOTICE_SECONDS, ranks.timeout_seconds), ranks.timeout_seconds):
            remaining = began + patience - time.monotonic()
            is_full = is_full or store.wait([f"{turn}/full"], remaining, stage)
            if is_full:
                break
            missing = self._find_missing(stage, turn)
            reply = f"{turn}/last reply"
            if missing and patience < ranks.timeout_seconds:
                logger.warning(
                    'waiting for %s in stage "%s": every rank must make this call',
                    name_ranks(missing),
                    stage,
                )
        # From here on no rank may complete the count.
        if not is_full and store.add(f"{turn}/count", 1, stage) // _ARRIVAL == ranks.world_size:
            is_full = store.wait([f"{turn}/full"], FOLLOWER_GRACE_SECONDS, stage)
        verdict: _Verdict
        if not is_full:
            verdict = _TOO_LATE, name, StageTimeoutError(stage, missing, ranks.timeout_seconds)
        elif not is_last and not store.get(f"{turn}/full", stage):
            verdict = _DIFFERENT
        else:
            (kind, value), _ = attempt(0, admit)
            if kind == "failure":
                kind, value = "ours", StageFailedError(stage, [value])
            verdict = kind, name, value
        if verdict is not _DIFFERENT or reply != f"{turn}/reply":
            store.set(reply, verdict, stage)
        return verdict

    def _await_reply(self, stage: str, turn: str) -> _Verdict:
        ranks, store = self._ranks, self._store
        seconds = ranks.timeout_seconds + FOLLOWER_GRACE_SECONDS
        for key in (f"{turn}/reply", f"{turn}/last reply"):
            verdict: _Verdict | None = store.get_within(key, seconds, stage)
            # Rank 0 must not find the count complete if it comes from now on.
            if verdict is None and store.add(f"{turn}/count", 1, stage) // _ARRIVAL == (
                ranks.world_size
            ):
                verdict = store.get_within(key, seconds, stage)  # it has just come
            if verdict is None:
                raise StageTimeoutError(stage, [0], ranks.timeout_seconds)
            if verdict[0] != _NAMES:
                return verdict
            store.set(f"{turn}/here/{ranks.rank}", None, stage)
            store.add(f"{turn}/named", 1, stage)
        raise AssertionError("names are asked for once")

    def _find_missing(self, stage: str, turn: str) -> list[int]:
        """Let every rank that waits for the reply say so, and return the others."""
        ranks, store = self._ranks, self._store
        if not store.is_there(f"{turn}/reply", stage):
            store.set(f"{turn}/reply", (_NAMES, None, None), stage)
        deadline = time.monotonic() + _NAMES_SECONDS
        while time.monotonic() < deadline:
            came = store.add(f"{turn}/count", 0, stage) // _ARRIVAL - 1
            if store.add(f"{turn}/named", 0, stage) >= came:
                break
            time.sleep(0.05)
        return [
            rank
            for rank in range(1, ranks.world_size)
            if not store.is_there(f"{turn}/here/{rank}", stage)
        ]


def attempt(rank: int, work: Callable[[], Any]) -> tuple[Outcome, BaseException | None]:
    """Return what this rank reports of its work, and what that is made from if it failed."""
    try:
        return ("value", work()), None
    except CheckpointError as error:
        return ("ours", error), error
    except BaseException as error:  # noqa: BLE001  # reported to every rank, and raised there
        # A description, since not every exception can be pickled, or read back.
        return ("failure", RankFailure.of(rank, error)), error


def _weight(entry: Entry | None) -> int:
    """Return 28 bits of an entry's digest; what they cannot tell apart, later exchanges can."""
    content = repr(entry).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little") >> 4


def _admit(stage: str, arrivals: Sequence[Arrival], admit: Callable[[bool], R]) -> R:
    """Judge how all ranks come; admit them if they come alike.

    Raises:
        CheckpointError: a rank cannot enter; ranks are in different calls; some are admitted
            already in their own eyes, and others are not.
    """
    for rank, each in enumerate(arrivals):
        kind, value = each.outcome
        if kind == "ours":
            error: CheckpointError = value
            error.add_note(f'raised on rank {rank} in stage "{each.stage}"')  # it travels along
            raise error
    failing = [each for each in arrivals if each.outcome[0] == "failure"]
    if failing:
        first = failing[0].stage
        raise StageFailedError(first, [each.outcome[1] for each in failing if each.stage == first])
    _check_same_call(stage, [each.outcome[1] for each in arrivals])
    staged_by = {each.plan for each in arrivals if each.in_background}
    if staged_by and (len(staged_by) > 1 or not all(each.in_background for each in arrivals)):
        reasons = [
            f"rank {rank}: {each.reason}"
            for rank, each in enumerate(arrivals)
            if not each.in_background
        ] or ["ranks hold different plans"]
        raise SaveGivenUpError(
            f"{arrivals[0].outcome[1][0]} was given up before anything was written: "
            f"{list_first(reasons, 'ranks')}.\n"
            "All ranks plan again in the next save. No earlier checkpoint was changed."
        )
    return admit(all(each.has_copy for each in arrivals))


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


def name_ranks(ranks: Sequence[int]) -> str:
    """Name ranks for a message: the first few, and how many more."""
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{more}"
