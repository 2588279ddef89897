"""A server in a thread of the test process, over the fake engine; and one in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvloop

from lowbit.server.app import App, Stop, run_server
from lowbit.server.connection import listen
from lowbit.server.limits import Limits
from lowbit.server.text import TextModel
from lowbit.settings import Settings
from server.fake_text import load_fake_text

HERE = Path(__file__).parent
FAKE_ENGINE = [sys.executable, str(HERE / "fake_engine.py")]
# httpx.get and its like read all certificates each time, 25 ms of a core that servers wait for; as there, no
# connection is kept.
http = httpx.Client(verify=False, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
QUICK = Limits(tick_seconds=0.05, stop_seconds=2.0, linger_seconds=0.3)


def settings(**values: Any) -> Settings:
    """Settings of a test server; port 0 is any free one."""
    return Settings(**{"model": "tiny", "port": 0, "log_level": "error", "max_running_requests": 4, **values})


class ServerThread:
    """``run_server`` on a loop of its own."""

    def __init__(
        self,
        options: Settings,
        limits: Limits = QUICK,
        load_text: Callable[[Settings], TextModel] = load_fake_text,
    ) -> None:
        self.settings = options
        self._limits = limits
        self._load_text = load_text
        self._stop: Stop | None = None
        self.failure: BaseException | None = None
        self.status: int | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.socket = listen(options.host, options.port)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread.start()
        assert self._started.wait(10)

    def _run(self) -> None:
        async def run() -> int:
            self.app = App(self.settings, self._limits, FAKE_ENGINE)
            self._stop = Stop()
            self.loop = asyncio.get_running_loop()
            self._started.set()
            text = lambda: self._load_text(self.settings)  # noqa: E731
            return await run_server(self.app, [self.socket], text, self._stop)

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                self.status = runner.run(run())
        except BaseException as error:
            self.failure = error
        finally:
            self._started.set()

    def signal(self) -> None:
        """As SIGTERM does."""
        assert self._stop is not None
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._stop.ask)

    def wait_ready(self) -> ServerThread:
        """Until requests are served."""
        wait_until(lambda: http.get(f"{self.url}/readyz").status_code == 200)
        return self

    def engine_pid(self) -> int:
        """The engine process."""
        process = self.app.client._process
        assert process is not None
        return process.pid

    def join(self, seconds: float = 10) -> None:
        """Until the server has ended."""
        self._thread.join(seconds)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        """End at once, leaving nothing."""
        self.signal()
        self.signal()
        self.join()

    def assert_idle(self) -> None:
        """Nothing is held when nothing runs."""
        client = self.app.client

        def idle() -> bool:
            return not (
                client._sequences
                or client._streams
                or client.places_held
                or self.app.queued.held
                or self.app.active
                or client.status.running
                or client.status.waiting
            )

        wait_until(idle, 5)


@contextlib.contextmanager
def serving(
    limits: Limits = QUICK, fake: dict[str, Any] | None = None, **values: Any
) -> Iterator[ServerThread]:
    """A ready server, ended afterwards."""
    with fake_options(fake or {}):
        server = ServerThread(settings(**values), limits)
        try:
            yield server.wait_ready()
        finally:
            server.stop()


@contextlib.contextmanager
def fake_options(options: dict[str, Any]) -> Iterator[None]:
    """FAKE_ENGINE and the module path that engine processes started within inherit."""
    before = {name: os.environ.get(name) for name in ("FAKE_ENGINE", "PYTHONPATH")}
    os.environ["FAKE_ENGINE"] = json.dumps(options)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), before["PYTHONPATH"] or ""])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def quick(**values: Any) -> Limits:
    """QUICK with changes."""
    return replace(QUICK, **values)


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Poll until true."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def exchange_raw(port: int, data: bytes, timeout: float = 5.0) -> bytes:
    """Send bytes as they are; everything that comes back until the server closes or goes quiet."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as client:
        client.sendall(data)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while part := client.recv(65536):
                received += part
        return received


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class ServerProcess:
    """``lowbit.server.app.serve`` in a process, with real signals."""

    def __init__(self, fake: dict[str, Any] | None = None, **values: Any) -> None:
        environment = {
            **os.environ,
            "FAKE_ENGINE": json.dumps(fake or {}),
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "run_server.py"), json.dumps(values)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = json.loads(line)["url"] if line else ""

    def wait_ready(self) -> ServerProcess:
        """Until requests are served."""
        wait_until(lambda: http.get(f"{self.url}/readyz").status_code == 200)
        return self

    def finish(self, seconds: float = 10) -> tuple[int, str]:
        """Exit status and stderr."""
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors

    def children(self) -> list[int]:
        """Process ids of the engine."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]
