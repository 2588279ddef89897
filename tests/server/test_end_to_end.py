"""The embedded model behind the real command: chat with the official client, kill, recover, stop."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from server.harness import alive, http, wait_until

QUESTION: Any = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
TEXT = "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy"


class Served:
    """``lowbit serve`` in a process."""

    def __init__(self, errors: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.errors = errors
        command = [sys.executable, "-m", "lowbit", "serve", "--port", str(port), "--max-total-tokens", "8192"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LOWBIT_KERNEL_TIMINGS": "off"}
        with errors.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def ready(self) -> bool:
        """Whether it serves; fails when it has ended."""
        assert self.process.poll() is None, self.errors.read_text()
        return http.get(self.url + "/readyz").status_code == 200

    def engine(self) -> int:
        """The engine's process id."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        [pid] = [int(pid) for pid in children if "lowbit.engine.process" in command_line(pid)]
        return pid

    def info(self) -> dict[str, Any]:
        """What the server says about itself."""
        return http.get(self.url + "/get_server_info").json()


def command_line(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("serve") / "output")
    try:
        wait_until(server.ready, 90)
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def greedy_chat(client: openai.OpenAI, tokens: int = 24) -> str:
    result = client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, max_tokens=tokens
    )
    return result.choices[0].message.content or ""


def test_chat_knows_paris(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    result = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=64)
    [choice] = result.choices
    assert "Paris" in (choice.message.content or "")
    assert "<|im_end|>" not in (choice.message.content or "")
    assert choice.finish_reason == "stop"  # by the model's own end token
    assert http.get(served.url + "/health_generate").status_code == 200


def test_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, max_tokens=24, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == greedy_chat(client)
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens <= 24
    assert usage.prompt_tokens_details is not None
    # The question was asked before: all its full pages come from the prefix cache.
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= (usage.prompt_tokens - 16) // 16 * 16


def test_prompt_logprobs_are_the_same_over_a_prefix_hit(served: Served, client: openai.OpenAI) -> None:
    def score() -> list[float]:
        result = client.completions.create(model="smollm2", prompt=TEXT, max_tokens=0, echo=True, logprobs=3)
        [choice] = result.choices
        assert choice.text == TEXT
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs
        assert "".join(logprobs.tokens) == TEXT
        first, *rest = logprobs.token_logprobs
        assert first is None and all(value is not None and value <= 0 for value in rest)
        return rest

    assert http.post(served.url + "/flush_cache").status_code == 200
    cold, warm = score(), score()
    assert cold == warm
    assert sum(cold[-8:]) > sum(cold[:8])  # the sentence's repetition is easier to foresee


def test_token_ids_and_text_agree(served: Served, client: openai.OpenAI) -> None:
    ids = http.post(served.url + "/tokenize", json={"prompt": TEXT}).json()["tokens"]
    assert http.post(served.url + "/detokenize", json={"tokens": ids}).json()["text"] == TEXT
    answers = [
        client.completions.create(model="smollm2", prompt=prompt, temperature=0, max_tokens=8)
        for prompt in (TEXT, ids)
    ]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    assert "dog" in answers[0].choices[0].text


def test_answers_do_not_depend_on_company(client: openai.OpenAI) -> None:
    alone = greedy_chat(client)
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        others = [
            pool.submit(
                client.completions.create,
                model="smollm2",
                prompt=f"{TEXT} {index}",
                max_tokens=8,
                seed=index,
            )
            for index in range(6)
        ]
        same = [pool.submit(greedy_chat, client) for _ in range(3)]
        assert {future.result() for future in same} == {alone}
        assert all(future.result().choices[0].text for future in others)


def test_bad_requests_do_not_disturb(served: Served, client: openai.OpenAI) -> None:
    for fields in ({"temperature": "NaN"}, {"max_token": 5}, {"messages": []}, {"max_tokens": 10**6}):
        body = {"messages": QUESTION, **fields}
        response = http.post(served.url + "/v1/chat/completions", json=body)
        assert response.status_code == 400 and response.json()["error"]["message"]
    assert "Paris" in greedy_chat(client)


def test_enormous_prompt_stalls_nobody(served: Served) -> None:
    """Tokenizing four million characters takes seconds, but not on the event loop."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        body = {"prompt": "hello world " * 350_000, "max_tokens": 1}
        refused = pool.submit(http.post, served.url + "/v1/completions", json=body, timeout=30)
        slowest = 0.0
        while not refused.done():
            began = time.monotonic()
            assert http.get(served.url + "/health").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
    assert refused.result().json()["error"]["code"] in ("prompt_too_long", "text_timeout")
    assert slowest < 0.7


def test_leaving_client_frees_its_place(served: Served, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="smollm2", prompt=TEXT, max_tokens=800, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    wait_until(lambda: served.info()["status"]["running"] == 1, 3)
    stream.close()
    began = time.monotonic()
    wait_until(lambda: served.info()["sequences_held"] == 0)
    assert time.monotonic() - began < 1
    wait_until(lambda: served.info()["status"]["running"] == 0, 3)


def test_http_process_holds_no_torch(served: Served) -> None:
    assert "torch" not in Path(f"/proc/{served.process.pid}/maps").read_text()
    assert "torch" in Path(f"/proc/{served.engine()}/maps").read_text()


def test_the_card_says_what_is_served(served: Served) -> None:
    card = http.get(served.url + "/v1/models").json()["data"][0]
    assert (card["architecture"], card["quantization"]) == ("llama", "gguf, Q4_1, Q8_0")
    assert 90e6 < card["weight_bytes"] < 110e6 and card["quality"] is None
    lines = http.get(served.url + "/metrics").text.splitlines()
    [line] = [line for line in lines if line.startswith("lowbit_weight_bytes ")]
    assert float(line.split()[1]) == card["weight_bytes"]


def test_killed_engine_is_healed(served: Served, client: openai.OpenAI) -> None:
    before = greedy_chat(client)
    old = served.engine()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [
            pool.submit(
                client.completions.create,
                model="smollm2",
                prompt=f"{TEXT} {index}",
                max_tokens=500,
                extra_body={"ignore_eos": True},
            )
            for index in range(4)
        ]
        wait_until(lambda: served.info()["status"]["running"] == 4)
        began = time.monotonic()
        os.kill(old, signal.SIGKILL)
        for future in running:
            with pytest.raises(openai.InternalServerError) as caught:
                future.result()
            assert caught.value.code == "engine_restarting"
        assert time.monotonic() - began < 2
    wait_until(served.ready, 60)
    assert not alive(old)
    assert greedy_chat(client) == before
    assert served.info()["restarts"] == 1
    assert served.info()["status"]["invariant_violations"] == 0


def test_sigterm_drains(served: Served, client: openai.OpenAI) -> None:
    """Last: it ends the server."""
    engine = served.engine()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(greedy_chat, client)
        wait_until(lambda: served.info()["sequences_held"] == 1)
        served.process.send_signal(signal.SIGTERM)
        assert "Paris" in future.result()
    assert served.process.wait(20) == 0
    assert not alive(engine)
    assert "Traceback" not in served.errors.read_text()
