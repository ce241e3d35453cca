"""No durable commit for too long: how long that is, when it is told, and when it stops a run."""

from __future__ import annotations

import math
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.config import CheckpointConfig
from holdfast.errors import CheckpointOverdueError, ConfigError
from holdfast.events import (
    ON_CHECKPOINT_OVERDUE,
    CallbackManager,
    OverdueEvent,
)
from holdfast.manager import DefaultCheckpointManager
from holdfast.policies.guards import Alarm, find_limit
from holdfast.protocol import CheckpointSaveContext
from tests.support.managers import linear
from tests.support.stores import FaultyFilesystem


class _Clock:
    """A clock that stands still until it is set, and counts who looks at it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return self.now


LIMITS = [
    (None, [], math.inf),
    (None, [100.0], 300.0),
    (None, [100.0, 400.0, 90.0], 1200.0),
    (None, [1.0], 60.0),
    (None, [20.0], 60.0),
    (7.5, [100.0], 7.5),
    (7.5, [], 7.5),
    (math.inf, [100.0], math.inf),
]


@pytest.mark.parametrize(("configured", "intervals", "limit"), LIMITS)
def test_the_limit_is_configured_or_measured(
    configured: float | None, intervals: list[float], limit: float
) -> None:
    """Three of the longest interval, at least a minute, if nothing else is configured."""
    assert find_limit(configured, intervals) == limit


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_a_limit_is_above_zero(value: float) -> None:
    """Zero is no way to turn it off: inf is."""
    with pytest.raises(ConfigError, match="alarm_after_seconds"):
        CheckpointConfig(alarm_after_seconds=value).validate()
    CheckpointConfig(alarm_after_seconds=math.inf).validate()


def test_a_stop_without_an_alarm_has_no_effect() -> None:
    """It is warned about, as every setting without effect."""
    with pytest.warns(UserWarning, match="alarm_stops: alarm_after_seconds is infinite"):
        CheckpointConfig(alarm_after_seconds=math.inf, alarm_stops=True).validate()


def _told(alarm: Alarm, clock: _Clock, until: float, step: float = 1.0) -> list[float]:
    """Take steps until a time; return the seconds at which a warning was due."""
    found = []
    while clock.now < until:
        clock.now += step
        if alarm.is_due():
            found.append(alarm.describe(None).seconds)
    return found


def test_warnings_come_at_doubling_times() -> None:
    """After the limit, twice and four times of it; a durable commit starts all over."""
    clock = _Clock()
    alarm = Alarm(100.0, stops=False, clock=clock)
    alarm.begin()
    assert _told(alarm, clock, 1999.0) == [100.0, 200.0, 400.0, 800.0]
    alarm.note_commit(40, "local")
    assert _told(alarm, clock, 2700.0) == [1600.0]
    alarm.note_commit(50, "persistent")
    assert _told(alarm, clock, 2950.0) == [100.0, 200.0]
    assert alarm.describe(None).iteration == 50


def test_a_step_that_took_long_is_told_once() -> None:
    """Several times that passed between two steps are one warning."""
    clock = _Clock()
    alarm = Alarm(100.0, stops=False, clock=clock)
    alarm.begin()
    assert _told(alarm, clock, 1850.0, step=850.0) == [850.0]
    assert _told(alarm, clock, 2700.0) == [1600.0]


def test_the_interval_is_measured_between_saves() -> None:
    """Nothing is due before two saves were asked for; failures do not stretch the interval."""
    clock = _Clock()
    alarm = Alarm(None, stops=False, clock=clock)
    alarm.begin()
    assert _told(alarm, clock, 50_000.0, step=1000.0) == []
    for _ in range(4):  # all of them fail
        alarm.note_save(is_persistent=True)
        alarm.note_failure(1, "persistent", OSError("full"))
        alarm.note_save(is_persistent=False)
        clock.now += 100.0
    assert alarm.describe(None).limit_seconds == 300.0
    alarm.note_commit(7, "persistent")
    assert _told(alarm, clock, clock.now + 400) == [300.0]


@pytest.mark.parametrize("after", [math.inf, None], ids=["off", "not measured"])
def test_what_is_off_reads_no_clock(after: float | None) -> None:
    """A step costs one reading of the clock, and none where nothing can be due."""
    clock = _Clock()
    alarm = Alarm(after, stops=False, clock=clock)
    assert not alarm.is_due()
    alarm.begin()
    clock.readings = 0
    assert not alarm.is_due()
    assert clock.readings == 0


class _Run:
    """A manager with a clock, its listener, and a file system that can be full."""

    def __init__(self, root: Path, local: Path | None = None, **values: Any) -> None:
        self.clock, self.filesystem, self.live = _Clock(), FaultyFilesystem(), linear()
        self.events: list[OverdueEvent] = []
        self._callbacks = CallbackManager()
        self._callbacks.register(ON_CHECKPOINT_OVERDUE, self.events.append)
        values.setdefault("async_save", False)
        values.setdefault("on_save_failure", "warn")
        values.setdefault("save_failure_limit", None)
        config = CheckpointConfig.from_mapping(
            {
                "persistent": {"directory": str(root)},
                "local": {"directory": None if local is None else str(local)},
                **values,
            }
        )
        self.manager = DefaultCheckpointManager(
            config, filesystem=self.filesystem, clock=self.clock
        )
        self.live.load(self.manager)

    def save(self, iteration: int, *, to_local: bool = False) -> None:
        live = self.live
        live.state.train_state.step = iteration
        context = CheckpointSaveContext(
            live.state, live.model, live.optimizer, None, non_persistent_ckpt=to_local
        )
        self.manager.save(context, self._callbacks)

    def step(self, seconds: float = 0.0) -> None:
        self.clock.now += seconds
        self.manager.finalize_async_saves(self.live.state)

    def fill_the_disk(self, is_full: bool = True) -> None:
        self.filesystem.refuses = lambda name, path: is_full and path.suffix == ".distcp"

    def end(self) -> None:
        self.manager.finalize_async_saves(self.live.state, terminate=True)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A local directory in RAM."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        each.getMessage()
        for each in caplog.records
        if each.levelname == "WARNING" and each.name == "holdfast.policies.guards"
    ]


def test_failures_that_are_lived_with_are_told_in_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With `warn` and a full disk, three intervals after the last commit it is told, and why."""
    run = _Run(tmp_path)
    for iteration in (1, 2):
        run.save(iteration)
        run.step(100.0)
    run.fill_the_disk()
    for iteration in (3, 4):
        run.save(iteration)
        run.step(99.0)
        assert _warnings(caplog) == []
    run.save(5)
    run.step(2.0)
    (message,) = _warnings(caplog)
    for part in (str(tmp_path), "300 s", "the last: iteration 2", "iteration 5 failed", "EIO",
                 "alarm_after_seconds", "inf turns"):  # fmt: skip
        assert part in message
    assert len(message.splitlines()) <= 3
    (event,) = run.events
    assert (event.seconds, event.limit_seconds, event.iteration) == (300.0, 300.0, 2)
    assert event.last_failure is not None
    assert "EIO" in str(event.last_failure)
    run.step(299.0)
    assert len(run.events) == 1
    run.step(1.0)
    assert len(run.events) == len(_warnings(caplog)) == 2
    run.fill_the_disk(False)
    run.save(6)
    run.step(299.0)
    assert len(run.events) == 2
    run.end()


def test_a_loop_that_asks_for_local_saves_only_is_told(
    tmp_path: Path, memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Local commits are not durable: the reason is that nobody asks for others."""
    run = _Run(tmp_path, memory, alarm_after_seconds=1000.0)
    for iteration in range(1, 12):
        run.save(iteration, to_local=True)
        run.step(100.0)
    (message,) = _warnings(caplog)
    assert "no save to the persistent tier was requested since" in message
    assert "none since the load" in message
    run.end()


def test_a_save_in_flight_is_told_with_how_far_it_came(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A save that hangs is the reason, with its iteration and the bytes that are written."""
    reached = threading.Event()

    def holds(path: Path) -> bool:  # what is written behind the shard file
        is_behind = path.name == "train_state.json"
        if is_behind:
            reached.set()
        return is_behind

    run = _Run(tmp_path, async_save=True, alarm_after_seconds=1000.0)
    run.save(1)
    run.manager.finalize_async_saves(run.live.state, blocking=True)
    run.filesystem.holds = holds
    reached.clear()
    run.filesystem.gate.clear()
    run.save(2)
    assert reached.wait(60)
    run.step(1001.0)
    run.filesystem.gate.set()
    (message,) = _warnings(caplog)
    assert "the save of iteration 2 is in flight for" in message
    assert re.search(r"([\d.]+ \w+) of \1 of rank 0's shard written", message)
    run.end()


def test_a_loaded_checkpoint_is_the_last_durable_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Time is measured since the load, and the iteration is that of the store."""
    run = _Run(tmp_path)
    run.save(7)
    run.end()
    run = _Run(tmp_path, alarm_after_seconds=50.0)
    run.step(51.0)
    assert "the last: iteration 7" in _warnings(caplog)[0]
    assert run.events == [], "who listens is known from the first save on"
    run.end()
    caplog.clear()
    run.step(5000.0)
    assert _warnings(caplog) == [], "a run that has ended owes nothing"


def test_a_step_reads_the_clock_once(tmp_path: Path) -> None:
    """Whatever is measured, `finalize_async_saves` looks at the clock once per step."""
    run = _Run(tmp_path, alarm_after_seconds=50.0)
    run.clock.readings = 0
    for _ in range(10):
        run.step()
    assert run.clock.readings == 10
    run.end()


def test_a_run_that_is_to_stop_stops_at_the_next_save(tmp_path: Path, memory: Path) -> None:
    """After a failure any save is refused, with the reason; without one a persistent is tried."""
    run = _Run(tmp_path, memory, alarm_after_seconds=100.0, alarm_stops=True)
    run.step(150.0)
    with pytest.raises(CheckpointOverdueError, match="requested since") as caught:
        run.save(1, to_local=True)
    assert (caught.value.seconds, caught.value.iteration) == (150.0, None)
    run.save(1)  # what the alarm asks for
    run.save(2, to_local=True)
    run.fill_the_disk()
    run.clock.now += 99.0
    run.save(3)
    run.clock.now += 1.0
    for to_local in (True, False):
        with pytest.raises(CheckpointOverdueError, match="iteration 3 failed") as caught:
            run.save(4, to_local=to_local)
        assert (caught.value.seconds, caught.value.iteration) == (100.0, 1)
    assert not (tmp_path / "iter_0000004").exists()
    run.end()


def test_without_alarm_stops_no_save_is_refused(tmp_path: Path) -> None:
    """A warning is all that comes of it."""
    run = _Run(tmp_path, alarm_after_seconds=100.0)
    run.fill_the_disk()
    for iteration in range(1, 5):
        run.save(iteration)
        run.step(100.0)
    assert [each.seconds for each in run.events] == [100.0, 200.0, 400.0]
    run.end()
