"""When a checkpoint is due, and in which tier.

Owns that one decision, as a pure function of the settings and the step. Promises that the
persistent tier wins where both are due, and that what a run leaves behind at its end is persistent,
even right after a local save: memory goes with the node. Saves nothing itself.
"""

from __future__ import annotations

from holdfast import CheckpointConfig

LOCAL = "local"
PERSISTENT = "persistent"


def find_due_tier(config: CheckpointConfig, step: int, last_step: int) -> str | None:
    """Return the tier that a save after this step goes to; None: no save is due."""
    persistent, local = config.persistent.save_interval, config.local.save_interval
    if config.local.directory is None:
        local = None
    if step == last_step:
        return None if persistent is None and local is None else PERSISTENT
    if persistent is not None and step % persistent == 0:
        return PERSISTENT
    if local is not None and step % local == 0:
        return LOCAL
    return None
