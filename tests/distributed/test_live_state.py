"""What saving leaves alone: the live state of every rank, and the trainer's process groups."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import distributed

from tests.distributed.training import Run, exact, seed_rank
from tests.support.ranks import run_ranks

# -- a save changes nothing ----------------------------------------------------------------------


def _bits_of(run: Run) -> dict[str, Any]:
    """Everything a step could depend on, read without touching it; generators last."""
    gradients = {
        name: None if each.grad is None else exact(each.grad)
        for name, each in run.model.named_parameters()
    }
    return {
        **run.tensors(),
        "gradients": gradients,
        "identities": [id(each) for each in run.model.parameters()],
        "moments": len(run.optimizer.state),
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in run.optimizer.param_groups
        ],
        "scheduler": run.scheduler.state_dict(),
        "data": run.data.state_dict(),
        "counters": run.state.train_state.to_dict(),
        "generators": _generators(),
    }


def _generators() -> tuple[Any, ...]:
    legacy: Any = np.random.get_state()
    return random.getstate(), legacy[1].tolist(), legacy[2:], torch.get_rng_state().tolist()


def _save_at_step_zero(root: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return each case's bits before and after its save; then its fate against a run without."""
    found = []
    for parallel in ("ddp", "fsdp"):
        for has_gradients in (False, True):
            for asynchronous in (False, True):
                case = f"{parallel} {has_gradients} {asynchronous}"
                run = Run(parallel, root / case.replace(" ", "-"), async_save=asynchronous)
                other = Run(parallel)
                for each in (other, run):  # `run` last: the generators are its own
                    _seed_alike(each)
                    if has_gradients:
                        inputs, _ = next(each.data)
                        each.model(inputs).sum().backward()
                before = _bits_of(run)
                run.save()
                run.finalize(blocking=True)
                found.append((case, before, _bits_of(run)))
                for each in (run, other):
                    _seed_alike(each)
                    each.train(2)
                found.append((f"{case}, two steps on", other.facts(), _facts_of(run)))
    return found


def _seed_alike(run: Run) -> None:
    seed_rank(40 + run.rank)


def _facts_of(run: Run) -> dict[str, Any]:
    _seed_alike(run)
    return run.facts()


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


def test_a_save_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    """Parameters, gradients, optimizer, scheduler, data and generators of every rank stay.

    With and without gradients: torch's own getter would step the optimizer, or find nothing.
    """
    for rank, found in enumerate(run_ranks(_save_at_step_zero, 2, tmp_path)):
        for case, before, after in found:
            if "two steps" in case:
                before, after = {**before, "draws": None}, {**after, "draws": None}
            assert not _differences(before, after), f"rank {rank}, {case}"
        assert [before["moments"] for case, before, _ in found if "steps" not in case] == [0] * 8


def _load_step_zero(root: Path) -> list[tuple[int, int, dict[str, Any], list[str]]]:
    found = []
    for parallel in ("ddp", "fsdp"):
        for has_gradients in (False, True):
            run = Run(parallel, root / f"{parallel}-{has_gradients}-False", seed=9)
            iteration, _ = run.load()
            moments = len(run.optimizer.state)
            tensors = run.tensors()
            run.train(2)
            found.append((iteration, moments, tensors, run.losses))
    return found


def test_a_checkpoint_of_step_zero_loads_as_such(tmp_path: Path) -> None:
    """It gives parameters and an optimizer without state; training goes on from it."""
    saved = run_ranks(_save_at_step_zero, 2, tmp_path)
    for rank, found in enumerate(run_ranks(_load_step_zero, 2, tmp_path)):
        befores = [before for case, before, _ in saved[rank] if "steps" not in case][::2]
        for (iteration, moments, tensors, losses), before in zip(found, befores, strict=True):
            assert (iteration, moments) == (0, 0)
            assert tensors["model"] == before["model"]
            assert len(losses) == 2


# -- no collective -------------------------------------------------------------------------------


class _CountingStore:
    """The rendezvous store, counting what is asked of it, by thread."""

    calls: ClassVar[Counter[str]] = Counter()

    def __init__(self, store: Any) -> None:
        self._store = store

    def clone(self) -> _CountingStore:
        return _CountingStore(self._store.clone())

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def count(*arguments: Any) -> Any:
            self.calls[threading.current_thread().name] += 1
            return method(*arguments)

        return count


def _collectives() -> int:
    """How many collectives this rank has begun on the trainer's group, as the group counts them."""
    group: Any = distributed.group.WORLD
    return int(group._get_backend(torch.device("cpu"))._get_sequence_number_for_group())


def _count_collectives(root: Path) -> dict[str, Any]:
    places: Any = distributed.distributed_c10d._world.pg_map
    backend, store = places[distributed.group.WORLD]
    places[distributed.group.WORLD] = (backend, _CountingStore(store))

    found: dict[str, Any] = {}
    before = _collectives()
    distributed.all_reduce(torch.zeros(1))
    distributed.barrier()
    distributed.all_gather([torch.zeros(1), torch.zeros(1)], torch.zeros(1))
    found["the meter"] = _collectives() - before

    for parallel in ("ddp", "fsdp"):
        plain = Run(parallel)
        plain.train(1)  # DDP settles its buckets in the first step
        before = _collectives()
        plain.train(4)
        plain_steps = _collectives() - before
        found[f"{parallel}: the meter in training"] = plain_steps
        for asynchronous in (False, True):
            run = Run(parallel, root / f"{parallel}-{asynchronous}", async_save=asynchronous)
            run.save()  # channels are opened by the first one; with no moments yet
            run.finalize(blocking=True)
            run.train(1)
            case = f"{parallel} {asynchronous}"
            before = _collectives()
            run.save()
            run.finalize()
            run.finalize(blocking=True)
            found[f"{case}: save and finalize"] = _collectives() - before

            before, _CountingStore.calls = _collectives(), Counter()
            run.train(4)
            found[f"{case}: steps without a save"] = _collectives() - before - plain_steps
            found[f"{case}: store calls of these"] = sum(_CountingStore.calls.values())

            before = _collectives()
            other = Run(parallel, root / f"{parallel}-{asynchronous}", seed=4)
            built = _collectives()
            other.load()
            found[f"{case}: load"] = _collectives() - built
            found[f"{case}: store calls of load"] = sum(_CountingStore.calls.values()) > 0
            _CountingStore.calls = Counter()
            other.save()
            other.finalize(blocking=True)
            found[f"{case}: threads"] = set(_CountingStore.calls)
    return found


def test_the_trainers_groups_are_left_alone(tmp_path: Path) -> None:
    """Save, finalize and load begin no collective; a step without a save asks the store nothing.

    Counted by the group itself, whatever thread or layer would have begun one, and by a store that
    counts its calls; both meters are seen to move.
    """
    for found in run_ranks(_count_collectives, 2, tmp_path):
        assert found.pop("the meter") == 3
        for name, count in found.items():
            if name.endswith("threads"):
                assert count == {"holdfast-call", "holdfast-writer"}
            elif name.endswith("in training"):
                assert count > 0, f"{name} does not move"
            elif name.endswith("of load"):
                assert count, f"{name}: the store's meter does not move"
            else:
                assert count == 0, name


def _change_after_save(root: Path) -> list[dict[str, Any]]:
    run = Run("fsdp", root)
    run.train(2)
    expected = run.tensors()
    run.save()
    with torch.no_grad():  # as soon as `save` returns, training may change every tensor
        for parameter in run.model.parameters():
            parameter.fill_(-1)
            for value in run.optimizer.state[parameter].values():
                value.fill_(-1)
    run.finalize(blocking=True)
    other = Run("fsdp", root, seed=4)
    other.load()
    return [expected, other.tensors()]


def test_what_changes_after_an_async_save_returns_is_not_in_it(tmp_path: Path) -> None:
    """Every rank's shards hold the values of the step that was saved."""
    for expected, found in run_ranks(_change_after_save, 2, tmp_path):
        assert found == expected
