"""Groups of an optimizer's parameters come back to their members, or the load is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.errors import StateMismatchError, UnsupportedStateError
from holdfast.state.fitting import OptimizerFit
from holdfast.state.groups import Group, match, read_record, show_side_by_side, unite
from holdfast.state.optimizer import look_up
from holdfast.state.saved import SavedTensors
from tests.support.managers import Live, linear, manager_of, step
from tests.support.states import digest

# -- which saved options a group takes -----------------------------------------------------------


def _groups(*described: tuple[str, float]) -> list[Group]:
    return [Group(tuple(names.split()), {"lr": rate}, "AdamW") for names, rate in described]


@pytest.mark.parametrize(
    ("live", "saved", "rates", "by_position"),
    [
        ([("a b", 1), ("", 2), ("", 3)], [("b a", 4), ("", 5), ("", 6)], [4, 5, 6], True),
        ([("a", 1), ("b", 2)], [("b", 3), ("a", 4)], [4, 3], False),
        ([("a b", 1)], [("a", 3), ("b", 3)], [3], False),
        ([("a", 1), ("b", 2)], [("a b", 3)], [3, 3], False),
        ([("a new", 1), ("other", 2)], [("a", 3)], [3, None], False),
        ([("a", 1), ("", 2)], [("a b", 3), ("", 4)], [3, 4], False),
        ([("a", 1), ("", 2)], [("a b", 3)], [3, None], False),
        ([], [("a", 3)], [], False),
    ],
)
def test_a_group_takes_what_was_saved_for_its_members(
    live: Any, saved: Any, rates: Sequence[float | None], by_position: bool
) -> None:
    """By position if all members are the same, else by the members that were saved."""
    found = match(_groups(*live), _groups(*saved), "optimizer")
    assert [each and each.options["lr"] for each in found.taken] == list(rates)
    assert (found.is_by_position, found.conflicts) == (by_position, ())


def test_members_that_disagree_are_a_conflict() -> None:
    """Which names the group, where its parameters were, and what differs."""
    saved = [*_groups(("a", 3)), Group(("b",), {"lr": 3, "betas": (0.5, 0.6)}, "Adam")]
    found = match(_groups(("a b", 1)), saved, "optimizer")
    assert found.taken == (None,)
    (conflict,) = found.conflicts
    assert conflict == (
        "optimizer group 0 has parameters of saved groups 0, 1: class AdamW and Adam; "
        "betas None and (0.5, 0.6)"
    )


def test_an_option_may_have_any_name() -> None:
    """Those of the record's own fields included, beside the kind of the optimizer."""
    options = {"class": "decay", "option:class": 1, "option:": 2, "lr": 3}
    group = Group(("a",), options, "AdamW")
    assert read_record([group.entry()]) == [group]


def test_what_is_no_number_equals_itself() -> None:
    """Members that were saved with the same options are one group, of whatever value."""
    options = {"lr": float("nan"), "of": [torch.tensor([1.0, float("nan")])]}
    saved = [Group((name,), options, "AdamW") for name in "ab"]
    assert match([Group(("a", "b"), {}, "AdamW")], saved, "optimizer").conflicts == ()


def test_both_structures_are_shown_side_by_side() -> None:
    """With the options in which groups differ, and long ones shortened."""
    many = " ".join(f"layer{number}" for number in range(9))
    shown = show_side_by_side(_groups(("a", 0.5), ("", 0.5)), _groups((many, 0.25)))
    assert shown.splitlines() == [
        "  saved                    | here",
        "  0: a; lr=0.5             | 0: layer0, layer1, layer2, ... (9); lr=0.25",
        "  1: no parameters; lr=0.5 |",
    ]


def test_records_of_several_ranks_are_one() -> None:
    """Equal ones are one; groups of equal options at one position hold the names of all ranks."""
    one, other = _groups(("a", 1), ("b", 2)), _groups(("c", 1), ("d e", 2))
    assert unite([one, one]) == one
    assert [each.names for each in unite([one, other])] == [("a", "c"), ("b", "d", "e")]
    apart = unite([one, _groups(("c", 9), ("a", 2))])
    assert [(each.names, each.options["lr"]) for each in apart] == [
        (("a",), 1), (("b",), 2), (("c",), 9),
    ]  # fmt: skip


@pytest.mark.parametrize("value", [None, {}, [3], [{}], [{"params": "ab"}], [{"params": [1]}]])
def test_what_is_no_record_is_refused(value: Any) -> None:
    """A file may hold anything under that name."""
    with pytest.raises(ValueError, match=r"is no list|without names"):
        read_record(value)


# -- saved and loaded ----------------------------------------------------------------------------


def _live(build: Callable[[Any], Any], seed: int) -> Live:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    return Live(model, build(model))


def _saved(root: Path, build: Callable[[Any], Any], steps: int = 2) -> Live:
    live = _live(build, 1)
    for number in range(steps):
        step(live, number)
    live.save(manager_of(root))
    return live


def _optimizers(live: Live) -> list[Any]:
    return live.optimizer if isinstance(live.optimizer, list) else [live.optimizer]


def _of_optimizers(live: Live) -> list[str]:
    return [digest(each.state_dict()) for each in _optimizers(live)]


def _empty(model: Any) -> Any:
    groups = [{"params": [], "lr": 0.5}, {"params": model.parameters()}, {"params": [], "lr": 0.2}]
    return torch.optim.AdamW(groups, lr=0.01)


def _tensor_rates(model: Any) -> Any:
    rates = [torch.tensor(0.1), torch.tensor(0.2)]
    groups = [
        {"params": each.parameters(), "lr": rate} for each, rate in zip(model, rates, strict=True)
    ]
    return torch.optim.AdamW(groups, betas=(torch.tensor(0.8), torch.tensor(0.9)), foreach=False)


def _two_of_one_parameter(model: Any) -> Any:
    first, second = model.parameters(), model[0].parameters()
    return [torch.optim.Adam(first), torch.optim.Adam(second, betas=(0.5, 0.6), amsgrad=True)]


def _adam_beside_sgd(model: Any) -> Any:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return [torch.optim.Adam(model.parameters()), sgd, torch.optim.Adagrad(model[1].parameters())]


def _apart(model: Any) -> Any:
    return [torch.optim.Adam(model[1].parameters()), torch.optim.SGD(model[0].parameters(), lr=0.1)]


def _nested_options(model: Any) -> Any:
    groups = [
        {"params": model.parameters(), "note": {"deep": [1, {"er": torch.ones(2)}], "no": {}}}
    ]
    return torch.optim.AdamW(groups)


def _named_parameters(model: Any) -> Any:
    return torch.optim.AdamW(model.named_parameters())


BUILDS = [
    _empty, _tensor_rates, _two_of_one_parameter, _adam_beside_sgd, _apart, _nested_options,
    _named_parameters,
]  # fmt: skip


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "stepped"])
@pytest.mark.parametrize("build", BUILDS)
def test_every_optimizer_comes_back_exactly(
    tmp_path: Path, build: Callable[[Any], Any], fresh: bool
) -> None:
    """Groups, options and state, and the next step is that of the run that went on."""
    saved = _saved(tmp_path, build)
    live = _live(build, 2)
    if not fresh:
        step(live, 9)
    live.load(manager_of(tmp_path))
    for _ in range(2):
        assert _of_optimizers(live) == _of_optimizers(saved)
        assert digest(live.model.state_dict()) == digest(saved.model.state_dict())  # type: ignore[union-attr]
        step(live, 5)
        step(saved, 5)


def test_a_rate_that_is_a_tensor_keeps_its_memory(tmp_path: Path) -> None:
    """Compiled steps and schedules refer to it."""
    _saved(tmp_path, _tensor_rates)
    live = _live(_tensor_rates, 2)
    rates = [group["lr"] for group in live.optimizer.param_groups]
    for each in rates:
        each.fill_(7)
    live.load(manager_of(tmp_path))
    assert all(
        group["lr"] is each for group, each in zip(live.optimizer.param_groups, rates, strict=True)
    )
    assert [each.item() for each in rates] == pytest.approx([0.1, 0.2])


def _split(model: Any) -> Any:
    groups = [
        {"params": each.parameters(), "lr": 0.1 * n, "weight_decay": 0.1}
        for n, each in enumerate(model, 1)
    ]
    return torch.optim.AdamW(groups)


def _whole(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def test_groups_that_were_merged_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    """Both structures are in the message; the optimizer can be kept."""
    _saved(tmp_path, _split)
    live = _live(_whole, 2)
    before = live.digests()
    for strict in (True, False):
        with pytest.raises(StateMismatchError) as caught:
            live.load(manager_of(tmp_path), strict=strict)
        lines = str(caught.value).splitlines()
        assert lines[2].startswith("  0: 0.weight, 0.bias; lr=0.1")
        assert lines[2].endswith(
            "| 0: 0.weight, 0.bias, 1.weight, ... (4); lr=0.1, weight_decay=0.01"
        )
        assert live.digests() == before
    live.load(manager_of(tmp_path, load={"override": ["optimizer"]}))


@pytest.mark.parametrize("order", ["split", "swapped"])
def test_other_groups_take_the_options_of_their_members(tmp_path: Path, order: str) -> None:
    """A group that was split, and groups in another order."""

    def swapped(model: Any) -> Any:
        groups = [{"params": each.parameters(), "lr": 9.0} for each in reversed(model)]
        return torch.optim.AdamW(groups)

    saved = _saved(tmp_path, _whole if order == "split" else _split)
    live = _live(_split if order == "split" else swapped, 2)
    live.load(manager_of(tmp_path))
    rates = [group["lr"] for group in live.optimizer.param_groups]
    assert rates == ([0.1, 0.1] if order == "split" else [0.2, 0.1])
    step(live, 5)
    step(saved, 5)
    assert digest(live.model.state_dict()) == digest(saved.model.state_dict())  # type: ignore[union-attr]


@pytest.mark.parametrize("other", ["whole", "swapped"])
def test_a_schedule_of_other_groups_is_refused(tmp_path: Path, other: str) -> None:
    """It has a base rate for each group in order, and nobody knows the order of the next one."""

    def build(model: Any) -> Any:
        groups = [
            {"params": each.parameters(), "lr": rate}
            for each, rate in zip(model, (0.1, 0.2), strict=True)
        ]
        return torch.optim.SGD(groups)

    def swapped(model: Any) -> Any:
        return torch.optim.SGD([{"params": each.parameters()} for each in reversed(model)], lr=1.0)

    def equal(model: Any) -> Any:
        return torch.optim.SGD([{"params": each.parameters()} for each in model], lr=0.1)

    def whole(model: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    saved = _live(equal if other == "whole" else build, 1)
    saved.scheduler = torch.optim.lr_scheduler.StepLR(saved.optimizer, 1)
    saved.save(manager_of(tmp_path), 1)
    live = _live(whole if other == "whole" else swapped, 2)
    live.scheduler = torch.optim.lr_scheduler.StepLR(live.optimizer, 1)
    before = live.digests()
    with pytest.raises(StateMismatchError, match=r"scheduler\.base_lrs was saved for"):
        live.load(manager_of(tmp_path))
    assert live.digests() == before
    live.load(manager_of(tmp_path, load={"override": ["scheduler"]}))


# -- frozen parameters, and those outside the model ----------------------------------------------


def test_another_schedule_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    """Settings of one in another would be kept in silence."""
    saved, live = _scheduled("StepLR", 2), _scheduled("CosineAnnealingLR", 9)
    manager = manager_of(tmp_path)
    saved.load(manager)
    saved.save(manager, 1)
    before = live.digests()
    with pytest.raises(StateMismatchError, match=r"scheduler has gamma, step_size, which no Cosin"):
        live.load(manager_of(tmp_path))
    assert live.digests() == before
    same = _scheduled("StepLR", 3)
    same.load(manager_of(tmp_path))
    assert same.scheduler.step_size == 2


def _scheduled(kind: str, setting: int) -> Live:
    live = linear()
    live.scheduler = getattr(torch.optim.lr_scheduler, kind)(live.optimizer, setting)
    return live


def test_state_of_a_frozen_parameter_comes_back(tmp_path: Path) -> None:
    """It was trained before it was frozen, and may be again."""

    def build(model: Any) -> Any:
        model[0].requires_grad_(False)
        return torch.optim.AdamW(model.parameters())

    saved = _live(build, 1)
    saved.model[0].requires_grad_(True)  # type: ignore[index]
    step(saved)
    saved.model[0].requires_grad_(False)  # type: ignore[index]
    saved.save(manager_of(tmp_path))
    live = _live(build, 2)
    live.load(manager_of(tmp_path))
    assert len(live.optimizer.state) == 4
    assert _of_optimizers(live) == _of_optimizers(saved)


def _with_temperature(model: Any) -> Any:
    temperature = nn.Parameter(torch.rand(3))
    groups = [
        {"params": [*model.parameters(), temperature]},
        {"params": [nn.Parameter(torch.rand(2))]},
    ]
    return torch.optim.AdamW(groups)


def _step_all(live: Live) -> None:
    for group in live.optimizer.param_groups:
        for each in group["params"]:
            each.grad = torch.ones_like(each)
    live.optimizer.step()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_parameter_outside_the_model_comes_back(tmp_path: Path, asynchronous: bool) -> None:
    """Its value too, which is saved nowhere else."""
    saved, live = _live(_with_temperature, 1), _live(_with_temperature, 2)
    manager = manager_of(tmp_path, async_save=asynchronous)
    for number in (1, 2):
        _step_all(saved)
        saved.save(manager, number)
        manager.finalize_async_saves(saved.state, blocking=True)
    live.load(manager_of(tmp_path))

    def outside(it: Live) -> list[Any]:
        first, second = it.optimizer.param_groups
        return [first["params"][-1], second["params"][0]]

    assert digest(outside(live)) == digest(outside(saved))
    assert _of_optimizers(live) == _of_optimizers(saved)
    with pytest.raises(StateMismatchError, match=r"optimizer\.group0\.4"):
        _live(_whole, 3).load(manager_of(tmp_path))
    other = _live(
        lambda model: torch.optim.AdamW([*model.parameters(), nn.Parameter(torch.ones(5))]), 4
    )
    with pytest.raises(StateMismatchError) as caught:
        other.load(manager_of(tmp_path), strict=False)
    assert caught.value.different == ("optimizer.parameters.group0.4 is [3], here [5]",)


def test_a_name_that_a_module_has_is_refused(tmp_path: Path) -> None:
    """A parameter outside the model would take the name of one inside."""
    model = nn.ModuleDict({"group0": nn.ParameterList([torch.ones(2), torch.ones(2)])})
    live = Live(model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=0.1))
    live.save(manager_of(tmp_path), 1)  # group0.2: no other has it
    live.optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1)), *model.parameters()], lr=0.1)
    with pytest.raises(UnsupportedStateError, match=r"would be saved as group0\.0"):
        live.save(manager_of(tmp_path / "other"), 1)


class _More(torch.optim.AdamW):
    def state_dict(self) -> Any:
        return {**super().state_dict(), "history": [1, 2]}


def test_a_state_dict_with_more_in_it_is_refused(tmp_path: Path) -> None:
    """What has no place would be lost without a word."""
    live = _live(lambda model: _More(model.parameters()), 1)
    with pytest.raises(UnsupportedStateError, match="state_dict\\(\\) also has history"):
        live.save(manager_of(tmp_path), 1)


# -- every pair of torch's optimizers ------------------------------------------------------------

ALL: dict[str, Callable[[Any], Any]] = {
    name: getattr(torch.optim, name)
    for name in sorted(vars(torch.optim))
    if isinstance(getattr(torch.optim, name), type)
    and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam")
}
ALL |= {
    "decoupled Adam": lambda each: torch.optim.Adam(each, decoupled_weight_decay=True),
    "momentum": lambda each: torch.optim.SGD(each, momentum=0.9),
    "centered": lambda each: torch.optim.RMSprop(each, centered=True, momentum=0.5),
    "amsgrad": lambda each: torch.optim.AdamW(each, amsgrad=True),
}
SAME = [
    {"SGD", "momentum"}, {"RMSprop", "centered"}, {"AdamW", "amsgrad", "decoupled Adam"},
    {"Adam", "decoupled Adam"},
]  # fmt: skip


def _matrix(kind: str, seed: int) -> Live:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2, bias=False)
    return Live(model, ALL[kind](model.parameters()))


def _step_with(live: Live, seed: int) -> None:
    (parameter,) = live.model.parameters()  # type: ignore[union-attr]
    parameter.grad = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed))
    live.optimizer.step(lambda: torch.tensor(1.0))


def _is_same(saved: str, live: str) -> bool:
    return saved == live or any({saved, live} <= each for each in SAME)


def test_of_every_pair_it_is_decided_by_class_and_options() -> None:
    """From names and options alone; what a step would do differently is another kind."""
    sides = {}
    for kind in ALL:
        live = _matrix(kind, 1)
        live.optimizer.load_state_dict(live.optimizer.state_dict())  # as after a load
        found = look_up(live.model, [live.optimizer], None)  # type: ignore[arg-type]
        record = [each.entry() for each in found.groups("optimizer")]
        path = ("optimizer", "param_groups")
        values = {"optimizer.param_groups": record}
        saved = SavedTensors({}, values, {"optimizer.param_groups": path}, ())
        sides[kind] = live, found, saved
    for kind, (_, _, saved) in sides.items():
        for other, (live, found, _) in sides.items():
            try:
                OptimizerFit([live.optimizer], found, saved).check_kinds("here")
            except StateMismatchError as error:
                told = str(error)
                assert not _is_same(kind, other), told
            else:
                assert _is_same(kind, other), (kind, other)


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        *((each, each) for each in ALL),
        *(
            (one, two)
            for each in SAME
            for one in sorted(each)
            for two in sorted(each)
            if one != two
        ),
    ],
)
def test_what_is_taken_is_exact(tmp_path: Path, saved: str, other: str) -> None:
    """The next step is that of the run that saved, whatever options the live side had."""
    before, after = _matrix(saved, 1), _matrix(other, 2)
    _step_with(before, 1)
    before.save(manager_of(tmp_path), 1)
    after.load(manager_of(tmp_path))
    for it in (before, after):
        _step_with(it, 2)
    assert digest(after.model.state_dict()) == digest(before.model.state_dict())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("saved", "other"), [("AdamW", "SGD"), ("RAdam", "Adam"), ("Adam", "AdamW")]
)
def test_another_optimizer_is_refused_before_anything_is_touched(
    tmp_path: Path, saved: str, other: str
) -> None:
    """With the way out, which works."""
    before, after = _matrix(saved, 1), _matrix(other, 2)
    _step_with(before, 1)
    before.save(manager_of(tmp_path), 1)
    was = after.digests()
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"load\.override=\[optimizer\]"):
            after.load(manager_of(tmp_path), strict=strict)
        assert after.digests() == was
    after.load(manager_of(tmp_path, load={"override": ["optimizer"]}))
    _step_with(after, 2)
