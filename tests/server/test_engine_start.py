"""The engine's process: it is waited for, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
import uvloop

from lowbit.server.engine_start import EngineProcess

# What stands in for the engine gets --fd N --parent PID behind its own words.
SLEEPS = [sys.executable, "-c", "import time; time.sleep(100)"]
SPEAKS = [
    sys.executable,
    "-c",
    "import os, sys; os.write(int(sys.argv[2]), f'{sys.argv[4]} {os.environ[\"OMP_WAIT_POLICY\"]}'.encode())",
]
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_context_leaves_no_process_behind() -> None:
    with pytest.raises(ZeroDivisionError), EngineProcess(SLEEPS) as engine:
        assert engine.returncode is None
        raise ZeroDivisionError
    assert engine.returncode == -signal.SIGKILL and gone(engine.pid)


def test_it_talks_through_its_end_of_the_pair_and_its_threads_sleep_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with EngineProcess(SPEAKS) as engine:
        assert engine.socket.recv(100).decode() == f"{os.getpid()} passive"
        assert engine.socket.recv(100) == b"", "ours is the only other end"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with EngineProcess(SPEAKS) as engine:
        assert engine.socket.recv(100).decode() == f"{os.getpid()} active"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("with_pidfd", [True, False])
def test_waiting(loop: str, with_pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_pidfd:

        def refuses(pid: int) -> int:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(os, "pidfd_open", refuses)

    async def run() -> None:
        with EngineProcess(SLEEPS) as engine:
            waiting = [asyncio.create_task(engine.wait()) for _ in range(2)]
            await asyncio.sleep(0.05)
            assert not waiting[0].done() and engine.returncode is None
            engine.send_signal(signal.SIGTERM)
            await asyncio.wait_for(asyncio.gather(*waiting), 10)
            assert engine.returncode == -signal.SIGTERM
            await asyncio.wait_for(engine.wait(), 10)
            engine.kill()  # one that has ended is nobody's business

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())


def test_what_cannot_be_started_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No such file"):
        EngineProcess(["no-such-program"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_serve_starts_the_engine_before_it_imports_the_server(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And ends it where serving cannot begin."""
    import lowbit.server.app as app
    import lowbit.server.engine_start as engine_start
    from lowbit.cli import main
    from lowbit.errors import LowbitError

    monkeypatch.setattr(engine_start, "engine_command", lambda: SLEEPS)
    seen: list[EngineProcess] = []

    def fails(*arguments: object, engine: EngineProcess, **more: object) -> int:
        seen.append(engine)
        assert engine.returncode is None
        raise LowbitError("E0801", "port 1 is in use")

    monkeypatch.setattr(app, "serve", fails)
    assert main(["serve", "smollm2"]) != 0
    assert "E0801" in capfd.readouterr().err and gone(seen[0].pid)

    def fork_fails(*arguments: object, **more: object) -> object:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(engine_start.subprocess, "Popen", fork_fails)
    assert main(["serve", "smollm2"]) != 0
    assert "E0710]: the engine process could not be started: Resource" in capfd.readouterr().err
