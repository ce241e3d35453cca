"""What a load leaves as the run has it now, and what it says where the run asks for something else.

Every claim about a learning rate is checked against a run that had the live rate from its start.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from holdfast.errors import (
    ConfigError,
    DataReshardError,
    NothingLoadedError,
    StateMismatchError,
    UnsupportedStateError,
)
from tests.support.managers import Live, counters, linear, manager_of, step
from tests.support.states import ReshardableStream, SampleStream, digest, rng_digests

OLD, NEW = 0.1, 0.013
SAVED_AT = 5


def _warm(at: int) -> float:
    return min(1.0, (at + 1) / 4) / (1 + at)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda it: schedules.LambdaLR(it, _warm),
    "multiplicative": lambda it: schedules.MultiplicativeLR(it, lambda at: 0.9),
    "step": lambda it: schedules.StepLR(it, 2, gamma=0.3),
    "milestones": lambda it: schedules.MultiStepLR(it, [3, 7], gamma=0.3),
    "constant": lambda it: schedules.ConstantLR(it, 0.5, total_iters=7),
    "linear": lambda it: schedules.LinearLR(it, total_iters=9),
    "exponential": lambda it: schedules.ExponentialLR(it, 0.8),
    "polynomial": lambda it: schedules.PolynomialLR(it, 20, 2.0),
    "cosine": lambda it: schedules.CosineAnnealingLR(it, 20),
    "restarts": lambda it: schedules.CosineAnnealingWarmRestarts(it, 3, 2),
    "warm-up first": lambda it: schedules.SequentialLR(
        it, [schedules.LinearLR(it, total_iters=3), schedules.CosineAnnealingLR(it, 20)], [3]
    ),
    "warm-up to come": lambda it: schedules.SequentialLR(
        it, [schedules.LinearLR(it, total_iters=8), schedules.StepLR(it, 2)], [8]
    ),
    "three in a row": lambda it: schedules.SequentialLR(
        it,
        [
            schedules.LinearLR(it, total_iters=2),
            schedules.ConstantLR(it, 1.0, total_iters=2),
            schedules.LambdaLR(it, _warm),
        ],
        [2, 7],
    ),
    "chained": lambda it: schedules.ChainedScheduler(
        [schedules.ConstantLR(it, 0.5, total_iters=4), schedules.ExponentialLR(it, 0.9)]
    ),
}


def _run(rate: float, schedule: str | None = None, **options: Any) -> Live:
    torch.manual_seed(3)
    model = nn.Linear(4, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 2 * rate}]
    live = Live(model, torch.optim.AdamW(groups, lr=rate, **options))
    if schedule is not None:
        live.scheduler = SCHEDULES[schedule](live.optimizer)
    return live


def _rates(live: Live) -> list[float]:
    return [float(group["lr"]) for group in live.optimizer.param_groups]


def _following(live: Live, count: int = 7) -> list[list[float]]:
    found = [_rates(live)]
    for number in range(count):
        step(live, number)
        found.append(_rates(live))
    return found


def _saved(root: Path, live: Live) -> None:
    for number in range(SAVED_AT):
        step(live, number)
    live.save(manager_of(root))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_kept_rate_is_that_of_a_run_that_always_had_it(tmp_path: Path, schedule: str) -> None:
    """The schedule goes on where it was, at the live base rate, for every step that follows."""
    _saved(tmp_path, _run(OLD, schedule))
    always, live = _run(NEW, schedule), _run(NEW, schedule)
    for number in range(SAVED_AT):
        step(always, number)
    live.load(manager_of(tmp_path, load={"override": ["optimizer.lr"]}))
    assert live.scheduler.last_epoch == SAVED_AT if schedule != "chained" else True
    assert live.scheduler.get_last_lr() == _rates(live)
    theirs, ours = _following(always), _following(live)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(expected, rel=1e-12)
    if schedule == "lambda":
        assert ours == theirs


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_equal_rate_is_kept_exactly(tmp_path: Path, schedule: str) -> None:
    """Keeping what was saved is an ordinary resume, bit for bit, and nothing is told of it."""
    _saved(tmp_path, _run(OLD, schedule))
    live, plain = _run(OLD, schedule), _run(OLD, schedule)
    live.load(manager_of(tmp_path, load={"override": ["optimizer.lr"]}))
    plain.load(manager_of(tmp_path))
    assert _following(live) == _following(plain)


def test_a_rate_without_a_schedule_is_the_live_one(tmp_path: Path) -> None:
    """There is nothing to scale; moments and every other option are restored."""
    saved = _run(OLD, weight_decay=0.3)
    _saved(tmp_path, saved)
    live = _run(NEW, weight_decay=0.1)
    live.load(manager_of(tmp_path, load={"override": ["optimizer.lr"]}))
    assert _rates(live) == [NEW, 2 * NEW]
    assert [each["weight_decay"] for each in live.optimizer.param_groups] == [0.3, 0.3]
    states = live.optimizer.state_dict()["state"], saved.optimizer.state_dict()["state"]
    assert digest(states[0]) == digest(states[1])


@pytest.mark.parametrize(
    ("option", "old", "new"),
    [("weight_decay", 0.3, 0.1), ("betas", (0.9, 0.99), (0.8, 0.9)), ("eps", 1e-8, 1e-6)],
)
def test_any_option_can_be_kept(tmp_path: Path, option: str, old: Any, new: Any) -> None:
    """It has its live value in every group; without the override it has the saved one."""
    _saved(tmp_path, _run(OLD, "cosine", **{option: old}))
    for override, expected in (([f"optimizer.{option}"], new), ([], old)):
        live = _run(OLD, "cosine", **{option: new})
        live.load(manager_of(tmp_path, load={"override": override}))
        assert [each[option] for each in live.optimizer.param_groups] == [expected] * 2


def test_a_rate_that_is_a_tensor_stays_one(tmp_path: Path) -> None:
    """Schedules write into it, so that it must keep its own memory and kind."""

    def build(rate: float) -> Live:
        torch.manual_seed(3)
        model = nn.Linear(4, 2)
        live = Live(model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(rate)))
        live.scheduler = schedules.StepLR(live.optimizer, 2, gamma=0.5)
        return live

    _saved(tmp_path, build(0.5))
    live = build(0.25)
    live.load(manager_of(tmp_path, load={"override": ["optimizer.lr"]}))
    assert isinstance(live.optimizer.param_groups[0]["lr"], torch.Tensor)
    assert _rates(live) == [0.0625]
    step(live)
    assert _rates(live) == [0.03125]


@pytest.mark.parametrize(
    "build",
    [
        lambda it: schedules.CosineAnnealingLR(it, 20, eta_min=1e-4),
        lambda it: schedules.OneCycleLR(it, 0.3, total_steps=20),
        lambda it: schedules.CyclicLR(it, 0.01, 0.3, cycle_momentum=False),
        schedules.ReduceLROnPlateau,
        lambda it: schedules.SequentialLR(
            it, [schedules.LinearLR(it), schedules.CosineAnnealingLR(it, 9, eta_min=1e-4)], [2]
        ),
    ],
    ids=["floor", "one cycle", "cyclic", "plateau", "floor later"],
)
@pytest.mark.parametrize("override", [["optimizer.lr"], ["optimizer"]], ids=str)
def test_a_schedule_that_cannot_follow_is_refused(
    tmp_path: Path, build: Callable[[Any], Any], override: list[str]
) -> None:
    """Before anything is touched, with the way out, which works."""

    def run(rate: float) -> Live:
        live = _run(rate)
        live.scheduler = build(live.optimizer)
        return live

    saved = run(OLD)
    saved.save(manager_of(tmp_path), SAVED_AT)
    live = run(NEW)
    before = live.digests()
    with pytest.raises(ConfigError, match=r"Add scheduler to load\.override"):
        live.load(manager_of(tmp_path, load={"override": override}))
    assert live.digests() == before
    assert live.load(manager_of(tmp_path, load={"override": [*override, "scheduler"]})).found


def test_a_kept_optimizer_keeps_groups_and_state(tmp_path: Path) -> None:
    """Model and counters are restored; the schedule goes on at the live base rate."""
    _saved(tmp_path, _run(OLD, "step"))
    always, live = _run(NEW, "step"), _run(NEW, "step", weight_decay=0.7)
    for number in range(SAVED_AT):
        step(always, number)
    result = live.load(manager_of(tmp_path, load={"override": ["optimizer"]}))
    assert not live.optimizer.state
    assert live.optimizer.param_groups[0]["weight_decay"] == 0.7
    assert _rates(live) == pytest.approx(_rates(always), rel=1e-12)
    assert live.state.train_state.step == SAVED_AT
    assert set(result.restored) == {"model", "scheduler", "rng", "train_state"}


def test_each_component_can_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is named keeps its live state, is not in the result, and is not said to be left out."""
    saved = _run(OLD, "cosine")
    saved.data = SampleStream(12)
    saved.state = counters(tokens_seen=8, extra={"a": 1})
    _saved(tmp_path, saved)
    for name in ("scheduler", "data", "rng", "train_state"):
        live = _run(OLD, "cosine")
        live.data = SampleStream(12)
        next(live.data)
        live.state = counters(tokens_seen=3)
        before = live.digests()
        torch.manual_seed(99)
        generators = rng_digests()
        caplog.clear()
        result = live.load(manager_of(tmp_path, load={"override": [name]}))
        expected = {"model", "optimizer", "scheduler", "data", "rng", "train_state"} - {name}
        assert set(result.restored) - {"train_state"} == expected - {"train_state"}
        after = live.digests()
        if name == "rng":
            assert rng_digests() == generators
        elif name != "train_state":
            assert after[name] == before[name]
        assert live.state.train_state.step == SAVED_AT
        assert live.state.train_state.tokens_seen == (3 if name == "train_state" else 8)
        told = [each.message for each in caplog.records if each.levelname == "WARNING"]
        # A fresh schedule beside a rate that the old one had brought down is worth a word.
        assert all("optimizer.lr" in each for each in told)
        assert len(told) == (name == "scheduler")


def test_one_counter_can_be_kept(tmp_path: Path) -> None:
    """The named field keeps its live value, the others are restored."""
    saved = _run(OLD)
    saved.state = counters(tokens_seen=8, consumed_train_samples=9)
    _saved(tmp_path, saved)
    live = _run(OLD)
    live.state = counters(tokens_seen=3)
    live.load(manager_of(tmp_path, load={"override": ["train_state.tokens_seen"]}))
    state = live.state.train_state
    assert (state.step, state.tokens_seen, state.consumed_train_samples) == (SAVED_AT, 3, 9)


@pytest.mark.parametrize(
    "name", ["optimizer.learning_rate", "train_state.epochs", "optimizer.initial_lr"]
)
def test_an_unknown_name_is_refused_with_those_that_are_known(tmp_path: Path, name: str) -> None:
    """Nothing is touched, and the message lists what this run has."""
    _saved(tmp_path, _run(OLD))
    live = _run(NEW)
    before = live.digests()
    with pytest.raises(ConfigError, match=name) as caught:
        live.load(manager_of(tmp_path, load={"override": [name, "optimizer.lr"]}))
    for known in ("optimizer.lr", "optimizer.betas", "train_state.tokens_seen", "scheduler"):
        assert known in str(caught.value)
    assert "train_state.step" not in str(caught.value)
    assert live.digests() == before


# -- what is told of options that differ ---------------------------------------------------------


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in caplog.records if "differ from the saved ones" in each.message]


@pytest.mark.parametrize("schedule", [None, "cosine", "lambda"])
def test_a_rate_typed_on_a_resume_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, schedule: str | None
) -> None:
    """One warning with both values and the way to keep the live one; the saved one is used."""
    saved = _run(OLD, schedule)
    _saved(tmp_path, saved)
    live = _run(NEW, schedule, weight_decay=0.5)
    live.load(manager_of(tmp_path))
    (told,) = _told(caplog)
    assert f"optimizer.lr (group 0) is {NEW} here and was {OLD}" in told
    assert "optimizer.weight_decay (group 1) is 0.5 here and was 0.01" in told
    assert "checkpoint.load.override=[optimizer.lr,optimizer.weight_decay]" in told
    assert _rates(live) == _rates(saved)
    caplog.clear()
    live = _run(NEW, schedule, weight_decay=0.5)
    kept = ["optimizer.lr", "optimizer.weight_decay"]
    live.load(manager_of(tmp_path, load={"override": kept}))
    assert _told(caplog) == []


@pytest.mark.parametrize(
    ("schedule", "other", "name"),
    [
        ("cosine", lambda it: schedules.CosineAnnealingLR(it, 40), "scheduler.T_max is 40"),
        ("step", lambda it: schedules.StepLR(it, 3, gamma=0.3), "scheduler.step_size is 3"),
        ("exponential", lambda it: schedules.ExponentialLR(it, 0.7), "scheduler.gamma is 0.7"),
        ("milestones", lambda it: schedules.MultiStepLR(it, [3, 8], gamma=0.3), "milestones is"),
        (
            "warm-up first",
            lambda it: schedules.SequentialLR(
                it,
                [schedules.LinearLR(it, total_iters=4), schedules.CosineAnnealingLR(it, 20)],
                [4],
            ),
            "total_iters is 4",
        ),
    ],
)  # fmt: skip
def test_another_schedule_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    schedule: str,
    other: Callable[[Any], Any],
    name: str,
) -> None:
    """Its arguments are compared, and how far it has come is not."""
    _saved(tmp_path, _run(OLD, schedule))
    live = _run(OLD)
    live.scheduler = other(live.optimizer)
    live.load(manager_of(tmp_path))
    (told,) = _told(caplog)
    assert name in told
    assert "override=[scheduler]" in told


@pytest.mark.parametrize(
    "build",
    [
        *(SCHEDULES[each] for each in SCHEDULES),
        lambda it: schedules.OneCycleLR(it, 0.3, total_steps=20),
        lambda it: schedules.CyclicLR(it, 0.01, 0.3, step_size_up=3),
        lambda it: None,
    ],
)
def test_an_ordinary_resume_tells_of_no_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, build: Callable[[Any], Any]
) -> None:
    """What a schedule changes as it goes, momentum included, is no option that differs."""

    def run() -> Live:
        model = linear().model
        live = Live(model, torch.optim.SGD(model.parameters(), lr=OLD, momentum=0.9))
        live.scheduler = build(live.optimizer)
        return live

    _saved(tmp_path, run())
    run().load(manager_of(tmp_path))
    assert _told(caplog) == []


class _Own:
    """A scheduler that is not torch's and changes rate and weight decay."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = OLD / self.steps, 0.1 * self.steps

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def test_a_scheduler_of_the_users_raises_no_false_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can tell what it drives, so that what it may drive is not compared."""
    saved, live = _run(OLD), _run(OLD, eps=1e-6)
    saved.scheduler, live.scheduler = _Own(saved.optimizer), _Own(live.optimizer)
    _saved(tmp_path, saved)
    live.load(manager_of(tmp_path))
    (told,) = _told(caplog)
    assert told.count(" here and was ") == 2
    assert "optimizer.eps (group 0)" in told


# -- what can be asked for again -----------------------------------------------------------------


def test_generators_are_restored_again_on_request(tmp_path: Path) -> None:
    """Numbers drawn between the load and the first step cost nothing then."""
    live = linear()
    live.save(manager_of(tmp_path), 1)
    manager, other = manager_of(tmp_path), linear(1)
    other.load(manager)
    expected = rng_digests()
    torch.rand(7)
    manager.restore_rng()
    assert rng_digests() == expected


@pytest.mark.parametrize("load", [{"rng": False}, {"override": ["rng"]}], ids=str)
def test_generators_can_be_left_alone(tmp_path: Path, load: dict[str, Any]) -> None:
    """Neither the load nor a later request touches them, and the result says so."""
    linear().save(manager_of(tmp_path), 1)
    live, manager = linear(1), manager_of(tmp_path, load=load)
    torch.manual_seed(5)
    before = rng_digests()
    assert "rng" not in live.load(manager).restored
    manager.restore_rng()
    assert rng_digests() == before


def test_nothing_can_be_asked_for_before_a_load(tmp_path: Path) -> None:
    """The error says which call is missing."""
    for ask in (
        lambda it: it.restore_rng(),
        lambda it: it.restore_data(SampleStream(12)),
    ):
        with pytest.raises(NothingLoadedError, match="call load first"):
            ask(manager_of(tmp_path))


def test_a_load_that_found_nothing_has_nothing_to_give(tmp_path: Path) -> None:
    """Generators stay as they are; a data position that is asked for is an error."""
    manager, live = manager_of(tmp_path), linear()
    live.load(manager)
    before = rng_digests()
    manager.restore_rng()
    assert rng_digests() == before
    with pytest.raises(NothingLoadedError, match="found no checkpoint"):
        manager.restore_data(SampleStream(12))


def test_a_later_iterator_is_given_its_position(tmp_path: Path) -> None:
    """One that is built after the load goes on as one that was given to it."""
    saved = linear()
    saved.data = SampleStream(12)
    next(saved.data)
    saved.save(manager_of(tmp_path), 1)
    manager = manager_of(tmp_path)
    linear(1).load(manager)
    later = SampleStream(12)
    manager.restore_data(later)
    assert digest(later.state_dict()) == digest(saved.data.state_dict())
    with pytest.raises(UnsupportedStateError, match="list_iterator"):
        manager.restore_data(iter([1]))


class _Keeps:
    """An iterator whose state is the very dict that it was given, and changes as it goes on."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"position": 9, "seen": [1]}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict
        self.state["position"] += 3
        self.state["seen"].append(2)

    def load_resharded_state(self, states: list[dict[str, Any]]) -> None:
        self.load_state_dict(states[0])


def test_a_position_is_given_as_it_was_saved_every_time(tmp_path: Path) -> None:
    """What an iterator makes of the dict that it was given changes nothing for the next one."""
    saved = linear()
    saved.data = _Keeps()
    saved.save(manager_of(tmp_path), 1)
    manager, live = manager_of(tmp_path), linear(1)
    live.data = _Keeps()
    live.load(manager)
    for _ in range(2):
        later = _Keeps()
        manager.restore_data(later)
        assert later.state == live.data.state == {"position": 12, "seen": [1, 2]}


def test_a_checkpoint_without_a_position_has_none_to_give(tmp_path: Path) -> None:
    """The error names the checkpoint and what it was saved without."""
    linear().save(manager_of(tmp_path), 1)
    manager = manager_of(tmp_path)
    linear(1).load(manager)
    with pytest.raises(NothingLoadedError, match="iter_0000001 holds no data position"):
        manager.restore_data(SampleStream(12))


class _Group:
    """A data-parallel group of some size, as far as a place is read from one."""

    def __init__(self, size: int) -> None:
        self._size = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size


class _Groups:
    def __init__(self, size: int) -> None:
        self.dp = _Group(size)


@pytest.mark.parametrize("accept", [True, False])
def test_a_later_iterator_reshards_as_an_earlier_one(tmp_path: Path, accept: bool) -> None:
    """Another data-parallel size: resharded where the iterator can, refused or restarted else."""
    saved = linear()
    saved.data = SampleStream(12)
    next(saved.data)
    saved.save(manager_of(tmp_path), 1)
    manager = manager_of(tmp_path, load={"accept_data_restart": accept})
    linear(1).load(manager, pg_collection=_Groups(2))
    able, unable = ReshardableStream(12), SampleStream(12)
    before = digest(unable.state_dict())
    manager.restore_data(able)
    assert able.state_dict() != SampleStream(12).state_dict()
    if accept:
        manager.restore_data(unable)
    else:
        with pytest.raises(DataReshardError, match="load_resharded_state"):
            manager.restore_data(unable)
    assert digest(unable.state_dict()) == before


# -- what the result says ------------------------------------------------------------------------


def test_a_result_counts_what_was_restored(tmp_path: Path) -> None:
    """By component: tensors and bytes that this rank got, and none that it did not ask for."""
    saved = _run(OLD, "cosine")
    saved.data = SampleStream(12)
    _saved(tmp_path, saved)
    live = _run(OLD, "cosine")
    live.data = SampleStream(12)
    restored = live.load(manager_of(tmp_path)).restored
    assert set(restored) == {"model", "optimizer", "scheduler", "data", "rng", "train_state"}
    model = saved.model.state_dict().values()  # type: ignore[union-attr]
    assert (restored["model"].tensors, restored["model"].size_bytes) == (
        2,
        sum(each.nbytes for each in model),
    )
    moments = [each for state in saved.optimizer.state.values() for each in state.values()]
    assert (restored["optimizer"].tensors, restored["optimizer"].size_bytes) == (
        len(moments),
        sum(each.nbytes for each in moments),
    )
    assert restored["rng"].tensors >= 1
    assert all(each.size_bytes > 0 for each in restored.values())
    alone = Live(_run(OLD).model).load(manager_of(tmp_path), strict=False)
    assert set(alone.restored) == {"model", "rng", "train_state"}
    skipped = _run(OLD, "cosine").load(manager_of(tmp_path), skip_load_to_model_and_opt=True)
    assert set(skipped.restored) == {"scheduler", "rng", "train_state"}
    assert dict(_run(OLD).load(manager_of(tmp_path / "none")).restored) == {}


def test_a_step_is_never_kept() -> None:
    """The config refuses it: it is the iteration of what is loaded."""
    with pytest.raises(ConfigError, match=r"train_state\.step"):
        manager_of(Path("/nowhere"), load={"override": ["train_state.step"]})


@pytest.mark.parametrize("name", ["model", "optimizer.", "lr", "rng.torch", ""])
def test_names_of_nothing_are_refused_by_the_config(name: str) -> None:
    """Before any checkpoint is looked at, with the names that there can be."""
    with pytest.raises(ConfigError, match=r"load\.override names"):
        manager_of(Path("/nowhere"), load={"override": [name]})


KINDS: dict[str, Callable[[Any], Any]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("live", KINDS)
@pytest.mark.parametrize("saved", KINDS)
def test_another_kind_of_optimizer_is_refused(
    saved: str, live: str, steps: int, tmp_path: Path
) -> None:
    """By class and options, before anything is touched; what is of the same class is loaded."""

    def build(kind: str, seed: int) -> Live:
        torch.manual_seed(seed)
        model = nn.Linear(2, 2)
        return Live(model, KINDS[kind](model.parameters()))

    before = build(saved, 1)
    for _ in range(steps):
        step(before)
    before.save(manager_of(tmp_path))
    after = build(live, 2)
    was = after.digests()
    same = {"sgd": "momentum"}
    if same.get(saved, saved) == same.get(live, live):
        after.load(manager_of(tmp_path))
        step(after)
        return
    with pytest.raises(StateMismatchError, match=r"load\.override=\[optimizer\]"):
        after.load(manager_of(tmp_path))
    assert after.digests() == was
    after.load(manager_of(tmp_path, load={"override": ["optimizer"]}))
    step(after)
