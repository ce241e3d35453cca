"""Train on two ranks under random SIGKILL for as long as asked, and lose nothing.

    python -m tests.faults.soak --seconds 60 --seed 1

One rank or both are killed at random moments, and the same command is started again: DDP, an
asynchronous save every few steps, the newest two checkpoints kept. At the end the steps that the
last resumed start counts on must have the losses and the state of a run that nobody killed, bit for
bit. Prints what happened; exits with 1 where a checkpoint was lost or anything was wrong.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.events import ON_CHECKPOINT_SAVE, CallbackManager
from tests.faults.jobs import Job, damages, job_of_rank, leftovers
from tests.support.ranks import RanksFailedError, run_ranks
from tests.support.states import digest

RANKS = 2
SAVE_EVERY = 5
"""Steps."""
LAST_STEPS = 20
"""Trained in peace at the end."""
LAUNCH_SECONDS = 60.0
"""A launch that has not ended by then hangs."""


# What the ranks run.


class _Notes:
    """One line per thing that happened on a rank; a line that was written survives its death."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def put(self, *words: object) -> None:
        os.write(self._descriptor, f"{' '.join(map(str, words))}\n".encode())


def _train(store: Path, folder: Path, until: int | None) -> None:
    """Resume and train until a step, or until killed."""
    keep = {"directory": str(store), "keep": {"last": 2}}
    job = job_of_rank(store, async_save=True, timeout_seconds=3.0, persistent=keep)
    rank = int(os.environ["RANK"])
    notes = _Notes(folder / f"rank_{rank}")
    notes.put("pid", os.getpid())
    result = job.load()
    notes.put("loaded", result.iteration)
    notes.put("state", job.step, digest(job.digests()))
    callbacks = CallbackManager()
    callbacks.register(ON_CHECKPOINT_SAVE, lambda event: notes.put("saved", event.iteration))
    while until is None or job.step < until:
        _take_step(job, notes)
        if job.step % SAVE_EVERY == 0:
            job.begin_save(callbacks)
        job.manager.finalize_async_saves(job.state)
    job.manager.finalize_async_saves(job.state, blocking=True, terminate=True)


def _train_uninterrupted(store: Path, folder: Path, until: int) -> None:
    """The same without a save or a load."""
    job = job_of_rank(store)
    notes = _Notes(folder / f"rank_{os.environ['RANK']}")
    while job.step < until:
        _take_step(job, notes)


def _take_step(job: Job, notes: _Notes) -> None:
    [loss] = job.run.train(1)
    job.state.train_state.step += 1
    notes.put("loss", job.step, loss.hex())
    if job.step % SAVE_EVERY == 0:
        notes.put("state", job.step, digest(job.digests()))


# What the notes say.


@dataclass
class _Record:
    """What one rank noted in one launch."""

    pid: int | None = None
    loaded: int | None = None
    saved: list[int] = field(default_factory=list)
    facts: dict[tuple[str, int], str] = field(default_factory=dict)
    """Losses and states by step."""

    @classmethod
    def read(cls, path: Path) -> _Record:
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
            elif kind == "saved":
                record.saved.append(int(values[0]))
            else:
                record.facts[kind, int(values[0])] = values[1]
        return record


@dataclass
class Tally:
    """What happened in a soak."""

    saves: int = 0
    kills: int = 0
    resumes: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Soak:
    """Launches and kills, and their notes."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.store = folder / "store"
        self._folder = folder
        self._rng = random.Random(seed)
        self._launches: list[Path] = []
        self.tally = Tally()

    def launch_and_kill(self) -> None:
        """Start the run, kill one rank or both at a random moment, and wait for the end of all."""
        folder = self._next_folder()
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

    def finish(self) -> None:
        """Train the last steps in peace, and compare everything with a run that nobody killed."""
        reached = max((step for _, step in self._facts(0)), default=0)
        until = reached + LAST_STEPS
        self._launch(self._next_folder(), until)
        reference = self._folder / "reference"
        run_ranks(_train_uninterrupted, RANKS, self.store, reference, until, timeout_seconds=600.0)
        for rank in range(RANKS):
            found, expected = self._facts(rank), _Record.read(reference / f"rank_{rank}").facts
            for (kind, step), value in expected.items():
                if found.get((kind, step)) != value:
                    self.tally.wrong.append(f"rank {rank}, step {step}: another {kind}")
        self._follow()
        self.tally.wrong += damages(self.store)
        self.tally.wrong += [f"left behind: {each}" for each in leftovers(self.store)]

    def _follow(self) -> None:
        """Go through the launches in order: what was acknowledged, and what was found."""
        acknowledged = 0
        known: dict[tuple[int, str, int], str] = {}
        for folder in self._launches:
            records = [_Record.read(folder / f"rank_{rank}") for rank in range(RANKS)]
            loaded = [each.loaded for each in records if each.loaded is not None]
            if len(set(loaded)) > 1:
                self.tally.wrong.append(f"{folder.name}: ranks resumed from {loaded}")
            if loaded:
                self.tally.resumes += loaded[0] > 0
                if loaded[0] < acknowledged:
                    self.tally.lost.append(
                        f"{folder.name}: resumed from {loaded[0]}, {acknowledged} was acknowledged"
                    )
            saved = {step for each in records for step in each.saved}
            self.tally.saves += len(saved)
            acknowledged = max([acknowledged, *saved])
            for rank, record in enumerate(records):
                for (kind, step), value in record.facts.items():
                    if known.setdefault((rank, kind, step), value) != value:
                        self.tally.wrong.append(
                            f"{folder.name}, rank {rank}, step {step}: another {kind} than before"
                        )

    def _launch(self, folder: Path, until: int | None) -> None:
        everybody = range(RANKS) if until is None else ()
        try:
            run_ranks(
                _train, RANKS, self.store, folder, until,
                may_die=everybody, timeout_seconds=LAUNCH_SECONDS,
            )  # fmt: skip
        except RanksFailedError as error:
            # Of a rank that was left alone an error is expected, and soon; of others none.
            hung = [each.rank for each in error.exits if each.signal is signal.SIGABRT]
            unmoved = all(each.exit_code >= 0 for each in error.exits)
            if hung or unmoved:
                self.tally.wrong.append(f"{folder.name}: ranks {hung or 'all'} failed: {error}")

    def _next_folder(self) -> Path:
        self._launches.append(self._folder / f"launch_{len(self._launches):04d}")
        self._launches[-1].mkdir()
        return self._launches[-1]

    def _wait_for_pids(self, folder: Path, launch: threading.Thread) -> list[int]:
        while launch.is_alive():
            pids = [_Record.read(folder / f"rank_{rank}").pid for rank in range(RANKS)]
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
        for folder in self._launches:
            found |= _Record.read(folder / f"rank_{rank}").facts
        return found


def main() -> int:
    """Soak for as long as asked and print the outcome; the exit code says whether it was good."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    _say(f"soaking for {arguments.seconds:g} s, seed {seed}")
    # What the ranks print of being killed is of no interest; what is wrong is told at the end.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        soak = Soak(Path(folder), seed)
        deadline = time.monotonic() + arguments.seconds
        while time.monotonic() < deadline:
            soak.launch_and_kill()
        soak.finish()
    tally = soak.tally
    for each in (*tally.lost, *tally.wrong):
        _say(each)
    _say(
        f"saves: {tally.saves}, kills: {tally.kills}, resumes: {tally.resumes}, "
        f"lost: {len(tally.lost)}, wrong: {len(tally.wrong)}"
    )
    proved = tally.saves > 0 and tally.kills > 0 and tally.resumes > 0
    if not proved:
        _say("too short to prove anything")
    return 0 if proved and not tally.lost and not tally.wrong else 1


def _say(line: str) -> None:
    assert sys.__stdout__ is not None
    sys.__stdout__.write(f"{line}\n")
    sys.__stdout__.flush()


if __name__ == "__main__":
    sys.exit(main())
