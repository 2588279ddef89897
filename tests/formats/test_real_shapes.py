"""One layer of real sizes in each layout, of random bits: some rows against the definition, products against
the reference.

What the tools write is the fixtures' matter, at sizes that fit into the repository; here it is that nothing
about a layout depends on sizes that small: rows that are no whole blocks, hundreds of groups, codebooks of
65536 vectors. Definitions are numpy, a few rows of the weight at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.helpers import header_of, last_bit, reader_of
from formats.real_layouts import LAYOUTS, config_of
from formats.real_models import Model
from formats.test_exl2 import layer as exl2_layer
from formats.test_exl3 import layer as exl3_layer
from gguf_blocks import random_blocks, tensor_of
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.formats import StoredLinear, StoredModule
from lowbit.kernels import choose
from lowbit.kernels.reference import Reference
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme
from numerics.test_block_layouts import dequantized

NAME = "model.layers.0.mlp.down_proj"
CPU = torch.device("cpu")
# Qwen2.5-0.5B's K and down, DeepSeek-V3's kv_a (4.5 blocks of 128 rows).
SMALL = [(128, 896), (576, 7168)]
# DeepSeek-V2-Lite's down: 85.5 groups of 128, which not every tool can make.
RAGGED, WHOLE = (64, 10944), ("awq", "awq-gemv", "quark-int4", "qqq")
LARGE = [(896, 4864), (1152, 6912), (768, 2048)]  # Qwen2.5-0.5B, Gemma 3 1B, Qwen3-30B-A3B
LLAMA = (4096, 14336)  # Llama 3 8B
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of a word's nibbles
Tensors = dict[str, Tensor]
Definition = Callable[[dict[str, np.ndarray], np.ndarray, tuple[int, int]], np.ndarray]
TORCH = {
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


def random_tensors(layout: str, shape: tuple[int, int]) -> Tensors:
    """All bits at random; scales small, of both signs and all unlike; what must be an order is one."""
    random = torch.Generator().manual_seed(sum(shape) + len(layout))
    found: Tensors = {}
    for suffix, (dtype, size) in LAYOUTS[layout].of(*shape).items():
        kind, leaf = TORCH[dtype], suffix.rpartition(".")[2]
        if kind.is_floating_point and kind is not torch.float8_e4m3fn:
            values = (torch.rand(size, generator=random) + 0.2) * 0.02
            found[suffix] = (values * torch.randint(0, 2, size, generator=random).mul(2).sub(1)).to(kind)
            continue
        count = int(np.prod(size)) * kind.itemsize
        bits = torch.randint(0, 256, (count,), generator=random, dtype=torch.uint8)
        if kind is torch.float8_e4m3fn:
            bits[(bits & 127) == 127] ^= 1  # no NaN
        if layout == "bitnet":
            bits &= 0xAA | 0x55 & ~(bits >> 1 & 0x55)  # 3 is no weight
        found[suffix] = bits.view(kind).view(size)
        if leaf in ("g_idx", "weight_g_idx"):
            places = torch.randperm(size[0], generator=random)
            places = places if layout.endswith("order") else torch.arange(size[0])
            found[suffix] = (places // 128).int()
        if layout == "gptq-8bit" and leaf == "qzeros":  # symmetric
            found[suffix] = torch.full(size, 0x7F7F7F7F, dtype=kind)
        if leaf == "perm":
            found[suffix] = torch.randperm(size[0], generator=random).to(kind)
        if leaf == "weight_shape":
            found[suffix] = torch.tensor(shape)
    return found


def folder_of(layout: str, shape: tuple[int, int], tensors: Tensors, folder: Path) -> Path:
    """A checkpoint of that layer alone."""
    how, found = LAYOUTS[layout], Model({"architectures": ["LlamaForCausalLM"]}, {NAME: shape})
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(how, found)))
    for name, values in how.documents(found).items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    save_file({f"{NAME}.{key}": value for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


def read(folder: Path, shape: tuple[int, int]) -> StoredLinear:
    reader, module = reader_of(folder, strict=True), StoredModule(NAME, NAME, shape)
    with TensorData(header_of(folder)) as data:
        found = reader.read(module, data)
    told = reader.scheme_of(module)
    assert (told.weight, told.blocks, told.scales) == (
        found.weight.scheme.weight,
        found.weight.scheme.blocks,
        found.weight.scheme.scales,
    )
    return found


# ---- definitions: (tensors as numpy, rows, shape) -> float64 (len(rows), in)


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """(…, n) words -> (…, 32 n / bits) numbers, the lowest first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words.view(np.uint32)[..., None] >> shifts) & (2**bits - 1)).reshape(*words.shape[:-1], -1)


def gptq(bits: int) -> Definition:
    def define(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        codes = fields(np.ascontiguousarray(t["qweight"][:, rows].T), bits)
        zeros = (fields(t["qzeros"], bits)[:, rows] + 1) & (2**bits - 1)
        groups = t["g_idx"]
        return (codes - zeros[groups].T.astype(float)) * t["scales"][groups][:, rows].T.astype(float)

    return define


def awq(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    def nibbles(words: np.ndarray) -> np.ndarray:
        return ((words.view(np.uint32)[:, rows // 8] >> (4 * AWQ_ORDER[rows % 8]).astype(np.uint32)) & 15).T

    size = shape[1] // len(t["scales"])
    zeros, scales = (np.repeat(x, size, 1) for x in (nibbles(t["qzeros"]), t["scales"][:, rows].T))
    return (nibbles(t["qweight"]) - zeros.astype(float)) * scales.astype(float)


def gemv(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    codes, zeros = fields(t["qweight"][rows], 4), fields(t["qzeros"][rows], 4)
    groups = np.arange(shape[1]) // 128
    return (codes - zeros[:, groups].astype(float)) * t["scales"][rows][:, groups].astype(float)


def packed(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    codes = fields(t["weight_packed"][rows], 4).astype(float)
    groups = t.get("weight_g_idx", np.arange(shape[1]) // 128)
    zeros: np.ndarray | float = 8.0
    if "weight_zero_point" in t:
        words = np.ascontiguousarray(t["weight_zero_point"].T)  # (groups, out / 8)
        zeros = fields(words, 4)[groups][:, rows].T.astype(float)
    return (codes - zeros) * t["weight_scale"][rows][:, groups]


def fp8(name: str, tall: int = 128, wide: int = 128) -> Definition:
    """A scale for each block; 0: as large as the matrix."""

    def define(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        scale = t[name].reshape(-1, 1) if not wide else t[name]
        across = np.arange(shape[1]) // (wide or shape[1])
        down = rows // (tall or shape[0])
        return t["weight"][rows] * scale.reshape(len(scale), -1)[down][:, across]

    return define


def nvfp4(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    raw = t["weight_packed" if "weight_packed" in t else "weight"][rows]
    codes = np.stack((raw & 15, raw >> 4), -1).reshape(len(rows), -1)
    outer = t["weight_scale_2"] if "weight_scale_2" in t else np.float32(1) / t["weight_global_scale"]
    return E2M1[codes] * np.repeat(t["weight_scale"][rows], 16, 1) * outer.astype(float)


def mlx(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    scales, biases = (np.repeat(t[name][rows], 64, 1) for name in ("scales", "biases"))
    return fields(t["weight"][rows], 4) * scales + biases


def slabs(raw: np.ndarray, high_first: bool) -> np.ndarray:
    """(groups, size) codes of 4 bits in two slabs."""
    parts = (raw >> 4, raw & 15) if high_first else (raw & 15, raw >> 4)
    return np.concatenate(parts).astype(float)


def hqq(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    flat = (slabs(t["W_q"], True) - t["zero"]) * t["scale"]
    return flat.reshape(shape)[rows]


def sinq(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    flat = (slabs(t["W_q"], True) - t["meta.zero"]) * t["meta.scale"]
    return flat.reshape(shape)[rows] * t["meta.scale2"]


def quanto(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    flat = slabs(t["weight._data._data"], False) * t["weight._scale"] - t["weight._shift"]
    return flat.reshape(shape)[rows]


def bitnet(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    quarter = shape[0] // 4
    codes = t["weight"][rows % quarter] >> (2 * (rows // quarter)).astype(np.uint8)[:, None] & 3
    return (codes.astype(float) - 1) * t["weight_scale"]


def quark(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    words = t["weight"].view(np.uint32)[:, rows // 8] >> (4 * AWQ_ORDER[rows % 8]).astype(np.uint32)
    codes = ((words & 15 ^ 8).astype(float) - 8).T
    return codes * np.repeat(t["weight_scale"][:, rows].T, 128, 1)


def aqlm(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    codes = t["codes"].view(np.uint16)[rows, :, 0]
    return t["codebooks"][0, :, 0][codes].reshape(len(rows), -1) * t["scales"].reshape(-1, 1)[rows]


def vptq(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    bits = np.unpackbits(t["indices"][0, rows // 8].view(np.uint8), axis=1, bitorder="little")
    index = (bits[:, : shape[1] * 24].reshape(len(rows), -1, 24) << np.arange(24)).sum(-1)
    main, second = (t[f"{name}centroids.weight"].reshape(-1, 8) for name in ("", "res_"))
    places = (rows % 8)[:, None]
    stored = main[index & 0xFFFF, places] + second[index >> 16, places]
    placed = np.empty_like(stored)
    placed[:, t["perm"].view(np.uint16)] = stored
    return placed * t["weight_scale"] + t["weight_bias"]


def int8_rows(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return t["weight"][rows].astype(float) * t["weight_scale"][rows]


def qqq(t: dict[str, np.ndarray], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A word has of one row four columns of 16, and the same of the row eight below."""
    r, c = rows[:, None], np.arange(shape[1])
    words = t["B"].view(np.uint32)[c // 16, r // 64 * 128 + r % 8 * 16 + c % 16 // 4 * 4 + r % 64 // 16]
    nibble = np.array([0, 4, 1, 5, 2, 6, 3, 7])[r % 16 // 8 * 4 + c % 4]
    codes = (words >> (4 * nibble).astype(np.uint32) & 15).astype(float) - 8
    inner = t["s_group"][:, rows // 64 * 64 + rows % 8 * 8 + rows % 64 // 8].T
    outer = t["s_channel"][0, rows // 32 * 32 + rows % 8 // 2 * 8 + rows % 32 // 8 * 2 + rows % 2]
    return codes * np.repeat(inner, 128, 1) * outer[:, None]


DEFINITIONS: dict[str, Definition] = {
    "qqq": qqq,
    "gptq-order": gptq(4),
    "gptq-8bit": gptq(8),
    "awq": awq,
    "awq-32": awq,
    "awq-gemv": gemv,
    "ct-w4a16": packed,
    "ct-w4a16-asym": packed,
    "ct-w4a16-order": packed,
    "ct-w8a8": int8_rows,
    "ct-fp8": fp8("weight_scale", 0, 0),
    "ct-fp8-dynamic": fp8("weight_scale", 1, 0),
    "ct-fp8-block": fp8("weight_scale"),
    "ct-nvfp4": nvfp4,
    "fp8-block": fp8("weight_scale_inv"),
    "modelopt-nvfp4": nvfp4,
    "mlx": mlx,
    "hqq": hqq,
    "sinq": sinq,
    "quanto": quanto,
    "bitnet": bitnet,
    "quark-int4": quark,
    "aqlm": aqlm,
    "vptq": vptq,
}


def as_numpy(tensors: Tensors) -> dict[str, np.ndarray]:
    """Floats of all kinds as float64, whole numbers as they are."""
    return {
        key: tensor.double().numpy() if tensor.dtype.is_floating_point else tensor.numpy()
        for key, tensor in tensors.items()
    }


def some_rows(rows: int, height: int = 1) -> np.ndarray:
    """The first and the last ones, and a few between."""
    random = np.random.default_rng(rows)
    between = random.choice(rows, min(rows, 24), replace=False)
    return np.unique(np.concatenate((np.arange(height), np.arange(rows - 2 * height, rows), between)))


def check_products(weight: QuantizedTensor) -> None:
    """The kernel that a CPU has for the layer, with 1 and 33 tokens, against the reference."""
    weight = replace(weight, scheme=replace(weight.scheme, activation=None))  # x is what is multiplied
    choice = choose(weight.scheme, weight.shape, CPU)
    kernel = choice.kernel
    assert kernel.name != "reference", choice.refusals
    x = torch.randn(33, weight.shape[1], generator=torch.Generator().manual_seed(5)).bfloat16().float()
    reference = Reference()
    wanted = reference.linear(x, reference.pack(weight, CPU))
    made = kernel.pack(weight, CPU)
    scale = weight.dequantize().norm(dim=1) * x.norm(dim=1, keepdim=True)
    limit = 3e-3 if kernel.rounds(made.scheme) or weight.scheme.scales_columns else 1e-4
    for tokens in (1, 33):
        found = kernel.linear(x[:tokens], made)
        assert ((found - wanted[:tokens]).abs() <= limit * scale[:tokens] + 1e-9).all(), kernel.name


def check_layout(layout: str, shape: tuple[int, int], folder: Path) -> None:
    tensors = random_tensors(layout, shape)
    found = read(folder_of(layout, shape, tensors, folder), shape)
    rows = some_rows(shape[0])
    wanted = torch.from_numpy(DEFINITIONS[layout](as_numpy(tensors), rows, shape))
    weight = found.weight.dequantize()[torch.from_numpy(rows)]
    multiplier = None if found.input is None else found.input.multiplier
    weight = weight if multiplier is None else weight * multiplier
    far = (weight.double() - wanted).abs()
    # Sums and products of float32 numbers: some are rounded twice.
    assert (far <= 4 * last_bit(torch.float32, wanted.float()) + 1e-7 * wanted.abs().max()).all(), far.max()
    check_products(found.weight)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("layout", DEFINITIONS)
def test_a_layer(layout: str, shape: tuple[int, int], tmp_path: Path) -> None:
    check_layout(layout, shape, tmp_path)


@pytest.mark.parametrize("layout", [name for name in DEFINITIONS if name not in WHOLE])
def test_a_layer_with_half_a_group(layout: str, tmp_path: Path) -> None:
    check_layout(layout, RAGGED, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("layout", DEFINITIONS)
def test_a_large_layer(layout: str, shape: tuple[int, int], tmp_path: Path) -> None:
    check_layout(layout, shape, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["gptq-order", "awq", "ct-w4a16-asym", "fp8-block", "aqlm"])
def test_the_largest_layer(layout: str, tmp_path: Path) -> None:
    check_layout(layout, LLAMA, tmp_path)


def check_exl2(shape: tuple[int, int], folder: Path) -> None:
    """Important columns in wide codes, as the tool orders them: the rest in groups of 128 of two widths."""
    out, columns = shape
    groups = [(8, 32), (6, 32), (6, 64)] + [(5, 128)] * (columns // 512)
    left = columns - sum(size for _, size in groups)
    groups += [(4, 128)] * (left // 128) + ([(3, left % 128)] if left % 128 else [])
    tensors, wanted = exl2_layer(NAME, out, groups)
    found = read(
        folder_of("exl2", shape, {k.removeprefix(f"{NAME}."): v for k, v in tensors.items()}, folder), shape
    )
    assert np.array_equal(found.weight.dequantize().numpy(), wanted)
    check_products(found.weight)


@pytest.mark.parametrize("shape", [(128, 896), (576, 1152)], ids=str)
def test_exl2(shape: tuple[int, int], tmp_path: Path) -> None:
    check_exl2(shape, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4864, 896), (896, 4864), (1024, 4096), (1536, 7168)], ids=str)
def test_exl2_large(shape: tuple[int, int], tmp_path: Path) -> None:
    check_exl2(shape, tmp_path)


def check_exl3(shape: tuple[int, int], folder: Path) -> None:
    tensors, wanted = exl3_layer(NAME, *shape, bits=4, book="mcg")
    own = {key.removeprefix(f"{NAME}."): value for key, value in tensors.items()}
    found = read(folder_of("exl3", shape, own, folder), shape)
    error = (found.weight.dequantize().double() - torch.from_numpy(wanted.copy())).abs()
    assert error.max() <= 2e-3 * np.abs(wanted).max()
    check_products(found.weight)


@pytest.mark.parametrize("shape", [(128, 896), (576, 256)], ids=str)
def test_exl3(shape: tuple[int, int], tmp_path: Path) -> None:
    check_exl3(shape, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(896, 4864), (576, 7168), (768, 2048)], ids=str)
def test_exl3_large(shape: tuple[int, int], tmp_path: Path) -> None:
    check_exl3(shape, tmp_path)


def check_blocks(name: str, shape: tuple[int, int]) -> None:
    layout = tensor_of(name, random_blocks(name, 1, 1)).scheme.weight.block
    assert layout is not None
    raw = random_blocks(name, shape[0], shape[1] // layout.weights)
    weight, rows = tensor_of(name, raw), some_rows(shape[0])
    assert weight.shape == shape
    assert np.array_equal(weight.dequantize().numpy()[rows], dequantized(name, raw[rows]), equal_nan=True)
    assert isinstance(weight.scheme, Scheme)
    check_products(weight)


# What llama.cpp makes of rows that 256 does not divide (896: 3.5 super blocks) has blocks of 32.
BLOCKS = {
    (128, 896): ("q4_0", "q5_0", "q5_1", "q8_0", "iq4_nl"),
    (64, 4864): ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq2_xxs", "iq3_s", "iq4_xs", "iq1_s", "iq1_m"),
}


@pytest.mark.parametrize(("shape", "name"), [(s, n) for s, names in BLOCKS.items() for n in names])
def test_gguf_blocks(shape: tuple[int, int], name: str) -> None:
    check_blocks(name, shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(896, 4864), (2048, 768)], ids=str)
@pytest.mark.parametrize("name", BLOCKS[64, 4864])
def test_gguf_blocks_of_large_layers(shape: tuple[int, int], name: str) -> None:
    check_blocks(name, shape)
