"""The small HTTP layer between uvicorn (ASGI) and the endpoints: routes, one request, and the guard.

Plain ASGI without a framework, because every answer, also to nonsense, has OpenAI's error shape, bodies are
bounded before they are buffered, and streams are written under a deadline.

    Guard    host ─▶ origin ─▶ key          decides whether a request may enter; what a route needs is
                                            a property of the Route (``access``), never of a handler
    Exchange one request and its answer     body in, JSON or a stream out, exactly one answer
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from lowbit.server.api_error import ApiError, ClientGoneError
from lowbit.server.elsewhere import what_instead
from lowbit.server.limits import Limits, MiB
from lowbit.server.strict_json import Document, parse

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

ABORT_EXTENSION = "lowbit.abort"  # connection.py puts the transport's abort() into the scope under this name
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_INLINE_JSON_BYTES = 256 * 1024  # larger bodies are parsed in a thread
_ENCODER = msgspec.json.Encoder()

Access = Literal["public", "key", "admin"]


@dataclass(frozen=True)
class Route:
    """One endpoint. ``access``: "public" needs nothing; "key" an API key where keys are set; "admin" the
    same, and without keys it is closed unless the server listens on this machine only.

    ``while_draining``: probes and metrics answer to the end. ``path`` ending in "/*" takes the rest.
    """

    method: str
    path: str
    handler: Callable[[Any, Exchange], Awaitable[None]]  # (the App, the request)
    access: Access
    while_draining: bool = False

    def matches(self, path: str) -> bool:
        """Whether ``path`` is this route's."""
        if self.path.endswith("/*"):
            return path.startswith(self.path[:-1]) and len(path) > len(self.path) - 1
        return path == self.path


def find_route(routes: Iterable[Route], method: str, path: str) -> Route:
    """The route of a request; 404 or 405 in OpenAI's shape. HEAD goes where GET goes."""
    wanted = "GET" if method == "HEAD" else method
    routes = list(routes)
    allowed = [route for route in routes if route.matches(path)]
    for route in allowed:
        if route.method == wanted:
            return route
    if allowed:
        methods = ", ".join(route.method for route in allowed)
        raise ApiError(405, "method_not_allowed", f"{path} takes {methods}, not {method}")
    raise ApiError(404, "not_found", what_instead(path, [route.path for route in routes]))


class QueuedBytes:
    """Bytes of all request bodies in progress, bounded together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, count: int) -> None:
        """Reserve ``count`` bytes, or 429."""
        if self.held + count > self.limit:
            raise ApiError(
                429,
                "overloaded",
                f"requests in progress hold {self.held // MiB} of {self.limit // MiB} MiB; retry after 1 s",
                retry_after=1,
                close=True,
            )
        self.held += count

    def release(self, count: int) -> None:
        """Give them back."""
        self.held -= count


class Exchange:
    """One HTTP request and its answer."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, limits: Limits, queued: QueuedBytes
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._limits = limits
        self._queued = queued
        self._held = 0
        self._body_read = False
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            self.headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        wish = self.headers.get("x-request-id", "")
        self.request_id = wish if _REQUEST_ID.match(wish) else uuid.uuid4().hex
        self.cache_salt = ""  # the API key's, set by the guard
        self.status = 0  # of the answer; 0 = none yet
        self.finished = False
        self.closing = False  # tell the client to open a new connection next time
        self.log: dict[str, object] = {}  # what handlers add to the access line

    # --- in ---

    async def read_json(self) -> Document:
        """The body as strict JSON."""
        body = await self.read_body()
        return parse(body) if len(body) < _INLINE_JSON_BYTES else await asyncio.to_thread(parse, body)

    async def read_body(self) -> bytes:
        """The body, refused before it is buffered if it is too large or compressed."""
        if (encoding := self.headers.get("content-encoding", "identity").strip().lower()) != "identity":
            text = f"the body is encoded as '{encoding}'; send it plain"
            raise ApiError(415, "unsupported_encoding", text, close=True)
        declared = self.headers.get("content-length", "")
        if declared.isdigit():
            self._refuse_above_limit(int(declared))
            self._hold(int(declared))
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self._refuse_above_limit(size)
                    if size > self._held:
                        self._hold(size - self._held)
                    if not message.get("more_body", False):
                        self._body_read = True
                        return b"".join(parts)
        except TimeoutError:
            text = f"the body did not arrive within {self._limits.body_seconds:g} s"
            raise ApiError(408, "body_timeout", text, close=True) from None

    def _refuse_above_limit(self, size: int) -> None:
        limit = self._limits.body_bytes
        if size > limit:
            text = f"body is {size / MiB:.1f} MiB, limit {limit / MiB:g} MiB"
            raise ApiError(413, "body_too_large", text, close=True)

    def _hold(self, count: int) -> None:
        self._queued.take(count)
        self._held += count

    def release(self) -> None:
        """The request is over: its bytes no longer count."""
        self._queued.release(self._held)
        self._held = 0

    @contextlib.asynccontextmanager
    async def cancelled_if_client_leaves(self) -> AsyncIterator[None]:
        """Within, a closed connection ends the handler with ClientGoneError."""
        task = asyncio.current_task()
        assert task is not None
        left = False

        async def watch() -> None:
            nonlocal left
            while (await self._receive())["type"] != "http.disconnect":
                pass
            if not self.finished:
                left = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if left:
                task.uncancel()
                raise ClientGoneError from None
            raise
        finally:
            watcher.cancel()

    # --- out ---

    async def send_json(
        self, value: object, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """A whole answer."""
        await self.send_bytes(_ENCODER.encode(value), b"application/json", status, headers)

    async def send_bytes(
        self, body: bytes, kind: bytes, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """A whole answer of any type. After an unread body the connection closes, lingering a moment so
        that a client still sending gets to read the answer instead of a reset."""
        unread = not self._body_read and self.method not in ("GET", "HEAD")
        extra = [*headers, (b"content-length", str(len(body)).encode())]
        if unread:
            self.closing = True
        await self._start(status, kind, extra)
        if unread:
            await self._send_part(body, more=True)
            await self._discard_body()
            body = b""
        await self._finish(body)

    async def _start(self, status: int, kind: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
        lines = [
            (b"content-type", kind),
            (b"x-request-id", self.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            *headers,
        ]
        if self.closing and not any(name == b"connection" for name, _ in lines):
            lines.append((b"connection", b"close"))
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": lines})

    async def _discard_body(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.linger_seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return

    async def start_stream(self) -> None:
        """Headers of a server-sent event stream."""
        headers = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await self._start(200, b"text/event-stream; charset=utf-8", headers)

    async def send_part(self, data: bytes, watch: Callable[[Callable[[], None] | None], None]) -> None:
        """A piece of a stream. Who does not read within ``send_seconds`` is given up, or at once when the
        function handed to ``watch`` is called (too much text waits behind this piece)."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._limits.send_seconds) as deadline:
                watch(lambda: deadline.reschedule(loop.time()))
                await self._send_part(data, more=True)
        except TimeoutError:
            self.abort()
            raise ClientGoneError from None
        finally:
            watch(None)

    async def _send_part(self, data: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def finish_stream(self, data: bytes = b"") -> None:
        """The last piece."""
        await self._finish(data)

    async def _finish(self, data: bytes) -> None:
        self.finished = True  # before the last send: from then on a disconnect is no news
        try:
            async with asyncio.timeout(self._limits.send_seconds):
                await self._send_part(data, more=False)
        except TimeoutError:
            self.abort()
            raise ClientGoneError from None

    def abort(self) -> None:
        """Drop the connection without waiting for a client that does not read."""
        extension = self._scope.get("extensions", {}).get(ABORT_EXTENSION)
        if extension:
            extension["abort"]()


class Guard:
    """Who may enter: Host header (against DNS rebinding), origin (against other web pages), key."""

    def __init__(self, host: str, allowed_hosts: str, keys: Iterable[str]) -> None:
        self.keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._hosts = {name.strip().lower() for name in allowed_hosts.split(",") if name.strip()}
        self._any_host = "*" in self._hosts
        self._hosts |= {"localhost", host.lower(), socket.gethostname().lower()}
        self.local_only = is_loopback(host)

    def check(self, exchange: Exchange, route: Route) -> None:
        """Raises the ApiError that refuses; sets the cache salt of the key."""
        if not (route.while_draining and route.access == "public" and "host" not in exchange.headers):
            self._check_host(exchange)  # probes of HTTP/1.0 bring none
        self._check_origin(exchange)
        if route.access == "public":
            return
        if route.access == "admin" and not self.keys and not self.local_only:
            raise ApiError(
                403, "admin_closed", f"{route.path} is closed: start the server with --api-key-file"
            )
        if self.keys:
            if "authorization" not in exchange.headers:
                text = "no API key; send the header 'Authorization: Bearer KEY'"
                raise ApiError(401, "invalid_api_key", text)
            exchange.cache_salt = self._check_key(exchange.headers["authorization"])

    def _check_host(self, exchange: Exchange) -> None:
        host = exchange.headers.get("host", "")
        name = host_name(host)
        # An IP address cannot be rebound, and whoever brings the key is no rebound web page.
        if self._any_host or name in self._hosts or _is_address(name) or (self.keys and name):
            return
        text = f"Host '{host}' is not served here; start the server with --allowed-hosts {name or 'NAME'}"
        raise ApiError(421, "host_not_allowed", text)

    def _check_origin(self, exchange: Exchange) -> None:
        origin = exchange.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != exchange.headers.get("host", "").lower():
            raise ApiError(403, "cross_origin", "web pages of other origins may not use this server")

    def _check_key(self, authorization: str) -> str:
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.keys]  # all of them: constant time
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(401, "invalid_api_key", "invalid API key")
        return digest.hex()[:32]


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def now() -> float:
    """Monotonic seconds: a changed wall clock makes no timeout."""
    return time.monotonic()
