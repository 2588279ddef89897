"""The engine process, seen from the HTTP process: start, talk, watch, restart.

    starting ──EngineReady──▶ ready ──process gone, or hung for hang_kill_seconds──▶ restarting ──▶ ready …
        │                                                        │
        └── EngineFailed or gone: EngineStartError               └── more than ``restarts`` in the window:
                                                                      LowbitError E0711

Every accepted sequence gets exactly one final event: from the engine, or from here when the engine died
(``engine_restarting``), a deadline passed (``queue_timeout``, ``request_timeout``) or the server stops
(``draining``). Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from lowbit.engine.messages import (
    Admitted,
    Alive,
    Drain,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineStatus,
    FlushCache,
    FromEngine,
    Ping,
    Request,
    TokenEvent,
)
from lowbit.engine.wire import FrameDecoder, FrameError, Start, encode_frames
from lowbit.errors import LowbitError
from lowbit.server.api_error import ApiError
from lowbit.server.engine_start import EngineProcess
from lowbit.server.http import now
from lowbit.server.limits import Limits
from lowbit.server.logs import log
from lowbit.server.memory_limit import memory_limit, oom_kills
from lowbit.server.stream import Sequence, Stream
from lowbit.settings import CPU_FRACTION, Settings

State = Literal["starting", "ready", "restarting"]
_READ_SIZE = 1 << 18
_SERVER_ONLY = ("api_key", "api_key_file")  # what the engine process has no use for


@dataclass
class Counters:
    """What only grows, over all engines of this server's life (an engine's own counters start at 0)."""

    restarts: int = 0
    finished: int = 0  # sequences
    status_before: EngineStatus = field(default_factory=EngineStatus)  # sums of the engines that are gone


@dataclass
class Hooks:
    """Whom to tell what happens; metrics and the command line listen."""

    on_progress: Callable[[EngineProgress], None] = lambda progress: None
    on_ready: Callable[[EngineReady], None] = lambda ready: None
    on_first_token: Callable[[float], None] = lambda seconds: None  # since the HTTP request was accepted
    on_token_gap: Callable[[float, int], None] = lambda seconds, tokens: None
    on_queue_wait: Callable[[float], None] = lambda seconds: None


class EngineClient:
    """Supervises one engine process. ``run`` is its task; the rest is called by handlers on the same loop."""

    def __init__(
        self,
        settings: Settings,
        limits: Limits,
        hooks: Hooks | None = None,
        command: Iterable[str] = (),
        started: EngineProcess | None = None,
    ) -> None:
        """``started``: the first engine, which already runs; ``command``: how to start the others."""
        self.limits = limits
        self.hooks = hooks or Hooks()
        self.counters = Counters()
        self.state: State = "starting"
        self.ready: EngineReady | None = None
        self.progress: EngineProgress | None = None
        self.loading_since = now()
        self.status = EngineStatus()
        self.news = 0  # events with tokens so far
        self._settings = settings
        self._command = list(command)
        self._resolved = asyncio.Event()
        self._started = started
        self._process: EngineProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._sequences: dict[str, Sequence] = {}
        self._streams: set[Stream] = set()
        self._failure: EngineFailed | None = None
        # When the Ping was sent that is not answered yet, or a step last showed that it gets on.
        self._asked_since: float | None = None
        self._dumped = False
        self._finish_rate = 0.0  # sequences a second, smoothed; for Retry-After
        self._finished_before = 0
        self._was_ready = False  # this engine, not the one before
        self._stopping = False

    # --- what handlers use ---

    @property
    def hung(self) -> bool:
        """Whether the engine has done nothing for longer than a part of a step may take."""
        asked = self._asked_since
        return asked is not None and now() - asked > self.limits.hang_dump_seconds

    @property
    def places_held(self) -> int:
        """Sequences in the engine, or with a place reserved there."""
        return sum(stream.places for stream in self._streams)

    @property
    def waiting(self) -> int:
        """Sequences in the engine's queue, as far as this side can know without asking."""
        running = self.ready.max_running if self.ready else 0
        return max(0, self.places_held - running)

    def require_ready(self) -> EngineReady:
        """The engine's limits, or the 503 that says why there are none now."""
        if self.state == "ready" and self.ready is not None:
            return self.ready
        if self.state == "restarting":
            raise ApiError(
                503, "engine_restarting", "the engine is restarting; try again soon", retry_after=2
            )
        percent, left = self.load_progress()
        text = f"model is loading ({percent} %)" + (f", about {left} s left" if left is not None else "")
        raise ApiError(503, "loading", text, retry_after=min(60, max(1, left or 1)))

    def load_progress(self) -> tuple[int, int | None]:
        """Percent of the model's bytes loaded, and the seconds the rest takes if it goes on like this."""
        if self.state == "ready":
            return 100, 0
        progress = self.progress
        if progress is None or progress.total <= 0 or progress.done <= 0:
            return 0, None
        share = min(1.0, progress.done / progress.total)
        return int(100 * share), math.ceil((now() - self.loading_since) * (1 - share) / share)

    def open(self, requests: list[Request]) -> Stream:
        """Accept requests together or refuse them together (429)."""
        ready = self.require_ready()
        running = ready.max_running
        places = min(len(requests), running)
        room = running + self._settings.queue_limit(running) - self.places_held
        if places > room:
            seconds = self._retry_after()
            raise ApiError(
                429,
                "overloaded",
                f"queue is full ({self.waiting} waiting); retry after {seconds} s",
                retry_after=seconds,
            )
        stream = Stream(self, requests, places)
        self._streams.add(stream)
        stream.fill()
        return stream

    def flush_cache(self) -> None:
        """Drop the prefix cache's unlocked pages."""
        self.send([FlushCache()])

    def total_status(self) -> EngineStatus:
        """The engine's status with counters summed over restarts."""
        return _summed(self.counters.status_before, self.status)

    def _retry_after(self) -> int:
        """Seconds until about half the queue has gone, by the rate sequences finished lately."""
        rate = max(self._finish_rate, 0.05)
        return min(60, max(1, math.ceil(0.5 * self.waiting / rate)))

    # --- what streams use ---

    def submit(self, sequence: Sequence) -> None:
        """Hand a sequence to the engine."""
        sequence.submitted = now()
        self._sequences[sequence.request.id] = sequence
        self.send([sequence.request])

    def send(self, messages: list[object]) -> None:
        """Write messages; without an engine they are dropped, its death already failed their requests."""
        if messages and self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frames(messages))

    def forget(self, sequence: Sequence) -> None:
        """Events of this sequence are no longer wanted."""
        self._sequences.pop(sequence.request.id, None)

    def release(self, stream: Stream) -> None:
        """The stream is over."""
        stream.places = 0
        self._streams.discard(stream)

    def fail_all(self, code: str, message: str) -> None:
        """End every sequence in progress with an error event."""
        for stream in list(self._streams):
            stream.fail(code, message)

    # --- life ---

    def resolved(self, settings: Settings) -> None:
        """The model's files are known: the engine may load ``settings.model``. Until then it waits."""
        self._settings = settings
        self._resolved.set()

    async def run(self) -> None:
        """Keep an engine running until ``stop``; raises LowbitError when that is hopeless."""
        deaths: deque[float] = deque()
        while not self._stopping:
            kills_before = oom_kills()
            reason = await self._run_once()
            if self._stopping:
                break
            if oom_kills() > kills_before:
                reason += f"; the memory limit is {memory_limit()}"
                self._lower_admission()
            if self.ready is None:
                raise self._start_error(reason)
            deaths.append(now())
            while deaths[0] < now() - self.limits.restart_window_seconds:
                deaths.popleft()
            log(logging.ERROR, "engine stopped", reason=reason, deaths=len(deaths))
            if len(deaths) > self.limits.restarts:
                minutes = self.limits.restart_window_seconds / 60
                text = f"the engine stopped {len(deaths)} times in {minutes:g} minutes; last: {reason}"
                raise LowbitError("E0711", f"{text}. The log above says more; please report it")
            self.counters.restarts += 1
            if not self._was_ready:  # it cannot even load: whatever is wrong may need a moment
                await asyncio.sleep(min(10.0, 0.2 * 2 ** len(deaths)))

    def _start_error(self, reason: str) -> LowbitError:
        if self._failure is not None:
            return LowbitError(self._failure.code, self._failure.message)
        if "memory limit" in reason or "signal 9" in reason:
            text = f"the engine was killed while loading ({reason}): probably out of memory"
            return LowbitError("E0500", f"{text}; use a smaller model or --mem-fraction-static 0.2")
        return LowbitError("E0710", f"the engine process ended while loading: {reason}")

    def _forget_engine(self) -> None:
        """The engine cannot be talked to any more: nobody enters, and whoever waited is told at once."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        if self.state == "ready":
            self.state = "restarting"
        if self._stopping:
            self.fail_all("draining", "the server is shutting down")
        else:
            text = "the engine stopped and is being restarted; send the request again"
            self.fail_all("engine_restarting", text)
        self._asked_since = None
        self._dumped = False
        self.counters.status_before = _summed(self.counters.status_before, self.status, gauges=False)
        self.status = EngineStatus()
        self.progress = None
        self.loading_since = now()
        self._finished_before = self.counters.finished

    def _lower_admission(self) -> None:
        """After an out-of-memory kill the next engine takes less."""
        old = self._settings
        running = old.max_running_requests or (self.ready.max_running if self.ready else old.running_limit)
        self._settings = replace(old, max_running_requests=max(1, running // 2))
        device = self.ready.details.get("device", "cpu") if self.ready else old.device
        if not device.startswith("cuda"):  # a GPU's memory is not what was short
            fraction = old.mem_fraction_static or CPU_FRACTION
            self._settings.mem_fraction_static = max(0.01, fraction * 0.75)

    async def _run_once(self) -> str:
        """One engine from start to end; why it ended."""
        self._failure = None
        self._was_ready = False
        try:
            self._process = process = self._started or EngineProcess(self._command)
        except OSError as error:
            return f"it could not be started: {error.strerror}"
        self._started = None
        reader, self._writer = await asyncio.open_unix_connection(sock=process.socket)
        ticker = asyncio.create_task(self._tick())
        broken = ""
        try:
            await self._resolved.wait()
            self.send([Start(settings=_engine_settings(self._settings))])
            await self._read(reader)
        except FrameError as error:
            broken = f"the engine sent {error}"
        except ConnectionError:
            pass  # it died with messages unread; how, its exit status says
        finally:
            ticker.cancel()
            self._forget_engine()
            await self._end(process)
            self._process = None
        if self._failure is not None:
            return f"{self._failure.message} ({self._failure.code})"
        return broken or _how_it_ended(process.returncode)

    async def _end(self, process: EngineProcess) -> None:
        """The socket is closed: the process must leave; it is never left behind."""
        try:
            async with asyncio.timeout(self.limits.stop_seconds):
                await process.wait()
        except (TimeoutError, asyncio.CancelledError):
            process.kill()
            await process.wait()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder: FrameDecoder[FromEngine] = FrameDecoder(FromEngine)
        while data := await reader.read(_READ_SIZE):
            for message in decoder.feed(data):
                self._handle(message)

    def _handle(self, message: FromEngine) -> None:
        match message:
            case TokenEvent():
                self._deliver(message)
            case Admitted():
                for identity in message.ids:
                    self._note_admission(identity)
            case Alive():
                self._asked_since = now() if self._asked_since is not None else None
            case EngineStatus():
                self.status = message
                self._asked_since = None
                self._dumped = False
                self._watch_queue()
            case EngineProgress():
                self.progress = message
                self.hooks.on_progress(message)
            case EngineReady():
                first = self.ready is None
                self.ready = message
                self.state = "ready"
                self._was_ready = True
                log(logging.INFO, "engine ready", restarts=self.counters.restarts)
                if first:
                    self.hooks.on_ready(message)
            case EngineFailed():
                self._failure = message

    def _deliver(self, event: TokenEvent) -> None:
        sequence = self._sequences.get(event.id)
        if sequence is None:
            return  # cancelled while this event was on its way
        moment = now()
        if event.tokens:
            self.news += 1
            if sequence.last_token:
                self.hooks.on_token_gap(moment - sequence.last_token, len(event.tokens))
            else:
                self.hooks.on_first_token(moment - sequence.stream.created)
            sequence.last_token = moment
        if event.finish_reason is not None:
            self.counters.finished += 1
            self.forget(sequence)
        sequence.stream.put(sequence, event)

    def _note_admission(self, identity: str) -> None:
        sequence = self._sequences.get(identity)
        if sequence is not None:
            sequence.stream.begun = True
            self.hooks.on_queue_wait(now() - sequence.submitted)

    async def _tick(self) -> None:
        """Deadlines, the watchdog and the status, once a tick."""
        while True:
            before = now()
            await asyncio.sleep(self.limits.tick_seconds)
            if now() - before > 3 * self.limits.tick_seconds + 1:
                self._asked_since = None  # this process was stopped, not the engine: ask again
            if self.state != "ready" or self._process is None:
                continue
            self._watch_engine(self._process)
            self._watch_deadlines()
            finished = self.counters.finished - self._finished_before
            self._finished_before = self.counters.finished
            rate = finished / self.limits.tick_seconds
            self._finish_rate += 0.2 * (rate - self._finish_rate)

    def _watch_engine(self, process: EngineProcess) -> None:
        if self._asked_since is None:
            self._asked_since = now()
            self.send([Ping()])
            return
        silent = now() - self._asked_since
        if silent > self.limits.hang_kill_seconds:
            log(logging.ERROR, "engine hangs, killed", silent_seconds=round(silent, 1))
            process.kill()
        elif silent > self.limits.hang_dump_seconds and not self._dumped:
            log(logging.ERROR, "engine hangs, stack dump follows", silent_seconds=round(silent, 1))
            self._dumped = True
            process.send_signal(signal.SIGUSR1)

    def _watch_deadlines(self) -> None:
        seconds = self.limits.request_seconds
        for stream in list(self._streams):
            if now() - stream.created > seconds:
                stream.fail("request_timeout", f"not finished after {seconds:g} s; request stopped")
        if self.hung:
            self._watch_queue()

    def _watch_queue(self) -> None:
        """Give up on streams of which nothing was begun. Asked when the engine has told all that it began: in
        the middle of a long step nobody knows."""
        seconds = self.limits.queue_seconds
        for stream in list(self._streams):
            if not stream.begun and now() - stream.created > seconds:
                text = f"waited {seconds:g} s without being started; try again later"
                stream.fail("queue_timeout", text)

    async def stop(self) -> None:
        """End the engine: by itself if it can within ``stop_seconds``, else by force."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        if self.state == "ready" and not self.hung:
            self.send([Drain()])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.limits.stop_seconds):
                    await process.wait()
        process.kill()
        await process.wait()

    def kill(self) -> None:
        """End the engine now."""
        self._stopping = True
        if self._process is not None:
            self._process.kill()


def _engine_settings(settings: Settings) -> dict[str, str | int | float | bool | None]:
    return {name: value for name, value in asdict(settings).items() if name not in _SERVER_ONLY}


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "unknown"
    if status < 0:
        try:
            return f"killed by signal {-status} ({signal.Signals(-status).name})"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}"


_GAUGES = ("running", "waiting", "pages_total", "pages_free", "pages_cached")


def _summed(before: EngineStatus, current: EngineStatus, gauges: bool = True) -> EngineStatus:
    """Counters added up; gauges are the current engine's, or 0."""
    values = {
        name: (getattr(current, name) if gauges else 0)
        if name in _GAUGES
        else getattr(before, name) + getattr(current, name)
        for name in EngineStatus.__struct_fields__
    }
    return EngineStatus(**values)
