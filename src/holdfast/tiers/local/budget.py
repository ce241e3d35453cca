"""What the local tier needs of each node: who shares one, and what fits on it.

Owns the gathering of which ranks see the same directory, the sum of what they need there (each
rank's shard, times the files of its buffer pool, plus the copies it holds for others; on a disk
also the memory that a shard is copied into) and the limits it is compared with: free space in the
directory and memory left on the machine or in its control group. Promises one log line and, where
it cannot fit on some node, an error with the numbers on every rank. Files that the run left there
count as free space. Allocates nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.config import LocalConfig
from holdfast.errors import ConfigError
from holdfast.filesystem import Filesystem, free_bytes, is_memory, place_of, taken_bytes
from holdfast.messages import describe_size
from holdfast.ranks.coordinator import Coordinator
from holdfast.ranks.topology import Seat, Topology, assign_holders, node_name
from holdfast.snapshot.arena import Room, find_room
from holdfast.tiers.local.replication import device_of, load_package
from holdfast.tiers.local.shard_file import make_private_directory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """What one place of the local tier needs, and has available."""

    directory: str
    own_bytes: int
    """Of all files for its ranks' own shards."""
    copy_bytes: int
    """Of all files for copies that its ranks hold for others."""
    buffers: int
    """Files per shard, reused in rotation."""
    room: Room | None
    """The tightest limit; None: unknown."""
    arena_bytes: int = 0
    """Of the memory its ranks copy their state into, where the files are on a disk; 0: it is
    allocated already, or the files are that memory."""
    memory: Room | None = None
    """The limit for that; None: unknown."""
    note: str = ""
    """A remark on the sum."""

    @property
    def needed_bytes(self) -> int:
        """Of all files at once."""
        return self.own_bytes + self.copy_bytes

    @property
    def line(self) -> str:
        """The sum as a log line."""
        needed, room, beside = self.needed_bytes, "", ""
        if self.room is not None:
            room = f" of {describe_size(self.room.free_bytes, needed)} free"
        if self.arena_bytes:
            beside = f", and in memory {describe_size(self.arena_bytes)}"
            if self.memory is not None:
                beside += f" of {describe_size(self.memory.free_bytes, self.arena_bytes)} left"
        return (
            f"local tier at {self.directory}: {describe_size(needed)}{room} "
            f"({self.buffers} files in rotation: own shards {describe_size(self.own_bytes)}, "
            f"copies for others {describe_size(self.copy_bytes)}){beside}{self.note}"
        )

    @property
    def fullness(self) -> float:
        """The needed fraction of what is available; above 1: it does not fit."""
        return max(_part_of(self.needed_bytes, self.room), _part_of(self.arena_bytes, self.memory))

    @property
    def problem(self) -> str | None:
        """Why it cannot fit, with the numbers; None: it can."""
        if self.fullness <= 1:
            return None
        advice = "lower local.keep.last or local.replication.factor, or name a larger directory"
        limit = self.room
        if _part_of(self.arena_bytes, self.memory) > 1:
            limit = self.memory
            advice = "give the job more memory, or shard the state over more nodes"
        assert limit is not None
        return f"checkpoint.local: {self.line}; limited by {limit.limited_by}; {advice}"


def _part_of(needed_bytes: int, room: Room | None) -> float:
    if room is None or needed_bytes <= 0:
        return 0.0
    return needed_bytes / room.free_bytes if room.free_bytes > 0 else math.inf


@dataclass(frozen=True)
class Measured:
    """What one place has, as its first rank finds it."""

    directory: str
    room: Room
    """The tightest limit of the files there."""
    memory: Room | None
    """The limit of memory that state is copied into; None: unknown, or the files are it."""
    in_memory: bool


def measure_place(directory: Path, *, in_memory: bool, reused: Sequence[Path]) -> Measured:
    """Measure what a place has left.

    `reused`: directories whose present files will be replaced, so that their space counts as free.
    """
    taken = sum(map(taken_bytes, reused))
    memory = find_room()
    rooms = [Room(free_bytes(directory) + taken, "the free space of the directory")]
    if in_memory and memory is not None:
        rooms.append(Room(memory.free_bytes + taken, memory.limited_by))
    tightest = min(rooms, key=lambda each: each.free_bytes)
    return Measured(str(directory), tightest, None if in_memory else memory, in_memory)


def take_seats(
    config: LocalConfig,
    filesystem: Filesystem,
    coordinator: Coordinator,
    *,
    node: str | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> Topology:
    """Create the directory where it is missing, and gather which ranks see the same one.

    `node`: the name of this node. None: HOLDFAST_NODE, or the host name. `prepare`: called with the
    directory created; what it raises is reported on all ranks.

    Raises:
        ConfigError: it is not this user's alone, or a rank lacks the tier's package or what the
            transport for copies needs.
        StageFailedError: it cannot be created, on some rank.
    """
    assert config.directory is not None
    directory = Path(config.directory).absolute()

    def find_seat() -> Seat:
        load_package()  # fail here, even on a fresh store, not hours later at the first save
        device_of(config.replication.transport)
        make_private_directory(filesystem, directory)
        prepare()
        return Seat(node_name(node), place_of(directory))

    def gather(seats: list[Seat]) -> bytes:
        return Topology(tuple(seats)).to_bytes()

    return Topology.from_bytes(coordinator.all_reduce("local seats", find_seat, gather))


@dataclass(frozen=True)
class Need:
    """The estimate of one rank."""

    image_bytes: int
    """Of its shard."""
    uncounted: Sequence[str] = ()
    """Optimizers whose state size cannot be estimated yet."""


def report_budget(
    config: LocalConfig,
    topology: Topology,
    run_id: str | None,
    need: Need,
    coordinator: Coordinator,
    *,
    drains: bool,
    is_estimate: bool = True,
) -> Budget:
    """Return and log the budget of the fullest place; every rank passes its own need.

    `run_id`: the run whose files will be replaced; None: there are none. `drains`: commits are held
    while they are promoted, for which there is one more file. `is_estimate`: made before training,
    when on a disk the memory to copy into is still to be allocated.

    Raises:
        ConfigError: on every rank: it does not fit somewhere, with the numbers of each such place.
    """
    assert config.directory is not None
    assert config.keep.last is not None
    directory = Path(config.directory).absolute()
    buffers = config.keep.last + 1 + drains
    rank, first = coordinator.rank, topology.place_mates(coordinator.rank)[0]

    def measure() -> tuple[Need, Measured | None]:
        if rank != first:
            return need, None
        reused = [] if run_id is None else [directory / run_id]
        return need, measure_place(directory, in_memory=is_memory(directory), reused=reused)

    def judge(found: Sequence[tuple[Need, Measured | None]]) -> Budget:
        needs = [each for each, _ in found]
        factor, jump = config.replication.factor, config.replication.jump
        # With factor 1 only the small states are copied: negligible here.
        holders = assign_holders(topology.nodes, factor, jump) if factor > 1 else []
        if is_estimate:
            useless = _find_useless_copies(config, topology, needs, holders, buffers)
            if useless is not None:
                logger.warning("%s", useless)
        own = [each.image_bytes for each in needs]
        copies = [0] * len(needs)
        for owner, ranks in enumerate(holders):
            for holder in ranks[1:]:
                copies[holder] += own[owner]
        uncounted = sorted({name for each in needs for name in each.uncounted})
        has_places = len(set(topology.places)) > 1
        budgets = []
        for one, (_, measured) in enumerate(found):
            if measured is None:
                continue
            mates = topology.place_mates(one)
            arena_bytes = sum(own[each] for each in mates)
            on_disk = is_estimate and not measured.in_memory
            budgets.append(
                Budget(
                    measured.directory,
                    buffers * sum(own[each] for each in mates),
                    buffers * sum(copies[each] for each in mates),
                    buffers,
                    measured.room,
                    arena_bytes=arena_bytes if on_disk else 0,
                    memory=measured.memory if on_disk else None,
                    note=_note(topology.seats[one].node if has_places else None, uncounted),
                )
            )
        return _fullest(budgets)

    # One exchange: what the places have is measured by their first ranks, and added up on rank 0.
    fullest = coordinator.all_reduce("local budget", measure, judge)
    if rank == 0:
        places = len(set(topology.places))
        others = f"; of {places} places this has the least to spare" if places > 1 else ""
        logger.info("%s%s", fullest.line, others)
    return fullest


def _find_useless_copies(
    config: LocalConfig,
    topology: Topology,
    needs: Sequence[Need],
    holders: Sequence[Sequence[int]],
    buffers: int,
) -> str | None:
    """Return a warning, with the cost, if all ranks are on one node: copies then do not help."""
    factor, jump = config.replication.factor, config.replication.jump
    world_size = topology.world_size
    nodes = len(set(topology.nodes)) if jump is None else math.ceil(world_size / jump)
    if factor == 1 or nodes > 1:
        return None
    if world_size == 1:
        return (
            f"checkpoint.local.replication.factor is {factor}, but the job has one rank: no copy "
            "is made, and a lost node loses its local checkpoints."
        )
    cost = buffers * sum(
        needs[owner].image_bytes * (len(ranks) - 1) for owner, ranks in enumerate(holders)
    )
    return (
        f"checkpoint.local.replication.factor is {factor}, but all {world_size} ranks are on one "
        f"node ({topology.seats[0].node}): its copies protect against nothing, since they are lost "
        f"together with what they copy, and take {describe_size(cost)} there "
        f"({buffers} files in rotation).\n"
        "Set local.replication.factor=1; or, where host names do not identify nodes, name them "
        "with HOLDFAST_NODE or local.replication.jump."
    )


def _fullest(budgets: Sequence[Budget]) -> Budget:
    """Return the budget of the fullest place.

    Raises:
        ConfigError: it does not fit at some place.
    """
    if problems := [each.problem for each in budgets if each.problem is not None]:
        raise ConfigError(problems)
    return max(budgets, key=lambda each: each.fullness)


def _note(node: str | None, uncounted: Sequence[str]) -> str:
    """`node`: where there are several places."""
    parts = []
    if node is not None:
        parts.append(f"on node {node}")
    if uncounted:
        parts.append(f"not counting what {', '.join(uncounted)} will keep")
    return "".join(f"; {each}" for each in parts)
