"""Under every layout a resumed run goes on as the uninterrupted one, from its very next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layout_runs import WAYS, LayoutRun
from tests.support.deadlines import LAUNCH_SECONDS
from tests.support.ranks import run_ranks

SAVED_AT, LAST = 4, 9
"""Within an epoch of the data; the epoch ends in between on two ranks."""
ON_TWO = [way for way in WAYS if way not in ("hsdp", "fsdp x tp", "pp x dp")]
ON_FOUR = ["hsdp", "fsdp x tp", "pp x dp"]
_NO_UNION = "a load compares a rank's names with those of all ranks"
_NO_OWN_BUFFERS = "every rank gets the buffers of one"
_BROKEN = {
    "ddp with batch norm": _NO_OWN_BUFFERS,
    "ddp with batch norm of rank 0": _NO_OWN_BUFFERS,
    "pp": _NO_UNION,
    "pp x dp": _NO_UNION,
    "ep": _NO_UNION,
}


def _resume(root: Path, ways: list[str]) -> dict[str, dict[str, Any]]:
    """Return by way what differs on this rank, and how much the run learned."""
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        run = LayoutRun(way, root / way)
        run.train(LAST, save_at=[SAVED_AT])
        expected = run.facts()
        learned = [float.fromhex(each) for each in run.losses]
        expected["losses"] = expected["losses"][SAVED_AT:]
        expected["seen"] = expected["seen"][-len(expected["seen"]) * (LAST - SAVED_AT) // LAST :]
        again = LayoutRun(way, root / way, seed=77)
        try:
            assert again.load().iteration == SAVED_AT
        except Exception as error:  # noqa: BLE001  # one layout must not hide the others
            found[way] = {"different": [f"{type(error).__name__}: {error}"], "losses": learned}
            continue
        again.train(LAST)
        facts = again.facts()
        different = [name for name in expected if facts[name] != expected[name]]
        found[way] = {"different": different, "losses": learned, "draws": facts["draws"]}
    return found


@pytest.mark.parametrize(
    ("ranks", "ways"),
    [(2, ON_TWO[:5]), (2, ON_TWO[5:8]), (2, ON_TWO[8:]), (4, ON_FOUR)],
    ids=["replicas", "wrappers", "parts", "grids"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    ranks: int, ways: list[str], tmp_path: Path
) -> None:
    """Losses, samples, tensors, options, schedule and draws of each rank, bit for bit.

    The resumed run was built from another seed.
    """
    results = run_ranks(_resume, ranks, tmp_path, ways, timeout_seconds=2 * LAUNCH_SECONDS)
    broken = {}
    for way in ways:
        outcomes = [found[way] for found in results]
        different = {rank: each["different"] for rank, each in enumerate(outcomes)}
        if any(different.values()):
            broken[way] = different
        else:
            draws = {each["draws"] for each in outcomes}
            row = WAYS[way].row or ranks
            assert len(draws) == (ranks // row if WAYS[way].draws_alike else ranks), way
        losses = outcomes[-1]["losses"]
        assert min(losses) < 0.8 * losses[0], f"{way}: nothing was learned: {losses}"
    expected = {way for way in ways if way in _BROKEN}
    assert set(broken) == expected, broken
