"""A proxy in front of a TCPStore that counts requests, and can delay each of them.

Owns the socket between clients and server: bytes are forwarded unchanged, and parsed on the way by
the store's own framing (`torch/csrc/distributed/c10d/TCPStoreBackend.hpp`), so that what is counted
is what the server is sent, whatever a client's Python calls became: a `get` is two requests there.
A request that cannot be parsed ends the proxy. Each listening port has counters of its own, which
tells rank 0 from the others. A delay holds each request for that long on its way to the server, and
those of different clients at the same time.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

_NUMBER = struct.Struct("<Q")
_NAMES = (
    *("validate", "set", "compare_set", "get", "add", "check", "wait", "count_keys", "delete"),
    *("append", "multi_get", "multi_set", "cancel_wait", "ping"),
)
_LIMIT = 1 << 40
_CHUNK_BYTES = 1 << 20


class Framing:
    """The requests in one client's stream of bytes, by name."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, content: bytes) -> list[str]:
        """Take more bytes; return the names of the requests that are complete now.

        Raises:
            ValueError: this is not the framing of a TCPStore.
        """
        self._rest += content
        found: list[str] = []
        while self._rest:
            name, end = self._next()
            if end is None:
                break
            found.append(name)
            self._rest = self._rest[end:]
        return found

    def _next(self) -> tuple[str, int | None]:
        kind = self._rest[0]
        if kind >= len(_NAMES):
            raise ValueError(f"request {kind} is unknown: another version of the store's protocol")
        name, end = _NAMES[kind], 1
        if name in ("validate", "ping"):
            return name, self._skip(end, 4)
        if name in ("cancel_wait", "count_keys"):
            return name, end
        strings = {"set": 2, "compare_set": 3, "append": 2}.get(name, 1)
        if name in ("check", "wait", "multi_get", "multi_set"):
            if (after := self._skip(end, _NUMBER.size)) is None:
                return name, None
            strings = _NUMBER.unpack_from(self._rest, end)[0] * (1 + (name == "multi_set"))
            end = after
        place: int | None = end
        for _ in range(strings):
            assert place is not None
            if (after := self._skip(place, _NUMBER.size)) is None:
                return name, None
            place = self._skip(after, _NUMBER.unpack_from(self._rest, place)[0])
            if place is None:
                return name, None
        assert place is not None
        return name, self._skip(place, _NUMBER.size) if name == "add" else place

    def _skip(self, place: int, size_bytes: int) -> int | None:
        if size_bytes > _LIMIT:
            raise ValueError(f"a length of {size_bytes} bytes: another framing")
        return place + size_bytes if place + size_bytes <= len(self._rest) else None


@dataclass
class Count:
    """What the clients of one port have sent and received since the last look."""

    requests: Counter[str] = field(default_factory=Counter)
    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def total(self) -> int:
        """All requests that a rank has made for a call; not those that open a connection."""
        return sum(each for name, each in self.requests.items() if name not in ("validate", "ping"))


@dataclass
class _End:
    """One socket of a pair."""

    socket: socket.socket
    port: int
    framing: Framing | None
    """Of the client's side; None: it is the server's."""
    other: Any = None
    unsent: bytearray = field(default_factory=bytearray)


class Proxy:
    """Forwards until its pipe is closed; any message on the pipe is answered by the counts."""

    def __init__(self, server: tuple[str, int], delay_seconds: float, ports: int = 2) -> None:
        self._server = server
        self._delay_seconds = delay_seconds
        self._listeners = []
        for _ in range(ports):
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            listener.listen(16384)
            listener.setblocking(False)
            self._listeners.append(listener)
        self.ports = [each.getsockname()[1] for each in self._listeners]
        self._counts = [Count() for _ in self._listeners]
        self._ends: dict[int, _End] = {}
        self._held: deque[tuple[float, _End, bytes]] = deque()
        self._epoll = select.epoll()

    def run(self, pipe: Connection) -> None:
        """Forward and count."""
        for each in self._listeners:
            self._epoll.register(each.fileno(), select.EPOLLIN)
        self._epoll.register(pipe.fileno(), select.EPOLLIN)
        listeners = {each.fileno(): number for number, each in enumerate(self._listeners)}
        while True:
            for descriptor, event in self._epoll.poll(0 if self._held else -1, 4096):
                if descriptor in self._ends:
                    self._serve(self._ends[descriptor], event)
                elif descriptor in listeners:
                    self._accept(listeners[descriptor])
                elif descriptor == pipe.fileno():
                    try:
                        pipe.recv()
                    except EOFError:
                        self._close_all()
                        return
                    pipe.send(self._counts)
                    self._counts = [Count() for _ in self._listeners]
            now = time.monotonic()
            while self._held and self._held[0][0] <= now:
                _, end, content = self._held.popleft()
                self._send(end, content)

    def _close_all(self) -> None:
        for end in list(self._ends.values()):
            self._close(end)
        for listener in self._listeners:
            listener.close()
        self._epoll.close()

    def _accept(self, port: int) -> None:
        while True:
            try:
                client, _ = self._listeners[port].accept()
            except BlockingIOError:
                return
            server = socket.create_connection(self._server)
            ends = (_End(client, port, Framing()), _End(server, port, None))
            for end, other in (ends, ends[::-1]):
                end.socket.setblocking(False)
                end.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.other = other
                self._ends[end.socket.fileno()] = end
                self._epoll.register(end.socket.fileno(), select.EPOLLIN)

    def _serve(self, end: _End, event: int) -> None:
        if event & select.EPOLLOUT:
            self._send(end, b"")
        if not event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            return
        try:
            content = end.socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        if not content:
            self._close(end)
            return
        count = self._counts[end.port]
        if end.framing is None:
            count.received_bytes += len(content)
            self._send(end.other, content)
            return
        count.sent_bytes += len(content)
        names = end.framing.feed(content)
        count.requests.update(names)
        if self._delay_seconds:
            self._held.append((time.monotonic() + self._delay_seconds, end.other, content))
        else:
            self._send(end.other, content)

    def _send(self, end: _End, content: bytes) -> None:
        if end.socket.fileno() < 0:
            return
        was_full = bool(end.unsent)
        end.unsent += content
        try:
            sent = end.socket.send(end.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(end)
            return
        del end.unsent[:sent]
        if was_full or end.unsent:
            wanted = select.EPOLLIN | (select.EPOLLOUT if end.unsent else 0)
            self._epoll.modify(end.socket.fileno(), wanted)

    def _close(self, end: _End) -> None:
        for each in (end, end.other):
            if each.socket.fileno() >= 0:
                self._ends.pop(each.socket.fileno(), None)
                self._epoll.unregister(each.socket.fileno())
                each.socket.close()


def serve_proxy(server: tuple[str, int], delay_seconds: float, pipe: Connection) -> None:
    """Be the process of a proxy: send its ports, then forward."""
    proxy = Proxy(server, delay_seconds)
    pipe.send(proxy.ports)
    proxy.run(pipe)
