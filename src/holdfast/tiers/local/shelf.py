"""What one rank publishes and removes in its directory of the local tier.

Owns this rank's files through their life: taken for a snapshot or for a copy that arrives,
published, taken back when the save fails, pruned when newer commits stand. Promises that what was
published before a save stands as it was when that save fails, that directories of ranks which are
no more are pruned too, each by one rank of its place, and that on a disk every file is durable
before its name and every name before the save is agreed on. Knows no other rank but by number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from holdfast.tiers.local.files import Found, RunDirectory
from holdfast.tiers.local.nodes import Topology
from holdfast.tiers.local.shards import ReceivedShard
from holdfast.tiers.local.tail import ShardRecord, Tail
from holdfast.tiers.local.turns import TurnFile, Turns
from holdfast.tiers.local.vote import Commit

logger = logging.getLogger(__name__)


class Shelf:
    """The files of one rank."""

    def __init__(
        self,
        run: RunDirectory,
        rank: int,
        topology: Topology,
        *,
        turns: int,
        copies: int,
        in_memory: bool,
    ) -> None:
        """`turns`: files of the own shard; `copies`: shards of others that are held besides."""
        self.run = run
        self.rank = rank
        self.topology = topology
        self.directory = run.rank_directory(rank)
        self.turns = Turns(
            self.directory,
            run.filesystem,
            limit=turns,
            spares=turns,
            mapped=True,
            in_memory=in_memory,
        )
        """Of the own shard, where files take turns."""
        self._copies = Turns(
            self.directory, run.filesystem, spares=copies, mapped=False, in_memory=in_memory
        )
        self._in_memory = in_memory
        self._keep = turns - 1
        self.spared: frozenset[int] = frozenset()
        """Iterations that may be sound but could not be read when it was settled what is kept."""
        self._fresh: list[tuple[Path, Path | None]] = []
        """What was published since the last commit, with the predecessor of each."""

    # -- what there is ---------------------------------------------------------------------------

    def share(self) -> list[int]:
        """Return the rank directories that this rank lists: its own, and a part of the orphans."""
        return [each for each in self.run.ranks() if self.lister(each) == self.rank]

    def lister(self, directory: int) -> int:
        """Return who lists a rank directory of this place."""
        mates = self.topology.place_mates(self.rank)
        return directory if directory in mates else mates[directory % len(mates)]

    def scan(self) -> tuple[Found, ...]:
        """Return every published file in this rank's share."""
        return tuple(self.run.scan(self.share()))

    # -- publish and take back -------------------------------------------------------------------

    def take(self, size_bytes: int, timeout_seconds: float, kept: Collection[Commit]) -> TurnFile:
        """Return a file for the next shard that nobody reads.

        Raises:
            NoFileFreeError: all of them are held, and stayed so.
            OSError: there is no room, or what a failed save has left cannot be removed.
        """
        if not self.turns.has_turn:
            self.prune(kept)  # left of a save that failed, or of pruning that did
        return self.turns.take(size_bytes, timeout_seconds)

    def sink(self) -> ReceivedShard:
        """Return what receives a shard into a file of this rank."""
        return ReceivedShard(lambda size_bytes: self._copies.take(size_bytes, 0.0))

    def publish(self, pending: Path, record: ShardRecord, file: TurnFile | None) -> None:
        """Give the own shard, sealed and synced, its name."""
        final = self._publish(pending, record)
        if file is not None:
            self.turns.published_as(file, final)

    def publish_received(self, sink: ReceivedShard, tail: Tail) -> None:
        """Give a sealed copy its name."""
        assert sink.file is not None
        if not self._in_memory:
            sink.file.sync()  # durable before it has the name that counts
        final = self._publish(sink.file.path, tail.record)
        self._copies.published_as(sink.file, final)

    def _publish(self, pending: Path, record: ShardRecord) -> Path:
        final, replaced = self.run.publish(pending, self.rank, record.iteration, record.owner)
        self._fresh.append((final, replaced))
        if replaced is not None:
            self._rename(final, replaced)
        return final

    def _rename(self, path: Path, target: Path) -> None:
        for turns in (self.turns, self._copies):
            turns.renamed(path, target)

    def sync_names(self) -> None:
        """Make the names durable: without them the bytes are not found after a power cut."""
        if not self._in_memory:
            self.run.filesystem.sync_directory(self.directory)

    def settle(self) -> list[tuple[Path, Path | None]]:
        """Return what was published, with the predecessor of each, which is not taken back now."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def take_back(self) -> None:
        """Undo what was published since the last commit."""
        for final, replaced in self.settle():
            try:
                self.retire(final)
                if replaced is not None:
                    self.run.filesystem.rename(replaced, final)
                    self._rename(replaced, final)
            except OSError as error:  # it is of a commit that no vote will find whole
                logger.warning("%s is left of a save that failed: %s", final, error)

    def drop(self, pending: Path, file: TurnFile | None) -> None:
        """Take a shard that was not published out of the way."""
        if file is not None:
            self.turns.give_back(file)
        else:
            with suppress(OSError):  # published and taken back already, or the next start sweeps it
                self.run.filesystem.remove_file(pending)

    def drop_received(self, sink: ReceivedShard) -> None:
        """Take a copy that was not published out of the way."""
        if sink.file is not None:
            self._copies.give_back(sink.file)

    # -- prune -----------------------------------------------------------------------------------

    def prune(self, kept: Collection[Commit]) -> None:
        """Remove every published file of this rank's share that is surely not of a kept commit.

        Raises:
            OSError: one cannot be removed; the others were.
        """
        failures = []
        for found in self.scan():
            if self._is_doomed(found, kept):
                try:
                    self.retire(self.run.root / found.path)
                except OSError as error:
                    failures.append(error)
        if failures:
            raise failures[0]
        mates = self.topology.place_mates(self.rank)
        self.run.remove_empty([each for each in self.share() if each not in mates])

    def _is_doomed(self, found: Found, kept: Collection[Commit]) -> bool:
        if found.too_new is not None:
            return False  # a later version of holdfast wrote it: not this one's to judge
        if found.record is None:
            # Nothing but its name tells what it may be the only copy of.
            is_kept = found.iteration in {iteration for _, _, iteration in kept}
            return not (found.is_unread and (is_kept or found.iteration in self.spared))
        if found.record.commit in kept:
            return False
        newest_attempt = max((attempt for _, attempt, _ in kept), default=0)
        if found.record.attempt > newest_attempt:
            return False  # a later start has taken over meanwhile: what it commits is not ours
        is_spared = found.iteration in self.spared and not self.turns.has(
            self.run.root / found.path
        )
        return not is_spared or (len(kept) >= self._keep and found.record.commit < min(kept))

    def discard(self, is_doomed: Callable[[ShardRecord], bool]) -> None:
        """Remove the published files of this rank's share whose record is doomed.

        Raises:
            OSError: one cannot be removed.
        """
        for found in self.scan():
            if found.record is not None and is_doomed(found.record):
                self.retire(self.run.root / found.path)

    def retire(self, path: Path) -> None:
        """Take one published file out of sight.

        Raises:
            OSError: it cannot be renamed or removed.
        """
        turns = self.turns if self.turns.has(path) else self._copies
        turns.retire(path)

    def close(self) -> None:
        """Let go of every file; what is published stays."""
        self.turns.close()
        self._copies.close()
