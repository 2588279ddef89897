"""docs/formats.md, made from the formats' code and the fixtures: ``make docs`` writes it, a test compares "
"it."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

from formats.conversions import conversions
from formats.lossless import section
from formats.tools_that_load import loaded
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.formats import all_formats, detect
from lowbit.formats.refused import REFUSED
from lowbit.formats.writing import all_writers
from lowbit.loading import plan_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
# What the tests compare with a tool that runs inside them, without a fixture.
IN_TESTS = {
    "dense": "transformers (logits of every family)",
    "gguf": "the gguf package (every block type)",
    "mxfp4": "transformers (unpacking and logits)",
}
READS = {
    "aqlm": "any codebooks; on a CPU vectors of more than one row are decoded to 16 bits a weight when "
    "loaded",
    "auto-round": "2-8 bits in GPTQ packing (v1, v2), 4 bits in AWQ packing, mixed bits (extra_config); FP8 "
    "in blocks and static, NVFP4, MXFP4, MXFP8, mixed too",
    "awq": "gemm, gemv, gemv_fast, Marlin; 4 bits, in gemm 2, 3 and 8 too, dynamic rules; inputs behind "
    "scaled activations",
    "bitnet": "transformers' packed 2 bits (bitlinear, autobitlinear), unpacked, and online; int8 inputs a "
    "token",
    "bitsandbytes": "nf4, fp4, double quantization, any storage dtype; LLM.int8 with outlier columns",
    "blockwise_int8": "int8 in blocks",
    "compressed-tensors": "pack-quantized 1-8 bit (both packings), int-, float-, naive-quantized, nvfp4, "
    "mxfp4, mxfp6, mxfp8, sparse and 2:4 masks, marlin-24, several groups, act-order; QuIP, QuaRot and "
    "SpinQuant rotations (hadamard, random-hadamard, random-matrix), Q and K's too",
    "dense": "f32, f16, bf16",
    "eetq": "int8 per channel, taken out of its GEMM's layout",
    "exl2": "2-6 and 8 bits in one matrix, at the room of its widest group",
    "exl3": "1-8 bits a weight, all three code books, quantized heads of tied models; all sizes",
    "fp8": "per tensor, per channel, blocks with ragged edges; e4m3, e5m2, fnuz, ue8m0; fbgemm, MXFP8, fp4 "
    "experts; GPTQModel's, whose inputs stay as they are",
    "fouroversix": "NVFP4, NVINT4, MXFP4 of every rule, tiled scales; inputs are left as they are",
    "fp_quant": "MXFP4 and NVFP4 under a block Hadamard transform, packed and pseudo-quantized",
    "gguf": "every block type, mixed types, split files, experts stacked or (before April 2024) one by one",
    "gguf-layers": "GGUF's Q1_0, Q2_0, Q4_0, Q8_0, Q4_K, Q5_K and Q6_K in safetensors, as GPTQModel writes "
    "them; dynamic rules",
    "gptq": "2, 3, 4, 8 bits, v1 and v2 zeros, act-order, planar (also 5-7 bits), Marlin and sparse "
    "Marlin (marlin_24), dynamic rules, quantized embeddings; rotated models (inputs of down_proj)",
    "higgs": "2, 3 and 4 bits, grids of single numbers and of pairs, in the order of every FLUTE template, "
    "files from before transformers 4.50 too; inputs rotated by block Hadamard matrices; on a GPU decoded to "
    "16 bits a weight when loaded",
    "hqq": "1-6 and 8 bits with float zero points, axis 1 and 0, any group, views as floats; HQQ's own "
    "qmodel.pt",
    "metal": "transformers' MLX layout: affine 2, 4, 8 bits",
    "mlx": "affine 1-6 and 8 bits, groups of 32, 64, 128; mxfp4, mxfp8, nvfp4; rules of modules, embeddings, "
    "stacked experts",
    "modelopt": "FP8, NVFP4, MXFP8, MXFP4, int4 AWQ, int8 SmoothQuant, mixed",
    "mxfp4": "gpt-oss' stacked experts",
    "qoq": "QServe's W4A8, per channel and per group, pickled files too",
    "paroquant": "int4 as AWQ packs it, under Givens rotations of pairs of inputs; GPTQModel's files and the "
    "method's own, experts that share a rotation",
    "scaled-8bit": "FP8 and int8 weights beside their scales where config.json says nothing, ComfyUI's too; "
    "a scale for the tensor, for each row or for blocks of 128",
    "qqq": "4 bits per channel and in groups of 128, int8 inputs, as GPTQModel and QQQ's own tool save them; "
    "dynamic rules",
    "quip_sharp": "E8P12, E8P12RVQ3B and E8P12RVQ4B, fused layers, low rank, rescaled inputs; low rank, and "
    "on a CPU E8P12RVQ3B, are decoded to 16 bits a weight when loaded",
    "sinq": "1-6 and 8 bits, scales of rows (8-bit ones too) and columns, tiles, nf4",
    "quanto": "qint8, qfloat8 (e4m3, e5m2), qint4, qint2 with float shifts or zero points; inputs and "
    "outputs of 8 bits, but no LayerNorm's",
    "quark": "fp8 (static, a token), int8, uint8, int4, uint4 (both packings), int4 of fp8, MXFP4, MXFP6, "
    "two-stage NVFP4; int4 and int8 inputs in groups; patterns of layers; inputs rotated at run time (R4, "
    "online R1); of models calibrated for attention in FP8 all but that",
    "spqr": "3 bits, scales of scales, outliers (by row or 16 rows), act-order",
    "torchao": "safetensors of torchao 0.15 and newer, pickled files of the same classes: Int8Tensor, "
    "Float8Tensor (inputs a row or tensor), Int4Tensor (plain), Int4TilePackedTo4dTensor, "
    "IntxUnpackedToInt8Tensor, MXTensor (fp4, fp6, fp8) and NVFP4Tensor, scales in tiles or rows, and "
    "stacks of experts as these two; int8 inputs with zero points (8da4w), MX and calibrated NVFP4 inputs",
    "squeezellm": "3 and 4 bits with a table for each row, sparse outliers, rows kept whole, the tool's "
    "sq-*.pt too; decoded to 16 bits a weight when loaded",
    "vptq": "residual codebooks, outliers, groups, permuted and scaled columns, GPTQModel's files too; "
    "vectors of 3 to 16 rows stay "
    "packed, others are decoded to 16 bits a weight when loaded",
    "w4afp8": "int4 experts with FP8 inputs beside FP8 blocks, told by config.json or hf_quant_config.json",
    "w8a8_fp8": "e4m3 per channel",
    "w8a8_int8": "int8 per channel",
}


def page() -> str:
    """The whole page."""
    verified, kernels = evidence()
    writers = all_writers()
    lines = [
        "# Checkpoint formats",
        "",
        "Made by `make docs` from the formats' code and the fixtures under tests/fixtures; do not edit. "
        "The method is read from the checkpoint's own config: nobody passes a flag.",
        "",
        "*Verified against*: a tool nobody here wrote saved these files and dequantized them itself; the "
        "values agree to the last bit of the stored scale's type. *Kernels*: what runs the fixtures' "
        "layers on a CPU with AVX2 or AVX-512 (-: there is no fixture); everything runs on `reference` too, "
        "and `lowbit inspect` says why a layer does not run on another. On a GPU `gpu_blocks` runs them, "
        "`gpu_vectors` (AQLM), `gpu_row_vectors` (VPTQ), `gpu_trellis` (EXL3), `gpu_lattice` (QuIP#), "
        "`gpu_halves` (SpQR) and `gpu_columns` (scales of columns: HQQ, SINQ), packed there too. "
        "*Writes*: what `lowbit convert --format` writes, exactly or not at all.",
        "",
        "| format | also called | reads | verified against (fixtures) | kernels | writes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fmt in sorted(all_formats(), key=lambda one: one.name):
        tools = sorted(verified[fmt.name])
        if fmt.name in IN_TESTS:
            tools.append(IN_TESTS[fmt.name])
        cells = (
            f"`{fmt.name}`",
            ", ".join(f"`{alias}`" for alias in fmt.aliases) or "-",
            READS[fmt.name],
            "; ".join(tools) or "**unverified**: no tool that writes it runs on a CPU; a numpy oracle only",
            ", ".join(f"`{kernel}`" for kernel in sorted(kernels[fmt.name])) or "-",
            writers[fmt.name].writes if fmt.name in writers else "-",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *loaded(), "", *section(), "", *conversions()]
    lines += ["", "## Recognised and refused", "", "| method | why, and what to do |", "| --- | --- |"]
    lines += [f"| `{method}` | {why} |" for method, why in sorted(REFUSED.items())]
    lines += [
        "",
        "## Fixtures",
        "",
        "| fixture | format | tool | dequantized by |",
        "| --- | --- | --- | --- |",
    ]
    for folder, about in cases():
        name = f"{folder.parent.name}/{folder.name}"
        tool = f"{about['tool']} {about['version']}"
        lines.append(f"| {name} | `{format_of(folder)}` | {tool} | {about['dequantized_by']} |")
    return "\n".join(lines) + "\n"


def cases() -> list[tuple[Path, dict[str, str]]]:
    """Every fixture folder with what it says about itself."""
    found = sorted(FIXTURES.glob("*/*/about.json"))
    return [(path.parent, json.loads(path.read_text())) for path in found]


@cache
def format_of(folder: Path) -> str:
    """The format that claims it."""
    return detect(open_checkpoint(str(folder))).name


def evidence() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """(format -> tools with versions and how many cases, format -> kernels of its fixtures' layers)."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    kernels: dict[str, set[str]] = defaultdict(set)
    for folder, about in cases():
        name = format_of(folder)
        counts[name][f"{about['tool']} {about['version']}"] += 1
        try:
            plan = plan_model(open_checkpoint(str(folder)), device="cpu")
        except LowbitError:
            continue
        quantized = {module.kernel for module in plan.modules if not module.scheme.is_dense}
        kernels[name] |= quantized or {module.kernel for module in plan.modules}  # decoded when loaded
    for path in sorted((FIXTURES / "gguf_families").glob("*.gguf")):
        plan = plan_model(open_checkpoint(str(path)), device="cpu")
        kernels["gguf"] |= {
            m.kernel for m in plan.modules if not m.scheme.is_dense and m.kernel != "unpacked"
        }
    about = FIXTURES / "gguf_families" / "about.json"
    files = len(list((FIXTURES / "gguf_families").glob("*.gguf")))
    counts["gguf"][f"{json.loads(about.read_text())['tool']} ({files} model families)"] = 1
    verified = {
        name: {f"{tool} ({count})" if count > 1 else tool for tool, count in tools.items()}
        for name, tools in counts.items()
    }
    kernels["dense"].add("cpu_dense")
    return defaultdict(set, verified), kernels


if __name__ == "__main__":
    sys.stdout.write(page())
