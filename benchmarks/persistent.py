"""How long a save keeps training, how long until it is durable, and how long a load takes.

Owns one comparison of the persistent tier with torch's own ways, each method in a fresh process,
the methods taking turns, beside physical probes of the same size in the same round. Prints medians
with their range and ratios; writes JSON where asked. Timings are never asserted: machines differ.

    python benchmarks/persistent.py --mib 256 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAVES = 3
"""Saves per process; the first warms up and is not counted."""


def main() -> None:
    """Run every method in turn and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="bytes of model and optimizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write; a temporary folder")
    parser.add_argument("--json", type=Path, help="also write every sample here")
    parser.add_argument("--method", choices=[*METHODS], help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.method:
        print(json.dumps(_measure(parsed.method, parsed.mib, parsed.directory)))
        return
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for number in range(parsed.rounds):
        for name in METHODS:
            print(f"round {number + 1}/{parsed.rounds}: {name}", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=parsed.directory) as folder:
                samples[name].append(_in_a_process(name, parsed.mib, Path(folder)))
    _print_table(samples, parsed.mib)
    if parsed.json:
        parsed.json.write_text(json.dumps(samples, indent=1))


def _in_a_process(name: str, mib: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--method", name, "--mib", str(mib)]
    done = subprocess.run(
        [*command, "--directory", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(name: str, mib: int, folder: Path) -> dict[str, float]:
    """Return the median seconds of each quantity in this process."""
    runs = METHODS[name](mib, folder)
    keys = runs[0].keys()
    return {key: statistics.median(run[key] for run in runs[1:] or runs) for key in keys}


def _build(mib: int) -> tuple[Any, Any]:
    """Make a model and an AdamW with state, of so many MiB together, in about 600 tensors."""
    import torch

    torch.manual_seed(0)
    width = max(int((mib * 2**20 / 4 / 3 / 200) ** 0.5), 8)
    model = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(200))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _probe(mib: int, folder: Path) -> list[dict[str, float]]:
    """Copy memory into memory, and write a file past the page cache, synced."""
    import torch

    source = torch.randn(mib * 2**18)
    target = torch.zeros_like(source)
    torch.set_num_threads(1)
    block = mmap.mmap(-1, 8 << 20)
    block.write(os.urandom(1 << 20) * 8)

    def write(path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0)
        descriptor = os.open(path, flags, 0o600)
        for _ in range(0, mib, 8):
            os.write(descriptor, block)
        os.fsync(descriptor)
        os.close(descriptor)

    return [
        {
            "stall": _seconds(lambda: target.copy_(source)),
            "durable": _seconds(lambda number=number: write(folder / str(number))),
            "load": _seconds(lambda: target.copy_(source)),
        }
        for number in range(SAVES)
    ]


def _holdfast(mib: int, folder: Path) -> list[dict[str, float]]:
    import holdfast

    model, optimizer = _build(mib)
    settings = {"persistent": {"directory": str(folder / "store")}}
    manager = holdfast.DefaultCheckpointManager(holdfast.CheckpointConfig.from_mapping(settings))
    state = holdfast.GlobalState()
    runs = []
    for step in range(1, SAVES + 1):
        state.train_state.step = step
        began = time.perf_counter()
        manager.save(holdfast.CheckpointSaveContext(state, model, optimizer, None))
        stall = time.perf_counter() - began
        manager.finalize_async_saves(state, blocking=True)
        durable = time.perf_counter() - began
        loading = holdfast.CheckpointLoadContext(holdfast.GlobalState(), model, optimizer, None)
        runs.append(
            {"stall": stall, "durable": durable, "load": _seconds(lambda: manager.load(loading))}  # noqa: B023
        )
    return runs


def _torch_save(mib: int, folder: Path) -> list[dict[str, float]]:
    import torch

    model, optimizer = _build(mib)
    runs = []
    for number in range(SAVES):
        path = folder / f"{number}.pt"

        def save() -> None:
            with path.open("wb") as stream:  # noqa: B023
                torch.save({"model": model.state_dict(), "opt": optimizer.state_dict()}, stream)
                stream.flush()
                os.fsync(stream.fileno())

        def load() -> None:
            loaded = torch.load(path, weights_only=True)  # noqa: B023
            model.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["opt"])

        durable = _seconds(save)
        runs.append({"stall": durable, "durable": durable, "load": _seconds(load)})
    return runs


def _dcp(mib: int, folder: Path, *, asynchronous: bool) -> list[dict[str, float]]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = _build(mib)
    stager = DefaultStager(StagingOptions(False, False, False, False))
    runs = []
    for number in range(SAVES):
        path = folder / str(number)
        began = time.perf_counter()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        if asynchronous:
            future: Any = dcp.async_save(
                state, storage_writer=FileSystemWriter(path), async_stager=stager
            )
            stall = time.perf_counter() - began
            future.result()
        else:
            dcp.save(state, storage_writer=FileSystemWriter(path, thread_count=2))
            stall = time.perf_counter() - began
        durable = time.perf_counter() - began

        def load() -> None:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=path)  # noqa: B023
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )

        runs.append({"stall": stall, "durable": durable, "load": _seconds(load)})
    return runs


def _print_table(samples: dict[str, list[dict[str, float]]], mib: int) -> None:
    print(f"{mib} MiB of state; median seconds (range) over {len(samples['probe'])} processes")
    print(
        "memory to memory, written past the cache: the limits of this machine, in the same rounds"
    )
    ours = {key: statistics.median(each[key] for each in samples["holdfast"]) for key in QUANTITIES}
    print(f"{'':<22}" + "".join(f"{label:>32}" for label in QUANTITIES.values()))
    for name, runs in samples.items():
        cells = []
        for key in QUANTITIES:
            values = [run[key] for run in runs]
            middle = statistics.median(values)
            ratio = f" {ours[key] / middle:5.2f}x" if name != "holdfast" else "       "
            cells.append(f"{middle:.3f} ({min(values):.3f}-{max(values):.3f}){ratio}")
        print(f"{name:<22}" + "".join(f"{cell:>32}" for cell in cells))
    print("the ratio behind a method is holdfast's median over its: below 1 holdfast is faster")


QUANTITIES = {"stall": "training waits", "durable": "durable after", "load": "load, warm"}
METHODS: dict[str, Callable[[int, Path], list[dict[str, float]]]] = {
    "probe": _probe,
    "holdfast": _holdfast,
    "torch.save": _torch_save,
    "dcp.save": lambda mib, folder: _dcp(mib, folder, asynchronous=False),
    "dcp.async_save": lambda mib, folder: _dcp(mib, folder, asynchronous=True),
}

if __name__ == "__main__":
    main()
