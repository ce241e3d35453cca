"""The rank runner itself: a test that cannot fail would prove nothing about those that use it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.support.ranks import RankExit, RanksFailedError, run_program, run_ranks


def _sum_ranks(start: int) -> tuple[int, int]:
    total = torch.tensor(start + distributed.get_rank())
    distributed.all_reduce(total)
    return os.getpid(), int(total)


def _return_rank(start: int) -> int:
    return start + distributed.get_rank()


def test_every_rank_is_a_process_of_one_group() -> None:
    """Results come in rank order from different processes that reached one another."""
    results = run_ranks(_sum_ranks, 3, 10)
    assert [total for _, total in results] == [33, 33, 33]
    assert len({pid for pid, _ in results} | {os.getpid()}) == 4


def test_several_targets_share_one_launch() -> None:
    """Each target gives its own list, from the same processes; a target may be a name."""
    sums, ranks = run_ranks([_sum_ranks, "tests.support.test_ranks:_return_rank"], 2, 5)
    assert [total for _, total in sums] == [11, 11]
    assert ranks == [5, 6]


def _fail_on_rank_one() -> None:
    if distributed.get_rank() == 1:
        raise FileNotFoundError(2, "gone", "/nowhere")
    distributed.barrier()


def test_a_failing_rank_shows_its_traceback() -> None:
    """The error has the failing rank's traceback and chains its exception; nobody waits for it."""
    began = time.monotonic()
    with pytest.raises(RanksFailedError, match="rank 1 raised") as caught:
        run_ranks(_fail_on_rank_one, 2, timeout_seconds=60)
    assert "in _fail_on_rank_one" in str(caught.value)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert time.monotonic() - began < 30


def _wait_for_ever() -> None:
    threading.Thread(target=_sleep_in_a_thread, daemon=True).start()
    if distributed.get_rank() == 0:
        distributed.barrier()
    else:
        time.sleep(600)


def _sleep_in_a_thread() -> None:
    time.sleep(600)


def test_a_hang_ends_in_the_stacks_of_all_threads() -> None:
    """At the deadline every rank shows where each of its threads is, and is gone."""
    with pytest.raises(RanksFailedError, match=r"ranks \[0, 1\] did not end in time") as caught:
        run_ranks(_wait_for_ever, 2, timeout_seconds=3)
    for each in caught.value.exits:
        assert each.signal is signal.SIGABRT
        assert "in _wait_for_ever" in each.output
        assert "in _sleep_in_a_thread" in each.output
    assert "in barrier" in caught.value.exits[0].output


def _stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_stopped_rank_is_killed() -> None:
    """A rank that cannot even show its stacks does not outlive the deadline."""
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(_stop_itself, 1, timeout_seconds=2)
    assert caught.value.exits[0].signal is signal.SIGKILL


def _die_on_rank_one(how: str) -> str:
    print("last words")  # noqa: T201  # must not be lost in a buffer
    if distributed.get_rank() == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)
    return "lives"


@pytest.mark.parametrize(("how", "exit_code"), [("kill", -signal.SIGKILL), ("exit", 7)])
def test_a_rank_may_die(how: str, exit_code: int) -> None:
    """A death that is allowed is reported in place of the value, with what the rank had said."""
    assert run_ranks(_die_on_rank_one, 2, how, may_die={1}) == [
        "lives",
        RankExit(1, exit_code, "last words\n"),
    ]


def test_an_unexpected_death_is_an_error() -> None:
    """A rank that dies without being allowed to is no success."""
    with pytest.raises(RanksFailedError, match=r"rank 1 died with exit code -9(.|\n)*last words"):
        run_ranks(_die_on_rank_one, 2, "kill")


def _assert_false() -> None:
    raise AssertionError("a claim of the test")


def test_an_exception_is_no_death() -> None:
    """A rank that may die still may not fail."""
    with pytest.raises(RanksFailedError, match="a claim of the test"):
        run_ranks(_assert_false, 1, may_die={0})


def test_what_no_rank_can_import_is_refused() -> None:
    """A lambda or a nested function is refused before anything starts."""
    with pytest.raises(ValueError, match="not at the top level"):
        run_ranks(lambda: None, 1)


PROGRAM = """
from torch import distributed
distributed.init_process_group("gloo")
distributed.barrier()
print("rank", distributed.get_rank())
distributed.destroy_process_group()
"""


def test_a_program_runs_on_ranks(tmp_path: Path) -> None:
    """A program is one group of fresh interpreters that only need to initialise it."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    exits = run_program([script], 2)
    assert [each.exit_code for each in exits] == [0, 0]
    assert ["rank 0\n" in exits[0].output, "rank 1\n" in exits[1].output] == [True, True]


def test_a_program_that_fails_is_an_error_unless_it_may() -> None:
    """An exit code other than 0 raises, or is reported where it was expected."""
    with pytest.raises(RanksFailedError, match=r"rank 0 died with exit code 3(.|\n)*words"):
        run_program(["-c", "import sys; print('words'); sys.exit(3)"])
    (ended,) = run_program(["-c", "import sys; sys.exit(3)"], may_die={0})
    assert (ended.exit_code, ended.signal) == (3, None)


def test_a_program_that_hangs_shows_its_stacks() -> None:
    """At the deadline a program shows where each of its threads is."""
    program = "import time\ndef linger(): time.sleep(600)\nlinger()"
    with pytest.raises(RanksFailedError, match=r"ranks \[0\] did not end in time") as caught:
        run_program(["-c", program], timeout_seconds=4)
    assert "in linger" in caught.value.exits[0].output
