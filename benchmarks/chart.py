"""One PNG per state: every quantity of every method beside the physical limit.

Owns the drawing. Promises a log scale, the same order of methods in every panel, the median as a
dot with its range as a line, and the limit as a vertical line. Needs matplotlib, an extra; without
it a message says so and nothing fails.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.harness import PROBES
from benchmarks.report import QUANTITIES, Quantity, limit_of, number, summary

_PANELS = ("stall", "durable", "lost", "memory", "load_cold", "load_warm", "cpu", "first_durable")
_SCALES = {"ms": 1e3, "MiB": 2.0**-20}
_OURS, _PEER, _LIMIT = "#0b6e4f", "#6b7280", "#b91c1c"
_FLOOR = 0.1
"""Where a log axis ends: what is measured as nothing, or less than that by noise, stands there."""


def draw(document: dict[str, Any], report_path: Path) -> list[str]:
    """Write a chart per state beside the report, and return a line on each."""
    try:
        import_module("matplotlib").use("Agg")
    except ImportError:
        return ["no chart: matplotlib is not installed (it is in the `bench` extra)"]
    lines = []
    for state, rows in document["samples"].items():
        if any(method != PROBES for method in rows):
            path = report_path.with_name(f"{report_path.stem}-{state}.png")
            _draw(document, state, path)
            lines.append(f"chart: {path}")
    return lines


def _draw(document: dict[str, Any], state: str, path: Path) -> None:
    plt = import_module("matplotlib.pyplot")
    methods = [each for each in document["samples"][state] if each != PROBES][::-1]
    chosen = {each.name: each for each in QUANTITIES}
    height = 1.7 + 0.34 * len(methods)
    figure, axes = plt.subplots(2, 4, figsize=(17, 2 * height), sharey=True)
    for axis, name in zip(axes.flat, _PANELS, strict=True):
        _panel(axis, document, state, chosen[name], methods)
    about, machine = document["states"][state], document["machine"]
    labels = [document["methods"][each]["label"] for each in methods]
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(methods)), labels)
        for tick, method in zip(axis.get_yticklabels(), methods, strict=True):
            if document["methods"][method]["ours"]:
                tick.set_color(_OURS)
                tick.set_fontweight("bold")
    quick = "QUICK RUN, small state: " if document["settings"]["quick"] else ""
    figure.suptitle(
        f"{quick}{about['label']}: less is better; the red line is the limit of the machine",
        fontsize=13,
    )
    figure.text(
        0.5,
        0.005,
        f"{machine['date']}, {machine['processor']}, {machine['usable_cores']} cores, "
        f"{machine['file_systems']['disk']}, torch {machine['packages'].get('torch')}; "
        "dot: median, line: lowest to highest",
        ha="center",
        fontsize=9,
        color=_PEER,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 0.97))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(
    axis: Any, document: dict[str, Any], state: str, quantity: Quantity, methods: list[str]
) -> None:
    scale = _SCALES[quantity.unit]
    limit = limit_of(document, state, quantity)
    title = f"{quantity.label}, {quantity.unit}"
    seen = []
    if limit is not None:
        axis.axvline(limit * scale, color=_LIMIT, linewidth=1.2)
        title += f"\nlimit {number(limit * scale)}"
        seen.append(limit * scale)
    for row, method in enumerate(methods):
        found = summary(document, state, method, quantity.name)
        if found is None:
            continue
        color = _OURS if document["methods"][method]["ours"] else _PEER
        median, low, high = (
            max(value * scale, _FLOOR) for value in (found.median, found.low, found.high)
        )
        axis.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="round")
        axis.plot([median], [row], "o", color=color, markersize=6)
        axis.annotate(
            number(found.median * scale),
            (median, row),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=color,
        )
        seen += [low, high]
    axis.set_title(title, fontsize=10)
    axis.set_xscale("log")
    ticker = import_module("matplotlib.ticker")
    wide = bool(seen) and max(seen) > 200 * min(seen)
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=12))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    if seen:
        axis.set_xlim(min(seen) / 2, max(seen) * 2)
    axis.set_ylim(-0.6, len(methods) - 0.1)
    axis.grid(axis="x", which="both", color="#e5e7eb", linewidth=0.6)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
