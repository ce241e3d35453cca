"""What the coordinator of a large job pays for planning, beside torch's own planner.

Owns one comparison on simulated ranks, nothing is written: the first plan of a run, where every
rank holds its own chunk (fsdp) or all hold the same (ddp), and the steady state, where ranks only
say that nothing changed. Each side runs in a fresh process, in turn, with the same state of the
garbage collector; encoding `.metadata` is counted apart on both. Unpickling and pickling torch's
plans is scaled from 16 of them. Prints medians and ratios; timings are never asserted.

    python benchmarks/planning.py --ranks 1024 --rounds 3
"""

from __future__ import annotations

import argparse
import gc
import json
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SAMPLED = 16
WIDTH = 96
STEADY_RANKS = 4096


def main() -> None:
    """Run both sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-gc", action="store_true", help="garbage collection off, on both")
    parser.add_argument("--json", type=Path, help="also write every sample here")
    parser.add_argument("--side", choices=[*SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=["fsdp", "ddp"], help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.side:
        import torch.distributed.checkpoint  # noqa: F401

        gc.collect()
        gc.freeze()  # a full collection of what torch imports would be multiplied by the scaling
        if parsed.no_gc:
            gc.disable()
        print(json.dumps(SIDES[parsed.side](parsed.mode, parsed.ranks, parsed.tensors)))
        return
    samples: dict[str, list[dict[str, float]]] = {}
    for number in range(parsed.rounds):
        for mode in ("fsdp", "ddp"):
            for side in ("dcp", "holdfast"):
                print(f"round {number + 1}/{parsed.rounds}: {side} {mode}", file=sys.stderr)
                samples.setdefault(f"{mode} {side}", []).append(_run(parsed, side, mode))
        samples.setdefault("steady", []).append(_run(parsed, "steady", "fsdp"))
    _print_table(samples, parsed)
    if parsed.json:
        parsed.json.write_text(json.dumps(samples, indent=1))


def _run(parsed: argparse.Namespace, side: str, mode: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--mode", mode]
    command += ["--ranks", str(parsed.ranks), "--tensors", str(parsed.tensors)]
    command += ["--no-gc"] if parsed.no_gc else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{side} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _shapes(mode: str, ranks: int, rank: int, tensors: int) -> list[tuple[str, Any, Any, Any]]:
    """Return name, size, offsets and lengths of what one rank holds."""
    state = []
    for number in range(tensors):
        name = f"model.layers.{number // 6}.block.{number % 6}.weight"
        columns = WIDTH + number % 7
        if mode == "ddp":
            state.append((name, (WIDTH, columns), (0, 0), (WIDTH, columns)))
        else:
            state.append((name, (4 * ranks, columns), (4 * rank, 0), (4, columns)))
    return state


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def _measure_dcp(mode: str, ranks: int, tensors: int) -> dict[str, float]:
    import torch
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
    )
    from torch.distributed.checkpoint.planner import (
        SavePlan,
        TensorWriteData,
        WriteItem,
        WriteItemType,
    )
    from torch.distributed.checkpoint.storage import WriteResult

    kind = WriteItemType.SHARD if mode == "fsdp" else WriteItemType.TENSOR

    def plan_of(rank: int) -> SavePlan:
        items, paths = [], {}
        for name, size, offsets, lengths in _shapes(mode, ranks, rank, tensors):
            paths[name] = tuple(name.split("."))
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths))
            written = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(size))
            items.append(WriteItem(MetadataIndex(name, chunk.offsets), kind, tensor_data=written))
        return SavePlan(items, planner_data=paths)

    pickled = [pickle.dumps(plan_of(rank)) for rank in range(min(SAMPLED, ranks))]
    scale = ranks / len(pickled)
    for _ in range(2):  # the first warms up; no plan is kept, a live heap would slow the collector
        unpickle = sum(_seconds(partial(pickle.loads, each))[0] for each in pickled)
    plans = [plan_of(rank) for rank in range(ranks)]
    planner = DefaultSavePlanner()
    decide, (planned, metadata) = _seconds(lambda: planner.create_global_plan(plans))
    chosen = planned[:: max(ranks // SAMPLED, 1)]
    reply, _ = _seconds(lambda: [pickle.dumps(each) for each in chosen])
    results = [
        [
            WriteResult(item.index, 4096, _StorageInfo(f"__{rank}_0.distcp", 4096 * at, 4096))
            for at, item in enumerate(plan.items)
        ]
        for rank, plan in enumerate(planned)
    ]

    def encode() -> bytes:  # as FileSystemWriter.finish does
        places: dict[Any, Any] = {}
        for each in results:
            places.update({result.index: result.storage_data for result in each})
        metadata.storage_data = places
        return pickle.dumps(metadata)

    encoding, content = _seconds(encode)
    return {
        "proposal_bytes": len(pickled[0]),
        "receive": unpickle * scale,
        "decide": decide,
        "reply": reply * ranks / len(chosen),
        "plan": unpickle * scale + decide + reply * ranks / len(chosen),
        "metadata": encoding,
        "metadata_bytes": len(content),
    }


def _items(mode: str, ranks: int, rank: int, tensors: int) -> list[Any]:
    import torch

    from holdfast.format.layout import Item

    return [
        Item(name, tuple(name.split(".")), torch.float32, size, offsets, lengths)
        for name, size, offsets, lengths in _shapes(mode, ranks, rank, tensors)
    ]


def _measure_holdfast(mode: str, ranks: int, tensors: int) -> dict[str, float]:
    from holdfast.format.dcp import encode_metadata
    from holdfast.format.items import propose
    from holdfast.format.plan import decide

    proposals = [propose(_items(mode, ranks, rank, tensors)) for rank in range(ranks)]
    own = _items(mode, ranks, 0, tensors)
    proposing, _ = _seconds(lambda: propose(own))
    pickled = [pickle.dumps(each) for each in proposals]
    receive, received = _seconds(lambda: [pickle.loads(each) for each in pickled])  # noqa: S301
    deciding, decision = _seconds(lambda: decide(received))
    reply, _ = _seconds(lambda: [pickle.dumps((each, decision.plan)) for each in decision.shares])
    encoding, content = _seconds(lambda: encode_metadata(decision))
    return {
        "propose_on_each_rank": proposing,
        "proposal_bytes": len(proposals[0]),
        "receive": receive,
        "decide": deciding,
        "reply": reply,
        "plan": receive + deciding + reply,
        "metadata": encoding,
        "metadata_bytes": len(content),
    }


def _measure_steady(mode: str, ranks: int, tensors: int) -> dict[str, float]:
    """A rank finds its structure and says so; the coordinator judges what all said."""
    from holdfast.format.items import pack_record, structure_of
    from holdfast.format.plan import judge

    own = _items(mode, STEADY_RANKS, 0, tensors)
    structure_of(own)
    hashing, structure = _seconds(lambda: structure_of(own))
    plan = b"p" * 16
    records = [pack_record(structure, plan) for _ in range(STEADY_RANKS)]
    judging, reason = _seconds(lambda: judge(records, [structure] * STEADY_RANKS))
    assert reason is None
    return {"record_bytes": len(records[0]), "structure_on_each_rank": hashing, "judge": judging}


SIDES = {"dcp": _measure_dcp, "holdfast": _measure_holdfast, "steady": _measure_steady}


def _print_table(samples: dict[str, list[dict[str, float]]], parsed: argparse.Namespace) -> None:
    def median(key: str, quantity: str) -> float:
        return statistics.median(run[quantity] for run in samples[key])

    state = "off" if parsed.no_gc else "on"
    print(f"{parsed.ranks} ranks x {parsed.tensors} tensors, garbage collection {state},")
    print(f"seconds of the coordinator, medians of {parsed.rounds}")
    print(f"{'':22}{'torch':>12}{'holdfast':>12}{'ratio':>8}")
    for mode in ("fsdp", "ddp"):
        for quantity in ("receive", "decide", "reply", "plan", "metadata"):
            theirs = median(f"{mode} dcp", quantity)
            ours = median(f"{mode} holdfast", quantity)
            print(f"{mode + ' ' + quantity:22}{theirs:12.3f}{ours:12.3f}{ours / theirs:8.3f}")
        for quantity in ("proposal_bytes", "metadata_bytes"):
            theirs = median(f"{mode} dcp", quantity)
            ours = median(f"{mode} holdfast", quantity)
            print(f"{mode + ' ' + quantity:22}{theirs:12.0f}{ours:12.0f}{ours / theirs:8.3f}")
        proposing = median(f"{mode} holdfast", "propose_on_each_rank")
        print(f"{mode} propose, each rank {proposing * 1e3:25.2f} ms")
    print(f"steady state, {STEADY_RANKS} ranks x {parsed.tensors} tensors:")
    print(f"  judge {median('steady', 'judge') * 1e3:.2f} ms on the coordinator")
    print(f"  structure {median('steady', 'structure_on_each_rank') * 1e3:.2f} ms on each rank")
    print(f"  record {median('steady', 'record_bytes'):.0f} bytes")


if __name__ == "__main__":
    main()
