"""Where the package meets Hydra: the settings as a schema, and what a stored config names.

Owns the one registration of `CheckpointConfig` with Hydra's ConfigStore, as `checkpoint/schema`.
Promises that a YAML file beginning with `defaults: [schema, _self_]` in a group named `checkpoint`
is checked field by field while Hydra composes it. Refuses to act on import: a program calls
`register()` before `hydra.main`. No other file of the package imports Hydra.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore

from holdfast.config import CheckpointConfig


def register() -> None:
    """Offer `CheckpointConfig` to Hydra as `checkpoint/schema`; once or more often."""
    ConfigStore.instance().store(group="checkpoint", name="schema", node=CheckpointConfig)


def instantiate(config: Any) -> Any:
    """Return what the `_target_` of a config makes; whoever calls it has checked all of them."""
    from hydra.utils import instantiate as make

    return make(config)
