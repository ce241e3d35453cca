"""How a recipe begins and ends; import this module before torch.

Owns what torch reads while it is imported, and the exit status of a program. Promises that an error
which the person at the keyboard can fix ends in a message of at most three lines, printed by one
process. Any other error is a defect and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from commands import describe_command
from complaints import PLAIN_ERRORS, condense

# Threads of torch otherwise spin while they wait: where something else runs too, a checkpoint's
# writer for example, a step then takes up to forty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Hydra raises instead of printing a page.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
# nvidia-resiliency-ext brings pynvml, and torch warns of it at every import: nothing to fix.
warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)

PRINTING_SECONDS = 10.0
"""How long silent processes wait for the one that prints the message."""


def run_program(program: Callable[[], object]) -> int:
    """Run a recipe and return its exit status."""
    prints = os.environ.get("RANK", "0") == "0"
    sys.path.append(os.getcwd())  # so that a manager's module in the working directory imports
    warnings.showwarning = _WarningPrinter(prints)
    try:
        program()
    except PLAIN_ERRORS as error:
        if prints:
            print(condense(error), file=sys.stderr, flush=True)
        else:
            # The launcher ends all processes when the first one exits: let the printing one be it.
            time.sleep(PRINTING_SECONDS)
        return 1
    except KeyboardInterrupt:
        if prints:
            print(f"interrupted; to go on: {describe_command()}", file=sys.stderr)
        return 130
    return 0


class _WarningPrinter:
    """Print each warning once, however many modules check the same settings, on one process."""

    def __init__(self, prints: bool) -> None:
        self._prints = prints
        self._printed: set[str] = set()

    def __call__(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if self._prints and str(message) not in self._printed:
            self._printed.add(str(message))
            print(f"warning: {message}", file=sys.stderr)
