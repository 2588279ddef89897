"""How fast is each linear kernel? Every format by the number of tokens, beside torch's bf16 and the bound.

    python benchmarks/linear.py [--formats F ...] [--shapes S ...] [--tokens N ...] [--plot FILE.svg]

Before a format is timed its product is compared with the dequantized float32 weight's (inputs rounded to
bfloat16, as the kernels have them, or quantized as the scheme says), and fewer tokens must give the same
bits as many. Then copies of the weight, together more than twice the largest cache, are multiplied one after
another, as the layers of a model are, so that every weight comes from memory (beyond 16 tokens fewer do); on
native kernels the calls are one recorded step, without Python between them. 128 tokens and more are timed as
a prompt's, for which some kernels round weights. torch's F.linear in bfloat16 gets
copies of its own and takes turns with the kernel.

*Bound*: what the same run's probes say this machine could do: the longer of reading the packed weight with
all threads from memory and of the products at the rate of the best dot-product instruction for the inputs
(bf16, or 8 bit where the scheme quantizes them; fp32 for float32 tables). ``cached``: the read bandwidth of a
buffer of the weight's size.

On --device cuda the bounds are a large copy and large products of torch's (bf16, fp8, int8) in the same run,
calls are one CUDA graph, and x and results are bfloat16.
The last line is JSON. --plot draws % of the bound by tokens, a line a format (extra ``bench``). --cliffs is
another table, of many more formats: see cliffs.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import cliffs
import torch
from linear_formats import DEFAULT_SHAPES, FORMATS, SHAPES, Sample, matrix
from machine import commit, cpu_name, machine_kind
from torch import Tensor
from torch.nn import functional

from lowbit.checkpoint.embedded import cache_directory
from lowbit.errors import LowbitError
from lowbit.kernels import PackedWeight, choose, native, probes, timing
from lowbit.kernels.gpu import tuned_sizes
from lowbit.kernels.packed_linear import INPUT_WORDS, NativeWeight, takes
from lowbit.kernels.prompt_rows import prompt_rows
from lowbit.kernels.step_plan import Arena, Recorder
from lowbit.layers.linear import Linear

TOKENS = {"cpu": (1, 4, 16, 32, 64, 256, 512), "cuda": (1, 4, 16, 32, 64, 256, 1024, 4096)}
TOLERANCE = 3e-3  # of the norm: bfloat16 inputs have been rounded, float32 sums reordered
MOST_COPIES = 512
MOST_BYTES = 1 << 30
DRAM_BYTES = 512 << 20
FLOAT_TABLES = ("f16", "f32", "nf4")  # formats that do not meet x in bfloat16


@dataclass(frozen=True)
class Row:
    """One format, shape and number of tokens."""

    format: str
    shape: str
    tokens: int
    kernel: str
    nbytes: int
    us: float
    spread_us: float
    gb_per_s: float
    tflops: float
    bound_us: float
    percent_of_bound: float
    bound_by: str
    torch_us: float
    ratio_to_torch: float
    error: float


@dataclass(frozen=True)
class Bounds:
    """GB/s by bytes of the buffer, and TFLOPS by kind of dot product."""

    memory: float
    cached: dict[int, float]
    dots: dict[str, float]

    def of(self, nbytes: int, operations: int, inputs: str) -> tuple[float, str]:
        """(microseconds, what bounds)."""
        reading, working = nbytes / self.memory / 1e3, operations / self.dots[inputs] / 1e6
        return (reading, "memory") if reading >= working else (working, inputs)


def measured_bounds(device: torch.device, sizes: set[int]) -> Bounds:
    """By probes, now."""
    if device.type == "cuda":
        return cuda_bounds()
    if native.library() is None:
        raise SystemExit("no native library: there is no kernel to measure here")
    dots = {kind: probes.dot_peak(kind, 0.3) for kind in probes.DOTS}
    best = {
        "fp32": dots["fp32 fma"],
        "bf16": max(dots["bf16 dot"], dots["bf16 tiles"], dots["fp32 fma"]),
        "int8": max(dots["int8 dot"], dots["int8 tiles"]),
    }
    cached = {size: probes.read_bandwidth(size, 0.1) for size in sorted(sizes)}
    return Bounds(probes.read_bandwidth(DRAM_BYTES, 1.0), cached, {**dots, **best})


def cuda_bounds() -> Bounds:
    """A copy of half a GB, and square products; int8 also stands for fp8, where the GPU has it the faster."""
    source = torch.ones(1 << 28, dtype=torch.bfloat16, device="cuda")
    copied = torch.empty_like(source)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copying = min(cuda_seconds(lambda: copied.copy_(source)) for _ in range(5))
    whole = (square * 20).to(torch.int8)
    products: dict[str, Callable[[], object]] = {
        "bf16": lambda: square @ square,
        "int8": lambda: torch._int_mm(whole, whole.T),
    }
    if torch.cuda.get_device_capability() >= (8, 9):
        small, one = square.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        products["fp8"] = lambda: torch._scaled_mm(small, small.T, one, one, out_dtype=torch.bfloat16)
    rates = {
        kind: 2 * 8192**3 / min(cuda_seconds(product) for _ in range(5)) / 1e12
        for kind, product in products.items()
    }
    rates["int8"] = max(rates["int8"], rates.get("fp8", 0.0))
    return Bounds(2 * source.nbytes / copying / 1e9, {}, {**rates, "fp32": rates["bf16"]})


def largest_cache(device: torch.device) -> int:
    """The largest cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return timing.cache_bytes()


def cuda_seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return cuda_seconds(call)
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Bench:
    """One shape: torch's weight copies, and a format at a time beside them."""

    def __init__(self, name: str, bounds: Bounds, device: torch.device, repeats: int) -> None:
        self.name, self.bounds, self.device, self.repeats = name, bounds, device, repeats
        self.values = matrix(SHAPES[name])
        self.wanted = 2 * largest_cache(device)
        on_device = self.values.to(device)
        self._torch = [on_device.clone() for _ in range(self._copies(on_device.nbytes))]

    def _copies(self, nbytes: int) -> int:
        return max(1, min(MOST_COPIES, MOST_BYTES // nbytes, -(-self.wanted // nbytes)))

    def run(self, format: str, tokens: list[int]) -> list[Row]:
        """A row a number of tokens; LowbitError where the format does not have this shape."""
        sample = FORMATS[format](self.values)
        kernel = choose(sample.weight.scheme, sample.weight.shape, self.device).kernel
        packed = kernel.pack(sample.weight, self.device)
        error = self._compare(packed, sample, max(tokens))
        layers = [
            Linear("bench", [kernel.pack(sample.weight, self.device)], None, [sample.transform])
            for _ in range(self._copies(packed.nbytes))
        ]
        return [self._row(format, layers, sample, count, error) for count in tokens]

    def _input(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(tokens, SHAPES[self.name][1], generator=generator)
        return x if self.device.type == "cpu" else x.bfloat16().to(self.device)

    def _compare(self, packed: PackedWeight, sample: Sample, tokens: int) -> float:
        """The error beside the dequantized weight; SystemExit beyond the tolerance."""
        x = self._input(tokens)
        layer = Linear("bench", [packed], None, [sample.transform])
        found = layer(x)
        exact = sample.weight.dequantize().to(self.device)
        if sample.transform is not None:
            changed, factor = sample.transform.in_torch(x)
            expected = functional.linear(changed.float(), exact)
            expected = expected if factor is None else expected * factor
        else:
            fmt = sample.weight.scheme.weight
            words = isinstance(packed, NativeWeight) and takes(packed.description, INPUT_WORDS)
            whole = words or (fmt.in_bytes and fmt.block is None) or fmt.name in FLOAT_TABLES
            rounded = x if whole else x.bfloat16()
            expected = functional.linear(rounded.float(), exact)
        error = float((found.float() - expected).norm() / expected.norm())
        bound = TOLERANCE if self.device.type == "cpu" else 4 * TOLERANCE  # results are bf16 there
        if not error < bound:
            raise SystemExit(f"{sample.weight.scheme} of {self.name}: differs by {error:.2e} of the norm")
        few = min(3, tokens)
        same = self.device.type != "cpu" or packed.kernel.name == "reference"  # torch's last bit may move
        if not same and not torch.equal(layer(x[:few]), found[:few]):
            raise SystemExit(f"{sample.weight.scheme} of {self.name}: {few} rows alone differ")
        return error

    def _row(self, format: str, layers: list[Linear], sample: Sample, tokens: int, error: float) -> Row:
        x = self._input(tokens)
        layers, weights = _enough(layers, tokens), _enough(self._torch, tokens)
        calls = (self._step(layers, x), self._torch_step(weights, x.bfloat16()))
        mine: list[float] = []
        torchs: list[float] = []
        for repeat in range(self.repeats + 1):
            pair = [_seconds(call, self.device) for call in calls]
            if repeat:  # the first turn also meets memory for the first time
                mine.append(pair[0] / len(layers) * 1e6)
                torchs.append(pair[1] / len(weights) * 1e6)
        us, torch_us = statistics.median(mine), statistics.median(torchs)
        nbytes, (rows, columns) = layers[0].nbytes, SHAPES[self.name]
        operations = 2 * tokens * rows * columns
        name = sample.weight.scheme.weight.name
        inputs = "fp32" if name in FLOAT_TABLES else "bf16" if sample.transform is None else "int8"
        bound, by = self.bounds.of(nbytes, operations, inputs)
        return Row(
            format=format, shape=self.name, tokens=tokens, kernel=layers[0].weights[0].kernel.name,
            nbytes=nbytes, us=round(us, 2), spread_us=round(max(mine) - min(mine), 2),
            gb_per_s=round(nbytes / us / 1e3, 2), tflops=round(operations / us / 1e6, 4),
            bound_us=round(bound, 2), percent_of_bound=round(100 * bound / us, 1), bound_by=by,
            torch_us=round(torch_us, 2), ratio_to_torch=round(torch_us / us, 2),
            error=float(f"{error:.1e}"),
        )  # fmt: skip

    def _step(self, layers: list[Linear], x: Tensor) -> Callable[[], object]:
        """All layers once: a recorded step where every call is native."""

        def step() -> Tensor:
            with prompt_rows(cliffs.first_prompt(len(x)), len(x)):
                for layer in layers:
                    y = layer(x)
            return y

        if self.device.type == "cpu" and native.library() is not None:
            _, plan = Recorder(Arena(1 << 30)).record(step)
            if plan is not None:
                return plan.run
        return graph(step) if self.device.type == "cuda" else step

    def _torch_step(self, weights: list[Tensor], x: Tensor) -> Callable[[], object]:
        def step() -> None:
            for weight in weights:
                functional.linear(x, weight)

        return graph(step) if self.device.type == "cuda" else step


def graph(step: Callable[[], object]) -> Callable[[], object]:
    """The step captured: launching a kernel from Python takes longer than many of them run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # what is compiled or allocated once
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


Copy = TypeVar("Copy")


def _enough(copies: list[Copy], tokens: int) -> list[Copy]:
    """Fewer copies for many tokens, whose products take long beside reading the weight."""
    return copies[: max(2, len(copies) * 16 // max(tokens, 16))]


def show(rows: list[Row]) -> None:
    """Lines as they come."""
    for row in rows:
        print(
            f"{row.shape:13} {row.format:15} {row.tokens:4} {row.us:10.1f} us ±{row.spread_us / 2:8.1f}"
            f" {row.gb_per_s:7.2f} GB/s {row.tflops:7.3f} TFLOPS {row.percent_of_bound:6.1f}%"
            f" of {row.bound_by:6} x{row.ratio_to_torch:6.2f} torch  {row.kernel}  error {row.error:.0e}",
            flush=True,
        )


def plot(rows: list[Row], path: Path, title: str) -> None:
    """% of the bound by tokens: a panel a shape, a line a format."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "linear"
    from matplotlib import pyplot

    shapes, formats = list(dict.fromkeys(r.shape for r in rows)), list(dict.fromkeys(r.format for r in rows))
    figure, axes = pyplot.subplots(
        len(shapes), 1, figsize=(8, 2.6 * len(shapes) + 0.8), squeeze=False, sharex=True
    )
    colours = pyplot.get_cmap("tab20")
    for axis, shape in zip(axes[:, 0], shapes, strict=True):
        for number, format in enumerate(formats):
            found = [row for row in rows if (row.shape, row.format) == (shape, format)]
            axis.plot(
                [row.tokens for row in found],
                [row.percent_of_bound for row in found],
                marker="o" if number % 2 else "s",
                markersize=3,
                linewidth=1,
                color=colours(number % 20),
                label=format,
            )
        axis.set_title(shape, fontsize=9, loc="left")
        axis.set_ylabel("% of bound", fontsize=8)
        axis.set_ylim(0)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("tokens")
    ticks = sorted({row.tokens for row in rows})
    axes[-1, 0].set_xticks(ticks, [str(tick) for tick in ticks])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=6, fontsize=7, loc="upper center", title=title, title_fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.8 / figure.get_figheight()))
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _cliffs(options: argparse.Namespace) -> None:
    """The table of cliffs.py, on one thread."""
    torch.set_num_threads(1)
    native.set_threads(1)
    shape = SHAPES[options.shapes[0] if len(options.shapes) == 1 else "1B qkv"]
    tokens = options.tokens or [1, 8, 32, 512]
    rows = cliffs.run(options.formats, shape, tokens, options.repeats)
    command = " ".join(["python", "benchmarks/linear.py", *sys.argv[1:]])
    told = {"benchmark": "cliffs", "commit": commit(), "command": command, "cpu": cpu_name(), "threads": 1,
            "machine": machine_kind(), "isa": native.isa(), "shape": shape, "rows": rows}  # fmt: skip
    print(json.dumps(told))


def main() -> None:
    """Print a line a row, then JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    known = list(cliffs.FORMATS if "--cliffs" in sys.argv else FORMATS)
    parser.add_argument("--cliffs", action="store_true", help="every format beside others of its size")
    parser.add_argument("--formats", nargs="*", default=known, choices=known, metavar="F")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), metavar="S")
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--threads", type=int, default=native.available_cores())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--plot", type=Path, help="SVG of the share of the bound")
    options = parser.parse_args()
    tuned_sizes.look_in(cache_directory() / "tuned")  # as a server has them
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; use --device cpu")
    options.shapes = options.shapes or DEFAULT_SHAPES[options.device]
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install 'lowbit[bench]'")
    if options.cliffs:
        _cliffs(options)
        return
    options.tokens = options.tokens or list(TOKENS[options.device])
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    native.set_threads(options.threads)
    sizes = {SHAPES[shape][0] * SHAPES[shape][1] // 2 for shape in options.shapes}
    bounds = measured_bounds(device, sizes)
    rates = ", ".join(f"{kind} {rate:.3f}" for kind, rate in bounds.dots.items() if rate)
    print(f"memory {bounds.memory:.1f} GB/s; TFLOPS: {rates}")
    for size, rate in bounds.cached.items():
        print(f"cached, {size / 1e6:.2f} MB: {rate:.1f} GB/s")
    rows: list[Row] = []
    refusals: dict[str, str] = {}
    for shape in options.shapes:
        bench = Bench(shape, bounds, device, options.repeats)
        for format in options.formats:
            try:
                found = bench.run(format, options.tokens)
            except LowbitError as error:
                refusals[f"{format}, {shape}"] = error.message
                print(f"{shape:13} {format:15} not there: {error.message}")
                continue
            except (Exception, SystemExit) as error:
                if device.type == "cpu":
                    raise
                # A GPU is lent for a while: the other formats' figures are worth having.
                refusals[f"{format}, {shape}"] = f"failed: {type(error).__name__}: {error}"
                print(f"{shape:13} {format:15} failed: {type(error).__name__}: {error}", flush=True)
                continue
            show(found)
            rows += found
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    if options.plot:
        plot(rows, options.plot, f"{where}, {native.isa()}, {options.threads} threads")
    told = {
        "benchmark": "linear",
        "commit": commit(),
        "command": " ".join(["python", "benchmarks/linear.py", *sys.argv[1:]]),
        "cpu": where,
        "machine": where if device.type == "cuda" else machine_kind(),
        "isa": "cuda" if device.type == "cuda" else native.isa(),
        "device": options.device,
        "threads": options.threads,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "bounds": asdict(bounds),
        "refusals": refusals,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
