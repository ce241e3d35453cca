"""Commands for a person to type: this run again, or a program beside the running interpreter.

Promises that a command runs the programs of this very environment: they are written by their bare
names only where PATH leads there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def name_program(name: str) -> str:
    """Return how to call `python` or a program that is installed beside it, such as `torchrun`."""
    running = Path(sys.executable)
    program = running if name == "python" else running.with_name(name)
    found = shutil.which(name)
    if found is not None and Path(found) == program:
        return name
    if not program.exists():
        return name  # not installed as a program: the person knows how it was started
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.quote(str(program))


def describe_command(steps: int | None = None) -> str:
    """Return what the user typed, to be typed again; with `steps`, to train up to that many."""
    arguments = sys.argv[1:]
    if steps is not None:
        arguments = [each for each in arguments if not each.startswith("steps=")]
        arguments.append(f"steps={steps}")
    script = shlex.join([sys.argv[0], *arguments])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = name_program("torchrun")
        return f"{launcher} --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} {script}"
    return f"{name_program('python')} {script}"
