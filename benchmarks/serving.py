"""How fast is serving? Ready time, prefill, decode alone, and 8 and 32 streams at once.

    python benchmarks/serving.py                  # starts a server, measures over HTTP
    python benchmarks/serving.py --in-process     # the engine alone, without HTTP
    python benchmarks/serving.py --url http://127.0.0.1:30000    # a server that already runs
    python benchmarks/serving.py --rival llama.cpp --rival-python llama.cpp=V/bin/python    # beside another

Prompts are random token ids, new for every request, so that neither a tokenizer nor the prefix cache is in
the figures. Two phases of a request differ in kind: *prefill* computes all prompt tokens at once and is bound
by arithmetic; *decode* computes one token a step and is bound by reading the weights from memory, which is
why many streams together give more tokens a second than one.

Before anything is timed, one greedy prompt is run alone and among seven others: the tokens must be the same.
Each figure is the median over --repeats, its spread (largest less smallest) beside it. The last line is JSON.

With --rival (llama.cpp, openvino, vllm, or all) the engine runs in this process and the rivals each in one of
their own, in the Python that --rival-python or LOWBIT_RIVAL_PYTHON names (NAME=PATH, several with commas);
they take turns (comparison.py) in the regimes of regimes.py. A rival that is not there is recorded with what
would bring it. --model 1b is a Llama of 1.1 billion random weights; --file is the GGUF type lowbit runs,
--rival-files what each rival tries. An AVX2 comparison: LOWBIT_ISA=avx2, and a llama.cpp without AVX-512.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from comparison import (
    ENGINES,
    OWN,
    SAME_SIZE,
    TEXT,
    Comparison,
    Contestant,
    Engine,
    model_bytes,
    rival_contestant,
    rival_pythons,
    why_absent,
)
from machine import cpu_name, run_record
from regimes import Figure, Prompts, assert_same_alone_and_in_a_batch, measure, rival_regimes
from rich.console import Console
from rich.table import Table
from targets import (
    EngineTarget,
    HttpTarget,
    RivalError,
    Target,
    import_torch_seconds,
    running_server,
)

OWN_FILES = {"smollm2": "q4_1", "1b": "q4_0"}
RIVAL_FILES = {
    "llama.cpp": {"smollm2": ["q4_1", "q4_0", "q4_k_m"], "1b": ["q4_0", "q4_1"]},
    "openvino": {"smollm2": ["int4-g64"], "1b": ["int4-g128"]},
    "vllm": {"smollm2": ["w4a16", "bf16"], "1b": ["w4a16"]},
}


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
    parser.add_argument("--model", default="smollm2", help="smollm2, 1b (random), a folder or a GGUF file")
    parser.add_argument("--in-process", action="store_true", help="the engine alone, without HTTP")
    parser.add_argument("--url", help="measure a server that already runs")
    parser.add_argument("--threads", type=int, help="CPU threads of the engine")
    parser.add_argument("--streams", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--largest-id", type=int, default=30000, help="largest token id in the prompts")
    rivals = parser.add_argument_group("beside other engines")
    rivals.add_argument("--rival", action="append", default=[], choices=[*ENGINES, "all"])
    rivals.add_argument("--rival-python", action="append", default=[], metavar="NAME=PATH")
    rivals.add_argument(
        "--rival-files", nargs="*", metavar="TYPE", help="GGUF types, int4-g64, gguf-q4_1, w4a16, bf16 …"
    )
    rivals.add_argument(
        "--activation-quantization", default="none", choices=("none", "int8"), help="of lowbit"
    )
    rivals.add_argument("--kv-cache-dtype", default="auto", metavar="TYPE", help="of lowbit")
    rivals.add_argument("--file", metavar="TYPE", help="GGUF type lowbit runs of a made model")
    rivals.add_argument("--regimes", nargs="*", metavar="KEY", help="prefill decode streams8 long prefix …")
    arguments = parser.parse_args()
    arguments.threads_used = arguments.threads or len(os.sched_getaffinity(0))
    if arguments.rival:
        compare(arguments)
    else:
        measure_alone(arguments)


def measure_alone(arguments: argparse.Namespace) -> None:
    """lowbit by itself."""
    prompts, ready = Prompts(arguments.largest_id), []

    def run(target: Target) -> list[Figure]:
        assert_same_alone_and_in_a_batch(target, prompts)
        return measure(target, prompts, arguments.streams, arguments.repeats, arguments.decode_tokens)

    if arguments.in_process:
        started = time.perf_counter()
        target = EngineTarget(own_model(arguments), arguments.threads)
        ready.append(Figure("engine ready, torch imported with it", "s", [time.perf_counter() - started]))
        figures, how = run(target), "engine in process"
    elif arguments.url:
        figures, how = run(HttpTarget(arguments.url)), arguments.url
    else:
        torch_seconds = import_torch_seconds()
        with running_server(own_model(arguments), arguments.threads) as (url, seconds):
            ready += ready_figures([seconds], torch_seconds)
            figures, how = run(HttpTarget(url)), "server over HTTP"
    figures = ready + figures
    show(figures, f"{arguments.model}, {how}, {cpu_name()}, {arguments.threads_used} threads")
    print(json.dumps(record(arguments, how) | {"figures": figures_record(figures)}))


def own_model(arguments: argparse.Namespace) -> str:
    """The model lowbit loads: a made one is a GGUF file of the type asked for."""
    if arguments.model not in OWN_FILES or (arguments.model == "smollm2" and not arguments.file):
        return str(arguments.model)
    from made_models import gguf_file

    return str(gguf_file(arguments.model, arguments.file or OWN_FILES[arguments.model]))


def ready_figures(seconds: list[float], torch_seconds: float) -> list[Figure]:
    beyond = [max(0.0, value - torch_seconds) for value in seconds]
    return [Figure("server ready", "s", seconds), Figure("server ready beyond import torch", "s", beyond)]


def record(arguments: argparse.Namespace, how: str) -> dict[str, Any]:
    """What every JSON line of this benchmark says."""
    return {
        **run_record("serving"),
        "model": arguments.model,
        "how": how,
        "threads": arguments.threads_used,
        "repeats": arguments.repeats,
    }


def figures_record(figures: list[Figure]) -> dict[str, dict[str, object]]:
    return {
        figure.name: {"median": figure.median, "spread": figure.spread, "unit": figure.unit}
        for figure in figures
    }


def compare(arguments: argparse.Namespace) -> None:
    """lowbit beside rivals."""
    from lowbit.checkpoint import open_checkpoint
    from lowbit.kernels import native
    from lowbit.tokenization import load_tokenizer

    regimes = rival_regimes(arguments.streams)
    chosen = arguments.regimes or [regime.key for regime in regimes]
    if unknown := [key for key in chosen if key not in {regime.key for regime in regimes}]:
        known = ", ".join(regime.key for regime in regimes)
        raise SystemExit(f"--regimes {' '.join(unknown)}: no such regime; known: {known}")
    model = own_model(arguments)
    torch_seconds, ready = import_torch_seconds(), []
    for _ in range(arguments.repeats):
        with running_server(model, arguments.threads) as (_, seconds):
            ready.append(seconds)
    own = EngineTarget(
        model,
        arguments.threads,
        activation_quantization=arguments.activation_quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
    )
    prompts = Prompts(arguments.largest_id)
    assert_same_alone_and_in_a_batch(own, prompts)
    header = open_checkpoint(model)
    own_bytes = model_bytes(header.root)
    kind = (arguments.file or OWN_FILES.get(arguments.model)) if arguments.model in OWN_FILES else None
    lowbit = Contestant(OWN, own, own_bytes, ready_seconds=sorted(ready)[len(ready) // 2])
    comparison = Comparison([lowbit])
    text = load_tokenizer(header).encode(TEXT)
    for rival, label, path in rival_models(arguments, header.root, comparison.notes):
        engine, python = ENGINES[rival[0]], rival[1]
        try:
            made = rival_contestant(engine, python, path, label, arguments.threads_used, own, text)
        except RivalError as error:
            comparison.notes.append(f"{rival[0]} {label}: {error}")
            continue
        made.counts = made.nbytes <= SAME_SIZE * own_bytes
        made.always = label == kind and rival[0] == "llama.cpp"
        if native.isa() == "avx2" and "AVX512 = 1" in str(made.details):
            comparison.notes.append(f"{made.name} is built with AVX-512, lowbit runs on AVX2 only")
        comparison.contestants.append(made)
    try:
        for regime in regimes:
            if regime.key in chosen:
                comparison.run(regime, prompts, arguments.repeats, arguments.decode_tokens)
    finally:
        comparison.close()
    title = f"{arguments.model} {kind or ''}, {cpu_name()}, {native.isa()}, {arguments.threads_used} threads"
    comparison.show(title)
    readiness = ready_figures(ready, torch_seconds)
    show(readiness, "lowbit serve")
    told = {"isa": native.isa(), "file": kind, "figures": figures_record(readiness), **comparison.record()}
    print(json.dumps(record(arguments, "engine in process, rivals in theirs") | told))


def rival_models(
    arguments: argparse.Namespace, own: Path, notes: list[str]
) -> list[tuple[tuple[str, str], str, Path]]:
    """((engine, Python), label, model) of every rival there is a Python for; ``notes`` get the others."""
    pythons = rival_pythons(arguments.rival_python)
    names = [name for name in ENGINES if name in arguments.rival or "all" in arguments.rival]
    found: list[tuple[tuple[str, str], str, Path]] = []
    for name in names:
        if name not in pythons:
            notes.append(f"{name} was not run: {why_absent(ENGINES[name])}")
            continue
        if arguments.model not in OWN_FILES:
            found.append(((name, pythons[name]), own.name, own))
            continue
        for kind in arguments.rival_files or RIVAL_FILES[name][arguments.model]:
            try:
                path = rival_file(ENGINES[name], pythons[name], arguments.model, kind)
            except RuntimeError as error:
                notes.append(f"{name} {kind} was not run: {error}")
                continue
            if path is not None:
                found.append(((name, pythons[name]), kind, path))
    return found


def rival_file(engine: Engine, python: str, model: str, kind: str) -> Path | None:
    """A made model in the form the engine runs; None for a kind that is another engine's."""
    import made_models

    if kind in ("bf16", "w4a16"):
        if engine.name != "vllm":
            return None
        return made_models.float_folder(model) if kind == "bf16" else made_models.four_bit_folder(model)
    if kind.startswith(("int4-g", "gguf-")):
        return made_models.openvino_folder(model, kind, python) if engine.name == "openvino" else None
    return made_models.gguf_file(model, kind) if engine.name == "llama.cpp" else None


if __name__ == "__main__":
    main()
