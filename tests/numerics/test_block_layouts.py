"""GGUF blocks against the gguf package's own dequantizers: bit-equal.

The package has none for Q1_0: there the oracle is a loop written from the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from gguf_blocks import F16_FIELDS, NAMES, random_blocks, tensor_of
from lowbit.checkpoint.gguf_file import read_gguf_header
from lowbit.checkpoint.gguf_types import GGUF_TYPES_BY_NAME
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.numerics.block_layouts import grid_vectors
from lowbit.numerics.number_formats import number_format


def dequantized(name: str, raw: np.ndarray) -> np.ndarray:
    """float32 (rows, columns) by the gguf package."""
    if name == "q1_0":
        return np.stack([q1_0_row(row) for row in raw])
    with np.errstate(all="ignore"):
        return dequantize(raw, gguf.GGMLQuantizationType[name.upper()])


def q1_0_row(row: np.ndarray) -> np.ndarray:
    """Blocks of f16 d and 128 bits, lowest first: d where set, -d where not."""
    values = []
    for block in row.reshape(-1, 18):
        d = np.float32(block[:2].view(np.float16)[0])
        values += [d if block[2 + i // 8] >> i % 8 & 1 else -d for i in range(128)]
    return np.array(values, np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_is_bit_equal_to_gguf(name: str) -> None:
    raw = random_blocks(name)
    expected = dequantized(name, raw)
    found = tensor_of(name, raw).dequantize().numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    finite = expected[np.isfinite(expected)]
    assert len(np.unique(finite)) > 50, "the blocks are too tame to tell anything"


def test_every_scale_byte_of_mxfp4_and_nvfp4() -> None:
    """All but 255: NaN in OCP's rule, never written. Exponents 0 and 1 are float32 subnormals."""
    codes = np.tile(np.arange(0, 256, 17, dtype=np.uint8), (255, 1))  # all 16 in both nibbles
    scales = np.arange(255, dtype=np.uint8)
    mxfp4 = np.concatenate([scales[:, None], codes], 1)
    assert np.array_equal(tensor_of("mxfp4", mxfp4).dequantize().numpy(), dequantized("mxfp4", mxfp4))
    assert np.count_nonzero(dequantized("mxfp4", mxfp4[:1])) == 28, "subnormals must not be flushed"
    nvfp4 = np.concatenate([np.stack([np.roll(scales, n) for n in range(4)], 1), codes, codes], 1)
    assert np.array_equal(tensor_of("nvfp4", nvfp4).dequantize().numpy(), dequantized("nvfp4", nvfp4))


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q6_k", "iq3_s"])
def test_extreme_f16_scales(name: str) -> None:
    """The largest and smallest scales, of either sign, and both zeros."""
    extremes = np.array([65504, -65504, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0, 1.0], np.float16)
    raw = random_blocks(name, rows=8, blocks=1)
    at = F16_FIELDS[name][0]
    raw[:, at : at + 2] = extremes.view(np.uint8).reshape(8, 2)
    assert np.array_equal(tensor_of(name, raw).dequantize().numpy(), dequantized(name, raw))


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"])
def test_every_vector_of_the_grids(name: str) -> None:
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    assert np.array_equal(
        grid_vectors(name, torch.device("cpu")).numpy(), kind.grid.reshape(kind.grid.shape[-2:])
    )


@pytest.mark.parametrize("name", NAMES)
def test_any_leading_shape_any_address_any_device(name: str) -> None:
    raw = random_blocks(name, rows=6)
    layout = number_format(f"gguf_{name}").block
    assert layout is not None
    blocks = torch.from_numpy(raw).unflatten(-1, (-1, layout.bytes))  # (6, 3, bytes)
    expected = layout.decode(blocks)
    assert expected.shape == (6, 3, layout.weights) and expected.dtype == torch.float32
    stacked = layout.decode(blocks.unflatten(0, (2, 3)))
    assert torch.equal(stacked.flatten(0, 1).nan_to_num(), expected.nan_to_num())
    shifted = torch.zeros(1 + layout.bytes, dtype=torch.uint8)  # one block at an odd address
    shifted[1:] = blocks[1, 1]
    alone = layout.decode(shifted[1:].view(1, 1, layout.bytes))
    assert torch.equal(alone[0, 0].nan_to_num(), expected[1, 1].nan_to_num())
    # On the meta device an operand left behind on the CPU is an error.
    assert layout.decode(blocks.to("meta")).shape == expected.shape


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch's threads wait for each other busily: on cores shared with other tests that costs tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_embedded_model_is_bit_equal(embedded_path: Path) -> None:
    header = read_gguf_header(embedded_path)
    checked = 0
    with TensorData(header) as data:
        for name, entry in header.tensors.items():
            if entry.dtype == "F32":
                continue
            kind, raw = entry.dtype.lower(), data.tensor(name).numpy()
            assert np.array_equal(tensor_of(kind, raw).dequantize().numpy(), dequantized(kind, raw)), name
            checked += 1
    assert checked == 211
