"""One client of the job's rendezvous store, as the coordinator uses it.

Owns single requests: values are pickled, many keys are asked for at once where the store can, and
an outcome can be appended to a list. Promises that every request either is answered or raises a
typed error that names the lost store, and that a wait ends at its deadline. Knows nothing about
calls, turns or verdicts. Ranks of one job trust each other; files are never read so.
"""

from __future__ import annotations

import pickle
import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any

from holdfast.errors import RankFailure, StageFailedError

_FRAME = struct.Struct("<IQ")
"""Before each value of a list: the rank that appended it, and its length in bytes."""


_WAITED = 0.9
"""Fraction of the time after which a wait that failed has timed out; earlier, the store is lost."""


class StoreClient:
    """Requests of one rank to the rendezvous store; for one thread at a time."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store = store
        self._rank = rank

    @cached_property
    def address(self) -> str:
        """Where the store is, for messages."""
        store = self._store
        for _ in range(8):  # a prefix over a prefix
            host, port = getattr(store, "host", None), getattr(store, "port", None)
            if host is not None and port is not None:
                return f" at {host}:{port}"
            store = getattr(store, "underlying_store", None)
        return ""

    @cached_property
    def has_lists(self) -> bool:
        """Whether the store can append, and take many keys in one request."""
        return bool(self._ask("store", self._store.has_extended_api))

    def wait(self, keys: Sequence[str], seconds: float, stage: str) -> bool:
        """Whether all of the keys appear within so many seconds.

        Raises:
            StageFailedError: the store is gone.
        """
        seconds, began = max(seconds, 0.001), time.monotonic()
        try:
            self._store.wait(list(keys), timedelta(seconds=seconds))
        except RuntimeError as error:
            # Types and texts of the error differ between stores and releases of torch.
            if time.monotonic() - began < _WAITED * seconds:
                raise self._lost(stage, error) from error
            return False
        return True

    def is_there(self, key: str, stage: str) -> bool:
        """Whether a key exists now."""
        return bool(self._ask(stage, self._store.check, [key]))

    def add(self, key: str, amount: int, stage: str) -> int:
        """Add to a counter, which starts at 0; return its new value."""
        return int(self._ask(stage, self._store.add, key, amount))

    def set(self, key: str, value: Any, stage: str) -> None:
        """Store a value."""
        content = pickle.dumps(value)
        self._ask(stage, self._store.set, key, content)

    def set_many(self, keys: Sequence[str], values: Sequence[Any], stage: str) -> None:
        """Store a value under each key."""
        contents = [pickle.dumps(each) for each in values]
        if self.has_lists:
            self._ask(stage, self._store.multi_set, list(keys), contents)
            return
        for key, content in zip(keys, contents, strict=True):
            self._ask(stage, self._store.set, key, content)

    def get(self, key: str, stage: str) -> Any:
        """Return the value of a key that exists."""
        content = self._ask(stage, self._store.get, key)
        return pickle.loads(content)  # noqa: S301  # written by a rank of this job

    def get_within(self, key: str, seconds: float, stage: str) -> Any:
        """Return the value of a key as soon as it exists; None: it does not in so many seconds.

        Raises:
            StageFailedError: the store is gone.
        """
        if not self._waits_in_get:
            return self.get(key, stage) if self.wait([key], seconds, stage) else None
        began = time.monotonic()
        self._store.set_timeout(timedelta(seconds=seconds))  # of this client alone
        try:
            content = self._store.get(key)
        except RuntimeError as error:
            if time.monotonic() - began < _WAITED * seconds:
                raise self._lost(stage, error) from error
            return None
        return pickle.loads(content)  # noqa: S301  # written by a rank of this job

    @cached_property
    def _waits_in_get(self) -> bool:
        """Whether a client's `get` waits by itself, with a timeout that no other client shares."""
        store = self._store
        while (inner := getattr(store, "underlying_store", None)) is not None:
            store = inner
        return type(store).__name__ == "TCPStore"

    def get_many(self, keys: Sequence[str], stage: str) -> list[Any]:
        """Return the value of each of these keys, which exist."""
        if not self.has_lists or len(keys) < 2:
            return [self.get(key, stage) for key in keys]
        contents = self._ask(stage, self._store.multi_get, list(keys))
        return [pickle.loads(each) for each in contents]  # noqa: S301  # likewise

    def append(self, key: str, value: Any, stage: str) -> None:
        """Append a value to the list at a key, which starts empty; needs `has_lists`."""
        content = pickle.dumps(value)
        frame = _FRAME.pack(self._rank, len(content)) + content
        self._ask(stage, self._store.append, key, frame)

    def get_list(self, key: str, stage: str) -> dict[int, Any]:
        """Return the values that were appended, by the rank that appended each."""
        content = self._ask(stage, self._store.get, key)
        found: dict[int, Any] = {}
        position = 0
        while position < len(content):
            rank, length = _FRAME.unpack_from(content, position)
            position += _FRAME.size + length
            frame = content[position - length : position]
            found[rank] = pickle.loads(frame)  # noqa: S301  # likewise
        return found

    def delete(self, keys: Sequence[str], stage: str) -> None:
        """Delete keys; any of them may be absent."""
        for key in keys:
            self._ask(stage, self._store.delete_key, key)

    def _ask(self, stage: str, request: Callable[..., Any], *arguments: Any) -> Any:
        """Send one request.

        Raises:
            StageFailedError: the store is gone.
        """
        try:
            return request(*arguments)
        except RuntimeError as error:
            raise self._lost(stage, error) from error

    def _lost(self, stage: str, error: RuntimeError) -> StageFailedError:
        reason = (
            f"the rendezvous store{self.address} is gone; has the process died that hosts it "
            f"(rank 0, or torchrun's agent)? {error}"
        )
        return StageFailedError(stage, [RankFailure(self._rank, type(error).__name__, reason)])
