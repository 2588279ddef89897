"""GGUF encoders: against ggml's blocks, the gguf package's, a numpy oracle's, and native against torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.numerics.number_formats import number_format
from lowbit.quantize import gguf_blocks
from lowbit.quantize.gguf_blocks import ENCODABLE, REFUSED, block_weights, encode
from oracles import gguf_quantize as oracle

GOLDEN = load_file(Path(__file__).parents[1] / "fixtures" / "gguf_blocks" / "blocks.safetensors")
BLOCK_TYPES = [name for name in ENCODABLE if name not in ("F16", "BF16")]
IN_PACKAGE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
# Root mean square of what quantizing loses, relative to gaussian weights: an upper bound.
LOSS = {
    "Q4_0": 0.1,
    "Q4_1": 0.08,
    "Q5_0": 0.05,
    "Q5_1": 0.04,
    "Q8_0": 0.006,
    "Q1_0": 0.7,
    "TQ1_0": 0.9,
    "TQ2_0": 0.9,
    "MXFP4": 0.13,
    "NVFP4": 0.11,
    "IQ3_S": 0.18,
    "IQ4_NL": 0.08,
    "IQ4_XS": 0.08,
    "Q2_K": 0.33,
    "Q3_K": 0.17,
    "Q4_K": 0.08,
    "Q5_K": 0.04,
    "Q6_K": 0.02,
}


def cruel(rows: int, columns: int, seed: int) -> Tensor:
    """Every 16 weights their own scale and offset, with zeros and ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns // 16, 16, generator=generator)
    scale = torch.exp2(torch.randint(-9, 3, (rows, columns // 16, 1), generator=generator).float())
    offset = torch.randn(rows, columns // 16, 1, generator=generator)
    x = (x + offset) * scale
    x[:, ::5] = (x[:, ::5] * 4).round() / 4
    x[:, 1::7] = 0
    return x.flatten(1)


def decode(name: str, blocks: Tensor, columns: int) -> Tensor:
    layout = number_format(f"gguf_{name.lower()}").block
    assert layout is not None
    return layout.decode(blocks.view(len(blocks), -1, layout.bytes)).reshape(-1, columns)


def test_every_type_has_golden_blocks_and_an_oracle() -> None:
    assert set(BLOCK_TYPES) == set(GOLDEN) - {"weight"} == set(oracle.TYPES)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_are_those_that_ggml_wrote(name: str) -> None:
    weight, expected = GOLDEN["weight"], GOLDEN[name]
    if name == "IQ3_S":  # what follows a sub-block of zeros lies elsewhere in ggml: compare the other blocks
        sound = (weight.view(-1, 8, 32) != 0).any(-1).all(-1)
        assert sound.sum() > 15
        weight, expected = weight.view(-1, 256)[sound], expected.view(-1, 110)[sound]
    assert torch.equal(encode(name, weight), expected)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_are_the_oracles(name: str) -> None:
    weight = cruel(3, 512, seed=len(name))
    assert np.array_equal(encode(name, weight).numpy(), oracle.encode(name, weight.numpy()))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_torch_gives_the_native_bits(name: str) -> None:
    size = block_weights(name)
    # Not a multiple of what is encoded at once: the last lanes are empty.
    weight = torch.cat((cruel(5, 1280, seed=3).flatten(), GOLDEN["weight"].flatten()))
    blocks = weight[: len(weight) // size * size].view(-1, size)
    in_torch = gguf_blocks._encode_in_torch(name, blocks, gguf_blocks._block(name)[1])
    assert in_torch is not None and torch.equal(in_torch.flatten(), encode(name, blocks).flatten())


@pytest.mark.parametrize("name", IN_PACKAGE)
def test_blocks_are_those_of_the_gguf_package(name: str) -> None:
    for weight in (GOLDEN["weight"], cruel(9, 768, seed=5) + 0.0):  # no -0: numpy's minimum may be either
        expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
        assert np.array_equal(encode(name, weight).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_half_precision_weights_count_as_their_float32_values(name: str, dtype: torch.dtype) -> None:
    weight = cruel(3, 512, seed=7).to(dtype)
    assert torch.equal(encode(name, weight), encode(name, weight.float()))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_decoding_gives_the_weights_back(name: str) -> None:
    weight = torch.randn(8, 1024, generator=torch.Generator().manual_seed(1))
    loss = (decode(name, encode(name, weight), 1024) - weight).square().mean().sqrt()
    assert LOSS[name] / 2 < loss < LOSS[name]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_do_not_touch_each_other(name: str) -> None:
    weight = cruel(6, 768, seed=2)
    rows = [encode(name.lower(), row.unsqueeze(0)) for row in weight]
    assert torch.equal(encode(name, weight), torch.cat(rows))
    stacked = weight.view(2, 3, 768)
    assert torch.equal(encode(name, stacked).flatten(0, 1), torch.cat(rows))
    strided = torch.cat((weight, weight), 1)[:, :768]
    assert torch.equal(encode(name, strided), torch.cat(rows))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_zeros_and_tiny_weights_decode_to_zero(name: str) -> None:
    for weight in (torch.zeros(2, 512), torch.full((2, 512), 1e-20), torch.full((2, 512), -1e-44)):
        assert decode(name, encode(name, weight), 512).abs().max() < 1e-7


def test_tiny_weights_have_no_scale_that_is_nan() -> None:
    """ggml's byte of an exponent wraps around below 2^-125: to 255, which MXFP4's readers take for NaN."""
    weight = torch.tensor([2.0**-126, 1.5 * 2.0**-126, 2.0**-125, 2.0**-127, 2.0**-149]).repeat_interleave(32)
    blocks = encode("MXFP4", weight.view(5, 32))
    assert blocks[:, 0].tolist() == [0] * 5
    decoded = decode("MXFP4", blocks, 32)
    assert (decoded - weight.view(5, 32)).abs().max() <= 2.0**-128
    in_torch = gguf_blocks._encode_in_torch("MXFP4", weight.view(5, 32), gguf_blocks._block("MXFP4")[1])
    assert in_torch is not None and torch.equal(in_torch.view(5, -1), blocks)


def test_plain_floats() -> None:
    weight = torch.tensor([[1.0, -2.5, 1e-6, 3.1415927]])
    assert encode("F16", weight).view(torch.float16).tolist() == weight.half().tolist()
    assert encode("BF16", weight).view(torch.bfloat16).tolist() == weight.bfloat16().tolist()
    assert encode("BF16", weight).shape == (1, 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_nan_and_infinity_are_refused(name: str, bad: float) -> None:
    weight = torch.ones(2, 512)
    weight[1, 300] = bad
    with pytest.raises(LowbitError, match="NaN or infinite") as caught:
        encode(name, weight)
    assert caught.value.code == "E0402"
    assert gguf_blocks._encode_in_torch(name, weight.view(-1, block_weights(name)), 1) is None


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if name not in ("MXFP4", "NVFP4")])
def test_a_scale_that_float16_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(LowbitError, match="too large"):
        encode(name, torch.linspace(-1e9, 1e9, 512).unsqueeze(0))


@pytest.mark.parametrize("name", [*REFUSED, "Q9_0"])
def test_a_type_without_an_encoder_is_refused(name: str) -> None:
    for call in (lambda: encode(name, torch.ones(1, 256)), lambda: block_weights(name)):
        with pytest.raises(LowbitError, match="use one of Q4_0") as caught:
            call()
        assert caught.value.code == "E0402"


@pytest.mark.slow
@pytest.mark.parametrize("isa", native.INSTRUCTION_SETS)
def test_every_instruction_set_gives_ggmls_blocks(isa: str) -> None:
    if os.environ.get("LOWBIT_ISA") or isa == native.isa():
        pytest.skip("covered by this process")
    if not native.has(isa) or native._library_file(isa) is None:
        pytest.skip(f"no {isa} here")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "ggml_wrote or oracles", __file__]
    run = subprocess.run(command, env=os.environ | {"LOWBIT_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_codes_of_iq3_s_stay_in_place_after_a_sub_block_of_zeros() -> None:
    weight = torch.randn(1, 256, generator=torch.Generator().manual_seed(4))
    weight[:, 32:64] = 0
    decoded = decode("IQ3_S", encode("IQ3_S", weight), 256)
    assert (decoded - weight)[weight != 0].square().mean().sqrt() < 0.2
    assert decoded[:, 32:64].abs().max() < 0.2
