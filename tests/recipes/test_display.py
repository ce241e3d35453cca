"""What a run leaves on a terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

from tests.recipes.conftest import ROOT

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
"""The cursor, by DEC's private modes."""


def test_sigterm_leaves_the_terminal_as_it_was(tmp_path: Path, text: Path) -> None:
    """The progress bar hides the cursor; a run that is ended by the signal shows it again."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "recipes/pretrain.py", "model=tiny", "steps=1000000"]
    command += [f"run_dir={tmp_path / 'run'}", f"data.paths=[{text}]"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while HIDE not in shown:
            shown += os.read(ours, 4096)  # an error of EIO: it ended by itself
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        while SHOW not in shown.rpartition(HIDE)[2]:
            shown += os.read(ours, 4096)
    finally:
        process.kill()
        os.close(ours)
