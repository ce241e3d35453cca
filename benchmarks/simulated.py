"""Simulated ranks: many managers in one process, each with clients of its own on one real store.

Owns a process of ranks: a thread, a manager, a model with AdamW and its own connections to the
rendezvous store for each. What runs is the code of a real job: the whole manager, over a TCPStore
server. Three things are simulated. There is no process group: rank and world size are given to
the channels, and a sharded parameter is a DTensor over a mesh that has none. Ranks of a simulated
node share a directory of their own in RAM. Copies of shards are not sent: they go between two
ranks and never through the store. All ranks share the machine's cores, so that seconds of a whole
call contain the work of all ranks, one after the other; seconds of agreeing are measured by a
replay of the same exchanges, with the values that were really sent and no work between them.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, TypeVar
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from holdfast.config import CheckpointConfig
from holdfast.events import CallbackManager
from holdfast.filesystem import LocalFilesystem
from holdfast.manager import DefaultCheckpointManager
from holdfast.protocol import CheckpointLoadContext, CheckpointSaveContext, GlobalState, TrainState
from holdfast.ranks.channels import Channels
from holdfast.ranks.coordinator import Coordinator, StoreCoordinator
from holdfast.ranks.entry import Arrival, Entry, Ruling

R = TypeVar("R")

_NODE: ContextVar[str] = ContextVar("node", default="node")
_COLUMNS = 16
_STACK_BYTES = 256 << 10
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class World:
    """What is simulated."""

    ranks: int
    node_ranks: int
    tensors: int
    directory: str
    local: bool
    timeout_seconds: float = 300.0
    rows: int = 4
    """Of each parameter, on each rank."""


@dataclass
class Report:
    """What one process says of a phase."""

    began: float
    ended: float
    cpu_seconds: float
    """Of the whole process."""
    error: str | None = None
    exchanges: dict[str, int] = field(default_factory=dict)
    """By kind, of the first rank of this process."""
    details: list[str] = field(default_factory=list)


class Recorder:
    """A channel that notes what its rank gives and gets, and can do it again without the work."""

    def __init__(self, inner: StoreCoordinator) -> None:
        self._inner = inner
        self.rank, self.world_size = inner.rank, inner.world_size
        self.timeout_seconds = inner.timeout_seconds
        self.notes: list[tuple[str, str, bytes, bytes]] = []
        """Kind, stage, and pickled: what this rank gave, and what rank 0 made of it."""

    def begin(self, stage: str, enter: Callable[[], Any], admit: Callable[[], Any]) -> Any:
        """As the channel does; a replay needs no new call."""
        self.notes.append(("begin", stage, b"", b""))
        return self._inner.begin(stage, enter, admit)

    def begin_as(
        self, stage: str, arrival: Arrival, cause: BaseException | None, admit: Callable[[bool], R]
    ) -> Ruling[R]:
        """As the channel does; a replay needs no new call."""
        self.notes.append(("begin", stage, b"", b""))
        return self._inner.begin_as(stage, arrival, cause, admit)

    def begin_alike(self, stage: str, entry: Entry, admit: Callable[[], R]) -> R:
        """As the channel does."""
        self.notes.append(("begin_alike", stage, b"", b""))
        return self._inner.begin_alike(stage, entry, admit)

    def decline(self, stage: str, name: str | None) -> None:
        """As the channel does."""
        self._inner.decline(stage, name)

    def expect_alike(self) -> None:
        """As the channel does."""
        self._inner.expect_alike()

    @property
    def call(self) -> object:
        """As of the channel."""
        return self._inner.call

    def follow(self, call: object) -> None:
        """As the channel does."""
        self._inner.follow(call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _noting(self, kind: str, stage: str, work: Callable[[], Any]) -> Callable[[], Any]:
        def noted() -> Any:
            value = work()
            place = len(self.notes)
            self.notes.append((kind, stage, pickle.dumps(value), b""))
            assert place < len(self.notes)
            return value

        return noted

    def all_gather(self, stage: str, work: Callable[[], Any]) -> Any:
        """As the channel does."""
        return self._inner.all_gather(stage, self._noting("all_gather", stage, work))

    def gather(self, stage: str, work: Callable[[], Any]) -> Any:
        """As the channel does."""
        return self._inner.gather(stage, self._noting("gather", stage, work))

    def all_reduce(
        self,
        stage: str,
        work: Callable[[], Any],
        judge: Callable[[list[Any]], Any],
        *,
        then: str | None = None,
    ) -> Any:
        """As the channel does."""

        def judged(values: list[Any]) -> Any:
            verdict = judge(values)
            kind, name, value, _ = self.notes[-1]
            self.notes[-1] = (kind, name, value, pickle.dumps(verdict))
            return verdict

        noting = self._noting("all_reduce", stage, work)
        return self._inner.all_reduce(stage, noting, judged, then=then)

    def broadcast(self, stage: str, work: Callable[[], Any]) -> Any:
        """As the channel does."""
        if self.rank != 0:
            self.notes.append(("broadcast", stage, b"", b""))
        return self._inner.broadcast(stage, self._noting("broadcast", stage, work))

    def scatter(self, stage: str, work: Callable[[], Sequence[Any]]) -> Any:
        """As the channel does."""
        if self.rank != 0:
            self.notes.append(("scatter", stage, b"", b""))
        return self._inner.scatter(stage, self._noting("scatter", stage, work))

    def replay(self) -> None:
        """Do every noted exchange again, on fresh turns."""
        for kind, stage, given, verdict in self.notes:
            value = pickle.loads(given) if given else None  # noqa: S301  # our own note
            stage = f"again {stage}"
            if kind == "begin":
                self._inner.begin(stage, lambda: ("again",), lambda: None)
            elif kind == "begin_alike":
                self._inner.expect_alike()
                self._inner.begin_alike(stage, ("again",), lambda: None)
            elif kind == "all_reduce":
                decided = pickle.loads(verdict) if verdict else None  # noqa: S301  # likewise
                self._inner.all_reduce(stage, partial(_same, value), partial(_same, decided))
            else:
                if kind == "scatter" and value is not None:  # noted by a job of another size
                    value = [*value, *([value[-1]] * self.world_size)][: self.world_size]
                getattr(self._inner, kind)(stage, partial(_same, value))


def _same(value: Any, *_: Any) -> Any:
    return value


class _Given(Channels):
    """The channels of a simulated rank: its own connections, made when first needed."""

    def __init__(self, connect: Callable[[], Any], rank: int, world: World, name: str) -> None:
        super().__init__(3, world.timeout_seconds, name)
        clients = [connect(), connect()]
        clients.append(clients[1])  # of drains, which are not simulated
        self.recorders = [
            Recorder(
                StoreCoordinator(client, rank, world.ranks, world.timeout_seconds, f"{name}/{n}")
            )
            for n, client in enumerate(clients)
        ]

    def open(self) -> list[Coordinator]:
        return list(self.recorders)


class SimulatedRank:
    """One rank: its live objects, its manager, and the thread that calls it."""

    def __init__(self, rank: int, world: World, port: int) -> None:
        self.rank, self.world = rank, world
        self._port = port
        self._clients: list[Any] = []
        self.manager: DefaultCheckpointManager | None = None
        self.channels: _Given | None = None
        self.model, self.optimizer = make_model(rank, world)
        self.state = GlobalState(train_state=TrainState())

    def _connect(self) -> Any:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

        timeout = timedelta(seconds=self.world.timeout_seconds)
        client = TCPStore(
            "127.0.0.1", self._port, is_master=False, wait_for_workers=False, timeout=timeout
        )
        self._clients.append(client)
        return client

    def start(self) -> None:
        """Make a manager, as a new process of the job does; the connections stay."""
        world, node = self.world, f"node{self.rank // self.world.node_ranks}"
        local = {"directory": f"{world.directory}/{node}"} if world.local else {}
        config = CheckpointConfig.from_mapping(
            {
                "persistent": {"directory": f"{world.directory}/store"},
                "local": local,
                "timeout_seconds": world.timeout_seconds,
            }
        )
        spare, self._clients = self._clients, []
        self.manager = DefaultCheckpointManager(config)

        def connect() -> Any:
            if spare:
                self._clients.append(spare.pop(0))
                return self._clients[-1]
            return self._connect()

        generation = getattr(self, "_generation", 0) + 1
        self._generation = generation
        name = f"scale/{generation}"
        channels = self.make_channels(connect, name)
        self.manager._channels = self.manager._saver._channels = channels
        self.channels = channels if isinstance(channels, _Given) else None

    def make_channels(self, connect: Callable[[], Any], name: str) -> Channels:
        """Return the channels of a new manager; a real rank has those of its process group."""
        return _Given(connect, self.rank, self.world, name)

    def load(self) -> None:
        """Load, or find nothing."""
        assert self.manager is not None
        self.manager.load(CheckpointLoadContext(self.state, self.model, self.optimizer, None))

    def save(self, *, non_persistent: bool = False) -> None:
        """Save, go on training without work until the outcome is told."""
        assert self.manager is not None
        told: list[Any] = []
        listener = CallbackManager()
        listener.register("on_checkpoint_save", told.append)
        self.state.train_state.step += 10
        context = CheckpointSaveContext(
            self.state, self.model, self.optimizer, None, non_persistent_ckpt=non_persistent
        )
        self.manager.save(context, listener)
        while not told:
            time.sleep(_POLL_SECONDS)
            self.state.train_state.step += 1
            self.manager.finalize_async_saves(self.state)

    def end(self) -> None:
        """End the manager, as a program that ends does."""
        assert self.manager is not None
        self.manager.finalize_async_saves(self.state, terminate=True)

    def forget(self) -> None:
        """Note exchanges from here on."""
        assert self.channels is not None
        for each in self.channels.recorders:
            each.notes.clear()

    def adopt(self, *, first: list[Any], others: list[Any]) -> None:
        """Take the notes of a smaller job: of its rank 0, or of one of the others."""
        assert self.channels is not None
        given = others if self.rank else first
        for each, notes in zip(self.channels.recorders, given, strict=True):
            each.notes = list(notes)

    def replay(self) -> None:
        """Do the noted exchanges again, channel by channel."""
        assert self.channels is not None
        for each in self.channels.recorders:
            each.replay()


class _Mesh(DeviceMesh):
    """A mesh equal to itself alone: torch caches by mesh what depends on this process's rank."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def make_model(rank: int, world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model whose parameters are sharded over all ranks, after one optimizer step."""
    mesh = _Mesh("cpu", torch.arange(world.ranks), _init_backend=False, _rank=rank)
    size = torch.Size((world.rows * world.ranks, _COLUMNS))
    meta = TensorMeta(size, (_COLUMNS, 1), torch.float32)
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=meta)

    def shard() -> DTensor:
        make: Any = DTensor
        local = torch.full((world.rows, _COLUMNS), float(rank))
        made: DTensor = make(local, spec, requires_grad=False)
        return made

    model = nn.Module()
    for number in range(world.tensors):
        model.register_parameter(f"weight{number}", nn.Parameter(shard()))
    optimizer = torch.optim.AdamW(model.parameters())
    for each in model.parameters():
        each.grad = shard()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


_opened: Counter[tuple[str, str]] = Counter()
"""By node and file of a checkpoint: how often it was opened for reading."""


@contextlib.contextmanager
def simulation() -> Iterator[None]:
    """Replace what a simulated rank cannot have: a host of its own, and a process group."""

    def name_node(override: str | None = None) -> str:
        return override or _NODE.get()

    def open_and_count(self: LocalFilesystem, path: Path) -> BinaryIO:
        if path.parent.name.startswith("iter_"):
            _opened[_NODE.get(), path.name] += 1
        return open_existing(self, path)

    open_existing = LocalFilesystem.open_existing
    replaced: list[tuple[str, Any]] = [
        ("tiers.local.budget.node_name", name_node),
        ("read.together.node_name", name_node),
        ("tiers.local.tier.make_replication", lambda *_: None),
        ("filesystem.LocalFilesystem.open_existing", open_and_count),
    ]
    with contextlib.ExitStack() as undone:
        for name, value in replaced:
            undone.enter_context(patch(f"holdfast.{name}", value))
        yield


def serve_ranks(ranks: Sequence[int], world: World, port: int, pipe: Connection) -> None:
    """Be a process of ranks: carry out phases by name until the pipe is closed."""
    torch.set_num_threads(1)
    threading.stack_size(_STACK_BYTES)
    sys.setswitchinterval(5.0)  # hundreds of threads that wait for the interpreter wake up so often
    simulated = [SimulatedRank(rank, world, port) for rank in ranks]
    orders: list[SimpleQueue[tuple[str, dict[str, Any]] | None]] = [
        SimpleQueue() for _ in simulated
    ]
    outcomes: SimpleQueue[tuple[float, str | None]] = SimpleQueue()

    def work(rank: SimulatedRank, queue: SimpleQueue[Any]) -> None:
        _NODE.set(f"node{rank.rank // world.node_ranks}")
        while (order := queue.get()) is not None:
            name, arguments = order
            problem = None
            try:
                getattr(rank, name)(**arguments)
            except BaseException as error:  # noqa: BLE001  # told to the driver
                problem = f"rank {rank.rank}: {type(error).__name__}: {error}"
            outcomes.put((time.monotonic(), problem))

    with simulation():
        threads = [
            threading.Thread(target=work, args=(each, queue), daemon=True)
            for each, queue in zip(simulated, orders, strict=True)
        ]
        for thread in threads:
            thread.start()
        gc.collect()
        gc.freeze()
        gc.disable()
        pipe.send("ready")
        while True:
            try:
                order = pipe.recv()
            except EOFError:
                return
            if order[0] == "opened":
                pipe.send(dict(_opened))
                _opened.clear()
                continue
            if order[0] == "notes":
                channels = simulated[0].channels
                pipe.send([] if channels is None else [each.notes for each in channels.recorders])
                continue
            began, cpu = time.monotonic(), time.process_time()
            for queue in orders:
                queue.put(order)
            ended = [outcomes.get() for _ in orders]
            problems = [problem for _, problem in ended if problem is not None]
            report = Report(
                began,
                max(moment for moment, _ in ended),
                time.process_time() - cpu,
                problems[0] if problems else None,
            )
            if (channels := simulated[0].channels) is not None:
                for each in channels.recorders:
                    for kind, stage, *_ in each.notes:
                        report.exchanges[kind] = report.exchanges.get(kind, 0) + 1
                        report.details.append(f"{kind}:{stage}")
            pipe.send(report)


def remove(directory: str) -> None:
    """Remove what a simulation has written."""
    import shutil

    shutil.rmtree(Path(directory), ignore_errors=True)
