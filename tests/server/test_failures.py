"""Engines that crash, hang, are killed or never start; clients that leave or do not read; full queues."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lowbit.engine.messages import EngineStatus
from lowbit.errors import LowbitError
from lowbit.server import engine_client, engine_start
from server.fake_text import BOS, answer
from server.harness import (
    ServerThread,
    alive,
    exchange_raw,
    fake_options,
    http,
    quick,
    serving,
    settings,
    wait_until,
)

LONG = {"prompt": "x", "max_tokens": 600}


def complete(server: ServerThread, prompt: str = "x", **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 5, **fields}
    return http.post(f"{server.url}/v1/completions", json=body, timeout=20)


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def is_right(server: ServerThread) -> bool:
    response = complete(server, "after")
    return response.status_code == 200 and response.json()["choices"][0]["text"] == answer(
        [BOS, *b"after"], 5
    )


def events(text: str) -> list[Any]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def recovered(server: ServerThread, old_pid: int) -> bool:
    process = server.app.client._process
    return bool(process and process.pid != old_pid and server.app.client.state == "ready")


def test_killed_engine_with_requests_in_flight() -> None:
    """kill -9 at several moments: everyone gets an error, the next request is right, nothing is left."""
    with serving(fake={"step_seconds": 0.01}) as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
        for round_number in range(4):
            pid = server.engine_pid()
            streamed = [pool.submit(complete, server, stream=True, max_tokens=600) for _ in range(6)]
            whole = [pool.submit(complete, server, max_tokens=600) for _ in range(6)]
            wait_until(lambda: len(server.app.client._sequences) == 12)
            if round_number % 2:
                time.sleep(0.05 * round_number)
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            for future in whole:
                assert error_of(future.result()) == (503, "engine_restarting")
            for future in streamed:
                response = future.result()
                if response.status_code == 200:  # it had begun
                    *_, last, done = events(response.text)
                    assert last["error"]["code"] == "engine_restarting" and done == "[DONE]"
                else:
                    assert error_of(response) == (503, "engine_restarting")
            assert time.monotonic() - began < 2
            wait_until(lambda pid=pid: recovered(server, pid))
            assert not alive(pid)
            assert is_right(server)
        assert server.app.client.counters.restarts == 4
        server.assert_idle()
        last_pid = server.engine_pid()
    wait_until(lambda: not alive(last_pid))


@pytest.mark.parametrize("command", ["CRASH", "KILL"])
def test_a_request_that_ends_the_engine(command: str) -> None:
    with serving() as server:
        assert error_of(complete(server, command)) == (503, "engine_restarting")
        assert http.get(server.url + "/livez").status_code == 200
        wait_until(lambda: http.get(server.url + "/readyz").status_code == 200)
        assert is_right(server)
        text = http.get(server.url + "/metrics").text
        assert "lowbit_engine_restarts_total 1.0" in text


def test_while_restarting_requests_get_503() -> None:
    with serving(fake={"load_seconds": 0.5}) as server:
        pid = server.engine_pid()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.app.client.state == "restarting")
        response = complete(server)
        assert error_of(response) == (503, "engine_restarting")
        assert response.headers["retry-after"] == "2"
        assert error_of(http.get(server.url + "/readyz")) == (503, "engine_restarting")
        wait_until(lambda: recovered(server, pid))
        assert is_right(server)


def test_counters_survive_a_restart() -> None:
    with serving() as server:
        complete(server, max_tokens=7)
        wait_until(lambda: server.app.client.status.generated_tokens == 7)
        complete(server, "KILL", max_tokens=7)
        wait_until(lambda: server.app.client.counters.restarts == 1 and server.app.client.state == "ready")
        complete(server, max_tokens=5)
        wait_until(lambda: server.app.client.total_status().generated_tokens >= 12)


def test_restart_limit_ends_the_server() -> None:
    with fake_options({}):
        server = ServerThread(settings(), quick(restarts=2)).wait_ready()
        for _ in range(3):
            wait_until(lambda: server.app.client.state == "ready")
            complete(server, "KILL")
        server.join()
    failure = server.failure
    assert isinstance(failure, LowbitError)
    assert (failure.code, failure.exit_code) == ("E0711", 70)
    assert "the engine stopped 3 times in 10 minutes; last: killed by signal 9 (SIGKILL)" in failure.message


def test_hung_engine_is_dumped_then_killed(capfd: pytest.CaptureFixture[str]) -> None:
    limits = quick(hang_dump_seconds=0.5, hang_kill_seconds=1.2)
    with serving(limits) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        pid = server.engine_pid()
        hung = pool.submit(complete, server, "HANG")
        wait_until(lambda: server.app.client.hung)
        assert error_of(http.get(server.url + "/readyz")) == (503, "engine_hung")
        assert http.get(server.url + "/livez").status_code == 200
        assert error_of(hung.result()) == (503, "engine_restarting")
        wait_until(lambda: recovered(server, pid))
        assert is_right(server)
    assert "in obey" in capfd.readouterr().err  # the stack dump names the function that hangs


def test_stopped_engine_is_killed() -> None:
    with serving(quick(hang_dump_seconds=0.3, hang_kill_seconds=0.6)) as server:
        pid = server.engine_pid()
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: recovered(server, pid))
        assert not alive(pid)
        assert is_right(server)


def test_first_start_fails_with_the_engines_own_error() -> None:
    with fake_options({"load_error": True}):
        server = ServerThread(settings())
        server.join()
    assert isinstance(server.failure, LowbitError)
    assert (server.failure.code, server.failure.exit_code) == ("E0203", 3)
    assert "incomplete download" in server.failure.message


def test_first_start_is_killed() -> None:
    with fake_options({"load_kill": True}):
        server = ServerThread(settings())
        server.join()
    assert isinstance(server.failure, LowbitError)
    assert (server.failure.code, server.failure.exit_code) == ("E0500", 5)
    assert "probably out of memory" in server.failure.message


def test_text_parts_fail() -> None:
    with fake_options({}):
        server = ServerThread(settings(model="missing"))
        server.join()
    assert isinstance(server.failure, LowbitError)
    assert server.failure.code == "E0201"


def test_restart_that_finds_the_checkpoint_changed(tmp_path: Path) -> None:
    """It cannot load any more: the limit of restarts ends it with the loader's reason."""
    options = {"count_starts": str(tmp_path / "starts"), "fail_after": 1}
    with fake_options(options):
        server = ServerThread(settings(), quick(restarts=2)).wait_ready()
        complete(server, "KILL")
        server.join()
    assert isinstance(server.failure, LowbitError)
    assert "last: x.gguf is truncated (E0203)" in server.failure.message


def test_out_of_memory_lowers_admission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter([0, 1, 1, 1, 1, 1])
    monkeypatch.setattr(engine_client, "oom_kills", lambda: next(kills))
    monkeypatch.setattr(engine_client, "memory_limit", lambda: "512 MiB")
    starts = tmp_path / "starts"
    with serving(fake={"count_starts": str(starts)}, max_running_requests=8) as server:
        pid = server.engine_pid()
        complete(server, "KILL")
        wait_until(lambda: recovered(server, pid))
    assert [int(line.split()[1]) for line in starts.read_text().splitlines()] == [8, 4]


def test_loading_says_how_far_it_is() -> None:
    with fake_options({"load_seconds": 1.0}):
        server = ServerThread(settings())
        try:
            wait_until(lambda: http.get(server.url + "/livez").json() == {"status": "starting"})
            assert http.get(server.url + "/health").status_code == 503
            seen = set()
            wait_until(lambda: seen.add(message_of(server)) or any("left" in text for text in seen))
            response = complete(server)
            assert error_of(response) == (503, "loading")
            assert int(response.headers["retry-after"]) >= 1
            assert error_of(http.get(server.url + "/v1/models")) == (503, "loading")
            server.wait_ready()
            assert http.get(server.url + "/health").status_code == 200
            assert is_right(server)
        finally:
            server.stop()
    assert any(text.startswith("model is loading (") and " %), about " in text for text in seen)


def message_of(server: ServerThread) -> str:
    return http.get(server.url + "/readyz").json()["error"]["message"]


# --- clients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_frees_its_place(stream: bool) -> None:
    with serving(fake={"step_seconds": 0.01}) as server:
        body = json.dumps({**LONG, "stream": stream, "n": 3}).encode()
        client = socket.create_connection(("127.0.0.1", server.port))
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        wait_until(lambda: server.app.client.status.running == 3)
        client.close()
        began = time.monotonic()
        wait_until(lambda: server.app.client.status.running == 0)
        assert time.monotonic() - began < 1
        server.assert_idle()


def test_official_client_closing_a_stream() -> None:
    with (
        serving(fake={"step_seconds": 0.01}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=600, stream=True)
        next(iter(stream))
        stream.close()
        wait_until(lambda: server.app.client.status.running == 0 and not server.app.client._sequences, 1.5)
        server.assert_idle()


@pytest.mark.parametrize(
    "limits", [quick(pending_bytes=1 << 18, send_seconds=60), quick(pending_bytes=1 << 40, send_seconds=0.5)]
)
def test_client_that_does_not_read_is_given_up(limits: engine_client.Limits) -> None:
    """By what piles up, and by time."""
    with serving(limits, fake={"step_seconds": 0.001}) as server:
        body = json.dumps({"prompt": "WIDE", "max_tokens": 600, "stream": True}).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        wait_until(lambda: server.app.active == 1)
        server.assert_idle()
        text = http.get(server.url + "/metrics").text
        assert 'lowbit_requests_total{path="/v1/completions",status="200"} 1.0' in text
        client.close()
        assert server.app.client.counters.finished == 0  # given up, not run to the end


def test_client_that_does_not_read_a_whole_answer_is_given_up() -> None:
    """The answer waits in the connection's buffer, and must not wait there for ever."""
    with serving(quick(send_seconds=0.4, keep_alive_seconds=1), fake={"step_seconds": 0.0}) as server:
        body = json.dumps({"prompt": "WIDE", "max_tokens": 600}).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        wait_until(lambda: server.app.client.counters.finished == 1)
        time.sleep(1.5)
        received = 0
        while data := client.recv(1 << 20):
            received += len(data)
        assert received < 600 * 32768  # what the kernel held already, not the rest
        client.close()
        server.assert_idle()


def test_pings_keep_a_silent_stream_alive() -> None:
    with serving(quick(ping_seconds=0.1), fake={"step_seconds": 0.35}) as server:
        response = complete(server, stream=True, max_tokens=2)
        assert response.text.count(": ping") >= 3
        assert events(response.text)[-1] == "[DONE]"


def test_error_after_the_first_token_is_an_event() -> None:
    with serving(fake={"nan_at": 2}) as server:
        response = complete(server, "NAN", stream=True)
        assert response.status_code == 200
        *_, last, done = events(response.text)
        assert last["error"]["code"] == "model_numerical_error"
        assert done == "[DONE]"
        server.assert_idle()


# --- queues and deadlines -----------------------------------------------------------------------------------


def test_full_queue() -> None:
    with (
        serving(fake={"step_seconds": 0.02}, max_queued_requests=3) as server,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        futures = [pool.submit(complete, server, max_tokens=60) for _ in range(7)]  # 4 run, 3 wait
        wait_until(lambda: server.app.client.places_held == 7)
        response = complete(server)
        assert error_of(response) == (429, "overloaded")
        seconds = int(response.headers["retry-after"])
        assert response.json()["error"]["message"] == f"queue is full (3 waiting); retry after {seconds} s"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert error_of(complete(server, n=2)) == (429, "overloaded")
        assert [future.result().status_code for future in futures] == [200] * 7
        assert is_right(server)
        server.assert_idle()


def test_queue_wait_and_total_time_are_bounded() -> None:
    limits = quick(queue_seconds=0.4, request_seconds=1.5)
    with (
        serving(limits, fake={"step_seconds": 0.02}) as server,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        running = [
            pool.submit(complete, server, max_tokens=600, stream=bool(index % 2)) for index in range(4)
        ]
        wait_until(lambda: server.app.client.status.running == 4)
        response = complete(server)
        assert error_of(response) == (503, "queue_timeout")
        for index, future in enumerate(running):
            response = future.result()
            if index % 2:
                assert events(response.text)[-2]["error"]["code"] == "request_timeout"
            else:
                assert error_of(response) == (504, "request_timeout")
        server.assert_idle()


def test_prompts_being_computed_are_not_queued() -> None:
    """A first step longer than queue_seconds is no reason to give up."""
    with serving(quick(queue_seconds=0.3), fake={"step_seconds": 1.0}) as server:
        assert complete(server, max_tokens=1).status_code == 200


@pytest.mark.parametrize("body", [{"prompt": "abc", "n": 3}, {"prompt": ["abc"] * 6}])
def test_a_request_of_which_something_is_computed_does_not_wait(body: dict[str, object]) -> None:
    """Of choices and lists the engine may begin with some long after others."""
    fake = {"step_seconds": 0.02, "admits": 1}
    with serving(quick(queue_seconds=0.3), fake=fake) as server:
        response = http.post(server.url + "/v1/completions", json={**body, "max_tokens": 20}, timeout=30)
        assert response.status_code == 200, response.text
        assert [choice["finish_reason"] for choice in response.json()["choices"]] == ["length"] * (
            len(response.json()["choices"])
        )
        server.assert_idle()


def test_who_waits_behind_a_list_is_told() -> None:
    fake = {"step_seconds": 0.02, "admits": 1}
    with (
        serving(quick(queue_seconds=0.3), fake=fake) as server,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(complete, server, max_tokens=60)
        wait_until(lambda: server.app.client.status.running == 1)
        assert error_of(complete(server)) == (503, "queue_timeout")
        assert first.result().status_code == 200
        server.assert_idle()


def test_a_long_step_that_gets_on_is_not_hung() -> None:
    fake = {"pulse_seconds": 0.1}
    limits = quick(hang_dump_seconds=0.5, hang_kill_seconds=0.8)
    with serving(limits, fake=fake) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(complete, server, "SLOW")
        seen = False
        while not slow.done():
            seen = seen or server.app.client.hung
            time.sleep(0.02)
        assert slow.result().status_code == 200 and not seen
        assert server.app.client.counters.restarts == 0


def test_health_generate_of_a_busy_server() -> None:
    """Its queue is full, and tokens come."""
    with (
        serving(fake={"step_seconds": 0.02}, max_queued_requests=0) as server,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        futures = [pool.submit(complete, server, max_tokens=60) for _ in range(4)]
        wait_until(lambda: server.app.client.places_held == 4)
        assert http.get(server.url + "/health_generate").json() == {"status": "ok"}
        assert [future.result().status_code for future in futures] == [200] * 4
        server.assert_idle()


def test_health_generate_fails_when_nothing_comes() -> None:
    with serving(quick(health_seconds=0.3), fake={"step_seconds": 1.0}) as server:
        assert error_of(http.get(server.url + "/health_generate")) == (503, "health_timeout")
        server.assert_idle()


def test_idle_accounting_check_is_counted() -> None:
    with serving(fake={"violate": True}) as server:
        wait_until(lambda: server.app.client.status.invariant_violations >= 1)
        metrics = http.get(server.url + "/metrics").text
        [line] = [
            line for line in metrics.splitlines() if line.startswith("lowbit_invariant_violations_total")
        ]
        assert float(line.split()[1]) >= 1


# --- draining -----------------------------------------------------------------------------------------------


def test_drain_lets_requests_finish() -> None:
    with fake_options({"step_seconds": 0.02}):
        server = ServerThread(settings()).wait_ready()
        pid = server.engine_pid()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            whole = pool.submit(complete, server, max_tokens=60)
            streamed = pool.submit(complete, server, max_tokens=60, stream=True)
            wait_until(lambda: server.app.active == 2)
            server.signal()
            wait_until(lambda: server.app.draining, 1)
            assert error_of(http.get(server.url + "/readyz")) == (503, "draining")
            assert http.get(server.url + "/livez").json() == {"status": "draining"}
            assert http.get(server.url + "/health").status_code == 503
            refused = complete(server)
            assert error_of(refused) == (503, "draining")
            assert refused.headers["connection"] == "close"
            assert whole.result().json()["choices"][0]["text"] == answer([BOS, *b"x"], 60)
            assert events(streamed.result().text)[-1] == "[DONE]"
            assert "error" not in streamed.result().text
        server.join()
    assert (server.status, server.failure) == (0, None)
    assert not alive(pid)


def test_drain_that_takes_too_long_ends_with_error_events() -> None:
    with fake_options({"step_seconds": 0.02}):
        server = ServerThread(settings(), quick(drain_seconds=0.4)).wait_ready()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            whole = pool.submit(complete, server, max_tokens=600)
            streamed = pool.submit(complete, server, max_tokens=600, stream=True)
            wait_until(lambda: server.app.client.status.running == 2)
            server.signal()
            assert error_of(whole.result()) == (503, "draining")
            assert events(streamed.result().text)[-2]["error"]["code"] == "draining"
        server.join()
    assert (server.status, server.failure) == (0, None)


def test_second_signal_ends_at_once() -> None:
    with fake_options({"step_seconds": 0.02}):
        server = ServerThread(settings()).wait_ready()
        pid = server.engine_pid()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(complete, server, max_tokens=600)
            wait_until(lambda: server.app.active == 1)
            began = time.monotonic()
            server.signal()
            server.signal()
            server.join()
            assert time.monotonic() - began < 2
            assert error_of(future.result())[0] == 503
    assert server.status == 0
    assert not alive(pid)


@pytest.mark.parametrize("moment", ["text", "engine"])
def test_signal_while_loading(moment: str) -> None:
    def slow_text(options: Any) -> Any:
        time.sleep(5 if moment == "text" else 0)
        return server_text(options)

    from server.fake_text import load_fake_text as server_text

    with fake_options({"load_seconds": 5}):
        server = ServerThread(settings(), load_text=slow_text)
        time.sleep(0.2)
        server.signal()
        server.join(3)
    assert (server.status, server.failure) == (0, None)


def test_idle_keep_alive_connections_do_not_delay_the_end() -> None:
    with fake_options({}):
        server = ServerThread(settings()).wait_ready()
        client = httpx.Client()
        client.get(server.url + "/health")
        began = time.monotonic()
        server.signal()
        server.join()
        assert time.monotonic() - began < 2
        client.close()


def test_summed_status() -> None:
    before = EngineStatus(steps=5, running=3, pages_total=9)
    assert engine_client._summed(before, EngineStatus(steps=2, running=1)) == EngineStatus(steps=7, running=1)
    assert engine_client._summed(before, before, gauges=False) == EngineStatus(steps=10)


def test_raw_garbage_does_not_disturb_others() -> None:
    with serving() as server:
        for data in (
            b"\x00" * 100,
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        ):
            exchange_raw(server.port, data, timeout=0.5)
        assert is_right(server)


def test_engine_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(engine_start.subprocess, "Popen", refuse)
    server = ServerThread(settings())
    server.join()
    assert isinstance(server.failure, LowbitError)
    assert server.failure.code == "E0710"
    assert "could not be started: Resource temporarily unavailable" in server.failure.message
