"""How much of a step on a GPU is its kernels? One captured step, beside the sum of what runs in it.

    python benchmarks/gpu_step.py [--made 1b]            # a random 8B model of 4-bit weights, made here
    python benchmarks/gpu_step.py --model DIR --step 1x1024 32x512 1x2048p

``32x512``: 32 sequences that decode one token each at contexts of 512; ``1x2048p``: one prompt. *Step*: the
graph's replay by CUDA events; a prompt is run eagerly, as it is served. *Kernels*: the sum of their times in
the same replay, by torch's profiler. *Weights*: packed bytes over the step's time, beside the memory
bandwidth that a large copy had in the same run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from typing import Any

import made_models
import torch
from linear import cuda_bounds, cuda_seconds, graph
from machine import commit
from rich.console import Console
from rich.table import Table
from step import PAGE, batch_of
from torch.profiler import ProfilerActivity, profile

from lowbit.checkpoint import open_checkpoint
from lowbit.kernels.recurrent import allocate_layer
from lowbit.loading import load_model
from lowbit.models.model import Model

_STEP = re.compile(r"(\d+)x(\d+)(p?)")


def step_of(model: Model, text: str) -> tuple[Callable[[], object], bool]:
    """What runs one step, and whether it is a prompt's."""
    found = _STEP.fullmatch(text)
    if found is None:
        raise SystemExit(f"--step {text}: not like 32x512 or 1x2048p")
    sequences, context, prompt = int(found[1]), int(found[2]), bool(found[3])
    batch = batch_of(sequences, context, context if prompt else 1, model.vocab_size).to(model.device)
    pages = batch.page_table.numel()
    caches = [allocate_layer(spec, pages, sequences, PAGE, model.device) for spec in model.cache_specs()]

    def run() -> object:
        return model.forward(batch, caches)

    return (run if prompt else graph(run)), prompt


def kernels_of(run: Callable[[], object], repeats: int) -> dict[str, tuple[int, float]]:
    """Calls and microseconds of each kernel in one step."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in seen.key_averages():
        if event.self_device_time_total:
            found[event.key] = (event.count // repeats, event.self_device_time_total / repeats)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def measured(model: Model, text: str, repeats: int, bandwidth: float) -> dict[str, Any]:
    """The figures of a step."""
    run, prompt = step_of(model, text)
    for _ in range(3):
        run()
    step = statistics.median(cuda_seconds(run) for _ in range(repeats)) * 1e6
    kernels = kernels_of(run, 3)
    total = sum(spent for _, spent in kernels.values())
    rate = model.weight_bytes / step / 1e3
    return {
        "step_us": round(step, 1),
        "kernels_us": round(total, 1),
        "ratio": round(step / total, 3),
        "weights_gb_per_s": round(rate, 1),
        "percent_of_bandwidth": None if prompt else round(100 * rate / bandwidth, 1),
        "kernels": {name: [calls, round(spent, 2)] for name, (calls, spent) in kernels.items()},
    }


def main() -> None:
    """A table a step, then JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="a checkpoint; without one a random 8B Llama of 4-bit weights")
    parser.add_argument("--made", default="8b", choices=list(made_models.SIZES), help="of a random model")
    parser.add_argument("--step", nargs="*", default=["1x128", "1x4096", "8x1024", "32x1024", "1x2048p"])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; benchmarks/step.py is for CPUs")
    bandwidth = cuda_bounds().memory
    name = options.model or str(made_models.random_four_bit(options.made))
    model = load_model(open_checkpoint(name), device="cuda")
    console, steps = Console(), {}
    for text in options.step:
        found = steps[text] = measured(model, text, options.repeats, bandwidth)
        times = f"step {found['step_us']:.0f} us, kernels {found['kernels_us']:.0f} us, {found['ratio']:.2f}"
        rates = f"weights {found['weights_gb_per_s']:.0f} of {bandwidth:.0f} GB/s"
        table = Table(title=f"{text}: {times}; {rates}")
        for column in ("kernel", "calls", "us", "%"):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for kernel, (calls, spent) in list(found["kernels"].items())[:16]:
            share = f"{100 * spent / found['kernels_us']:.1f}"
            table.add_row(kernel[:70], str(calls), f"{spent:.0f}", share)
        console.print(table)
    told = {
        "benchmark": "gpu_step",
        "commit": commit(),
        "machine": torch.cuda.get_device_name(),
        "isa": "cuda",
        "threads": 0,
        "command": "python benchmarks/gpu_step.py",
        "model": options.model or f"random {options.made.upper()}, int4 g128",
        "weight_bytes": model.weight_bytes,
        "memory_gb_per_s": bandwidth,
        "torch": torch.__version__,
        "steps": steps,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
