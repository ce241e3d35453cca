"""Whose checkpoints a store holds, and which start of the run may save."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from holdfast.errors import CorruptCheckpointError, StoreIdentityError, SupersededAttemptError
from holdfast.filesystem import LocalFilesystem
from holdfast.identity import Attempt, RunIdentity
from tests.support.stores import tree


@pytest.fixture
def identity(tmp_path: Path) -> RunIdentity:
    """The identity of an empty store."""
    return RunIdentity(tmp_path, LocalFilesystem())


def test_a_run_id_is_made_once(identity: RunIdentity, tmp_path: Path) -> None:
    """The first job makes an id, every later one is given the same."""
    assert identity.read_run_id() is None
    run_id = identity.agree_run_id(None)
    assert len(run_id) == 16
    twin = RunIdentity(tmp_path, LocalFilesystem())
    assert twin.agree_run_id(None) == twin.agree_run_id(run_id) == twin.read_run_id() == run_id


def test_two_runs_have_different_ids(tmp_path: Path) -> None:
    """Ids of two stores differ."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ids = {RunIdentity(tmp_path / name, LocalFilesystem()).agree_run_id(None) for name in "ab"}
    assert len(ids) == 2


def test_a_configured_id_is_taken_for_an_empty_store(identity: RunIdentity) -> None:
    """An empty store takes the id that is configured."""
    assert identity.agree_run_id("mine") == "mine"
    assert identity.agree_run_id(None) == "mine"


def test_another_id_is_refused_before_anything_is_written(
    identity: RunIdentity, tmp_path: Path
) -> None:
    """A configured id that is not the store's is refused, with the ways out, writing nothing."""
    identity.agree_run_id("theirs")
    before = tree(tmp_path)
    with pytest.raises(StoreIdentityError) as caught:
        identity.agree_run_id("mine")
    for part in (str(tmp_path), "'theirs'", "'mine'", "persistent.directory", "run_id=null"):
        assert part in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"run_id": ""}', b'{"run_id": 7}', b"\xff"]
)
def test_a_torn_run_record_is_refused(
    identity: RunIdentity, tmp_path: Path, content: bytes
) -> None:
    """A run.json that names no run is an error once a job has saved under it."""
    identity.claim_attempt(identity.agree_run_id(None), None, None)
    (tmp_path / "run.json").write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(CorruptCheckpointError, match=r"run\.json"):
        identity.agree_run_id(None)
    assert tree(tmp_path) == before


def test_a_run_record_torn_before_its_first_use_is_written_again(
    identity: RunIdentity, tmp_path: Path
) -> None:
    """A crash that tore run.json before any attempt was claimed leaves an empty store."""
    (tmp_path / "run.json").write_bytes(b'{"run')
    assert identity.read_run_id() is None
    assert identity.agree_run_id("mine") == "mine"
    assert identity.read_run_id() == "mine"


def test_attempts_count_up_and_say_where_from(identity: RunIdentity, tmp_path: Path) -> None:
    """Each claim takes the next number, keeps where it resumed, and is shown in run.json."""
    run_id = identity.agree_run_id(None)
    claimed = [
        identity.claim_attempt(run_id, None, None),
        identity.claim_attempt(run_id, 40, "/store/iter_0000040"),
    ]
    assert claimed == [Attempt(1), Attempt(2, 40, "/store/iter_0000040")]
    assert identity.attempts() == claimed
    shown = json.loads((tmp_path / "run.json").read_bytes())
    assert shown["run_id"] == run_id
    assert [each["number"] for each in shown["attempts"]] == [1, 2]
    assert identity.read_run_id() == run_id


def test_racing_starts_take_different_numbers(tmp_path: Path) -> None:
    """Eight jobs that start at once get eight numbers and one run id; only the last may go on."""
    start, taken = threading.Barrier(8), []

    def begin() -> None:
        identity = RunIdentity(tmp_path, LocalFilesystem())
        start.wait()
        run_id = identity.agree_run_id(None)
        taken.append((run_id, identity.claim_attempt(run_id, None, None)))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len({run_id for run_id, _ in taken}) == 1
    assert sorted(attempt.number for _, attempt in taken) == list(range(1, 9))
    identity = RunIdentity(tmp_path, LocalFilesystem())
    for _, attempt in taken:
        if attempt.number == 8:
            identity.check_newest(attempt)
        else:
            with pytest.raises(SupersededAttemptError, match="attempt 8 of this run"):
                identity.check_newest(attempt)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"number": 1}', b"\xff\xfe"])
def test_a_torn_claim_keeps_its_number(
    identity: RunIdentity, tmp_path: Path, content: bytes
) -> None:
    """A claim whose bytes were lost still counts: the next attempt is the one after it."""
    first = identity.claim_attempt("run", None, None)
    (tmp_path / "attempt_0000002.json").write_bytes(content)
    assert identity.attempts() == [first, Attempt(2)]
    with pytest.raises(SupersededAttemptError):
        identity.check_newest(first)
    assert identity.claim_attempt("run", None, None).number == 3


def test_foreign_names_claim_nothing(identity: RunIdentity, tmp_path: Path) -> None:
    """Names outside the grammar, directories and links are no claims."""
    for name in ("attempt_5.json", "attempt_00000009.json", "attempt_0000009.json.bak",
                 "attempt_0000009.json.pending-0123abcd", "attempt_x.json"):  # fmt: skip
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "attempt_0000010.json").mkdir()
    (tmp_path / "attempt_0000011.json").symlink_to("attempt_5.json")
    assert identity.attempts() == []
    first = identity.claim_attempt("run", None, None)
    assert first.number == 1
    identity.check_newest(first)


def test_numbers_grow_beyond_seven_digits(identity: RunIdentity, tmp_path: Path) -> None:
    """The largest number is the newest also where names no longer sort by text."""
    (tmp_path / "attempt_9999999.json").write_bytes(b"{}")
    assert identity.claim_attempt("run", None, None).number == 10_000_000
    assert identity.claim_attempt("run", None, None).number == 10_000_001
