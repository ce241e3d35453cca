"""The benchmark harness reckons rightly; what it measures is never asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, chart, harness, report
from benchmarks.harness import Settings, Task
from benchmarks.shapes import RECIPES, whole_bytes


def _process(method: str, number: int, **samples: list[float]) -> dict[str, Any]:
    return {
        "state": "1gib", "method": method, "round": number, "seconds": 1.0,
        "samples": samples, "facts": {}, "mismatches": [],
    }  # fmt: skip


def _about(label: str, **values: Any) -> dict[str, Any]:
    return {
        "label": label, "ours": False, "asynchronous": True, "copies": True,
        "durability": "syncs its files", "note": "", **values,
    }  # fmt: skip


def _document(*processes: dict[str, Any]) -> dict[str, Any]:
    """Return a report as a run writes it, of these processes."""
    return {
        "format": harness.FORMAT,
        "machine": {
            "date": "2000-01-01 00:00 UTC", "processor": "none", "cores": 2, "usable_cores": 2,
            "memory_gib": 1.0, "kernel": "0", "python": "3", "holdfast": "0",
            "packages": {"torch": "2"}, "file_systems": {"disk": "ext4", "memory": "tmpfs"},
        },
        "load_average_before": 0.0,
        "settings": {
            "saves": 2, "loads": 1, "quick": False, "OMP_WAIT_POLICY": "default",
            "device": "cpu",
        },
        "states": {"1gib": {"label": "1 GiB", "ranks": 1, "rounds": 2, "size_bytes": 2**30}},
        "methods": {
            "holdfast": _about("holdfast", ours=True),
            "dcp-async": _about("dcp.async_save"),
            "forks": _about("forks", copies=False),
            "ram": _about("ram", durability="memory: survives processes, not power loss"),
        },
        "processes": list(processes),
        **harness.gather(processes),
    }  # fmt: skip


def _verdict(document: dict[str, Any], quantity: str, over: str) -> bars.Verdict:
    (found,) = (
        each
        for each in bars.judge(document)
        if each.bar.quantity == quantity and each.bar.over.text == over
    )
    return found


def test_a_summary_is_the_median_with_the_range_over_all_processes() -> None:
    """Samples of every round count alike, in whichever process they were taken."""
    document = _document(
        _process("holdfast", 1, stall=[1.0, 5.0]), _process("holdfast", 2, stall=[2.0, 3.0, 9.0])
    )
    assert report.summary(document, "1gib", "holdfast", "stall") == report.Summary(3.0, 1.0, 9.0, 5)
    assert report.summary(document, "1gib", "holdfast", "cpu") is None


def test_a_bar_is_the_ratio_of_medians_with_the_range_round_by_round() -> None:
    """The range tells how far the ratio itself moved, not how far the machine did."""
    document = _document(
        _process("probes", 1, memcpy_2=[1.0]),
        _process("holdfast", 1, stall=[1.0, 1.4]),
        _process("probes", 2, memcpy_2=[10.0]),
        _process("holdfast", 2, stall=[12.0, 16.0]),
    )
    verdict = _verdict(document, "stall, blocking", "memcpy, 2 threads")
    assert verdict.ratio == pytest.approx(6.7 / 5.5)
    assert (verdict.low, verdict.high) == (pytest.approx(1.2), pytest.approx(1.4))
    assert verdict.to_lowest == pytest.approx(6.7)
    assert verdict.met is True


def test_a_limit_that_a_method_has_measured_itself_is_held_against_it() -> None:
    """What only its own ranks can show: a transfer between them, say."""
    processes = [
        _process("holdfast-local-2", number, raw_transfer=[limit], recovery_peer=[limit * ratio])
        | {"state": "local-fsdp2"}
        for number, limit, ratio in ((1, 0.1, 1.2), (2, 0.2, 1.4))
    ]
    document = _document(*processes)
    verdict = _verdict(document, "local: shard back from a peer", "raw gloo transfer")
    assert verdict.ratio == pytest.approx(0.2 / 0.15)
    assert verdict.low == pytest.approx(1.2)
    assert verdict.high == pytest.approx(1.4)
    assert verdict.met is False


def test_a_bar_that_is_missed_says_so() -> None:
    """One sample above the limit is not met, one below is."""
    for stall, met in ((0.131, False), (0.129, True)):
        document = _document(
            _process("probes", 1, memcpy_2=[0.1]), _process("holdfast", 1, stall=[stall])
        )
        assert _verdict(document, "stall, blocking", "memcpy, 2 threads").met is met


def test_the_best_peer_is_the_best_of_those_that_are_comparable() -> None:
    """A fork is no copy and memory is not durable: neither is the peer to beat there."""
    document = _document(
        _process("holdfast", 1, stall=[0.07], durable=[0.4]),
        _process("dcp-async", 1, stall_bare=[0.1], durable_bare=[0.8]),
        _process("forks", 1, stall_bare=[0.01], durable_bare=[0.5]),
        _process("ram", 1, stall_bare=[0.2], durable_bare=[0.1]),
    )
    copying = _verdict(document, "stall, blocking", "best copying peer")
    assert (copying.ratio, copying.over) == (pytest.approx(0.7), "best copying peer (dcp-async)")
    durable = _verdict(document, "time to durable", "best durable peer")
    assert (durable.ratio, durable.over) == (pytest.approx(0.8), "best durable peer (forks)")


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    """A method that was left out carries its reason into the table of bars."""
    skipped = {"state": "1gib", "method": "holdfast-sync", "round": 1, "skipped": "not built"}
    document = _document(_process("holdfast", 1, memory=[1.02 * 2**30]), skipped)
    verdict = _verdict(document, "extra memory, sync", "64 MiB")
    assert (verdict.ratio, verdict.met) == (None, None)
    assert "not built" in verdict.reason
    assert _verdict(document, "extra memory, async", "state").met is True
    assert _verdict(document, "load, cold", "dcp.load").met is None


def test_an_accelerator_has_bars_of_its_own() -> None:
    """A copy to pinned memory is not held against a copy in host memory, nor the reverse."""
    document = _document(
        _process("probes", 1, memcpy_2=[0.1], pinned_d2h=[0.02]),
        _process("holdfast", 1, stall=[0.11]),
    )
    stalls = [each for each in bars.judge(document) if each.bar.quantity == "stall, blocking"]
    assert [each.over for each in stalls if each.ratio] == ["memcpy, 2 threads"]
    document["settings"]["device"] = "cuda"
    stalls = [each for each in bars.judge(document) if each.bar.quantity == "stall, blocking"]
    assert [each.over for each in stalls if each.ratio] == ["pinned copy"]


def test_several_ranks_count_as_the_slowest_and_their_cpu_adds_up() -> None:
    """A save has ended when its last rank has; processor time is spent on every one."""
    first = {"samples": {"stall": [1.0, 4.0], "cpu": [1.0, 1.0]}, "facts": {"tensors": 3}}
    second = {
        "samples": {"stall": [2.0, 3.0], "cpu": [0.5, 0.25]}, "facts": {"tensors": 4},
        "mismatches": ["cold load: w"],
    }  # fmt: skip
    merged = harness.merge_ranks([first, second])
    assert merged["samples"] == {"stall": [2.0, 4.0], "cpu": [1.5, 1.25]}
    assert merged["facts"] == {"tensors": 3}
    assert merged["mismatches"] == ["rank 1: cold load: w"]
    assert harness.merge_ranks([first, {"failed": "broke"}]) == {"failed": "broke"}


def test_a_mismatch_cannot_be_overlooked() -> None:
    """It stands at the very end of the report, and silence says that there was none."""
    sound = _document(_process("holdfast", 1, stall=[1.0]))
    assert report.render(sound).endswith("bit for bit")
    process = _process("holdfast", 1, stall=[1.0]) | {"mismatches": ["cold load: 2 tensors differ"]}
    shown = report.render(_document(process))
    assert "LOADED WHAT WAS NOT SAVED" in shown
    assert "1gib holdfast: cold load: 2 tensors differ" in shown


def test_the_table_puts_every_quantity_beside_its_limit() -> None:
    """A stall of 0.2 s over a copy of 0.1 s reads as twice the limit."""
    document = _document(
        _process("probes", 1, memcpy_2=[0.1], write_direct=[0.5]),
        _process("holdfast", 1, stall=[0.2], durable=[0.55]),
    )
    (row,) = (line for line in report.render(document).splitlines() if "1.10x" in line)
    assert row.split()[:5] == ["holdfast", "200", "2.00x", "550", "1.10x"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (99.96, "100.0"), (12345.6, "12,346")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    """A median reads the same whether it is microseconds or minutes."""
    assert report.number(value) == text


def test_a_chart_without_matplotlib_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report does not need it."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    (line,) = chart.draw(_document(_process("holdfast", 1, stall=[1.0])), tmp_path / "r.json")
    assert "matplotlib is not installed" in line
    assert list(tmp_path.iterdir()) == []


def test_every_method_sees_the_same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process was told of OpenMP reaches no method unless all are told."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert "OMP_WAIT_POLICY" not in harness.environment("default", 1)
    assert harness.environment("active", 1)["OMP_WAIT_POLICY"] == "active"
    assert harness.environment("default", 2)["OMP_NUM_THREADS"] == "1"


def test_the_states_have_the_sizes_that_their_names_say() -> None:
    """1 GiB is a gibibyte to a thousandth; the tiny state is 3.7 MiB."""
    assert whole_bytes(RECIPES["1gib"], quick=False) == pytest.approx(2**30, rel=1e-3)
    assert whole_bytes(RECIPES["3gib"], quick=False) == pytest.approx(3 * 2**30, rel=1e-2)
    assert whole_bytes(RECIPES["tiny"], quick=False) == pytest.approx(3.7 * 2**20, rel=2e-2)


def test_a_quick_run_measures_checks_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """One method in processes of its own: all quantities, no mismatch, a report that is JSON."""
    settings = Settings(1, 1, 1, True, tmp_path, tmp_path, timeout_seconds=100)
    told: list[str] = []
    kept: list[dict[str, Any]] = []
    result = harness.run(
        [Task("tiny", 1, 1, ["holdfast", "nosuch"])], settings, told.append, kept.append
    )
    samples = result["samples"]["tiny"]
    assert set(samples["probes"]) >= {"memcpy_1", "memcpy_2", "write_direct", "read_direct_cold"}
    wanted = {each.name for each in report.QUANTITIES} | {"returns", "stall_bare", "durable_bare"}
    wanted -= {*report.RECOVERING, *report.RESTARTING}
    assert set(samples["holdfast"]) >= wanted
    assert all(math.isfinite(value) for values in samples["holdfast"].values() for value in values)
    assert samples["holdfast"]["durable"][0] >= samples["holdfast"]["stall"][0] > 0
    assert result["mismatches"] == []
    assert "nosuch" in result["skipped"]["tiny"]
    assert result["facts"]["tiny"]["holdfast"]["tensors"] == 400
    assert list(tmp_path.iterdir()) == []
    assert json.loads(json.dumps(kept[-1])) == result


def test_a_recovery_is_measured_beside_its_limit(tmp_path: Path) -> None:
    """Losing, loading and being whole again, on the state of the local tier; each load compared."""
    settings = Settings(1, 1, 1, True, tmp_path, tmp_path, timeout_seconds=100)
    task = Task("local", 1, 1, ["holdfast-local"], in_memory=True)
    result = harness.run([task], settings, lambda _: None)
    assert result["skipped"] == {}
    samples = result["samples"]["local"]["holdfast-local"]
    for name in ("raw_copy", "raw_read", "recovery_own", "recovered_own", "first_recovery_own"):
        (value,) = samples[name]
        assert value > 0
    assert samples["recovered_own"][0] >= samples["recovery_own"][0]
    assert result["mismatches"] == []
