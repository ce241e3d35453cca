"""A file system in RAM of a given size, and a directory at a second place, as containers have them.

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
    with _mounted(folder, ["-t", "tmpfs", "-o", f"size={size},mode=700", "none"]):
        yield folder


@contextmanager
def bound(source: Path, folder: Path) -> Iterator[Path]:
    """Show a directory at a second place, a folder that is made for it."""
    with _mounted(folder, ["--bind", str(source)]):
        yield folder


@contextmanager
def _mounted(folder: Path, arguments: list[str]) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", *arguments, str(folder)]
    try:
        is_mounted = subprocess.run(command, check=False).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
