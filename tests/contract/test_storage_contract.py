"""Each promise of the storage contract is seen to fail: a storage that breaks it does not pass."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from holdfast.filesystem import LocalFilesystem
from holdfast.storage.backend import Append, Entry
from holdfast.storage.posix import PosixStorage
from holdfast.testing import MemoryStorage, StorageContract
from holdfast.testing.memory import MemoryObject


class _NoRoot(MemoryStorage):
    def prepare(self) -> None:
        return


class _Cut(MemoryStorage):
    def put(self, name: str, content: bytes) -> None:
        super().put(name, content[:-1])


class _LateCopy(MemoryStorage):
    """Keeps the blocks themselves until the end."""

    @contextmanager
    def put_from(self, name: str) -> Iterator[Append]:
        blocks: list[memoryview] = []
        yield blocks.append
        self.put(name, b"".join(blocks))


class _Swallowing(MemoryStorage):
    @contextmanager
    def put_from(self, name: str) -> Iterator[Append]:
        with super().put_from(name) as append, suppress(RuntimeError):
            yield append


class _Flat(MemoryStorage):
    def list(self) -> list[Entry]:
        return [each for each in super().list() if not each.is_group]


class _Trusting(MemoryStorage):
    def _full(self, name: str) -> str:
        return self.where(name)


class _Nameless(MemoryStorage):
    def get(self, name: str) -> bytes:
        with suppress(FileNotFoundError):
            return super().get(name)
        raise FileNotFoundError("it is not there")


class _Short(MemoryStorage):
    """Gives at most a megabyte at once, and says that it gave all."""

    class Source(MemoryObject):
        def get_into(self, offset: int, targets: Sequence[memoryview]) -> int:
            super().get_into(offset, [each[:999_000] for each in targets])
            return sum(map(len, targets))

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        yield self.Source(self.get(name))


class _OneReader(MemoryStorage):
    """All readers share one position."""

    position = 0

    class Source(MemoryObject):
        def get_into(self, offset: int, targets: Sequence[memoryview]) -> int:
            _OneReader.position = offset
            time.sleep(0.0001)
            return super().get_into(_OneReader.position, targets)

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        yield self.Source(self.get(name))


class _Shared(MemoryStorage):
    """Maps the object itself."""

    class Source(MemoryObject):
        def map(self) -> memoryview:
            return memoryview(self._content)

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        content = bytearray(self.get(name))
        self._contents.objects[self._full(name)] = content  # type: ignore[assignment]
        yield self.Source(content)  # type: ignore[arg-type]  # on purpose: it can be written to


class _LastWins(MemoryStorage):
    def put_new(self, name: str, content: bytes) -> None:
        self.put(name, content)


class _CheckThenPut(MemoryStorage):
    def put_new(self, name: str, content: bytes) -> None:
        if any(each.name == name for each in self.list()):
            raise FileExistsError(name)
        time.sleep(0.01)
        self.put(name, content)


class _InPlace(PosixStorage):
    """Creates and replaces files where readers see them."""

    def put_new(self, name: str, content: bytes) -> None:
        self._write(name, "xb", content)

    def replace(self, name: str, content: bytes) -> None:
        self._write(name, "wb", content)

    def _write(self, name: str, mode: str, content: bytes) -> None:
        with Path(self.where(name)).open(mode) as stream:
            for start in range(0, len(content), 10_000):
                stream.write(content[start : start + 10_000])
                stream.flush()
                time.sleep(0.001)


class _Private(MemoryStorage):
    """Each one opened sees only its own."""

    def has_group(self, group: str = "") -> bool:
        return False


class _Forgetting(MemoryStorage):
    """Publishes without the folders of a group."""

    def _move(self, source: str, target: str) -> None:
        super()._move(source, target)
        for each in list(self._contents.objects):
            if each.startswith(f"{self._full(target)}/state/"):
                del self._contents.objects[each]


class _RecordFirst(MemoryStorage):
    """Shows the record before the rest."""

    def publish(
        self, group: str, name: str, record: str, content: bytes, needs: Sequence[str]
    ) -> str | None:
        files, final = self.under(group), self.under(name)
        final.put(record, content)
        time.sleep(0.01)
        for each in needs:
            final.put(each, files.get(each))
        self.delete(group)
        return None


class _Overwriting(MemoryStorage):
    """Removes what it replaces."""

    def publish(
        self, group: str, name: str, record: str, content: bytes, needs: Sequence[str]
    ) -> str | None:
        replaced = super().publish(group, name, record, content, needs)
        if replaced is not None:
            self.delete(replaced)
        return replaced


class _Hasty(MemoryStorage):
    """Makes room before it knows that there is a successor."""

    def publish(
        self, group: str, name: str, record: str, content: bytes, needs: Sequence[str]
    ) -> str | None:
        if not self.has_group(group):
            self.delete(name)
        return super().publish(group, name, record, content, needs)


class _Grabbing(MemoryStorage):
    def restore(self, replaced: str, name: str) -> None:
        self.delete(name)
        super().restore(replaced, name)


class _Copying(MemoryStorage):
    """Leaves what it retracts in its place."""

    def retract(self, name: str) -> str:
        content = {each: self.get(f"{name}/{each}") for each in ("a", "record")}
        left = super().retract(name)
        for each, found in content.items():
            self.under(name).put(each, found)
        return left


class _Unordered(MemoryStorage):
    def list(self) -> list[Entry]:
        return super().list()[::-1]


class _ByPrefix(MemoryStorage):
    """Deletes all that begins with a name."""

    def delete(self, name: str) -> None:
        for each in list(self._contents.objects):
            if each.startswith(self._full(name)):
                del self._contents.objects[each]


@dataclass(frozen=True)
class _Case:
    """A storage that breaks a promise, and what the test of that promise is called with."""

    kind: type[MemoryStorage]
    arguments: dict[str, Any]


def _breaks(kind: type[MemoryStorage], **arguments: Any) -> _Case:
    return _Case(kind, arguments)


BROKEN = {
    "test_a_root_is_made_once_and_again": _breaks(_NoRoot),
    "test_what_is_written_is_read": _breaks(_Cut, verb="put", content=b"abc"),
    "test_a_large_object_is_its_blocks": _breaks(_LateCopy),
    "test_an_error_while_writing_reaches_the_caller": _breaks(_Swallowing),
    "test_objects_lie_in_folders_of_a_group": _breaks(_Flat),
    "test_a_name_that_leads_elsewhere_is_refused": _breaks(_Trusting, name="../x"),
    "test_what_is_missing_is_told_by_its_name": _breaks(_Nameless),
    "test_ranges_are_filled_and_never_short": _breaks(_Short),
    "test_many_read_at_once": _breaks(_OneReader),
    "test_mapped_memory_is_a_copy_that_stays": _breaks(_Shared),
    "test_only_the_first_creates": _breaks(_LastWins),
    "test_one_of_many_threads_creates": _breaks(_CheckThenPut),
    "test_a_begun_group_is_seen_by_others": _breaks(_Private),
    "test_a_group_is_published_whole": _breaks(_Forgetting),
    "test_a_reader_of_the_record_sees_everything": _breaks(_RecordFirst),
    "test_a_successor_takes_the_name": _breaks(_Overwriting),
    "test_a_failed_publication_keeps_what_was_there": _breaks(_Hasty),
    "test_a_replaced_group_gets_its_name_back": _breaks(_Grabbing),
    "test_a_retracted_group_is_no_longer_there": _breaks(_Copying),
    "test_a_list_has_everything_by_name": _breaks(_Unordered),
    "test_what_is_deleted_is_gone_and_nothing_else": _breaks(_ByPrefix),
}
"""By the test of the promise."""
IN_PLACE = (
    "test_one_of_many_processes_creates",
    "test_a_created_object_is_never_seen_in_part",
    "test_a_replaced_object_is_old_or_new",
)
"""Promises that only a storage with files can break: processes, and bytes that come by and by."""


class _ClaimsAll(PosixStorage):
    """Every process is told that it was first."""

    def put_new(self, name: str, content: bytes) -> None:
        self.replace(name, content)


def test_every_promise_has_its_culprit() -> None:
    """No test of the contract is left out below."""
    tests = {name for name in vars(StorageContract) if name.startswith("test_")}
    assert tests == {*BROKEN, *IN_PLACE}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found(name: str) -> None:
    """The test fails on the storage that breaks its promise, and passes on one that keeps it."""
    case = BROKEN[name]
    _call(name, _opener(MemoryStorage()), case.arguments)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        _call(name, _opener(case.kind()), case.arguments)


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_file_written_in_place_is_found(tmp_path: Path, name: str) -> None:
    """The same for what needs files or processes."""
    kind = _ClaimsAll if "processes" in name else _InPlace
    with pytest.raises(AssertionError):
        _call(name, partial(kind, tmp_path, LocalFilesystem()), {})


def _opener(storage: MemoryStorage) -> Callable[[], MemoryStorage]:
    return lambda: storage


def _call(name: str, open_storage: Callable[[], Any], arguments: dict[str, Any]) -> None:
    test = getattr(StorageContract(), name)
    storage = open_storage()
    wanted = inspect.signature(test).parameters
    if "storage" in wanted:
        storage.prepare()
        arguments = {**arguments, "storage": storage}
    if "open_storage" in wanted:
        arguments = {**arguments, "open_storage": open_storage}
    test(**arguments)
