"""How fast is paged attention? Each shape is first checked against the reference kernel, then timed.

A layer call on bfloat16 pages is timed as the model makes it (write and attend), beside torch's
scaled_dot_product_attention on contiguous K and V, one call a sequence (torch's best case: it gathers no
pages), and beside the same call on each narrower type of cache. GB/s counts K and V once a sequence, also
where sequences share pages; GFLOPS counts what causal attention needs, not what tiles waste.
The last line is JSON.

    python benchmarks/attention.py [--threads N] [--repeats N] [--caches int8 int4 …] [--device cuda]

On --device cuda q, K and V are bfloat16 and a call is timed by CUDA events, as one graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from linear import cuda_seconds, graph
from machine import commit, cpu_name, machine_kind
from torch import Tensor
from torch.nn import functional

from lowbit.kernels import native
from lowbit.kernels.attention import PAGE_SIZE, AttentionParameters, CacheSpec, choose_attention
from lowbit.kernels.attention_reference import ReferenceAttention
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.numerics.cache_format import K_FORMATS, KvDtype


@dataclass(frozen=True)
class Shape:
    """``sequences`` sequences that each add ``queries`` tokens to a context of ``context`` in all.

    The first ``shared`` tokens of the contexts lie on the same pages.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    sequences: int
    queries: int
    context: int
    shared: int = 0  # tokens that all sequences have in common, whole pages of them

    @property
    def operations(self) -> int:
        """Multiplications and additions of the scores and values a causal mask leaves."""
        seen = sum(range(self.context - self.queries + 1, self.context + 1))
        return 4 * self.sequences * self.heads * self.dim * seen


NARROW = [name for name, stored in K_FORMATS.items() if stored.bits < 16]
SHAPES = [
    Shape("135M prefill 512", 9, 3, 64, 1, 512, 512),
    Shape("135M prefill 128 at 1024", 9, 3, 64, 1, 128, 1024),
    Shape("135M decode 1 x 128", 9, 3, 64, 1, 1, 128),
    Shape("135M decode 1 x 1024", 9, 3, 64, 1, 1, 1024),
    Shape("135M decode 8 x 256", 9, 3, 64, 8, 1, 256),
    Shape("135M decode 32 x 256", 9, 3, 64, 32, 1, 256),
    Shape("135M decode 32 x 512", 9, 3, 64, 32, 1, 512),
    Shape("135M decode 32 x 1024", 9, 3, 64, 32, 1, 1024),
    Shape("135M decode 32 x 600, 512 shared", 9, 3, 64, 32, 1, 600, 512),
    Shape("135M decode 32 x 600, 400 shared", 9, 3, 64, 32, 1, 600, 400),
    Shape("1B decode 32 x 512", 32, 8, 64, 32, 1, 512),
    Shape("8B prefill 512", 32, 8, 128, 1, 512, 512),
    Shape("8B decode 1 x 4096", 32, 8, 128, 1, 1, 4096),
    Shape("8B decode 8 x 1024", 32, 8, 128, 8, 1, 1024),
    Shape("no groups decode 1 x 4096", 16, 16, 128, 1, 1, 4096),
]


GPU_SHAPES = [
    Shape("8B prefill 2048", 32, 8, 128, 1, 2048, 2048),
    Shape("8B prefill 512 at 8192", 32, 8, 128, 1, 512, 8192),
    Shape("8B decode 1 x 1024", 32, 8, 128, 1, 1, 1024),
    Shape("8B decode 1 x 16384", 32, 8, 128, 1, 1, 16384),
    Shape("8B decode 32 x 1024", 32, 8, 128, 32, 1, 1024),
    Shape("8B decode 128 x 2048", 32, 8, 128, 128, 1, 2048),
]


def batch_of(shape: Shape, device: torch.device) -> tuple[ForwardBatch, ForwardBatch, int]:
    """The batch to time, the batch that fills the cache before, and the number of pages."""
    per_sequence = -(-shape.context // PAGE_SIZE)
    count = per_sequence * shape.sequences
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).int()
    table = order.view(shape.sequences, per_sequence)
    table[:, : shape.shared // PAGE_SIZE] = table[0, : shape.shared // PAGE_SIZE]

    def batch(first: int, end: int) -> ForwardBatch:
        positions = torch.arange(first, end, dtype=torch.int32)
        slots = table[:, positions.long() // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        tokens = positions.repeat(shape.sequences)
        lengths = torch.full((shape.sequences,), end - first, dtype=torch.int32)
        contexts = torch.full((shape.sequences,), end, dtype=torch.int32)
        return ForwardBatch(
            tokens,
            tokens,
            slots.flatten().int(),
            lengths,
            contexts,
            table,
            torch.arange(len(tokens)),
            PAGE_SIZE,
            end - first,
            end,
        ).to(device)

    return batch(shape.context - shape.queries, shape.context), batch(0, shape.context), count


def measured(call: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """(median, spread between the quartiles) of the milliseconds of a call."""
    if device.type == "cuda":
        replay = graph(call)
        replay()
        times = [cuda_seconds(replay) * 1e3 for _ in range(max(repeats, 3))]
        low, middle, high = statistics.quantiles(times, n=4)
        return middle, high - low
    call()
    start = time.perf_counter()
    call()
    inner = max(int(2e-3 / (time.perf_counter() - start)), 1)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        times.append((time.perf_counter() - start) / inner * 1e3)
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low


def torch_attention(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """torch on the same numbers: (1, heads, tokens, dim) in bfloat16, each sequence by itself."""
    dtype, sequences = torch.bfloat16, []
    for part in range(shape.sequences):
        new = slice(part * shape.queries, (part + 1) * shape.queries)
        all_tokens = slice(part * shape.context, (part + 1) * shape.context)
        sequences.append(
            [x.transpose(0, 1)[None].to(dtype).contiguous() for x in (q[new], k[all_tokens], v[all_tokens])]
        )
    earlier = shape.context - shape.queries
    mask = torch.ones(shape.queries, shape.context, dtype=torch.bool, device=q.device).tril(earlier)
    arguments = {"is_causal": True} if not earlier else {} if shape.queries == 1 else {"attn_mask": mask}

    def call() -> None:
        for queries, keys, values in sequences:
            functional.scaled_dot_product_attention(queries, keys, values, enable_gqa=True, **arguments)

    return call


def run(shape: Shape, repeats: int, cache_types: list[str], device: torch.device) -> dict[str, object]:
    """Check, time, print a line and one a further type of cache, return the numbers."""
    parameters = AttentionParameters(scale=shape.dim**-0.5)
    random_numbers = torch.Generator().manual_seed(1)
    tokens = shape.sequences * shape.queries
    q = torch.randn(tokens, shape.heads, shape.dim, generator=random_numbers)
    k, v = torch.randn(
        2, shape.sequences * shape.context, shape.kv_heads, shape.dim, generator=random_numbers
    )
    for x in (k, v):
        by_sequence = x.view(shape.sequences, shape.context, shape.kv_heads, shape.dim)
        by_sequence[:, : shape.shared] = by_sequence[:1, : shape.shared]
    q, k, v = (x if device.type == "cpu" else x.bfloat16().to(device) for x in (q, k, v))
    batch, filling, pages = batch_of(shape, device)
    last = torch.arange(len(k), device=device).view(shape.sequences, -1)[:, -shape.queries :].flatten()
    new_k, new_v = k[last], v[last]

    def timed(cache_type: str) -> tuple[float, float, float, int]:
        """(ms, spread of it, error, bytes of K and V) of pages of this type."""
        spec = CacheSpec("paged", shape.kv_heads, shape.dim, shape.dim, KvDtype.of(cache_type))
        results = []
        for kernel in (ReferenceAttention(), choose_attention(spec, device)):
            cache = kernel.allocate(spec, pages, PAGE_SIZE, device)
            kernel.write(cache, k, v, filling)
            results.append(kernel.attend(q, cache, batch, parameters).float())
        error = ((results[1] - results[0]).norm() / results[0].norm()).item()
        # Random values average out; what bfloat16 rounds of x beside 4-bit codes then weighs more.
        assert error < (1e-2 if cache_type == "int4" else 5e-3), (
            f"{shape.name}, {cache_type}: differs from the reference by {error:.2e}"
        )

        def call() -> None:
            kernel.write(cache, new_k, new_v, batch)
            kernel.attend(q, cache, batch, parameters)

        return *measured(call, repeats, device), error, shape.sequences * shape.context * spec.token_bytes()

    ms, spread, error, cache_bytes = timed("bf16")
    torch_ms, _ = measured(torch_attention(shape, q, k, v), repeats, device)
    numbers = {
        "shape": shape.name,
        "ms": round(ms, 4),
        "spread_ms": round(spread, 4),
        "gb_per_s": round(cache_bytes / ms / 1e6, 2),
        "gflops": round(shape.operations / ms / 1e6, 1),
        "torch_ms": round(torch_ms, 4),
        "speedup": round(torch_ms / ms, 2),
        "error": float(f"{error:.2e}"),
    }
    print(
        f"{shape.name:33} {ms:8.3f} ms ±{spread:6.3f} {numbers['gb_per_s']:7.2f} GB/s"
        f" {numbers['gflops']:7.1f} GFLOPS  torch {torch_ms:8.3f} ms"
        f"  {numbers['speedup']:6.2f}x  error {error:.1e}"
    )
    others = numbers["caches_ms"] = {}
    for cache_type in cache_types:
        other_ms, spread, error, cache_bytes = timed(cache_type)
        others[cache_type] = round(other_ms, 4)
        print(
            f"  {cache_type:31} {other_ms:8.3f} ms ±{spread:6.3f} {cache_bytes / other_ms / 1e6:7.2f} GB/s"
            f"  {other_ms / ms:6.2f} of bf16's time  error {error:.1e}"
        )
    return numbers


def main() -> None:
    """Print the lines of each shape, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--caches", nargs="*", default=NARROW, choices=NARROW, help="timed beside bf16")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    device, on_gpu = torch.device(options.device), options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; use --device cpu")
    torch.set_num_threads(options.threads)
    native.set_threads(options.threads)
    shapes = GPU_SHAPES if on_gpu else SHAPES
    results: list[dict[str, object]] = []
    failed: list[str] = []
    for shape in shapes:
        try:
            results.append(run(shape, options.repeats, options.caches, device))
        except Exception as error:
            if not on_gpu:
                raise
            # A GPU is lent for a while: the other shapes' figures are worth having.
            failed.append(f"{shape.name}: {type(error).__name__}: {error}")
            print(f"failed: {failed[-1]}", flush=True)
    print(
        json.dumps(
            {
                "benchmark": "attention",
                "cache": "bf16",
                "commit": commit(),
                "command": " ".join(["python", "benchmarks/attention.py", *sys.argv[1:]]),
                "cpu": cpu_name(),
                "machine": torch.cuda.get_device_name() if on_gpu else machine_kind(),
                "isa": "cuda" if on_gpu else native.isa(),
                "threads": options.threads,
                "torch": torch.__version__,
                "results": results,
                "failed": failed,
            }
        )
    )


if __name__ == "__main__":
    main()
