"""A save that is in flight when the program ends is finished first."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.nodes import memory_directory

ROOT = Path(__file__).parents[2]
PROGRAM = '''
import concurrent.futures.thread as pools
import sys, threading, time
from pathlib import Path
from holdfast.filesystem import LocalFilesystem
from tests.support.managers import linear, manager_of, step

class AtTheEnd(LocalFilesystem):
    """Its writer goes on when the main thread has ended, and pools with it, if nobody waits."""
    def list_directory(self, path):
        if threading.current_thread().name == "holdfast-writer":
            while not threading._SHUTTING_DOWN:
                time.sleep(0.001)
            deadline = time.monotonic() + 0.3
            while not pools._shutdown and time.monotonic() < deadline:
                time.sleep(0.001)
        return super().list_directory(path)

root, local, tier = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
live = linear(width=64)
step(live, 1)
manager = manager_of(root, AtTheEnd(), async_save=True, local={"directory": local})
live.load(manager)
live.save(manager, 1, non_persistent_ckpt=tier == "local")
'''


@pytest.mark.parametrize("tier", ["local", "persistent"])
def test_what_is_in_flight_at_the_end_is_committed(tmp_path: Path, tier: str) -> None:
    """Without a last call of the manager, the program ends when its save is done."""
    pytest.importorskip("nvidia_resiliency_ext")
    with memory_directory() as local:
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), str(local), tier]
        ended = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert len(list(local.glob("*/0/iter_0000001_0_local.pt"))) == 1
    committed = (tmp_path / "iter_0000001/manifest.json").exists()
    assert committed == (tier == "persistent")


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from holdfast.filesystem import LocalFilesystem
from tests.support.managers import linear, manager_of

class Interrupting(LocalFilesystem):
    # Sends the program an interrupt when the n-th file is opened.
    opened = 0
    def open_existing(self, path):
        self.opened += 1
        if self.opened == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGINT)
        return super().open_existing(path)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
root = Path(sys.argv[1])
live = linear(width=1 << 20)
live.save(manager_of(root), 1)
manager = manager_of(root, Interrupting())
while True:
    live.load(manager)
"""


@pytest.mark.parametrize("opened", [1, 3, 6, 7, 9])
def test_a_load_that_is_interrupted_ends_with_the_program(tmp_path: Path, opened: int) -> None:
    """Ctrl-C in a load ends the program as it ends any other: no abort, no hang, nothing else."""
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED, str(tmp_path), str(opened)]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == -signal.SIGINT, ended.stderr
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt") or "the load did" in ended.stderr
