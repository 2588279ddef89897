"""What does a screened output head bring? Greedy decode with and without it, from the same weights.

    python benchmarks/head_screen.py                       # the embedded model: 4-bit layers, a bfloat16 head
    python benchmarks/head_screen.py --model 1b --sequences 1 4
    python benchmarks/head_screen.py --model FOLDER --quantization none

Prompts are sentences; each is answered with and without the screen, and must get the same tokens. Then a few
steps with it and a few without take turns, so that what else the machine does meets both alike: *with* and
*without* are the fastest tenth of such steps, in ms; with --threads 1 of CPU time, which others disturb less.
*blocks*: how many of the head's blocks of 16 rows a step with the screen reads, on average; *whole*: the
share of steps in which it was in vain and all were. Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

from made_models import float_folder
from rich.console import Console
from rich.table import Table

from lowbit.engine.messages import Request, SamplingParams
from lowbit.kernels import native
from lowbit.kernels.screened_head import ScreenedHead
from lowbit.llm import LLM
from lowbit.models.language_model import LanguageModel

PROMPTS = (
    "The harbour office keeps a book of every boat that leaves before dawn.",
    "Explain how rainbows form and why the sky is blue.",
    "A recipe for bread with seeds, step by step:",
    "def leave(self, name, hour, people):",
    "The three largest cities of Italy are",
    "Dear friend, I have moved to a new city and",
    "In 1969 the first people walked on the moon.",
    "Photosynthesis is the process by which",
)

TURN = 8  # steps


@dataclass
class Figure:
    """So many sequences at once: seconds of single steps, without and with the screen."""

    sequences: int
    off: list[float]
    on: list[float]
    steps: int = 0
    blocks: int = 0
    whole: int = 0

    @property
    def times(self) -> tuple[float, float]:
        """Milliseconds of the fastest tenth, without and with."""
        without, screened = (sorted(times)[len(times) // 10] * 1e3 for times in (self.off, self.on))
        return without, screened


def answer(
    llm: LLM, sequences: int, tokens: int, screened: list[bool]
) -> tuple[list[list[int]], list[float]]:
    """Tokens of each sequence and seconds of each step that decodes all of them. ``screened``: whether a step
    is to use the screen, in turn."""
    engine, runner = llm._engine, llm._engine._runner
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    found: dict[str, list[int]] = {}
    for number in range(sequences):
        prompt = llm.tokenizer.encode(f"{number}. {PROMPTS[number % len(PROMPTS)]}")
        found[str(number)] = []
        engine.submit(Request(id=str(number), prompt=tuple(prompt), sampling=sampling))
    times: list[float] = []
    clock = time.thread_time if native.threads() == 1 else time.perf_counter
    while engine.has_work():
        decoding = all(found.values())
        runner._is_screened = screened[len(times) % len(screened)]
        began = clock()
        events = engine.step()
        if decoding:
            times.append(clock() - began)
        for event in events:
            found[event.id] += event.tokens
    return list(found.values()), times


def measure(llm: LLM, head: ScreenedHead, sequences: int, tokens: int, repeats: int) -> Figure:
    """Equal tokens first, then times."""
    before = head.steps
    expected, _ = answer(llm, sequences, tokens, [False])
    found, _ = answer(llm, sequences, tokens, [True])
    if found != expected:
        raise SystemExit(f"{sequences} sequences: the screen changed the answer")
    screened, blocks, whole = (b - a for a, b in zip(before, head.steps, strict=True))
    figure = Figure(sequences, [], [], screened, blocks, whole)
    for _ in range(repeats):
        _, times = answer(llm, sequences, tokens, [False] * TURN + [True] * TURN)
        for number, seconds in enumerate(times):
            if number % TURN:  # the first finds other weights in the caches, or is recorded
                (figure.on if number // TURN % 2 else figure.off).append(seconds)
    return figure


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, 1b (random), or a folder")
    parser.add_argument("--quantization", default="rtn", help="of the layers; none: as they are")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    folder = str(float_folder(asked.model)) if asked.model in ("smollm2", "1b") else asked.model
    llm = LLM(
        folder,
        quantization=None if asked.quantization == "none" else asked.quantization,
        threads=asked.threads,
        max_total_tokens=8192,
        disable_radix_cache=True,
        lm_head_screen="on",
    )
    model = llm._engine.model
    if not isinstance(model, LanguageModel) or model.screened is None:
        raise SystemExit(f"{folder}: its output head has no screen")
    head = model.head.weights[0].nbytes
    total = model.weight_bytes - model.screened.screen.nbytes
    figures = [
        measure(llm, model.screened, sequences, asked.tokens, asked.repeats) for sequences in asked.sequences
    ]
    title = (
        f"{asked.model}, {asked.quantization}: {total / 1e6:.0f} MB, {head / total:.0%} of them the head's"
    )
    table = Table(title=f"{title}; {native.isa()}, {native.threads()} threads")
    for column in ("sequences", "without, ms", "with, ms", "times as fast", "blocks", "of", "whole"):
        table.add_column(column, justify="right")
    for figure in figures:
        off, on = figure.times
        cells = (f"{off:.2f}", f"{on:.2f}", f"{off / on:.2f}", f"{figure.blocks / max(figure.steps, 1):.1f}")
        whole = figure.whole / max(figure.steps + figure.whole, 1)
        table.add_row(str(figure.sequences), *cells, str(-(-model.vocab_size // 16)), f"{whole:.0%}")
    Console(width=110).print(table)
    results = [
        {
            "sequences": figure.sequences,
            "without_ms": figure.times[0],
            "with_ms": figure.times[1],
            "blocks": figure.blocks / max(figure.steps, 1),
            "whole_steps": figure.whole,
        }
        for figure in figures
    ]
    record = {"benchmark": "head_screen", "model": asked.model, "isa": native.isa(), "figures": results}
    print(json.dumps(record | {"threads": native.threads(), "head_share": head / total}))


if __name__ == "__main__":
    main()
