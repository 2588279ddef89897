"""``serve`` as a process of its own: signals, ports, orphans, imports."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from lowbit.errors import LowbitError
from lowbit.server.connection import connection_limit, listen
from server.fake_text import BOS, answer
from server.harness import ServerProcess, alive, http, wait_until


def complete(url: str, count: int) -> httpx.Response:
    return http.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": count}, timeout=20)


def test_sigterm_while_busy() -> None:
    server = ServerProcess(fake={"step_seconds": 0.02}).wait_ready()
    [engine] = server.children()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(complete, server.url, 50)
        wait_until(lambda: http.get(server.url + "/get_server_info").json()["sequences_held"] == 1)
        server.process.send_signal(signal.SIGTERM)
        assert future.result().json()["choices"][0]["text"] == answer([BOS, *b"x"], 50)
    status, errors = server.finish()
    assert (status, errors) == (0, "")
    assert not alive(engine)


def test_sigint_twice_ends_at_once() -> None:
    server = ServerProcess(fake={"step_seconds": 0.02}).wait_ready()
    [engine] = server.children()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(complete, server.url, 600)
        wait_until(lambda: http.get(server.url + "/get_server_info").json()["sequences_held"] == 1)
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: http.get(server.url + "/readyz").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        status, _ = server.finish()
        assert time.monotonic() - began < 3
        assert future.result().status_code == 503
    assert status == 0
    assert not alive(engine)


def test_engine_dies_with_a_killed_server() -> None:
    server = ServerProcess(fake={"step_seconds": 0.02}).wait_ready()
    [engine] = server.children()
    server.process.kill()
    server.finish()
    wait_until(lambda: not alive(engine), 5)


def test_engine_ignores_the_terminals_signals() -> None:
    server = ServerProcess().wait_ready()
    [engine] = server.children()
    os.kill(engine, signal.SIGINT)
    os.kill(engine, signal.SIGTERM)
    assert complete(server.url, 3).json()["choices"][0]["text"] == answer([BOS, *b"x"], 3)
    assert server.children() == [engine]
    server.process.terminate()
    assert server.finish()[0] == 0


def test_load_error_is_one_line_and_an_exit_status() -> None:
    server = ServerProcess(fake={"load_error": True})
    status, errors = server.finish()
    assert status == 3
    assert errors == "error[E0203]: x.gguf is 10 bytes but its header needs 20: incomplete download\n"


def test_port_in_use_is_found_before_anything_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = ServerProcess(port=port, fake={"load_seconds": 60})
        status, errors = server.finish(5)
    name = Path("/proc/self/comm").read_text().strip()
    assert status == 8
    assert errors == (
        f"error[E0801]: port {port} on 127.0.0.1 is in use by pid {os.getpid()} ({name}); "
        f"use --port {port + 1 if port < 65535 else port - 1} or stop it\n"
    )


def test_ports_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(LowbitError) as caught:
        listen("127.0.0.1", 80)
    assert str(caught.value) == "error[E0802]: port 80 needs root; use --port 8000"
    assert caught.value.exit_code == 8
    monkeypatch.undo()
    with pytest.raises(LowbitError, match="cannot listen on 'no such host'") as caught:
        listen("no such host", 8000)
    assert caught.value.code == "E0803"
    with pytest.raises(LowbitError, match=r"cannot listen on 192\.0\.2\.1 port 8000: "):
        listen("192.0.2.1", 8000)


def test_serving_open_to_the_world_warns() -> None:
    server = ServerProcess(host="0.0.0.0").wait_ready()
    server.process.terminate()
    status, errors = server.finish()
    assert status == 0
    assert errors.startswith("lowbit: warning: --host 0.0.0.0 without --api-key: anyone who can reach port")


def test_closed_stderr_does_not_stop_serving() -> None:
    server = ServerProcess(log_level="info", fake={"violate": True})
    assert server.process.stderr is not None
    server.process.stderr.close()
    server.wait_ready()
    for _ in range(3):
        assert complete(server.url, 3).status_code == 200
    server.process.terminate()
    server.process.wait(10)
    assert server.process.returncode == 0


def test_log_lines_are_json_without_prompts() -> None:
    server = ServerProcess(log_level="info").wait_ready()
    secret = "my secret\nprompt"
    http.post(f"{server.url}/v1/completions", json={"prompt": secret, "max_tokens": 3})
    http.get(server.url + "/nowhere/%0a%1b[31m", headers={"X-Request-Id": "my-id"})
    server.process.terminate()
    _, errors = server.finish()
    lines = [json.loads(line) for line in errors.splitlines()]
    assert "secret" not in errors and "\x1b" not in errors
    [done] = [line for line in lines if line.get("path") == "/v1/completions"]
    assert (done["status"], done["completion_tokens"], done["event"]) == (200, 3, "request")
    assert (done["draft_tokens"], done["accepted_draft_tokens"]) == (2, 1)
    [lost] = [line for line in lines if line.get("id") == "my-id"]
    assert (lost["status"], lost["path"], lost["error"]) == (404, "unknown", "not_found")


def test_few_file_descriptors() -> None:
    """Connections are refused, nothing crashes, and it recovers."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "from server.run_server import main; sys.argv = ['x', '{}']; sys.exit(main())"
    )
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    wait_until(lambda: http.get(url + "/readyz").status_code == 200)
    port = int(url.rpartition(":")[2])
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    time.sleep(0.2)
    assert process.poll() is None
    for client in held:
        client.close()
    wait_until(lambda: http.get(url + "/health").status_code == 200)
    assert complete(url, 3).status_code == 200
    process.terminate()
    assert process.wait(10) == 0


def test_connection_limit_follows_the_file_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = {"now": (100, 300)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, value: limits.update(now=value))
    assert connection_limit(50) == 50
    assert connection_limit(200) == 200 and limits["now"] == (232, 300)
    assert connection_limit(1024) == 268 and limits["now"] == (300, 300)


def test_the_http_process_never_imports_torch() -> None:
    """Nor transformers, nor a web framework it does not use."""
    code = (
        "import sys, lowbit, lowbit.server.app;"
        "print([m for m in ('torch', 'transformers', 'fastapi', 'starlette') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
