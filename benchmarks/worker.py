"""What one fresh process measures: one method, on one state, as one rank.

Owns the order inside a process: build, first save apart, timed saves, one save with the memory
watched, loads cold and warm, and for asynchronous methods the training time lost. Promises that
every load is compared bit for bit with what was saved, that all ranks begin each measurement
together, and that a failure is written where the harness reads it. The time of a recovery is that
of the slowest rank, beside the least that the same ranks need for the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import probes
from benchmarks.shapes import RECIPES, whole_bytes


@dataclass(frozen=True)
class Order:
    """What a worker is to measure."""

    method: str
    state: str
    folder: str
    """An empty folder that all ranks of this measurement share."""
    quick: bool = False
    saves: int = 3
    loads: int = 2
    lost: int = 1
    """Saves under training."""
    device: str = "cpu"

    def to_json(self) -> str:
        """Return the order as a command-line argument."""
        return json.dumps(asdict(self))


class Worker:
    """The measurements of one method in this process."""

    def __init__(self, order: Order) -> None:
        from benchmarks.registry import METHODS

        self._order = order
        self._method = METHODS[order.method]()
        self._samples: dict[str, list[float]] = {}
        self._mismatches: list[str] = []
        self._facts: dict[str, Any] = {}
        self._steps = 0
        self._older: Path | None = None

    def run(self) -> dict[str, Any]:
        """Measure everything and return what the harness merges."""
        reason = self._method.unavailable()
        if reason is None and _ranks() > 1 and not self._method.many_ranks:
            reason = "saves the state of one rank only"
        if reason is not None:
            return {"skipped": " ".join(reason.split())}
        with _process_group(_ranks() > 1 or self._method.needs_group):
            self._measure()
        return {
            "samples": self._samples,
            "facts": self._facts,
            "mismatches": self._mismatches,
        }

    def _measure(self) -> None:
        from benchmarks import meters, states

        order, method = self._order, self._method
        recipe = RECIPES[order.state]
        self._state = states.build(recipe, quick=order.quick, device=order.device)
        self._training = meters.Training(self._state, order.device)
        size_bytes, count = self._state.size_bytes(), self._state.count()
        self._facts |= {"size_bytes": size_bytes, "tensors": count}
        folder = Path(order.folder) if recipe.in_memory else None
        baseline = meters.settled_memory_bytes(folder)
        self._add("prepare", _seconds(lambda: method.prepare(self._state, Path(order.folder))))
        with meters.Peak(folder).watch() as peak:
            first = self._save()
        for name in ("stall", "durable"):
            self._add(f"first_{name}", first[name])
        self._add("first_memory", peak.size_bytes - baseline)
        for _ in range(order.saves):
            for name, value in self._save(with_cpu=True).items():
                self._add(name, value)
        with meters.Peak(folder).watch() as peak:
            self._save()
        self._add("memory", max(0, peak.size_bytes - baseline))
        self._measure_loads()
        for loss in method.losses:
            self._measure_recovery(loss)
        if method.overlapped:
            self._measure_the_wait()
        if method.asynchronous:
            for _ in range(order.lost):
                self._measure_lost_training()
        method.close()

    def _save(self, *, with_cpu: bool = False) -> dict[str, float]:
        """Save once, the state changed before, and return the seconds of each quantity."""
        from benchmarks import meters

        self._state.change()
        self._saved = self._state.fingerprint()
        self._steps += 1
        method = self._method
        method.aside.take()
        self._barrier()
        cpu = meters.cpu_seconds() if with_cpu else 0.0
        began = time.perf_counter()
        method.save(self._steps)
        returned = time.perf_counter() - began
        method.settle()
        self._synchronise()
        stall = time.perf_counter() - began
        beside = method.aside.take()
        method.wait()
        durable = time.perf_counter() - began
        quantities = {
            "returns": returned,
            "stall": stall,
            "stall_bare": stall - beside,
            "durable": durable,
            "durable_bare": durable - beside,
        }
        if with_cpu:
            quantities["cpu"] = meters.cpu_seconds() - cpu
        self._forget_older()
        return quantities

    def _forget_older(self) -> None:
        """Remove the save before this one, as retention does, outside of any measurement."""
        # Were all kept, each buffered write would use fresh memory, which costs a virtual
        # machine dear: that would be held against the methods that write through the page cache.
        newest = self._method.newest()
        if self._older and self._older != newest and int(os.environ.get("RANK", "0")) == 0:
            if self._older.is_dir():
                shutil.rmtree(self._older)
            else:
                self._older.unlink(missing_ok=True)
        self._older = newest

    def _measure_loads(self) -> None:
        self._load("cold")  # imports, and whatever else a first load of a process pays
        self._samples["first_load"] = self._samples.pop("load_cold")
        self._samples.pop("load_cold_bare")
        for _ in range(self._order.loads):
            self._load("cold")
        for _ in range(self._order.loads):
            self._load("warm")

    def _load(self, temperature: str) -> None:
        method = self._method
        newest = method.newest()
        if temperature == "cold":
            self._facts["cold"] = probes.drop_caches(newest)
        else:
            probes.warm_up(newest)
        self._state.spoil()
        addresses = self._state.addresses()
        method.aside.take()
        self._barrier()
        seconds = _seconds(self._with_device(method.load))
        self._add(f"load_{temperature}", seconds)
        self._add(f"load_{temperature}_bare", seconds - method.aside.take())
        self._facts["in_place"] = self._state.addresses() == addresses
        self._compare(f"{temperature} load")

    def _measure_recovery(self, loss: str) -> None:
        """Lose something and load; each time after the limits were measured on these ranks."""
        method = self._method
        size_bytes, folder = self._state.size_bytes(), Path(self._order.folder)
        measures = {
            name: make(size_bytes, folder) for name, make in probes.LIMITS_OF_RECOVERY[loss].items()
        }
        for measure in measures.values():
            measure(self._barrier)
        method.restart()
        for number in range(1 + self._order.loads):
            self._barrier()
            method.lose(loss)
            self._state.spoil()
            limits = {name: measure(self._barrier) for name, measure in measures.items()}
            self._barrier()
            began = time.perf_counter()
            self._with_device(method.load)()
            seconds = time.perf_counter() - began
            method.recover()
            whole = time.perf_counter() - began
            self._compare(f"{loss} recovery")
            if number == 0:  # with all that a job sets up once after its start
                self._add(f"first_recovery_{loss}", seconds)
                continue
            for name, limit in limits.items():
                self._add(name, limit)
            self._add(f"recovery_{loss}", seconds)
            self._add(f"recovered_{loss}", whole)

    def _measure_the_wait(self) -> None:
        """Compute for longer than the copy takes, then see how long an optimizer step waits."""
        copy = statistics.median(self._samples["stall"])
        self._state.change()
        self._barrier()
        self._steps += 1
        self._method.save(self._steps)
        self._training.compute_for(0.05 + 4 * copy)
        self._add("hook_wait", _seconds(self._with_device(self._method.settle)))
        self._method.wait()

    def _measure_lost_training(self) -> None:
        """Train on beside a save; what the same steps take longer than alone is lost."""
        training, method = self._training, self._method
        seconds = 0.3 if self._order.quick else 1.0
        steps = training.steps_in(max(seconds, 1.3 * statistics.median(self._samples["durable"])))
        steps = _largest(steps)
        alone = -(-steps // 2)
        self._barrier()
        before = training.seconds_of(alone)
        self._saved = self._state.fingerprint()
        self._steps += 1
        self._barrier()
        began = time.perf_counter()
        method.save(self._steps)
        done, taken = False, 0
        while not done or taken < steps:
            training.compute()
            method.settle()
            self._state.change()
            taken += 1
            done = method.is_done()
        wall = time.perf_counter() - began
        method.wait()
        for _ in range(_largest(taken) - taken):
            self._state.change()  # replicas stay replicas
        self._barrier()
        after = training.seconds_of(alone)
        self._add("lost", wall - taken * (before + after) / (2 * alone))
        self._state.spoil()
        method.load()
        self._compare("save under training")

    def _compare(self, what: str) -> None:
        from benchmarks.states import differences

        wrong = differences(self._saved, self._state.fingerprint())
        if wrong:
            shown = ", ".join(wrong[:3])
            self._mismatches.append(f"{what}: {len(wrong)} tensors differ: {shown}")

    def _add(self, name: str, value: float) -> None:
        self._samples.setdefault(name, []).append(value)

    def _with_device(self, work: Callable[[], None]) -> Callable[[], None]:
        def synchronised() -> None:
            work()
            self._synchronise()

        return synchronised

    def _synchronise(self) -> None:
        if self._order.device != "cpu":
            import torch

            torch.accelerator.synchronize()

    def _barrier(self) -> None:
        """Let disk and accelerator come to rest, and all ranks begin together."""
        os.sync()
        self._synchronise()
        if _ranks() > 1:
            import torch

            torch.distributed.barrier()


class _process_group:  # noqa: N801  # used as a function
    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted

    def __enter__(self) -> None:
        if self._wanted:
            import torch

            torch.distributed.init_process_group("gloo")

    def __exit__(self, kind: object, *_: object) -> None:
        if self._wanted and kind is None:
            import torch

            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def _largest(value: int) -> int:
    """Return the largest of the ranks' values."""
    if _ranks() == 1:
        return value
    import torch

    largest = torch.tensor([value])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest.item())


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _measure_probes(order: Order) -> dict[str, Any]:
    size_bytes = whole_bytes(RECIPES[order.state], quick=order.quick)
    repeats = max(order.saves, 3)
    return probes.measure(size_bytes, Path(order.folder), repeats, order.device)


def main() -> None:
    """Carry out the order in the arguments and write the result beside the folder."""
    order = Order(**json.loads(sys.argv[1]))
    result_path = Path(sys.argv[2])
    # NVRx brings pynvml, of which torch warns at every import; nothing to fix here.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        result = _measure_probes(order) if order.method == "probes" else Worker(order).run()
    except BaseException as error:  # noqa: BLE001  # reported, whatever it is
        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {error}"}
    result_path.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    if "failed" in result:
        os._exit(1)  # another rank may wait for this one, and a peer's process for ever


if __name__ == "__main__":
    main()
