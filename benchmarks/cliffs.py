"""Does any format fall off a cliff? Every format and group size on one thread, beside others of its size.

    python benchmarks/linear.py --cliffs [--formats F ...] [--shapes S] [--tokens N ...]

Codes are random: only how they lie matters. A product is timed by the thread's own CPU time, the least of
some repeats, so that other processes disturb it little; for one token copies of the weight take turns,
together more than twice the largest cache. *Ratio*: the time beside the fastest format whose packed size is
within 12 %; with an input rule its quantizing counts. Beyond 1.5 is a cliff (2.5 for one token on IQ1 to
IQ3). The last line is JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from linear_formats import (
    Sample,
    codebook_weight,
    lattice_weight,
    matrix,
    row_codebook_weight,
    trellis_weight,
)
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import PackedWeight, choose, timing
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.prompt_rows import prompt_rows
from lowbit.kernels.settled import settled
from lowbit.layers.linear import Linear
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import Outliers, QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme, dense

LIKE = 1.12  # sizes that are compared
PROMPT = (
    128  # tokens from which on they are a prompt's: some kernels then round weights (kernels.prompt_rows)
)
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Cliff:
    """One format: seconds by the number of tokens."""

    format: str
    kernel: str
    bits: float  # packed, a weight
    weights: int
    whole: bool  # x comes as int8, at twice the rate
    seconds: dict[int, float]


def coded(
    name: str,
    group: int,
    scale: str = "f16",
    *,
    zero: str = "none",
    offset: bool = False,
    order: bool = False,
    rows: int = 1,
    apart: bool = False,
    inputs: ActivationScheme | None = None,
) -> Callable[[tuple[int, int]], Sample]:
    """Random codes in a canonical scheme; ``rows``: of a block (0: all), ``apart`` from each other."""

    def made(shape: tuple[int, int]) -> Sample:
        generator = torch.Generator().manual_seed(1)
        fmt, (out, columns) = number_format(name), shape
        codes = torch.randint(1 << int(fmt.bits), shape, generator=generator).to(torch.uint8)
        table = fmt.table()
        codes[~table[codes.int()].isfinite()] = 1
        places = (-(-out // rows) if rows else 1, -(-columns // (group or columns)))

        def numbers() -> Tensor:
            exponents = torch.randint(112, 122, places, generator=generator)
            if scale == "e8m0":
                return exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
            return torch.exp2(exponents.float() - 127).to(number_format(scale).dtype)

        zeros = None
        if zero != "none":
            zeros = torch.randint(1 << int(fmt.bits), places, generator=generator).to(torch.uint8)
            zeros = zeros if zero == "integer" else (zeros.float() + 0.25).to(number_format(scale).dtype)
        scheme = Scheme(
            fmt, ((rows, group),), (number_format(scale),),
            "none" if zero == "none" else "integer" if zero == "integer" else "float",
            offset, reordered=order, scattered=apart,
        )  # fmt: skip
        columns_order = torch.randperm(columns, generator=generator) if order else None
        offsets = (numbers(),) if offset else ()
        weight = QuantizedTensor(
            scheme, shape, codes, (numbers(),), zeros, offsets, columns_order, "benchmark"
        )
        if apart:
            weight = replace(weight, row_groups=torch.arange(out) % places[0])
        return Sample(weight, None if inputs is None else InputTransform(inputs))

    return made


def nvfp4(inputs: ActivationScheme | None = None) -> Callable[[tuple[int, int]], Sample]:
    """e2m1 codes with e4m3 scales for 16 columns under one float32."""

    def made(shape: tuple[int, int]) -> Sample:
        weight = coded("e2m1", 16, "e4m3")(shape).weight
        f32 = number_format("f32")
        scheme = replace(weight.scheme, blocks=((1, 16), (0, 0)), scales=(*weight.scheme.scales, f32))
        weight = replace(weight, scheme=scheme, scales=(weight.scales[0], torch.tensor([[0.5]])))
        return Sample(weight, None if inputs is None else InputTransform(inputs))

    return made


def sinq_tiles(bits: int, group: int) -> Callable[[tuple[int, int]], Sample]:
    """Groups of the row with float zero points, under a scale for as many rows of a column."""

    def made(shape: tuple[int, int]) -> Sample:
        weight = coded(f"uint{bits}", group, zero="float")(shape).weight
        second = coded(f"uint{bits}", 1, rows=group)(shape).weight.scales[0]
        scales = (*weight.scheme.scales, *weight.scheme.scales)
        scheme = replace(weight.scheme, blocks=((1, group), (group, 1)), scales=scales)
        return Sample(replace(weight, scheme=scheme, scales=(weight.scales[0], second)), None)

    return made


def with_outliers(share: float) -> Callable[[tuple[int, int]], Sample]:
    """3-bit codes with scales and zero points of 16 columns, and so many outliers (SpQR)."""

    def made(shape: tuple[int, int]) -> Sample:
        weight, half = coded("uint3", 16, zero="float")(shape).weight, number_format("f16")
        generator = torch.Generator().manual_seed(2)
        at = (torch.rand(shape, generator=generator) < share).nonzero()
        values = torch.randn(len(at), generator=generator).half()
        outliers = Outliers.of(at[:, 0], at[:, 1], values, shape[0])
        scheme = replace(weight.scheme, outliers=half, outlier_share=len(at) / (shape[0] * shape[1]))
        return Sample(replace(weight, scheme=scheme, outliers=outliers), None)

    return made


_HALVES = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "tq1_0": (52,), "tq2_0": (64,)}
_HALVES |= {"iq1_m": (), "mxfp4": (), "nvfp4": ()}
_HALVES |= dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2))


def blocks(name: str) -> Callable[[tuple[int, int]], Sample]:
    """Random GGUF blocks whose f16 fields are 2^-8."""

    def made(shape: tuple[int, int]) -> Sample:
        fmt = number_format(f"gguf_{name}")
        assert fmt.block is not None
        count = shape[1] // fmt.block.weights
        generator = torch.Generator().manual_seed(1)
        raw = torch.randint(256, (shape[0], count, fmt.block.bytes), dtype=torch.uint8, generator=generator)
        for at in _HALVES.get(name, (0,)):
            raw[..., at], raw[..., at + 1] = 0, 0x1C
        if name == "iq1_m":
            raw[..., 55] = raw[..., 55] & 0x8F | 0x10
        if name == "mxfp4":
            raw[..., 0] = 120
        if name == "nvfp4":
            raw[..., :4] &= 0x3F
        return Sample(QuantizedTensor(Scheme(fmt), shape, raw.flatten(1), origin="benchmark"), None)

    return made


def plain(name: str, *, bfloats: bool = False) -> Callable[[tuple[int, int]], Sample]:
    """A dense matrix. ``bfloats``: of bfloat16 numbers, as a float16 file made from a bfloat16 model has."""

    def made(shape: tuple[int, int]) -> Sample:
        scheme = dense(name)
        numbers = matrix(shape)
        values = (numbers if bfloats else numbers.float() * 1.1).to(scheme.weight.dtype)
        return Sample(QuantizedTensor(scheme, shape, values, origin="benchmark"), None)

    return made


def vectors(books: int, bits: int, length: int, group: int = 0) -> Callable[[tuple[int, int]], Sample]:
    """Random indices of codebooks' vectors, under scales of ``group`` columns or of rows."""
    return lambda shape: Sample(codebook_weight(shape, books, bits, length, group), None)


def row_vectors(length: int, centroids: int, residual: int = 0) -> Callable[[tuple[int, int]], Sample]:
    """Random indices of codebooks' vectors of rows."""
    return lambda shape: Sample(row_codebook_weight(shape, length, centroids, residual), None)


def trellis(bits: int, book: str) -> Callable[[tuple[int, int]], Sample]:
    """Random bits of a trellis."""
    return lambda shape: Sample(trellis_weight(shape, bits, book), None)


def lattice(divisor: float = 0.0) -> Callable[[tuple[int, int]], Sample]:
    """Random codes of a lattice's vectors."""
    return lambda shape: Sample(lattice_weight(shape, divisor), None)


def _inputs(name: str, columns: int, scale: str = "f32") -> ActivationScheme:
    return ActivationScheme(number_format(name), (1, columns), scale=number_format(scale))


_GGUF = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs"),
    *("q1_0", "tq1_0", "tq2_0", "mxfp4", "nvfp4"),
)
FORMATS: dict[str, Callable[[tuple[int, int]], Sample]] = {
    **{name: plain(name) for name in ("bf16", "f16", "f32")},
    "f16 of bf16 numbers": plain("f16", bfloats=True),
    **{f"int{bits} g64": coded(f"int{bits}", 64) for bits in range(1, 9)},
    **{f"uint{bits} g64 zero": coded(f"uint{bits}", 64, zero="integer") for bits in range(1, 9)},
    **{f"uint{bits} g64 float zero (HQQ)": coded(f"uint{bits}", 64, zero="float") for bits in range(1, 9)},
    "uint4 columns float zero (HQQ axis 0)": coded("uint4", 1, zero="float", rows=0),
    **{
        f"uint{bits} g64 of a column (HQQ axis 0)": coded(f"uint{bits}", 1, zero="float", rows=64, apart=True)
        for bits in (2, 3, 4, 8)
    },
    "uint4 g64 tiles (SINQ)": sinq_tiles(4, 64),
    **{f"int4 g{group or ' row'}": coded("int4", group) for group in (8, 16, 32, 48, 128, 256, 0)},
    **{f"int8 g{group or ' row'}": coded("int8", group) for group in (16, 32, 128, 0)},
    "int4 g64 f32": coded("int4", 64, "f32"),
    "uint4 g64 bf16 offset": coded("uint4", 64, "bf16", offset=True),
    "uint4 g128 zero (AWQ, GPTQ)": coded("uint4", 128, zero="integer"),
    "uint4 g128 zero act-order": coded("uint4", 128, zero="integer", order=True),
    "int4 16x64 blocks f32": coded("int4", 64, "f32", rows=16),
    "nf4 g64 f32": coded("nf4", 64, "f32"),
    "nf4 g64 float zero (SINQ)": coded("nf4", 64, zero="float"),
    "fp4 g64 f32 (bitsandbytes)": coded("fp4_bnb", 64, "f32"),
    **{f"spqr, {share:g} % outliers": with_outliers(share / 100) for share in (0, 1, 5)},
    "mxfp4": coded("e2m1", 32, "e8m0"),
    "mxfp6 e2m3": coded("e2m3", 32, "e8m0"),
    "mxfp6 e3m2": coded("e3m2", 32, "e8m0"),
    "mxfp8": coded("e4m3", 32, "e8m0"),
    "mxfp8 e5m2": coded("e5m2", 32, "e8m0"),
    "nvfp4": nvfp4(),
    "fp8 row": coded("e4m3", 0, "f32"),
    "fp8 128x128": coded("e4m3", 128, "f32", rows=128),
    "fp8 48x40": coded("e4m3", 40, "f32", rows=48),
    **{f"{name} row": coded(name, 0, "f32") for name in ("e5m2", "e4m3fnuz", "e5m2fnuz")},
    "fp8 128x128, inputs g128": coded("e4m3", 128, "f32", rows=128, inputs=_inputs("e4m3", 128)),
    "mxfp8, inputs": coded("e4m3", 32, "e8m0", inputs=_inputs("e4m3", 32, "e8m0")),
    "mxfp4, inputs": coded("e2m1", 32, "e8m0", inputs=_inputs("e2m1", 32, "e8m0")),
    "nvfp4, inputs": nvfp4(_inputs("e2m1", 16, "e4m3")),
    "aqlm 1x16 g8": vectors(1, 16, 8),
    "aqlm 1x16 g16": vectors(1, 16, 16),
    "aqlm 2x8 g8": vectors(2, 8, 8),
    "aqlm 1x8 g8": vectors(1, 8, 8),
    "higgs 4 bits": vectors(1, 8, 2, 256),
    "higgs 3 bits": vectors(1, 6, 2, 256),
    "higgs 2 bits": vectors(1, 8, 4, 256),
    "vptq v8 k65536": row_vectors(8, 65536),
    "vptq v8 k65536+256": row_vectors(8, 65536, 256),
    "vptq v8 k256": row_vectors(8, 256),
    "vptq v16 k65536+65536": row_vectors(16, 65536, 65536),
    "vptq v12 k65536": row_vectors(12, 65536),
    **{f"exl3 {bits} bits": trellis(bits, "mcg") for bits in range(1, 9)},
    "exl3 4 bits 3inst": trellis(4, "3inst"),
    "exl3 4 bits mul1": trellis(4, "mul1"),
    "quip# 2 bits": lattice(),
    "quip# 4 bits": lattice(3.45),
    "w8a8": coded("int8", 0, "f32", inputs=_inputs("int8", 0)),
    **{f"gguf {name}": blocks(name) for name in _GGUF},
}


def _copies(packed: PackedWeight) -> list[PackedWeight]:
    """Copies of a weight, together more than twice the largest cache."""
    count = 1 if packed.kernel.name == "reference" else -(-2 * timing.cache_bytes() // packed.nbytes)
    made = [packed]
    shared = () if packed.scheme.weight.vectors is not None else ("table",)  # codebooks are a weight's own
    for _ in range(count - 1):
        buffers = {
            name: buffer if name in shared else buffer.clone() for name, buffer in packed.buffers.items()
        }
        made.append(packed.kernel.restore(packed.scheme, packed.shape, buffers, packed.origin))
    return made


def measured(name: str, shape: tuple[int, int], tokens: list[int], repeats: int) -> Cliff:
    """One format by the number of tokens; LowbitError where it does not have this shape."""
    sample = FORMATS[name](shape)
    kernel = choose(sample.weight.scheme, sample.weight.shape, DEVICE).kernel
    packed = kernel.pack(sample.weight, DEVICE)
    layers = [Linear("bench", [copy], None, [settled(copy, sample.transform)]) for copy in _copies(packed)]
    seconds = {}
    for count in tokens:
        x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(5))
        used = layers if count == 1 else layers[:1]
        times = []
        with prompt_rows(first_prompt(count), count):
            for _ in range(repeats + 1):
                began = time.thread_time()
                for layer in used:
                    layer(x)
                times.append((time.thread_time() - began) / len(used))
        seconds[count] = min(times[1:])
    bits = packed.nbytes * 8 / (shape[0] * shape[1])
    whole = sample.transform is not None and sample.transform.gives_int8
    return Cliff(name, kernel.name, bits, shape[0] * shape[1], whole, seconds)


def first_prompt(tokens: int) -> int | None:
    """So many tokens of a step are one prompt's, fewer are of sequences that decode."""
    return 0 if tokens >= PROMPT else None


def alike(one: float, other: float) -> bool:
    """Whether two sizes are compared."""
    return max(one, other) <= LIKE * min(one, other)


def ratio(cliff: Cliff, all_of_them: list[Cliff], tokens: int) -> float:
    """Its time a weight beside the fastest one of its size."""
    like = [c for c in all_of_them if c.whole == cliff.whole and alike(c.bits, cliff.bits)]
    return cliff.seconds[tokens] / min(c.seconds[tokens] for c in like)


def run(names: list[str], shape: tuple[int, int], tokens: list[int], repeats: int) -> list[dict[str, object]]:
    """Print a Markdown table; the same as rows of a JSON document."""
    found = []
    for name in names:
        try:
            found.append(measured(name, shape, tokens, repeats))
        except LowbitError as error:
            print(f"{name}: not there: {error.message}")
    heads = [f"{count} token{'s' * (count > 1)}" for count in tokens]
    print("| format | bits | kernel | " + " | ".join(f"{head} | ratio" for head in heads) + " |")
    print("| --- | ---: | --- |" + " ---: | ---: |" * len(tokens))
    rows: list[dict[str, object]] = []
    for cliff in sorted(found, key=lambda c: c.bits):
        cells, ratios = [], {}
        for count in tokens:
            rate = cliff.weights / cliff.seconds[count] / 1e9
            ratios[count] = round(ratio(cliff, found, count), 2)
            speed = f"{rate * cliff.bits / 8:.1f} GB/s" if count == 1 else f"{2 * rate * count:.0f} GFLOPS"
            cells.append(f"{speed} | {ratios[count]:.2f}")
        print(f"| {cliff.format} | {cliff.bits:.2f} | {cliff.kernel} | " + " | ".join(cells) + " |")
        rows.append({"format": cliff.format, "kernel": cliff.kernel, "bits": round(cliff.bits, 3),
                     "seconds": cliff.seconds, "ratios": ratios})  # fmt: skip
    return rows
