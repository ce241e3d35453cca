"""Numbers of bytes as people read them.

Owns the one way in which messages state a size: binary units with three significant digits, so that
what is needed and what is free can be compared at a glance.
"""

from __future__ import annotations


def describe_size(size_bytes: float) -> str:
    """Return a size with its unit, from `512 B` to `1.50 TiB`."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes:.0f} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if abs(size) < 1023.5 or unit == "TiB":
            break
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {unit}"
