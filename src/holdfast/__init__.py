"""holdfast: checkpoints for PyTorch distributed training that hold.

The public surface, loaded on first use: importing the package imports neither torch nor hydra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.config import CheckpointConfig
    from holdfast.errors import CheckpointError
    from holdfast.events import CallbackManager, CheckpointEvent
    from holdfast.factory import create_checkpoint_manager
    from holdfast.manager import DefaultCheckpointManager
    from holdfast.protocol import (
        CheckpointLoadContext,
        CheckpointManager,
        CheckpointSaveContext,
        GlobalState,
        LoadResult,
        TrainState,
    )
    from holdfast.state.components import SharingPattern, StateComponent
    from holdfast.state.sharding import declare_sharding
    from holdfast.state.strategy import LoadStrategy
    from holdfast.storage.annotations import annotate, read_annotations
    from holdfast.tiers.opening import open_tensors
    from holdfast.weights import build_model_from_checkpoint, load_model_weights

__version__ = "0.1.0"

_HOMES = {
    "CallbackManager": "events",
    "CheckpointConfig": "config",
    "CheckpointError": "errors",
    "CheckpointEvent": "events",
    "CheckpointLoadContext": "protocol",
    "CheckpointManager": "protocol",
    "CheckpointSaveContext": "protocol",
    "DefaultCheckpointManager": "manager",
    "GlobalState": "protocol",
    "LoadResult": "protocol",
    "LoadStrategy": "state.strategy",
    "SharingPattern": "state.components",
    "StateComponent": "state.components",
    "TrainState": "protocol",
    "annotate": "storage.annotations",
    "build_model_from_checkpoint": "weights",
    "create_checkpoint_manager": "factory",
    "declare_sharding": "state.sharding",
    "load_model_weights": "weights",
    "open_tensors": "tiers.opening",
    "read_annotations": "storage.annotations",
}

__all__ = [
    "CallbackManager",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointEvent",
    "CheckpointLoadContext",
    "CheckpointManager",
    "CheckpointSaveContext",
    "DefaultCheckpointManager",
    "GlobalState",
    "LoadResult",
    "LoadStrategy",
    "SharingPattern",
    "StateComponent",
    "TrainState",
    "annotate",
    "build_model_from_checkpoint",
    "create_checkpoint_manager",
    "declare_sharding",
    "load_model_weights",
    "open_tensors",
    "read_annotations",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return getattr(import_module(f"holdfast.{_HOMES[name]}"), name)
