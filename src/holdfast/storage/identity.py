"""The identity of a store: the run id and the attempts at that run.

Owns run.json and the attempt_*.json claims beside it. The first job that uses an empty store makes
the run id. Each start of the run that saves takes the next attempt number by exclusive creation of
its claim, so two jobs never hold one number, without locks, clocks or clean-up. The claims are
authoritative, each with its digest; run.json repeats them for people, and for claims damaged later.
Refuses another run's id and an attempt that has been superseded. Unknown fields are ignored; a
format above this version's is an error, never damage.

A claim also records the process that made it: host, pid, and the boot and start time that
distinguish two processes with the same pid. Only a warning depends on that.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.errors import (
    CorruptCheckpointError,
    FormatTooNewError,
    StoreIdentityError,
    SupersededAttemptError,
)
from holdfast.storage.backend import Storage
from holdfast.storage.manifest import check_format, seal, unseal

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Process:
    """One process of one host."""

    host: str
    pid: int
    start_mark: str | None
    """None: the system does not report it."""


def this_process() -> Process:
    """Return the calling process; not cached, since a fork is another process."""
    pid = os.getpid()
    return Process(socket.gethostname(), pid, find_start_mark(pid))


def find_start_mark(pid: int) -> str | None:
    """Return boot id and start time of a process of this host; None: ended, or no /proc."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        return None
    # The program name is in brackets and may contain anything: count from the last bracket.
    fields = content[content.rfind(b")") + 1 :].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X", b"x"):
        return None  # ended, but not yet reaped by its parent
    return f"{boot}/{fields[19].decode()}"  # field 22 of proc(5), in ticks since the boot


RUN_NAME = "run.json"
FORMAT = 1
"""Of run.json and of each claim. Every version seals claims and numbers formats this way."""
_CLAIM_NAME = re.compile(r"attempt_([0-9]{7}|[1-9][0-9]{7,})\.json")


@dataclass(frozen=True)
class CommitIdentity:
    """Attempt and sequence of a commit, assigned by the tier that admits saves."""

    attempt: int
    sequence: int
    """Larger than that of any earlier commit of the run, in either tier."""


@dataclass(frozen=True)
class Parent:
    """The checkpoint of another run that a run began from."""

    path: str
    run_id: str | None
    """None: it has no run id."""
    iteration: int | None
    what: str
    """`weights` or `everything`."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run that has saved, or is about to."""

    number: int
    """From 1; the largest is the one that may commit."""
    resumed_from: int | None = None
    """The iteration of this store that it loaded; None: it started fresh or from another store."""
    resumed_path: str | None = None
    """The checkpoint that was loaded, in any store."""
    asked_step: int | None = field(default=None, compare=False)
    """The value of `load.step` at that load."""
    parent: Parent | None = None
    """The checkpoint that the run began from; None: none, or this attempt loaded one of its own."""
    # Who made the claim and when: used in warnings only, so it is not compared.
    host: str | None = field(default=None, compare=False)
    pid: int | None = field(default=None, compare=False)
    """Of rank 0."""
    start_mark: str | None = field(default=None, compare=False)
    """Distinguishes that process from a later one with its pid; None: not reported."""
    claimed_at: str | None = field(default=None, compare=False)
    """UTC, ISO 8601."""


class RunIdentity:
    """The run id and the attempts, stored at the root of one store."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read_run_id(self) -> str | None:
        """Return the run id; None: no job has saved here yet.

        Raises:
            CorruptCheckpointError: run.json exists and cannot be read.
            FormatTooNewError: a newer holdfast wrote it.
        """
        where = self._storage.where(RUN_NAME)
        try:
            content = self._storage.get(RUN_NAME)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            run_id = _parse_known(content, where).get("run_id")
            if not isinstance(run_id, str) or not run_id:
                raise CorruptCheckpointError(where, "names no run_id; restore it from any manifest")
        except CorruptCheckpointError:
            if self._claims():
                raise
            return None  # torn by a crash before any attempt could be claimed under it
        return run_id

    def attempts(self) -> list[Attempt]:
        """Return every attempt claimed so far, oldest first.

        Raises:
            FormatTooNewError: a newer holdfast made one of the claims.
        """
        found = []
        for number, name in self._claims():
            claim = self._read_claim(name)
            if claim is None or claim.number != number:
                # The file name alone takes the number. If run.json does not have it either, a crash
                # tore the claim before anything depended on it.
                claim = self._repeated_in_run_json().get(number, Attempt(number))
            found.append(claim)
        return found

    def _read_claim(self, name: str) -> Attempt | None:
        where = self._storage.where(name)
        try:
            content = self._storage.get(name)
            try:
                text = unseal(content, where)
            except CorruptCheckpointError:
                _parse_known(content, where)  # an intact claim of a newer format, sealed otherwise?
                raise
            return _attempt_of(_parse_known(text, where))
        except (CorruptCheckpointError, KeyError, TypeError):
            return None

    def _repeated_in_run_json(self) -> dict[int, Attempt]:
        try:
            content = self._storage.get(RUN_NAME)
            listed = _parse_known(content, self._storage.where(RUN_NAME))["attempts"]
            return {each.number: each for each in map(_attempt_of, listed)}
        except (OSError, CorruptCheckpointError, KeyError, TypeError):
            return {}

    def agree_run_id(self, configured: str | None) -> str:
        """Return the store's run id, making one for an empty store.

        Raises:
            StoreIdentityError: another run id is configured than the store has.
        """
        run_id = self.read_run_id()
        if run_id is None:
            fresh = {"format": FORMAT, "run_id": configured or secrets.token_hex(8), "attempts": []}
            # Its name is synced with the first claim, before any save uses the run id.
            with suppress(FileExistsError):  # another job was first: use its id
                self._storage.put_new(RUN_NAME, _encode(fresh))
            run_id = self.read_run_id()
            if run_id is None:
                self._storage.replace(RUN_NAME, _encode(fresh))  # it was torn
                run_id = self.read_run_id()
            assert run_id is not None
        self.check_run_id(configured, run_id)
        return run_id

    def check_run_id(self, configured: str | None, found: str) -> None:
        """Refuse a store of another run than the one configured.

        Raises:
            StoreIdentityError: the two differ.
        """
        if configured is not None and configured != found:
            raise StoreIdentityError(
                f"{self._storage.where()} belongs to run {found!r}, but checkpoint.run_id is "
                f"{configured!r}.\n"
                "Name another checkpoint.persistent.directory, or set checkpoint.run_id=null to go "
                "on with the store's run."
            )

    def claim_attempt(
        self,
        run_id: str,
        resumed_from: int | None,
        path: str | None,
        *,
        asked_step: int | None = None,
        parent: Parent | None = None,
    ) -> Attempt:
        """Claim the next attempt number; no earlier attempt may commit from then on.

        Raises:
            FormatTooNewError: a newer holdfast made one of the claims; nothing was written.
        """
        self.attempts()  # before our claim supersedes one that this version cannot read
        process = this_process()
        while True:
            claims = self._claims()
            number = claims[-1][0] + 1 if claims else 1
            attempt = Attempt(
                number,
                resumed_from,
                path,
                asked_step,
                parent,
                process.host,
                process.pid,
                process.start_mark,
                datetime.now(UTC).isoformat(timespec="seconds"),
            )
            try:
                claim = seal(_encode({"format": FORMAT, **asdict(attempt)}))
                self._storage.put_new(_claim_name(number), claim)
            except FileExistsError:
                continue  # another job took this number after the listing
            # For people; another job's later version may win: it too is rebuilt from the claims.
            summary = [asdict(each) for each in self.attempts()]
            shown = {"format": FORMAT, "run_id": run_id, "attempts": summary}
            self._storage.replace(RUN_NAME, _encode(shown))
            # Before any checkpoint of this attempt can be visible: from here on the number and what
            # the attempt supersedes are durable.
            self._storage.settle([_claim_name(number), RUN_NAME])
            return attempt

    def check_newest(self, attempt: Attempt) -> None:
        """Refuse an attempt that has been superseded.

        Raises:
            SupersededAttemptError: a newer attempt of this run has begun to save.
        """
        claims = self._claims()
        if claims and claims[-1][0] > attempt.number:
            raise SupersededAttemptError(
                f"{self._storage.where()}: attempt {claims[-1][0]} of this run has taken over from "
                f"attempt {attempt.number}, which may no longer save here.\n"
                "Stop this job: another one is running, or give it its own "
                "checkpoint.persistent.directory."
            )

    def _claims(self) -> list[tuple[int, str]]:
        return sorted(
            (int(match[1]), each.name)
            for each in self._storage.list()
            if not each.is_group and (match := _CLAIM_NAME.fullmatch(each.name))
        )


def _claim_name(number: int) -> str:
    return f"attempt_{number:07d}.json"


def _encode(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1, sort_keys=True).encode() + b"\n"


def _attempt_of(values: dict[str, Any]) -> Attempt:
    """Parse a claim; fields that older versions did not write are None.

    Raises:
        KeyError, TypeError: it is not an attempt.
    """
    parent = values.get("parent")
    attempt = Attempt(
        values["number"],
        values["resumed_from"],
        values["resumed_path"],
        values.get("asked_step"),
        None
        if parent is None
        else Parent(**{each.name: parent[each.name] for each in fields(Parent)}),
        **{name: values.get(name) for name in ("host", "pid", "start_mark", "claimed_at")},
    )
    if type(attempt.number) is not int:
        raise TypeError("an attempt's number is whole")
    for number in (attempt.resumed_from, attempt.asked_step, attempt.pid):
        if type(number) not in (int, type(None)):
            raise TypeError("an attempt's numbers are whole")
    for name in (attempt.host, attempt.start_mark, attempt.claimed_at):
        if type(name) not in (str, type(None)):
            raise TypeError("the process of an attempt is described by strings")
    return attempt


def _parse_known(content: bytes, path: str) -> dict[str, Any]:
    """Parse a record that this version can read.

    Raises:
        CorruptCheckpointError: it is not a JSON object.
        FormatTooNewError: its format is above the one that this version writes.
    """
    values = _parse(content, path)
    try:
        check_format({"format": FORMAT, **values}, FORMAT, path)  # early claims had none
    except FormatTooNewError:
        raise
    except (ValueError, TypeError) as error:
        raise CorruptCheckpointError(path, f"is of no format: {error}") from error
    return values


def _parse(content: bytes, path: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CorruptCheckpointError(path, "is not a JSON object")
    return values
