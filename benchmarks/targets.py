"""What a serving benchmark sends prompts to: a server, the engine in this process, another's process."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

RIVAL_SCRIPTS = Path(__file__).parent / "rivals"


@dataclass
class Answer:
    """One finished request. ``times``: when each token (over HTTP: each piece of text) came, in seconds."""

    tokens: int = 0
    text: str = ""
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # empty over HTTP


class Target(Protocol):
    """Something that continues prompts, all of them at once."""

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
        """Greedy continuations of exactly ``max_tokens`` tokens each."""


class HttpTarget:
    """A server over /v1/completions. The client is plain sockets: it shares the cores with the server."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
        return asyncio.run(self._complete(prompts, max_tokens))

    async def _complete(self, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
        started = time.perf_counter()
        return await asyncio.gather(*(self._one(prompt, max_tokens, started) for prompt in prompts))

    async def _one(self, prompt: list[int], max_tokens: int, started: float) -> Answer:
        body = json.dumps(
            {
                "model": "default",
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit(f"{status.decode().strip()}: {(await reader.read()).decode(errors='replace')}")
        answer = Answer()
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue  # headers, chunk sizes, blank lines, [DONE]
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"the server answered: {event['error']}")
            for choice in event["choices"]:
                answer.text += choice["text"]
                answer.times.append(time.perf_counter() - started)
            if event.get("usage"):
                answer.tokens = event["usage"]["completion_tokens"]
        writer.close()
        return answer


class EngineTarget:
    """The engine in this process. ``options``: further settings."""

    def __init__(self, model: str, threads: int | None, **options: Any) -> None:
        from lowbit.engine.load import load_engine
        from lowbit.settings import Settings

        settings = Settings(model=model, threads=threads, **options)
        self.engine = load_engine(settings)
        self.sent = 0
        self._idle()

    @property
    def weight_bytes(self) -> int:
        """Of the packed model."""
        return self.engine.model.weight_bytes

    def _idle(self) -> None:
        """What the server's loop does between requests."""
        while self.engine.idle_step():
            pass

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
        from lowbit.engine.messages import Request, SamplingParams

        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        answers: dict[str, Answer] = {}
        started = time.perf_counter()
        for prompt in prompts:
            self.sent += 1
            request = Request(id=f"bench-{self.sent}", prompt=tuple(prompt), sampling=sampling)
            answers[request.id] = Answer()
            self.engine.submit(request)
        while self.engine.has_work():
            for event in self.engine.step():
                if event.error:
                    raise SystemExit(f"the engine answered: {event.error}")
                answer = answers[event.id]
                answer.tokens += len(event.tokens)
                answer.ids += event.tokens
                answer.text += event.text
                answer.times += [time.perf_counter() - started] * len(event.tokens)
        self._idle()
        return list(answers.values())


class RivalError(RuntimeError):
    """Another engine could not do what it was asked; the message is its own."""


class RivalTarget:
    """Another engine in a process of its own Python: one of benchmarks/rivals/ (``line_protocol`` there).

    ``name``: what the table calls it. ``variants``: its settings worth trying, by name; ``variant`` is the
    one in use. ``ready_seconds``: from the start of its process until the model could answer.
    """

    def __init__(self, name: str, python: str, script: str, options: dict[str, Any]) -> None:
        self.name = name
        self.variant = ""
        self.copied_contexts = False  # may it fill the contexts of one call with copies of the longest?
        started = time.perf_counter()
        command = [python, str(RIVAL_SCRIPTS / script), json.dumps(options)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        except OSError as error:
            raise RivalError(f"{python} does not run: {error}") from None
        ready = self._read()
        self.ready_seconds = time.perf_counter() - started
        self.version: str = ready["version"]
        self.details: dict[str, Any] = ready["details"]
        self.variants: list[str] = ready["variants"]

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
        asked = {"prompts": prompts, "max_tokens": max_tokens, "copied_contexts": self.copied_contexts}
        answers = [
            Answer(len(said["ids"]), "", said["times"], said["ids"]) for said in self._ask(asked)["answers"]
        ]
        if any(answer.tokens != max_tokens for answer in answers):
            told = sorted({answer.tokens for answer in answers})
            raise RivalError(f"{self.name} gave {told} tokens where {max_tokens} were asked for")
        return answers

    def logits(self, prompt: list[int], file: Path) -> tuple[int, int]:
        """Has float32 logits of all the prompt's tokens written to ``file``: (tokens, vocabulary)."""
        tokens, words = self._ask({"prompt": prompt, "logits": str(file)})["shape"]
        if (tokens, file.stat().st_size) != (len(prompt), 4 * tokens * words):
            held = f"{tokens} x {words} logits in {file.stat().st_size} bytes"
            raise RivalError(f"{self.name} wrote {held} for {len(prompt)} tokens")
        return tokens, words

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None, "a pipe was asked for"
        asked["variant"] = self.variant or self.variants[0]
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RivalError(f"{self.name} ended") from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "a pipe was asked for"
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RivalError(f"{self.name} ended with status {status}; its last words are above")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise RivalError(f"{self.name}: {said['error']}")
        return said

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None, "a pipe was asked for"
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def running_server(model: str, threads: int | None) -> Iterator[tuple[str, float]]:
    """A server of our own on a free port: its address, and the seconds it took to be ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lowbit", "serve", model, "--port", str(port), "--log-level", "warning"]
    command += ["--threads", str(threads)] if threads else []
    started = time.perf_counter()
    server = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _is_ready(f"{url}/readyz"):
            if server.poll() is not None:
                raise SystemExit(f"the server ended with status {server.returncode}")
            time.sleep(0.02)
        yield url, time.perf_counter() - started
    finally:
        server.terminate()
        server.wait(60)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def import_torch_seconds() -> float:
    """What ``python -c "import torch"`` takes here and now: the best of three."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        times.append(time.perf_counter() - started)
    return min(times)
