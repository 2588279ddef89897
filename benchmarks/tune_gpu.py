"""Tries sizes of linear layers' launches on this GPU and keeps the fastest: ``bench_gpu.py --tune`` runs it.

    python benchmarks/tune_gpu.py --shapes "8B out" --formats "int4 g128" --tokens 1 8

For each shape, format and number of tokens: the cuts that ``kernels.gpu.programs`` reckons to be the
cheapest, then more or fewer warps and stages for the best of them. A size counts if its product is that of
the default within rounding. Times are of CUDA graphs over as many copies of a weight as the L2 cache cannot
hold. What was best is written for this kind of GPU into the user's cache, which ``serve`` reads, or into
--into (src/lowbit/kernels/gpu/tuned, to come with lowbit). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from linear import cuda_seconds, graph, largest_cache
from linear_formats import DEFAULT_SHAPES, FORMATS, SHAPES, matrix
from machine import commit

from lowbit.checkpoint.embedded import cache_directory
from lowbit.kernels.gpu import tuned_sizes
from lowbit.kernels.gpu.linear import GpuBlocks, GpuWeight, sizes_by_cost
from lowbit.kernels.gpu.tuned_sizes import Known, Product, Sizes

TUNED = ("int4 g128", "awq g128", "q4_k", "q6_k", "int8 channel", "nf4", "mxfp4")
TOKENS = (1, 2, 4, 8, 16, 32, 64)
CUTS = 6
BETTER = 0.98  # of the default's time, before a size is kept: less may be noise
TOLERANCE = 1e-2  # of the norm: sums in another order, and a result in bfloat16

Time = Callable[[Sizes | None], float]  # seconds of the product with these sizes; None: the default


def best(weight: GpuWeight, tokens: int, time: Time, processors: int) -> tuple[Sizes | None, float, float]:
    """The fastest sizes, None where the default is as fast; their time and the default's."""
    default = time(None)
    found, least = None, default * BETTER
    product = Product.of(weight.layout)

    def look(tried: Iterator[Sizes]) -> None:
        nonlocal found, least
        for sizes in tried:
            if tuned_sizes.staged(product, tokens, sizes) and (taken := time(sizes)) < least:
                found, least = sizes, taken

    cuts = sizes_by_cost(weight.layout, tokens, processors)[:CUTS]
    look(iter(cuts))
    around = found or cuts[0]
    look(replace(around, warps=warps) for warps in (2, 4, 8) if warps != around.warps)
    around = found or cuts[0]
    look(replace(around, stages=stages) for stages in (2, 3, 5, 6) if stages != around.stages)
    return found, (default if found is None else least), default


def timed(weights: list[GpuWeight], x: torch.Tensor, repeats: int) -> Time:
    """Of one product; infinite where the sizes do not compile or compute something else."""
    kernel = GpuBlocks()
    wanted = kernel.linear(x, weights[0]).float()

    def time(sizes: Sizes | None) -> float:
        def run() -> None:
            for weight in weights:
                kernel.linear(x, weight)

        try:
            if sizes is None:
                replayed = graph(run)
            else:
                with tuned_sizes.trying(sizes):
                    found = kernel.linear(x, weights[0]).float()
                    if not (found - wanted).norm() <= TOLERANCE * wanted.norm():
                        print(f"  {sizes}: other numbers", flush=True)
                        return float("inf")
                    replayed = graph(run)
        except Exception as error:  # the compiler's and the driver's are of many kinds
            print(f"  {sizes}: {type(error).__name__}", flush=True)
            return float("inf")
        replayed()
        return statistics.median(cuda_seconds(replayed) for _ in range(repeats)) / len(weights)

    return time


def copies(weight: GpuWeight, device: torch.device) -> list[GpuWeight]:
    """As many as the L2 cache does not hold."""
    kernel, found = GpuBlocks(), [weight]
    for _ in range(min(-(-2 * largest_cache(device) // max(weight.nbytes, 1)), 64)):
        buffers = {name: buffer.clone() for name, buffer in weight.buffers.items()}
        again = kernel.restore(weight.scheme, weight.shape, buffers, weight.origin)
        assert isinstance(again, GpuWeight), "of this kernel"
        found.append(again)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="*", default=DEFAULT_SHAPES["cuda"], choices=list(SHAPES))
    parser.add_argument("--formats", nargs="*", default=list(TUNED), choices=list(FORMATS))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--into", type=Path, default=cache_directory() / "tuned", help="folder of the file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("sizes are measured on a GPU, and torch sees none")
    device = torch.device("cuda")
    gpu = tuned_sizes.gpu_name(device)
    path = options.into / tuned_sizes.file_name(gpu)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    known: Known = {}
    rows = []
    for shape in options.shapes:
        values = matrix(SHAPES[shape])
        for name in options.formats:
            packed = GpuBlocks().pack(FORMATS[name](values).weight, device)
            assert isinstance(packed, GpuWeight), "of this kernel"
            weights = copies(packed, device)
            for tokens in options.tokens:
                x = torch.randn(tokens, SHAPES[shape][1], device=device).bfloat16()
                sizes, least, default = best(packed, tokens, timed(weights, x, options.repeats), processors)
                row = {"default_us": default * 1e6, "us": least * 1e6}
                rows.append({"shape": shape, "format": name, "tokens": tokens, **row})
                print(f"{shape:12} {name:14} {tokens:3} {row} {sizes or 'as reckoned'}", flush=True)
                if sizes is not None:
                    known.setdefault(Product.of(packed.layout), {})[tokens] = sizes
            tuned_sizes.write(path, gpu, known)  # a lease may end
    print(
        json.dumps({"benchmark": "tune_gpu", "gpu": gpu, "commit": commit(), "file": str(path), "rows": rows})
    )


if __name__ == "__main__":
    main()
