"""Sockets: the port, checked before anything is loaded, and uvicorn's HTTP/1.1 connection with bounds.

uvicorn parses HTTP and keeps connections; it bounds neither the size of headers nor the time they take. The
subclass here does, and refuses what nobody honest sends: pipelined requests (their sender could vanish
unnoticed) and connections beyond the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httptools
import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lowbit.errors import LowbitError, printable
from lowbit.server.api_error import ApiError
from lowbit.server.http import ABORT_EXTENSION
from lowbit.server.limits import Limits

_BACKLOG = 1024
_RESERVED_FILES = 32  # descriptors kept for the model's files, the engine's socket, logs
_PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, or the error that says who has the port. Port 0: any free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise LowbitError(
            "E0803",
            f"cannot listen on '{printable(host)}': {error.strerror}; use --host 127.0.0.1 or 0.0.0.0",
        ) from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise _listen_error(error, host, port) from None
    return sock


def _listen_error(error: OSError, host: str, port: int) -> LowbitError:
    if error.errno == errno.EADDRINUSE:
        owner = _owner_of_port(port)
        by = f" by {owner}" if owner else ""
        free = port + 1 if port < 65535 else port - 1
        return LowbitError("E0801", f"port {port} on {host} is in use{by}; use --port {free} or stop it")
    if error.errno == errno.EACCES:
        return LowbitError("E0802", f"port {port} needs root; use --port 8000")
    return LowbitError(
        "E0803", f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}; use --host 127.0.0.1"
    )


def _owner_of_port(port: int) -> str | None:
    """ "pid 4121 (python)": whoever listens on ``port``, as far as /proc lets us see."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:  # 0A = LISTEN
                    inodes.add(f"socket:[{columns[9]}]")
    for folder in Path("/proc").glob("[0-9]*/fd") if inodes else ():
        with contextlib.suppress(OSError):
            if any(os.readlink(link) in inodes for link in folder.iterdir()):
                name = (folder.parent / "comm").read_text().strip()
                return f"pid {folder.parent.name} ({printable(name, 40)})"
    return None


def connection_limit(wanted: int) -> int:
    """``wanted`` connections, or as many as the file descriptor limit leaves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return max(1, min(wanted, soft - _RESERVED_FILES))
    return wanted


class Connection(HttpToolsProtocol):
    """One client connection, with the limits of its class attribute."""

    limits = Limits()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._header_bytes = 0
        self._chunks = 0
        self._begun = False  # a request line has begun and its headers are not complete
        self._between = True  # no body is being received: the next bytes belong to headers
        self._header_timer: asyncio.TimerHandle | None = None
        self._flush_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse above the limit; headers must come soon."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
            return
        self._arm_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._disarm_header_timer()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, counting what it would buffer without limit while headers are incomplete."""
        if self.transport.is_closing():
            return
        if self._between and self._header_timer is None:
            self._arm_header_timer()  # a further request on a kept connection begins
        super().data_received(data)
        if self._begun and not self.transport.is_closing():
            self._header_bytes += len(data)
            if self._header_bytes > self.limits.header_bytes:
                self._refuse_headers()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._begun = True
        self._chunks = 0
        self.scope["extensions"] = {ABORT_EXTENSION: {"abort": self.transport.abort}}

    def on_headers_complete(self) -> None:
        """Hand the request to the application, unless its headers are too large or it was pipelined."""
        self._disarm_header_timer()
        self._begun = self._between = False
        self._header_bytes = 0
        if self.transport.is_closing():
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.header_bytes:
            self._refuse_headers()
        elif self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
        else:
            super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """One more piece of a chunked body."""
        self._chunks += 1
        if self._chunks > self.limits.body_chunks:
            text = f"the body comes in more than {self.limits.body_chunks} chunks"
            self._refuse(ApiError(400, "too_many_chunks", text))

    def on_body(self, body: bytes) -> None:
        """Body bytes; none after a refusal."""
        if self.cycle is not None and not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole; the next bytes are headers again."""
        self._between = True
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is written, though perhaps not sent: a client that does not read it is given up."""
        super().on_response_complete()
        self._watch_flush(self.transport.get_write_buffer_size())

    def _watch_flush(self, waiting: int) -> None:
        if waiting:
            self._flush_timer = self.loop.call_later(self.limits.send_seconds, self._check_flush, waiting)

    def _check_flush(self, before: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if waiting >= before:
            self.transport.abort()
        else:
            self._watch_flush(waiting)

    def send_400_response(self, msg: str) -> None:
        """What the parser could not read."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # an answer is under way: a second one would be read as part of it
        else:
            self._refuse(ApiError(400, "invalid_http", "this is not a valid HTTP/1.1 request"))

    def _refuse_headers(self) -> None:
        limit = self.limits.header_bytes // 1024
        self._refuse(ApiError(431, "headers_too_large", f"request headers are over {limit} KiB"))

    def _refuse(self, error: ApiError) -> None:
        """Answer by hand and close: the application never sees this request."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = msgspec.json.encode(error.body())
        lines = (
            b"HTTP/1.1 %d %s" % (error.status, _PHRASES[error.status]),
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
            b"",
            body,
        )
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()

    def _arm_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.limits.header_seconds, self._headers_late)

    def _disarm_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._between and not answering and not self.transport.is_closing():
            self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn's server; signals belong to ``app.serve``."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the handlers alone."""
        yield


def http_server(application: Any, limits: Limits) -> HttpServer:
    """A server for an ASGI application, without uvicorn's own logging, headers and websockets."""
    bounded = type("BoundedConnection", (Connection,), {"limits": limits})
    config = uvicorn.Config(
        application,
        http=bounded,
        loop="none",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(max(1, limits.keep_alive_seconds)),
        timeout_graceful_shutdown=1,
        backlog=_BACKLOG,
    )
    return HttpServer(config)


assert httptools  # uvicorn would silently fall back to a slower parser without it
