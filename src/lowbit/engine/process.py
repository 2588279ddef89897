"""The engine in a process of its own: ``python -m lowbit.engine.process --fd N --parent PID``.

The HTTP process starts it with one end of a socket pair and talks to it in frames (wire.py). What it does:

    Start ──▶ load the model (EngineProgress …) ──▶ EngineReady, or EngineFailed and exit
          ──▶ loop: read what came, without waiting while there is work
                    engine.step(), its events in one write; a thread says Alive while a long one gets on
                    idle: what could wait, a step at a time; then wait for a message, and once a second
                    check the page accounting

It owns no policy: it dies with its parent (PR_SET_PDEATHSIG, and end of file on the socket), ignores the
terminal's SIGINT and SIGTERM because the parent drains it, and an exception in a step ends the process
after an EngineFailed, because half a step may have left the page tables wrong. The parent restarts it.

Imports no torch by itself: the model code is imported after the socket is up, so that a failing import is
an EngineFailed too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, Protocol

import msgspec

from lowbit.engine.messages import (
    Admitted,
    Alive,
    Cancel,
    Drain,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineStatus,
    FlushCache,
    Ping,
    Request,
    TokenEvent,
)
from lowbit.engine.wire import FrameDecoder, FrameError, ParentMessage, Start, encode_frames
from lowbit.errors import EXIT_BUG, LowbitError, printable
from lowbit.settings import Settings

_PR_SET_PDEATHSIG = 1
_IDLE_CHECK_SECONDS = 1.0
_PROGRESS_SECONDS = 0.1
_PULSE_SECONDS = 5.0
_READ_SIZE = 1 << 18


class EngineLike(Protocol):
    """What the loop asks of an engine; ``engine.Engine`` is one, tests bring their own."""

    def submit(self, request: Request) -> object:
        """Accept a request; a LowbitError refuses it."""

    def cancel(self, request_id: str) -> object:
        """Forget a request."""

    def step(self) -> list[TokenEvent]:
        """One forward pass; what it made certain."""

    def admitted(self) -> list[str]:
        """Ids of the requests that the last step began with."""

    def progress(self) -> int:
        """Grows while a step computes; asked by another thread."""

    def has_work(self) -> bool:
        """Whether ``step`` would do something."""

    def idle_step(self) -> bool:
        """A moment's work of what can wait until nothing else is to be done; False: there was none left."""

    def status(self) -> EngineStatus:
        """Counters and gauges."""

    def flush_cache(self) -> object:
        """Drop unlocked prefix-cache pages."""

    def close(self) -> object:
        """The last thing that is asked, once the work is done."""

    def check(self) -> object:
        """Check the page accounting; a non-empty result is a violation, which the status counts."""


class ParentGoneError(Exception):
    """The HTTP process closed its end: nobody waits for tokens any more."""


class Connection:
    """This process's end of the socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._frames: FrameDecoder[ParentMessage] = FrameDecoder(ParentMessage)
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)

    def send(self, messages: Iterable[object]) -> None:
        """Write the messages in one call. Any thread."""
        frames = encode_frames(messages)
        try:
            with self._sending:
                self._socket.sendall(frames)
        except OSError as error:
            raise ParentGoneError from error

    def receive(self, timeout: float) -> list[ParentMessage]:
        """Messages that arrived, waiting at most ``timeout`` seconds for the first bytes."""
        if not self._poll.poll(timeout * 1000):
            return []
        try:
            data = self._socket.recv(_READ_SIZE)
        except OSError as error:
            raise ParentGoneError from error
        if not data:
            raise ParentGoneError
        return self._frames.feed(data)


class EngineLoop:
    """Messages in, steps, events out."""

    def __init__(self, engine: EngineLike, connection: Connection) -> None:
        self._engine = engine
        self._connection = connection
        self._failed_checks = 0
        self._last_check = time.monotonic()
        self._draining = False
        self._more_when_idle = True
        self._step_since: float | None = None

    def run(self) -> None:
        """Until the parent leaves, or has asked to drain and the work is done."""
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()
        while True:
            busy = self._draining or self._engine.has_work() or self._more_when_idle
            for message in self._connection.receive(0.0 if busy else _IDLE_CHECK_SECONDS):
                self._handle(message)
            if self._engine.has_work():
                self._step_since = time.monotonic()
                events = self._engine.step()
                self._step_since = None
                self._more_when_idle = True
                admitted = self._engine.admitted()
                if events or admitted:
                    news: list[object] = [Admitted(tuple(admitted))] if admitted else []
                    self._connection.send(news + events)
            elif self._draining:
                return
            else:
                self._more_when_idle = self._more_when_idle and self._engine.idle_step()
                self._check_when_idle()

    def _pulse(self) -> None:
        """Tell the parent's watchdog that a long step gets on: a large model's may take minutes."""
        before = -1
        while True:
            time.sleep(_PULSE_SECONDS)
            since, reached = self._step_since, self._engine.progress()
            if since is not None and time.monotonic() - since > _PULSE_SECONDS and reached != before:
                try:
                    self._connection.send([Alive()])
                except ParentGoneError:
                    return
            before = reached

    def _handle(self, message: ParentMessage) -> None:
        match message:
            case Request():
                self._submit(message)
            case Cancel():
                self._engine.cancel(message.id)
            case Ping():
                self._connection.send([self.status()])
            case FlushCache():
                self._engine.flush_cache()
            case Drain():
                self._draining = True
            case Start():
                raise FrameError("a second Start")

    def _submit(self, request: Request) -> None:
        """A request the engine refuses, or that cannot be set up, ends alone."""
        try:
            if self._draining:
                raise LowbitError("draining", "the server is shutting down")
            self._engine.submit(request)
        except LowbitError as error:
            self._connection.send([_refusal(request, error.code, error.message)])
        except Exception:
            _log("request could not be set up", request=request.id, traceback=traceback.format_exc())
            self._connection.send([_refusal(request, "internal", "the engine could not set up the request")])

    def status(self) -> EngineStatus:
        """The engine's status; a check that could not even be made is a violation too."""
        status = self._engine.status()
        total = status.invariant_violations + self._failed_checks
        return msgspec.structs.replace(status, invariant_violations=total)

    def _check_when_idle(self) -> None:
        now = time.monotonic()
        if now - self._last_check < _IDLE_CHECK_SECONDS:
            return
        self._last_check = now
        try:
            found = self._engine.check()
        except LowbitError:
            raise  # what the engine lives on is gone
        except Exception as error:  # counted and logged, not fatal: serving on is better than a restart loop
            self._failed_checks += 1
            found = repr(error)
        if found:
            _log("accounting invariant violated", found=found)


def _refusal(request: Request, code: str, message: str) -> TokenEvent:
    """The one final event of a request that never ran."""
    return TokenEvent(
        id=request.id,
        finish_reason="error",
        error=message,
        error_code=code,
        prompt_tokens=len(request.prompt),
    )


def _log(event: str, **values: object) -> None:
    """One JSON line on stderr; never fails, because stderr may be closed."""
    line = {"level": "error", "event": event, "process": "engine", **values}
    with contextlib.suppress(OSError, ValueError):
        print(json.dumps(line, default=str), file=sys.stderr, flush=True)


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent dies; leave if it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise ParentGoneError


def set_signals() -> None:
    """The terminal sends Ctrl+C to the whole group, and only the parent obeys: it lets requests finish and
    then asks us to drain. SIGUSR1 is its watchdog asking for a stack dump."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def settings_from(values: dict[str, Any]) -> Settings:
    """The settings of a Start message; a name this version does not have is our own bug."""
    known = {f.name for f in fields(Settings)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise FrameError(f"unknown settings {', '.join(unknown)}")
    return Settings(**values)


def show_log(level: str) -> None:
    """What the model code has to say goes to stderr, as it is; a closed stderr never stops the engine."""
    logging.raiseExceptions = False
    logger = logging.getLogger("lowbit")
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.setLevel(level.upper())
    logger.propagate = False


def build_engine(
    settings: Settings, on_progress: Callable[[int, int, str], None]
) -> tuple[EngineLike, EngineReady]:
    """Load the model and set up its engine: everything that needs torch."""
    from lowbit.engine.load import load_engine

    show_log(settings.log_level)
    engine = load_engine(settings, on_progress=on_progress, serving=True)
    return engine, engine.ready()


def serve_parent(
    connection: Connection,
    build: Callable[[Settings, Callable[[int, int, str], None]], tuple[EngineLike, EngineReady]],
    prepare: Callable[[], object] = lambda: None,
) -> int:
    """Load, report, run. The exit status of the process. ``prepare`` runs while the parent still resolves
    the model's name: importing torch takes as long as that does."""
    progress = _Progress(connection)
    try:
        prepare()
        settings = _wait_for_start(connection)
        engine, ready = build(settings, progress)
        gc.collect()
        gc.freeze()  # the model's objects live for ever: spare the collector walking them in every step
        connection.send([ready])
        EngineLoop(engine, connection).run()
        engine.close()
    except ParentGoneError:
        return 0
    except LowbitError as error:
        return _fail(connection, error.code, error.message, error.exit_code)
    except MemoryError as error:
        return _fail(connection, "E0500", f"out of memory in the engine: {printable(error) or 'malloc'}", 5)
    except Exception as error:
        _log("engine failed", traceback=traceback.format_exc())
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        return _fail(connection, "E0710", f"{type(error).__name__} at {where}: {printable(error)}", EXIT_BUG)
    return 0


class _Progress:
    """Loading news at most ten times a second, the last always."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done >= total or now - self._last >= _PROGRESS_SECONDS:
            self._last = now
            self._connection.send([EngineProgress(what=what, done=done, total=total)])


def _wait_for_start(connection: Connection) -> Settings:
    while True:
        for message in connection.receive(3600.0):
            if not isinstance(message, Start):
                raise FrameError(f"{type(message).__name__} before Start")
            return settings_from(message.settings)


def _fail(connection: Connection, code: str, message: str, status: int) -> int:
    with contextlib.suppress(ParentGoneError):
        connection.send([EngineFailed(code=code, message=message)])
    return status


def import_engine() -> None:
    """Everything that loading and running a model imports, which holds still afterwards.

    The collector would walk torch's hundreds of thousands of objects again and again while they come in, a
    tenth of the time of importing it, and once more whenever it looks at all objects.
    """
    gc.disable()
    for name in ("lowbit.engine.load", "lowbit.engine.speed", "lowbit.loading", "lowbit.tokenization"):
        importlib.import_module(name)
    gc.freeze()
    gc.enable()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="lowbit.engine.process")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    set_signals()
    try:
        die_with_parent(options.parent)
    except ParentGoneError:
        return 0
    connection = Connection(socket.socket(fileno=options.fd))
    return serve_parent(connection, build_engine, import_engine)


if __name__ == "__main__":
    sys.exit(main())
