"""What each rank says before a save, and whether the plan in hand still stands.

Owns the record of fixed size that every rank sends every time, and the judgement of all of them.
Promises that a plan is used only while every rank stands by it with the structure it was made for.
Pure: no input or output, no communication.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.shards.planning import few

NO_PLAN = bytes(16)
"""What a rank without a plan for its present structure sends in the place of one."""

_RECORD = struct.Struct("<8sq16s16s")
_RECORD_MARK = b"holdfst1"
_RECORDS = np.dtype(
    [("mark", "S8"), ("iteration", "<i8"), ("structure", "<u8", 2), ("plan", "<u8", 2)]
)


@dataclass(frozen=True)
class Record:
    """What a rank says before a save that needs no planning."""

    iteration: int
    structure: bytes
    """Of the state it is about to save."""
    plan: bytes
    """The plan that it holds for this structure; `NO_PLAN`: none."""

    def pack(self) -> bytes:
        """Return the record in its fixed size."""
        return _RECORD.pack(_RECORD_MARK, self.iteration, self.structure, self.plan)

    @classmethod
    def unpack(cls, content: bytes) -> Record:
        """Read what `pack` made; `judge` has found it to be a record."""
        _, iteration, structure, plan = _RECORD.unpack(content)
        return cls(iteration, structure, plan)


@dataclass(frozen=True)
class Verdict:
    """Whether all ranks may save by the plan that they have."""

    is_current: bool
    """All ranks save one iteration, each with the structure that the one plan was made for."""
    changed: tuple[int, ...]
    """The ranks because of which to plan anew; when plans merely differ, all of them."""
    iterations: tuple[int, ...]
    """Of which iteration each record speaks, without repeats; more than one is an error."""
    reason: str
    """Empty when current."""


def judge(records: Sequence[bytes], structures: Sequence[bytes] | None = None) -> Verdict:
    """Judge every rank's packed record, in rank order.

    With the structures of the decision at hand, a rank that claims its plan for another structure
    is found out as well.

    Raises:
        ValueError: a record is none.
    """
    content = b"".join(records)
    if not records or any(len(record) != _RECORD.size for record in records):
        raise ValueError(f"not every one of {len(records)} records has {_RECORD.size} bytes")
    table = np.frombuffer(content, dtype=_RECORDS)
    if (table["mark"] != _RECORD_MARK).any():
        raise ValueError("not every record is of this version of holdfast")
    numbers, holders = np.unique(table["iteration"], return_index=True)
    iterations = tuple(numbers.tolist())
    if len(iterations) > 1:
        named = [f"rank {rank} saves {iterations[at]}" for at, rank in enumerate(holders.tolist())]
        return Verdict(False, (), iterations, f"the ranks' iterations differ: {few(named)}")
    stale = (table["plan"] == 0).all(axis=1)
    if structures is not None:
        if len(structures) != len(records):
            everyone = tuple(range(len(records)))
            reason = f"{len(records)} ranks, where the plan is for {len(structures)}"
            return Verdict(False, everyone, iterations, reason)
        planned = np.frombuffer(b"".join(structures), dtype="<u8").reshape(-1, 2)
        stale |= (table["structure"] != planned).any(axis=1)
    if not stale.any():
        stale = (table["plan"] != table["plan"][0]).any(axis=1)
    changed = tuple(np.flatnonzero(stale).tolist())
    if not changed:
        return Verdict(True, (), iterations, "")
    ranks = few([str(rank) for rank in changed])
    return Verdict(False, changed, iterations, f"no plan for the present state of ranks {ranks}")
