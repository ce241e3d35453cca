"""The contract's values: counters, contexts and the result of a load."""

from __future__ import annotations

import inspect
import json
from dataclasses import MISSING, fields
from typing import Any

import pytest

from holdfast.protocol import (
    CheckpointLoadContext,
    CheckpointManager,
    CheckpointSaveContext,
    GlobalState,
    LoadResult,
    ReshardableData,
    SkippedCheckpoint,
    Stateful,
    TrainState,
)


def test_counters_make_the_round_trip_through_json() -> None:
    """Counters come back exactly, far beyond what a float holds."""
    saved = TrainState(
        step=7,
        consumed_train_samples=2**60 + 1,
        floating_point_operations_so_far=10**30 + 1,
        do_valid=False,
        extra={"best": [1.5, "x", None]},
    )
    restored = TrainState()
    restored.update_from(json.loads(json.dumps(saved.to_dict())))
    assert restored == saved


def test_counters_are_restored_in_place() -> None:
    """An absent name keeps its value: an older checkpoint has fewer counters."""
    state = TrainState(step=3, tokens_seen=99)
    state.update_from({"step": 10})
    assert (state.step, state.tokens_seen) == (10, 99)


def test_unknown_counters_change_nothing() -> None:
    """A counter of a newer version is an error that names it, before anything was overwritten."""
    state = TrainState(step=3)
    with pytest.raises(ValueError, match="unknown train state fields: later, zzz"):
        state.update_from({"step": 10, "zzz": 1, "later": 1})
    assert state.step == 3


def test_saved_counters_do_not_follow_the_live_ones() -> None:
    """What to_dict returned is a copy, nested values included."""
    state = TrainState(extra={"seen": [1]})
    values = state.to_dict()
    state.extra["seen"].append(2)
    assert values["extra"] == {"seen": [1]}


def test_a_result_unpacks_as_the_two_numbers_of_bridge() -> None:
    """A loop written for a plain pair takes a LoadResult as well."""
    iteration, operations = LoadResult(40, 10**20, found=True, tier="persistent")
    assert (iteration, operations) == (40, 10**20)


def test_a_result_without_a_checkpoint_is_zero() -> None:
    """The default says that nothing was found, and why candidates were passed over."""
    result = LoadResult(skipped=(SkippedCheckpoint("iter_0000010", "is short"),))
    assert tuple(result) == (0, 0)
    assert (result.found, result.tier, result.path) == (False, None, None)
    assert result.skipped[0].reason == "is short"


SHAPES: list[tuple[type[Any], list[str], list[str]]] = [
    (
        CheckpointSaveContext,
        ["state", "model", "optimizer", "opt_param_scheduler"],
        [
            "num_floating_point_operations_so_far",
            "train_data_iterator",
            "non_persistent_ckpt",
            "pg_collection",
            "module_name",
        ],
    ),
    (
        CheckpointLoadContext,
        ["state", "model", "optimizer", "opt_param_scheduler"],
        ["strict", "skip_load_to_model_and_opt", "pg_collection", "module_name"],
    ),
]


@pytest.mark.parametrize(("context", "required", "optional"), SHAPES)
def test_a_context_has_the_fields_of_bridge(
    context: type[Any], required: list[str], optional: list[str]
) -> None:
    """Names and positions are Megatron-Bridge's; what we add comes later and has a default."""
    all_fields = fields(context)
    assert [each.name for each in all_fields[: len(required)]] == required
    assert all(
        each.default is MISSING and each.default_factory is MISSING
        for each in all_fields[: len(required)]
    )
    names = [each.name for each in all_fields[len(required) :]]
    assert [name for name in names if name in optional] == optional
    state = GlobalState()
    made = context(state, "model", None, None)
    assert (made.state, made.model) == (state, "model")


def test_the_protocol_has_the_signatures_of_bridge() -> None:
    """Parameter names, their order and their defaults are those of the published protocol."""
    assert [
        (
            name,
            str(
                inspect.signature(getattr(CheckpointManager, name)).replace(
                    parameters=[
                        each.replace(annotation=inspect.Parameter.empty)
                        for each in inspect.signature(
                            getattr(CheckpointManager, name)
                        ).parameters.values()
                    ],
                    return_annotation=inspect.Signature.empty,
                )
            ),
        )
        for name in ("save", "load", "finalize_async_saves")
    ] == [
        ("save", "(self, ctx, callback_manager=None)"),
        ("load", "(self, ctx)"),
        ("finalize_async_saves", "(self, state, blocking=False, terminate=False)"),
    ]


class _Manager:
    def save(self, ctx: Any, callback_manager: Any = None) -> None: ...
    def load(self, ctx: Any) -> tuple[int, int]:
        return 0, 0

    def finalize_async_saves(
        self, state: Any, blocking: bool = False, terminate: bool = False
    ) -> None: ...


def test_protocols_are_checked_by_shape() -> None:
    """An object is what it can do, without inheriting from anything of ours."""
    assert isinstance(_Manager(), CheckpointManager)
    assert not isinstance(object(), CheckpointManager)

    class _Loader:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    assert isinstance(_Loader(), Stateful)
    assert not isinstance(_Loader(), ReshardableData)
