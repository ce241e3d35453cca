"""A file system in RAM of a given size, as a container has one.

Owns the mounting and its end. Promises to skip the test where mounting is not allowed, and that
nothing stays mounted. Knows nothing of holdfast.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_memory(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of a size, `256k` say, at a folder that is made for it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", str(folder)]
    try:
        is_mounted = subprocess.run(command, check=False).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
