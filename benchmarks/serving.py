"""How fast is serving? Ready time, prefill, decode alone, and 8 and 32 streams at once.

    python benchmarks/serving.py                  # starts a server, measures over HTTP
    python benchmarks/serving.py --in-process     # the engine alone, without HTTP
    python benchmarks/serving.py --url http://127.0.0.1:30000    # a server that already runs

Prompts are random token ids, new for every request, so that neither a tokenizer nor the prefix cache is in
the figures. Two phases of a request differ in kind: *prefill* computes all prompt tokens at once and is bound
by arithmetic; *decode* computes one token a step and is bound by reading the weights from memory, which is
why many streams together give more tokens a second than one.

Before anything is timed, one greedy prompt is run alone and among seven others: the tokens must be the same.
Each figure is the median over --repeats, its spread (largest less smallest) beside it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PREFILL_TOKENS = 512
DECODE_TOKENS = 128
SHORT_PROMPT = 32  # tokens before a decode run: short, so that decode is what is timed


@dataclass
class Answer:
    """One finished request. ``times``: when each piece of text came, in seconds since the batch was sent."""

    tokens: int = 0
    text: str = ""
    times: list[float] = field(default_factory=list)


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
    """The engine in this process."""

    def __init__(self, model: str, threads: int | None) -> None:
        from lowbit.engine.engine import load_engine
        from lowbit.settings import Settings

        self.engine = load_engine(Settings(model=model, threads=threads))
        self.sent = 0

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
                answers[event.id].tokens += len(event.tokens)
                answers[event.id].text += event.text
                answers[event.id].times.append(time.perf_counter() - started)
        return list(answers.values())


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


@dataclass
class Figure:
    """One row of the table."""

    name: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        return max(self.values) - min(self.values)


class Prompts:
    """Random prompts, the same ones in every run."""

    def __init__(self, largest_id: int) -> None:
        self._random = random.Random(2718)
        self._largest = largest_id

    def take(self, count: int, tokens: int) -> list[list[int]]:
        # Small ids are often control tokens.
        return [[self._random.randint(300, self._largest) for _ in range(tokens)] for _ in range(count)]


def assert_same_alone_and_in_a_batch(target: Target, prompts: Prompts) -> None:
    """No speed is worth reporting if a request's tokens change with its neighbours."""
    batch = prompts.take(8, SHORT_PROMPT)
    together = target.complete(batch, 32)[0]
    alone = target.complete(batch[:1], 32)[0]
    if alone.text != together.text or alone.tokens != 32 or together.tokens != 32:
        raise SystemExit(f"greedy answers differ alone and among eight:\n{alone}\n{together}")


def measure(target: Target, prompts: Prompts, streams: list[int], repeats: int) -> list[Figure]:
    """Every figure of the running target; the first, cold run of each kind is not counted."""
    prefill, decode = Figure("prefill 512, one request", "tok/s", []), Figure("decode 128", "tok/s", [])
    for repeat in range(repeats + 1):
        first = target.complete(prompts.take(1, PREFILL_TOKENS), 1)[0]
        times = target.complete(prompts.take(1, SHORT_PROMPT), DECODE_TOKENS)[0].times
        if repeat:
            prefill.values.append(PREFILL_TOKENS / first.times[0])
            decode.values.append((DECODE_TOKENS - 1) / (times[-1] - times[0]))
    first_token = Figure("time to first token, prompt 512", "ms", [512e3 / value for value in prefill.values])
    figures = [prefill, first_token, decode]
    for count in streams:
        total = Figure(f"{count} streams, decode 128, all tokens", "tok/s", [])
        wait = Figure(f"{count} streams, time to first token (median)", "ms", [])
        gap = Figure(f"{count} streams, between tokens (99th percentile)", "ms", [])
        for _ in range(repeats):
            answers = target.complete(prompts.take(count, SHORT_PROMPT), DECODE_TOKENS)
            total.values.append(count * DECODE_TOKENS / max(answer.times[-1] for answer in answers))
            wait.values.append(1e3 * statistics.median(answer.times[0] for answer in answers))
            gaps = [b - a for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)]
            gap.values.append(1e3 * statistics.quantiles(gaps, n=100)[98])
        figures += [total, wait, gap]
    return figures


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def show(figures: list[Figure], title: str) -> None:
    table = Table(title=title)
    table.add_column("figure")
    for column in ("median", "spread"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    for figure in figures:
        table.add_row(figure.name, f"{figure.median:,.1f}", f"{figure.spread:,.1f}", figure.unit)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--in-process", action="store_true", help="the engine alone, without HTTP")
    parser.add_argument("--url", help="measure a server that already runs")
    parser.add_argument("--threads", type=int, help="CPU threads of the engine")
    parser.add_argument("--streams", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--largest-id", type=int, default=30000, help="largest token id in the prompts")
    arguments = parser.parse_args()
    prompts, ready = Prompts(arguments.largest_id), []

    def run(target: Target) -> list[Figure]:
        assert_same_alone_and_in_a_batch(target, prompts)
        return measure(target, prompts, arguments.streams, arguments.repeats)

    if arguments.in_process:
        started = time.perf_counter()
        target = EngineTarget(arguments.model, arguments.threads)
        ready.append(Figure("engine ready, torch imported with it", "s", [time.perf_counter() - started]))
        figures, how = run(target), "engine in process"
    elif arguments.url:
        figures, how = run(HttpTarget(arguments.url)), arguments.url
    else:
        torch_seconds = import_torch_seconds()
        with running_server(arguments.model, arguments.threads) as (url, seconds):
            beyond = max(0.0, seconds - torch_seconds)
            ready.append(Figure("server ready", "s", [seconds]))
            ready.append(Figure("server ready beyond import torch", "s", [beyond]))
            figures, how = run(HttpTarget(url)), "server over HTTP"
    figures = ready + figures
    threads = arguments.threads or len(os.sched_getaffinity(0))
    show(figures, f"{arguments.model}, {how}, {cpu_name()}, {threads} threads")
    record = {
        "benchmark": "serving",
        "commit": commit(),
        "model": arguments.model,
        "how": how,
        "cpu": cpu_name(),
        "threads": threads,
        "repeats": arguments.repeats,
        "figures": {
            figure.name: {"median": figure.median, "spread": figure.spread, "unit": figure.unit}
            for figure in figures
        },
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
