"""GGUF blocks against the gguf package's own dequantizers: bit-equal."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from lowbit.checkpoint.gguf_types import GGUF_TYPES_BY_NAME
from lowbit.numerics.block_layouts import block_formats
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

# Where a block's f16 fields lie; IQ1_M spreads its d over the top nibbles of its last 8 bytes.
F16_FIELDS = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0", "iq4_nl", "iq4_xs"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s"), (0,)),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
NAMES = [name.removeprefix("gguf_") for name in block_formats()]


def random_blocks(name: str, rows: int = 48, blocks: int = 3) -> np.ndarray:
    """uint8 (rows, blocks * bytes): all codes random, scales finite, some negative, some zero."""
    rng = np.random.default_rng(sum(map(ord, name)))
    layout = number_format(f"gguf_{name}").block
    assert layout is not None
    raw = rng.integers(0, 256, (rows, blocks, layout.bytes), dtype=np.uint8)
    for at in F16_FIELDS.get(name, ()):
        scales = rng.normal(0, 1, (rows, blocks, 1)).astype(np.float16)
        scales[::7] = 0
        raw[..., at : at + 2] = scales.view(np.uint8)
    if name == "iq1_m":
        raw[..., 55] = raw[..., 55] & 0x8F | 0x30  # keeps the exponent of d small
    if name == "mxfp4":
        raw[..., 0] = rng.integers(0, 255, (rows, blocks))  # 255 is NaN in OCP's e8m0 and never written
    if name == "nvfp4":
        raw[..., :4] &= 0x7F  # scales are unsigned
    return raw.reshape(rows, -1)


def tensor_of(name: str, raw: np.ndarray) -> QuantizedTensor:
    fmt = number_format(f"gguf_{name}")
    assert fmt.block is not None
    columns = raw.shape[1] // fmt.block.bytes * fmt.block.weights
    return QuantizedTensor(Scheme(fmt), (len(raw), columns), torch.from_numpy(raw))


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_is_bit_equal_to_gguf(name: str) -> None:
    raw = random_blocks(name)
    with np.errstate(all="ignore"):
        expected = dequantize(raw, gguf.GGMLQuantizationType[name.upper()])
    found = tensor_of(name, raw).dequantize().numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    finite = expected[np.isfinite(expected)]
    assert len(np.unique(finite)) > 50, "the blocks are too tame to tell anything"


@pytest.mark.parametrize("name", NAMES)
def test_expand_is_the_same_weight(name: str) -> None:
    weight = tensor_of(name, random_blocks(name))
    expanded = weight.expand()
    assert expanded.scheme.weight.bits <= 8
    assert expanded.codes.shape == weight.shape
    assert torch.equal(expanded.dequantize().nan_to_num(), weight.dequantize().nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_sizes_agree_with_gguf(name: str) -> None:
    layout = number_format(f"gguf_{name}").block
    assert layout is not None
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    kind = GGUF_TYPES_BY_NAME[name.upper()]
    assert (layout.weights, layout.bytes) == size == (kind.weights, kind.bytes)
    assert kind.id == gguf.GGMLQuantizationType[name.upper()].value


def test_every_type_gguf_can_dequantize_is_there() -> None:
    theirs = set(gguf.quants._type_traits) - {gguf.GGMLQuantizationType.BF16}
    assert {kind.name.lower() for kind in theirs} <= set(NAMES)


def test_the_embedded_model_is_bit_equal(embedded_path: Path) -> None:
    reader = gguf.GGUFReader(embedded_path)
    checked = 0
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "F32":
            continue
        raw = np.array(tensor.data).reshape(tensor.data.shape[0], -1)
        expected = dequantize(raw, tensor.tensor_type)
        found = tensor_of(tensor.tensor_type.name.lower(), raw).dequantize().numpy()
        assert np.array_equal(found, expected), tensor.name
        checked += 1
    assert checked == 211
