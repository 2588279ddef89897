"""What does speculation bring? Decode with and without it, on copies and on other text.

    python benchmarks/speculation.py                     # one stream and four
    python benchmarks/speculation.py --streams 1 --repeats 7

*Copies* are answers whose words mostly stand in the prompt: a text or a program to repeat, or to print with a
change; greedy. *Others* are free texts, sampled at temperature 0.8, because a small model's greedy texts soon
repeat themselves, which is a copy again. Both engines answer every prompt first, and must give the same
tokens. Then they take turns, so that what else the machine does meets both alike: a ratio is the median over
--repeats of with / without, measured in tokens a second of wall time, and again of CPU time, which other
programs disturb less. Time counts from the moment that every stream has its first token. Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowbit.engine.messages import Request, SamplingParams
from lowbit.llm import LLM

ROOT = Path(__file__).parents[1]
PROSE = """The harbour office keeps a book of every boat that leaves before dawn. The clerk writes the name,
the hour and the number of people on board, and the pilot signs below. When a boat returns, a second clerk
draws a line through the entry and adds the weather. Boats that have no line by midnight are read out on the
radio, and the lifeboat crew is woken at one."""
PROGRAM = '''class Ledger:
    """Boats at sea."""

    def __init__(self):
        self.entries = {}

    def leave(self, name, hour, people):
        if name in self.entries:
            raise ValueError(f"{name} is at sea already")
        self.entries[name] = (hour, people)

    def come_back(self, name):
        hour, people = self.entries.pop(name)
        return people

    def missing(self, now):
        return [name for name, (hour, _) in self.entries.items() if hour < now]
'''
COPIES = {
    "repeat prose": f"Repeat this text exactly, word for word:\n\n{PROSE}",
    "repeat a program": f"Repeat this program exactly:\n\n```python\n{PROGRAM}```",
    "change a program": f"Rename the class to Logbook and print the program:\n\n```python\n{PROGRAM}```",
}
OTHERS = {
    "story": "Write a short story about a lighthouse keeper who finds a letter.",
    "explanation": "Explain how rainbows form and why the sky is blue.",
    "letter": "Write a letter to a friend about moving to a new city.",
}


@dataclass
class Run:
    """One timed answer to each of some requests."""

    tokens: list[list[int]]
    rate: float  # tokens a second of wall time
    cpu_rate: float  # of CPU time of all threads


def answer(llm: LLM, prompts: list[list[int]], sampling: list[SamplingParams]) -> Run:
    """All prompts at once."""
    engine = llm._engine
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    for name, prompt, params in zip(tokens, prompts, sampling, strict=True):
        engine.submit(Request(id=name, prompt=tuple(prompt), sampling=params))
    begun, wall, cpu = 0, 0.0, 0.0
    while engine.has_work():
        for event in engine.step():
            tokens[event.id] += event.tokens
        if not begun and all(tokens.values()):
            begun, wall, cpu = sum(map(len, tokens.values())), time.perf_counter(), time.process_time()
    rest = sum(map(len, tokens.values())) - begun
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Run(list(tokens.values()), rest / wall, rest / cpu)


@dataclass
class Figure:
    """A kind of prompt with so many streams."""

    kind: str
    streams: int
    ratios: list[float] = field(default_factory=list)
    cpu_ratios: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # without
    share: float = 0.0  # of the drafts that were right
    steps: float = 0.0  # with / without

    def row(self) -> list[str]:
        """Cells of the table."""
        spread = f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"
        ratio, cpu = statistics.median(self.ratios), statistics.median(self.cpu_ratios)
        rate = statistics.median(self.rates)
        cells = [
            f"{rate:.0f}",
            f"{ratio:.2f}",
            spread,
            f"{cpu:.2f}",
            f"{self.steps:.2f}",
            f"{self.share:.0%}",
        ]
        return [self.kind, str(self.streams), *cells]


def measure(
    without: LLM, speculating: LLM, kind: str, streams: int, question: str, tokens: int, repeats: int
) -> Figure:
    """Equal tokens first, then times in turns."""
    assert without.chat_template is not None, "the model has a chat template"
    prompt = without.chat_template.render([{"role": "user", "content": question}])
    temperature = 0.0 if kind in COPIES else 0.8
    sampling = [SamplingParams(temperature=temperature, seed=n, max_tokens=tokens) for n in range(streams)]
    figure = Figure(kind, streams)
    before = [llm._engine.status() for llm in (without, speculating)]
    first, second = (answer(llm, [prompt] * streams, sampling) for llm in (without, speculating))
    if first.tokens != second.tokens:
        raise SystemExit(f"{kind}, {streams} streams: speculation changed the answer")
    after = [llm._engine.status() for llm in (without, speculating)]
    plain, fewer = (b.steps - a.steps for a, b in zip(before, after, strict=True))
    drafts = after[1].draft_tokens - before[1].draft_tokens
    figure.steps = fewer / plain
    figure.share = (after[1].accepted_draft_tokens - before[1].accepted_draft_tokens) / max(drafts, 1)
    for _ in range(repeats):
        off, on = (answer(llm, [prompt] * streams, sampling) for llm in (without, speculating))
        figure.ratios.append(on.rate / off.rate)
        figure.cpu_ratios.append(on.cpu_rate / off.cpu_rate)
        figure.rates.append(off.rate)
    return figure


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, help="CPU threads of the engine")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=160, help="of an answer, at most")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    options = {"max_total_tokens": 8192, "threads": arguments.threads}
    without = LLM(arguments.model, **options)
    speculating = LLM(arguments.model, speculative_algorithm="NGRAM", **options)
    figures = [
        measure(without, speculating, kind, streams, text, arguments.tokens, arguments.repeats)
        for streams in arguments.streams
        for kind, text in (COPIES | OTHERS).items()
    ]
    threads = arguments.threads or len(os.sched_getaffinity(0))
    table = Table(title=f"{arguments.model}, with / without speculation, {cpu_name()}, {threads} threads")
    for column in ("answer", "streams", "tok/s", "ratio", "spread", "by CPU time", "steps", "drafts right"):
        table.add_column(column, justify="left" if column == "answer" else "right")
    for figure in figures:
        table.add_row(*figure.row())
    Console(width=110).print(table)
    record = {
        "benchmark": "speculation",
        "commit": commit(),
        "model": arguments.model,
        "cpu": cpu_name(),
        "threads": threads,
        "repeats": arguments.repeats,
        "tokens": arguments.tokens,
        "figures": [
            {
                "kind": figure.kind,
                "streams": figure.streams,
                "ratio": statistics.median(figure.ratios),
                "spread": max(figure.ratios) - min(figure.ratios),
                "cpu_ratio": statistics.median(figure.cpu_ratios),
                "steps_ratio": figure.steps,
                "drafts_right": figure.share,
            }
            for figure in figures
        ],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
