"""How long ranks wait for one another in tests where one of them is to be missed.

Owns the deadline of such a job and when whoever is left must have been told. Long enough that a
rank which lives keeps it however busy the machine is: a dozen processes share its cores in these
tests, and one that is late by itself would be named in place of the one that died.
"""

from __future__ import annotations

from holdfast.ranks.coordinator import _FOLLOWER_GRACE_SECONDS

DEADLINE_SECONDS = 12.0
"""For a rank's answer; tests wait for it, several at a time."""
_BUSY_SECONDS = 8.0
"""What a busy machine may add; less than waiting for the deadline again would."""


def told_within(missing: int) -> float:
    """Return the seconds after which the ranks that are left know that this one is missing."""
    # Without rank 0 nobody can say who is: the others find out by themselves, and that is later.
    return DEADLINE_SECONDS + (_FOLLOWER_GRACE_SECONDS if missing == 0 else 0.0) + _BUSY_SECONDS
