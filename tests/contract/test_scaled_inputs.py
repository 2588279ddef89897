"""Inputs of small floats under a scale for each token and some columns: fp8 in blocks, MX formats, NVFP4.

The kernel makes codes and scales itself and scales sums of their products. Its result is the float64 product
of what the rule says of x, nearer than where x is dequantized and rounded to bfloat16. Run under every
instruction set by kernels/test_instruction_sets.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from contract.test_linear_kernels import CPU, ROWS_OF_X, canonical, moved, normal_form, nvfp4
from guard_page import at_guard_page, rows_at_guard_page
from lowbit.kernels import native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.cpu_blocks import CpuBlocks
from lowbit.kernels.packed_linear import INPUT_BFLOAT, INPUT_SCALED, NativeWeight
from lowbit.kernels.prompt_rows import prompt_rows, rounding
from lowbit.kernels.settled import settled
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(native.base_isa() in ("scalar", "amx"), reason="no such kernel"),
]


def rule(name: str, columns: int, scale: str = "f32", **more: object) -> ActivationScheme:
    return ActivationScheme(number_format(name), (1, columns), scale=number_format(scale), **more)  # type: ignore[arg-type]


BLOCKS_OF_128 = rule("e4m3", 128)
CASES: dict[str, tuple[Callable[[], QuantizedTensor], ActivationScheme, float | None]] = {
    "fp8 blocks": (
        lambda: canonical("e4m3", 128, "f32", block_rows=16, shape=(48, 256)),
        BLOCKS_OF_128,
        None,
    ),
    "fp8 blocks, 320 columns": (lambda: canonical("e4m3", 64, "f32", shape=(37, 320)), BLOCKS_OF_128, None),
    "fp8 row, 300 columns": (lambda: canonical("e4m3", 0, "f32", shape=(37, 300)), BLOCKS_OF_128, None),
    "e5m2": (lambda: canonical("e5m2", 32, "f32"), rule("e5m2", 32), None),
    "mxfp8": (lambda: canonical("e4m3", 32, "e8m0"), rule("e4m3", 32, "e8m0"), None),
    "mxfp6": (lambda: canonical("e2m3", 32, "e8m0"), rule("e3m2", 32, "e8m0"), None),
    "mxfp4": (lambda: canonical("e2m1", 32, "e8m0"), rule("e2m1", 32, "e8m0"), None),
    "nvfp4": (lambda: nvfp4(1), rule("e2m1", 16, "e4m3", mode="static"), 0.013),
    "e2m1, e3m2 of 16": (lambda: canonical("e2m1", 16), rule("e3m2", 16), None),
    "int8, int8 of 32": (lambda: canonical("int8", 32, shape=(37, 200)), rule("int8", 32), None),
    "int4, int8 of 64": (lambda: canonical("int4", 128), rule("int8", 64), None),
}


def built(name: str) -> tuple[QuantizedTensor, NativeWeight, InputTransform]:
    make, scheme, outer = CASES[name]
    weight = make()
    transform = InputTransform(scheme, static_scale=None if outer is None else torch.tensor(outer))
    packed = CpuBlocks().pack(weight, CPU)
    assert isinstance(packed, NativeWeight)
    assert settled(packed, transform) is None and packed.description.input == INPUT_SCALED
    return weight, packed, transform


def inputs(tokens: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator) * (torch.rand(tokens, 1, generator=generator) * 30)
    x[:, 32:64] = 0
    x[-1, 7] = 3e3
    return x


@pytest.mark.parametrize("name", CASES)
def test_the_product_is_the_rules(name: str) -> None:
    weight, packed, transform = built(name)
    exact = normal_form(weight).double()
    for tokens in ROWS_OF_X:
        x = inputs(tokens, weight.shape[1])
        seen = transform.in_torch(x)[0].double()
        found = packed.kernel.linear(x, packed, torch.full((tokens, weight.shape[0]), float("nan")))
        assert not found.isnan().any(), "poison was left"
        scale = (seen.abs() @ exact.abs().T).clamp(min=1e-30)
        assert ((found.double() - seen @ exact.T).abs() / scale).max() < 2e-6


@pytest.mark.parametrize("name", ["fp8 blocks", "nvfp4"])
def test_it_is_nearer_than_with_values_in_bfloat16(name: str) -> None:
    """Scales that are no powers of two: code times scale has more bits than bfloat16."""
    weight, packed, transform = built(name)
    x = inputs(64, weight.shape[1])
    seen = transform.in_torch(x)[0]
    wanted = seen.double() @ normal_form(weight).double().T
    found = packed.kernel.linear(x, packed)
    packed.description.input = INPUT_BFLOAT
    rounded = packed.kernel.linear(seen, packed)
    assert (found - wanted).norm() < (rounded - wanted).norm() / 100


@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_depend_on_its_company(name: str) -> None:
    _, packed, _ = built(name)
    x = inputs(130, packed.columns)
    x[64, 40] = float("nan")
    together = packed.kernel.linear(x, packed)
    assert together[64].isnan().all() and not together[63].isnan().any()
    together = together.nan_to_num()
    for row in (0, 1, 63, 64, 65, 129):
        assert torch.equal(packed.kernel.linear(x[row : row + 1], packed)[0].nan_to_num(), together[row])
    assert torch.equal(packed.kernel.linear(x[40:77], packed).nan_to_num(), together[40:77])


@pytest.mark.parametrize("name", CASES)
def test_nothing_past_the_end_is_touched(name: str) -> None:
    _, packed, _ = built(name)
    rows, columns = packed.shape
    guarded = moved(packed, {part: at_guard_page(buffer) for part, buffer in packed.buffers.items()}, rows)
    x = inputs(13, columns)
    out = rows_at_guard_page(torch.full((13, rows), 7.0), rows + 3)
    found = guarded.kernel.linear(rows_at_guard_page(x, columns + 5), guarded, out)
    assert torch.equal(found, packed.kernel.linear(x, packed))


@pytest.mark.skipif(not rounding("cpu"), reason="no kernel rounds here")
@pytest.mark.parametrize("name", CASES)
def test_prompts_round_weights_and_what_inputs_are_worth(name: str) -> None:
    """As those of inputs that are not quantized: a row in any company, a NaN in its own row alone."""
    weight, packed, transform = built(name)
    x = inputs(77, weight.shape[1])
    stored = packed.kernel.linear(x, packed)
    seen, exact = transform.in_torch(x)[0].double(), normal_form(weight).double()
    with prompt_rows(0, 77):
        found = packed.kernel.linear(x, packed)
    off = (found.double() - seen @ exact.T).norm(dim=1) / (seen.abs() @ exact.abs().T).norm(dim=1)
    assert off.max() < 6e-3 and off.median() < 1e-3 and not torch.equal(found, stored)
    for count in (1, 15, 33):
        with prompt_rows(0, count):
            assert torch.equal(packed.kernel.linear(x[:count], packed), found[:count]), count
    with prompt_rows(40, 77):
        mixed = packed.kernel.linear(x, packed)
    assert torch.equal(mixed, torch.cat((stored[:40], found[40:])))
    x[70, 3] = float("nan")
    with prompt_rows(0, 77):
        damaged = packed.kernel.linear(x, packed)
    assert damaged[70].isnan().all() and torch.equal(damaged[:70], found[:70])


def test_a_multiplier_comes_first() -> None:
    weight, packed, _ = built("fp8 blocks")
    multiplier = torch.linspace(0.5, 2, 256)
    transform = InputTransform(BLOCKS_OF_128, multiplier=multiplier)
    assert settled(packed, transform) is None
    x = inputs(5, 256)
    plain = CpuBlocks().pack(weight, CPU)
    assert settled(plain, InputTransform(BLOCKS_OF_128)) is None
    assert torch.equal(packed.kernel.linear(x, packed), plain.kernel.linear(x * multiplier, plain))


def test_what_the_kernel_leaves_to_the_rule() -> None:
    """Columns in an order of their own, offsets, groups that its tiles do not have."""
    transform = InputTransform(BLOCKS_OF_128)
    for weight in (
        canonical("e4m3", 0, "f32", order=True),
        canonical("uint4", 128, zero=True),
        replace(nvfp4(0), origin="other"),
    ):
        packed = CpuBlocks().pack(weight, CPU)
        left = InputTransform(rule("e2m1", 8)) if weight.origin == "other" else transform
        assert settled(packed, left) is left
        assert isinstance(packed, NativeWeight) and packed.description.input == INPUT_BFLOAT
