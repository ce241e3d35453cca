"""Lose a node's memory and prove that nothing was lost with it.

Owns two runs of the same tiny training on two simulated nodes of this machine. Each node has a
launcher, two processes and a local directory of its own. One run is left alone. The other is
killed, a node's directory is removed, and the same commands start it again. Promises a zero exit
only when the processes died as planned, the run resumed from the iteration that the remaining files
hold, and every loss equals that of the run left alone, to the last bit.

    python recipes/lost_node.py
    python recipes/lost_node.py --lose node0 node1
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drill import STEPS, DrillError, Verdict, compare, conclude
from losses import LossCurve, read_losses

PROGRAM = Path(__file__).with_name("pretrain.py")
NODES = ("node0", "node1")
MEMORY = Path("/dev/shm")  # noqa: S108  # only ever with a fresh name below
REPEATED = ("skipped", "warning", "resumed")
"""How the lines of a restarted run begin that the drill prints too."""
_SHARD = re.compile(r"iter_([0-9]{7,})_([0-9]+)_local\.pt")
_SOURCE = re.compile(r"^source: rank ([0-9]+) has (.+?) from (.+)$", re.MULTILINE)
"""How the restarted run prints the sources of its state."""


@dataclass(frozen=True)
class ShardFile:
    """A file of the local tier: the shard's owner, its iteration, and the rank that holds it."""

    iteration: int
    owner: int
    holder: int
    """The rank in whose directory it is."""
    size_bytes: int


@dataclass(frozen=True)
class Origin:
    """Where a restarted rank got a part of its state from, as its load reported."""

    rank: int
    size: str
    place: str


@dataclass(frozen=True)
class Cluster:
    """Two nodes that are directories of this machine."""

    disk: Path
    """What both see."""
    memory: Path
    """Above what each of them has for itself."""
    per_node: int = 2
    """Processes on each."""

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.per_node * len(NODES)

    def node_of(self, rank: int) -> str:
        """Return the node that a rank runs on."""
        return NODES[rank // self.per_node]

    def run(self, name: str, *overrides: str) -> tuple[list[int], str]:
        """Run the main job on both nodes to its end or death; return statuses and output."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launchers = []
        logs = [self.disk / f"{name}-{node}.log" for node in NODES]
        for number, (node, log) in enumerate(zip(NODES, logs, strict=True)):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(NODES))]
            command += ["--node-rank", str(number), "--nproc-per-node", str(self.per_node)]
            command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
            command += [str(PROGRAM), "recipe=lost_node", f"steps={STEPS}"]
            command += [f"run_dir={self.disk / name}"]
            command += [f"checkpoint.local.directory={self.local(name, node)}", *overrides]
            environment = {"OMP_NUM_THREADS": "1", **os.environ, "HOLDFAST_NODE": node}
            with log.open("wb") as output:
                launchers.append(
                    subprocess.Popen(
                        command, env=environment, stdout=output, stderr=subprocess.STDOUT
                    )
                )
        try:
            statuses = [each.wait() for each in launchers]
        finally:
            for each in launchers:
                if each.poll() is None:  # this was interrupted; a launcher takes its ranks along
                    each.send_signal(signal.SIGTERM)
                    each.wait()
        return statuses, "".join(log.read_text(errors="replace") for log in logs)

    def run_to_end(self, name: str, *overrides: str) -> tuple[LossCurve, str]:
        """Run the main job and return its losses and what it printed.

        Raises:
            DrillError: it failed.
        """
        statuses, printed = self.run(name, *overrides)
        if any(statuses):
            raise DrillError(f"{name}: exit statuses {statuses}\n{printed}")
        return read_losses(self.disk / name), printed

    def run_to_death(self, name: str, *overrides: str) -> None:
        """Run the main job and see it die.

        Raises:
            DrillError: it did not, or not by SIGKILL.
        """
        statuses, printed = self.run(name, *overrides)
        if not all(statuses) or "SIGKILL" not in printed:
            raise DrillError(f"{name}: it was to be killed, but\n{printed}")

    def local(self, name: str, node: str) -> Path:
        """Return a node's local directory of a run."""
        return self.memory / name / node

    def lose(self, name: str, node: str) -> None:
        """Remove what a node had in memory."""
        shutil.rmtree(self.local(name, node))

    def shard_files(self, name: str) -> list[ShardFile]:
        """Return the local files of a run, on all nodes: `<run id>/<holder>/<shard>`."""
        found = []
        for node in NODES:
            for path in sorted(self.local(name, node).glob("*/*/iter_*")):
                if match := _SHARD.fullmatch(path.name):
                    iteration, owner = int(match[1]), int(match[2])
                    holder = int(path.parent.name)
                    found.append(ShardFile(iteration, owner, holder, path.stat().st_size))
        return found

    def persistent_iteration(self, name: str) -> int:
        """Return the newest iteration in the store of a run."""
        tracker = self.disk / name / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text())


def find_newest(files: Sequence[ShardFile], persistent: int, world_size: int) -> int:
    """Return the iteration that a restart resumes from.

    `persistent` is the newest iteration on disk: what the nodes have left must be as new, and of
    every rank. Takes every file for a whole shard, as all are with two copies of each.
    """
    complete = [
        iteration
        for iteration in {each.iteration for each in files}
        if {each.owner for each in files if each.iteration == iteration} == set(range(world_size))
    ]
    return max([persistent, *complete])


def read_origins(printed: str) -> list[Origin]:
    """Return where a restarted run got its state from, by rank."""
    found = [Origin(int(rank), size, place) for rank, size, place in _SOURCE.findall(printed)]
    return sorted(found, key=lambda each: each.rank)


def drill(cluster: Cluster, lost: Sequence[str]) -> tuple[Verdict, list[Origin], str]:
    """Make the two runs and compare; return where the state came from, and what the restart said.

    Raises:
        DrillError: a run did not end as planned, or resumed from elsewhere than the files say.
    """
    shape = f"{STEPS} steps by {cluster.world_size} processes on {' and '.join(NODES)}"
    print(f"1/3 {shape}, left alone", flush=True)
    alone, _ = cluster.run_to_end("alone", "crash_at_step=null")

    print("2/3 the same, killed", flush=True)
    cluster.run_to_death("killed")
    reached = read_losses(cluster.disk / "killed").furthest_step
    persistent = cluster.persistent_iteration("killed")
    had = find_newest(cluster.shard_files("killed"), persistent, cluster.world_size)
    if had <= persistent:
        raise DrillError(f"iteration {had} is the newest in memory, {persistent} on disk")
    print(f"    died at step {reached}: iteration {had} in memory, {persistent} on disk")
    for node in lost:
        cluster.lose("killed", node)
        print(f"    {node} is gone, with all that was in its memory")
    expected = find_newest(cluster.shard_files("killed"), persistent, cluster.world_size)

    print("3/3 the same commands again", flush=True)
    resumed, printed = cluster.run_to_end("killed")
    said = "\n".join(f"    {each}" for each in printed.splitlines() if each.startswith(REPEATED))
    if resumed.resumed_from[-1] != expected:
        raise DrillError(
            f"it resumed from iteration {resumed.resumed_from[-1]}, but the files that were left "
            f"hold iteration {expected}\n{said}"
        )
    origins = read_origins(printed)
    if {each.rank for each in origins} != set(range(cluster.world_size)):
        raise DrillError(f"not every rank has said where its state is from\n{printed}")
    return compare("killed", resumed, alone), origins, said


def main() -> int:
    """Run the drill, print a table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument(
        "--lose", nargs="+", choices=NODES, default=["node1"], help="which nodes (default: node1)"
    )
    parser.add_argument("--processes-per-node", type=int, default=2)
    arguments = parser.parse_args()
    lost = sorted(set(arguments.lose))
    memory = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    with (
        tempfile.TemporaryDirectory(prefix="holdfast-lost-node-") as disk,
        tempfile.TemporaryDirectory(prefix="holdfast-lost-node-", dir=memory) as nodes,
    ):
        cluster = Cluster(Path(disk), Path(nodes), arguments.processes_per_node)
        try:
            verdict, origins, said = drill(cluster, lost)
        except DrillError as error:
            print(f"drill failed: {error}", file=sys.stderr)
            return 1
    print(said)
    print(f"\n{'rank':>4}  {'node':<6} {'its state':>10}  from")
    for each in origins:
        print(f"{each.rank:>4}  {cluster.node_of(each.rank):<6} {each.size:>10}  {each.place}")
    validation = "differs" if verdict.validation_differs else "equal"
    differing = f"{len(verdict.different_steps)} of {STEPS} steps differ, validation {validation}"
    print(f"\nresumed from iteration {verdict.resumed_from}: {differing}")
    return conclude([verdict])


if __name__ == "__main__":
    sys.exit(main())
