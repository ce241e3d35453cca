"""Ranks agree on values and on failures."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore, HashStore, TCPStore

from holdfast.errors import (
    CorruptCheckpointError,
    RankFailure,
    StageFailedError,
    StageTimeoutError,
    StateMismatchError,
)
from holdfast.ranks.channels import open_channels
from holdfast.ranks.coordinator import Coordinator, SingleProcess, StoreCoordinator

RANKS = 3


_channels = itertools.count()


@pytest.fixture(scope="module")
def tcp_clients() -> list[Any]:
    """A TCP store and a client of it for each of two channels of every rank, made once."""
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    return [server, *(server.clone() for _ in range(2 * RANKS - 1))]


class _Clients(list[Any]):
    """Clients of one rendezvous store."""

    list_above = RANKS
    """With more ranks, outcomes are appended to one list."""


@pytest.fixture(params=["hash", "tcp", "tcp-list", "file"])
def clients(request: pytest.FixtureRequest, tmp_path: Path) -> _Clients:
    """Clients of each kind of rendezvous store, and of one on which ranks append to a list."""
    if request.param == "hash":
        return _Clients([HashStore()] * (2 * RANKS))
    if request.param == "file":
        name = str(tmp_path / "rendezvous")
        return _Clients(FileStore(name, -1) for _ in range(2 * RANKS))
    found = _Clients(request.getfixturevalue("tcp_clients"))
    if request.param == "tcp-list":
        found.list_above = 0
    return found


class _Paced:
    """A client by which rank 0's deadline begins once all who come have told how they come.

    A short deadline would else be missed by ranks that are there, on a machine that is busy.
    """

    def __init__(self, store: Any, rank: int, come: threading.Barrier) -> None:
        self._store, self._rank = store, rank
        self._come: threading.Barrier | None = come

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        come = self._come
        if come is not None and (self._rank == 0 or keys[0].endswith("/reply")):
            self._come = None
            come.wait()
        self._store.wait(keys, timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def _on_ranks(
    clients: list[Any],
    program: Callable[[StoreCoordinator], Any],
    ranks: tuple[int, ...] = tuple(range(RANKS)),
    timeout_seconds: float = 20.0,
    *,
    missed: bool = False,
) -> dict[int, Any]:
    """Run a program on threads as ranks; return what each returned or raised.

    `missed`: the deadline will be, by ranks that are not among these.
    """
    outcomes: dict[int, Any] = {}
    channel = f"test/{next(_channels)}"
    come = threading.Barrier(len(ranks), timeout=60)

    def run(rank: int) -> None:
        coordinator = StoreCoordinator(
            _Paced(clients[rank], rank, come) if missed else clients[rank],
            rank,
            RANKS,
            timeout_seconds,
            channel,
            list_above=getattr(clients, "list_above", RANKS),
        )
        try:
            outcomes[rank] = program(coordinator)
        except Exception as error:  # noqa: BLE001  # what a rank raises is what is tested
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive(), "a rank hangs"
    return outcomes


def test_everyone_learns_every_value(clients: list[Any]) -> None:
    """`all_gather` gives each rank all results in rank order."""
    found = _on_ranks(clients, lambda ranks: ranks.all_gather("s", lambda: ranks.rank * 10))
    assert found == {rank: [0, 10, 20] for rank in range(RANKS)}


def test_only_the_leader_gathers(clients: list[Any]) -> None:
    """`gather` gives rank 0 all results and the others None."""
    found = _on_ranks(clients, lambda ranks: ranks.gather("s", lambda: ranks.rank * 10))
    assert found == {0: [0, 10, 20], 1: None, 2: None}


def test_the_leader_decides_for_all(clients: list[Any]) -> None:
    """`broadcast` runs on rank 0 alone and gives everyone its result."""
    ran: list[int] = []

    def program(ranks: Coordinator) -> Any:
        return ranks.broadcast("s", lambda: (ran.append(ranks.rank), {"path": Path("/x")})[1])

    assert _on_ranks(clients, program) == {rank: {"path": Path("/x")} for rank in range(RANKS)}
    assert ran == [0]


def test_the_leader_deals_shares(clients: list[Any]) -> None:
    """`scatter` runs on rank 0 alone and gives rank n the n-th result."""
    found = _on_ranks(clients, lambda ranks: ranks.scatter("s", lambda: ["a", "b", "c"]))
    assert found == {0: "a", 1: "b", 2: "c"}


def test_rank_0_judges_for_all(clients: list[Any]) -> None:
    """`all_reduce` shows rank 0 all results in rank order, once, and gives everyone its verdict."""
    judged: list[tuple[int, list[int]]] = []

    def program(ranks: Coordinator) -> Any:
        def judge(found: list[int]) -> dict[str, int]:
            judged.append((ranks.rank, found))
            return {"sum": sum(found)}

        return ranks.all_reduce("s", lambda: ranks.rank * 10, judge)

    assert _on_ranks(clients, program) == {rank: {"sum": 30} for rank in range(RANKS)}
    assert judged == [(0, [0, 10, 20])]


class _Counting:
    """A rendezvous store that counts the bytes which each kind of key was given."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.replies: list[int] = []

    def set(self, key: str, content: bytes) -> None:
        if key.endswith("/reply"):
            self.replies.append(len(content))
        self._store.set(key, content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_verdict_is_no_longer_than_it_is() -> None:
    """What `all_reduce` tells a rank does not hold the ranks' results, as `all_gather` does."""
    store = _Counting(HashStore())
    content = bytes(10_000)
    _on_ranks([store] * RANKS, lambda ranks: ranks.all_reduce("s", lambda: content, lambda _: "go"))
    assert len(store.replies) == 1
    assert max(store.replies) < 100
    _on_ranks([store] * RANKS, lambda ranks: ranks.all_gather("s", lambda: content))
    assert max(store.replies) > RANKS * len(content)


@pytest.mark.parametrize("ours", [True, False])
def test_a_judge_that_fails_fails_all(clients: list[Any], ours: bool) -> None:
    """What the judge raises on rank 0 reaches every rank: ours as it is, else named with stage."""

    def judge(found: list[int]) -> None:
        if ours:
            raise CorruptCheckpointError("/x", f"torn {sum(found)}")
        raise KeyError("nothing")

    found = _on_ranks(clients, lambda ranks: ranks.all_reduce("plan", lambda: ranks.rank, judge))
    if ours:
        assert {type(each) for each in found.values()} == {CorruptCheckpointError}
        assert all("torn 3" in str(each) for each in found.values())
    else:
        expected = (RankFailure(0, "KeyError", "'nothing'"),)
        assert [(each.stage, each.failures) for each in found.values()] == [("plan", expected)] * 3


def test_nothing_is_judged_where_a_rank_failed(clients: list[Any]) -> None:
    """With a result missing, rank 0 raises as all do, without asking the judge."""
    asked: list[Any] = []

    def program(ranks: Coordinator) -> Any:
        return ranks.all_reduce("s", lambda: 1 // ranks.rank if ranks.rank < 2 else 2, asked.append)

    found = _on_ranks(clients, program)
    assert {type(each) for each in found.values()} == {StageFailedError}
    assert not asked


TURNS = ["all_gather", "gather", "all_reduce"]


def _take(ranks: Coordinator, turn: str, stage: str, work: Callable[[], Any]) -> Any:
    """Take one turn of a kind; what `all_reduce` is asked to judge is everything."""
    more = [lambda found: found] if turn == "all_reduce" else []
    return getattr(ranks, turn)(stage, work, *more)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("failing", [(0,), (1,), (0, 2)])
def test_a_failure_on_some_ranks_is_raised_on_all(
    clients: list[Any], turn: str, failing: tuple[int, ...]
) -> None:
    """A rank that raises makes every rank raise the same, with rank, stage, errno and path."""

    def program(ranks: Coordinator) -> Any:
        def work() -> int:
            if ranks.rank in failing:
                raise OSError(28, "No space left on device", f"/store/{ranks.rank}")
            return 1

        return _take(ranks, turn, "write", work)

    found = _on_ranks(clients, program)
    expected = tuple(
        RankFailure(rank, "OSError", "ENOSPC No space left on device", f"/store/{rank}", 28)
        for rank in failing
    )
    assert {type(each) for each in found.values()} == {StageFailedError}
    assert [(each.stage, each.failures) for each in found.values()] == [("write", expected)] * 3
    for rank in failing:
        assert isinstance(found[rank].__cause__, OSError)


@pytest.mark.parametrize("turn", ["broadcast", "scatter"])
def test_a_failure_of_the_leader_is_raised_on_all(clients: list[Any], turn: str) -> None:
    """When the leader's work raises, every rank raises that, with stage and rank 0."""
    found = _on_ranks(clients, lambda ranks: getattr(ranks, turn)("plan", lambda: 1 // 0))
    assert {type(each) for each in found.values()} == {StageFailedError}
    assert {each.failures[0].error for each in found.values()} == {"ZeroDivisionError"}
    assert {each.failures[0].rank for each in found.values()} == {0}


def test_our_own_errors_keep_type_and_fields(clients: list[Any]) -> None:
    """An error of holdfast's arrives as itself on every rank; of several the lowest rank's wins."""
    errors = {
        1: StateMismatchError("p", ["a"], ["b"], ["c"]),
        2: CorruptCheckpointError("/q", "torn"),
    }

    def program(ranks: Coordinator) -> Any:
        def work() -> None:
            if ranks.rank == 0:
                raise ValueError("a foreign failure beside one of ours")
            raise errors[ranks.rank]

        return ranks.all_gather("compare", work)

    found = _on_ranks(clients, program)
    for each in found.values():
        assert type(each) is StateMismatchError
        assert (each.path, each.missing, each.unexpected) == ("p", ("a",), ("b",))


class _Stubborn(Exception):
    """Cannot be pickled, as exceptions of other libraries at times."""

    def __init__(self) -> None:
        super().__init__("will not travel")
        self.lock = threading.Lock()


class _Broken(Exception):
    """Pickles, but raises when it is read back."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


@pytest.mark.parametrize("error", [_Stubborn(), _Broken("will not travel", "x")])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_that_cannot_travel_is_described(
    clients: list[Any], error: Exception, failing: int
) -> None:
    """An exception that cannot be pickled, or not unpickled, reaches all ranks as a description."""

    def program(ranks: Coordinator) -> Any:
        def work() -> None:
            if ranks.rank == failing:
                raise error

        return ranks.all_gather("capture", work)

    found = _on_ranks(clients, program, timeout_seconds=5)
    expected = (RankFailure(failing, type(error).__name__, "will not travel"),)
    assert [each.failures for each in found.values()] == [expected] * RANKS


def test_missing_ranks_are_named_within_the_deadline(clients: list[Any]) -> None:
    """Ranks that do not come are named to all that did, soon after the deadline."""
    started = time.monotonic()
    found = _on_ranks(
        clients,
        lambda ranks: ranks.all_gather("write", lambda: 1),
        (0, 1),
        timeout_seconds=1.5,
        missed=True,
    )
    elapsed = time.monotonic() - started
    assert [type(each) for each in found.values()] == [StageTimeoutError] * 2
    assert {(each.stage, each.missing_ranks) for each in found.values()} == {("write", (2,))}
    assert 1.5 <= elapsed < 60


def test_what_failed_is_named_beside_who_is_missing(clients: list[Any]) -> None:
    """A cause on the ranks that came is not lost because another one did not."""

    def program(ranks: Coordinator) -> Any:
        def work() -> None:
            if ranks.rank == 0:
                raise ValueError("the cause")

        with pytest.raises(StageTimeoutError) as caught:
            ranks.all_gather("write", work)
        return caught.value.missing_ranks, [str(each) for each in caught.value.failures]

    found = _on_ranks(clients, program, ranks=(0, 1), timeout_seconds=1.5, missed=True)
    missing = "rank 2: Timeout: did not answer within 1.5 s"
    assert found == dict.fromkeys((0, 1), ((2,), ["rank 0: ValueError: the cause", missing]))


def test_several_missing_ranks_are_all_named(clients: list[Any]) -> None:
    """The verdict names every rank that is missing, not only the first."""
    found = _on_ranks(
        clients, lambda ranks: ranks.all_gather("write", lambda: 1), (0,), timeout_seconds=1.5
    )
    assert found[0].missing_ranks == (1, 2)


def test_a_missing_leader_is_named(clients: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Followers whose leader is gone say so, after the deadline and a short grace."""
    monkeypatch.setattr("holdfast.ranks.coordinator.FOLLOWER_GRACE_SECONDS", 0.1)
    started = time.monotonic()
    found = _on_ranks(
        clients, lambda ranks: ranks.broadcast("s", lambda: 1), (1, 2), timeout_seconds=1.5
    )
    assert {each.missing_ranks for each in found.values()} == {(0,)}
    assert time.monotonic() - started < 60


def test_a_late_rank_is_told_the_verdict_and_goes_on(clients: list[Any]) -> None:
    """A rank that comes after the deadline raises what the others raised; the next turn works."""
    decided = threading.Event()
    come = threading.Barrier(2, timeout=60)

    def program(ranks: StoreCoordinator) -> Any:
        def work() -> None:
            if ranks.rank == 2:
                assert decided.wait(60)

        own = clients[ranks.rank]
        late = StoreCoordinator(
            own if ranks.rank == 2 else _Paced(own, ranks.rank, come),
            ranks.rank,
            RANKS,
            1.5 if ranks.rank == 0 else 60.0,
            ranks._channel,
            list_above=ranks._list_above,
        )
        with pytest.raises(StageTimeoutError) as caught:
            late.all_gather("write", work)
        decided.set()
        return caught.value.missing_ranks, ranks.all_gather("next", lambda: ranks.rank)

    found = _on_ranks(clients, program, timeout_seconds=60.0)
    assert found == {rank: ((2,), [0, 1, 2]) for rank in range(RANKS)}


@pytest.mark.parametrize("late", [0, 2])
def test_a_rank_that_missed_calls_meets_the_others_in_their_next(
    clients: list[Any], late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 counts; a rank that was away takes part in the call that rank 0 is in now."""
    if late == 0:  # then nobody tells the others: they wait for themselves
        monkeypatch.setattr("holdfast.ranks.entry.FOLLOWER_GRACE_SECONDS", 0.2)
    waited_in_vain = threading.Barrier(RANKS, timeout=60)
    come = threading.Barrier(RANKS - 1, timeout=60)

    def enter(ranks: Coordinator, call: str) -> int:
        number, verdict = ranks.begin("enter", lambda: (call,), lambda: f"admitted to {call}")
        assert verdict == f"admitted to {call}"
        assert ranks.all_gather("s", lambda: number) == [number] * RANKS
        return number

    def program(ranks: StoreCoordinator) -> Any:
        met = [enter(ranks, "the first")]
        if ranks.rank != late:
            # Only who waits for the one that is away has a short deadline.
            waiting = StoreCoordinator(
                _Paced(clients[ranks.rank], ranks.rank, come) if late else clients[ranks.rank],
                ranks.rank,
                RANKS,
                1.0 if ranks.rank == 0 or late == 0 else 60.0,
                ranks._channel,
                list_above=ranks._list_above,
            )
            with pytest.raises(StageTimeoutError) as caught:
                enter(waiting, "one that misses a rank")
            assert caught.value.missing_ranks == (late,)
        waited_in_vain.wait()
        return [*met, enter(ranks, "the last")]

    found = _on_ranks(clients, program, timeout_seconds=60.0)
    last = 2 if late == 0 else 3
    assert found == {rank: [1, last] for rank in range(RANKS)}


def test_coordinators_of_one_channel_share_the_count_of_calls(clients: list[Any]) -> None:
    """Managers of one directory take turns, however often; ranks meet in each of their calls."""

    def program(ranks: StoreCoordinator) -> Any:
        met = []
        for _ in range(12):
            # An old one, a fresh one for several calls in a row, and the old one again.
            other = StoreCoordinator(clients[ranks.rank], ranks.rank, RANKS, 20.0, ranks._channel)
            for each in (ranks, other, other, other, other, other, other):
                call, _ = each.begin("enter", lambda: ("a save",), lambda: None)
                met.append(call)
        return met

    found = _on_ranks(clients, program)
    assert found == {rank: list(range(1, 85)) for rank in range(RANKS)}


def test_ranks_in_different_calls_are_named(clients: list[Any]) -> None:
    """At once, and before rank 0 admits anything; the next call meets."""
    admitted: list[int] = []

    def program(ranks: Coordinator) -> Any:
        def enter(call: str) -> int:
            return ranks.begin("enter", lambda: (call,), lambda: admitted.append(ranks.rank))[0]

        with pytest.raises(StageFailedError) as caught:
            enter("a load" if ranks.rank == 2 else "a save")
        (failure,) = caught.value.failures
        assert (failure.rank, failure.reason) == (2, "is in a load, and rank 0 in a save")
        assert admitted == []
        return enter("a save")

    assert _on_ranks(clients, program) == dict.fromkeys(range(RANKS), 2)
    assert admitted == [0]


def test_a_call_that_is_refused_on_one_rank_is_refused_on_all(clients: list[Any]) -> None:
    """With the error of that rank."""

    def program(ranks: Coordinator) -> Any:
        def enter() -> tuple[str, ...]:
            if ranks.rank == 1:
                raise CorruptCheckpointError("a/b", "as planned")
            return ("a load",)

        with pytest.raises(CorruptCheckpointError, match="as planned"):
            ranks.begin("enter", enter, lambda: None)
        return ranks.begin("enter", lambda: ("a load",), lambda: ranks.rank)

    assert _on_ranks(clients, program) == dict.fromkeys(range(RANKS), (2, 0))


def test_keys_are_cleaned_up(clients: list[Any]) -> None:
    """A hundred turns of every kind, failures among them, leave a handful of keys."""

    def fail(ranks: Coordinator) -> None:
        if ranks.rank == 1:
            raise ValueError("as planned")

    def program(ranks: Coordinator) -> None:
        for _ in range(20):
            ranks.begin("arrive", lambda: ("a save",), lambda: None)
            ranks.all_gather("a", lambda: 1)
            ranks.gather("b", lambda: 1)
            ranks.all_reduce("s", lambda: 1, len)
            ranks.broadcast("c", lambda: 1)
            ranks.scatter("d", lambda: [1, 2, 3])
            with pytest.raises(StageFailedError):
                ranks.all_gather("e", lambda: fail(ranks))

    before = clients[0].num_keys()
    assert _on_ranks(clients, program) == dict.fromkeys(range(RANKS))
    assert clients[0].num_keys() - before < 16, "those of the last turn, and of the last calls"


def test_channels_do_not_disturb_one_another(clients: list[Any]) -> None:
    """Turns on two channels of one store, in different orders, each keep their values."""

    def program(ranks: StoreCoordinator) -> Any:
        client = clients[RANKS + ranks.rank]
        other = StoreCoordinator(client, ranks.rank, RANKS, 20.0, "other")
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.append([other.all_gather("o", lambda: -1) for _ in range(10)])
        )
        thread.start()
        mine = [ranks.all_gather("m", lambda: ranks.rank) for _ in range(10)]
        thread.join()
        return mine, found[0]

    for mine, other in _on_ranks(clients, program).values():
        assert mine == [[0, 1, 2]] * 10
        assert other == [[-1] * RANKS] * 10


# -- one process ---------------------------------------------------------------------------------


def test_a_single_process_agrees_with_itself() -> None:
    """With one rank every kind of turn is the work itself."""
    single: Coordinator = SingleProcess()
    assert single.all_gather("s", lambda: 1) == [1]
    assert single.gather("s", lambda: 1) == [1]
    assert single.all_reduce("s", lambda: 1, lambda found: (found, "go")) == ([1], "go")
    assert single.broadcast("s", lambda: 1) == 1
    assert single.scatter("s", lambda: [1]) == 1


@pytest.mark.parametrize("turn", ["all_gather", "gather", "all_reduce", "broadcast", "scatter"])
def test_a_single_process_fails_as_ranks_do(turn: str) -> None:
    """Foreign errors are named with their stage, ours stay, and a crash passes through."""

    def fail(error: BaseException) -> Any:
        raise error

    def work(stage: str, task: Callable[[], Any]) -> Any:
        return _take(SingleProcess(), turn, stage, task)

    with pytest.raises(StageFailedError) as caught:
        work("write", lambda: fail(PermissionError(13, "Permission denied", "/x")))
    assert caught.value.failures == (
        RankFailure(0, "PermissionError", "EACCES Permission denied", "/x", 13),
    )
    with pytest.raises(StageFailedError, match="nothing"):
        SingleProcess().all_reduce("plan", lambda: 1, lambda _: fail(KeyError("nothing")))
    ours = CorruptCheckpointError("/x", "torn")
    with pytest.raises(CorruptCheckpointError) as kept:
        work("write", lambda: fail(ours))
    assert kept.value is ours
    with pytest.raises(KeyboardInterrupt):
        work("write", lambda: fail(KeyboardInterrupt()))


def test_channels_without_ranks_are_single() -> None:
    """Without torch.distributed every channel is the null case."""
    channels = open_channels(2, 5.0, "test")
    assert [(each.rank, each.world_size) for each in channels] == [(0, 1), (0, 1)]
    assert all(isinstance(each, SingleProcess) for each in channels)
    assert len(set(map(id, channels))) == 2


class _Unreachable:
    """A rendezvous store whose server has gone after so many requests, or when told to."""

    def __init__(self, store: Any, requests: int) -> None:
        self._store = store
        self._left = itertools.count(requests, -1)
        self._gone = threading.Event()

    def go(self) -> None:
        """Break every connection, those that wait included."""
        self._gone.set()

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait in short turns, so that a lost server ends it."""
        if next(self._left) <= 0:
            raise RuntimeError("Broken pipe")
        deadline = time.monotonic() + timeout.total_seconds()
        while not self._store.check(keys):
            if self._gone.is_set() or time.monotonic() > deadline:
                raise RuntimeError("Broken pipe")
            self._gone.wait(0.001)

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: Any) -> Any:
            if next(self._left) <= 0 or self._gone.is_set():
                raise RuntimeError("Broken pipe")
            return getattr(self._store, name)(*arguments)

        return request


@pytest.mark.parametrize("requests", range(12))
def test_a_lost_store_is_an_error_of_ours(requests: int) -> None:
    """Whenever the rendezvous store goes away, a rank raises a typed error and no other."""
    shared = HashStore()
    theirs = _Unreachable(shared, 1000)
    follower = StoreCoordinator(theirs, 1, 2, 0.05, "test")

    def follow() -> None:
        for _ in range(3):
            with suppress(StageFailedError):
                follower.all_gather("s", lambda: 1)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        leader = StoreCoordinator(_Unreachable(shared, requests), 0, 2, 0.5, "test")
        for _ in range(3):
            try:
                leader.all_gather("s", lambda: 1)
            except StageFailedError:
                return
        assert requests >= 9
    finally:
        theirs.go()
        # A thread that the end of the interpreter finds in torch's code aborts the process.
        thread.join()
