"""gpu_halves: weights that float16 arithmetic makes, and outliers (SpQR), beside their definition.

Weights are float16's own numbers and x, in bfloat16, is float16's too: products are exact but for sums.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from contract.test_linear_kernels import canonical, with_outliers
from gpu.coded_products import error, inputs, no_tokens_and_no_rows, product
from lowbit.kernels import choose
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.halves import GpuHalves
from lowbit.kernels.gpu.programs import Cut
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import Outliers
from lowbit.numerics.scheme import ActivationScheme

KERNEL = GpuHalves()
KINDS = {
    "some": lambda: with_outliers((37, 144), 0.05),
    "act-order": lambda: with_outliers((20, 208), 0.1, order=True),
    "nowhere": lambda: with_outliers((37, 80), 0.0),
    "everywhere": lambda: with_outliers((19, 80), 1.0),
    "one tile": lambda: with_outliers((5, 16), 0.3, order=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_unpack_restore_and_rows(name: str, device: torch.device) -> None:
    weight = KINDS[name]()
    assert weight.outliers is not None
    packed = KERNEL.pack(weight, device)
    order = packed.buffers.get("column_order")
    held = packed.nbytes - (0 if order is None else order.nbytes)
    assert held == KERNEL.nbytes(weight.scheme, weight.shape)
    again = KERNEL.unpack(KERNEL.restore(packed.scheme, packed.shape, dict(packed.buffers), "test"))
    assert again.scheme == weight.scheme and torch.equal(again.codes.cpu(), weight.codes)
    assert again.outliers is not None and torch.equal(again.outliers.entries.cpu(), weight.outliers.entries)
    ids = torch.tensor([0, weight.shape[0] - 1, 3, 3], dtype=torch.int32, device=device)
    assert torch.equal(KERNEL.rows(packed, ids).cpu(), weight.dequantize()[ids.cpu().long()])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_a_few_tokens(name: str, tokens: int, device: torch.device) -> None:
    weight = KINDS[name]()
    assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < 1e-6


@pytest.mark.parametrize("tokens", [17, 130])
def test_more_tokens(tokens: int, device: torch.device) -> None:
    assert error(KERNEL, KINDS["act-order"](), inputs(tokens, 208), device) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 130])
@pytest.mark.parametrize("name", KINDS)
def test_any_number_of_tokens(name: str, tokens: int, device: torch.device) -> None:
    weight = KINDS[name]()
    assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_of_x(dtype: torch.dtype, device: torch.device) -> None:
    weight = KINDS["act-order"]()
    assert error(KERNEL, weight, inputs(2, 208, dtype), device) < 2**-12
    assert KERNEL.linear(inputs(2, 208, dtype).to(device), KERNEL.pack(weight, device)).dtype is dtype


@pytest.mark.parametrize(("tokens", "height"), [(1, 64), (1, 16), (3, 32)])
def test_heights_and_splits(
    tokens: int, height: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.gpu_kernel.cut", lambda *_: Cut(height, 2, 2))
    for name in ("act-order", "some"):
        weight = KINDS[name]()
        assert error(KERNEL, weight, inputs(tokens, weight.shape[1]), device) < 1e-6


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_no_code_is_nothing(tokens: int, device: torch.device) -> None:
    """Behind the last column codes are 0, which less this zero point and times its scale is infinite."""
    weight = with_outliers((5, 80), 0.1)
    assert weight.zeros is not None
    weight.codes[:, 64:] = 7
    weight.zeros[:, 4], weight.scales[0][:, 4] = 7.0, 60000.0
    assert error(KERNEL, weight, inputs(tokens, 80), device) < 1e-6


@pytest.mark.parametrize("tokens", [1, 3])
def test_sums_with_outliers_are_rounded(tokens: int, device: torch.device) -> None:
    """One outlier a row, and nothing else that counts: without the last rounding it would be 2^-12 off."""
    weight = with_outliers((30, 16), 0.0)
    rows = torch.arange(30)
    values = (torch.linspace(1, 2, 30) + 2**-9).half()
    scheme = replace(weight.scheme, outlier_share=1 / 16)
    weight = replace(weight, scheme=scheme, outliers=Outliers.of(rows, rows % 16, values, 30))
    x = torch.zeros(tokens, 16)
    x[:, 0] = 1
    found = product(KERNEL, weight, x.bfloat16(), device)
    assert torch.equal(found, weight.dequantize()[:, 0].double().expand(tokens, -1))


def test_no_tokens_and_no_rows(device: torch.device) -> None:
    no_tokens_and_no_rows(KERNEL, KINDS["some"](), device)


def test_refusals_and_damage(device: torch.device) -> None:
    weight = KINDS["act-order"]()
    scheme, shape = weight.scheme, weight.shape
    assert choose(scheme, shape, device).kernel.name == "gpu_halves"
    assert KERNEL.refuses(canonical("int4", 32).scheme, (37, 256), device) == "no weight has an outlier"
    wide = replace(scheme, blocks=((1, 32),))
    assert "scales and zero points of 16 columns" in str(KERNEL.refuses(wide, shape, device))
    assert "3-bit codes" in str(KERNEL.refuses(replace(scheme, weight=number_format("uint4")), shape, device))
    assert "65552 columns" in str(KERNEL.refuses(scheme, (16, 65552), device))
    quantized = replace(scheme, activation=ActivationScheme(number_format("int8"), (1, 0)))
    assert "quantizes its input" in str(KERNEL.refuses(quantized, shape, device))
    packed = KERNEL.pack(weight, device)

    def damaged(name: str, buffer: torch.Tensor, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            KERNEL.restore(scheme, shape, packed.buffers | {name: buffer}, "test")

    for name in ("outliers", "outlier_starts", "outlier_rests"):
        damaged(name, packed.buffers[name][:-1], rf"^test: no {name} of torch")
    for name in ("plane2", "plane1", "scale0", "zeros"):
        damaged(name, packed.buffers[name][:-1], rf"^test: {name} has \d+ numbers instead of")
    falling = packed.buffers["outlier_starts"].clone()
    falling[1] = falling[-1] + 1
    damaged("outlier_starts", falling, "no outliers of 20 rows")
    damaged("outliers", packed.buffers["outliers"] | 208, "an outlier outside 20 x 208")
    damaged("column_order", torch.full((208,), 208, device=device), "no order of 208 columns")
    runtime._state["interpreting"] = False
    if device.type == "cpu":
        assert KERNEL.refuses(scheme, shape, device) == "needs an NVIDIA GPU, got cpu"
