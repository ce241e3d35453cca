"""Train on two ranks under random SIGKILL for as long as asked, and lose nothing.

    python -m tests.faults.soak --seconds 60 --seed 1

One rank or both are killed at random moments, and the same command is started again: DDP, an
asynchronous save every few steps, the newest two checkpoints kept. At the end the steps that the
last resumed start counts on must have the losses and the state of a run that nobody killed, bit for
bit. Prints what happened; exits with 1 where a checkpoint was lost or anything was wrong.

With `--tiered` the ranks sit on two simulated nodes, each with a directory in RAM and a copy of the
other's shard: all saves but every fourth are local alone, and between two starts a node's memory is
sometimes lost, or that of both, after which the newest persistent checkpoint has to be there. Both
are lost as well where one loses its memory, no save comes about, and then the other does.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.events import ON_CHECKPOINT_SAVE, CallbackManager
from holdfast.storage.manifest import LOCAL, PERSISTENT
from tests.faults.jobs import Job, damages, job_of_rank, leftovers
from tests.support.deadlines import LAUNCH_SECONDS
from tests.support.ranks import RanksFailedError, run_ranks
from tests.support.states import digest

RANKS = 2
SAVE_EVERY = 5
"""Steps."""
PERSIST_EVERY = 20
"""Steps; with a local tier, where saves between are local alone."""
NODES = ("a", "b")
"""By rank."""
LAST_STEPS = 20
"""Trained in peace at the end."""


# What the ranks run.


class Notes:
    """One line per thing that happened on a rank; a line that was written survives its death."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def put(self, *words: object) -> None:
        line = " ".join(" ".join(map(str, words)).split())  # a reason may have several lines
        os.write(self._descriptor, f"{line}\n".encode())


def _train(store: Path, folder: Path, until: int | None, nodes: Path | None) -> None:
    """Resume and train until a step, or until killed; `nodes`: where their memory is, if any."""
    keep = {"directory": str(store), "keep": {"last": 2}}
    rank = int(os.environ["RANK"])
    local: dict[str, object] = {}
    if nodes is not None:
        os.environ["HOLDFAST_NODE"] = NODES[rank]
        local = {"directory": str(nodes / NODES[rank]), "replication": {"factor": 2}}
    # Whoever is left alone shall say so soon; where nobody is killed, nobody is hurried.
    deadline = {"timeout_seconds": 3.0} if until is None else {}
    job = job_of_rank(store, async_save=True, persistent=keep, local=local, **deadline)
    notes = Notes(folder / f"rank_{rank}")
    notes.put("pid", os.getpid())
    result = job.load()
    notes.put("loaded", result.iteration)
    notes.put("from", result.tier or "nothing")
    for passed in result.skipped:
        notes.put("passed", passed.iteration, passed.reason)
    notes.put("state", job.step, digest(job.digests()))
    callbacks = CallbackManager()
    callbacks.register(
        ON_CHECKPOINT_SAVE, lambda event: notes.put("saved", event.iteration, event.tier)
    )
    while until is None or job.step < until:
        _take_step(job, notes)
        if job.step % SAVE_EVERY == 0:
            to_local = nodes is not None and job.step % PERSIST_EVERY != 0
            job.begin_save(callbacks, to_local=to_local)
        job.manager.finalize_async_saves(job.state)
    job.manager.finalize_async_saves(job.state, blocking=True, terminate=True)


def _train_uninterrupted(store: Path, folder: Path, until: int) -> None:
    """The same without a save or a load."""
    job = job_of_rank(store)
    notes = Notes(folder / f"rank_{os.environ['RANK']}")
    while job.step < until:
        _take_step(job, notes)


def _take_step(job: Job, notes: Notes) -> None:
    [loss] = job.run.train(1)
    job.state.train_state.step += 1
    notes.put("loss", job.step, loss.hex())
    if job.step % SAVE_EVERY == 0:
        notes.put("state", job.step, digest(job.digests()))


# What the notes say.


@dataclass
class Record:
    """What one rank noted in one launch."""

    pid: int | None = None
    loaded: int | None = None
    tier: str = ""
    """That it was loaded from."""
    saved: list[tuple[int, str]] = field(default_factory=list)
    """Steps, with the tier that they were saved to."""
    passed: list[str] = field(default_factory=list)
    """What the load passed over, with reasons."""
    facts: dict[tuple[str, int], str] = field(default_factory=dict)
    """Losses and states by step."""

    @classmethod
    def read(cls, path: Path) -> Record:
        record = cls()
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if not line.endswith("\n"):
                break  # it died in the middle of it
            kind, *values = line.split()
            if kind == "pid":
                record.pid = int(values[0])
            elif kind == "loaded":
                record.loaded = int(values[0])
            elif kind == "from":
                record.tier = values[0]
            elif kind == "passed":
                record.passed.append(" ".join(values))
            elif kind == "saved":
                record.saved.append((int(values[0]), values[1]))
            else:
                record.facts[kind, int(values[0])] = values[1]
        return record


@dataclass
class Tally:
    """What happened in a soak."""

    saves: Counter[str] = field(default_factory=Counter)
    """By tier."""
    kills: int = 0
    resumes: Counter[str] = field(default_factory=Counter)
    """By tier."""
    losses_of_nodes: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Soak:
    """Launches and kills, and their notes."""

    def __init__(self, folder: Path, seed: int, nodes: Path | None = None) -> None:
        """`nodes`: where the memory of simulated nodes is; None: there is no local tier."""
        self.store = folder / "store"
        self._nodes = nodes
        self.losses: dict[Path, set[str]] = {}
        """By launch: the nodes that lost their memory before it."""
        self._folder = folder
        self._rng = random.Random(seed)
        self.launches: list[Path] = []
        self.tally = Tally()

    def launch_and_kill(self) -> None:
        """Start the run, kill one rank or both at a random moment, and wait for the end of all."""
        folder = self.next_folder()
        launch = threading.Thread(target=self._launch, args=(folder, None))
        launch.start()
        pids = self._wait_for_pids(folder, launch)
        victims = self._rng.choice([[0], [1], [0, 1]])
        # Starting and loading included, and several saves.
        time.sleep(self._rng.uniform(0.0, 1.2))
        if not launch.is_alive():
            self.tally.wrong.append(f"{folder.name}: ended before anybody was killed")
            return
        self._kill([pids[rank] for rank in victims])
        self.tally.kills += len(victims)
        if self._rng.random() < 0.9:
            # As launchers do once a worker has died; else the other has to find out by itself.
            time.sleep(self._rng.uniform(0.0, 0.3))
            self._kill(pids)
        launch.join()
        if self._nodes is not None and self._rng.random() < 0.4:
            self._lose(self._rng.choice([NODES[:1], NODES[1:], NODES, NODES]))

    def _lose(self, names: Sequence[str]) -> None:
        """Lose the memory of nodes before the next launch."""
        assert self._nodes is not None
        for name in names:
            shutil.rmtree(self._nodes / name, ignore_errors=True)
        self.losses[self._folder_of(len(self.launches))] = set(names)
        self.tally.losses_of_nodes += len(names)

    def finish(self) -> None:
        """Train the last steps in peace, and compare everything with a run that nobody killed."""
        reached = max((step for _, step in self._facts(0)), default=0)
        until = reached + LAST_STEPS
        self._launch(self.next_folder(), until)
        reference = self._folder / "reference"
        run_ranks(
            _train_uninterrupted,
            RANKS,
            self.store,
            reference,
            until,
            timeout_seconds=10 * LAUNCH_SECONDS,
        )
        for rank in range(RANKS):
            found, expected = self._facts(rank), Record.read(reference / f"rank_{rank}").facts
            for (kind, step), value in expected.items():
                if found.get((kind, step)) != value:
                    self.tally.wrong.append(f"rank {rank}, step {step}: another {kind}")
        self.follow()
        self.tally.wrong += damages(self.store)
        self.tally.wrong += [f"left behind: {each}" for each in leftovers(self.store)]
        if self._nodes is not None:
            self.tally.wrong += [
                f"left behind: {each}" for each in self._nodes.rglob("*-*") if each.is_file()
            ]

    def follow(self) -> None:
        """Go through the launches in order: what was acknowledged, and what was found."""
        acknowledged = persisted = 0
        empty: set[str] = set()  # nodes without a copy of what is acknowledged
        known: dict[tuple[int, str, int], str] = {}
        for folder in self.launches:
            records = [Record.read(folder / f"rank_{rank}") for rank in range(RANKS)]
            loaded = [each.loaded for each in records if each.loaded is not None]
            if len(set(loaded)) > 1:
                self.tally.wrong.append(f"{folder.name}: ranks resumed from {loaded}")
            empty |= self.losses.get(folder, set())
            if empty.issuperset(NODES):
                acknowledged = persisted
            if loaded:
                record = next(each for each in records if each.loaded is not None)
                self.tally.resumes[record.tier] += loaded[0] > 0
                if loaded[0] < acknowledged:
                    tiers = LOCAL if acknowledged > persisted else PERSISTENT
                    self.tally.lost.append(
                        f"{folder.name}: resumed from {loaded[0]}, {acknowledged} was acknowledged "
                        f"({tiers}); passed over: {record.passed or 'nothing'}"
                    )
            saved = {each for record in records for each in record.saved}
            self.tally.saves.update(tier for _, tier in saved)
            acknowledged = max([acknowledged, *(step for step, _ in saved)])
            if saved:
                empty = set()  # each has its own shard of it and a copy of the other's
            persisted = max([persisted, *(step for step, tier in saved if tier == PERSISTENT)])
            for rank, each in enumerate(records):
                for (kind, step), value in each.facts.items():
                    if known.setdefault((rank, kind, step), value) != value:
                        self.tally.wrong.append(
                            f"{folder.name}, rank {rank}, step {step}: another {kind} than before"
                        )

    def _launch(self, folder: Path, until: int | None) -> None:
        everybody = range(RANKS) if until is None else ()
        try:
            run_ranks(
                _train, RANKS, self.store, folder, until, self._nodes,
                may_die=everybody, timeout_seconds=LAUNCH_SECONDS,
            )  # fmt: skip
        except RanksFailedError as error:
            # Of a rank that was left alone an error is expected, and soon; of others none.
            hung = [each.rank for each in error.exits if each.signal is signal.SIGABRT]
            unmoved = all(each.exit_code >= 0 for each in error.exits)
            if hung or unmoved:
                self.tally.wrong.append(f"{folder.name}: ranks {hung or 'all'} failed: {error}")

    def next_folder(self) -> Path:
        self.launches.append(self._folder_of(len(self.launches)))
        self.launches[-1].mkdir()
        return self.launches[-1]

    def _folder_of(self, number: int) -> Path:
        return self._folder / f"launch_{number:04d}"

    def _wait_for_pids(self, folder: Path, launch: threading.Thread) -> list[int]:
        while launch.is_alive():
            pids = [Record.read(folder / f"rank_{rank}").pid for rank in range(RANKS)]
            found = [each for each in pids if each is not None]
            if len(found) == RANKS:
                return found
            time.sleep(0.005)
        raise AssertionError(f"the launch ended before its ranks began: {self.tally.wrong}")

    @staticmethod
    def _kill(pids: Sequence[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _facts(self, rank: int) -> dict[tuple[str, int], str]:
        """Return losses and states by step, of the last launch that came by."""
        found: dict[tuple[str, int], str] = {}
        for folder in self.launches:
            found |= Record.read(folder / f"rank_{rank}").facts
        return found


def main() -> int:
    """Soak for as long as asked and print the outcome; the exit code says whether it was good."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--tiered", action="store_true", help="with a local tier on two nodes")
    arguments = parser.parse_args()
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    _say(f"soaking for {arguments.seconds:g} s, seed {seed}")
    # What the ranks print of being killed is of no interest; what is wrong is told at the end.
    memory = tempfile.TemporaryDirectory(dir="/dev/shm") if arguments.tiered else nullcontext()
    with tempfile.TemporaryDirectory() as folder, memory as nodes, redirect_stdout(io.StringIO()):
        soak = Soak(Path(folder), seed, Path(nodes) if nodes is not None else None)
        deadline = time.monotonic() + arguments.seconds
        while time.monotonic() < deadline:
            soak.launch_and_kill()
        soak.finish()
    tally = soak.tally
    for each in (*tally.lost, *tally.wrong):
        _say(each)
    saves, resumes = tally.saves.total(), tally.resumes.total()
    _say(
        f"saves: {saves}, kills: {tally.kills}, resumes: {resumes}, "
        f"lost: {len(tally.lost)}, wrong: {len(tally.wrong)}"
    )
    proved = saves > 0 and tally.kills > 0 and resumes > 0
    if arguments.tiered:
        for tier in (LOCAL, PERSISTENT):
            lost = sum(f"({tier})" in each for each in tally.lost)
            _say(
                f"  {tier}: saves: {tally.saves[tier]}, resumes: {tally.resumes[tier]}, "
                f"lost: {lost}"
            )
            proved = proved and tally.saves[tier] > 0 and tally.resumes[tier] > 0
        _say(f"  memory of a node lost: {tally.losses_of_nodes} times")
    if not proved:
        _say("too short to prove anything")
    return 0 if proved and not tally.lost and not tally.wrong else 1


def _say(line: str) -> None:
    assert sys.__stdout__ is not None
    sys.__stdout__.write(f"{line}\n")
    sys.__stdout__.flush()


if __name__ == "__main__":
    sys.exit(main())
