"""The proxy of the scaling benchmark counts what the store's server is sent."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
from torch.distributed import TCPStore

from benchmarks.scale import growth
from benchmarks.store_proxy import Framing, serve_proxy


@pytest.fixture
def proxied() -> Iterator[tuple[Connection, Any]]:
    """The pipe of a proxy in front of a real server, and a client that knows the proxy alone."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mine, theirs = Pipe()
    arguments = ("127.0.0.1", server.port), 0.0, theirs
    thread = threading.Thread(target=serve_proxy, args=arguments, daemon=True)
    thread.start()
    first, _ = mine.recv()
    timeout = timedelta(seconds=20)
    client = TCPStore("127.0.0.1", first, wait_for_workers=False, timeout=timeout)
    mine.send("counts")
    mine.recv()
    yield mine, client
    mine.close()
    thread.join(20)
    assert not thread.is_alive()


def test_each_call_is_counted_as_the_requests_it_becomes(proxied: tuple[Connection, Any]) -> None:
    """Also a value of many packets; a get is two requests, which a count of calls would miss."""
    pipe, client = proxied
    calls = [
        (lambda: client.set("a", b"x" * 3_000_000), {"set": 1}),
        (lambda: client.get("a"), {"wait": 1, "get": 1}),
        (lambda: client.add("n", 1), {"add": 1}),
        (lambda: client.check(["a"]), {"check": 1}),
        (lambda: client.wait(["a", "n"]), {"wait": 1}),
        (lambda: client.append("l", b"y"), {"append": 1}),
        (lambda: client.multi_set(["b", "c"], [b"1", b"2"]), {"multi_set": 1}),
        (lambda: client.multi_get(["b", "c"]), {"wait": 1, "multi_get": 1}),
        (lambda: client.delete_key("b"), {"delete": 1}),
    ]
    for call, expected in calls:
        call()
        client.check(["z"])  # a request without an answer has passed when the next one is answered
        pipe.send("counts")
        first, others = pipe.recv()
        assert first.requests == Counter(expected) + Counter({"check": 1})
        assert (others.total, others.sent_bytes) == (0, 0)
        assert first.total == sum(expected.values()) + 1
    client.get("a")
    pipe.send("counts")
    assert pipe.recv()[0].received_bytes > 3_000_000


def test_a_request_may_come_in_pieces_or_with_others() -> None:
    """However the bytes are cut; bytes of another protocol are refused."""
    key, number = (3).to_bytes(8, "little") + b"key", (1).to_bytes(8, "little")
    stream = b"\x01" + key + key + b"\x04" + key + number + b"\x06" + number + key
    for size in (1, 7, len(stream)):
        framing, found = Framing(), []
        for start in range(0, len(stream), size):
            found += framing.feed(stream[start : start + size])
        assert found == ["set", "add", "wait"]
    with pytest.raises(ValueError, match="unknown"):
        Framing().feed(b"\xff")


def test_growth_is_the_exponent_of_the_ranks() -> None:
    """What is constant has 0, what is proportional 1; nothing is fitted to one point."""
    sizes = [64, 256, 1024]
    assert growth(sizes, [5.0, 5.0, 5.0]) == pytest.approx(0)
    assert growth(sizes, [3.0 * each for each in sizes]) == pytest.approx(1)
    assert math.isnan(growth([64], [1.0]))
