"""How a program beside the running interpreter is called from the shell that started this one.

Owns one question: what to write in a command that a person is to type. Promises a word that runs
the program of this very environment: its bare name only where PATH leads there.
"""

from __future__ import annotations

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
        return name  # not installed as a program: whoever has started it knows how
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.quote(str(program))
