"""Whose checkpoints a store holds, and which start of the run may save."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import (
    CorruptCheckpointError,
    FormatTooNewError,
    StoreIdentityError,
    SupersededAttemptError,
)
from holdfast.filesystem import LocalFilesystem
from holdfast.storage.identity import Attempt, Parent, RunIdentity, find_start_mark
from holdfast.storage.manifest import seal, unseal
from holdfast.storage.posix import PosixStorage
from tests.support.stores import tree


@pytest.fixture
def identity(tmp_path: Path) -> RunIdentity:
    """The identity of an empty store."""
    return RunIdentity(PosixStorage(tmp_path, LocalFilesystem()))


def test_a_run_id_is_made_once(identity: RunIdentity, tmp_path: Path) -> None:
    """The first job makes an id, every later one is given the same."""
    assert identity.read_run_id() is None
    run_id = identity.agree_run_id(None)
    assert len(run_id) == 16
    twin = RunIdentity(PosixStorage(tmp_path, LocalFilesystem()))
    assert twin.agree_run_id(None) == twin.agree_run_id(run_id) == twin.read_run_id() == run_id


def test_two_runs_have_different_ids(tmp_path: Path) -> None:
    """Ids of two stores differ."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ids = {
        RunIdentity(PosixStorage(tmp_path / name, LocalFilesystem())).agree_run_id(None)
        for name in "ab"
    }
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
        identity = RunIdentity(PosixStorage(tmp_path, LocalFilesystem()))
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
    identity = RunIdentity(PosixStorage(tmp_path, LocalFilesystem()))
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


def test_a_claim_records_who_made_it_and_what_was_asked(
    identity: RunIdentity, tmp_path: Path
) -> None:
    """Host, process, its start, the time, `load.step` and the parent are read back from a claim."""
    parent = Parent("/other/iter_0000040", "theirs", 40, "weights")
    before = datetime.now(UTC).replace(microsecond=0)
    identity.claim_attempt("run", 10, "x", asked_step=10)
    identity.claim_attempt("run", None, None, parent=parent)
    first, second = RunIdentity(PosixStorage(tmp_path, LocalFilesystem())).attempts()
    assert (first.asked_step, first.parent) == (10, None)
    assert (second.asked_step, second.parent) == (None, parent)
    assert (first.host, first.pid) == (socket.gethostname(), os.getpid())
    assert first.start_mark == find_start_mark(os.getpid())
    assert first.claimed_at is not None
    assert before <= datetime.fromisoformat(first.claimed_at) <= datetime.now(UTC)
    shown = json.loads((tmp_path / "run.json").read_bytes())
    assert shown["attempts"][1]["parent"]["iteration"] == 40
    claim = json.loads(unseal((tmp_path / "attempt_0000001.json").read_bytes(), ""))
    assert claim["format"] == shown["format"] == 1


def _rewrite(path: Path, *, sealed: bool = True, **values: Any) -> None:
    """Write fields of a claim or of run.json as another version would."""
    content = path.read_bytes()
    text = unseal(content, "") if path.name != "run.json" else content
    changed = json.dumps({**json.loads(text), **values}, indent=1).encode() + b"\n"
    path.write_bytes(seal(changed) if sealed and path.name != "run.json" else changed)


def test_a_claim_of_an_older_version_is_read(identity: RunIdentity, tmp_path: Path) -> None:
    """A claim that has the first version's three fields only reads as None in all others."""
    values = {"number": 1, "resumed_from": 7, "resumed_path": "x"}
    (tmp_path / "attempt_0000001.json").write_bytes(seal(json.dumps(values).encode() + b"\n"))
    (found,) = identity.attempts()
    assert found == Attempt(1, 7, "x")
    assert (found.host, found.pid, found.start_mark, found.claimed_at) == (None,) * 4


def test_fields_that_are_not_known_are_ignored(identity: RunIdentity, tmp_path: Path) -> None:
    """What a later version adds, in a claim, in run.json and in its list, changes nothing."""
    parent = Parent("/other", None, None, "everything")
    first = identity.claim_attempt(identity.agree_run_id("mine"), 10, "x", parent=parent)
    claim, shown = tmp_path / "attempt_0000001.json", tmp_path / "run.json"
    listed = json.loads(shown.read_bytes())["attempts"]
    listed[0]["colour"] = "red"
    listed[0]["parent"]["colour"] = "red"
    _rewrite(shown, attempts=listed, colour="red")
    _rewrite(claim, colour="red", parent={**listed[0]["parent"]})
    assert identity.read_run_id() == "mine"
    assert identity.attempts() == [first]
    claim.write_bytes(b"torn")  # then run.json speaks for it
    assert identity.attempts() == [first]


@pytest.mark.parametrize("name", ["run.json", "attempt_0000001.json"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_newer_format_is_never_taken_for_damage(
    identity: RunIdentity, tmp_path: Path, name: str, sealed: bool
) -> None:
    """A record of format 3 stops reading and claiming with its path and both formats."""
    run_id = identity.agree_run_id("mine")
    identity.claim_attempt(run_id, None, None)
    if name == "run.json":
        (tmp_path / "attempt_0000001.json").write_bytes(b"torn")  # so that it is asked
    _rewrite(tmp_path / name, sealed=sealed, format=3)
    before = tree(tmp_path)
    for ask in (identity.attempts, lambda: identity.claim_attempt(run_id, None, None)):
        with pytest.raises(
            FormatTooNewError, match="this version of holdfast reads up to format 1"
        ) as caught:
            ask()
        assert (caught.value.found, caught.value.known) == ("format 3", "up to format 1")
        assert caught.value.path == str(tmp_path / name)
    if name == "run.json":
        with pytest.raises(FormatTooNewError):
            identity.agree_run_id(None)
    assert tree(tmp_path) == before


def test_a_new_run_record_without_claims_is_no_torn_one(
    identity: RunIdentity, tmp_path: Path
) -> None:
    """A run.json of a newer format is not written again, even before any attempt was claimed."""
    content = b'{"format": 2, "run": {"id": "x"}}'
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(FormatTooNewError):
        identity.agree_run_id("mine")
    assert (tmp_path / "run.json").read_bytes() == content


@pytest.mark.parametrize(
    "values",
    [
        {"format": "1"},
        {"format": True},
        {"asked_step": "7"},
        {"parent": "x"},
        {"parent": {"path": "x"}},
        {"pid": "1"},
        {"host": 1},
    ],
)
def test_a_claim_of_wrong_types_is_a_torn_one(
    identity: RunIdentity, tmp_path: Path, values: dict[str, Any]
) -> None:
    """What is no claim keeps its number alone; run.json speaks for it."""
    first = identity.claim_attempt(identity.agree_run_id(None), 10, "x", asked_step=10)
    _rewrite(tmp_path / "attempt_0000001.json", **values)
    assert identity.attempts() == [first]
    (tmp_path / "run.json").unlink()
    assert identity.attempts() == [Attempt(1)]


def test_a_start_mark_tells_processes_apart() -> None:
    """A process keeps its mark, another one has another, and one that has ended has none."""
    own = find_start_mark(os.getpid())
    assert own is not None
    assert own == find_start_mark(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert find_start_mark(child.pid) not in (None, own)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: /proc still knows it
        assert Path(f"/proc/{child.pid}").exists()
        assert find_start_mark(child.pid) is None
    assert find_start_mark(child.pid) is None
