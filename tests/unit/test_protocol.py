"""The contract's values: counters, contexts and the result of a load."""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from holdfast.protocol import (
    CheckpointLoadContext,
    CheckpointManager,
    CheckpointSaveContext,
    GlobalState,
    LoadResult,
    ReshardableData,
    Restored,
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


def test_unknown_counters_are_kept_in_extra() -> None:
    """A counter of a newer version or of a subclass is kept, and what is in extra by name stays."""
    state = TrainState(step=3, extra={"mine": 1})
    state.update_from({"step": 10, "zzz": 1, "later": [2]})
    assert (state.step, state.extra) == (10, {"mine": 1, "zzz": 1, "later": [2]})
    state.update_from({"step": 11, "zzz": 5, "extra": {"zzz": 9, "other": 0}})
    assert (state.step, state.extra) == (11, {"zzz": 9, "other": 0})


@dataclass
class _Mine(TrainState):
    epochs: int = 0
    best: float | None = None
    ratio: float = 1.0
    phase: str = "warm"


def test_a_subclass_resumes_its_fields_through_any_train_state() -> None:
    """Its counters come back to it, and a base class in between keeps them."""
    saved = json.loads(json.dumps(_Mine(step=1, epochs=3, best=2.5, phase="x").to_dict()))
    direct, base, again = _Mine(), TrainState(), _Mine()
    direct.update_from(saved)
    base.update_from(saved)
    assert base.extra == {"epochs": 3, "best": 2.5, "ratio": 1.0, "phase": "x"}
    again.update_from(json.loads(json.dumps(base.to_dict())))
    assert direct == again == _Mine(step=1, epochs=3, best=2.5, phase="x")
    renamed = TrainState(extra={"epochs": "three", "best": 1.5})
    again.update_from(renamed.to_dict())
    assert (again.epochs, again.best, again.extra) == (3, 1.5, {"epochs": "three"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "7"), ("step", 7.5), ("step", True), ("tokens_seen", None), ("do_train", 1),
        ("do_train", "no"), ("extra", [1]), ("epochs", [3]), ("ratio", "high"), ("phase", 4),
        ("ratio", 10**400), ("best", None),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_an_error_that_names_the_counter(name: str, value: Any) -> None:
    """Nothing is overwritten then; None is right only where a counter says so."""
    state = _Mine(step=3, best=1.0)
    if name == "best":
        state.update_from({name: value})
        assert state.best is None
        return
    with pytest.raises(ValueError, match=f"train_state.{name} is saved as"):
        state.update_from({"skipped_train_samples": 4, name: value})
    assert state == _Mine(step=3, best=1.0)


def test_numbers_take_the_type_of_their_counter() -> None:
    """A whole number written as a float counts, and a float that was whole is one again."""
    state = _Mine()
    state.update_from({"tokens_seen": 5e3, "ratio": 2})
    assert (state.tokens_seen, type(state.tokens_seen)) == (5000, int)
    assert (state.ratio, type(state.ratio)) == (2.0, float)


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


def _result() -> LoadResult:
    return LoadResult(
        40,
        10**20,
        found=True,
        tier="local",
        path=Path("/store/iter_40"),
        skipped=[SkippedCheckpoint("iter_0000050", "is short")],
        restored={"model": Restored(3, 96)},
        is_durable=True,
    )


def test_a_result_is_a_pair_with_attributes() -> None:
    """To code that knows Bridge it is the tuple of two; the rest is read by name."""
    result = _result()
    assert isinstance(result, tuple)
    assert (len(result), result[0], result[1]) == (2, 40, 10**20)
    assert result == (40, 10**20)
    assert (result.iteration, result.num_floating_point_operations_so_far) == tuple(result)
    assert (result.restored["model"].tensors, result.restored["model"].size_bytes) == (3, 96)
    assert (result.is_durable, result.is_pretrained) == (True, False)
    assert result.skipped[0].iteration is None


@pytest.mark.parametrize("copied", [lambda it: pickle.loads(pickle.dumps(it)), deepcopy, copy])
def test_a_result_survives_copies(copied: Callable[[LoadResult], LoadResult]) -> None:
    """Attributes travel with the pair, whatever way it is copied."""
    again = copied(_result())
    assert again == _result()
    assert hash(again) == hash(_result()) == hash((40, 10**20))
    assert vars(again) == vars(_result())
    assert type(again) is LoadResult


def test_results_are_equal_only_in_everything() -> None:
    """Two results of the same numbers differ in their attributes; a plain pair has none."""
    assert LoadResult(40, 1) != LoadResult(40, 1, found=True)
    assert LoadResult(40, 1, found=True) == (40, 1)
    assert LoadResult(40, 1) != (40, 2)
    assert LoadResult(40, 1) != [40, 1]


def test_a_result_shows_and_keeps_its_attributes() -> None:
    """Its repr names each; none can be changed, added or removed."""
    result = _result()
    shown = repr(result)
    assert shown.startswith("LoadResult(iteration=40, num_floating_point_operations_so_far=1000")
    assert "restored={'model': Restored(tensors=3, size_bytes=96)}" in shown
    for change in (
        lambda: setattr(result, "found", False),
        lambda: setattr(result, "other", 1),
        lambda: delattr(result, "tier"),
    ):
        with pytest.raises(AttributeError, match="of a load's result"):
            change()
    restored: Any = result.restored
    with pytest.raises(TypeError):
        restored["optimizer"] = Restored()
    assert result == _result()


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


def test_a_counter_beside_the_counters_is_refused() -> None:
    """`state.step = 100` would have no effect: the error names `state.train_state.step`."""
    state = GlobalState()
    with pytest.raises(AttributeError, match=r"set state\.train_state\.step"):
        state.step = 100  # type: ignore[attr-defined]
    state.timers = "others' attributes are theirs"  # type: ignore[attr-defined]

    @dataclass
    class OwnState(GlobalState):
        step: int = 0

    assert OwnState(step=5).step == 5


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
