"""The report of a run as text for a terminal.

Owns medians and ranges and the tables that show them: per state the limits of the machine, the
saves, the loads, and what was skipped; at the end the bars. Promises that each quantity of ours and
of each peer stands beside its physical limit, and that a mismatch is never overlooked.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.bars import ELSEWHERE, judge
from benchmarks.harness import PROBES
from benchmarks.probes import LABELS


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A column of the tables and a panel of the charts."""

    name: str
    label: str
    unit: str
    limit: str | None
    """The probe whose median is its physical limit; `state` for the bytes of the state."""


QUANTITIES = (
    Quantity("stall", "training waits", "ms", "memcpy_2"),
    Quantity("durable", "durable after", "ms", "write_direct"),
    Quantity("cpu", "CPU per save", "ms", None),
    Quantity("memory", "extra memory", "MiB", "state"),
    Quantity("lost", "training lost", "ms", None),
    Quantity("load_cold", "load, cold", "ms", "read_direct_cold"),
    Quantity("load_warm", "load, warm", "ms", "memcpy_1"),
    Quantity("first_stall", "first stall", "ms", None),
    Quantity("first_durable", "first durable", "ms", None),
    Quantity("first_load", "first load", "ms", None),
    Quantity("raw_copy", "memcpy, 1 thread a rank", "ms", None),
    Quantity("raw_read", "read from RAM, digested", "ms", None),
    Quantity("recovery_own", "own shard back", "ms", None),
    Quantity("raw_transfer", "raw gloo transfer", "ms", None),
    Quantity("busy_transfer", "beside a read, digested", "ms", None),
    Quantity("recovery_peer", "back from a peer", "ms", None),
    Quantity("recovered_peer", "both copies back", "ms", None),
    Quantity("first_recovery_own", "first: own shard back", "ms", None),
    Quantity("first_recovery_peer", "first: back from a peer", "ms", None),
)
_SAVING = ("stall", "durable", "cpu", "memory", "lost")
_LOADING = ("load_cold", "load_warm", "first_stall", "first_durable", "first_load")
RECOVERING = (
    "raw_copy", "raw_read", "recovery_own",
    "raw_transfer", "busy_transfer", "recovery_peer", "recovered_peer",
)  # fmt: skip
RESTARTING = ("first_recovery_own", "first_recovery_peer")
"""As `RECOVERING`, of the local tier alone."""
_SCALES = {"ms": 1e3, "MiB": 2.0**-20}
_LABEL_WIDTH = 27
_CELL_WIDTH = 28


@dataclasses.dataclass(frozen=True)
class Summary:
    """A median with the range over all samples of all processes."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise one or more samples."""
        return cls(statistics.median(values), min(values), max(values), len(values))


def summary(document: dict[str, Any], state: str, method: str, quantity: str) -> Summary | None:
    """Return a quantity of a method; None: it was not measured."""
    values = document["samples"].get(state, {}).get(method, {}).get(quantity)
    return Summary.of(values) if values else None


def limit_of(document: dict[str, Any], state: str, quantity: Quantity) -> float | None:
    """Return the physical limit of a quantity in seconds or bytes; None: it has none."""
    if quantity.limit is None:
        return None
    if quantity.limit == "state":
        about = document["states"][state]
        return float(about["size_bytes"])
    probe = summary(document, state, PROBES, quantity.limit)
    return probe.median if probe else None


def number(value: float) -> str:
    """Return a value with three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, min(digits, 4))}f}"


def render(document: dict[str, Any]) -> str:
    """Return the whole report as text."""
    parts = [_machine(document)]
    # Interrupted before its first round, a state has no samples.
    parts += [_state(document, each) for each in document["states"] if each in document["samples"]]
    parts += [_bars(document), *_mismatches(document)]
    return "\n\n".join(parts)


def _machine(document: dict[str, Any]) -> str:
    about, settings = document["machine"], document["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    wait = settings["OMP_WAIT_POLICY"]
    where = (
        f"{about['date']}: {about['processor']}, {about['usable_cores']} cores, "
        f"{about['memory_gib']} GiB, Linux {about['kernel']}, {about['file_systems']['disk']}"
    )
    how = (
        f"fresh processes in turn, {settings['saves']} timed saves each; "
        f"OMP_WAIT_POLICY {'unset' if wait == 'default' else wait} for every method; "
        f"load average before {document['load_average_before']:.2f}"
    )
    lines = [
        where,
        f"holdfast {about['holdfast']}, Python {about['python']}, {versions}",
        how,
        "median (lowest..highest) over all samples; x: over the physical limit above its column",
    ]
    if settings["quick"]:
        lines.append("QUICK: small states; these figures say that it runs, and nothing else")
    return "\n".join(lines)


def _state(document: dict[str, Any], state: str) -> str:
    about = document["states"][state]
    rounds = "1 round" if about["rounds"] == 1 else f"{about['rounds']} rounds"
    size = f"{about['size_bytes'] / 2**20:,.1f} MiB"
    lines = [f"== {state}: {about['label']}; {size} measured in {rounds} =="]
    for name, label in LABELS.items():
        if probe := summary(document, state, PROBES, name):
            rate = about["size_bytes"] / probe.median / 2**30
            lines.append(f"  {label:<38} {_span(probe, 1e3):>24} ms  {rate:6.2f} GiB/s")
    lines += ["", *_table(document, state, _SAVING), "", *_table(document, state, _LOADING)]
    if any(RECOVERING[0] in row for row in document["samples"][state].values()):
        for names in (RECOVERING, RESTARTING):
            lines += ["", *_table(document, state, names)]
    lines += _remarks(document, state)
    return "\n".join(lines)


def _table(document: dict[str, Any], state: str, names: Sequence[str]) -> list[str]:
    chosen = [each for each in QUANTITIES if each.name in names]
    head = [f"{f'{each.label}, {each.unit}':>{_CELL_WIDTH}}" for each in chosen]
    limits = [limit_of(document, state, each) for each in chosen]
    on_top = [
        "" if limit is None else f"limit {number(limit * _SCALES[each.unit])}      "
        for each, limit in zip(chosen, limits, strict=True)
    ]
    lines = [" " * _LABEL_WIDTH + "".join(head)]
    if any(on_top):
        lines.append(" " * _LABEL_WIDTH + "".join(f"{each:>{_CELL_WIDTH}}" for each in on_top))
    for method in document["samples"].get(state, {}):
        if method == PROBES:
            continue
        cells = []
        for each, limit in zip(chosen, limits, strict=True):
            found = summary(document, state, method, each.name)
            cells.append(_cell(found, _SCALES[each.unit], limit))
        label = document["methods"][method]["label"]
        lines.append(f"{label:<{_LABEL_WIDTH}}" + "".join(f"{c:>{_CELL_WIDTH}}" for c in cells))
    return lines


def _cell(found: Summary | None, scale: float, limit: float | None) -> str:
    if found is None:
        return "-      "
    ratio = "" if limit is None else f"{number(found.median / limit)}x" if limit > 0 else ""
    return f"{_span(found, scale)} {ratio:>6}"


def _span(found: Summary, scale: float) -> str:
    low, high = number(found.low * scale), number(found.high * scale)
    return number(found.median * scale) + (f" ({low}..{high})" if found.count > 1 else "")


def _remarks(document: dict[str, Any], state: str) -> list[str]:
    """Say of each method what makes its row not quite the same as the others."""
    lines = [""]
    for method in document["samples"].get(state, {}):
        if method == PROBES:
            facts = document["facts"].get(state, {}).get(method, {})
            lines += [f"  {each}" for each in facts.get("notes", ())]
            lines.append(f"  cold: {facts.get('cold', 'unknown')}")
            continue
        about = document["methods"][method]
        facts = document["facts"].get(state, {}).get(method, {})
        remarks = [about["durability"]]
        stall = summary(document, state, method, "stall")
        bare = summary(document, state, method, "stall_bare")
        if stall and bare and bare.median < 0.98 * stall.median:
            remarks.append(f"{number((stall.median - bare.median) * 1e3)} ms of the stall are "
                           "the state dictionary")  # fmt: skip
        if wait := summary(document, state, method, "hook_wait"):
            returns = summary(document, state, method, "returns")
            assert returns is not None
            remarks.append(f"save returns after {_span(returns, 1e3)} ms; a step that comes later "
                           f"than the copy takes then waits {_span(wait, 1e3)} ms")  # fmt: skip
        if facts.get("in_place") is False:
            remarks.append("load replaces tensors")
        if about["note"]:
            remarks.append(about["note"])
        lines.append(f"  {about['label']}: {'; '.join(remarks)}")
    for method, reason in document["skipped"].get(state, {}).items():
        lines.append(f"  {method} is left out: {_first_line(reason)}")
    return lines


def _bars(document: dict[str, Any]) -> str:
    lines = [
        "== bars: our median over the other's (round by round), then over its lowest sample =="
    ]
    for verdict in judge(document):
        bar = verdict.bar
        line = f"{bar.state:<6} {bar.quantity:<28} {verdict.over or bar.over.text:<37}"
        line += f"{f'<= {bar.limit:.3g}':>9} "
        if verdict.ratio is None:
            lines.append(f"{line}  unmeasured: {_first_line(verdict.reason)}")
            continue
        lowest = "" if verdict.to_lowest is None else f"{verdict.to_lowest:.3g}"
        line += f"{verdict.ratio:8.3g} {f'({verdict.low:.3g}..{verdict.high:.3g})':<18}"
        lines.append(f"{line} {lowest:>7}  {'met' if verdict.met else 'NOT MET'}")
    lines.append(ELSEWHERE)
    return "\n".join(lines)


def _mismatches(document: dict[str, Any]) -> list[str]:
    if not document["mismatches"]:
        return ["every load gave back what was saved, bit for bit"]
    lines = ["!" * 78, "LOADED WHAT WAS NOT SAVED:"]
    lines += [
        f"  {each['state']} {each['method']}: {each['what']}" for each in document["mismatches"]
    ]
    return ["\n".join([*lines, "!" * 78])]


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return line if len(line) <= 160 else line[:157] + "..."
