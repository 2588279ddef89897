"""Where does a step's time go? Every native call of one step, timed in place; what is left is Python.

    python benchmarks/step.py                            # decode of 1 and 32 streams, prefill of 512 tokens
    python benchmarks/step.py --step 32x256 --step 1x512p --model FILE --quantization fp8

``32x256``: 32 sequences that decode one token each at contexts of 256; ``1x512p``: one prompt of 512 tokens.
A step is recorded once and replayed (kernels/step_plan.py), so what is timed is what is served; *replay* is
the plan in one call, *eager* the same step issued from Python. GB/s counts the packed weight, GFLOPS its
products; how many of its experts a mixture reads is not known here. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from lowbit.checkpoint import open_checkpoint
from lowbit.kernels import native
from lowbit.kernels.experts import ExpertsDescription
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.native_layer import LayerDescription
from lowbit.kernels.packed_linear import Description
from lowbit.kernels.prompt_rows import rounding
from lowbit.kernels.recurrent import allocate_layer
from lowbit.kernels.step_plan import Arena, Recorder, StepPlan
from lowbit.loading import load_model
from lowbit.models.model import Model

PAGE = 16
_STEP = re.compile(r"(\d+)x(\d+)(p?)")
Row = tuple[str, int, float, float, float]  # name, calls, seconds, GB/s, GFLOPS


def batch_of(sequences: int, context: int, queries: int, vocabulary: int) -> ForwardBatch:
    """Each sequence adds ``queries`` tokens and then has ``context``; the last one's logits are wanted."""
    pages = -(-context // PAGE)
    table = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    positions = torch.arange(context - queries, context, dtype=torch.int32).repeat(sequences)
    owner = torch.arange(sequences).repeat_interleave(queries)
    slots = table[owner, positions // PAGE] * PAGE + positions % PAGE
    return ForwardBatch(
        tokens=torch.randint(vocabulary, (sequences * queries,), dtype=torch.int32),
        positions=positions,
        write_slots=slots.to(torch.int32),
        query_lengths=torch.full((sequences,), queries, dtype=torch.int32),
        context_lengths=torch.full((sequences,), context, dtype=torch.int32),
        page_table=table,
        sample_rows=torch.arange(1, sequences + 1) * queries - 1,
        page_size=PAGE,
        max_query=queries,
        max_context=context,
        state_slots=torch.arange(sequences, dtype=torch.int32),
        prompt_row=0 if queries > 1 and rounding("cpu") else None,
    )


def record(model: Model, batch: ForwardBatch) -> tuple[StepPlan, Callable[[], object], object]:
    """The step's plan, the step issued from Python, and what both need kept alive."""
    pages, sequences = batch.page_table.numel(), len(batch.query_lengths)
    caches = [allocate_layer(spec, pages, sequences, PAGE, model.device) for spec in model.cache_specs()]
    recorder = Recorder(Arena(1 << 30))
    logits, plan = recorder.record(lambda: model.forward(batch, caches))
    if plan is None:
        raise SystemExit(f"this step cannot be recorded: {recorder.reason}")
    expected = logits.clone()
    for cache in caches:  # states have moved on
        for tensor in vars(cache).values():
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()
    if not torch.equal(plan.run(), expected):
        raise SystemExit("the replayed step gave other logits")
    return plan, lambda: model.forward(batch, caches), caches


def seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def rows_of(plan: StepPlan, repeats: int) -> list[Row]:
    """The plan's calls by kind, linear layers by shape; the longest first."""
    found: dict[str, list[float]] = {}
    for operation, words, spent in plan.profile(repeats):
        name, nbytes, products = operation.name, 0, 0
        if name in ("layer", "linear"):
            gate, at = "", words[0]
            if name == "layer":
                layer = LayerDescription.from_address(at)
                gate, at = "gated " if layer.activation >= 0 else "", layer.weight
            weight = Description.from_address(at)
            name = f"{gate}linear {weight.rows} x {words[4]}, codes {weight.codes}, {words[2]} tokens"
            nbytes, products = weight.nbytes, 2 * weight.rows * words[4] * words[2]
        elif name == "mix_experts":
            experts, tokens, k = ExpertsDescription.from_address(words[0]), words[3], words[6]
            first, last = experts.gate_up, experts.down
            name = f"experts {first.rows} x {first.columns}, {tokens} tokens, {k} of {experts.count} each"
            products = 2 * tokens * k * (first.rows * first.columns + last.rows * last.columns)
        entry = found.setdefault(name, [0, 0.0, 0.0, 0.0])
        for place, value in enumerate((1, spent, nbytes, products)):
            entry[place] += value
    rows = [
        (name, int(calls), spent, nbytes / spent / 1e9, products / spent / 1e9)
        for name, (calls, spent, nbytes, products) in found.items()
    ]
    return sorted(rows, key=lambda row: -row[2])


def main() -> None:
    """Print one table a step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantization")
    parser.add_argument("--activation-quantization", default="none", choices=("none", "int8"))
    parser.add_argument("--step", action="append", help="NxCONTEXT, or NxTOKENSp for a prefill")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    if asked.threads:
        native.set_threads(asked.threads)
    assert ctypes.sizeof(ctypes.c_void_p) == 8, "plans hold 64-bit addresses"
    model = load_model(
        open_checkpoint(asked.model),
        quantization=asked.quantization,
        activation_quantization=asked.activation_quantization,
    )
    console, results = Console(), {}
    for text in asked.step or ["1x64", "32x64", "32x512", "1x512p"]:
        match = _STEP.fullmatch(text)
        if match is None:
            raise SystemExit(f"--step {text}: give NxCONTEXT or NxTOKENSp, as in 32x256 or 1x512p")
        sequences, context = int(match[1]), int(match[2])
        batch = batch_of(sequences, context, context if match[3] else 1, model.vocab_size)
        plan, eager, _kept = record(model, batch)
        replay, issued = seconds(plan.run, asked.repeats), seconds(eager, asked.repeats)
        rows = rows_of(plan, asked.repeats)
        table = Table(title=f"{text}: replay {replay * 1e3:.2f} ms, eager {issued * 1e3:.2f} ms")
        for column in ("operation", "calls", "µs", "%", "µs a call", "GB/s", "GFLOPS"):
            table.add_column(column, justify="left" if column == "operation" else "right")
        total = sum(row[2] for row in rows)
        for name, calls, spent, bandwidth, rate in rows:
            share = f"{100 * spent / total:.1f}"
            speeds = (f"{bandwidth:.1f}" if bandwidth else "", f"{rate:.0f}" if rate else "")
            table.add_row(
                name, str(calls), f"{spent * 1e6:.0f}", share, f"{spent / calls * 1e6:.1f}", *speeds
            )
        console.print(table)
        results[text] = {
            "replay_ms": replay * 1e3,
            "eager_ms": issued * 1e3,
            "operations": {name: [calls, spent * 1e6] for name, calls, spent, *_ in rows},
        }
    print(json.dumps({"isa": native.isa(), "threads": native.threads(), "steps": results}))


if __name__ == "__main__":
    main()
