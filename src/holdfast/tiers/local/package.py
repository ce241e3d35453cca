"""nvidia-resiliency-ext, which not every platform has.

Owns the one place where it is imported, when a job first uses a local tier. Promises that a missing
or broken package is an error that says what to do, and not an ImportError from somewhere inside.
"""

from __future__ import annotations

import warnings
from typing import Any

from holdfast.errors import ConfigError


def import_engine() -> Any:
    """Return the module that stands on the package.

    Raises:
        ConfigError: it is missing, or does not work here.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "The pynvml package is deprecated", category=FutureWarning
            )
            from holdfast.tiers.local import engine
    except ImportError as error:
        problem = (
            "checkpoint.local.directory is set, but nvidia-resiliency-ext cannot be imported "
            f"({error}); install nvidia-resiliency-ext>=0.4.1,<0.8 (Linux, Python below 3.13), "
            "or set local.directory to null"
        )
        raise ConfigError([problem]) from error
    return engine
