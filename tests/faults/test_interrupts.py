"""Interrupts at any moment: nothing is lost in silence, nothing that counts is mixed or torn.

An interrupt is Ctrl-C, or any signal handler that raises: Python runs it on the main thread between
two instructions. Here one comes at every line that the main thread executes inside a call of the
manager (`sys.settrace`), and at random moments (`signal.setitimer`), in native waits too.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import distributed, nn

import holdfast.manager as manager_module
from holdfast.errors import CheckpointError, LoadIncompleteError, StoreNotLoadedError
from holdfast.filesystem import LocalFilesystem
from holdfast.manager import DefaultCheckpointManager
from holdfast.storage.posix import PosixStorage
from holdfast.storage.store import Store
from tests.faults.report import record
from tests.support.managers import Live, manager_of
from tests.support.ranks import run_ranks

FULL = os.environ.get("HOLDFAST_FAULTS") == "full"
STORMS = int(os.environ.get("HOLDFAST_STORMS", "5000" if FULL else "60"))
LINES = 40
"""At so many of the lines, spread evenly; at all of them in full."""
SEED = 11
RANK_SAVES = 40 if FULL else 6
ELEMENTS = 150_000
"""Of each of four tensors: more than a copy takes between two looks at signals."""
MODES = {
    "blocking": {"async_save": True},
    "overlapped": {"async_save": True, "staging": "overlapped"},
    "sync": {"async_save": False},
}


class _Raised(BaseException):
    """What a handler of the user's raises."""


class _Told(logging.Handler):
    """What was logged, as text."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


@dataclass
class _Run:
    """A run whose every tensor holds the number of its iteration, and what became of its saves."""

    root: Path
    settings: dict[str, Any]
    told: _Told = field(default_factory=_Told)
    asked: list[int] = field(default_factory=list)
    weather: Callable[[], Any] = nullcontext
    """What the manager's calls are made in."""
    raised: str = ""

    def __post_init__(self) -> None:
        self.model = nn.ParameterList([torch.zeros(ELEMENTS) for _ in range(4)])
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.live = Live(self.model, optimizer)
        self.manager = self.make_manager()
        self.iteration = 0

    def make_manager(self) -> DefaultCheckpointManager:
        return manager_of(self.root / "store", **self.settings)

    @torch.no_grad()
    def train(self) -> None:
        """Take a step: the optimizer's hook comes first, as it does before any step."""
        while True:
            try:
                self.live.optimizer.step()
                break
            except (KeyboardInterrupt, _Raised):
                continue
        self.iteration += 1
        for parameter in self.model.parameters():
            parameter.fill_(float(self.iteration))
        self.live.state.train_state.step = self.iteration

    def call(self, work: Callable[[], object]) -> bool:
        """Call the manager as a loop that survives interrupts would; return whether one came."""
        caught: BaseException | None = None
        try:
            with self.weather():
                work()
        except (CheckpointError, KeyboardInterrupt, _Raised) as error:
            caught = error
        _calm()
        is_interrupt = isinstance(caught, KeyboardInterrupt | _Raised)
        shown: list[BaseException] = []  # what the exception carries along
        rest = [caught]
        while rest:
            if (each := rest.pop()) is not None and not any(each is other for other in shown):
                shown.append(each)
                rest += [each.__cause__, each.__context__]
        self.raised += "".join(f"{each}\n" for each in shown if isinstance(each, CheckpointError))
        return is_interrupt

    def save(self, *, to_local: bool = False) -> bool:
        raised = self.raised
        interrupted = self.call(lambda: self.live.save(self.manager, non_persistent_ckpt=to_local))
        last = self.manager._caller._last
        own = f"the save of iteration {self.iteration}"
        has_begun = not interrupted or (last is not None and last.name == own)
        if has_begun and self.raised == raised:  # else it was refused, and the caller knows
            self.asked.append(self.iteration)
        return interrupted

    def finalize(self, **how: bool) -> bool:
        return self.call(lambda: self.manager.finalize_async_saves(self.live.state, **how))

    def end(self) -> None:
        """Finish without interrupts, and hold what is there against what was asked for."""
        self.finalize(blocking=True, terminate=True)
        listing = Store(PosixStorage(self.root / "store", LocalFilesystem())).listing()
        assert listing.broken == ()
        committed = {each.iteration for each in listing.checkpoints}
        fresh = _Run(self.root, {**self.settings, "run_id": None})
        for iteration in sorted(committed):
            manager = fresh.make_manager()
            manager.checkpoint_config.load.step = iteration
            result = fresh.live.load(manager)
            assert result.iteration == iteration
            values = _values(fresh.model)
            assert values == {float(iteration)}, f"iteration {iteration} holds {values}"
            manager.finalize_async_saves(fresh.live.state, terminate=True)
        named = self.told.text + self.raised
        for iteration in set(self.asked) - committed:
            assert f"iteration {iteration}" in named, f"{iteration} was lost in silence: {named}"
        left = [each.name for each in (self.root / "store").glob("*.pending-*")]
        assert left == []


def _values(model: nn.Module) -> set[float]:
    ends = [each.detach().aminmax() for each in model.parameters()]
    return {float(value) for pair in ends for value in pair}


@contextmanager
def _running(settings: dict[str, Any], **more: Any) -> Iterator[_Run]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        keep = {"persistent": {"keep": {"last": None}}, "timeout_seconds": 30.0}
        run = _Run(Path(folder), {**keep, **settings, **more})
        logger = logging.getLogger("holdfast")
        logger.addHandler(run.told)
        try:
            run.manager.load  # noqa: B018  # it is there
            yield run
        finally:
            logger.removeHandler(run.told)


class _AtLine:
    """Raises at the n-th line that the main thread executes in the files of interest, once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.lines = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if "holdfast" not in name and not name.endswith(("threading.py", "queue.py")):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.number:
                raise KeyboardInterrupt(f"{name}:{frame.f_lineno}")
        return self


@contextmanager
def _traced(tracer: _AtLine) -> Iterator[None]:
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(None)


def _story(run: _Run, weather: Callable[[], Any]) -> None:
    """Save at every step while interrupts may come; each save is followed by changes at once."""
    run.weather = weather
    for _ in range(2):
        run.train()
        run.save()
        run.train()
        run.finalize()
    run.finalize(blocking=True)
    run.weather = nullcontext
    run.train()
    run.save()
    run.end()


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_at_any_line_loses_and_mixes_nothing(mode: str) -> None:
    """Whichever line of the main thread it hits, every save is committed whole, or named."""
    with _running(MODES[mode]) as run:
        counting = _AtLine(-1)
        _story(run, lambda: _traced(counting))
    assert counting.lines > 20
    step = 1 if FULL else max(counting.lines // LINES, 1)
    numbers = range(1 + random.Random(SEED).randrange(step), counting.lines + 5, step)
    for number in numbers:
        with _running(MODES[mode]) as run:
            tracer = _AtLine(number)
            _story(run, lambda tracer=tracer: _traced(tracer))  # type: ignore[misc]
    record("interrupts at lines", len(numbers))


@contextmanager
def _storm(rng: random.Random, error: type[BaseException]) -> Iterator[None]:
    """Raise from a signal handler at random moments, again and again, until `_calm`."""

    def handler(_: int, frame: FrameType | None) -> None:
        # Not at once: on a busy machine one would come in the handler of the one before, for ever.
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.002, 0.012))
        while frame is not None:  # this file's own bookkeeping is left alone
            if frame.f_code.co_filename == manager_module.__file__:
                raise error
            frame = frame.f_back

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0001, 0.01))
    yield


def _calm() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # a handler may just have set the timer again
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tier", ["persistent", "tiered"])
def test_a_storm_of_interrupts_loses_and_mixes_nothing(mode: str, tier: str) -> None:
    """One after the other, at random moments, also while one is being dealt with."""
    rng = random.Random(f"{SEED} {mode} {tier}")
    count = max(STORMS // 6, 1)
    for number in range(count):
        error = (KeyboardInterrupt, _Raised)[number % 2]
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            local = {"local": {"directory": f"{memory}/local"}} if tier == "tiered" else {}
            with _running(MODES[mode], **local) as run:
                if local:
                    run.live.load(run.manager)

                _weather(run, rng, error, some_local=bool(local))
                run.train()
                for _ in range(3):  # refused while the last failure is told
                    if run.iteration not in run.asked:
                        run.save()
                assert run.iteration in run.asked, run.raised
                run.end() if not local else _end_tiered(run)
    record("storms of interrupts", count)


def _weather(
    run: _Run, rng: random.Random, error: type[BaseException], *, some_local: bool
) -> None:
    run.weather = lambda: _storm(rng, error)
    for _ in range(4):
        run.train()
        run.save(to_local=some_local and rng.random() < 0.3)
        run.train()
        run.finalize()
    run.finalize(blocking=True)
    run.weather = nullcontext


def _end_tiered(run: _Run) -> None:
    """As `end`, where some saves went to memory alone and may have been pruned there since."""
    run.finalize(blocking=True, terminate=True)
    manager = run.make_manager()
    fresh = _Run(run.root, run.settings)
    result = fresh.live.load(manager)
    assert result.iteration == run.iteration
    values = _values(fresh.model)
    assert values == {float(run.iteration)}
    manager.finalize_async_saves(fresh.live.state, terminate=True)
    listing = Store(PosixStorage(run.root / "store", LocalFilesystem())).listing()
    assert listing.broken == ()
    for each in listing.checkpoints:
        manager = run.make_manager()
        manager.checkpoint_config.load.step = each.iteration
        fresh.live.load(manager)
        values = _values(fresh.model)
        assert values == {float(each.iteration)}
        manager.finalize_async_saves(fresh.live.state, terminate=True)


def test_an_interrupted_load_lets_nothing_be_saved_until_one_completes() -> None:
    """Whoever left a load that had begun to overwrite live state must load again before saving."""
    with _running({"async_save": False}) as run:
        run.train()
        run.save()
        refused = 0
        for number in range(1, 400):
            again = _Run(run.root, run.settings)
            tracer = _AtLine(number)
            try:
                with _traced(tracer):
                    again.live.load(again.manager)
            except KeyboardInterrupt:
                pass
            if tracer.lines < number:
                break
            again.iteration = 5
            again.live.state.train_state.step = 5
            try:
                again.live.save(again.manager)
            except LoadIncompleteError:
                refused += 1
                assert again.live.load(again.manager).iteration >= 1
            except StoreNotLoadedError:
                pass  # it was left before anything was touched
            _forget_five(run.root / "store")
        assert refused > 0


def _forget_five(store: Path) -> None:
    import shutil

    shutil.rmtree(store / "iter_0000005", ignore_errors=True)


def test_a_wait_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    """Ctrl-C in finalize is raised at once; the save is finished, and the next one waits for it."""
    slow = {"persistent": {"write_mib_per_second": 8.0, "keep": {"last": None}}}
    with _running({"async_save": True, **slow}) as run:
        run.train()
        run.save()
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert run.finalize(blocking=True)
        assert run.manager.progress.written_bytes < run.manager.progress.total_bytes
        run.train()
        run.save()
        run.end()
        names = sorted(each.name for each in (run.root / "store").glob("iter_*"))
        assert names == ["iter_0000001", "iter_0000002"]


def _interrupted_rank(root: Path, odd: int, mode: str) -> list[Any]:
    """Save on every rank, while one of them (-1: each) gets an interrupt in many of its calls."""
    rank = distributed.get_rank()
    rng = random.Random(f"{SEED} {odd} {mode} {rank}")
    settings = {**MODES[mode], "timeout_seconds": 20.0, "persistent": {"keep": {"last": None}}}
    run = _Run(root, settings)
    logging.getLogger("holdfast").addHandler(run.told)

    @contextmanager
    def once() -> Iterator[None]:
        with _storm(rng, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0005, 0.03))
            yield

    for _ in range(RANK_SAVES):
        run.weather = once if odd in (rank, -1) else nullcontext
        run.train()
        run.save()
        run.train()
        run.finalize()
        run.weather = nullcontext
        run.finalize(blocking=True)
    run.train()
    for _ in range(3):
        if run.iteration not in run.asked:
            run.save()
    run.finalize(blocking=True, terminate=True)
    distributed.barrier()
    return [run.asked, run.told.text + run.raised]


@pytest.mark.parametrize("odd", [1, 0, -1])
@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_an_interrupt_on_some_rank_loses_and_mixes_nothing(
    odd: int, mode: str, tmp_path: Path
) -> None:
    """Ranks meet again at the next call; what counts is whole on all of them, the rest is named."""
    found = run_ranks(_interrupted_rank, 2, tmp_path, odd, mode)
    listing = Store(PosixStorage(tmp_path / "store", LocalFilesystem())).listing()
    assert listing.broken == ()
    committed = {each.iteration for each in listing.checkpoints}
    assert found[0][0][-1] in committed, "the last save, in calm weather"
    reader = _Run(tmp_path, MODES["sync"])
    for iteration in committed:
        manager = reader.make_manager()
        manager.checkpoint_config.load.step = iteration
        reader.live.load(manager)
        assert _values(reader.model) == {float(iteration)}
    for asked, named in found:
        for iteration in set(asked) - committed:
            assert f"iteration {iteration}" in named, f"{iteration} was lost in silence: {named}"
    record("interrupts on some rank", 2 * RANK_SAVES)
