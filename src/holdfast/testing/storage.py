"""The promises of the storage protocol as tests, to be run on any implementation.

Owns one test per promise of `holdfast.storage.backend`. Each test begins with a storage that holds
nothing. Durability, which no test in a living process can see, and behaviour under faults are the
implementation's own to test.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from holdfast.storage.backend import Storage, as_stream, pending_name

OpenStorage = Callable[[], Storage]

UNSHOWABLE_NAMES = ("a\nb", "a\\b")
HOSTILE_NAMES = (
    "", ".", "..", "../x", "/x", "a/../../x", "a/..", "a//b", "./a", "a/", "a/./b", "a\0b",
    *UNSHOWABLE_NAMES,
)  # fmt: skip
_CONTENTS = (b"", b"x", b"0123456789" * 1000)
_BLOCKS = (4096, 1, 0, 5000, 8 << 20, 4096, 3)
"""Sizes of the blocks of a large object, whole pages and others."""
_ROUNDS = 20


class StorageContract:
    """Derive a test class and give it a fixture `open_storage`.

    The fixture returns a function that opens one storage, which is empty at the first call and the
    same at each later one. If `is_shared` is true, other processes can unpickle the function and
    open the storage too.

        class TestMyStorage(StorageContract):
            @pytest.fixture
            def open_storage(self, tmp_path: Path) -> OpenStorage:
                return functools.partial(MyStorage, tmp_path / "root")
    """

    is_shared = True

    @pytest.fixture
    def open_storage(self) -> OpenStorage:
        """Return the function that opens the storage; see the class."""
        raise NotImplementedError

    @pytest.fixture
    def storage(self, open_storage: OpenStorage) -> Storage:
        """The storage, with a root."""
        storage = open_storage()
        storage.prepare()
        return storage

    # -- objects ---------------------------------------------------------------------------------

    def test_a_root_is_made_once_and_again(self, open_storage: OpenStorage) -> None:
        """Nothing is listed without a root; `prepare` makes it, and may be called again."""
        storage = open_storage()
        assert storage.list() == []
        for _ in range(2):
            storage.prepare()
            assert storage.has_group()
            assert open_storage().list() == []

    @pytest.mark.parametrize("content", _CONTENTS, ids=len)
    @pytest.mark.parametrize("verb", ["put", "put_new", "replace", "put_from"])
    def test_what_is_written_is_read(
        self, storage: Storage, open_storage: OpenStorage, verb: str, content: bytes
    ) -> None:
        """Every way to write an object gives it exactly the bytes, for every later reader."""
        if verb == "put_from":
            with storage.put_from("a") as append:
                append(memoryview(content))
        else:
            getattr(storage, verb)("a", content)
        storage.settle(["a"])
        for reader in (storage, open_storage()):
            assert reader.get("a") == content
            assert reader.size_bytes("a") == len(content)
            with reader.open("a") as source, as_stream(source) as stream:
                assert source.size_bytes == len(content)
                assert stream.read() == content

    def test_a_large_object_is_its_blocks(self, storage: Storage) -> None:
        """Blocks of any size arrive whole and in order; their memory may then be overwritten."""
        memory, expected = bytearray(max(_BLOCKS)), bytearray()
        with storage.put_from("a") as append:
            for number, size_bytes in enumerate(_BLOCKS):
                block = memoryview(memory)[:size_bytes]
                block[:] = bytes([number + 1]) * size_bytes
                append(block)
                expected += block
                block[:] = bytes(size_bytes)
        assert storage.get("a") == expected

    def test_an_error_while_writing_reaches_the_caller(self, storage: Storage) -> None:
        """What fails inside `put_from` is raised as it is, not swallowed."""

        def give_up() -> None:
            with storage.put_from("a") as append:
                append(memoryview(b"half"))
                raise RuntimeError("given up")

        with pytest.raises(RuntimeError, match="given up"):
            give_up()

    def test_objects_lie_in_folders_of_a_group(self, storage: Storage) -> None:
        """A name with several parts is the same object seen from the root and from its group."""
        storage.begin("g")
        storage.under("g").put("folder/a", b"inner")
        storage.under("g").put("b", b"outer")
        storage.under("g").settle(["folder/a", "b"])
        assert storage.under("g").get("folder/a") == storage.get("g/folder/a") == b"inner"
        assert storage.under("g").where("folder/a") == storage.where("g/folder/a")
        assert storage.where("g").startswith(storage.where())
        listed = [(each.name, each.is_group) for each in storage.under("g").list()]
        assert listed == [("b", False), ("folder", True)]

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_a_name_that_leads_elsewhere_is_refused(self, storage: Storage, name: str) -> None:
        """No verb takes a name that is not below the root, or that a message cannot show."""
        attempts: list[Callable[[], Any]] = [
            lambda: storage.put(name, b"x"),
            lambda: storage.put_new(name, b"x"),
            lambda: storage.replace(name, b"x"),
            lambda: storage.put_from(name).__enter__(),
            lambda: storage.begin(name),
            lambda: storage.delete(name),
            lambda: storage.retract(name),
            lambda: storage.restore(name, "a"),
            lambda: storage.restore("a", name),
            lambda: storage.publish(name, "a", "record", b"x", []),
            lambda: storage.publish("a", name, "record", b"x", []),
            lambda: storage.get(name),
            lambda: storage.size_bytes(name),
            lambda: storage.open(name).__enter__(),
        ]
        if name not in UNSHOWABLE_NAMES:  # other writers' groups have such names
            attempts.append(lambda: storage.under(name))
        storage.begin("a")
        for attempt in attempts:
            with pytest.raises(ValueError, match="name"):
                attempt()
        assert [each.name for each in storage.list()] == ["a"]

    def test_what_is_missing_is_told_by_its_name(self, storage: Storage) -> None:
        """Reading what is not there is FileNotFoundError with the full name in `filename`."""
        for name in ("a", "g/a"):
            attempts: list[Callable[[], Any]] = [
                lambda name=name: storage.get(name),  # type: ignore[misc]  # mypy: no default here
                lambda name=name: storage.size_bytes(name),  # type: ignore[misc]
                lambda name=name: storage.open(name).__enter__(),  # type: ignore[misc]
            ]
            storage.begin("g")
            for attempt in attempts:
                with pytest.raises(FileNotFoundError) as caught:
                    attempt()
                assert caught.value.filename == storage.where(name)

    # -- ranges ----------------------------------------------------------------------------------

    def test_ranges_are_filled_and_never_short(self, storage: Storage) -> None:
        """Memory is filled in order from any offset; a smaller count means the object ended."""
        content = bytes(range(256)) * 5000
        storage.put("a", content)
        with storage.open("a") as source:
            for offset, sizes in (
                (0, (1, 0, 700, 3)), (255, (1_000_000,)), (77, tuple(range(2000))),
                (len(content) - 5, (3, 10, 4)), (len(content), (5,)), (len(content) + 9, (5,)),
            ):  # fmt: skip
                memory = [bytearray(b"-" * size) for size in sizes]
                count = source.get_into(offset, [memoryview(each) for each in memory])
                expected = content[offset : offset + sum(sizes)]
                assert count == len(expected)
                assert b"".join(memory) == expected.ljust(sum(sizes), b"-")

    def test_many_read_at_once(self, storage: Storage) -> None:
        """Readers on threads of their own do not disturb each other."""
        content = bytes(range(256)) * 4096
        storage.put("a", content)
        wrong: list[int] = []

        def read(number: int) -> None:
            for turn in range(_ROUNDS):
                offset, memory = (number * 9973 + turn * 31) % 500_000, bytearray(100_000)
                with storage.open("a") as source:
                    source.get_into(offset, [memoryview(memory)])
                if memory != content[offset : offset + len(memory)]:
                    wrong.append(number)

        _run(read, 8)
        assert wrong == []

    def test_mapped_memory_is_a_copy_that_stays(self, storage: Storage) -> None:
        """Mapped bytes outlive source and object; writing to them changes no object."""
        content = bytes(range(256)) * 1000
        storage.put("a", content)
        with storage.open("a") as source:
            memory = source.map()
        memory[:3] = b"new"
        assert storage.get("a") == content
        storage.delete("a")
        assert memory[3:] == content[3:]

    # -- one creator, whole or absent ------------------------------------------------------------

    def test_only_the_first_creates(self, storage: Storage) -> None:
        """A second creation of a name is FileExistsError, and changes nothing."""
        storage.put_new("a", b"first")
        with pytest.raises(FileExistsError):
            storage.put_new("a", b"second")
        assert storage.get("a") == b"first"

    def test_one_of_many_threads_creates(self, storage: Storage) -> None:
        """Of threads that create one name at once exactly one succeeds, with its own bytes."""
        winners: dict[str, list[int]] = {f"claim_{turn}": [] for turn in range(_ROUNDS)}
        barrier = threading.Barrier(8)

        def create(number: int) -> None:
            for name, won in winners.items():
                barrier.wait()
                with suppress(FileExistsError):
                    storage.put_new(name, _mark(number))
                    won.append(number)

        _run(create, 8)
        for name, won in winners.items():
            assert len(won) == 1, name
            assert storage.get(name) == _mark(won[0])

    def test_one_of_many_processes_creates(
        self, storage: Storage, open_storage: OpenStorage
    ) -> None:
        """The same among processes."""
        if not self.is_shared:
            pytest.skip("this storage is of one process")
        names = [f"claim_{turn}" for turn in range(_ROUNDS)]
        context = multiprocessing.get_context("spawn")
        barrier, outcomes = context.Barrier(3), context.SimpleQueue()
        processes = [
            context.Process(target=_race, args=(open_storage, names, number, barrier, outcomes))
            for number in range(3)
        ]
        for process in processes:
            process.start()
        found = dict(outcomes.get() for _ in processes)
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        for name in names:
            won = [number for number, created in found.items() if name in created]
            assert len(won) == 1, name
            assert storage.get(name) == _mark(won[0])

    def test_a_created_object_is_never_seen_in_part(self, storage: Storage) -> None:
        """A reader sees a name that is being created as absent or whole."""
        names = [f"claim_{turn}" for turn in range(_ROUNDS)]
        with _watching(storage, names) as seen:
            for number, name in enumerate(names):
                storage.put_new(name, _mark(number))
        assert seen <= {_mark(number) for number in range(_ROUNDS)}

    def test_a_replaced_object_is_old_or_new(self, storage: Storage) -> None:
        """A reader of a name that is being replaced sees one version, whole, and never none."""
        storage.replace("hint", _mark(0))
        with _watching(storage, ["hint"], may_be_absent=False) as seen:
            for number in range(_ROUNDS):
                storage.replace("hint", _mark(number))
        assert seen <= {_mark(number) for number in range(_ROUNDS)}
        assert storage.get("hint") == _mark(_ROUNDS - 1)
        assert [each.name for each in storage.list()] == ["hint"]

    # -- groups ----------------------------------------------------------------------------------

    def test_a_begun_group_is_seen_by_others(
        self, storage: Storage, open_storage: OpenStorage
    ) -> None:
        """Another client of the storage sees a begun group, and can put objects into it."""
        group = pending_name("g")
        assert not storage.has_group(group)
        storage.begin(group)
        other = open_storage()
        assert other.has_group(group)
        other.under(group).put("state/a", b"x")
        assert storage.under(group).get("state/a") == b"x"

    def test_a_group_is_published_whole(self, storage: Storage) -> None:
        """Under its final name it holds all that was put, and the record; its old name is gone."""
        group = _begin(storage, "g", {"a": b"1", "state/b": b"2"})
        assert storage.publish(group, "g", "record", b"all", ["a", "state/b"]) is None
        assert _content(storage.under("g")) == {"a": b"1", "record": b"all", "state/b": b"2"}
        assert [(each.name, each.is_group) for each in storage.list()] == [("g", True)]
        assert not storage.has_group(group)

    def test_a_reader_of_the_record_sees_everything(self, storage: Storage) -> None:
        """At no moment is a record visible under the final name without what it needs."""
        groups = [
            _begin(storage, f"g_{turn}", {"a": b"1", "state/b": b"2"}) for turn in range(_ROUNDS)
        ]
        wrong: list[str] = []
        done = threading.Event()

        def look() -> None:
            while not done.is_set():
                for each in storage.list():
                    if each.name in names and each.is_group:
                        found = _content(storage.under(each.name))
                        if found != {"a": b"1", "record": b"all", "state/b": b"2"}:
                            wrong.append(each.name)

        names = {f"g_{turn}" for turn in range(_ROUNDS)}
        looker = threading.Thread(target=look)
        looker.start()
        for turn, group in enumerate(groups):
            storage.publish(group, f"g_{turn}", "record", b"all", ["a", "state/b"])
            assert f"g_{turn}" in {each.name for each in storage.list()}
        done.set()
        looker.join(60)
        assert wrong == []

    def test_a_successor_takes_the_name(self, storage: Storage) -> None:
        """A group that is replaced stays readable under the name that is returned."""
        for version in (b"old", b"new"):
            group = _begin(storage, "g", {"a": version})
            replaced = storage.publish(group, "g", "record", version, ["a"])
        assert replaced is not None
        assert _content(storage.under("g")) == {"a": b"new", "record": b"new"}
        assert _content(storage.under(replaced)) == {"a": b"old", "record": b"old"}
        storage.delete(replaced)
        assert [each.name for each in storage.list()] == ["g"]

    def test_a_failed_publication_keeps_what_was_there(self, storage: Storage) -> None:
        """Publishing a group that is gone is an OSError; the earlier one is still there."""
        storage.publish(_begin(storage, "g", {"a": b"old"}), "g", "record", b"old", ["a"])
        with pytest.raises(OSError, match=r"."):
            storage.publish(pending_name("g"), "g", "record", b"new", [])
        assert _content(storage.under("g")) == {"a": b"old", "record": b"old"}

    def test_a_replaced_group_gets_its_name_back(self, storage: Storage) -> None:
        """It does if no group has that name, and leaves one that has it alone."""
        for version in (b"old", b"new"):
            group = _begin(storage, "g", {"a": version})
            replaced = storage.publish(group, "g", "record", version, ["a"])
        assert replaced is not None
        storage.restore(replaced, "g")
        assert storage.under("g").get("record") == b"new"
        storage.delete(storage.retract("g"))
        storage.restore(replaced, "g")
        assert _content(storage.under("g")) == {"a": b"old", "record": b"old"}
        assert [each.name for each in storage.list()] == ["g"]

    def test_a_retracted_group_is_no_longer_there(self, storage: Storage) -> None:
        """Its name is free at once; what is left, under another name, is the caller's to delete."""
        storage.publish(_begin(storage, "g", {"a": b"x"}), "g", "record", b"all", ["a"])
        left = storage.retract("g")
        assert [each.name for each in storage.list()] == [left]
        assert left.startswith(pending_name("g")[:-8])
        with pytest.raises(FileNotFoundError):
            storage.under("g").get("record")
        storage.delete(left)
        assert storage.list() == []

    # -- names -----------------------------------------------------------------------------------

    def test_a_list_has_everything_by_name(self, storage: Storage) -> None:
        """It has each object and group directly below the root, once and in order."""
        for number in (3, 1, 2):
            storage.put(f"object_{number}", b"x")
            _begin(storage, "", {"a": b"1", "state/b": b"2"}, group=f"group_{number}")
        storage.begin("empty")
        assert [(each.name, each.is_group) for each in storage.list()] == [
            ("empty", True), ("group_1", True), ("group_2", True), ("group_3", True),
            ("object_1", False), ("object_2", False), ("object_3", False),
        ]  # fmt: skip

    def test_what_is_deleted_is_gone_and_nothing_else(self, storage: Storage) -> None:
        """Objects and whole groups go; what is absent is fine; similar names stay."""
        for name in ("a", "ab", "b"):
            storage.put(name, b"x")
        for group in ("g", "gh"):
            _begin(storage, "", {"a": b"1", "state/b": b"2"}, group=group)
        for _ in range(2):
            for name in ("a", "g", "absent"):
                storage.delete(name)
        assert [each.name for each in storage.list()] == ["ab", "b", "gh"]
        assert _content(storage.under("gh")) == {"a": b"1", "state/b": b"2"}
        storage.under("gh").delete("state/b")
        assert storage.under("gh").get("a") == b"1"


def _begin(storage: Storage, name: str, objects: dict[str, bytes], group: str = "") -> str:
    """Begin a group, pending by default, that holds some objects, and return its name."""
    group = group or pending_name(name)
    storage.begin(group)
    for each, content in objects.items():
        storage.under(group).put(each, content)
    return group


def _content(storage: Storage) -> dict[str, bytes]:
    """Return every object of a group by name, two levels deep."""
    found = {}
    for each in storage.list():
        if each.is_group:
            inner = storage.under(each.name).list()
            found.update({f"{each.name}/{name.name}": b"" for name in inner})
        else:
            found[each.name] = b""
    return {name: storage.get(name) for name in sorted(found)}


def _mark(number: int) -> bytes:
    """Return a content too long to be written at once by chance, different for each number."""
    return b"%08d" % number * 20_000


@contextmanager
def _watching(
    storage: Storage, names: list[str], *, may_be_absent: bool = True
) -> Iterator[set[bytes]]:
    """Read objects again and again on a thread meanwhile; yield the contents that were seen."""
    seen: set[bytes] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for name in names:
                try:
                    seen.add(storage.get(name))
                except FileNotFoundError:
                    if not may_be_absent:
                        seen.add(b"absent")

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join(60)


def _run(work: Callable[[int], None], count: int) -> None:
    """Run work on several threads and raise the first error."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  # raised below, on the test's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    if errors:
        raise errors[0]


def _race(
    open_storage: OpenStorage, names: list[str], number: int, barrier: Any, outcomes: Any
) -> None:
    """Create each name at the same time as other processes, and send those that succeeded."""
    storage, created = open_storage(), []
    for name in names:
        barrier.wait(60)
        with suppress(FileExistsError):
            storage.put_new(name, _mark(number))
            created.append(name)
    outcomes.put((number, created))
