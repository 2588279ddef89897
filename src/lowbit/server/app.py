"""The HTTP application, and ``serve``: port, engine process, signals, exit status.

    serve ─ listen (E0801 before anything is loaded)
          ├ HTTP server              answers from the first moment: 503 "loading" until the model is there
          ├ TextModel.load           tokenizer, template, sampling defaults; resolves the model's name
          ├ EngineClient.run         the engine process and its restarts
          └ SIGTERM: drain           not ready, no new requests; what runs has drain_timeout seconds

The process that runs this never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from lowbit.engine.messages import EngineProgress, EngineReady
from lowbit.errors import LowbitError, printable
from lowbit.server import admin, chat, completions, health, native, tokens
from lowbit.server.api_error import ApiError, ClientGoneError, to_api_error
from lowbit.server.connection import connection_limit, http_server, listen
from lowbit.server.engine_client import EngineClient
from lowbit.server.engine_start import EngineProcess
from lowbit.server.http import Exchange, Guard, QueuedBytes, Receive, Route, Scope, Send, find_route, now
from lowbit.server.limits import Limits
from lowbit.server.logs import configure, log
from lowbit.server.metrics import Metrics
from lowbit.server.protocol import GenerationFields, StreamOptions
from lowbit.server.text import Result, TextModel, Workers, served_name
from lowbit.settings import Settings

_CANCEL_SECONDS = 2.0  # for handlers to tell their clients that the server stops


ROUTES = (
    Route("POST", "/v1/chat/completions", chat.chat_completions, access="key"),
    Route("POST", "/v1/completions", completions.completions, access="key"),
    Route("POST", "/generate", native.generate, access="key"),
    Route("GET", "/v1/models", admin.models, access="key"),
    Route("GET", "/v1/models/*", admin.model, access="key"),
    *(Route("POST", path, tokens.tokenize, access="key") for path in ("/tokenize", "/v1/tokenize")),
    *(Route("POST", path, tokens.detokenize, access="key") for path in ("/detokenize", "/v1/detokenize")),
    Route("GET", "/tokenizer_info", tokens.tokenizer_info, access="key"),
    # SGLang's newer and older names
    *(Route("GET", path, admin.model_info, access="key") for path in ("/model_info", "/get_model_info")),
    *(Route("GET", path, admin.server_info, access="key") for path in ("/server_info", "/get_server_info")),
    Route("POST", "/flush_cache", admin.flush_cache, access="admin"),
    Route("GET", "/health_generate", health.generate, access="key"),
    Route("GET", "/health", health.health, access="public", while_draining=True),
    Route("GET", "/livez", health.live, access="public", while_draining=True),
    Route("GET", "/readyz", health.ready, access="public", while_draining=True),
    Route("GET", "/metrics", admin.metrics, access="key", while_draining=True),
    *(Route("GET", path, admin.static_file, access="public") for path in admin.STATIC_FILES),
)


class App:
    """The ASGI application: the routes, and what their handlers share."""

    def __init__(
        self,
        settings: Settings,
        limits: Limits,
        engine_command: Sequence[str] = (),
        engine: EngineProcess | None = None,
    ) -> None:
        self.settings = settings
        self.limits = limits
        self.model_name = served_name(settings)
        self.metrics = Metrics()
        self.client = EngineClient(settings, limits, self.metrics.hooks(), engine_command, engine)
        self.metrics.watch(self.client, self.model_name)
        self.workers = Workers()
        self.queued = QueuedBytes(limits.queued_bytes)
        self.guard = Guard(settings.host, settings.allowed_hosts, api_keys(settings))
        self.draining = False
        self.active = 0  # requests in handlers, probes not counted
        self._text: TextModel | None = None

    @property
    def text(self) -> TextModel:
        """The tokenizer and its kin; 503 until they are loaded."""
        if self._text is None:
            self.client.require_ready()
            raise ApiError(503, "loading", "the tokenizer is loading", retry_after=1)
        return self._text

    def loaded(self, text: TextModel) -> None:
        """The text parts are there; the engine may load the same files."""
        self._text = text
        resolved = replace(self.settings, model=text.root, revision=None, served_model_name=self.model_name)
        self.client.resolved(resolved)

    def check_model(self, model: str | None) -> None:
        """Requests name the served model, say "default", or nothing."""
        if model not in (None, "default", self.model_name):
            text = f"model '{printable(model)}' not served here; available: {self.model_name}"
            raise ApiError(404, "model_not_found", text, param="model")

    async def text_work(self, seconds: float, what: str, work: Callable[[], Result], param: str) -> Result:
        """Tokenizing or a template in a worker; what it refuses is the request's fault: 400."""
        try:
            return await self.workers.run(seconds, what, work)
        except LowbitError as error:
            raise ApiError(400, "text_refused", error.message, param=param) from None

    def stream_options(self, request: GenerationFields) -> StreamOptions:
        """What the request says of its stream, with usage where the server always gives it."""
        options = request.stream_options or StreamOptions()
        always = self.settings.stream_response_default_include_usage
        return msgspec.structs.replace(options, include_usage=options.include_usage or always)

    def new_id(self, prefix: str) -> str:
        """An id no other request has."""
        return f"{prefix}-{uuid.uuid4().hex}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: exactly one answer, whatever happens."""
        began = now()
        exchange = Exchange(scope, receive, send, self.limits, self.queued)
        path = "unknown"
        counted = False
        try:
            route = find_route(ROUTES, exchange.method, exchange.path)
            path = route.path
            self.guard.check(exchange, route)
            if self.draining and not route.while_draining:
                raise ApiError(503, "draining", "the server is shutting down", retry_after=5, close=True)
            if not route.while_draining:
                self.active += 1
                counted = True
            await route.handler(self, exchange)
        except ClientGoneError:
            exchange.log["error"] = "client_gone"
        except Exception as error:
            await self._answer_error(exchange, error)
        finally:
            self.active -= counted
            exchange.release()
            self._account(exchange, path, now() - began)

    async def _answer_error(self, exchange: Exchange, error: Exception) -> None:
        """The only place where an exception becomes an answer."""
        answer = to_api_error(error, exchange.request_id)
        exchange.log["error"] = answer.code
        if answer.code == "internal":
            unexpected = None if isinstance(error, ApiError) else error
            values = {"id": exchange.request_id, "path": exchange.path}
            logging.getLogger("lowbit.server").error(
                "unexpected error", exc_info=unexpected, extra={"values": values}
            )
        if exchange.status:  # an answer has begun: its end missing is all that can be told
            exchange.abort()
            return
        exchange.closing = exchange.closing or self.draining
        with contextlib.suppress(ClientGoneError):
            await exchange.send_json(answer.body(), answer.status, answer.headers())

    def _account(self, exchange: Exchange, path: str, seconds: float) -> None:
        status = exchange.status or 499  # nginx's number for a client that left before the answer
        self.metrics.answered(path, status, seconds)
        quiet = status == 200 and path in ("/health", "/livez", "/readyz", "/metrics")
        log(
            logging.DEBUG if quiet else logging.INFO,
            "request",
            id=exchange.request_id,
            method=exchange.method,
            path=path,
            status=status,
            ms=round(1000 * seconds, 1),
            **exchange.log,
        )


def api_keys(settings: Settings) -> list[str]:
    """The keys of --api-key and --api-key-file (one a line, empty lines and # comments skipped)."""
    keys = [settings.api_key] if settings.api_key else []
    if settings.api_key_file:
        try:
            text = Path(settings.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            where = printable(settings.api_key_file)
            raise LowbitError("E0300", f"cannot read --api-key-file {where}: {reason}") from None
        lines = (line.strip() for line in text.splitlines())
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            where = printable(settings.api_key_file)
            raise LowbitError("E0111", f"--api-key-file {where} holds no key; put one key on each line")
        keys += found
    return keys


def exposure_warning(settings: Settings, guard: Guard) -> str | None:
    """What to say when everybody may use the server."""
    if guard.keys or guard.local_only:
        return None
    return (
        f"--host {settings.host} without --api-key: anyone who can reach port {settings.port} "
        "can use this server; add --api-key-file to close it"
    )


def serve(
    settings: Settings,
    on_ready: Callable[[EngineReady, str], None] | None = None,
    *,
    on_progress: Callable[[int, int, str], None] | None = None,
    engine: EngineProcess | None = None,
    limits: Limits | None = None,
    engine_command: Sequence[str] = (),
    load_text: Callable[[Settings, Callable[[int, int, str], None] | None], TextModel] = TextModel.load,
) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. LowbitError when serving cannot begin or go on.

    ``on_ready`` gets the engine's limits and the server's URL, once; ``on_progress`` (done, total, what)
    while files are downloaded, from another thread, and while weights are loaded. ``engine``: the engine
    process, where it was started already; the caller ends it if this does not. The rest is for tests.
    """
    configure(settings.log_level)
    limits = limits or Limits.from_settings(settings)
    limits = replace(limits, connections=connection_limit(limits.connections))
    app = App(settings, limits, engine_command, engine)
    sock = listen(settings.host, settings.port)
    if warning := exposure_warning(settings, app.guard):
        with contextlib.suppress(OSError, ValueError):
            print(f"lowbit: warning: {warning}", file=sys.stderr, flush=True)
    port = sock.getsockname()[1]
    url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{port}"
    report = _harmless(on_progress) if on_progress is not None else None
    if on_ready is not None:
        announce = _harmless(on_ready)
        app.client.hooks.on_ready = lambda ready: announce(ready, url)
    if report is not None:

        def engine_progress(progress: EngineProgress) -> None:
            report(progress.done, progress.total, progress.what)

        app.client.hooks.on_progress = engine_progress
    log(logging.INFO, "listening", url=url)

    async def run() -> int:
        stop = Stop()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.ask)
        return await run_server(app, [sock], lambda: load_text(settings, report), stop)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _harmless(callback: Callable[..., None]) -> Callable[..., None]:
    """``callback`` whose failure is logged and no more: a closed terminal must not end the server."""

    def call(*arguments: object) -> None:
        try:
            callback(*arguments)
        except Exception as error:
            log(logging.WARNING, "callback failed", error=repr(error))

    return call


class Stop:
    """The wish to stop: once, drain; twice, at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurry = asyncio.Event()

    def ask(self) -> None:
        """A signal came."""
        (self.hurry if self.asked.is_set() else self.asked).set()


async def run_server(app: App, sockets: list[Any], load_text: Callable[[], TextModel], stop: Stop) -> int:
    """Everything that runs at the same time, from the first connection to the last."""
    server = http_server(app, app.limits)
    http = asyncio.create_task(server.serve(sockets=sockets))
    engine = asyncio.create_task(app.client.run())
    loading = asyncio.create_task(app.workers.run(None, "loading", load_text))
    asked = asyncio.create_task(stop.asked.wait())
    failure: LowbitError | None = None
    try:
        await asyncio.wait({loading, engine, asked, http}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and not asked.done() and not engine.done():
            app.loaded(loading.result())
            await asyncio.wait({engine, asked, http}, return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            await drain(app, stop)
        elif engine.done():
            engine.result()
        elif http.done():
            http.result()
            raise LowbitError("E0710", "the HTTP server stopped by itself; please report it")
    except LowbitError as error:
        failure = error
        app.draining = True
    finally:
        app.client.fail_all("draining", "the server is shutting down")
        await _end(app, server, http, engine)
        asked.cancel()
        loading.cancel()
    if failure is not None:
        raise failure
    log(logging.INFO, "stopped")
    return 0


async def drain(app: App, stop: Stop) -> None:
    """Not ready, no new requests; what runs may finish within ``drain_seconds``, unless somebody hurries."""
    app.draining = True
    log(logging.INFO, "draining", active=app.active, seconds=app.limits.drain_seconds)
    deadline = now() + app.limits.drain_seconds
    while app.active and now() < deadline and not stop.hurry.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await stop.hurry.wait()
    if stop.hurry.is_set():
        app.client.kill()
        return
    app.client.fail_all("draining", "the server is shutting down")
    deadline = now() + _CANCEL_SECONDS
    while app.active and now() < deadline and not stop.hurry.is_set():
        await asyncio.sleep(0.02)


async def _end(app: App, server: Any, http: asyncio.Task[None], engine: asyncio.Task[None]) -> None:
    """The engine first: no process may be left behind."""
    await app.client.stop()
    engine.cancel()
    server.should_exit = True
    server.force_exit = app.active == 0
    await asyncio.wait({engine, http})
    for task in (engine, http):
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, LowbitError):
            log(logging.ERROR, "task ended badly", error=repr(error))
