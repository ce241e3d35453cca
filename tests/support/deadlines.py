"""How long tests on several ranks wait: for a launch, for an answer, for one that will not come.

Owns every such deadline and when whoever is left must have been told. Long enough that a rank which
lives keeps it however busy the machine is: a dozen processes share its cores in these tests, and
one that is late by itself would be named in place of the one that died.
"""

from __future__ import annotations

LAUNCH_SECONDS = 60.0
"""For all ranks of one launch to end; a launch with more to do is given a multiple of it."""
ANSWER_SECONDS = 20.0
"""For a rank's answer where none is to be missed."""
DEADLINE_SECONDS = 12.0
"""For a rank's answer where one is; tests wait for it, several at a time."""
_BUSY_SECONDS = 8.0
"""What a busy machine may add; less than waiting for the deadline again would."""


def told_within(missing: int) -> float:
    """Return the seconds after which the ranks that are left know that this one is missing."""
    from holdfast.ranks.entry import FOLLOWER_GRACE_SECONDS  # with torch, which is slow

    # Without rank 0 nobody can say who is: the others find out by themselves, and that is later.
    return DEADLINE_SECONDS + (FOLLOWER_GRACE_SECONDS if missing == 0 else 0.0) + _BUSY_SECONDS
