"""Numbers of bytes as people read them.

Owns the one way in which messages state a size: binary units with a decimal or two, so that what is
needed and what is free can be compared at a glance.
"""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def describe_size(size_bytes: float, beside: float = 0) -> str:
    """Return a size with its unit, from `512 B` over `3.5 MiB` to `1.50 TiB`.

    `beside`: a size that it is compared with; no smaller unit than that one's is taken.
    """
    power = max(_power_of(size_bytes), _power_of(beside))
    digits = 0 if power == 0 else 1 if power < 3 else 2
    return f"{size_bytes / 1024**power:.{digits}f} {_UNITS[power]}"


def _power_of(size_bytes: float) -> int:
    power = 0
    while power < len(_UNITS) - 1 and abs(size_bytes) / 1024**power >= 1023.95:
        power += 1
    return power
