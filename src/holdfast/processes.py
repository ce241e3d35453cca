"""Which process this is, in terms that another process can check later.

Owns the mark that tells two processes with the same pid apart: the boot of the machine and the time
at which the process started. Where the system does not say (no /proc) the mark is None, and nothing
is claimed about any process. Nothing but a warning depends on it.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Process:
    """One process of one host."""

    host: str
    pid: int
    start_mark: str | None
    """None: the system does not say."""


def this_process() -> Process:
    """Return the process that calls; not cached, since a fork is another one."""
    pid = os.getpid()
    return Process(socket.gethostname(), pid, find_start_mark(pid))


def find_start_mark(pid: int) -> str | None:
    """Return boot and start time of a process of this host; None: it has ended, or no /proc."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        return None
    # The name of the program stands in brackets and may contain anything: count from the last one.
    fields = content[content.rfind(b")") + 1 :].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X", b"x"):
        return None  # ended, and its parent has not asked for its exit code yet
    return f"{boot}/{fields[19].decode()}"  # field 22 of proc(5), in ticks since the boot
