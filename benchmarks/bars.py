"""The limits that this project sets itself (the bars), and whether a run met them.

Owns each bar as a value: what is divided by what, and the largest ratio allowed. Promises pure
arithmetic on the samples of one run: ratios of medians, with the range of the same ratio by round.
Asserts nothing; what a run did not measure is reported as not measured. A peer that is used with
torch's state-dictionary getters is judged without the time of these getters.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import PROBES

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Over:
    """What our quantity is divided by: a method's quantity, the best of several, or a number."""

    text: str
    quantity: str = ""
    methods: Callable[[dict[str, Any]], Sequence[str]] | Sequence[str] = ()
    """Names, or a choice among what a report has; the smallest median counts."""
    number: Callable[[dict[str, Any], str], float] | None = None


@dataclasses.dataclass(frozen=True)
class Bar:
    """One line of the table of bars."""

    quantity: str
    state: str
    ours: str
    """The method whose quantity is held against the bar."""
    measured: str
    over: Over
    limit: float
    accelerator: bool | None = None
    """True: for states on an accelerator only; False: for states in host memory only."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a run says of a bar."""

    bar: Bar
    ratio: float | None = None
    """None: not measured."""
    low: float | None = None
    high: float | None = None
    over: str = ""
    """What it was divided by, the best peer by its name."""
    to_lowest: float | None = None
    """Our median over its lowest sample: what is left if the machine disturbed the other."""
    reason: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None: not measured."""
        return None if self.ratio is None else self.ratio <= self.bar.limit

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain JSON values."""
        return {
            "quantity": self.bar.quantity,
            "state": self.bar.state,
            "method": self.bar.ours,
            "over": self.over or self.bar.over.text,
            "limit": self.bar.limit,
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "to_lowest": self.to_lowest,
            "met": self.met,
            "reason": self.reason,
        }


def copying_peers(document: dict[str, Any]) -> list[str]:
    """Return the peers whose asynchronous save copies the state."""
    return _peers(document, lambda about: about["asynchronous"] and about["copies"])


def durable_peers(document: dict[str, Any]) -> list[str]:
    """Return the peers that are durable when their save is waited for."""
    return _peers(document, lambda about: "survives processes" not in about["durability"])


def _peers(document: dict[str, Any], wanted: Callable[[dict[str, Any]], bool]) -> list[str]:
    about = document["methods"]
    return [name for name, each in about.items() if not each["ours"] and wanted(each)]


def _probe(name: str, text: str) -> Over:
    return Over(text, name, (PROBES,))


def _state_bytes(document: dict[str, Any], state: str) -> float:
    return float(document["states"][state]["size_bytes"])


_MEMCPY_1 = _probe("memcpy_1", "memcpy, 1 thread")
_MEMCPY_2 = _probe("memcpy_2", "memcpy, 2 threads")
_COPYING = Over("best copying peer", "stall_bare", copying_peers)
_DURABLE = Over("best durable peer", "durable_bare", durable_peers)
_STATE = Over("state", number=_state_bytes)
_MIB_64 = Over("64 MiB", number=lambda *_: 64.0 * MIB)
_MS = Over("1 ms", number=lambda *_: 0.001)
_MS_5 = Over("5 ms", number=lambda *_: 0.005)
_PINNED = _probe("pinned_d2h", "pinned copy")


def _dcp_async(quantity: str) -> Over:
    return Over("dcp.async_save", quantity, ("dcp-async",))


def _dcp_load(quantity: str) -> Over:
    return Over("dcp.load", quantity, ("dcp-save",))


BARS = (
    Bar("stall, blocking", "1gib", "holdfast", "stall", _MEMCPY_2, 1.3, accelerator=False),
    Bar("stall, blocking", "1gib", "holdfast", "stall", _PINNED, 1 / 0.9, accelerator=True),
    Bar("stall, blocking", "1gib", "holdfast", "stall", _COPYING, 0.7),
    Bar("stall, overlapped", "1gib", "holdfast-overlapped", "returns", _MEMCPY_2, 0.2,
        accelerator=False),
    Bar("stall, overlapped", "1gib", "holdfast-overlapped", "returns", _MS_5, 1.0,
        accelerator=True),
    Bar("overlapped: the step's wait", "1gib", "holdfast-overlapped", "hook_wait", _MS, 1.0),
    Bar("time to durable", "1gib", "holdfast", "durable",
        _probe("write_direct", "O_DIRECT write"), 1.2),
    Bar("time to durable", "1gib", "holdfast", "durable", _DURABLE, 0.9),
    Bar("time to durable", "1gib", "holdfast", "durable", _dcp_async("durable_bare"), 0.55),
    Bar("stall, tiny tensors", "tiny", "holdfast", "stall", _dcp_async("stall_bare"), 0.2),
    Bar("durable, tiny tensors", "tiny", "holdfast", "durable", _dcp_async("durable_bare"), 1 / 40),
    Bar("load, cold", "1gib", "holdfast", "load_cold",
        _probe("read_direct_cold", "O_DIRECT cold read"), 1.15),
    Bar("load, cold", "1gib", "holdfast", "load_cold", _dcp_load("load_cold_bare"), 0.75),
    Bar("load, warm", "1gib", "holdfast", "load_warm", _MEMCPY_1, 1.4),
    Bar("load, warm", "1gib", "holdfast", "load_warm", _dcp_load("load_warm_bare"), 0.4),
    Bar("extra memory, async", "1gib", "holdfast", "memory", _STATE, 1.03),
    Bar("extra memory, sync", "1gib", "holdfast-sync", "memory", _MIB_64, 1.0),
    Bar("extra memory per rank", "ddp", "holdfast", "memory", _STATE, 0.55),
    Bar("CPU per save", "1gib", "holdfast", "cpu", _dcp_async("cpu"), 0.4),
    Bar("training lost per save", "1gib", "holdfast", "lost", _dcp_async("lost"), 0.4),
    Bar("local: stall", "local", "holdfast-local", "stall",
        Over("NVRx local", "stall_bare", ("nvrx-local",)), 0.35),
    Bar("local: completion", "local", "holdfast-local", "durable",
        Over("NVRx local", "durable_bare", ("nvrx-local",)), 0.1),
    Bar("local: stall, 2 copies", "local-fsdp2", "holdfast-local-2", "stall",
        Over("1 copy", "stall", ("holdfast-local",)), 1.1),
    Bar("local: own shard back", "local", "holdfast-local", "recovery_own",
        Over("memcpy, 1 thread", "raw_copy", ("holdfast-local",)), 1.3),
    Bar("local: own shard back", "local-fsdp2", "holdfast-local-2", "recovery_own",
        Over("memcpy, 1 thread per rank", "raw_copy", ("holdfast-local-2",)), 1.3),
    Bar("local: shard back from a peer", "local-fsdp2", "holdfast-local-2", "recovery_peer",
        Over("raw gloo transfer", "raw_transfer", ("holdfast-local-2",)), 1.3),
)  # fmt: skip
ELSEWHERE = "planning at 4,096 ranks: python benchmarks/planning.py; a GPU's bars: --device cuda"


def judge(document: dict[str, Any]) -> list[Verdict]:
    """Hold a report against every bar of a state that it measured."""
    accelerated = document["settings"]["device"] != "cpu"
    return [
        _judge(bar, document)
        for bar in BARS
        if bar.state in document["samples"] and bar.accelerator in (None, accelerated)
    ]


def _judge(bar: Bar, document: dict[str, Any]) -> Verdict:
    rows = document["samples"][bar.state]
    ours = rows.get(bar.ours, {}).get(bar.measured)
    if not ours:
        why = document["skipped"].get(bar.state, {}).get(bar.ours, "not measured")
        return Verdict(bar, reason=f"{bar.ours}: {why}")
    if bar.over.number is not None:
        number = bar.over.number(document, bar.state)
        ratios = [value / number for value in ours]
        return Verdict(bar, statistics.median(ratios), min(ratios), max(ratios), bar.over.text)
    chosen = bar.over.methods
    names = chosen(document) if callable(chosen) else chosen
    measured = {
        name: statistics.median(values)
        for name in names
        if (values := rows.get(name, {}).get(bar.over.quantity))
    }
    if not measured:
        return Verdict(bar, reason=f"{bar.over.text}: not measured")
    best = min(measured, key=lambda name: measured[name])
    text = bar.over.text if len(names) == 1 else f"{bar.over.text} ({best})"
    if measured[best] <= 0:
        return Verdict(bar, over=text, reason=f"{text}: nothing lost, no ratio")
    rounds = _round_ratios(bar, best, document)
    median, lowest = statistics.median(ours), min(rows[best][bar.over.quantity])
    to_lowest = median / lowest if lowest > 0 else None
    return Verdict(bar, median / measured[best], min(rounds), max(rounds), text, to_lowest)


def _round_ratios(bar: Bar, other: str, document: dict[str, Any]) -> list[float]:
    """Return the ratio of medians in each round that measured both."""

    def medians(method: str, quantity: str) -> dict[int, float]:
        return {
            each["round"]: statistics.median(values)
            for each in document["processes"]
            if (each["state"], each["method"]) == (bar.state, method)
            and (values := each.get("samples", {}).get(quantity))
        }

    ours, theirs = medians(bar.ours, bar.measured), medians(other, bar.over.quantity)
    return [
        ours[number] / theirs[number]
        for number in sorted(ours.keys() & theirs.keys())
        if theirs[number] > 0
    ] or [float("nan")]
