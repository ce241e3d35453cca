"""What the soak takes for lost, from notes of ranks that never ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.soak import Notes, Record, Soak

PERSISTENT_40 = "saved 40 persistent"
LOCAL_45 = "saved 45 local"


@pytest.fixture
def soak(tmp_path: Path) -> Soak:
    """A soak of which the first launch saved step 40 for good, and then 45 in memory."""
    soak = Soak(tmp_path, seed=0, nodes=tmp_path / "nodes")
    launch(soak, "loaded 0", "from nothing", PERSISTENT_40, LOCAL_45)
    return soak


def launch(soak: Soak, *notes: str, lost: str = "") -> None:
    """Add a launch by what both ranks noted; `lost`: the nodes that lost their memory before it."""
    folder = soak.next_folder()
    for rank in range(2):
        (folder / f"rank_{rank}").write_text("".join(f"{each}\n" for each in notes))
    if lost:
        soak.losses[folder] = set(lost)


@pytest.mark.parametrize("before", ["", "a"])
@pytest.mark.parametrize("lost", ["", "a"])
def test_a_commit_with_a_copy_left_has_to_be_found(soak: Soak, before: str, lost: str) -> None:
    """With one node's memory or both left, an older start is a loss; a node is lost only once."""
    launch(soak, lost=before)  # killed before it could load
    launch(soak, "loaded 40", "from persistent", "passed 45 a reason", lost=lost)
    soak.follow()
    [found] = soak.tally.lost
    assert found == (
        "launch_0002: resumed from 40, 45 was acknowledged (local); passed over: ['45 a reason']"
    )


def test_a_persistent_one_has_to_be_found_whatever_the_nodes_lost(soak: Soak) -> None:
    """The disk keeps what was acknowledged for good."""
    launch(soak, "loaded 20", "from persistent", lost="ab")
    soak.follow()
    [found] = soak.tally.lost
    assert "40 was acknowledged (persistent)" in found


def test_nodes_that_lose_their_memory_together_take_the_commit_with_them(soak: Soak) -> None:
    """Nothing is left of it, and none is missed."""
    launch(soak, "loaded 40", "from persistent", lost="ab")
    soak.follow()
    assert not soak.tally.lost


def test_nodes_that_lose_their_memory_in_turn_do_so_too(soak: Soak) -> None:
    """No rank lived long enough between them to write anything again."""
    launch(soak, lost="b")  # killed before it could load
    launch(soak, lost="a")
    launch(soak, "loaded 40", "from persistent")
    soak.follow()
    assert not soak.tally.lost


def test_a_save_between_two_losses_has_copies_of_its_own(soak: Soak) -> None:
    """The later loss leaves the copy on the other node."""
    launch(soak, "loaded 45", "from local", "saved 50 local", lost="b")
    launch(soak, "loaded 45", "from local", lost="a")
    soak.follow()
    [found] = soak.tally.lost
    assert "resumed from 45, 50 was acknowledged (local)" in found


def test_a_reason_of_several_lines_is_one_note(tmp_path: Path) -> None:
    """What follows it is read as it was noted."""
    path = tmp_path / "notes" / "rank_0"
    notes = Notes(path)
    notes.put("passed", 45, "rank 0: gone\n\nrank 1: too")
    notes.put("saved", 50, "local")
    record = Record.read(path)
    assert record.passed == ["45 rank 0: gone rank 1: too"]
    assert record.saved == [(50, "local")]
