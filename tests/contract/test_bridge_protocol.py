"""A manager written from Megatron-Bridge's published protocol alone drops in by dotted path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast import (
    CheckpointConfig,
    CheckpointLoadContext,
    CheckpointManager,
    CheckpointSaveContext,
    GlobalState,
    create_checkpoint_manager,
)

# What a reader of Bridge's protocol would write: it imports nothing of ours, gives back a plain
# pair, and has no defaults where the protocol's caller passes every argument.
BRIDGE_MANAGER = '''
class CountingManager:
    """Keeps what it was given in memory."""

    def __init__(self, checkpoint_config):
        self.checkpoint_config = checkpoint_config
        self.saved = {}
        self.finalized = []

    def save(self, ctx, callback_manager):
        step = ctx.state.train_state.step
        self.saved[step] = (
            ctx.model,
            ctx.optimizer,
            ctx.opt_param_scheduler,
            ctx.num_floating_point_operations_so_far,
            ctx.train_data_iterator,
            ctx.non_persistent_ckpt,
            ctx.pg_collection,
            ctx.module_name,
        )
        if callback_manager is not None:
            callback_manager.fire("on_checkpoint_save", ctx)

    def load(self, ctx):
        if not self.saved:
            return 0, 0
        step = max(self.saved)
        ctx.state.train_state.step = step
        if not ctx.skip_load_to_model_and_opt:
            ctx.model.append("loaded")
        return step, self.saved[step][3]

    def finalize_async_saves(self, state, blocking, terminate):
        self.finalized.append((state.train_state.step, blocking, terminate))


class DefaultsManager(CountingManager):
    """The same, with the defaults that the protocol shows."""

    def save(self, ctx, callback_manager=None):
        super().save(ctx, callback_manager)

    def finalize_async_saves(self, state, blocking=False, terminate=False):
        super().finalize_async_saves(state, blocking, terminate)


class KeywordsManager(CountingManager):
    """The same, taking whatever comes."""

    def save(self, ctx, *args, **kwargs):
        super().save(ctx, *args, **kwargs)

    def finalize_async_saves(self, state, **kwargs):
        super().finalize_async_saves(state, **kwargs)
'''

MakeManager = Callable[[str], Any]


@pytest.fixture
def make_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeManager:
    """Make a manager of the module above through the factory, as a config would name it."""
    package = tmp_path / "bridge_user"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "managers.py").write_text(BRIDGE_MANAGER)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("bridge_user", "bridge_user.managers"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def make(name: str) -> Any:
        return create_checkpoint_manager(
            CheckpointConfig.from_mapping(
                {
                    "custom_manager_class": f"bridge_user.managers.{name}",
                    "custom_manager_allowlist": ["bridge_user"],
                    "options": {"bucket": "somewhere"},
                }
            )
        )

    return make


class _Callbacks:
    def __init__(self) -> None:
        self.fired: list[tuple[str, Any]] = []

    def fire(self, event_name: str, context: Any) -> None:
        self.fired.append((event_name, context))


@pytest.mark.parametrize("name", ["CountingManager", "DefaultsManager", "KeywordsManager"])
def test_a_bridge_manager_serves_a_loop(make_manager: MakeManager, name: str) -> None:
    """Every call of a loop reaches the manager with its arguments, and its answers come back."""
    manager = make_manager(name)
    assert isinstance(manager, CheckpointManager)
    assert manager.checkpoint_config.options == {"bucket": "somewhere"}

    state, model, groups, callbacks = (
        GlobalState(),
        ["model"],
        SimpleNamespace(dp=None),
        _Callbacks(),
    )
    load = CheckpointLoadContext(state, model, "optimizer", "scheduler", pg_collection=groups)
    iteration, operations = manager.load(load)
    assert (iteration, operations) == (0, 0)

    state.train_state.step = 7
    save = CheckpointSaveContext(
        state, model, "optimizer", "scheduler", 10**20,
        train_data_iterator="data", pg_collection=groups, module_name="actor",
    )  # fmt: skip
    manager.save(save, callbacks)
    assert manager.saved[7] == (
        model, "optimizer", "scheduler", 10**20, "data", False, groups, "actor",
    )  # fmt: skip
    assert callbacks.fired == [("on_checkpoint_save", save)]
    manager.save(save, None)

    manager.finalize_async_saves(state, blocking=False, terminate=False)
    manager.finalize_async_saves(state, blocking=True, terminate=True)
    assert manager.finalized == [(7, False, False), (7, True, True)]

    state.train_state.step = 0
    iteration, operations = manager.load(load)
    assert (iteration, operations, state.train_state.step) == (7, 10**20, 7)
    assert model == ["model", "loaded"]
