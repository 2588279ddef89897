"""What no tool decides: numpy oracles of our own rules, odd shapes, slices, NaN, float16's limits, ties."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.cpu_blocks import CpuBlocks
from lowbit.numerics.number_formats import number_format
from lowbit.quantize import method
from lowbit.quantize.bitsandbytes import dynamic_map
from lowbit.quantize.method import build_method
from lowbit.quantize.rounding import e8m0_scale, mx_exponent, stored_scale
from lowbit.quantize.specification import METHODS, parse_method
from oracles import quantizers as oracle
from quantize.helpers import ORIGIN, module_of, quantized
from quantize.tools import cruel

ALL = [
    name
    for name, entry in METHODS.items()
    if entry.module in ("floats", "integers", "bitsandbytes", "torchao")
]
ALL += ["hqq", "fp8:weights=tensor", "fp8:weights=block", "int4:symmetric=true", "nf4:double_quant=true"]
ALL += ["bitsandbytes:type=int8"]
BLOCKS_OF_ROWS = {"blockwise_int8": 128, "fp8:weights=block": 128}


@pytest.mark.parametrize("shape", [(16, 128), (13, 99), (1, 64), (1, 1), (300, 7)])
@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("fp8", oracle.fp8_rows),
        ("w8a8_fp8", oracle.fp8_rows),
        ("fp8:weights=tensor", oracle.fp8_tensor),
        ("w8a8_int8", oracle.int8_rows),
        ("blockwise_int8", oracle.int8_blocks),
    ],
)
def test_rules_in_numpy(text: str, rule: object, shape: tuple[int, int]) -> None:
    weight = cruel(*shape, torch.float32)
    assert callable(rule)
    np.testing.assert_array_equal(quantized(text, weight).dequantize().numpy(), rule(weight.numpy()))


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slices_change_nothing(text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight cut every few rows gives the bits of the whole; blocks of rows are never cut."""
    weight = cruel(256 if text in BLOCKS_OF_ROWS else 48, 256, dtype)
    whole = quantized(text, weight)
    monkeypatch.setattr(method, "SLICE_WEIGHTS", 1800)
    sliced = quantized(text, weight)
    assert torch.equal(whole.codes, sliced.codes)
    for ours, theirs in zip(whole.scales + whole.offsets, sliced.scales + sliced.offsets, strict=True):
        assert torch.equal(ours.float(), theirs.float())


@pytest.mark.parametrize("columns", [72, 97])
def test_flattened_blocks_are_cut_where_they_end(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = cruel(130, columns, torch.float32)
    whole = quantized("nf4:double_quant=true", weight)
    monkeypatch.setattr(method, "SLICE_WEIGHTS", 1)
    assert torch.equal(whole.dequantize(), quantized("nf4:double_quant=true", weight).dequantize())


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    text: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(32, 256)
    weight[21, 200] = value
    monkeypatch.setattr(method, "SLICE_WEIGHTS", 256 * 7)
    with pytest.raises(LowbitError, match=re.escape(f"{ORIGIN}: the weight in row 21, column 200 is ")) as it:
        build_method(parse_method(text)).quantize(weight, module_of(weight), ORIGIN)
    assert it.value.code == "E0215" and "\n" not in str(it.value)


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e-12, 1e4, 1e30])
def test_no_size_of_weights_gives_nan(text: str, size: float) -> None:
    """Zeros, subnormals, the tiniest and the largest weights: finite, and no larger than they were."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(4)).clamp(-2, 2) * size
    weight[:, :64] = 0
    if text == "bitsandbytes:type=int8" and size > 1e4:
        with pytest.raises(LowbitError, match="beyond 65504"):
            quantized(text, weight)
        return
    found = quantized(text, weight)
    again = found.dequantize()
    assert again.isfinite().all()
    # What a tool's smallest scale adds to weights near zero (HQQ's: a step of 1) stays below it.
    assert again.abs().max() <= max(3.1 * size, 1e-10)
    assert int(found.codes.max()) < 2 ** int(found.scheme.weight.bits)


@pytest.mark.parametrize("text", [name for name in ALL if name not in ("nf4", "fp4", "bitsandbytes")])
def test_one_row(text: str) -> None:
    weight = cruel(48, 256, torch.float32)[40:41]
    if text.startswith("fp8dq"):
        assert "out % 16" in str(build_method(parse_method(text)).refuses(module_of(weight)))
        return
    found = quantized(text, weight).dequantize()
    limit = 0.8 if text == "int2" else 0.45 if text == "int3" else 0.3
    assert float((found - weight).norm() / weight.norm()) < limit


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_float16_scales_at_their_limits(bits: int, symmetric: str) -> None:
    """Scales past 65504 saturate, below the smallest normal they keep what bits there are."""
    text = f"rtn:bits={bits},group_size=32,symmetric={symmetric}"
    large = torch.linspace(-3e7, 3e7, 64).reshape(2, 32)
    found = quantized(text, large)
    assert found.scales[0].max() == 65504 and found.dequantize().abs().max() <= 65504 * 256
    small = torch.linspace(-3e-6, 3e-6, 64).reshape(2, 32)
    found = quantized(text, small)
    assert (found.scales[0] > 0).all() and found.scales[0].max() < torch.finfo(torch.float16).smallest_normal
    step = 6.1e-6 / (2**bits - 1) + 2.0**-24
    assert (found.dequantize() - small).abs().max() <= step + 2.0**-25 * 2**bits


def test_a_range_keeps_zero() -> None:
    """Groups all above or all below zero: 0 is still a code, so that pruned weights stay pruned."""
    weight = torch.rand(6, 64) + 1
    weight[::2] *= -1
    weight[:, 5] = 0
    for bits in range(2, 9):
        found = quantized(f"rtn:bits={bits},group_size=64", weight).dequantize()
        assert (found[:, 5] == 0).all()


def test_mx_exponents() -> None:
    """By the bits of float32: a quarter of the mantissa below the next power of two counts as that power."""
    exact = torch.tensor([1.0, 1.75, 1.7499999, 1.999, 6.0, 7.0, 6.999999, 448.0, 2.0**-126, 2.0**-130, 0.0])
    for name, largest in (("e2m1", 2), ("e4m3", 8)):
        fmt = number_format(name)
        shifted = (exact.view(torch.int32) + (1 << 21)) >> 23
        wanted = (shifted - 127 - largest).clamp(min=-127)
        assert torch.equal(mx_exponent(exact, fmt, 1.75), wanted.int()), name
        plain = torch.floor(torch.log2(exact.double())).clamp(min=-127 + largest).int() - largest  # OCP
        assert torch.equal(mx_exponent(exact, fmt), plain), name


def test_every_power_of_two_is_exact() -> None:
    exponents = torch.arange(-127, 128)
    assert torch.equal(e8m0_scale(exponents).double(), torch.ldexp(torch.ones(255).double(), exponents))


def test_stored_scales() -> None:
    scale = torch.tensor([0.0, 1e-30, 2.0**-24, 3e-6, 1.0, 7e4, float("inf")])
    stored = stored_scale(scale, torch.float16)
    assert stored.tolist()[:3] == [0.0, 2.0**-24, 2.0**-24]
    assert stored[3] == torch.tensor(3e-6).half() and stored[4:].tolist() == [1.0, 65504.0, 65504.0]


def test_dynamic_map() -> None:
    """The 8-bit numbers of scales: sorted, one of each, 0 and 1 among them, ± the middles of its decades."""
    table = dynamic_map()
    assert len(table) == 256 == len(table.unique()) and (table.diff() > 0).all()
    assert table[-1] == 1 and 0 in table and -1 not in table
    assert torch.equal(table[table < 0].neg().flip(0), table[(table > 0) & (table < 1)])
    assert (
        table[table > 0][0].item() == pytest.approx(0.55e-6) and len(table[table.abs() >= 0.1]) == 2 * 64 + 1
    )


def test_double_quantization_costs_little() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    plain, double = (quantized(text, weight) for text in ("nf4", "nf4:double_quant=true"))
    assert torch.equal(plain.codes, double.codes)
    assert 0 < (plain.scales[0] - double.scales[0]).abs().max() < 0.02 * plain.scales[0].max()


@pytest.mark.parametrize(
    "text", ["hqq", "hqq:bits=3,group_size=32", "int4wo-64", "int4", "nf4", "mxfp4", "nvfp4"]
)
def test_weight_only_schemes_run_natively(text: str) -> None:
    scheme = build_method(parse_method(text)).scheme_of(module_of(torch.empty(64, 512)))
    assert CpuBlocks().refuses(scheme, (64, 512), torch.device("cpu")) is None


def test_hqq_forgives_outliers() -> None:
    """Its error is smaller than that of the range alone, in the norm it minimises; every group by itself."""
    weight = (
        torch.randn(64, 256, generator=torch.Generator().manual_seed(8)) * torch.logspace(-2, 0, 64)[:, None]
    )
    weight[:, ::61] *= 6
    for bits in (3, 4):
        ours = quantized(f"hqq:bits={bits}", weight).dequantize()
        plain = quantized(f"rtn:bits={bits},group_size=64", weight).dequantize()

        def norm(found: Tensor) -> Tensor:
            return (found - weight).abs().pow(0.7).mean(1)

        assert (norm(ours) < norm(plain)).float().mean() > 0.9
