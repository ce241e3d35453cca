"""What an import costs: a command that reads no tensor must not wait for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "hydra", "omegaconf", "numpy", "nvidia_resiliency_ext")

LIGHT = [
    "import holdfast",
    "import holdfast; holdfast.CheckpointConfig, holdfast.CheckpointManager, holdfast.TrainState",
    "import holdfast; holdfast.create_checkpoint_manager, holdfast.CallbackManager",
    "import holdfast.config",
    "import holdfast.errors",
    "import holdfast.protocol",
    "import holdfast.factory",
    "import holdfast.events",
]


@pytest.mark.parametrize("statement", LIGHT)
def test_a_light_import_stays_light(statement: str) -> None:
    """A fresh interpreter has loaded none of the heavy packages after the import."""
    program = f"import sys; {statement}; print([n for n in {HEAVY!r} if n in sys.modules])"
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert finished.stdout.strip() == "[]"


def test_the_check_sees_a_heavy_import() -> None:
    """The names looked for are those under which the packages appear."""
    program = "import sys, hydra; print('hydra' in sys.modules, 'omegaconf' in sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert finished.stdout.split() == ["True", "True"]
