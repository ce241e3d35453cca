"""Memory for snapshots: there when it is needed, not the children's, and never too much."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from holdfast.errors import CheckpointError, NotEnoughMemoryError
from holdfast.snapshot.arena import (
    Node,
    Room,
    allocate,
    check_room,
    find_room,
    prefer_huge_pages,
    touch,
)
from tests.support.mounts import small_memory
from tests.support.nodes import memory_directory
from tests.support.proc import in_fork, mapping_of

MIB = 1 << 20


# -- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, 5000, 8 * MIB + 3])
def test_memory_is_zero_writable_and_on_a_page(size_bytes: int) -> None:
    """What is allocated is of the size asked for, all zeros, and starts on a page."""
    memory = allocate(size_bytes)
    assert len(memory) == size_bytes
    assert not memory.readonly
    assert bytes(memory) == bytes(size_bytes)
    if size_bytes:
        assert ctypes.addressof(ctypes.c_char.from_buffer(memory)) % mmap.PAGESIZE == 0
        memory[size_bytes - 1] = 1


def test_pages_are_there_before_they_are_needed() -> None:
    """All pages are the process's own at once: the first write to them faults on none."""
    memory = allocate(8 * MIB)
    assert mapping_of(memory)["Rss"] >= len(memory)
    ones = b"\1" * len(memory)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory[:] = ones
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 500  # of 2048 pages


def test_memory_goes_with_its_last_view() -> None:
    """A view keeps the whole mapping; without any it is unmapped."""
    memory = allocate(4 * MIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    part = memory[-1:]
    del memory
    assert mapping_of(part)["Size"] >= 4 * MIB
    del part
    starts = [line.split("-")[0] for line in Path("/proc/self/maps").read_text().splitlines()]
    assert f"{address:x}" not in starts


# -- the processes of one node ---------------------------------------------------------------------

_SHARE = 96 * MIB
_SLACK = 32 * MIB
"""For what else this process takes or gives back meanwhile."""


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


class _Machine:
    """Memory that several allocate from at the same time, each by a lock of its own."""

    def __init__(self, free_bytes: int, patience: float) -> None:
        self._before = _resident_bytes()
        self._free_bytes = free_bytes
        self._meeting = threading.Barrier(2)
        self._patience = patience
        self.have_met = False
        self.taken: list[memoryview] = []

    def find_room(self) -> Room:
        """Say what is left; whoever asks waits a while for another who asks meanwhile."""
        free = self._free_bytes - (_resident_bytes() - self._before)
        with suppress(threading.BrokenBarrierError):
            self._meeting.wait(self._patience)
            self.have_met = True
        return Room(free, "a limit of this test")

    def allocate(self, lock: Path, processes: int | None) -> str:
        """Allocate a share; say how that went."""
        try:
            self.taken.append(allocate(_SHARE, Node(self.find_room, lock, processes)))
        except NotEnoughMemoryError:
            return "refused"
        return "taken"


@pytest.mark.parametrize("processes", [None, 2])
@pytest.mark.parametrize("shares", [1, 2, 4])
def test_what_others_allocate_at_the_same_time_counts(
    tmp_path: Path, shares: int, processes: int | None
) -> None:
    """Two that ask at once get what is there for both; where only one fits the other is refused."""
    is_roomy = processes is not None and shares >= processes
    machine = _Machine(shares * _SHARE + _SLACK, patience=20 if is_roomy else 0.3)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(machine.allocate, tmp_path / "lock", processes) for _ in range(2)]
        found = sorted(each.result() for each in asked)
    assert found == (["taken"] * 2 if shares >= 2 else ["refused", "taken"])
    if is_roomy:
        assert machine.have_met  # side by side where there is room for all
    if processes is None:
        assert not machine.have_met


def test_a_process_that_keeps_the_lock_is_not_waited_for_without_end(tmp_path: Path) -> None:
    """Where a process stops with the lock in its hand, the others go on and check alone."""
    lock = tmp_path / "lock"
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        node = Node(lambda: Room(2 * _SHARE, "a limit of this test"), lock, 1, 0.1)
        assert len(allocate(_SHARE, node)) == _SHARE


@pytest.mark.parametrize("kind", ["link", "no directory"])
def test_where_no_lock_can_be_had_memory_is_checked_alone(tmp_path: Path, kind: str) -> None:
    """A lock that cannot be taken costs the accounting between processes, and nothing else."""
    lock = tmp_path / "lock" if kind == "link" else tmp_path / "missing" / "lock"
    if kind == "link":
        lock.symlink_to(tmp_path / "elsewhere")
    machine = _Machine(_SHARE + _SLACK, patience=0)
    assert machine.allocate(lock, None) == "taken"
    assert machine.allocate(lock, None) == "refused"
    assert not (tmp_path / "elsewhere").exists()


# -- files in RAM --------------------------------------------------------------------------------

_THP = Path("/sys/kernel/mm/transparent_hugepage")


def _huge_shared_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next((line for line in lines if line.startswith("ShmemHugePages:")), "- 0")
    return int(found.split()[1]) << 10


def test_a_file_in_ram_has_huge_pages_where_the_kernel_gives_them() -> None:
    """Whole huge pages, whatever the mount says of them, and not a byte more than asked for."""
    release = tuple(int(each) for each in os.uname().release.split(".")[:2])
    if not (_THP / "hpage_pmd_size").exists() or release < (6, 1):
        pytest.skip("this kernel gives none by name")
    if "[deny]" in (_THP / "shmem_enabled").read_text():
        pytest.skip("this system denies them")
    size_bytes = 64 * MIB + 3 * mmap.PAGESIZE
    with memory_directory() as path, (path / "file").open("w+b") as stream:
        before = _huge_shared_bytes()
        prefer_huge_pages(stream.fileno(), size_bytes)
        assert _huge_shared_bytes() - before >= 32 * MIB  # of 64: others use them too
        os.posix_fallocate(stream.fileno(), 0, size_bytes)
        found = os.fstat(stream.fileno())
        assert (found.st_size, found.st_blocks * 512) == (size_bytes, size_bytes)
        assert (path / "file").read_bytes() == bytes(size_bytes)
        assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("size_bytes", [0, 1, MIB])
def test_a_small_file_is_left_as_it_is(size_bytes: int) -> None:
    """What is smaller than a huge page gets none, and no byte before its time."""
    with memory_directory() as path, (path / "file").open("w+b") as stream:
        prefer_huge_pages(stream.fileno(), size_bytes)
        assert os.fstat(stream.fileno()).st_size == 0


@pytest.mark.parametrize("size", ["16k", "6m"])
def test_where_there_is_no_room_allocating_says_so(tmp_path: Path, size: str) -> None:
    """Asking for huge pages fails silently, and leaves the error to what allocates the rest."""
    with small_memory(tmp_path / "memory", size) as path, (path / "file").open("w+b") as stream:
        prefer_huge_pages(stream.fileno(), 16 * MIB)
        with pytest.raises(OSError, match="No space left"):
            os.posix_fallocate(stream.fileno(), 0, 16 * MIB)


class _OldKernel(mmap.mmap):
    """A mapping on a kernel that knows no advice."""

    def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
        raise OSError(22, "Invalid argument")


def test_an_older_kernel_is_touched_by_hand() -> None:
    """Where the kernel cannot be asked for pages they are written to, with what they hold."""
    size_bytes = 64 * mmap.PAGESIZE
    pages = _OldKernel(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages[mmap.PAGESIZE] = 7
    touch(pages)
    assert mapping_of(memoryview(pages))["Private_Dirty"] >= size_bytes
    assert bytes(pages[:]) == bytes(mmap.PAGESIZE) + b"\7" + bytes(size_bytes - mmap.PAGESIZE - 1)


# -- children ------------------------------------------------------------------------------------


def test_a_forked_child_does_not_have_the_memory() -> None:
    """In a child there is no mapping where the parent's is, so it can never hold its pages."""
    memory = allocate(4 * MIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def starts() -> bool:
        return any(
            int(line.split("-")[0], 16) <= address < int(line.split()[0].split("-")[1], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
        )

    assert starts()
    with in_fork(starts) as child:
        assert child.result is False


def test_a_living_child_makes_nothing_copy_on_write() -> None:
    """While a child lives, writing to all of the memory faults on no page and takes no new one."""
    memory = allocate(8 * MIB)
    memory[:] = b"\1" * len(memory)
    others = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    others[:] = b"\1" * len(others)
    twos = b"\2" * len(memory)

    def faults(write: Callable[[], None]) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        write()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with in_fork(lambda: None):
        assert mapping_of(memory)["Private_Dirty"] >= len(memory)  # shared with nobody
        plain = faults(lambda: others.__setitem__(slice(None), twos))
        own = faults(lambda: memory.__setitem__(slice(None), twos))
    assert own < 100
    assert plain > own  # the measure sees a fork where there is one


# -- limits --------------------------------------------------------------------------------------


def _write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


MEMINFO = {"proc/meminfo": "MemTotal: 100 kB\nMemAvailable:     90 kB\nSwapFree: 7 kB\n"}
MACHINE = "the machine's available memory"

LIMITS: dict[str, tuple[dict[str, str], int | None, str]] = {
    "nothing is told": ({}, None, ""),
    "the machine alone": (MEMINFO, 90 << 10, MACHINE),
    "no limit": (
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/job\n",
            "groups/job/memory.max": "max\n",
            "groups/job/memory.current": "5\n",
        },
        90 << 10,
        MACHINE,
    ),
    "a group": (
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/job\n",
            "groups/job/memory.max": "5000\n",
            "groups/job/memory.current": "1000\n",
        },
        4000,
        "groups/job",
    ),
    "a looser group": (
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/job\n",
            "groups/job/memory.max": "5000000\n",
            "groups/job/memory.current": "1000\n",
        },
        90 << 10,
        MACHINE,
    ),
    "a group above": (
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/pod/job/step\n",
            "groups/pod/memory.max": "6000\n",
            "groups/pod/memory.current": "3500\n",
            "groups/pod/job/memory.max": "9000\n",
            "groups/pod/job/memory.current": "3000\n",
            "groups/pod/job/step/memory.max": "max\n",
            "groups/pod/job/step/memory.current": "3000\n",
        },
        2500,
        "groups/pod",
    ),
    "the root of a container": (
        {
            "proc/self/cgroup": "0::/\n",
            "groups/memory.max": "6000\n",
            "groups/memory.current": "1000\n",
        },
        5000,
        "groups",
    ),
    "a name from outside the container": (
        {
            "proc/self/cgroup": "0::/kubepods/pod1/x\n",
            "groups/memory.max": "6000\n",
            "groups/memory.current": "1000\n",
        },
        5000,
        "groups",
    ),
    "page cache is given back": (
        {
            "proc/self/cgroup": "0::/job\n",
            "groups/job/memory.max": "5000\n",
            "groups/job/memory.current": "4900\n",
            "groups/job/memory.stat": (
                "anon 1000\nfile 3900\nactive_file 1500\ninactive_file 2000\nfile_dirty 3\n"
            ),
        },
        3600,
        "groups/job",
    ),
    "over its limit": (
        {
            "proc/self/cgroup": "0::/job\n",
            "groups/job/memory.max": "5000\n",
            "groups/job/memory.current": "5100\n",
        },
        0,
        "groups/job",
    ),
    "version 1": (
        {
            **MEMINFO,
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/x\n1:name=systemd:/\n",
            "groups/memory/docker/x/memory.limit_in_bytes": "7000\n",
            "groups/memory/docker/x/memory.usage_in_bytes": "1000\n",
            "groups/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "groups/memory/memory.usage_in_bytes": "2000\n",
        },
        6000,
        "groups/memory/docker/x",
    ),
    "version 1 with the page cache of groups within": (
        {
            "proc/self/cgroup": "4:cpuset,memory:/docker/x\n",
            "groups/memory/docker/memory.limit_in_bytes": "7000\n",
            "groups/memory/docker/memory.usage_in_bytes": "6500\n",
            "groups/memory/docker/memory.stat": (
                "active_file 1\ninactive_file 2\ntotal_active_file 1000\ntotal_inactive_file 2000\n"
            ),
        },
        3500,
        "groups/memory/docker",
    ),
    "both versions": (
        {
            "proc/self/cgroup": "4:memory:/x\n0::/x\n",
            "groups/memory/x/memory.limit_in_bytes": "7000\n",
            "groups/memory/x/memory.usage_in_bytes": "1000\n",
        },
        6000,
        "groups/memory/x",
    ),
    "a limit without a usage": (
        {**MEMINFO, "proc/self/cgroup": "0::/job\n", "groups/job/memory.max": "5000\n"},
        90 << 10,
        MACHINE,
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_tightest_limit_counts(tmp_path: Path, name: str) -> None:
    """What is left is what the machine and every group around the process leave, less no cache."""
    files, free_bytes, limited_by = LIMITS[name]
    _write(tmp_path, files)
    room = find_room(tmp_path / "proc", tmp_path / "groups")
    if free_bytes is None:
        assert room is None
        return
    assert room is not None
    assert room.free_bytes == free_bytes
    if limited_by == MACHINE:
        assert room.limited_by == MACHINE
    else:
        limit = room.limited_by.split()
        assert limit[:2] == ["the", "limit"]
        assert limit[-1] == str(tmp_path / limited_by)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    """A size above what is left is an error that tells both, and what to do."""
    check_room(3 << 30, Room(3 << 30, "x"))
    with pytest.raises(NotEnoughMemoryError) as caught:
        check_room((3 << 30) + 1, Room(3 << 30, "the limit of 4 bytes of control group /a"))
    error = caught.value
    assert isinstance(error, CheckpointError)
    assert isinstance(error, MemoryError)
    assert (error.needed_bytes, error.free_bytes) == ((3 << 30) + 1, 3 << 30)
    text = str(error)
    assert text.count("3.00 GiB") == 2
    assert "control group /a" in text
    assert "async_save=false" in text


def test_this_machine_refuses_what_it_does_not_have() -> None:
    """An arena beyond the memory of the machine is refused before a page of it is touched."""
    room = find_room()
    assert room is not None
    assert 0 < room.free_bytes < 1 << 50
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(NotEnoughMemoryError) as caught:
        allocate(1 << 50)
    assert caught.value.needed_bytes == 1 << 50
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE >= caught.value.free_bytes
