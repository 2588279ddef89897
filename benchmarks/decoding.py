"""What of a product's time is decoding? The share of a linear layer's time that is spent once for 64 tokens.

    python benchmarks/decoding.py [--formats F ...]

A native linear kernel decodes a tile of 16 rows and 32 columns once for up to 64 tokens. A routine that
decodes the weight once for all tokens of a batch ("dequantize, then multiply as bf16") can save no more than
what is done once a tile, and pays for writing the numbers and reading them again. Thread CPU time of one
thread, of 8 to 64 tokens in steps of 8, lies on a line: where it begins is what is done once (*once*), its
slope what each token takes. *share*: of the time of 64 tokens; bf16, which decodes nothing, has one too, of
reading tiles. The last figure is the time of 64 tokens over theirs by bf16's slope alone: no routine that
multiplies as bf16 could be faster by more. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from linear_formats import FORMATS
from machine import commit, cpu_name

from lowbit.kernels import choose, native

CPU = torch.device("cpu")
SHAPE = (512, 1024)  # small enough for a core's own cache in every format but f32
TOKENS = tuple(range(8, 65, 8))
DEFAULT = (
    *("bf16", "int8 channel", "int4 g32", "int4 g128", "awq g128", "int3 g64", "int5 g64", "q4_k", "q6_k"),
    *("q8_0", "mxfp4", "fp8 channel", "fp8 block", "nf4"),
)


@dataclass(frozen=True)
class Line:
    """Microseconds done once a tile of tokens, and for each token."""

    format: str
    once_us: float
    token_us: float

    @property
    def share(self) -> float:
        """Of the time of 64 tokens."""
        return self.once_us / (self.once_us + 64 * self.token_us)


def fitted(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(at no token, for each) by least squares."""
    count, x, y = len(tokens), sum(tokens) / len(tokens), sum(seconds) / len(seconds)
    slope = sum((t - x) * (s - y) for t, s in zip(tokens, seconds, strict=True))
    slope /= sum((t - x) ** 2 for t in tokens) if count > 1 else 1.0
    return y - slope * x, slope


def fastest(call: Callable[[], object], turns: int) -> float:
    """Seconds of this thread; neighbours only add to them."""
    best = float("inf")
    for _ in range(turns):
        began = time.thread_time()
        call()
        best = min(best, time.thread_time() - began)
    return best


def measure(format: str, turns: int) -> Line:
    """One format."""
    values = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    weight = FORMATS[format](values).weight
    kernel = choose(weight.scheme, weight.shape, CPU).kernel
    packed = kernel.pack(weight, CPU)
    seconds = []
    for tokens in TOKENS:
        x, out = torch.randn(tokens, SHAPE[1]), torch.empty(tokens, SHAPE[0])
        seconds.append(fastest(lambda x=x, out=out: kernel.linear(x, packed, out), turns))  # type: ignore[misc]
    once, each = fitted(TOKENS, seconds)
    return Line(format, once * 1e6, each * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=DEFAULT, choices=list(FORMATS), metavar="F")
    parser.add_argument("--turns", type=int, default=60)
    options = parser.parse_args()
    if native.library() is None:
        raise SystemExit("no native library: there is no kernel to measure here")
    native.set_threads(1)
    plain = measure("bf16", options.turns)
    lines = []
    for format in options.formats:
        line = measure(format, options.turns)
        lines.append(line)
        possible = (line.once_us + 64 * line.token_us) / (64 * plain.token_us)
        print(
            f"{format:14} once {line.once_us:6.1f} us  a token {line.token_us:6.2f} us  "
            f"share {100 * line.share:4.1f} %  x{possible:5.2f} beside bf16",
            flush=True,
        )
    print(json.dumps({"cpu": cpu_name(), "commit": commit(), "lines": [asdict(line) for line in lines]}))


if __name__ == "__main__":
    main()
