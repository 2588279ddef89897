"""Limits of the HTTP layer, who may enter, and the shapes of refusals; raw sockets where clients are odd."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lowbit.server import app as app_module
from lowbit.server.app import ROUTES, api_keys, exposure_warning
from lowbit.server.elsewhere import NOT_HERE
from lowbit.server.http import Guard, Route, host_name, is_loopback
from lowbit.server.limits import Limits
from server.harness import ServerThread, exchange_raw, http, quick, serving, settings, wait_until

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    limits = quick(
        body_seconds=0.4, header_seconds=0.4, body_chunks=50, queued_bytes=12 << 20, keep_alive_seconds=1.0
    )
    with serving(limits) as running:
        yield running


def post(server: ServerThread, path: str = "/v1/chat/completions", **arguments: Any) -> httpx.Response:
    return http.post(server.url + path, timeout=10, **arguments)


def head(path: str = "/v1/chat/completions", *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_what_is_elsewhere_is_not_here() -> None:
    assert not {route.path for route in ROUTES} & set(NOT_HERE)


def test_unknown_path_and_method(server: ServerThread) -> None:
    response = http.get(server.url + "/v2/x")
    assert response.status_code == 404
    assert error_of(response)["message"] == "there is no /v2/x here; the API is under /v1"
    for path, told in [
        ("/v1/chat/completion", "; did you mean /v1/chat/completions?"),
        ("/chat/completions", "; did you mean /v1/chat/completions?"),
        ("/v1/models/", "; did you mean /v1/models?"),
        ("/v1/embeddings", ": lowbit generates text and gives no embeddings, scores or classes; "
         "serve such a model elsewhere"),
        ("/v1/responses", ": send the conversation to /v1/chat/completions"),
        ("/v1/responses/resp_1/cancel", ": send the conversation to /v1/chat/completions"),
        ("/v1/messages/count_tokens", ": use /tokenize"),
        ("/load", ": use /get_server_info or /metrics"),
    ]:  # fmt: skip
        response = http.post(server.url + path, json={"input": "x"})
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
        assert error_of(response)["message"] == f"there is no {path} here{told}"
    response = http.put(server.url + "/v1/completions", content=b"x")
    assert response.status_code == 405
    assert error_of(response)["message"] == "/v1/completions takes POST, not PUT"
    assert http.head(server.url + "/health").status_code == 200


def test_compressed_bodies_are_refused_by_name(server: ServerThread) -> None:
    body = gzip.compress(b'{"prompt": "x", "max_tokens": 1}')
    response = http.post(server.url + "/v1/completions", content=body, headers={"content-encoding": "gzip"})
    error = error_of(response)
    assert (response.status_code, error["code"]) == (415, "unsupported_encoding")
    assert error["message"] == "the body is encoded as 'gzip'; send it plain"
    plain = {"content-encoding": "identity"}
    whole = http.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=plain)
    assert whole.status_code == 200


def test_body_too_large_is_refused_before_it_is_sent(server: ServerThread) -> None:
    answer = exchange_raw(server.port, head("/v1/completions", f"Content-Length: {12_690_000}"))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body is 12.1 MiB, limit 8 MiB" in answer
    assert b"connection: close" in answer.lower()


def test_body_too_large_is_read_by_a_client_that_sends_it_anyway(server: ServerThread) -> None:
    response = post(server, content=b"x" * (9 << 20))
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert server.app.queued.held == 0


def test_body_too_large_in_chunks(server: ServerThread) -> None:
    data = head("/v1/completions", "Transfer-Encoding: chunked")
    piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    answer = exchange_raw(server.port, data + piece * 9 + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_too_many_chunks(server: ServerThread) -> None:
    data = head("/v1/completions", "Transfer-Encoding: chunked")
    answer = exchange_raw(server.port, data + b"1\r\nx\r\n" * 60)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"too_many_chunks" in answer


def test_chunked_body_is_fine(server: ServerThread) -> None:
    response = post(server, content=iter([json.dumps(CHAT).encode()[:20], json.dumps(CHAT).encode()[20:]]))
    assert response.status_code == 200


@pytest.mark.parametrize("pieces", [1, 40])
def test_headers_too_large(server: ServerThread, pieces: int) -> None:
    """In one write and in many, complete and unfinished."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        data = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 33_000
        data += b"\r\n\r\n" if pieces == 1 else b""
        size = -(-len(data) // pieces)
        for start in range(0, len(data), size):
            client.sendall(data[start : start + size])
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"request headers are over 32 KiB" in answer


def test_headers_below_the_limit_and_a_large_body_in_one_write(server: ServerThread) -> None:
    body = json.dumps({**CHAT, "user": "u" * 100_000}).encode()
    data = head("/v1/chat/completions", f"Content-Length: {len(body)}", "X: " + "y" * 31_000)
    answer = exchange_raw(server.port, data + body, timeout=1.0)
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_slow_headers_are_cut_off(server: ServerThread) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert client.recv(100) == b""
    assert 0.3 < time.monotonic() - began < 2


def test_silent_connection_is_cut_off(server: ServerThread) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        assert client.recv(100) == b""


def test_slow_second_request_on_a_kept_connection_is_cut_off(server: ServerThread) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(head("/health", method="GET"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"GET /health HTTP/1.1\r\n")
        began = time.monotonic()
        assert client.recv(100) == b""
    assert time.monotonic() - began < 0.9  # the header clock, not the keep-alive's


def test_idle_connection_is_closed_after_keep_alive(server: ServerThread) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(head("/health", method="GET"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        began = time.monotonic()
        assert client.recv(100) == b""
    assert time.monotonic() - began > 0.6


def test_slow_body_times_out(server: ServerThread) -> None:
    answer = exchange_raw(server.port, head("/v1/completions", "Content-Length: 100") + b"{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within 0.4 s" in answer
    server.assert_idle()


def test_client_that_leaves_in_the_middle_of_its_body(server: ServerThread) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head("/v1/completions", "Content-Length: 100") + b"{")
    server.assert_idle()


def test_not_http(server: ServerThread) -> None:
    answer = exchange_raw(server.port, b"hello there\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"invalid_http" in answer


def test_pipelined_request_ends_the_connection(server: ServerThread) -> None:
    body = json.dumps({**CHAT, "max_tokens": 400}).encode()
    data = head("/v1/chat/completions", f"Content-Length: {len(body)}") + body
    assert exchange_raw(server.port, data + head("/health", method="GET")) == b""
    server.assert_idle()


def test_bodies_in_progress_are_bounded_together(server: ServerThread) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as first:
        first.sendall(head("/v1/completions", f"Content-Length: {7 << 20}") + b" ")
        wait_until(lambda: server.app.queued.held == 7 << 20)
        answer = exchange_raw(server.port, head("/v1/completions", f"Content-Length: {7 << 20}"))
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert b"requests in progress hold 7 of 12 MiB" in answer
    assert b"retry-after: 1" in answer
    server.assert_idle()


def test_connections_beyond_the_limit_are_refused() -> None:
    with serving(quick(connections=5, header_seconds=20)) as small:
        held = [socket.create_connection(("127.0.0.1", small.port), timeout=5) for _ in range(8)]

        def open_now() -> int:
            return sum(not closed(client) for client in held)

        wait_until(lambda: open_now() <= 5)
        for client in held:
            client.close()
        wait_until(lambda: http.get(small.url + "/health").status_code == 200)


def closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_request_id(server: ServerThread) -> None:
    for wish in ("abc-DEF_1.2", "x" * 64):
        answer = http.get(server.url + "/health", headers={"X-Request-Id": wish})
        assert answer.headers["x-request-id"] == wish
    for wish in ("x" * 65, "a b", "a/b", ""):
        answer = http.get(server.url + "/nowhere", headers={"X-Request-Id": wish})
        assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:8", "10.0.0.7", "localhost."]
)
def test_hosts_that_are_served(server: ServerThread, host: str) -> None:
    assert http.get(server.url + "/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example"])
def test_hosts_that_are_not(server: ServerThread, host: str) -> None:
    response = http.get(server.url + "/health", headers={"Host": host})
    assert response.status_code in (400, 421)
    assert error_of(response)["code"] in ("host_not_allowed", "invalid_http")


def test_probes_of_http_1_0_bring_no_host(server: ServerThread) -> None:
    """HAProxy's, unless it is told otherwise."""

    def asked(path: str) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"GET " + path.encode() + b" HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: connection.recv(4096), b""))

    assert b" 200 " in asked("/health").partition(b"\r\n")[0]
    assert b" 421 " in asked("/v1/models").partition(b"\r\n")[0]


def test_other_origins_may_not_post(server: ServerThread) -> None:
    response = post(server, json=CHAT, headers={"Origin": "http://evil.example"})
    assert response.status_code == 403
    assert error_of(response)["code"] == "cross_origin"
    assert "access-control-allow-origin" not in response.headers
    assert post(server, json=CHAT, headers={"Origin": "null"}).status_code == 403
    assert post(server, json=CHAT, headers={"Origin": server.url}).status_code == 200


def test_static_page(server: ServerThread) -> None:
    page = http.get(server.url + "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("/chat.js", "/chat.css"):
        assert name in page.text
        assert http.get(server.url + name).status_code == 200
    assert "<script>" not in page.text and "style=" not in page.text  # the policy forbids inline code


# --- keys ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# ours\n\nsecond-key\n  third-key  \n")
    with serving(api_key="first-key", api_key_file=str(file)) as running:
        yield running


def test_every_route_says_who_may_use_it() -> None:
    assert all(isinstance(route, Route) for route in ROUTES)
    public = {route.path for route in ROUTES if route.access == "public"}
    assert public == {"/health", "/livez", "/readyz", "/", "/chat.css", "/chat.js"}
    assert {route.path for route in ROUTES if route.access == "admin"} == {"/flush_cache"}
    assert all(route.access in ("public", "key", "admin") for route in ROUTES)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_all_routes_ask_for_the_key(locked: ServerThread, route: Route) -> None:
    path = route.path.replace("*", "tiny")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}):
        response = http.request(route.method, locked.url + path, headers=headers)
        if route.access == "public":
            assert response.status_code == 200
        else:
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
            told = "invalid API key" if headers else "no API key; send the header 'Authorization: Bearer KEY'"
            assert error_of(response)["message"] == told
            assert response.headers["www-authenticate"] == "Bearer"
    for key in ("first-key", "second-key", "third-key"):
        response = http.request(route.method, locked.url + path, headers={"Authorization": f"Bearer {key}"})
        assert response.status_code in (200, 400)  # 400: it got to the (empty) body


def test_keys_have_salts_of_their_own() -> None:
    guard = Guard("127.0.0.1", "", ["a", "b"])
    salts = {guard._check_key(f"Bearer {key}") for key in ("a", "b")}
    assert len(salts) == 2


def test_key_makes_any_host_name_good(locked: ServerThread) -> None:
    assert http.get(locked.url + "/health", headers={"Host": "box.example"}).status_code == 200


def test_key_file_errors(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(app_module.LowbitError, match="holds no key") as caught:
        api_keys(settings(api_key_file=str(empty)))
    assert caught.value.code == "E0111"
    with pytest.raises(app_module.LowbitError, match="No such file") as caught:
        api_keys(settings(api_key_file=str(tmp_path / "none")))
    assert caught.value.code == "E0300"
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(app_module.LowbitError, match="not UTF-8"):
        api_keys(settings(api_key_file=str(binary)))


def test_open_to_the_world() -> None:
    wide = settings(host="0.0.0.0", port=30000)
    guard = Guard(wide.host, "", [])
    assert exposure_warning(wide, guard) == (
        "--host 0.0.0.0 without --api-key: anyone who can reach port 30000 can use this server; "
        "add --api-key-file to close it"
    )
    assert exposure_warning(wide, Guard(wide.host, "", ["k"])) is None
    assert exposure_warning(settings(), Guard("127.0.0.1", "", [])) is None


def test_admin_is_closed_on_open_hosts_without_keys() -> None:
    with serving(host="0.0.0.0") as wide:
        response = http.post(wide.url + "/flush_cache")
        assert response.status_code == 403
        assert error_of(response)["code"] == "admin_closed"
    with serving() as narrow:
        assert http.post(narrow.url + "/flush_cache").status_code == 200
        wait_until(lambda: narrow.app.client.status.preemptions == 1)  # the fake counts flushes there


def test_host_names() -> None:
    assert [host_name(h) for h in ("a:1", "[::1]:2", "A.B.", "x")] == ["a", "::1", "a.b", "x"]
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "0.0.0.0", "box")] == [
        *[True] * 4,
        *[False] * 2,
    ]
    guard = Guard("127.0.0.1", "box.lan, other", [])
    assert {"box.lan", "other", "localhost"} <= guard._hosts


def test_slow_tokenizing_costs_its_sender_only() -> None:
    with serving(quick(tokenize_seconds=0.2)) as running:
        slow: list[httpx.Response] = []
        threads = [
            threading.Thread(
                target=lambda: slow.append(
                    post(running, "/v1/completions", json={"prompt": "SLOWTEXT", "max_tokens": 1})
                )
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert post(running, "/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        for thread in threads:
            thread.join()
        assert [response.status_code for response in slow] == [400, 400]
        assert error_of(slow[0])["message"] == "tokenizing took longer than 0.2 s; shorten the input"


def test_limits_come_from_settings() -> None:
    limits = Limits.from_settings(
        settings(max_body_mb=3, queue_timeout=1, request_timeout=2, drain_timeout=4, max_connections=7)
    )
    assert (limits.body_bytes, limits.queue_seconds, limits.request_seconds) == (3 << 20, 1, 2)
    assert (limits.drain_seconds, limits.connections) == (4, 7)
