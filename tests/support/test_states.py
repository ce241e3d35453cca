"""The small runs: deterministic, learning, and with digests that see every bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard

from tests.support.ranks import run_ranks
from tests.support.states import (
    MODELS,
    ReshardableStream,
    SampleStream,
    SmallRun,
    digest,
    draw_from_each_generator,
    make_run,
)


@pytest.mark.parametrize("kind", MODELS)
def test_two_runs_of_one_seed_are_equal(kind: str) -> None:
    """The same seed gives the same losses and digests, another one others."""
    first = make_run(kind)
    losses = first.train(5)
    digests = first.digests()
    again = make_run(kind)
    assert again.train(5) == losses
    assert again.digests() == digests
    other = make_run(kind, seed=1)
    assert other.train(5) != losses


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_learns(kind: str) -> None:
    """The loss falls, so that state lost on the way shows."""
    losses = make_run(kind).train(300)
    assert sum(losses[-50:]) < 0.9 * sum(losses[:50])


def _flip_parameter(run: SmallRun) -> None:
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[0].mul_(1.0001)


def _flip_moment(run: SmallRun) -> None:
    next(iter(run.optimizer.state.values()))["exp_avg"].view(-1)[0].add_(1e-6)


CHANGES: list[tuple[str, Callable[[SmallRun], Any]]] = [
    ("model.inner.weight", _flip_parameter),
    ("optimizer.0.exp_avg", _flip_moment),
    ("optimizer.groups", lambda run: run.optimizer.param_groups[0].update(lr=0.5)),
    ("scheduler", lambda run: setattr(run.scheduler, "last_epoch", 99)),
    ("data", lambda run: next(run.stream)),
    ("rng.python", lambda run: random.random()),
    ("rng.numpy", lambda run: np.random.random()),
    ("rng.torch", lambda run: torch.rand(())),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_every_change_is_seen_and_named(name: str, change: Callable[[SmallRun], Any]) -> None:
    """One changed value changes its own digest and no other."""
    run = make_run()
    run.train(2)
    before = run.digests()
    change(run)
    after = run.digests()
    assert [each for each in after if after[each] != before[each]] == [name]


DIFFERENT = [
    (0.0, -0.0),
    (1, 1.0),
    (1, True),
    ("1", 1),
    (None, "None"),
    ([1, 2], (1, 2)),
    ([[1], [2]], [[1, 2], []]),
    (["ab", "c"], ["a", "bc"]),
    ({"a": 1}, {"a": 1, "b": None}),
    (torch.zeros(2), torch.zeros(2, 1)),
    (torch.zeros(0, 4), torch.zeros(0, 3)),
    (torch.zeros(()), torch.zeros(1)),
    (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    (torch.tensor(0.0), torch.tensor(-0.0)),
    (torch.tensor(float("nan")), torch.tensor(float("inf"))),
    (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16)),
    (np.zeros(2), np.zeros(2, dtype=np.float32)),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_a_digest_tells_values_apart(one: Any, other: Any) -> None:
    """Type, shape, sign and structure count, and equal values agree."""
    assert digest(one) != digest(other)
    assert digest(one) == digest(one)


def test_a_digest_ignores_the_order_of_names_and_of_memory() -> None:
    """What is equal in a checkpoint's sense has one digest."""
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    values = torch.arange(6.0).reshape(2, 3)
    assert digest(values.t()) == digest(values.t().contiguous())


def test_an_unknown_type_has_no_digest() -> None:
    """An object whose text may hold an address is refused, not hashed by chance."""
    with pytest.raises(TypeError, match="no digest of a object"):
        digest([object()])


def test_ranks_draw_differently_and_start_equal() -> None:
    """Parameters agree between ranks, random draws and batches do not."""
    runs, draws, batches = [], [], []
    for rank in range(2):
        runs.append(make_run(rank=rank, ranks=2))
        draws.append(draw_from_each_generator())
        batches.append(next(runs[-1].stream)[0])
    models = [
        {name: value for name, value in run.digests().items() if name.startswith("model.")}
        for run in runs
    ]
    assert models[0] == models[1]
    assert all(first != second for first, second in zip(*draws, strict=True))
    assert not torch.equal(*batches)


def test_a_stream_deals_every_sample_once_at_any_number_of_ranks() -> None:
    """Two ranks together take the samples of one, also when they take over half way."""
    single = SampleStream(batch_size=4)
    wanted = torch.cat([next(single)[0] for _ in range(4)])
    pair = [SampleStream(rank=rank, ranks=2, batch_size=4) for rank in range(2)]
    taken = [next(stream)[0] for stream in pair]
    alone = ReshardableStream(batch_size=4)
    alone.load_resharded_state([stream.state_dict() for stream in pair])
    taken += [next(alone)[0], next(alone)[0]]
    assert torch.equal(torch.cat(taken), wanted)


def _digest_sharded() -> dict[str, str]:
    run = make_run()
    fully_shard(run.model)
    return run.digests()


def test_a_sharded_model_has_the_digests_of_the_whole() -> None:
    """Sharding changes where the bits are, not what they are."""
    whole = make_run().digests()
    for digests in run_ranks(_digest_sharded, 2):
        models = {name: value for name, value in digests.items() if name.startswith("model.")}
        assert models.items() <= whole.items()
        assert len(models) == 4
