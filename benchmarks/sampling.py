"""What does a sampled token cost beside a greedy one? Draws from real logits, and whole steps.

    python benchmarks/sampling.py                    # rows alone; then steps of 1, 8 and 32 streams
    python benchmarks/sampling.py --rival-python llama.cpp=V/bin/python    # beside llama.cpp's sampler

Logits are those of the embedded model after tokens of English text. *Native* draws with csrc/sampling.cpp on
all threads and on one, *torch* is what runs where there is no native library, *llama.cpp* its sampler chain
on one thread, as it samples; each is the fastest of --repeats, in microseconds a token. Before anything is
timed native and torch draw the same tokens. A step's figure is the median of engine steps in which all
streams decode, of the fastest of three rounds, each step a call of its own; greedy decoding several steps a
call stands beside it at last (engine.continuous_decode), both engines taking turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quality_originals as originals
from comparison import rival_pythons
from machine import run_record
from regimes import SHORT_PROMPT, Prompts, decode_rate, decode_window_rate
from rich.console import Console
from rich.table import Table
from targets import EngineTarget
from torch import Tensor

from lowbit.checkpoint import open_checkpoint
from lowbit.engine import sampler
from lowbit.engine.messages import Request, SamplingParams
from lowbit.engine.sequence import Sequence
from lowbit.kernels import native
from lowbit.kernels.row_peaks import row_peaks
from lowbit.kernels.sampling import draw_tokens
from lowbit.loading import load_model
from lowbit.tokenization import load_tokenizer

ROWS = 32
ROUNDS = 3
RULES: dict[str, dict[str, Any]] = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8, top-k 40, top-p 0.95, min-p 0.05": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
    },
    "temperature 1, top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "temperature 0.7, top-p 0.8, top-k 20": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
}
PENALIZED = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of so many runs."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def real_logits() -> Tensor:
    """float32 (ROWS, vocabulary): after tokens of English text."""
    header = open_checkpoint(originals.SOURCE)
    model = load_model(header, device="cpu")
    prompt = originals.english_prompts(256)[0]
    logits = originals.prompt_logits(model, prompt)
    return logits[:: len(prompt) // ROWS][:ROWS].contiguous()


def sequences_of(rule: dict[str, Any]) -> list[Sequence]:
    tokenizer = load_tokenizer(open_checkpoint(originals.SOURCE))
    made = []
    for seed in range(ROWS):
        request = Request(id=str(seed), prompt=(1,), sampling=SamplingParams(seed=seed, **rule))
        made.append(Sequence.start(request, 1000, frozenset(), tokenizer, None))
    return made


def row_figures(logits: Tensor, rule: dict[str, Any], repeats: int) -> dict[str, float]:
    """Seconds a row: native on all threads and on one, torch."""
    sequences = sequences_of(rule)
    draws = [sampler.plan_draw(row, sequence, 1, logits.shape[1]) for row, sequence in enumerate(sequences)]
    peaks = row_peaks(logits)[0]

    def with_torch() -> list[int]:
        return [sampler._draw(row, one) for row, one in zip(logits, sequences, strict=True)]

    drawn = draw_tokens(logits, peaks, draws)
    if drawn is None:
        raise SystemExit("no native library here: there is nothing to compare")
    if drawn != with_torch():
        raise SystemExit(f"{rule}: native and torch drew different tokens")
    figures = {"native": fastest(lambda: draw_tokens(logits, peaks, draws), repeats) / ROWS}
    alone = [
        fastest(
            lambda row=row: draw_tokens(  # type: ignore[misc]
                logits[row : row + 1], peaks[row : row + 1], [draws[row]._replace(row=0)]
            ),
            repeats,
        )
        for row in range(ROWS)
    ]
    figures["native, one row"] = statistics.mean(alone)
    figures["torch"] = fastest(with_torch, max(repeats // 4, 1)) / ROWS
    return figures


def rival_seconds(python: str, logits: Tensor, repeats: int) -> dict[str, Any]:
    """llama.cpp's sampler on the same logits."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits"
        file.write_bytes(logits.numpy().tobytes())
        rows, width = logits.shape
        asked = {"logits": str(file), "rows": rows, "width": width, "repeats": repeats}
        asked["rules"] = list(RULES.values())
        script = Path(__file__).parent / "rivals" / "sample_llama.py"
        command = [python, str(script), json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script.name} failed: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def step_seconds(target: EngineTarget, streams: int, rule: dict[str, Any], tokens: int) -> float:
    """Of a step in which all streams decode, the median."""
    engine = target.engine
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1, **rule)
    prompts = originals.english_prompts(256 * streams)
    for number in range(streams):
        prompt = tuple(prompts[number % len(prompts)][: 32 + number])
        target.sent += 1
        engine.submit(Request(id=f"bench-{target.sent}", prompt=prompt, sampling=sampling))
    times = []
    while engine.has_work():
        began = time.perf_counter()
        events = engine.step()
        if len(events) == streams:
            times.append(time.perf_counter() - began)
    while engine.idle_step():
        pass
    return statistics.median(times[2:])


def continued_rates(streams: list[int], tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Tokens a second of all streams, greedy, by steps in a call; the median of so many turns."""
    targets = {
        "one": EngineTarget(originals.SOURCE, None, num_continuous_decode_steps=1),
        "default": EngineTarget(originals.SOURCE, None),
    }
    prompts = Prompts(48_000)
    found: dict[str, dict[str, float]] = {}
    for count in streams:
        rates: dict[str, list[float]] = {name: [] for name in targets}
        for _ in range(repeats + 1):
            asked = prompts.take(count, SHORT_PROMPT)
            answers = {name: target.complete(asked, tokens) for name, target in targets.items()}
            if any(a.ids != b.ids for a, b in zip(*answers.values(), strict=True)):
                raise SystemExit("steps in one call chose other tokens")
            for name, listed in answers.items():
                rates[name].append((decode_rate if count == 1 else decode_window_rate)(listed).popitem()[1])
        found[str(count)] = {name: statistics.median(values[1:]) for name, values in rates.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rival-python", action="append", default=[], metavar="NAME=PATH")
    options = parser.parse_args()
    console = Console(stderr=True)
    logits = real_logits()
    python = rival_pythons(options.rival_python).get("llama.cpp")
    rival = rival_seconds(python, logits, options.repeats) if python else None
    rows: dict[str, dict[str, float]] = {}
    for place, (name, rule) in enumerate(RULES.items()):
        rows[name] = row_figures(logits, rule, options.repeats)
        if rival is not None:
            rows[name]["llama.cpp"] = rival["seconds"][place]
    table = Table(title=f"µs a token, vocabulary {logits.shape[1]}, {native.threads()} threads")
    table.add_column("drawn with")
    for heading in next(iter(rows.values()), {}):
        table.add_column(heading, justify="right")
    for name, found in rows.items():
        table.add_row(name, *(f"{value * 1e6:.0f}" for value in found.values()))
    console.print(table)

    # A step at a time: what several in one call spare is not the sampler's.
    target = EngineTarget(originals.SOURCE, None, num_continuous_decode_steps=1)
    kinds = {
        "greedy": {"temperature": 0.0},
        **RULES,
        "temperature 0.8, top-p 0.95, repetition penalty 1.1": PENALIZED,
    }
    kinds["temperature 1, 5 log-probabilities"] = {"temperature": 1.0, "logprobs": 5}
    steps: dict[str, dict[str, float]] = {name: {} for name in kinds}
    for count in options.streams:
        for _ in range(ROUNDS):  # the kinds take turns: a machine has its minutes
            for name, rule in kinds.items():
                seconds = step_seconds(target, count, rule, options.tokens)
                steps[name][str(count)] = min(seconds, steps[name].get(str(count), seconds))
    table = Table(title="ms a step")
    table.add_column("chosen by")
    for streams in map(str, options.streams):
        table.add_column(f"{streams} streams", justify="right")
        table.add_column("to greedy", justify="right")
    for name, by_streams in steps.items():
        cells = [(f"{v * 1e3:.2f}", f"{v / steps['greedy'][n]:.2f}") for n, v in by_streams.items()]
        table.add_row(name, *(text for cell in cells for text in cell))
    console.print(table)
    continued = continued_rates(options.streams, 2 * options.tokens, max(options.repeats // 4, 3))
    table = Table(title="greedy tokens a second, by steps in a call")
    for heading in ("streams", "one", "default", "ratio"):
        table.add_column(heading, justify="right")
    for count, by_steps in continued.items():
        one, default = by_steps.values()
        table.add_row(count, f"{one:.0f}", f"{default:.0f}", f"{default / one:.3f}")
    console.print(table)
    record = run_record("sampling") | {"isa": native.isa(), "threads": native.threads()}
    record |= {"rows": rows, "steps": steps, "continued": continued, "rival": rival}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
