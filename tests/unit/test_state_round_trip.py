"""Live state into a checkpoint and out again, on one process, through the manager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import DataReshardError, StateMismatchError, UnsupportedStateError
from tests.support.managers import Live, counters, linear, manager_of, step, zero
from tests.support.states import MODELS, SampleStream, digest, make_run, seed_everything

# -- a save changes nothing ----------------------------------------------------------------------


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.1),
    "tensor lr": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1)),
    "tensor betas": lambda model: torch.optim.Adam(
        model.parameters(),
        lr=torch.tensor(0.1),
        betas=(torch.tensor(0.9), torch.tensor(0.99)),
        foreach=False,
    ),
    "two groups": lambda model: torch.optim.AdamW(
        [
            {"params": [each for name, each in model.named_parameters() if "bias" in name]},
            {
                "params": [each for name, each in model.named_parameters() if "bias" not in name],
                "lr": 0.5,
            },
        ],
        lr=0.1,
    ),
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("with_gradients", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_save_at_step_zero_changes_nothing(
    tmp_path: Path, kind: str, with_gradients: bool, asynchronous: bool
) -> None:
    """Before the first step a save leaves parameters, gradients, optimizer and RNG bit for bit."""
    model = nn.Linear(4, 2)
    live = Live(model, OPTIMIZERS[kind](model))
    if with_gradients:
        model(torch.rand(3, 4)).sum().backward()
    stateless = digest(live.optimizer.state_dict()["state"])
    before = live.digests()
    manager = manager_of(tmp_path, async_save=asynchronous)
    live.save(manager, 0)
    manager.finalize_async_saves(live.state, blocking=True)
    assert live.digests() == before
    assert digest(live.optimizer.state_dict()["state"]) == stateless


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_without_state_is_restored_without(tmp_path: Path, kind: str) -> None:
    """What was saved before the first step takes the state of an optimizer that has stepped."""
    model = nn.Linear(4, 2)
    saved = Live(model, OPTIMIZERS[kind](model))
    saved.save(manager_of(tmp_path), 0)
    expected = saved.digests()
    other = nn.Linear(4, 2)
    live = Live(other, OPTIMIZERS[kind](other))
    step(live)
    for parameter in other.parameters():
        parameter.grad = None
    assert live.load(manager_of(tmp_path)).found
    assert live.digests() == expected


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "stepped"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_state_is_restored_bit_for_bit(tmp_path: Path, kind: str, fresh: bool) -> None:
    """Moments, steps and groups come back exactly, and the next step is the same step."""
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    saved, live = Live(model, OPTIMIZERS[kind](model)), Live(other, OPTIMIZERS[kind](other))
    for seed in range(3):
        step(saved, seed)
    saved.save(manager_of(tmp_path))
    if not fresh:
        step(live, 9)
    assert tuple(live.load(manager_of(tmp_path))) == (3, 0)
    for each in (saved, live):
        each.optimizer.zero_grad()
    assert live.digests() == saved.digests()
    for seed in range(3):
        step(saved, seed)
        step(live, seed)
    assert live.digests() == saved.digests()


class _WideMomentum(torch.optim.Optimizer):
    """Keeps 32-bit momentum beside 16-bit parameters, as mixed-precision optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            momentum = state.setdefault(
                "momentum", torch.zeros_like(parameter, dtype=torch.float32)
            )
            momentum.mul_(0.9).add_(parameter.grad.float() / 3)
            parameter.sub_(momentum.to(parameter.dtype))


def test_state_wider_than_its_parameter_is_not_rounded(tmp_path: Path) -> None:
    """32-bit state of a 16-bit parameter comes back in 32 bits, every one of them."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2).bfloat16() for _ in range(2)]
    optimizers = [_WideMomentum(each.parameters()) for each in models]
    for parameter in models[0].parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers[0].step()
    Live(models[0], optimizers[0]).save(manager_of(tmp_path), 1)
    Live(models[1], optimizers[1]).load(manager_of(tmp_path))
    for saved, loaded in zip(models[0].parameters(), models[1].parameters(), strict=True):
        expected = optimizers[0].state[saved]["momentum"]
        found = optimizers[1].state[loaded]["momentum"]
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert not torch.equal(expected, expected.bfloat16().float())


def test_lbfgs_history_is_restored(tmp_path: Path) -> None:
    """Optimizer state that is lists of tensors comes back as lists."""

    def train(live: Live) -> None:
        inputs = torch.arange(12.0).reshape(3, 4) / 12

        def closure() -> Tensor:
            live.optimizer.zero_grad()
            loss: Tensor = live.model(inputs).square().sum()  # type: ignore[operator]
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        live.optimizer.step(closure)

    def build(seed: int) -> Live:
        torch.manual_seed(seed)
        model = nn.Linear(4, 2)
        return Live(model, torch.optim.LBFGS(model.parameters(), max_iter=2))

    saved, live = build(1), build(2)
    train(saved)
    saved.save(manager_of(tmp_path), 1)
    live.load(manager_of(tmp_path))
    assert digest(live.optimizer.state_dict()) == digest(saved.optimizer.state_dict())
    for _ in range(2):
        train(saved)
        train(live)
    assert live.digests() == saved.digests()


# -- models of every shape -----------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_run_goes_on_as_if_never_interrupted(
    tmp_path: Path, kind: str, asynchronous: bool
) -> None:
    """Model, optimizer, scheduler, data and RNG come back: the next losses are the same floats."""
    saved = make_run(kind, seed=1)
    saved.train(5)
    live = Live(saved.model, saved.optimizer, saved.scheduler, saved.stream)
    manager = manager_of(tmp_path, async_save=asynchronous)
    live.save(manager, 5)
    expected, at_save = saved.train(5), None
    manager.finalize_async_saves(live.state, blocking=True)
    resumed = make_run(kind, seed=2)
    assert resumed.train(1) != expected[:1]
    again = Live(resumed.model, resumed.optimizer, resumed.scheduler, resumed.stream)
    assert again.load(manager_of(tmp_path)).iteration == 5
    assert at_save is None
    assert resumed.train(5) == expected
    assert resumed.digests() == saved.digests()


class _Odd(nn.Module):
    """Buffers and parameters of every dtype and of shapes that break checkpoints."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        dtypes = (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
            torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
            torch.bool, torch.complex64, torch.complex128,
        )  # fmt: skip
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            for number, shape in enumerate([(), (0, 3), (3, 5)]):
                values = torch.randint(0, 100, shape, generator=generator)
                if dtype.is_floating_point:
                    values = values / 100
                self.register_buffer(f"{name}_{number}", values.to(dtype))
        base = torch.rand(4, 6, generator=generator)
        self.register_buffer("transposed", base.t())
        self.register_buffer("strided", base[:, ::2])
        self.register_buffer("row", base[1])
        self.register_buffer("expanded", torch.rand(2, 1, generator=generator).expand(2, 3))
        waves = torch.view_as_complex(torch.rand(3, 2, generator=generator))
        self.register_buffer("waves", waves)
        self.register_buffer("conjugated", waves.conj())
        self.register_buffer("temporary", torch.rand(1), persistent=False)
        self.weight = nn.Parameter(torch.rand(3, generator=generator))
        self.frozen = nn.Parameter(torch.rand(3, generator=generator), requires_grad=False)
        self.idle = nn.Parameter(torch.rand(2, generator=generator))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_every_kind_of_tensor_is_restored(tmp_path: Path, asynchronous: bool) -> None:
    """Every dtype, 0-dimensional, empty, strided, tied and lazy tensors come back exactly."""
    saved, model = _Odd(1), _Odd(2)
    live = Live(saved, torch.optim.AdamW([saved.weight, saved.idle]))
    saved.weight.grad = torch.ones(3)
    live.optimizer.step()  # `idle` has no gradient and so no state
    manager = manager_of(tmp_path, async_save=asynchronous)
    live.save(manager, 1)
    manager.finalize_async_saves(live.state, blocking=True)
    model.expanded = torch.zeros(2, 3)  # what is expanded cannot be written in place
    other = Live(model, torch.optim.AdamW([model.weight, model.idle]))
    assert other.load(manager_of(tmp_path)).found
    saved.weight.grad = None
    assert other.digests() == live.digests()
    assert model.idle not in other.optimizer.state


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """A tensor under two names is one tensor after a load, with one optimizer state."""
    saved, other = make_run("tied", seed=1), make_run("tied", seed=2)
    saved.train(2)
    Live(saved.model, saved.optimizer).save(manager_of(tmp_path), 2)
    Live(other.model, other.optimizer).load(manager_of(tmp_path))
    assert other.model.head.weight is other.model.embedding.weight  # type: ignore[union-attr]
    assert digest(other.optimizer.state_dict()) == digest(saved.optimizer.state_dict())


def test_several_models_and_optimizers(tmp_path: Path) -> None:
    """Several modules and several optimizers are saved together and each gets its own back."""

    def build(seed: int) -> Live:
        torch.manual_seed(seed)
        models = [nn.Linear(3, 2), nn.Linear(3, 2)]
        optimizers = [
            torch.optim.AdamW(models[0].parameters(), lr=0.1),
            torch.optim.SGD(models[1].parameters(), lr=0.2, momentum=0.9),
        ]
        return Live(models, optimizers)

    saved, live = build(1), build(2)
    step(saved)
    saved.save(manager_of(tmp_path))
    live.load(manager_of(tmp_path))
    for model in [*saved.model, *live.model]:  # type: ignore[misc]
        model.zero_grad()
    assert live.digests() == saved.digests()


class _WithExtra(nn.Module):
    """A module with state of its own beside tensors, as quantised layers have."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


EXTRAS = [
    7,
    "text",
    torch.arange(3.0),
    [1, 2],
    {"count": 3, "scale": 0.5},
    {"amax": torch.arange(4.0), "count": 3, "deep": {"names": ["a", "b"]}},
    {"history": [torch.ones(2), torch.zeros(1)]},
    {"mixed": [1, torch.ones(2), {"a": [torch.zeros(1), None]}]},
    {"full": 1, "empty": {}},
    {"empty": []},
    {},
    [],
    None,
]


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_extra_state_of_a_module_is_restored(tmp_path: Path, extra: Any) -> None:
    """What get_extra_state returned, nested or not, is what set_extra_state is given."""
    saved = nn.Sequential(_WithExtra(extra))
    fresh = dict.fromkeys(extra) if isinstance(extra, dict) else None
    live = nn.Sequential(_WithExtra(fresh))
    Live(saved).save(manager_of(tmp_path), 1)
    Live(live).load(manager_of(tmp_path))
    assert digest(live[0].extra) == digest(extra)
    assert digest(live[0].weight) == digest(saved[0].weight)


# -- names and shapes ----------------------------------------------------------------------------


def _named(**widths: int) -> Live:
    model = nn.ModuleDict({name: nn.Linear(width, 1) for name, width in widths.items()})
    return Live(model, torch.optim.AdamW(model.parameters()))


def test_strict_names_everything_missing_and_unexpected(tmp_path: Path) -> None:
    """A strict load that does not fit names every name, model and optimizer, and changes none."""
    saved, live = _named(a=2, b=2), _named(b=2, c=2)
    step(saved)
    saved.save(manager_of(tmp_path))
    before = live.digests()
    with pytest.raises(StateMismatchError) as caught:
        live.load(manager_of(tmp_path))
    parts = ("weight", "bias")
    names = {"a": "unexpected", "c": "missing"}
    for name, kind in names.items():
        assert set(getattr(caught.value, kind)) == {
            f"{group}.{name}.{part}" for group in ("model", "optimizer") for part in parts
        }
    assert caught.value.different == ()
    assert live.digests() == before


@pytest.mark.parametrize("how", ["context", "config"])
def test_without_strict_what_fits_is_loaded(tmp_path: Path, how: str) -> None:
    """A load that is not strict restores the names that both sides have and leaves the others."""
    saved, live = _named(a=2, b=2), _named(b=2, c=2)
    step(saved, 1)
    step(live, 2)
    saved.save(manager_of(tmp_path))
    before = live.digests()
    if how == "context":
        live.load(manager_of(tmp_path), strict=False)
    else:
        live.load(manager_of(tmp_path, load={"strict": False}))
    after, wanted = live.digests(), saved.digests()
    for part in ("weight", "bias"):
        assert after[f"model.0.b.{part}"] == wanted[f"model.0.b.{part}"]
        assert after[f"model.0.c.{part}"] == before[f"model.0.c.{part}"]
    moments = [live.optimizer.state[each] for each in live.model["b"].parameters()]  # type: ignore[index]
    expected = [saved.optimizer.state[each] for each in saved.model["b"].parameters()]  # type: ignore[index]
    assert digest(moments) == digest(expected)
    step(live)  # and the optimizer still works for every parameter


def test_without_strict_groups_may_differ(tmp_path: Path) -> None:
    """A parameter group that the checkpoint knows nothing of keeps its own options and state."""

    def build(*names: str) -> Live:
        model = nn.ModuleDict({name: nn.Linear(2, 1) for name in names})
        groups = [
            {"params": [*model[name].parameters()], "lr": 0.1 * (number + 1)}
            for number, name in enumerate(names)
        ]
        return Live(model, torch.optim.AdamW(groups))

    saved, live = build("a"), build("b", "a")
    step(saved, 1)
    step(live, 2)
    saved.save(manager_of(tmp_path))
    before = digest([live.optimizer.state[each] for each in live.model["b"].parameters()])  # type: ignore[index]
    live.load(manager_of(tmp_path), strict=False)
    moments = [
        [each.optimizer.state[one] for one in each.model["a"].parameters()]  # type: ignore[index]
        for each in (saved, live)
    ]
    assert digest(moments[0]) == digest(moments[1])
    kept = [live.optimizer.state[each] for each in live.model["b"].parameters()]  # type: ignore[index]
    assert digest(kept) == before
    assert [group["lr"] for group in live.optimizer.param_groups] == [0.1, 0.1]
    step(live)


def test_state_that_no_optimizer_takes_is_not_counted_as_restored(tmp_path: Path) -> None:
    """Saved state of a parameter that is frozen now is left out, and not read either."""
    saved, live = _named(a=2, b=2), _named(a=2, b=2)
    step(saved)
    saved.save(manager_of(tmp_path))
    live.optimizer = torch.optim.AdamW(live.model["a"].parameters())  # type: ignore[index]
    result = live.load(manager_of(tmp_path), strict=False)
    assert result.restored["model"].tensors == 4
    assert result.restored["optimizer"].tensors == 3 * 2


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_must_agree_either_way(tmp_path: Path, strict: bool) -> None:
    """A tensor of another shape is refused, strict or not, naming both shapes."""
    saved, live = _named(a=2), _named(a=3)
    saved.save(manager_of(tmp_path), 1)
    before = live.digests()
    with pytest.raises(StateMismatchError) as caught:
        live.load(manager_of(tmp_path), strict=strict)
    assert caught.value.different == ("model.a.weight is [1, 2], here [1, 3]",)
    assert live.digests() == before


def test_a_strict_load_wants_the_same_types(tmp_path: Path) -> None:
    """Another dtype is refused when strict and converted when not."""
    saved, live = _named(a=2), _named(a=2)
    live.model.to(torch.bfloat16)  # type: ignore[union-attr]
    saved.save(manager_of(tmp_path), 1)
    with pytest.raises(StateMismatchError, match=r"model\.a\.weight is torch\.float32, here torch"):
        live.load(manager_of(tmp_path))
    live.load(manager_of(tmp_path), strict=False)
    wanted = saved.model["a"].weight.bfloat16()  # type: ignore[index]
    assert digest(live.model["a"].weight) == digest(wanted)  # type: ignore[index]


def _with_scheduler(live: Live) -> Live:
    live.scheduler = torch.optim.lr_scheduler.StepLR(live.optimizer, 1)
    return live


def _with_data(live: Live) -> Live:
    live.data = SampleStream()
    return live


ABSENT = [(_with_scheduler, "scheduler"), (_with_data, "data")]


@pytest.mark.parametrize("skip", [False, True], ids=["whole", "without tensors"])
@pytest.mark.parametrize(("add", "name"), ABSENT, ids=["scheduler", "data"])
def test_small_state_that_is_missing_is_named(
    tmp_path: Path, add: Callable[[Live], Live], name: str, skip: bool
) -> None:
    """A scheduler or data stream that the checkpoint has no state for is refused when strict."""
    linear().save(manager_of(tmp_path), 1)
    live = add(linear(1))
    before = live.digests()
    with pytest.raises(StateMismatchError) as caught:
        live.load(manager_of(tmp_path), skip_load_to_model_and_opt=skip)
    assert caught.value.missing == (name,)
    assert live.digests() == before
    assert live.load(manager_of(tmp_path), strict=False, skip_load_to_model_and_opt=skip).found
    assert live.digests()[name] == before[name]


def test_an_optimizer_that_was_not_saved_is_named(tmp_path: Path) -> None:
    """A checkpoint saved without optimizer does not fit a run that has one, unless not strict."""
    saved, live = linear(), linear(1)
    Live(saved.model).save(manager_of(tmp_path), 1)
    with pytest.raises(StateMismatchError) as caught:
        live.load(manager_of(tmp_path))
    assert set(caught.value.missing) == {"optimizer.weight", "optimizer.bias"}
    step(live)
    moments = live.digests()["optimizer.0"]
    live.load(manager_of(tmp_path), strict=False)
    assert live.digests()["model.0.weight"] == saved.digests()["model.0.weight"]
    assert live.digests()["optimizer.0"] == moments


def test_a_model_alone_is_loaded_from_a_whole_checkpoint(tmp_path: Path) -> None:
    """Without optimizer, scheduler and data on the live side, the model is loaded, strictly."""
    saved = _with_data(_with_scheduler(linear()))
    step(saved)
    saved.save(manager_of(tmp_path))
    live = Live(linear(1).model)
    live.load(manager_of(tmp_path))
    assert live.digests()["model.0.weight"] == saved.digests()["model.0.weight"]


def test_model_and_optimizer_may_be_left_alone(tmp_path: Path) -> None:
    """skip_load_to_model_and_opt restores counters, scheduler, data and RNG, and no tensor."""
    saved, live = (_with_data(_with_scheduler(linear(seed))) for seed in (1, 2))
    seed_everything(5)
    next(saved.data)
    step(saved)
    saved.save(manager_of(tmp_path))
    wanted, before = saved.digests(), live.digests()
    seed_everything(6)
    live.load(manager_of(tmp_path), skip_load_to_model_and_opt=True)
    after = live.digests()
    for name, value in after.items():
        kept = name.startswith(("model", "gradient", "optimizer"))
        assert value == (before if kept else wanted)[name], name


# -- state that is refused -----------------------------------------------------------------------


class _Data:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict["position"]


class _Custom:
    def __repr__(self) -> str:
        return "_Custom()"  # in the name of a test, which is the same in every process


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("value", [np.zeros(2), _Custom()], ids=["array", "object"])
@pytest.mark.parametrize("place", ["data", "extra state", "scheduler", "optimizer"])
def test_unsafe_state_is_refused_at_the_save(
    tmp_path: Path, place: str, value: Any, asynchronous: bool
) -> None:
    """What no safe loader could read back is refused while the run lives, naming its place."""
    live = linear()
    if place == "data":
        live.data, named = _Data([value]), "rank 0 data.position[0] is a"
    elif place == "extra state":
        live.model = nn.Sequential(_WithExtra({"deep": value}))
        live.optimizer = None
        named = "model.0._extra_state.deep is a"
    elif place == "scheduler":
        live.scheduler, named = _Data(value), "scheduler.position is a"
    else:
        live.optimizer.param_groups[0]["odd"] = value
        named = "odd is a"
    manager = manager_of(tmp_path, async_save=asynchronous)
    with pytest.raises(UnsupportedStateError) as caught:
        live.save(manager, 1)
    assert named in str(caught.value)
    assert list(tmp_path.glob("iter_*")) == []
    good = linear()
    good.save(manager, 2)
    manager.finalize_async_saves(good.state, blocking=True)
    assert [each.name for each in tmp_path.glob("iter_*")] == ["iter_0000002"]


def test_a_key_that_is_no_text_is_refused_in_shards(tmp_path: Path) -> None:
    """DCP writes keys as texts: state with number keys would come back under others."""
    live = Live(nn.Sequential(_WithExtra({3: torch.ones(1)})))
    with pytest.raises(UnsupportedStateError, match=r"the key 3 of model\.0\._extra_state"):
        live.save(manager_of(tmp_path), 1)


NOT_JSON = [
    {"a": _Custom()}, {"a": np.int64(1)}, {"a": float("nan")}, {"a": {1: 2}}, {"a": (1, 2)},
    {"a": {1, 2}}, {"a": b"x"}, {3: "x"},
]  # fmt: skip


@pytest.mark.parametrize("extra", NOT_JSON, ids=str)
def test_counters_that_json_would_change_are_refused(tmp_path: Path, extra: Any) -> None:
    """A value in TrainState.extra that would not come back as it is, is refused at the save."""
    live = Live(linear().model, state=counters(step=1, extra=extra))
    with pytest.raises(UnsupportedStateError, match="train_state"):
        live.save(manager_of(tmp_path))
    assert list(tmp_path.glob("iter_*")) == []


@pytest.mark.parametrize("number", [-1, 1.5, True, "1", None, np.int64(3)])
def test_a_step_that_names_no_iteration_is_refused(tmp_path: Path, number: Any) -> None:
    """A step that is no whole number from 0 on would be saved under a name that nobody lists."""
    live = Live(linear().model, state=counters(step=number))
    with pytest.raises(UnsupportedStateError, match="train_state"):
        live.save(manager_of(tmp_path))
    assert list(tmp_path.glob("iter_*")) == []


def test_counters_are_exact(tmp_path: Path) -> None:
    """Integers beyond 2**53, every counter and nested extras come back as they were."""
    state = counters(
        step=10_000_000,
        consumed_train_samples=2**60 + 1,
        consumed_valid_samples=3,
        skipped_train_samples=4,
        tokens_seen=2**70 + 1,
        floating_point_operations_so_far=2**80 + 1,
        do_train=False,
        do_valid=False,
        do_test=False,
        extra={"best": 0.1, "names": ["a", None, True], "deep": {"\u00e9": -0.0}},
    )
    saved, live = Live(linear().model, state=state), Live(linear(1).model)
    saved.save(manager_of(tmp_path), num_floating_point_operations_so_far=2**90 + 1)
    kept = live.state.train_state
    assert tuple(live.load(manager_of(tmp_path))) == (10_000_000, 2**90 + 1)
    assert live.state.train_state is kept  # restored in place
    assert digest(kept.to_dict()) == digest(state.train_state.to_dict())


def test_a_callers_change_of_the_restored_counters_stays_its_own(tmp_path: Path) -> None:
    """Two loads of one checkpoint give values that do not share anything."""
    saved = Live(linear().model, state=counters(step=1, extra={"list": [1]}))
    saved.save(manager_of(tmp_path))
    manager = manager_of(tmp_path)
    first, second = Live(linear().model), Live(linear().model)
    first.load(manager)
    first.state.train_state.extra["list"].append(2)
    second.load(manager)
    assert second.state.train_state.extra == {"list": [1]}


# -- data of another world -----------------------------------------------------------------------


class _Group:
    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class _Groups:
    def __init__(self, rank: int, size: int) -> None:
        self.dp = _Group(rank, size)


def test_data_of_another_number_of_readers_is_refused(tmp_path: Path) -> None:
    """A stream that cannot be resharded is refused with the option to start over, untouched."""
    saved, live = linear(), linear(1)
    saved.data, live.data = SampleStream(), SampleStream()
    next(saved.data)
    saved.save(manager_of(tmp_path), 1)
    before = live.digests()
    with pytest.raises(DataReshardError, match=r"accept_data_restart=true"):
        live.load(manager_of(tmp_path), pg_collection=_Groups(0, 2))
    assert live.digests() == before
    accepting = manager_of(tmp_path, load={"accept_data_restart": True})
    live.load(accepting, pg_collection=_Groups(0, 2))
    assert live.data.position == 0


def test_a_load_into_live_objects_leaves_gradients_alone(tmp_path: Path) -> None:
    """A load fills parameters in place and neither makes nor drops a gradient."""
    saved, live = linear(1), linear(2)
    step(saved)
    saved.save(manager_of(tmp_path))
    zero(saved)
    live.model(torch.rand(1, 4)).sum().backward()  # type: ignore[operator]
    kept = [(each, each.grad) for each in live.model.parameters()]  # type: ignore[union-attr]
    before = digest([gradient for _, gradient in kept])
    live.load(manager_of(tmp_path))
    for parameter, (same, gradient) in zip(live.model.parameters(), kept, strict=True):  # type: ignore[union-attr]
        assert parameter is same
        assert parameter.grad is gradient
    assert digest([gradient for _, gradient in kept]) == before


class ShardedTensor(Tensor):
    """Named as the tensors of FSDP1 are, which have no device mesh."""


def test_a_sharded_tensor_of_fsdp1_is_refused_by_name(tmp_path: Path) -> None:
    """With the way out, and not with the words of torch's own refusal."""
    model = nn.Linear(2, 2)
    model.register_buffer("part", torch.ones(2).as_subclass(ShardedTensor))
    with pytest.raises(UnsupportedStateError, match=r"model\.part is a ShardedTensor") as caught:
        Live(model).save(manager_of(tmp_path))
    assert "fully_shard" in str(caught.value)
