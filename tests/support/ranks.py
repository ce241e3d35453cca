"""Run functions, or a program, on several real ranks over gloo.

Owns the starting, the watching and the ending of rank processes. Promises processes of their own
that see what torchrun would show them (its environment variables, a rendezvous store that outlives
every rank), a deadline that ends with the stacks of all threads of all ranks, and an error that
shows the traceback of the rank that failed. Ranks are forked from a server that has imported torch
once, so that a launch costs a tenth of a second instead of several. Such a rank is a fresh process
but for its imports; what depends on the start or the exit of the interpreter needs `run_program`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.deadlines import LAUNCH_SECONDS

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

_PRELOADED = [
    "holdfast.manager",
    "hypothesis",
    "numpy",
    "pytest",
    "torch",
    "torch._dynamo",  # the first optimizer step would import it
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
]
"""Imported once for all ranks: each would otherwise spend half a second of a core on it."""
_PRELOADED_WITH_NVRX = [
    *_PRELOADED,
    "holdfast.tiers.local.tier",
    "nvidia_resiliency_ext.checkpointing.local.replication.group_utils",
]
_POLL_SECONDS = 0.01
_GRACE_SECONDS = 3.0
"""How long the other ranks may go on after one failed, and a rank after it was asked for stacks."""
_SHOWN_CHARACTERS = 20_000
"""Of each rank's output in an error, from the end."""

Target = str | Callable[..., Any]
"""A function at the top level of its module, or `package.module:function`."""


@dataclass(frozen=True)
class RankExit:
    """How the process of one rank ended."""

    rank: int
    exit_code: int
    """As subprocess reports it: negative for a signal."""
    output: str
    """Standard output and standard error, in order."""

    @property
    def signal(self) -> signal.Signals | None:
        """What killed it; None if it ended by itself."""
        return signal.Signals(-self.exit_code) if self.exit_code < 0 else None


class RanksFailedError(Exception):
    """Some ranks failed or did not end in time. The first failure's own exception is chained."""

    def __init__(self, message: str, exits: Sequence[RankExit]) -> None:
        super().__init__(message)
        self.exits = tuple(exits)


def run_ranks(
    target: Target | Sequence[Target],
    processes: int,
    *arguments: Any,
    timeout_seconds: float = LAUNCH_SECONDS,
    may_die: Collection[int] = (),
    initialise: bool = True,
) -> list[Any]:
    """Call a function on every rank and return what each returned, in the order of ranks.

    Several targets are called one after the other in the same processes, and the result is one such
    list per target. Arguments and results are pickled. A rank in `may_die` that ends without an
    exception, by a signal or `os._exit`, gives its `RankExit` instead of a value. With
    `initialise=False` the target makes its own process group.

    Raises:
        RanksFailedError: an exception on any rank, a death that was not allowed, or the deadline.
    """
    targets = [target] if isinstance(target, str) or callable(target) else list(target)
    names = [each if isinstance(each, str) else _name(each) for each in targets]
    work = pickle.dumps(arguments)
    with _rendezvous(processes) as environment, tempfile.TemporaryDirectory() as folder:
        started = []
        server = _fork_server()
        try:
            for rank in range(processes):
                order = _Order(
                    names,
                    work,
                    {**environment, **_rank_environment(rank)},
                    Path(folder, f"output_{rank}"),
                    Path(folder, f"outcomes_{rank}"),
                    timeout_seconds,
                    initialise,
                )
                process = server.Process(target=_be_rank, args=(order,))
                process.start()
                assert process.pid is not None
                started.append(
                    _Rank(rank, process.pid, functools.partial(_exit_code, process), order.output)
                )
            late = _watch(started, timeout_seconds, may_die)
        finally:
            _end(started)
        exits = [each.report() for each in started]
        outcomes = [_read_outcomes(Path(folder, f"outcomes_{rank}")) for rank in range(processes)]
    failures = {
        rank: failure
        for rank, found in enumerate(outcomes)
        for failure in found
        if isinstance(failure, _Failure)
    }
    _raise_unless_sound(exits, late, may_die, failures)
    columns = [
        [found[index] if index < len(found) else exits[rank] for rank, found in enumerate(outcomes)]
        for index in range(len(names))
    ]
    return columns[0] if isinstance(target, str) or callable(target) else columns


def run_program(
    arguments: Sequence[str | Path],
    processes: int = 1,
    *,
    timeout_seconds: float = 2 * LAUNCH_SECONDS,
    may_die: Collection[int] = (),
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> list[RankExit]:
    """Run `python <arguments>` once per rank, as torchrun would, and return how each ended.

    A rank in `may_die` may end in any way; every other one must exit with 0.

    Raises:
        RanksFailedError: a rank that may not die did, or the deadline.
    """
    with _rendezvous(processes) as shared, tempfile.TemporaryDirectory() as folder:
        started = []
        try:
            for rank in range(processes):
                output = Path(folder, f"output_{rank}")
                with output.open("wb") as stream:
                    process = subprocess.Popen(
                        [sys.executable, *map(str, arguments)],
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        env={
                            **os.environ,
                            "PYTHONFAULTHANDLER": "1",
                            **shared,
                            **_rank_environment(rank),
                            **(environment or {}),
                        },
                        cwd=directory,
                        start_new_session=True,
                    )
                started.append(_Rank(rank, process.pid, process.poll, output))
            late = _watch(started, timeout_seconds, may_die)
        finally:
            _end(started)
        exits = [each.report() for each in started]
    _raise_unless_sound(exits, late, may_die, {})
    return exits


# In the parent: watching.


@dataclass(frozen=True)
class _Rank:
    rank: int
    pid: int
    poll: Callable[[], int | None]
    output: Path

    def signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # it leads a group: what it started ends too
            self.signal(signal.SIGKILL)  # unless it had no time yet to lead one

    def report(self) -> RankExit:
        exit_code = self.poll()
        assert exit_code is not None, "reported before its end"
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        return RankExit(self.rank, exit_code, text)


def _watch(ranks: Sequence[_Rank], timeout_seconds: float, may_die: Collection[int]) -> list[int]:
    """Wait for all ranks and return those that had to be stopped, after dumping their stacks."""
    deadline = time.monotonic() + timeout_seconds
    waiting = list(ranks)
    failed = False
    while waiting and time.monotonic() < deadline:
        for each in list(waiting):
            if (exit_code := each.poll()) is not None:
                waiting.remove(each)
                if exit_code != 0 and each.rank not in may_die and not failed:
                    # The others may now wait for it for ever; their stacks would say nothing new.
                    failed = True
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(_POLL_SECONDS)
    for each in waiting:
        each.signal(signal.SIGABRT)  # faulthandler writes the stacks of all threads, then it dies
    grace = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < grace and any(each.poll() is None for each in waiting):
        time.sleep(_POLL_SECONDS)
    return [each.rank for each in waiting]


def _end(ranks: Sequence[_Rank]) -> None:
    for each in ranks:
        each.kill()
    for each in ranks:
        while each.poll() is None:
            time.sleep(_POLL_SECONDS)


def _raise_unless_sound(
    exits: Sequence[RankExit],
    late: Collection[int],
    may_die: Collection[int],
    failures: Mapping[int, _Failure],
) -> None:
    dead = [
        each.rank
        for each in exits
        if each.exit_code != 0
        and each.rank not in late
        and each.rank not in failures
        and each.rank not in may_die
    ]
    shown = "\n".join(
        f"--- output of rank {each.rank} (exit code {each.exit_code}):\n"
        f"{each.output[-_SHOWN_CHARACTERS:].rstrip()}"
        for each in exits
    )
    if not failures and not dead and not late:
        sys.stdout.write(shown + "\n")  # pytest shows it if the test fails later
        return
    first = min(failures.values(), key=lambda failure: failure.time, default=None)
    lines = [f"rank {rank} raised:\n{failure.traceback}" for rank, failure in failures.items()]
    lines += [f"rank {rank} died with exit code {exits[rank].exit_code}" for rank in dead]
    if late:
        why = "after another rank failed" if failures or dead else "in time"
        lines.append(f"ranks {sorted(late)} did not end {why}; their stacks are in their output")
    error = RanksFailedError("\n".join([*lines, shown]), exits)
    raise error from (None if first is None else first.load())


def _exit_code(process: multiprocessing.process.BaseProcess) -> int | None:
    return process.exitcode


# In the parent: starting.


@functools.cache
def _fork_server() -> ForkServerContext:
    """Return the context whose server has torch imported, having waited for it."""
    context = multiprocessing.get_context("forkserver")
    has_nvrx = find_spec("nvidia_resiliency_ext") is not None
    preloaded = _PRELOADED_WITH_NVRX if has_nvrx else _PRELOADED
    context.set_forkserver_preload(preloaded)
    with _environment(
        OMP_NUM_THREADS="1",  # no pool of threads may exist when the server forks
        OPENBLAS_NUM_THREADS="1",
        PYTORCH_NVML_BASED_CUDA_CHECK="1",  # nor a CUDA context
        PYTHONWARNINGS="ignore",  # whatever the imports warn of, a test's own process has shown
    ):
        first = context.Process(target=_expect_loaded, args=(preloaded,))
        first.start()
    first.join()
    assert first.exitcode == 0, "the server that ranks are forked from does not start"
    return context


def _expect_loaded(names: Sequence[str]) -> None:
    """Demand that the server has imported these; it passes over what it cannot import."""
    if missing := [name for name in names if name not in sys.modules]:
        raise ImportError(f"not imported by the server that ranks are forked from: {missing}")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _rendezvous(processes: int) -> Iterator[dict[str, str]]:
    """Host the rendezvous store, as torchrun's agent does, on a port that the system chooses."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in __all__

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
    }


def _rank_environment(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _name(function: Callable[..., Any]) -> str:
    name = f"{function.__module__}:{function.__qualname__}"
    if "<" in name:
        raise ValueError(f"{name} is not at the top level of its module: no rank can import it")
    return name


# In the ranks.


@dataclass(frozen=True)
class _Order:
    """What one rank is to do."""

    targets: Sequence[str]
    arguments: bytes
    environment: Mapping[str, str]
    output: Path
    outcomes: Path
    timeout_seconds: float
    initialise: bool


@dataclass(frozen=True)
class _Failure:
    """An exception on a rank; its pickle is None where it has none."""

    traceback: str
    time: float
    content: bytes | None

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        content = None
        with contextlib.suppress(Exception):
            content = pickle.dumps(error)
            pickle.loads(content)
        return cls("".join(traceback.format_exception(error)), time.time(), content)

    def load(self) -> BaseException | None:
        with contextlib.suppress(Exception):
            error = pickle.loads(self.content or b"")
            return error if isinstance(error, BaseException) else None
        return None


def _be_rank(order: _Order) -> None:
    """Run in a fork of the server: carry out an order and write an outcome per target."""
    os.setpgid(0, 0)
    descriptor = os.open(order.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a text stream here
    faulthandler.enable()  # a rank killed by SIGABRT shows the stacks of all its threads
    # Should the parent itself be gone by then.
    faulthandler.dump_traceback_later(order.timeout_seconds + 3 * _GRACE_SECONDS, exit=True)
    os.environ.update(order.environment)
    random.seed()  # as in a fresh process; forks share their server's state
    with order.outcomes.open("wb") as outcomes:

        def record(outcome: Any) -> None:
            outcomes.write(pickle.dumps(outcome))
            outcomes.flush()

        try:
            _carry_out(order, record)
        except BaseException as error:  # noqa: BLE001  # reported to the parent, whatever it is
            traceback.print_exception(error)
            record(_Failure.of(error))
            sys.stderr.flush()
            os._exit(1)  # a clean exit could wait for the others


def _carry_out(order: _Order, record: Callable[[Any], None]) -> None:
    import numpy as np
    import torch
    from torch import distributed

    np.random.seed(None)
    torch.set_num_threads(1)
    arguments = pickle.loads(order.arguments)
    functions = [_resolve(name) for name in order.targets]
    if order.initialise:
        distributed.init_process_group("gloo")
        distributed.barrier()  # a rank that ends at once would break what others still connect
    for index, function in enumerate(functions):
        if index > 0 and distributed.is_initialized():
            distributed.barrier()  # no rank runs ahead into the next target
        record(function(*arguments))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _resolve(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Any = import_module(module)
    for part in function.split("."):
        found = getattr(found, part)
    resolved: Callable[..., Any] = found
    return resolved


def _read_outcomes(path: Path) -> list[Any]:
    """Read what a rank wrote until its end; a torn last outcome counts as none."""
    found: list[Any] = []
    if path.exists():
        with path.open("rb") as stream, contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                found.append(pickle.load(stream))
    return found
